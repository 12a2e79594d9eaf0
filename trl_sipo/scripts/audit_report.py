# SPDX-License-Identifier: Apache-2.0
"""What every audit writes: its numbers as JSON, a figure, and both with the sentences and tables as a page."""

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import printable, words_without_secrets

if TYPE_CHECKING:
    from trl_sipo.reporting.evaluation_tables import Table


def recorded_command(command: str, argv: list[str]) -> str:
    """The command that was given, without secrets."""
    return shlex.join(words_without_secrets(["trl-sipo", *command.split(), *argv]))


def prepare_output(output: Path | None) -> bool:
    """Make the folder before anything long begins; returns whether figures can be drawn, and says so where not.

    Raises:
        ConfigurationError: The folder cannot be made, or nothing can be written there.
    """
    if output is None:
        return False
    from trl_sipo.reporting.figures import check_plotting

    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"a full disk takes a name, and no content")
    except OSError as error:
        raise ConfigurationError(
            f"`--output {output}` cannot be made, or nothing can be written there: {error}. Give another folder."
        ) from error
    try:
        check_plotting()
    except ConfigurationError as error:
        print(f"No figures, only numbers and tables: {error}")
        return False
    return True


def print_sentences(sentences: Sequence[str]) -> None:
    """One below the other; names of columns and sources are the data's, and steer no terminal."""
    for sentence in sentences:
        print(printable(sentence))


def print_tables(tables: Sequence["Table"]) -> None:
    """The tables as plain text, each under its title."""
    for table in tables:
        cells = [list(table.header), *[[printable(cell) for cell in row] for row in table.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
        print(f"\n{printable(table.title)}")
        for row in cells:
            first, *others = zip(row, widths, strict=True)
            line = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            print("  ".join(line).rstrip())
        if table.note:
            print(printable(table.note))


def write_audit(
    folder: Path,
    name: str,
    report: Mapping[str, Any],
    sentences: Sequence[str],
    tables: Sequence["Table"],
    figures: Mapping[str, Any],
) -> None:
    """`<name>.json`, `<name>.html`, and a PNG for each figure; a folder may hold several audits.

    Args:
        name: The audit's.
        report: With the keys `command` and `settings`, as JSON takes it.
        sentences: What was found, the most important first.
        figures: Name of a file to a matplotlib figure and its caption.

    Raises:
        StorageError: A file cannot be written.
    """
    from trl_sipo.data.cache.shards import write_whole
    from trl_sipo.reporting.page import Page, png_bytes

    page = Page(f"trl-sipo audit {name}")
    for place, sentence in enumerate(sentences):
        page.paragraph(sentence, "" if place else "verdict")
    pictures = {file: (png_bytes(figure), caption) for file, (figure, caption) in figures.items()}
    for file, (png, caption) in pictures.items():
        write_whole(folder / f"{file}.png", lambda path, png=png: path.write_bytes(png))
        page.figure(png, caption, caption)
    for table in tables:
        page.heading(table.title)
        page.table(table.header, table.rows)
        if table.note:
            page.paragraph(table.note, "note")
    page.heading("How it was made")
    page.code(report["command"])
    page.code("\n".join(f"{key}: {value}" for key, value in report["settings"].items()))
    texts = {f"{name}.json": json.dumps(report, indent=1, allow_nan=False) + "\n", f"{name}.html": page.render()}
    for file, text in texts.items():
        write_whole(folder / file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    written = ", ".join([*texts, *(f"{file}.png" for file in pictures)])
    print(f"Numbers and figure are in {folder}: {written}.")
