"""What is shown of jobs while they run: bars on a terminal, lines elsewhere, both on stderr."""

import base64
import contextlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

# Where there is no terminal, a line at most so often, or when the stage changes.
SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_THE_BATCHS_RATE = 3600
PREVIEW_ROWS = 16
MAX_PREVIEW_BYTES = 2**20
MAX_PREVIEW_SIDE_PX = 1024
MAX_LABEL_CHARACTERS = 40


def printable(text: str) -> str:
    """Without what would control the terminal: texts come from endpoints and files."""
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in text)


class JobProgress:
    """One job as its status tells it."""

    def __init__(self, label: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.label = " ".join(label.split())[:MAX_LABEL_CHARACTERS]
        self.stage = "sending"
        self.percent: float | None = None
        self.preview: bytes | None = None
        self._clock = clock
        self._since = clock()
        self._told = "sending"
        self._first: tuple[float, float] | None = None  # a percentage, and when it was seen
        self._last: tuple[float, float] | None = None

    def update(self, answer: dict[str, Any]) -> None:
        """Take over what /status answered."""
        status, output = answer.get("status"), answer.get("output")
        if status == "IN_QUEUE":
            return self._enter("queue", "in the queue, position unknown")
        if status != "IN_PROGRESS":
            return self._enter(str(status), str(status).lower().replace("_", " "))
        update = output if isinstance(output, dict) else {}
        progress = update.get("progress")
        if not isinstance(progress, dict):
            return self._enter("started", "at a worker")
        self._see(progress)
        uri = update.get("preview")
        if isinstance(uri, str) and len(uri) < MAX_PREVIEW_BYTES:
            with contextlib.suppress(ValueError):
                self.preview = base64.b64decode(uri.partition(",")[2])
        return None

    def text(self) -> str:
        """What the job does, with the time left where that can be told."""
        left = self.seconds_left()
        if left is not None:
            return f"{self._told}, {_duration(left)} left"
        if self.percent is not None:
            return self._told
        return f"{self._told}: {_duration(self._clock() - self._since)}"

    def seconds_left(self) -> float | None:
        """From how fast the percentage grew since it was first seen."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        (first, began), (last, seen) = self._first, self._last
        left = (100 - last) * (seen - began) / (last - first) - (self._clock() - seen)
        return max(0.0, left) if seen > began and math.isfinite(left) else None

    def _see(self, progress: dict[str, Any]) -> None:
        stage = str(progress.get("stage"))
        percent = progress.get("percent")
        if stage == "loading":
            return self._enter(stage, f"loading the model {progress.get('model', '')}".rstrip())
        if stage == "download":
            done, total = progress.get("bytes") or 0, progress.get("total_bytes")
            size = _megabytes(done) + (f" of {_megabytes(total)}" if total else "")
            self._enter(stage, f"downloading, {size}")
        else:
            self._enter("drawing", f"{stage}, step {progress.get('step')}/{progress.get('steps')}")
        if isinstance(percent, int | float) and not isinstance(percent, bool):
            self.percent = float(min(max(0, percent), 100))  # of NaN, 0
            self._last = (self.percent, self._clock())
            self._first = self._first or self._last
        return None

    def _enter(self, stage: str, told: str) -> None:
        if stage != self.stage:
            self.stage, self._since = stage, self._clock()
            self.percent = self._first = self._last = None
        self._told = told


class Display:
    """Shows jobs, inside `with`. This one shows nothing but what has to be said."""

    shows_pictures = False

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was found."""

    def total(self, done: int, of: int) -> None:
        """How many jobs of a batch are done."""

    def add(self, job: JobProgress) -> None:
        """A job begins."""

    def changed(self, job: JobProgress) -> None:
        """There is news of a job."""

    def remove(self, job: JobProgress) -> None:
        """A job has ended."""

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that tells how it goes on; the quiet display leaves it out."""


class LineDisplay(Display):
    """For logs and pipes."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said: dict[JobProgress, tuple[str, float]] = {}
        self._total = ""

    def total(self, done: int, of: int) -> None:
        self._total = f"{done}/{of} "

    def changed(self, job: JobProgress) -> None:
        stage, at = self._said.get(job, ("", 0.0))
        if stage == job.stage and time.monotonic() - at < SECONDS_BETWEEN_LINES:
            return
        self._said[job] = (job.stage, time.monotonic())
        self.say(f"{self._total}{job.label + ': ' if job.label else ''}{job.text()}")

    def remove(self, job: JobProgress) -> None:
        self._said.pop(job, None)

    def note(self, text: str) -> None:
        self.say(text)


class _TextColumn(ProgressColumn):
    """Looks at the job anew at each drawing, so that its seconds go on."""

    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        job = task.fields.get("job")
        if job is None:
            text = f"{task.completed:g} of {task.total or 0:g} done"
            if task.time_remaining:
                text += f", {_duration(task.time_remaining)} left"
        else:
            text = f"{job.label}: {job.text()}" if job.label else job.text()
        text = printable(text).replace("\n", " ")
        return Text(text, no_wrap=True, overflow="ellipsis")


class BarDisplay(Display):
    """For terminals: a bar for each job, above them the picture so far, below the total."""

    def __init__(self, console: Console, *, shows_pictures: bool) -> None:
        super().__init__(console)
        self.shows_pictures = shows_pictures
        self._bars = Progress(
            BarColumn(bar_width=24),
            _TextColumn(),
            console=console,
            speed_estimate_period=SECONDS_OF_THE_BATCHS_RATE,
        )
        self._tasks: dict[JobProgress, TaskID] = {}
        self._total: TaskID | None = None
        self._picture: RenderableType | None = None
        self._shown: bytes | None = None
        self._live = Live(
            get_renderable=self._renderable, console=console, transient=True, refresh_per_second=4
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        self._show_picture(None)
        self._live.stop()

    def total(self, done: int, of: int) -> None:
        if self._total is None:
            self._total = self._bars.add_task("", total=of)
        self._bars.update(self._total, completed=done)

    def add(self, job: JobProgress) -> None:
        self._tasks[job] = self._bars.add_task("", total=None, job=job)

    def changed(self, job: JobProgress) -> None:
        total = None if job.percent is None else 100
        self._bars.update(self._tasks[job], total=total, completed=job.percent or 0)
        if self.shows_pictures and job.preview is not None and job.preview is not self._shown:
            self._show_picture(job.preview)

    def remove(self, job: JobProgress) -> None:
        self._bars.remove_task(self._tasks.pop(job))
        if not self._tasks:
            self._show_picture(None)

    def note(self, text: str) -> None:
        self.say(text)

    def _show_picture(self, jpeg: bytes | None) -> None:
        old, self._picture, self._shown = self._picture, None, jpeg
        if jpeg is not None:
            with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
                picture = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
                if max(picture.size) <= MAX_PREVIEW_SIDE_PX:
                    self._picture = _terminal_picture(picture.convert("RGB"))
        if old is not None:
            old.cleanup()  # type: ignore[union-attr]

    def _renderable(self) -> RenderableType:
        return Group(self._picture, self._bars) if self._picture else self._bars


def make_display(*, quiet: bool, preview: bool | None) -> Display:
    """
    Args:
        preview: whether pictures are shown on a terminal; None: where it has the colours for it.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        return Display(console)
    if not console.is_terminal or console.is_dumb_terminal:
        return LineDisplay(console)
    has_colours = (
        os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
        and console.color_system is not None
        and not console.no_color
    )
    wanted = has_colours if preview is None else preview
    # A terminal at stdout is asked what it can, and answers at stdin.
    can_be_asked = sys.stdin.isatty() or not sys.stdout.isatty()
    return BarDisplay(console, shows_pictures=wanted and can_be_asked)


def _terminal_picture(picture: Image.Image) -> RenderableType:
    """As the terminal can best: pixels (kitty, sixel), otherwise two in each cell."""
    # It says so where a terminal does not answer, while the display waits for what it draws.
    logging.getLogger("textual_image").addHandler(logging.NullHandler())
    logging.getLogger("textual_image").propagate = False
    # Importing it asks the terminal what it can, which only who wants pictures should wait for.
    from textual_image.renderable import HalfcellImage, SixelImage, TGPImage
    from textual_image.renderable import Image as BestImage

    # The protocols write to stdout, where files' names may be read by a program.
    of_pixels = (TGPImage, SixelImage)
    kind = BestImage if sys.stdout.isatty() and BestImage in of_pixels else HalfcellImage
    made: RenderableType = kind(picture, height=PREVIEW_ROWS, width="auto")
    return made


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _megabytes(count: Any) -> str:
    is_size = isinstance(count, int | float) and 0 <= count < 2**63
    return f"{count / 1e6:.0f} MB" if is_size else "? MB"
