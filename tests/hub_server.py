"""A Hugging Face hub on this machine: the routes that the weights are fetched by, with faults."""

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
# What the hub keeps on the server of large files, with digests.
LARGE = (".safetensors", ".zip")


@dataclass(frozen=True)
class Fault:
    """What happens to one request for a file."""

    status: int | None = None
    """Answered in place of the file."""
    drop_after: int | None = None
    """Bytes after which the connection ends."""
    content: bytes | None = None
    """Sent in place of the right bytes."""


@dataclass(frozen=True)
class Seen:
    path: str
    headers: dict[str, str]
    sent: int
    """Bytes of the body."""


@dataclass
class Hub:
    """Two servers, as the hub has them: its own, and that of the large files."""

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By org/name: the files, by their names."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By their paths: what another web server might serve."""
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """By the end of a path, for the requests to come."""
    gated: set[str] = field(default_factory=set)
    """Repositories that want the token "secret"."""
    seen: list[Seen] = field(default_factory=list)
    large_files: str = ""

    def requests(self, name: str) -> list[Seen]:
        """What was sent of a file: redirects are left out."""
        return [request for request in self.seen if request.path.endswith(name) and request.sent]

    def fault(self, path: str) -> Fault | None:
        for name, faults in self.faults.items():
            if path.endswith(name) and faults:
                return faults.pop(0)
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    servers = []
    for kind in (_Hub, _LargeFiles):
        handler = type(kind.__name__, (kind,), {"hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.large_files = (
        f"http://127.0.0.1:{server.server_address[1]}" for server in servers
    )
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path: str, content: bytes) -> None:
        """The file, or from where the range begins, and what its next fault makes of it."""
        fault = self.hub.fault(path) or Fault()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        content = fault.content or content
        status, headers = 200, {"ETag": etag, "Accept_Ranges": "bytes"}
        body = content
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            body, status = content[start:stop], 206
            headers["Content_Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
        sent = len(body) if fault.drop_after is None else fault.drop_after
        if fault.status is not None:
            sent = 0
        self.hub.seen.append(Seen(path, dict(self.headers), sent))
        if fault.status is not None:
            self.answer(fault.status)
        elif fault.drop_after is None:
            self.answer(status, body, **headers)
        else:
            self.answer(status, b"", **{**headers, "Content_Length": str(len(body))})
            self.wfile.write(body[:sent])
            self.close_connection = True


class _Hub(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in self.hub.files:
            return self.send_file(path, self.hub.files[path])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.send_info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_repo_file(path, *match.groups())
        return self.answer(404)

    def refused(self, repo: str, revision: str) -> bool:
        allowed = self.headers.get("Authorization") == "Bearer secret"
        if repo not in self.hub.repos:
            self.answer(401)  # as for private ones: it does not tell
        elif repo in self.hub.gated and not allowed:
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        elif revision == "missing":
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def send_info(self, repo: str, revision: str) -> None:
        path = unquote(self.path)
        fault = self.hub.fault(urlsplit(path).path)
        self.hub.seen.append(Seen(path, dict(self.headers), 0))
        if fault is not None and fault.status is not None:
            return self.answer(fault.status)
        if self.refused(repo, revision):
            return None
        siblings = []
        for name, content in self.hub.repos[repo].items():
            sibling: dict[str, Any] = {"rfilename": name}
            if "blobs=" in self.path:
                sibling |= {"size": len(content), "blobId": "0" * 40}
                if name.endswith(LARGE):
                    sha256 = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else COMMIT
        info = {"id": repo, "sha": commit, "siblings": siblings}
        return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_repo_file(self, path: str, repo: str, revision: str, name: str) -> None:
        if self.refused(repo, revision):
            return None
        content = self.hub.repos[repo].get(name)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if name.endswith(LARGE):
            self.hub.seen.append(Seen(path, dict(self.headers), 0))
            return self.answer(302, Location=f"{self.hub.large_files}/{repo}/{name}?signature=s")
        return self.send_file(path, content)


class _LargeFiles(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        owner, name, file = path.lstrip("/").split("/", 2)
        self.send_file(path, self.hub.repos[f"{owner}/{name}"][file])
