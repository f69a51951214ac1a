"""Where not all networks fit: each comes for its pass, and no other is there meanwhile."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

from sdxl_worker.drawing.encoding import encode_canvas
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from tests.support import (
    REQUESTS,
    canvas_of,
    draw,
    fresh_models,
    largest_difference,
    load,
    models,
    noise_picture,
    weights_being_read,
)

# Here from the host to the host, under another name: what is seen is where each was sent.
DEVICE = torch.device("cpu", 0)


class Places:
    """Where each network was sent last, and which were on the device in each pass."""

    def __init__(self, offloaded: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        networks = offloaded.networks()
        self.places = dict.fromkeys(networks, "cpu")
        self.passes: list[tuple[str, list[str]]] = []
        for name, network in networks.items():
            send = functools.partial(self._send, name, network.to)
            monkeypatch.setattr(network, "to", send)
            # A VAE's own `forward` is not what pipelines call.
            inside: Any = network.decoder if name == "vae" else network
            inside.register_forward_hook(functools.partial(self._note, name))

    def on_device(self) -> list[str]:
        return [name for name, place in self.places.items() if place == str(DEVICE)]

    def _send(self, name: str, send: Any, *args: Any, **options: Any) -> Any:
        if args and isinstance(args[0], str | torch.device):
            self.places[name] = str(args[0])
        return send(*args, **options)

    def _note(self, name: str, *_: Any) -> None:
        self.passes.append((name, self.on_device()))


@pytest.fixture
def offloaded() -> Models:
    placement = Placement(DEVICE, torch.float32, resident=False)
    return load(dataclasses.replace(weights_being_read(), placement=placement))


@pytest.fixture
def places(offloaded: Models, monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(offloaded, monkeypatch)


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


def test_networks_that_fit_are_left_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = fresh_models()
    places = Places(resident, monkeypatch)
    draw(parse_request(REQUESTS["refined"]), resident)
    assert places.passes
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
