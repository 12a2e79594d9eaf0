# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo data check`, from a folder on disk to a page, and back to training without the rows that it lists."""

import json
import re

import pytest

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import preference_pairs
from trl_sipo.cli.main import main
from trl_sipo.scripts.data import DATA_COMMANDS
from trl_sipo.scripts.data_check import make_parser


@pytest.fixture
def pairs(tmp_path):
    """Eight pairs as JSON Lines with images beside them, one of which is no image."""
    rows = []
    (tmp_path / "pairs" / "media").mkdir(parents=True)
    for number, row in enumerate(preference_pairs(8)):
        arms = {arm: f"media/{number}_{arm}.png" for arm in ("chosen", "rejected")}
        for arm, path in arms.items():
            row[arm].save(tmp_path / "pairs" / path)
        rows.append({"prompt": row["prompt"] + " <b>", **arms})
    (tmp_path / "pairs" / "media" / "5_rejected.png").write_bytes(b"broken")
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs"


def test_a_page_that_needs_nothing_else(pairs, tmp_path, capsys):
    assert main(["data", "check", str(pairs), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "8 rows of the canonical format (images): 7 pairs, 0 ties, 0 without a label, 1 bad." in printed
    assert "row 5: column 'rejected'" in printed and f"--skip_rows {tmp_path / 'out' / 'bad_rows.jsonl'}" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_bad"] == 1 and report["sizes"] == {"32x32": 14}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 1 and "data:image/png;base64," in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "a red cat &lt;b&gt;" in page and "cannot tell a second judgement from a copied row" in page


def test_training_refuses_what_is_listed_and_goes_on_without_it(pairs, tmp_path, capsys):
    main(["data", "check", str(pairs), "--output", str(tmp_path / "out")])
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    command = ["dpo", "--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(pairs)]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--per_device_train_batch_size", "4"]
    command += ["--use_peft", "true", "--use_cpu", "true", "--report_to", "none"]
    assert main(command) == 2
    assert "row 5, the rejected image" in capsys.readouterr().err
    assert main([*command, "--skip_rows", str(tmp_path / "out" / "bad_rows.jsonl")]) == 0
    assert "rows 7, ties 0" in capsys.readouterr().out


def test_strict_ends_with_an_error(pairs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["data", "check", str(pairs), "--strict", *output]) == 2
    assert "1 rows cannot be trained on" in capsys.readouterr().err
    (pairs / "media" / "5_rejected.png").write_bytes((pairs / "media" / "5_chosen.png").read_bytes())
    assert main(["data", "check", str(pairs), "--strict", "--dataset_streaming", *output]) == 0
    assert "1 pairs of the same thing twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "`--limit` must be at least 1"),
        (["--num_frames", "0"], "`--num_frames` must be at least 1"),
        (["--num_workers", "-1"], "`--num_workers` must be zero or more"),
        (["--num_workers", "2", "--dataset_streaming"], "read by one process"),
        (["--dataset_format", "nothing"], "unknown format 'nothing'"),
        (["--dataset_split", "test"], "no split 'test'"),
    ],
)
def test_options_that_make_no_sense(options, message, pairs, tmp_path, capsys):
    assert main(["data", "check", str(pairs), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help(capsys):
    assert main(["data", "--help"]) == 0 and all(name in capsys.readouterr().out for name in DATA_COMMANDS)
    assert main(["data", "mend"]) == 2 and "Unknown command 'mend'" in capsys.readouterr().err
    assert "--skip_rows" not in make_parser().format_help()
