# SPDX-License-Identifier: Apache-2.0
"""What the server answers to whom: signing in, a rater's own pairs, their media, and answers.

A rater's requests are looked up among that rater's own assignments alone. What belongs to another is answered as what
is not there: with the same words, and after the same work.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trl_sipo.annotation.hosts import is_allowed_host, is_same_origin
from trl_sipo.annotation.messages import Refused, Request, Response, cookie, json_object, json_response, not_found
from trl_sipo.annotation.pages import PAGES
from trl_sipo.annotation.rate_limits import RateLimit, address_key
from trl_sipo.annotation.records import CHOICES, SKIP, TIE, Assignment, Rater
from trl_sipo.annotation.sessions import LIFETIME, Sessions
from trl_sipo.annotation.store import Store, digest_of
from trl_sipo.errors import AnswerError, StorageError
from trl_sipo.printing import printable

logger = logging.getLogger(__name__)

_MEDIA = re.compile(r"/media/([A-Za-z0-9_-]{1,64})/(left|right)")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_LONGEST_TOKEN = 256
_LONGEST_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Limits:
    """How often is often enough.

    Args:
        sign_ins: Attempts with a wrong token that an address has at once, and how many come back each second.
        answers: Of a rater.
        reads: Requests for lists and media, of a rater.
    """

    sign_ins: tuple[int, float] = (10, 1 / 30)
    answers: tuple[int, float] = (60, 2.0)
    reads: tuple[int, float] = (300, 20.0)


class Application:
    """The routes.

    Args:
        store: Of the study.
        sessions: Signs them.
        port: That the server listens on.
        host_names: Names by which it may be asked for, beside the machine's own address.
        limits: How often is often enough.
    """

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        port: int,
        *,
        host_names: frozenset[str] = frozenset(),
        limits: Limits | None = None,
    ):
        self.store, self.sessions, self.port, self.host_names = store, sessions, port, host_names
        self.study = store.study()
        self.media_folder = store.media_folder.resolve()
        limits = limits or Limits()
        self._sign_ins, self._answers, self._reads = (
            RateLimit(*limit) for limit in (limits.sign_ins, limits.answers, limits.reads)
        )
        self._raters: dict[str, Rater] = {}
        self._assignments: dict[int, dict[str, Assignment]] = {}
        self._routes: Mapping[str, Mapping[str, Callable[[Request], Response]]] = {
            **{path: {"GET": lambda request, page=page: page} for path, page in PAGES.items()},
            "/api/study": {"GET": self._study},
            "/api/choices": {"GET": self._choices},
            "/api/sign-in": {"POST": self._sign_in},
            "/api/sign-out": {"POST": self._sign_out},
            "/api/answer": {"POST": self._answer},
        }

    def respond(self, request: Request) -> Response:
        """The answer to a request. What goes wrong unexpectedly is logged, and answered without detail."""
        try:
            self._check_origin(request)
            return self._route(request)(request)
        except Refused as refusal:
            return refusal.response()
        except AnswerError as error:  # of what the checks here let pass: one id for two answers
            logger.warning("Refused an answer: %s", printable(error))
            return Refused(HTTPStatus.CONFLICT, "This answer cannot be stored.").response()
        except StorageError as error:
            logger.error("A request could not be served: %s", printable(error))
            return Refused(HTTPStatus.SERVICE_UNAVAILABLE, "Nothing can be stored right now.", 5).response()
        except Exception:  # whatever it is, the server goes on for the others
            logger.exception("A request failed")
            return Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "The server made a mistake.", 5).response()

    def route_of(self, path: str) -> str:
        """What a log may say of a path: nothing that a request could have put into it."""
        return path if path in self._routes else "/media" if _MEDIA.fullmatch(path) else "(no such path)"

    def _check_origin(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if not is_allowed_host(host, request.local_address, self.port, self.host_names):
            logger.warning(
                "Refused: asked for as %s. Is it a name of this server? `--allowed_host`", printable(host[:80])
            )
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "This server is not known by that name.")
        if request.method != "GET" and not is_same_origin(request.headers.get("origin", ""), host):
            raise Refused(HTTPStatus.FORBIDDEN, "The request comes from another page.")

    def _route(self, request: Request) -> Callable[[Request], Response]:
        methods = {"GET": self._media} if _MEDIA.fullmatch(request.path) else self._routes.get(request.path)
        if methods is None:
            raise not_found()
        if request.method not in methods:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "This is not done here.")
        return methods[request.method]

    def _sign_in(self, request: Request) -> Response:
        address = address_key(request.address)
        _check_limit(self._sign_ins, address)
        token = json_object(request).get("token")
        rater = self.store.rater_of(token) if isinstance(token, str) and len(token) <= _LONGEST_TOKEN else None
        if rater is None:
            raise Refused(HTTPStatus.UNAUTHORIZED, "This invitation is not known.")
        self._sign_ins.give_back(address)
        logger.info("Rater %s signed in", rater.rater_id)
        is_encrypted = request.headers["origin"].startswith("https:")
        session = self.sessions.open(rater.rater_id, digest_of(token))
        cookie_text = self._cookie(session, LIFETIME, is_encrypted)
        return json_response({"signed_in": True}, headers={"Set-Cookie": cookie_text})

    def _sign_out(self, request: Request) -> Response:
        self._check_csrf(request)
        is_encrypted = request.headers["origin"].startswith("https:")
        return json_response({"signed_in": False}, headers={"Set-Cookie": self._cookie("", 0, is_encrypted)})

    def _cookie(self, value: str, seconds: int, is_encrypted: bool) -> str:
        text = f"{self.sessions.cookie_name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict"
        return f"{text}; Secure" if is_encrypted else text

    def _study(self, request: Request) -> Response:
        """All that the page needs: the study's texts, this rater's pairs in order, and what was answered so far."""
        rater = self._rater(request)
        _check_limit(self._reads, rater.rater_id)
        study, own = self.study, self._own(rater, is_fresh=True).values()
        names = self.store.model_names(rater.rater_id)
        return json_response(
            {
                "title": study.title,
                "guidelines": study.guidelines,
                "question": study.question,
                "is_blind": study.is_blind,
                "allows_tie": study.allows_tie,
                "rater": rater.name,
                "csrf_token": self.sessions.csrf_token(self._session(request)),
                "tasks": [_shown(assignment) for assignment in own],
                "names": None if names is None else [names[assignment.assignment_id] for assignment in own],
                "choices": self.store.choices(rater.rater_id),
            }
        )

    def _choices(self, request: Request) -> Response:
        """What this rater has answered so far, here or on another device."""
        rater = self._rater(request)
        _check_limit(self._reads, rater.rater_id)
        return json_response({"choices": self.store.choices(rater.rater_id)})

    def _answer(self, request: Request) -> Response:
        """Store an answer; that it is stored is said when it is, and not before."""
        rater = self._check_csrf(request)
        _check_limit(self._answers, rater.rater_id)
        given = json_object(request)
        assignment = self._own(rater).get(given.get("assignment") if isinstance(given.get("assignment"), str) else "")
        if assignment is None:
            raise not_found()
        choice, seconds, request_id = _checked_answer(given, self.study.allows_tie)
        self.store.answer(rater.rater_id, assignment.assignment_id, choice, seconds, request_id)
        return json_response({"saved": request_id})

    def _media(self, request: Request) -> Response:
        """A sample. Nothing of the answer depends on the file but its bytes and their number."""
        rater = self._rater(request)
        _check_limit(self._reads, rater.rater_id)
        found = _MEDIA.fullmatch(request.path)
        assignment = self._own(rater).get(found[1])
        if assignment is None:
            raise not_found()
        path = self.media_folder / (assignment.left_media if found[2] == "left" else assignment.right_media)
        if not path.resolve().is_relative_to(self.media_folder) or not path.is_file():
            logger.error("The file %s of the study is not there, or leads out of its folder", printable(path.name))
            raise not_found()
        return Response(HTTPStatus.OK, path.open("rb"), "application/octet-stream")

    def _session(self, request: Request) -> str:
        return cookie(request, self.sessions.cookie_name) or ""

    def _rater(self, request: Request) -> Rater:
        """Whose request it is.

        Raises:
            Refused: Nobody's who is signed in, of this study, and by an invitation that no newer one has replaced.
        """
        session = self._session(request)
        rater_id = self.sessions.rater_id(session)
        if rater_id is not None and rater_id not in self._raters:
            self._raters = {str(rater.rater_id): rater for rater in self.store.raters()}
        rater = self._raters.get(rater_id or "")
        if rater is None or not self.sessions.is_of_invitation(session, self.store.invitation(rater.rater_id)):
            raise Refused(HTTPStatus.UNAUTHORIZED, "Please sign in.")
        return rater

    def _check_csrf(self, request: Request) -> Rater:
        rater = self._rater(request)
        if not self.sessions.is_csrf_token(self._session(request), request.headers.get("x-csrf-token", "")):
            raise Refused(HTTPStatus.FORBIDDEN, "The page is out of date: load it again.")
        return rater

    def _own(self, rater: Rater, *, is_fresh: bool = False) -> Mapping[str, Assignment]:
        """The assignments of a rater by their ids, in order; they are kept, since every file is looked up in them."""
        if is_fresh or rater.rater_id not in self._assignments:
            found = sorted(self.store.assignments(rater.rater_id), key=lambda assignment: assignment.position)
            self._assignments[rater.rater_id] = {assignment.assignment_id: assignment for assignment in found}
        return self._assignments[rater.rater_id]


def _shown(assignment: Assignment) -> dict[str, Any]:
    """What the page is told of a pair."""
    return {
        "id": assignment.assignment_id,
        "prompt": assignment.prompt,
        "category": assignment.category,
        "is_video": assignment.is_video,
    }


def _checked_answer(given: Mapping[str, Any], allows_tie: bool) -> tuple[str, float, str]:
    """Choice, seconds and the request's id.

    Raises:
        Refused: One of them is not as it must be.
    """
    choice, seconds, request_id = given.get("choice"), given.get("seconds"), given.get("request_id")
    if choice not in (*CHOICES, SKIP) or (choice == TIE and not allows_tie):
        raise Refused(HTTPStatus.BAD_REQUEST, "There is no such choice.")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 <= seconds <= _LONGEST_SECONDS:  # which NaN is not either
        raise Refused(HTTPStatus.BAD_REQUEST, "The time must be a number of seconds.")
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        raise Refused(HTTPStatus.BAD_REQUEST, "The request needs an id.")
    return choice, float(seconds), request_id


def _check_limit(limit: RateLimit, key: str | int) -> None:
    seconds = limit.take(key)
    if seconds > 0:
        raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "That was too often: wait a moment.", seconds)
