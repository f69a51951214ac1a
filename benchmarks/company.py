"""Drawings of any kind, side by side, for what compares them with those alone."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from sdxl_worker.speed.shared_passes import Drawing, draw_side_by_side

T = TypeVar("T")

SAMPLERS = (
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "PNDM",
    "KLMS",
    "DPMSolverMultistep",
    "DPMSolverMultistepSDE",
    "K_HEUN",
    "UniPC",
    "DDPM",
)
PROMPTS = (
    "a red circle on a blue background",
    "a star",
    "a white ring, " + "and so on, " * 40,
)
# How likely another one begins, while there are any, before each pass: from one after the other
# to nearly all at once.
CHANCES = (0.3, 0.7, 0.95)


def any_request(choose: random.Random) -> dict[str, Any]:
    """Of small pictures and few steps, with whatever may differ between those drawn together."""
    request: dict[str, Any] = {
        "prompt": choose.choice(PROMPTS),
        "seed": choose.randrange(2**32),
        "height": 64,
        "width": 64,
        "scheduler": choose.choice(SAMPLERS),
        "num_inference_steps": choose.randint(2, 7),
        "guidance_scale": choose.choice([1, 4, 7.5]),
        "num_images": choose.choice([1, 1, 1, 2]),
        "refiner_inference_steps": choose.choice([0, 0, 6]),
        "strength": 0.5,
    }
    if choose.random() < 0.3 and request["refiner_inference_steps"]:
        request["high_noise_frac"] = 0.5
    if request["guidance_scale"] > 1 and choose.random() < 0.5:
        request["negative_prompt"] = "a blue square"
    if choose.random() < 0.2:
        request |= {"image_url": "https://example.org/a.png", "mode": "img2img", "strength": 0.8}
        # Between where `strength` begins and the ensemble hands over there must be a step.
        request["num_inference_steps"] += 3
        if "high_noise_frac" in request:
            request["high_noise_frac"] = 0.8
    return request


def side_by_side(draw: Sequence[Callable[[], T]], choose: random.Random) -> list[T]:
    """What each gives. They begin in their order, each before any pass of those that began.

    Raises:
        Exception: what one of them raised.
    """
    futures: list[Future[T]] = [Future() for _ in draw]
    to_begin = [
        functools.partial(_hand_over, one, future)
        for one, future in zip(draw, futures, strict=True)
    ]
    chance = choose.choice(CHANCES)

    def begin(drawn: int) -> Iterator[Drawing]:
        while to_begin and (not drawn or choose.random() < chance):
            drawn += 1
            yield to_begin.pop(0)

    while to_begin:  # it ends where those that began did nothing
        draw_side_by_side(begin)
    return [future.result(0) for future in futures]


def _hand_over(draw: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(draw())
    except Exception as error:
        future.set_exception(error)
