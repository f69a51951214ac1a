"""Where the mask does not reach, the answer is the picture that was sent, byte for byte; and it has
its size."""

import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from tests.support import PROMPT, data_uri, picture

JOB = {"prompt": PROMPT, "num_inference_steps": 3, "refiner_inference_steps": 0}
# The models draw 64 pixels and more, in multiples of 8.
SIDES = st.integers(64, 110)
LANCZOS = Image.Resampling.LANCZOS


@st.composite
def pictures_with_masks(draw: st.DrawFn) -> tuple[Image.Image, np.ndarray]:
    """Noise, and a mask of scattered dots, of a rectangle, or of a thin line."""
    width, height = draw(SIDES), draw(SIDES)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool)
    rows, columns = (sorted(random.choice(side + 1, 2, replace=False)) for side in mask.shape)
    match draw(st.sampled_from(["dots", "rectangle", "line"])):
        case "dots":
            mask = random.random(mask.shape) < draw(st.sampled_from([0.001, 0.01]))
            mask[rows[0] % height, columns[0] % width] = True
        case "rectangle":
            mask[slice(*rows), slice(*columns)] = True
        case _:
            mask[rows[0] % height, slice(*columns)] = True
    return Image.fromarray(pixels), mask


MASK_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "mask_blur": st.integers(0, 12),
        "mask_padding": st.integers(0, 40),
        "strength": st.sampled_from([0.4, 1.0]),
    },
)


def masked_job(image: Image.Image, mask: np.ndarray, *, invert: bool) -> dict[str, Any]:
    """What the mask has True is repainted."""
    shown = Image.fromarray(mask != invert)
    return {
        **JOB,
        "image_url": data_uri(image),
        "mask_url": data_uri(shown),
        "mask_invert": invert,
    }


def check_kept(result: Image.Image, expected: Image.Image, reached: np.ndarray, blur: int) -> None:
    """
    Args:
        reached: by the mask, without its blur.
    """
    assert result.size == expected.size
    before, after = np.asarray(expected), np.asarray(result)
    is_kept = distance_transform_cdt(~reached, "chessboard") > blur
    assert np.array_equal(after[is_kept], before[is_kept])
    if not blur:  # which can leave next to nothing of a dot
        assert not np.array_equal(after[reached], before[reached])


@settings(max_examples=12, deadline=None)
@given(pictures_with_masks(), MASK_OPTIONS, st.booleans())
def test_a_picture_in_its_own_size(
    sent: tuple[Image.Image, np.ndarray], options: dict[str, Any], invert: bool
) -> None:
    image, mask = sent
    result = picture(**masked_job(image, mask, invert=invert), **options)
    check_kept(result, image, mask, options.get("mask_blur", 0))


@pytest.mark.parametrize("options", [{}, {"mask_padding": 4}], ids=str)
@pytest.mark.parametrize("size", [(20, 30), (63, 200), (300, 10), (1, 1)])
def test_a_picture_smaller_than_the_models_draw(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    mask = np.zeros(size[::-1], bool)
    mask[: size[1] // 2 + 1, : size[0] // 2 + 1] = True
    check_kept(picture(**masked_job(image, mask, invert=False), **options), image, mask, 0)


def fitted(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """As the documents say: what is too much is cut off, what is missing is filled up from the
    edges, or the picture is distorted."""
    scales = [side / own for side, own in zip(size, image.size, strict=True)]
    if fit == "crop":
        left, top = (
            max(0, (own - side / max(scales)) / 2)
            for side, own in zip(size, image.size, strict=True)
        )
        box = (left, top, image.width - left, image.height - top)
        return image.resize(size, LANCZOS, box=box)
    if fit == "stretch":
        return image.resize(size, LANCZOS)
    inner = image.resize(inner_size(image.size, size), LANCZOS)
    return Image.fromarray(filled_up(np.asarray(inner), size))


def inner_size(sent: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    scale = min(size[0] / sent[0], size[1] / sent[1])
    return round(sent[0] * scale), round(sent[1] * scale)


def filled_up(inner: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """In the middle of the size."""
    missing = [side - own for side, own in zip(size[::-1], inner.shape, strict=False)]
    edges = [(side // 2, side - side // 2) for side in missing]
    return np.pad(inner, [*edges, (0, 0)][: inner.ndim], mode="edge")


def reach_of(mask: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """Where in the fitted picture a pixel of the mask comes to lie, if only in part."""
    sent = mask.shape[::-1]
    if fit == "pad":
        return filled_up(reach_of(mask, inner_size(sent, size), "stretch"), size)
    scales = [side / own for side, own in zip(size, sent, strict=True)]
    if fit == "crop":
        scales = [max(scales)] * 2
    offset = [(side - own * scale) / 2 for side, own, scale in zip(size, sent, scales, strict=True)]
    reached = np.zeros(size[::-1], bool)
    for y, x in np.argwhere(mask):
        spans = []
        for at, axis in ((y, 1), (x, 0)):
            begin = math.floor(offset[axis] + at * scales[axis] + 1e-6)
            end = math.ceil(offset[axis] + (at + 1) * scales[axis] - 1e-6)
            spans.append(slice(max(0, begin), max(0, end)))
        reached[tuple(spans)] = True
    return reached


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@settings(max_examples=6, deadline=None)
@given(
    pictures_with_masks(),
    MASK_OPTIONS,
    st.tuples(*[st.sampled_from([64, 72, 88, 104, 128])] * 2),
)
def test_a_picture_that_is_fitted(
    fit: Literal["crop", "pad", "stretch"],
    sent: tuple[Image.Image, np.ndarray],
    options: dict[str, Any],
    size: tuple[int, int],
) -> None:
    image, mask = sent
    reached = reach_of(mask, size, fit)
    if not reached.any():
        return  # all of it is cut off, which is refused
    job = masked_job(image, mask, invert=False) | {"width": size[0], "height": size[1], "fit": fit}
    result = picture(**job, **options)
    check_kept(result, fitted(image, size, fit), reached, options.get("mask_blur", 0))
