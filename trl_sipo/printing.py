# SPDX-License-Identifier: Apache-2.0
"""What a command prints of an error: text of others may hold what steers a terminal, and a user's may hold a token."""

import argparse
import os
import re
from typing import NoReturn

HIDDEN = "***"
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_PASSWORDS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # of an address: https://name:password@host
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_TOKEN_NAME = re.compile(r"[\w-]*(token|api[_-]?key|password)", re.IGNORECASE)


class ArgumentParser(argparse.ArgumentParser):
    """One that repeats no token that was given for something else, as its errors repeat what they refuse."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and end the process with 2."""
        super().error(printable(message))


def printable(text: object) -> str:
    """A text for the terminal: control characters escaped, tokens and passwords left out."""
    return "".join(_shown(character) for character in without_secrets(str(text)))


def without_secrets(text: str) -> str:
    """The same text without tokens of the hub, what variables hold for tokens, and passwords within addresses."""
    for name in _VARIABLES:
        value = os.environ.get(name)
        text = text.replace(value, HIDDEN) if value else text
    return _PASSWORDS.sub(HIDDEN, _TOKENS.sub(HIDDEN, text))


def names_secret(name: str) -> bool:
    """Whether a setting or an option of this name, such as `hub_token` or `--hub-token`, holds a secret."""
    return _TOKEN_NAME.fullmatch(name) is not None


def words_without_secrets(words: list[str]) -> list[str]:
    """The words of a command, in which what follows `--hub_token` and the like is left out."""
    shown, is_token = [], False
    for word in words:
        name, is_set, _ = word.partition("=")
        is_named = name.startswith("--") and names_secret(name)
        shown.append(HIDDEN if is_token else f"{name}={HIDDEN}" if is_named and is_set else without_secrets(word))
        is_token = is_named and not is_set
    return shown


def _shown(character: str) -> str:
    return character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
