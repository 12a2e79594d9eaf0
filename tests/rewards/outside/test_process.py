# SPDX-License-Identifier: Apache-2.0
"""Scorers in a process of their own: real ones, that also crash, hang and print what they should not."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError, DatasetError, RewardError, StorageError
from trl_sipo.rewards import outside
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.cache import CachedReward
from trl_sipo.rewards.outside import open_scorer, process_transport
from trl_sipo.rewards.registry import load_reward

ROOT = Path(__file__).resolve().parents[3]
SERVE = Path(outside.__file__).with_name("serve.py")
MISBEHAVING = Path(__file__).with_name("misbehaving.py")
WHITE = Image.new("RGB", (8, 6), "white")
VIDEO = np.full((5, 16, 16, 3), 200, np.uint8)


def served(target: str, *options: str) -> str:
    """The command of `serve.py` for one of `scorers.py`."""
    words = [sys.executable, str(SERVE), f"tests.rewards.outside.scorers:{target}", "--stdio", *options]
    return f"process:{shlex.join(words)}"


def misbehaving(mode: str, folder: Path) -> str:
    """The command of a scorer that misbehaves; it starts in milliseconds."""
    return f"process:{shlex.join([sys.executable, '-S', '-E', str(MISBEHAVING), mode, str(folder / 'starts')])}"


def started(folder: Path) -> list[int]:
    """The numbers of the processes that were started."""
    return [int(line) for line in (folder / "starts").read_text().split()]


def is_running(number: int) -> bool:
    """Whether a process is there, and not only its entry in the table."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    """Whether a condition comes true in this time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(process_transport, "_GRACE", 0.5)


# --------------------------------------------------------------------------------------------------------- what works


def test_a_function_in_an_environment_without_any_package_scores(tmp_path):
    command = shlex.join([sys.executable, "-S", "-E", "-s", str(SERVE), "scorers:size", "--stdio"])
    with open_scorer(f"process:{command}", cwd=str(Path(__file__).parent), batch_size=2) as scorer:
        scores = scorer.score([WHITE, Image.new("RGB", (8, 6)), WHITE], ["a", "bb", "ccc"])
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    assert (scores - scores.floor()).tolist() == pytest.approx([0.001, 0.002, 0.003], abs=1e-4)
    assert scores.min() > 60  # a PNG


def test_it_is_a_reward_that_says_what_it_is(tmp_path):
    reward = load_reward(served("Scaled", "--options", '{"scale": 2.5}'), cwd=str(ROOT))
    try:
        assert isinstance(reward, Reward)
        info = reward.info
        assert (info.name, info.convention, info.licence) == ("scaled", "scale * number of words", "MIT")
        assert not info.higher_is_better and info.media == {"image", "video"}
        assert reward.batch_size == 2  # what the scorer takes at once
        assert reward.score([WHITE] * 3, ["a", "a red", "a red cat"]).tolist() == [2.5, 5.0, 7.5]
        assert reward.score([], []).shape == (0,)
        cached = CachedReward(reward, tmp_path / "scores.db")
        assert cached.score([VIDEO, WHITE], ["a red", "a"]).tolist() == [5.0, 2.5]
        assert reward.identity()["outside"] == {"scale": 2.5}
    finally:
        reward.close()


def test_media_arrive_as_they_are_and_what_is_printed_does_no_harm():
    dark, light = Image.new("RGBA", (9, 7), (10, 20, 30, 255)), Image.new("L", (4, 4), 250)
    with open_scorer(served("brightness", "--decode", "--media", "image", "video"), cwd=str(ROOT)) as scorer:
        scores = scorer.score([dark, light, VIDEO], ["", "", ""])
    assert scores[:2].tolist() == [20.0, 250.0]
    assert scores[2] == pytest.approx(200, abs=1.5)  # next to lossless


def test_files_are_there_while_they_are_scored_and_not_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(process_transport.tempfile, "tempdir", str(tmp_path))
    with open_scorer(misbehaving("good", tmp_path)) as scorer:
        scorer.score([WHITE] * 3, ["a"] * 3)
        (folder,) = tmp_path.glob("trl-sipo-scorer-*")
        assert [path.name for path in folder.iterdir()] == ["stderr.log"]
    assert not list(tmp_path.glob("trl-sipo-scorer-*"))


# ----------------------------------------------------------------------------------------------------- wrong answers

WRONG = {
    "too_few": "gave 1 scores for 2 samples",
    "too_many": "gave 3 scores for 2 samples",
    "nan": "score 0 of 2 is no finite number, but nan",
    "infinite": r"score 0 of 2 is no finite number, but 1e\+39",
    "text": "score 0 of 2 is no finite number, but 'high'",
    "no_list": "has no list `scores`",
    "other_version": "no message of version 1",
    "other_id": "the answer is to message 99",
    "error": "reports an error: the model is not there",
    "garbage": "no JSON came as an answer: 'Downloading: 100%'.*belongs on its stderr",
    "endless": "longer than 16777216 bytes",
}


@pytest.mark.parametrize("mode", WRONG)
def test_a_wrong_answer_is_an_error_without_a_second_try_and_ends_the_process(mode, tmp_path):
    scorer = open_scorer(misbehaving(mode, tmp_path), backoff=0)
    with pytest.raises(RewardError, match=WRONG[mode]):
        scorer.score([WHITE, WHITE], ["a", "b"])
    (number,) = started(tmp_path)
    assert wait_until(lambda: not is_running(number))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no_info", "no object `info`"),
        ("no_name", r"`info\.name` must be a text"),
        ("media", r"`info\.media` must be"),
    ],
)
def test_a_scorer_must_say_what_it_is(mode, message, tmp_path):
    with pytest.raises(RewardError, match=message):
        open_scorer(misbehaving(mode, tmp_path))
    assert wait_until(lambda: not is_running(started(tmp_path)[0]))


# ---------------------------------------------------------------------------------------------------------- no answer


@pytest.mark.parametrize("mode", ["crashes_once", "slow_once"])
def test_after_a_crash_or_a_time_out_it_is_started_again(mode, tmp_path):
    with open_scorer(misbehaving(mode, tmp_path), timeout=1.5, start_timeout=60, backoff=0) as scorer:
        assert scorer.score([WHITE, WHITE], ["a", "b"]).tolist() == [1.0, 1.0]
        first, second = started(tmp_path)
        assert not is_running(first) and is_running(second)
        assert scorer.score([WHITE], ["a"]).tolist() == [1.0]
    assert len(started(tmp_path)) == 2 and not is_running(second)


def test_a_crash_at_every_try_is_an_error_with_what_it_said_last(tmp_path):
    with open_scorer(misbehaving("crashes", tmp_path), retries=2, backoff=0) as scorer:
        with pytest.raises(
            RewardError, match=r"(?s)asked 3 times: it ended with status 3\..*CUDA error: out of memory"
        ):
            scorer.score([WHITE], ["a"])
    assert len(started(tmp_path)) == 3


def test_a_scorer_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(RewardError, match=r"(?s)asked once: it ended with status 3.*CUDA error"):
        open_scorer(misbehaving("does_not_start", tmp_path), retries=0)


@pytest.mark.parametrize("mode", ["slow", "drips"])
def test_a_time_out_is_of_the_whole_answer(mode, tmp_path):
    scorer = open_scorer(misbehaving(mode, tmp_path), timeout=0.3, retries=0)
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"did not answer within 0\.3 s"):
        scorer.score([WHITE], ["a"])
    assert time.monotonic() - begun < 30
    assert wait_until(lambda: not is_running(started(tmp_path)[0]))


def test_a_scorer_that_does_not_read_is_timed_out_too(tmp_path):
    scorer = open_scorer(misbehaving("does_not_read", tmp_path), timeout=0.5, retries=0)
    with pytest.raises(RewardError, match=r"did not answer within 0\.5 s"):
        scorer.score([WHITE], ["a" * 10**6])  # more than a pipe takes


def test_pauses_between_tries_double(tmp_path, monkeypatch):
    pauses = []
    with open_scorer(misbehaving("crashes", tmp_path), retries=3, backoff=0.5) as scorer:
        monkeypatch.setattr(time, "sleep", pauses.append)
        with pytest.raises(RewardError):
            scorer.score([WHITE], ["a"])
    assert [pause for pause in pauses if pause >= 0.5] == [0.5, 1.0, 2.0]


# ------------------------------------------------------------------------------------------------------------ its end


def test_it_ends_with_what_it_started_when_it_is_closed(tmp_path):
    scorer = open_scorer(misbehaving("with_child", tmp_path))
    numbers = started(tmp_path)
    assert len(numbers) == 2 and all(map(is_running, numbers))
    scorer.close()
    scorer.close()
    assert wait_until(lambda: not any(map(is_running, numbers)))


def test_one_that_does_not_want_to_end_is_ended(tmp_path):
    scorer = open_scorer(misbehaving("does_not_end", tmp_path))
    begun = time.monotonic()
    scorer.close()
    assert not is_running(started(tmp_path)[0]) and time.monotonic() - begun < 30


def test_it_ends_when_it_is_forgotten(tmp_path):
    scorer = open_scorer(misbehaving("good", tmp_path))
    del scorer
    assert wait_until(lambda: not is_running(started(tmp_path)[0]))


@pytest.mark.parametrize("end", ["error", "kill"])
def test_it_ends_with_the_program(end, tmp_path):
    command = served("sleeps")
    code = f"""
import os, sys
from PIL import Image
from trl_sipo.rewards.outside import open_scorer
scorer = open_scorer({command!r})
print(scorer._transport._running._process.pid, flush=True)
if {end!r} == "error":
    raise RuntimeError("of the user's")
if {end!r} == "kill":
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    number = int(program.stdout.readline())
    if end == "kill":
        assert is_running(number)
        program.send_signal(signal.SIGKILL)
    program.wait(60)
    program.stdin.close()
    program.stdout.close()
    assert wait_until(lambda: not is_running(number))


def test_a_forked_process_has_a_scorer_of_its_own(tmp_path):
    with open_scorer(misbehaving("good", tmp_path)) as scorer:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                scored = scorer.score([WHITE], ["a"]).tolist() == [1.0]
                scorer.close()
                status = 0 if scored else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        first, second = started(tmp_path)
        assert is_running(first) and wait_until(lambda: not is_running(second))
        assert scorer.score([WHITE], ["a"]).tolist() == [1.0]


# --------------------------------------------------------------------------------------------------------- mistakes


def test_no_shell_sees_the_command(tmp_path):
    with pytest.raises((ConfigurationError, RewardError)):
        open_scorer(f"process:true; touch {tmp_path}/owned && $(touch {tmp_path}/owned)", retries=0, start_timeout=2)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("process:", {}, "has no command"),
        ("process:a 'b", {}, "cannot be read: No closing quotation"),
        ("process:no-such-program-anywhere", {}, "cannot be started"),
        ("process:true", {"cwd": "/no/such/folder"}, "cannot be started"),
        ("process:true", {"port": 1}, "has no option 'port'.*timeout"),
        ("process:true", {"timeout": 0}, "`timeout` of a scorer must be positive"),
        ("process:true", {"retries": -1}, "`retries` of a scorer must be at least 0"),
        ("process:true", {"timeout": "5"}, "`timeout` of a scorer must be a number up to 1e\\+06, got '5'"),
        ("process:true", {"timeout": float("inf")}, "`timeout` of a scorer must be a number up to"),
        ("process:true", {"batch_size": 0}, "`batch_size` of a scorer must be at least 1"),
        ("ftp://a/b", {}, "is no scorer outside of this process"),
    ],
)
def test_mistakes_are_named_before_anything_starts(spec, options, message):
    with pytest.raises(ConfigurationError, match=message):
        open_scorer(spec, **options)


def test_other_media_are_refused(tmp_path):
    with open_scorer(misbehaving("good", tmp_path)) as scorer:
        with pytest.raises(DatasetError, match="good takes images, and medium 1 is of the kind 'video'"):
            scorer.score([WHITE, VIDEO], ["a", "b"])
        with pytest.raises(DatasetError, match="1 images or videos and 2 prompts"):
            scorer.score([WHITE], ["a", "b"])


def test_the_log_is_kept_where_it_is_asked_for(tmp_path):
    log = tmp_path / "logs" / "scorer.log"
    with open_scorer(misbehaving("crashes", tmp_path), retries=1, backoff=0, log=log) as scorer:
        with pytest.raises(RewardError, match="CUDA error"):
            scorer.score([WHITE], ["a"])
    assert log.read_text().count("CUDA error") == 2
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="The log of the scorer"):
        open_scorer(misbehaving("good", tmp_path), log=tmp_path / "file" / "log")
