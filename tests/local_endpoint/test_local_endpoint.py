"""The local endpoint over HTTP: by hand, with real SDK workers, and as a command."""

import asyncio
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import runpod

from local_endpoint import JUNK_JOBS, EndpointError, Fault, LocalEndpoint, Receipt, Rules
from local_endpoint.server import REPOSITORY
from tests import tutorial
from tests.hand_worker import HandWorker

TINY_WORKER = [sys.executable, "tests/tiny_worker.py"]
QUICK: dict[str, Any] = {
    "execution_timeout_min_seconds": 0.1,
    "ttl_min_seconds": 0.1,
    "runsync_wait_min_seconds": 0.1,
    "webhook_delay_seconds": 0.1,
    "ping_interval_seconds": 1,
    "job_lost_after_seconds": 3,
    "poll_seconds": 1.5,
}


def eventually(look: Callable[[], Any], timeout_seconds: float = 30) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def processes_of(endpoint_id: str) -> list[psutil.Process]:
    """The processes that were started as workers of this endpoint, and their children."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUNPOD_ENDPOINT_ID") == endpoint_id:
                found.append(process)
        except psutil.Error:
            continue  # somebody else's, or gone
    return found


def assert_no_process_is_left(endpoint_id: str) -> None:
    """Killed ones may need a moment to die."""
    eventually(lambda: not processes_of(endpoint_id), 2)


# By hand: no worker processes, the tests do what workers do.


@contextmanager
def bare_endpoint(**rules: Any) -> Iterator[LocalEndpoint]:
    with LocalEndpoint(workers=0, rules=Rules(**{**QUICK, "poll_seconds": 0.3, **rules})) as bare:
        yield bare


@pytest.fixture(scope="module")
def bare() -> Iterator[LocalEndpoint]:
    with bare_endpoint(run_max_bytes=1000, runsync_max_bytes=2000) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _no_job_is_left(bare: LocalEndpoint) -> Iterator[None]:
    yield
    bare.faults.clear()
    bare.with_queue(lambda queue: queue.purge())


@pytest.fixture
def hand(bare: LocalEndpoint) -> HandWorker:
    return HandWorker(bare)


@pytest.mark.parametrize("key", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}])
@pytest.mark.parametrize("route", ["health", "status/a", "job-take/w1", "ping/w1"])
def test_without_the_key_nothing_is_answered(
    bare: LocalEndpoint, route: str, key: dict[str, str]
) -> None:
    code, answer = bare.call(route, headers=key)
    assert code == 401
    assert "key" in answer["error"]


@pytest.mark.parametrize("form", ["{}", "Bearer {}"])
def test_the_key_may_be_bare_or_a_bearer_token(bare: LocalEndpoint, form: str) -> None:
    code, _ = bare.call("health", headers={"Authorization": form.format(bare.api_key)})
    assert code == 200


def test_a_job_goes_from_run_to_status(bare: LocalEndpoint, hand: HandWorker) -> None:
    code, queued = bare.call("run", {"input": {"prompt": "a"}})
    assert (code, queued) == (200, {"id": queued["id"], "status": "IN_QUEUE"})
    assert hand.take() == {"id": queued["id"], "input": {"prompt": "a"}}
    assert bare.status(queued["id"])["status"] == "IN_PROGRESS"
    assert hand.done(queued["id"], {"output": {"seed": 1}}) == 200
    answer = bare.status(queued["id"])
    assert bare.call(f"status/{queued['id']}", {}) == (200, answer), "POST is as good as GET"
    assert list(answer) == ["delayTime", "executionTime", "id", "output", "status", "workerId"]
    assert answer["output"] == {"seed": 1}
    assert isinstance(answer["executionTime"], int)


@pytest.mark.parametrize(
    ("method", "route"),
    [("GET", "status"), ("GET", "stream"), ("POST", "cancel"), ("POST", "retry")],
)
def test_an_unknown_job_is_not_found(bare: LocalEndpoint, method: str, route: str) -> None:
    code, answer = bare.call(f"{route}/nobody", method=method)
    assert (code, answer) == (404, {"error": "there is no job nobody"})


def test_an_unknown_endpoint_is_not_found(bare: LocalEndpoint) -> None:
    request = urllib.request.Request(
        f"{bare.url_base}/another/health", headers={"Authorization": bare.api_key}
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    with raised.value as answer:
        assert answer.code == 404


@pytest.mark.parametrize(
    ("body", "reason"),
    [({"prompt": "a"}, '"input"'), ([], '"input"'), ({"input": 1, "policy": {"ttl": 1}}, "ttl")],
)
def test_a_wrong_request_is_refused(bare: LocalEndpoint, body: Any, reason: str) -> None:
    for route in ("run", "runsync"):
        code, answer = bare.call(route, body)
        assert code == 400
        assert reason in answer["error"]


def test_runsync_answers_when_the_job_has_ended(bare: LocalEndpoint, hand: HandWorker) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bare.call, "runsync?wait=30000", {"input": 1})
        job = hand.take()
        assert job["id"].startswith("sync-")
        hand.done(job["id"], {"error": "no"})
        code, ended = answer.result(5)
    assert code == 200
    assert (ended["status"], ended["error"]) == ("FAILED", "no")


def test_runsync_answers_with_the_state_when_the_wait_is_over(bare: LocalEndpoint) -> None:
    code, answer = bare.call("runsync?wait=100", {"input": 1})
    assert (code, answer["status"]) == (200, "IN_QUEUE")


@pytest.mark.parametrize("wait", ["99", "300001", "a", "-1"])
def test_a_wait_outside_the_limits_is_refused(bare: LocalEndpoint, wait: str) -> None:
    code, answer = bare.call(f"runsync?wait={wait}", {"input": 1})
    assert code == 400
    assert answer["error"].startswith("wait: must be")


@pytest.mark.parametrize(("route", "limit"), [("run", 1000), ("runsync?wait=100", 2000)])
def test_requests_over_the_limit_are_refused(bare: LocalEndpoint, route: str, limit: int) -> None:
    frame = len(json.dumps({"input": ""}))
    assert bare.call(route, {"input": "x" * (limit - frame)})[0] == 200
    code, answer = bare.call(route, {"input": "x" * (limit - frame + 1)})
    assert code == 413
    assert str(limit) in answer["error"]


def test_results_over_the_limit_are_answered_with_400(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    job_id = bare.run(1)
    hand.take()
    assert hand.done(job_id, {"output": "x" * 1000}) == 400
    assert bare.record.posts_of(job_id)[0].receipt is Receipt.TOO_LARGE
    answer = bare.status(job_id)
    assert answer["status"] == "COMPLETED"
    assert "output" not in answer


@pytest.mark.parametrize("body", [{"output": float("nan")}, {"output": float("inf")}, ["a"]])
def test_results_that_are_no_json_object_are_refused(
    bare: LocalEndpoint, hand: HandWorker, body: Any
) -> None:
    job_id = bare.run(1)
    hand.take()
    assert hand.done(job_id, body) == 400
    assert bare.status(job_id)["status"] == "IN_PROGRESS"


def test_results_are_kept_for_the_retention_time_only() -> None:
    with bare_endpoint(run_retention_seconds=0.3, runsync_retention_seconds=0.1) as endpoint:
        hand = HandWorker(endpoint)
        job_id = endpoint.run(1)
        hand.take()
        hand.done(job_id, {"output": 1})
        assert endpoint.status(job_id)["output"] == 1
        eventually(lambda: endpoint.call(f"status/{job_id}")[0] == 404, 5)


def test_a_job_past_its_ttl_is_gone_for_everybody(bare: LocalEndpoint, hand: HandWorker) -> None:
    job_id = bare.run(1, policy={"ttl": 300})
    hand.take()
    assert bare.status(job_id)["status"] == "IN_PROGRESS"
    eventually(lambda: bare.call(f"status/{job_id}")[0] == 404, 5)
    assert hand.get("job-stop/hand") == (200, {"jobsToStop": [job_id]})
    assert hand.done(job_id, {"output": 1}) == 404
    assert bare.call("runsync", {"input": 1, "policy": {"ttl": 200}})[0] == 404


def test_questions_for_jobs_are_held_and_answered_as_soon_as_there_is_one(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    start = time.monotonic()
    assert hand.get("job-take/hand?gpu=x&job_in_progress=0") == (204, None)
    assert hand.get("job-stop/hand?gpu=x") == (204, None)
    assert time.monotonic() - start >= 0.6, "both were held for poll_seconds"
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(hand.take)
        time.sleep(0.1)
        job_id = bare.run("now")
        assert answer.result(5)["id"] == job_id
        answers = pool.submit(hand.get, "job-stop/hand?gpu=x")
        time.sleep(0.1)
        bare.call(f"cancel/{job_id}", {})
        assert answers.result(5) == (200, {"jobsToStop": [job_id]})


def test_a_worker_that_is_to_end_is_not_held_and_has_no_reason_to_hurry() -> None:
    with bare_endpoint(poll_seconds=60) as endpoint:
        hand = HandWorker(endpoint)
        endpoint.with_queue(lambda queue: queue.drain("hand"))
        endpoint.run(1)
        start = time.monotonic()
        assert hand.get("job-take/hand?gpu=x&job_in_progress=0") == (204, None)
        assert 0.25 < time.monotonic() - start < 30


def test_a_worker_that_hung_up_gets_no_job(bare: LocalEndpoint, hand: HandWorker) -> None:
    with socket.create_connection(("127.0.0.1", int(bare.url.split(":")[2].split("/")[0]))) as gone:
        lines = "GET /v2/{}/job-take/gone HTTP/1.1\r\nHost: a\r\nAuthorization: {}\r\n\r\n"
        gone.sendall(lines.format(bare.endpoint_id, bare.api_key).encode())
        eventually(lambda: bare.with_queue(lambda queue: queue.has_heard("gone")), 5)
    time.sleep(0.05)
    job_id = bare.run(1)
    assert hand.take()["id"] == job_id


def test_a_batch_is_a_list(bare: LocalEndpoint, hand: HandWorker) -> None:
    ids = [bare.run(i) for i in range(3)]
    route = "job-take-batch/hand?gpu=x&batch_size=2&job_in_progress=1"
    code, jobs = hand.get(route)
    assert code == 200
    assert [job["id"] for job in jobs] == ids[:2]
    assert hand.get(route)[1] == [{"id": ids[2], "input": 2}]
    take = bare.record.takes[-1]
    assert (take.worker_id, take.job_ids, take.asked_count) == ("hand", (ids[2],), 2)
    assert take.job_in_progress


def test_addresses_without_a_question_mark_work(bare: LocalEndpoint, hand: HandWorker) -> None:
    first, second, third = bare.run(1), bare.run(2), bare.run(3)
    assert hand.get("job-take/hand&job_in_progress=0")[1]["id"] == first
    _, jobs = hand.get("job-take-batch/hand&batch_size=2&job_in_progress=1")
    assert [job["id"] for job in jobs] == [second, third]
    assert bare.call(f"job-done/hand/{first}&isStream=false", {"output": 1})[0] == 200
    assert bare.status(first)["workerId"] == "hand"


def test_progress_is_shown_and_late_progress_is_counted_only(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    job_id = bare.run(1)
    hand.take()
    hand.done(job_id, {"status": "IN_PROGRESS", "output": {"step": 1}})
    answer = bare.status(job_id)
    assert (answer["status"], answer["output"]) == ("IN_PROGRESS", {"step": 1})
    hand.done(job_id, {"output": "pictures"})
    assert hand.done(job_id, {"status": "IN_PROGRESS", "output": {"step": 2}}) == 200
    answer = bare.status(job_id)
    assert (answer["status"], answer["output"]) == ("COMPLETED", "pictures")
    [late] = [post for post in bare.record.late_progress if post.job_id == job_id]
    assert late.body["output"] == {"step": 2}
    kinds = [post.kind for post in bare.record.posts_of(job_id)]
    assert kinds == ["progress", "result", "progress"]
    times = [post.at for post in bare.record.posts_of(job_id)]
    assert times == sorted(times)


def test_a_stream_is_drained(bare: LocalEndpoint, hand: HandWorker) -> None:
    job_id = bare.run(1)
    hand.take()
    for chunk in ("a", "b"):
        bare.call(f"job-stream/hand/{job_id}?isStream=false", {"output": chunk})
    expected = {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": "b"}]}
    assert bare.call(f"stream/{job_id}") == (200, expected)
    assert bare.call(f"stream/{job_id}", {})[1]["stream"] == []


def test_retry_purge_and_health_answer_as_documented(bare: LocalEndpoint, hand: HandWorker) -> None:
    job_id = bare.run(1)
    code, answer = bare.call(f"retry/{job_id}", {})
    assert code == 400
    assert "IN_QUEUE" in answer["error"]
    hand.take()
    hand.done(job_id, {"error": "no"})
    assert bare.call(f"retry/{job_id}", {}) == (200, {"id": job_id, "status": "IN_QUEUE"})
    health = bare.call("health")[1]
    assert health["jobs"]["inQueue"] == 1
    assert set(health["workers"]) == {
        *("idle", "initializing", "ready", "running", "throttled", "unhealthy")
    }
    assert bare.call("purge-queue", {}) == (200, {"removed": 1, "status": "completed"})
    assert bare.call(f"status/{job_id}")[0] == 404


def test_an_unhealthy_worker_is_counted() -> None:
    with bare_endpoint() as endpoint:
        HandWorker(endpoint).get("ping/sick?gpu=x&status=unhealthy&check=gpu&reason=none")
        HandWorker(endpoint).get("ping/well?gpu=x&job_id=a,b&runpod_version=1")
        workers = endpoint.call("health")[1]["workers"]
        assert (workers["unhealthy"], workers["idle"]) == (1, 1)
        assert [ping.job_ids for ping in endpoint.record.pings] == [(), ("a", "b")]


class Hook(http.server.ThreadingHTTPServer):
    """A webhook that notes what it is sent and answers with `codes`, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HookHandler)
        self.codes: list[int] = []
        self.received: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class HookHandler(http.server.BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))
        self.send_response(self.server.codes.pop(0) if self.server.codes else 200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("codes", "count"), [([], 1), ([500], 2), ([404, 500], 3), ([500, 500, 500, 500], 3)]
)
def test_a_webhook_is_called_until_it_answers_2xx_at_most_three_times(
    bare: LocalEndpoint, hand: HandWorker, hook: Hook, codes: list[int], count: int
) -> None:
    hook.codes = list(codes)
    job_id = bare.run({"prompt": "a"}, webhook=hook.url)
    assert hand.take()["webhook"] == hook.url
    hand.done(job_id, {"output": {"seed": 1}})
    eventually(lambda: len(hook.received) == count)
    time.sleep(0.3)
    assert len(hook.received) == count
    answer = bare.status(job_id)
    assert hook.received[-1] == {**answer, "input": {"prompt": "a"}, "webhook": hook.url}
    calls = [call.status_code for call in bare.record.webhook_calls if call.job_id == job_id]
    assert calls == ([*codes, 200])[:count]


def test_webhooks_hear_of_failures_and_cancelled_jobs_too(
    bare: LocalEndpoint, hand: HandWorker, hook: Hook
) -> None:
    failed = bare.run(1, webhook=hook.url)
    hand.take()
    hand.done(failed, {"error": "no"})
    cancelled = bare.run(1, webhook=hook.url)
    bare.call(f"cancel/{cancelled}", {})
    eventually(lambda: len(hook.received) == 2)
    statuses = {job["id"]: job["status"] for job in hook.received}
    assert statuses == {failed: "FAILED", cancelled: "CANCELLED"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "no address"])
def test_a_webhook_that_cannot_be_reached_changes_nothing(
    bare: LocalEndpoint, hand: HandWorker, url: str
) -> None:
    job_id = bare.run(1, webhook=url)
    hand.take()
    hand.done(job_id, {"output": 1})
    calls = bare.record.webhook_calls
    eventually(lambda: [call.job_id for call in list(calls)].count(job_id) == 3)
    assert bare.status(job_id)["status"] == "COMPLETED"


def test_a_route_can_be_made_to_answer_with_an_error(bare: LocalEndpoint) -> None:
    bare.faults.answer("health", 503, times=2)
    assert [bare.call("health")[0] for _ in range(3)] == [503, 503, 200]
    codes = [r.status_code for r in bare.record.exchanges if r.route == "health"][-3:]
    assert codes == [503, 503, 200]


def test_a_connection_can_be_dropped_before_or_after_the_work(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    job_id = bare.run(1)
    hand.take()
    bare.faults.drop("job-done")
    with pytest.raises(OSError, match=r"reset|closed"):
        hand.done(job_id, {"output": 1})
    assert bare.status(job_id)["status"] == "IN_PROGRESS"
    bare.faults.drop_answer("job-done")
    with pytest.raises(OSError, match=r"reset|closed"):
        hand.done(job_id, {"output": 1})
    assert bare.status(job_id)["status"] == "COMPLETED"
    dropped = [r for r in bare.record.exchanges if r.route == "job-done"][-2:]
    assert [request.status_code for request in dropped] == [None, None]


def test_a_route_can_be_made_slow(bare: LocalEndpoint) -> None:
    bare.faults.delay("health", 0.4)
    start = time.monotonic()
    bare.call("health")
    slow = time.monotonic() - start
    bare.call("health")
    assert slow >= 0.4
    assert time.monotonic() - start - slow < 0.4


def test_a_fault_of_progress_spares_the_result_and_the_other_way_round(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    job_id = bare.run(1)
    hand.take()
    bare.faults.answer("progress", 500)
    bare.faults.answer("job-done", 502)
    progress = {"status": "IN_PROGRESS", "output": 1}
    assert [hand.done(job_id, progress) for _ in range(2)] == [500, 200]
    assert [hand.done(job_id, {"output": 1}) for _ in range(2)] == [502, 200]


def test_a_job_can_be_delivered_twice(bare: LocalEndpoint, hand: HandWorker) -> None:
    bare.faults.duplicate()
    bare.run(1)
    assert hand.take() == HandWorker(bare, "other").take()
    assert hand.get("job-take/hand")[0] == 204


def test_an_answer_can_have_headers_and_a_body(bare: LocalEndpoint) -> None:
    bare.faults.answer("health", 429, headers={"Retry-After": "7", "Content-Type": "text/html"})
    request = urllib.request.Request(f"{bare.url}/health", headers={"Authorization": bare.api_key})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    with raised.value as answer:
        assert answer.code == 429
        assert answer.headers["Retry-After"] == "7"
        assert answer.headers["Content-Type"] == "text/html"
    bare.faults.answer("job-done", 413, body='{"error": "large"}')
    assert HandWorker(bare).done("any", {"output": 1}) == 413
    assert bare.call("health")[0] == 200


@pytest.mark.parametrize("name", JUNK_JOBS)
def test_a_question_for_jobs_can_be_answered_with_junk(bare: LocalEndpoint, name: str) -> None:
    """And takes no job from the queue."""
    job_id = bare.run(1)
    bare.faults.add("job-take", JUNK_JOBS[name])
    request = urllib.request.Request(
        f"{bare.url}/job-take/hand", headers={"Authorization": bare.api_key}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
        assert answer.read().decode() == JUNK_JOBS[name].body
        expected = "text/html" if name == "another content type" else "application/json"
        assert answer.headers.get_content_type() == expected
    assert HandWorker(bare).take()["id"] == job_id


def faults_met(endpoint: LocalEndpoint, *routes: str, count: int) -> list[str | None]:
    """What the next requests of these routes meet."""
    before = len(endpoint.record.exchanges)
    for _ in range(count):
        for route in routes:
            with suppress(OSError, ValueError):
                endpoint.call(route)
    return [exchange.fault for exchange in list(endpoint.record.exchanges)[before:]]


def test_a_share_of_the_requests_can_fail_at_random_and_again_in_the_same_way(
    bare: LocalEndpoint,
) -> None:
    faults = [Fault("answer", 503), Fault("drop")]
    bare.faults.at_random("health", faults=faults, share=0.25, seed=5)
    met = faults_met(bare, "health", count=100)
    assert len(met) == 100
    assert 10 < met.count("answer") + met.count("drop") < 40
    assert {"answer", "drop"} < set(met)
    bare.faults.at_random("health", faults=faults, share=0.25, seed=5)
    assert faults_met(bare, "health", count=100) == met
    bare.faults.at_random("health", faults=faults, share=0.25, seed=6)
    assert faults_met(bare, "health", count=100) != met
    bare.faults.clear()
    assert set(faults_met(bare, "health", count=50)) == {None}


def test_random_faults_spare_other_routes_and_come_after_those_asked_for(
    bare: LocalEndpoint,
) -> None:
    bare.faults.at_random("health", faults=[Fault("answer", 503)], share=1)
    bare.faults.answer("health", 418)
    assert [bare.call("health")[0] for _ in range(2)] == [418, 503]
    assert bare.call("status/a")[0] == 404
    with pytest.raises(ValueError, match="no route 'helth'"):
        bare.faults.at_random("helth")


def test_a_random_duplicate_is_of_the_job_handed_out_next(
    bare: LocalEndpoint, hand: HandWorker
) -> None:
    bare.faults.at_random("job-take", faults=[Fault("duplicate")], share=1)
    bare.run(1)
    job = hand.take()
    bare.faults.clear()
    assert hand.take() == job


def test_the_record_counts_the_results_of_each_job(bare: LocalEndpoint, hand: HandWorker) -> None:
    job_ids = [bare.run(i) for i in range(3)]
    once, twice, never = [hand.take()["id"] for _ in job_ids]
    hand.done(never, {"status": "IN_PROGRESS", "output": 1})
    hand.done(once, {"output": 1})
    bare.faults.drop_answer("job-done")
    with pytest.raises(OSError, match=r"reset|closed"):
        hand.done(twice, {"output": 1})
    hand.done(twice, {"output": 1})

    def counts(receipt: Receipt | None) -> list[int]:
        return [bare.record.result_counts(receipt)[job_id] for job_id in (once, twice, never)]

    accepted = bare.record.result_counts()
    assert [accepted[job_id] for job_id in (once, twice, never)] == [1, 1, 0]
    assert counts(Receipt.LATE) == [0, 1, 0]
    assert counts(None) == [1, 2, 0]


def test_nothing_lost_and_nothing_doubled_is_one_comparison() -> None:
    with bare_endpoint() as endpoint:
        hand = HandWorker(endpoint)
        job_ids = [endpoint.run(i) for i in range(2)]
        hand.done(hand.take()["id"], {"output": 1})
        assert endpoint.record.result_counts() != dict.fromkeys(job_ids, 1)
        hand.done(hand.take()["id"], {"output": 1})
        assert endpoint.record.result_counts() == dict.fromkeys(job_ids, 1)


@pytest.mark.parametrize("code", [200, 400, 404])
def test_a_second_result_changes_nothing_whatever_it_is_answered(code: int) -> None:
    with bare_endpoint(late_result_status_code=code) as endpoint:
        hand = HandWorker(endpoint)
        job_id = endpoint.run(1)
        hand.take()
        assert hand.done(job_id, {"output": "first"}) == 200
        assert hand.done(job_id, {"output": "second"}) == code
        assert hand.done(job_id, {"status": "IN_PROGRESS", "output": 1}) == 200
        assert endpoint.status(job_id)["output"] == "first"
        assert [post.receipt for post in endpoint.record.posts_of(job_id, "result")] == [
            Receipt.ACCEPTED,
            Receipt.LATE,
        ]


@pytest.mark.parametrize(
    "job_id", ["../../x", "a&b=c", "a b", "%2F", "\u00fc\u732b", "a\nb", "?", "#", "..", "a%26b"]
)
def test_a_job_is_found_by_any_id_that_is_quoted(
    bare: LocalEndpoint, hand: HandWorker, job_id: str
) -> None:
    bare.run(1, job_id=job_id)
    assert hand.take()["id"] == job_id
    quoted = urllib.parse.quote(job_id, safe="").replace(".", "%2E")
    bare.call(f"job-stream/hand/{quoted}?isStream=false", {"output": "chunk"})
    assert bare.call(f"stream/{quoted}")[1]["stream"] == [{"output": "chunk"}]
    assert bare.call(f"job-done/hand/{quoted}&isStream=false", {"output": 1})[0] == 200
    assert bare.record.posts_of(job_id, "result")[-1].receipt is Receipt.ACCEPTED
    assert bare.status(job_id)["output"] == 1


def test_a_taken_port_is_told(bare: LocalEndpoint) -> None:
    port = int(bare.url.split(":")[2].split("/")[0])
    with pytest.raises(EndpointError, match=f"port {port} is taken"), LocalEndpoint(port=port):
        pass


# With two workers on the real SDK.


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    rules = Rules(**QUICK, run_max_bytes=100_000)
    with LocalEndpoint(worker_command=TINY_WORKER, workers=2, rules=rules) as running:
        yield running


@pytest.fixture
def client(endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch) -> runpod.Endpoint:
    monkeypatch.setattr(runpod, "endpoint_url_base", endpoint.url_base)
    monkeypatch.setattr(runpod, "api_key", endpoint.api_key)
    return runpod.Endpoint(endpoint.endpoint_id)


def test_the_official_client_runs_jobs(client: runpod.Endpoint) -> None:
    job = client.run({"a": 1})
    assert job.output(timeout=20) == {"input": {"a": 1}, "job_keys": ["id", "input"]}
    assert job.status() == "COMPLETED"
    assert client.run_sync({"input": {"b": 2}})["input"] == {"b": 2}
    assert client.run_sync({"return": {"error": "no"}}) is None
    health = client.health()
    assert health["jobs"]["completed"] >= 2
    assert health["workers"]["initializing"] == 0
    assert client.purge_queue() == {"removed": 0, "status": "completed"}


def test_the_official_client_cancels_a_running_job_and_the_handler_is_told(
    endpoint: LocalEndpoint, client: runpod.Endpoint
) -> None:
    job = client.run({"sleep_seconds": 60})
    worker_id = endpoint.wait(job.job_id, "IN_PROGRESS")["workerId"]
    [worker] = [worker for worker in endpoint.workers if worker.id == worker_id]
    # A stop that comes before the SDK has started the handler is lost.
    eventually(lambda: f"started {job.job_id}" in worker.log())
    assert client.run_sync({"a": 1}), "the other worker is free"
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    assert job.status() == "CANCELLED"
    eventually(lambda: f"told to stop {job.job_id}" in worker.log())
    assert endpoint.record.posts_of(job.job_id) == []


def test_the_official_asyncio_client_runs_jobs(client: runpod.Endpoint) -> None:
    async def output() -> Any:
        async with aiohttp.ClientSession() as session:
            asynchronous = runpod.AsyncioEndpoint(client.endpoint_id, session)
            job = await asynchronous.run({"a": 1})
            assert (await asynchronous.health())["jobs"]["inProgress"] >= 0
            return await job.output(timeout=20)

    assert asyncio.run(output())["input"] == {"a": 1}


def test_a_wrong_key_is_what_the_official_client_expects(
    endpoint: LocalEndpoint, client: runpod.Endpoint
) -> None:
    stranger = runpod.Endpoint(endpoint.endpoint_id, api_key="wrong")
    assert stranger.rp_client.endpoint_url_base == client.rp_client.endpoint_url_base
    with pytest.raises(RuntimeError, match="401"):
        stranger.health()


@tutorial.needs_curl
def test_the_commands_of_the_tutorial_work_with_only_the_host_replaced(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    shell = tutorial.shell(endpoint.url_base, tmp_path)
    queued = json.loads(shell(tutorial.RUN))
    assert queued == {"id": queued["id"], "status": "IN_QUEUE"}

    def is_completed() -> bool:
        answer = json.loads(shell(tutorial.STATUS.replace("JOB_ID", queued["id"])))
        return bool(answer["status"] == "COMPLETED")

    eventually(is_completed)
    shell(tutorial.SAVE.replace("JOB_ID", queued["id"]))
    saved = json.loads((tmp_path / "output.json").read_text())
    assert saved["output"]["input"]["prompt"].startswith("A cute fluffy white dog")
    assert saved.keys() == {*("delayTime", "executionTime", "id", "output", "status", "workerId")}


def test_progress_of_a_worker_shows_in_the_status(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"progress": ["half"], "progress_gap_seconds": 1})
    eventually(lambda: endpoint.status(job_id).get("output") == "half")
    assert endpoint.status(job_id)["status"] == "IN_PROGRESS"
    assert endpoint.wait(job_id)["output"]["input"]["progress"] == ["half"]


def test_late_progress_of_a_worker_is_counted(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"late_progress": "too late"})
    assert endpoint.wait(job_id)["status"] == "COMPLETED"
    eventually(lambda: job_id in [post.job_id for post in endpoint.record.late_progress])
    assert endpoint.status(job_id)["status"] == "COMPLETED"


def test_what_handlers_return_becomes_what_the_platform_makes_of_it(
    endpoint: LocalEndpoint,
) -> None:
    listed = endpoint.run({"return": {"error": ["a", "b"]}})
    raised = endpoint.run({"raise": "no"})
    too_large = endpoint.run({"text_bytes": 100_000})
    assert endpoint.wait(listed)["status"] == "COMPLETED", "the error is lost, as on the platform"
    assert "error" not in endpoint.status(listed)
    answer = endpoint.wait(raised)
    assert answer["status"] == "FAILED"
    assert json.loads(answer["error"])["error_message"] == "no"
    answer = endpoint.wait(too_large)
    assert answer["status"] == "COMPLETED"
    assert "output" not in answer


def test_a_job_past_its_execution_timeout_is_stopped_in_the_worker(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"sleep_seconds": 60}, policy={"executionTimeout": 1000})
    answer = endpoint.wait(job_id)
    assert answer["status"] == "TIMED_OUT"
    assert 1000 <= answer["executionTime"] < 2000
    log_path = endpoint.log_dir / f"{answer['workerId']}.log"
    eventually(lambda: f"told to stop {job_id}" in log_path.read_text())


def test_results_get_through_500s_but_a_dropped_one_means_another_run(
    endpoint: LocalEndpoint,
) -> None:
    endpoint.faults.answer("job-done", 500)
    repeated = endpoint.run({"a": 1})
    assert "retries" not in endpoint.wait(repeated), "the SDK posts again after a 500"
    endpoint.faults.drop("job-done")
    lost = endpoint.run({"a": 2})
    answer = endpoint.wait(lost)
    assert (answer["status"], answer["retries"]) == ("COMPLETED", 1), "not so after a lost one"


def test_workers_get_over_random_faults_without_losing_or_doubling_a_job(
    endpoint: LocalEndpoint,
) -> None:
    passing = [Fault("answer", 500), Fault("delay", delay_seconds=0.2)]
    before = len(endpoint.record.exchanges)
    endpoint.faults.at_random("job-take", "job-done", faults=passing, share=0.3, seed=1)
    endpoint.faults.duplicate(times=2)
    job_ids = [endpoint.run({"a": i}) for i in range(12)]
    for job_id in job_ids:
        assert endpoint.wait(job_id)["status"] == "COMPLETED"
    endpoint.faults.clear()
    met = [one.fault for one in list(endpoint.record.exchanges)[before:] if one.fault]
    assert len(met) > 1
    counts = endpoint.record.result_counts()
    assert {job_id: counts[job_id] for job_id in job_ids} == dict.fromkeys(job_ids, 1)


def test_of_a_job_delivered_twice_the_first_result_counts(endpoint: LocalEndpoint) -> None:
    endpoint.faults.duplicate()
    job_id = endpoint.run({"sleep_seconds": 1})
    assert endpoint.wait(job_id)["status"] == "COMPLETED"
    posts = eventually(
        lambda: found if len(found := endpoint.record.posts_of(job_id)) == 2 else None
    )
    assert [post.receipt for post in posts] == [Receipt.ACCEPTED, Receipt.LATE]


def test_a_frozen_worker_loses_its_job_to_the_other_one(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"sleep_seconds": 1.5})
    frozen_id = endpoint.wait(job_id, "IN_PROGRESS")["workerId"]
    [frozen] = [worker for worker in endpoint.workers if worker.id == frozen_id]
    os.killpg(frozen.pid, signal.SIGSTOP)
    try:
        answer = endpoint.wait(job_id)
    finally:
        os.killpg(frozen.pid, signal.SIGCONT)
    assert (answer["status"], answer["retries"]) == ("COMPLETED", 1)
    assert answer["workerId"] != frozen_id
    eventually(lambda: len(endpoint.record.posts_of(job_id, "result")) == 2)
    late = endpoint.record.posts_of(job_id, "result")[1]
    assert (late.worker_id, late.receipt) == (frozen_id, Receipt.LATE)


def test_a_killed_workers_job_is_done_by_another_and_the_worker_is_replaced(
    endpoint: LocalEndpoint,
) -> None:
    job_id = endpoint.run({"sleep_seconds": 1})
    killed_id = endpoint.wait(job_id, "IN_PROGRESS")["workerId"]
    [killed] = [worker for worker in endpoint.workers if worker.id == killed_id]
    children = psutil.Process(killed.pid).children(recursive=True)
    assert children, "the one that pings"
    os.kill(killed.pid, signal.SIGKILL)
    answer = endpoint.wait(job_id)
    assert (answer["status"], answer["retries"]) == ("COMPLETED", 1)
    assert answer["workerId"] != killed_id
    eventually(lambda: not any(child.is_running() for child in children))
    eventually(lambda: len(endpoint.workers) == 2)
    endpoint.wait_until_ready()
    assert killed_id not in [worker.id for worker in endpoint.workers]
    assert killed.exit_status == -signal.SIGKILL


def test_a_job_without_input_and_one_that_ends_every_worker_fail_after_one_retry(
    endpoint: LocalEndpoint,
) -> None:
    jobs = [endpoint.run({}), endpoint.run({"exit_status": 3})]
    for job_id in jobs:
        answer = endpoint.wait(job_id)
        assert answer["status"] == "FAILED"
        assert answer["error"] == "job timed out after 1 retries"
        assert answer["retries"] == 1
    endpoint.wait_until_ready()


def test_a_worker_that_asks_to_be_recycled_is_replaced(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"return": {"a": 1, "refresh_worker": True}})
    answer = endpoint.wait(job_id)
    assert answer["output"] == {"a": 1}
    eventually(lambda: answer["workerId"] not in [worker.id for worker in endpoint.workers])
    eventually(lambda: len(endpoint.workers) == 2)
    endpoint.wait_until_ready()
    assert endpoint.wait(endpoint.run({"b": 2}))["workerId"] != answer["workerId"]


def test_a_worker_that_is_terminated_finishes_its_job_and_is_not_replaced() -> None:
    with LocalEndpoint(worker_command=TINY_WORKER, rules=Rules(**QUICK)) as endpoint:
        [worker] = endpoint.workers
        job_id = endpoint.run({"sleep_seconds": 1})
        eventually(lambda: f"started {job_id}" in worker.log())
        worker.terminate()
        assert endpoint.wait(job_id)["status"] == "COMPLETED"
        eventually(lambda: worker.exit_status is not None)
        assert worker.exit_status == 0
        time.sleep(0.3)
        assert endpoint.workers == []


def test_streams_and_batches_of_a_concurrent_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalEndpoint(
        worker_command=TINY_WORKER,
        worker_query="",  # the addresses have no "?"
        environment={"TINY_WORKER_STREAMS": "1", "TINY_WORKER_CONCURRENCY": "3"},
        rules=Rules(**QUICK),
    ) as endpoint:
        monkeypatch.setattr(runpod, "endpoint_url_base", endpoint.url_base)
        client = runpod.Endpoint(endpoint.endpoint_id, api_key=endpoint.api_key)
        jobs = [client.run({"chunks": ["a", i], "gap_seconds": 0.2}) for i in range(3)]
        with ThreadPoolExecutor() as pool:
            streamed = list(pool.map(lambda job: list(job.stream()), jobs))
        assert streamed == [["a", i] for i in range(3)]
        assert jobs[0].output() == []
        assert max(take.asked_count for take in endpoint.record.takes) > 1
        assert "Failed" not in endpoint.workers[0].log()


def test_when_the_block_is_left_the_job_at_hand_is_finished_and_nothing_stays() -> None:
    endpoint_id = f"test-{uuid.uuid4()}"
    rules = Rules(poll_seconds=60)  # those that wait for jobs are not waited for
    with LocalEndpoint(
        worker_command=TINY_WORKER, endpoint_id=endpoint_id, rules=rules, stop_grace_seconds=20
    ) as endpoint:
        [worker] = endpoint.workers
        job_id = endpoint.run({"sleep_seconds": 1})
        eventually(lambda: f"started {job_id}" in worker.log())
        log_dir = endpoint.log_dir
        record = endpoint.record
    assert worker.exit_status == 0, "it ended by itself"
    assert [post.receipt for post in record.posts_of(job_id)] == [Receipt.ACCEPTED]
    assert_no_process_is_left(endpoint_id)
    assert not log_dir.exists()


# As a command.


@contextmanager
def command(endpoint_id: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "local_endpoint", "--endpoint-id", endpoint_id, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop_and_leaves_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    endpoint_id = f"test-{uuid.uuid4()}"
    with command(endpoint_id, "--port", "0", "--workers", "2", "--", *TINY_WORKER) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ready: 2"):
                break
        [curl] = [line for line in lines if line.startswith("curl ")]
        done = subprocess.run(
            ["sh", "-c", curl], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        answer = json.loads(done.stdout)
        assert answer["status"] == "COMPLETED"
        assert answer["output"]["input"] == {"prompt": "a red circle on a blue background"}
        assert any("for development and tests" in line for line in lines)
        started = processes_of(endpoint_id)
        assert len(started) == 4, "two workers and the processes that ping for them"
        process.send_signal(number)
        rest, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert "Stopping the workers." in rest
        assert "Traceback" not in rest
    assert_no_process_is_left(endpoint_id)


def test_the_command_ends_at_once_when_it_is_told_twice() -> None:
    endpoint_id = f"test-{uuid.uuid4()}"
    with command(endpoint_id, "--port", "0", "--", *TINY_WORKER) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        url = next(line for line in lines if line.startswith("http")).split()[0]
        assert any(line.startswith("Ready: 1") for line in lines)
        request = urllib.request.Request(
            f"{url}/run",
            b'{"input": {"sleep_seconds": 60}}',
            {"Authorization": "YOUR_API_KEY"},
        )
        urllib.request.urlopen(request).close()
        assert any("started" in line for line in lines)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert any("Stopping" in line for line in lines)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert time.monotonic() - start < 4.5, "less than workers get to finish"
        assert process.returncode == 0
    assert_no_process_is_left(endpoint_id)


def test_workers_end_with_a_command_that_was_killed() -> None:
    endpoint_id = f"test-{uuid.uuid4()}"
    with command(endpoint_id, "--port", "0", "--", *TINY_WORKER) as process:
        assert process.stdout is not None
        assert any(line.startswith("Ready: 1") for line in process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3, "a worker, the process that pings for it, and its guard"
        process.kill()
        eventually(lambda: not any(child.is_running() for child in children), 5)
    assert_no_process_is_left(endpoint_id)


def failed_command(*arguments: str) -> str:
    """The only line that a command prints that must fail at once."""
    endpoint_id = f"test-{uuid.uuid4()}"
    with command(endpoint_id, *arguments) as process:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
    assert_no_process_is_left(endpoint_id)
    [line] = errors.splitlines()
    return str(line)


def test_a_taken_port_is_told_in_one_line(bare: LocalEndpoint) -> None:
    port = bare.url.split(":")[2].split("/")[0]
    assert failed_command("--port", port) == (
        f"The endpoint has stopped: port {port} is taken; choose another one"
    )


def test_a_worker_that_dies_at_start_is_told_in_one_line_with_its_reason() -> None:
    script = "print('loading'); import sys; sys.exit('The worker cannot start. MODEL_DIR: gone')"
    assert failed_command("--port", "0", "--workers", "2", "--", sys.executable, "-c", script) == (
        "The endpoint has stopped: worker-1 ended before it was ready, with exit status 1; "
        "its last line: The worker cannot start. MODEL_DIR: gone"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "http"], "PORT: must be an integer from 0 to 65535; got 'http'"),
        (["--workers", "0"], "WORKERS: must be an integer from 1 to 64; got '0'"),
        (["--port", "0", "--", "/no/program"], "the worker cannot be started: "),
    ],
)
def test_wrong_settings_are_told_in_one_line(arguments: list[str], reason: str) -> None:
    assert failed_command(*arguments).startswith(f"The endpoint has stopped: {reason}")


def test_a_worker_that_dies_at_start_is_an_error_in_tests_too() -> None:
    with (
        pytest.raises(EndpointError, match=r"worker-1 ended .* exit status 0; .*nothing"),
        LocalEndpoint(worker_command=[sys.executable, "-c", ""]),
    ):
        pass


def test_workers_get_the_environment_of_runpod_and_a_home_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RUNPOD_REALTIME_PORT", "8000"), ("SERVE_HTTP", "true")):
        monkeypatch.setenv(name, value)  # would make it a server
    monkeypatch.setenv("RUNPOD_AI_API_KEY", "of this machine")
    monkeypatch.setenv("SETTING", "passed on")
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    with (
        pytest.raises(EndpointError) as raised,
        LocalEndpoint(
            worker_command=[sys.executable, "-c", script],
            endpoint_id="e1",
            environment={"MORE": "added"},
        ),
    ):
        pass
    worker = json.loads(str(raised.value).partition("its last line: ")[2])
    url = worker["RUNPOD_WEBHOOK_GET_JOB"].partition("/job-take/")[0]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v2/e1", url)
    expected = {
        "MORE": "added",
        "RUNPOD_AI_API_KEY": "YOUR_API_KEY",
        "RUNPOD_ENDPOINT_ID": "e1",
        "RUNPOD_PING_INTERVAL": "10000",
        "RUNPOD_POD_ID": "worker-1",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=local",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
        "SETTING": "passed on",
    }
    assert {name: worker.get(name) for name in expected} == expected
    assert not {"RUNPOD_REALTIME_PORT", "SERVE_HTTP"} & set(worker)
    assert worker["HOME"] != os.environ.get("HOME")


def test_workers_that_are_not_ready_in_time_are_an_error_and_are_ended() -> None:
    endpoint_id = f"test-{uuid.uuid4()}"
    endpoint = LocalEndpoint(
        worker_command=["sleep", "60"],
        endpoint_id=endpoint_id,
        start_timeout_seconds=0.5,
        rules=Rules(**QUICK),
    )
    with pytest.raises(EndpointError, match="not all workers were ready after 0.5 s"), endpoint:
        pass
    assert_no_process_is_left(endpoint_id)


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    venv = Path(sys.executable).parent.parent
    return subprocess.run(
        ["make", "endpoint", f"VENV={venv}", f"--old-file={venv}/.run", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_endpoint_starts_the_worker_and_tells_why_it_cannot() -> None:
    done = make("PORT=0", DTYPE="int4")
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("The endpoint has stopped: worker-1 ended before it was ready")
    assert "The worker cannot start." in line
    assert "DTYPE" in line


def test_make_endpoint_has_a_port_and_one_worker_by_default() -> None:
    assert '--port "8000" --workers "1"' in make("--dry-run").stdout
    assert '--port "8123" --workers "2"' in make("--dry-run", "PORT=8123", "WORKERS=2").stdout
    assert "PORT: must be an integer" in make("PORT=").stderr


def test_the_worker_does_not_import_the_endpoint() -> None:
    sources = [REPOSITORY / "handler.py", *(REPOSITORY / "sdxl_worker").rglob("*.py")]
    assert len(sources) > 20
    assert not [path for path in sources if re.search("local_endpoint", path.read_text())]
