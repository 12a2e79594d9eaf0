# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo report` as a user meets it: bad options, a run that goes on, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from playwright.sync_api import Error, expect

from tests.browsers import open_context
from tests.reporting.logged_runs import ENDED, append_line_to, held_out, learning, levels_at, write_log
from tests.reporting.watched_run import SHOWN, STEPS, train
from tests.trainer.children import end, fork
from trl_sipo.cli.main import main
from trl_sipo.errors import DatasetError
from trl_sipo.scripts import report


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
        (["run", "--output", f"{'long' * 100}.html"], "File name too long"),
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
    """A real run in a process of its own, which grows the log while this one rewrites the page."""
    folder, output = tmp_path / "run", tmp_path / "report.html"
    child = fork(lambda: train(folder, output), tmp_path / "output.txt")
    try:
        with _within(90):
            assert main(["report", str(folder), "--output", str(output), "--watch", "1"]) == 0
    finally:
        assert end(child, tmp_path / "output.txt", seconds=10) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    page, printed = output.read_text(encoding="utf-8"), capsys.readouterr().out
    steps = ["run: has not begun yet", f"run: step {SHOWN}: ", f"run: step {STEPS}: ", "All runs have ended."]
    assert sorted(steps, key=printed.index) == steps
    assert f"step {STEPS} of {STEPS}, ended" in page and "The page looks again" not in page


@contextmanager
def _within(seconds):
    """Ends what would go on for ever."""

    def give_up(*_):
        raise AssertionError("the runs have not ended")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _watch(run, *, looks, monkeypatch):
    """Watch a run for so many looks, then press Ctrl-C."""
    naps = iter(range(looks - 1))

    def nap(seconds):
        if next(naps, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", nap)
    return main(["report", str(run), "--output", str(run.parent / "out.html"), "--watch", "1"])


def test_a_run_that_logs_nothing_for_long_is_told_of_once(run, monkeypatch, capsys):
    monkeypatch.setattr(report, "_IDLE_SECONDS", -1.0)
    assert _watch(run, looks=4, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err.count("Nothing has been logged for an hour.") == 1


def test_a_page_that_cannot_be_written_is_tried_again(run, monkeypatch, capsys):
    output, before = run.parent / "out.html", os.replace
    failures = [OSError(28, "No space left on device"), OSError(28, "No space left on device")]

    def replace(*paths):
        if failures:
            raise failures.pop()
        before(*paths)

    monkeypatch.setattr(os, "replace", replace)
    assert _watch(run, looks=3, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.err.count("No space left") == 1 and printed.out.count("run: step 10") == 1 and output.exists()


def test_a_file_that_vanishes_while_it_is_read_ends_no_watch(run, monkeypatch, capsys):
    from trl_sipo.reporting import run_files

    read, log = run_files.read_levels, run / "run_log/levels.jsonl"

    def read_and_replace(row):
        if log.exists():
            log.unlink()
            raise DatasetError("replaced just now")
        return read(row)

    monkeypatch.setattr(run_files, "read_levels", read_and_replace)
    assert _watch(run, looks=2, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert "replaced just now" in printed.err and "run: step 10" in printed.out


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
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that was started in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        _wait(output.exists)
        yield run, output, process
        process.kill()


def _add_a_step(run):
    with (run / "run_log/metrics.jsonl").open("a") as file:
        append_line_to(file, learning(15))
        file.write('{"step": 20, "loss":')  # torn, as it is being written


def test_a_watched_page_looks_again_until_it_is_interrupted(watched, browser):
    run, output, process = watched
    with open_context(browser) as context:
        tab = context.new_page()
        tab.goto(output.as_uri())
        expect(tab.get_by_text("The page looks again every 1 s.")).to_be_visible()
        _add_a_step(run)
        expect(tab.locator(".facts")).to_contain_text("step 15", timeout=60_000)
        assert context.failures == []
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped watching" in printed, errors
    page = output.read_text(encoding="utf-8")
    assert "The page looks again" not in page and not re.search("http-equiv=.refresh", page)


@pytest.mark.slow
def test_a_watched_page_stays_as_it_was_set(watched, browser):
    run, output, _ = watched
    with open_context(browser) as context:
        tab = context.new_page()
        tab.goto(output.as_uri())
        pause, slider = tab.locator("#pause"), tab.locator("#levels-0")
        while pause.get_attribute("aria-pressed") != "true":  # so that it holds still while it is set
            pause.click()  # lost when the page is loaded again between the button's going down and up
        tab.wait_for_timeout(1500)  # a load that had begun already would take the focus from what follows
        expect(pause).to_have_attribute("aria-pressed", "true")
        card = tab.locator(".card", has=tab.get_by_role("heading", name="Margin"))
        card.locator("summary").click()
        tab.locator("#theme").click()
        card.get_by_role("button", name="held out").click()
        while slider.get_attribute("aria-valuetext") != "step 0":
            slider.press("Home")
        tab.evaluate("scrollTo(0, 300)")
        _add_a_step(run)
        pause.evaluate("(button) => button.focus({preventScroll: true})")
        tab.keyboard.press("Enter")
        expect(tab.locator(".facts")).to_contain_text("step 15", timeout=60_000)
        expect(slider).to_have_attribute("aria-valuetext", "step 0")
        expect(pause).to_be_focused()
        expect(card.locator("table")).to_be_visible()
        expect(tab.locator("#theme")).to_have_text("Theme: light")
        expect(card.get_by_role("button", name="held out")).to_have_attribute("aria-pressed", "false")
        expect(card.get_by_role("button", name="training")).to_have_attribute("aria-pressed", "true")
        tab.wait_for_function("() => Math.abs(scrollY - 300) < 40")
        assert context.failures == []


def test_a_page_that_is_paused_while_it_looks_again_holds_still(watched, browser):
    _, output, _ = watched
    with open_context(browser) as context:
        tab, asked = context.new_page(), []
        tab.goto(output.as_uri())
        tab.route("**/*", lambda route: asked.append(route))  # answered by nobody: the page waits for itself
        with tab.expect_request("**/*"):
            pass
        tab.evaluate("window.isTheSame = true")
        # By hand: the driver would wait for the page that comes.
        tab.evaluate("document.getElementById('pause').click()")
        for route in asked:
            with suppress(Error):  # of a request that has been taken back
                route.continue_()
        tab.unroute("**/*")
        tab.wait_for_timeout(500)
        assert tab.evaluate("window.isTheSame")
        expect(tab.locator("#pause")).to_have_attribute("aria-pressed", "true")
        tab.locator("#pause").click()
        tab.wait_for_function("() => !window.isTheSame")


def test_a_page_without_scripts_is_refreshed_by_the_browser(tmp_path):
    from trl_sipo.reporting.run_files import read_runs
    from trl_sipo.reporting.run_quality import Quality
    from trl_sipo.reporting.run_report import Contents, run_page

    run = write_log(tmp_path, [learning(1), {"step": 1, **ENDED}])
    page = run_page(Contents("x", read_runs([run]), [None], Quality(), reload_seconds=7))
    assert '<noscript><meta http-equiv="refresh" content="7"></noscript></head>' in page
