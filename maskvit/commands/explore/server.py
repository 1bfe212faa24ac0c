"""The page over HTTP, on this machine alone: a thin layer that reads requests, asks `answers.Explorer` and writes JSON."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from maskvit.commands.explore.answers import Explorer

HOST = "127.0.0.1"
LONGEST = 2**20  # bytes of a request's body


class Server(ThreadingHTTPServer):
    """A server that is bound at once and answers when it has an explorer."""

    daemon_threads = True
    explorer: Explorer
    page: str

    def __init__(self, port: int):
        """Raises OSError where the port is taken; 0 takes any that is free."""
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "taken" if error.errno == errno.EADDRINUSE else "not allowed to you"
                raise OSError(f"port {port} is {why}: give another with --port, or 0 for any that is free") from error
            raise

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """GET /, /picture, /token; POST /draw, /rebuild."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, a sample, or a token of one."""
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/":
            if self._from_here():
                self._send(200, self.server.page.encode("utf-8"), "text/html; charset=utf-8")
            return
        explorer = self.server.explorer
        self._answer(parts.path, {"/picture": explorer.picture, "/token": explorer.token}, query)

    def do_POST(self) -> None:
        """A mask, or what is rebuilt under one."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST:
            self.close_connection = True
            self._json(413, {"error": "a request has a length, and not more than 1 MiB"})
            return
        body = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":  # what a page of another site can send without asking
            self._json(415, {"error": "requests are application/json"})
            return
        try:
            query = json.loads(body)
        except ValueError:
            query = None
        if not isinstance(query, dict):
            self._json(400, {"error": "a request is a JSON object"})
            return
        explorer = self.server.explorer
        self._answer(urlsplit(self.path).path, {"/draw": explorer.draw, "/rebuild": explorer.rebuild}, query)

    def _answer(self, path: str, known: dict[str, Callable[..., Any]], query: dict[str, Any]) -> None:
        """Call what `path` names with the query's values, numbers as numbers."""
        if not self._from_here():
            return
        if path not in known:
            self._json(404, {"error": f"there is no {path}"})
            return
        try:
            arguments = {name: _value(name, value) for name, value in query.items()}
            self._json(200, known[path](**arguments))
        except (ValueError, TypeError) as error:
            self._json(400, {"error": str(error)})

    def _from_here(self) -> bool:
        """Whether the browser asked for this machine by name: pages of other sites that have their name point here are refused."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self._json(403, {"error": f"ask for {self.server.address}"})
        return host in (HOST, "localhost")

    def _json(self, status: int, answer: Any) -> None:
        self._send(status, json.dumps(answer).encode("utf-8"), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not told."""


TEXTS = ("strategy", "budget", "masked")


def _value(name: str, value: Any) -> str | int:
    """A query's value as the text or the whole number that it must be."""
    if name in TEXTS:
        return str(value)
    try:
        return int(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} is {value!r}, which is no whole number") from None
