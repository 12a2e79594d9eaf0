# SPDX-License-Identifier: Apache-2.0
"""What is held against a hostile input, and what the documentation says of it: one table for both."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        what: as the documentation calls it.
        make: writes what is needed into an empty folder; gives the cell, the path of the table, or nothing.
        refused: a part of the error's message; None: it is taken.
        taken: how, in words.
        shows: of an image that is taken, whether it is the right one.
    """

    what: str
    make: Callable[[Path], Any]
    refused: str | None = None
    taken: str | None = None
    shows: Callable[[Image.Image], bool] = lambda image: True

    @property
    def happens(self) -> str:
        """As the documentation says it."""
        return f"taken: {self.taken}" if self.refused is None else f'refused: "{self.refused}"'

    def __str__(self) -> str:
        return self.what
