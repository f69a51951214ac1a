"""Stop signals that come before their job has begun."""

import asyncio
from typing import Any

import pytest
from runpod.serverless.modules.rp_scale import JobScaler

from sdxl_worker.serving import stops


class Scaler:
    """What the SDK's stop looks at: the tasks of the jobs that have begun."""

    def __init__(self) -> None:
        self.jobs_tasks: dict[str, asyncio.Task[Any]] = {}


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    return {"handled": job["id"]}


@pytest.fixture
def heeding(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(JobScaler, "stop_job", JobScaler.stop_job)  # put back afterwards
    return stops.heeding_early_stops(handler)


async def stop(job_id: str) -> bool:
    return bool(await JobScaler.stop_job(Scaler(), job_id))


def test_a_job_stopped_before_it_began_does_not_begin(heeding: Any) -> None:
    async def job() -> None:
        assert await stop("a") is False
        assert await heeding({"id": "b"}) == {"handled": "b"}
        with pytest.raises(asyncio.CancelledError):
            await heeding({"id": "a"})
        assert await heeding({"id": "a"}) == {"handled": "a"}, "sent again, it is wanted"

    asyncio.run(job())


def test_an_old_signal_does_not_stop_a_job_that_is_sent_again(
    heeding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job() -> None:
        await stop("a")
        monkeypatch.setattr(stops, "KEPT_SECONDS", 0.0)
        await asyncio.sleep(0.01)
        assert await heeding({"id": "a"}) == {"handled": "a"}

    asyncio.run(job())


def test_a_running_job_is_stopped_as_ever(heeding: Any) -> None:
    async def job() -> None:
        scaler = Scaler()
        running = asyncio.create_task(asyncio.sleep(60))
        scaler.jobs_tasks["a"] = running
        assert await JobScaler.stop_job(scaler, "a") is True
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await heeding({"id": "a"}) == {"handled": "a"}

    asyncio.run(job())
