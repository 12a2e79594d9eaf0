# SPDX-License-Identifier: Apache-2.0
"""From the samples of several models to a study: pairs, files under names that tell nothing, raters and their tokens.

<study>/study.sqlite    everything but the files; only its owner can read it
<study>/media/          one file per sample, under a random name
"""

import os
import random
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
from tqdm.auto import tqdm

from trl_sipo.annotation.media import (
    VIDEO_SUFFIX,
    Medium,
    check_alike,
    common_length,
    degraded,
    encode,
    filled_up,
    read_medium,
)
from trl_sipo.annotation.plan import check_plan, plan_tasks
from trl_sipo.annotation.records import Comparison, Study
from trl_sipo.annotation.sources import METADATA, SourceSample, read_sources
from trl_sipo.annotation.store import MEDIA_FOLDER, STUDY_FILE, Store
from trl_sipo.data.images import image_size
from trl_sipo.data.video_writing import check_video_writing
from trl_sipo.errors import StorageError, StudyError

AUTO: Final = "auto"
BETTER, WORSE = "better", "worse"

_GOLD_SHARE, _LEAST_GOLD = 0.05, 5  # of the pairs; of fewer, nobody can be told to be careless
_MIRRORED_SHARE = 0.1  # of a rater's pairs
_MOST_RATERS = 1000
_SECONDS_PER_TASK = {False: 10.0, True: 20.0}  # of images and of videos: for the estimate alone
_LOSSY = {".jpg", ".jpeg"}
_DEGRADED = ", degraded"  # after the name of the model whose sample it was


@dataclass(frozen=True)
class BuildSettings:
    """What a study is made of.

    Args:
        study: Texts, seed and `tasks_per_rater`; categories and the number of mirrored pairs are set by the plan.
        groups, raters_per_group: Twelve raters in three groups are those of the SIPO paper, appendix E.
        against: Compare all models with this one; None: each two.
        samples_per_prompt: The first ones of each prompt.
        max_prompts: So many of them, chosen at random.
        gold: "auto": samples beside the same with blur and noise. A folder: of `better/`, `worse/` and a table of
            prompts. None: there are none.
        num_gold: Of "auto"; None: a twentieth of the pairs, at least five.
        num_mirrored: Pairs that a rater sees a second time with the sides exchanged; None: a tenth of their pairs.

    Raises:
        StudyError: A number out of range.
    """

    study: Study
    groups: int = 3
    raters_per_group: int = 4
    against: str | None = None
    samples_per_prompt: int = 1
    max_prompts: int | None = None
    gold: str | None = AUTO
    num_gold: int | None = None
    num_mirrored: int | None = None

    def __post_init__(self) -> None:
        numbers = ("groups", "raters_per_group", "samples_per_prompt", "max_prompts", "num_gold")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StudyError(f"`{name}` must be at least 1, got {value}.")
        if self.groups * self.raters_per_group > _MOST_RATERS:
            raise StudyError(
                f"`groups`={self.groups} of `raters_per_group`={self.raters_per_group} are more than {_MOST_RATERS:,} "
                "raters. Build for fewer, and invite more later."
            )
        if self.num_gold is not None and self.gold != AUTO:
            raise StudyError(f"`num_gold`={self.num_gold} is for gold={AUTO!r}; a folder's pairs are all taken.")


@dataclass(frozen=True)
class SourcePair:
    """Two samples that become a pair.

    Attributes:
        models: Names of the first and the second.
        samples: Theirs; of automatic gold twice the same.
        is_gold: The first is known to be better.
    """

    models: tuple[str, str]
    samples: tuple[SourceSample, SourceSample]
    is_gold: bool = False

    @property
    def is_degraded(self) -> bool:
        """Whether the second is the first made worse."""
        return self.is_gold and self.samples[0] is self.samples[1]


@dataclass(frozen=True)
class BuildPlan:
    """A study that is not yet written.

    Attributes:
        settings: With the study's categories.
        pairs: Gold ones last.
        notes: What whoever runs the study should know.
    """

    settings: BuildSettings
    pairs: Sequence[SourcePair]
    notes: Sequence[str]

    @property
    def num_raters(self) -> int:
        """In all groups."""
        return self.settings.groups * self.settings.raters_per_group

    @property
    def tasks_per_rater(self) -> int:
        """Gold and repeats among them; the same number for all."""
        return len(plan_tasks(self.comparisons(), self.settings.study, 1, 0))

    @property
    def minutes_per_rater(self) -> float:
        """A guess: ten seconds for two images, twenty for two videos."""
        return self.tasks_per_rater * _SECONDS_PER_TASK[self.pairs[0].samples[0].is_video] / 60

    def comparisons(self) -> list[Comparison]:
        """The pairs, without files."""
        return [_comparison(number, pair, "", "") for number, pair in enumerate(self.pairs)]


@dataclass(frozen=True)
class Invitation:
    """What a rater needs to take part.

    Attributes:
        name, group: Of the rater.
        token: 32 hexadecimal digits, which are kept nowhere else.
    """

    name: str
    group: int
    token: str


# ------------------------------------------------------------------------------------------------------- planning


def plan_study(folders: Mapping[str, Path], settings: BuildSettings, prompts: Path | None = None) -> BuildPlan:
    """Choose and check the pairs of a study, without decoding the files.

    Args:
        folders: Of samples, by model.
        prompts: See [`read_sources`].

    Raises:
        StudyError: Models that do not pair, or numbers that do not fit.
        DatasetError: A file that cannot be opened.
        ConfigurationError: Videos, while PyAV is not installed.
    """
    if settings.against is not None and settings.against not in folders:
        raise StudyError(f"`against`={settings.against!r} is none of the models {', '.join(folders)}.")
    sources = read_sources(folders, prompts)
    keys = _chosen_keys(next(iter(sources.values())), settings)
    first = settings.against
    couples = list(combinations(folders, 2)) if first is None else [(first, name) for name in folders if name != first]
    pairs = [SourcePair(two, (sources[two[0]][key], sources[two[1]][key])) for key in keys for two in couples]
    for pair in pairs:
        _check_headers(pair, is_blind=settings.study.is_blind)
    study = _planned(settings, pairs)
    check_plan(len(pairs), study.tasks_per_rater, study.num_mirrored)
    pairs += _gold_pairs(pairs, settings)
    if any(pair.samples[0].is_video for pair in pairs):
        check_video_writing()
    notes = _notes_on_files(sources)
    if first is not None and len(folders) > 2 and (study.tasks_per_rater or len(pairs)) > len(keys):
        notes.append(_note_on_repetition(first))
    return BuildPlan(replace(settings, study=study), pairs, notes)


def _planned(settings: BuildSettings, pairs: Sequence[SourcePair]) -> Study:
    categories = dict.fromkeys(pair.samples[0].category for pair in pairs if pair.samples[0].category)
    num_mirrored = settings.num_mirrored
    if num_mirrored is None:
        num_mirrored = round(_MIRRORED_SHARE * (settings.study.tasks_per_rater or len(pairs)))
    return replace(settings.study, categories=tuple(categories), num_mirrored=num_mirrored)


def _chosen_keys(samples: Mapping[str, SourceSample], settings: BuildSettings) -> list[str]:
    """The first samples of each prompt, of so many prompts."""
    by_prompt: dict[str, list[str]] = {}
    for key, sample in samples.items():
        by_prompt.setdefault(sample.prompt_id, []).append(key)
    fewest = min(map(len, by_prompt.values()))
    if fewest < settings.samples_per_prompt:
        raise StudyError(
            f"`samples_per_prompt`={settings.samples_per_prompt}, but a prompt has {fewest}. Ask for fewer."
        )
    prompts = list(by_prompt)
    if settings.max_prompts is not None and settings.max_prompts < len(prompts):
        generator = random.Random(f"{settings.study.seed}/prompts")
        prompts = [prompts[i] for i in sorted(generator.sample(range(len(prompts)), settings.max_prompts))]
    return [key for prompt in prompts for key in by_prompt[prompt][: settings.samples_per_prompt]]


def _check_headers(pair: SourcePair, *, is_blind: bool) -> None:
    """What can be known of two files without decoding them, so that a mistake is told at once."""
    first, second = pair.samples
    if first.is_video != second.is_video:
        raise StudyError(f"{str(first.path)!r} and {str(second.path)!r}: one is a video, the other an image.")
    if is_blind and not first.is_video:
        sizes = [image_size(sample.path, where=str(sample.path)) for sample in pair.samples]
        if sizes[0] != sizes[1]:
            shown = [f"{str(s.path)!r} ({size[1]} x {size[0]})" for s, size in zip(pair.samples, sizes, strict=True)]
            raise StudyError(
                f"{shown[0]} and {shown[1]} are of different sizes, which would tell raters which model is which. "
                "Draw or convert both alike."
            )


def _gold_pairs(pairs: Sequence[SourcePair], settings: BuildSettings) -> list[SourcePair]:
    if settings.gold is None:
        return []
    if settings.gold == AUTO:
        wanted = settings.num_gold or max(_LEAST_GOLD, round(_GOLD_SHARE * len(pairs)))
        originals = {
            sample.path: (name, sample) for p in pairs for name, sample in zip(p.models, p.samples, strict=True)
        }
        generator = random.Random(f"{settings.study.seed}/gold")
        chosen = generator.sample(list(originals.values()), min(wanted, len(originals)))
        return [SourcePair((name, f"{name}{_DEGRADED}"), (s, s), is_gold=True) for name, s in chosen]
    folder = Path(settings.gold)
    for name in (BETTER, WORSE):
        if not (folder / name).is_dir():
            raise StudyError(f"The gold folder {settings.gold!r} has no folder {name!r} in it.")
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    sources = read_sources({BETTER: folder / BETTER, WORSE: folder / WORSE}, table)
    gold = [SourcePair((BETTER, WORSE), (s, sources[WORSE][key]), is_gold=True) for key, s in sources[BETTER].items()]
    for pair in gold:
        _check_headers(pair, is_blind=settings.study.is_blind)
    return gold


def _notes_on_files(sources: Mapping[str, Mapping[str, SourceSample]]) -> list[str]:
    kinds = {name: Counter(s.path.suffix.lower() for s in samples.values()) for name, samples in sources.items()}
    lossy = [name for name, suffixes in kinds.items() if _LOSSY & set(suffixes)]
    if not lossy or len(lossy) == len(kinds):
        return []
    return [
        f"The samples of {', '.join(lossy)} were compressed with losses (JPEG) and those of the others were not: "
        "raters may learn to tell the models by that. Draw all alike if you can."
    ]


def _note_on_repetition(name: str) -> str:
    return (
        f"The samples of {name} come again with every other model, and theirs come once: raters who remember samples "
        "can tell them. Leave `against` out, build a study for each model, or give raters fewer pairs."
    )


# ------------------------------------------------------------------------------------------------------- writing


def build_study(plan: BuildPlan, output: Path, *, show_progress: bool = True) -> list[Invitation]:
    """Write a study: whole or not there. Raters are called rater-01, rater-02, ... and take the groups in turn.

    Args:
        output: A folder that is not there.

    Raises:
        StudyError: It is there; or samples of a prompt differ in more than their content.
        DatasetError: A file is broken.
        StorageError: It cannot be written: no space is left, say.
    """
    with written_study(output) as folder:
        media = _MediaWriter(folder / MEDIA_FOLDER, plan.settings.study)
        pairs = _write_media(plan.pairs, media, show_progress=show_progress)
        store = Store.create(folder / STUDY_FILE, plan.settings.study)
        try:
            store.add_pairs(pairs)
            names = [f"rater-{number:02d}" for number in range(1, plan.num_raters + 1)]
            groups = [number % plan.settings.groups + 1 for number in range(plan.num_raters)]
            return [Invitation(*rater, store.invite(*rater)) for rater in zip(names, groups, strict=True)]
        finally:
            store.close()


def check_output(output: Path) -> None:
    """Raise [`StudyError`] where a study is to be written over something."""
    if output.exists() or output.is_symlink():
        raise StudyError(f"{str(output)!r} is there already, and is not overwritten. Give another --output.")


@contextmanager
def written_study(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end; after an error nothing is left."""
    check_output(output)
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))  # for its owner alone
        (folder / MEDIA_FOLDER).mkdir()
        yield folder
        check_output(output)
        folder.rename(output)
    except OSError as error:
        raise StorageError(f"The study {str(output)!r} cannot be written: {error}. Nothing is left of it.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # not there where it took its name


class _MediaWriter:
    """Writes samples that are seen together to files of one length, each once. In a blind study they must be alike."""

    def __init__(self, folder: Path, study: Study):
        self._folder, self._is_blind = folder, study.is_blind
        self._noise = np.random.default_rng(random.Random(f"{study.seed}/noise").getrandbits(64))

    def write_samples(self, samples: Mapping[str, SourceSample]) -> dict[str, str]:
        """The names of the files of some models' samples of one prompt, by model."""
        return self._write({name: read_medium(s.path, is_video=s.is_video) for name, s in samples.items()}, samples)

    def write_degraded(self, sample: SourceSample) -> tuple[str, str]:
        """The names of a sample's file and of the same made worse."""
        medium = read_medium(sample.path, is_video=sample.is_video)
        files = self._write({BETTER: medium, WORSE: degraded(medium, self._noise)}, {BETTER: sample})
        return files[BETTER], files[WORSE]

    def _write(self, media: dict[str, Medium], samples: Mapping[str, SourceSample]) -> dict[str, str]:
        one = next(iter(media.values()))
        if self._is_blind:
            check_alike(media, f"Samples of {next(iter(samples.values())).key!r}")
            media = {name: Medium(medium.frames, one.rate) for name, medium in media.items()}
        contents = [encode(medium, self._folder / f"scratch{VIDEO_SUFFIX}") for medium in media.values()]
        length = common_length(contents)
        files = {name: secrets.token_hex(16) + one.suffix for name in media}
        for (_, file), content in sorted(zip(files.items(), contents, strict=True), key=lambda item: item[0][1]):
            path = self._folder / file
            with path.open("wb") as opened:
                opened.write(filled_up(content, length))
                opened.flush()
                os.fsync(opened.fileno())
            os.utime(path, (0, 0))  # when each was written tells in which order
        return files


def _write_media(pairs: Sequence[SourcePair], media: _MediaWriter, *, show_progress: bool) -> list[Comparison]:
    """The files of all pairs, and the pairs with their names. Samples that several pairs share are written once."""
    together: dict[tuple[bool, str], dict[str, SourceSample]] = {}
    for pair in pairs:
        if not pair.is_degraded:
            together.setdefault((pair.is_gold, pair.samples[0].key), {}).update(
                zip(pair.models, pair.samples, strict=True)
            )
    made_worse = [number for number, pair in enumerate(pairs) if pair.is_degraded]
    files: dict[tuple[bool, str], dict[str, str]] = {}
    worse: dict[int, tuple[str, str]] = {}
    with tqdm(total=len(together) + len(made_worse), desc="Writing samples", disable=not show_progress) as progress:
        for place, samples in together.items():
            files[place] = media.write_samples(samples)
            progress.update()
        for number in made_worse:
            worse[number] = media.write_degraded(pairs[number].samples[0])
            progress.update()
    comparisons = []
    for number, pair in enumerate(pairs):
        place = files.get((pair.is_gold, pair.samples[0].key), {})
        names = worse.get(number) or (place[pair.models[0]], place[pair.models[1]])
        comparisons.append(_comparison(number, pair, *names))
    return comparisons


def _comparison(number: int, pair: SourcePair, first_media: str, second_media: str) -> Comparison:
    sample = pair.samples[0]
    return Comparison(
        pair_id=f"{'gold' if pair.is_gold else 'pair'}-{number:05d}",
        prompt_id=sample.prompt_id,
        prompt=sample.prompt,
        category=sample.category,
        first_model=pair.models[0],
        second_model=pair.models[1],
        first_media=first_media,
        second_media=second_media,
        is_video=sample.is_video,
        is_gold=pair.is_gold,
    )
