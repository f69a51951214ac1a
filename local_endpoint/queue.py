"""The queue and the life of a job, without HTTP: what clients, workers and time may do to it.

IN_QUEUE -> IN_PROGRESS (a worker took it) -> COMPLETED, FAILED, CANCELLED or TIMED_OUT. A job whose
worker is lost goes back to the front of the queue. Times are seconds of the clock that is given.
"""

import reprlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

DAY_SECONDS = 86400


class Status(StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


class Receipt(StrEnum):
    """What became of something a worker posted."""

    ACCEPTED = "accepted"
    LATE = "late"  # the job had ended; ignored
    FOREIGN = "foreign"  # this worker was not given the job; ignored
    UNKNOWN = "unknown"  # no such job
    TOO_LARGE = "too large"


class RequestRefused(ValueError):  # noqa: N818  the name says it
    """A client's request that the platform would answer with 400. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The platform's times and limits. The defaults are the documented ones; tests shorten them."""

    execution_timeout_seconds: float = 600
    execution_timeout_min_seconds: float = 5
    ttl_seconds: float = DAY_SECONDS
    ttl_min_seconds: float = 10
    policy_max_seconds: float = 7 * DAY_SECONDS
    run_retention_seconds: float = 30 * 60
    runsync_retention_seconds: float = 60
    runsync_wait_seconds: float = 90
    runsync_wait_min_seconds: float = 1
    runsync_wait_max_seconds: float = 300
    # "MB" is not defined more closely; the stricter reading finds the problem earlier.
    run_max_bytes: int = 10_000_000
    runsync_max_bytes: int = 20_000_000
    stream_chunk_max_bytes: int = 1_000_000
    webhook_attempts: int = 3
    webhook_delay_seconds: float = 10
    # How long a worker's request for jobs, or for jobs to stop, is held while there are none.
    poll_seconds: float = 20
    ping_interval_seconds: int = 10  # the SDK divides milliseconds down to whole seconds
    # Not documented: a job is lost when no ping has named it for this long.
    job_lost_after_seconds: float = 30
    max_retries: int = 1
    # Not documented: the answer to a result of a job that has ended. It is ignored in any case.
    late_result_status_code: int = 200


@dataclass(eq=False)
class Job:
    """One job. Times are those of the queue's clock."""

    id: str
    request: dict[str, Any]
    is_sync: bool
    submitted_at: float
    execution_timeout_seconds: float
    ttl_seconds: float
    status: Status = Status.IN_QUEUE
    taken_at: float | None = None
    named_at: float = 0  # when it was taken, or last named in a ping
    finished_at: float | None = None
    worker_id: str | None = None
    # Every worker that was given the job since it was submitted or retried by the client.
    holders: set[str] = field(default_factory=set)
    output: Any = None
    has_output: bool = False
    error: str | None = None
    retries: int = 0
    chunks: list[Any] = field(default_factory=list)
    is_gone: bool = False  # deleted while somebody may still wait for it

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    def for_worker(self) -> dict[str, Any]:
        """The job as a worker gets it: `{"id", "input"}` and what else is passed on."""
        passed_on = ("input", "webhook", "s3Config", "policy")
        payload = {name: self.request[name] for name in passed_on if name in self.request}
        # An empty input is left out on the way to the worker, whose SDK then drops the job.
        if payload["input"] == {}:
            del payload["input"]
        return {"id": self.id, **payload}

    def for_client(self) -> dict[str, Any]:
        """The answer of the status route. `delayTime` and `executionTime` are milliseconds."""
        answer: dict[str, Any] = {"id": self.id, "status": self.status.value}
        if self.taken_at is not None:
            answer["delayTime"] = _milliseconds(self.taken_at - self.submitted_at)
            if self.finished_at is not None:
                answer["executionTime"] = _milliseconds(self.finished_at - self.taken_at)
        if self.worker_id is not None:
            answer["workerId"] = self.worker_id
        if self.status is Status.IN_PROGRESS:
            answer["input"] = self.request["input"]
        if self.has_output:
            answer["output"] = self.output
        if self.error is not None:
            answer["error"] = self.error
        if self.retries:
            answer["retries"] = self.retries
        return dict(sorted(answer.items()))

    def for_webhook(self) -> dict[str, Any]:
        """The whole job, with its input and the webhook's own address."""
        whole = {"input": self.request["input"], "webhook": self.request.get("webhook")}
        return dict(sorted((whole | self.for_client()).items()))


@dataclass
class KnownWorker:
    """A worker that has been heard of: it asked for jobs, or pinged."""

    heard_at: float
    unhealthy_because: str | None = None
    is_draining: bool = False


class JobQueue:
    """All jobs of one endpoint and the workers that were heard of.

    Not thread-safe. `changed` is called after each change, `ended` with each job that has ended;
    `tick` does what has become due with time and must be called often.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
        ended: Callable[[Job], None] = lambda _: None,
    ) -> None:
        self.rules = rules or Rules()
        self._clock = clock
        self._changed = changed
        self._ended = ended
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._again: deque[Job] = deque()  # to be delivered once more, whatever their state
        self._stops: dict[str, list[str]] = {}
        self._workers: dict[str, KnownWorker] = {}
        self._retried_count = 0

    # What clients do.

    def submit(self, request: Any, *, is_sync: bool, job_id: str | None = None) -> Job:
        """Queue a job.

        Args:
            request: the body of the client's request, `{"input": ..., "policy"?, "webhook"?, ...}`.
            job_id: in place of one like the platform's, for tests.

        Raises:
            RequestRefused: there is no `input`, or the policy is outside the limits.
        """
        if not isinstance(request, dict) or "input" not in request:
            raise RequestRefused('the body must be a JSON object with "input" in it')
        policy = request.get("policy")
        if policy is None:
            policy = {}
        if not isinstance(policy, dict):
            raise RequestRefused("policy: must be an object")
        rules = self.rules
        job = Job(
            id=job_id or f"{'sync-' if is_sync else ''}{uuid.uuid4()}-{'e' if is_sync else 'u'}1",
            request=request,
            is_sync=is_sync,
            submitted_at=self._clock(),
            execution_timeout_seconds=self._policy_seconds(
                policy,
                "executionTimeout",
                rules.execution_timeout_min_seconds,
                rules.execution_timeout_seconds,
            ),
            ttl_seconds=self._policy_seconds(
                policy, "ttl", rules.ttl_min_seconds, rules.ttl_seconds
            ),
        )
        self._jobs[job.id] = job
        self._waiting.append(job)
        self._changed()
        return job

    def find(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    @property
    def jobs(self) -> list[Job]:
        """All jobs that are not deleted yet, the oldest first."""
        return list(self._jobs.values())

    def cancel(self, job: Job) -> None:
        """Cancel a job that is queued or running; one that has ended stays as it is."""
        if not job.is_finished:
            self._end(job, Status.CANCELLED)

    def retry(self, job: Job) -> None:
        """Queue a job again that failed or timed out; its old output is removed.

        Raises:
            RequestRefused: it neither failed nor timed out.
        """
        if job.status not in (Status.FAILED, Status.TIMED_OUT):
            raise RequestRefused(f"only FAILED and TIMED_OUT jobs can be retried, not {job.status}")
        job.retries = 0
        job.holders.clear()
        self._requeue(job)

    def purge(self) -> int:
        """Delete all queued jobs and return how many there were."""
        purged = list(self._waiting)
        for job in purged:
            self._delete(job)
        return len(purged)

    def next_chunks(self, job: Job) -> list[Any]:
        """What was streamed since the last call."""
        chunks, job.chunks = job.chunks, []
        return chunks

    def health(self, starting_count: int = 0) -> dict[str, dict[str, int]]:
        """The answer of the health route; `starting_count` workers have not been heard of."""
        statuses = [job.status for job in self._jobs.values()]
        workers = [(id_, worker) for id_, worker in self._workers.items() if self._is_heard(worker)]
        healthy = [id_ for id_, worker in workers if worker.unhealthy_because is None]
        running = {job.worker_id for job in self._jobs.values() if job.status == Status.IN_PROGRESS}
        idle_count = sum(id_ not in running for id_ in healthy)
        return {
            "jobs": {
                "completed": statuses.count(Status.COMPLETED),
                "failed": statuses.count(Status.FAILED),
                "inProgress": statuses.count(Status.IN_PROGRESS),
                "inQueue": statuses.count(Status.IN_QUEUE),
                "retried": self._retried_count,
            },
            "workers": {
                "idle": idle_count,
                "initializing": starting_count,
                "ready": idle_count,
                "running": len(healthy) - idle_count,
                "throttled": 0,
                "unhealthy": len(workers) - len(healthy),
            },
        }

    # What workers do.

    def hear(self, worker_id: str) -> KnownWorker:
        """Note that a worker has made itself heard."""
        worker = self._workers.setdefault(worker_id, KnownWorker(self._clock()))
        worker.heard_at = self._clock()
        return worker

    def has_heard(self, worker_id: str) -> bool:
        """Whether the worker has asked for jobs or pinged, not only to say it is unhealthy."""
        known = self._workers.get(worker_id)
        return known is not None and known.unhealthy_because is None

    def forget(self, worker_id: str) -> None:
        """A worker has ended. Its jobs stay with it until its pings are missed."""
        self._workers.pop(worker_id, None)
        self._stops.pop(worker_id, None)

    def drain(self, worker_id: str) -> None:
        """Give a worker no more jobs."""
        self.hear(worker_id).is_draining = True
        self._changed()

    def is_draining(self, worker_id: str) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.is_draining

    def take(self, worker_id: str, count: int = 1) -> list[Job]:
        """Hand out up to `count` jobs, the oldest first."""
        if self.hear(worker_id).is_draining:
            return []
        taken: list[Job] = []
        while len(taken) < count and (self._again or self._waiting):
            if self._again:
                job = self._again.popleft()
            else:
                job = self._waiting.popleft()
                job.status = Status.IN_PROGRESS
                job.taken_at = job.named_at = self._clock()
                job.worker_id = worker_id
            job.holders.add(worker_id)
            taken.append(job)
            self._changed()
        return taken

    def deliver_again(self, job: Job) -> None:
        """Make the next `take` hand out this job once more: delivery is at least once."""
        self._again.append(job)
        self._changed()

    def take_stops(self, worker_id: str) -> list[str]:
        """Ids of jobs that this worker has to stop; each is given once."""
        self.hear(worker_id)
        return self._stops.pop(worker_id, [])

    def finish(self, worker_id: str, job_id: str, body: dict[str, Any], size_bytes: int) -> Receipt:
        """A worker posted a result: `{"output"?, "error"?}`, `size_bytes` long."""
        job, receipt = self._held(worker_id, job_id)
        if job is None:
            return receipt
        job.worker_id = worker_id
        if size_bytes > self._max_bytes(job):
            # The platform refuses the result, and still the job often counts as done.
            job.has_output = False
            self._end(job, Status.COMPLETED)
            return Receipt.TOO_LARGE
        job.output = body.get("output")
        job.has_output = "output" in body
        error = body.get("error")
        # The platform reads strings only: any other error is lost and the job counts as done.
        job.error = error if isinstance(error, str) and error else None
        self._end(job, Status.FAILED if job.error else Status.COMPLETED)
        return Receipt.ACCEPTED

    def note_progress(self, worker_id: str, job_id: str, progress: Any) -> Receipt:
        """A worker posted progress. On the platform a late one would bring the job back to life."""
        job, receipt = self._held(worker_id, job_id)
        if job is not None and job.status is Status.IN_PROGRESS:
            job.output, job.has_output = progress, True
            self._changed()
        return receipt

    def add_chunk(self, worker_id: str, job_id: str, chunk: Any, size_bytes: int) -> Receipt:
        """A worker posted one piece of a streamed output."""
        job, receipt = self._held(worker_id, job_id)
        if job is None:
            return receipt
        if size_bytes > self.rules.stream_chunk_max_bytes:
            return Receipt.TOO_LARGE
        job.chunks.append(chunk)
        self._changed()
        return receipt

    def ping(
        self, worker_id: str, job_ids: Iterable[str], unhealthy_because: str | None = None
    ) -> None:
        """A worker is alive and has these jobs."""
        self.hear(worker_id).unhealthy_because = unhealthy_because
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            if job is not None and worker_id in job.holders:
                job.named_at = self._clock()

    # What time does.

    def tick(self) -> None:
        """End, requeue and delete the jobs whose time has come."""
        now = self._clock()
        for job in self.jobs:
            if job.finished_at is not None:
                if now - job.finished_at >= self._retention_seconds(job):
                    self._delete(job)
            elif now - job.submitted_at >= job.ttl_seconds:
                self._delete(job)
            elif job.status is Status.IN_PROGRESS and job.taken_at is not None:
                if now - job.taken_at >= job.execution_timeout_seconds:
                    self._end(job, Status.TIMED_OUT)
                elif now - job.named_at >= self.rules.job_lost_after_seconds:
                    self._lose(job)

    def _lose(self, job: Job) -> None:
        if job.retries >= self.rules.max_retries:
            job.error = f"job timed out after {job.retries} retries"
            job.has_output = False
            self._end(job, Status.FAILED)
            return
        job.retries += 1
        self._requeue(job)

    def _requeue(self, job: Job) -> None:
        job.status = Status.IN_QUEUE
        job.taken_at = job.finished_at = job.worker_id = job.error = job.output = None
        job.has_output = False
        job.chunks.clear()
        self._retried_count += 1
        self._waiting.appendleft(job)
        self._changed()

    def _end(self, job: Job, status: Status) -> None:
        if status in (Status.CANCELLED, Status.TIMED_OUT):
            self._stop(job)
            job.has_output = False
        job.status = status
        job.finished_at = self._clock()
        if job in self._waiting:
            self._waiting.remove(job)
        self._ended(job)
        self._changed()

    def _stop(self, job: Job) -> None:
        for worker_id in job.holders & self._workers.keys():
            self._stops.setdefault(worker_id, []).append(job.id)

    def _delete(self, job: Job) -> None:
        if not job.is_finished:
            self._stop(job)
        if job in self._waiting:
            self._waiting.remove(job)
        del self._jobs[job.id]
        job.is_gone = True
        self._changed()

    def _held(self, worker_id: str, job_id: str) -> tuple[Job | None, Receipt]:
        """The job if this worker may still change it, else None and why not."""
        self.hear(worker_id)
        job = self._jobs.get(job_id)
        if job is None:
            return None, Receipt.UNKNOWN
        if worker_id not in job.holders:
            return None, Receipt.FOREIGN
        if job.is_finished:
            return None, Receipt.LATE
        return job, Receipt.ACCEPTED

    def _is_heard(self, worker: KnownWorker) -> bool:
        return self._clock() - worker.heard_at < self.rules.job_lost_after_seconds

    def _retention_seconds(self, job: Job) -> float:
        rules = self.rules
        return rules.runsync_retention_seconds if job.is_sync else rules.run_retention_seconds

    def _max_bytes(self, job: Job) -> int:
        return self.rules.runsync_max_bytes if job.is_sync else self.rules.run_max_bytes

    def _policy_seconds(
        self, policy: dict[str, Any], name: str, minimum: float, default: float
    ) -> float:
        value = policy.get(name)
        if value is None:
            return default
        maximum = self.rules.policy_max_seconds
        if not isinstance(value, int | float) or not minimum * 1000 <= value <= maximum * 1000:
            raise RequestRefused(
                f"policy.{name}: must be a number of milliseconds from {minimum * 1000:.0f} "
                f"to {maximum * 1000:.0f}; got {reprlib.repr(value)}"
            )
        return value / 1000


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
