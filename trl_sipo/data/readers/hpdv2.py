# SPDX-License-Identifier: Apache-2.0
"""HPDv2 (Wu et al., 2306.09341): choices between images (train.json), rankings of several (test.json)."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from trl_sipo.errors import DatasetError


def choice_pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs of `{"prompt", "file_path": [path, ...], "human_preference": [1 for the preferred image, else 0]}`.

    The preferred image against each of the others, which were not compared with one another. Two images with the same
    number are a tie.
    """
    paths, choices = record["file_path"], record["human_preference"]
    _check_lengths(paths, choices, "human_preference")
    pairs = _ordered_pairs(record["prompt"], paths, [-choice for choice in choices])
    return pairs if len(paths) == 2 else [pair for pair in pairs if pair["label"] == 1.0]


def ranking_pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All pairs of `{"prompt", "image_path": [path, ...], "rank": [the best is lowest]}`; equal ranks are ties."""
    _check_lengths(record["image_path"], record["rank"], "rank")
    return _ordered_pairs(record["prompt"], record["image_path"], record["rank"])


def _ordered_pairs(prompt: str, paths: list[str], ranks: list[float]) -> list[dict[str, Any]]:
    pairs = []
    for (path, rank), (other, other_rank) in combinations(zip(paths, ranks, strict=True), 2):
        better, worse = (other, path) if other_rank < rank else (path, other)
        label = 0.5 if rank == other_rank else 1.0
        pairs.append({"prompt": prompt, "chosen": better, "rejected": worse, "label": label})
    return pairs


def _check_lengths(paths: list[str] | None, numbers: list[float] | None, name: str) -> None:
    are_numbers = isinstance(numbers, list) and all(isinstance(number, int | float) for number in numbers)
    paths = paths if isinstance(paths, list) else []
    if not are_numbers or len(paths) != len(numbers):
        raise DatasetError(f"{len(paths)} images, but {name!r} is {numbers!r:.80}: one number per image is needed")
