# SPDX-License-Identifier: Apache-2.0
"""A scorer behind HTTP: each message is the JSON body of a POST request, media in it as base64."""

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from trl_sipo.errors import ConfigurationError, RewardError
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.outside.media_encoding import as_data
from trl_sipo.rewards.outside.protocol import MAX_ANSWER_BYTES, Unanswered, error_message, parse_answer, shown

PREFIXES = ("http://", "https://")
_READ_AT_ONCE = 2**16


class HTTPTransport:
    """Carries messages to a server and back, one connection for each.

    Redirections are not followed, and proxies of the environment are not used.

    Args:
        url: Of the scorer. A user and password in it are refused: they would be seen in logs.
        headers: Sent with every message, beside `Content-Type`.
        token_env: Name of a variable of the environment whose value is sent as a bearer token.

    Raises:
        ConfigurationError: The URL has no host or holds a password, or the variable is not set.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, token_env: str | None = None):
        self._url = _checked(url)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if token_env is not None:
            if not os.environ.get(token_env):
                raise ConfigurationError(f"`token_env` names the variable {token_env!r}, which is not set.")
            self._headers["Authorization"] = f"Bearer {os.environ[token_env]}"
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
        try:
            connection.request("POST", target, content, self._headers)
            socket = connection.sock
            socket.settimeout(_left(end))
            response = connection.getresponse()
            return response.status, _read(response, socket, end)
        except TimeoutError as error:
            raise Unanswered(f"it did not answer within {timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"the connection failed: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


def _read(response: http.client.HTTPResponse, socket: Any, end: float) -> bytes:
    """The body, however slowly it comes, until a time."""
    body = bytearray()
    while not response.isclosed():
        socket.settimeout(_left(end))
        chunk = response.read1(_READ_AT_ONCE)
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise RewardError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
        if not chunk:
            break
    if response.length:  # what is left of what it announced
        raise Unanswered(f"it broke off, {response.length} bytes before the end of its answer")
    return bytes(body)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(body: bytes) -> str:
    """What a body says of an error."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return shown(body)
    return error_message(answer)[:1000] if isinstance(answer, dict) and "error" in answer else shown(body)


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port != 0
    except ValueError as error:
        raise ConfigurationError(f"The scorer's address cannot be read: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise ConfigurationError(f"The scorer {url!r} is no address: write http://HOST:PORT/PATH.")
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "The scorer's address holds a user or password, which would be seen in logs and reports. Give `headers`, "
            "or `token_env` with the name of a variable of the environment."
        )
    return parts
