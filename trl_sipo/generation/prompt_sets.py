# SPDX-License-Identifier: Apache-2.0
"""Sets of prompts: what one is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what is known of it.

    Attributes:
        prompt_id: Its name in the set, safe as that of a folder.
        prompt: The text.
        category: What it tests, such as "counting".
        source: Where it comes from, such as a file's name.
    """

    prompt_id: str
    prompt: str
    category: str | None = None
    source: str | None = None
