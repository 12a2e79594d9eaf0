# SPDX-License-Identifier: Apache-2.0
"""The files of a run's log by themselves: whole lines, of one run, cut where a checkpoint was written."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.run_logs import lines
from trl_sipo.trainer.run_log import RunLog, append_line


def test_a_run_finds_its_own_log_again(tmp_path):
    """Where another one, which was given up, has moved it aside."""
    one = RunLog.begin(tmp_path, {"step": 0})
    one.write("metrics.jsonl", {"step": 1})
    mark = one.mark()
    one.write("metrics.jsonl", {"step": 2})
    RunLog.begin(tmp_path, {"step": 0}).write("metrics.jsonl", {"step": 1, "of": "another"})

    again = RunLog.resume(tmp_path, {"step": 1}, step=1, mark=mark)
    again.write("metrics.jsonl", {"step": 2, "of": "one"})
    assert lines(tmp_path, "metrics") == [{"step": 1}, {"step": 2, "of": "one"}]
    assert [start["step"] for start in lines(tmp_path, "starts")] == [0, 1]
    assert json.loads((tmp_path / "run_log-2" / "metrics.jsonl").read_text())["of"] == "another"


@pytest.mark.parametrize("takes_over", ["new", "same"])
def test_a_log_that_another_process_takes_over_ends_and_is_not_mixed(takes_over, tmp_path, caplog):
    """Two jobs with one output folder: of another run, or one that was started again while the first still runs."""
    one = RunLog.begin(tmp_path, {"step": 0})
    one.write("metrics.jsonl", {"step": 1, "of": "one"})
    if takes_over == "new":
        other = RunLog.begin(tmp_path, {"step": 0})
    else:
        other = RunLog.resume(tmp_path, {"step": 1}, step=1, mark=one.mark())
    for step in (2, 3):
        one.write("metrics.jsonl", {"step": step, "of": "one"})
        other.write("metrics.jsonl", {"step": step, "of": "other"})
    assert [line["of"] for line in lines(tmp_path, "metrics") if line["step"] > 1] == ["other", "other"]
    assert caplog.text.count("The log of the run ends here: another run has begun") == 1
    assert one.mark() == {"run": one.run, "sizes": {}}  # not those of the files of the other
    assert other.mark()["sizes"]["metrics.jsonl"] > 0


@pytest.mark.parametrize("sizes", [None, {"metrics.jsonl": 10**9}, {"metrics.jsonl": 5}], ids=["no", "long", "odd"])
def test_without_a_mark_that_fits_lines_are_dropped_by_their_step(sizes, tmp_path):
    log = RunLog.begin(tmp_path, {"step": 0})
    for step in (1, 2, 2, 3):
        log.write("metrics.jsonl", {"step": step})
    with open(tmp_path / "run_log" / "metrics.jsonl", "a") as file:
        file.write("not a line of ours\n")
    mark = None if sizes is None else {"run": log.run, "sizes": sizes}
    RunLog.resume(tmp_path, {"step": 2}, step=2, mark=mark)
    assert lines(tmp_path, "metrics") == [{"step": step} for step in (1, 2, 2)]


@pytest.mark.parametrize("name", ["starts", "metrics", "levels"])
def test_a_file_elsewhere_that_a_log_links_to_is_left_as_it_is(name, tmp_path):
    log = RunLog.begin(tmp_path, {"step": 0})
    log.write("metrics.jsonl", {"step": 1})
    link, elsewhere = tmp_path / "run_log" / f"{name}.jsonl", tmp_path / "elsewhere"
    text = link.read_text() if link.exists() else ""
    elsewhere.write_text(text + '{"step": 9}\nfrom here on it would be cut')
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    RunLog.resume(tmp_path, {"step": 1}, step=1, mark=log.mark()).write(f"{name}.jsonl", {"step": 2})
    assert elsewhere.read_text() == text + '{"step": 9}\nfrom here on it would be cut'
    assert [start["step"] for start in lines(tmp_path, "starts")][0] == 1


def test_a_first_line_that_is_nested_beyond_reason_is_nobodys(tmp_path):
    (tmp_path / "run_log").mkdir()
    (tmp_path / "run_log" / "starts.jsonl").write_text(100_000 * "[")
    RunLog.resume(tmp_path, {"step": 1}, step=1, mark=None)
    assert [start["step"] for start in lines(tmp_path, "starts")] == [1]


def test_what_json_has_no_numbers_for(tmp_path):
    values = {"nan": math.nan, "up": math.inf, "down": np.float32(-np.inf), "tensor": torch.tensor(2.5)}
    others = {"list": (1, None, True), "path": Path("a"), "text": "\ud800é\n"}
    append_line(tmp_path / "run_log.jsonl", {**values, **others})
    (line,) = (tmp_path / "run_log.jsonl").read_text(encoding="ascii").splitlines()
    assert json.loads(line) == {
        "nan": "NaN", "up": "Infinity", "down": "-Infinity", "tensor": 2.5, "list": [1, None, True], "path": "a",
        "text": "\ud800é\n",
    }  # fmt: skip


def test_a_line_that_has_no_room_leaves_nothing(tmp_path, caplog):
    """Of which a part was written before the file system said no."""
    log = RunLog.begin(tmp_path, {"step": 0})
    log.write("metrics.jsonl", {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        for _ in range(3):
            log.write("metrics.jsonl", {"step": 2, "text": 30 * "x"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write("metrics.jsonl", {"step": 3})
    assert lines(tmp_path, "metrics") == [{"step": 1}, {"step": 3}]
    assert caplog.text.count("The log of the run has gaps") == 1
