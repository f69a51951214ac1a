"""A picture and its mask are brought to the size that is drawn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.fitting import Fit, How, choose_fit
from sdxl_worker.inputs.masks import Mask, covering, with_edges

BOUNDS_PX = (64, 2048, 8)
TO_THE_PIXEL_PX = (64, 4096, 1)
HOWS: tuple[How, ...] = ("crop", "pad", "stretch")


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def fit(
    size: tuple[int, int],
    *,
    height: int | None = None,
    width: int | None = None,
    how: How = "crop",
    bounds_px: tuple[int, int, int] = BOUNDS_PX,
) -> Fit:
    return choose_fit(
        size, "image_url", height_px=height, width_px=width, how=how, bounds_px=bounds_px
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 64), (128, 64)),
        ((2048, 2048), (2048, 2048)),
        ((134, 100), (128, 96)),  # down to a multiple of 8, as diffusers does
        ((1023, 767), (1016, 760)),
        ((71, 64), (64, 64)),
        ((4096, 2048), (2048, 1024)),  # down to the largest side
        ((3000, 2000), (2048, 1368)),
        ((32, 32), (64, 64)),  # up to the smallest side
        ((10, 200), (64, 1280)),
        ((64, 2048), (64, 2048)),
    ],
)
def test_without_sides_the_size_is_the_own_one_within_the_bounds(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit(size).size == expected
    assert fit(size).of_picture(Image.new("RGB", size)).size == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1023, 767), (1023, 767)),
        ((4096, 64), (4096, 64)),
        ((5000, 3333), (4096, 2730)),
        ((30, 45), (64, 96)),
    ],
)
def test_a_multiple_of_one_keeps_the_size_to_the_pixel(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit(size, bounds_px=TO_THE_PIXEL_PX).size == expected


def test_one_given_side_sets_the_other_by_the_aspect_ratio() -> None:
    assert fit((400, 200), width=128).size == (128, 64)
    assert fit((400, 200), height=128).size == (256, 128)
    assert fit((1000, 667), width=512).size == (512, 344), "to the nearest multiple"
    assert fit((1000, 667), width=512).how == "stretch", "by which nothing is cut off"


@pytest.mark.parametrize("how", HOWS)
def test_both_given_sides_are_the_size(how: How) -> None:
    chosen = fit((200, 100), height=96, width=72, how=how)
    assert chosen == Fit((200, 100), (72, 96), how)
    assert chosen.of_picture(noise(200, 100)).size == (72, 96)


@pytest.mark.parametrize("size", [(64, 2176), (5000, 8), (1, 33)])
def test_an_aspect_ratio_without_a_size_in_the_bounds_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=rf"^image_url: .* {size[0]} x {size[1]} pixels") as one:
        fit(size)
    assert "give both height and width" in str(one.value)


def test_one_given_side_may_push_the_other_over_the_bounds() -> None:
    with pytest.raises(RequestError, match="would become 64 x 4096"):
        fit((8, 512), width=64)


SENT = st.tuples(st.integers(64, 300), st.integers(64, 300))
SIZES = st.tuples(st.integers(8, 40), st.integers(8, 40)).map(lambda s: (s[0] * 8, s[1] * 8))


@given(SENT, SIZES)
def test_crop_covers_the_size_and_cuts_the_centre(
    sent: tuple[int, int], size: tuple[int, int]
) -> None:
    picture = noise(*sent)
    expected = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    fitted = Fit(sent, size, "crop").of_picture(picture)
    difference = np.asarray(fitted).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1  # the same box, by another way of rounding


@given(SENT, SIZES)
def test_pad_shows_the_whole_picture_and_repeats_its_edges(
    sent: tuple[int, int], size: tuple[int, int]
) -> None:
    picture = noise(*sent)
    inner = ImageOps.contain(picture, size, Image.Resampling.LANCZOS)
    left, top = ((size[i] - inner.size[i]) // 2 for i in range(2))
    right, bottom = size[0] - inner.width - left, size[1] - inner.height - top
    expected = np.pad(np.asarray(inner), ((top, bottom), (left, right), (0, 0)), mode="edge")
    assert abs(right - left) <= 1
    assert abs(bottom - top) <= 1
    assert np.array_equal(np.asarray(Fit(sent, size, "pad").of_picture(picture)), expected)


def test_stretch_resizes() -> None:
    picture = noise(200, 100)
    expected = picture.resize((64, 128), Image.Resampling.LANCZOS)
    assert Fit(picture.size, (64, 128), "stretch").of_picture(picture) == expected


@pytest.mark.parametrize("how", HOWS)
def test_a_picture_of_the_size_is_left_as_it_is(how: How) -> None:
    picture = noise(64, 128)
    assert Fit(picture.size, (64, 128), how).of_picture(picture) == picture


def slow_covering(mask: Mask, size: tuple[int, int]) -> Mask:
    """By its definition, in whole numbers, a pixel at a time."""
    (height, width), (new_width, new_height) = mask.shape, size
    result = np.zeros((new_height, new_width), bool)
    for y, x in np.argwhere(mask):
        rows = slice(y * new_height // height, math.ceil((y + 1) * new_height / height))
        result[rows, x * new_width // width : math.ceil((x + 1) * new_width / width)] = True
    return result


def random_mask(width: int, height: int, seed: int, share: float = 0.02) -> Mask:
    random = np.random.default_rng(seed)
    mask = random.random((height, width)) < share
    mask[random.integers(height), random.integers(width)] = True
    return mask


@given(
    st.tuples(st.integers(1, 99), st.integers(1, 99)),
    st.tuples(st.integers(1, 99), st.integers(1, 99)),
    st.integers(0, 2**31),
)
def test_a_mask_in_another_size_is_true_wherever_a_part_of_a_pixel_was(
    old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    mask = random_mask(*old, seed)
    assert np.array_equal(covering(mask, new), slow_covering(mask, new))
    assert np.array_equal(covering(mask, old), mask)


@pytest.mark.parametrize("thickness", [1, 6])
@pytest.mark.parametrize("at", [0, 9, 1000, 2994])
@pytest.mark.parametrize("how", HOWS)
def test_a_thin_line_is_not_lost(thickness: int, at: int, how: How) -> None:
    mask = np.zeros((3000, 2000), bool)
    mask[at : at + thickness] = True
    fitted = Fit((2000, 3000), (168, 256), how).of_mask(mask)
    assert fitted.any(axis=0).all()
    assert fitted.sum(axis=0).max() <= 4, "and is hardly thicker, but at an edge that is repeated"


@given(SENT, SIZES, st.sampled_from(HOWS), st.integers(0, 2**31), st.integers(1, 3))
def test_a_mask_lies_where_its_picture_lies(
    sent: tuple[int, int], size: tuple[int, int], how: How, seed: int, scale: int
) -> None:
    """Also one of another size. The picture is black but where the mask is."""
    spots = np.zeros(sent[::-1], bool)
    random = np.random.default_rng(seed)
    x, y = random.integers(sent[0] - 20), random.integers(sent[1] - 20)
    spots[y : y + 20, x : x + 20] = True
    picture = Image.fromarray(spots.astype(np.uint8) * 255).convert("RGB")
    chosen = Fit(sent, size, how)
    bright = np.asarray(chosen.of_picture(picture).convert("L")) > 140
    mask = chosen.of_mask(np.kron(spots, np.ones((scale, scale), bool)))
    assert mask.shape == (size[1], size[0])
    assert (mask | ~bright).all()
    # And hardly more: what is true by a part of a pixel is next to what is bright. But not where
    # an edge with such pixels is repeated, nor where a part of a pixel is all that is left of the
    # spot, which is bright then at its corners at most.
    middle = tuple(np.argwhere(mask).mean(axis=0).astype(int)) if mask.any() else (0, 0)
    if bright[middle] and how != "pad":
        bright_picture = Image.fromarray(bright.astype(np.uint8))
        near = np.asarray(bright_picture.filter(ImageFilter.MaxFilter(5))) != 0
        assert (near | ~mask).all()


def test_edges_are_repeated() -> None:
    small = np.arange(4).reshape(2, 2)
    assert with_edges(small, (4, 3), (1, 0)).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert with_edges(small, (2, 2)) is small
