"""The jobs: each is sent once, watched until it ends, and survives a reload."""

import io
import re
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from local_endpoint import LocalEndpoint
from local_endpoint.record import Exchange
from tests.hand_worker import HandWorker
from tests.page.conftest import OpenPage, page_of
from tests.page.test_form import control, data_uri, draw, open_groups, picture, problem_at
from tests.page.watch import Watch, origin

PICTURE = data_uri(picture())
OUTPUT = {"images": [PICTURE], "seed": 7}
FETCH_FAILED = "Failed to load resource"


@pytest.fixture
def jobs_page(bare_endpoint: LocalEndpoint, open_page: OpenPage) -> Page:
    """The page of an endpoint whose only worker is the test."""
    page = open_page(page_of(bare_endpoint))
    expect(page.locator("html[data-ready]")).to_be_attached()
    return page


@pytest.fixture
def worker(bare_endpoint: LocalEndpoint) -> HandWorker:
    return HandWorker(bare_endpoint)


def jobs_of(page: Page) -> Locator:
    return page.get_by_role("region", name="Jobs").get_by_role("listitem")


def draw_prompt(page: Page, prompt: str = "a red circle") -> None:
    control(page, "prompt").fill(prompt)
    draw(page)


def gallery_pictures(page: Page) -> Locator:
    return page.get_by_role("region", name="Gallery").get_by_role("list").locator("img")


def requests_of(endpoint: LocalEndpoint, route: str) -> list[Exchange]:
    return [one for one in list(endpoint.record.exchanges) if one.route == route]


def step(number: int, percent: int, **more: Any) -> dict[str, Any]:
    progress = {"stage": "base", "step": number, "steps": 25, "percent": percent}
    return {"progress": progress, **more}


def test_a_job_tells_how_far_it_is(jobs_page: Page, worker: HandWorker) -> None:
    draw_prompt(jobs_page)
    job = jobs_of(jobs_page)
    expect(job.get_by_role("heading")).to_have_text("a red circle")
    expect(job.get_by_text(re.compile(r"In queue, \d+ s"))).to_be_visible()
    job_id = worker.take()["id"]
    expect(job.get_by_text(re.compile(r"Started, \d+ s"))).to_be_visible()
    worker.progress(job_id, {"progress": {"stage": "loading", "model": "other"}})
    expect(job.get_by_text(re.compile(r"Loading other, \d+ s"))).to_be_visible()
    worker.progress(job_id, {"progress": {"stage": "download", "bytes": 5, "percent": 40}})
    expect(job.get_by_text("Downloading, 40%")).to_be_visible()
    worker.progress(job_id, step(5, 20))
    expect(job.get_by_text("Drawing: base, step 5 of 25, 20%", exact=True)).to_be_visible()
    expect(job.get_by_role("progressbar")).to_have_attribute("value", "20")
    expect(job.get_by_role("img")).to_have_count(0)
    worker.progress(job_id, step(10, 40, preview=PICTURE))
    expect(job.get_by_text(re.compile("step 10 of 25, 40%, about .* left"))).to_be_visible()
    expect(job.get_by_role("img", name="Preview of a red circle")).to_have_attribute("src", PICTURE)
    worker.done(job_id, {"output": OUTPUT})
    expect(job.get_by_text(re.compile(r"1 picture in [\d.]+ s"))).to_be_visible()
    expect(job.get_by_role("progressbar")).to_be_hidden()
    expect(gallery_pictures(jobs_page)).to_have_count(1)


def test_a_preview_that_is_no_picture_is_not_loaded(jobs_page: Page, worker: HandWorker) -> None:
    draw_prompt(jobs_page)
    worker.progress(worker.take()["id"], step(5, 20, preview="https://example.com/x.png"))
    expect(jobs_page.get_by_text(re.compile("step 5 of 25"))).to_be_visible()
    expect(jobs_of(jobs_page).get_by_role("img")).to_have_count(0)


def test_several_jobs_wait_for_their_turns(jobs_page: Page, worker: HandWorker) -> None:
    draw_prompt(jobs_page, "first")
    draw_prompt(jobs_page, "second")
    expect(jobs_of(jobs_page).get_by_role("heading")).to_have_text(["second", "first"])
    expect(jobs_of(jobs_page).get_by_text("In queue")).to_have_count(2)
    worker.done(worker.take()["id"], {"output": OUTPUT})
    first = jobs_of(jobs_page).filter(has_text="first")
    expect(first.get_by_text("1 picture")).to_be_visible()
    expect(jobs_of(jobs_page).filter(has_text="second").get_by_text("In queue")).to_be_visible()
    jobs_page.get_by_role("button", name="Clear finished").click()
    expect(jobs_of(jobs_page).get_by_role("heading")).to_have_text(["second"])


def test_a_job_is_cancelled(jobs_page: Page, bare_endpoint: LocalEndpoint) -> None:
    draw_prompt(jobs_page)
    job = jobs_of(jobs_page)
    expect(job.get_by_text("In queue")).to_be_visible()
    job.get_by_role("button", name="Cancel: a red circle").click()
    expect(job.get_by_text("Cancelled")).to_be_visible()
    assert bare_endpoint.jobs[0].status == "CANCELLED"
    expect(jobs_page.locator("#form").get_by_role("alert")).to_have_count(0)
    job.get_by_role("button", name="Dismiss").click()
    expect(jobs_of(jobs_page)).to_have_count(0)
    expect(jobs_page.get_by_text("Nothing is being drawn.")).to_be_visible()


def test_a_failed_job_says_why_and_can_be_sent_again(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint
) -> None:
    control(jobs_page, "seed").fill(str(2**64 - 1))
    draw_prompt(jobs_page)
    worker.done(worker.take()["id"], {"error": "the model is broken\n<b>badly</b>"})
    job = jobs_of(jobs_page)
    expect(job.get_by_text("Failed")).to_be_visible()
    expect(job.locator(".problem")).to_have_text("the model is broken <b>badly</b>")
    control(jobs_page, "prompt").fill("something else")
    job.get_by_role("button", name="Again").click()
    expect(jobs_of(jobs_page)).to_have_count(2)
    expect(jobs_of(jobs_page).first.get_by_text("In queue")).to_be_visible()
    first, second = bare_endpoint.jobs
    assert first.request == second.request
    assert second.request["input"]["seed"] == 2**64 - 1


@pytest.mark.parametrize(
    ("posted", "told"),
    [
        ({"output": None}, "the job has ended without an output"),
        ({"error": '{"error_type": "x", "error_message": "it broke"}'}, "it broke"),
        ({"output": {"error": "out of memory"}}, "out of memory"),
    ],
)
def test_odd_endings_are_told(
    jobs_page: Page, worker: HandWorker, posted: dict[str, Any], told: str
) -> None:
    draw_prompt(jobs_page)
    worker.done(worker.take()["id"], posted)
    expect(jobs_of(jobs_page).locator(".problem")).to_have_text(told)


def test_a_warning_stays(jobs_page: Page, worker: HandWorker) -> None:
    draw_prompt(jobs_page)
    worker.done(worker.take()["id"], {"output": {**OUTPUT, "warning": "sent as JPEG"}})
    expect(jobs_of(jobs_page).get_by_text("sent as JPEG")).to_be_visible()


def test_an_output_without_pictures_is_shown_with_all_digits(
    jobs_page: Page, worker: HandWorker
) -> None:
    draw_prompt(jobs_page)
    worker.done(worker.take()["id"], {"output": {"seed": 2**64 - 1, "model": "shapes"}})
    expect(jobs_of(jobs_page).locator("pre")).to_contain_text(f'"seed": {2**64 - 1}')


def test_only_the_last_jobs_that_ended_well_stay(jobs_page: Page, worker: HandWorker) -> None:
    for i in range(4):
        draw_prompt(jobs_page, f"prompt {i}")
        worker.done(worker.take()["id"], {"output": OUTPUT})
        job = jobs_of(jobs_page).filter(has_text=f"prompt {i}")
        expect(job.get_by_text("1 picture")).to_be_visible()
    names = ["prompt 3", "prompt 2", "prompt 1"]
    expect(jobs_of(jobs_page).get_by_role("heading")).to_have_text(names)
    expect(gallery_pictures(jobs_page)).to_have_count(4)


# Reloads.


def test_a_reload_in_the_middle_of_a_job(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint
) -> None:
    draw_prompt(jobs_page, "first")
    draw_prompt(jobs_page, "second")
    expect(jobs_of(jobs_page).get_by_text("In queue")).to_have_count(2)
    job_id = worker.take()["id"]
    jobs_page.reload()
    expect(jobs_of(jobs_page).get_by_role("heading")).to_have_text(["second", "first"])
    worker.progress(job_id, step(5, 20, preview=PICTURE))
    first = jobs_of(jobs_page).filter(has_text="first")
    expect(first.get_by_role("img", name="Preview of first")).to_be_visible()
    worker.done(job_id, {"output": OUTPUT})
    expect(first.get_by_text("1 picture")).to_be_visible()
    expect(gallery_pictures(jobs_page)).to_have_count(1)
    jobs_page.reload()
    expect(jobs_of(jobs_page).get_by_role("heading")).to_have_text(["second"])
    expect(gallery_pictures(jobs_page)).to_have_count(1)
    assert len(requests_of(bare_endpoint, "run")) == 2


def test_a_job_that_ends_while_the_page_is_away_is_fetched(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint
) -> None:
    draw_prompt(jobs_page)
    expect(jobs_page.get_by_text("In queue").first).to_be_visible()  # it knows the job's id
    job_id = worker.take()["id"]
    jobs_page.goto("about:blank")
    worker.done(job_id, {"output": OUTPUT})
    jobs_page.goto(page_of(bare_endpoint))
    expect(jobs_of(jobs_page).get_by_text("1 picture")).to_be_visible()
    expect(gallery_pictures(jobs_page)).to_have_count(1)


def test_a_reload_between_the_gallery_and_the_note_of_it_doubles_nothing(
    jobs_page: Page, worker: HandWorker
) -> None:
    draw_prompt(jobs_page)
    expect(jobs_page.get_by_text("In queue").first).to_be_visible()
    kept = jobs_page.evaluate("() => sessionStorage.getItem('sdxl-jobs')")
    worker.done(worker.take()["id"], {"output": OUTPUT})
    expect(gallery_pictures(jobs_page)).to_have_count(1)
    jobs_page.evaluate("(kept) => sessionStorage.setItem('sdxl-jobs', kept)", kept)
    jobs_page.reload()
    expect(jobs_of(jobs_page).get_by_text("1 picture")).to_be_visible()
    expect(gallery_pictures(jobs_page)).to_have_count(1)


def test_a_job_with_a_large_picture_survives_a_reload(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint
) -> None:
    file = io.BytesIO()
    Image.effect_noise((1450, 1450), 100).convert("RGB").save(file, "BMP")
    uri = data_uri(file.getvalue()).replace("png", "bmp", 1)
    assert len(uri) > 5_300_000  # characters: more than the tab's memory takes
    open_groups(jobs_page)
    jobs_page.evaluate(
        "async (uri) => (await import('/form.js')).setPicture('image_url', uri)", uri
    )
    draw_prompt(jobs_page, "large")
    expect(jobs_page.get_by_text("In queue").first).to_be_visible()
    jobs_page.reload()
    job = jobs_of(jobs_page)
    expect(job.get_by_text("In queue")).to_be_visible()
    job_id = worker.take()["id"]
    expect(job.get_by_text("Started")).to_be_visible()
    worker.done(job_id, {"output": OUTPUT})
    expect(job.get_by_text("1 picture")).to_be_visible()
    job.get_by_role("button", name="Again").click()
    expect(jobs_of(jobs_page)).to_have_count(2)
    expect(jobs_of(jobs_page).first.get_by_text("In queue")).to_be_visible()
    assert bare_endpoint.jobs[1].request["input"]["image_url"] == uri


def test_a_job_that_was_just_being_sent_is_not_sent_again(
    jobs_page: Page, bare_endpoint: LocalEndpoint
) -> None:
    bare_endpoint.faults.delay("run", 3)
    draw_prompt(jobs_page)
    expect(jobs_of(jobs_page).get_by_text("Sending")).to_be_visible()
    jobs_page.reload()
    expect(jobs_of(jobs_page).locator(".problem")).to_contain_text(
        "the page was left while this job was being sent"
    )
    assert len(requests_of(bare_endpoint, "run")) <= 1


# Trouble.


def test_trouble_while_asking_passes(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    draw_prompt(jobs_page)
    expect(jobs_page.get_by_text("In queue").first).to_be_visible()
    bare_endpoint.faults.answer("status", 500)
    job = jobs_of(jobs_page)
    expect(job.get_by_text("the endpoint answered 500: a fault on demand; trying")).to_be_visible()
    bare_endpoint.faults.drop("status", times=2)  # the browser itself tries once more
    expect(job.get_by_text(re.compile("could not reach 127.0.0.1:.*; trying"))).to_be_visible()
    worker.done(worker.take()["id"], {"output": OUTPUT})
    expect(job.get_by_text("1 picture")).to_be_visible()
    expect(job.get_by_text("trying again")).to_be_hidden()


def test_a_job_of_an_endpoint_that_does_not_answer_can_be_left(
    jobs_page: Page, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    draw_prompt(jobs_page)
    job = jobs_of(jobs_page)
    expect(job.get_by_text("In queue")).to_be_visible()
    expect(job.get_by_role("button", name="Dismiss")).to_be_hidden()
    jobs_page.route("**/status/**", lambda route: route.fulfill(status=500))
    jobs_page.route("**/cancel/**", lambda route: route.fulfill(status=500))
    job.get_by_role("button", name="Cancel").click()
    expect(job.get_by_text("not cancelled: the endpoint answered 500")).to_be_visible()
    job.get_by_role("button", name="Dismiss").click()
    expect(job).to_have_count(0)
    expect(jobs_page.get_by_role("alert")).to_be_hidden()
    jobs_page.reload()
    expect(jobs_page.get_by_text("Nothing is being drawn.")).to_be_visible()


def test_a_job_whose_sending_failed_may_have_arrived_and_is_not_sent_again(
    jobs_page: Page, bare_endpoint: LocalEndpoint, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    bare_endpoint.faults.drop("run")  # the browser itself tries once more
    bare_endpoint.faults.drop_answer("run")
    draw_prompt(jobs_page)
    expect(jobs_of(jobs_page).locator(".problem")).to_contain_text(
        "Whether the job has arrived is not known, so it was not sent again."
    )
    assert len([one for one in watch.requests if one.endswith("/run")]) == 1
    assert len(bare_endpoint.jobs) == 1


@pytest.mark.parametrize(
    ("status_code", "told"),
    [
        (401, "the API key is missing or wrong (401)"),
        (404, "the id is wrong"),
        (429, "takes no more requests for now (429)"),
        (503, "the endpoint answered 503: a fault on demand"),
    ],
)
def test_a_refused_job_says_why(
    jobs_page: Page, bare_endpoint: LocalEndpoint, watch: Watch, status_code: int, told: str
) -> None:
    watch.expected = [FETCH_FAILED]
    bare_endpoint.faults.answer("run", status_code)
    draw_prompt(jobs_page)
    problem = jobs_of(jobs_page).locator(".problem")
    expect(problem).to_contain_text(told)
    is_unsure = "Whether the job has arrived" in problem.inner_text()
    assert is_unsure == (status_code == 503)


def test_a_job_that_the_endpoint_no_longer_knows_ends(
    jobs_page: Page, bare_endpoint: LocalEndpoint, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    draw_prompt(jobs_page)
    expect(jobs_page.get_by_text("In queue").first).to_be_visible()
    bare_endpoint.call("purge-queue", method="POST")
    expect(jobs_of(jobs_page).locator(".problem")).to_contain_text("no longer kept (404)")


def test_a_hidden_page_asks_less_often(
    bare_endpoint: LocalEndpoint, open_page: OpenPage, watch: Watch
) -> None:
    watch.origins.add(origin(page_of(bare_endpoint)))
    page = open_page("about:blank")
    page.clock.install()
    page.goto(page_of(bare_endpoint))
    expect(page.locator("html[data-ready]")).to_be_attached()
    page.evaluate("() => Object.defineProperty(document, 'hidden', { get: () => true })")
    draw_prompt(page)
    asked = lambda: len(requests_of(bare_endpoint, "status"))  # noqa: E731
    with page.expect_response(re.compile("/status/")):
        page.clock.run_for(10)
    expect(page.get_by_text("In queue").first).to_be_visible()
    before = asked()
    page.clock.run_for(9000)
    assert asked() == before
    with page.expect_response(re.compile("/status/")):
        page.clock.run_for(2000)


# The endpoint and the key.


def connect(page: Page, url: str, key: str) -> Locator:
    dialog = page.get_by_role("dialog", name="Endpoint")
    if not dialog.is_visible():
        page.locator("#endpoint").click()
    dialog.get_by_label("Endpoint", exact=True).fill(url)
    dialog.get_by_label("API key").fill(key)
    dialog.get_by_role("button", name="Connect").click()
    return dialog


def test_the_local_endpoint_needs_nothing_typed(
    jobs_page: Page, bare_endpoint: LocalEndpoint
) -> None:
    expect(jobs_page.locator("#endpoint")).to_have_text("page-testsno worker yet")
    jobs_page.locator("#endpoint").click()
    dialog = jobs_page.get_by_role("dialog", name="Endpoint")
    expect(dialog.get_by_label("Endpoint", exact=True)).to_have_value(bare_endpoint.url)
    jobs_page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "Type the endpoint's id or its URL."),
        ("http://example.com/v2/x", "The key is sent over https:// only, or to this machine"),
        ("http://127.0.0.1.example.com/v2/x", "The key is sent over https:// only"),
        ("https://me:secret@example.com/v2/x", "A URL without user"),
        ("https://example.com/v2/x?key=1", "A URL without user"),
        ("javascript:alert(1)", "The key is sent over https:// only"),
        ("two words", "Neither an endpoint's id nor a URL"),
    ],
)
def test_a_key_goes_nowhere_unsafe(jobs_page: Page, watch: Watch, typed: str, told: str) -> None:
    expect(jobs_page.locator("#endpoint")).to_contain_text("no worker yet")
    before = len(watch.requests)
    dialog = connect(jobs_page, typed, "rpa_KEY")
    expect(dialog.get_by_role("status")).to_contain_text(told)
    expect(dialog).to_be_visible()
    assert len(watch.requests) == before


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("abc123DEF", "https://api.runpod.ai/v2/abc123DEF"),
        (" https://api.runpod.ai/v2/abc/ ", "https://api.runpod.ai/v2/abc"),
        ("https://api.runpod.ai/v2/abc/runsync", "https://api.runpod.ai/v2/abc"),
        ("http://localhost:8000/v2/local", "http://localhost:8000/v2/local"),
        ("http://[::1]:8000/v2/local", "http://[::1]:8000/v2/local"),
    ],
)
def test_an_endpoint_is_its_id_or_its_address(jobs_page: Page, typed: str, url: str) -> None:
    script = "async (typed) => (await import('/api.js')).endpointUrl(typed)"
    assert jobs_page.evaluate(script, typed) == url


def test_a_wrong_key_is_told_in_the_dialog(
    jobs_page: Page, bare_endpoint: LocalEndpoint, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    dialog = connect(jobs_page, bare_endpoint.url, "wrong")
    expect(dialog.get_by_role("status")).to_have_text("the API key is missing or wrong (401)")
    kept = jobs_page.evaluate("async () => (await import('/api.js')).connection()")
    assert kept["apiKey"] == bare_endpoint.api_key
    connect(jobs_page, bare_endpoint.url, bare_endpoint.api_key)
    expect(dialog).to_be_hidden()


def test_a_key_that_is_no_longer_right_is_told_in_the_header(
    jobs_page: Page, bare_endpoint: LocalEndpoint, watch: Watch
) -> None:
    watch.expected = [FETCH_FAILED]
    endpoint = jobs_page.locator("#endpoint")
    expect(endpoint).to_contain_text("no worker yet")
    expect(endpoint.locator("[data-on]")).to_be_attached()
    jobs_page.evaluate(
        """async (url) =>
            (await import("/api.js")).keepConnection({ url, apiKey: "wrong" })""",
        bare_endpoint.url,
    )
    jobs_page.reload()
    expect(endpoint).to_contain_text("wrong key")
    expect(endpoint.locator("[data-on]")).to_have_count(0)


def test_an_endpoint_that_cannot_be_reached_is_told(jobs_page: Page, watch: Watch) -> None:
    watch.expected = [FETCH_FAILED]
    watch.origins.add("http://127.0.0.1:9")
    dialog = connect(jobs_page, "http://127.0.0.1:9/v2/x", "key")
    expect(dialog.get_by_role("status")).to_contain_text(
        "the browser could not reach 127.0.0.1:9, or the endpoint does not allow pages from"
    )


def test_the_key_stays_in_the_tab(
    jobs_page: Page, worker: HandWorker, bare_endpoint: LocalEndpoint
) -> None:
    connect(jobs_page, bare_endpoint.url, bare_endpoint.api_key)
    expect(jobs_page.get_by_role("dialog")).to_be_hidden()
    draw_prompt(jobs_page)
    worker.done(worker.take()["id"], {"output": OUTPUT})
    expect(gallery_pictures(jobs_page)).to_have_count(1)
    kept = jobs_page.evaluate(
        """async () => {
            const found = [JSON.stringify(localStorage), location.href, document.cookie];
            for (const { name } of await indexedDB.databases()) {
                const database = await new Promise((resolve) => {
                    indexedDB.open(name).onsuccess = (event) => resolve(event.target.result);
                });
                for (const store of database.objectStoreNames) {
                    const all = database.transaction(store).objectStore(store).getAll();
                    await new Promise((resolve) => (all.onsuccess = resolve));
                    found.push(all.result.map((one) => JSON.stringify(one)).join());
                }
                database.close();
            }
            return found;
        }"""
    )
    assert "a red circle" in "".join(kept)  # the gallery was looked through
    assert bare_endpoint.api_key not in "".join(kept)
    assert bare_endpoint.api_key in jobs_page.evaluate("() => JSON.stringify(sessionStorage)")


def test_without_an_endpoint_the_page_asks_for_one(
    bare_endpoint: LocalEndpoint, open_page: OpenPage, watch: Watch
) -> None:
    watch.expected = ["403"]
    watch.origins.add(origin(page_of(bare_endpoint)))
    page = open_page("about:blank")
    page.route("**/page-config.json", lambda route: route.fulfill(status=403, body="{}"))
    page.goto(page_of(bare_endpoint))
    expect(page.get_by_role("button", name="Connect an endpoint")).to_be_visible()
    draw_prompt(page)
    expect(page.get_by_role("dialog", name="Endpoint")).to_be_visible()
    assert jobs_of(page).count() == 0
    assert bare_endpoint.jobs == []


# With the miniature model.


def test_a_picture_is_drawn(page: Page) -> None:
    control(page, "num_images").fill("2")
    control(page, "num_inference_steps").fill("200")
    draw_prompt(page, "a red circle on a blue background")
    job = jobs_of(page)
    expect(job.get_by_text(re.compile(r"Drawing: base, step \d+ of 200, \d+%"))).to_be_visible()
    expect(job.get_by_role("img", name="Preview of a red circle")).to_be_visible()
    expect(job.get_by_text(re.compile("2 pictures in"))).to_be_visible()
    expect(gallery_pictures(page)).to_have_count(2)


def test_a_job_that_is_being_drawn_is_cancelled(page: Page) -> None:
    control(page, "num_inference_steps").fill("1000")
    draw_prompt(page)
    job = jobs_of(page)
    expect(job.get_by_text(re.compile("Drawing: base"))).to_be_visible()
    job.get_by_role("button", name="Cancel").click()
    expect(job.get_by_text("Cancelled")).to_be_visible()
    expect(problem_at(control(page, "prompt"))).to_be_hidden()
