# SPDX-License-Identifier: Apache-2.0
"""VideoDPO (Liu et al., 2412.14167): a folder of videos, listed in metadata.json, and pairs of them in pair.json."""

from pathlib import Path
from typing import Any

from trl_sipo.data.json_text import parse_json
from trl_sipo.errors import DatasetError

_PAIRS, _VIDEOS = "pair.json", "metadata.json"


def is_video_dpo_folder(folder: Path) -> bool:
    """Whether both tables are there."""
    return (folder / _PAIRS).is_file() and (folder / _VIDEOS).is_file()


def read_video_dpo_folder(folder: Path) -> dict[str, list[Any]]:
    """The pairs as columns: `prompt`, `chosen`, `rejected` (absolute paths) and, where there is one, `score`.

    `video1`, the preferred one, and `video2` count the entries of metadata.json. The score is no label: it says how
    common the pair's quality gap is, which VideoDPO weighs pairs by.

    Raises:
        DatasetError: a file that is no JSON list, or a pair that names no entry; says which.
    """
    folder = folder.resolve()
    videos, pairs = _read_list(folder / _VIDEOS), _read_list(folder / _PAIRS)
    columns: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for number, pair in enumerate(pairs):
        try:
            prompt = pair["frame_caption"]
            arms = [folder / _entry(videos, pair[arm])["basic"]["clip_path"] for arm in ("video1", "video2")]
        except (KeyError, IndexError, TypeError) as error:
            raise DatasetError(
                f"{folder / _PAIRS}, pair {number}: {type(error).__name__}: {error} in {pair!r:.120}"
            ) from error
        columns["prompt"].append(prompt[0] if isinstance(prompt, list) and prompt else prompt)
        for column, path in zip(("chosen", "rejected"), arms, strict=True):
            columns[column].append(str(path))
    if any("score" in pair for pair in pairs):
        columns["score"] = [pair.get("score") for pair in pairs]
    return columns


def _entry(videos: list[Any], index: int) -> Any:
    if not 0 <= index < len(videos):
        raise IndexError(f"{_VIDEOS} has {len(videos)} videos, no number {index}")
    return videos[index]


def _read_list(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error
    content = parse_json(text, str(file))
    if not isinstance(content, list):
        raise DatasetError(f"{file} must hold a list, found {type(content).__name__}")
    return content
