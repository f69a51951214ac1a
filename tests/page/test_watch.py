"""A test of the page fails for what the browser notes, is skipped without a browser, and leaves
other tests alone."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from local_endpoint.server import REPOSITORY
from tests.page.conftest import OpenPage
from tests.page.watch import Watch

POLICY = "default-src 'self'; img-src *; connect-src * data:; script-src 'self' 'unsafe-eval'"
FILES = {
    "/": ("text/html", '<!doctype html><body><script src="/script"></script>'),
    "/script": ("text/javascript", "eval(decodeURIComponent(location.search.slice(1)))"),
    "/favicon.ico": ("image/png", ""),
}
PROBLEMS = {
    "console.error('wrong')": "console: wrong",
    "setTimeout(() => { throw new Error('broken') })": "uncaught: broken",
    "Promise.reject(new Error('unhandled'))": "uncaught: unhandled",
    "fetch('/missing')": "console: Failed to load resource: .* 404",
    "new Image().src = 'http://127.0.0.2/x.png'": "a request to elsewhere: http://127.0.0.2/x.png",
    "new Image().src = 'https://example.com/x.png'": "elsewhere: https://example.com/x.png",
    "new WebSocket('ws://127.0.0.2/')": "elsewhere: ws://127.0.0.2/",
    "document.body.innerHTML = '<p onclick=0>'; document.querySelector('p').click()": (
        "content security policy: script-src-attr"
    ),
    "document.body.innerHTML = '<p style=\"color: red\">'": "content security policy: style-src",
}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Its page runs the script that its address has after the "?"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = FILES.get(self.path.partition("?")[0], ("", ""))
            self.send_response(200 if kind else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("script", "problem"), PROBLEMS.items())
def test_what_the_browser_notes_is_a_problem_unless_it_was_expected(
    open_page: OpenPage, watch: Watch, site: str, script: str, problem: str
) -> None:
    page = open_page(f"{site}?{quote(script)}")
    for _ in range(300):
        if any(re.search(problem, one) for one in watch.problems()):
            break
        page.wait_for_timeout(100)
    assert re.search(problem, "\n".join(watch.problems()))
    watch.expected = [problem, "Failed to load|WebSocket connection|Content Security Policy"]


def test_own_requests_are_none(open_page: OpenPage, watch: Watch, site: str) -> None:
    page = open_page(f"{site}?{quote('fetch(`/script`); fetch(`data:,`); console.log(`fine`)')}")
    page.wait_for_load_state("networkidle")
    assert watch.problems() == []
    assert watch.requests[1:] == [f"{site}script", f"{site}script"]


def _pytest(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    ran = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "REQUIRE_CHROMIUM": "", **environment},
        capture_output=True,
        text=True,
    )
    return ran.stdout


THIS = "tests/page/test_watch.py::test_own_requests_are_none"


def test_without_a_browser_the_tests_are_skipped_and_say_what_to_install() -> None:
    told = _pytest(THIS, CHROMIUM="/nowhere/chromium")
    assert "1 skipped" in told
    assert "apt-get install chromium" in told


def test_where_a_browser_is_required_its_lack_is_an_error() -> None:
    told = _pytest(THIS, CHROMIUM="/nowhere/chromium", REQUIRE_CHROMIUM="1")
    assert "1 error" in told
    assert "apt-get install chromium" in told


def test_tests_of_other_folders_may_run_event_loops_afterwards(tmp_path: Path) -> None:
    other = tmp_path / "test_other.py"
    other.write_text("import asyncio\n\ndef test_other():\n    asyncio.run(asyncio.sleep(0))\n")
    assert "2 passed" in _pytest("--config-file=pyproject.toml", "--rootdir=.", THIS, str(other))
