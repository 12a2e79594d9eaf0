# SPDX-License-Identifier: Apache-2.0
"""What the pages on choosing a method, migrating and symptoms say is what was measured, and what the code does."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
import yaml
from trl import DPOConfig

from tests.docs.pages import ROOT, SOURCE, blocks, read
from trl_sipo import DiffusionDPOConfig
from trl_sipo.core.beta import to_diffusion_dpo_beta
from trl_sipo.core.objectives.diffusion_dpo import diffusion_dpo_loss
from trl_sipo.online.config import OnlineConfig, with_overrides
from trl_sipo.scripts.train import parse
from trl_sipo.trainer.rejected_fields import REJECTED_FIELDS


def _rows(page, columns):
    lines = [line.strip("| ").split(" | ") for line in read(SOURCE / page).splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in lines if len(row) == columns}


def test_the_table_of_methods_is_the_report():
    rows = json.loads((ROOT / "reports" / "baselines" / "summary.json").read_text())["rows"]
    stated = _rows("choosing_a_method.md", 5)
    stated.pop("method")
    stated = {name: cells for name, cells in stated.items() if cells[0].endswith("%")}
    assert len(stated) == 10
    for name, cells in stated.items():
        for source, accuracy, frechet in (("off_policy", *cells[:2]), ("on_policy", *cells[2:])):
            found = [row for row in rows if _name(row) == name and row["source"] == source]
            # SFT has no strength to choose.
            (final,) = [row["final"] for row in found if row["is_best"] or len(found) == 1]
            assert accuracy == f"{final['accuracy']['mean']:.0%}", (name, source)
            assert frechet == f"{final['frechet_distance']['mean']:.0f}", (name, source)


def _name(row):
    return row["label"].partition(",")[0]


def test_the_script_of_diffusers_and_ours_have_one_loss():
    """With beta converted; the script's own lines, from its formula, in float64."""
    error, ref_error = torch.rand(2, 2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    model_diff, ref_diff = error[0] - error[1], ref_error[0] - ref_error[1]
    theirs = -F.logsigmoid(2500 * (ref_diff - model_diff))
    beta = to_diffusion_dpo_beta(2500, "diffusers_sd15")
    chosen, rejected = (ref_error - error) / 2
    assert beta == 5000
    torch.testing.assert_close(diffusion_dpo_loss(chosen, rejected, beta=beta), theirs)
    assert "`--beta 2500 --beta_convention diffusers_sd15` | 5000 |" in read(SOURCE / "migrate_from_diffusers.md")


def test_defaults_named_when_migrating():
    ours = {name: field.default for name, field in DiffusionDPOConfig.__dataclass_fields__.items()}
    assert (ours["weight_decay"], ours["warmup_steps"], ours["seed"]) == (0.0, 0, 42)
    assert (ours["lr_scheduler_type"], ours["learning_rate"], ours["sample_posterior"]) == ("linear", 1e-5, False)
    text = {name: field.default for name, field in DPOConfig.__dataclass_fields__.items()}
    assert (text["beta"], text["learning_rate"]) == (0.1, 1e-6)
    assert "max_length" in REJECTED_FIELDS


def test_what_troubleshooting_says_of_its_runs():
    runs = json.loads((ROOT / "reports" / "symptoms" / "symptoms.json").read_text())["runs"]
    last = {name: {key: curve["values"][-1] for key, curve in run["curves"].items()} for name, run in runs.items()}
    rows = {name: cells for name, cells in _rows("troubleshooting.md", 6).items() if name in runs}
    assert rows.keys() == runs.keys()
    for name, (accuracy, drift, saturated, masked, _) in rows.items():
        assert accuracy == f"{last[name]['eval_rewards/accuracies']:.0%}", name
        assert float(drift) == pytest.approx(last[name]["eval_drift/chosen_error"], rel=0.05, abs=0.005), name
        assert saturated == f"{last[name]['rewards/saturated_fraction']:.0%}", name
        assert masked == f"{last[name]['sipo/masked_fraction']:.0%}", name


def test_settings_in_yaml_are_taken(tmp_path):
    (few_steps,) = blocks(SOURCE / "backbones.md", "yaml")
    (tmp_path / "turbo.yaml").write_text(few_steps.code)
    words = ["--config", str(tmp_path / "turbo.yaml"), "--dataset_name", "your/preferences", "--use_cpu", "true"]
    _, training, model = parse("sipo", [*words, "--max_steps", "10", "--output_dir", str(tmp_path / "out")])
    assert training.timesteps == [249, 499, 749, 999] and model.model_name_or_path == "stabilityai/sdxl-turbo"


def test_the_yaml_of_rounds_has_settings_that_exist():
    (self_play,) = blocks(SOURCE / "online.md", "yaml")
    settings = yaml.safe_load(self_play.code)
    assert settings["mode"] == "self_play" and settings.keys() <= OnlineConfig.__dataclass_fields__.keys()
    assert with_overrides(settings, ["--rounds", "2"])["rounds"] == 2


@pytest.mark.parametrize("block", blocks(SOURCE / "outside_scorers.md", "json"), ids=str)
def test_messages_of_the_protocol_are_json(block):
    decoder, text, seen = json.JSONDecoder(), block.code.strip(), 0
    while text:
        message, end = decoder.raw_decode(text)
        assert message["version"] == 1 and {"method", "info", "scores", "error"} & message.keys()
        text, seen = text[end:].strip(), seen + 1
    assert seen >= 1


def test_the_lines_of_the_first_table_lead_to_a_symptom():
    page = read(SOURCE / "troubleshooting.md")
    first = page.partition("## ")[0]
    assert len(re.findall(r"\]\(#[\w-]+\)", first)) >= 10
