# SPDX-License-Identifier: Apache-2.0
"""The site's navigation is the index page: each of its sections becomes one, with the pages it links to, in order."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

_SECTION = re.compile(r"^## (.+)$", re.M)
_PAGE = re.compile(r"\[([^\[\]]+)\]\(([^)#\s]+\.md)(?:#[^)]*)?\)")
_REDIRECT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={target}"><a href="{target}">{title}</a></html>
"""


def sections(text: str) -> list[tuple[str, list[str]]]:
    """(Heading, entries) of every section that links to pages. A page stands where a section links to it first.

    A page of the documentation goes by its own title, another file of the checkout by the text of the link.

    Args:
        text: The index page, Markdown.
    """
    parts = _SECTION.split(text)
    found, seen = [], set()
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        entries = []
        for link, page in _PAGE.findall(body):
            if page not in seen:
                entries.append(f"{link} <{page}>" if page.startswith("../") else page)
                seen.add(page)
        if entries:
            found.append((heading, entries))
    return found


def toctree(heading: str, entries: list[str]) -> str:
    """A hidden table of contents, in MyST's notation."""
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *entries, "```", ""])


def add_toctrees(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the tables of contents to the index page as it is read."""
    if docname == app.config.root_doc:
        source[0] += "".join(toctree(heading, entries) for heading, entries in sections(source[0]))


def share_navigation(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    """Pages of code stand nowhere in the navigation, so that those of one depth have the same: it is made once.

    Made for each of these hundreds of pages it would take longer than all the rest of their making.
    """
    if doctree is None and "toctree" in context:
        make, shared, depth = context["toctree"], _shared(app), pagename.count("/")

        def toctree(**options: Any) -> str:
            key = (depth, *sorted(options.items()))
            if key not in shared:
                shared[key] = make(**options)
            return shared[key]

        context["toctree"] = toctree


def _shared(app: Sphinx) -> dict:
    """Depth of a page and options of a tree -> the tree, of this build."""
    if not hasattr(app.builder, "shared_navigation"):
        app.builder.shared_navigation = {}
    return app.builder.shared_navigation


def add_front_door(app: Sphinx, exception: Exception | None) -> None:
    """`index.html` at the top of the site, which leads to the index page."""
    if exception is None and app.builder.format == "html":
        target = app.builder.get_target_uri(app.config.root_doc)
        page = _REDIRECT.format(title=app.config.project, target=target)
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.connect("source-read", add_toctrees)
    app.connect("html-page-context", share_navigation, priority=400)  # before the theme, which asks for the tree
    app.connect("build-finished", add_front_door)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
