# SPDX-License-Identifier: Apache-2.0
"""A study from the samples of two models to the report, with raters in a real browser and a server that is killed."""

import json
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.annotation.pages import ROOT, RaterPage, failures_of, free_port, serving
from tests.browsers import PHONE, open_context
from trl_sipo.annotation.store import Store
from trl_sipo.cli.main import main

MODELS = ("secret-base", "secret-tuned")
KEYS = {"left": "ArrowLeft", "right": "b", "tie": "t"}
NUM_PROMPTS = 4


@pytest.fixture
def samples(tmp_path):
    """Folders of samples of two models, and a table of their prompts."""
    generator = np.random.default_rng(0)
    for model in MODELS:
        (tmp_path / model).mkdir()
        for number in range(NUM_PROMPTS):
            pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / model / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "prompt": f"a sneaker, {number}"} for number in range(NUM_PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def build(samples, capsys, *options):
    """A study by its command: the folder, and the raters' tokens in the order of their invitations."""
    words = ["study", "build", "--models", *(f"{name}={samples / name}" for name in MODELS)]
    words += ["--prompts", str(samples / "prompts.jsonl"), "--output", str(samples / "study"), "--groups", "1"]
    assert main([*words, "--seed", "5", *options]) == 0
    return samples / "study", re.findall(r"group \d  ([0-9a-f]{32})", capsys.readouterr().out)


def watch(context, received):
    """Keep all that the server sends to a page: bodies and headers."""

    def keep(response):
        headers = json.dumps(response.all_headers())
        received.append(headers.encode() + (b"" if response.status in (204, 304) else response.body()))

    context.on("requestfinished", lambda request: keep(request.response()))


def choices_in_order(study, rater_number):
    """What a rater chose, in the order in which they saw the pairs."""
    store = Store.open(study)
    rater = store.raters()[rater_number]
    choices = store.choices(rater.rater_id)
    return [choices.get(assignment.assignment_id) for assignment in store.assignments(rater.rater_id)]


def test_two_raters_answer_while_the_server_is_killed_and_the_report_counts_them(browser, samples, capsys):
    study, (first_token, second_token) = build(
        samples, capsys, "--raters_per_group", "2", "--num_gold", "1", "--num_mirrored", "1"
    )
    total, port, received = NUM_PROMPTS + 2, free_port(), []
    first_choices = ["left", "right", "tie", "left", "left", "right"]
    second_choices = ["right", "right", "left", "tie", "left", "right"]
    serve = ("study", "serve", study, "--port", str(port))
    with (
        open_context(browser) as first_context,
        open_context(browser, viewport=PHONE, is_phone=True) as second_context,
    ):
        watch(first_context, received)
        with serving(*serve) as server:
            first = RaterPage(first_context, f"{server.link}#token={first_token}").begin()
            second = RaterPage(second_context, f"{server.link}#token={second_token}").begin()
            assert first_token not in first.page.url and first_context.cookies()[0]["httpOnly"]
            for choice in first_choices[:2]:
                first.press(KEYS[choice])
            second.click(f"choose-{second_choices[0]}").has_answered(1, total)
            first.has_answered(2, total).is_at(3)
            second.is_at(2)
            server.stop(signal.SIGKILL)
            first.press(KEYS[first_choices[2]])
            second.click(f"choose-{second_choices[1]}")
            first.says("1 answer is not saved yet. Trying again…")
        assert choices_in_order(study, 0) == [*first_choices[:2], *[None] * 4]
        assert choices_in_order(study, 1) == [second_choices[0], *[None] * 5]
        with serving(*serve) as server:
            first.has_answered(3, total).says("Saved")
            second.has_answered(2, total)
            for choice in first_choices[3:]:
                first.press(KEYS[choice])
            for choice in second_choices[2:]:
                second.click(f"choose-{choice}")
            first.is_done()
            second.is_done()
            said = server.stop()
        assert failures_of(first_context) == failures_of(second_context) == []
    assert f"Stopped: {2 * total} of {2 * total} answers are stored." in said
    assert first_token not in said and second_token not in said
    assert choices_in_order(study, 0) == first_choices and choices_in_order(study, 1) == second_choices
    assert len(received) > 2 * total
    assert not [text for text in received if b"secret" in text or b"gold" in text or b"mirrored" in text]
    assert main(["study", "report", str(study), "--min_median_seconds", "0"]) == 0
    assert (study / "report").is_dir() and "secret-tuned" in capsys.readouterr().out


@pytest.mark.slow
def test_raters_on_several_devices_finish_through_two_kills_with_every_command_a_process(browser, samples):
    """Keys and buttons, going back, reloading, another device; the server killed in the middle of it, twice."""
    study, port = samples / "study", free_port()
    models = [f"{name}={samples / name}" for name in MODELS]
    said = command(
        *("study", "build", "--models", *models, "--prompts", samples / "prompts.jsonl", "--output", study),
        *("--groups", "3", "--raters_per_group", "1", "--num_gold", "1", "--num_mirrored", "1", "--title", "Sneakers"),
    )
    tokens = re.findall(r"group \d  ([0-9a-f]{32})", said)
    serve = ("study", "serve", study, "--port", str(port))
    total = NUM_PROMPTS + 2
    with ExitStack() as stack:
        contexts = [stack.enter_context(open_context(browser)) for _ in range(4)]
        with serving(*serve) as server:
            links = [f"{server.link}#token={token}" for token in tokens]
            first, second, third = (RaterPage(*pair).begin() for pair in zip(contexts[:3], links, strict=True))
            for choice in ("left", "right"):
                first.press(KEYS[choice])
                second.click(f"choose-{choice}")
                third.press(KEYS[choice])
            third.has_answered(2, total).page.reload()
            third.is_at(3).press("p").is_at(2).press("t").is_at(3).says("Saved")
            server.stop(signal.SIGKILL)
            for rater in (first, second, third):
                rater.press("ArrowLeft")
        with serving(*serve) as server:
            for rater in (first, second, third):
                rater.has_answered(3, total).is_at(4)
            elsewhere = RaterPage(contexts[3], links[0])
            expect(elsewhere.locate("#start-button")).to_have_text("Go on with pair 4")
            elsewhere.begin().press("b").has_answered(4, total)
            first.page.reload()
            first.is_at(5)
            server.process.send_signal(signal.SIGKILL)
            for rater in (first, second):
                rater.press("ArrowRight")
            server.process.wait()
        with serving(*serve) as server:
            first.press("ArrowRight").is_done()
            for _ in range(2):
                second.press("ArrowRight")
            for _ in range(3):
                third.press("ArrowDown")
            second.is_done()
            third.is_done()
            server.stop()
        assert [failures_of(context) for context in contexts] == [[]] * 4
    assert choices_in_order(study, 0) == ["left", "right", "left", "right", "right", "right"]
    assert choices_in_order(study, 1) == ["left", "right", "left", "right", "right", "right"]
    assert choices_in_order(study, 2) == ["left", "tie", "left", "tie", "tie", "tie"]
    assert "secret-tuned" in command("study", "report", study, "--min_median_seconds", "0")
    report = json.loads((study / "report" / "study.json").read_text())
    assert report["is_partial"] is False and len(report["raters"]) == 3


def command(*words):
    """What a command prints, as a process of its own."""
    line = [sys.executable, "-m", "trl_sipo.cli.main", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_keys_are_those_of_the_page():
    """Of the table of docs/source/study.md, and of the page's own help."""
    script = files("trl_sipo.annotation").joinpath("assets", "screens.js").read_text(encoding="utf-8")
    table = script[script.index("export const KEYS") : script.index("}; // prettier-ignore")]
    keys = re.findall(r'(?:"(.)"|(\w+)): "(\w+)"', table)
    names = {"ArrowLeft": "left arrow", "ArrowRight": "right arrow", "ArrowDown": "down arrow", " ": "space"}
    of_page = {names.get(a or b, (a or b).lower()) for a, b, _ in keys}
    page = (ROOT / "docs/source/study.md").read_text(encoding="utf-8")
    rows = page[page.index("| key | what |") : page.index("Buttons do the same")].splitlines()[2:]
    described = [row.split("|")[1].replace("`", "").strip().lower().split(", ") for row in rows if row.startswith("|")]
    assert {key for row in described for key in row} == of_page
    explained = script[script.index("const EXPLAINED") : script.index("export const find")]
    assert len(re.findall(r'^  \["(\w+)"', explained, re.M)) == len(described) == len({what for *_, what in keys})
