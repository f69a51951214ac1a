"""The page in a real browser.

    def test_a_prompt_is_drawn(page: Page) -> None:
        page.get_by_label("prompt", exact=True).fill("a red circle on a blue background")

A test fails at its end if the browser noted an error on its console, an uncaught exception, a
violation of the content security policy, or a request to another origin; `watch.expected` takes
patterns of those that the test causes, `watch.origins` more origins.

Playwright leaves an event loop running in the thread of the tests, so a test here cannot use
`asyncio.run`. The loop ends with the folder's tests.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from local_endpoint import LocalEndpoint, Rules
from local_endpoint.server import REPOSITORY
from sdxl_worker.settings import Settings
from tests.page.watch import Watch, origin
from tools.chromium import ChromiumMissingError, launch

# Reached on a busy machine only.
WAIT_SECONDS = 60
DESKTOP = {"width": 1280, "height": 800}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}

OpenPage = Callable[..., Page]


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except ChromiumMissingError as missing:
            if os.environ.get("REQUIRE_CHROMIUM"):
                raise
            pytest.skip(str(missing))
        expect.set_options(timeout=WAIT_SECONDS * 1000)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[LocalEndpoint]:
    """One worker with the miniature model and its LoRAs, for all tests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(name.upper(), raising=False)
        running = LocalEndpoint(
            # Other tests look for what is left of endpoints with the default id.
            endpoint_id="page-tests",
            environment={
                "LORA_DIR": str(REPOSITORY / "models" / "adapters"),
                "RUNPOD_LOG_LEVEL": "",
            },
        )
        with running:
            yield running


@pytest.fixture
def bare_endpoint(
    contexts: list[BrowserContext], request: pytest.FixtureRequest
) -> Iterator[LocalEndpoint]:
    """Without a worker: a test takes the jobs, by `HandWorker(bare_endpoint)`.

    Its parameter: more options of the endpoint.
    """
    options = {"endpoint_id": "page-tests", **getattr(request, "param", {})}
    with LocalEndpoint(workers=0, rules=Rules(poll_seconds=5), **options) as running:
        yield running
        _close(contexts)  # first: a page that still asks would find nobody


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def contexts() -> list[BrowserContext]:
    """Those that are open."""
    return []


def _close(contexts: list[BrowserContext]) -> None:
    while contexts:
        contexts.pop().close()


@pytest.fixture
def open_page(
    chromium: Browser, watch: Watch, contexts: list[BrowserContext]
) -> Iterator[OpenPage]:
    """`open_page(address, schema=None, **options)`: a page in a browser context of its own.

    `schema` replaces the worker's; the options are those of Playwright's `Browser.new_context`,
    such as `**PHONE` or `color_scheme="dark"`.
    """

    def opened(address: str, *, schema: Any = None, **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": DESKTOP, "locale": "en-US", **options})
        contexts.append(context)
        context.set_default_timeout(WAIT_SECONDS * 1000)
        watch.origins.add(origin(address))
        watch.over(context)
        if schema is not None:
            body = json.dumps(schema)
            context.route(
                "**/input.schema.json",
                lambda route: route.fulfill(body=body, content_type="application/json"),
            )
        page = context.new_page()
        page.goto(address)
        return page

    yield opened
    _close(contexts)
    assert watch.problems() == []


@pytest.fixture
def page(open_page: OpenPage, endpoint: LocalEndpoint) -> Page:
    """The endpoint's page, on a desktop, in light colours."""
    return open_page(page_of(endpoint))


def page_of(endpoint: LocalEndpoint) -> str:
    """The address of the page that an endpoint serves."""
    parts = urlsplit(endpoint.url)
    return f"{parts.scheme}://{parts.netloc}/"


def wait_until(page: Page, condition: str) -> None:
    """Wait for an expression. Playwright's own `wait_for_function` breaks the page's policy."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)
