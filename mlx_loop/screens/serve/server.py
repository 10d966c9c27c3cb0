"""The process: sockets, threads, signals."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.server import get_system_fingerprint

from ...errors import UserError
from .comparing import Comparisons
from .desk import Desk
from .handler import Handler

# Connections at once, each with a thread.
MOST_CONNECTIONS = 256
_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\n\r\n"
    b'{"error": "too many connections: ask again later"}'
)

log = logging.getLogger("mlx_loop.serve")


class Server(ThreadingHTTPServer):
    """http.server's, which waits for the answers under way when it is closed.

    Args:
        desk: what serves requests; it ends with the server.
        address: host and port; port 0: any that is free.
    """

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, desk: Desk, address: tuple[str, int]):
        self.desk, self.comparisons = desk, Comparisons(desk.turns)
        self._places = threading.Semaphore(MOST_CONNECTIONS)
        # Connections that have asked nothing yet, as browsers open them in advance.
        self.waiting: set[socket.socket] = set()
        try:
            info = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family = info[0][0]
            handler: Callable[..., Any] = partial(
                Handler, desk, self.comparisons, system_fingerprint=get_system_fingerprint()
            )
            super().__init__((str(info[0][4][0]), int(info[0][4][1])), handler)
        except OSError as error:
            self._end()
            host, port = address
            raise UserError(
                f"cannot listen on {host} port {port}: {error.strerror or error}; give another "
                "--host or --port"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.sendall(_FULL)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def service_actions(self) -> None:
        self.desk.check()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection has failed", exc_info=True)

    def server_close(self) -> None:
        for connection in list(self.waiting):
            with suppress(OSError):  # It has closed itself.
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()
        self._end()

    def _end(self) -> None:
        self.comparisons.stop()
        self.desk.stop()


def serve(server: Server) -> int:
    """Serve until SIGTERM or Ctrl-C; then no more requests are taken, and those under way end.

    Returns:
        The exit status of that signal.
    """
    ended = 0

    def stop(signum: int, frame: Any) -> None:
        nonlocal ended
        ended = 128 + signum
        # The next one is not waited for.
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        log.warning("no more requests are taken; answers under way are finished first")
        threading.Thread(target=server.shutdown).start()

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in signals]
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    return ended
