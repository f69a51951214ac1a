"""The gallery: what is drawn stays in the browser, and can be taken up again."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect

from local_endpoint import LocalEndpoint
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.files import encode
from sdxl_worker.outputs.metadata import About, describe
from sdxl_worker.request import Request, parse_request
from tests.outputs.samples import ABOUT
from tests.page.conftest import OpenPage, page_of
from tests.page.gallery_steps import (
    CHEAP,
    PROMPT,
    Drawn,
    add,
    close,
    data_uri,
    draw,
    file_of,
    gallery,
    open_picture,
    parameter,
    png_of,
    tiles,
)
from tests.page.watch import Watch

LAST_SEED = 2**64 - 1
CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}
LINKED_FILE = png_of((64, 64), "green")
# All that quoting has to get through, in a shell, in Python and in JSON.
ODD_PROMPT = (
    "a red circle, it's \"50%\" $(touch hacked) `touch hacked` \\n \\\n ünï 日本 !! ${HOME} '''"
)


@pytest.fixture(scope="module")
def drawn(endpoint: LocalEndpoint) -> Drawn:
    """Two pictures of one job, of the last seed and the first."""
    return draw(endpoint, seed=LAST_SEED, num_images=2)


@pytest.fixture(scope="module")
def alone(endpoint: LocalEndpoint) -> Drawn:
    """The first of them by itself: beside another one, it is rounded otherwise."""
    return draw(endpoint, seed=LAST_SEED)


@pytest.fixture
def clipboard_page(open_page: OpenPage, endpoint: LocalEndpoint) -> Page:
    return open_page(page_of(endpoint), **CLIPBOARD)


def fill(page: Page, **fields: Any) -> None:
    for name, value in fields.items():
        page.get_by_label(name, exact=True).fill(str(value))


def drop(page: Page, *files: tuple[str, str, bytes]) -> None:
    """Drop files on the gallery, as (name, media type, content)."""
    expect(gallery(page).get_by_role("heading", name="Gallery")).to_be_visible()
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, type, content] of files) {
                const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type, lastModified: 1 }));
            }
            return transfer;
        }""",
        [[name, kind, base64.b64encode(content).decode()] for name, kind, content in files],
    )
    gallery(page).dispatch_event("drop", {"dataTransfer": transfer})


def downloaded(page: Page, name: str = "Download") -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def copied(page: Page, name: str) -> str:
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=name, exact=True).click()
    expect(dialog.get_by_role("status").filter(has_text="Copied.")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


# What is kept


def test_what_the_form_draws_is_in_the_gallery_with_its_file_and_survives_a_reload(
    page: Page, endpoint: LocalEndpoint
) -> None:
    fill(page, prompt=PROMPT, width=64, height=64, num_inference_steps=2, seed=7, num_images=2)
    page.get_by_role("button", name="Draw").click()
    expect(tiles(page)).to_have_count(2)
    output = endpoint.status(endpoint.jobs[-1].id)["output"]
    for _ in range(2):
        expect(tiles(page).nth(0)).to_contain_text("seed 7")
        expect(tiles(page).nth(1)).to_contain_text("seed 8")
        open_picture(page)
        assert downloaded(page)[1] == file_of(output["images"][0])
        close(page)
        page.reload()
        expect(tiles(page)).to_have_count(2)
    expect(gallery(page)).to_contain_text(re.compile(r"2 pictures, \d+ kB in this browser"))


def test_the_newest_picture_is_first(page: Page, drawn: Drawn, endpoint: LocalEndpoint) -> None:
    add(page, drawn)
    add(page, draw(endpoint, seed=5))
    expect(tiles(page).first).to_contain_text("seed 5")
    page.reload()
    expect(tiles(page).first).to_contain_text("seed 5")


def test_a_job_is_added_once_however_often_it_is_told(page: Page, drawn: Drawn) -> None:
    page.evaluate(
        """async ([input, output, jobId]) => {
            const { addPictures } = await import("/gallery.js");
            await Promise.all([1, 2, 3].map(() => addPictures({ input, output, jobId })));
        }""",
        [drawn.input, drawn.output, drawn.job_id],
    )
    assert drawn.output["image_url"] == drawn.output["images"][0]
    page.reload()
    add(page, drawn)
    expect(tiles(page)).to_have_count(2)


def test_seeds_go_round_at_two_to_the_64th_without_losing_a_digit(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    dialog = open_picture(page, 0)
    expect(parameter(dialog, "seed")).to_have_text(str(LAST_SEED))
    dialog.get_by_role("button", name="Older").click()
    expect(parameter(page.get_by_role("dialog"), "seed")).to_have_text("0")
    page.keyboard.press("ArrowLeft")
    dialog.get_by_role("button", name="Load into form").click()
    expect(page.get_by_label("seed", exact=True)).to_have_value(str(LAST_SEED))


def test_a_seed_that_only_the_answer_tells_keeps_its_digits(page: Page) -> None:
    """Of a picture without metadata."""
    output = {"images": [data_uri(png_of((8, 8), "red"))] * 2, "seed": LAST_SEED}
    page.evaluate(
        """async (text) => {
            const { addPictures } = await import("/gallery.js");
            const { parseJson } = await import("/json.js");
            await addPictures({ input: {}, output: parseJson(text), jobId: "odd", seconds: 1 });
        }""",
        json.dumps(output),
    )
    expect(tiles(page).nth(0)).to_contain_text(f"seed {LAST_SEED}")
    expect(tiles(page).nth(1)).to_have_text("seed 0")


def test_hundreds_of_pictures_are_shown_a_page_at_a_time(page: Page) -> None:
    page.evaluate(
        """async (image) => {
            const { addPictures } = await import("/gallery.js");
            for (let job = 0; job < 25; job += 1) {
                const images = Array(16).fill(image);
                const output = { images, seed: job * 16 };
                await addPictures({ input: {}, output, jobId: `${job}` });
            }
        }""",
        data_uri(png_of((8, 8), "red")),
    )
    expect(gallery(page)).to_contain_text("400 pictures")
    expect(tiles(page)).to_have_count(24)
    page.reload()
    expect(gallery(page)).to_contain_text("Page 1 of 17")
    expect(tiles(page).first).to_contain_text("seed 384")
    gallery(page).get_by_role("button", name="Older").click()
    expect(tiles(page).first).to_contain_text("seed 376")
    expect(tiles(page)).to_have_count(24)
    for _ in range(15):
        gallery(page).get_by_role("button", name="Older").click()
    expect(tiles(page)).to_have_count(16)
    expect(gallery(page).get_by_role("button", name="Older")).to_be_disabled()


def test_another_tab_shows_what_is_added_and_deleted(page: Page, drawn: Drawn) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    expect(gallery(other)).to_contain_text("No pictures yet")
    add(page, drawn)
    expect(tiles(other)).to_have_count(2)
    open_picture(other).get_by_role("button", name="Delete").click()
    other.get_by_role("dialog", name="Delete this picture").get_by_role(
        "button", name="Delete"
    ).click()
    expect(tiles(page)).to_have_count(1)


def test_a_picture_is_deleted_when_that_is_confirmed(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    dialog = open_picture(page)
    dialog.get_by_role("button", name="Delete").click()
    question = page.get_by_role("dialog", name="Delete this picture")
    question.get_by_role("button", name="Cancel").click()
    expect(tiles(page)).to_have_count(2)
    dialog.get_by_role("button", name="Delete").click()
    question.get_by_role("button", name="Delete").click()
    expect(tiles(page)).to_have_count(1)
    expect(tiles(page).get_by_role("button")).to_be_focused()
    page.reload()
    expect(tiles(page)).to_contain_text(["seed 0"])


def test_all_are_deleted_when_that_is_confirmed(page: Page, drawn: Drawn) -> None:
    expect(gallery(page).get_by_role("button", name="Delete all")).to_be_disabled()
    add(page, drawn)
    gallery(page).get_by_role("button", name="Delete all").click()
    page.keyboard.press("Escape")
    expect(tiles(page)).to_have_count(2)
    gallery(page).get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(gallery(page)).to_contain_text("No pictures yet")
    page.reload()
    expect(gallery(page)).to_contain_text("No pictures yet")
    left = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("sdxl-gallery").onsuccess = (event) => {
                const inputs = event.target.result.transaction("inputs").objectStore("inputs");
                inputs.count().onsuccess = ({ target }) => resolve(target.result);
            };
        })"""
    )
    assert left == 0


def test_a_picture_that_is_added_leaves_the_focus_where_it_is(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    tiles(page).nth(1).get_by_role("button").focus()
    add(page, drawn, job_id="another")
    expect(tiles(page)).to_have_count(4)
    expect(tiles(page).nth(3).get_by_role("button")).to_be_focused()


# Where the browser keeps nothing


def test_without_storage_the_gallery_says_so_and_keeps_pictures_in_memory(
    page: Page, drawn: Drawn
) -> None:
    page.context.add_init_script(
        "indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); };"
    )
    page.reload()
    expect(gallery(page)).to_contain_text("keeps no pictures here (its settings forbid it)")
    add(page, drawn)
    add(page, drawn)
    expect(tiles(page)).to_have_count(2)
    dialog = open_picture(page)
    expect(parameter(dialog, "prompt")).to_contain_text(PROMPT)
    assert downloaded(page)[1] == drawn.files[0]
    dialog.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog", name="Delete this").get_by_role("button", name="Delete").click()
    expect(tiles(page)).to_have_count(1)


def test_what_a_full_storage_does_not_take_stays_in_memory(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    expect(tiles(page)).to_have_count(2)
    # Chromium's own limit for tests is not one for IndexedDB.
    page.evaluate(
        """() => {
            IDBObjectStore.prototype.add = () => {
                throw new DOMException("full", "QuotaExceededError");
            };
        }"""
    )
    add(page, Drawn({}, {"images": [data_uri(LINKED_FILE)], "seed": 3}, "one more"))
    expect(gallery(page)).to_contain_text("could not store a picture (its storage is full)")
    expect(tiles(page)).to_have_count(3)
    expect(tiles(page).first).to_contain_text("seed 3")
    page.reload()
    expect(tiles(page)).to_have_count(2)


def test_a_database_that_is_taken_away_is_told_and_the_gallery_goes_on(
    page: Page, drawn: Drawn
) -> None:
    add(page, drawn)
    page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.deleteDatabase("sdxl-gallery").onsuccess = () => resolve();
        })"""
    )
    expect(gallery(page)).to_contain_text("The browser has closed its storage")
    add(page, drawn, job_id="later")
    expect(tiles(page)).to_have_count(2)


def test_a_file_that_is_dropped_while_the_gallery_opens_is_kept(page: Page) -> None:
    page.add_init_script(
        """{
            const { open } = IDBFactory.prototype;
            IDBFactory.prototype.open = function (...names) {
                const opening = {};
                setTimeout(() => {
                    const request = open.apply(this, names);
                    for (const name of ["onsuccess", "onerror", "onupgradeneeded"]) {
                        request[name] = () => {
                            opening.result = request.result;
                            opening[name]?.();
                        };
                    }
                }, 500);
                return opening;
            };
        }"""
    )
    page.reload()
    expect(gallery(page).get_by_role("heading", name="Gallery")).to_be_visible()
    drop(page, ("early.png", "image/png", png_of((8, 8), "red")))
    expect(tiles(page)).to_have_count(1)
    page.reload()
    expect(tiles(page)).to_have_count(1)


# What the files tell


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_parameters_are_read_from_the_file_and_completed_from_what_was_sent(
    page: Page, endpoint: LocalEndpoint, output_format: str
) -> None:
    add(
        page,
        draw(endpoint, seed=11, output_format=output_format, negative_prompt="a, b: c"),
    )
    dialog = open_picture(page)
    for name, value in {"seed": "11", "guidance_scale": "7.5", "model": "shapes"}.items():
        expect(parameter(dialog, name)).to_have_text(value)
    expect(parameter(dialog, "Software")).to_contain_text("sdxl-worker")
    expect(parameter(dialog, "prompt")).to_have_text(f"{PROMPT} not in the file")
    expect(parameter(dialog, "negative_prompt")).to_have_text("a, b: c not in the file")
    dialog.get_by_text("As text").click()
    expect(dialog.locator("pre")).to_contain_text(f"{PROMPT}\nNegative prompt: a, b: c\nSteps: 2")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_file_from_disk_is_added_with_all_that_it_tells(
    page: Page, output_format: OutputFormat
) -> None:
    prompt = "ein roter Kreis, 赤い円, <b>bold</b>"
    request = Request(prompt=prompt, seed=LAST_SEED, **CHEAP)  # type: ignore[arg-type]
    text = describe(request, 0, (64, 64), About("shapes", "all"))
    file = encode(Image.new("RGB", (64, 64), "red"), output_format, 90, text)
    drop(page, (f"mine.{output_format}", f"image/{output_format}", file))
    expect(tiles(page)).to_have_count(1)
    page.reload()
    dialog = open_picture(page)
    expect(parameter(dialog, "prompt")).to_have_text(prompt)
    expect(parameter(dialog, "seed")).to_have_text(str(LAST_SEED))
    expect(dialog.locator("pre")).to_have_text(text["parameters"], use_inner_text=False)
    dialog.get_by_role("button", name="Load into form").click()
    expect(page.get_by_label("prompt", exact=True)).to_have_value(prompt)
    expect(page.get_by_label("seed", exact=True)).to_have_value(str(LAST_SEED))
    expect(page.get_by_label("num_inference_steps", exact=True)).to_have_value("2")


def test_files_of_others_are_shown_with_their_text_or_without(page: Page) -> None:
    infotext = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", infotext, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(file, "PNG", pnginfo=chunks)
    plain = png_of((8, 8), "green")
    broken = plain[:8] + b"\xff\xff\xff\xfftEXt" + plain[16:]
    drop(
        page,
        ("a1111.png", "image/png", file.getvalue()),
        ("plain.png", "image/png", plain),
        ("broken.png", "image/png", broken),
        ("notes.txt", "text/plain", b"hello"),
    )
    expect(tiles(page)).to_have_count(2)
    expect(gallery(page)).to_contain_text("broken.png was not added: the picture cannot be read.")
    expect(gallery(page)).to_contain_text("notes.txt was not added: it is no PNG, JPEG or WebP.")
    dialog = open_picture(page, 1 if "plain" in tiles(page).first.inner_text() else 0)
    expect(dialog.locator("pre")).to_have_text(infotext, use_inner_text=False)
    expect(dialog.get_by_role("button", name="Again", exact=True)).to_be_disabled()
    close(page)
    drop(page, ("plain.png", "image/png", plain))
    expect(gallery(page)).to_contain_text("plain.png was not added: it is here already.")


def test_what_a_file_leaves_out_is_named_and_can_be_added_in_the_form(
    page: Page, endpoint: LocalEndpoint
) -> None:
    picture = data_uri(png_of((64, 64), "red"))
    fields = {"image_url": picture, "mode": "img2img", "strength": 0.75}
    own = draw(endpoint, seed=3, **fields)
    drop(page, ("own.png", "image/png", own.files[0]))
    dialog = open_picture(page)
    expect(dialog).to_contain_text("Not in the file: image_url, prompt.")
    expect(dialog.get_by_role("button", name="Again", exact=True)).to_be_disabled()
    dialog.get_by_role("button", name="Load into form").click()
    expect(page.get_by_label("mode", exact=True)).to_have_value('"img2img"')
    add(page, own)
    dialog = open_picture(page)
    expect(parameter(dialog, "image_url")).to_contain_text("not in the file")
    expect(dialog.get_by_role("button", name="Again", exact=True)).to_be_enabled()


CONTROLLED = {
    "prompt": PROMPT,
    "controlnet": [
        {"type": "canny", "image_url": "https://example.com/a.png"},
        {"type": "depth", "image_url": data_uri(png_of((64, 64), "red")), "scale": 0.5},
    ],
    "ip_adapter": [{"image_url": data_uri(png_of((64, 64), "blue"))}],
}


def controlled_file() -> bytes:
    """As a worker makes one: without the pictures that were sent."""
    told = describe(parse_request({**CONTROLLED, "seed": 3}), 0, (64, 64), ABOUT)
    chunks = PngImagePlugin.PngInfo()
    for name, text in told.items():
        chunks.add_text(name, text)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def with_example(page: Page, watch: Watch) -> None:
    """The address that the request has shows a picture."""
    watch.origins.add("https://example.com")
    page.context.route(
        "https://example.com/**",
        lambda route: route.fulfill(body=LINKED_FILE, content_type="image/png"),
    )


def test_control_pictures_that_a_file_leaves_out_are_named_and_their_places_kept(
    page: Page, watch: Watch
) -> None:
    with_example(page, watch)
    drop(page, ("controlled.png", "image/png", controlled_file()))
    dialog = open_picture(page)
    expect(dialog).to_contain_text(
        "Not in the file: controlnet[1].image_url, ip_adapter[0].image_url."
    )
    expect(parameter(dialog, "controlnet")).to_contain_text('"type":"depth"')
    expect(dialog.get_by_role("button", name="Again", exact=True)).to_be_disabled()
    dialog.get_by_role("button", name="Load into form").click()
    page.locator("#form details").evaluate_all("(all) => all.forEach((one) => (one.open = true))")
    second = page.get_by_role("group", name="controlnet 2", exact=True)
    expect(second.get_by_label("type", exact=True)).to_have_value('"depth"')
    expect(second.get_by_label("scale", exact=True)).to_have_value("0.5")
    expect(second.get_by_label("image_url", exact=True)).to_have_value("")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(second.get_by_label("image_url", exact=True)).to_be_focused()


def test_control_pictures_of_a_job_are_kept_beside_its_picture(
    clipboard_page: Page, watch: Watch
) -> None:
    page = clipboard_page
    with_example(page, watch)
    maps = [data_uri(png_of((64, 64), "white"))] * 2
    images = [data_uri(controlled_file())]
    add(page, Drawn(CONTROLLED, {"images": images, "maps": maps, "seed": 3}, "controlled"))
    expect(tiles(page)).to_have_count(3)
    expect(tiles(page).nth(1).get_by_role("button")).to_have_accessible_name(f"map 1 of {PROMPT}")
    dialog = open_picture(page)
    expect(dialog).not_to_contain_text("Not in the file")
    expect(parameter(dialog, "controlnet")).to_contain_text("data:image/png;base64, 1 kB")
    expect(parameter(dialog, "controlnet")).to_contain_text("not in the file")
    expect(dialog.get_by_role("button", name="Again", exact=True)).to_be_enabled()
    for way in ("curl", "Python"):
        text = copied(page, f"Copy as {way}")
        assert text.startswith(
            "# Save the input pictures as controlnet_2_image_url.png and "
            "ip_adapter_1_image_url.png first.\n"
        )
        assert "https://example.com/a.png" in text
        assert len(text) < 3000
    dialog.get_by_role("button", name="Use as input").click()
    page.locator("#form details").evaluate_all("(all) => all.forEach((one) => (one.open = true))")
    expect(page.locator("#fields [data-field=image_url] img").first).to_be_visible()


def test_foreign_text_stays_text(page: Page) -> None:
    evil = "<img src=x onerror=\"document.title='hacked'\">"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("request", json.dumps({"prompt": evil, evil: evil, "seed": 1}))
    chunks.add_text("parameters", evil)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    drop(page, (f"{evil.replace('/', '')}.png", "image/png", file.getvalue()))
    dialog = open_picture(page)
    expect(parameter(dialog, evil)).to_have_text(evil)
    assert page.title() != "hacked"
    assert page.locator("img[src='x']").count() == 0


# What can be done with a picture


def test_again_gives_an_equal_picture_and_next_seed_the_next(
    page: Page, drawn: Drawn, alone: Drawn, endpoint: LocalEndpoint
) -> None:
    add(page, drawn)
    open_picture(page).get_by_role("button", name="Again", exact=True).click()
    expect(tiles(page)).to_have_count(3)
    open_picture(page)
    assert downloaded(page)[1] == alone.files[0]
    page.get_by_role("dialog").get_by_role("button", name="Next seed").click()
    expect(tiles(page)).to_have_count(4)
    expect(tiles(page).first).to_contain_text("seed 0")
    open_picture(page)
    assert downloaded(page)[1] == draw(endpoint, seed=0).files[0]


def test_a_job_that_fails_is_told(page: Page, drawn: Drawn) -> None:
    wrong = Drawn({**drawn.input, "model": "none-such"}, drawn.output, "wrong")
    add(page, wrong)
    open_picture(page).get_by_role("button", name="Again", exact=True).click()
    expect(gallery(page)).to_contain_text(re.compile("Not drawn: .*model"))


def test_a_picture_becomes_the_input_of_the_form(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    fill(page, prompt="a green square", width=64, height=64, num_inference_steps=2)
    open_picture(page, 0).get_by_role("button", name="Use as input").click()
    expect(page.get_by_label("mode", exact=True)).to_have_value('"img2img"')
    expect(page.locator("[data-field=image_url] img")).to_be_in_viewport()
    expect(page.get_by_label("prompt", exact=True)).to_have_value("a green square")
    page.get_by_role("button", name="Draw").click()
    expect(tiles(page)).to_have_count(3)
    dialog = open_picture(page, 0)
    expect(parameter(dialog, "image_url")).to_contain_text("data:image/png;base64")
    expect(parameter(dialog, "mode")).to_have_text("img2img")


def test_a_note_takes_the_place_of_the_one_before(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    for name in ("Use as input", "Load into form"):
        open_picture(page).get_by_role("button", name=name).click()
    notes = page.get_by_role("log", name="Messages of the gallery").get_by_role("paragraph")
    expect(notes).to_have_count(1)
    expect(notes).to_contain_text("It is in the form.")


def test_a_download_is_the_file_under_a_name_for_people(page: Page, drawn: Drawn) -> None:
    add(page, drawn)
    open_picture(page, 0)
    name, file = downloaded(page)
    assert name == f"a-red-circle-on-a-blue-background-{LAST_SEED}.png"
    assert file == drawn.files[0]


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_copied_curl_command_draws_the_picture_in_a_shell(
    clipboard_page: Page, endpoint: LocalEndpoint, tmp_path: Path, output_format: str
) -> None:
    for tool in ("curl", "jq"):
        assert shutil.which(tool), f"{tool} is needed to run what is copied"
    page = clipboard_page
    own = draw(endpoint, prompt=ODD_PROMPT, seed=LAST_SEED, output_format=output_format)
    add(page, own)
    open_picture(page)
    command = copied(page, "Copy as curl")
    assert endpoint.api_key not in command
    result = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "RUNPOD_API_KEY": endpoint.api_key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"answer.json", f"picture.{output_format}"}
    assert (tmp_path / f"picture.{output_format}").read_bytes() == own.files[0]


@pytest.mark.parametrize("way", ["curl", "Python"])
def test_copied_commands_read_input_pictures_from_files(
    clipboard_page: Page, endpoint: LocalEndpoint, tmp_path: Path, way: str
) -> None:
    page = clipboard_page
    # Larger than the argument of a command may be.
    noise = Image.frombytes("RGB", (256, 256), os.urandom(3 * 256 * 256))
    noise.save(tmp_path / "image_url.png", "PNG")
    (tmp_path / "mask_url.png").write_bytes(png_of((256, 256), "white"))
    own = draw(
        endpoint,
        prompt=ODD_PROMPT,
        seed=4,
        image_url=data_uri((tmp_path / "image_url.png").read_bytes()),
        mask_url=data_uri((tmp_path / "mask_url.png").read_bytes()),
    )
    add(page, own)
    open_picture(page)
    text = copied(page, f"Copy as {way}")
    assert "# Save the input pictures as image_url.png and mask_url.png first." in text
    assert endpoint.api_key not in text
    assert len(text) < 3000
    command = ["sh", "-c", text] if way == "curl" else [sys.executable, "-c", text]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "RUNPOD_API_KEY": endpoint.api_key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    name = "picture.png" if way == "curl" else "picture-1.png"
    assert (tmp_path / name).read_bytes() == own.files[0]
    assert not (tmp_path / "hacked").exists()


def test_a_strangers_file_smuggles_nothing_into_what_is_copied(
    clipboard_page: Page, tmp_path: Path
) -> None:
    page = clipboard_page
    request = {
        "prompt": "x",
        "seed": 1,
        "image_url": "data:image/x'$(touch hacked)';base64,AAAA",
        "mask_url'\n touch hacked #": "data:image/png;base64,AAAA",
        "output_format": "png; touch hacked",
        "'; touch hacked; '": ["'; touch hacked; '"],
    }
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("request", json.dumps(request))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    drop(page, ("evil.png", "image/png", file.getvalue()))
    open_picture(page)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "curl").write_text("#!/bin/sh\ncat > body\n")
    (bin_dir / "curl").chmod(0o755)
    (tmp_path / "mask_url_touch_hacked_.png").write_bytes(b"mask")
    environment = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "RUNPOD_API_KEY": "key",
    }
    command = copied(page, "Copy as curl")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, timeout=60, check=False)
    sent = json.loads((tmp_path / "body").read_text())["input"]
    assert sent == {**request, "mask_url'\n touch hacked #": data_uri(b"mask")}
    program = copied(page, "Copy as Python")
    compile(program, "copied", "exec")
    assert not (tmp_path / "hacked").exists()


def test_a_copied_program_draws_the_picture(
    clipboard_page: Page, endpoint: LocalEndpoint, tmp_path: Path, alone: Drawn
) -> None:
    page = clipboard_page
    add(page, alone)
    open_picture(page)
    program = copied(page, "Copy as Python")
    assert endpoint.api_key not in program
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "RUNPOD_API_KEY": endpoint.api_key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == "picture-1.png\n", result.stderr
    assert (tmp_path / "picture-1.png").read_bytes() == alone.files[0]


def test_parameters_are_copied_as_text(clipboard_page: Page, drawn: Drawn) -> None:
    add(clipboard_page, drawn)
    open_picture(clipboard_page, 0)
    text = copied(clipboard_page, "Copy parameters")
    assert text.startswith(f"{PROMPT}\nSteps: 2, ")
    assert f"Seed: {LAST_SEED}" in text


def test_where_the_clipboard_is_closed_the_text_is_there_to_be_copied(
    page: Page, drawn: Drawn
) -> None:
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    add(page, drawn)
    dialog = open_picture(page, 0)
    dialog.get_by_role("button", name="Copy as curl").click()
    expect(dialog.get_by_label("Text to copy")).to_have_value(re.compile("^printf %s "))


# Links


@pytest.fixture(scope="module")
def picture_server() -> Iterator[str]:
    """Another origin: below /open/ it lets pages read its picture, elsewhere it only shows it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Type", "image/png")
            if "open" in self.path:
                self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()
            self.wfile.write(b"" if "missing" in self.path else LINKED_FILE)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def linked(watch: Watch, server: str, path: str) -> Drawn:
    watch.origins.add(server)
    output = {"images": [f"{server}/{path}?key=1"], "seed": 9}
    return Drawn({"prompt": PROMPT}, output, "linked")


def test_a_link_is_shown_and_said_to_be_one_and_kept_when_asked(
    page: Page, watch: Watch, picture_server: str
) -> None:
    add(page, linked(watch, picture_server, "open/a.png"))
    expect(tiles(page)).to_contain_text(["link"])
    dialog = open_picture(page)
    expect(dialog).to_contain_text("The answer had a link, and only that is kept here")
    expect(dialog).to_contain_text("64 x 64 pixels")
    dialog.get_by_role("button", name="Keep a copy").click()
    kept = page.get_by_role("dialog")
    expect(kept).to_contain_text(f"Copied from {picture_server}.")
    assert downloaded(page)[1] == LINKED_FILE
    page.reload()
    watch.origins.remove(picture_server)
    expect(tiles(page)).to_have_count(1)
    open_picture(page)
    assert downloaded(page)[1] == LINKED_FILE


def test_a_link_that_pages_may_not_read_says_what_to_do(
    page: Page, watch: Watch, picture_server: str
) -> None:
    watch.expected += ["CORS policy", "Failed to load resource"]
    add(page, linked(watch, picture_server, "closed/a.png"))
    dialog = open_picture(page)
    dialog.get_by_role("button", name="Keep a copy").click()
    expect(dialog).to_contain_text(
        "its server lets no page read it. Download opens it in a new tab"
    )


def test_a_link_that_shows_no_picture_is_told_in_words(
    page: Page, watch: Watch, picture_server: str
) -> None:
    watch.origins.add(picture_server)
    watch.expected.append("404")
    add(page, Drawn({}, {"images": [f"{picture_server}/missing.svg"]}, "gone"))
    expect(tiles(page)).to_contain_text(["a link that shows no picture"])


def test_an_answer_that_is_neither_picture_nor_link_is_left_out(page: Page) -> None:
    images = ["javascript:alert(1)", "data:text/html;base64,PGI+"]
    add(page, Drawn({}, {"images": images, "seed": 1}, "odd"))
    for number in (1, 2):
        told = f"Picture {number} of job odd is neither a picture nor a link"
        expect(gallery(page)).to_contain_text(told)
    expect(tiles(page)).to_have_count(0)
