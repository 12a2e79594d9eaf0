# SPDX-License-Identifier: Apache-2.0
"""What a run has written down, and rewards that misbehave."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from tests.trainer.resuming import untimed
from trl_sipo.errors import DatasetError, RewardError
from trl_sipo.rewards.base import RewardInfo

# A grid of two prompts every other step, as cheap as one can be.
SAMPLING = {"sample_prompts": ["a red cat", "a boat"], "sample_every_steps": 2, "sample_num_inference_steps": 1}


def lines(output: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of the log, strictly as JSON has it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = Path(output, "run_log", f"{name}.jsonl").read_text(encoding="ascii")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of the log, without times."""
    return untimed([{key: row[key] for key in row if key != "time"} for row in lines(output, "metrics")])


class TiresAfterTwo:
    """A reward that scores twice, and fails afterwards, each time in another way."""

    def __init__(self) -> None:
        self.info = RewardInfo("tires", "none", "Apache-2.0")
        self.calls = 0

    def score(self, media: Any, prompts: Any) -> torch.Tensor:
        """Ones, twice."""
        self.calls += 1
        if self.calls == 3:
            raise RewardError("It is tired.")
        if self.calls == 4:
            raise DatasetError("This picture shows nothing.")
        return torch.ones(len(media)) * (math.nan if self.calls > 4 else 1)
