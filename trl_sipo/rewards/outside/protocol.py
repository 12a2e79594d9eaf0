# SPDX-License-Identifier: Apache-2.0
"""The messages between this package and a scorer: what is asked, and what counts as an answer.

docs/source/outside_scorers.md describes them; `serve.py` is the other side.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_sipo.errors import RewardError
from trl_sipo.rewards.base import RewardInfo

VERSION = 1
MAX_ANSWER_BYTES = 2**24
"""A score takes some twenty bytes: what is longer is no answer."""
_SHOWN = 200
_LONGEST_TEXT = 1000  # of what stands in tables: a name, a convention, a licence


class Unanswered(RewardError):
    """No answer came, which may be different the next time: a connection that failed, a time-out, a crash."""


def info_request(number: int) -> dict[str, Any]:
    """What asks a scorer what it is."""
    return {"version": VERSION, "id": number, "method": "info"}


def score_request(number: int, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What asks for one score per sample, each with `kind`, `prompt`, and `path` or `format` and `data`."""
    return {"version": VERSION, "id": number, "method": "score", "samples": list(samples)}


def parse_answer(text: bytes, request: Mapping[str, Any]) -> dict[str, Any]:
    """The message that answers a request.

    Raises:
        RewardError: It is no message, one of another version, the answer to another request, or says what went wrong.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RewardError(
            f"what is no JSON came as an answer: {shown(text)}. What a scorer prints belongs on its stderr"
        ) from error
    if not isinstance(answer, dict) or answer.get("version") != VERSION:
        raise RewardError(f"the answer is no message of version {VERSION} of the protocol: {shown(text)}")
    if answer.get("id") != request["id"]:
        raise RewardError(
            f"the answer is to message {_quoted(answer.get('id'))}, and message {request['id']} was sent"
        )
    if "error" in answer:
        raise RewardError(f"it reports an error: {_short(error_message(answer))}")
    return answer


def error_message(answer: Mapping[str, Any]) -> str:
    """What a message with `error` says went wrong."""
    error = answer.get("error")
    return str(error.get("message", error) if isinstance(error, dict) else error)


def parse_info(answer: Mapping[str, Any]) -> tuple[RewardInfo, int | None, Any]:
    """What a scorer is, how many samples it takes at once (None: any number), and its own identity, or None.

    Raises:
        RewardError: The answer does not say, or in a wrong way.
    """
    found = answer.get("info")
    if not isinstance(found, dict):
        raise RewardError("the answer to `info` has no object `info`")
    for name in ("name", "convention", "licence"):
        if not isinstance(found.get(name), str) or not found[name]:
            raise RewardError(f"`info.{name}` must be a text, got {_quoted(found.get(name))}")
        if len(found[name]) > _LONGEST_TEXT or not found[name].isprintable():
            raise RewardError(
                f"`info.{name}` must be a line of at most {_LONGEST_TEXT} printable characters, got "
                f"{_quoted(found[name])}"
            )
    media, higher = found.get("media", ["image"]), found.get("higher_is_better", True)
    if not isinstance(media, list) or not media or not all(kind in ("image", "video") for kind in media):
        raise RewardError(f"`info.media` must be a list of 'image' and 'video', got {_quoted(media)}")
    if not isinstance(higher, bool):
        raise RewardError(f"`info.higher_is_better` must be true or false, got {_quoted(higher)}")
    at_once = found.get("batch_size")
    if at_once is not None and (type(at_once) is not int or at_once < 1):
        raise RewardError(f"`info.batch_size` must be a positive integer, got {_quoted(at_once)}")
    info = RewardInfo(found["name"], found["convention"], found["licence"], higher, frozenset(media))
    return info, at_once, found.get("identity")


def parse_scores(answer: Mapping[str, Any], count: int) -> list[float]:
    """One finite number per sample.

    Raises:
        RewardError: Another number of scores, or something that is no finite number.
    """
    scores = answer.get("scores")
    if not isinstance(scores, list):
        raise RewardError(f"the answer to `score` has no list `scores`, but {_quoted(scores)}")
    if len(scores) != count:
        raise RewardError(f"it gave {len(scores)} scores for {count} samples")
    for number, score in enumerate(scores):
        # Of NaN this is false as well.
        if type(score) not in (int, float) or not abs(score) <= torch.finfo(torch.float32).max:
            raise RewardError(f"score {number} of {count} is no finite number, but {_quoted(score)}")
    return [float(score) for score in scores]


def shown(text: bytes) -> str:
    """The beginning of what came, for an error."""
    return _quoted(text[: 2 * _SHOWN].decode(errors="replace"))


def _quoted(value: Any) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
