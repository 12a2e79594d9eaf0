# SPDX-License-Identifier: Apache-2.0
"""Scores that were computed once: a SQLite file of (reward, medium and prompt) -> score, for any number of processes.

A reward is what `identity()` says of it, and a medium is its decoded pixels; files' names and dates play no part.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from trl_sipo.errors import ConfigurationError, StorageError
from trl_sipo.rewards.base import Media, Reward, RewardInfo
from trl_sipo.rewards.media import check_samples, check_scores, content_hash

_TABLES = """
CREATE TABLE IF NOT EXISTS rewards (reward BLOB PRIMARY KEY, identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    reward BLOB NOT NULL, sample BLOB NOT NULL, score REAL NOT NULL, PRIMARY KEY (reward, sample)
) WITHOUT ROWID;
"""
_SECONDS_TO_WAIT = 60  # for another process that writes
_SCORED_AT_ONCE = 256  # and kept, so that an interruption loses no more


class CachedReward:
    """A reward that looks for a score before it computes it, and keeps what it computed.

    Args:
        reward: what computes the scores. Its `identity()` gives all that they are a function of, beside medium and
            prompt, as JSON; that of the built-in ones holds the class, the convention, the settings, a hash of the
            weights and the version of this package.
        path: the file, made if it is not there. Any number of rewards and processes share one; it should lie on a
            local disk, since network file systems often lack the locks that SQLite needs.
        identity: of a reward that has no `identity()`. Change it whenever the scores change.

    Raises:
        ConfigurationError: the reward has no identity, or one that is no JSON, or the path is a folder.
        StorageError: the file cannot be opened, or is something else.
    """

    def __init__(self, reward: Reward, path: str | Path, *, identity: Any = None):
        self.reward, self.info, self.path = reward, reward.info, Path(path).expanduser()
        if identity is None:
            if not hasattr(reward, "identity"):
                raise ConfigurationError(
                    f"{type(reward).__name__} ({reward.info.name}) has no `identity()`, so a cache cannot tell its "
                    "scores from those of another version. Give `identity`, such as its name and your version of it."
                )
            identity = reward.identity()
        described = _described(self.info, identity)
        self._key = hashlib.sha256(described.encode()).digest()
        if self.path.is_dir():
            raise ConfigurationError(
                f"The cache {str(self.path)!r} is a folder. Give a file in it, such as scores.db."
            )
        with self._database() as database:
            database.executescript(_TABLES)
            database.execute("INSERT OR IGNORE INTO rewards VALUES (?, ?)", (self._key, described))

    def identity(self) -> dict[str, Any]:
        """That of the reward, in its hash: a cache changes no score."""
        return {"cached": self._key.hex()}

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> torch.Tensor:
        """One score per sample, as `reward` gives it; equal samples are scored once.

        Raises:
            DatasetError: see the reward.
            RewardError: see the reward.
            StorageError: the file cannot be read or written.
        """
        check_samples(media, prompts, name=self.info.name)
        keys = [_sample_key(medium, prompt) for medium, prompt in zip(media, prompts, strict=True)]
        found = self._known(set(keys))
        missing = list({key: number for number, key in enumerate(keys) if key not in found}.items())
        for start in range(0, len(missing), _SCORED_AT_ONCE):
            part = missing[start : start + _SCORED_AT_ONCE]
            numbers = [number for _, number in part]
            its_prompts = [prompts[number] for number in numbers]
            scores = self.reward.score([media[number] for number in numbers], its_prompts)
            check_scores(scores, its_prompts, name=self.info.name)
            scored = dict(zip((key for key, _ in part), scores.tolist(), strict=True))
            self._keep(scored)
            found.update(scored)
        return torch.tensor([found[key] for key in keys], dtype=torch.float32)

    def _known(self, keys: set[bytes]) -> dict[bytes, float]:
        # What a damaged file may hold besides, a text or infinity, is computed again.
        query = (
            "SELECT score FROM scores WHERE reward = ? AND sample = ? AND typeof(score) = 'real' AND abs(score) <= ?"
        )
        largest = torch.finfo(torch.float32).max
        with self._database() as database:
            rows = {key: database.execute(query, (self._key, key, largest)).fetchone() for key in keys}
        return {key: row[0] for key, row in rows.items() if row is not None}

    def _keep(self, scores: dict[bytes, float]) -> None:
        rows = [(self._key, key, score) for key, score in scores.items()]
        with self._database() as database:
            database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one short transaction: it is never carried into another process."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_SECONDS_TO_WAIT)) as database, database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"The cache of scores {str(self.path)!r} cannot be used: {error}. Name another file, or delete it: "
                "its scores are computed again."
            ) from error


def _described(info: RewardInfo, identity: Any) -> str:
    described = {"name": info.name, "convention": info.convention, "identity": identity}
    try:
        return json.dumps(described, sort_keys=True)
    except TypeError as error:
        raise ConfigurationError(
            f"The identity of {info.name} must be numbers, texts, lists and dictionaries of them, since it is kept as "
            f"JSON: {error}."
        ) from error


def _sample_key(medium: Media, prompt: str) -> bytes:
    return hashlib.sha256(content_hash(medium) + prompt.encode("utf-8", "surrogatepass")).digest()
