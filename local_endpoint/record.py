"""What happened at the endpoint, in order, for tests to look at."""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal

from local_endpoint.queue import Receipt

PostKind = Literal["result", "progress", "chunk"]


@dataclass(frozen=True)
class Exchange:
    """One request, of a client or a worker, when it was answered.

    `status_code` is None where the connection was dropped. Times are those of time.monotonic().
    """

    came_at: float
    answered_at: float
    method: str
    route: str  # as in the URL, "job-take" for example; "progress" for progress posted to job-done
    path: str
    status_code: int | None
    fault: str | None = None  # the kind of fault that it met


@dataclass(frozen=True)
class Take:
    """Jobs that were handed out to a worker that asked for up to `asked_count`."""

    at: float
    worker_id: str
    job_ids: tuple[str, ...]
    asked_count: int
    job_in_progress: bool


@dataclass(frozen=True)
class Post:
    """Something a worker posted about a job, and what became of it."""

    at: float
    kind: PostKind
    worker_id: str
    job_id: str
    body: dict[str, Any]
    size_bytes: int
    receipt: Receipt


@dataclass(frozen=True)
class Stop:
    """A worker was told to stop these jobs."""

    at: float
    worker_id: str
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class Ping:
    at: float
    worker_id: str
    job_ids: tuple[str, ...]
    unhealthy_because: str | None = None


@dataclass(frozen=True)
class WebhookCall:
    """One attempt to call a webhook; `status_code` is None where there was no answer."""

    at: float
    url: str
    job_id: str
    status_code: int | None


class Record:
    """Lists of what happened, the newest last; each keeps `limit` entries (None: all)."""

    def __init__(self, limit: int | None = None) -> None:
        self.exchanges: deque[Exchange] = deque(maxlen=limit)
        self.takes: deque[Take] = deque(maxlen=limit)
        self.posts: deque[Post] = deque(maxlen=limit)
        self.stops: deque[Stop] = deque(maxlen=limit)
        self.pings: deque[Ping] = deque(maxlen=limit)
        self.webhook_calls: deque[WebhookCall] = deque(maxlen=limit)

    def posts_of(self, job_id: str, kind: PostKind | None = None) -> list[Post]:
        return [
            post for post in list(self.posts) if post.job_id == job_id and kind in (None, post.kind)
        ]

    def result_counts(self, receipt: Receipt | None = Receipt.ACCEPTED) -> Counter[str]:
        """How many results of each job became `receipt`; all that were posted, if that is None.

        None is lost and none is doubled where this equals `dict.fromkeys(job_ids, 1)`.
        """
        return Counter(
            post.job_id
            for post in list(self.posts)
            if post.kind == "result" and receipt in (None, post.receipt)
        )

    @property
    def late_progress(self) -> list[Post]:
        """Progress posted after its job had ended.

        On the platform it makes the job IN_PROGRESS again, for ever; here it is ignored.
        """
        return [p for p in list(self.posts) if p.kind == "progress" and p.receipt is Receipt.LATE]
