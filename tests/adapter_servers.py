"""Servers on this machine in the place of the Hub, of Civitai and of the storage that both redirect
to, with faults. They note what they are asked.
"""

import asyncio
import contextlib
import hashlib
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from aiohttp import web
from safetensors.numpy import save


def adapter(size: int = 1000, seed: int = 0) -> bytes:
    """A safetensors file with a tensor of so many bytes; others for other seeds."""
    data = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)
    return save({"lora_unet_x.lora_down.weight": data}, {"ss_network_dim": "4"})


@dataclass(frozen=True)
class Fault:
    """What happens to one request for a file."""

    status: int | None = None
    """Answered in place of the file."""
    drop_after: int | None = None
    """Bytes after which the connection ends."""
    stall_after: int | None = None
    """Bytes after which nothing comes."""
    is_chunked: bool = False
    """No length is told."""
    endless: bool = False
    """Zeros follow, without end."""
    length: int | None = None
    """Told in place of the right one."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Server:
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, as the next three."""
    redirects: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    etags: bool = True
    seen: list[web.BaseRequest] = field(default_factory=list)
    open: int = 0

    def paths(self) -> list[str]:
        return [request.path_qs for request in self.seen]

    def tokens(self) -> list[str | None]:
        return [request.headers.get("Authorization") for request in self.seen]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(request)
        self.open += 1
        try:
            return await self._answer(request)
        finally:
            self.open -= 1

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        fault = self.faults[path].pop(0) if self.faults[path] else Fault()
        if fault.status is not None:
            return web.Response(status=fault.status, headers=fault.headers)
        if path in self.refusals:
            status, headers = self.refusals[path]
            return web.Response(status=status, headers=headers)
        if path in self.redirects:
            return web.Response(status=302, headers={"Location": self.redirects[path]})
        if path not in self.files:
            return web.Response(status=404)
        content = self.files[path]
        etag = f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
        headers = {"ETag": etag} if self.etags else {}
        if self.etags and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers=headers)
        status, body = 200, content
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if match and request.headers.get("If-Range", etag) == etag:
            start, end = int(match[1]), len(content)
            status, body = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
        response = web.StreamResponse(status=status, headers={**headers, **fault.headers})
        if not (fault.is_chunked or fault.endless):
            response.content_length = len(body) if fault.length is None else fault.length
        await response.prepare(request)
        sent = fault.drop_after if fault.drop_after is not None else fault.stall_after
        await response.write(body[:sent])
        if fault.drop_after is not None and request.transport:
            request.transport.close()
        while fault.endless:
            await response.write(bytes(100_000))
        while fault.stall_after is not None and request.transport:
            await asyncio.sleep(0.01)
        return response


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    runner = web.ServerRunner(web.Server(server.answer), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
