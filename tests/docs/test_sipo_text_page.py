# SPDX-License-Identifier: Apache-2.0
"""What the page on language models says of the code is true: its commands, settings and table."""

import json
import re
import shlex
import statistics
from dataclasses import fields

import numpy as np
import pytest
from trl import DPOConfig

from tests.docs.pages import ROOT, SOURCE, blocks, inline_code, read
from trl_sipo import SIPOConfig
from trl_sipo.scripts import train_text
from trl_sipo.trainer.text_sipo_config import REFUSED_SETTINGS

PAGE = SOURCE / "sipo_text.md"


def test_its_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = blocks(PAGE, "bash")
    lines = [shlex.split(line) for line in block.code.replace("\\\n", " ").splitlines()]
    assert len(lines) == 2
    for words in lines:
        (place,) = (i for i, word in enumerate(words) if word in ("sipo-text", "trl_sipo.scripts.train_text"))
        data, training, _ = train_text.parse(words[place + 1 :])
        assert data.dataset_name == "your/preferences" and training.beta > 0


def test_every_setting_is_described_and_every_refused_one_named():
    ours = {field.name for field in fields(SIPOConfig)} - {field.name for field in fields(DPOConfig)}
    named = {code.split("=")[0] for code in inline_code(PAGE)}
    assert len(ours) == 6 and not (ours | REFUSED_SETTINGS.keys()) - named


def test_the_table_of_thresholds_is_what_the_formula_gives():
    rows = re.findall(r"^\| (0\.\d) \| (-[\d.]+) \| (-[\d.]+) \| (-[\d.]+) \|$", read(PAGE), re.M)
    assert len(rows) == 3
    for threshold, *rewards in rows:
        for length, reward in zip((5, 100, 1000), rewards, strict=True):
            digits = len(reward.split(".")[1])
            expected = 0.1 * length * np.log(float(threshold))
            assert float(reward) == pytest.approx(expected, abs=0.51 * 10**-digits)


def _cell(rows, metric):
    values = [row[metric] for row in rows]
    parts = [statistics.mean(values), min(values), max(values)]
    mean, low, high = (f"{part:.2f}" if metric == "drift" else f"{part:.0%}" for part in parts)
    return f"{mean} [{low}, {high}]"


def test_the_table_of_results_is_what_was_recorded():
    folder = ROOT / "reports" / "text_sipo"
    records = [json.loads((folder / f"learning_rate_{rate}.json").read_text()) for rate in ("3e-4", "1e-4")]
    stated = {row[0]: row[1:] for line in read(PAGE).splitlines() if len(row := line.strip("| ").split(" | ")) == 7}
    for name in records[0]["results"]:
        cells = [
            _cell(record["results"][name], metric)
            for record in records
            for metric in ("accuracy", "well_formed", "drift")
        ]
        assert stated[name] == cells, name
