"""Each format against the library that it comes from: its own modules, with random numbers, are
saved by its own names, and its own forward pass is compared with one of the changed weights.

Not its `get_diff_weight`, which for LoHa and LoKr multiplies by alpha / rank twice. DyLoRA cannot
be compared: its forward pass takes ranks at random. It is saved as a LoRA.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

from sdxl_worker.adapters.lora_formats import WEIGHT_FORMATS
from sdxl_worker.loading.models import Models
from tests.adapters.lora_files import apply, changed_weights, lora_of, low_rank, weights
from tests.support import fresh_models

# Of all sizes that there are; the last two are convolutions, one in steps of two pixels.
LINEARS = {
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "80 x 112",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": "512 x 64, with a bias",
}
CONVOLUTIONS = {
    "up_blocks.0.resnets.1.conv1": "80 x 144 x 3 x 3",
    "down_blocks.0.downsamplers.0.conv": "48 x 48 x 3 x 3, in steps of two pixels",
    "conv_in": "48 x 4 x 3 x 3",
}
ONE_PIXEL = {"down_blocks.1.resnets.0.conv_shortcut": "64 x 48 x 1 x 1"}
NORMS = {
    "up_blocks.0.attentions.1.transformer_blocks.0.norm2": "layer",
    "up_blocks.0.resnets.1.norm1": "group",
}
ALL = LINEARS | CONVOLUTIONS | ONE_PIXEL

Make = Callable[[torch.nn.Module], Any]
FORMATS: dict[str, tuple[Make, dict[str, str]]] = {
    "LoRA": (lambda m: LoConModule("x", m, lora_dim=4, alpha=1.5), ALL),
    "alpha is the rank": (lambda m: LoConModule("x", m, lora_dim=4, alpha=4), ALL),
    "rsLoRA": (lambda m: LoConModule("x", m, lora_dim=4, alpha=2, rs_lora=True), ALL),
    "Tucker": (lambda m: LoConModule("x", m, lora_dim=4, alpha=3, use_tucker=True), CONVOLUTIONS),
    "LoHa": (lambda m: LohaModule("x", m, lora_dim=3, alpha=1.5), ALL),
    "Tucker LoHa": (
        lambda m: LohaModule("x", m, lora_dim=3, alpha=2, use_tucker=True),
        CONVOLUTIONS,
    ),
    "LoKr, first whole": (lambda m: LokrModule("x", m, lora_dim=2, alpha=1, factor=4), ALL),
    "LoKr, both in two": (
        lambda m: LokrModule("x", m, lora_dim=1, alpha=2, decompose_both=True, factor=8),
        ALL,
    ),
    "LoKr, second whole": (
        lambda m: LokrModule("x", m, lora_dim=7, alpha=3, decompose_both=True, factor=2),
        LINEARS | CONVOLUTIONS,
    ),
    "LoKr, first in two": (
        lambda m: LokrModule(
            "x",
            m,
            lora_dim=16,
            alpha=3,
            decompose_both=True,
            factor=2,
            unbalanced_factorization=True,
        ),
        LINEARS,
    ),
    "LoKr, both whole": (lambda m: LokrModule("x", m, alpha=3, full_matrix=True), ALL),
    "LoKr, turned": (
        lambda m: LokrModule("x", m, lora_dim=2, factor=4, unbalanced_factorization=True),
        LINEARS | CONVOLUTIONS,
    ),
    "Tucker LoKr": (
        lambda m: LokrModule("x", m, lora_dim=1, alpha=2, factor=2, use_tucker=True),
        CONVOLUTIONS,
    ),
    "Tucker LoKr, both in two": (
        lambda m: LokrModule(
            "x", m, lora_dim=1, alpha=2, decompose_both=True, factor=8, use_tucker=True
        ),
        CONVOLUTIONS,
    ),
    "full": (lambda m: FullModule("x", m), ALL),
    "norm": (lambda m: NormModule("x", m), NORMS),
    "IA3": (lambda m: IA3Module("x", m), ALL),
    "IA3 on inputs": (lambda m: IA3Module("x", m, train_on_input=True), ALL),
}
DORA: dict[str, Make] = {
    "DoRA": lambda m: LoConModule("x", m, lora_dim=4, alpha=2, weight_decompose=True),
    "DoRA of inputs": lambda m: LoConModule(
        "x", m, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False
    ),
    "Tucker DoRA": lambda m: LoConModule(
        "x", m, lora_dim=4, alpha=2, weight_decompose=True, use_tucker=True
    ),
    "DoRA of LoHa": lambda m: LohaModule("x", m, lora_dim=3, weight_decompose=True),
    "DoRA of LoKr": lambda m: LokrModule(
        "x", m, lora_dim=2, factor=4, weight_decompose=True, wd_on_out=False
    ),
}
SQUARE = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"


def reference(module: torch.nn.Module, make: Make, scale: float) -> tuple[Any, dict[str, Any]]:
    """A copy of the module in LyCORIS' wrapper, with random numbers, and what LyCORIS saves."""
    own = copy.deepcopy(module).requires_grad_(False)
    wrapper = make(own)
    wrapper.multiplier = scale
    wrapper.apply_to()
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            noise = torch.randn_like(parameter) * 0.3
            if name == "dora_scale":
                parameter.mul_(1 + noise)
            elif isinstance(wrapper, FullModule):
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise)
    return own, {key: tensor.detach().clone() for key, tensor in wrapper.state_dict().items()}


def inputs_of(module: Any) -> torch.Tensor:
    if isinstance(module, torch.nn.Linear):
        return torch.randn(300, module.in_features)
    if isinstance(module, torch.nn.LayerNorm):
        return torch.randn(300, *module.normalized_shape)
    channels = module.in_channels if isinstance(module, torch.nn.Conv2d) else module.num_channels
    return torch.randn(2, channels, 12, 12)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    """Within what fp32 rounds, by the size of the difference that is meant."""
    meant = (theirs - plain).norm()
    assert meant > 0.01 * plain.norm(), "the comparison would show nothing"
    assert (ours - theirs).norm() < 1e-5 * (meant + plain.norm())


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, names) in FORMATS.items() for name in names]
)
@torch.no_grad()
def test_a_format_is_what_lycoris_makes_of_it(
    kind: str, name: str, scale: float, models: Models, tmp_path: Path
) -> None:
    module = models.unet.get_submodule(name)
    theirs, saved = reference(module, FORMATS[kind][0], scale)
    inputs = inputs_of(module)
    plain = module(inputs)
    prefix = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{prefix}.{key}": tensor for key, tensor in saved.items()}
    apply(models, lora_of(tmp_path, models, tensors, scale))
    assert_equal(module(inputs), theirs(inputs), plain)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("name", [*LINEARS, SQUARE, "up_blocks.0.resnets.1.conv1", *ONE_PIXEL])
@pytest.mark.parametrize("kind", DORA)
@torch.no_grad()
def test_dora_is_lycoris_at_its_full_scale_and_between_at_others(
    kind: str, name: str, scale: float, models: Models, tmp_path: Path
) -> None:
    module = models.unet.get_submodule(name)
    theirs, saved = reference(module, DORA[kind], 1.0)
    inputs = inputs_of(module)
    plain, whole = module(inputs), theirs(inputs)
    prefix = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{prefix}.{key}": tensor for key, tensor in saved.items()}
    apply(models, lora_of(tmp_path, models, tensors, scale))
    assert_equal(module(inputs), plain + scale * (whole - plain), plain)


@torch.no_grad()
def test_files_are_applied_in_order_each_on_what_the_ones_before_left(
    models: Models, tmp_path: Path
) -> None:
    """DoRA is not additive, so it tells the order."""
    module = models.unet.get_submodule(SQUARE)
    prefix = f"lora_unet_{SQUARE.replace('.', '_')}"
    plain = module.weight.clone()
    _, dora = reference(module, DORA["DoRA"], 1.0)
    lora = low_rank(module.weight)
    first = lora_of(tmp_path, models, {f"{prefix}.{k}": v for k, v in dora.items()}, name="a")
    second = lora_of(tmp_path, models, {f"{prefix}.{k}": v for k, v in lora.items()}, name="b")

    def rescaled(weight: torch.Tensor) -> torch.Tensor:
        weight = weight + 0.5 * dora["lora_up.weight"] @ dora["lora_down.weight"]
        return weight * (dora["dora_scale"] / weight.norm(dim=1, keepdim=True))

    def added(weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.5 * lora["lora_up.weight"] @ lora["lora_down.weight"]

    apply(models, first, second)
    torch.testing.assert_close(module.weight.data, added(rescaled(plain)), rtol=1e-5, atol=1e-5)
    apply(models, second, first)
    torch.testing.assert_close(module.weight.data, rescaled(added(plain)), rtol=1e-5, atol=1e-5)
    assert (added(rescaled(plain)) - rescaled(added(plain))).abs().max() > 1e-2


def test_all_differences_are_added_before_the_one_rounding(tmp_path: Path) -> None:
    """Each of eight is too small to change a weight in half precision; together they change all."""
    half = fresh_models(dtype=torch.float16)
    weight = half.unet.get_submodule(SQUARE).weight
    step = weight.detach().float().abs() * 2**-12  # half of the half that would round up
    loras = [
        lora_of(tmp_path, half, {f"unet.{SQUARE}.diff": step}, name=f"{i}.safetensors")
        for i in range(8)
    ]
    before = weights(half)
    apply(half, *loras)
    exact = before[f"unet.{SQUARE}.weight"].float() + 8 * step
    assert torch.equal(weight, exact.half())
    assert list(changed_weights(half, before)) == [f"unet.{SQUARE}.weight"]


@torch.no_grad()
def test_a_bias_is_changed_beside_the_weight(models: Models, tmp_path: Path) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    module = models.unet.get_submodule(name)
    before = module.bias.clone()
    difference = torch.randn_like(module.bias)
    parts = {**low_rank(module.weight), "diff_b": difference}
    tensors = {f"unet.{name}.{part}": tensor for part, tensor in parts.items()}
    apply(models, lora_of(tmp_path, models, tensors, 0.5))
    torch.testing.assert_close(module.bias.data, before + 0.5 * difference)


def test_every_format_is_compared(models: Models) -> None:
    compared = set()
    for make, names in FORMATS.values():
        for name in names:
            _, saved = reference(models.unet.get_submodule(name), make, 1.0)
            parts = {key.removesuffix(".weight") for key in saved if key != "alpha"}
            if "on_input" in parts:
                parts = {"ia3_in" if saved["on_input"] else "ia3_out"}
            compared.add(frozenset(parts - {"diff_b", "b_norm"}))
    assert compared == WEIGHT_FORMATS.keys()
