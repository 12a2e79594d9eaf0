# SPDX-License-Identifier: Apache-2.0
"""The copy of Pick-a-Pic in tar shards: the same fields as files, under names with a suffix."""

from trl_sipo.errors import DatasetError

COLUMN_NAMES = {
    "jpg_0.jpg": "jpg_0",
    "jpg_1.jpg": "jpg_1",
    "label_0.txt": "label_0",
    "original_prompt.txt": "caption",
}


def label_of_text(text: str | float | None) -> float | None:
    """A label as a number; None for an empty file.

    Raises:
        DatasetError: any other text.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise DatasetError(f"the label {text!r} is no number") from error
