"""What the models get of an input picture, and what comes out of what they draw."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from sdxl_worker.inputs.canvas import Canvas, prepare_canvas, with_holes_filled
from sdxl_worker.inputs.masks import Mask


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def spot(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Mask:
    mask = np.zeros(size[::-1], bool)
    mask[top:bottom, left:right] = True
    return mask


def canvas_of(picture: Image.Image, mask: Mask | None, **options: Any) -> Canvas:
    given = {"mask_blur": 0, "mask_padding": None, "native_size_px": 256, "max_side_px": 2048}
    return prepare_canvas(picture, mask, **given | options)


def drawn_in(canvas: Canvas, colour: str = "white") -> np.ndarray:
    """The picture after all of `working` was drawn in one colour."""
    result = canvas.put_back(Image.new("RGB", canvas.working.size, colour))
    assert result.size == canvas.picture.size
    assert result.mode == "RGB"
    return np.array(result)


def opacity(size: tuple[int, int], mask: Mask, **options: Any) -> np.ndarray:
    """Of white on black."""
    return drawn_in(canvas_of(Image.new("RGB", size), mask, **options))[:, :, 0]


def test_without_a_mask_the_picture_is_what_is_drawn_on() -> None:
    picture, drawn = noise(64, 128), noise(64, 128, 1)
    canvas = canvas_of(picture, None)
    assert canvas.working is picture
    assert canvas.mask is None
    assert canvas.put_back(drawn) is drawn


def test_a_picture_of_multiples_of_8_is_painted_as_it_is() -> None:
    picture = noise(128, 64)
    mask = spot((128, 64), 10, 20, 30, 40)
    canvas = canvas_of(picture, mask)
    assert canvas.working == picture
    assert canvas.mask is not None
    assert np.array_equal(canvas.mask, mask)


def test_other_pictures_are_extended_by_their_edges_which_do_not_come_out() -> None:
    picture = noise(129, 71)
    mask = spot((129, 71), 128, 70, 129, 71)
    canvas = canvas_of(picture, mask)
    assert canvas.working.size == (136, 72)
    expected = np.pad(np.asarray(picture), ((0, 1), (0, 7), (0, 0)), mode="edge")
    assert np.array_equal(np.asarray(canvas.working), expected)
    assert canvas.mask is not None
    assert np.array_equal(canvas.mask, np.pad(mask, ((0, 1), (0, 7)), mode="edge"))
    drawn = noise(136, 72, 1)
    result = np.asarray(canvas.put_back(drawn))
    assert np.array_equal(result[70, 128], np.asarray(drawn)[70, 128])
    assert (result == np.asarray(picture)).all(axis=2).sum() == 129 * 71 - 1


def test_a_picture_that_is_too_small_is_extended_by_its_edges_too() -> None:
    picture = noise(20, 70)
    canvas = canvas_of(picture, spot((20, 70), 19, 0, 20, 1))
    expected = np.pad(np.asarray(picture), ((0, 2), (0, 44), (0, 0)), mode="edge")
    assert np.array_equal(np.asarray(canvas.working), expected)
    result = drawn_in(canvas)
    assert (result[0, 19] == 255).all()
    assert (result == np.asarray(picture)).all(axis=2).sum() == 20 * 70 - 1


@pytest.mark.parametrize(
    ("size", "max_side_px", "working"),
    [
        ((2500, 1500), 2048, (2048, 1232)),
        ((2500, 64), 2048, (2048, 64)),
        ((2504, 64), 4096, (2504, 64)),
    ],
)
def test_a_picture_that_is_too_large_is_painted_smaller(
    size: tuple[int, int], max_side_px: int, working: tuple[int, int]
) -> None:
    picture = noise(*size)
    mask = spot(size, 1001, 31, 1002, 32)
    canvas = canvas_of(picture, mask, max_side_px=max_side_px)
    assert canvas.working.size == working
    result = drawn_in(canvas)
    assert (result[31, 1001] == 255).all()
    result[31, 1001] = np.asarray(picture)[31, 1001]
    assert np.array_equal(result, np.asarray(picture))


@pytest.mark.parametrize(
    ("mask", "padding", "working"),
    [
        ((100, 100, 200, 200), 0, (256, 256)),
        ((100, 100, 200, 200), 28, (256, 256)),
        ((100, 100, 300, 200), 0, (360, 184)),  # 2:1
        ((100, 100, 300, 110), 0, (360, 184)),  # grown to 2:1
        ((100, 100, 110, 300), 0, (184, 360)),
        ((0, 0, 400, 8), 0, (360, 184)),  # grown away from the picture's edge
        ((0, 0, 400, 400), 4096, (256, 256)),  # within the picture
    ],
)
def test_only_the_mask_and_its_padding_are_painted_at_the_model_s_size(
    mask: tuple[int, int, int, int], padding: int, working: tuple[int, int]
) -> None:
    picture = noise(400, 400)
    canvas = canvas_of(picture, spot((400, 400), *mask), mask_padding=padding)
    assert canvas.working.size == working
    assert canvas.working.width * canvas.working.height == pytest.approx(256**2, rel=0.02)


def test_what_is_painted_is_the_box_around_the_mask() -> None:
    picture = noise(400, 400)
    canvas = canvas_of(picture, spot((400, 400), 100, 120, 148, 168), mask_padding=8)
    expected = picture.crop((92, 112, 156, 176)).resize((256, 256), Image.Resampling.LANCZOS)
    assert canvas.working == expected
    assert canvas.mask is not None
    assert np.array_equal(canvas.mask, spot((256, 256), 32, 32, 224, 224))
    drawn = noise(256, 256, 1)
    small = np.asarray(drawn.resize((64, 64), Image.Resampling.LANCZOS))
    result = np.asarray(canvas.put_back(drawn))
    assert np.array_equal(result[120:168, 100:148], small[8:56, 8:56])


@pytest.mark.parametrize("size", [(4096, 64), (64, 4096)])
def test_a_picture_that_has_no_room_is_painted_in_its_shape(size: tuple[int, int]) -> None:
    canvas = canvas_of(noise(*size), spot(size, 0, 0, *size), mask_padding=0, native_size_px=1024)
    assert sorted(canvas.working.size) == [64, 2048]


@pytest.mark.parametrize("padding", [None, 0, 40])
@pytest.mark.parametrize("blur", [1, 2, 7, 8, 32])
def test_the_blur_reaches_as_far_as_it_says_on_both_sides(blur: int, padding: int | None) -> None:
    size = (400, 320)
    values = opacity(size, spot(size, 120, 100, 280, 220), mask_blur=blur, mask_padding=padding)
    ramp = values[160, 120 - blur - 1 : 120 + blur + 1].astype(int)
    assert ramp[0] == 0
    assert ramp[-1] == 255
    assert (np.diff(ramp) >= 0).all()
    if blur <= 8:  # where the smallest part of the ramp is not rounded away
        assert ramp[1] > 0
        assert ramp[-2] < 255
    assert np.diff(ramp).max() <= 255 / blur + 1, "no step"
    if blur >= 7:
        assert ramp[blur // 2] < 45, "and begins gently: a straight line is at 64 there"
    assert ramp[blur] + ramp[blur + 1] == pytest.approx(255, abs=2), "half at the edge"


def test_without_blur_the_edge_is_hard() -> None:
    size = (128, 64)
    mask = spot(size, 20, 20, 50, 50)
    assert np.array_equal(opacity(size, mask), mask * 255)
    assert np.array_equal(opacity(size, mask, mask_padding=0), mask * 255)


def test_at_the_picture_s_edge_there_is_no_ramp() -> None:
    size = (128, 64)
    for padding in (None, 0, 8):
        values = opacity(size, spot(size, 0, 0, 64, 64), mask_blur=8, mask_padding=padding)
        assert (values[:, :56] == 255).all()


@given(
    st.tuples(st.integers(64, 200), st.integers(64, 200)),
    st.sampled_from([None, 0, 1, 13, 300]),
    st.sampled_from([0, 1, 5, 16, 256]),
    st.integers(0, 2**31),
    st.sampled_from([96, 128, 2048]),
)
def test_outside_the_reach_the_picture_is_equal_byte_for_byte_and_inside_all_is_drawn(
    size: tuple[int, int], padding: int | None, blur: int, seed: int, max_side_px: int
) -> None:
    random = np.random.default_rng(seed)
    mask = np.zeros(size[::-1], bool)
    for _ in range(random.integers(1, 4)):
        x, y = random.integers(size[0]), random.integers(size[1])
        mask[y : y + random.integers(1, 60), x : x + random.integers(1, 60)] = True
    picture = noise(*size, seed)
    canvas = canvas_of(picture, mask, mask_padding=padding, mask_blur=blur, max_side_px=max_side_px)
    assert not any(side % 8 for side in canvas.working.size)
    assert min(canvas.working.size) >= 64
    assert canvas.mask is not None
    assert canvas.mask.shape == canvas.working.size[::-1]

    white, black = drawn_in(canvas, "white"), drawn_in(canvas, "black")
    # In pixels from the mask, diagonal ones as any.
    outside = distance_transform_cdt(~mask, "chessboard") > blur
    assert np.array_equal(white[outside], np.asarray(picture)[outside])
    assert np.array_equal(black[outside], np.asarray(picture)[outside])
    inside = mask.copy()
    if not mask.all():
        inside &= distance_transform_cdt(mask, "chessboard") > blur
    assert (white[inside] == 255).all()
    assert (black[inside] == 0).all()


@given(
    st.tuples(st.integers(64, 200), st.integers(64, 200)),
    st.sampled_from([None, 0, 13]),
    st.integers(0, 2**31),
    st.sampled_from([96, 2048]),
)
def test_whatever_is_white_is_white_in_what_the_models_get(
    size: tuple[int, int], padding: int | None, seed: int, max_side_px: int
) -> None:
    """Each white pixel alone changes what comes out only where the models may paint."""
    random = np.random.default_rng(seed)
    mask = random.random(size[::-1]) < 0.002
    mask[random.integers(size[1]), random.integers(size[0])] = True
    canvas = canvas_of(noise(*size), mask, mask_padding=padding, max_side_px=max_side_px)
    assert canvas.mask is not None
    # What is painted in the working size, where the mask is, comes back over all of the mask.
    painted = Image.fromarray(np.where(canvas.mask, 255, 0).astype(np.uint8)).convert("RGB")
    black = Canvas(Image.new("RGB", size), canvas.working, canvas.mask, canvas._patch)
    result = np.asarray(black.put_back(painted))[:, :, 0]
    assert (result[mask] > 0).all()


def by_lanczos(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.resize(size, Image.Resampling.LANCZOS)


class TestLarger:
    """What the second pass of `hires` draws on."""

    def test_without_a_mask_what_is_drawn_comes_out(self) -> None:
        canvas = canvas_of(noise(64, 128), None)
        assert canvas.larger_sizes(1.3) == ((80, 168), (80, 168))
        larger = canvas.with_larger(1.3, lambda *_: pytest.fail("nothing of it is seen"))
        drawn = noise(80, 168, 1)
        assert larger.put_back(drawn) is drawn
        small = noise(64, 128, 2)
        assert larger.enlarged(small, by_lanczos) == by_lanczos(small, (80, 168))

    def test_edges_are_added_to_the_larger_picture_anew(self) -> None:
        picture = noise(129, 71)
        canvas = canvas_of(picture, spot((129, 71), 128, 70, 129, 71)).with_larger(1.5, by_lanczos)
        larger = canvas.larger
        assert larger is not None
        assert larger.picture == by_lanczos(picture, (194, 106))
        expected = np.pad(np.asarray(larger.picture), ((0, 6), (0, 6), (0, 0)), mode="edge")
        assert np.array_equal(np.asarray(larger.working), expected)
        drawn = noise(136, 72, 1)
        within = by_lanczos(drawn.crop((0, 0, 129, 71)), (194, 106))
        expected = np.pad(np.asarray(within), ((0, 6), (0, 6), (0, 0)), mode="edge")
        assert np.array_equal(np.asarray(canvas.enlarged(drawn, by_lanczos)), expected)

    def test_a_part_that_is_painted_alone_is_painted_larger(self) -> None:
        picture = noise(400, 400)
        mask = spot((400, 400), 100, 120, 148, 168)
        canvas = canvas_of(picture, mask, mask_padding=8).with_larger(1.5, by_lanczos)
        larger = canvas.larger
        assert larger is not None
        whole = by_lanczos(picture, (600, 600))
        expected = whole.crop((138, 168, 234, 264)).resize((384, 384), Image.Resampling.LANCZOS)
        assert larger.working == expected
        assert larger.mask is not None
        assert np.array_equal(larger.mask, spot((384, 384), 48, 48, 336, 336))
        drawn = noise(384, 384, 1)
        small = np.asarray(drawn.resize((96, 96), Image.Resampling.LANCZOS))
        result = np.asarray(canvas.put_back(drawn))
        assert np.array_equal(result[180:252, 150:222], small[12:84, 12:84])
        first = noise(256, 256, 2)
        assert canvas.enlarged(first, by_lanczos) == by_lanczos(first, (384, 384))

    def test_the_blur_grows_with_the_picture(self) -> None:
        size = (400, 320)
        mask = spot(size, 120, 100, 280, 220)
        canvas = canvas_of(Image.new("RGB", size), mask, mask_blur=8).with_larger(2, by_lanczos)
        white = Image.new("RGB", (800, 640), "white")
        ramp = np.asarray(canvas.put_back(white))[320, 240 - 17 : 240 + 17, 0].astype(int)
        assert ramp[0] == 0
        assert ramp[-1] == 255
        assert 0 < ramp[3] < 60
        assert ramp[16] + ramp[17] == pytest.approx(255, abs=2), "half at the edge"

    @given(
        st.tuples(st.integers(64, 150), st.integers(64, 150)),
        st.sampled_from([None, 0, 1, 13, 300]),
        st.sampled_from([0, 1, 5, 16]),
        st.integers(0, 2**31),
        st.sampled_from([96, 2048]),
        st.floats(1.01, 2),
    )
    def test_outside_the_reach_it_is_the_enlarged_picture_and_inside_all_is_drawn(
        self,
        size: tuple[int, int],
        padding: int | None,
        blur: int,
        seed: int,
        max_side_px: int,
        scale: float,
    ) -> None:
        random = np.random.default_rng(seed)
        mask = np.zeros(size[::-1], bool)
        for _ in range(random.integers(1, 4)):
            x, y = random.integers(size[0]), random.integers(size[1])
            mask[y : y + random.integers(1, 60), x : x + random.integers(1, 60)] = True
        picture = noise(*size, seed)
        options = {"mask_padding": padding, "mask_blur": blur, "max_side_px": max_side_px}
        canvas = canvas_of(picture, mask, **options).with_larger(scale, by_lanczos)
        larger = canvas.larger
        assert larger is not None
        assert (larger.picture.size, larger.working.size) == canvas.larger_sizes(scale)
        assert larger.mask is not None
        assert larger.mask.shape == larger.working.size[::-1]
        assert not any(side % 8 for side in larger.working.size)
        grown = round(size[0] * scale), round(size[1] * scale)
        expected = np.asarray(by_lanczos(picture, grown))
        assert np.array_equal(np.asarray(larger.picture), expected)

        there = np.asarray(Image.fromarray(mask).resize(grown, Image.Resampling.NEAREST))
        outside = distance_transform_cdt(~there, "chessboard") > blur * scale + 1
        inside = there.copy()
        if not there.all():
            inside &= distance_transform_cdt(there, "chessboard") > blur * scale + 1
        for colour, value in (("white", 255), ("black", 0)):
            drawn = Image.new("RGB", larger.working.size, colour)
            result = np.asarray(canvas.put_back(drawn))
            assert np.array_equal(result[outside], expected[outside])
            assert (result[inside] == value).all()

    def test_no_pixel_of_the_mask_is_lost(self) -> None:
        mask = spot((96, 64), 17, 0, 18, 64)
        canvas = canvas_of(noise(96, 64), mask).with_larger(1.01, by_lanczos)
        assert canvas.larger is not None
        assert canvas.larger.mask is not None
        assert canvas.larger.mask.any(axis=1).all()


@pytest.mark.parametrize("thickness", [1, 6])
def test_a_thin_line_reaches_the_models(thickness: int) -> None:
    size = (4000, 3000)
    mask = spot(size, 0, 1009, 4000, 1009 + thickness)
    canvas = canvas_of(Image.new("RGB", size), mask)
    assert canvas.working.size == (2048, 1536)
    assert canvas.mask is not None
    assert canvas.mask.any(axis=0).all()


def test_nothing_given_is_changed() -> None:
    picture, mask = noise(129, 65), spot((129, 65), 5, 5, 9, 9)
    before = picture.copy(), mask.copy()
    for padding in (None, 4):
        drawn_in(canvas_of(picture, mask, mask_padding=padding, mask_blur=3))
    assert picture == before[0]
    assert np.array_equal(mask, before[1])


class TestHoles:
    @pytest.mark.parametrize("size", [(64, 64), (101, 77), (1, 9), (200, 3)])
    def test_what_is_not_masked_stays(self, size: tuple[int, int]) -> None:
        picture = noise(*size)
        mask = np.random.default_rng(1).random(size[::-1]) < 0.4
        filled = np.asarray(with_holes_filled(picture, mask))
        assert np.array_equal(filled[~mask], np.asarray(picture)[~mask])

    def test_a_hole_has_the_colours_around_it(self) -> None:
        picture = Image.new("RGB", (120, 80), "blue")
        picture.paste("red", (60, 0, 120, 80))
        mask = spot(picture.size, 10, 10, 110, 70)
        holed = picture.copy()
        holed.paste("white", (10, 10, 110, 70))
        filled = np.asarray(with_holes_filled(holed, mask)).astype(int)
        assert (filled[..., 1] <= 8).all(), "nothing is left of the white"
        assert filled[40, 12, 2] > 200, "blue on the left"
        assert filled[40, 108, 0] > 200, "red on the right"

    def test_without_anything_around_it_stays(self) -> None:
        picture = noise(9, 9)
        everything = np.ones((9, 9), bool)
        assert with_holes_filled(picture, everything).tobytes() == picture.tobytes()
