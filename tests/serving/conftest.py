"""The platform's side of a job that runs: a small server of the tests'."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Platform:
    """Takes updates; `delay_seconds` and `status` say how well it does so."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, str, Any]] = []
        self.delay_seconds = 0.0
        self.status = 200
        platform = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(platform.delay_seconds)
                platform.updates.append((time.monotonic(), self.path, body))
                self.send_response(platform.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    running = Platform()
    template = f"{running.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=x"
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", template)
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", f"{running.url}/job-take/w?gpu=x")
    yield running
    running.server.shutdown()
    running.server.server_close()
