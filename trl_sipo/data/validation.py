# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong with preference data is said before any long work."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from trl_sipo.data.formats import (
    PreferenceFormat,
    RowSelection,
    detect_format,
    read_prompt,
    refuse_custom_transform,
    select_pairs,
    undecoded,
)
from trl_sipo.data.frame_source import FrameSource
from trl_sipo.data.images import verify_image
from trl_sipo.data.preference_dataset import arms_of, of_videos, read_latents, stream_columns, stream_rows
from trl_sipo.data.stored import VIDEO_INSTEAD, is_address, looks_like_text
from trl_sipo.data.video import ClipSampler, checked_length, common_rate, open_video, read_clip
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)

_NUM_NAMED = 5  # problems that an error names
_NUM_STREAMED = 8  # rows of a stream that are looked at: what is read here is read again for training
_BATCH = 10_000
_NUM_DECODED_VIDEOS = 64  # pairs: a minute at 81 frames of 480x832
_NUM_SILENT = {"image": 500, "video": 20}  # rows that are opened without a progress bar


def check_preference_dataset(
    dataset: Dataset | IterableDataset,
    fmt: PreferenceFormat | None = None,
    *,
    num_checked_images: int = 2000,
    num_decoded_videos: int = _NUM_DECODED_VIDEOS,
    clip: ClipSampler | None = None,
) -> dict[str, Any]:
    """Check preference data, and count what is in it.

    All rows: labels in range. All pairs: prompts that are text and not empty; images or videos that are there and not
    empty (bytes, or a path), without opening them. `num_checked_images` pairs, evenly spaced, are opened: both images
    verified and decoded; of both videos, the index of frames read, which tells their length and rate in milliseconds,
    and of `num_decoded_videos` pairs among these, again evenly spaced, the first clip decoded (with a random start,
    the last one too). In the pairs that are not opened or not decoded an arm can still be broken, which ends the
    training run that comes to it. Of a stream, only the first few rows can be looked at.

    Args:
        dataset: the rows, ties included.
        fmt: its format; None: from its columns.
        num_checked_images: how many pairs have both arms opened; all when there are fewer. Some 400 pairs of JPEG a
            second at 512 px, and 70 of PNG.
        num_decoded_videos: of how many of these clips are decoded, if they are videos: one or two pairs a second at 81
            frames of 480x832.
        clip: the arms are videos, of which these frames are needed. None, or one frame: they are images.

    Returns:
        `format`, `num_rows`, `num_ties`, `num_unlabelled`, `num_swapped` (pairs whose second column is preferred),
        `num_pairs`, `num_checked`, and of those checked `num_identical_arms`, `num_unequal_sizes` and `smallest_side`
        (pixels; None for latents); of rows of a single image `num_disliked`, those left out as such; of videos also
        what `_video_report` says, and `num_decoded`, of which the three before are then. For a stream, the number of
        rows, ties, unlabelled and pairs are of the rows looked at, and `streaming` is True.

    Raises:
        DatasetError: with the rows concerned and what to do.
    """
    for name, count in (("num_checked_images", num_checked_images), ("num_decoded_videos", num_decoded_videos)):
        if count < 0:
            raise DatasetError(f"{name} must not be negative, found {count}")
    clip = of_videos(clip)
    if isinstance(dataset, IterableDataset):
        return _check_stream(dataset, fmt or detect_format(stream_columns(dataset)), num_checked_images, clip)
    refuse_custom_transform(dataset)
    fmt = fmt or detect_format(dataset.column_names)
    if len(dataset) == 0:
        raise DatasetError("the dataset is empty: it has no rows")
    return _check_table(dataset, fmt, num_checked_images, num_decoded_videos, clip)


def _check_table(
    dataset: Dataset, fmt: PreferenceFormat, num_checked: int, num_decoded: int, clip: ClipSampler | None
) -> dict[str, Any]:
    kind = "image" if clip is None else "video"
    selection = select_pairs(dataset, fmt)
    _refuse_nothing_left(selection, len(dataset))
    rows = undecoded(dataset, fmt)
    _check_prompts(rows, fmt, selection.kept)
    if not fmt.holds_latents:
        _check_stored_media(rows, fmt, selection.kept, kind)
    checked = selection.kept[_evenly_spaced(len(selection.kept), num_checked)]
    decoded = set(checked[_evenly_spaced(len(checked), num_decoded)].tolist())
    report = {
        "format": fmt.name,
        "streaming": False,
        "num_rows": len(dataset),
        "num_ties": selection.num_ties,
        "num_unlabelled": selection.num_unlabelled,
        "num_swapped": selection.num_swapped,
        **({} if fmt.second else {"num_disliked": selection.num_disliked}),
        "num_pairs": len(selection.kept),
        **_check_arms(((int(row), rows[int(row)]) for row in _with_progress(checked, kind)), fmt, clip, decoded),
    }
    _warn(report, fmt, clip)
    return report


def _refuse_nothing_left(selection: RowSelection, num_rows: int) -> None:
    if len(selection.kept) == 0:
        raise DatasetError(
            f"no pair is left to learn from: of {num_rows} rows {selection.num_ties} are ties (label 0.5) and "
            f"{selection.num_unlabelled} have no label"
            + (f", and {selection.num_disliked} are not liked (label below 0.5)" if selection.num_disliked else "")
        )


def _check_stream(
    dataset: IterableDataset, fmt: PreferenceFormat, num_checked_images: int, clip: ClipSampler | None
) -> dict[str, Any]:
    rows = list(
        enumerate(itertools.islice(stream_rows(undecoded(dataset, fmt)), min(num_checked_images, _NUM_STREAMED)))
    )
    if not rows and num_checked_images:
        raise DatasetError("the dataset is empty: the stream has no rows")
    unlabelled = {number for number, row in rows if fmt.is_unlabelled(row)}
    ties = {number for number, row in rows if fmt.is_tie(row, where=f"row {number}")}
    disliked = {number for number, row in rows if fmt.is_disliked(row, where=f"row {number}")}
    dropped = unlabelled if fmt.soft_labels else unlabelled | ties | disliked
    pairs = [(number, row) for number, row in rows if number not in dropped]
    report = {
        "format": fmt.name,
        "streaming": True,
        "num_rows": len(rows),
        "num_ties": len(ties),
        "num_unlabelled": len(unlabelled),
        "num_swapped": sum(fmt.is_swapped(row) for _, row in pairs),
        **({} if fmt.second else {"num_disliked": len(disliked)}),
        "num_pairs": len(pairs),
        **_check_arms(iter(pairs), fmt, clip, {number for number, _ in pairs}),
    }
    _warn(report, fmt, clip)
    return report


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    if count >= length:
        return np.arange(length)
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def _check_prompts(rows: Dataset, fmt: PreferenceFormat, kept: np.ndarray) -> None:
    problems = []
    for number, prompt in _column_values(rows, fmt.prompt, kept):
        try:
            read_prompt(prompt, where=f"row {number}, column {fmt.prompt!r}")
        except DatasetError as error:
            problems.append(str(error))
    _raise_all(problems, "Remove such rows with dataset.filter(...).")


def _check_stored_media(rows: Dataset, fmt: PreferenceFormat, kept: np.ndarray, kind: str) -> None:
    """Images or videos that are missing or empty, from the lengths of stored bytes and the sizes of files alone."""
    problems = []
    for column in fmt.media_columns:
        found = _stored_media(rows, column)
        if found is None:
            continue
        num_bytes, paths = found
        where = "row {}, column " + repr(column)
        for number in kept[num_bytes[kept] == 0].tolist():
            problems.append(f"{where.format(number)}: the {kind} is empty (0 bytes)")
        for number in kept[num_bytes[kept] < 0].tolist():
            problem = _path_problem(paths[number].as_py(), kind)
            if problem:
                problems.append(f"{where.format(number)}: {problem}")
    _raise_all(problems, "Relative paths are relative to the folder in which this process was started.")


def _stored_media(rows: Dataset, column: str) -> tuple[np.ndarray, pa.ChunkedArray] | None:
    """Per row, the number of stored bytes (-1: none) and the path; None for a column of another kind.

    From the whole Arrow column: lengths come from its offsets, so that nothing is read from the disk or copied, as a
    selection of rows would.
    """
    table = rows.data.table.select([column])
    if rows._indices is not None:  # rows that were selected or shuffled; there is no public name for it
        positions = rows._indices.column(0).to_numpy()
    else:
        positions = np.arange(len(rows))
    values = table[column]
    if pa.types.is_struct(values.type) and {"bytes", "path"} <= {child.name for child in values.type}:
        stored, paths = pc.struct_field(values, "bytes"), pc.struct_field(values, "path")
        stored = None if pa.types.is_null(stored.type) else stored
        if not (stored is None or _is_bytes(stored.type)) or not _is_text(paths.type):
            return None
    elif _is_text(values.type) and not pa.types.is_null(values.type):
        stored, paths = None, values
    elif _is_bytes(values.type):
        stored, paths = values, pa.chunked_array([pa.nulls(len(values), pa.string())])
    else:
        return None
    num_bytes = np.full(len(values), -1, dtype=np.int64)
    if stored is not None:
        num_bytes = pc.fill_null(pc.binary_length(stored).cast(pa.int64()), -1).to_numpy()
    return num_bytes[positions], paths.take(pa.array(positions)).combine_chunks()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _path_problem(path: str | None, kind: str) -> str | None:
    if path is None:
        return f"the {kind} is missing (null)"
    if os.path.isdir(path):
        return None if kind == "video" else f"{path!r} is a folder, {VIDEO_INSTEAD}"
    if os.path.isfile(path):
        return f"the file {path!r} is empty (0 bytes)" if os.path.getsize(path) == 0 else None
    if os.path.exists(path):
        return f"{path!r} is a pipe or a device, and no file"
    # Opening says more of a text, or of an address.
    return None if looks_like_text(path) or is_address(path) else f"there is no file {path!r}"


def _with_progress(checked: np.ndarray, kind: str) -> Iterator[int]:
    is_quiet = len(checked) <= _NUM_SILENT[kind] or os.environ.get("LOCAL_RANK", "0") != "0"
    return iter(tqdm(checked, desc=f"Checking {kind}s", unit="pair", disable=is_quiet, leave=False))


def _column_values(rows: Dataset, column: str, kept: np.ndarray) -> Iterator[tuple[int, Any]]:
    """(row number, value) of the kept rows of one column, without reading the others."""
    is_kept = np.zeros(len(rows), dtype=bool)
    is_kept[kept] = True
    start = 0
    for batch in rows.select_columns([column]).iter(batch_size=_BATCH):
        for offset, value in enumerate(batch[column]):
            if is_kept[start + offset]:
                yield start + offset, value
        start += len(batch[column])


@dataclass(frozen=True)
class _Arm:
    """What is noted of an arm that was opened.

    Args:
        content: pixels or latents; None for a video that was not decoded.
        size: width and height in pixels; None for latents, and for a video that was not decoded.
        num_frames: of a video, at the rate that is asked for.
        rate: of a video file, in frames per second.
        is_irregular: the frames of the video are not all shown for as long.
    """

    content: bytes | None
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    rate: float | None = None
    is_irregular: bool = False


def _check_arms(
    rows: Iterator[tuple[int, Mapping[str, Any]]],
    fmt: PreferenceFormat,
    clip: ClipSampler | None,
    decoded: Collection[int],
) -> dict[str, Any]:
    """Open the arms of each row; of videos, decode those of the rows `decoded`."""
    pairs: list[tuple[_Arm, ...]] = []
    num_identical = 0
    problems = []
    for number, row in rows:
        try:
            pair = fmt.read(row, where=f"row {number}")
        except DatasetError as error:
            problems.append(str(error))
            continue
        where = f"row {number}"
        if clip is not None and not fmt.holds_latents:
            look = _decoded_arm if number in decoded else _indexed_arm
            opened = _video_arms(pair, clip, look, where, problems)
        else:
            opened = _still_arms(pair, fmt, where, problems)
        if not opened:
            continue
        if len(opened) > 1 and opened[0].content is not None:
            num_identical += (opened[0].content, opened[0].size) == (opened[1].content, opened[1].size)
        pairs.append(tuple(replace(arm, content=None) for arm in opened))
    _raise_all(problems, "")
    arms = [arm for pair in pairs for arm in pair]
    report = {
        "num_checked": len(pairs),
        "num_identical_arms": num_identical,
        "num_unequal_sizes": sum(opened[0].size != opened[-1].size for opened in pairs),
        "smallest_side": min((min(arm.size) for arm in arms if arm.size is not None), default=None),
    }
    if clip is None or fmt.holds_latents:
        return report
    return {**report, **_video_report(arms), "num_decoded": sum(opened[0].size is not None for opened in pairs)}


def _still_arms(pair: Mapping[str, Any], fmt: PreferenceFormat, where: str, problems: list[str]) -> tuple[_Arm, ...]:
    """The images or latents; none where one does not open, of which `problems` then says why."""
    try:
        if fmt.holds_latents:
            return _latent_arms(pair, where)
        return tuple(_image_arm(pair, arm, where) for arm in arms_of(pair))
    except DatasetError as error:
        problems.append(str(error))
        return ()


def _latent_arms(pair: Mapping[str, Any], where: str) -> tuple[_Arm, ...]:
    latents = read_latents(pair, where=where)
    return tuple(_Arm(latents[f"{arm}_latents"].numpy().tobytes()) for arm in arms_of(pair))


def _image_arm(pair: Mapping[str, Any], arm: str, where: str) -> _Arm:
    image = verify_image(pair[arm], where=f"{where}, the {arm} image")
    return _Arm(image.tobytes(), image.size)


def _video_arms(
    pair: Mapping[str, Any],
    clip: ClipSampler,
    look: Callable[[FrameSource, ClipSampler], _Arm],
    where: str,
    problems: list[str],
) -> tuple[_Arm, ...]:
    """Both are opened even if the first is broken, so that all broken files are named at once."""
    videos, arms = [], []
    for arm in arms_of(pair):
        try:
            video = open_video(pair[arm], frame_rate=clip.rate, where=f"{where}, the {arm} video")
            arms.append(look(video, clip))
            videos.append(video)
        except DatasetError as error:
            problems.append(str(error))
    if len(videos) < len(arms_of(pair)):
        return ()
    try:
        common_rate(videos, clip, where=where)
    except DatasetError as error:
        problems.append(str(error))
        return ()
    return tuple(arms)


def _decoded_arm(video: FrameSource, clip: ClipSampler) -> _Arm:
    arm = _indexed_arm(video, clip)
    images = read_clip(video, clip)
    if clip.random_start:
        read_clip(video, clip, checked_length(video, clip) - clip.num_frames)
    return replace(arm, content=b"".join(image.tobytes() for image in images), size=images[0].size)


def _indexed_arm(video: FrameSource, clip: ClipSampler) -> _Arm:
    """Only when its frames are shown: for most files, without decoding them."""
    return _Arm(
        content=None,
        num_frames=checked_length(video, clip),
        rate=None if video.rate is None else round(float(video.rate), 3),
        is_irregular=not video.timeline().is_regular,
    )


def _video_report(arms: Sequence[_Arm]) -> dict[str, Any]:
    """`shortest_frames`, `longest_frames` (at `frame_rate`, if set), `frame_rates`, `num_irregular`.

    `frame_rates` are those of the files, with the number of videos of each; irregular are videos whose frames are not
    all shown for as long.
    """
    lengths = [arm.num_frames for arm in arms if arm.num_frames is not None]
    rates = Counter(arm.rate for arm in arms if arm.rate is not None)
    return {
        "shortest_frames": min(lengths, default=None),
        "longest_frames": max(lengths, default=None),
        "frame_rates": dict(sorted(rates.items())),
        "num_irregular": sum(arm.is_irregular for arm in arms),
    }


def _raise_all(problems: Sequence[str], advice: str) -> None:
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
    lines = "".join(f"\n  {problem}" for problem in problems[:_NUM_NAMED])
    raise DatasetError(f"{len(problems)} problem(s) in the preference data:{lines}{more}\n{advice}".rstrip())


def _warn(report: Mapping[str, Any], fmt: PreferenceFormat, clip: ClipSampler | None) -> None:
    if report.get("num_irregular") and clip is not None and clip.frame_rate is None:
        logger.warning(
            "%d checked videos have frames that are shown for different times, so that consecutive frames are not "
            "evenly spaced. Set `frame_rate` to take them at even times.",
            report["num_irregular"],
        )
    if report["num_identical_arms"]:
        logger.warning(
            "%d of %d checked pairs have the same picture or video as chosen and rejected; they teach nothing.",
            report["num_identical_arms"],
            report.get("num_decoded", report["num_checked"]),
        )
    if report["num_swapped"] and fmt.first.startswith("chosen"):
        logger.warning(
            "In %d of %d pairs the column %r is below 0.5, so that %r is taken as the rejected one: the column is "
            "read as the share of votes for %r. If it means something else, drop it: dataset.remove_columns(%r).",
            report["num_swapped"],
            report["num_pairs"],
            fmt.label,
            fmt.first,
            fmt.first,
            fmt.label,
        )
