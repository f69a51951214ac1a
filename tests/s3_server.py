"""A real S3 server for tests: rclone's, which checks every signature, as a process of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "AKIDEXAMPLE", "secret-hunter2"


@dataclass(frozen=True)
class S3Server:
    url: str
    folder: Path
    """A folder in it is a bucket, and holds its objects under their keys."""


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    # pip puts it beside Python; not every way to run the tests has that folder on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    rclone = shutil.which("rclone", path=path)
    assert rclone, "no rclone: install requirements-dev.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", ""]
    command += ["--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}"]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", folder)
    finally:
        process.kill()
        process.wait()
