# SPDX-License-Identifier: Apache-2.0
"""A scorer behind HTTP: each message is the JSON body of a POST request, media in it as base64."""

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from trl_sipo.errors import ConfigurationError, RewardError
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.outside.media_encoding import as_data
from trl_sipo.rewards.outside.protocol import MAX_ANSWER_BYTES, Unanswered, error_message, parse_answer, shown

PREFIXES = ("http://", "https://")
_READ_AT_ONCE = 2**16
_URL = re.compile(r"[!-~]*")  # what http.client sends: of the rest it complains with all of the address
_HEADER_NAME, _HEADER_VALUE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"), re.compile(r"[\t -~\xa0-\xff]*")


class HTTPTransport:
    """Carries messages to a server and back, one connection for each.

    Redirections are not followed, and proxies of the environment are not used.

    Args:
        url: Of the scorer. A user and password in it are refused: they would be seen in logs.
        headers: Sent with every message, beside `Content-Type`.
        token_env: Name of a variable of the environment whose value is sent as a bearer token.

    Raises:
        ConfigurationError: The URL has no host or holds a password, the variable is not set, or a header, or the value
            of the variable, cannot be sent.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, token_env: str | None = None):
        self._url = _checked(url)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if token_env is not None:
            if not os.environ.get(token_env):
                raise ConfigurationError(f"`token_env` names the variable {token_env!r}, which is not set.")
            self._headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        _check_headers(self._headers, token_env)
        # Without a query, in which there may be a key.
        self.name = self._url._replace(query="", fragment="").geturl()

    def samples(self, media: Sequence[Media], prompts: Sequence[str], frame_rate: float) -> list[dict[str, Any]]:
        """The samples of a message, media in them."""
        return [as_data(medium, prompt, frame_rate) for medium, prompt in zip(media, prompts, strict=True)]

    def exchange(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            Unanswered: The server cannot be reached, breaks off, takes too long, or has a fault (status 5xx).
            RewardError: It refuses the message (4xx), or answers what is no answer.
        """
        status, body = self._post(json.dumps(request).encode(), timeout)
        if status >= 500:
            raise Unanswered(f"it answered with status {status}: {_reason(body)}")
        if status != 200:
            raise RewardError(f"it answered with status {status}: {_reason(body)}")
        return parse_answer(body, request)

    def close(self) -> None:
        """There is nothing to close."""

    def _post(self, content: bytes, timeout: float) -> tuple[int, bytes]:
        end = time.monotonic() + timeout
        secure = self._url.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(self._url.hostname, self._url.port, timeout=timeout)
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        too_late = f"it did not answer within {timeout:g} s"
        try:
            connection.connect()
            with _cut_off(connection.sock, end):
                connection.request("POST", target, content, self._headers)
                response = connection.getresponse()
                body = _read(response)
            if time.monotonic() >= end:  # an answer of no announced length looks whole where it was cut off
                raise TimeoutError
            return response.status, body
        except (OSError, http.client.HTTPException, Unanswered) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= end:
                raise Unanswered(too_late) from error
            if isinstance(error, Unanswered):
                raise
            raise Unanswered(f"the connection failed: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


@contextmanager
def _cut_off(connected: socket.socket, end: float) -> Iterator[None]:
    """Shut a connection at a time, whatever is going on.

    A socket's own time-out begins anew with every byte, and http.client reads status lines, headers and trailers for
    as long as they come.
    """

    def shut() -> None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(end - time.monotonic(), 0), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body."""
    body = bytearray()
    while not response.isclosed():
        chunk = response.read1(_READ_AT_ONCE)
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise RewardError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
        if not chunk:
            break
    if response.length:  # what is left of what it announced
        raise Unanswered(f"it broke off, {response.length} bytes before the end of its answer")
    return bytes(body)


def _reason(body: bytes) -> str:
    """What a body says of an error."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return shown(body)
    return error_message(answer)[:1000] if isinstance(answer, dict) and "error" in answer else shown(body)


def _checked(url: str) -> SplitResult:
    """The parts of an address. Errors show neither its query, in which there may be a key, nor a password."""
    form = "write http://HOST:PORT/PATH, with %XX for spaces and what is not ASCII"
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port != 0
    except ValueError:
        raise ConfigurationError(f"The scorer's address cannot be read: {form}.") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "The scorer's address holds a user or password, which would be seen in logs and reports. Give `headers`, "
            "or `token_env` with the name of a variable of the environment."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid or not _URL.fullmatch(url):
        raise ConfigurationError(f"The scorer {re.split('[?#]', url)[0]!r} is no address: {form}.")
    return parts


def _check_headers(headers: Mapping[str, Any], token_env: str | None) -> None:
    """Refuse what http.client would refuse later, in an error that shows the value."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(str(value)):
            is_token = token_env is not None and name == "Authorization"
            what = f"The variable {token_env!r} that `token_env` names" if is_token else f"The header {name!r}"
            raise ConfigurationError(
                f"{what} cannot be sent to the scorer: it holds the end of a line, or other characters that headers "
                "have not."
            )
