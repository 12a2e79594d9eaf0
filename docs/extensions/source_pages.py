# SPDX-License-Identifier: Apache-2.0
"""A link to a file of the checkout that is no page (code, settings, numbers) leads to that file, shown on a page.

MyST makes a download of such a link. On GitHub it leads to the file's text, with colours, and so it does here.
"""

from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.highlighting import PygmentsBridge
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.osutil import relative_uri
from sphinx.util.typing import ExtensionMetadata

FOLDER = "source"
"""Of the site, under which the files are shown at their paths."""
SUFFIXES = {".py", ".sh", ".yaml", ".json", ".toml", ".cfg"}


class source_reference(nodes.reference):
    """A link to a file's page; `path` is relative to the checkout."""


class FindSources(SphinxTransform):
    """Puts links to files' pages in the place of downloads, before the downloads are collected."""

    default_priority = 990

    def apply(self, **kwargs) -> None:
        """Change this document."""
        for node in list(self.document.findall(addnodes.download_reference)):
            path = _inside(self.env, node["reftarget"])
            if path.suffix not in SUFFIXES:
                continue
            node.replace_self(source_reference("", "", *node.children, path=path.as_posix()))
            _linked(self.env).setdefault(self.env.docname, set()).add(path.as_posix())


class LinkSources(SphinxPostTransform):
    """Gives the links the addresses that they have from the page they stand on."""

    default_priority = 5
    formats = ("html",)

    def run(self, **kwargs) -> None:
        """Change this document."""
        here = self.app.builder.get_target_uri(self.env.docname)
        for node in list(self.document.findall(source_reference)):
            target = relative_uri(here, f"{FOLDER}/{node['path']}.html")
            node.replace_self(nodes.reference("", "", *node.children, refuri=target, internal=True))


def _inside(env: BuildEnvironment, target: str) -> Path:
    """The path of a link's target, relative to the checkout."""
    _, path = env.relfn2path(target, env.docname)
    return Path(path).resolve().relative_to(Path(env.srcdir).resolve())


def _linked(env: BuildEnvironment) -> dict[str, set[str]]:
    """Page -> the files that it links to; kept with the environment, so that a second build knows them."""
    if not hasattr(env, "linked_sources"):
        env.linked_sources = {}
    return env.linked_sources


def forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """A page is read anew, or is gone."""
    _linked(env).pop(docname, None)


def merge(app: Sphinx, env: BuildEnvironment, docnames: set[str], other: BuildEnvironment) -> None:
    """Take over what another process has read."""
    _linked(env).update({name: files for name, files in _linked(other).items() if name in docnames})


def pages(app: Sphinx) -> Iterator[tuple[str, dict, str]]:
    """(Name, context, template) of a page per file."""
    bridge = PygmentsBridge("html", app.config.pygments_style)
    for path in sorted({path for files in _linked(app.env).values() for path in files}):
        text = (Path(app.srcdir) / path).read_text(encoding="utf-8")
        body = bridge.highlight_block(text, language_of(path), linenos="inline")
        yield f"{FOLDER}/{path}", {"title": path, "body": f"<h1>{path}</h1>\n{body}"}, "page.html"


def language_of(path: str) -> str:
    """The name by which Pygments knows the language of a file; "text" if it does not."""
    try:
        return get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        return "text"


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.add_node(source_reference)
    app.add_transform(FindSources)
    app.add_post_transform(LinkSources)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}
