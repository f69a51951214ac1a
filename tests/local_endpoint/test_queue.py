"""The local endpoint's queue: the life of a job, on a clock that the tests move."""

from typing import Any

import pytest

from local_endpoint.faults import Faults
from local_endpoint.queue import Job, JobQueue, Receipt, RequestRefused, Rules, Status

RULES = Rules(
    execution_timeout_seconds=100,
    ttl_seconds=1000,
    run_retention_seconds=50,
    runsync_retention_seconds=5,
    job_lost_after_seconds=30,
    run_max_bytes=1000,
    runsync_max_bytes=2000,
    stream_chunk_max_bytes=100,
)


class World:
    """A queue, its clock, and the jobs that have ended."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.seconds = 1000.0
        self.ended: list[Job] = []
        self.change_count = 0
        self.queue = JobQueue(
            rules, clock=lambda: self.seconds, changed=self._count, ended=self.ended.append
        )

    def _count(self) -> None:
        self.change_count += 1

    def submit(self, job_input: Any = "a", *, is_sync: bool = False, **more: Any) -> Job:
        return self.queue.submit({"input": job_input, **more}, is_sync=is_sync)

    def taken(self, worker_id: str = "w1", **more: Any) -> Job:
        """A new job that this worker has taken."""
        job = self.submit(**more)
        assert self.queue.take(worker_id) == [job]
        return job

    def finish(self, job: Job, body: Any = None, worker_id: str = "w1", size: int = 10) -> Receipt:
        body = {"output": "done"} if body is None else body
        return self.queue.finish(worker_id, job.id, body, size)

    def wait(self, seconds: float, *, pinged_by: str | None = None) -> None:
        """Let time pass, second by second; a worker pings with all jobs, if one is named."""
        for _ in range(int(seconds)):
            self.seconds += 1
            if pinged_by:
                self.queue.ping(pinged_by, [job.id for job in self.queue.jobs])
            self.queue.tick()


@pytest.fixture
def world() -> World:
    return World()


# What clients see.


def test_a_job_is_queued_taken_and_completed_with_its_times(world: World) -> None:
    job = world.submit({"prompt": "a"})
    assert job.for_client() == {"id": job.id, "status": "IN_QUEUE"}
    world.seconds += 1.5
    assert world.queue.take("w1") == [job]
    assert job.for_client() == {
        "delayTime": 1500,
        "id": job.id,
        "input": {"prompt": "a"},
        "status": "IN_PROGRESS",
        "workerId": "w1",
    }
    world.seconds += 2
    assert world.finish(job, {"output": {"images": []}}) is Receipt.ACCEPTED
    assert job.for_client() == {
        "delayTime": 1500,
        "executionTime": 2000,
        "id": job.id,
        "output": {"images": []},
        "status": "COMPLETED",
        "workerId": "w1",
    }
    assert list(job.for_client()) == sorted(job.for_client())
    assert world.ended == [job]


def test_the_oldest_job_is_handed_out_first_and_a_batch_is_no_larger_than_asked(
    world: World,
) -> None:
    first, second, third = (world.submit(i) for i in range(3))
    assert world.queue.take("w1", 2) == [first, second]
    assert world.queue.take("w2", 2) == [third]
    assert world.queue.take("w2", 2) == []


def test_a_worker_gets_the_input_and_what_was_sent_along(world: World) -> None:
    more: dict[str, Any] = {
        "webhook": "http://127.0.0.1/",
        "s3Config": {"bucketName": "b"},
        "policy": {"ttl": 20000},
    }
    job = world.submit({"prompt": "a"}, **more, other="not passed on")
    assert job.for_worker() == {"id": job.id, "input": {"prompt": "a"}, **more}


@pytest.mark.parametrize("job_input", ["text", ["a"], None, {"a": 1}, 0])
def test_any_input_is_passed_on(world: World, job_input: Any) -> None:
    assert world.submit(job_input).for_worker()["input"] == job_input


def test_an_empty_input_is_left_out_on_the_way_to_the_worker(world: World) -> None:
    job = world.submit({})
    assert job.for_worker() == {"id": job.id}


@pytest.mark.parametrize("request_body", [{}, {"prompt": "a"}, [], "input", None])
def test_a_request_without_input_is_refused(world: World, request_body: Any) -> None:
    with pytest.raises(RequestRefused, match='"input"'):
        world.queue.submit(request_body, is_sync=False)
    assert world.queue.jobs == []


def test_ids_tell_run_from_runsync(world: World) -> None:
    assert world.submit().id.endswith("-u1")
    sync_id = world.submit(is_sync=True).id
    assert sync_id.startswith("sync-")
    assert sync_id.endswith("-e1")


def test_the_webhook_gets_the_whole_job(world: World) -> None:
    job = world.taken(webhook="http://127.0.0.1/hook")
    world.finish(job)
    assert job.for_webhook() == {
        **job.for_client(),
        "input": "a",
        "webhook": "http://127.0.0.1/hook",
    }


# Results.


@pytest.mark.parametrize(
    ("body", "status", "kept"),
    [
        ({"output": {"a": 1}}, "COMPLETED", {"output": {"a": 1}}),
        ({"output": None}, "COMPLETED", {"output": None}),
        ({}, "COMPLETED", {}),
        ({"error": "no"}, "FAILED", {"error": "no"}),
        ({"output": {"a": 1}, "error": "no"}, "FAILED", {"output": {"a": 1}, "error": "no"}),
        ({"output": "a", "stopPod": True}, "COMPLETED", {"output": "a"}),
        # Only a string is an error to the platform.
        ({"error": ["a", "b"]}, "COMPLETED", {}),
        ({"error": {"a": 1}, "output": {"b": 2}}, "COMPLETED", {"output": {"b": 2}}),
        ({"error": ""}, "COMPLETED", {}),
    ],
)
def test_what_a_result_makes_of_the_job(
    world: World, body: dict[str, Any], status: str, kept: dict[str, Any]
) -> None:
    job = world.taken()
    assert world.finish(job, body) is Receipt.ACCEPTED
    answer = job.for_client()
    assert answer["status"] == status
    assert {name: answer[name] for name in ("output", "error") if name in answer} == kept


@pytest.mark.parametrize(("is_sync", "limit"), [(False, 1000), (True, 2000)])
def test_a_result_over_the_limit_is_refused_and_lost(
    world: World, is_sync: bool, limit: int
) -> None:
    fits, too_large = world.taken(is_sync=is_sync), world.taken(is_sync=is_sync)
    assert world.finish(fits, size=limit) is Receipt.ACCEPTED
    assert world.finish(too_large, size=limit + 1) is Receipt.TOO_LARGE
    assert too_large.status is Status.COMPLETED
    assert "output" not in too_large.for_client()


def test_only_the_first_result_counts(world: World) -> None:
    job = world.taken()
    world.finish(job, {"output": 1})
    assert world.finish(job, {"error": "second"}) is Receipt.LATE
    assert job.for_client()["output"] == 1
    assert world.ended == [job]


def test_results_of_unknown_jobs_and_of_other_workers_are_ignored(world: World) -> None:
    job = world.taken("w1")
    assert world.finish(job, worker_id="w2") is Receipt.FOREIGN
    assert world.queue.finish("w1", "nobody", {}, 1) is Receipt.UNKNOWN
    assert job.status is Status.IN_PROGRESS


def test_progress_is_the_output_of_a_running_job(world: World) -> None:
    job = world.taken()
    assert world.queue.note_progress("w1", job.id, {"step": 3}) is Receipt.ACCEPTED
    assert job.for_client()["output"] == {"step": 3}
    assert job.for_client()["status"] == "IN_PROGRESS"


def test_late_progress_is_told_and_changes_nothing(world: World) -> None:
    job = world.taken()
    world.finish(job, {"output": "done"})
    assert world.queue.note_progress("w1", job.id, {"step": 3}) is Receipt.LATE
    assert job.for_client()["output"] == "done"
    assert job.status is Status.COMPLETED


def test_chunks_are_given_out_once_and_large_ones_refused(world: World) -> None:
    job = world.taken()
    assert world.queue.add_chunk("w1", job.id, "a", 1) is Receipt.ACCEPTED
    assert world.queue.add_chunk("w1", job.id, "b", 100) is Receipt.ACCEPTED
    assert world.queue.add_chunk("w1", job.id, "c", 101) is Receipt.TOO_LARGE
    assert world.queue.next_chunks(job) == ["a", "b"]
    assert world.queue.next_chunks(job) == []


# Cancel, retry, purge.


def test_a_queued_job_can_be_cancelled_and_no_worker_gets_it(world: World) -> None:
    job = world.submit()
    world.queue.cancel(job)
    assert job.for_client() == {"id": job.id, "status": "CANCELLED"}
    assert world.queue.take("w1") == []
    assert world.ended == [job]


def test_a_running_job_that_is_cancelled_is_stopped_once_where_it_runs(world: World) -> None:
    job = world.taken("w1")
    world.queue.cancel(job)
    assert job.status is Status.CANCELLED
    assert world.queue.take_stops("w2") == []
    assert world.queue.take_stops("w1") == [job.id]
    assert world.queue.take_stops("w1") == []
    assert world.finish(job) is Receipt.LATE


def test_cancelling_an_ended_job_changes_nothing(world: World) -> None:
    job = world.taken()
    world.finish(job)
    world.queue.cancel(job)
    assert job.status is Status.COMPLETED
    assert world.queue.take_stops("w1") == []


def test_a_failed_job_can_be_retried_without_its_old_output(world: World) -> None:
    job = world.taken()
    world.finish(job, {"output": "old", "error": "no"})
    world.queue.retry(job)
    assert job.for_client() == {"id": job.id, "status": "IN_QUEUE"}
    assert world.queue.take("w2") == [job]
    assert world.finish(job, {"output": "new"}, "w1") is Receipt.FOREIGN, "of the first try"
    assert world.finish(job, {"output": "new"}, "w2") is Receipt.ACCEPTED
    assert world.queue.health()["jobs"]["retried"] == 1


@pytest.mark.parametrize("end", ["queued", "running", "completed", "cancelled"])
def test_only_failed_and_timed_out_jobs_can_be_retried(world: World, end: str) -> None:
    job = world.submit() if end == "queued" else world.taken()
    if end == "completed":
        world.finish(job)
    if end == "cancelled":
        world.queue.cancel(job)
    status = job.status
    with pytest.raises(RequestRefused, match=status.value):
        world.queue.retry(job)
    assert job.status is status


def test_purging_deletes_the_queued_jobs_only(world: World) -> None:
    running = world.taken()
    queued = [world.submit(), world.submit()]
    assert world.queue.purge() == 2
    assert world.queue.jobs == [running]
    assert all(job.is_gone for job in queued)
    assert world.queue.take("w1") == []
    assert world.queue.purge() == 0


# Time.


def test_a_job_that_runs_too_long_is_timed_out_and_stopped(world: World) -> None:
    job = world.taken()
    world.wait(99, pinged_by="w1")
    assert job.status is Status.IN_PROGRESS
    world.wait(1, pinged_by="w1")
    assert job.status is Status.TIMED_OUT
    assert job.for_client()["executionTime"] == 100_000
    assert world.queue.take_stops("w1") == [job.id]
    assert world.ended == [job]
    world.queue.retry(job)
    assert world.queue.take("w1") == [job]


def test_time_in_the_queue_does_not_count_as_execution(world: World) -> None:
    job = world.submit(policy={"executionTimeout": 5000})
    world.wait(50)
    assert job.status is Status.IN_QUEUE
    world.queue.take("w1")
    world.wait(5)
    assert job.status is Status.TIMED_OUT


@pytest.mark.parametrize("is_running", [False, True])
def test_a_job_past_its_ttl_is_deleted_even_while_it_runs(world: World, is_running: bool) -> None:
    job = world.submit(policy={"ttl": 12000})
    if is_running:
        world.queue.take("w1")
    world.wait(11, pinged_by="w1")
    assert world.queue.find(job.id) is job
    world.wait(1, pinged_by="w1")
    assert world.queue.find(job.id) is None
    assert job.is_gone
    assert world.queue.take("w1") == []
    assert world.queue.take_stops("w1") == ([job.id] if is_running else [])


@pytest.mark.parametrize(
    "policy",
    [
        {"executionTimeout": 4999},
        {"executionTimeout": 7 * 86400 * 1000 + 1},
        {"executionTimeout": "5000"},
        {"executionTimeout": True},
        {"ttl": 9999},
        {"ttl": 7 * 86400 * 1000 + 1},
    ],
)
def test_a_policy_outside_the_documented_limits_is_refused(
    world: World, policy: dict[str, Any]
) -> None:
    with pytest.raises(RequestRefused, match=f"policy.{next(iter(policy))}: must be"):
        world.submit(policy=policy)


def test_the_limits_of_the_policy_are_allowed_and_can_be_moved(world: World) -> None:
    job = world.submit(policy={"executionTimeout": 5000, "ttl": 10000, "lowPriority": True})
    assert (job.execution_timeout_seconds, job.ttl_seconds) == (5, 10)
    quick = World(Rules(execution_timeout_min_seconds=0.1, ttl_min_seconds=0.2))
    job = quick.submit(policy={"executionTimeout": 100, "ttl": 200})
    assert (job.execution_timeout_seconds, job.ttl_seconds) == (0.1, 0.2)
    with pytest.raises(RequestRefused, match="policy: must be an object"):
        world.submit(policy=[1])


def test_the_documented_times_and_sizes_are_the_default() -> None:
    rules = Rules()
    assert (rules.execution_timeout_seconds, rules.execution_timeout_min_seconds) == (600, 5)
    assert (rules.ttl_seconds, rules.ttl_min_seconds) == (86400, 10)
    assert (rules.run_retention_seconds, rules.runsync_retention_seconds) == (1800, 60)
    assert (rules.run_max_bytes, rules.runsync_max_bytes) == (10e6, 20e6)
    assert (rules.webhook_attempts, rules.webhook_delay_seconds) == (3, 10)
    assert (rules.runsync_wait_seconds, rules.runsync_wait_max_seconds) == (90, 300)


@pytest.mark.parametrize(("is_sync", "seconds"), [(False, 50), (True, 5)])
def test_ended_jobs_are_kept_for_a_while(world: World, is_sync: bool, seconds: int) -> None:
    job = world.taken(is_sync=is_sync)
    world.wait(20, pinged_by="w1")
    world.finish(job)
    world.wait(seconds - 1)
    assert world.queue.find(job.id) is job
    world.wait(1)
    assert world.queue.find(job.id) is None


def test_a_job_that_no_ping_names_goes_to_another_worker(world: World) -> None:
    queued = world.submit("later")
    [lost] = world.queue.take("w1")
    assert lost is queued
    waiting = world.submit("waiting")
    world.wait(29)
    assert lost.status is Status.IN_PROGRESS
    world.queue.note_progress("w1", lost.id, "half")
    world.wait(1)
    assert lost.for_client() == {"id": lost.id, "status": "IN_QUEUE", "retries": 1}
    assert world.queue.take("w2", 2) == [lost, waiting], "it is served first"
    assert lost.for_client()["retries"] == 1


def test_a_job_that_pings_name_is_not_lost(world: World) -> None:
    job = world.taken("w1")
    world.wait(90, pinged_by="w1")
    assert job.status is Status.IN_PROGRESS


def test_pings_of_a_worker_that_was_not_given_the_job_do_not_keep_it(world: World) -> None:
    job = world.taken("w1")
    world.wait(30, pinged_by="w2")
    assert job.status is Status.IN_QUEUE


def test_a_job_that_is_lost_twice_fails(world: World) -> None:
    job = world.taken("w1")
    world.wait(30)
    world.queue.take("w2")
    world.wait(30)
    assert job.status is Status.FAILED
    assert job.for_client()["error"] == "job timed out after 1 retries"
    assert world.ended == [job]
    world.queue.retry(job)
    assert "retries" not in job.for_client(), "they are counted anew"


def test_a_worker_that_was_only_slow_may_still_answer(world: World) -> None:
    job = world.taken("w1")
    world.wait(30)
    world.queue.note_progress("w1", job.id, "half")
    assert "output" not in job.for_client(), "a queued job shows no progress"
    assert world.finish(job, worker_id="w1") is Receipt.ACCEPTED
    assert job.status is Status.COMPLETED
    assert job.for_client()["workerId"] == "w1"
    assert world.queue.take("w2") == [], "it needs nobody else"


# Workers.


def test_a_job_can_be_delivered_twice(world: World) -> None:
    job = world.taken("w1")
    world.queue.deliver_again(job)
    assert world.queue.take("w2") == [job]
    assert world.queue.take("w2") == []
    assert world.finish(job, worker_id="w2") is Receipt.ACCEPTED
    assert world.finish(job, worker_id="w1") is Receipt.LATE


def test_both_workers_of_a_job_delivered_twice_are_told_to_stop(world: World) -> None:
    job = world.taken("w1")
    world.queue.deliver_again(job)
    world.queue.take("w2")
    world.queue.cancel(job)
    assert world.queue.take_stops("w1") == world.queue.take_stops("w2") == [job.id]


def test_a_draining_worker_gets_no_jobs(world: World) -> None:
    world.queue.drain("w1")
    job = world.submit()
    assert world.queue.take("w1") == []
    assert world.queue.take("w2") == [job]


def test_health_counts_jobs_and_workers(world: World) -> None:
    completed, failed, _ = world.taken("w1"), world.taken("w1"), world.taken("w1")
    world.submit()
    world.finish(completed)
    world.finish(failed, {"error": "no"})
    world.queue.ping("w2", [])
    world.queue.ping("w3", [], unhealthy_because="no GPU")
    assert world.queue.health(starting_count=2) == {
        "jobs": {"completed": 1, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0},
        "workers": {
            "idle": 1,
            "initializing": 2,
            "ready": 1,
            "running": 1,
            "throttled": 0,
            "unhealthy": 1,
        },
    }
    world.queue.forget("w3")
    assert world.queue.health()["workers"]["unhealthy"] == 0
    world.seconds += 30
    assert world.queue.health()["workers"]["idle"] == 0, "w2 is not heard of any more"


def test_every_change_is_told_so_that_nobody_waits_in_vain(world: World) -> None:
    job = world.submit()
    changes = [
        lambda: world.queue.take("w1"),
        lambda: world.queue.note_progress("w1", job.id, 1),
        lambda: world.queue.add_chunk("w1", job.id, 1, 1),
        lambda: world.finish(job, {"error": "no"}),
        lambda: world.queue.retry(job),
        lambda: world.queue.drain("w1"),
        lambda: world.queue.deliver_again(job),
        lambda: world.queue.cancel(job),
        lambda: world.wait(60),
    ]
    for change in changes:
        before = world.change_count
        change()
        assert world.change_count > before
    assert world.queue.jobs == []


# Faults on demand.


def test_faults_happen_in_order_as_often_as_asked_and_to_their_route_only() -> None:
    faults = Faults()
    faults.answer("job-done", 503, times=2)
    faults.delay("job-done", 0.5)
    faults.drop("ping")
    faults.duplicate()
    assert faults.next("job-take") is None, "a duplicate is no fault of a request"
    found = [faults.next("job-done") for _ in range(4)]
    assert [fault and (fault.kind, fault.status_code) for fault in found] == [
        ("answer", 503),
        ("answer", 503),
        ("delay", 500),
        None,
    ]
    assert [route for route, _ in faults.pending] == ["ping", "job-take"]
    assert faults.next_duplicate()
    assert not faults.next_duplicate()
    faults.clear()
    assert faults.pending == []


def test_a_fault_of_no_route_is_refused() -> None:
    with pytest.raises(ValueError, match="no route 'jobdone'; there are cancel, health"):
        Faults().drop("jobdone")
