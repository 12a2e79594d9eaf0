# SPDX-License-Identifier: Apache-2.0
"""The page and what it loads: the same files for everyone, with nothing of a study or a rater in them."""

from http import HTTPStatus
from importlib.resources import files
from typing import Final

from trl_sipo.annotation.messages import Response

_HTML, _SCRIPT, _STYLE = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8"
# Path -> (file in assets, type).
_FILES: Final = {
    "/": ("index.html", _HTML),
    "/style.css": ("style.css", _STYLE),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{f"/{name}.js": (f"{name}.js", _SCRIPT) for name in ("app", "clock", "media", "outbox", "screens", "server")},
}


def _load(name: str, content_type: str) -> Response:
    return Response(HTTPStatus.OK, files("trl_sipo.annotation").joinpath("assets", name).read_bytes(), content_type)


PAGES: Final = {path: _load(name, content_type) for path, (name, content_type) in _FILES.items()}
"""Path -> answer."""
