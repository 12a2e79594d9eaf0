# SPDX-License-Identifier: Apache-2.0
"""One HTML file that opens from disk: text, tables and embedded figures, light and dark, readable on a phone.

A policy within the file forbids it whatever it does not hold itself: it loads nothing and runs no script but its own.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--muted:#5a6572;--line:#d5dbe1;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ec;--bg:#14181c;--muted:#9aa5b1;--line:#333b44;--card:#1d2329}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
body{max-width:68rem;margin:0 auto;padding:1.5rem}
h1{line-height:1.2}h2{margin-top:2.5rem}p.note,figcaption{color:var(--muted);font-size:.92rem}
.verdict{background:var(--card);border-left:4px solid #0072b2;padding:.8rem 1rem;border-radius:4px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{vertical-align:bottom}
figure{margin:1rem 0}figure img{max-width:100%;background:#fff;border-radius:4px;padding:4px;box-sizing:border-box}
pre{background:var(--card);padding:.8rem;overflow-x:auto;border-radius:4px;font-size:.85rem}
"""


@dataclass
class Page:
    """A report under construction; the parts appear in the order in which they were added.

    Attributes:
        title: Its heading, and the window's.
        parts: Markup, as it is.
        style: Added to the style that all pages share.
        script: Run at the end; empty: none.
        data: Numbers for the script, as JSON in the element `data`.
        reload_seconds: After which the page is loaded again where scripts do not run; None: never.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    style: str = ""
    script: str = ""
    data: Any = None
    reload_seconds: int | None = None

    def heading(self, text: str) -> None:
        """A section's heading."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, kind: str = "") -> None:
        """A paragraph; `kind` is "", "note" or "verdict"."""
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is the row's name."""
        self.parts.append(table_markup(header, rows))

    def figure(self, png: bytes, caption: str, alternative: str) -> None:
        """An embedded picture, with its text alternative."""
        self.parts.append(
            f'<figure><img src="{data_address("image/png", png)}" alt="{html.escape(alternative)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """Preformatted text."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def render(self) -> str:
        """The whole document."""
        title, style = html.escape(self.title), _STYLE + self.style
        reload = f'<noscript><meta http-equiv="refresh" content="{self.reload_seconds}"></noscript>'
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, self.script)}">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style>'
            f"{reload if self.reload_seconds else ''}</head>"
            f"<body><main><h1>{title}</h1>{''.join(self.parts)}</main>{self._scripts()}</body></html>\n"
        )

    def _scripts(self) -> str:
        data = (
            "" if self.data is None else f'<script type="application/json" id="data">{script_json(self.data)}</script>'
        )
        return f"{data}<script>{self.script}</script>" if self.script else data


def _policy(style: str, script: str) -> str:
    """What the page may use: pictures within it, and this very style and script."""
    scripts = _hash(script) if script else "'none'"
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {scripts}; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_json(value: Any) -> str:
    """JSON that may stand within a script element: no character in it ends the element, or a line of a script.

    Raises:
        ValueError: A number is not finite, which JSON has no word for.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # non-ASCII characters are escaped already
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table_markup(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on its own; the first column is the row's name."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def data_address(kind: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_bytes(figure: Any) -> bytes:
    """A matplotlib figure or a PIL image as PNG."""
    buffer = io.BytesIO()
    if hasattr(figure, "savefig"):
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    else:
        figure.save(buffer, format="PNG")
    return buffer.getvalue()
