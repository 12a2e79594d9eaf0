# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a step runs, and counts what it says."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step_time.py"


def test_every_variant_is_measured_and_split_arms_keep_half(tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    options = ["--unet", "tiny", "--latent-size", "8", "--rounds", "2", "--output", str(tmp_path / "out.json")]
    script["main"](script["make_parser"]().parse_args([*options, "--device", "cpu"]))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["seconds"].keys() == {*script["TRAINERS"], "bare", "bare, no reference", "peer"}
    assert all(len(values) == 1 and values[0] > 0 for values in result["seconds"].values())
    ratios = {name: entry["ratio"] for name, entry in result["ratios"].items()}
    assert 0.4 < ratios["split / both arms at once, activations"] < 0.6
    assert ratios["peer on the fly / ours precomputed"] > 1.5 and ratios["precomputed / live reference"] < 0.9
    printed = capsys.readouterr().out
    assert "step / bare loop" in printed and "target <= 1.03" in printed
