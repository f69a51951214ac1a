"""Nothing within a picture waits for the GPU, and the host does not run away from it."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_worker.drawing import decoding
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.image_prompts import ImagePrompt
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.samplers import SAMPLERS
from sdxl_worker.speed.no_waits import StepsAhead
from tests.control_networks import control, draw_controlled, single, union
from tests.random_ip_adapters import make_ip_adapters
from tests.support import (
    JOB,
    REQUESTS,
    SCHEDULERS,
    canvas_of,
    draw,
    fresh_models,
    noise_picture,
)

CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


class CopiesFromHost(TorchDispatchMode):
    """Counts tensors that go from the host to the device: on a GPU each such copy waits for it,
    unless it was queued from pinned memory."""

    count = 0

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_meta and "_to_copy" in str(func):
            pinned = any(args[0] is tensor for tensor in self._pinned)
            queued = pinned and kwargs.get("non_blocking", False)
            self.count += not args[0].is_meta and not queued
        return out


@pytest.fixture(scope="module")
def on_meta() -> Models:
    """Models on the meta device, which raises at any attempt to read a number from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_module, "fit_latent_rgb", lambda *_: None)
        made = fresh_models("meta", torch.float16)
    # Once a job, the encoder's numbers are looked at, but for a VAE that computes in float32.
    made.vae.register_to_config(force_upcast=True)
    return made


@pytest.fixture
def without_memory(on_meta: Models, monkeypatch: pytest.MonkeyPatch) -> Models:
    def as_many_pixels(images: torch.Tensor, **_: Any) -> tuple[Any, bool]:
        return np.zeros((len(images), *images.shape[2:], 3), np.uint8), True

    monkeypatch.setattr(decoding, "_to_pixels", as_many_pixels)
    return on_meta


# Between the stages, a few tensors go over; inpainting has two stages as well.
MODES: dict[str, dict[str, Any]] = {
    **REQUESTS,
    "inpainted": {
        **REQUESTS["refined"],
        "image_url": "https://example.com/a.png",
        "mask_url": "https://example.com/mask.png",
        "strength": 0.75,
        "refiner_strength": 0.5,
    },
}


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is pinned."""
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return pinned


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize(
    ("mode", "scheduler"),
    [
        *((mode, name) for mode in MODES for name in SCHEDULERS),
        # UniPC copies two numbers to the device, and solves an equation with them there.
        *(("inpainted", name) for name in SAMPLERS if name not in (*SCHEDULERS, "UniPC")),
    ],
)
def test_no_step_waits_for_the_gpu(
    mode: str, scheduler: str, without_memory: Models, pinned: list[torch.Tensor]
) -> None:
    """What reads from the device or copies to it makes the host wait for all steps so far."""
    request = parse_request({**MODES[mode], "scheduler": scheduler})
    canvas = canvas_of(noise_picture(128, 128), np.eye(128, dtype=bool)) if request.mode else None
    copies = []
    with CopiesFromHost(pinned) as from_host:
        [picture] = draw(
            request, without_memory, canvas, on_step=lambda _: copies.append(from_host.count)
        )
    assert picture.size == (128, 128)
    increases = [after - before for before, after in itertools.pairwise(copies)]
    assert sum(increase > 0 for increase in increases) <= (mode != "base")


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize(("mode", "share"), [("base", {"start": 0.5}), ("inpainted", {"end": 0.5})])
def test_no_step_with_controlnets_waits_for_the_gpu(
    mode: str, share: dict[str, Any], without_memory: Models, pinned: list[torch.Tensor]
) -> None:
    request = parse_request({**MODES[mode], "scheduler": "K_EULER"})
    canvas = canvas_of(noise_picture(128, 128), np.eye(128, dtype=bool)) if request.mode else None
    on_meta = [copy.deepcopy(network).half().to("meta") for network in (union(), single())]
    controls = [control(on_meta[0], 1), control(on_meta[0], 3), control(on_meta[1], None, **share)]
    copies = []
    with CopiesFromHost(pinned) as from_host:
        [picture] = draw_controlled(
            request, without_memory, controls, canvas, lambda _: copies.append(from_host.count)
        )
    assert sum(tensor.shape == (1, 3, 128, 128) for tensor in pinned) == len(controls)
    assert picture.size == (128, 128)
    increases = [after - before for before, after in itertools.pairwise(copies)]
    assert sum(increase > 0 for increase in increases) <= (mode != "base")


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize("mode", ["base", "inpainted"])
def test_no_step_with_image_prompts_waits_for_the_gpu(
    mode: str, without_memory: Models, pinned: list[torch.Tensor], tmp_path: Path
) -> None:
    request = parse_request({**MODES[mode], "scheduler": "K_EULER"})
    half = np.eye(128, dtype=bool)
    canvas = canvas_of(noise_picture(128, 128), half) if request.mode else None
    make_ip_adapters(tmp_path, without_memory.unet)
    prompts = []
    for kind, mask in (("plus", None), ("style", half)):
        files = find_ip_adapter(kind, tmp_path, "ip_adapter[0].type", without_memory.unet)
        adapter = files.load(CPU).half().to("meta")
        tokens = torch.empty(
            2, 1, files.form.tokens, files.form.attentions[0][1], dtype=torch.half, device="meta"
        )
        prompts.append(ImagePrompt(adapter, tokens, kind, 0.7, mask))
    copies = []
    with CopiesFromHost(pinned) as from_host:
        [picture] = generate(
            request,
            plan_stages(request, without_memory),
            without_memory,
            canvas,
            lambda _: copies.append(from_host.count),
            steering=Steering(image_prompts=tuple(prompts)),
        )
    assert picture.size == (128, 128)
    increases = [after - before for before, after in itertools.pairwise(copies)]
    assert sum(increase > 0 for increase in increases) <= (mode != "base")


def test_reading_a_number_would_have_shown(
    without_memory: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def read(step: Step) -> None:
        step.latents().sum().item()

    with pytest.raises(RuntimeError, match="meta"):
        draw(parse_request(JOB), without_memory, on_step=read)


def test_the_host_is_at_most_two_steps_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    waited: list[int] = []

    class Event:
        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            waited.append(recorded.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = StepsAhead(torch.device("cuda"))
    for _ in range(5):
        steps.limit()
    assert waited == [0, 1, 2], "after step 4, step 2 is done: 3 and 4 may be under way"
    StepsAhead(torch.device("cpu")).limit()
    assert len(recorded) == 5
