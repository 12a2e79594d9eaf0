# SPDX-License-Identifier: Apache-2.0
"""A study in one SQLite file, for any number of threads and processes: what was acknowledged is on the disk.

Answers are only ever added, and the file itself refuses anything else. Of several to one assignment the last counts.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trl_sipo.annotation.plan import check_plan, plan_tasks
from trl_sipo.annotation.records import (
    CHOICES,
    SKIP,
    TIE,
    Answer,
    Assignment,
    Comparison,
    Rater,
    Study,
    Task,
)
from trl_sipo.annotation.schema import APPLICATION_ID, SCHEMA, VERSION, check_schema
from trl_sipo.errors import AnswerError, StorageError, StudyError

STUDY_FILE: Final = "study.sqlite"
MEDIA_FOLDER: Final = "media"

_SECONDS_TO_WAIT = 30  # for others that write
_TOKEN_BYTES = 16
_MAX_NAME, _MAX_REQUEST, _MAX_SECONDS = 80, 64, 1e9
_PAIR_COLUMNS = (
    "pair_id, prompt_id, prompt, category, first_model, second_model, first_media, second_media, is_video, is_gold"
)


class Store:
    """A study's file. One object may be used by any number of threads; each has a connection of its own.

    Make one by [`Store.create`] or [`Store.open`].
    """

    def __init__(self, path: Path):
        self.path = path
        self._own = threading.local()

    @classmethod
    def create(cls, path: str | Path, study: Study) -> "Store":
        """Make a new file, which only its owner can read, since it tells which model is which.

        Raises:
            StudyError: There is such a file already; or the study has no title or question.
            StorageError: It cannot be written.
        """
        path = Path(path)
        if not study.title.strip() or not study.question.strip():
            raise StudyError("A study needs a title and a question, and one of them is empty.")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError as error:
            raise StudyError(f"{str(path)!r} exists already, and is not overwritten. Give another place.") from error
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be written: {error}.") from error
        store = cls(path)
        try:
            store._make(study)
        except BaseException:
            store.close()
            path.unlink()
            raise
        return store

    def _make(self, study: Study) -> None:
        with self._writing(begin=False) as database:
            mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StorageError(
                    f"{str(self.path)!r}: the file system has no shared memory for SQLite's log. Use a disk."
                )
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        with self._writing() as database:
            for statement in SCHEMA:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {VERSION}")
            fields = {**vars(study), "categories": json.dumps(study.categories), "seed": str(study.seed)}
            marks = ", ".join("?" * len(fields))
            database.execute(f"INSERT INTO study ({', '.join(fields)}) VALUES ({marks})", list(fields.values()))

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a study: its file, or the folder that it lies in.

        Raises:
            StudyError: It is not there, no study, damaged, changed by others, or of another version.
        """
        path = Path(path)
        path = path / STUDY_FILE if path.is_dir() else path
        if not path.is_file():
            raise StudyError(f"There is no study at {str(path)!r}. `trl-sipo study build` makes one.")
        store = cls(path)
        with store._reading() as database:
            check_schema(database, path)
        return store

    @property
    def media_folder(self) -> Path:
        """Where the files lie that pairs and assignments name."""
        return self.path.parent / MEDIA_FOLDER

    def check_writable(self) -> None:
        """Raise [`StorageError`] where no answer could be stored, as on a disk that is only read."""
        with self._writing() as database:
            database.execute(f"PRAGMA user_version = {VERSION}")  # as it is: a transaction without a write may succeed

    def close(self) -> None:
        """Close this thread's connection; the next call opens another."""
        self._own.__dict__.clear()

    # ------------------------------------------------------------------------------------------------ the study

    def study(self) -> Study:
        """What all raters share.

        Raises:
            StudyError: The file does not say it.
        """
        with self._reading() as database:
            found = database.execute("SELECT * FROM study").fetchall()
        try:
            (row,) = map(dict, found)
            categories = tuple(json.loads(row.pop("categories")))
            flags = {name: bool(row.pop(name)) for name in ("is_blind", "allows_tie")}
            return Study(**{**row, "categories": categories, "seed": int(row["seed"]), **flags})
        except ValueError as error:
            raise StudyError(f"{str(self.path)!r} does not say what it is a study of: {error}.") from error

    def add_pairs(self, pairs: Sequence[Comparison]) -> None:
        """Give a new study its pairs; their files lie in the media folder.

        Raises:
            StudyError: There are raters already, pairs of one name, or the study's numbers do not fit the pairs.
        """
        study = self.study()
        check_plan(sum(not pair.is_gold for pair in pairs), study.tasks_per_rater, study.num_mirrored)
        names = [name.strip() for name in _PAIR_COLUMNS.split(",")]
        marks = ", ".join("?" * len(names))
        rows = [[getattr(pair, name) for name in names] for pair in pairs]
        with self._writing() as database:
            if database.execute("SELECT count(*) FROM raters").fetchone()[0]:
                raise StudyError(f"{str(self.path)!r} has raters, so that no pairs can be added. Build another study.")
            try:
                database.executemany(f"INSERT INTO pairs ({_PAIR_COLUMNS}) VALUES ({marks})", rows)
            except sqlite3.IntegrityError as error:
                raise StudyError(f"Pairs that the study cannot hold: {error}.") from error

    def pairs(self) -> list[Comparison]:
        """All pairs, in the order in which they were added."""
        with self._reading() as database:
            rows = database.execute(f"SELECT {_PAIR_COLUMNS} FROM pairs ORDER BY number").fetchall()
        return [
            Comparison(**{**row, "is_video": bool(row["is_video"]), "is_gold": bool(row["is_gold"])}) for row in rows
        ]

    def model_names(self, rater_id: int) -> dict[str, tuple[str, str]] | None:
        """Assignment -> left and right model, of one rater; None: the study is blind, and nobody is told."""
        if self.study().is_blind:
            return None
        models = {pair.pair_id: pair.models for pair in self.pairs()}
        return {
            assignment.assignment_id: models[task.pair_id][::-1] if task.is_flipped else models[task.pair_id]
            for assignment, task in zip(self.assignments(rater_id), self.tasks(rater_id), strict=True)
        }

    # ------------------------------------------------------------------------------------------------ raters

    def invite(self, name: str, group: int) -> str:
        """Add a rater, with the next share of the group's pairs in an order of their own.

        Args:
            name: Not used by another rater.
            group: From 1.

        Returns:
            The token by which the rater is known: 32 hexadecimal digits, which are kept nowhere.

        Raises:
            StudyError: The name is empty, too long or used; the group is none; or the study has no pairs.
        """
        if group < 1:
            raise StudyError(f"Groups are counted from 1, got {group}.")

        def next_share(database: sqlite3.Connection) -> tuple[int, int]:
            query = "SELECT coalesce(max(share), -1) + 1 FROM raters WHERE group_number = ?"
            return group, database.execute(query, (group,)).fetchone()[0]

        return self._add_rater(name, next_share)

    def replace_rater(self, replaced: str, name: str) -> str:
        """Add a rater who gets what another has: pairs that a discarded rater judged are given to the group again.

        Args:
            replaced: Name of the other, whose answers stay.
            name: Not used by another rater.

        Returns:
            The new rater's token.

        Raises:
            StudyError: There is no such rater, or the name cannot be used.
        """

        def same_share(database: sqlite3.Connection) -> tuple[int, int]:
            query = "SELECT group_number, share FROM raters WHERE name = ?"
            row = database.execute(query, (replaced,)).fetchone()
            if row is None:
                raise StudyError(f"The study has no rater {replaced!r}.")
            return row["group_number"], row["share"]

        return self._add_rater(name, same_share)

    def _add_rater(self, name: str, group_and_share: Callable[[sqlite3.Connection], tuple[int, int]]) -> str:
        if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
            raise StudyError(f"The rater's name {name!r} must be of 1 to {_MAX_NAME} printable characters.")
        study, pairs, token = self.study(), self.pairs(), secrets.token_hex(_TOKEN_BYTES)
        check_plan(sum(not pair.is_gold for pair in pairs), study.tasks_per_rater, study.num_mirrored)
        with self._writing() as database:
            group, share = group_and_share(database)
            try:
                rater_id = database.execute(
                    "INSERT INTO raters (name, group_number, share, token_hash) VALUES (?, ?, ?, ?)",
                    (name, group, share, _hash(token)),
                ).lastrowid
            except sqlite3.IntegrityError as error:
                raise StudyError(f"The study has a rater {name!r} already. Give another name.") from error
            database.executemany(
                "INSERT INTO assignments (assignment_id, rater_id, position, pair_id, kind, is_flipped) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (secrets.token_hex(_TOKEN_BYTES), rater_id, position, task.pair_id, task.kind, task.is_flipped)
                    for position, task in enumerate(plan_tasks(pairs, study, group, share))
                ],
            )
        return token

    def renew_token(self, name: str) -> str:
        """A new token for a rater who lost theirs, which is void from now on.

        Raises:
            StudyError: There is no such rater.
        """
        token = secrets.token_hex(_TOKEN_BYTES)
        with self._writing() as database:
            changed = database.execute("UPDATE raters SET token_hash = ? WHERE name = ?", (_hash(token), name))
            if not changed.rowcount:
                raise StudyError(f"The study has no rater {name!r}.")
        return token

    def invitation(self, rater_id: int) -> str:
        """Digest of the rater's token; another one from when the token is renewed."""
        with self._reading() as database:
            row = database.execute("SELECT token_hash FROM raters WHERE rater_id = ?", (rater_id,)).fetchone()
        return row["token_hash"].hex()

    def raters(self) -> list[Rater]:
        """All, in the order in which they were invited."""
        with self._reading() as database:
            rows = database.execute("SELECT rater_id, name, group_number FROM raters ORDER BY rater_id").fetchall()
        return [Rater(*row) for row in rows]

    def rater_of(self, token: str) -> Rater | None:
        """Whose token this is; how long it takes does not tell how much of it was right."""
        given, found = _hash(token), None
        with self._reading() as database:
            rows = database.execute("SELECT rater_id, name, group_number, token_hash FROM raters").fetchall()
        for *rater, token_hash in rows:
            if hmac.compare_digest(token_hash, given):
                found = Rater(*rater)
        return found

    # ------------------------------------------------------------------------------------------------ assignments

    def assignments(self, rater_id: int) -> list[Assignment]:
        """What a rater has to judge, in the order in which they see it."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT assignment_id, position, prompt, category, first_media, second_media, is_flipped, is_video "
                "FROM assignments JOIN pairs USING (pair_id) WHERE rater_id = ? ORDER BY position",
                (rater_id,),
            ).fetchall()
        return [_as_assignment(row) for row in rows]

    def tasks(self, rater_id: int) -> list[Task]:
        """What a rater's assignments are for, in their order."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT pair_id, kind, is_flipped FROM assignments WHERE rater_id = ? ORDER BY position", (rater_id,)
            ).fetchall()
        return [Task(row["pair_id"], row["kind"], bool(row["is_flipped"])) for row in rows]

    def choices(self, rater_id: int) -> dict[str, str]:
        """Assignment -> the last choice, "skip" among them, of one rater."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT assignment_id, choice FROM answers WHERE rater_id = ? ORDER BY answer_id", (rater_id,)
            ).fetchall()
        return dict(tuple(row) for row in rows)

    def progress(self, rater_id: int) -> tuple[int, int]:
        """How many assignments are decided, and how many there are; what was skipped is not decided."""
        decided = sum(choice != SKIP for choice in self.choices(rater_id).values())
        with self._reading() as database:
            query = "SELECT count(*) FROM assignments WHERE rater_id = ?"
            return decided, database.execute(query, (rater_id,)).fetchone()[0]

    # ------------------------------------------------------------------------------------------------ answers

    def answer(self, rater_id: int, assignment_id: str, choice: str, seconds: float, request_id: str) -> None:
        """Add an answer; when this returns, it is on the disk.

        Args:
            choice: "left", "right" or "tie"; or "skip", which decides nothing.
            seconds: Spent on it, without pauses.
            request_id: Of the page's request. The same one again, since no acknowledgement arrived, adds nothing.

        Raises:
            AnswerError: Another rater's assignment or none, an unknown choice, or a request that said something else.
            StorageError: It could not be written, and is not stored.
        """
        allowed = CHOICES if self.study().allows_tie else tuple(c for c in CHOICES if c != TIE)
        if choice not in (*allowed, SKIP):
            raise AnswerError(f"The choice {str(choice)[:20]!r} is none of {', '.join((*allowed, SKIP))}.")
        if not math.isfinite(seconds) or not 0 <= seconds <= _MAX_SECONDS:
            raise AnswerError(f"{seconds} seconds cannot have been spent on an answer.")
        if not 1 <= len(request_id) <= _MAX_REQUEST or not request_id.isascii():
            raise AnswerError(f"A request's name has 1 to {_MAX_REQUEST} characters of ASCII.")
        with self._writing() as database:
            owner = database.execute(
                "SELECT 1 FROM assignments WHERE assignment_id = ? AND rater_id = ?",
                (assignment_id if assignment_id.isascii() else "", rater_id),
            ).fetchone()
            if owner is None:  # the same words whether it is another's or nobody's
                raise AnswerError("There is no such assignment.")
            stored = database.execute(
                "SELECT assignment_id, choice FROM answers WHERE rater_id = ? AND request_id = ?",
                (rater_id, request_id),
            ).fetchone()
            if stored is None:
                database.execute(
                    "INSERT INTO answers (rater_id, assignment_id, choice, seconds, request_id, answered_at) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (rater_id, assignment_id, choice, float(seconds), request_id, time.time()),
                )
            elif tuple(stored) != (assignment_id, choice):
                raise AnswerError("This request was used for another answer before. Send the answer as a new one.")

    def answers(self) -> list[Answer]:
        """All answers that were ever given, the replaced ones among them, in the order in which they came."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT answer_id, raters.rater_id, name, group_number, assignment_id, position, pair_id, kind, "
                "is_flipped, choice, seconds, answered_at FROM answers JOIN assignments USING (assignment_id) "
                "JOIN raters ON raters.rater_id = answers.rater_id ORDER BY answer_id"
            ).fetchall()
        return [
            Answer(
                answer_id=row["answer_id"],
                rater=Rater(row["rater_id"], row["name"], row["group_number"]),
                assignment_id=row["assignment_id"],
                position=row["position"],
                task=Task(row["pair_id"], row["kind"], bool(row["is_flipped"])),
                choice=row["choice"],
                seconds=row["seconds"],
                answered_at=row["answered_at"],
            )
            for row in rows
        ]

    # ------------------------------------------------------------------------------------------------ connections

    def _connection(self) -> sqlite3.Connection:
        held = getattr(self._own, "held", None)
        if held is None or held.process != os.getpid():  # a connection must not cross a fork
            held = self._own.held = _Connection(self.path)
        return held.database

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._explained("read"):
            yield self._connection()

    @contextmanager
    def _writing(self, *, begin: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, which waits for those of others, and is on the disk at the end, or undone."""
        with self._explained("written"):
            database = self._connection()
            if not begin:
                yield database
                return
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, no space left, read-only, not to be opened
            raise StorageError(
                f"The study {str(self.path)!r} cannot be {action}: {error}. What was acknowledged is kept. See that "
                "nothing else holds it, that its disk has room, and that its folder can be written, which reading "
                "needs too; and try again."
            ) from error
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{str(self.path)!r} is no study, or damaged: {error}. Take a copy of it.") from error
        except UnicodeEncodeError as error:  # halves of characters, which JSON can spell and no file can hold
            raise StudyError(f"A text for the study is no Unicode: {error}. Correct it.") from error


class _Connection:
    """Of one thread; closed with it."""

    def __init__(self, path: Path):
        self.process = os.getpid()
        uri = f"{path.resolve().as_uri()}?mode=rw"
        # It is used by its own thread alone, but may be closed by another that collects garbage.
        self.database = sqlite3.connect(
            uri, uri=True, timeout=_SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False
        )
        self.database.row_factory = sqlite3.Row
        for setting in ("synchronous = FULL", "foreign_keys = ON", "recursive_triggers = ON", "trusted_schema = OFF"):
            self.database.execute(f"PRAGMA {setting}")

    def __del__(self) -> None:
        if getattr(self, "database", None) is not None and self.process == os.getpid():
            self.database.close()


def _hash(token: str) -> bytes:
    """What is kept of a token. Of 128 random bits, one round of SHA-256 cannot be turned back."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def digest_of(token: str) -> str:
    """Of a token, see [`Store.invitation`]."""
    return _hash(token).hex()


def _as_assignment(row: Any) -> Assignment:
    media = row["first_media"], row["second_media"]
    left, right = media[::-1] if row["is_flipped"] else media
    return Assignment(
        assignment_id=row["assignment_id"],
        position=row["position"],
        prompt=row["prompt"],
        category=row["category"],
        left_media=left,
        right_media=right,
        is_video=bool(row["is_video"]),
    )
