# SPDX-License-Identifier: Apache-2.0
"""Names that become those of folders: of models, and of prompts."""

import re
from collections.abc import Iterable
from pathlib import Path

from trl_sipo.errors import ConfigurationError

MAX_LENGTH = 120
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_folder_names(names: Iterable[str], what: str) -> None:
    """Raise [`ConfigurationError`] unless every name can be that of a folder of its own, on every file system.

    Args:
        what: What the names are of, for the error, such as "model".
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not _SAFE.fullmatch(name) or len(name) > MAX_LENGTH or name.endswith("."):
            raise ConfigurationError(
                f"The {what} name {name!r} cannot be that of a folder. Use up to {MAX_LENGTH} letters, digits, '_', "
                "'-' and '.', of which the first is no '-' or '.', and the last no '.'."
            )
        if name.casefold() in seen:
            other = seen[name.casefold()]
            raise ConfigurationError(
                f"Two {what} names are the same folder's: {other!r} and {name!r}. Give each its own; upper and lower "
                "case are one to some file systems."
            )
        seen[name.casefold()] = name


def links_out_of(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of some paths within a folder that lead elsewhere by links; the folder itself may be one."""
    root = folder.resolve()
    return [path for path in paths if not path.resolve().is_relative_to(root)]
