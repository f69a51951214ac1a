"""`make endpoint`: the endpoint and its workers in the terminal, until Ctrl-C."""

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from local_endpoint.server import Options, Server
from local_endpoint.workers import EndpointError

FOLLOW_SECONDS = 0.2
PORT_MAX = 65535


def main() -> int:
    """Run the endpoint and return the exit status."""
    try:
        options = _options(sys.argv[1:])
        return asyncio.run(_serve(options))
    except EndpointError as error:
        print(f"The endpoint has stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # so early that nothing was started


def _options(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m local_endpoint",
        description="A stand-in for a Runpod Serverless endpoint on 127.0.0.1, for development and "
        "tests. Production runs on Runpod itself.",
    )
    defaults = Options()
    parser.add_argument("--port", default="8000", help="0 for a free one (default: 8000)")
    parser.add_argument("--workers", default="1", help="worker processes (default: 1)")
    parser.add_argument("--endpoint-id", default=defaults.endpoint_id)
    parser.add_argument("--api-key", default=defaults.api_key)
    parser.add_argument(
        "--allow-origin",
        metavar="ORIGIN",
        help="of pages from elsewhere whose calls are answered (CORS); null: a page from a file",
    )
    parser.add_argument(
        "command", nargs="*", help="after --: the worker's command (default: python handler.py)"
    )
    parsed = parser.parse_args(arguments)
    return Options(
        worker_command=parsed.command or defaults.worker_command,
        workers=_integer("WORKERS", parsed.workers, 1, 64),
        port=_integer("PORT", parsed.port, 0, PORT_MAX),
        endpoint_id=parsed.endpoint_id,
        api_key=parsed.api_key,
        record_limit=0,
        allow_origin=parsed.allow_origin,
    )


def _integer(name: str, text: str, minimum: int, maximum: int) -> int:
    if not text.isdecimal() or not minimum <= int(text) <= maximum:
        raise EndpointError(f"{name}: must be an integer from {minimum} to {maximum}; got {text!r}")
    return int(text)


async def _serve(options: Options) -> int:
    server = Server(options)
    stop_asked = asyncio.Event()

    def stop() -> None:
        if stop_asked.is_set():
            server.pool.kill()  # asked twice: do not wait
        stop_asked.set()

    loop = asyncio.get_running_loop()
    # The workers are in process groups of their own: the terminal's signals do not reach them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)

    follower = asyncio.create_task(_follow(server))
    try:
        await server.start()
        print(_welcome(server), flush=True)
        announcer = asyncio.create_task(_announce(server))
        await server.run(stop_asked.wait)
        announcer.cancel()
        print("Stopping the workers.", flush=True)
    finally:
        await server.stop()
        follower.cancel()
    return 0


def _welcome(server: Server) -> str:
    options = server.options
    body = shlex.quote('{"input": {"prompt": "a red circle on a blue background"}}')
    return f"""\
A stand-in for a Runpod endpoint, for development and tests; production runs on Runpod itself.
{server.url} (Ctrl-C stops it)

A page to draw with: {server.page_url}

curl -X POST {server.url}/runsync -H 'Content-Type: application/json' \
-H 'Authorization: Bearer {options.api_key}' -d {body}
"""


async def _announce(server: Server) -> None:
    with contextlib.suppress(EndpointError):
        await server.wait_until_ready()
        print(f"Ready: {len(server.pool.workers)} worker(s) ask for jobs.", flush=True)


async def _follow(server: Server) -> None:
    """Print what the workers print, line by line."""
    offsets: dict[Path, int] = {}
    while True:
        for path in sorted(server.log_dir.glob("*.log")):
            with path.open("rb") as log:
                log.seek(offsets.get(path, 0))
                for line in log:
                    if not line.endswith(b"\n"):
                        break
                    offsets[path] = offsets.get(path, 0) + len(line)
                    text = line.decode("utf-8", errors="replace").rstrip()
                    print(f"[{path.stem}] {text}", flush=True)
        await asyncio.sleep(FOLLOW_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
