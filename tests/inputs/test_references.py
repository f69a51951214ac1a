"""Control pictures and pictures that are prompts, on the way from their files to what is drawn."""

import asyncio
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.canvas import Canvas, prepare_canvas
from sdxl_worker.inputs.control_maps import canny_map
from sdxl_worker.inputs.references import (
    References,
    addresses_of,
    decode_references,
    prepare_references,
    references_of,
)
from sdxl_worker.request import Request, parse_request
from tests.support import data_uri, noise_picture

ADDRESS = "https://example.com/a.png"
SIZE = (128, 64)


def request_of(**fields: Any) -> Request:
    return parse_request({"prompt": "x", **fields})


def controlled(*kinds: str, **fields: Any) -> Request:
    """With finished maps."""
    entries = [{"type": kind, "image_url": ADDRESS, "preprocess": False} for kind in kinds]
    return request_of(controlnet=entries, **fields)


def prompted(**of_prompt: Any) -> Request:
    return request_of(ip_adapter=[{"image_url": ADDRESS, **of_prompt}])


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def decoded(request: Request, *pictures: Image.Image, size: tuple[int, int] = SIZE) -> References:
    contents = dict(zip(addresses_of(request), map(png, pictures), strict=True))
    return references_of(request, asyncio.run(decode_references(request, contents, size)))


def masked_canvas(picture: Image.Image, padding: int | None) -> Canvas:
    mask = np.zeros(picture.size[::-1], bool)
    mask[20:40, 30:50] = True
    return prepare_canvas(
        picture, mask, mask_blur=0, mask_padding=padding, native_size_px=128, max_side_px=2048
    )


def test_each_picture_has_its_place_in_the_request() -> None:
    request = request_of(
        controlnet=[{"type": "canny", "image_url": "http://a"}],
        ip_adapter=[
            {"image_url": "http://b"},
            {"image_url": "http://c", "mask_url": "http://d"},
        ],
    )
    assert addresses_of(request) == {
        "controlnet[0].image_url": "http://a",
        "ip_adapter[0].image_url": "http://b",
        "ip_adapter[1].image_url": "http://c",
        "ip_adapter[1].mask_url": "http://d",
    }
    assert addresses_of(request_of()) == {}


def test_a_control_picture_is_cut_to_the_shape_that_is_drawn() -> None:
    sent = Image.new("RGB", (64, 64), "red")
    sent.paste("blue", (0, 16, 64, 48))
    [fitted] = decoded(controlled("depth"), sent).controls
    assert fitted.size == SIZE
    assert np.asarray(fitted)[4:-4, :, 2].min() > 240, "what is too much is cut off"


@pytest.mark.parametrize(("how", "left_over"), [("pad", 64), ("stretch", 0)])
def test_or_is_fitted_to_it_as_the_request_says(how: str, left_over: int) -> None:
    sent = Image.new("RGB", (64, 64), "white")
    sent.paste("black", (0, 0, 32, 64))
    request = controlled("depth", fit=how)
    [fitted] = decoded(request, sent).controls
    dark = (np.asarray(fitted)[32, :, 0] < 128).sum()
    assert dark == 64
    edge = np.abs(np.diff(np.asarray(fitted)[32, :, 0].astype(int)))
    assert (edge > 20).sum() <= (2 if left_over else 6), "padding does not blur"


def test_a_map_of_the_drawn_size_comes_through_as_it_is() -> None:
    sent = noise_picture(*SIZE)
    [fitted] = decoded(controlled("canny"), sent).controls
    assert fitted.tobytes() == sent.tobytes()


def test_pictures_that_are_prompts_keep_their_size() -> None:
    sent = noise_picture(45, 33)
    found = decoded(prompted(), sent)
    [picture] = found.image_prompts
    assert (picture.size, picture.tobytes()) == (sent.size, sent.tobytes())
    assert found.image_prompt_masks == (None,)


def test_a_prompt_s_mask_is_of_what_is_drawn() -> None:
    sent = Image.new("L", (256, 128))
    ImageDraw.Draw(sent).rectangle((0, 0, 99, 127), fill="white")
    [mask] = decoded(prompted(mask_url=ADDRESS), noise_picture(45, 33), sent).image_prompt_masks
    assert mask is not None
    assert mask.shape == SIZE[::-1]
    assert mask[:, :50].all()
    assert not mask[:, 50:].any()


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (Image.new("L", (64, 64), "white"), "a mask of 64 x 64 pixels does not fit"),
        (Image.new("L", SIZE), "nothing in it is at least half white, so the picture would count"),
    ],
)
def test_a_prompt_s_mask_of_another_shape_or_with_nothing_in_it_is_refused(
    mask: Image.Image, told: str
) -> None:
    with pytest.raises(RequestError) as caught:
        decoded(prompted(mask_url=ADDRESS), noise_picture(45, 33), mask)
    assert str(caught.value).startswith(f"ip_adapter[0].mask_url: {told}")
    assert "repaint" not in str(caught.value)


def test_what_is_no_picture_is_refused_by_its_place() -> None:
    request = controlled("depth", "canny")
    contents = dict(zip(addresses_of(request), (png(noise_picture(*SIZE)), b"x"), strict=True))
    with pytest.raises(RequestError, match=r"^controlnet\[1\].image_url: not a picture"):
        asyncio.run(decode_references(request, contents, SIZE))


@pytest.mark.parametrize("padding", [None, 4])
def test_on_a_canvas_they_are_cut_and_scaled_as_what_is_drawn_on(padding: int | None) -> None:
    picture = noise_picture(100, 76)
    canvas = masked_canvas(picture, padding)
    request = controlled("tile")
    [control] = prepare_references(References((picture,)), request, canvas, None).controls
    assert control.tobytes() == canvas.working.tobytes()
    assert canvas.mask is not None
    whole = np.zeros((76, 100), bool)
    whole[20:40, 30:50] = True
    references = References(image_prompts=(picture,), image_prompt_masks=(whole,))
    [mask] = prepare_references(references, prompted(), canvas, None).image_prompt_masks
    assert mask is not None
    assert np.array_equal(mask, canvas.mask)


def test_a_prompt_s_mask_beside_the_part_that_is_painted_is_refused() -> None:
    canvas = masked_canvas(noise_picture(100, 76), 4)
    elsewhere = np.zeros((76, 100), bool)
    elsewhere[70:, 90:] = True
    references = References(image_prompts=(noise_picture(8, 8),), image_prompt_masks=(elsewhere,))
    with pytest.raises(RequestError, match=r"^ip_adapter\[0\].mask_url: nothing of it is white"):
        prepare_references(references, prompted(), canvas, None)


def test_maps_are_made_in_the_size_that_is_drawn() -> None:
    """Scaled edges would be grey."""
    picture = Image.new("RGB", (100, 76), "navy")
    ImageDraw.Draw(picture).ellipse((25, 15, 55, 45), fill="yellow")
    canvas = masked_canvas(picture, 4)
    entry = {"type": "canny", "image_url": ADDRESS}
    request = request_of(controlnet=[entry])
    [edges] = prepare_references(References((picture,)), request, canvas, None).controls
    assert edges.tobytes() == canny_map(canvas.working).tobytes()
    assert set(np.unique(np.asarray(edges))) == {0, 255}


def test_repaint_is_black_in_the_request_s_mask_and_a_tile_is_the_picture() -> None:
    picture = noise_picture(128, 64)
    canvas = masked_canvas(picture, None)
    entries = [{"type": kind, "image_url": ADDRESS} for kind in ("repaint", "tile")]
    request = request_of(controlnet=entries, image_url=data_uri(picture), mask_url=ADDRESS)
    repaint, tile = prepare_references(References((picture,) * 2), request, canvas, None).controls
    assert tile.tobytes() == picture.tobytes()
    pixels = np.asarray(repaint)
    assert canvas.mask is not None
    assert not pixels[canvas.mask].any()
    assert np.array_equal(pixels[~canvas.mask], np.asarray(picture)[~canvas.mask])


def test_with_scale_0_no_map_is_made_unless_it_is_sent_back() -> None:
    entry = {"type": "canny", "image_url": ADDRESS, "scale": 0}
    picture = noise_picture(64, 64)
    for asked in (False, True):
        request = request_of(controlnet=[entry], return_maps=asked)
        [control] = prepare_references(References((picture,)), request, None, None).controls
        assert (control is picture) == (not asked)


def test_repaint_without_a_mask_is_refused() -> None:
    picture = noise_picture(64, 64)
    request = request_of(controlnet=[{"type": "repaint", "image_url": ADDRESS}])
    with pytest.raises(RequestError, match=r"^controlnet\[0\].type: repaint needs a mask"):
        prepare_references(References((picture,)), request, None, None)
