"""The log: a line for each phase, JSON on the platform, plain on a laptop."""

import json
import logging
from collections.abc import Iterator

import pytest

from sdxl_worker.serving import logs
from tests.support import PROMPT, data_uri, picture, run

JOB = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 4}


def test_each_phase_of_a_job_has_one_line_with_its_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "sdxl_worker")
    image = data_uri(picture(**JOB))
    caplog.clear()
    run({**JOB, "image_url": image, "strength": 1})
    lines = [vars(record) for record in caplog.records]
    assert [line["phase"] for line in lines] == ["fetch", "decode", "generate", "encode"]
    for line in lines:
        assert line["job_id"] == "test"
        assert isinstance(line["ms"], int)
        assert line["peak_memory_mb"] > 50
    assert lines[2]["wait_ms"] >= 0
    assert lines[2]["ms"] > 0


def record(level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("sdxl_worker", level, __file__, 1, "drew %d", (3,), None)
    vars(made).update(extra)
    return made


def test_json_lines_have_the_form_of_the_sdk_s_and_our_figures() -> None:
    line = json.loads(logs.JsonFormatter().format(record(job_id="a", phase="generate", ms=7)))
    assert line == {
        "requestId": "a",
        "message": "drew 3",
        "level": "INFO",
        "phase": "generate",
        "ms": 7,
    }
    assert json.loads(logs.JsonFormatter().format(record()))["requestId"] is None


def test_a_traceback_stays_on_its_json_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        import sys

        failed = record(logging.ERROR)
        failed.exc_info = sys.exc_info()
    text = logs.JsonFormatter().format(failed)
    assert "\n" not in text
    assert "ValueError: wrong" in json.loads(text)["traceback"]


def test_plain_lines_are_as_the_sdk_s() -> None:
    assert logs.PlainFormatter().format(record(job_id="a")) == "INFO   | a | drew 3"
    assert logs.PlainFormatter().format(record()) == "INFO   | drew 3"


@pytest.fixture
def _logging_left_as_it_was() -> Iterator[None]:
    handlers, level = logs.log.handlers, logs.log.level
    yield
    logs.log.handlers = handlers
    logs.log.setLevel(level)
    logs.log.propagate = True


@pytest.mark.usefixtures("_logging_left_as_it_was")
@pytest.mark.parametrize(
    ("value", "level"),
    [
        ("", logging.INFO),
        ("debug", logging.DEBUG),
        ("WARN", logging.WARNING),
        ("ERROR", logging.ERROR),
    ],
)
def test_the_level_is_the_sdk_s_variable(
    value: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_LOG_LEVEL", value)
    logs.set_up_logging()
    assert logs.log.level == level


@pytest.mark.usefixtures("_logging_left_as_it_was")
@pytest.mark.parametrize(
    ("endpoint", "formatter"), [("ep", logs.JsonFormatter), ("", logs.PlainFormatter)]
)
def test_the_platform_gets_json(
    endpoint: str, formatter: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", endpoint)
    logs.set_up_logging()
    [handler] = logs.log.handlers
    assert isinstance(handler.formatter, formatter)


def test_only_debug_shows_the_request_and_nothing_the_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "sdxl_worker")
    run(JOB)
    assert "num_inference_steps" not in caplog.text
    caplog.set_level("DEBUG", "sdxl_worker")
    run(JOB)
    assert "num_inference_steps" in caplog.text
    assert PROMPT not in caplog.text
