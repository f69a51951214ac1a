"""Takes the README's pictures of the page: in Chromium, at a local endpoint with the miniature
model. `python -m tools.page_screenshots`"""

import io
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from local_endpoint import LocalEndpoint
from tools.chromium import launch

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = (
    "a green triangle on a black background",
    "a black square on a cyan background",
    "a white triangle on a green background",
    "a magenta triangle on a yellow background",
    "a blue ring on a yellow background",
    "a green square on a white background",
    "a cyan star on a magenta background",
    "a white ring on a red background",
    "a yellow star on a black background",
    "a red circle on a blue background",
)
SLOW_PROMPT = "a yellow circle on a magenta background"
# So many that a preview is there, and the job is not over before its picture is taken.
SLOW_STEPS = 600
MOSTLY_DRAWN = re.compile("[78][0-9]%")
GRID_PROMPT = "a red star on a white background"
GRID = {
    "X setting": "num_inference_steps",
    "X values": "2, 4, 8, 25",
    "Y setting": "guidance_scale",
    "Y values": "1, 3, 7.5",
}
SEED = "1"
WAIT_MS = 120_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}


def main() -> None:
    with LocalEndpoint() as endpoint, sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_MS)
        browser = launch(playwright)
        parts = urlsplit(endpoint.url)

        def opened(options: dict[str, Any]) -> Page:
            page = browser.new_context(**options, reduced_motion="reduce").new_page()
            page.set_default_timeout(WAIT_MS)
            page.goto(f"{parts.scheme}://{parts.netloc}/")
            for prompt in PROMPTS:
                draw(page, prompt)
            button(page, "Clear finished").click()
            return page

        page = opened(DESKTOP)
        draw_slowly(page)
        save(page, "page-light")
        page.emulate_media(color_scheme="dark")
        save(page, "page-dark")
        page.emulate_media(color_scheme="light")
        end_jobs(page)
        paint(page)
        save(page, "page-mask")
        button(page.get_by_role("dialog").last, "Close").click()
        page.keyboard.press("Escape")
        draw_grid(page)
        save(page, "page-grid")

        page = opened(PHONE)
        draw_slowly(page)
        page.get_by_role("link", name="1 job").click()
        save(page, "page-phone")
        end_jobs(page)
        browser.close()


def field(page: Page, name: str) -> Locator:
    return page.get_by_label(name, exact=True)


def button(scope: Page | Locator, name: str) -> Locator:
    return scope.get_by_role("button", name=name, exact=True)


def section(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def tiles(page: Page) -> Locator:
    return section(page, "Gallery").get_by_role("list").get_by_role("listitem")


def draw(page: Page, prompt: str) -> None:
    before = tiles(page).count()
    field(page, "prompt").fill(prompt)
    field(page, "seed").fill(SEED)
    button(page, "Draw").click()
    expect(tiles(page)).to_have_count(before + 1)


def draw_slowly(page: Page) -> None:
    """A job under way, whose preview shows something already."""
    field(page, "prompt").fill(SLOW_PROMPT)
    steps = field(page, "num_inference_steps")
    steps.fill(str(SLOW_STEPS))
    button(page, "Draw").click()
    steps.fill("")
    steps.blur()
    show_top(page)
    jobs = section(page, "Jobs")
    expect(jobs.get_by_text(MOSTLY_DRAWN)).to_be_visible()
    expect(jobs.get_by_role("img")).to_be_visible()


def end_jobs(page: Page) -> None:
    page.get_by_role("button", name=re.compile("^Cancel: ")).click()
    button(page, "Clear finished").click()


def paint(page: Page) -> None:
    """A mask over the shape of the second picture, a star somewhat right of the middle."""
    tiles(page).nth(1).get_by_role("button").click()
    button(page.get_by_role("dialog"), "Paint mask").click()
    painter = page.get_by_role("dialog").last
    painter.get_by_label("Brush size").fill("30")
    left, top, side = painter.locator("canvas").evaluate(
        "(one) => (({ left, top, width }) => [left, top, width])(one.getBoundingClientRect())"
    )
    for turn in range(41):
        # Two rounds, the second one inside of the first.
        radius = side * (0.24 if turn <= 20 else 0.1)
        x = left + 0.55 * side + radius * math.cos(turn * math.pi / 10)
        y = top + 0.49 * side + radius * math.sin(turn * math.pi / 10)
        page.mouse.move(x, y)
        if turn == 0:
            page.mouse.down()
    page.mouse.up()


def draw_grid(page: Page) -> None:
    field(page, "prompt").fill(GRID_PROMPT)
    grid = section(page, "X/Y grid")
    grid.get_by_text("X/Y grid", exact=True).click()
    for name, value in GRID.items():
        control = grid.get_by_label(name)
        if name.endswith("setting"):
            control.select_option(value)
        else:
            control.fill(value)
    button(grid, "Start").click()
    expect(grid.get_by_role("img")).to_have_count(12)
    expect(button(grid, "Start")).to_be_enabled()
    button(page, "Clear finished").click()
    page.set_viewport_size({"width": 1280, "height": 860})
    show_top(page)
    grid.evaluate("(one) => scrollBy(0, one.getBoundingClientRect().top - 80)")


def show_top(page: Page) -> None:
    """Of the form and the page, and no control under the pointer."""
    page.locator("#form").evaluate("(form) => form.scrollTo(0, 0)")
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(0, 0)


def save(page: Page, name: str) -> None:
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
