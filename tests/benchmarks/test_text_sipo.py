# SPDX-License-Identifier: Apache-2.0
"""The comparison on language models: its data, its judge, and a run so short that only the script is tested."""

import json
import math

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark(script):
    return script("text_sipo")


def test_pairs_are_another_writers(benchmark):
    pairs = benchmark.writers_pairs(64, seed=0)
    assert pairs[:] == benchmark.writers_pairs(64, seed=0)[:] != benchmark.writers_pairs(64, seed=1)[:]
    for row in pairs:
        letters = row["prompt"].split()[1:-1]
        assert row["chosen"].split() == [letter.upper() for letter in sorted(letters)]
        assert sorted(row["rejected"].split()) == row["chosen"].split() != row["rejected"].split()
    total = math.exp(row["chosen_logps"]) + 23 * math.exp(row["rejected_logps"])
    assert total == pytest.approx(1)


@pytest.mark.parametrize(
    ("written", "judged"),
    [
        ("a b c d <end>", (1, 1, 0)),
        ("A B C D <end>", (1, 1, 1)),
        ("d a c b <end>", (0, 1, 0)),
        ("a b c <end> <end>", (0, 0, 0)),
        ("a b c d a", (0, 0, 0)),
    ],
)
def test_what_is_right(benchmark, written, judged):
    ids = torch.tensor([[benchmark.WORDS.index(word) for word in f"sort b a d c : {written}".split()]])
    assert tuple(benchmark.judged(ids).values()) == judged


def test_it_runs(benchmark, tmp_path, monkeypatch, capsys):
    arms = [arm for arm in benchmark.ARMS if arm.name in ("DPO, beta 0.1", "SIPO, beta 0.1, recorded")]
    monkeypatch.setattr(benchmark, "ARMS", arms)
    argv = ["--seeds", "1", "--base-steps", "3", "--steps", "2", "--pairs", "32"]
    options = benchmark.make_parser().parse_args([*argv, "--output", str(tmp_path / "result.json")])
    benchmark.main(options)
    record = json.loads((tmp_path / "result.json").read_text())
    assert list(record["results"]) == ["base model", *(arm.name for arm in arms)]
    assert all(len(rows) == 1 for rows in record["results"].values())
    assert record["settings"]["steps"] == "2" and record["environment"]["trl"]
    assert "| SIPO, beta 0.1, recorded |" in capsys.readouterr().out
