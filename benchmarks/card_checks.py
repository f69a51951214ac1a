"""Whether what only a GPU can show is right there: graphs, compiled code, waits, number formats.

Each check prints "ok", "failed" with the reason, or "not possible here" with what it needs; the
exit status is 1 if one failed. They draw with the embedded model, its ControlNet and its
IP-Adapter: small pictures of few steps. On a CPU, those that need a GPU are not possible.

    python -m benchmarks.card_checks
    python -m benchmarks.card_checks --only graphs waits
"""

import argparse
import contextlib
import dataclasses
import itertools
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import ControlNetModel
from PIL import Image
from torch._inductor.utils import fresh_cache

from benchmarks import common
from benchmarks.overhead import sample_picture
from benchmarks.ways import psnr_db
from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import NO_STEERING, Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.gpu import is_broken
from sdxl_worker.loading.controlnets import find_controlnet
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base
from sdxl_worker.loading.weights import start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.compiling import at_the_start
from sdxl_worker.speed.no_waits import host_noise
from sdxl_worker.speed.optimize import MODES, optimize

CONTROLNETS = EMBEDDED_MODEL_DIR.parent / "controlnets"
IP_ADAPTERS = EMBEDDED_MODEL_DIR.parent / "ip-adapters"

# "The same within rounding", in dB: a level or two of 255 in each value.
SAME_DB = 40
# With 8 or 11 bits of mantissa in place of 24: 45 and 60 dB on a CPU.
SAME_IN_16_BITS_DB = 30
SIZES = ((128, 128), (192, 128))
# Six of the base, and six of the refiner.
STEPS = {"num_inference_steps": 6, "refiner_inference_steps": 20}

COLUMNS = ("check", "result", "seconds", "note")


class NotPossibleError(Exception):
    """The message says what is needed."""


@dataclass(frozen=True)
class Machine:
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The worker's own."""
        return torch.float16 if self.on_gpu else torch.float32

    def needs_gpu(self) -> None:
        if not self.on_gpu:
            raise NotPossibleError("needs a GPU")

    def models(
        self,
        mode: Any = None,
        *,
        dtype: torch.dtype | None = None,
        resident: bool = True,
    ) -> Models:
        """As a worker has them with that COMPILE."""
        found = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
        placement = Placement(self.device, dtype or self.dtype, resident)
        weights = start_reading(found, found.weight_files("float16"), placement)
        models = add_refiner(load_base(weights), weights)
        optimizations = MODES[mode] if self.on_gpu else MODES[mode] - {"cuda_graphs"}
        optimize(optimizations, models.unet, models.vae)
        optimize(optimizations, models.refiner_unet)
        return models


def union(models: Models) -> Steering:
    """The embedded model's own, which knows several types."""
    files = find_controlnet("canny", CONTROLNETS, "controlnet[0].type", models.unet.config)
    return _controlled(files.load(models.placement), files.mode)


def single(models: Models) -> Steering:
    """Made for one purpose, with random weights where a training begins with zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with torch.device("cpu"):
            network: Any = ControlNetModel.from_unet(models.unet, load_weights_from_unet=False)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    placement = models.placement
    home = placement.device if placement.resident else torch.device("cpu")
    network = network.eval().requires_grad_(False).to(home, placement.dtype)
    return _controlled(network, None)


def _controlled(network: Any, mode: int | None) -> Steering:
    # A part of a larger one, whose edges are of that size.
    drawn = sample_picture(256, 256).crop((0, 0, 128, 128))
    return Steering(controls=(Control(network, mode, drawn, scale=0.8, start=0.0, end=1.0),))


def prompted(models: Models) -> Steering:
    files = find_ip_adapter("plain", IP_ADAPTERS, "ip_adapter[0].type", models.unet)
    adapter, encoder = files.load(models.placement), files.encoder.load(models.placement)
    seen = sample_picture(256, 256, seed=1)
    tokens = tokens_of_picture(seen, encoder, adapter, models.placement)
    return Steering(image_prompts=(ImagePrompt(adapter, tokens, "plain", 0.8),))


def draw(
    models: Models,
    steering: Steering = NO_STEERING,
    size: tuple[int, int] = SIZES[0],
    on_step: Callable[[Step], None] = lambda _: None,
    **fields: Any,
) -> list[Image.Image]:
    width, height = size
    sized = [
        dataclasses.replace(control, map=control.map.resize(size)) for control in steering.controls
    ]
    request = parse_request(
        {
            "prompt": "a red circle on a blue background",
            "seed": 3,
            "width": width,
            "height": height,
            **STEPS,
            **fields,
        }
    )
    return generate(
        request,
        plan_stages(request, models),
        models,
        on_step=on_step,
        steering=dataclasses.replace(steering, controls=tuple(sized)),
    )


def same(got: list[Image.Image], expected: list[Image.Image], what: str, least: int) -> float:
    """Their PSNR in dB.

    Raises:
        AssertionError: it is too low.
    """
    db = psnr_db(got, expected)
    if db < least:
        raise AssertionError(f"{what}: {db:.1f} dB, not {least} or more")
    return db


@contextlib.contextmanager
def replays() -> Iterator[list[None]]:
    """An entry for each graph that is replayed."""
    counted: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counting(graph: Any) -> None:
        counted.append(None)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counting):
        yield counted


def graphs(machine: Machine) -> str:
    """COMPILE=graphs: plain, with a ControlNet, plain again, at two sizes, against eager."""
    machine.needs_gpu()
    eager, graphed = machine.models(), machine.models("graphs")
    steering = {"plain": NO_STEERING, "controlled": union(eager), "plain again": NO_STEERING}
    worst = 99.0
    with replays() as replayed:
        for (width, height), (name, steered) in itertools.product(SIZES, steering.items()):
            size = (width, height)
            expected = draw(eager, steered, size)
            for number in (1, 2):  # the first may record
                got = draw(graphed, steered, size)
                what = f"{name}, {width}x{height}, picture {number}"
                worst = min(worst, same(got, expected, what, SAME_DB))
    if not replayed:
        raise AssertionError("no graph was replayed")
    return f"{worst:.1f} dB at worst, {len(replayed)} replays"


def blocks(machine: Machine) -> str:
    """COMPILE=blocks: the same pictures at two sizes, plain and with a ControlNet, and nothing is
    compiled for them after the first."""
    if not machine.on_gpu and shutil.which("c++") is None:
        raise NotPossibleError("compiling needs a C++ compiler")
    eager, compiled = machine.models(), machine.models("blocks")
    worst = 99.0
    started = time.perf_counter()
    try:
        # Where an earlier run was cut off, what it compiled may be half there.
        with fresh_cache(), at_the_start(MODES["blocks"]):
            draw(compiled)
        seconds = time.perf_counter() - started
        controlled = union(eager)
        for size, steering in itertools.product(SIZES, (NO_STEERING, controlled)):
            with torch.compiler.set_stance("fail_on_recompile"):
                got = draw(compiled, steering, size)
            what = f"{size[0]}x{size[1]}, {len(steering.controls)} ControlNets"
            worst = min(worst, same(got, draw(eager, steering, size), what, SAME_DB))
    finally:
        torch.compiler.set_stance("default")
    return f"{worst:.1f} dB at worst, the first picture {seconds:.1f} s"


def no_waits(
    machine: Machine, steering: Callable[[Models], Steering] | None, mode: Any = None
) -> str:
    """From the second step of each stage on, the host waits for nothing."""
    machine.needs_gpu()
    models = machine.models(mode)
    steered = steering(models) if steering is not None else NO_STEERING
    draw(models, steered)  # what libraries set up at first use may wait
    watched = 0

    def on_step(step: Step) -> None:
        nonlocal watched
        is_last = step.step == step.steps
        watched += not is_last
        torch.cuda.set_sync_debug_mode("default" if is_last else "error")

    try:
        draw(models, steered, on_step=on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{watched} steps"


@contextlib.contextmanager
def same_noise() -> Iterator[None]:
    """In every number format: before torch 2.13, what is drawn in 16 bits are other numbers."""

    def in_32_bits(shape: Any, generator: Any, device: torch.device, dtype: torch.dtype) -> Any:
        return host_noise(shape, generator, device, torch.float32).to(dtype)

    with mock.patch("sdxl_worker.drawing.generate.host_noise", in_32_bits):
        yield


def bfloat16(machine: Machine) -> str:
    return _in_format(machine, torch.bfloat16)


def float16(machine: Machine) -> str:
    """And how far its numbers are from its largest one, 65504."""
    return _in_format(machine, torch.float16)


def _in_format(machine: Machine, dtype: torch.dtype) -> str:
    """All numbers are finite, and the picture is that of 32 bits."""
    models = machine.models(dtype=dtype)
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str, network: Any) -> None:
        def after(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                # On the device, and NaN stays NaN.
                here = output.detach().abs().amax().float()
                largest[name] = torch.maximum(largest[name], here) if name in largest else here

        for module in network.modules():
            if not any(module.children()):
                module.register_forward_hook(after)

    watch("base", models.unet)
    watch("refiner", models.refiner_unet)
    watch("decoder", models.vae.decoder)
    with same_noise():
        got = draw(models, high_noise_frac=0.5)
        expected = draw(machine.models(dtype=torch.float32), high_noise_frac=0.5)
    numbers = {name: float(number) for name, number in largest.items()}
    told = ", ".join(f"{name} {number:.0f}" for name, number in numbers.items())
    if len(numbers) < 3 or not all(torch.isfinite(number) for number in largest.values()):
        raise AssertionError(f"largest numbers: {told}")
    db = same(got, expected, "against float32", SAME_IN_16_BITS_DB)
    return f"{db:.1f} dB against float32; largest numbers: {told}"


def offloading(machine: Machine) -> str:
    """Networks that take turns, with a ControlNet and an IP-Adapter: the same pictures, and only
    one of them is on the device afterwards."""
    resident, offloaded = machine.models(), machine.models(resident=False)
    worst = 99.0
    for name, steer in {"plain": None, "controlled": union, "prompted": prompted}.items():
        here, there = (
            draw(models, steer(models) if steer else NO_STEERING)
            for models in (resident, offloaded)
        )
        worst = min(worst, same(there, here, name, SAME_DB))
    if machine.on_gpu:
        on_device = [
            name
            for name, network in offloaded.networks().items()
            if next(network.parameters()).device.type == "cuda"
        ]
        if len(on_device) > 1:
            raise AssertionError(f"on the GPU at once: {', '.join(on_device)}")
    return f"{worst:.1f} dB at worst"


Check = Callable[[Machine], str]
"""Returns what is worth to be told; raises `NotPossibleError`, or anything if it fails."""

CHECKS: dict[str, Check] = {
    "graphs": graphs,
    "waits: plain": lambda machine: no_waits(machine, None),
    "waits: union ControlNet": lambda machine: no_waits(machine, union),
    "waits: single ControlNet": lambda machine: no_waits(machine, single),
    "waits: IP-Adapter": lambda machine: no_waits(machine, prompted),
    "waits: graphs": lambda machine: no_waits(machine, None, "graphs"),
    "float16": float16,
    "bfloat16": bfloat16,
    "offloading": offloading,
    "blocks": blocks,
}


def run(names: Sequence[str], machine: Machine, out: Path) -> int:
    """
    Returns:
        How many failed.
    """
    about = common.machine(machine.device.type)
    name = common.slug(about["device"]) if machine.on_gpu else machine.device.type
    results = common.CsvFile(out / f"card-checks-{name}.csv", [*about, *COLUMNS])
    failed: list[str] = []
    broken_by = ""
    for check in names:
        started = time.perf_counter()
        try:
            if broken_by:
                raise NotPossibleError(f"{broken_by} broke the GPU for this process")
            note = CHECKS[check](machine)
            result = "ok"
        except NotPossibleError as error:
            result, note = "not possible here", str(error)
        except Exception as error:
            # Whatever goes wrong in one check must not cost the others.
            traceback.print_exc()
            result, note = "failed", common.shortened(error)
            failed.append(check)
            if is_broken():
                broken_by = check
        seconds = round(time.perf_counter() - started, 1)
        results.add({**about, "check": check, "result": result, "seconds": seconds, "note": note})
        print(f"{check}: {result}{': ' * bool(note)}{note} ({seconds} s)", flush=True)
    print(f"{len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in CHECKS))
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="CHECK")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in CHECKS if name.partition(":")[0] in arguments.only]
    sys.exit(1 if run(names, Machine(device), arguments.out) else 0)


if __name__ == "__main__":
    main()
