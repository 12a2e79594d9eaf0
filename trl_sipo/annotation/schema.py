# SPDX-License-Identifier: Apache-2.0
"""The tables of a study, and whether a file holds them as they were made."""

import sqlite3
from pathlib import Path
from typing import Final

from trl_sipo.errors import StudyError

APPLICATION_ID: Final = 0x53495044
VERSION: Final = 1

_TABLES = (
    """CREATE TABLE study (
    title TEXT NOT NULL, guidelines TEXT NOT NULL, question TEXT NOT NULL, categories TEXT NOT NULL,
    is_blind INTEGER NOT NULL, allows_tie INTEGER NOT NULL, seed TEXT NOT NULL,
    tasks_per_rater INTEGER, num_mirrored INTEGER NOT NULL
)""",
    # Names of media are checked here, so that no study can make a server read another file.
    """CREATE TABLE pairs (
    number INTEGER PRIMARY KEY, pair_id TEXT NOT NULL UNIQUE, prompt_id TEXT NOT NULL,
    prompt TEXT NOT NULL, category TEXT NOT NULL, first_model TEXT NOT NULL, second_model TEXT NOT NULL,
    first_media TEXT NOT NULL CHECK (first_media NOT GLOB '*[^0-9a-z.]*' AND first_media GLOB '[0-9a-z]*.[a-z]*'),
    second_media TEXT NOT NULL CHECK (second_media NOT GLOB '*[^0-9a-z.]*' AND second_media GLOB '[0-9a-z]*.[a-z]*'),
    is_video INTEGER NOT NULL, is_gold INTEGER NOT NULL
)""",
    """CREATE TABLE raters (
    rater_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, group_number INTEGER NOT NULL CHECK (group_number >= 1),
    share INTEGER NOT NULL, token_hash BLOB NOT NULL UNIQUE
)""",
    """CREATE TABLE assignments (
    assignment_id TEXT PRIMARY KEY, rater_id INTEGER NOT NULL REFERENCES raters, position INTEGER NOT NULL,
    pair_id TEXT NOT NULL REFERENCES pairs (pair_id),
    kind TEXT NOT NULL CHECK (kind IN ('sample', 'gold', 'mirrored')), is_flipped INTEGER NOT NULL,
    UNIQUE (rater_id, position), UNIQUE (rater_id, assignment_id)
)""",
    """CREATE TABLE answers (
    answer_id INTEGER PRIMARY KEY AUTOINCREMENT, rater_id INTEGER NOT NULL, assignment_id TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'skip')), seconds REAL NOT NULL,
    request_id TEXT NOT NULL, answered_at REAL NOT NULL,
    UNIQUE (rater_id, request_id),
    FOREIGN KEY (rater_id, assignment_id) REFERENCES assignments (rater_id, assignment_id)
)""",
)
_FIXED = ("study", "pairs", "assignments", "answers")
SCHEMA: Final = (
    *_TABLES,
    *(
        f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table}: rows are only ever added'); END"
        for table in _FIXED
        for action in ("UPDATE", "DELETE")
    ),
)


def check_schema(database: sqlite3.Connection, path: Path) -> None:
    """Raise [`StudyError`] unless a file holds these tables and triggers and no others, and rows that they allow."""
    if database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StudyError(f"{str(path)!r} is a database, but no study of `trl-sipo study build`.")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise StudyError(
            f"{str(path)!r} is a study of version {version}, and this trl-sipo reads version {VERSION}. Use the "
            "trl-sipo that made it."
        )
    found = database.execute(
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    )
    if sorted(row[0] for row in found) != sorted(SCHEMA):
        raise StudyError(
            f"{str(path)!r}: its tables are not those that `trl-sipo study build` makes, so that it may have been "
            "changed by others. Build it again, or take a copy that was not changed."
        )
    # What the tables demand of their rows is checked by SQLite when a row is written, unless the writer forbids it.
    faults = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if faults != "ok":
        raise StudyError(f"{str(path)!r} is damaged, or was changed by others: {faults}. Take a copy of it.")
