# SPDX-License-Identifier: Apache-2.0
"""A study's file: only added to, by many processes at once, and nothing acknowledged lost when one is killed."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tests.annotation.studies import comparisons, empty_study
from trl_sipo.annotation.plan import plan_tasks
from trl_sipo.annotation.records import MIRRORED, Comparison, Study
from trl_sipo.annotation.schema import SCHEMA
from trl_sipo.annotation.store import STUDY_FILE, Store
from trl_sipo.errors import AnswerError, StorageError, StudyError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    with closing(empty_study(tmp_path / "study", number=6, num_gold=1, num_mirrored=2)) as opened:
        yield opened


def joined(store, name="rater-01", group=1):
    return store.rater_of(store.invite(name, group))


def stored(folder):
    """Rows of the table of answers, read without this package."""
    with closing(sqlite3.connect(Path(folder) / STUDY_FILE)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return database.execute("SELECT assignment_id, choice, request_id FROM answers ORDER BY answer_id").fetchall()


def writer(folder, token, number=""):
    command = [sys.executable, "-m", "tests.annotation.writing", str(folder), token, *[str(number)] * bool(number)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_what_was_put_in_comes_out(store):
    assert store.study() == Study("Which is better?", num_mirrored=2)
    assert store.pairs() == comparisons(6, num_gold=1)
    again = Store.open(store.path.parent)
    assert again.study() == store.study() and again.path == store.path
    assert again.media_folder == store.path.parent / "media"


def test_assignments_are_those_of_the_plan_under_random_names(store):
    raters = [joined(store, f"rater-{number}", group) for number, group in ((1, 1), (2, 2), (3, 1))]
    assert [rater.group for rater in raters] == [1, 2, 1] and store.raters() == raters
    pairs = {pair.pair_id: pair for pair in store.pairs()}
    for rater, number in zip(raters, (0, 0, 1), strict=True):  # within the group
        tasks = plan_tasks(store.pairs(), store.study(), rater.group, number)
        assert store.tasks(rater.rater_id) == tasks and sum(task.kind == MIRRORED for task in tasks) == 2
        for place, (assignment, task) in enumerate(zip(store.assignments(rater.rater_id), tasks, strict=True)):
            pair = pairs[task.pair_id]
            media = [pair.first_media, pair.second_media][:: -1 if task.is_flipped else 1]
            assert [assignment.left_media, assignment.right_media] == media and assignment.position == place
            assert set(vars(assignment)) == {
                "assignment_id", "position", "prompt", "category", "left_media", "right_media", "is_video"
            }  # fmt: skip
    names = [assignment.assignment_id for rater in raters for assignment in store.assignments(rater.rater_id)]
    assert len(set(names)) == len(names) == 27 and all(len(name) == 32 for name in names)


def test_tokens_are_known_by_their_hash_alone(store):
    token = store.invite("rater-01", 1)
    assert len(token) == 32 and store.rater_of(token).name == "rater-01"
    for wrong in ("", token[:-1], token.upper() + "x", "\udcff", "rater-01"):
        assert store.rater_of(wrong) is None
    store.close()
    assert token.encode() not in store.path.read_bytes()
    new = store.renew_token("rater-01")
    assert store.rater_of(token) is None and store.rater_of(new).rater_id == 1
    with pytest.raises(StudyError, match="no rater 'rater-02'"):
        store.renew_token("rater-02")


def test_a_study_is_for_its_owner_alone_and_never_overwritten(store):
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    with pytest.raises(StudyError, match="not overwritten"):
        Store.create(store.path, Study("another"))
    assert store.study().title == "Which is better?"


def test_what_is_acknowledged_is_on_the_disk_not_only_with_the_system(store):
    """Against a loss of power, which no test can bring about: every commit syncs the log."""
    settings = {
        name: store._connection().execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    }
    assert settings == {"journal_mode": "wal", "synchronous": 2}


def test_later_answers_count_and_all_are_kept(store):
    rater = joined(store)
    one, two, three, *others = (assignment.assignment_id for assignment in store.assignments(rater.rater_id))
    for number, (assignment, choice) in enumerate(
        [(one, "left"), (two, "tie"), (one, "right"), (three, "left"), (three, "skip")]
    ):
        store.answer(rater.rater_id, assignment, choice, number, f"r{number}")
    assert store.choices(rater.rater_id) == {one: "right", two: "tie", three: "skip"}
    assert store.progress(rater.rater_id) == (2, 3 + len(others))
    answers = store.answers()
    assert [(answer.assignment_id, answer.choice, answer.seconds) for answer in answers] == [
        (one, "left", 0), (two, "tie", 1), (one, "right", 2), (three, "left", 3), (three, "skip", 4)
    ]  # fmt: skip
    assert [answer.task for answer in answers[:2]] == store.tasks(rater.rater_id)[:2]


def test_a_request_that_comes_again_is_no_second_answer(store):
    rater = joined(store)
    one, two, *_ = (assignment.assignment_id for assignment in store.assignments(rater.rater_id))
    for _ in range(3):
        store.answer(rater.rater_id, one, "left", 2.0, "same")
    store.answer(joined(store, "rater-02").rater_id, store.assignments(2)[0].assignment_id, "tie", 1.0, "same")
    assert len(store.answers()) == 2
    for assignment, choice in ((one, "right"), (two, "left")):
        with pytest.raises(AnswerError, match="another answer before"):
            store.answer(rater.rater_id, assignment, choice, 2.0, "same")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"assignment_id": "0" * 32}, "no such assignment"),
        ({"rater_id": 2}, "no such assignment"),  # it is the first rater's
        ({"rater_id": 99}, "no such assignment"),
        ({"choice": "both"}, "none of left, right, tie, skip"),
        ({"choice": "LEFT"}, "none of"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"request_id": ""}, "1 to 64"),
        ({"request_id": "x" * 65}, "1 to 64"),
        ({"request_id": "\ud800"}, "ASCII"),
        ({"assignment_id": "\ud800"}, "no such assignment"),
    ],
)
def test_answers_that_are_none_are_refused(store, change, words):
    joined(store), joined(store, "rater-02")
    answer = {"rater_id": 1, "assignment_id": store.assignments(1)[0].assignment_id, "choice": "left"}
    with pytest.raises(AnswerError, match=words):
        store.answer(**{**answer, "seconds": 1.0, "request_id": "r", **change})
    assert store.answers() == []


def test_a_tie_is_refused_where_the_study_asks_for_a_decision(tmp_path):
    store = empty_study(tmp_path, allows_tie=False)
    rater = joined(store)
    assignment = store.assignments(rater.rater_id)[0].assignment_id
    with pytest.raises(AnswerError, match="none of left, right, skip"):
        store.answer(rater.rater_id, assignment, "tie", 1.0, "r")


def test_names_of_models_are_told_only_where_the_study_is_not_blind(tmp_path, store):
    assert store.model_names(joined(store).rater_id) is None
    open_study = empty_study(tmp_path / "open", is_blind=False)
    joined(open_study)
    pairs = {pair.first_media: pair for pair in open_study.pairs()}
    for assignment in open_study.assignments(1):
        is_flipped = assignment.left_media not in pairs
        expected = ("tuned", "base") if is_flipped else ("base", "tuned")
        assert open_study.model_names(1)[assignment.assignment_id] == expected


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE answers SET choice = 'right'",
        "DELETE FROM answers",
        "REPLACE INTO answers SELECT * FROM answers",
        "UPDATE assignments SET is_flipped = 1 - is_flipped",
        "DELETE FROM pairs",
        "UPDATE study SET seed = 1",
    ],
)
def test_the_file_itself_refuses_changes(store, statement):
    rater = joined(store)
    store.answer(rater.rater_id, store.assignments(1)[0].assignment_id, "left", 1.0, "r")
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("PRAGMA recursive_triggers = ON")
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            database.execute(statement)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.png", "a\\b.png", "..", "A.PNG", ".png"])
def test_no_pair_can_name_a_file_elsewhere(tmp_path, name):
    store = Store.create(tmp_path / STUDY_FILE, Study("t"))
    pair = Comparison("p", "p", "a cat", "", "base", "tuned", "0a.png", name)
    with pytest.raises(StudyError, match="cannot hold"):
        store.add_pairs([pair])


def test_texts_that_are_no_unicode_are_told(tmp_path):
    with pytest.raises(StudyError, match="no Unicode"):
        Store.create(tmp_path / STUDY_FILE, Study("half a \ud800 character"))
    assert not (tmp_path / STUDY_FILE).exists()


def _with_a_name_elsewhere(store, path):
    """A copy with a row that SQLite lets nobody write but who tells it not to look."""
    shutil.copy(store.path, path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        row = ("pair-x", "p", "a cat", "", "base", "tuned", "../../secret", "/etc/passwd", 0, 0)
        database.execute("INSERT INTO pairs SELECT NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?", row)
        database.commit()
    return path


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM study", "UPDATE study SET categories = '{'", "UPDATE study SET seed = 'abc'"],
)
def test_a_study_that_does_not_say_what_it_is_of_is_told(store, statement):
    triggers = [row for row in SCHEMA if "ON study" in row]
    names = [row.split()[2] for row in triggers]
    store.close()
    with closing(sqlite3.connect(store.path)) as database:
        for change in (*(f"DROP TRIGGER {name}" for name in names), statement, *triggers):
            database.execute(change)
        database.commit()
    with pytest.raises(StudyError, match="does not say what"):
        Store.open(store.path).study()


def test_files_that_are_no_studies_are_refused(tmp_path, store):
    store.close()
    (tmp_path / "text").write_text("no database at all, but long enough to be taken for one" * 50)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)")
    newer, changed = tmp_path / "newer", tmp_path / "changed"
    for path, statement in ((newer, "PRAGMA user_version = 2"), (changed, "DROP TRIGGER answers_no_update")):
        shutil.copy(store.path, path)
        with closing(sqlite3.connect(path)) as database:
            database.execute(statement)
    for path, words in (
        (tmp_path / "absent", "no study at"),
        (tmp_path / "text", "no study, or damaged"),
        (tmp_path / "other.db", "no study of"),
        (newer, "version 2"),
        (changed, "changed by others"),
        (_with_a_name_elsewhere(store, tmp_path / "forged"), "CHECK constraint failed in pairs"),
    ):
        with pytest.raises(StudyError, match=words):
            Store.open(path)


@pytest.mark.parametrize(
    "name, group, words", [("", 1, "1 to 80"), ("a\nb", 1, "printable"), ("x" * 81, 1, "1 to 80"), ("x", 0, "from 1")]
)
def test_raters_without_a_proper_name_or_group_are_refused(store, name, group, words):
    with pytest.raises(StudyError, match=words):
        store.invite(name, group)


def test_a_rater_who_replaces_another_gets_the_same_tasks(tmp_path):
    store = empty_study(tmp_path, number=6, tasks_per_rater=2)
    for name in ("one", "two", "three"):
        store.invite(name, 1)
    token = store.replace_rater("two", "four")
    four, five = store.rater_of(token), joined(store, "five")
    assert four.group == 1 and store.tasks(four.rater_id) == store.tasks(2)
    assert {a.assignment_id for a in store.assignments(2)}.isdisjoint(a.assignment_id for a in store.assignments(4))
    seen = [task.pair_id for rater_id in (1, 2, 3) for task in store.tasks(rater_id)]
    assert len(set(seen)) == 6 and {task.pair_id for task in store.tasks(five.rater_id)} == set(seen[:2])
    with pytest.raises(StudyError, match="no rater 'six'"):
        store.replace_rater("six", "seven")
    with pytest.raises(StudyError, match="already"):
        store.replace_rater("two", "one")


def test_a_name_is_given_once_and_pairs_before_raters(store, tmp_path):
    store.invite("rater-01", 1)
    with pytest.raises(StudyError, match="already"):
        store.invite("rater-01", 2)
    with pytest.raises(StudyError, match="has raters"):
        store.add_pairs(comparisons(6))
    with pytest.raises(StudyError, match="no pairs"):
        Store.create(tmp_path / STUDY_FILE, Study("t")).invite("rater-01", 1)


def test_a_full_disk_is_told_and_nothing_is_half_stored(store):
    """SQLite's own limit on pages stands for the end of the disk."""
    rater = joined(store)
    assignments = [assignment.assignment_id for assignment in store.assignments(rater.rater_id)]
    store._connection().execute("PRAGMA max_page_count = 1")  # as many as there are
    with pytest.raises(StorageError, match="full"):
        for number in range(1000):
            store.answer(rater.rater_id, assignments[0], "left", 1.0, f"{number:064d}")
    before = len(store.answers())
    store.close()
    store.answer(rater.rater_id, assignments[1], "tie", 1.0, "there is room again")
    assert 0 < before == len(store.answers()) - 1


def test_threads_share_a_store(store):
    raters = [joined(store, f"rater-{number}") for number in range(6)]
    failures = []

    def work(rater):
        try:
            for turn, assignment in enumerate(store.assignments(rater.rater_id)):
                store.answer(rater.rater_id, assignment.assignment_id, "left", 1.0, f"{turn}")
        except Exception as error:  # a thread's own error fails no test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(store.progress(rater.rater_id) == (9, 9) for rater in raters)


def test_many_processes_write_at_once_and_no_answer_is_lost(store):
    tokens = [store.invite(f"rater-{number}", 1) for number in range(4)]
    processes = [writer(store.path.parent, token, 40) for token in tokens]
    acknowledged = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * 4
    rows = [" ".join(row) for row in stored(store.path.parent)]
    assert len(acknowledged) == 160 and sorted(rows) == sorted(acknowledged)


def test_sigkill_in_the_middle_of_writing_loses_nothing_that_was_acknowledged(store):
    tokens = [store.invite(f"rater-{number}", 1) for number in range(2)]
    processes = [writer(store.path.parent, token) for token in tokens]
    acknowledged = [processes[0].stdout.readline() for _ in range(25)]
    for process in processes:
        process.kill()
    acknowledged += [line for process in processes for line in process.communicate()[0].splitlines()]
    assert all(process.returncode < 0 for process in processes)
    whole = {line.strip() for line in acknowledged if len(line.split()) == 3}
    rows = [" ".join(row) for row in stored(store.path.parent)]
    assert len(whole) >= 25 and whole <= set(rows) and len(rows) == len(set(rows))
    assert len(rows) <= len(whole) + len(processes)  # the one that was on its way
    again = Store.open(store.path.parent)
    rater = again.rater_of(tokens[0])
    again.answer(rater.rater_id, again.assignments(rater.rater_id)[0].assignment_id, "tie", 1.0, "after")
    assert len(stored(store.path.parent)) == len(rows) + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_connection_of_its_own(store):
    rater = joined(store)
    one, two, *_ = (assignment.assignment_id for assignment in store.assignments(rater.rater_id))
    child = os.fork()
    if child == 0:
        try:
            store.answer(rater.rater_id, one, "left", 1.0, "child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    store.answer(rater.rater_id, two, "left", 1.0, "parent")
    assert len(store.answers()) == 2
