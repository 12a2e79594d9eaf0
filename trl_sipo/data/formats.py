# SPDX-License-Identifier: Apache-2.0
"""The column layouts that preference data comes in, and which rows of them are pairs.

A label, where there is one, is the share of votes for the first image: 1 means that the first image is preferred, 0
that the second is, 0.5 is a tie. Labels in between only say which image is preferred, and ties, which then teach
nothing, are dropped; unless the labels are to be trained as probabilities (`soft_labels`), to which a tie is one
more. Rows without a label are dropped in any case.

A row may also hold a single image, whose label, where there is one, says whether it is liked. Methods that learn from
single images take pairs apart for that: see `Arms`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, LargeList, List

from trl_sipo.errors import ConfigurationError, DatasetError

Arms = Literal["pair", "chosen", "each"]
"""What a sample is made of: both arms of a pair; the chosen arm alone, or a liked image; or each arm by itself, with
the label 1 (chosen, or liked) or 0."""

TIE = 0.5
_LONGEST_PROMPT = 100_000  # characters
_QUOTED = 80


@dataclass(frozen=True)
class PreferenceFormat:
    """Which column holds what.

    Args:
        name: the key in `FORMATS`.
        prompt: column of the prompt, a string or TRL's conversational form.
        first, second: columns of the two arms; the first is the preferred one unless `label` says otherwise. Rows of
            a single image have no second, and their label says whether it is liked.
        label: column of the share of votes for `first`, in [0, 1]; None: `first` is always preferred.
        label_required: without the label it could not be known which arm is preferred.
        has_label: column that is False in rows nobody has judged; None: all rows are judged.
        holds_latents: the arms are encoded latents (nested lists or arrays of floats), not images or videos.
        soft_labels: the labels are trained as probabilities: pairs come with them, and ties are pairs.
        arms: what samples are made of.
    """

    name: str
    prompt: str
    first: str
    second: str | None = None
    label: str | None = None
    label_required: bool = False
    has_label: str | None = None
    holds_latents: bool = False
    soft_labels: bool = False
    arms: Arms = "pair"

    @property
    def media_columns(self) -> tuple[str, ...]:
        """The columns of the arms."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def samples_per_row(self) -> int:
        """Samples that `samples` makes of a row."""
        return len(self.media_columns) if self.arms == "each" else 1

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns without which a dataset is not of this format."""
        label = (self.label,) if self.label_required and self.label is not None else ()
        return (self.prompt, *self.media_columns, *label)

    @property
    def label_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.label, self.has_label) if column is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, in order, once each."""
        return (self.prompt, *self.media_columns, *self.label_columns)

    def with_soft_labels(self) -> "PreferenceFormat":
        """The same columns, with labels that are trained as probabilities.

        Raises:
            ConfigurationError: there is no column of labels.
        """
        if self.label is None:
            raise ConfigurationError(
                "`soft_labels=True` trains labels as probabilities, but the dataset has none. Give the column `label` "
                "(the probability that the first arm is preferred, in [0, 1]), or leave `soft_labels` off."
            )
        return replace(self, soft_labels=True)

    def with_arms(self, arms: Arms) -> "PreferenceFormat":
        """The same columns, with samples made of other arms.

        Raises:
            DatasetError: rows of a single image are no pairs, or have no label to tell whether it is liked.
        """
        if self.second is None and arms == "pair":
            raise DatasetError(
                f"the rows hold one {self.first!r} each, and pairs are needed: the columns `chosen` and `rejected`. "
                "DiffusionSFTTrainer learns from single images, and DiffusionKTOTrainer from single images that are "
                "liked or not."
            )
        if self.second is None and arms == "each" and self.label is None:
            raise DatasetError(
                f"the rows hold one {self.first!r} each, and nothing says which of them are liked: give the column "
                "`label`, true or 1 for those that are."
            )
        return replace(self, arms=arms, soft_labels=self.soft_labels and arms == "pair")

    def is_unlabelled(self, row: Mapping[str, Any]) -> bool:
        """Whether nobody has judged this pair: `has_label` is False, or the label is null."""
        if self.has_label is not None and (_is_null(row[self.has_label]) or not row[self.has_label]):
            return True
        return self.label is not None and _is_null(row[self.label])

    def is_tie(self, row: Mapping[str, Any], *, where: str = "a row") -> bool:
        """Whether neither arm is preferred. False for an unlabelled row.

        Raises:
            DatasetError: the label is not a number in [0, 1].
        """
        if self.label is None or self.is_unlabelled(row):
            return False
        return _as_label(row[self.label], self.label, where) == TIE

    def is_disliked(self, row: Mapping[str, Any], *, where: str = "a row") -> bool:
        """Whether a row of a single image is of no use, since only liked ones are wanted; False for a pair.

        Raises:
            DatasetError: the label is not a number in [0, 1].
        """
        if self.second is not None or self.arms != "chosen" or self.label is None or self.is_unlabelled(row):
            return False
        return _as_label(row[self.label], self.label, where) < TIE

    def is_swapped(self, row: Mapping[str, Any], *, where: str = "a row") -> bool:
        """Whether the second arm is the preferred one.

        Raises:
            DatasetError: the label is not a number in [0, 1].
        """
        if self.second is None or self.label is None or self.is_unlabelled(row):
            return False
        return _as_label(row[self.label], self.label, where) < TIE

    def read(self, row: Mapping[str, Any], *, where: str = "a row") -> dict[str, Any]:
        """A row under the canonical names: `{"prompt": str, "chosen": ..., "rejected": ...}`, the arms as stored.

        With soft labels there is `"label"` too, the probability that `chosen` is preferred, in [0.5, 1]; of a tie, the
        first arm is called so. A single image is called `chosen`, and so is what is wanted of a pair of which only the
        chosen arm is.

        Raises:
            DatasetError: the prompt is no text, the label is not a number in [0, 1], or the row is no pair (a tie or
                without a label).
        """
        chosen, rejected = self.first, self.second
        if self.is_unlabelled(row) or (self.is_tie(row, where=where) and not self.soft_labels):
            raise DatasetError(
                f"{where} has no preferred image or video (a tie, or without a label); drop_ties removes such"
            )
        if self.is_swapped(row, where=where):
            chosen, rejected = rejected, chosen
        prompt = read_prompt(row[self.prompt], where=f"{where}, column {self.prompt!r}")
        pair = {"prompt": prompt, "chosen": row[chosen]}
        if rejected is not None and self.arms != "chosen":
            pair["rejected"] = row[rejected]
        if self.soft_labels:
            label = float(row[self.label])
            pair["label"] = max(label, 1 - label)
        return pair

    def samples(self, row: Mapping[str, Any], *, where: str = "a row") -> list[dict[str, Any]]:
        """What `read` gives, taken apart into `samples_per_row` samples.

        Where each arm is a sample by itself, it is `{"prompt", "chosen", "label"}` with a label of 1 or 0.

        Raises:
            DatasetError: as `read`.
        """
        pair = self.read(row, where=where)
        if self.arms != "each":
            return [pair]
        labels = [1.0, 0.0] if self.second is not None else [float(row[self.label] > TIE)]
        arms = [pair[arm] for arm in ("chosen", "rejected") if arm in pair]
        return [
            {"prompt": pair["prompt"], "chosen": arm, "label": label} for arm, label in zip(arms, labels, strict=True)
        ]


FORMATS: dict[str, PreferenceFormat] = {
    "canonical": PreferenceFormat("canonical", "prompt", "chosen", "rejected", label="label"),
    "pick_a_pic": PreferenceFormat(
        "pick_a_pic", "caption", "jpg_0", "jpg_1", label="label_0", label_required=True, has_label="has_label"
    ),
    "rapidata": PreferenceFormat("rapidata", "prompt", "image1", "image2", label="label", label_required=True),
    "rapidata_video": PreferenceFormat("rapidata_video", "prompt", "video1", "video2", "label", label_required=True),
    "latents": PreferenceFormat(
        "latents", "prompt", "chosen_latents", "rejected_latents", label="label", holds_latents=True
    ),
    # Of single images: the label is whether it is liked.
    "images": PreferenceFormat("images", "prompt", "image", label="label"),
    "videos": PreferenceFormat("videos", "prompt", "video", label="label"),
    "image_latents": PreferenceFormat("image_latents", "prompt", "latents", label="label", holds_latents=True),
}
PAIRS = {name: fmt for name, fmt in FORMATS.items() if fmt.second is not None}


def detect_format(column_names: Iterable[str], arms: Arms | None = "pair") -> PreferenceFormat:
    """The format whose required columns are all there, with the optional columns that are not taken out.

    Args:
        column_names: of the dataset. Where they fit pairs, single images beside them are left alone.
        arms: what samples are to be made of; None: whatever the rows hold.

    Raises:
        DatasetError: no format fits, or more than one; lists the columns found, the formats known, and what is missing
            from the nearest. Or samples of these arms cannot be made of its rows.
    """
    found = list(column_names)
    of_pairs = [fmt for fmt in PAIRS.values() if set(fmt.required_columns) <= set(found)]
    fitting = of_pairs or [fmt for fmt in FORMATS.values() if set(fmt.required_columns) <= set(found)]
    if len(fitting) > 1:
        names = " and ".join(repr(fmt.name) for fmt in fitting)
        raise DatasetError(f"the columns {found} fit the formats {names}; remove the columns of one (remove_columns)")
    if fitting:
        fmt = fitting[0]
        fmt = replace(
            fmt,
            label=fmt.label if fmt.label in found else None,
            has_label=fmt.has_label if fmt.has_label in found else None,
        )
        return fmt if arms is None else fmt.with_arms(arms)
    wanted = PAIRS if arms == "pair" else FORMATS
    known = "; ".join(f"{fmt.name}: {', '.join(fmt.required_columns)}" for fmt in wanted.values())
    nearest = max(wanted.values(), key=lambda fmt: len(set(fmt.required_columns) & set(found)))
    missing = [column for column in nearest.required_columns if column not in found]
    advice = ""
    if len(missing) < len(nearest.required_columns):
        advice = f" Nearest is {nearest.name!r}, from which {missing} {'are' if len(missing) > 1 else 'is'} missing."
    raise DatasetError(
        f"this is no preference data that is known here. Columns found: {found}. Formats known: {known}.{advice} "
        "Columns of other names can be renamed with rename_columns. Published datasets of other layouts are converted "
        "by load_preference_dataset, or by trl_sipo.data.readers.read_source."
    )


@dataclass(frozen=True)
class RowSelection:
    """Which rows are pairs, from the label columns alone.

    Args:
        kept: int64 array, the positions of the rows that are pairs, in order.
        num_ties: rows whose label is 0.5; pairs too where labels are soft.
        num_unlabelled: rows that nobody has judged.
        num_swapped: kept rows in which the second arm is the preferred one.
        num_disliked: rows of a single image that is not wanted.
        num_dropped: rows that are no pairs, or of no use.
    """

    kept: np.ndarray
    num_ties: int = 0
    num_unlabelled: int = 0
    num_swapped: int = 0
    num_disliked: int = 0
    num_dropped: int = 0


def label_values(dataset: Dataset, fmt: PreferenceFormat) -> np.ndarray:
    """The label of every row, float64; NaN where nobody has judged, 1 where there is no column of labels.

    Raises:
        DatasetError: a label is not a number in [0, 1]; names the row.
    """
    labels = np.ones(len(dataset))
    if not fmt.label_columns or len(dataset) == 0:
        return labels
    table = dataset.select_columns(list(fmt.label_columns)).with_format("arrow")[:]
    if fmt.label is not None:
        labels = _numbers(table, fmt.label).copy()
    if fmt.has_label is not None:
        labels[np.nan_to_num(_numbers(table, fmt.has_label)) == 0] = np.nan
    outside = np.flatnonzero((labels < 0) | (labels > 1))
    if outside.size:
        row = int(outside[0])
        raise DatasetError(_label_message(float(labels[row]), fmt.label, f"row {row}"))
    return labels


def select_pairs(dataset: Dataset, fmt: PreferenceFormat) -> RowSelection:
    """Find the rows that are pairs, reading the label columns only: no image is decoded or copied.

    Raises:
        DatasetError: a label is not a number in [0, 1]; names the row.
    """
    labels = label_values(dataset, fmt)
    unlabelled, ties = np.isnan(labels), labels == TIE
    keep = ~unlabelled if fmt.soft_labels else ~unlabelled & ~ties
    is_single, low = fmt.second is None, labels < TIE
    disliked = low & is_single & (fmt.arms == "chosen")
    keep &= ~disliked
    return RowSelection(
        kept=np.flatnonzero(keep),
        num_ties=int(ties.sum()),
        num_unlabelled=int(unlabelled.sum()),
        num_swapped=0 if is_single else int(low[keep].sum()),
        num_disliked=int(disliked.sum()),
        num_dropped=int((~keep).sum()),
    )


def drop_ties(dataset: Dataset, fmt: PreferenceFormat) -> tuple[Dataset, int]:
    """The dataset without ties and unlabelled rows, and how many rows that took (`select_pairs` counts them apart).

    Rows are selected by index: images are neither decoded nor rewritten.
    """
    selection = select_pairs(dataset, fmt)
    return (dataset.select(selection.kept) if selection.num_dropped else dataset), selection.num_dropped


def undecoded(dataset: Dataset | IterableDataset, fmt: PreferenceFormat) -> Dataset | IterableDataset:
    """Only the columns that `fmt` reads, as plain Python values, with images and videos left as they are stored.

    Decoding then happens in `open_image` and `open_arms_clips`, which name the row that does not open.

    Raises:
        DatasetError: the dataset has a transform (`set_transform`), whose results cannot be foreseen from its columns.
    """
    refuse_custom_transform(dataset)
    return without_decoding(dataset.select_columns(list(fmt.columns)).with_format(None))


def without_decoding(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, in which no column is decoded by `datasets`.

    It opens whatever file a table names, and fetches addresses, also of columns that hold no media of ours: who wrote
    the table says what its columns are.
    """
    for column, feature in (dataset.features or {}).items():
        stored = _undecoded_feature(feature)
        if stored != feature:
            dataset = dataset.cast_column(column, stored)
    return dataset


def _undecoded_feature(feature: Any) -> Any:
    """The same media, of whatever kind, or list of frames, as they are stored."""
    if isinstance(feature, dict):
        return {name: _undecoded_feature(part) for name, part in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_undecoded_feature(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", None) is True else feature


def refuse_custom_transform(dataset: Dataset | IterableDataset) -> None:
    """Raise a DatasetError when the dataset has a `set_transform` or `with_transform`."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise DatasetError(
            "the dataset has a transform (set_transform or with_transform), which would run after its columns were "
            "examined. Apply it with dataset.map(...) instead, or take it off with dataset.reset_format()."
        )


def read_prompt(value: Any, *, where: str = "the prompt") -> str:
    """A prompt as a string: a string itself, or the text of the user's turns of a conversation, joined by newlines.

    In a conversation, `[{"role": ..., "content": ...}, ...]`, a content is a string or a list of
    `{"type": "text", "text": ...}`. Turns of other roles (system, assistant) are not part of the prompt.

    Raises:
        DatasetError: anything else, an image within the prompt, no text at all, more text than a model can have read,
            or text that is no valid Unicode.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
        turns = [turn.get("content") for turn in value if turn.get("role") == "user"]
        text = "\n".join(_content_text(content, where) for content in turns)
    else:
        raise DatasetError(f"{where}: expected a string or a conversation, found {type(value).__name__} {value!r:.80}")
    _check_text(text, where)
    return text


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        raise DatasetError(f"{where}: the prompt is empty")
    if len(text) > _LONGEST_PROMPT:
        raise DatasetError(
            f"{where}: the prompt has {len(text)} characters, and text encoders read some thousand at most: is it the "
            f"right column? It begins with {text[:_QUOTED]!r}."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{where}: the prompt has half of a character at position {error.start} (the surrogate "
            f"{text[error.start]!r}), as where text was cut or decoded wrongly: {text[:_QUOTED]!r}"
        ) from error


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise DatasetError(f"{where}: the content of a turn is {type(content).__name__}, not text")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DatasetError(f"{where}: a turn holds {part!r:.80}; prompts are text only")
    return "".join(part["text"] for part in content)


def _is_null(value: Any) -> bool:
    return value is None or value != value  # NaN is what tables call null where it is a number


def _as_label(value: Any, column: str, where: str) -> float:
    if not isinstance(value, int | float | np.number | np.bool_) or not 0 <= value <= 1:
        raise DatasetError(_label_message(value, column, where))
    return float(value)


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as float64, nulls as NaN."""
    values = table[column]
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or kind == pa.null()):
        raise DatasetError(_label_message(values[0].as_py(), column, "row 0"))
    return values.cast(pa.float64(), safe=False).to_numpy()  # whole numbers that it rounds are no labels anyway


def _label_message(value: Any, column: str, where: str) -> str:
    return (
        f"{where}, column {column!r}: a label is the share of votes for the first image, a number in [0, 1] (0.5 is a "
        f"tie), found {value!r:.80}. Rename the column if it means something else."
    )
