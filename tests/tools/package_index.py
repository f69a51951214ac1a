"""Package indexes on 127.0.0.1 with tiny wheels, and pip that knows no other ones."""

import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class _Listing(SimpleHTTPRequestHandler):
    """A folder's listing, with a link to each file, is what pip expects of an index."""

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of an index of the wheels in `folder`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Listing, directory=folder)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def add_wheel(
    folder: Path, name: str, version: str, tags: str = "py3-none-any", needs: Sequence[str] = ()
) -> None:
    """Puts a wheel that can be installed, and holds nothing, into an index."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    wheel = ["Wheel-Version: 1.0", "Generator: tests", "Root-Is-Purelib: true", f"Tag: {tags}"]
    (folder / name).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name / f"{stem}-{tags}.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "\n".join(wheel) + "\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def environment(**variables: str) -> dict[str, str]:
    """Without pip's settings of this machine, and those of a `make` that runs the tests."""
    left_out = ("PIP_", "MAKE", "MFLAGS", "VENV", "TORCH_INDEX")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **inherited,
        "PATH": programs,  # `pip` is that of these tests
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_CACHE_DIR": "1",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
