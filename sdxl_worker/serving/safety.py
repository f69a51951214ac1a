"""Finished pictures are judged by the classifier of `SAFETY_CHECKER`, before anything of them is
sent."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from sdxl_worker import gpu
from sdxl_worker.errors import PictureError
from sdxl_worker.serving.progress import JobStopped, Progress
from sdxl_worker.serving.start import is_beside, put_beside
from sdxl_worker.serving.threads import draw_on_gpu_thread, in_thread, on_gpu_thread

if TYPE_CHECKING:
    import torch

    from sdxl_worker.loading.models import Models
    from sdxl_worker.loading.safety_checkers import SafetyCheckerFiles

log = logging.getLogger(__name__)


async def judge(
    pictures: Sequence[Image.Image], folder: Path, models: "Models", progress: Progress
) -> list[bool]:
    """Of each picture, whether the safety checker flags it.

    Args:
        folder: `SAFETY_CHECKER`.

    Raises:
        PictureError: it cannot tell.
        RequestError: it had to go for others, and cannot be loaded again.
    """
    from sdxl_worker.loading.safety_checkers import SafetyCheckerFiles

    files = SafetyCheckerFiles(folder)
    pixels = await in_thread(_prepared, pictures, files, progress)
    flags = functools.partial(_flags, pixels, files, models, progress)
    # Between the passes of another job, whose networks must not be moved to make room.
    found = await on_gpu_thread(lambda: flags() if is_beside(files) else None)
    return found if found is not None else await draw_on_gpu_thread(flags, None, 1)


def _prepared(
    pictures: Sequence[Image.Image], files: "SafetyCheckerFiles", progress: Progress
) -> "torch.Tensor":
    with _failing_readably():
        return files.prepared(pictures, progress.check)


def _flags(
    pixels: "torch.Tensor",
    files: "SafetyCheckerFiles",
    models: "Models",
    progress: Progress,
) -> list[bool]:
    from sdxl_worker.loading.companions import at_work
    from sdxl_worker.loading.safety_checkers import SafetyChecker

    [checker] = put_beside(models, [files], progress.on_loading)
    with _failing_readably(), at_work(checker, models.placement):
        return cast(SafetyChecker, checker).flags(pixels, progress.check)


@contextlib.contextmanager
def _failing_readably() -> Iterator[None]:
    """
    Raises:
        PictureError: for what is neither a stop nor the GPU's.
    """
    try:
        yield
    except JobStopped:
        raise
    except Exception as error:
        if gpu.is_out_of_memory(error) or gpu.is_broken():
            raise
        log.exception("the safety checker failed")
        raise PictureError(
            "the worker's safety checker failed at the pictures, so they are not sent; if it comes "
            "again, the worker's owner should check SAFETY_CHECKER"
        ) from None


def blanked(pictures: Sequence[Image.Image], nsfw: Sequence[bool]) -> list[Image.Image]:
    """With a black one in the place of each that is flagged."""
    return [
        Image.new("RGB", picture.size) if is_flagged else picture
        for picture, is_flagged in zip(pictures, nsfw, strict=True)
    ]


def warning_of_blanks(nsfw: Sequence[bool]) -> list[str]:
    if not any(nsfw):
        return []
    return [
        f"nsfw: {sum(nsfw)} of {len(nsfw)} pictures flagged by the worker's safety checker, which "
        "may be wrong, and black in their places"
    ]
