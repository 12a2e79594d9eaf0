# SPDX-License-Identifier: Apache-2.0
"""HPDv3 (HPSv3): `path1` is the preferred image, with a confidence."""

from collections.abc import Mapping
from typing import Any

from trl_sipo.data.formats import TIE
from trl_sipo.errors import DatasetError


def confidence_pair(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pair of `{"prompt", "path1", "path2"}`; its label is the `confidence`, where there is one.

    `path1` is preferred in any case: a confidence below one half makes a tie, not a preference for `path2`.
    """
    confidence = record.get("confidence")
    if confidence is not None and not (isinstance(confidence, int | float) and 0 <= confidence <= 1):
        raise DatasetError(f"the confidence {confidence!r} is no number in [0, 1]")
    label = 1.0 if confidence is None else max(float(confidence), TIE)
    return [{"prompt": record["prompt"], "chosen": record["path1"], "rejected": record["path2"], "label": label}]
