# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or not there, whenever their writing ends, and damaged ones are found out and named."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import checkpoint_files
from trl_sipo.trainer.checkpoint_files import (
    MANIFEST_FILE,
    begin,
    checkpoint_to_resume,
    discard,
    publish,
    rotate,
    temporary_folder,
    why_not_resumable,
    written_whole,
)

FILES = {"weights.safetensors": "w" * 100, "optimizer.pt": "o" * 50, "rng_state.pth": "r", "trainer_state.json": "{}"}


class Killed(BaseException):
    """Stands for the end of the process."""


def _write(run_dir: Path, step: int, mark: str = "") -> Path:
    checkpoint = run_dir / f"checkpoint-{step}"
    begin(checkpoint)
    folder = temporary_folder(checkpoint)
    (folder / "unet").mkdir()
    for name, content in {**FILES, "unet/config.json": mark}.items():
        (folder / name).write_text(content)
    publish(checkpoint)
    return checkpoint


def _ends_at(monkeypatch, call: int) -> list[int]:
    """Let the process end before the given call that brings something to the disk or changes a name."""
    count = [0]
    for owner, name in (
        (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (Path, "replace"),
        (Path, "unlink"), (checkpoint_files.shutil, "rmtree"),
    ):  # fmt: skip
        original = getattr(owner, name)

        def counted(*args, _original=original, **kwargs):
            count[0] += 1
            if count[0] >= call:
                raise Killed
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return count


def _mark(checkpoint: Path) -> str:
    return (checkpoint / "unet" / "config.json").read_text()


# Steps of the checkpoints that are there, and of the one that is written.
MOMENTS = {"new": ([2, 4], 6), "replaces_one": ([2, 4], 4), "replaces_the_only_one": ([4], 4)}


@pytest.mark.parametrize("case", MOMENTS)
def test_at_whatever_moment_writing_ends_there_is_a_complete_checkpoint(case, tmp_path):
    """Every moment between two operations on the disk: first all that was before stays, then the new one is there."""
    before, step = MOMENTS[case]
    call, found = 0, []
    while not found or found[-1] != "done":
        call += 1
        run_dir = tmp_path / str(call)
        for earlier in before:
            _write(run_dir, earlier, str(earlier))
        (run_dir / "_saving-checkpoint-9").mkdir()  # of a run that was killed
        with pytest.MonkeyPatch.context() as patch:
            _ends_at(patch, call)
            try:
                _write(run_dir, step, "new")
                found.append("done")
            except Killed:
                found.append("killed")
        # Nothing that a run, transformers or a reader would take for a checkpoint is incomplete.
        assert all(why_not_resumable(folder) is None for folder in run_dir.glob("checkpoint-*"))
        if before == [4]:
            _is_found_by_every_way_to_go_on(run_dir, 4)
        last = Path(checkpoint_to_resume(run_dir, True))
        assert _mark(last) in ("4", "new")
        assert _mark(run_dir / "checkpoint-2") == "2" if 2 in before else True
        if found[-1] == "done":
            assert _mark(last) == "new"
        _write(run_dir, 8)
        assert not list(run_dir.glob("_*"))
    assert found.count("killed") > 15


def _is_found_by_every_way_to_go_on(run_dir: Path, step: int) -> None:
    """In copies of the folder: resumed by its path, begun anew, and a next checkpoint written without either."""
    ways = {
        "path": lambda copy: checkpoint_to_resume(copy, str(copy / f"checkpoint-{step}")),
        "anew": lambda copy: checkpoint_to_resume(copy, None),
        "next": lambda copy: begin(copy / "checkpoint-8"),
    }
    for way, go_on in ways.items():
        copy = run_dir.with_name(f"{run_dir.name}-{way}")
        shutil.copytree(run_dir, copy)
        go_on(copy)
        assert why_not_resumable(copy / f"checkpoint-{step}") is None, way


def test_a_checkpoint_that_lacks_only_its_name_gets_it(tmp_path):
    """When one of the same step is replaced, there is a moment in which neither has the name."""
    checkpoint = _write(tmp_path, 4, "new")
    checkpoint.rename(temporary_folder(checkpoint))
    assert checkpoint_to_resume(tmp_path, True) == str(checkpoint) and _mark(checkpoint) == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_only_checkpoint_stays_when_another_cannot_take_its_name(error, tmp_path, monkeypatch):
    """The new one is discarded then, as after every error."""
    checkpoint = _write(tmp_path, 4, "old")
    rename = Path.rename

    def fail(folder, target):
        if folder == temporary_folder(checkpoint):
            raise error
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error):
        _write(tmp_path, 4, "new")
    discard(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"] and _mark(checkpoint) == "old"


def test_half_of_a_checkpoint_that_was_replaced_is_never_taken(tmp_path):
    """Removed without its manifest it would pass for one of an earlier version."""
    checkpoint = _write(tmp_path, 4, "old")
    with pytest.MonkeyPatch.context() as patch:
        removed = []
        patch.setattr(checkpoint_files, "_remove", removed.append)
        _write(tmp_path, 4, "new")
    assert [folder.name for folder in removed] == ["_deleting-checkpoint-4"]
    (tmp_path / "_deleting-checkpoint-4" / MANIFEST_FILE).unlink()
    _cut(checkpoint / "optimizer.pt")
    assert checkpoint_to_resume(tmp_path, "auto") is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "torn": (lambda folder: _cut(folder / "optimizer.pt"), "optimizer.pt has 49 bytes instead of 50"),
    "missing": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "missing_inside": (lambda folder: (folder / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "zeros": (
        lambda folder: (folder / "optimizer.pt").write_bytes(b"\0" * 50),
        "optimizer.pt is not what was written",
    ),
    "manifest": (lambda folder: _cut(folder / MANIFEST_FILE), f"{MANIFEST_FILE} cannot be read"),
    **{
        f"other_manifest_{number}": (
            lambda folder, text=text: (folder / MANIFEST_FILE).write_text(text),
            f"{MANIFEST_FILE} cannot be read",
        )
        for number, text in enumerate(["[]", '{"files": null}', '{"files": {"a": 3}}', '{"files": {"a": [1]}}'])
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage, tmp_path, caplog):
    earlier, later = _write(tmp_path, 2), _write(tmp_path, 10)
    DAMAGES[damage][0](later)
    assert checkpoint_to_resume(tmp_path, True) == str(earlier)
    assert str(later) in caplog.text and DAMAGES[damage][1] in caplog.text
    with pytest.raises(ConfigurationError, match=DAMAGES[damage][1]):
        checkpoint_to_resume(tmp_path, str(later))


def test_a_checkpoint_that_must_not_be_read_is_passed_over(tmp_path, monkeypatch, caplog):
    earlier, later = _write(tmp_path, 2), _write(tmp_path, 10)
    read = Path.read_bytes

    def refuse(path):
        if path == later / "optimizer.pt":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert checkpoint_to_resume(tmp_path, "auto") == str(earlier)
    assert "optimizer.pt cannot be read" in caplog.text


def test_large_files_are_known_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "CHECKSUM_LIMIT", 60)
    checkpoint = _write(tmp_path, 2)
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert listed["weights.safetensors"] == [100, None] and listed["optimizer.pt"][1] is not None


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path):
    """It has no manifest; transformers wrote trainer_state.json last."""
    checkpoint = _write(tmp_path, 3)
    (checkpoint / MANIFEST_FILE).unlink()
    assert checkpoint_to_resume(tmp_path, "latest") == str(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3, "log_hi')
    with pytest.raises(ConfigurationError, match="interrupted"):
        checkpoint_to_resume(tmp_path, str(checkpoint))


def test_weights_alone_are_not_resumed_from(tmp_path):
    checkpoint = _write(tmp_path, 3)
    for name in ("rng_state.pth", MANIFEST_FILE):
        (checkpoint / name).unlink()
    with pytest.raises(ConfigurationError, match="save_only_model"):
        checkpoint_to_resume(tmp_path, str(checkpoint))


@pytest.mark.parametrize("wanted", [True, "true", "latest"])
def test_without_a_checkpoint(wanted, tmp_path):
    for folder in (tmp_path, tmp_path / "not_there"):
        with pytest.raises(ConfigurationError, match="holds no checkpoint"):
            checkpoint_to_resume(folder, wanted)
        assert checkpoint_to_resume(folder, "auto") is None
    assert checkpoint_to_resume(tmp_path, None) is checkpoint_to_resume(tmp_path, False) is None
    with pytest.raises(ConfigurationError, match="no such folder"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-1"))


def test_the_newest_by_number(tmp_path):
    for step in (2, 10, 9):
        _write(tmp_path, step)
    assert checkpoint_to_resume(tmp_path, "auto") == str(tmp_path / "checkpoint-10")


def _steps(run_dir: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in run_dir.glob("checkpoint-*"))


def test_rotation_deletes_the_oldest(tmp_path):
    written = [_write(tmp_path, step) for step in (2, 4, 6, 8)]
    rotate(tmp_path, None, {written[-1]})
    assert _steps(tmp_path) == [2, 4, 6, 8]
    rotate(tmp_path, 3, {written[-1]})
    assert _steps(tmp_path) == [4, 6, 8]
    rotate(tmp_path, 2, {written[-1], written[1]})  # the best one stays
    assert _steps(tmp_path) == [4, 8]
    rotate(tmp_path, 1, {written[-1], written[1]})
    assert _steps(tmp_path) == [4, 8] and not list(tmp_path.glob("_*"))


def test_rotation_deletes_damaged_ones_first_and_never_the_newest(tmp_path):
    for step in (2, 4, 6, 100):
        _write(tmp_path, step)
    _cut(tmp_path / "checkpoint-6" / "optimizer.pt")
    rotate(tmp_path, 3, {tmp_path / "checkpoint-4"})  # which was just written, by a run that began anew
    assert _steps(tmp_path) == [2, 4, 100]
    rotate(tmp_path, 1, {tmp_path / "checkpoint-4"})
    assert _steps(tmp_path) == [4]


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path, monkeypatch, caplog):
    written = [_write(tmp_path, step) for step in (2, 4)]

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_files, "_delete", refuse)
    rotate(tmp_path, 1, {written[-1]})
    assert str(written[0]) in caplog.text and _steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_syncs_no_folders_will_do(code, tmp_path, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    assert why_not_resumable(_write(tmp_path, 2)) is None


def test_what_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """As on a network disk, where a file stays as long as someone has it open."""
    first = _write(tmp_path, 2)
    rmtree = checkpoint_files.shutil.rmtree

    def busy(folder, ignore_errors=False):
        if not folder.name.startswith("_deleting-"):
            rmtree(folder, ignore_errors)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", busy)
    rotate(tmp_path, 1, {_write(tmp_path, 4)})
    assert (tmp_path / f"_deleting-{first.name}").is_dir()
    assert why_not_resumable(_write(tmp_path, 6)) is None and _steps(tmp_path) == [4, 6]


def test_of_a_checkpoint_that_lies_elsewhere_the_link_is_removed(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    _write(run_dir, 2).rename(elsewhere)
    (run_dir / "checkpoint-2").symlink_to(elsewhere)
    rotate(run_dir, 1, {_write(run_dir, 4)})
    _write(run_dir, 6)
    assert _steps(run_dir) == [4, 6] and not list(run_dir.glob("_*"))
    assert why_not_resumable(elsewhere) is None


def test_a_model_replaces_another_as_a_whole(tmp_path):
    """At whatever moment writing ends, the folder loads as the old pipeline, as the new one, or not at all."""
    call, done = 0, False
    while not done:
        call += 1
        target = tmp_path / str(call)
        _model(target, "old")
        (target / "notes.txt").write_text("of the user")
        with pytest.MonkeyPatch.context() as patch:
            _ends_at(patch, call)
            try:
                with written_whole(target) as folder:
                    patch.undo()
                    _model(folder, "new")
                    patch.setattr(os, "fsync", os.fsync)
                    _ends_at(patch, call)
                done = True
            except Killed:
                pass
        assert _model_of(target) in ({"old"}, {"new"}, None)
        assert (target / "notes.txt").read_text() == "of the user"
    assert _model_of(target) == {"new"} and not list(target.glob("_*")) and call > 8


def _model(folder: Path, mark: str) -> None:
    for name in ("unet/weights", "vae/weights", "model_index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "w") as file:
            file.write(mark)


def _model_of(folder: Path) -> set[str] | None:
    names = ("unet/weights", "vae/weights", "model_index.json")
    return {(folder / name).read_text() for name in names} if (folder / "model_index.json").exists() else None


def test_an_error_leaves_the_model_that_was_there(tmp_path):
    _model(tmp_path, "old")
    with pytest.raises(OSError, match="full"), written_whole(tmp_path) as folder:
        _model(folder, "new")
        raise OSError("the disk is full")
    assert _model_of(tmp_path) == {"old"} and not list(tmp_path.glob("_*"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["unet", "vae", "model_index.json"])
def test_an_error_in_the_middle_of_replacing_leaves_the_model_that_was_there(name, error, tmp_path, monkeypatch):
    """Else there would be neither the old one nor the new one."""
    _model(tmp_path, "old")
    replace = Path.replace

    def fail(entry, place):
        if entry.name == name and entry.parent.name == "new":
            raise error
        return replace(entry, place)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(error), written_whole(tmp_path) as folder:
        _model(folder, "new")
    assert _model_of(tmp_path) == {"old"} and not list(tmp_path.glob("_*"))
