"""The worker on the platform: real `python handler.py` processes against the local endpoint."""

import base64
import functools
import hashlib
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import runpod
from PIL import Image

from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Rules
from local_endpoint.workers import EndpointError
from tests import tutorial
from tests.support import REPOSITORY, decoded, largest_difference, picture

QUICK = {
    "prompt": "a red circle on a blue background",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
}
# Runs for many seconds on any machine that runs these tests, unless it is stopped.
LONG = {"prompt": "a star", "seed": 1, "num_inference_steps": 150, "num_images": 8}
RULES = Rules(
    execution_timeout_min_seconds=0.5,
    ping_interval_seconds=1,
    job_lost_after_seconds=5,
    poll_seconds=5,
)


def endpoint_with(workers: int = 1, **environment: str) -> LocalEndpoint:
    return LocalEndpoint(
        workers=workers,
        rules=RULES,
        environment={"RUNPOD_LOG_LEVEL": "", **environment},
    )


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    """One worker that takes one job at a time, as deployed by default."""
    with endpoint_with() as running:
        yield running


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def steps_seen(endpoint: LocalEndpoint, job_id: str) -> bool:
    """Whether the job has sent an update, and so is in the middle of a picture."""
    return bool(endpoint.record.posts_of(job_id, "progress"))


def log_lines(endpoint: LocalEndpoint, job_id: str) -> list[dict[str, Any]]:
    """What the workers logged of a job: JSON lines, as on the platform."""
    lines = []
    for path in sorted(endpoint.log_dir.glob("*.log")):
        for text in path.read_text().splitlines():
            if text.startswith("{"):
                lines.append(json.loads(text))
    return [line for line in lines if line.get("requestId") == job_id]


@tutorial.needs_curl
def test_the_tutorial_works_command_for_command(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    shell = tutorial.shell(endpoint.url_base, tmp_path)
    queued = json.loads(shell(tutorial.RUN))
    assert queued["status"] == "IN_QUEUE"
    status = tutorial.STATUS.replace("JOB_ID", queued["id"])
    wait_for(lambda: json.loads(shell(status))["status"] == "COMPLETED")
    shell(tutorial.SAVE.replace("JOB_ID", queued["id"]))
    saved = json.loads((tmp_path / "output.json").read_text())
    assert set(saved) == {"delayTime", "executionTime", "id", "output", "status", "workerId"}
    script = REPOSITORY / "tests" / "decode_image.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "generated_image.png").size == (128, 128)


@tutorial.needs_curl
@pytest.mark.parametrize("language", ["python", "sh"])
def test_the_guide_s_way_to_redraw_a_picture_of_one_s_own_works(
    language: str, endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    if language == "sh" and shutil.which("jq") is None:
        pytest.skip("the command needs jq")
    guide = (REPOSITORY / "docs" / "inpainting.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if "https://api.runpod.ai/v2" in block]
    block = block.replace("https://api.runpod.ai/v2", endpoint.url_base)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    command = [sys.executable, "-c", block] if language == "python" else ["sh", "-c", block]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "redrawn.png").size == (64, 64)


class TestOfficialClient:
    @pytest.fixture
    def client(self, endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch) -> runpod.Endpoint:
        monkeypatch.setattr(runpod, "endpoint_url_base", endpoint.url_base)
        monkeypatch.setattr(runpod, "api_key", endpoint.api_key)
        return runpod.Endpoint(endpoint.endpoint_id)

    def test_run_sync_returns_the_output(self, client: runpod.Endpoint) -> None:
        output = client.run_sync({**QUICK, "seed": 9}, timeout=60)
        assert list(output) == ["images", "image_url", "seed"]
        assert decoded(output["image_url"]).size == (64, 64)

    def test_run_status_and_output(self, client: runpod.Endpoint) -> None:
        job = client.run({"input": {**QUICK, "seed": 10}})
        assert job.output(timeout=60)["seed"] == 10
        assert job.status() == "COMPLETED"

    def test_stream_gives_the_output(self, client: runpod.Endpoint) -> None:
        job = client.run(QUICK)
        list(job.stream())
        assert job.status() == "COMPLETED"

    def test_cancel(self, client: runpod.Endpoint) -> None:
        job = client.run(LONG)
        job.cancel()
        assert job.status() == "CANCELLED"

    def test_health(self, client: runpod.Endpoint) -> None:
        assert client.health()["workers"]["ready"] == 1


class TestStopping:
    def test_a_job_cancelled_in_the_queue_is_never_run(self, endpoint: LocalEndpoint) -> None:
        running, queued = endpoint.run(LONG), endpoint.run(QUICK)
        wait_for(lambda: steps_seen(endpoint, running))
        endpoint.call(f"cancel/{queued}", {})
        endpoint.call(f"cancel/{running}", {})
        after = endpoint.run(QUICK)
        assert endpoint.wait(after)["status"] == "COMPLETED"
        assert endpoint.status(queued)["status"] == "CANCELLED"
        assert log_lines(endpoint, queued) == []

    def test_a_job_cancelled_as_it_is_handed_out_is_not_run(self, endpoint: LocalEndpoint) -> None:
        """The SDK forgets a stop for a job that it holds but has not begun."""
        job_ids = [endpoint.run({**LONG, "num_images": 2}) for _ in range(3)]
        for job_id in job_ids:
            endpoint.wait(job_id, "IN_PROGRESS")
            endpoint.call(f"cancel/{job_id}", {})
        assert endpoint.wait(endpoint.run(QUICK))["status"] == "COMPLETED"
        for job_id in job_ids:
            assert endpoint.record.posts_of(job_id, "result") == []

    @pytest.mark.parametrize("way", ["cancel", "execution timeout"])
    def test_a_job_stopped_in_the_middle_frees_the_gpu_within_a_step(
        self, way: str, endpoint: LocalEndpoint
    ) -> None:
        expected = picture(**QUICK, seed=3)
        policy = {"executionTimeout": 2000} if way == "execution timeout" else {}
        stopped = endpoint.run(LONG, policy=policy)
        wait_for(lambda: steps_seen(endpoint, stopped))
        if way == "cancel":
            endpoint.call(f"cancel/{stopped}", {})
        status = endpoint.wait(stopped)["status"]
        assert status == ("CANCELLED" if way == "cancel" else "TIMED_OUT")
        wait_for(lambda: any("phase" in line for line in log_lines(endpoint, stopped)))
        told_at = next(stop.at for stop in endpoint.record.stops if stopped in stop.job_ids)
        # A step takes some tenths of a second here; eight pictures would take ten and more.
        assert time.monotonic() - told_at < 2.5, "time from the stop signal to a free GPU"

        after = endpoint.wait(endpoint.run({**QUICK, "seed": 3}))
        assert decoded(after["output"]["image_url"]).tobytes() == expected.tobytes()
        assert endpoint.record.posts_of(stopped, "result") == [], "nothing is posted for it"

    def test_a_stopped_request_gives_its_picture_when_asked_again(
        self, endpoint: LocalEndpoint
    ) -> None:
        job_input = {**QUICK, "num_inference_steps": 150, "height": 128, "width": 128, "seed": 6}
        first = endpoint.run(job_input)
        wait_for(lambda: steps_seen(endpoint, first))
        endpoint.call(f"cancel/{first}", {})
        again = endpoint.wait(endpoint.run(job_input))
        assert decoded(again["output"]["image_url"]).tobytes() == picture(**job_input).tobytes()


class TestProgress:
    def test_updates_come_in_order_at_most_one_a_second_and_none_after_the_end(
        self, endpoint: LocalEndpoint
    ) -> None:
        job_id = endpoint.run({**LONG, "num_images": 1, "preview": True})
        seen = []
        while endpoint.status(job_id)["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            output = endpoint.status(job_id).get("output") or {}
            if "progress" in output:
                seen.append(output["progress"])
            time.sleep(0.2)
        assert seen, "the status shows the progress"
        assert set(seen[0]) == {"stage", "step", "steps", "percent"}
        assert [one["percent"] for one in seen] == sorted(one["percent"] for one in seen)

        posts = endpoint.record.posts_of(job_id, "progress")
        assert all(later.at - one.at > 0.9 for one, later in itertools.pairwise(posts))
        time.sleep(1.5)
        assert endpoint.record.posts_of(job_id)[-1].kind == "result", "nothing after the result"

        uri = posts[0].body["output"]["preview"]
        jpeg = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        assert len(jpeg) <= 20_000
        assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
        assert "preview" not in posts[0].body["output"]["progress"]

    @pytest.mark.parametrize("fault", ["slow", "failing", "dropped"])
    def test_a_bad_progress_route_harms_no_job(self, fault: str, endpoint: LocalEndpoint) -> None:
        match fault:
            case "slow":
                endpoint.faults.delay("progress", 1.2, times=20)
            case "failing":
                endpoint.faults.answer("progress", 500, times=20)
            case "dropped":
                endpoint.faults.drop("progress", times=20)
        try:
            job_id = endpoint.run({**LONG, "num_images": 1})
            assert endpoint.wait(job_id)["status"] == "COMPLETED"
        finally:
            endpoint.faults.clear()
        time.sleep(1.5)
        assert [post for post in endpoint.record.late_progress if post.job_id == job_id] == []


def test_malformed_inputs_between_good_ones_fail_alone(endpoint: LocalEndpoint) -> None:
    good = {**QUICK, "seed": 2}
    bad = [{"prompt": "a", "height": 65}, "text", {"prompt": 3}, {"image_url": "http://127.0.0.1/"}]
    job_ids = [
        endpoint.run(one) for pair in zip([good] * len(bad), bad, strict=True) for one in pair
    ]
    answers = [endpoint.wait(job_id) for job_id in job_ids]
    assert [answer["status"] for answer in answers] == ["COMPLETED", "FAILED"] * len(bad)
    assert all(isinstance(answer["error"], str) for answer in answers[1::2])
    assert "height: must be an integer" in answers[1]["error"]
    assert len({answer["output"]["image_url"] for answer in answers[0::2]}) == 1
    assert len(endpoint.workers) == 1, "no worker was replaced"


def test_a_check_answers_in_under_2_kb(endpoint: LocalEndpoint) -> None:
    answer = endpoint.wait(endpoint.run({"check": True}))
    assert answer["status"] == "COMPLETED"
    assert len(json.dumps(answer["output"])) < 2000
    assert answer["output"]["model"] == "shapes"


def test_a_result_that_must_be_too_large_fails_before_it_is_made(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run({"prompt": "a", "height": 2048, "width": 2048, "num_images": 8})
    answer = endpoint.wait(job_id)
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("the result would be at least ")
    assert "num_images" in answer["error"]
    assert answer["executionTime"] < 2000


def test_each_phase_is_logged_with_the_job_s_id(endpoint: LocalEndpoint) -> None:
    job_id = endpoint.run(QUICK)
    endpoint.wait(job_id)
    lines = [line for line in log_lines(endpoint, job_id) if "phase" in line]
    assert [line["phase"] for line in lines] == ["generate", "encode"]
    assert all(line["ms"] >= 0 and line["peak_memory_mb"] > 0 for line in lines)
    text = endpoint.workers[0].log()
    assert str(QUICK["prompt"]) not in text, "prompts stay out of the log"
    assert "base64" not in text
    for line in (
        "imported the libraries in",
        "loaded the base in",
        "drew a first picture in",
        "loaded the refiner in",
    ):
        assert line in text


def test_the_sdk_s_own_checks_run_while_the_models_load() -> None:
    """All of them before ours, which waits for the models and so comes last."""
    environment = {
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "",
        "RUNPOD_SKIP_GPU_CHECK": "",
        "RUNPOD_LOG_LEVEL": "DEBUG",
    }
    command = [sys.executable, "-m", "benchmarks.offline_worker", "handler.py"]
    with LocalEndpoint(worker_command=command, rules=RULES, environment=environment) as endpoint:
        text = endpoint.workers[0].log()
    checks = re.findall(r"Executing fitness check: (\w+)", text)
    assert checks[0] == "come_after_the_sdk_checks"
    assert checks[-1] == "models_draw"
    assert {"_memory_check", "_disk_check", "_network_check"} <= set(checks[1:-1])
    checked = text.index("Executing fitness check: models_draw")
    assert checked < text.index("loaded the refiner in"), "they did not wait for the models"


SLOW_CHECK = """
import asyncio, logging, sys
import runpod
sys.argv[1:] = []
told = []
logging.getLogger("sdxl_worker.serving.start").addFilter(lambda record: told.append(record) or True)

async def slow():
    while not any(record.getMessage().startswith("loaded the base") for record in told):
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)  # long enough for a picture
    print("slow check passed", flush=True)

# The SDK runs it as one of its own: after those that are there before it begins, before ours.
def as_one_of_the_sdk_s():
    runpod.serverless.register_fitness_check(slow)

runpod.serverless.register_fitness_check(as_one_of_the_sdk_s)
import handler
handler.main()
"""


def test_no_cuda_graph_is_recorded_while_the_sdk_s_checks_run() -> None:
    """They wait for all work of the GPU, which fails while a graph is recorded. COMPILE stands for
    graphs here too, where there is no GPU."""
    with LocalEndpoint(
        worker_command=[sys.executable, "-c", SLOW_CHECK],
        rules=RULES,
        environment={"COMPILE": "graphs", "RUNPOD_LOG_LEVEL": "INFO"},
    ) as endpoint:
        text = endpoint.workers[0].log()
    assert text.index("slow check passed") < text.index("drew a first picture in")


def test_the_webhook_gets_the_finished_job(endpoint: LocalEndpoint) -> None:
    received: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/done"
        job_id = endpoint.run({**QUICK, "seed": 8}, webhook=url)
        wait_for(lambda: bool(received))
        server.shutdown()
    [body] = received
    assert (body["id"], body["status"], body["output"]["seed"]) == (job_id, "COMPLETED", 8)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_a_worker_delivers_its_job_and_ends_by_itself(sent: signal.Signals) -> None:
    with endpoint_with() as endpoint:
        [worker] = endpoint.workers
        job_id = endpoint.run({**LONG, "num_images": 2})
        wait_for(lambda: steps_seen(endpoint, job_id))
        worker.is_ending = True
        subprocess.run(["kill", f"-{sent.value}", str(worker.pid)], check=True)
        answer = endpoint.wait(job_id)
        assert answer["status"] == "COMPLETED"
        assert len(answer["output"]["images"]) == 2
        wait_for(lambda: worker.exit_status is not None)
        assert worker.exit_status == 0


def test_asked_to_end_a_worker_delivers_all_that_it_draws_side_by_side() -> None:
    with endpoint_with(BATCH_JOBS="3") as endpoint:
        [worker] = endpoint.workers
        job_ids = [endpoint.run({**QUICK, "num_inference_steps": 300}) for _ in range(3)]
        for job_id in job_ids:
            wait_for(functools.partial(steps_seen, endpoint, job_id))
        worker.is_ending = True
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(worker.pid)], check=True)
        answers = [endpoint.wait(job_id) for job_id in job_ids]
        assert [answer["status"] for answer in answers] == ["COMPLETED"] * 3
        wait_for(lambda: worker.exit_status is not None)
        assert worker.exit_status == 0


class TestTwoWorkers:
    @pytest.fixture(scope="class")
    @staticmethod
    def endpoint() -> Iterator[LocalEndpoint]:
        with endpoint_with(workers=2, WORKER_CONCURRENCY="2") as running:
            yield running

    def test_fifty_jobs_lose_nothing_double_nothing_and_match_their_seeds(
        self, endpoint: LocalEndpoint
    ) -> None:
        expected = {
            seed: hashlib.sha256(picture(**QUICK, seed=seed).tobytes()).hexdigest()
            for seed in range(50)
        }
        endpoint.faults.duplicate(times=2)
        endpoint.faults.answer("job-done", 500, times=2)
        endpoint.faults.answer("job-take", 500, times=2)
        job_ids = {endpoint.run({**QUICK, "seed": seed}): seed for seed in expected}
        workers = set()
        for job_id, seed in job_ids.items():
            answer = endpoint.wait(job_id, timeout_seconds=120)
            assert answer["status"] == "COMPLETED", answer
            assert answer["output"]["seed"] == seed
            pixels = decoded(answer["output"]["image_url"]).tobytes()
            assert hashlib.sha256(pixels).hexdigest() == expected[seed]
            workers.add(answer["workerId"])
        assert len(workers) == 2
        assert any(take.asked_count == 2 for take in endpoint.record.takes), "two jobs at once"
        assert len(job_ids) == 50

    def test_jobs_of_a_killed_worker_complete_elsewhere(self, endpoint: LocalEndpoint) -> None:
        job_id = endpoint.run({**LONG, "num_images": 2})
        wait_for(lambda: steps_seen(endpoint, job_id))
        first = next(post.worker_id for post in endpoint.record.posts_of(job_id, "progress"))
        next(worker for worker in endpoint.workers if worker.id == first).kill()
        answer = endpoint.wait(job_id, timeout_seconds=120)
        assert answer["status"] == "COMPLETED"
        assert answer["workerId"] != first
        assert answer["retries"] == 1


def test_jobs_are_drawn_side_by_side_and_one_that_is_cancelled_leaves_the_others() -> None:
    job = {**QUICK, "num_inference_steps": 300}
    with endpoint_with(BATCH_JOBS="3") as endpoint:
        job_ids = [endpoint.run({**job, "seed": seed}) for seed in range(3)]
        for job_id in job_ids:
            wait_for(functools.partial(steps_seen, endpoint, job_id))
        statuses = [endpoint.status(job_id)["status"] for job_id in job_ids]
        assert statuses == ["IN_PROGRESS"] * 3
        endpoint.call(f"cancel/{job_ids[1]}", {})
        answers = [endpoint.wait(job_id) for job_id in job_ids]
    assert [answer["status"] for answer in answers] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    for seed in (0, 2):
        alone = picture(**job, seed=seed)
        assert largest_difference(decoded(answers[seed]["output"]["image_url"]), alone) <= 2


def test_a_worker_without_its_models_ends_as_unhealthy() -> None:
    endpoint = endpoint_with(MODEL_DIR="/nowhere")
    with pytest.raises(EndpointError, match="ended before it was ready"), endpoint:
        pytest.fail("the endpoint is ready")
    [reason] = [ping.unhealthy_because for ping in endpoint.record.pings]
    assert "MODEL_DIR: /nowhere must be a folder" in str(reason)
