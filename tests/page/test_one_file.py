"""The page as one file: how it is joined, and that it works from a disk."""

import hashlib
import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from client import one_file as module
from client.one_file import PAGE_DIR, PageError, joined_modules, one_file, page_files
from local_endpoint import LocalEndpoint, Rules
from local_endpoint.server import REPOSITORY
from tests.hand_worker import HandWorker
from tests.page.conftest import OpenPage
from tests.page.test_form import control, draw
from tests.page.test_jobs import FETCH_FAILED, OUTPUT, connect, gallery_pictures, jobs_of
from tests.page.watch import Watch


@pytest.fixture
def allowing_endpoint() -> Iterator[LocalEndpoint]:
    """It answers pages from files."""
    with LocalEndpoint(
        workers=0, endpoint_id="page-tests", rules=Rules(poll_seconds=5), allow_origin="null"
    ) as running:
        yield running


def from_disk(open_page: OpenPage, folder: Path, text: str | None = None) -> Page:
    path = folder / "sdxl.html"
    path.write_text(text or one_file(), encoding="utf-8")
    return open_page(path.as_uri())


def test_it_holds_all_that_the_page_is() -> None:
    text = one_file()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for name, path in page_files().items():
        if name.endswith((".js", ".css")):
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line and not line.startswith(("import", "export"))]
            assert all(f"{line}\n" in text for line in kept), name


def test_its_policy_allows_exactly_its_script_and_its_style() -> None:
    text = one_file()
    [script] = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    directives = dict(one.split(" ", 1) for one in policy.replace("&#x27;", "'").split("; "))
    for name, part in (("script-src", script), ("style-src", style)):
        digest = b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert directives.pop(name) == f"'sha256-{digest}'"
    loopback = "http://127.0.0.1:* http://localhost:*"
    assert directives == {
        "default-src": "'none'",
        "img-src": f"data: blob: https: {loopback}",
        "connect-src": f"https: {loopback}",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<script")


def test_the_schema_cannot_end_its_element() -> None:
    schema = {"properties": {"a": {"description": "</script><script>alert(1)</script>"}}}
    text = one_file(json.dumps(schema))
    assert text.count("<script") == 2
    [block] = re.findall(r'id="input-schema">(.*?)</script>', text)
    assert json.loads(block) == schema


def test_the_command_prints_it() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "client.one_file"], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert printed.stdout.decode() == one_file()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"main.js": 'import {a} from "./a.js";\n', "a.js": 'import {b} from "./main.js";\n'},
            "a circle of imports: main.js -> a.js -> main.js",
        ),
        (
            {"main.js": 'import {a} from "./a.js";\nlet same;\n', "a.js": "function same() {}\n"},
            "main.js: same is a name in a.js as well",
        ),
        ({"main.js": 'import a from "./a.js";\n'}, "main.js: only whole lines"),
        ({"main.js": 'import("./a.js");\n'}, "main.js: only whole lines"),
        ({"main.js": "export default 1;\n"}, "main.js: only whole lines"),
        ({"main.js": "const { a } = b;\n"}, "main.js: a name at the top level"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], told: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "PAGE_DIR", tmp_path)
    with pytest.raises(PageError, match=re.escape(told)):
        joined_modules("main.js")


def test_each_module_is_imported_by_the_page() -> None:
    joined = set(module._in_order("main.js", ()))
    assert joined == {path.name for path in PAGE_DIR.glob("*.js")}


def test_it_draws_from_a_disk(
    allowing_endpoint: LocalEndpoint, open_page: OpenPage, watch: Watch, tmp_path: Path
) -> None:
    watch.origins.add(allowing_endpoint.url.partition("/v2")[0])
    page = from_disk(open_page, tmp_path)
    expect(page.get_by_role("button", name="Connect an endpoint")).to_be_visible()
    dialog = connect(page, allowing_endpoint.url, allowing_endpoint.api_key)
    expect(dialog).to_be_hidden()
    control(page, "prompt").fill("a red circle")
    control(page, "seed").fill(str(2**64 - 1))
    draw(page)
    expect(jobs_of(page).get_by_text("In queue")).to_be_visible()
    worker = HandWorker(allowing_endpoint)
    job = worker.take()
    assert job["input"]["seed"] == 2**64 - 1
    page.reload()
    expect(jobs_of(page).get_by_text("Started")).to_be_visible()
    worker.done(job["id"], {"output": OUTPUT})
    expect(gallery_pictures(page)).to_have_count(1)


def test_an_endpoint_that_allows_no_page_from_a_disk_is_told(
    bare_endpoint: LocalEndpoint, open_page: OpenPage, watch: Watch, tmp_path: Path
) -> None:
    watch.expected = ["blocked by CORS policy", FETCH_FAILED]
    watch.origins.add(bare_endpoint.url.partition("/v2")[0])
    page = from_disk(open_page, tmp_path)
    dialog = connect(page, bare_endpoint.url, bare_endpoint.api_key)
    expect(dialog.get_by_role("status")).to_contain_text(
        "or the endpoint does not allow pages from elsewhere"
    )


def test_a_script_that_was_added_does_not_run(
    open_page: OpenPage, watch: Watch, tmp_path: Path
) -> None:
    watch.expected = ["content security policy: script-src", "Content Security Policy"]
    added = (
        "<body><script>document.title = 'added'</script>"
        "<img src='data:,' onerror='document.title = 0'>"
    )
    page = from_disk(open_page, tmp_path, one_file().replace("<body>", added))
    expect(page.locator("html[data-ready]")).to_be_attached()
    expect(page).to_have_title("SDXL")
