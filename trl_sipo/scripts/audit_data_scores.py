# SPDX-License-Identifier: Apache-2.0
"""Scores of both arms of pairs, for `trl-sipo audit data`: of columns of the data, and of rewards that are asked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_sipo.errors import ConfigurationError

if TYPE_CHECKING:
    from trl_sipo.data.formats import PreferenceFormat
    from trl_sipo.rewards.base import Reward

_NUMBERS = ("int", "uint", "float", "double")


def score_columns(rows: Any, fmt: "PreferenceFormat") -> dict[str, tuple[str, str]]:
    """Columns that hold a number for each arm, by what they are called without it.

    `chosen_pickscore` and `rejected_pickscore` are "pickscore", as are `pickscore_chosen` and `pickscore_rejected`;
    the arms are called as the format's media columns are. A larger number is a better sample.
    """
    numbers = [
        name
        for name, feature in rows.features.items()
        if str(getattr(feature, "dtype", "")).startswith(_NUMBERS) and name not in fmt.columns
    ]
    found = {}
    for first in numbers:
        for pattern in ("{}_", "_{}"):
            part = pattern.format(fmt.first)
            is_named = first.startswith(part) if pattern == "{}_" else first.endswith(part)
            second = first.replace(part, pattern.format(fmt.second), 1)
            if is_named and second in numbers and second != first:
                found[first.replace(part, "", 1)] = (first, second)
    return found


def column_differences(rows: Any, columns: tuple[str, str], numbers: np.ndarray) -> np.ndarray:
    """First minus second score of some rows, float64; NaN where one is missing."""
    table = rows.select_columns(list(columns)).select(numbers).with_format(None)[:]
    first, second = (
        np.array([np.nan if value is None else value for value in table[name]], dtype=np.float64) for name in columns
    )
    return first - second


def reward_differences(
    rows: Any,
    fmt: "PreferenceFormat",
    numbers: np.ndarray,
    rewards: Sequence["Reward"],
    *,
    batch_size: int,
    is_video: bool,
) -> dict[str, np.ndarray]:
    """What each reward makes of the first arm minus what it makes of the second, larger is better.

    Raises:
        DatasetError, RewardError: A prompt or medium that it cannot score, or a scorer that failed.
    """
    from tqdm.auto import tqdm

    from trl_sipo.data.formats import read_prompt, without_decoding
    from trl_sipo.rewards.media import check_scores

    stored = without_decoding(rows.select_columns([fmt.prompt, *fmt.media_columns]).with_format(None))
    differences: dict[str, list[np.ndarray]] = {reward.info.name: [] for reward in rewards}
    with tqdm(total=len(numbers), desc="Scoring pairs") as progress:
        for start in range(0, len(numbers), batch_size):
            batch = [(int(number), stored[int(number)]) for number in numbers[start : start + batch_size]]
            prompts = 2 * [read_prompt(row[fmt.prompt]) for _, row in batch]
            media = [
                _opened(row[column], is_video, f"row {number}, column {column!r}")
                for column in fmt.media_columns
                for number, row in batch
            ]
            for reward in rewards:
                scores = reward.score(media, prompts)
                check_scores(scores, prompts, name=reward.info.name)
                first, second = scores.double().numpy().reshape(2, len(batch))
                sign = 1 if reward.info.higher_is_better else -1
                differences[reward.info.name].append(sign * (first - second))
            progress.update(len(batch))
    return {name: np.concatenate(parts) for name, parts in differences.items()}


def check_media(rows: Any, rewards: Sequence["Reward"]) -> None:
    """See by the first row whether the rewards take what the arms are, before all of them are read.

    Raises:
        ConfigurationError: Latents, or a reward of something else.
        DatasetError: Columns of no known format.
    """
    from trl_sipo.data.checking.rows import is_of_videos
    from trl_sipo.data.formats import detect_format, without_decoding

    fmt = detect_format(rows.column_names)
    if not rewards or not len(rows):
        return
    if fmt.holds_latents:
        raise ConfigurationError("`--rewards` score pictures, and the data holds latents. Leave them out.")
    first = without_decoding(rows.select_columns(list(fmt.media_columns)).with_format(None))[0]
    kind = "video" if any(is_of_videos(first[column]) for column in fmt.media_columns) else "image"
    for reward in rewards:
        if kind not in reward.info.media:
            takes = " and ".join(f"{name}s" for name in sorted(reward.info.media))
            raise ConfigurationError(
                f"`--rewards {reward.info.name}` scores {takes}, and the pairs are of {kind}s. Leave it out, or, for "
                "a reward of images, say of how many frames it is to take the mean (frames_per_video)."
            )


def _opened(value: Any, is_video: bool, where: str) -> Any:
    from trl_sipo.data.images import open_image
    from trl_sipo.data.video import open_video

    if not is_video:
        return open_image(value, where=where)
    return np.stack([np.asarray(frame.open()) for frame in open_video(value, where=where).frames()])
