"""Where not all networks fit: each comes for its pass, and no other is there meanwhile."""

import dataclasses
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker.adapters.of_request import NO_ADAPTERS, read_adapters
from sdxl_worker.drawing.encoding import encode_canvas
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.offload import send_home
from sdxl_worker.placement import Placement
from sdxl_worker.request import Request, parse_request
from sdxl_worker.serving.model_memory import ModelMemory
from tests.adapters.lora_files import saved
from tests.own_files import write_lora
from tests.support import (
    REQUESTS,
    canvas_of,
    difference,
    draw,
    fresh_models,
    largest_difference,
    load,
    models,
    noise_picture,
    weights_being_read,
)

# Here from the host to the host: what is seen is that it is a copy.
DEVICE = torch.device("cpu", 0)


class Places:
    """Where each network is, and which were on the device in each pass."""

    def __init__(self, offloaded: Models) -> None:
        self._networks = offloaded.networks()
        self._home = {name: address(network) for name, network in self._networks.items()}
        self.passes: list[tuple[str, list[str]]] = []
        for name, network in self._networks.items():
            # A VAE's own `forward` is not what pipelines call.
            inside: Any = network.decoder if name == "vae" else network
            inside.register_forward_hook(functools.partial(self._note, name))

    def on_device(self) -> list[str]:
        return [name for name, one in self._networks.items() if address(one) != self._home[name]]

    def _note(self, name: str, *_: Any) -> None:
        self.passes.append((name, self.on_device()))


def address(network: torch.nn.Module) -> int:
    return next(network.parameters()).data_ptr()


@pytest.fixture
def offloaded() -> Models:
    placement = Placement(DEVICE, torch.float32, resident=False)
    return load(dataclasses.replace(weights_being_read(), placement=placement))


@pytest.fixture
def places(offloaded: Models) -> Places:
    return Places(offloaded)


@pytest.mark.parametrize("mode", REQUESTS)
def test_offloaded_networks_draw_the_same_job_after_job(
    mode: str, offloaded: Models, places: Places
) -> None:
    """And each is on the device for its pass, alone."""
    request = parse_request(REQUESTS[mode])
    drawing = {"unet", "vae"} | ({"refiner_unet"} if mode != "base" else set())
    # The second time, the texts' encodings are still there.
    for expected in (drawing | {"text_encoder", "text_encoder_2"}, drawing):
        places.passes.clear()
        [picture] = draw(request, offloaded)
        assert largest_difference(picture, draw(request, models())[0]) == 0
        assert {name for name, _ in places.passes} == expected
        assert [(name, [name]) for name, _ in places.passes] == places.passes


def test_a_unet_leaves_before_the_decoder_comes_also_after_the_refiner_s_turn(
    offloaded: Models, places: Places
) -> None:
    """Jobs with and without the refiner share the decoder, and follow one another in any order."""
    draw(parse_request(REQUESTS["refined"]), offloaded)
    places.passes.clear()
    draw(parse_request(REQUESTS["base"]), offloaded)
    assert [on_device for name, on_device in places.passes if name == "vae"] == [["vae"]]
    assert set(places.on_device()) == {"vae"}


def test_networks_that_fit_are_left_where_they_are() -> None:
    resident = fresh_models()
    places = Places(resident)
    draw(parse_request(REQUESTS["refined"]), resident)
    assert places.passes
    assert not any(on_device for _, on_device in places.passes)
    assert not any(hasattr(network, "_hf_hook") for network in resident.networks().values())


def test_a_picture_is_encoded_where_the_networks_work_wherever_they_are_before() -> None:
    """A network that waits for its turn is on the host; only its hook brings it to the GPU."""
    made = fresh_models()
    seen: list[torch.Tensor] = []

    def encode(image: torch.Tensor) -> None:
        seen.append(image)
        raise StopAsyncIteration

    made.vae.encode = encode
    canvas = canvas_of(noise_picture(64, 64))
    with pytest.raises(StopAsyncIteration):
        encode_canvas(canvas, (64, 64), made.vae, torch.device("meta"), sees_mask=False)
    assert seen[0].is_meta
    assert made.vae.device.type == "cpu"


def test_loras_go_where_the_networks_go_and_come_off_bit_for_bit(
    offloaded: Models, tmp_path: Path
) -> None:
    """They are put on wherever a network is just then; what is on the host has to know of it."""
    plain = parse_request(REQUESTS["ensemble"])
    request = parse_request({**REQUESTS["ensemble"], "loras": [{"path": "a.safetensors"}]})
    path = write_lora(tmp_path / "a.safetensors", 1)

    def drawn(request: Request, by: Models) -> Image.Image:
        adapters = NO_ADAPTERS
        if request.loras:
            adapters = read_adapters(request, {"loras[0].path": saved(path)}, by)
        stages = plan_stages(request, by)
        [picture] = generate(request, stages, by, adapters=adapters)
        return picture

    resident = fresh_models()
    expected = [drawn(one, resident) for one in (plain, request)]
    assert difference(*expected) > 1
    for one, number in ((plain, 0), (request, 1), (request, 1), (plain, 0)):
        assert largest_difference(drawn(one, offloaded), expected[number]) == 0
    send_home(offloaded.networks().values())
    drawn(plain, resident)
    for name, network in resident.networks().items():
        there = offloaded.networks()[name].state_dict()
        assert all(torch.equal(tensor, there[key]) for key, tensor in network.state_dict().items())


def test_between_two_turns_nothing_is_copied_back(
    offloaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[str] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("copy"):
            copies.append("non_blocking" if options.get("non_blocking") else "back")
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    draw(parse_request(REQUESTS["refined"]), offloaded)
    assert set(copies) == {"non_blocking"}


def test_a_model_that_is_dropped_holds_nothing_on_the_host(offloaded: Models) -> None:
    draw(parse_request(REQUESTS["base"]), offloaded)
    weight = weakref.ref(offloaded.vae.decoder.conv_in.weight.untyped_storage())
    ModelMemory().drop(offloaded)
    gc.collect()
    assert weight() is None
    hook = offloaded.vae._hf_hook
    assert hook.seat._visit is None
