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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from sdxl_worker.serving.delivery import job_url
from sdxl_worker.serving.job_bar import show_update

if TYPE_CHECKING:
    from sdxl_worker.drawing.steps import Step
    from sdxl_worker.loading.latent_rgb import LatentRgb

log = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 1.0
# How long at most an update that is under way holds back the result.
UPDATE_TIMEOUT_SECONDS = 5.0


class JobStopped(Exception):  # noqa: N818 - not an error: somebody wanted it
    """Raised in a thread, between two steps of its work, in a job that nobody waits for."""


class Progress:
    """Watches one job: inside `async with`, its work calls `on_step` and the like.

    Leaving the block, in whatever way, stops the job on the GPU thread within one step, and no
    update is sent after it.
    """

    latent_rgb: "LatentRgb | None" = None
    """How to draw previews, where they are wanted."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job_id = str(job.get("id"))
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
        elif show := show_update.get():
            self._task = asyncio.create_task(self._show_updates(show))
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

    def on_step(self, step: "Step") -> None:
        """Called on the GPU thread after each denoising step.

        Raises:
            JobStopped: as `check`.
        """
        self.check()
        if not self._wanted.is_set():
            return
        progress = {
            "stage": step.stage,
            "step": step.step,
            "steps": step.steps,
            "percent": step.percent,
        }
        update: dict[str, Any] = {"progress": progress}
        if self.latent_rgb is not None:
            from sdxl_worker.drawing.preview import preview_jpeg  # imports torch

            jpeg = preview_jpeg(step.latents(), self.latent_rgb)
            update["preview"] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
        self._send(update)

    def on_bytes(self, done: int, total: int | None) -> None:
        """Called in any thread as LoRAs and embeddings are downloaded.

        Args:
            done: bytes so far.
            total: of all files, where their servers tell.

        Raises:
            JobStopped: as `check`.
        """
        self.check()
        if self._wanted.is_set():
            share = {} if not total else {"percent": min(100, round(100 * done / total))}
            progress = {"stage": "download", "bytes": done, "total_bytes": total, **share}
            self._send({"progress": progress})

    def on_tile(self, done: int, tiles: int) -> None:
        """Called on the GPU thread as finished pictures are enlarged by a network.

        Args:
            tiles: of all pictures.

        Raises:
            JobStopped: as `check`.
        """
        self.check()
        if self._wanted.is_set():
            percent = 100 * done // tiles
            progress = {"stage": "upscale", "step": done, "steps": tiles, "percent": percent}
            self._send({"progress": progress})

    def on_loading(self, model: str) -> None:
        """Called on the GPU thread where another model has to be loaded or brought to the card."""
        if self._wanted.is_set():
            self._send({"progress": {"stage": "loading", "model": model}})

    def _send(self, update: dict[str, Any]) -> None:
        self._wanted.clear()
        self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def _show_updates(self, show: Callable[[dict[str, Any]], None]) -> None:
        while True:
            self._wanted.set()
            show(await self._updates.get())

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
