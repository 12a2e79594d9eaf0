# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study build, invite, report, export, import`, as a user types them."""

import csv
import json
import stat

import pytest

from tests.annotation.studies import answer_all, model_folders, side_of
from trl_sipo.annotation.records import GOLD, LEFT
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.tasks import Invitation
from trl_sipo.annotation.votes import FIRST, SECOND
from trl_sipo.cli.main import main
from trl_sipo.errors import StorageError
from trl_sipo.scripts.study_build import tell_tokens


@pytest.fixture
def models(tmp_path):
    folders = model_folders(tmp_path, 6)
    return [f"{name}={folder}" for name, folder in folders.items()]


def build(tmp_path, models, *options):
    return main(
        ["study", "build", "--models", *models, "--prompts", str(tmp_path / "prompts.csv")]
        + ["--output", str(tmp_path / "study"), "--groups", "3", "--raters_per_group", "1", *options]
    )


def test_a_study_from_its_beginning_to_its_end(tmp_path, models, capsys):
    assert build(tmp_path, models, "--num_gold", "2", "--num_mirrored", "1", "--title", "Cats", "--seed", "5") == 0
    said = capsys.readouterr().out
    assert "6 pairs of 6 prompts, and 2 of which the better is known: base and tuned." in said
    assert "3 raters in 3 groups. Each gets 9 tasks, of which 2 gold and 1 mirrored: about 2 minutes" in said
    tokens = [line.split() for line in said.splitlines() if line.startswith("rater-")]
    assert [(words[0], words[2]) for words in tokens] == [("rater-01", "1"), ("rater-02", "2"), ("rater-03", "3")]
    store = Store.open(tmp_path / "study")
    assert [store.rater_of(words[-1]).name for words in tokens] == ["rater-01", "rater-02", "rater-03"]
    assert store.study().title == "Cats" and store.study().seed == 5 and store.study().is_blind

    assert main(["study", "invite", str(tmp_path / "study"), "--name", "anna", "--group", "3"]) == 0
    assert store.rater_of(capsys.readouterr().out.split()[-1]).name == "anna"
    assert main(["study", "invite", str(tmp_path / "study"), "--name", "anna", "--renew"]) == 0
    assert store.rater_of(capsys.readouterr().out.split()[-1]).name == "anna"

    assert main(["study", "invite", str(tmp_path / "study"), "--name", "ben", "--replaces", "rater-02"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:3] == ["ben", "group", "2"] and store.tasks(store.rater_of(words[-1]).rater_id) == store.tasks(2)

    answer_all(store, lambda rater, task: side_of(FIRST if task.kind == GOLD else SECOND, task))
    store.answer(1, store.assignments(1)[0].assignment_id, LEFT, 1.0, "another")
    store.close()
    assert main(["study", "report", str(tmp_path / "study"), "--num_resamples", "200"]) == 0
    said = capsys.readouterr().out
    assert "tuned wins against base: win rate 100.0%" in said and "6 wins, 0 ties, 0 losses" in said
    assert "not finished" not in said and "left out" not in said
    report = json.loads((tmp_path / "study/report/study.json").read_text())
    assert report["num_stored"] == report["num_answered"] + 1 == 46
    assert report["command"].startswith("trl-sipo study report ")

    for name in ("answers.csv", "answers.jsonl"):
        assert main(["study", "export", str(tmp_path / "study"), "--output", str(tmp_path / name)]) == 0
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(lines) == 46 and [line["is_last"] for line in lines].count(False) == 1
    assert [{name: str(value) for name, value in line.items()} for line in lines] == rows
    for line in lines:
        pair = line["kind"] != "gold" and line["is_last"] and line["rater"] != "rater-01"
        assert not pair or line["chosen"] == "tuned" == line[line["choice"]]


def test_a_dry_run_writes_nothing(tmp_path, models, capsys):
    assert build(tmp_path, models, "--dry_run", "--tasks_per_rater", "4", "--num_mirrored", "0") == 0
    said = capsys.readouterr().out
    assert "In each group a pair gets 0.667 answers in the mean." in said and "rater-01" not in said
    assert not (tmp_path / "study").exists()


def test_tokens_can_go_to_a_file_of_the_owner(tmp_path, models, capsys):
    file = tmp_path / "invitations.csv"
    assert build(tmp_path, models, "--invitations", str(file)) == 0
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert all(row["token"] not in capsys.readouterr().out for row in rows)
    store = Store.open(tmp_path / "study")
    assert [store.rater_of(row["token"]).name for row in rows] == [row["rater"] for row in rows]
    assert len(rows) == 3


def test_tokens_are_printed_where_their_file_cannot_be_written(tmp_path, capsys):
    """The folder went away while the study was written, say."""
    with pytest.raises(StorageError, match="The tokens are printed above"):
        tell_tokens([Invitation("rater-01", 1, "0f")], tmp_path / "absent/file.csv")
    assert capsys.readouterr().out == "rater-01  group 1  0f\n"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--gold", "/no/such/folder"], "no folder 'better'"),
        (["--guidelines", "/no/such/file"], "cannot be read"),
        (["--against", "nobody"], "none of the models"),
        (["--title", " "], "needs a title"),
        (["--samples_per_prompt", "2"], "a prompt has 1"),
        (["--tasks_per_rater", "7"], "from 1 to 6"),
        (["--raters_per_group", "1000000000"], "more than 1,000 raters"),
        (["--title", "\ud800"], "no Unicode"),
        (["--invitations", "/no/such/folder/file.csv"], "no folder '/no/such/folder' for the invitations"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, models, capsys, options, words):
    assert build(tmp_path, models, *options) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "study").exists()


def test_a_study_without_answers_exports_a_header(tmp_path, models, capsys):
    assert build(tmp_path, models) == 0
    for name in ("answers.csv", "answers.jsonl"):
        assert main(["study", "export", str(tmp_path / "study"), "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "answers.csv").read_text().startswith("answer_id,rater,")
    assert (tmp_path / "answers.jsonl").read_text() == ""
    assert main(["study", "export", str(tmp_path / "study"), "--output", str(tmp_path / "answers.csv")]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["report", "STUDY"], "Nobody has judged"),
        (["report", "STUDY", "--max_side_share", "2"], "`max_side_share`"),
        (["report", "STUDY", "--level", "1"], "level"),
        (["report", "STUDY", "--seed", "-1"], "zero or more"),
        (["report", "elsewhere"], "no study at 'elsewhere'"),
        (["export", "STUDY", "--output", "answers.txt"], "must end with .csv or .jsonl"),
        (["import", "STUDY", "--output", "pairs"], "Nobody has judged"),
        (["invite", "STUDY", "--name", "rater-01", "--group", "1"], "already"),
        (["invite", "STUDY", "--name", "anna", "--group", "33"], "no group 33: its groups are 1, 2, 3"),
        (["unknown"], "Unknown command 'unknown' of study"),
    ],
)
def test_commands_on_a_study_without_answers(tmp_path, models, capsys, argv, words):
    assert build(tmp_path, models) == 0
    argv = [word.replace("STUDY", str(tmp_path / "study")) for word in argv]
    assert main(["study", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
