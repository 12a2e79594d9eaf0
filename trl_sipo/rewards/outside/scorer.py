# SPDX-License-Identifier: Apache-2.0
"""A reward whose scores come from outside: batches, time-outs, further tries, and checks of what comes back."""

import inspect
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from trl_sipo.errors import ConfigurationError, DatasetError, RewardError
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.media import check_samples
from trl_sipo.rewards.outside import protocol
from trl_sipo.rewards.outside.http_transport import PREFIXES, HTTPTransport
from trl_sipo.rewards.outside.process_transport import PREFIX, ProcessTransport
from trl_sipo.rewards.outside.protocol import Unanswered

BATCH_SIZE = 8
_LONGEST_PAUSE = 60.0  # seconds
_LARGEST = 1e6  # of numbers of options: of seconds, eleven days, which every clock can count


class Transport(Protocol):
    """What carries messages to a scorer."""

    name: str

    def samples(self, media: Sequence[Media], prompts: Sequence[str], frame_rate: float) -> list[dict[str, Any]]:
        """Media and prompts as they stand in a message."""
        ...

    def exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a message; `Unanswered` where another try may help."""
        ...

    def close(self) -> None:
        """Let the scorer go."""
        ...


class OutsideScorer:
    """A `Reward` that asks a scorer outside of this process. It can be used in a `with` statement, which closes it.

    Args:
        transport: What carries the messages.
        timeout: Seconds for the answer to a batch.
        retries: Further tries after no answer: a connection that fails, a server's fault (5xx), a time-out, a crash.
        backoff: Seconds before the first of them; before each further one twice as long.
        batch_size: Samples in a message; None: as many as the scorer says it takes at once, or 8.
        frame_rate: Frames per second of the videos that it is given.
        identity: What the scores are a function of, such as a version, for the cache of scores; else what the scorer
            says, or its command or address. Change it when the scores change.

    Raises:
        ConfigurationError: A number out of range.
        RewardError: The scorer does not answer, or not what it is.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        timeout: float = 300.0,
        retries: int = 3,
        backoff: float = 1.0,
        batch_size: int | None = None,
        frame_rate: float = 16.0,
        identity: Any = None,
    ):
        _check_numbers(timeout=timeout, retries=retries, backoff=backoff, batch_size=batch_size, frame_rate=frame_rate)
        self._transport, self._lock, self._numbers = transport, threading.Lock(), itertools.count(1)
        self._timeout, self._retries, self._backoff, self._frame_rate = timeout, retries, backoff, frame_rate
        try:
            answer = self._ask(protocol.info_request)
            self.info, at_once, stated = self._understood(protocol.parse_info, answer)
        except BaseException:
            transport.close()
            raise
        self.batch_size = min(batch_size or at_once or BATCH_SIZE, at_once or batch_size or BATCH_SIZE)
        self._identity = next((value for value in (identity, stated) if value is not None), transport.name)

    def identity(self) -> dict[str, Any]:
        """What the scores are a function of, beside media and prompts, as JSON."""
        return {
            "outside": self._identity,
            "name": self.info.name,
            "convention": self.info.convention,
            "frame_rate": self._frame_rate if "video" in self.info.media else None,
        }

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> torch.Tensor:
        """One score per sample, as the scorer gives it.

        Args:
            media: images or videos, n of them.
            prompts: one per sample.

        Returns:
            (n,) float32 on the CPU, finite.

        Raises:
            DatasetError: Other numbers of both, or a medium that the scorer does not take.
            RewardError: The scorer did not answer, or gave what are no scores.
            StorageError: The files for it cannot be written.
        """
        check_samples(media, prompts, name=self.info.name)
        self._check_kinds(media)
        scores: list[float] = []
        for start in range(0, len(media), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self._score_batch(media[part], prompts[part])
        return torch.tensor(scores, dtype=torch.float32)

    def close(self) -> None:
        """Let the scorer go: a process is ended. A later call of `score` starts it again."""
        self._transport.close()

    def __enter__(self) -> "OutsideScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_kinds(self, media: Sequence[Media]) -> None:
        for number, medium in enumerate(media):
            kind = "video" if hasattr(medium, "ndim") else "image"
            if kind not in self.info.media:
                taken = " and ".join(f"{name}s" for name in sorted(self.info.media))
                raise DatasetError(f"{self.info.name} takes {taken}, and medium {number} is of the kind {kind!r}.")

    def _score_batch(self, media: Sequence[Media], prompts: Sequence[str]) -> list[float]:
        def request(number: int) -> dict[str, Any]:
            return protocol.score_request(number, self._transport.samples(media, prompts, self._frame_rate))

        answer = self._ask(request)
        return self._understood(lambda found: protocol.parse_scores(found, len(media)), answer)

    def _ask(self, make_request: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The answer to a message, which is made anew for each try."""
        with self._lock:
            for tries in itertools.count(1):
                try:
                    return self._transport.exchange(make_request(next(self._numbers)), self._timeout)
                except Unanswered as error:
                    if tries > self._retries:
                        times = "once" if tries == 1 else f"{tries} times"
                        raise RewardError(f"The scorer {self._transport.name} was asked {times}: {error}.") from error
                    time.sleep(min(self._backoff * 2 ** (tries - 1), _LONGEST_PAUSE))
                except RewardError as error:
                    raise RewardError(f"The scorer {self._transport.name} failed: {error}.") from error
        raise AssertionError("unreachable")

    def _understood(self, parse: Callable[[dict[str, Any]], Any], answer: dict[str, Any]) -> Any:
        try:
            return parse(answer)
        except RewardError as error:
            self.close()
            raise RewardError(f"The scorer {self._transport.name} gave a wrong answer: {error}.") from error


def open_scorer(spec: str, **options: Any) -> OutsideScorer:
    """The scorer behind an address, or that a command starts.

    Args:
        spec: `"http://host:port/path"`, `"https://..."` or `"process:COMMAND"`.
        options: Those of [`OutsideScorer`], and of [`HTTPTransport`] or [`ProcessTransport`].

    Raises:
        ConfigurationError: It is none of these, or an option is not known or out of range.
        RewardError: The scorer does not answer, or not what it is.
    """
    if spec.startswith(PREFIXES):
        transport_class, target = HTTPTransport, spec
    elif spec.startswith(PREFIX):
        transport_class, target = ProcessTransport, spec.removeprefix(PREFIX)
    else:
        raise ConfigurationError(
            f"{spec!r} is no scorer outside of this process: write http://HOST:PORT/PATH or process:COMMAND."
        )
    known = {name: set(list(inspect.signature(name).parameters)[1:]) for name in (OutsideScorer, transport_class)}
    unknown = options.keys() - set.union(*known.values())
    if unknown:
        raise ConfigurationError(
            f"The scorer {spec.partition(':')[0]!r} has no option {sorted(unknown)[0]!r}. It has: "
            f"{', '.join(sorted(set.union(*known.values())))}."
        )
    own, others = ({name: value for name, value in options.items() if name in of} for of in known.values())
    return OutsideScorer(transport_class(target, **others), **own)


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if name == "batch_size" and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value > _LARGEST:
            raise ConfigurationError(f"`{name}` of a scorer must be a number up to {_LARGEST:g}, got {value!r}.")
        if name in ("timeout", "frame_rate") and not value > 0:
            raise ConfigurationError(f"`{name}` of a scorer must be positive, got {value}.")
        least = {"retries": 0, "backoff": 0, "batch_size": 1}.get(name)
        if least is not None and not value >= least:
            raise ConfigurationError(f"`{name}` of a scorer must be at least {least}, got {value}.")
