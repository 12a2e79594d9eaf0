# SPDX-License-Identifier: Apache-2.0
"""The documentation as Markdown: its pages, their code blocks, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "docs" / "source"
PAGES = [
    *sorted(SOURCE.rglob("*.md")),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "reports").rglob("*.md")),
    *sorted(ROOT.glob("[A-Z]*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block of code."""

    page: Path
    number: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.parent.name}/{self.page.stem}-{self.number}"


def read(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of one language, in order."""
    return [
        Block(page, number, name, code)
        for number, (name, code) in enumerate(_FENCE.findall(read(page)))
        if name == language
    ]


def inline_code(page: Path) -> list[str]:
    """What stands in backticks outside of fenced blocks, on one line each."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _FENCE.sub("", read(page)))]


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of every link outside of code blocks."""
    return _LINK.findall(_FENCE.sub("", read(page)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
