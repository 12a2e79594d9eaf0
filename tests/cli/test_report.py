# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo report` as a user meets it: bad options, a run that goes on, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from playwright.sync_api import expect

from tests.browsers import open_context
from tests.reporting.logged_runs import ENDED, append_line_to, held_out, learning, levels_at, write_log
from tests.trainer.runs import SIPO, make_trainer, preference_pairs
from trl_sipo.cli.main import main


@pytest.fixture
def run(tmp_path):
    lines = [levels_at(step, lambda time: time) for step in (0, 10)]
    return write_log(tmp_path / "run", [held_out(learning(0)), learning(5), learning(10)], lines)


@pytest.mark.parametrize(
    "words, message",
    [
        (["missing", "--output", "out.html"], "There is no folder 'missing'"),
        (["run", "--output", "."], "is a folder"),
        (["run", "--output", "run/run_log/metrics.jsonl"], "is an HTML file"),
        (["run", "--output", "file/out.html"], "nothing can be written in"),
        (["run", "--output", "out.html", "--max_pictures", "-1"], "at least 0"),
        (["run", "--output", "out.html", "--picture_size", "4"], "from 16 to"),
        (["run", "--output", "out.html", "--watch", "0.1"], "from 1 to 86400"),
        (["run", "--output", "out.html", "--watch", "nan"], "from 1 to 86400"),
        (["run", "--output", "out.html", "--evaluation", "run"], "holds no `evaluation.json`"),
        (["run", "run", "--output", "out.html"], "more than once"),
        (["run"] * 25 + ["--output", "out.html"], "at most 24 runs"),
    ],
)
def test_mistakes_are_named(run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run.parent)
    (run.parent / "file").write_text("")
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (run.parent / "out.html").exists()


def test_a_folder_that_cannot_be_written_is_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert main(["report", str(run), "--output", str(run.parent / "out.html")]) == 2
    assert "nothing can be written" in capsys.readouterr().err


def test_the_verdict_is_printed_too(run, capsys):
    output = run.parent / "deep/er/report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"Open {output}" in printed and "- run: Too early to say." in printed
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_run_is_watched_from_before_it_begins_until_it_ends(tmp_path, capsys):
    """A real run beside the command, which rewrites the page as the log grows."""
    folder, output = tmp_path / "run", tmp_path / "report.html"
    status = []
    command = ["report", str(folder), "--output", str(output), "--watch", "1"]
    watching = threading.Thread(target=lambda: status.append(main(command)))
    watching.start()
    _wait(lambda: output.exists())
    assert "Nothing logged yet" in output.read_text(encoding="utf-8")
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    make_trainer(SIPO, folder, trainer_options={"eval_dataset": preference_pairs(4, seed=1)}, **options).train()
    watching.join(timeout=60)
    assert status == [0]
    page, printed = output.read_text(encoding="utf-8"), capsys.readouterr().out
    assert "run: has not begun yet" in printed and "run: step 4:" in printed and "All runs have ended." in printed
    assert "step 4 of 4, ended" in page and "The page looks again" not in page


def _wait(is_there, seconds=60):
    for _ in range(10 * seconds):
        if is_there():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


@pytest.fixture
def watched(run):
    """A page that is written again and again by a process of its own."""
    output = run.parent / "watched.html"
    words = [sys.executable, "-m", "trl_sipo.cli.main", "report", str(run), "--output", str(output), "--watch", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait(output.exists)
        yield run, output, process
        process.kill()


def test_a_watched_page_looks_again_and_stays_as_it_was_set(watched, browser):
    run, output, process = watched
    with open_context(browser) as context:
        tab = context.new_page()
        tab.goto(output.as_uri())
        expect(tab.get_by_text("The page looks again every 1 s.")).to_be_visible()
        pause, slider = tab.locator("#pause"), tab.locator("#levels-0")
        pause.click()  # so that it holds still while it is set
        expect(pause).to_have_attribute("aria-pressed", "true")
        tab.wait_for_load_state()
        card = tab.locator(".card", has=tab.get_by_role("heading", name="Margin"))
        card.locator("summary").click()
        tab.locator("#theme").click()
        slider.focus()
        tab.keyboard.press("Home")
        tab.evaluate("scrollTo(0, 300)")
        with (run / "run_log/metrics.jsonl").open("a") as file:
            append_line_to(file, learning(15))
            file.write('{"step": 20, "loss":')  # torn, as it is being written
        pause.evaluate("(button) => button.focus({preventScroll: true})")
        tab.keyboard.press("Enter")
        expect(tab.locator(".facts")).to_contain_text("step 15", timeout=60_000)
        expect(slider).to_have_attribute("aria-valuetext", "step 0")
        expect(pause).to_be_focused()
        expect(card.locator("table")).to_be_visible()
        expect(tab.locator("#theme")).to_have_text("Theme: light")
        tab.wait_for_function("() => Math.abs(scrollY - 300) < 40")
        assert context.failures == []
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped watching" in printed, errors
    page = output.read_text(encoding="utf-8")
    assert "The page looks again" not in page and not re.search("http-equiv=.refresh", page)


def test_a_page_without_scripts_is_refreshed_by_the_browser(tmp_path):
    from trl_sipo.reporting.run_files import read_runs
    from trl_sipo.reporting.run_quality import Quality
    from trl_sipo.reporting.run_report import Contents, run_page

    run = write_log(tmp_path, [learning(1), {"step": 1, **ENDED}])
    page = run_page(Contents("x", read_runs([run]), [None], Quality(), reload_seconds=7))
    assert '<noscript><meta http-equiv="refresh" content="7"></noscript></head>' in page
