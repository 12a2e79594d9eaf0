# SPDX-License-Identifier: Apache-2.0
"""The file that fixes the test before its first run, and what keeps code and file together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from beyond import area, inference, points, protocol
from beyond.bases import BASES
from beyond.protocol import Arm

from trl_sipo.errors import ConfigurationError

NAME = "protocol.json"


def record_of(arms: Sequence[Arm], single: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """All that is fixed before the test, as JSON has it.

    Args:
        arms: Those that are tested.
        single: Method -> the policies that a user would take.
        quick: Whether it is the protocol of quick runs.
    """
    content = {
        **protocol.as_record(arms),
        "candidates": {"methods": protocol.CANDIDATES, "cells": [asdict(cell) for cell in protocol.CANDIDATE_CELLS]},
        "bases": {name: asdict(base) for name, base in BASES.items()},
        "analysis": {
            **area.as_record(),
            **inference.as_record(),
            "stopping": points.STOPPING,
            "max_settings": [protocol.MAX_SETTINGS, protocol.MAX_SETTINGS_OF_OTHERS],
        },
        "single": single,
        "is_quick": quick,
    }
    return json.loads(json.dumps(content))


def digest_of(record: Mapping[str, Any]) -> str:
    """Of a frozen protocol."""
    return blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def write(folder: Path, record: Mapping[str, Any], tuning: Sequence[Mapping[str, Any]], num_test_runs: int) -> Path:
    """Freeze a protocol, with the table that it follows from; the same one may be written again.

    Args:
        num_test_runs: Test runs that were made already, by whatever protocol.

    Raises:
        ConfigurationError: There are test runs, and the file that they were made by is another, or none.
    """
    path = folder / NAME
    old = _load(path)["protocol"] if path.is_file() else None
    if num_test_runs and old != record:
        what = f"{path} has another protocol ({changes(old, record)})" if old else f"there is no {path}"
        raise ConfigurationError(
            f"{num_test_runs} test runs were made already, and {what}: a protocol is frozen before the test. Name "
            "another folder with --runs, or take back the change."
        )
    content = {"digest": digest_of(record), "protocol": record, "tuning": list(tuning)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def read(folder: Path, *, quick: bool) -> tuple[list[Arm], dict[str, Any]]:
    """The arms of the frozen protocol, and the whole file.

    Raises:
        ConfigurationError: Nothing is frozen, the file was changed by hand, or the code says something else than it.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: run `python benchmarks/frontier.py freeze` before the test.")
    content = _load(path)
    record = content["protocol"]
    if digest_of(record) != content["digest"]:
        raise ConfigurationError(f"{path} was changed after it was frozen: its digest is not that of its protocol.")
    arms = [Arm(**arm) for arm in record["arms"]]
    unknown = [f"{arm.method}, {arm.label}" for arm in arms if arm not in protocol.ARMS]
    if unknown:
        raise ConfigurationError(f"{path} has arms that the code has not ({'; '.join(unknown)}).")
    now = record_of(arms, record["single"], quick=quick)
    if now != record:
        raise ConfigurationError(
            f"The code is not of the protocol in {path}: {changes(record, now)}. Take back the change, or tune and "
            "freeze anew in other folders."
        )
    return arms, content


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Which entries differ, with both values: "batch_size is 12, was 8"."""
    parts = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            parts.append(changes(before, after, f"{prefix}{name}."))
        elif before != after:
            parts.append(f"{prefix}{name} is {_brief(after)}, was {_brief(before)}")
    return "; ".join(part for part in parts if part)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in ("digest", "protocol", "tuning")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is no frozen protocol ({error!r}).") from error
