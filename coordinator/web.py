"""How is a run watched in a browser? One page and its data, from this process, for this machine by default.

    /             the page: files of coordinator/page, nothing from another host
    /api/state    the overview as JSON (see overview.py)
    /metrics      the same for Prometheus
    /card.md      the model card of the committed state

Only GET and HEAD; nothing can be changed from here. The page may run nothing but its own script, frame
nothing and ask nobody else (Content-Security-Policy). A request whose Host is not one under which the page is
served gets nothing, so no page of another site can read it by rebinding its name to this machine.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from coordinator.errors import UsageError
from coordinator.exposition import CONTENT_TYPE, exposition
from coordinator.overview import Overview

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0  # a client that is slower than that is left
STOP_SECONDS = 5.0
MAX_REQUESTS = 64  # at one time; more are refused at once
_POLL_SECONDS = 0.1
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/monitor.css": ("monitor.css", "text/css; charset=utf-8"),
    "/monitor.js": ("monitor.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # innerHTML and its like throw, whatever the script says
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Reply:
    status: HTTPStatus
    content_type: str
    body: bytes
    file_name: str = ""  # to be saved under, where it is a download


class Latest:
    """What is shown at the moment. Thread-safe: the monitor sets it, requests read it."""

    def __init__(self, overview: Overview | None = None, card: Callable[[], str] = str) -> None:
        """`card` makes the model card of the present state; called when somebody asks for it."""
        self._overview: Overview = overview or {}
        self._card = card
        self._lock = threading.Lock()
        self._card_lock = threading.Lock()  # one at a time: of a long chain it takes a moment

    def set(self, overview: Overview, card: Callable[[], str] | None = None) -> None:
        with self._lock:
            self._overview, self._card = overview, card or self._card

    def get(self) -> Overview:
        with self._lock:
            return self._overview

    def card(self) -> str:
        with self._card_lock:
            return self._card()


def reply_to(path: str, latest: Latest) -> Reply:
    """What a GET of `path` gets."""
    path = path.partition("?")[0]
    if path in _FILES:
        name, content_type = _FILES[path]
        return Reply(HTTPStatus.OK, content_type, files("coordinator").joinpath("page", name).read_bytes())
    overview = latest.get()
    if path == "/api/state":
        body = json.dumps(overview, allow_nan=False, separators=(",", ":")).encode()
        return Reply(HTTPStatus.OK, "application/json", body)
    if path == "/metrics":
        return Reply(HTTPStatus.OK, CONTENT_TYPE, exposition(overview))
    if path == "/card.md":
        name = f"{overview['run']['name']}-round-{overview['state']['round']}.md"
        return Reply(HTTPStatus.OK, "text/markdown; charset=utf-8", latest.card().encode(), name)
    return Reply(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"nothing is here\n")


def is_own_host(header: str, served_at: str) -> bool:
    """Whether a Host header names an address of this machine rather than a name that another site chose."""
    host = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    host = host.removeprefix("[").removesuffix("]").lower()
    if host in ("localhost", served_at.lower(), socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class WebServer:
    """Has its port from the beginning, answers from `start` on; a context manager."""

    def __init__(self, host: str, port: int, latest: Latest) -> None:
        """Port 0: any. Raises UsageError when it cannot be had."""
        handler = type("Handler", (_Handler,), {"latest": latest, "served_at": host})
        try:
            self._server = _Server(host, port, handler)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot serve the page on {host} port {port}: {why}; choose another --web PORT or --web-host"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="web", daemon=True
        )

    @property
    def url(self) -> str:
        host, port = (str(part) for part in self._server.server_address[:2])
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def start(self) -> None:
        self._thread.start()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(STOP_SECONDS)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # whoever is slow is not waited for
    request_queue_size = 64

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request of %s failed: %s", client_address, sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    latest: Latest
    served_at: str
    timeout = REQUEST_SECONDS
    server_version, sys_version = "monitor", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if is_own_host(self.headers.get("Host", ""), self.served_at):
            reply = reply_to(self.path, self.latest)
        else:
            text = "this page is served under the address of its machine, not under this name\n"
            reply = Reply(HTTPStatus.MISDIRECTED_REQUEST, "text/plain; charset=utf-8", text.encode())
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        if reply.file_name:
            self.send_header("Content-Disposition", f'attachment; filename="{reply.file_name}"')
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (a name of http.server)
        logger.debug(format, *args)
