# SPDX-License-Identifier: Apache-2.0
"""Preference data as folders: `chosen/<id>.png` (or .mp4, or a folder of frames), likewise `rejected`, and prompts."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from trl_sipo.data.json_text import check_header, parse_json
from trl_sipo.data.stored import ANIMATION_SUFFIXES, FRAME_SUFFIXES, VIDEO_SUFFIXES
from trl_sipo.errors import DatasetError

_ARMS = ("chosen", "rejected")
_SUFFIXES = FRAME_SUFFIXES | ANIMATION_SUFFIXES | VIDEO_SUFFIXES
_METADATA = ("metadata.csv", "metadata.jsonl")
_NUM_NAMED = 5


def find_image_folders(root: Path) -> dict[str, Path]:
    """Folders of the layout at or one level below `root`, by split: `{"": root}`, `{"train": root / "train", ...}`."""
    if _is_image_folder(root):
        return {"": root}
    return {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir() and _is_image_folder(folder)}


def read_image_folder(folder: Path) -> dict[str, list[Any]]:
    """One such folder as columns: `prompt`, `chosen`, `rejected` (absolute paths) and the others there are.

    Rows are in the order of the metadata. Ids are the names of the images or videos without their suffix, or of the
    folders that hold the frames of a video.

    Raises:
        DatasetError: no metadata, a row without `id` or `prompt`, an id used twice, or a file or a row without its
            partners (names the first few).
    """
    folder = folder.resolve()
    media = {arm: _media_by_id(folder / arm) for arm in _ARMS}
    rows = _read_metadata(folder)
    ids = [row.pop("id") for row in rows]
    _check_partners(folder, ids, media)
    columns: dict[str, list[Any]] = {"prompt": [row.pop("prompt") for row in rows]}
    for arm in _ARMS:
        columns[arm] = [str(media[arm][identifier]) for identifier in ids]
    others = sorted({key for row in rows for key in row} - {*columns, "file_name"})
    for column in others:
        columns[column] = [row.get(column) for row in rows]
    return columns


def _is_image_folder(folder: Path) -> bool:
    return all((folder / arm).is_dir() for arm in _ARMS)


def _media_by_id(folder: Path) -> dict[str, Path]:
    media: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if path.name.startswith(".") or not (_holds_frames(path) if is_folder else path.suffix.lower() in _SUFFIXES):
            continue
        identifier = path.name if is_folder else path.stem
        if identifier in media:
            raise DatasetError(
                f"{folder}: the id {identifier!r} has two files, {media[identifier].name} and {path.name}"
            )
        media[identifier] = path
    return media


def _holds_frames(folder: Path) -> bool:
    return any(file.suffix.lower() in FRAME_SUFFIXES for file in folder.iterdir())


def _read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Rows with at least `id` (a string) and `prompt`."""
    files = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(files) != 1:
        found = [file.name for file in files]
        raise DatasetError(f"{folder}: expected one of {' and '.join(_METADATA)} beside the folders, found {found}")
    file = files[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = _csv_rows(text) if file.suffix == ".csv" else _json_rows(text, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.get("prompt") is None:
            raise DatasetError(f"{file}, row {number}: no 'prompt' in {row!r:.80}")
        identifier = row["id"] if row.get("id") is not None else row.get("file_name")
        if identifier is None:
            raise DatasetError(f"{file}, row {number}: neither 'id' nor 'file_name' in {row!r:.80}")
        row["id"] = _stem(str(identifier))
    return rows


def _json_rows(text: str, file: Path) -> list[Any]:
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def _csv_rows(text: str) -> list[dict[str, Any]]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    check_header(table.fieldnames or ())
    rows = list(table)
    if any(None in row or None in row.values() for row in rows):
        raise csv.Error("a row has more or fewer cells than the header")
    for row in rows:
        if "label" in row:
            row["label"] = _number(row["label"])
    return rows


def _number(cell: str) -> float | str | None:
    """A cell of a CSV as a number; an empty one is null, any other text stays what it is and is refused later."""
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


def _stem(identifier: str) -> str:
    name = identifier.replace("\\", "/").rsplit("/", 1)[-1]
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in _SUFFIXES else name


def _check_partners(folder: Path, ids: list[str], media: dict[str, dict[str, Path]]) -> None:
    if not ids:
        raise DatasetError(f"{folder}: the metadata has no rows")
    known = set(ids)
    repeated = {identifier for identifier, count in Counter(ids).items() if count > 1}
    if repeated:
        raise DatasetError(f"{folder}: the metadata names an id more than once: {_first(repeated)}")
    problems = []
    for arm, found in media.items():
        if known - set(found):
            problems.append(f"{arm}/ has nothing for {_first(known - set(found))}")
        if set(found) - known:
            problems.append(f"the metadata has no row for {_first(set(found) - known)} of {arm}/")
    if problems:
        raise DatasetError(f"{folder}: images or videos without their partners: {'; '.join(problems)}")


def _first(identifiers: set[str]) -> str:
    more = f" and {len(identifiers) - _NUM_NAMED} more" if len(identifiers) > _NUM_NAMED else ""
    return f"{sorted(identifiers)[:_NUM_NAMED]}{more}"
