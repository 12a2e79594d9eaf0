# SPDX-License-Identifier: Apache-2.0
"""From a study to preference pairs, and from these to a step of training."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.annotation.studies import answer_all, model_folders, side_of
from tests.data.clips import write_video
from tests.trainer.runs import DPO, make_trainer
from trl_sipo.annotation.records import TIE, Study
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.study_analysis import analyse
from trl_sipo.annotation.study_pairs import ImportCounts, num_samples, write_preference_pairs
from trl_sipo.annotation.tasks import BuildSettings, build_study, plan_study
from trl_sipo.annotation.votes import FIRST, SECOND
from trl_sipo.cli.main import main
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.errors import StudyError


def study_of(root, number=8, raters=3, groups=3):
    """Pictures of two models, and raters who all see every pair."""
    folders = model_folders(root, number)
    settings = BuildSettings(Study("t", seed=1), groups=groups, raters_per_group=raters // groups, num_mirrored=0)
    build_study(plan_study(folders, settings, root / "prompts.csv"), root / "study", show_progress=False)
    return Store.open(root / "study"), folders


def labels_of(*labels):
    """All raters' labels of the pairs by their numbers: a text for all raters, or one each."""

    def choose(rater, task):
        if task.kind == "gold":
            return side_of(FIRST, task)
        label = labels[int(task.pair_id.rsplit("-", 1)[1]) % len(labels)]
        return side_of(label if isinstance(label, str) else label[rater.rater_id - 1], task)

    return choose


def written(store, output, **options):
    pairs = num_samples(store.pairs())
    return write_preference_pairs(analyse(store).kept.votes, store.media_folder, output, num_pairs=pairs, **options)


def test_pairs_hold_the_samples_that_were_preferred_and_how_far(tmp_path):
    store, folders = study_of(tmp_path)
    answer_all(
        store, labels_of(SECOND, FIRST, TIE, (SECOND, SECOND, FIRST), (FIRST, SECOND, TIE), (FIRST, TIE, FIRST))
    )
    assert written(store, tmp_path / "pairs") == ImportCounts(6, 2, 0, 0, 0)
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs/pairs.parquet"), split="train")
    by_prompt = {row["prompt"]: row for row in rows}
    pairs = {pair.pair_id: pair for pair in store.pairs()}
    expected = [
        ("tuned", 1.0),
        ("base", 1.0),
        None,
        ("tuned", 2 / 3),
        None,
        ("base", 5 / 6),
        ("tuned", 1.0),
        ("base", 1.0),
    ]
    found = {}
    for row in rows:
        number, pair = int(row["pair_id"].rsplit("-", 1)[1]), pairs[row["pair_id"]]
        chosen, rejected = row["source"].split(" over ")
        found[number] = (chosen, pytest.approx(row["label"]))
        assert {chosen, rejected} == {"base", "tuned"} and row["margin"] == pytest.approx(2 * row["label"] - 1)
        assert row["prompt"] == pair.prompt and row["category"] == pair.category
        for model, arm in ((chosen, "chosen"), (rejected, "rejected")):
            source = Image.open(folders[model] / f"{pair.prompt_id}.png")
            assert np.array_equal(np.asarray(row[arm]), np.asarray(source))
    assert found == {number: value for number, value in enumerate(expected) if value is not None}
    assert len(by_prompt) == 6


def test_files_are_no_longer_filled_up(tmp_path):
    store, _ = study_of(tmp_path, 2, 1, 1)
    answer_all(store, labels_of(SECOND))
    written(store, tmp_path / "pairs")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs/pairs.parquet"), split="train")
    for row in table.cast_column("rejected", datasets.Image(decode=False)):
        assert len(row["rejected"]["bytes"]) < 1000 and b"paDd" not in row["rejected"]["bytes"]
        Image.open(io.BytesIO(row["rejected"]["bytes"])).verify()


def test_pairs_below_a_margin_unjudged_and_contested_ones_are_counted(tmp_path):
    """Of five raters in three groups, of one, one and three: the small ones say "first", the large one "second"."""
    store, _ = study_of(tmp_path, 4, 3)
    for name in ("one", "another"):
        store.invite(name, 3)
    contested, narrow = (FIRST, FIRST, SECOND, SECOND, SECOND), (SECOND, SECOND, FIRST, FIRST, SECOND)
    choose = labels_of(SECOND, contested, narrow, SECOND)
    for rater in store.raters():
        for assignment, task in zip(store.assignments(rater.rater_id), store.tasks(rater.rater_id), strict=True):
            if task.pair_id != "pair-00003":
                store.answer(
                    rater.rater_id, assignment.assignment_id, choose(rater, task), 5.0, f"r{assignment.position}"
                )
    assert written(store, tmp_path / "pairs") == ImportCounts(2, 0, 1, 0, 1)
    assert written(store, tmp_path / "clear", min_margin=0.5) == ImportCounts(1, 0, 1, 1, 1)
    with pytest.raises(StudyError, match="No pair of the study is left.*ties=0"):
        write_preference_pairs([], store.media_folder, tmp_path / "none", num_pairs=4)
    with pytest.raises(StudyError, match="from 0 to 1"):
        written(store, tmp_path / "wrong", min_margin=2)
    with pytest.raises(StudyError, match="not overwritten"):
        written(store, tmp_path / "pairs")
    for path in store.media_folder.iterdir():
        path.unlink()
    with pytest.raises(StudyError, match="is missing"):
        written(store, tmp_path / "lost")


def test_three_answers_against_two_are_a_margin_of_a_fifth(tmp_path):
    store, _ = study_of(tmp_path, 2, 5, 1)
    answer_all(store, labels_of((SECOND, FIRST, FIRST, SECOND, FIRST), (SECOND, FIRST, SECOND, SECOND, FIRST)))
    assert written(store, tmp_path / "pairs", min_margin=0.2) == ImportCounts(2, 0, 0, 0, 0)


def test_nothing_outside_a_study_gets_into_the_pairs(tmp_path):
    store, _ = study_of(tmp_path, 2, 1, 1)
    answer_all(store, labels_of(SECOND))
    (tmp_path / "secret").write_text("a key of mine")
    path = store.media_folder / store.pairs()[0].first_media
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(StudyError, match="leads out of the study"):
        written(store, tmp_path / "pairs")


def test_a_study_goes_straight_into_training(tmp_path, capsys):
    """`study import`, `data check`, and a step on the soft labels."""
    store, _ = study_of(tmp_path)
    answer_all(store, labels_of(SECOND, FIRST, TIE, (SECOND, SECOND, FIRST)))
    store.close()
    pairs = tmp_path / "pairs"
    assert main(["study", "import", str(tmp_path / "study"), "--output", str(pairs)]) == 0
    assert "6 pairs; dropped: 2 ties, 0 on which" in capsys.readouterr().out
    check = ["data", "check", str(pairs / "pairs.parquet"), "--output", str(tmp_path / "check"), "--strict"]
    assert main(check) == 0
    assert (
        "6 rows of the canonical format (images): 6 pairs, 0 ties, 0 without a label, 0 bad."
        in capsys.readouterr().out
    )
    dataset = load_preference_dataset(str(pairs / "pairs.parquet"))
    trainer = make_trainer(DPO, tmp_path / "run", pairs=dataset, soft_labels=True, max_steps=1)
    labels = sorted(float(trainer.train_dataset[index]["label"]) for index in range(6))
    assert labels == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0])
    trainer.train()
    assert trainer.state.global_step == 1 and np.isfinite(trainer.state.log_history[0]["loss"])


def test_videos_become_pairs_of_videos(tmp_path):
    for number, model in enumerate(("base", "tuned")):
        write_video(tmp_path / model / "a.mp4", 6, first=3 * number)
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a cat\n")
    folders = {name: tmp_path / name for name in ("base", "tuned")}
    settings = BuildSettings(Study("t"), groups=1, raters_per_group=1, gold=None)
    build_study(plan_study(folders, settings, tmp_path / "prompts.csv"), tmp_path / "study", show_progress=False)
    store = Store.open(tmp_path / "study")
    answer_all(store, labels_of(SECOND))
    assert written(store, tmp_path / "pairs").pairs == 1
    check = ["data", "check", str(tmp_path / "pairs/pairs.parquet"), "--output", str(tmp_path / "check"), "--strict"]
    assert main([*check, "--num_frames", "6", "--decode_videos"]) == 0
