"""What a developer sees of a local job: a bar on stderr, where that is a terminal."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

SECONDS_BETWEEN_LOOKS = 0.5

show_update: ContextVar[Callable[[dict[str, Any]], None] | None] = ContextVar(
    "show_update", default=None
)
"""Called with each update of the job in whose context it is set."""


@contextmanager
def loading_shown() -> Iterator[None]:
    """Say that the models are loaded, and for how long, while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    with _bar(bar_format="loading the models, {elapsed}") as bar:

        def go_on() -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                bar.refresh()

        thread = threading.Thread(target=go_on, name="loading-shown", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def job_shown() -> Iterator[None]:
    """Show the progress of the job that runs in the block."""
    if not sys.stderr.isatty():
        yield
        return
    with _bar(total=100, bar_format="{desc} {bar:30} {percentage:3.0f}%, {remaining} left") as bar:

        def show(update: dict[str, Any]) -> None:
            progress = update["progress"]
            bar.set_description_str(_told(progress), refresh=False)
            bar.n = progress.get("percent", 0)
            bar.refresh()

        token = show_update.set(show)
        try:
            yield
        finally:
            show_update.reset(token)


@contextmanager
def _bar(**options: Any) -> Iterator[Any]:
    # Imported where there is a terminal, which is not on the platform.
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    # The log's lines go above the bar, to stdout as before.
    with (
        logging_redirect_tqdm([logging.getLogger("sdxl_worker")]),
        tqdm(file=sys.stderr, leave=False, **options) as bar,
    ):
        yield bar


def _told(progress: dict[str, Any]) -> str:
    match progress["stage"]:
        case "loading":
            return f"loading {progress['model']}"
        case "download":
            return f"downloading, {progress['bytes'] / 1e6:.0f} MB"
    return f"{progress['stage']}, step {progress['step']}/{progress['steps']}"
