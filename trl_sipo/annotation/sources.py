# SPDX-License-Identifier: Apache-2.0
"""Where the samples of a study come from: folders that tell their prompts, or any of equal file names and a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import PIL.Image

from trl_sipo.data.formats import read_prompt
from trl_sipo.data.stored import ANIMATION_SUFFIXES, FRAME_SUFFIXES, VIDEO_SUFFIXES
from trl_sipo.errors import StudyError
from trl_sipo.generation.identity import SETTINGS_FILE
from trl_sipo.generation.names import links_out_of
from trl_sipo.generation.prompt_files import SUFFIXES, read_rows
from trl_sipo.generation.prompt_sets import CATEGORY_COLUMNS, PROMPT_COLUMNS
from trl_sipo.generation.sampling import read_samples

METADATA: Final = ("metadata.csv", "metadata.jsonl")
NAME_COLUMNS: Final = ("file_name", "id", "prompt_id")
_SAMPLES = "samples"  # in what `trl-sipo evaluate` and `feedback` write
_MOVING = VIDEO_SUFFIXES | (ANIMATION_SUFFIXES - FRAME_SUFFIXES)
_NUM_NAMED, _MAX_NAME = 3, 80


@dataclass(frozen=True)
class SourceSample:
    """One file of a model.

    Attributes:
        key: What it shares with the samples of the other models that it is compared with.
        prompt_id, prompt, category: Of the prompt; the category may be empty.
        path: Of the file.
    """

    key: str
    prompt_id: str
    prompt: str
    category: str
    path: Path

    @cached_property
    def is_video(self) -> bool:
        """By the suffix; a WebP may be either, and is looked into."""
        suffix = self.path.suffix.lower()
        return suffix in _MOVING or (suffix in ANIMATION_SUFFIXES and _is_animated(self.path))


def model_folders(specs: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER`; `FOLDER`, which names the model; or the output of `trl-sipo evaluate`, with all models in it.

    Raises:
        StudyError: A folder is not there, a name is given twice, or there are fewer than two.
    """
    folders: dict[str, Path] = {}
    for spec in specs:
        for name, folder in _named_folders(spec):
            if name in folders:
                raise StudyError(f"The model name {name!r} is given twice. Write NAME=FOLDER, each with its own name.")
            if not name or len(name) > _MAX_NAME or not name.isprintable():
                raise StudyError(f"The model name {name!r} must be of 1 to {_MAX_NAME} printable characters.")
            if not folder.is_dir():
                raise StudyError(f"There is no folder {str(folder)!r} with the samples of {name!r}.")
            folders[name] = folder
    if len(folders) < 2:
        raise StudyError(f"A study compares at least two models, and {len(folders)} is given.")
    return folders


def _named_folders(spec: str) -> list[tuple[str, Path]]:
    name, is_named, rest = spec.partition("=")
    folder = Path(spec).expanduser()
    if is_named and not folder.is_dir():  # as of runs/lr=1e-5
        return [(name.strip(), Path(rest).expanduser())]
    found = sorted(path.parent for path in (folder / _SAMPLES).glob(f"*/{SETTINGS_FILE}"))
    return [(path.name, path) for path in found] or [(folder.resolve().name, folder)]


def read_sources(folders: Mapping[str, Path], prompts: Path | None = None) -> dict[str, dict[str, SourceSample]]:
    """The samples of every model, by key; the same keys and prompts for all.

    Args:
        folders: By model.
        prompts: A table with the columns `file_name` (or `id`, `prompt_id`), `prompt` and, if there are any,
            `category`, for folders that do not hold their prompts. None: `metadata.csv` or `.jsonl` in one of them.

    Raises:
        StudyError: No prompts, files without a partner, or prompts that differ.
        DatasetError: A folder or table that cannot be read.
    """
    table = prompts or _metadata_of(folders.values())
    records = None if table is None else _read_table(table)
    sources = {name: _read_folder(folder, records) for name, folder in folders.items()}
    (base, expected), *others = sources.items()
    for name, samples in others:
        _check_partners((base, expected), (name, samples))
    return sources


def _check_partners(
    one: tuple[str, Mapping[str, SourceSample]], other: tuple[str, Mapping[str, SourceSample]]
) -> None:
    for (name, samples), (its, theirs) in ((one, other), (other, one)):
        missing = [key for key in samples if key not in theirs]
        if missing:
            raise StudyError(
                f"{len(missing)} of {len(samples)} samples of {name!r} have no partner of {its!r}, such as "
                f"{_quoted(missing)}. Every model needs a sample of each: draw what is missing, or move away the rest."
            )
    (name, samples), (its, theirs) = one, other
    for key, sample in samples.items():
        if sample.prompt != theirs[key].prompt:
            raise StudyError(
                f"{key!r} was drawn for {sample.prompt!r} by {name!r}, for {theirs[key].prompt!r} by {its!r}."
            )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NUM_NAMED]))


def _metadata_of(folders: Iterable[Path]) -> Path | None:
    return next((folder / name for folder in folders for name in METADATA if (folder / name).is_file()), None)


def _read_folder(folder: Path, records: Mapping[str, tuple[str, str]] | None) -> dict[str, SourceSample]:
    if (folder / SETTINGS_FILE).is_file():
        return {
            f"{record.prompt_id}/{index:03d}": SourceSample(
                f"{record.prompt_id}/{index:03d}", record.prompt_id, record.prompt, record.category or "", path
            )
            for record, index, path in read_samples(folder)
        }
    files = _media_files(folder)
    if records is None:
        raise StudyError(
            f"{str(folder)!r} does not tell the prompts of its files. Give --prompts with a table of the columns "
            f"{NAME_COLUMNS[0]} and prompt, or put it there as {METADATA[0]}."
        )
    unknown = [name for name in files if name not in records]
    if unknown:
        raise StudyError(f"{len(unknown)} files of {str(folder)!r} have no prompt, such as {_quoted(unknown)}.")
    return {name: SourceSample(name, name, *records[name], path) for name, path in files.items()}


def _media_files(folder: Path) -> dict[str, Path]:
    """Images and videos of a folder by their names without suffixes."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in FRAME_SUFFIXES | _MOVING or not path.is_file():
            continue
        if path.stem in files:
            raise StudyError(f"{str(folder)!r} has two files of one name, {files[path.stem].name} and {path.name}.")
        files[path.stem] = path
    if not files:
        raise StudyError(f"{str(folder)!r} holds no images or videos.")
    links = links_out_of(folder, files.values())
    if links:
        raise StudyError(f"{str(links[0])!r} leads out of its folder: it is a link. Put the file there.")
    return files


def _read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Prompt and category by the name of the file."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise StudyError(f"Prompts are not read from {str(path)!r}: expected a file of {', '.join(SUFFIXES)}.")
    records: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        name, prompt = _cell(row, NAME_COLUMNS), _cell(row, PROMPT_COLUMNS)
        if name is None or prompt is None:
            raise StudyError(
                f"{where}: expected a column of {', '.join(NAME_COLUMNS)}, and one of {', '.join(PROMPT_COLUMNS)}; "
                f"the columns are {list(row)}."
            )
        path_in_table = Path(str(name))
        stem = path_in_table.stem if path_in_table.suffix.lower() in FRAME_SUFFIXES | _MOVING else path_in_table.name
        category = _cell(row, CATEGORY_COLUMNS)
        record = read_prompt(prompt, where=where).strip(), "" if category is None else str(category)
        if records.setdefault(stem, record) != record:
            raise StudyError(f"{where}: {stem!r} has another prompt in an earlier row.")
    return records


def _cell(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[name] for name in columns if row.get(name) not in (None, "")), None)


def _is_animated(path: Path) -> bool:
    try:
        with PIL.Image.open(path) as image:
            return getattr(image, "is_animated", False)
    except OSError:  # broken: whoever decodes it says how
        return False
