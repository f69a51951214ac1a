"""A result is kept until the platform has it."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sdxl_worker.serving import delivery
from sdxl_worker.serving.delivery import Deliveries, job_url

RESULT = {"output": {"images": ["data:image/png;base64,AAAA"], "seed": 1}}
Answers = list[int | dict[str, Any] | None]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ways in a thousandth of the time."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_SECONDS", 0.02)


class Platform:
    """Takes results; what it answers first is given, and from then on 200."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.at: list[float] = []

    async def take(self, request: web.BaseRequest) -> web.Response:
        self.at.append(time.monotonic())
        self.paths.append(request.raw_path.partition("?")[0])
        self.bodies.append(json.loads(await request.read()))
        answer = self.answers.pop(0) if self.answers else 200
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.Response(**(answer if isinstance(answer, dict) else {"status": answer}))


def deliver(
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
    result: dict[str, Any] = RESULT,
    job_id: str = "job-1",
    meanwhile: Callable[[Deliveries], None] = lambda _: None,
) -> Platform:
    """What the platform got of one result."""
    platform = Platform(answers)

    async def run() -> None:
        runner = web.ServerRunner(web.Server(platform.take))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", f"{url}/job-take/$ID?")
        monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", f"{url}/job-done/w/$ID?gpu=x")
        done: list[str] = []
        async with aiohttp.ClientSession() as session:
            deliveries = Deliveries(done.append)
            deliveries.start(session, job_id, result)
            assert deliveries.is_delivering(job_id)
            while not platform.at and platform.answers:
                await asyncio.sleep(0.001)
            meanwhile(deliveries)
            await asyncio.wait_for(deliveries.all_done(), 20)
            assert not deliveries.is_delivering(job_id)
        assert done == [job_id]
        await runner.cleanup()

    asyncio.run(run())
    return platform


def test_a_result_is_posted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deliver([], monkeypatch).bodies == [RESULT]


@pytest.mark.parametrize("trouble", [429, 400, 401, 403, 408, 500, 502, 503, 504, None])
@pytest.mark.parametrize("times", [1, 4])
def test_it_is_posted_again_until_the_platform_has_it(
    trouble: int | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = deliver([trouble] * times, monkeypatch)
    assert platform.bodies == [RESULT] * (times + 1)


@pytest.mark.parametrize("status", [409, 410])
def test_a_platform_that_has_a_result_has_it(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(deliver([None, status], monkeypatch).bodies) == 2


def test_retry_after_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = deliver([{"status": 429, "headers": {"Retry-After": "1"}}], monkeypatch)
    assert platform.at[1] - platform.at[0] >= 1


@pytest.mark.parametrize("wanted", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "1e9", "\u00b2"])
def test_a_retry_after_that_is_no_number_is_not(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"status": 429, "headers": {"Retry-After": wanted}}
    assert len(deliver([answer], monkeypatch).bodies) == 2


def test_what_is_too_large_for_the_platform_is_told_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = deliver([413, 500], monkeypatch, {**RESULT, "stopPod": True}).bodies
    assert bodies[0] == {**RESULT, "stopPod": True}
    assert bodies[1]["error"].startswith("the platform refused the result of 0.0 MB (413); ask")
    assert bodies[1:] == [{"error": bodies[1]["error"], "stopPod": True}] * 2


class TestOverTime:
    """What is posted when, on a clock of its own; each post takes no time."""

    @staticmethod
    def posted(
        says: Callable[[float], int | tuple[int, float] | None],
        monkeypatch: pytest.MonkeyPatch,
        result: dict[str, Any] = RESULT,
    ) -> list[tuple[float, dict[str, Any]]]:
        """When, in seconds, and what; `says` is what the platform answers when."""
        monkeypatch.undo()  # the real pauses
        monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://platform/take/$ID?")
        monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://platform/done/$ID?")
        now = [0.0]
        posts: list[tuple[float, dict[str, Any]]] = []

        async def post(_: Any, __: str, body: bytes, ___: str) -> tuple[int | None, float]:
            posts.append((now[0], json.loads(body)))
            said = says(now[0])
            return said if isinstance(said, tuple) else (said, 0.0)

        async def sleep(seconds: float) -> None:
            now[0] += seconds

        with monkeypatch.context() as patch:
            patch.setattr(delivery, "_post", post)
            patch.setattr(delivery.time, "monotonic", lambda: now[0])
            patch.setattr(delivery.asyncio, "sleep", sleep)
            asyncio.run(delivery._deliver(None, "job-1", result))  # type: ignore[arg-type]
        return posts

    @pytest.mark.parametrize("trouble", [None, 400, 403, 408, 429, 500, 502])
    def test_a_minute_of_trouble_loses_nothing(
        self, trouble: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = self.posted(lambda at: 200 if at >= 45 else trouble, monkeypatch)
        assert posts[-1][1] == RESULT
        assert 45 <= posts[-1][0] <= 60
        assert len(posts) < 12

    def test_two_minutes_of_a_broken_platform_lose_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = self.posted(lambda at: 200 if at >= 110 else 502, monkeypatch)
        assert posts[-1][1] == RESULT

    def test_a_result_is_given_up_after_that(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        posts = self.posted(lambda _: 500, monkeypatch)
        assert posts[-1] == (delivery.KEPT_SECONDS, RESULT)
        assert "the result is lost" in caplog.text

    def test_a_platform_that_asks_for_patience_gets_a_last_post(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = self.posted(lambda at: 200 if at >= 90 else (429, 70.0), monkeypatch)
        assert [at for at, _ in posts] == [0, 70, 120]

    def test_a_refusal_is_believed_after_a_minute_of_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = self.posted(lambda at: 200 if at > 80 else 400, monkeypatch)
        refused_at = next(at for at, body in posts if body != RESULT)
        assert 60 <= refused_at <= 80
        assert "refused the result" in posts[-1][1]["error"]

    def test_one_refusal_amid_other_trouble_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def says(at: float) -> int:
            return 502 if at < 70 else 400 if at < 80 else 200

        assert self.posted(says, monkeypatch)[-1][1] == RESULT

    @pytest.mark.parametrize("first", [[], [502, 502]])
    def test_a_job_that_is_not_there_is_believed_after_a_while(
        self, first: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        says = iter(first)
        posts = self.posted(lambda _: next(says, 404), monkeypatch)
        assert 20 <= posts[-1][0] < 40
        says = iter([*first, 404, 404])
        assert self.posted(lambda _: next(says, 200), monkeypatch)[-1][0] < 20

    @pytest.mark.parametrize("status", [400, 413])
    def test_an_error_of_the_worker_is_not_replaced(
        self, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = self.posted(lambda _: status, monkeypatch, {"error": "no"})
        assert {json.dumps(body) for _, body in posts} == {json.dumps({"error": "no"})}
        assert posts[-1][0] == delivery.KEPT_SECONDS

    def test_a_result_is_replaced_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        posts = self.posted(lambda _: 413, monkeypatch)
        assert posts[0] == (0, RESULT)
        assert len({json.dumps(body) for _, body in posts[1:]}) == 1


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {"status": 302, "headers": {"Location": "/elsewhere"}}
    platform = deliver([elsewhere], monkeypatch)
    assert platform.bodies == [RESULT] * 2
    assert set(platform.paths) == {"/job-done/w/job-1"}


def test_a_result_that_nobody_wants_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_SECONDS", 30)
    dropped: list[bool] = []

    def drop(deliveries: Deliveries) -> None:
        dropped.extend([deliveries.drop("job-2"), deliveries.drop("job-1")])

    assert len(deliver([500], monkeypatch, meanwhile=drop).bodies) == 1
    assert dropped == [False, True]


@pytest.mark.parametrize(
    ("job_id", "path"),
    [
        ("../../x", "/job-done/w/..%2F..%2Fx"),
        ("a?b#c&d", "/job-done/w/a%3Fb%23c&d"),
        ("\n", "/job-done/w/%0A"),
        ("\u00e4 b", "/job-done/w/%C3%A4%20b"),
    ],
)
def test_an_id_leads_nowhere_else(job_id: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deliver([], monkeypatch, job_id=job_id).paths == [path]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, b"bytes"])
def test_an_answer_that_is_not_json_becomes_an_error(
    value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    [body] = deliver([], monkeypatch, {"output": value}).bodies
    assert body == {"error": "the worker failed at this job: its answer is not JSON"}


def test_half_a_character_can_be_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deliver([], monkeypatch, {"error": "\ud800"}).bodies == [{"error": "\ud800"}]


def test_off_the_platform_there_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_WEBHOOK_GET_JOB", raising=False)
    assert job_url("job-1") is None
