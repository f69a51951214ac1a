"""A grid over two settings: one job for each cell."""

import io
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from local_endpoint import LocalEndpoint
from tests.hand_worker import HandWorker
from tests.page.conftest import OpenPage, page_of, wait_until
from tests.page.gallery_steps import CHEAP, PROMPT, data_uri, draw, png_of, tiles


def grid(page: Page) -> Locator:
    section = page.get_by_role("region", name="X/Y grid", exact=True)
    section.get_by_text("X/Y grid", exact=True).click()
    return section


def choose(section: Locator, x: tuple[str, str], y: tuple[str, str] | None = None) -> None:
    for axis, chosen in (("X", x), ("Y", y)):
        if chosen:
            section.get_by_label(f"{axis} setting").select_option(chosen[0])
            section.get_by_label(f"{axis} values").fill(chosen[1])


def fill_cheaply(page: Page, **fields: Any) -> None:
    cheap = {name: CHEAP[name] for name in ("width", "height", "num_inference_steps")}
    for name, value in {"prompt": PROMPT, **cheap, **fields}.items():
        page.get_by_label(name, exact=True).fill(str(value))


def job_ids(endpoint: LocalEndpoint) -> set[str]:
    return {job.id for job in endpoint.jobs}


def inputs_since(endpoint: LocalEndpoint, known: set[str]) -> list[dict[str, Any]]:
    """Those of the jobs that are not known; old ones may be forgotten meanwhile."""
    return [job.request["input"] for job in endpoint.jobs if job.id not in known]


def cells(section: Locator) -> Locator:
    return section.get_by_role("region", name="Cells of the grid").locator("tbody td")


def values_of(page: Page, field: str, text: str) -> str:
    """The values, as JSON with all digits, or the error."""
    return str(
        page.evaluate(
            """async ([name, text]) => {
                const { parseAxis } = await import("/grid.js");
                const { loadSchema, propertiesOf } = await import("/schema.js");
                const { writeJson } = await import("/json.js");
                const fields = propertiesOf(await loadSchema());
                try {
                    return writeJson(parseAxis(fields.find((one) => one.name === name), text));
                } catch (error) {
                    return error.message;
                }
            }""",
            [field, text],
        )
    )


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("num_inference_steps", "20, 30,40", "[20,30,40]"),
        ("num_inference_steps", "1-4", "[1,2,3,4]"),
        ("num_inference_steps", "20:50:10, 60", "[20,30,40,50,60]"),
        ("num_inference_steps", "20:49:10", "[20,30,40]"),
        ("guidance_scale", "0.1:0.4:0.1", "[0.1,0.2,0.3,0.4]"),
        ("seed", "-1", "[-1]"),
        ("seed", f"{2**64 - 2}-{2**64 - 1}", f"[{2**64 - 2},{2**64 - 1}]"),
        ("prompt_weighting", "true, False", "[true,false]"),
        ("scheduler", "DDIM, DPM++ 2M", '["DDIM","DPM++ 2M"]'),
    ],
)
def test_values_are_lists_and_ranges(page: Page, field: str, text: str, expected: str) -> None:
    assert values_of(page, field, text) == expected


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("num_inference_steps", "0-3", "must be an integer from 1 to 1000; got 0"),
        ("num_inference_steps", "1.5", "must be an integer from 1 to 1000; got 1.5"),
        ("num_inference_steps", "4-1", "a range goes up, by a step above 0; got 4-1"),
        ("num_inference_steps", "1:5:0", "a range goes up, by a step above 0; got 1:5:0"),
        ("num_inference_steps", "1-1000", "1-1000 has more than 400 values"),
        ("num_inference_steps", "5, 5", "5 is there twice"),
        ("num_inference_steps", "many", "must be an integer from 1 to 1000; got many"),
        ("width", "100", "a multiple of 8; got 100"),
        ("scheduler", "EULER", "got EULER"),
        ("prompt_weighting", "yes", "must be true or false; got yes"),
        ("seed", "18446744073709551616", "got 18446744073709551616"),
        ("num_inference_steps", " , ", "needs values, such as 1, 2, 3"),
    ],
)
def test_wrong_values_are_refused_in_words(page: Page, field: str, text: str, problem: str) -> None:
    told = values_of(page, field, text)
    assert told.startswith(f"{field}: ")
    assert problem in told


def test_two_settings_are_drawn_cell_by_cell_with_one_failing(
    page: Page, endpoint: LocalEndpoint
) -> None:
    """A sampler whose name has its schedule in it does not go with another one."""
    fill_cheaply(page, seed=3)
    section = grid(page)
    samplers = ["DPMSolverMultistep", "Euler (trailing timesteps)"]
    choose(section, ("scheduler", ", ".join(samplers)), ("schedule", "trailing, karras"))
    expect(section.get_by_role("status").first).to_have_text("2 x 2 values: 4 jobs, 3 at a time.")
    before = job_ids(endpoint)
    section.get_by_role("button", name="Start").click()
    expect(section).to_contain_text("Finished: 3 of 4 drawn, 1 failed.")
    table = section.get_by_role("table", name="scheduler across, schedule down")
    expect(table.get_by_role("columnheader")).to_have_text(samplers)
    expect(table.get_by_role("rowheader")).to_have_text(["trailing", "karras"])
    expect(cells(section).get_by_role("img")).to_have_count(3)
    expect(cells(section).nth(3)).to_contain_text("schedule: ")
    expect(tiles(page)).to_have_count(3)
    sent = inputs_since(endpoint, before)
    pairs = [(one["scheduler"], one["schedule"]) for one in sent]
    assert sorted(pairs) == sorted((x, y) for x in samplers for y in ("trailing", "karras"))
    assert {one["seed"] for one in sent} == {3}

    with page.expect_download() as waiting:
        section.get_by_role("button", name="Download as one picture").click()
    assert waiting.value.suggested_filename == "grid-scheduler-schedule.png"
    whole = Image.open(waiting.value.path()).convert("RGB")
    places = []
    for x, y in (
        ("DPMSolverMultistep", "trailing"),
        (samplers[1], "trailing"),
        ("DPMSolverMultistep", "karras"),
    ):
        [fields] = [one for one in sent if (one["scheduler"], one["schedule"]) == (x, y)]
        [file] = draw(endpoint, **{"refiner_inference_steps": 50, **fields}).files
        places.append(_find(whole, Image.open(io.BytesIO(file)).convert("RGB")))
    [first, right, below] = places
    assert first is not None
    assert right is not None
    assert below is not None
    assert right[0] >= first[0] + 64
    assert right[1] == first[1]
    assert below[0] == first[0]
    assert below[1] >= first[1] + 64


def _find(whole: Image.Image, part: Image.Image) -> tuple[int, int] | None:
    """Where a picture is in a larger one, to the pixel."""
    width, height = part.size
    for y in range(whole.height - height + 1):
        for x in range(whole.width - width + 1):
            if whole.getpixel((x, y)) != part.getpixel((0, 0)):
                continue
            if whole.crop((x, y, x + width, y + height)).tobytes() == part.tobytes():
                return x, y
    return None


def test_words_of_the_prompt_are_replaced_and_a_random_seed_is_the_same_for_all(
    page: Page, endpoint: LocalEndpoint
) -> None:
    fill_cheaply(page)
    section = grid(page)
    choose(section, ("words of the prompt", '"red circle", "green, $& square"'))
    before = job_ids(endpoint)
    section.get_by_role("button", name="Start").click()
    expect(section).to_contain_text("Finished: 2 of 2 drawn. All with seed")
    sent = inputs_since(endpoint, before)
    assert [one["prompt"] for one in sent] == [
        PROMPT,
        "a green, $& square on a blue background",
    ]
    assert len({one["seed"] for one in sent}) == 1


def test_words_that_are_not_in_the_prompt_are_told_before_a_job_starts(
    page: Page, endpoint: LocalEndpoint
) -> None:
    fill_cheaply(page)
    section = grid(page)
    choose(section, ("words of the prompt", "cat, dog"))
    before = job_ids(endpoint)
    section.get_by_role("button", name="Start").click()
    expect(section).to_contain_text('The prompt does not have "cat"')
    assert inputs_since(endpoint, before) == []


def test_settings_inside_of_others_are_compared_too(page: Page, endpoint: LocalEndpoint) -> None:
    fill_cheaply(page)
    section = grid(page)
    choose(section, ("loras[0].scale", "0, 0.5"), ("upscale.factor", "2"))
    section.get_by_role("button", name="Start").click()
    expect(section).to_contain_text("Add one to loras in the form first.")

    page.locator("#form summary", has_text="LoRAs").click()
    page.get_by_role("button", name="Add to loras").click()
    page.locator(":focus").fill("dot.safetensors")
    before = job_ids(endpoint)
    section.get_by_role("button", name="Start").click()
    expect(section).to_contain_text("Finished: 2 of 2 drawn")
    sent = sorted(inputs_since(endpoint, before), key=lambda one: one["loras"][0]["scale"])
    assert [(one["loras"], one["upscale"]) for one in sent] == [
        ([{"path": "dot.safetensors", "scale": 0}], {"factor": 2}),
        ([{"path": "dot.safetensors", "scale": 0.5}], {"factor": 2}),
    ]
    assert page.evaluate("() => import('/form.js').then(({readInput}) => readInput().loras)") == [
        {"path": "dot.safetensors"}
    ], "the form's own stay as they are"


def test_what_cannot_start_says_why(page: Page) -> None:
    section = grid(page)
    start = section.get_by_role("button", name="Start")
    expect(start).to_be_disabled()
    choose(section, ("num_inference_steps", "0"))
    expect(section).to_contain_text("must be an integer from 1 to 1000; got 0")
    choose(section, ("num_inference_steps", "1"), ("num_inference_steps", "2"))
    expect(section).to_contain_text("X and Y are the same setting")
    expect(start).to_be_disabled()
    choose(section, ("num_inference_steps", "1-30"), ("seed", "1-30"))
    expect(section).to_contain_text("900 pictures are too many")
    choose(section, ("num_inference_steps", "1-6"), ("seed", "1-6"))
    expect(section).to_contain_text("36 jobs, 3 at a time")
    start.click()
    question = page.get_by_role("dialog", name="Start 36 jobs?")
    question.get_by_role("button", name="Cancel").click()
    expect(section.get_by_role("button", name="Cancel all")).to_be_disabled()


def test_three_jobs_run_at_once_and_cancel_all_ends_them(
    open_page: OpenPage, bare_endpoint: LocalEndpoint
) -> None:
    page = open_page(page_of(bare_endpoint))
    worker = HandWorker(bare_endpoint)
    fill_cheaply(page)
    section = grid(page)
    choose(section, ("num_inference_steps", "1-8"))
    section.get_by_role("button", name="Start").click()
    expect(cells(section).filter(has_text="drawing")).to_have_count(3)
    expect(cells(section).filter(has_text="waiting")).to_have_count(5)
    wait_until(page, "document.querySelectorAll('#jobs li').length === 3")
    job = worker.take()
    worker.done(job["id"], {"output": {"images": [data_uri(png_of((8, 8), "red"))], "seed": 1}})
    expect(cells(section).get_by_role("img")).to_have_count(1)
    expect(cells(section).filter(has_text="drawing")).to_have_count(3)
    section.get_by_role("button", name="Cancel all").click()
    expect(section).to_contain_text("Cancelled: 1 of 8 drawn, 3 failed.")
    expect(cells(section).filter(has_text="cancelled")).to_have_count(7)
    assert len(bare_endpoint.jobs) == 4
    states = [bare_endpoint.status(job.id)["status"] for job in bare_endpoint.jobs]
    assert sorted(states) == ["CANCELLED"] * 3 + ["COMPLETED"]
    assert section.get_by_role("button", name="Start").is_enabled()
