# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo label` from two folders to pairs that load, in a real browser and real processes."""

import signal

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.annotation.pages import RaterPage, failures_of, serving
from tests.annotation.studies import model_folders
from tests.browsers import open_context
from trl_sipo.annotation.labelling import open_session, write_pairs
from trl_sipo.annotation.store import Store
from trl_sipo.cli.main import main
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.errors import StudyError


def label_words(root, *options):
    return (
        "label",
        root / "base",
        root / "tuned",
        "--prompts",
        root / "prompts.csv",
        "--output",
        root / "labels",
        *options,
    )


def session_of(root, **options):
    """A label session without a server."""
    folders = {"base": root / "base", "tuned": root / "tuned"}
    return open_session(folders, root / "labels", **{"prompts": root / "prompts.csv", **options})


def prefer(session, model, *, ties=0):
    """Answer everything: this model, after a few ties."""
    (rater,) = session.store.raters()
    names = session.store.model_names(rater.rater_id)
    for number, assignment in enumerate(session.store.assignments(rater.rater_id)):
        choice = "tie" if number < ties else ("left", "right")[names[assignment.assignment_id].index(model)]
        session.store.answer(rater.rater_id, assignment.assignment_id, choice, 2.0, f"{model}-{number}")


def test_labels_become_pairs_and_later_ones_replace_them(tmp_path):
    model_folders(tmp_path)
    session = session_of(tmp_path)
    assert session.is_new and write_pairs(session.store) is None
    prefer(session, "base", ties=1)
    path, counts = write_pairs(session.store)
    assert (counts.pairs, counts.ties, counts.unjudged) == (3, 1, 0)
    assert set(load_preference_dataset(str(path))["source"]) == {"base over tuned"}
    again = session_of(tmp_path)
    assert not again.is_new and again.token != session.token and again.store.rater_of(session.token) is None
    prefer(again, "tuned")
    path, counts = write_pairs(again.store)
    rows = load_preference_dataset(str(path))
    assert counts.pairs == len(rows) == 4 and set(rows["source"]) == {"tuned over base"}
    assert sorted(rows["prompt"]) == [f"prompt {number}" for number in range(4)]
    leftovers = {file.name for file in path.parent.iterdir() if "sqlite" not in file.name}
    assert leftovers == {"media", "pairs.parquet"}


def test_samples_of_different_sizes_can_be_labelled(tmp_path):
    """In a blind study they tell the model; here it is told anyway."""
    model_folders(tmp_path)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "tuned" / "0.png")
    session = session_of(tmp_path)
    prefer(session, "tuned")
    path, _ = write_pairs(session.store)
    assert {image.size for image in load_preference_dataset(str(path))["chosen"]} == {(30, 20), (48, 48)}


def test_a_label_session_is_not_confused_with_another_study(tmp_path):
    folders = model_folders(tmp_path, models=("base", "tuned", "other"))
    session_of(tmp_path)
    with pytest.raises(StudyError, match="a label session of base and tuned, not of base and other"):
        open_session({"base": folders["base"], "other": folders["other"]}, tmp_path / "labels")
    for place in (tmp_path / "base", tmp_path / "prompts.csv"):
        with pytest.raises(StudyError, match="is there already, and holds no label session"):
            open_session({"base": folders["base"], "other": folders["other"]}, place)
    with pytest.raises(StudyError, match="Two folders are compared, and these are 3"):
        open_session(folders, tmp_path / "more")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"title": "Other"}, "--title"),
        ({"question": "Other?"}, "--question"),
        ({"allows_tie": False}, "--no_tie"),
    ],
)
def test_a_session_that_is_there_says_what_it_said(tmp_path, options, problem):
    model_folders(tmp_path)
    first = session_of(tmp_path, question="Which?")
    assert not session_of(tmp_path).is_new and not session_of(tmp_path, question="Which?").is_new
    token = session_of(tmp_path).token
    with pytest.raises(StudyError, match=f"begun with another {problem}"):
        session_of(tmp_path, **options)
    assert first.store.rater_of(token) is not None  # the link that is in use stays good


def test_a_session_does_not_go_on_with_other_files(tmp_path):
    model_folders(tmp_path)
    session_of(tmp_path)
    for model in ("base", "tuned"):
        Image.new("RGB", (48, 48)).save(tmp_path / model / "4.png")
    with (tmp_path / "prompts.csv").open("a") as table:
        table.write("4.png,prompt 4,food\n")
    with pytest.raises(StudyError, match="a label session of 4 pairs, and the folders hold 5; .* as of '4'"):
        session_of(tmp_path)


def test_pairs_that_all_became_ties_are_taken_back(tmp_path):
    model_folders(tmp_path)
    session = session_of(tmp_path)
    prefer(session, "base")
    path, _ = write_pairs(session.store)
    prefer(session, "tuned", ties=4)
    assert write_pairs(session.store) is None and not path.exists()


def test_who_labels_their_own_pairs_is_not_left_out(tmp_path, capsys):
    """However quickly they answer, and whichever side they choose."""
    model_folders(tmp_path, number=12)
    store = session_of(tmp_path).store
    (rater,) = store.raters()
    for assignment in store.assignments(rater.rater_id):
        store.answer(rater.rater_id, assignment.assignment_id, "left", 0.4, f"r-{assignment.position}")
    assert main(["study", "import", str(tmp_path / "labels"), "--output", str(tmp_path / "pairs")]) == 0
    assert "12 pairs" in capsys.readouterr().out
    assert len(load_preference_dataset(str(tmp_path / "pairs" / "pairs.parquet"))) == 12


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--port", "99999"], "--port"),
        (["--allowed_host", "https://x"], "--allowed_host"),
        (["--prompts", "none.csv"], "none.csv"),
        (["--host", "192.0.2.1", "--port", "0"], "Cannot listen on 192.0.2.1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_served(tmp_path, capsys, options, problem):
    model_folders(tmp_path)
    assert main([*map(str, label_words(tmp_path)), *options]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_a_study_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["study", "serve", str(tmp_path / "none")]) == 2
    assert "There is no study at" in capsys.readouterr().err


@pytest.mark.slow
def test_two_folders_are_labelled_in_the_browser(browser, tmp_path):
    model_folders(tmp_path)
    with open_context(browser) as context:
        with serving(*label_words(tmp_path, "--port", "0", "--title", "My pairs")) as server:
            rater = RaterPage(context, server.link).begin()
            for _ in range(2):
                rater.ready()
                names = [rater.locate(f"#{side} .name").text_content() for side in ("left", "right")]
                assert sorted(names) == ["base", "tuned"]
                rater.press("ArrowLeft" if names[0] == "tuned" else "ArrowRight")
            rater.has_answered(2, 4)
            said = server.stop(signal.SIGINT)
            assert server.process.returncode == 0 and "2 pairs, 0 ties left out, 2 without an answer" in said
        with serving(*label_words(tmp_path, "--port", "0")) as server:
            rater = RaterPage(context, server.link)
            expect(rater.locate("#start-button")).to_have_text("Go on with pair 3")
            rater.begin().press("t").press("n")
            expect(rater.locate("#finished-title")).to_have_text("Nearly done")
            assert "2 pairs, 1 ties left out, 1 without" in server.stop()
        assert failures_of(context) == []
    assert (
        main(["data", "check", str(tmp_path / "labels" / "pairs.parquet"), "--output", str(tmp_path / "check")]) == 0
    )
    rows = load_preference_dataset(str(tmp_path / "labels" / "pairs.parquet"))
    assert set(rows["source"]) == {"tuned over base"} and len(rows) == 2
    media = Store.open(tmp_path / "labels").media_folder
    with Image.open(next(iter(sorted(media.iterdir())))) as image:
        assert image.size == (48, 48)
