# SPDX-License-Identifier: Apache-2.0
"""Folders that are there as a whole or not at all, and which checkpoint a run continues from. Files alone: no torch.

A checkpoint is written under a name that nothing takes for one, brought to the disk, listed in a manifest, and then
renamed. So whatever ends the process, a folder `checkpoint-<step>` is complete, and one that was damaged afterwards is
found out by its manifest.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_sipo.errors import ConfigurationError

logger = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint_manifest.json"
STATE_FILE = "trainer_state.json"
# Larger files are known by their size alone: to read gigabytes again would take as long as to write them, and what
# a kill, a full disk or a loss of power leaves behind is too short, since all is on the disk before the manifest.
CHECKSUM_LIMIT = 64 * 2**20

# transformers pushes no file whose name begins with an underscore, and takes none of these for a checkpoint.
# What is being written; what was complete and makes room for a new one of the same step; what may be half removed.
_SAVING, _REPLACED, _DELETING = "_saving-", "_replaced-", "_deleting-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(rf"({_SAVING}|{_REPLACED}|{_DELETING})checkpoint-\d+")
_PIPELINE_INDEX = "model_index.json"
# What file systems say that can bring files to the disk, but not folders: those of networks and of FUSE among them.
_NOT_FOR_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR}


# ------------------------------------------------------------------------------------------------------- writing


def temporary_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is written, beside the place that it takes at the end."""
    return checkpoint.with_name(_SAVING + checkpoint.name)


def begin(checkpoint: Path) -> None:
    """Make the temporary folder of a checkpoint, and remove what killed runs have left beside it."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    recover(checkpoint.parent)
    for folder in sorted(_folders(checkpoint.parent, _LEFTOVER)):  # `_deleting-` first, whose name another may take
        if folder.name.startswith(_REPLACED):
            _delete_if_possible(folder)
        else:
            _remove(folder)
    temporary_folder(checkpoint).mkdir()


def publish(checkpoint: Path) -> None:
    """Let the temporary folder of a checkpoint take its place: on the disk first, the manifest last, then the name.

    A checkpoint that is there already, from an earlier run or damaged, is replaced.
    """
    temporary = temporary_folder(checkpoint)
    _sync_tree(temporary)
    manifest = temporary / MANIFEST_FILE
    manifest.write_text(json.dumps({"files": _describe_files(temporary)}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(temporary)
    _take_name(checkpoint)


def discard(checkpoint: Path) -> None:
    """Remove the temporary folder of a checkpoint that could not be written, as far as that is possible."""
    shutil.rmtree(temporary_folder(checkpoint), ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete checkpoints until `limit` are left: damaged ones first, then those of the fewest steps.

    Args:
        limit: `None` or less than 1: nothing is deleted.
        keep: Those that stay in any case: the newest, which is known to be complete, and the best.
    """
    if limit is None or limit < 1:
        return
    checkpoints = _numbered(run_dir)
    others = [folder for folder in checkpoints if folder not in keep]
    others.sort(key=lambda folder: _damage(folder, checksums=False) is None)
    for folder in others[: max(len(checkpoints) - limit, 0)]:
        logger.info("Deleting the checkpoint %s: `save_total_limit` is %d.", folder, limit)
        _delete_if_possible(folder)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write a model into, whose entries replace those of `target` when all of them are on the disk.

    An error leaves `target` as it was. A pipeline takes several renames; one that is interrupted between them has no
    `model_index.json`, so that it does not load, rather than as a mixture of two models.
    """
    temporary = target / f"{_SAVING}model"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    (temporary / "new").mkdir(parents=True)
    (temporary / "old").mkdir()
    try:
        yield temporary / "new"
        _sync_tree(temporary / "new")
        _move_entries(temporary / "new", target, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_entries(source: Path, target: Path, replaced: Path) -> None:
    try:
        if (source / _PIPELINE_INDEX).exists() and (target / _PIPELINE_INDEX).exists():
            (target / _PIPELINE_INDEX).rename(replaced / _PIPELINE_INDEX)
        for entry in _index_last(source):
            place = target / entry.name
            if place.is_dir():
                place.rename(replaced / entry.name)
            entry.replace(place)
    except BaseException:
        _put_back(source, target, replaced)
        raise
    _sync(target)


def _put_back(source: Path, target: Path, replaced: Path) -> None:
    """Undo what was done of [`_move_entries`]."""
    for entry in _index_last(replaced):
        place = target / entry.name
        if place.is_dir():
            place.rename(source / entry.name)
        entry.replace(place)


def _index_last(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name == _PIPELINE_INDEX)


def _take_name(checkpoint: Path) -> None:
    """Rename a temporary folder that is complete; what had the name is moved aside first, and deleted at the end.

    At every moment one of the two has the name, or another by which [`recover`] finds it.
    """
    temporary, replaced = temporary_folder(checkpoint), checkpoint.with_name(_REPLACED + checkpoint.name)
    try:
        if checkpoint.exists():
            checkpoint.rename(replaced)
        temporary.rename(checkpoint)
    except BaseException:  # Ctrl-C too: the new one is going to be discarded
        if replaced.exists() and not checkpoint.exists():
            replaced.rename(checkpoint)
        raise
    _sync(checkpoint.parent)
    if replaced.exists():
        _delete_if_possible(replaced)


def _delete_if_possible(folder: Path) -> None:
    try:
        _delete(folder)
    except OSError as error:
        logger.warning("The folder %s could not be deleted (%s): delete it yourself.", folder, error)


def _delete(folder: Path) -> None:
    """Under another name first: half of a checkpoint must not be taken for one."""
    doomed = folder.with_name(_DELETING + folder.name.removeprefix(_REPLACED))
    folder.rename(doomed)
    _remove(doomed)  # what stays goes with the next checkpoint


def _remove(folder: Path) -> None:
    """As far as that is possible: of a link itself, not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # where neither a folder nor a file that is open for reading can be synced
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NOT_FOR_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def _describe_files(folder: Path) -> dict[str, list[int | None]]:
    """Size in bytes, and CRC-32 or `None`, of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}


def _checksum(path: Path) -> int | None:
    return zlib.crc32(path.read_bytes()) if path.stat().st_size <= CHECKSUM_LIMIT else None


# ------------------------------------------------------------------------------------------------------- reading


def checkpoint_to_resume(output_dir: str | Path, wanted: str | bool | None) -> str | None:
    """The checkpoint that a run continues from; `None`: it begins anew.

    Args:
        output_dir: Of the run.
        wanted: A path; `True`, "true" or "latest" for the last complete checkpoint in `output_dir`; "auto" for the
            same if there is one; `None`, `False` or "false" for none.

    Raises:
        ConfigurationError: There is no such checkpoint, or it cannot be continued from.
    """
    choice = str(wanted).lower()
    is_path = wanted is not None and choice not in ("false", "true", "latest", "auto")
    recover(Path(str(wanted)).parent if is_path else Path(output_dir))
    if wanted is None or choice == "false":
        return None
    if is_path:
        if (reason := why_not_resumable(Path(str(wanted)))) is not None:
            raise ConfigurationError(
                f"`resume_from_checkpoint={wanted}` cannot be continued from: {reason}. Give another checkpoint, or "
                "`True` for the last complete one in `output_dir`."
            )
        return str(wanted)
    last = last_complete_checkpoint(Path(output_dir))
    if last is None and choice != "auto":
        raise ConfigurationError(
            f"`resume_from_checkpoint={wanted}`, but {str(output_dir)!r} holds no checkpoint to continue from. Look "
            "at `output_dir`, or leave `resume_from_checkpoint` away to start anew ('auto' does so by itself)."
        )
    return None if last is None else str(last)


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of most steps that a run can continue from; those that it cannot are named in warnings."""
    for checkpoint in reversed(_numbered(output_dir)):
        if (reason := why_not_resumable(checkpoint)) is None:
            return checkpoint
        logger.warning("Passed over the checkpoint %s: %s.", checkpoint, reason)
    return None


def earlier_complete_checkpoint(checkpoint: Path) -> Path | None:
    """The checkpoint of most steps, beside this one and of fewer steps, that a run can continue from."""
    step = step_of(checkpoint)
    for folder in reversed(_numbered(checkpoint.parent)):
        is_earlier = folder.name != checkpoint.name and (step is None or _step(folder) < step)
        if is_earlier and why_not_resumable(folder) is None:
            return folder
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step that the name of a checkpoint says; `None`: it has another name."""
    return _step(checkpoint) if _CHECKPOINT.fullmatch(checkpoint.name) else None


def warn_of_earlier_run(output_dir: Path) -> None:
    """Warn of checkpoints in the folder of a run that begins anew: they will be taken for its own."""
    if checkpoints := _numbered(output_dir):
        logger.warning(
            "%s holds checkpoints of an earlier run, up to %s, and this run begins anew. Resumed, it would go on from "
            "the checkpoint of most steps, whichever run wrote it. Give another `output_dir`, or remove them.",
            output_dir,
            checkpoints[-1].name,
        )


def recover(run_dir: Path) -> None:
    """Give the name to checkpoints that lack nothing else: their process ended while one took the place of another."""
    for prefix in (_SAVING, _REPLACED):  # the new one rather than that which it replaces
        for folder in _folders(run_dir, re.compile(prefix + _CHECKPOINT.pattern)):
            checkpoint = folder.with_name(folder.name.removeprefix(prefix))
            is_whole = prefix == _REPLACED or (folder / MANIFEST_FILE).exists()
            if is_whole and _damage(folder) is None and _damage(checkpoint) is not None:
                _give_name(folder, checkpoint)


def _give_name(folder: Path, checkpoint: Path) -> None:
    try:
        if checkpoint.exists():
            _delete(checkpoint)
        folder.rename(checkpoint)
        _sync(checkpoint.parent)
    except OSError as error:  # not ours, or read-only
        logger.warning("%s is complete, but cannot be renamed to %s (%s).", folder, checkpoint.name, error)


def why_not_resumable(checkpoint: Path) -> str | None:
    """Why a run cannot continue from this folder, as a clause; `None`: it can."""
    if (reason := _damage(checkpoint)) is not None:
        return reason
    if not any(checkpoint.glob("rng_state*")):
        return "it holds the weights alone (`save_only_model=True`)"
    return None


def _damage(folder: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, as a clause that names the file; `None`: nothing."""
    if not folder.is_dir():
        return "there is no such folder"
    if (reason := _strange_entry(folder)) is not None:
        return reason
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        return _damage_of_unlisted(folder)
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        files = [(name, size, checksum if checksums else None) for name, (size, checksum) in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({error})"
    for name, size, checksum in files:
        if (reason := _damage_of_file(folder / name, size, checksum)) is not None:
            return f"its file {name} {reason}"
    return None


def _strange_entry(folder: Path) -> str | None:
    """What a trainer writes nowhere: to open a pipe is to wait for it, and behind a link to a folder may be more."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir():
            if path.is_symlink():
                return f"its folder {name} is a link"
        elif not path.is_file():
            return f"its {name} is no file, but a pipe, a device, or a link to one or to nothing"
    return None


def _damage_of_file(path: Path, size: int, checksum: int | None) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes instead of {size}"
        if checksum is not None and _checksum(path) != checksum:
            return "is not what was written (its CRC-32 differs)"
    except OSError as error:  # of another user, or on a disk that fails
        return f"cannot be read ({error})"
    return None


def _damage_of_unlisted(folder: Path) -> str | None:
    """Of a checkpoint without a manifest: an earlier version wrote it, whose last file was the trainer's state."""
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has neither a {MANIFEST_FILE} nor a readable {STATE_FILE}, so that its writing was interrupted"
    return None


def _numbered(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, of the fewest steps first."""
    return sorted(_folders(run_dir, _CHECKPOINT), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def _folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    if not parent.is_dir():
        return []
    return [folder for folder in parent.iterdir() if name.fullmatch(folder.name) and folder.is_dir()]
