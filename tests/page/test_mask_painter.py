"""The mask painter: what is painted is white, pixel for pixel, and only that is repainted."""

import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from local_endpoint import LocalEndpoint
from tests.page.conftest import PHONE, OpenPage, page_of, wait_until
from tests.page.gallery_steps import (
    add,
    data_uri,
    draw,
    file_of,
    open_picture,
    parameter,
    png_of,
    tiles,
)

WIDTH, HEIGHT = 96, 64


@pytest.fixture
def painter(page: Page) -> Locator:
    """Over a picture of 96 x 64 pixels, without a mask to start from."""
    return open_painter(page)


def open_painter(page: Page, mask: bytes | None = None) -> Locator:
    page.evaluate(
        """async ([picture, mask]) => {
            const { paintMask } = await import("/mask_painter.js");
            window.painted = undefined;
            paintMask(picture, mask).then((result) => { window.painted = result; });
        }""",
        [data_uri(png_of((WIDTH, HEIGHT), "blue")), mask and data_uri(mask)],
    )
    dialog = page.get_by_role("dialog", name="Paint a mask")
    expect(dialog).to_be_visible()
    return dialog


def apply(dialog: Locator) -> np.ndarray:
    """The mask, True where white; all else has to be black."""
    dialog.get_by_role("button", name="Apply mask").click()
    expect(dialog).to_have_count(0)
    return mask_of(dialog.page)


def mask_of(page: Page) -> np.ndarray:
    wait_until(page, "window.painted !== undefined")
    pixels = np.asarray(Image.open(io.BytesIO(file_of(page.evaluate("window.painted")))))
    assert set(np.unique(pixels[..., :3])) <= {0, 255}
    assert (pixels[..., 3] == 255).all()
    assert (pixels[..., 0] == pixels[..., 1]).all()
    return pixels[..., 0] == 255


def set_range(dialog: Locator, label: str, value: int) -> None:
    dialog.get_by_label(label, exact=True).evaluate(
        """(range, value) => {
            range.value = value;
            range.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        value,
    )


def stroke(dialog: Locator, *points: tuple[float, float]) -> None:
    """With the mouse, along points in pixels of the picture."""
    page, box = dialog.page, dialog.get_by_role("img", name="Mask of").bounding_box()
    assert box
    scale = box["width"] / WIDTH
    for i, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * scale, box["y"] + y * scale, steps=4)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def add_shape(dialog: Locator, kind: str, box: tuple[int, int, int, int]) -> None:
    details = dialog.get_by_role("group").filter(has_text="Shapes by numbers")
    if details.get_attribute("open") is None:
        dialog.get_by_text("Shapes by numbers").click()
    dialog.get_by_label("Shape", exact=True).select_option(kind)
    for name, value in zip(("x", "y", "width", "height"), box, strict=True):
        dialog.get_by_label(name, exact=True).fill(str(value))
    dialog.get_by_role("button", name="Add shape").click()


def test_what_the_mouse_paints_is_white_in_a_mask_of_the_pictures_size(painter: Locator) -> None:
    set_range(painter, "Brush size", 10)
    stroke(painter, (20, 30), (70, 30))
    mask = apply(painter)
    assert mask.shape == (HEIGHT, WIDTH)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    distance = np.hypot(x - np.clip(x, 20, 70), y - 30)
    # The pointer's place is rounded to a pixel of the screen.
    assert mask[distance < 4.5].all()
    assert not mask[distance > 5.5].any()


def test_the_eraser_undo_and_redo_take_back_and_bring_back(painter: Locator) -> None:
    page = painter.page
    set_range(painter, "Brush size", 10)
    expect(painter.get_by_role("button", name="Undo")).to_be_disabled()
    stroke(painter, (20, 20), (70, 20))
    page.keyboard.press("e")
    stroke(painter, (40, 20), (50, 20))
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    expect(painter.get_by_role("button", name="Undo")).to_be_disabled()
    page.keyboard.press("Control+y")
    painter.get_by_role("button", name="Redo").click()
    expect(painter.get_by_role("button", name="Redo")).to_be_disabled()
    mask = apply(painter)
    assert mask[20, 25]
    assert not mask[20, 45]
    assert mask[20, 65]


def test_fill_clear_and_invert(painter: Locator) -> None:
    stroke(painter, (10, 10), (20, 10))
    painter.get_by_role("button", name="Clear").click()
    painter.get_by_role("button", name="Apply mask").click()
    expect(painter.get_by_role("status")).to_contain_text("Nothing is painted yet")
    add_shape(painter, "rectangle", (0, 0, 10, HEIGHT))
    painter.get_by_role("button", name="Invert").click()
    mask = apply(painter)
    assert not mask[:, :10].any()
    assert mask[:, 10:].all()
    again = open_painter(painter.page)
    again.get_by_role("button", name="Fill all").click()
    assert apply(again).all()


def test_a_mask_is_made_without_a_pointer(painter: Locator) -> None:
    page = painter.page
    add_shape(painter, "rectangle", (8, 4, 20, 16))
    add_shape(painter, "ellipse", (50, 10, 30, 20))
    painter.get_by_label("height", exact=True).press("Enter")
    mask = mask_of(page)
    assert mask[4:20, 8:28].all()
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    inside = ((x - 65) / 15) ** 2 + ((y - 20) / 10) ** 2 <= 1
    assert (mask[:, 40:] == inside[:, 40:]).all()
    assert mask.sum() == 20 * 16 + inside.sum()


def test_shapes_outside_of_the_picture_are_refused(painter: Locator) -> None:
    add_shape(painter, "rectangle", (WIDTH, 0, 5, 5))
    painter.get_by_role("button", name="Apply mask").click()
    expect(painter.get_by_role("status")).to_contain_text("Nothing is painted yet")


def test_brackets_change_the_brush_and_numbers_are_typed_in_peace(painter: Locator) -> None:
    page = painter.page
    size = painter.get_by_label("Brush size", exact=True)
    before = float(size.input_value())
    page.keyboard.press("]")
    larger = float(size.input_value())
    assert larger > before
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert float(size.input_value()) < larger
    painter.get_by_text("Shapes by numbers").click()
    painter.get_by_label("x", exact=True).press("e")
    expect(painter.get_by_label("Eraser")).not_to_be_checked()


def test_escape_dismisses_without_a_mask(painter: Locator) -> None:
    page = painter.page
    stroke(painter, (10, 10), (20, 10))
    page.keyboard.press("Escape")
    expect(painter).to_have_count(0)
    wait_until(page, "window.painted === null")


def test_a_mask_to_start_from_counts_as_in_the_worker(page: Page) -> None:
    """White from half white on; what is transparent is black; another size is fitted."""
    grey = np.zeros((HEIGHT // 2, WIDTH // 2, 4), np.uint8)
    grey[:, :10] = (127, 127, 127, 255)
    grey[:, 10:20] = (128, 128, 128, 255)
    grey[:, 20:30] = (255, 255, 255, 0)
    grey[:, 30:] = (255, 255, 255, 255)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    mask = apply(open_painter(page, file.getvalue()))
    assert mask.any(axis=0).tolist() == [False] * 20 + [True] * 20 + [False] * 20 + [True] * 36
    assert mask.all(axis=0).tolist() == mask.any(axis=0).tolist()


def test_zoom_and_opacity_leave_the_mask_as_it_is(painter: Locator) -> None:
    canvas = painter.get_by_role("img", name="Mask of")
    box = canvas.bounding_box()
    add_shape(painter, "rectangle", (8, 4, 20, 16))
    painter.get_by_text("Shapes by numbers").click()
    set_range(painter, "Zoom", 200)
    set_range(painter, "Opacity", 20)
    larger = canvas.bounding_box()
    assert box is not None
    assert larger is not None
    assert larger["width"] == pytest.approx(2 * box["width"], rel=0.02)
    expect(canvas).to_have_css("opacity", "0.2")
    assert apply(painter).sum() == 20 * 16


def test_a_finger_paints_on_a_phone(open_page: OpenPage, endpoint: LocalEndpoint) -> None:
    page = open_page(page_of(endpoint), **PHONE)
    dialog = open_painter(page)
    canvas = dialog.get_by_role("img", name="Mask of")
    box = canvas.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finger = page.context.new_cdp_session(page)
    for kind, x in (("touchStart", 20), ("touchMove", 40), ("touchMove", 70), ("touchEnd", 0)):
        scale = box["width"] / WIDTH
        point = {"x": box["x"] + x * scale, "y": box["y"] + 30 * scale}
        points = [] if kind == "touchEnd" else [point]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    mask = apply(dialog)
    assert mask[30, 22:68].all()
    assert not mask[50:].any()


def test_painting_a_gallery_picture_repaints_only_what_was_painted(
    page: Page, endpoint: LocalEndpoint
) -> None:
    own = draw(endpoint, seed=6, width=WIDTH, height=HEIGHT)
    add(page, own)
    page.get_by_label("prompt", exact=True).fill("a yellow star on a green background")
    page.get_by_label("num_inference_steps", exact=True).fill("4")
    open_picture(page).get_by_role("button", name="Paint mask").click()
    dialog = page.get_by_role("dialog", name="Paint a mask")
    set_range(dialog, "Brush size", 16)
    stroke(dialog, (24, 32), (40, 32))
    dialog.get_by_role("button", name="Apply mask").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Draw").click()
    expect(tiles(page)).to_have_count(2)
    detail = open_picture(page)
    expect(parameter(detail, "mask_url")).to_contain_text("data:image/png;base64")
    output = endpoint.status(endpoint.jobs[-1].id)["output"]
    job_input = endpoint.jobs[-1].request["input"]
    assert file_of(job_input["image_url"]) == own.files[0]
    mask = np.asarray(Image.open(io.BytesIO(file_of(job_input["mask_url"]))).convert("L")) > 0
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask[32, 32]
    assert not mask[5, 5]
    before, after = (
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
        for file in (own.files[0], file_of(output["images"][0]))
    )
    assert (before[~mask] == after[~mask]).all()
    assert np.abs(before[mask] - after[mask]).mean() > 5


def test_two_fingers_move_a_zoomed_picture_and_paint_nothing(
    open_page: OpenPage, endpoint: LocalEndpoint
) -> None:
    page = open_page(page_of(endpoint), **PHONE)
    dialog = open_painter(page)
    set_range(dialog, "Zoom", 300)
    canvas = dialog.get_by_role("img", name="Mask of")
    stage = dialog.locator(".mask-stage")
    stage.evaluate("(stage) => stage.scrollTo(0, 0)")
    before, frame = canvas.bounding_box(), stage.bounding_box()
    assert before is not None
    assert frame is not None
    fingers = page.context.new_cdp_session(page)
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    for kind, moved, count in (
        ("touchStart", 0, 1),
        ("touchStart", 0, 2),
        ("touchMove", 40, 2),
        ("touchMove", 80, 2),
        ("touchEnd", 0, 0),
    ):
        points = [{"x": x - moved + 30 * i, "y": y, "id": i} for i in range(count)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    after = canvas.bounding_box()
    assert after is not None
    assert after["x"] < before["x"] - 30
    dialog.get_by_role("button", name="Apply mask").click()
    expect(dialog.get_by_role("status")).to_contain_text("Nothing is painted yet")
