"""The form: a control for each field of the schema, and what it makes of what is entered."""

import base64
import io
import json
import re
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, expect

from client.one_file import SCHEMA
from local_endpoint import LocalEndpoint
from sdxl_worker.field_types import CONTROL_TYPES
from sdxl_worker.request import Request
from sdxl_worker.samplers import SAMPLERS, SPELLINGS
from sdxl_worker.wording import field_schemas, rule
from tests.hand_worker import HandWorker
from tests.page.conftest import OpenPage, page_of

FIELDS = field_schemas(Request)
# Objects, and lists of them: what is in them comes with a button.
ROWS = [
    name
    for name, one in FIELDS.items()
    if "properties" in one or "properties" in one.get("items", {})
]
NUMBERS = {name: one for name, one in FIELDS.items() if one["type"] in ("integer", "number")}
# What the page sends beside what was entered.
USUAL = {"preview": True, "duplicate_first": False}
DROP = """(element, [kind, base64, name]) => {
    const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    element.dispatchEvent(
        kind === "paste"
            ? new ClipboardEvent("paste", { ...options, clipboardData: data })
            : new DragEvent("drop", { ...options, dataTransfer: data }),
    );
}"""


def picture(colour: str = "red", size: tuple[int, int] = (48, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture
def form(bare_endpoint: LocalEndpoint, open_page: OpenPage) -> Page:
    """The page of an endpoint whose jobs nobody draws, with all groups open."""
    page = open_page(page_of(bare_endpoint))
    open_groups(page)
    return page


def open_groups(page: Page) -> None:
    expect(page.locator("html[data-ready]")).to_be_attached()
    page.locator("#form details").evaluate_all(
        "(groups) => groups.forEach((one) => (one.open = true))"
    )


def control(page: Page, name: str) -> Locator:
    return page.get_by_label(name, exact=True)


def problem_at(one: Locator) -> Locator:
    """What is said to be wrong at a control."""
    ids = (one.get_attribute("aria-describedby") or "").split()
    return one.page.locator(f"#{ids[-1]}")


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def sent(page: Page, endpoint: LocalEndpoint, count: int = 1) -> dict[str, Any]:
    """The input of the last of `count` jobs, without what the page always sends."""
    expect(page.get_by_role("listitem").get_by_text("In queue")).to_have_count(count)
    assert len(endpoint.jobs) == count
    job_input = dict(endpoint.jobs[-1].request["input"])
    assert {name: job_input.pop(name) for name in USUAL} == USUAL
    return job_input


def test_each_field_has_a_control_with_its_name(form: Page) -> None:
    for name, schema in FIELDS.items():
        is_rows = name in ROWS
        one = form.get_by_role("group", name=name, exact=True) if is_rows else control(form, name)
        expect(one).to_be_visible()
        tag, kind = one.evaluate("(one) => [one.tagName, one.type]")
        expected = {
            "boolean": ("INPUT", "checkbox"),
            "integer": ("INPUT", "text" if name == "seed" else "number"),
            "number": ("INPUT", "number"),
            "array": ("FIELDSET", "fieldset") if is_rows else ("TEXTAREA", "textarea"),
            "object": ("FIELDSET", "fieldset"),
            "string": ("TEXTAREA", "textarea") if "prompt" in name else ("INPUT", "text"),
        }[schema["type"]]
        assert (tag, kind) == (("SELECT", "select-one") if "enum" in schema else expected), name


def test_no_field_stands_in_two_places(form: Page) -> None:
    names = form.locator("#fields [data-field]").evaluate_all(
        "(all) => all.map((one) => one.dataset.field)"
    )
    assert sorted(names) == sorted(FIELDS)


def test_fields_stand_in_groups(bare_endpoint: LocalEndpoint, open_page: OpenPage) -> None:
    names = "(all) => all.map((one) => one.dataset.field)"
    page = open_page(page_of(bare_endpoint))
    first = page.locator("#fields > .first [data-field]").evaluate_all(names)
    assert first == [
        *("prompt", "negative_prompt", "width", "height", "num_inference_steps"),
        *("guidance_scale", "seed", "num_images"),
    ]
    newer = open_page(page_of(bare_endpoint), schema=NEWER)

    def group(title: str) -> list[str]:
        inside = newer.locator("details", has_text=title).locator("[data-field]")
        return list(inside.evaluate_all(names))

    open_groups(newer)
    assert group("Control") == ["controlnet", "pictures"]  # their rows have pictures
    assert {"anything", "either", "sizes", "nothing", "crop"} <= set(group("More"))


def test_defaults_are_placeholders(form: Page) -> None:
    for name, schema in NUMBERS.items():
        default = schema["default"]
        # The browser's 1.0 is 1.
        told = "not set" if default is None else json.dumps(default).removesuffix(".0")
        expect(control(form, name)).to_have_attribute("placeholder", told)
        expect(control(form, name)).to_have_value("")


def test_bounds_are_checked_while_typing_in_the_words_of_the_worker(form: Page) -> None:
    for name, schema in NUMBERS.items():
        one, words = control(form, name), f"must be {rule(schema)}"
        step = schema.get("multipleOf", 1)
        low, high = schema["minimum"], schema["maximum"]
        for wrong in (low - step, high + step, low + 0.5 if schema["type"] == "integer" else None):
            if wrong is None:
                continue
            one.fill(str(wrong))
            expect(problem_at(one)).to_have_text(words)
            expect(one).to_have_attribute("aria-invalid", "true")
        for right in (low, high):
            one.fill(str(right))
            expect(problem_at(one)).to_be_hidden()
        one.fill("")
        expect(problem_at(one)).to_be_hidden()


def test_text_and_lists_are_checked_while_typing(form: Page) -> None:
    control(form, "model").fill("m" * 201)
    expect(problem_at(control(form, "model"))).to_have_text(f"must be {rule(FIELDS['model'])}")
    control(form, "model").fill("m" * 200)
    expect(problem_at(control(form, "model"))).to_be_hidden()
    control(form, "image_url").fill("ftp://example.com/x.png")
    expect(problem_at(control(form, "image_url"))).to_have_text(
        f"must be {rule(FIELDS['image_url'])}"
    )
    control(form, "upload_urls").fill("https://example.com/1\nnot an address")
    expect(problem_at(control(form, "upload_urls"))).to_have_text(
        "line 2 must be an http:// or https:// address"
    )


def test_a_form_with_problems_is_not_sent(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a red circle")
    control(form, "width").fill("1001")
    control(form, "mask_blur").fill("999")
    form.locator("#form summary", has_text="Picture").click()
    draw(form)
    expect(control(form, "width")).to_be_focused()
    expect(control(form, "mask_blur")).to_be_hidden()
    control(form, "width").fill("1000")
    draw(form)
    expect(control(form, "mask_blur")).to_be_focused()  # its group was opened
    assert bare_endpoint.jobs == []


def test_without_a_prompt_nothing_is_sent(form: Page, bare_endpoint: LocalEndpoint) -> None:
    draw(form)
    expect(control(form, "prompt")).to_be_focused()
    expect(problem_at(control(form, "prompt"))).to_have_text(
        "required, unless image_url or check is given"
    )
    assert bare_endpoint.jobs == []


def test_what_was_entered_is_sent(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a red circle")
    draw(form)
    assert sent(form, bare_endpoint) == {"prompt": "a red circle"}

    control(form, "width").fill("512")
    control(form, "strength").fill("0.3")  # the default, but with a picture it is another one
    control(form, "guidance_scale").fill("-0")
    control(form, "prompt_weighting").check()
    control(form, "schedule").select_option("karras")
    control(form, "upload_urls").fill(" https://example.com/1\n\nhttps://example.com/2 \n")
    draw(form)
    assert sent(form, bare_endpoint, 2) == {
        "prompt": "a red circle",
        "width": 512,
        "strength": 0.3,
        "guidance_scale": 0,
        "prompt_weighting": True,
        "schedule": "karras",
        "upload_urls": ["https://example.com/1", "https://example.com/2"],
    }


def test_preview_is_on_and_can_be_turned_off(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    expect(control(form, "preview")).to_be_checked()
    control(form, "preview").uncheck()
    control(form, "duplicate_first").check()
    draw(form)
    expect(form.get_by_text("In queue").first).to_be_visible()
    assert bare_endpoint.jobs[0].request["input"] == {"prompt": "a"}


def test_a_check_alone_stays_alone(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "check").check()
    draw(form)
    expect(form.get_by_text("In queue").first).to_be_visible()
    assert bare_endpoint.jobs[0].request["input"] == {"check": True}


@pytest.mark.parametrize("seed", [2**64 - 1, 2**53 + 1, 12345678901234567890, -1, 0])
def test_seeds_lose_no_digits(form: Page, bare_endpoint: LocalEndpoint, seed: int) -> None:
    control(form, "prompt").fill("a")
    control(form, "seed").fill(str(seed))
    draw(form)
    assert sent(form, bare_endpoint)["seed"] == seed
    form.reload()
    expect(control(form, "seed")).to_have_value(str(seed))


def test_seeds_beyond_the_largest_are_refused(form: Page) -> None:
    for wrong in (2**64, -2, "1.5", "1_000", "0x10", "seven"):
        control(form, "seed").fill(str(wrong))
        expect(problem_at(control(form, "seed"))).to_have_text(f"must be {rule(FIELDS['seed'])}")


def test_a_side_of_0_is_taken_as_the_worker_takes_it(
    form: Page, bare_endpoint: LocalEndpoint
) -> None:
    control(form, "prompt").fill("a")
    control(form, "width").fill("0")
    control(form, "height").fill("8")
    expect(problem_at(control(form, "height"))).to_have_text(f"must be {rule(FIELDS['height'])}")
    control(form, "height").fill("64")
    draw(form)
    assert sent(form, bare_endpoint) == {"prompt": "a", "width": 0, "height": 64}


def test_the_samplers_main_names_come_first(form: Page, bare_endpoint: LocalEndpoint) -> None:
    one = control(form, "scheduler")
    texts = one.locator("> option").all_inner_texts()
    assert texts == ["DDIM (default)", *SAMPLERS]
    others = one.locator("optgroup > option").all_inner_texts()
    assert sorted([*texts[1:], *others]) == sorted(SPELLINGS)
    control(form, "prompt").fill("a")
    one.select_option("DPM++ 2M Karras")
    draw(form)
    assert sent(form, bare_endpoint)["scheduler"] == "DPM++ 2M Karras"


def test_a_slider_moves_its_number_and_follows_it(form: Page) -> None:
    one = control(form, "guidance_scale")
    slider = form.locator("[data-field=guidance_scale] input[type=range]")
    expect(slider).to_have_value("7.5")
    slider.evaluate("(one) => { one.value = 4; one.dispatchEvent(new Event('input')); }")
    expect(one).to_have_value("4")
    one.fill("12")
    expect(slider).to_have_value("12")
    one.fill("90")
    expect(slider).to_have_value("20")  # its end; the number stays
    expect(one).to_have_value("90")


def test_descriptions_are_explained_as_text(
    bare_endpoint: LocalEndpoint, open_page: OpenPage
) -> None:
    hostile = (
        "<img src=x onerror=alert(1)> `<b>code</b>` [good](https://example.com/a) "
        "[bad](javascript:alert) [here](docs/x.md)"
    )
    field = {"type": "string", "description": hostile, "default": ""}
    page = open_page(page_of(bare_endpoint), schema={"properties": {"prompt": field}})
    button = page.get_by_role("button", name="Explain prompt", exact=True)
    hint = page.locator("[data-field=prompt] .hint")
    expect(hint).to_be_hidden()
    button.click()
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(hint).to_have_text(
        "<img src=x onerror=alert(1)> <b>code</b> good bad here A string.",
    )
    expect(hint.locator("code")).to_have_text("<b>code</b>")
    expect(hint.locator("img, b, script")).to_have_count(0)
    expect(hint.get_by_role("link")).to_have_attribute("href", "https://example.com/a")
    button.click()
    expect(hint).to_be_hidden()


# Lists.


def test_loras_are_rows(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    add = form.get_by_role("button", name="Add to loras")
    for path in ("dot.safetensors", "frame.safetensors"):
        add.click()
        expect(form.locator(":focus")).to_have_accessible_name("path")
        form.locator(":focus").fill(path)
    second = form.get_by_role("group", name="loras 2", exact=True)
    control_in(second, "scale").fill("0.5")
    control_in(second, "scale").fill("7")
    expect(problem_at(control_in(second, "scale"))).to_have_text("must be a number from -5 to 5")
    draw(form)
    expect(control_in(second, "scale")).to_be_focused()
    control_in(second, "scale").fill("-0.5")
    form.get_by_role("button", name="Remove loras 1").click()
    expect(add).to_be_focused()
    expect(form.get_by_role("group", name="loras 2", exact=True)).to_have_count(0)
    draw(form)
    assert sent(form, bare_endpoint)["loras"] == [{"path": "frame.safetensors", "scale": -0.5}]


def control_in(group: Locator, name: str) -> Locator:
    return group.get_by_label(name, exact=True)


def test_a_row_needs_what_the_schema_requires(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    form.get_by_role("button", name="Add to embeddings").click()
    draw(form)
    row = form.get_by_role("group", name="embeddings 1", exact=True)
    expect(control_in(row, "path")).to_be_focused()
    expect(problem_at(control_in(row, "path"))).to_contain_text("required, an https:// address")
    expect(problem_at(control_in(row, "token"))).to_contain_text("required, what stands for it")
    assert bare_endpoint.jobs == []


def test_a_list_takes_no_more_than_it_may_have(form: Page) -> None:
    add = form.get_by_role("button", name="Add to loras")
    for _ in range(8):
        expect(add).to_be_enabled()
        add.click()
    expect(add).to_be_disabled()
    form.get_by_role("button", name="Remove loras 8").click()
    expect(add).to_be_enabled()


CONTROL_WAYS = ("file", "drop", "paste")


@pytest.mark.parametrize("way", CONTROL_WAYS)
def test_control_pictures_are_rows_with_pictures(
    form: Page, bare_endpoint: LocalEndpoint, way: str
) -> None:
    control(form, "prompt").fill("a")
    form.get_by_role("button", name="Add to controlnet").click()
    row = form.get_by_role("group", name="controlnet 1", exact=True)
    draw(form)
    expect(problem_at(control_in(row, "type"))).to_contain_text("required, one of canny, depth")
    expect(problem_at(control_in(row, "image_url"))).to_contain_text("required, an http://")

    texts = control_in(row, "type").locator("> option").all_inner_texts()
    assert texts == ["not set", *CONTROL_TYPES]
    control_in(row, "type").select_option("openpose")
    if way == "file":
        with form.expect_file_chooser() as chooser:
            form.get_by_role("button", name="Choose a file for controlnet[0].image_url").click()
        chooser.value.set_files(FilePayload(name="x.png", mimeType="image/png", buffer=picture()))
    else:
        drop(row.locator("[data-field=image_url]"), way, picture())
    expect(row.get_by_text("48 x 32, PNG")).to_be_visible()
    control_in(row, "preprocess").uncheck()
    control_in(row, "end").fill("0.6")
    control(form, "return_maps").check()

    form.get_by_role("button", name="Add to ip_adapter").click()
    reference = form.get_by_role("group", name="ip_adapter 1", exact=True)
    drop(reference.locator("[data-field=image_url]"), "drop", picture("blue"))
    drop(reference.locator("[data-field=mask_url]"), "drop", picture("white"))
    expect(reference.get_by_text("48 x 32, PNG")).to_have_count(2)
    expect(form.locator("summary", has_text=re.compile("^Control")).locator(".count")).to_have_text(
        "3 set"
    )
    draw(form)
    assert sent(form, bare_endpoint) == {
        "prompt": "a",
        "controlnet": [
            {
                "type": "openpose",
                "image_url": data_uri(picture()),
                "preprocess": False,
                "end": 0.6,
            }
        ],
        "return_maps": True,
        "ip_adapter": [
            {"image_url": data_uri(picture("blue")), "mask_url": data_uri(picture("white"))}
        ],
    }


def test_an_object_is_there_or_not(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    for name in ("hires", "upscale"):
        form.get_by_role("button", name=f"Add {name}").click()
        expect(form.get_by_role("button", name=f"Add {name}")).to_be_disabled()
    hires = form.get_by_role("group", name="hires", exact=True)
    for wrong, right in (("0.9", "1.25"), ("2.1", "2")):
        control_in(hires, "scale").fill(wrong)
        expect(problem_at(control_in(hires, "scale"))).to_have_text("must be a number from 1 to 2")
        control_in(hires, "scale").fill(right)
        expect(problem_at(control_in(hires, "scale"))).to_be_hidden()
    draw(form)
    assert sent(form, bare_endpoint) == {"prompt": "a", "hires": {"scale": 2}, "upscale": {}}

    form.reload()  # it is kept
    open_groups(form)
    expect(control_in(hires, "scale")).to_have_value("2")
    form.get_by_role("button", name="Remove hires").click()
    expect(form.get_by_role("button", name="Add hires")).to_be_focused()
    draw(form)
    assert sent(form, bare_endpoint, 2) == {"prompt": "a", "upscale": {}}


def test_errors_of_what_is_inside_stand_there(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    form.get_by_role("button", name="Add hires").click()
    form.get_by_role("button", name="Add to controlnet").click()
    row = form.get_by_role("group", name="controlnet 1", exact=True)
    control_in(row, "type").select_option("canny")
    control_in(row, "image_url").fill(data_uri(picture()))
    draw(form)
    lines = [
        "controlnet[0].image_url: was not found",
        "hires.upscaler: is not there",
        "upscale: too large",
        "hires: is for the base",
    ]
    worker = HandWorker(bare_endpoint)
    worker.done(worker.take()["id"], {"error": "\n".join(lines)})
    hires = form.get_by_role("group", name="hires", exact=True)
    expect(problem_at(control_in(row, "image_url"))).to_have_text("was not found")
    expect(control_in(row, "image_url")).to_be_focused()
    expect(problem_at(control_in(hires, "upscaler"))).to_have_text("is not there")
    expect(form.locator("[data-field=hires].list > .problem")).to_have_text("is for the base")
    expect(form.locator("[data-field=upscale].list > .problem")).to_have_text("too large")


# A schema of another version.

NEWER: dict[str, Any] = {
    "$defs": {
        "Control": {
            "type": "object",
            "required": ["image_url"],
            "properties": {
                "image_url": FIELDS["image_url"],
                "type": {"enum": ["canny", "depth"], "type": "string"},
                "scale": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
                "start": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
            },
        }
    },
    "properties": {
        "prompt": {"type": "string", "default": ""},
        "controlnet": {
            "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Control"}}, {"type": "null"}],
            "default": None,
        },
        "pictures": {"type": "array", "items": {"$ref": "#/$defs/Control"}},
        "anything": {"description": "Without a type."},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "crop": {"type": "object", "properties": {"left": {"type": "integer"}}},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "odd": {"type": "string", "pattern": "(?P<name>[a-"},
        "big": {"type": "integer", "minimum": 0, "maximum": 2**70},
        "nothing": {},
    },
}


def test_fields_of_a_newer_worker_have_controls(
    bare_endpoint: LocalEndpoint, open_page: OpenPage
) -> None:
    page = open_page(page_of(bare_endpoint), schema=NEWER)
    open_groups(page)
    page.get_by_role("button", name="Add to controlnet").click()
    row = page.get_by_role("group", name="controlnet 1", exact=True)
    drop(row.locator("[data-field=image_url]"), "drop", picture())
    expect(row.get_by_text("48 x 32")).to_be_visible()
    control_in(row, "type").select_option("depth")
    control_in(row, "scale").fill("0.7")
    control(page, "prompt").fill("a")
    control(page, "anything").fill('{"a": [1, 18446744073709551615]}')
    control(page, "either").fill('"text"')
    page.get_by_role("button", name="Add crop").click()
    control(page, "left").fill("3")
    control(page, "sizes").fill("1\n2")
    control(page, "odd").fill("[")
    control(page, "big").fill(str(2**70))
    draw(page)
    expect(page.get_by_text("In queue").first).to_be_visible()
    assert bare_endpoint.jobs[0].request["input"] == {
        "prompt": "a",
        "controlnet": [{"image_url": data_uri(picture()), "type": "depth", "scale": 0.7}],
        "anything": {"a": [1, 2**64 - 1]},
        "either": "text",
        "crop": {"left": 3},
        "sizes": [1, 2],
        "odd": "[",
        "big": 2**70,
    }


def test_json_that_cannot_be_read_is_told(
    bare_endpoint: LocalEndpoint, open_page: OpenPage
) -> None:
    page = open_page(page_of(bare_endpoint), schema=NEWER)
    open_groups(page)
    control(page, "anything").fill("{a")
    expect(problem_at(control(page, "anything"))).to_have_text(
        "must be JSON, with quotes around text"
    )


# Pictures.


def drop(zone: Locator, kind: str, content: bytes, name: str = "x.png") -> None:
    zone.evaluate(DROP, [kind, base64.b64encode(content).decode(), name])


@pytest.mark.parametrize("way", ["file", "drop", "paste", "data URI"])
def test_a_picture_becomes_a_data_uri(form: Page, bare_endpoint: LocalEndpoint, way: str) -> None:
    content = picture()
    control(form, "prompt").fill("a")
    field = form.locator("[data-field=image_url]")
    if way == "file":
        with form.expect_file_chooser() as chooser:
            form.get_by_role("button", name="Choose a file for image_url").click()
        chooser.value.set_files(FilePayload(name="x.png", mimeType="image/png", buffer=content))
    elif way == "data URI":
        control(form, "image_url").fill(data_uri(content))
    else:
        drop(field, way, content)
    expect(field.get_by_text("48 x 32, PNG")).to_be_visible()
    expect(field.locator("img")).to_have_attribute("src", data_uri(content))
    draw(form)
    assert sent(form, bare_endpoint)["image_url"] == data_uri(content)

    form.get_by_role("button", name="Remove image_url").click()
    expect(field.locator("img")).to_be_hidden()
    draw(form)
    assert sent(form, bare_endpoint, 2) == {"prompt": "a"}


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_from_elsewhere_goes_into_the_first_empty_field(form: Page, way: str) -> None:
    drop(control(form, "prompt"), way, picture("red"))
    expect(form.locator("[data-field=image_url] img")).to_be_visible()
    drop(control(form, "prompt"), way, picture("white"))
    expect(form.locator("[data-field=mask_url] img")).to_be_visible()
    source = form.locator("[data-field=image_url] img").get_attribute("src")
    assert source == data_uri(picture("red"))


def test_text_that_brings_a_picture_of_itself_is_pasted_as_text(form: Page) -> None:
    taken = control(form, "prompt").evaluate(
        """(element) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File(["x"], "x.png", { type: "image/png" }));
            clipboardData.setData("text/plain", "a cat");
            const options = { bubbles: true, cancelable: true, clipboardData };
            return !element.dispatchEvent(new ClipboardEvent("paste", options));
        }"""
    )
    assert not taken
    expect(form.locator("[data-field=image_url] img")).to_be_hidden()


def test_a_file_dropped_on_a_dialog_changes_nothing(form: Page) -> None:
    form.locator("#endpoint").click()
    prevented = form.get_by_role("dialog").evaluate(
        """(dialog) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["x"], "x.png", { type: "image/png" }));
            const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
            return !dialog.dispatchEvent(event);
        }"""
    )
    assert prevented, "the browser would leave the page for the file"
    expect(form.locator("[data-field=image_url] img")).to_be_hidden()


def test_an_address_is_sent_as_it_is(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    control(form, "image_url").fill("http://example.com/x.png")
    draw(form)
    assert sent(form, bare_endpoint)["image_url"] == "http://example.com/x.png"


def test_a_file_that_is_no_picture_is_refused(form: Page) -> None:
    with form.expect_file_chooser() as chooser:
        form.get_by_role("button", name="Choose a file for image_url").click()
    chooser.value.set_files(FilePayload(name="x.txt", mimeType="text/plain", buffer=b"text"))
    expect(problem_at(control(form, "image_url"))).to_have_text("must be a picture; x.txt is none")


def test_a_request_over_the_platforms_limit_is_not_sent(
    form: Page, bare_endpoint: LocalEndpoint
) -> None:
    control(form, "prompt").fill("a")
    large = io.BytesIO()
    Image.effect_noise((1800, 1800), 100).convert("RGB").save(large, "BMP")
    with form.expect_file_chooser() as chooser:
        form.get_by_role("button", name="Choose a file for image_url").click()
    chooser.value.set_files(
        FilePayload(name="x.bmp", mimeType="image/bmp", buffer=large.getvalue())
    )
    expect(form.locator("[data-field=image_url]").get_by_text("1800 x 1800")).to_be_visible()
    draw(form)
    expect(problem_at(control(form, "image_url"))).to_have_text(
        re.compile(r"the request has 13\.0 MB, and the platform takes 10 MB; a smaller picture")
    )
    expect(control(form, "image_url")).to_be_focused()
    assert bare_endpoint.jobs == []


def test_a_mask_is_painted_on_the_picture(form: Page) -> None:
    paint = form.get_by_role("button", name="Paint mask_url")
    paint.click()
    expect(control(form, "image_url")).to_be_focused()
    expect(problem_at(control(form, "image_url"))).to_contain_text("give it first")
    control(form, "image_url").fill(data_uri(picture()))
    expect(form.locator("[data-field=image_url] img")).to_be_visible()
    paint.click()
    expect(form.get_by_role("dialog")).to_be_visible()
    form.keyboard.press("Escape")
    expect(form.get_by_role("dialog")).to_be_hidden()
    expect(paint).to_be_focused()


# Errors of the worker.


def test_a_workers_errors_stand_at_their_fields(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    for path in ("a.safetensors", "b.safetensors"):
        form.get_by_role("button", name="Add to loras").click()
        form.locator(":focus").fill(path)
    for group in form.locator("#form details > summary").all():
        group.click()
    draw(form)
    worker = HandWorker(bare_endpoint)
    lines = [
        "loras[1].scale: must be less",
        "width: does not fit",
        "loras: are too many",
        "upload_urls[1]: is no address",
        "colour: no such field",
        "something else",
    ]
    worker.done(worker.take()["id"], {"error": "\n".join(lines)})
    second = form.get_by_role("group", name="loras 2", exact=True)
    expect(problem_at(control_in(second, "scale"))).to_have_text("must be less")
    expect(control_in(second, "scale")).to_be_focused()
    expect(problem_at(control(form, "width"))).to_have_text("does not fit")
    expect(form.locator("[data-field=loras].list > .problem")).to_have_text("are too many")
    expect(form.locator("[data-field=upload_urls] .problem")).to_have_text("line 2 is no address")
    summary = form.locator("#form").get_by_role("alert")
    expect(summary).to_have_text("colour: no such fieldsomething else")
    # What is changed is judged anew.
    control(form, "width").fill("512")
    expect(problem_at(control(form, "width"))).to_be_hidden()


def test_an_error_that_speaks_of_no_field_is_summed_up(
    form: Page, bare_endpoint: LocalEndpoint
) -> None:
    control(form, "prompt").fill("a")
    draw(form)
    worker = HandWorker(bare_endpoint)
    worker.done(worker.take()["id"], {"error": "out of memory: draw fewer pictures"})
    summary = form.locator("#form").get_by_role("alert")
    expect(summary).to_have_text("out of memory: draw fewer pictures")
    expect(summary).to_be_focused()


def test_who_has_gone_on_typing_keeps_the_focus(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    draw(form)
    job = HandWorker(bare_endpoint).take()
    control(form, "negative_prompt").press_sequentially("b")
    HandWorker(bare_endpoint).done(job["id"], {"error": "width: does not fit"})
    expect(problem_at(control(form, "width"))).to_have_text("does not fit")
    expect(control(form, "negative_prompt")).to_be_focused()


def test_a_broken_tie_is_told_by_the_worker_at_its_field(page: Page) -> None:
    open_groups(page)
    control(page, "prompt").fill("a red circle")
    control(page, "refiner_strength").fill("0.5")
    draw(page)
    expect(problem_at(control(page, "refiner_strength"))).to_contain_text("needs mode img2img")
    expect(control(page, "refiner_strength")).to_be_focused()


# Keys, and what is kept.


def test_ctrl_enter_draws_and_enter_alone_does_not(
    form: Page, bare_endpoint: LocalEndpoint
) -> None:
    control(form, "prompt").fill("a")
    control(form, "width").press("Enter")
    control(form, "width").press("Control+Enter")
    sent(form, bare_endpoint)
    control(form, "prompt").press("Meta+Enter")
    sent(form, bare_endpoint, 2)


def test_a_double_click_draws_once(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a")
    form.get_by_role("button", name="Draw", exact=True).dblclick()
    control(form, "prompt").fill("b")
    draw(form)
    sent(form, bare_endpoint, 2)


def test_the_form_survives_a_reload(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "prompt").fill("a red circle")
    control(form, "scheduler").select_option("Euler a")
    control(form, "image_url").fill(data_uri(picture()))
    control(form, "preview").uncheck()
    form.get_by_role("button", name="Add to loras").click()
    form.locator(":focus").fill("dot.safetensors")
    form.reload()
    open_groups(form)
    control(form, "preview").check()
    draw(form)
    assert sent(form, bare_endpoint) == {
        "prompt": "a red circle",
        "scheduler": "Euler a",
        "image_url": data_uri(picture()),
        "loras": [{"path": "dot.safetensors"}],
    }


def test_reset_empties_the_form_and_can_be_undone(form: Page) -> None:
    control(form, "prompt").fill("a red circle")
    control(form, "preview").uncheck()
    form.get_by_role("button", name="Reset").click()
    expect(control(form, "prompt")).to_have_value("")
    expect(control(form, "preview")).to_be_checked()
    form.get_by_role("button", name="Undo reset").click()
    expect(control(form, "prompt")).to_have_value("a red circle")
    expect(form.get_by_role("button", name="Reset", exact=True)).to_be_visible()


def test_a_form_is_filled_by_others(form: Page, bare_endpoint: LocalEndpoint) -> None:
    control(form, "negative_prompt").fill("left over")
    form.evaluate(
        """async (uri) => {
            const { fillForm, setPicture } = await import("/form.js");
            fillForm({ prompt: "a", seed: 2n ** 64n - 1n, loras: [{ path: "x" }], colour: 1 });
            setPicture("image_url", uri);
        }""",
        data_uri(picture()),
    )
    expect(form.locator("#form").get_by_role("alert")).to_have_text(
        "not in this form, and left out: colour"
    )
    draw(form)
    assert sent(form, bare_endpoint) == {
        "prompt": "a",
        "seed": 2**64 - 1,
        "loras": [{"path": "x"}],
        "image_url": data_uri(picture()),
    }


def test_the_theme_is_kept(form: Page) -> None:
    form.get_by_label("Theme").select_option("Dark")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = form.evaluate(background)
    form.get_by_label("Theme").select_option("Light")
    assert form.evaluate(background) != dark
    form.get_by_label("Theme").select_option("Dark")
    form.reload()
    expect(form.get_by_label("Theme")).to_have_value("dark")
    assert form.evaluate(background) == dark


def test_the_schema_that_is_served_is_the_documents() -> None:
    assert set(json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]) == set(FIELDS)
