# SPDX-License-Identifier: Apache-2.0
"""The sockets: requests read within limits of size and time, answers sent, and an end that finishes what was begun."""

import io
import logging
import socket
import socketserver
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from email.errors import FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, BinaryIO

from trl_sipo.annotation.application import Application
from trl_sipo.annotation.messages import SECURITY_HEADERS, Refused, Request, Response
from trl_sipo.annotation.rate_limits import address_key

logger = logging.getLogger(__name__)

_CHUNK = 2**16
_NO_HEADER = (MissingHeaderBodySeparatorDefect, FirstHeaderLineIsContinuationDefect)
_SINGLE_HEADERS = frozenset(
    ("content-length", "content-type", "cookie", "host", "origin", "transfer-encoding", "x-csrf-token")
)
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class TransportLimits:
    """What a connection may cost.

    Args:
        body_bytes: Of a request; an answer has some hundred.
        head_bytes: Of its first line and headers together.
        idle_seconds: Between two requests of a connection.
        read_seconds: For the whole of a request, from its first byte on, however slowly they come.
        answer_seconds: For an answer to be taken, and more for a long one:
        slowest_reader: so many bytes a second.
        connections: At once, of all.
        connections_per_address: At once, of one address; a browser opens six.
    """

    body_bytes: int = 8192
    head_bytes: int = 16384
    idle_seconds: float = 20.0
    read_seconds: float = 10.0
    answer_seconds: float = 10.0
    slowest_reader: int = 32768
    connections: int = 512
    connections_per_address: int = 192


class TooLong(Exception):
    """A request's head is longer than allowed."""


class _RequestBytes(io.RawIOBase):
    """What comes in by a socket, with a time limit for a whole request, and not for each of its bytes."""

    def __init__(self, connection: socket.socket, limits: TransportLimits):
        self._connection, self._limits = connection, limits
        self.expect_request()

    def expect_request(self) -> None:
        """Wait for the first byte of a request; from then on the time for all of it runs."""
        self._is_idle, self._deadline = True, time.monotonic() + self._limits.idle_seconds
        self._left = self._limits.head_bytes

    def expect_body(self, length: int) -> None:
        """So much more may come, in the time that is left."""
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the request took too long")
        if self._left <= 0:
            raise TooLong
        self._connection.settimeout(remaining)
        count = self._connection.recv_into(memoryview(buffer)[: min(len(buffer), self._left)])
        self._left -= count
        if self._is_idle:
            self._is_idle, self._deadline = False, time.monotonic() + self._limits.read_seconds
        return count


class _Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    request_version = default_request_version = "HTTP/1.0"  # of requests that do not say: they get a head too
    disable_nagle_algorithm = True
    server: "AnnotationServer"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._input = _RequestBytes(self.connection, self.server.limits)
        self.rfile = io.BufferedReader(self._input, _CHUNK)

    def handle_one_request(self) -> None:
        """Read a request, and answer it; a connection that breaks, or takes too long, is closed without a word."""
        self._input.expect_request()
        try:
            self._read_and_answer()
        except OSError:  # timeouts among them
            self.close_connection = True
        if self.server.is_stopping:
            self.close_connection = True

    def _read_and_answer(self) -> None:
        try:
            super().handle_one_request()
        except TooLong:
            self._send_error(Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request is too long."))

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server wants
        self._respond()

    do_POST = do_GET  # noqa: N815

    def handle_expect_100(self) -> bool:
        """Refuse to say "go on" before anything was checked; no browser asks."""
        self._send_error(Refused(HTTPStatus.EXPECTATION_FAILED, "Send the request as a whole."))
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server says of requests that it cannot read; in our form, with nothing of the request in it."""
        self._send_error(Refused(HTTPStatus(code), HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: lines of requests could hold a token that somebody pasted into the wrong place."""

    def _respond(self) -> None:
        try:
            request = self._request()
        except Refused as refusal:
            self._send_error(refusal)
            return
        started = time.monotonic()
        response = self.server.application.respond(request)
        spent = 1000 * (time.monotonic() - started)
        # Of the path what is known of it: somebody may have pasted a token there.
        route = self.server.application.route_of(request.path)
        logger.debug("%s %s %d, %.0f ms", request.method, route, response.status, spent)
        self._send(response)

    def _request(self) -> Request:
        """The request, with its body.

        Raises:
            Refused: A line that is no header, a header in two lines, or one that counts and stands twice, all of which
                proxies and servers read differently; or a body of unknown, or of too great a length.
        """
        is_folded = any(mark in value for value in self.headers.values() for mark in "\r\n")
        if is_folded or any(isinstance(defect, _NO_HEADER) for defect in self.headers.defects):
            raise Refused(HTTPStatus.BAD_REQUEST, "The request has a line that is no header.")
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            if name.lower() in headers and name.lower() in _SINGLE_HEADERS:
                raise Refused(HTTPStatus.BAD_REQUEST, "A header stands twice.")
            headers.setdefault(name.lower(), value)
        if not self.path.startswith("/") or "transfer-encoding" in headers:
            raise Refused(HTTPStatus.BAD_REQUEST, "The request has a form that is not taken here.")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or (self.command == "GET" and int(length[:9])):
            raise Refused(HTTPStatus.BAD_REQUEST, "The request's length makes no sense.")
        if len(length) > 9 or int(length) > self.server.limits.body_bytes:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
        return Request(
            method=self.command,
            path=self.path.partition("?")[0],
            headers=headers,
            body=self._body(int(length)),
            address=self.client_address[0],
            local_address=self.connection.getsockname()[0],
        )

    def _body(self, length: int) -> bytes:
        self._input.expect_body(length)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the request ended in the middle")
        return body

    def _send(self, response: Response) -> None:
        stream = io.BytesIO(response.content) if isinstance(response.content, bytes) else response.content
        with stream:
            length = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            self.send_response_only(response.status)
            headers = {"Content-Type": response.content_type, "Content-Length": str(length), **SECURITY_HEADERS}
            if self.close_connection or self.server.is_stopping:
                headers["Connection"] = "close"
            for name, value in {**headers, **response.headers}.items():
                self.send_header(name, value)
            self._send_all(stream, length)

    def _send_all(self, stream: BinaryIO, length: int) -> None:
        """The head that was put together, and the body; in all not slower than the slowest reader that is allowed."""
        limits = self.server.limits
        deadline = time.monotonic() + limits.answer_seconds + length / limits.slowest_reader
        self.connection.settimeout(limits.answer_seconds)
        self.end_headers()
        while chunk := stream.read(_CHUNK):
            self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            self.wfile.write(chunk)

    def _send_error(self, refusal: Refused) -> None:
        """Refuse a request that was not read to its end: what follows on the connection may be part of it."""
        self.close_connection = True
        self._send(refusal.response())
        self._drain()

    def _drain(self) -> None:
        """Read a little of what is still coming: closed with unread bytes, a connection takes the answer with it."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.5)
        for _ in range(8):
            if not self.connection.recv(_CHUNK):
                return


class AnnotationServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, and gives each connection a thread.

    Args:
        host, port: To listen on; port 0 takes a free one.
        limits: What a connection may cost.

    Raises:
        OSError: It cannot listen there.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, limits: TransportLimits | None = None):
        self.limits = limits or TransportLimits()
        self.is_stopping = False
        self.application: Application  # set before it serves; it needs the port
        self._lock = threading.Lock()
        self._open: dict[Any, str] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def port(self) -> int:
        """That is listened on."""
        return self.server_address[1]

    @property
    def num_connections(self) -> int:
        """That are open."""
        with self._lock:
            return len(self._open)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, unless there are too many."""
        key = address_key(client_address[0])
        with self._lock:
            is_full = (
                len(self._open) >= self.limits.connections
                or Counter(self._open.values())[key] >= self.limits.connections_per_address
            )
            if not is_full:
                self._open[request] = key
        if is_full:
            logger.warning("Too many connections; one was refused")
            request.setblocking(False)
            request.send(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a connection; that it broke is nothing to log."""
        logger.exception("A connection failed")

    def finish(self, seconds: float = 10.0) -> bool:
        """Take no more requests, and wait for those that were begun; whether all of them were finished in time.

        `serve_forever` must have ended, or be about to. Connections that wait for a request are closed; of one whose
        request has arrived, the request is still read.
        """
        self.is_stopping = True
        self.server_close()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                waiting = list(self._open)
            if not waiting:
                return True
            for connection in waiting:
                with suppress(OSError):  # it is closed by now
                    connection.shutdown(socket.SHUT_RD)
            time.sleep(0.05)
        return False
