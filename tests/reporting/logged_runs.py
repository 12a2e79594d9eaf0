# SPDX-License-Identifier: Apache-2.0
"""Logs of runs with numbers of the test's choice, written by what trainers write theirs with."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_sipo.trainer.run_log import LEVELS, METRICS, RUN_LOG_FOLDER, RunLog, append_line

TIMES = [0.1, 0.3, 0.5, 0.7, 0.9]
START = {
    "step": 0,
    "method": "SIPO",
    "model": "org/model",
    "backbone": "StableDiffusionPipeline",
    "command": ["trl-sipo", "sipo", "--config", "a file.yaml"],
    "settings": {"beta": 5000.0, "learning_rate": 1e-5, "max_steps": 100},
    "environment": {"python": "3.11.9", "versions": {"torch": "2.9.0"}, "processes": 1},
    "eval_pairs": 100,
    "mask_threshold": 0.9,
}
ENDED = {"train_runtime": 12.5, "train_loss": 0.6}


def write_log(folder: Path, rows: Iterable[Mapping[str, Any]], levels: Iterable[Mapping[str, Any]] = (), **start: Any):
    """A run's log of these rows, which hold a step each; numbers that are not finite as the trainer writes them."""
    RunLog.begin(folder, {**START, **start})
    with (folder / RUN_LOG_FOLDER / METRICS).open("a", encoding="utf-8") as file:
        for row in rows:
            append_line_to(file, {"epoch": 0.1, "time": 4e9, **row})
    for line in levels:
        append_line(folder / RUN_LOG_FOLDER / LEVELS, line)
    return folder


def append_line_to(file: Any, row: Mapping[str, Any]) -> None:
    """A line as the trainer writes it, without opening the file anew."""
    import json

    words = {math.inf: "Infinity", -math.inf: "-Infinity"}
    plain = {
        key: ("NaN" if value != value else words.get(value, value)) if isinstance(value, float) else value
        for key, value in row.items()
    }
    file.write(json.dumps(plain) + "\n")


def learning(step: int, **others: Any) -> dict[str, Any]:
    """A training log of a run that learns."""
    gain = step / 100
    return {
        "step": step,
        "loss": 0.69 - 0.2 * gain,
        "grad_norm": 1.0,
        "learning_rate": 1e-5,
        "rewards/chosen": 0.3 * gain,
        "rewards/rejected": -0.2 * gain,
        "rewards/margins": 0.5 * gain,
        "rewards/accuracies": 0.5 + 0.3 * gain,
        "rewards/saturated_fraction": 0.0,
        "drift/chosen_error": -0.01 * gain,
        "drift/rejected_error": 0.01 * gain,
        "sipo/masked_fraction": 0.1,
        "sipo/importance_weight": 0.95,
        **others,
    }


def held_out(row: Mapping[str, Any], name: str = "eval_") -> dict[str, Any]:
    """A log of the evaluation of a dataset, of the same numbers."""
    return {key if key == "step" else f"{name}{key}": value for key, value in row.items() if key != "grad_norm"}


def levels_at(step: int, weight: Callable[[float], float], split: str = "eval") -> dict[str, Any]:
    """A line of noise levels, of which the chosen error falls and the rejected one rises."""
    levels = [
        {
            "time": time,
            "timestep": 1000 * time,
            "pairs": 4,
            "importance_weight": weight(time),
            "masked": float(weight(time) < 0.9),
            "chosen_error": 0.1 * (1 - step / 1000),
            "rejected_error": 0.1 * (1 + step / 1000),
            "chosen_ref_error": 0.1,
            "rejected_ref_error": 0.1,
            "margin": step / 100,
        }
        for time in TIMES
    ]
    return {"step": step, "split": split, "levels": levels}


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_clip(path: Path, seed: int, num_frames: int = 4) -> None:
    """An animated WebP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [picture(seed + index) for index in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
