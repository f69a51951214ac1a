"""The loop over the platform's jobs: what a bad platform may say, and what must not be lost.

Each test runs the SDK's own loop, as the worker does, against a platform that answers as it says.
"""

import asyncio
import inspect
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import pytest
from aiohttp import web
from runpod.serverless import worker
from runpod.serverless.modules import rp_job, rp_scale
from runpod.serverless.modules.worker_state import JobsProgress

from sdxl_worker.serving import ending, scaler
from sdxl_worker.serving.scaler import WorkerScaler, take_the_place_of_the_sdks_scaler
from sdxl_worker.serving.slot import begin_next_job

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
JOB = {"id": "job-1", "input": {"prompt": "a"}}


async def echo(job: dict[str, Any]) -> dict[str, Any]:
    return {"got": job["input"]}


class Platform:
    """Gives what it is told, one thing for each time it is asked, and then nothing."""

    def __init__(self, *given: Any, stops: tuple[str, ...] = ()) -> None:
        self.given = list(given)
        self.stops = list(stops)
        self.asked_at: list[float] = []
        self.results: dict[str, list[Any]] = {}
        self.refuse_results = 0
        self.result_seconds = 0.0
        self.stop_seconds = 0.1
        self.nothing_seconds = 0.1
        self.on_ask: Callable[[], None] = lambda: None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if "/job-done/" in path:
            job_id = path.partition("&")[0].rpartition("/job-done/w/")[2]
            await asyncio.sleep(self.result_seconds)
            if self.refuse_results:
                self.refuse_results -= 1
                return web.Response(status=500)
            self.results.setdefault(job_id, []).append(json.loads(await request.read()))
            return web.Response()
        if "/job-stop/" in path:
            if self.stops:
                return web.json_response({"jobsToStop": [self.stops.pop(0)]})
            await asyncio.sleep(self.stop_seconds)
            return web.Response(status=204)
        self.asked_at.append(time.monotonic())
        self.on_ask()
        if not self.given:
            await asyncio.sleep(self.nothing_seconds)
            return web.Response(status=204)
        given = self.given.pop(0)
        if isinstance(given, int):
            return web.Response(status=given)
        text = given if isinstance(given, str) else json.dumps(given)
        return web.Response(text=text, content_type="application/json")


def serve(
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    *,
    handler: Handler = echo,
    concurrency: int = 1,
    until: Callable[[WorkerScaler], bool],
    seconds: float = 20,
) -> None:
    """Run a worker until a condition holds, and end it as a signal does."""
    JobsProgress().clear()
    monkeypatch.setattr(ending, "_ends_at", None)  # put back afterwards

    async def run() -> None:
        runner = web.ServerRunner(web.Server(platform.answer), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v2/e"
        monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", f"{url}/job-take/w?gpu=x")
        monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", f"{url}/job-done/w/$ID?gpu=x")
        monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{url}/job-take/w?gpu=x")
        config = {"handler": handler, "concurrency_modifier": lambda _: concurrency}
        working = WorkerScaler(config)
        running = asyncio.create_task(working.run())
        try:
            async with asyncio.timeout(seconds):
                while not until(working):
                    assert not running.done(), "the worker has ended"
                    await asyncio.sleep(0.01)
            working.kill_worker()
            await asyncio.wait_for(running, 10)
        finally:
            running.cancel()
            await runner.cleanup()

    asyncio.run(run())


def test_a_place_that_becomes_free_is_filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []

    async def handler(_: dict[str, Any]) -> dict[str, Any]:
        begun.append(time.monotonic())
        await asyncio.sleep(0.2)
        return {}

    platform = Platform(*({"id": f"job-{i}", "input": {}} for i in range(4)))
    serve(platform, monkeypatch, handler=handler, until=lambda _: len(platform.results) == 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert min(gaps) >= 0.2, "one at a time"
    assert max(gaps) < 0.8, "the SDK looks once a second"


def test_a_job_that_was_taken_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the SDK's queue, too, where it is for up to a tenth of a second."""
    counted: list[int] = []

    async def handler(_: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.3)
        return {}

    def until(scaler: WorkerScaler) -> bool:
        counted.append(scaler.current_occupancy())
        return len(platform.results) == 3

    platform = Platform([{"id": f"job-{i}", "input": {}} for i in range(3)])
    serve(platform, monkeypatch, handler=handler, concurrency=8, until=until)
    assert max(counted) == 3


def test_the_sdk_is_the_one_that_the_scaler_is_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version may lose no jobs, or lose them elsewhere: read its source, then mend this."""
    assert version("runpod") == "1.12.0"
    sdk = rp_scale.JobScaler
    monkeypatch.setattr(rp_scale, "JobScaler", sdk)
    take_the_place_of_the_sdks_scaler()
    assert rp_scale.JobScaler is WorkerScaler
    assert "rp_scale.JobScaler(config)" in inspect.getsource(worker.run_worker)
    for name, method in vars(WorkerScaler).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert inspect.signature(method).parameters.keys() == (
                inspect.signature(getattr(sdk, name)).parameters.keys()
            )
    assert "await asyncio.gather(*tasks)" in inspect.getsource(sdk.run), "what ours does"
    source = inspect.getsource(sdk)
    for used in ("self.jobs_fetcher(session, jobs_needed)", "self.jobs_handler(session, "):
        assert used in source


def test_free_memory_goes_back_after_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(scaler, "give_back_host_memory", lambda: given_back.append(True))
    serve(Platform(JOB), monkeypatch, until=lambda _: bool(given_back))
    assert given_back == [True]


def test_a_job_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(JOB)
    serve(platform, monkeypatch, until=lambda _: bool(platform.results))
    assert platform.results == {"job-1": [{"output": {"got": {"prompt": "a"}}}]}


@pytest.mark.parametrize(
    ("answer", "posted"),
    [
        ({"error": "no"}, {"error": "no"}),
        ({"error": "no", "refresh_worker": True}, {"error": "no", "stopPod": True}),
        ({"images": [], "seed": 1}, {"output": {"images": [], "seed": 1}}),
        ({}, {"output": {}}),
    ],
)
def test_an_answer_is_posted_as_the_platform_takes_it(
    answer: dict[str, Any], posted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(_: dict[str, Any]) -> dict[str, Any]:
        return dict(answer)

    platform = Platform(JOB)
    serve(platform, monkeypatch, handler=handler, until=lambda _: bool(platform.results))
    assert platform.results == {"job-1": [posted]}


JUNK: list[Any] = [
    None,
    3,
    "text",
    [],
    {},
    [None, 3, "text", [], {}],
    {"input": {}},
    *(
        {"id": junk, "input": {}}
        for junk in (None, "", True, 1.5, [1], {"a": 1}, "x" * 1000, "\ud800")
    ),
    [{"id": {}, "input": {}}, {"id": [], "input": {}}],
    "{ no JSON",
    "[" * 100_000,
    500,
    502,
    404,
    400,
]


def test_a_worker_takes_jobs_after_junk(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    for i, junk in enumerate(JUNK):
        text = junk if isinstance(junk, str | int) and junk != 3 else json.dumps(junk)
        given += [text, {**JOB, "id": f"after {junk!r:.30} ({i})"}]
    platform = Platform(*given)
    answered = {job["id"] for job in given[1::2]}
    serve(
        platform,
        monkeypatch,
        concurrency=64,
        until=lambda _: len(platform.results) == len(answered),
    )
    assert platform.results.keys() == answered


ODD_JOBS: list[tuple[dict[str, Any], str, Any]] = [
    ({"id": 7, "input": {}}, "7", {}),
    ({"id": "\n", "input": {}}, "\n", {}),
    ({"id": "../../x", "input": {}}, "../../x", {}),
    ({"id": "a?b#c,d %41", "input": {}}, "a?b#c,d %41", {}),
    ({"id": "no-input"}, "no-input", {}),
    ({"id": "odd", "input": None}, "odd", None),
    ({"id": "more", "input": {}, "self": 1, "webhook": "x", "id ": 2}, "more", {}),
    ({"id": "class", "input": {}, "__class__": "x", "__dict__": "x"}, "class", {}),
    ({"id": "dots..", "input": {}}, "dots..", {}),
]


def test_an_odd_job_is_answered_under_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(*(job for job, _, _ in ODD_JOBS))
    serve(
        platform,
        monkeypatch,
        concurrency=64,
        until=lambda _: len(platform.results) == len(ODD_JOBS),
    )
    assert platform.results == {job_id: [{"output": {"got": got}}] for _, job_id, got in ODD_JOBS}


@pytest.mark.parametrize("in_list", [False, True])
def test_a_job_whose_json_cannot_be_read_is_answered(
    in_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = "[" * 5000 + "]" * 5000
    deep = f'{{"input": {{"id": "not me", "a": {levels}}}, "id": "deep \\"1\\""}}'
    platform = Platform(f"[{deep}, {deep.replace('1', '2')}]" if in_list else deep, JOB)
    wanted = ['deep "1"', 'deep "2"'] if in_list else ['deep "1"']
    serve(platform, monkeypatch, until=lambda _: len(platform.results) == len(wanted) + 1)
    assert sorted(platform.results) == [*wanted, "job-1"]
    [body] = platform.results[wanted[0]]
    assert body["error"].startswith("the job cannot be read: ")


def test_an_id_that_cannot_be_read_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[{"id": "a\nb", "input": no}, {"id": "\\x", "input": 1}, {"id": "good", "input": 1}]'
    platform = Platform(text)
    serve(platform, monkeypatch, until=lambda _: len(platform.results) == 2)
    assert sorted(platform.results) == ["a\nb", "good"]


def test_a_number_of_any_length_does_not_lose_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        return {"seeds": [str(seed) for seed in job["input"]["seeds"]]}

    digits = "9" * 5000
    platform = Platform(f'{{"id": "long", "input": {{"seeds": [{digits}, -{digits}]}}}}')
    serve(platform, monkeypatch, handler=handler, until=lambda _: bool(platform.results))
    assert platform.results == {"long": [{"output": {"seeds": ["inf", "-inf"]}}]}


@pytest.mark.parametrize("trouble", [500, "{", 400, 204])
def test_a_platform_that_fails_or_answers_at_once_is_asked_less_and_less(
    trouble: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(*[trouble] * 1000)
    began = time.monotonic()
    serve(platform, monkeypatch, until=lambda _: time.monotonic() > began + 2)
    assert 3 <= len(platform.asked_at) < 10


def test_after_trouble_it_is_asked_at_once_again(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(500, 500, 500, 500, 500, JOB, 500, {**JOB, "id": "job-2"})
    serve(platform, monkeypatch, concurrency=5, until=lambda _: len(platform.results) == 2)
    assert platform.asked_at[5] - platform.asked_at[4] > 1
    assert platform.asked_at[7] - platform.asked_at[6] < 0.5


def test_a_job_that_comes_with_the_last_poll_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK takes it and drops it."""
    platform = Platform()
    workers: list[WorkerScaler] = []

    def third_ask() -> None:
        if len(platform.asked_at) == 3:
            workers[0].kill_worker()
            platform.given = [JOB]

    def until(working: WorkerScaler) -> bool:
        workers.append(working)
        return not working.is_alive()

    platform.on_ask = third_ask
    serve(platform, monkeypatch, until=until)
    assert platform.results == {"job-1": [{"output": {"got": {"prompt": "a"}}}]}


def test_a_job_that_runs_when_the_worker_is_told_to_end_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        begun.append(job["id"])
        await asyncio.sleep(2)
        return {}

    for refused, connecting_seconds in [(2, 0.0), (0, 0.3)]:
        begun.clear()
        platform = Platform(JOB)
        platform.refuse_results = refused
        platform.result_seconds = connecting_seconds
        serve(platform, monkeypatch, handler=handler, until=lambda _: bool(begun))
        assert platform.results == {"job-1": [{"output": {}}]}


def test_while_a_result_waits_the_next_job_goes_on_and_the_pings_name_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named: list[str] = []

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        named.append(str(JobsProgress().get_job_list()))
        platform.refuse_results = 3 if job["id"] == "first" else 0
        return {}

    platform = Platform({"id": "first", "input": {}}, {"id": "second", "input": {}})
    monkeypatch.setattr("sdxl_worker.serving.delivery.FIRST_PAUSE_SECONDS", 2)
    serve(platform, monkeypatch, handler=handler, until=lambda _: bool(platform.results))
    assert list(platform.results) == ["second", "first"], "the end of the worker waits for it"
    assert sorted(named[1].split(",")) == ["first", "second"]
    assert JobsProgress().get_job_count() == 0


class TestUploading:
    """What a job does once it left its slot."""

    def test_the_next_job_goes_on_and_the_pings_name_both(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        named: dict[str, set[str]] = {}

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            named[job["id"]] = set(str(JobsProgress().get_job_list()).split(","))
            if job["id"] == "first":
                begin_next_job()
                while "second" not in named:
                    await asyncio.sleep(0.01)
            return {"of": job["id"]}

        platform = Platform({"id": "first", "input": {}}, {"id": "second", "input": {}})
        serve(platform, monkeypatch, handler=handler, until=lambda _: len(platform.results) == 2)
        assert named["second"] == {"first", "second"}
        assert platform.results == {
            name: [{"output": {"of": name}}] for name in ("first", "second")
        }
        assert JobsProgress().get_job_count() == 0

    def test_without_leaving_it_the_next_job_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        running: list[str] = []

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            running.append(job["id"])
            assert running == [job["id"]]
            await asyncio.sleep(0.5)
            running.clear()
            return {}

        platform = Platform({"id": "first", "input": {}}, {"id": "second", "input": {}})
        serve(platform, monkeypatch, handler=handler, until=lambda _: len(platform.results) == 2)
        assert set(platform.results) == {"first", "second"}
        assert platform.results["second"] == [{"output": {}}]

    def test_the_worker_ends_when_it_has_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begun: list[str] = []

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            begin_next_job()
            begun.append(job["id"])
            await asyncio.sleep(1.5)
            return {}

        platform = Platform(JOB)
        serve(platform, monkeypatch, handler=handler, until=lambda _: bool(begun))
        assert platform.results == {"job-1": [{"output": {}}]}

    def test_a_stop_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended: list[str] = []

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            begin_next_job()
            await asyncio.sleep(0.3)  # the slot is free by now
            platform.stops = [job["id"]]
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                ended.append(job["id"])
                raise
            return {}

        platform = Platform(JOB)
        serve(platform, monkeypatch, handler=handler, until=lambda _: bool(ended))
        assert platform.results == {}
        assert JobsProgress().get_job_count() == 0

    def test_few_do_it_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or a storage that hangs would fill the memory with pictures."""
        monkeypatch.setattr(scaler, "MAX_WAITING_RESULTS", 2)
        begun: list[str] = []
        storage = asyncio.Event()

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            begin_next_job()
            begun.append(job["id"])
            await storage.wait()
            return {}

        platform = Platform(*({"id": f"job-{i}", "input": {}} for i in range(9)))
        began = time.monotonic()

        def until(_: WorkerScaler) -> bool:
            if time.monotonic() > began + 4 and not storage.is_set():
                assert len(begun) == 3, "two may wait, and the next one has to"
                storage.set()
            return storage.is_set()

        serve(platform, monkeypatch, handler=handler, until=until)
        assert len(platform.results) == len(begun), "those that were taken are delivered"


def test_a_platform_that_takes_no_results_gets_no_more_jobs_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdxl_worker.serving.delivery.FIRST_PAUSE_SECONDS", 6)
    monkeypatch.setattr(scaler, "MAX_WAITING_RESULTS", 1)
    platform = Platform(*({"id": f"job-{i}", "input": {}} for i in range(9)))
    platform.refuse_results = 2
    began = time.monotonic()
    serve(platform, monkeypatch, until=lambda _: time.monotonic() > began + 5)
    taken = 9 - len(platform.given)
    assert taken == 2, "one result may wait, and the next one has to"
    assert len(platform.results) == taken, "those that were taken are delivered"


def test_a_job_that_is_here_already_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting, running, or with a result that waits: its one answer will do."""
    begun: list[str] = []

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        begun.append(job["id"])
        await asyncio.sleep(1.5)
        return {}

    again = {**JOB, "input": {}}
    platform = Platform([JOB, again], [again], [again], {**JOB, "id": "job-2"})
    platform.refuse_results = 1
    serve(
        platform,
        monkeypatch,
        handler=handler,
        concurrency=4,
        until=lambda _: len(platform.results) == 2,
    )
    assert sorted(begun) == ["job-1", "job-2"]
    assert [len(results) for results in platform.results.values()] == [1, 1]


def test_a_worker_that_cannot_go_on_takes_no_more_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(_: dict[str, Any]) -> dict[str, Any]:
        return {"error": "broken", "refresh_worker": True}

    platform = Platform(*({"id": f"job-{i}", "input": {}} for i in range(5)))
    platform.refuse_results = 2
    serve(platform, monkeypatch, handler=handler, until=lambda working: not working.is_alive())
    assert platform.results == {"job-0": [{"error": "broken", "stopPod": True}]}


def test_an_open_question_for_stops_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(JOB)
    platform.stop_seconds = 30
    began = time.monotonic()
    serve(platform, monkeypatch, until=lambda _: bool(platform.results))
    assert time.monotonic() - began < 10


class TestStops:
    def test_a_job_handed_out_anew_while_it_stops_is_run(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[str] = []

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            begun.append(job["id"])
            if len(begun) > 1:
                return {"again": True}
            platform.stops = ["job-1"]
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                platform.given = [JOB]
                await asyncio.sleep(1)
                raise
            return {}

        platform = Platform(JOB)
        serve(
            platform,
            monkeypatch,
            handler=handler,
            concurrency=2,
            until=lambda _: bool(platform.results),
        )
        assert platform.results == {"job-1": [{"output": {"again": True}}]}

    def test_a_running_job_is_stopped_and_not_answered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended: list[str] = []

        async def handler(job: dict[str, Any]) -> dict[str, Any]:
            platform.stops = [job["id"]]
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                ended.append(job["id"])
                raise
            return {}

        platform = Platform(JOB)
        serve(platform, monkeypatch, handler=handler, until=lambda _: bool(ended))
        assert platform.results == {}

    def test_a_job_stopped_before_it_began_does_not_begin_but_sent_again_it_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        platform = Platform()

        def until(working: WorkerScaler) -> bool:
            if not platform.asked_at:
                return False
            if not platform.stops and not platform.given and not working._stopped_at:
                if len(platform.asked_at) < 3:
                    platform.stops = ["job-1"]
                return bool(platform.results)
            if working._stopped_at and not platform.given:
                platform.given = [JOB, JOB]
            return False

        serve(platform, monkeypatch, until=until)
        assert len(platform.results["job-1"]) == 1

    def test_an_old_stop_does_not_hold_for_a_job_that_is_sent_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scaler, "STOP_KEPT_SECONDS", 0.0)
        platform = Platform(stops=("job-1",))

        def until(working: WorkerScaler) -> bool:
            if working._stopped_at and not platform.given:
                platform.given = [JOB]
            return bool(platform.results)

        serve(platform, monkeypatch, until=until)

    def test_a_result_that_nobody_wants_any_more_is_not_posted_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sdxl_worker.serving.delivery.FIRST_PAUSE_SECONDS", 5)
        platform = Platform(JOB)
        platform.refuse_results = 1
        began = time.monotonic()

        def until(working: WorkerScaler) -> bool:
            if platform.refuse_results == 0 and not platform.stops and len(platform.asked_at) < 9:
                platform.stops = ["job-1"]
            return platform.refuse_results == 0 and not working._deliveries.is_delivering("job-1")

        serve(platform, monkeypatch, until=until)
        assert platform.results == {}
        assert time.monotonic() - began < 4


def test_a_worker_that_ends_hurries_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hurried: list[bool] = []
    monkeypatch.setattr(scaler, "hurry", lambda: hurried.append(True))
    platform = Platform(JOB)
    serve(platform, monkeypatch, until=lambda _: bool(platform.results))
    assert hurried == [True]
