"""Two pictures over each other, and what differs between them."""

import io

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from local_endpoint import LocalEndpoint
from tests.page.gallery_steps import Drawn, add, close, draw, gallery, open_picture, tiles


@pytest.fixture(scope="module")
def two(endpoint: LocalEndpoint) -> list[Drawn]:
    """Of other steps and sizes, the second one wider."""
    first = draw(endpoint, seed=1)
    return [first, draw(endpoint, seed=1, num_inference_steps=3, width=128)]


def compare(page: Page) -> Locator:
    for tile in tiles(page).all()[:2]:
        tile.get_by_role("checkbox").check()
    gallery(page).get_by_role("button", name="Compare two").click()
    dialog = page.get_by_role("dialog", name="Compare")
    expect(dialog).to_be_visible()
    return dialog


def test_the_slider_moves_by_keys_from_one_picture_to_the_other(
    page: Page, two: list[Drawn]
) -> None:
    for one in two:
        add(page, one)
    dialog = compare(page)
    slider = dialog.get_by_role("slider", name="Divider")
    expect(slider).to_be_focused()
    expect(slider).to_have_value("50")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("52")
    expect(slider).to_have_attribute("aria-valuetext", "52% of the left picture")
    stage = dialog.locator(".compare-stage")
    box = stage.bounding_box()
    divider = stage.locator(".divider").bounding_box()
    assert box is not None
    assert divider is not None
    assert divider["x"] - box["x"] == pytest.approx(0.52 * box["width"], abs=2)
    page.keyboard.press("End")
    expect(slider).to_have_value("100")
    page.keyboard.press("Home")
    expect(slider).to_have_value("0")


def test_the_divider_shows_the_left_picture_left_of_it(page: Page) -> None:
    """By the pixels on the screen: blue on the left, green on the right."""
    page.evaluate(
        """async () => {
            const { comparePictures } = await import("/compare.js");
            const one = (fill) => {
                const canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [64, 64];
                const context = canvas.getContext("2d");
                context.fillStyle = fill;
                context.fillRect(0, 0, 64, 64);
                const url = canvas.toDataURL();
                return { url, name: fill, width: 64, height: 64, parameters: {} };
            };
            comparePictures(one("rgb(0, 0, 255)"), one("rgb(0, 255, 0)"));
        }"""
    )
    dialog = page.get_by_role("dialog", name="Compare")
    slider = dialog.get_by_role("slider", name="Divider")
    for _ in range(25):
        slider.press("ArrowLeft")
    expect(slider).to_have_value("25")
    assert colours(dialog, 0.2, 0.3) == [(0, 0, 255), (0, 255, 0)]
    dialog.get_by_role("button", name="Swap sides").click()
    assert colours(dialog, 0.2, 0.3) == [(0, 255, 0), (0, 0, 255)]
    box = dialog.locator(".compare-stage").bounding_box()
    assert box
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 20)
    assert colours(dialog, 0.7, 0.9) == [(0, 255, 0), (0, 0, 255)]


def colours(dialog: Locator, *shares: float) -> list[tuple[int, ...]]:
    shot = Image.open(io.BytesIO(dialog.locator(".compare-stage").screenshot())).convert("RGB")
    places = [(int(share * shot.width), shot.height // 2) for share in shares]
    return [tuple(shot.getpixel(place)) for place in places]  # type: ignore[arg-type]


def test_what_differs_is_listed_and_nothing_else(page: Page, two: list[Drawn]) -> None:
    for one in two:
        add(page, one)
    dialog = compare(page)
    rows = dialog.get_by_role("table", name="What differs").get_by_role("row")
    expect(rows).to_have_text(
        ["ParameterLeftRight", "width12864", "num_inference_steps32"], use_inner_text=False
    )
    expect(dialog).to_contain_text("Left: a red circle on a blue background, seed 1, 128 x 64")
    expect(dialog).to_contain_text("The pictures have different sizes")
    dialog.get_by_role("button", name="Swap sides").click()
    expect(rows.nth(1)).to_have_text("width64128", use_inner_text=False)


def test_two_and_no_other_number_of_pictures_are_compared(page: Page, two: list[Drawn]) -> None:
    for number, one in enumerate([*two, two[0]]):
        add(page, one, job_id=f"job {number}")
    button = gallery(page).get_by_role("button", name="Compare two")
    for number, is_enabled in enumerate([False, True, False]):
        tiles(page).nth(number).get_by_role("checkbox").check()
        assert button.is_enabled() == is_enabled
    close_tile = tiles(page).nth(2).get_by_role("checkbox")
    close_tile.uncheck()
    button.click()
    close(page)
    expect(button).to_be_focused()


def test_a_picture_is_compared_with_the_next_from_its_own_dialog(
    page: Page, two: list[Drawn]
) -> None:
    for one in two:
        add(page, one)
    open_picture(page).get_by_role("button", name="Compare with the next").click()
    dialog = page.get_by_role("dialog", name="Compare")
    expect(dialog.get_by_role("img", name="Left:")).to_be_visible()
    expect(dialog.get_by_role("img", name="Right:")).to_be_visible()
