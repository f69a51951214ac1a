"""A worker of the tests' own, at a local endpoint that has none."""

from typing import Any

from local_endpoint import LocalEndpoint


class HandWorker:
    """A worker that asks and posts when the test says so."""

    def __init__(self, endpoint: LocalEndpoint, worker_id: str = "hand") -> None:
        self.endpoint = endpoint
        self.id = worker_id

    def get(self, path: str) -> tuple[int, Any]:
        # The SDK sends its key as it is, without "Bearer".
        return self.endpoint.call(path, headers={"Authorization": self.endpoint.api_key})

    def take(self) -> dict[str, Any]:
        code, job = self.get(f"job-take/{self.id}?gpu=x&job_in_progress=0")
        assert code == 200
        return dict(job)

    def done(self, job_id: str, body: Any) -> int:
        return self.endpoint.call(f"job-done/{self.id}/{job_id}?gpu=x&isStream=false", body)[0]

    def progress(self, job_id: str, output: Any) -> int:
        return self.done(job_id, {"status": "IN_PROGRESS", "output": output})
