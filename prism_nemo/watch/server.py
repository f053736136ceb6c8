"""The page's server: this machine only, reading only, five addresses.

Python's own server: the page is for one reader beside the run, and a framework would bring more to trust than it saves.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prism_nemo import report
from prism_nemo.errors import InputError
from prism_nemo.watch.state import Watched

PORT = 8265
_PORTS = 20  # that are tried, where one is taken
_HERE = Path(__file__).parent
_FILES = {
    "/": (_HERE / "page.html", "text/html; charset=utf-8"),
    "/page.js": (_HERE / "page.js", "text/javascript; charset=utf-8"),
    "/page.css": (_HERE / "page.css", "text/css; charset=utf-8"),
    "/report.css": (Path(report.__file__).parent / "page.css", "text/css; charset=utf-8"),
}
# Nothing from elsewhere, nothing inline, no frames: text of a model that got into the page as markup could do nothing.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Looks:
    """One look at a run serves all who ask within half a second."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._lock = watched, threading.Lock()
        self._kept: dict[str, tuple[float, bytes]] = {}

    def take(self, chosen: str | None) -> bytes:
        with self._lock:
            kept = self._kept.get(chosen or "")
            if kept is None or time.monotonic() - kept[0] > 0.5:
                body = json.dumps(self._watched.look(chosen), allow_nan=False).encode()
                kept = (time.monotonic(), body)
                self._kept = {chosen or "": kept}  # names come from outside: one is kept, not all
            return kept[1]


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version, timeout = "prism-nemo", "", 20
    protocol_version = "HTTP/1.1"

    def __init__(self, looks: _Looks, hosts: frozenset[str], *arguments: Any) -> None:
        self._looks, self._hosts = looks, hosts
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        host = (self.headers.get("Host") or "").lower()
        address = urlsplit(self.path)
        # A page of another site that let its name point here (DNS rebinding) still says its own name.
        if self._hosts and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            self._send(
                HTTPStatus.MISDIRECTED_REQUEST, b"this server is asked for by another name\n", "text/plain", body
            )
        elif address.path == "/state.json":
            chosen = parse_qs(address.query).get("run", [""])[0]
            self._send(HTTPStatus.OK, self._looks.take(chosen or None), "application/json", body)
        elif address.path in _FILES:
            path, kind = _FILES[address.path]
            self._send(HTTPStatus.OK, path.read_bytes(), kind, body)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such page\n", "text/plain", body)

    def _send(self, code: HTTPStatus, content: bytes, kind: str, body: bool) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal belongs to the reader."""


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def make_server(watched: Watched, host: str = "127.0.0.1", port: int = PORT) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; its `server_port` says where.

    Args:
        watched: What it shows.
        host: Address to listen at. Another than this machine's own lets everybody in the network read the run.
        port: 0 for any; where it is taken, the next free one is used.

    Raises:
        InputError: If the host is no address of this machine, or all ports that were tried are taken.
    """
    # Asked for from elsewhere, the name by which this machine is known there is not ours to guess.
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]"}) if is_local(host) else frozenset[str]()
    handler = partial(_Handler, _Looks(watched), hosts)
    for one in [port] if port == 0 else range(port, min(port + _PORTS, 65536)):
        try:
            server = (_Server6 if ":" in host else ThreadingHTTPServer)((host, one), handler)
        except OSError as error:
            problem = error
            continue
        server.daemon_threads = True
        return server
    raise InputError(f"--host {host} --port {port}: cannot listen there ({problem.strerror or problem}); give others")


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
