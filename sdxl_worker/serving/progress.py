"""What the caller sees of a job while it runs, and how a job is stopped.

The SDK's `progress_update` starts a thread for each call: updates can overtake one another and
arrive after the result, which puts the job back to IN_PROGRESS for ever. Here one task of each job
posts them one after the other, and the result waits for the last.
"""

import asyncio
import base64
import contextlib
import json
import logging
import threading
from typing import Any, Self

from sdxl_worker.drawing.preview import preview_jpeg
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading.latent_rgb import LatentRgb
from sdxl_worker.serving.delivery import job_url

log = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 1.0
# How long at most an update that is under way holds back the result.
UPDATE_TIMEOUT_SECONDS = 5.0


class JobStopped(Exception):  # noqa: N818 - not an error: somebody wanted it
    """Raised in a thread, between two steps of its work, in a job that nobody waits for."""


class Progress:
    """Watches one job: inside `async with`, `generate` calls `on_step`.

    Leaving the block, in whatever way, stops the job on the GPU thread within one step, and no
    update is sent after it.
    """

    def __init__(self, job: dict[str, Any], *, latent_rgb: LatentRgb | None) -> None:
        """
        Args:
            latent_rgb: how to draw previews, or None where none are wanted.
        """
        self._job_id = str(job.get("id"))
        self._latent_rgb = latent_rgb
        self._left = threading.Event()
        # Set while an update may be made: the GPU thread makes none that would not be sent.
        self._wanted = threading.Event()
        self._updates: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._sending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if url := job_url(self._job_id):
            self._task = asyncio.create_task(self._send_updates(url))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if self._task is None:
            return
        if kind is None:
            async with self._sending:
                self._task.cancel()
        else:
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def check(self) -> None:
        """Called in any thread, before work that takes long.

        Raises:
            JobStopped: the job was left; the work must not go on.
        """
        if self._left.is_set():
            raise JobStopped

    def on_step(self, step: Step) -> None:
        """Called on the GPU thread after each denoising step.

        Raises:
            JobStopped: as `check`.
        """
        self.check()
        if not self._wanted.is_set():
            return
        self._wanted.clear()
        progress = {
            "stage": step.stage,
            "step": step.step,
            "steps": step.steps,
            "percent": step.percent,
        }
        update: dict[str, Any] = {"progress": progress}
        if self._latent_rgb is not None:
            jpeg = preview_jpeg(step.latents(), self._latent_rgb)
            update["preview"] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
        self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def _send_updates(self, url: str) -> None:
        import aiohttp
        from runpod.http_client import AsyncClientSession

        timeout = aiohttp.ClientTimeout(total=UPDATE_TIMEOUT_SECONDS)
        async with AsyncClientSession() as session:
            while True:
                self._wanted.set()
                update = await self._updates.get()
                body = json.dumps({"status": "IN_PROGRESS", "output": update})
                try:
                    async with (
                        self._sending,
                        session.post(url, data=body, timeout=timeout) as response,
                    ):
                        await response.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    # A job does not fail because an update does.
                    log.debug("update not sent: %s", error, extra={"job_id": self._job_id})
                await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
