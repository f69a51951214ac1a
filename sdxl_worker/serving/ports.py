"""Where the worker serves HTTP. The ports are open before the models load, which takes a while."""

import socket

from sdxl_worker.errors import ModelError
from sdxl_worker.settings import Settings

# After which a connection is dropped whose client takes nothing of its answer.
STUCK_MILLISECONDS = 60_000


def open_ports(settings: Settings) -> list[socket.socket]:
    """
    Raises:
        ModelError: one is taken, or not for this user.
    """
    ports = {"PORT": settings.http_port}
    if settings.port_health not in (None, settings.http_port):
        ports["PORT_HEALTH"] = settings.port_health
    return [_open(name, port) for name, port in ports.items()]


def _open(name: str, port: int) -> socket.socket:
    try:
        # A container's ports are reached from outside of it.
        opened = socket.create_server(("0.0.0.0", port), backlog=2048)  # noqa: S104
    except OSError as error:
        raise ModelError(
            f"{name}: {port} cannot be used: {error.strerror}; choose another port"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux. Its connections inherit it
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_MILLISECONDS)
    return opened
