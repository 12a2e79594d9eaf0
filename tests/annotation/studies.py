# SPDX-License-Identifier: Apache-2.0
"""Small studies: pairs without files, folders of pictures, and raters who answer by a rule."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from trl_sipo.annotation.records import LEFT, RIGHT, TIE, Comparison, Rater, Study, Task
from trl_sipo.annotation.store import STUDY_FILE, Store
from trl_sipo.annotation.votes import FIRST

MODELS = ("base", "tuned")
SIZE = 48


def comparisons(number: int, *, num_gold: int = 0, models: tuple[str, str] = MODELS) -> list[Comparison]:
    """Pairs of two models, of a prompt each, in the categories "food" and "animals" in turn."""
    return [
        Comparison(
            pair_id=f"{'gold' if is_gold else 'pair'}-{models[1]}-{index}",
            prompt_id=f"p{index}",
            prompt=f"prompt {index}",
            category=("food", "animals")[index % 2],
            first_model=models[0],
            second_model=models[1],
            first_media=f"{index:04x}a.png",
            second_media=f"{index:04x}b.png",
            is_gold=is_gold,
        )
        for is_gold, count in ((False, number), (True, num_gold))
        for index in range(count)
    ]


def empty_study(folder: Path, *, number: int = 6, num_gold: int = 0, **options) -> Store:
    """A study without files."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store.create(folder / STUDY_FILE, Study("Which is better?", **options))
    store.add_pairs(comparisons(number, num_gold=num_gold))
    return store


def picture(number: int, *, smooth: bool = False) -> Image.Image:
    """A picture of its own for every number; a smooth one is a far smaller PNG than the others."""
    generator = np.random.default_rng(number)
    if smooth:
        return Image.new("RGB", (SIZE, SIZE), tuple(generator.integers(0, 255, 3).tolist()))
    return Image.fromarray(generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))


def model_folders(root: Path, number: int = 4, models: tuple[str, ...] = MODELS) -> dict[str, Path]:
    """Plain folders of pictures of equal names, and a table of prompts beside them. The first model's are smooth."""
    for place, model in enumerate(models):
        (root / model).mkdir(parents=True)
        for index in range(number):
            picture(100 * place + index, smooth=place == 0).save(root / model / f"{index}.png")
    rows = [f"{index}.png,prompt {index},{('food', 'animals')[index % 2]}" for index in range(number)]
    (root / "prompts.csv").write_text("\n".join(["file_name,prompt,category", *rows]) + "\n")
    return {model: root / model for model in models}


def side_of(label: str, task: Task) -> str:
    """The choice by which a rater says "first", "second" or "tie" of a pair."""
    if label == TIE:
        return TIE
    return LEFT if (label == FIRST) != task.is_flipped else RIGHT


def answer_all(store: Store, choose: Callable[[Rater, Task], str], *, seconds: float = 5.0) -> None:
    """Let every rater answer everything, `choose` giving left, right, tie or skip."""
    for rater in store.raters():
        for assignment, task in zip(store.assignments(rater.rater_id), store.tasks(rater.rater_id), strict=True):
            choice = choose(rater, task)
            store.answer(rater.rater_id, assignment.assignment_id, choice, seconds, f"r{assignment.position}")
