import asyncio
import dataclasses
import gc
import itertools
import logging
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sdxl_worker.adapters.lora import Lora, read_lora
from sdxl_worker.adapters.patching import Patches, patches_of
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.speed.quantize import quantize
from tests.adapters.lora_files import (
    FIELD,
    Tensors,
    adapter_file,
    apply,
    changed_weights,
    lora_of,
    low_rank,
    weights,
)
from tests.adapters.test_module_names import lora_modules
from tests.support import fresh_models

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TO_Q, TO_K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"
CONVOLUTION = "up_blocks.0.resnets.1.conv1"
LAYER_2 = "text_model.encoder.layers.1.mlp.fc1"


def lora_tensors(models: Models, *names: str, network: str = "unet") -> dict[str, torch.Tensor]:
    return {
        f"{network}.{name}.{part}": tensor
        for name in names
        for part, tensor in low_rank(getattr(models, network).get_submodule(name).weight).items()
    }


def everywhere(models: Models) -> dict[str, torch.Tensor]:
    """For each linear and convolution of all three networks."""
    return {
        key: tensor
        for network in ("unet", "text_encoder", "text_encoder_2")
        for key, tensor in lora_tensors(
            models, *lora_modules(getattr(models, network)), network=network
        ).items()
    }


def test_another_list_gives_what_it_would_give_alone(models: Models, tmp_path: Path) -> None:
    before = weights(models)
    first = lora_of(tmp_path, models, lora_tensors(models, TO_Q, TO_K), name="a")
    second = lora_of(tmp_path, models, lora_tensors(models, TO_K, CONVOLUTION), 0.3, name="b")
    apply(models, second)
    alone = weights(models)
    apply(models, first)
    assert changed_weights(models, before).keys() == {f"unet.{TO_Q}.weight", f"unet.{TO_K}.weight"}
    apply(models, second)
    assert changed_weights(models, alone) == {}


def test_originals_are_kept_of_what_is_changed_and_only_as_long(
    models: Models, tmp_path: Path
) -> None:
    patches = patches_of(models)
    size = {name: models.unet.get_submodule(name).weight.nbytes for name in (TO_Q, TO_K)}
    both = lora_of(tmp_path, models, lora_tensors(models, TO_Q, TO_K), name="a")
    one = lora_of(tmp_path, models, lora_tensors(models, TO_K), name="b")
    patches.apply([both])
    assert patches.originals_bytes == sum(size.values())
    patches.apply([one])
    assert patches.originals_bytes == size[TO_K]
    patches.restore()
    assert patches.originals_bytes == 0


def test_the_same_list_is_no_work(models: Models, tmp_path: Path) -> None:
    patches = patches_of(models)
    tensors = lora_tensors(models, TO_Q)
    patches.apply([lora_of(tmp_path, models, tensors, 0.5)])
    weight = models.unet.get_submodule(TO_Q).weight
    version, key = weight._version, patches.key
    patches.apply([lora_of(tmp_path, models, tensors, 0.5)])
    assert (weight._version, patches.key) == (version, key)
    patches.apply([lora_of(tmp_path, models, tensors, 0.6)])
    assert weight._version != version
    assert patches.key != key


def test_the_order_and_each_repetition_count(models: Models, tmp_path: Path) -> None:
    patches = patches_of(models)
    a = lora_of(tmp_path, models, lora_tensors(models, TO_Q), name="a")
    b = lora_of(tmp_path, models, lora_tensors(models, TO_Q), 0.5, name="b")
    keys = []
    for loras in ([a], [a, a], [a, b], [b, a]):
        patches.apply(loras)
        keys.append(patches.key)
    assert len(set(keys)) == len(keys)
    weight = models.unet.get_submodule(TO_Q).weight.detach().clone()
    patches.apply([a, a])
    assert not torch.equal(weight, models.unet.get_submodule(TO_Q).weight)


def test_at_scale_0_a_lora_is_left_out(models: Models, tmp_path: Path) -> None:
    patches = patches_of(models)
    patches.apply([lora_of(tmp_path, models, everywhere(models), 0)])
    assert (patches.key, patches.originals_bytes) == ((), 0)


def failing_at(number: int, error: BaseException) -> Callable[[], None]:
    calls = itertools.count(1)

    def check() -> None:
        if next(calls) == number:
            raise error

    return check


# Two more originals, then three weights.
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("error", [asyncio.CancelledError(), torch.OutOfMemoryError("full")])
def test_after_a_failure_in_the_middle_all_is_as_it_was_loaded(
    number: int, error: BaseException, models: Models, tmp_path: Path
) -> None:
    patches, before = patches_of(models), weights(models)
    patches.apply([lora_of(tmp_path, models, lora_tensors(models, TO_Q, TO_K), name="a")])
    other = lora_of(
        tmp_path, models, lora_tensors(models, TO_K, CONVOLUTION, f"{BLOCK}.ff.net.2"), name="b"
    )
    with pytest.raises(type(error)):
        patches.apply([other], failing_at(number, error))
    assert changed_weights(models, before) == {}
    assert (patches.key, patches.originals_bytes, patches.lost) == ((), 0, 0)
    patches.apply([other])
    assert len(changed_weights(models, before)) == 3


def test_a_file_may_be_removed_before_it_is_used(models: Models, tmp_path: Path) -> None:
    before = weights(models)
    lora = lora_of(tmp_path, models, lora_tensors(models, TO_Q))
    (tmp_path / "style.safetensors").unlink()
    apply(models, lora)
    assert changed_weights(models, before)


def test_a_file_that_was_cut_off_since_is_refused(models: Models, tmp_path: Path) -> None:
    before = weights(models)
    lora = lora_of(tmp_path, models, lora_tensors(models, TO_Q, TO_K, CONVOLUTION))
    with (tmp_path / "style.safetensors").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(RequestError, match=r"^loras\[0\]\.path: style\.safetensors could not be"):
        apply(models, lora)
    assert changed_weights(models, before) == {}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_up.weight", "dora_scale"])
def test_numbers_that_are_not_finite_are_refused_by_their_key(
    part: str, number: float, models: Models, tmp_path: Path
) -> None:
    before = weights(models)
    tensors = lora_tensors(models, TO_Q, TO_K)
    tensors[f"unet.{TO_K}.dora_scale"] = torch.ones(80, 1)
    tensors[f"unet.{TO_K}.{part}"][3] = number
    with pytest.raises(RequestError, match=rf"not finite, in unet\.{TO_K}\.{part}; use a file"):
        apply(models, lora_of(tmp_path, models, tensors))
    assert changed_weights(models, before) == {}


def test_weights_that_would_overflow_are_refused(tmp_path: Path) -> None:
    half = fresh_models(dtype=torch.float16)
    before = weights(half)
    tensors = {f"unet.{TO_Q}.diff": torch.full((80, 80), 40_000.0)}
    with pytest.raises(RequestError, match=rf"numbers of {TO_Q}\.weight are too large.*smaller"):
        apply(half, lora_of(tmp_path, half, tensors, 2))
    assert changed_weights(half, before) == {}
    apply(half, lora_of(tmp_path, half, tensors, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_rounding_loses_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    half = fresh_models(dtype=dtype)
    before = weights(half)
    tensors = lora_tensors(half, TO_Q, CONVOLUTION)
    apply(half, lora_of(tmp_path, half, tensors))
    errors, differences = [], []
    for name in (TO_Q, CONVOLUTION):
        up, down = (
            tensors[f"unet.{name}.lora_{part}.weight"].flatten(1) for part in ("up", "down")
        )
        weight = half.unet.get_submodule(name).weight.detach()
        difference = (up.double() @ down.double() / 2).view(weight.shape)
        exact = before[f"unet.{name}.weight"].double() + difference
        errors.append((weight.double() - exact).flatten())
        differences.append(difference.flatten())
    expected = float(torch.cat(errors).norm() / torch.cat(differences).norm())
    assert patches_of(half).lost == pytest.approx(expected, rel=1e-3)
    assert expected > (0.01 if dtype is torch.bfloat16 else 0.0001)


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    """In their memory and its order: CUDA graphs and compiled code read them there."""
    own = fresh_models()
    own.unet.to(memory_format=torch.channels_last)
    weight = own.unet.get_submodule(CONVOLUTION).weight

    def place() -> Any:
        return weight.data_ptr(), weight.stride()

    at_first, before = place(), weights(own)
    apply(own, lora_of(tmp_path, own, everywhere(own)))
    assert place() == at_first
    assert len(changed_weights(own, before)) > 150
    patches_of(own).restore()
    assert place() == at_first
    assert changed_weights(own, before) == {}


def test_compiled_code_goes_on_with_the_new_weights(tmp_path: Path, models: Models) -> None:
    block = models.unet.get_submodule(BLOCK)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block.forward, backend=counter, fullgraph=True)
    inputs = torch.randn(1, 16, 80), None, torch.randn(1, 77, 112)
    with torch.no_grad():
        plain = compiled(*inputs)
        patches_of(models).apply(
            [lora_of(tmp_path, models, lora_tensors(models, TO_Q, TO_K, f"{BLOCK}.ff.net.2"))]
        )
        torch.testing.assert_close(compiled(*inputs), block(*inputs))
        assert not torch.allclose(compiled(*inputs), plain, atol=1e-3)
        patches_of(models).restore()
        assert torch.equal(compiled(*inputs), plain)
    assert counter.frame_count == 1


def test_networks_may_move_while_they_are_changed(tmp_path: Path) -> None:
    """As offloading moves them: each weight gets other memory."""
    own = fresh_models()
    before = weights(own)

    def move() -> None:
        for network in (own.unet, own.text_encoder, own.text_encoder_2):
            for parameter in network.parameters():
                parameter.data = parameter.data.clone()

    patches = patches_of(own)
    patches.apply([lora_of(tmp_path, own, everywhere(own), name="a")])
    move()
    patches.apply([lora_of(tmp_path, own, lora_tensors(own, TO_Q), name="b")])
    move()
    assert changed_weights(own, before).keys() == {f"unet.{TO_Q}.weight"}
    patches.restore()
    assert changed_weights(own, before) == {}


def test_the_refiners_prompt_is_encoded_without_it(models: Models, tmp_path: Path) -> None:
    before, patches = weights(models), patches_of(models)
    patches.apply([lora_of(tmp_path, models, lora_tensors(models, TO_Q))])
    assert not patches.touches_text_encoders
    patches.apply([lora_of(tmp_path, models, everywhere(models))])
    assert patches.touches_text_encoders
    patched = weights(models)
    with patches.text_encoders_unpatched():
        inside = weights(models)
    assert changed_weights(models, patched) == {}
    of_unet = {name for name in before if name.startswith("unet.")}
    assert {name for name in before if torch.equal(before[name], inside[name])} >= (
        before.keys() - of_unet
    )
    assert all(torch.equal(patched[name], inside[name]) for name in of_unet)
    with pytest.raises(asyncio.CancelledError), patches.text_encoders_unpatched():
        raise asyncio.CancelledError
    assert changed_weights(models, patched) == {}


def test_there_are_patches_for_each_model_whatever_is_added_to_it(models: Models) -> None:
    with_other = dataclasses.replace(models, refiner_unet=None)
    assert patches_of(with_other) is patches_of(models)
    assert patches_of(fresh_models()) is not patches_of(models)


def test_they_go_with_their_model(tmp_path: Path) -> None:
    own = fresh_models()
    apply(own, lora_of(tmp_path, own, lora_tensors(own, TO_Q)))
    gone = weakref.ref(own.unet), weakref.ref(patches_of(own))
    del own
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize(("resident", "room"), [(True, True), (True, False), (False, True)])
def test_originals_stay_beside_the_weights_if_there_is_room(
    resident: bool, room: bool, models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fits(size: int, free: int) -> bool:
        asked.append((size, free))
        return room

    placement = dataclasses.replace(models.placement, resident=resident)
    patches = Patches(
        dataclasses.replace(models, placement=placement), fits=fits, free_bytes=lambda _: 5
    )
    with caplog.at_level(logging.INFO, "sdxl_worker.adapters.patching"):
        patches.apply([lora_of(tmp_path, models, lora_tensors(models, TO_Q))])
    size = models.unet.get_submodule(TO_Q).weight.nbytes
    patches.restore()
    assert asked == ([(size, 5)] if resident else [])
    assert f"on {'cpu' if resident and room else 'the host'}" in caplog.text


def test_weights_in_8_bits_are_refused_by_name(tmp_path: Path) -> None:
    own = fresh_models()
    tensors = lora_tensors(own, TO_Q)
    quantize(own.unet, "int8")
    with pytest.raises(RequestError, match=r"^loras\[0\]\.path: style.* in 8 bits \(QUANTIZE\)"):
        lora_of(tmp_path, own, tensors)
    # What is not quantized can still be changed.
    apply(own, lora_of(tmp_path, own, lora_tensors(own, TO_K)))


def random_files(models: Models, folder: Path, count: int) -> list[Any]:
    """Of all kinds, over parts of the networks that overlap."""
    choose = random.Random(0)  # noqa: S311  not for secrets
    names = {
        network: list(lora_modules(getattr(models, network)))
        for network in ("unet", "text_encoder", "text_encoder_2")
    }
    files = []
    for i in range(count):
        tensors: dict[str, torch.Tensor] = {}
        for network, modules in names.items():
            for name in choose.sample(modules, len(modules) // 3):
                weight = getattr(models, network).get_submodule(name).weight.detach()
                tensors |= {
                    f"{network}.{name}.{part}": tensor
                    for part, tensor in random_parts(choose.randrange(6), weight).items()
                }
        if i % 4 == 3:
            key = choose.choice([key for key in tensors if tensors[key].ndim > 1])
            tensors[key].flatten()[0] = float("nan")
        files.append(adapter_file(folder / f"{i}.safetensors", tensors))
    return files


def random_parts(kind: int, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape[0], weight[0].numel()
    lora = low_rank(weight, 3)
    if kind == 0:
        return lora
    if kind == 1:
        lengths = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        return {**lora, "dora_scale": lengths * 1.2}
    if kind == 2:
        return {
            f"hada_w{i}_{side}": torch.randn(*size) * 0.1
            for i in (1, 2)
            for side, size in (("a", (rows, 2)), ("b", (2, columns)))
        }
    if kind == 3:
        return {
            "lokr_w1": torch.randn(2, 1) * 0.1,
            "lokr_w2": torch.randn(rows // 2, *weight.shape[1:]),
        }
    if kind == 4:
        return {"diff": torch.randn_like(weight) * 0.1}
    return {"weight": torch.randn(rows) * 0.1, "on_input": torch.tensor(0)}


def test_after_200_changing_lists_with_failures_all_is_as_it_was_loaded(
    models: Models, tmp_path: Path
) -> None:
    before, patches = weights(models), patches_of(models)
    files = random_files(models, tmp_path, 12)
    choose = random.Random(1)  # noqa: S311  not for secrets
    outcomes, memory = [], []
    for i in range(200):
        loras: list[Lora] = []
        for file in choose.sample(files, choose.randrange(4)):
            scale = choose.choice([-5, -0.5, 0, 0.3, 1.0, 2.5])
            loras.append(read_lora(file, scale, FIELD, models))
        check = failing_at(choose.randrange(1, 400), asyncio.CancelledError())
        try:
            patches.apply(loras, check if choose.random() < 0.3 else lambda: None)
            outcomes.append("on")
        except (RequestError, asyncio.CancelledError) as error:
            outcomes.append(type(error).__name__)
            assert changed_weights(models, before) == {}
        if choose.random() < 0.2:
            with patches.text_encoders_unpatched():
                pass
        if choose.random() < 0.1:
            patches.restore()
            assert changed_weights(models, before) == {}
        if i >= 50:
            memory.append(psutil.Process().memory_info().rss)
    patches.restore()
    assert changed_weights(models, before) == {}
    assert min(outcomes.count(it) for it in ("on", "RequestError", "CancelledError")) > 10
    early, late = max(memory[:75]), max(memory[75:])
    assert late - early < 5e6


def test_nothing_is_changed_under_the_hands_of_whoever_draws(
    models: Models, tmp_path: Path
) -> None:
    patches = patches_of(models)
    first = lora_of(tmp_path, models, lora_tensors(models, TO_Q), name="a")
    apply(models, first)
    on = weights(models)
    with patches.in_use():
        with pytest.raises(RuntimeError, match="somebody draws"):
            apply(models)
        assert changed_weights(models, on) == {}


def test_a_failure_is_forgotten_once_the_weights_are_put_back(
    models: Models, tmp_path: Path
) -> None:
    patches = patches_of(models)
    first = lora_of(tmp_path, models, lora_tensors(models, TO_Q), name="a")
    apply(models, first)
    with pytest.raises(ValueError, match="odd"), patches.in_use():
        raise ValueError("odd")
    assert patches.key == ()
    apply(models, first)
    with patches.in_use():
        pass
    assert patches.key == ((first.sha256, 1.0),), "it stays for the next job"
