"""The pictures show what the prompt says: every scheduler in every mode, each setting's effect.

The embedded model was trained on these shapes and colours. `shapes.judge` measures what a
picture shows: the shape with the overlap of its outline (`iou`), the colours with their distance to
the pure ones (`flat_distance`, 0 to 255).
"""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from shapes.data import Scene, render
from shapes.judge import judge
from tests.support import SCHEDULERS, data_uri, difference, picture, pictures

PROMPTS = [
    "a red circle on a blue background",
    "a green square on a white background",
    "A photo of a yellow star on a black background, high quality",
    "a magenta triangle on a yellow background",
]
MODES: dict[str, dict[str, Any]] = {
    "no refiner": {"refiner_inference_steps": 0},
    "refiner": {},
    "ensemble": {"high_noise_frac": 0.8},
}
# Pure colours are within 3 or so; the multistep schedulers stray a little further at times.
FLAT_DISTANCE = 15


def drawn(shape: str, color: str, background: str, size_px: int = 128) -> Image.Image:
    """The picture as it should be."""
    scene = Scene(shape, color, background, center_x=0.5, center_y=0.5, radius=0.32)
    return Image.fromarray(render(scene, size_px, size_px))


def assert_shows(image: Image.Image, prompt: str) -> None:
    seen = judge(image)
    assert seen.matches(prompt), f"{prompt}: {seen}"
    assert seen.flat_distance < FLAT_DISTANCE, f"{prompt}: {seen}"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_picture_matches_the_prompt(scheduler: str, mode: str) -> None:
    for seed, prompt in enumerate(PROMPTS):
        image = picture(prompt=prompt, seed=seed, scheduler=scheduler, **MODES[mode])
        assert_shows(image, prompt)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_refined_input_picture_matches_the_prompt(scheduler: str) -> None:
    original = drawn("circle", "red", "blue")
    job_input = {"prompt": PROMPTS[0], "image_url": data_uri(original), "scheduler": scheduler}
    refined = picture(**job_input, seed=1)
    assert_shows(refined, PROMPTS[0])
    assert 0 < difference(refined, original) < 10


REDRAWN_PROMPT = "a green square on a white background"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_redrawn_as_the_prompt_says(scheduler: str, mode: str) -> None:
    original = data_uri(drawn("circle", "red", "blue"))
    job_input = {
        "prompt": REDRAWN_PROMPT,
        "image_url": original,
        "mode": "img2img",
        "strength": 0.9,
    }
    for image in pictures(**job_input, seed=1, num_images=2, scheduler=scheduler, **MODES[mode]):
        assert_shows(image, REDRAWN_PROMPT)


@pytest.mark.parametrize("scheduler", ["DDIM", "K_EULER_ANCESTRAL", "DPMSolverMultistep"])
def test_strength_goes_from_the_picture_to_the_prompt(scheduler: str) -> None:
    original = drawn("circle", "red", "blue")
    job_input = {
        "prompt": REDRAWN_PROMPT,
        "image_url": data_uri(original),
        "mode": "img2img",
        "scheduler": scheduler,
        "refiner_inference_steps": 0,
        "num_images": 4,
        "seed": 1,
    }
    away, right = [], []
    for strength in (0.1, 0.25, 0.9):
        images = pictures(**job_input, strength=strength)
        away.append(sum(difference(image, original) for image in images) / 4)
        right.append(sum(judge(image).matches(REDRAWN_PROMPT) for image in images))
    assert away == sorted(away)
    assert right == [0, 0, 4]
    assert away[0] < 35 < 100 < away[2], "at first, most of what was there is there still"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", MODES)
def test_inpainting_repaints_as_the_prompt_says_and_only_inside(scheduler: str, mode: str) -> None:
    original = drawn("circle", "red", "blue")
    inside = np.zeros((128, 128), bool)
    inside[12:116, 12:116] = True
    prompt = "a yellow star on a blue background"
    images = pictures(
        prompt=prompt,
        image_url=data_uri(original),
        mask_url=data_uri(Image.fromarray(inside)),
        seed=1,
        num_images=2,
        scheduler=scheduler,
        **MODES[mode],
    )
    for image in images:
        assert judge(image).matches(prompt), judge(image)
        assert np.array_equal(np.asarray(image)[~inside], np.asarray(original)[~inside])


def test_what_the_prompt_leaves_open_differs_with_the_seed() -> None:
    """Eight seeds at once, of a prompt that only names the shape."""
    seen = [judge(image) for image in pictures(prompt="a star", seed=100, num_images=8)]
    assert sum(one.shape == "star" for one in seen) >= 7
    assert len({(one.color, one.background) for one in seen}) > 2, "seeds differ"


@pytest.mark.parametrize("mode", MODES)
def test_what_the_negative_prompt_names_is_drawn_less(mode: str) -> None:
    """Left to itself, the model draws a circle on black in white."""

    def white_circles(**settings: Any) -> int:
        job_input = {"prompt": "a circle on a black background", "seed": 40, "num_images": 8}
        images = pictures(**job_input, **MODES[mode], **settings)
        return sum(judge(image).color == "white" for image in images)

    assert white_circles() >= 6
    assert white_circles(negative_prompt="white") <= 3


def test_the_refiner_heeds_prompt_and_negative_prompt() -> None:
    """From a picture between two shapes, prompt and negative prompt pull it either way."""
    noisy = Image.blend(drawn("circle", "red", "blue"), drawn("square", "red", "blue"), 0.5)
    job_input = {"image_url": data_uri(noisy), "seed": 3, "strength": 0.6}
    circle = picture(**job_input, prompt="a red circle", negative_prompt="a red square")
    square = picture(**job_input, prompt="a red square", negative_prompt="a red circle")
    assert difference(circle, square) > 0.5


def test_guidance_makes_the_picture_follow_the_prompt() -> None:
    """Without guidance colours are duller or shapes wrong more often than with it."""
    prompt = "a white ring on a red background"
    settings = {"prompt": prompt, "seed": 60, "num_images": 8, "refiner_inference_steps": 0}
    guided = [judge(image) for image in pictures(**settings, guidance_scale=7.5)]
    unguided = [judge(image) for image in pictures(**settings, guidance_scale=0)]
    assert sum(seen.matches(prompt) for seen in guided) >= 7
    assert sum(seen.matches(prompt) for seen in guided) >= sum(
        seen.matches(prompt) for seen in unguided
    )


def test_what_stands_after_token_77_is_drawn() -> None:
    filler = "high quality, sharp, detailed, " * 14
    for prompt in PROMPTS[:2]:
        assert_shows(picture(prompt=filler + prompt, seed=2), prompt)
        assert_shows(picture(prompt=f"{prompt}, {filler}", seed=2), prompt)


def test_strength_moves_away_from_the_input_picture() -> None:
    original = drawn("square", "green", "white")
    job_input = {"prompt": PROMPTS[0], "image_url": data_uri(original), "seed": 4}
    distances = [
        difference(picture(**job_input, strength=strength), original)
        for strength in (0.1, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0], distances


@pytest.mark.parametrize(("height", "width"), [(96, 128), (128, 96), (128, 192), (160, 160)])
def test_other_sizes_show_the_colours_of_the_prompt(height: int, width: int) -> None:
    seen = judge(picture(prompt=PROMPTS[0], seed=6, height=height, width=width))
    assert (seen.color, seen.background) == ("red", "blue")
