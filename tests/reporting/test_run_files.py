# SPDX-License-Identifier: Apache-2.0
"""What is read of runs: whole logs, torn ones, long ones, those of checkpoints and of the demo, and hostile ones."""

import json
import math
import os
import shutil

import pytest
from PIL import Image

from tests.hostile.media import png_bomb
from tests.reporting.conftest import STEPS
from tests.reporting.logged_runs import ENDED, held_out, learning, levels_at, picture, write_clip, write_log
from tests.trainer.runs import SIPO, make_trainer
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.reporting.level_frames import ExactFrames, PooledFrames, read_levels
from trl_sipo.reporting.run_files import read_runs
from trl_sipo.reporting.run_lines import JsonLines
from trl_sipo.reporting.run_pictures import Limits, PictureReader, evenly, read_samples
from trl_sipo.reporting.run_quality import check_evaluations, read_quality
from trl_sipo.reporting.setting_tables import command_of, setting_rows, start_rows
from trl_sipo.reporting.thinning import ThinnedLog

LEVEL = {0.5: {"importance_weight": 0.8, "pairs": 2.0}}


def read(folder, **options):
    return read_runs([folder], **options)[0]


def test_a_real_run_is_read_as_it_was_logged(runs):
    run = read(runs[0])
    assert run.has_ended and run.last_step == STEPS and run.notes == [] and not run.is_empty
    assert run.course("rewards/margins").steps == list(range(1, STEPS + 1))
    assert run.course("rewards/margins", "held out").finite[0] == (0, 0.0)
    assert [frame.step for frame in run.eval_frames] == [0, 4, 8]
    assert len(run.train_frames) == STEPS and run.train_frames[0].levels
    assert run.text("method") == "SIPO" and run.setting("mask_threshold") == 0.9
    assert run.samples.keys == ["brightness", "brightness_base"]
    samples = read_samples(run.folder, PictureReader(Limits()))
    assert samples.steps == [4, 8] and samples.rows[0].prompt == "a red cat" and samples.rows[0].base.width == 32


def test_a_run_without_a_log_is_read_from_its_newest_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "run_log": False}
    make_trainer(SIPO, tmp_path, **options).train()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9/trainer_state.json").write_text('{"log_history": [{"st')  # being written
    run = read(tmp_path)
    assert run.source == "checkpoint-4/trainer_state.json" and "is torn" in run.notes[0]
    assert run.course("loss").steps == [1, 2, 3, 4] and run.has_ended
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert not read(tmp_path).has_ended


def test_a_run_of_the_demo_is_read_with_what_it_measured(tmp_path):
    records = [{"step": step, "accuracy": 0.8, "held_out_margins": 0.1 * step} for step in (0, 10)]
    log = [{"step": 5, **learning(5)}]
    (tmp_path / "result.json").write_text(json.dumps({"arm": "sipo", "records": records, "log": log}))
    run = read(tmp_path)
    assert run.course("rewards/margins", "held out").finite == [(0, 0.0), (10, 1.0)]
    (points,) = read_quality([run], []).measures["accuracy by the verifier"].values()
    assert [(point.step, point.value) for point in points] == [(0, 0.8), (10, 0.8)]


def test_a_torn_last_line_is_waited_for_and_a_broken_one_is_counted(tmp_path):
    run = write_log(tmp_path, [learning(1), learning(2)])
    log = run / "run_log/metrics.jsonl"
    with log.open("a") as file:
        file.write('no json\n[1, 2]\n{"step": "three"}\n' + "[" * 100_000 + "\n" + '{"step": 3, "lo')
    found = read(run)
    assert found.course("loss").steps == [1, 2]
    assert found.notes == ["3 line(s) of metrics.jsonl could not be read."]


def test_a_line_longer_than_any_is_passed_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * (9 << 20) + b'"}\n{"c": 2}\n')
    lines = JsonLines(path)
    assert list(lines) == [{"a": 1}, {"c": 2}] and lines.num_broken == 1


def test_numbers_that_are_not_finite_are_gaps_with_their_step(tmp_path):
    rows = [learning(1), learning(2, loss=math.nan), learning(3, loss=math.inf), learning(4, loss=10**400)]
    course = read(write_log(tmp_path, rows)).course("loss")
    assert course.means[0] == pytest.approx(0.688) and course.means[1:] == [None] * 3
    assert course.num_broken == 3 and course.first_broken == 2


def test_a_resumed_run_has_not_ended(tmp_path):
    rows = [learning(1), {"step": 1, **ENDED, "time": 10.0}]
    assert not read(write_log(tmp_path / "again", rows, step=1)).has_ended  # the start is later than the end
    assert read(write_log(tmp_path / "once", rows, step=0)).has_ended  # a clock that was set back
    rows = [learning(1), {"step": 1, **ENDED}]
    assert read(write_log(tmp_path / "other", rows, step=1)).has_ended
    assert not read(write_log(tmp_path / "on", [*rows, learning(2)])).has_ended


def test_what_is_evaluated_after_the_end_leaves_a_run_ended(tmp_path):
    run = write_log(tmp_path, [learning(1), {"step": 1, **ENDED}, held_out(learning(1))])
    assert read(run).has_ended


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "x", 5, None, "nan"])
@pytest.mark.parametrize("step", [10**400, math.nan, "1", None], ids=["huge", "nan", "text", "none"])
def test_starts_of_no_calendar_and_no_step_are_shown(tmp_path, time, step):
    run = write_log(tmp_path, [learning(1)])
    starts = run / "run_log/starts.jsonl"
    starts.write_text(json.dumps({**json.loads(starts.read_text()), "time": time, "step": step}) + "\n")
    found = read(run)
    assert start_rows(found) == [["-", "-", "-"]] and not found.has_ended


def test_some_other_result_is_no_hindrance(tmp_path):
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(DatasetError, match="no JSON object"):
        read(tmp_path)
    found = read(write_log(tmp_path, [learning(1)]))
    assert found.last_step == 1 and "result.json" in found.notes[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    run = write_log(tmp_path, [learning(1)])
    before = type(run).open

    def refuse(path, *args, **options):
        if path.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied")
        return before(path, *args, **options)

    monkeypatch.setattr(type(run), "open", refuse)  # root may read everything
    with pytest.raises(DatasetError, match="metrics.jsonl' cannot be read: Permission denied"):
        read(run)


def test_many_noise_levels_are_thinned_over_the_whole_schedule():
    levels = [{"time": (index + 0.5) / 150, "masked": 1.0} for index in range(150)]
    times = list(read_levels({"levels": levels}))
    assert len(times) == 50 and times[0] < 0.01 and times[-1] > 0.98


def test_the_last_numbers_are_those_of_five_logs_at_least(tmp_path):
    rows = [learning(step, **{"sipo/masked_fraction": float(step == 20)}) for step in range(1, 21)]
    assert read(write_log(tmp_path, rows)).recent("sipo/masked_fraction") == pytest.approx(0.2)


def test_several_held_out_datasets_are_told_apart(tmp_path):
    rows = [held_out(learning(10), "eval_cats_"), held_out(learning(20), "eval_big_dogs_")]
    run = read(write_log(tmp_path, rows))
    assert list(run.held_out) == ["cats", "big_dogs"]
    assert run.course("rewards/margins", "big_dogs").finite == [(20, pytest.approx(0.1))]


def test_a_long_log_is_thinned_to_means_between_the_extremes():
    log = ThinnedLog(limit=10)
    for step in range(1, 1001):
        log.add(step, {"loss": 5.0 if step == 777 else 1.0, "late": float(step > 990)})
    course = log.course("loss")
    assert 10 <= len(course.steps) <= 20 and course.steps[-1] == 1000
    assert log.num_rows == 1000 and log.rows_per_point == 64
    assert max(course.highs) == 5.0 and min(course.lows) == 1.0 and 1.0 < max(course.means) < 1.1
    assert sum(course.means[:-1]) * 64 + course.means[-1] * (1000 - 64 * (len(course.means) - 1)) == pytest.approx(
        1004
    )


def test_a_row_of_an_earlier_step_is_counted_and_left_out():
    log = ThinnedLog()
    for step in (1, 5, 3, 6):
        log.add(step, {"loss": 1.0})
    assert log.course("loss").steps == [1, 5, 6] and log.num_disordered == 1


def test_evaluations_are_kept_exactly_and_draws_are_pooled():
    exact, pooled = ExactFrames(limit=3), PooledFrames(limit=3)
    for step in range(100):
        exact.add(step, {0.5: {"importance_weight": step / 100, "pairs": 1.0}})
        pooled.add(step, {0.5: {"importance_weight": float(step % 2), "pairs": 1.0 + step % 2}})
    steps = [frame.step for frame in exact.frames]
    assert steps[0] == 0 and steps[-1] == 99 and 3 <= len(steps) <= 8
    assert all(frame.levels[0.5]["importance_weight"] == frame.step / 100 for frame in exact.frames)
    assert len(pooled.frames) <= 6
    assert pooled.frames[0].levels[0.5]["importance_weight"] == pytest.approx(2 / 3)  # weighted by pairs
    assert sum(frame.levels[0.5]["pairs"] for frame in pooled.frames) == 150


def test_hostile_levels_are_left_out(tmp_path):
    levels = [{"time": 2}, {"time": "x"}, 5, {"time": 0.5, "importance_weight": "NaN", "pairs": -3}]
    lines = [{"step": 1, "split": "eval", "levels": levels}, {"step": 2, "split": "eval", "levels": {"time": 1}}]
    run = read(write_log(tmp_path, [learning(1)], lines))
    (frame,) = run.eval_frames
    assert frame.values("importance_weight", [0.5]) == [None]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "There is no folder"),
        (lambda path: path.write_text(""), "is no folder"),
        (lambda path: path.mkdir(), "holds no training run"),
        (lambda path: write_log(path / "inner", [learning(1)]), "There are runs below it: .*inner"),
        (lambda path: (path.mkdir(), (path / "evaluation.json").write_text("{}")), "--evaluation"),
    ],
    ids=["missing", "file", "empty", "parent", "evaluation"],
)
def test_what_is_no_run_is_refused(tmp_path, make, message):
    make(tmp_path / "place")
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path / "place")


def test_runs_are_named_apart_and_given_once(tmp_path):
    folders = [write_log(tmp_path / place / "run", [learning(1)]) for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    with pytest.raises(ConfigurationError, match="more than once"):
        read_runs([folders[0], folders[0] / "../run"])


def test_language_models_and_diffusion_models_are_not_mixed(tmp_path):
    text = write_log(tmp_path / "text", [learning(1, **{"sipo/chosen_importance_weight": 1.0})])
    images = write_log(tmp_path / "images", [learning(1)])
    with pytest.raises(ConfigurationError, match="a report of each"):
        read_runs([text, images])


def test_links_out_of_the_folder_and_pipes_are_not_followed(tmp_path):
    secret = write_log(tmp_path / "secret", [learning(1)])
    run = tmp_path / "run"
    (run / "run_log").mkdir(parents=True)
    (run / "run_log/metrics.jsonl").symlink_to(secret / "run_log/metrics.jsonl")
    os.mkfifo(run / "run_log/levels.jsonl")
    with pytest.raises(ConfigurationError, match="is a link out of this folder"):
        read(run)
    picture(1).save(tmp_path / "secret.png")
    (run / "samples/step-000001").mkdir(parents=True)
    (run / "samples/step-000001/00.png").symlink_to(tmp_path / "secret.png")
    assert read_samples(run, PictureReader(Limits())) is None


def test_broken_and_huge_pictures_are_left_out_and_named(tmp_path):
    place = tmp_path / "samples/step-000001"
    place.mkdir(parents=True)
    picture(1).save(place / "00.png")
    (place / "01.png").write_bytes((place / "00.png").read_bytes()[:200])
    (place / "02.png").write_bytes(png_bomb())
    samples = read_samples(tmp_path, PictureReader(Limits()))
    assert [bool(row.current) for row in samples.rows] == [True, False, False]
    notes = " ".join(samples.notes)
    assert "01.png does not open" in notes and "02.png" in notes and ("too large" in notes or "Bomb" in notes)


def test_old_grids_are_cut_into_reference_and_policy(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (5, 10):
        grid = Image.new("RGB", (2 * 32 + 4, 32), "white")
        grid.paste("red", (0, 0, 32, 32))
        grid.paste("blue", (36, 0, 68, 32))
        grid.save(tmp_path / f"samples/step-{step:06d}.png")
    samples = read_samples(tmp_path, PictureReader(Limits()))
    assert samples.steps == [5, 10]
    with_colours = (samples.rows[0].base, samples.rows[0].current[10])
    assert [_colour(part.data) for part in with_colours] == [(255, 0, 0), (0, 0, 255)]


def _colour(data):
    from io import BytesIO

    return Image.open(BytesIO(data)).convert("RGB").getpixel((16, 16))


def test_pictures_are_scaled_and_counted(tmp_path):
    for step in range(0, 100, 10):
        place = tmp_path / f"samples/step-{step:06d}"
        place.mkdir(parents=True)
        for index in range(4):
            picture(step + index, (200, 100)).save(place / f"{index:02d}.png")
    samples = read_samples(tmp_path, PictureReader(Limits(pictures=20, side=50)))
    assert len(samples.rows) == 4 and samples.steps == [0, 30, 60, 90]
    assert (samples.rows[0].current[0].width, samples.rows[0].current[0].height) == (50, 25)
    assert "Shown are 4 of 10 steps, evenly spaced." in samples.notes


def test_clips_keep_a_still_frame_and_are_not_read_twice(tmp_path):
    write_clip(tmp_path / "samples/step-000001/00.webp", 0)
    reader = PictureReader(Limits())
    clip = read_samples(tmp_path, reader).rows[0].current[1]
    assert clip.still and clip.still != clip.data
    assert read_samples(tmp_path, reader).rows[0].current[1] is clip
    reader.forget_unused()
    assert read_samples(tmp_path, reader).rows[0].current[1] is clip
    reader.forget_unused()
    reader.forget_unused()  # not read meanwhile
    assert read_samples(tmp_path, reader).rows[0].current[1] is not clip


def test_evenly_keeps_both_ends():
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly([1, 2], 5) == [1, 2] and evenly([1, 2, 3], 1) == [3]


def _evaluation(folder, models, rows):
    folder.mkdir()
    report = {"base": "base", "models": models, "metrics": rows}
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


def _row(model, estimate, rate=None):
    interval = {"estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1}
    against = None if rate is None else {"win_rate": {"estimate": rate, "low": None, "high": None}}
    return {"metric": "pick", "model": model, "mean": interval, "against_base": against}


def test_evaluations_are_laid_on_the_steps_of_their_run(tmp_path):
    folders = [write_log(tmp_path / name, [learning(300)]) for name in ("one", "two")]
    models = ["base=org/m", f"early=org/m+{folders[0]}/checkpoint-100", "late=org/m+moved/one", "x=org/other"]
    rows = [_row("base", 0.2), _row("late", 0.6, 0.7), _row("early", 0.4, 0.6), _row("x", 0.9, 0.9)]
    quality = read_quality(read_runs(folders), [_evaluation(tmp_path / "evaluation", models, rows)])
    points = quality.measures["pick"]["one"]
    assert [(p.step, p.value, p.low) for p in points] == [
        (0, 0.2, pytest.approx(0.1)), (100, 0.4, pytest.approx(0.3)), (300, 0.6, pytest.approx(0.5))
    ]  # fmt: skip
    assert [(p.step, p.value, p.high) for p in quality.win_rates["win rate by pick"]["one"]] == [
        (100, 0.6, 0.6), (300, 0.7, 0.7)
    ]  # fmt: skip
    assert "two" not in quality.measures["pick"] and "'x'" in quality.notes[0]


def test_a_run_of_the_same_name_is_not_taken_for_another(tmp_path):
    mine, other = (write_log(tmp_path / place / "run", [learning(300)]) for place in ("a", "b"))
    models = ["base=org/m", f"mine=org/m+{mine}/checkpoint-100", f"other=org/m+{other}/checkpoint-200"]
    rows = [_row("mine", 0.4, 0.6), _row("other", 0.9, 0.9)]
    quality = read_quality(read_runs([mine]), [_evaluation(tmp_path / "evaluation", models, rows)])
    assert [point.step for point in quality.measures["pick"]["run"]] == [100] and "'other'" in quality.notes[0]


@pytest.mark.parametrize("corrected, is_sure", [(None, True), (0.01, True), (0.2, False)])
def test_a_win_rate_is_sure_where_the_correction_leaves_it_so(tmp_path, corrected, is_sure):
    run = write_log(tmp_path / "run", [learning(300)])
    row = {**_row("late", 0.6, 0.9), "corrected_win_p_value": corrected}
    folder = _evaluation(tmp_path / "evaluation", ["base=org/m", f"late=org/m+{run}"], [row])
    (point,) = read_quality(read_runs([run]), [folder]).win_rates["win rate by pick"]["run"]
    assert point.is_sure is is_sure


def test_an_evaluation_must_be_one(tmp_path):
    with pytest.raises(ConfigurationError, match="--evaluation"):
        check_evaluations([tmp_path])
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(DatasetError, match="no JSON object"):
        read_quality([], [tmp_path])


def test_settings_that_differ_come_first_and_secrets_never(tmp_path):
    token = "hf_" + "x" * 20
    one = write_log(tmp_path / "one", [], command=["trl-sipo", "sipo", "--hub_token", token, "--name", "a b"])
    two = write_log(tmp_path / "two", [], settings={"beta": 10.0, "max_steps": 100, "lists": [1, {"x": [2]}]})
    runs = read_runs([one, two])
    different, every = setting_rows(runs)
    assert ["beta", "5000.0", "10.0"] in different and ["max_steps", "100", "100"] not in different
    assert ["max_steps", "100", "100"] in every and ["learning_rate", "1e-05", ""] in different
    hidden = {"hub_token": token, "inner": {"wandb_api_key": "secret"}, "url": "https://me:secret@host/x", "seed": 1}
    _, every = setting_rows([read(write_log(tmp_path / "three", [], settings=hidden, model=f"org/{token}"))])
    assert ["seed", "1"] in every and not any(token in text or "secret" in text for _, text in every)
    assert token not in command_of(runs[0].last_start) and command_of(runs[0].last_start).endswith("'a b'")


def test_settings_without_end_are_cut(tmp_path):
    run = write_log(tmp_path, [], settings={"long": "x" * 10_000, "many": {str(i): i for i in range(5000)}})
    starts = run / "run_log/starts.jsonl"
    starts.write_text(starts.read_text().replace('"long"', f'"deep": {"[" * 900 + "]" * 900}, "long"'))
    _, every = setting_rows([read(run)])
    assert len(every) == 1000 and max(len(row[1]) for row in every) < 320


def test_a_restart_shows_what_changed(tmp_path):
    run = write_log(tmp_path, [learning(1)])
    starts = run / "run_log/starts.jsonl"
    again = {**json.loads(starts.read_text()), "step": 50, "settings": {"beta": 1.0, "learning_rate": 1e-5}}
    with starts.open("a") as file:
        file.write(json.dumps(again) + "\n")
    rows = start_rows(read(run))
    assert [row[1] for row in rows] == ["0", "50"] and "UTC" in rows[0][0]
    assert rows[1][2] == "beta: 5000.0 -> 1.0; max_steps: 100 -> not set"


def test_levels_of_a_run_are_kept_by_split(tmp_path):
    lines = [
        levels_at(5, lambda time: time, "train"),
        levels_at(5, lambda time: 1.0),
        levels_at(5, lambda _: 0.0, "eval_b"),
    ]
    run = read(write_log(tmp_path, [learning(5)], lines))
    assert run.eval_frames[0].values("importance_weight", [0.1]) == [1.0]
    assert run.train_frames[0].values("importance_weight", [0.1]) == [0.1]


def test_a_moved_folder_is_still_a_run(runs, tmp_path):
    shutil.copytree(runs[1] / "run_log", tmp_path / "elsewhere/run_log")
    assert read(tmp_path / "elsewhere").last_step == STEPS
