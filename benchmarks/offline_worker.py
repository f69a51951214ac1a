"""Runs a worker on a machine without network, where the SDK's network check would end it.

That check connects to a public name server. Here it connects to this process, so that all checks
run and take their time; nothing else differs.

    python -m benchmarks.offline_worker handler.py
"""

import asyncio
import runpy
import sys
from typing import Any

NAME_SERVER = ("8.8.8.8", 53)


def answer_network_check() -> None:
    connect = asyncio.open_connection

    async def connect_here(host: Any = None, port: Any = None, **options: Any) -> Any:
        if (host, port) == NAME_SERVER:
            server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            host, port = server.sockets[0].getsockname()
        return await connect(host, port, **options)

    asyncio.open_connection = connect_here


if __name__ == "__main__":
    answer_network_check()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
