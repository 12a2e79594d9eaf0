# SPDX-License-Identifier: Apache-2.0
"""The runs behind the page on troubleshooting: curves as they were logged, and the script from pairs to pictures."""

import json

import pytest
from PIL import Image


def test_curves_are_what_was_logged(script):
    symptoms = script("symptoms")
    log = [{"step": 10, "loss": 0.7, "grad_norm": 2.0}, {"step": 20, "eval_drift/chosen_error": 0.1}]
    log.append({"step": 20, "loss": 0.6, "grad_norm": 3.0})
    curves = symptoms.curves(log)
    assert curves["loss"] == {"steps": [10, 20], "values": [0.7, 0.6]}
    assert curves["eval_drift/chosen_error"] == {"steps": [20], "values": [0.1]}
    assert curves["sipo/masked_fraction"] == {"steps": [], "values": []}


@pytest.mark.slow
def test_from_pairs_to_pictures(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "beta 2, far too small"
    script("symptoms").main(["--steps", "10", "--pairs", "64", "--runs", name, "--device", "cpu"])
    run = json.loads((tmp_path / "reports" / "symptoms" / "symptoms.json").read_text())["runs"][name]
    assert run["arm"] == "dpo@2" and run["curves"]["loss"]["values"][0] == pytest.approx(0.69, abs=0.02)
    for picture in ("symptoms_metrics", "symptoms_samples"):
        with Image.open(tmp_path / "docs" / "source" / "images" / f"{picture}.png") as image:
            assert image.width > 100
