"""Bytes from the network to the disk: several files at once, resumed, verified, with progress.

huggingface_hub 2.4.0 knows the hub's addresses, headers and errors. Its own `hf_hub_download`
removes a partial file when it fails, and so cannot resume it in a later run; its faster protocol,
Xet, is verified no earlier either. Plain HTTP with ranges can be resumed and verified.
"""

import contextlib
import errno
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from builder.download_weights import DownloadError

STREAMS = 4
TIMEOUT_SECONDS = 30.0
# Between tries after failures that may pass; a try that received something begins them anew.
RETRY_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)
# Between two lines of a build's log; a terminal is updated continuously.
LOG_INTERVAL_SECONDS = 10.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Download:
    """One file to fetch."""

    url: str
    """Its query may hold a token and is never printed."""
    path: str
    """Where it goes, relative to the model's folder."""
    size_bytes: int | None
    sha256: str | None
    stored_as: str
    """The file that it becomes part of; where that exists, there is nothing to fetch."""
    etag: str | None = None
    as_published: bool = False
    """Its numbers keep their format; those of other safetensors are stored as fp16."""

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the file in a later run."""
        return {
            "url": without_query(self.url),
            "path": self.path,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "etag": self.etag,
        }

    def bytes_in(self, folder: Path) -> int:
        """How much of the file is there, also while another thread is completing it."""
        target = folder / self.path
        for path in (_incomplete(target), target):  # in the order in which it moves
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size
        return (self.size_bytes or 0) if (folder / self.stored_as).exists() else 0


class ProgressBar:
    """How much of all files has come: a bar in a terminal, a line now and then in a log."""

    def __init__(self, total_bytes: int, initial_bytes: int) -> None:
        self.total_bytes, self.initial_bytes = total_bytes, initial_bytes
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, done_bytes: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if not (self.terminal or last or now - self.shown >= LOG_INTERVAL_SECONDS):
            return
        self.shown = now
        line = tqdm.format_meter(
            done_bytes,
            self.total_bytes,
            now - self.started,
            initial=self.initial_bytes,
            ncols=80,
            ascii=True,
            unit="B",
            unit_scale=True,
        )
        end = "\n" if last or not self.terminal else ""
        print("\r" * self.terminal + line, end=end, file=sys.stderr, flush=True)


def without_query(url: str) -> str:
    """What may be printed of an address: queries and user names can be secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def headers_for(url: str) -> dict[str, str]:
    """The hub's, with HF_TOKEN, only for the hub. A compressed transfer could not be resumed."""
    headers = {"Accept-Encoding": "identity"}
    if urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc:
        headers |= build_hf_headers()
    return headers


def patiently(
    ask: Callable[[], Answer],
    what: str,
    *,
    progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> Answer:
    """What `ask` returns, tried again after failures that may pass.

    Args:
        what: names what is asked for, in messages.
        progress: a number that grows while something is received.

    Raises:
        DownloadError: it failed permanently.
    """
    stop = stop or threading.Event()
    failures = 0
    while True:
        before = progress()
        try:
            return ask()
        except OfflineModeIsEnabled as error:
            raise DownloadError(f"{what}: HF_HUB_OFFLINE is set: unset it") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            failures = 1 if progress() > before else failures + 1
            if not _may_pass(error) or failures > len(RETRY_WAITS_SECONDS) or stop.is_set():
                raise DownloadError(f"{what}: {_reason(error)}") from error
            print(f"{what}: {_short(error)}; trying again", file=sys.stderr, flush=True)
            stop.wait(RETRY_WAITS_SECONDS[failures - 1])


def download_all(files: Sequence[Download], folder: Path) -> None:
    """Fetch what is not there yet. What is fetched stays when another file fails.

    Raises:
        DownloadError: a file cannot be fetched, is not as expected, or does not fit on the disk.
    """
    stop = threading.Event()
    progress = ProgressBar(
        sum(file.size_bytes or 0 for file in files), sum(file.bytes_in(folder) for file in files)
    )
    # The largest begin first, so that they do not end alone.
    by_size = sorted(files, key=lambda file: -(file.size_bytes or 0))
    with ThreadPoolExecutor(STREAMS) as pool:
        pending = {pool.submit(_download, file, folder, stop) for file in by_size}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress.show(sum(file.bytes_in(folder) for file in files), last=not pending)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(file: Download, folder: Path, stop: threading.Event) -> None:
    target = folder / file.path
    if target.exists() or (folder / file.stored_as).exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    incomplete = _incomplete(target)
    patiently(
        lambda: _receive(file, incomplete, stop),
        without_query(file.url),
        progress=lambda: incomplete.stat().st_size if incomplete.exists() else 0,
        stop=stop,
    )
    _verify(file, incomplete)
    incomplete.rename(target)


def _receive(file: Download, incomplete: Path, stop: threading.Event) -> None:
    """Append what is missing to the file, or begin anew where the server knows no ranges."""
    there = incomplete.stat().st_size if incomplete.exists() else 0
    if file.size_bytes is not None and there >= file.size_bytes > 0:
        return
    headers = headers_for(file.url)
    if there and file.size_bytes is not None:
        headers["Range"] = f"bytes={there}-"
    with get_session().stream(
        "GET", file.url, headers=headers, timeout=TIMEOUT_SECONDS
    ) as response:
        hf_raise_for_status(response)
        try:
            with incomplete.open("ab" if response.status_code == 206 else "wb") as output:
                # Chunks as they come: gathering them into larger ones took three times as long.
                for chunk in response.iter_raw():
                    output.write(chunk)
                    output.flush()
                    if stop.is_set():
                        raise DownloadError(f"{without_query(file.url)}: stopped")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DownloadError(
                    f"the disk of {incomplete.parent} is full: make room and run the same command "
                    "again, which goes on where this one ended"
                ) from error
            raise


def _verify(file: Download, path: Path) -> None:
    problem = None
    size_bytes = path.stat().st_size
    if file.size_bytes is not None and size_bytes != file.size_bytes:
        problem = f"it has {size_bytes} bytes, and should have {file.size_bytes}"
    elif file.sha256 is not None and (sha256 := file_sha256(path)) != file.sha256:
        problem = f"its SHA-256 is {sha256}, and should be {file.sha256}"
    if problem:
        path.unlink()
        raise DownloadError(
            f"{without_query(file.url)}: {problem}. It was damaged on its way or changed at its "
            "source; it was removed, and the same command fetches it again"
        )


def _incomplete(target: Path) -> Path:
    return target.with_name(target.name + ".incomplete")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError) and not isinstance(
        error, httpx2.UnsupportedProtocol
    )


def _short(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return f"{type(error).__name__} {error}".strip()


def _reason(error: Exception) -> str:
    """What happened and what to do. The libraries' own texts would show the address's query."""
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            return (
                f"not found, or access denied (HTTP {status}). If the model is gated or private, "
                "accept its conditions on its page and set HF_TOKEN to a token that may read it"
            )
        if status == 404:
            return "not found (HTTP 404)"
        return f"the server answers HTTP {status}; {_AGAIN}"
    if isinstance(error, httpx2.TransportError):
        return f"no answer ({_short(error)}). Check the network; {_AGAIN}"
    return _short(error)


_AGAIN = "the same command goes on where this one ended"
