# SPDX-License-Identifier: Apache-2.0
"""What comes in and goes out over HTTP, apart from the sockets that carry it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, BinaryIO

# Every answer carries these. A page may load from this server alone, nothing inline, and stand in no frame; what is
# received stays in no cache; media are no documents, whatever a file holds.
SECURITY_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Request:
    """A request whose size, time and form are within what the transport allows.

    Args:
        method: "GET" or "POST".
        path: Without the query, which nothing here reads.
        headers: By name in lower case; those that are read here came once.
        body: Empty for GET.
        address: Whom the connection is from.
        local_address: The connection's address on this side.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    address: str
    local_address: str


@dataclass(frozen=True)
class Response:
    """An answer.

    Args:
        status: Of HTTP.
        content: Its body, or an open file that holds it; whoever sends it closes the file.
        content_type: Of the body.
        headers: Those of this answer, beside what all carry.
    """

    status: int
    content: bytes | BinaryIO
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        reason: For people; holds nothing that the request held.
        retry_after: Seconds after which the same may succeed.
    """

    def __init__(self, status: int, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after

    def response(self) -> Response:
        """The answer: like any other of this status, whoever asks, and for whatever."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}
        return json_response({"error": self.reason}, self.status, headers)


def not_found() -> Refused:
    """The one answer to what is not there, and to what is there and belongs to another rater."""
    return Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")


def json_response(value: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(status, content, "application/json; charset=utf-8", headers or {})


def json_object(request: Request) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
        Refused: It is no JSON, or says that it is something else, as a form of another site would have to.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The request must be JSON.")
    try:
        value = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "The request is no JSON.") from error
    if not isinstance(value, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, "The request must be an object.")
    return value


def cookie(request: Request, name: str) -> str | None:
    """The value of a cookie; of several of one name the first, as browsers put the most particular one there."""
    for part in request.headers.get("cookie", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return None
