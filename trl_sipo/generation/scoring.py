# SPDX-License-Identifier: Apache-2.0
"""Scores of a folder of samples by one or several rewards, as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from trl_sipo.data.cache.shards import write_whole
from trl_sipo.errors import ConfigurationError, RewardError
from trl_sipo.generation.media_files import VIDEO_SUFFIX
from trl_sipo.generation.processes import process_state
from trl_sipo.generation.sampling import Sample, read_samples
from trl_sipo.rewards.base import Reward, RewardInfo

_SAMPLE_COLUMNS = ("prompt_id", "index", "prompt", "category")  # in the table of scores, beside the rewards


@dataclass(frozen=True)
class ScoredSamples:
    """Samples with what each reward makes of them.

    Attributes:
        samples: (n,) where they lie, and their prompts.
        infos: Reward's name -> what its number means.
        scores: Reward's name -> (n,) float64, in the reward's own unit.
    """

    samples: Sequence[Sample]
    infos: Mapping[str, RewardInfo]
    scores: Mapping[str, np.ndarray]

    @property
    def prompt_ids(self) -> list[str]:
        """The prompt of each sample."""
        return [sample.record.prompt_id for sample in self.samples]

    def table(self) -> pa.Table:
        """One row per sample: prompt_id, index, prompt, category, and a column for each reward."""
        records = [sample.record for sample in self.samples]
        return pa.table(
            {
                "prompt_id": self.prompt_ids,
                "index": pa.array([sample.index for sample in self.samples], pa.int64()),
                "prompt": [record.prompt for record in records],
                "category": pa.array([record.category for record in records], pa.string()),
                **{name: pa.array(values, pa.float64()) for name, values in self.scores.items()},
            }
        )

    def write(self, path: Path) -> None:
        """Write the table as Parquet.

        Raises:
            StorageError: It cannot be written.
        """
        write_whole(path, lambda temporary: pq.write_table(self.table(), temporary))


def check_rewards(rewards: Sequence[Reward], samples: Sequence[Sample]) -> None:
    """Raise [`ConfigurationError`] when two rewards have one name, or one does not take what the samples are."""
    names = [reward.info.name for reward in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ConfigurationError(
            f"Two rewards are called {twice[0]!r}: their scores could not be told apart. Leave one out."
            if twice
            else "There are no rewards to score with: name one at least."
        )
    taken = sorted(set(names) & set(_SAMPLE_COLUMNS))
    if taken:
        raise ConfigurationError(
            f"A reward is called {taken[0]!r}, as a column of the table of scores is ({', '.join(_SAMPLE_COLUMNS)}). "
            "Give it another name."
        )
    kind = "video" if samples[0].path.suffix == VIDEO_SUFFIX else "image"
    for reward in rewards:
        if kind not in reward.info.media:
            takes = " and ".join(f"{name}s" for name in sorted(reward.info.media))
            raise ConfigurationError(
                f"The reward {reward.info.name!r} scores {takes}, and the samples are {kind}s. Take another, or, for "
                "a reward of images, say of how many frames it is to take the mean (frames_per_video)."
            )


def score_samples(
    folder: str | Path, rewards: Sequence[Reward], *, batch_size: int = 16, show_progress: bool = True
) -> ScoredSamples:
    """Score all samples of a folder; every process of the run must call it, and takes its share.

    Args:
        folder: As [`~trl_sipo.generation.sampling.draw_samples`] made it, complete.
        rewards: Each with a name of its own.
        batch_size: Samples that are opened, and given to a reward, at once.

    Raises:
        ConfigurationError: Rewards that cannot be told apart, or do not take these samples.
        DatasetError: Samples that are missing or broken, or prompts that a reward cannot score.
        RewardError: A scorer failed, or answered with another number of scores, or with what is no number.
    """
    samples = list(read_samples(folder))
    check_rewards(rewards, samples)
    state = process_state()
    share = samples[state.process_index :: state.num_processes]
    parts: dict[str, list[np.ndarray]] = {reward.info.name: [] for reward in rewards}
    is_shown = show_progress and state.is_main_process
    with tqdm(total=len(share), desc="Scoring", unit="sample", disable=not is_shown) as progress:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            media, prompts = [sample.open() for sample in batch], [sample.record.prompt for sample in batch]
            for reward in rewards:
                parts[reward.info.name].append(_checked(reward, reward.score(media, prompts).numpy(), batch))
            progress.update(len(batch))
    own = {name: np.concatenate([*values, np.empty(0)]) for name, values in parts.items()}
    return ScoredSamples(samples, {reward.info.name: reward.info for reward in rewards}, _gathered(own, len(samples)))


def _checked(reward: Reward, scores: np.ndarray, batch: Sequence[Sample]) -> np.ndarray:
    name, scores = reward.info.name, np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(batch),):
        raise RewardError(f"The reward {name!r} gave scores of shape {scores.shape} for {len(batch)} samples.")
    if not np.isfinite(scores).all():
        broken = batch[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise RewardError(f"The reward {name!r} gave no finite score for {broken.path}.")
    return scores


def _gathered(own: Mapping[str, np.ndarray], total: int) -> dict[str, np.ndarray]:
    """The scores of all processes, in the order of the samples: process p of P has every P-th, from p."""
    shares = gather_object([own])
    scores = {name: np.empty(total) for name in own}
    for first, part in enumerate(shares):
        for name, values in part.items():
            scores[name][first :: len(shares)] = values
    return scores
