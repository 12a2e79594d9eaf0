# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation: navigation, a reference that is the code's; slow: the whole, in a browser."""

import importlib
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from inspect import isclass, isfunction
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import trl_sipo
from tests.browsers import PHONE, open_context
from tests.docs.pages import ROOT, SOURCE
from trl_sipo.cli.main import COMMANDS
from trl_sipo.trainer.methods import METHODS

EXTENSIONS = ROOT / "docs" / "extensions"
# As in docs/conf.py: the pages outside of docs/source.
OUTSIDE = [*ROOT.glob("[A-Z]*.md"), *(ROOT / "reports").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


# ------------------------------------------------------------------------------------------------------- navigation


def test_every_page_stands_in_the_navigation_once(extension):
    sections = extension("navigation").sections((SOURCE / "index.md").read_text(encoding="utf-8"))
    assert len(sections) >= 10
    entries = [entry.rpartition("<")[2].rstrip(">") for _, pages in sections for entry in pages]
    files = [(SOURCE / entry).resolve() for entry in entries]
    assert len(set(files)) == len(files)
    expected = {path for path in [*SOURCE.rglob("*.md"), *OUTSIDE] if path != SOURCE / "index.md"}
    assert set(files) == expected


def test_a_page_elsewhere_goes_by_the_text_of_its_link(extension):
    text = "# Top\n[A](a.md)\n## One\n[A](a.md#x), [B](b.md), [A](a.md)\n## Two\nnone\n## Three\n[R](../../R.md)\n"
    assert extension("navigation").sections(text) == [("One", ["a.md", "b.md"]), ("Three", ["R <../../R.md>"])]


def test_pages_of_code_share_their_navigation(extension):
    share, app = extension("navigation").share_navigation, SimpleNamespace(builder=SimpleNamespace())
    made = []

    def tree_of(page, doctree=None):
        context = {"toctree": lambda **options: made.append(page) or f"tree of {page}"}
        share(app, page, "page.html", context, doctree)
        return context["toctree"](collapse=False)

    assert tree_of("source/a/b") == tree_of("_modules/c/d") == "tree of source/a/b"
    assert tree_of("genindex") == "tree of genindex"  # of another depth: its links are others
    assert tree_of("docs/source/index", doctree=object()) == "tree of docs/source/index"
    assert made == ["source/a/b", "genindex", "docs/source/index"]


# -------------------------------------------------------------------------------------------------------- reference


def test_every_command_and_option_is_in_the_reference(extension):
    command_line = extension("command_line")
    commands = list(command_line.commands())
    assert {name.split()[0] for name, _, _ in commands} == set(COMMANDS)
    assert {"audit weights", "data check"} <= {name for name, _, _ in commands}
    page = command_line.markdown()
    for name, _, parser in commands:
        assert f"\n## trl-sipo {name}\n" in f"\n{page}"
        settings = _settings(name)
        options = [action for action in command_line.options(parser) if action.option_strings]
        shown = [action for action in options if action.dest.removeprefix("no_") not in settings]
        assert shown or name == "env", name
        for action in shown:
            assert action.option_strings[0] in page, (name, action.option_strings)


def _settings(command):
    config = METHODS[command][0] if command in METHODS else "SIPOConfig" if command == "sipo-text" else None
    return getattr(trl_sipo, config).__dataclass_fields__ if config else {}


def test_a_command_without_parser_and_table_is_no_command(extension):
    with pytest.raises(LookupError, match="somewhere"):
        list(extension("command_line")._of_module("x", "help", ModuleType("somewhere")))


def test_every_public_name_is_in_the_reference(extension):
    exports = extension("reference").exports
    pages = exports("Config") + exports("Trainer") + exports("Other")
    for name in set(trl_sipo.__all__) - {"__version__"}:
        assert f":: trl_sipo.{name}\n" in pages, name


def test_every_setting_has_its_default_in_the_reference(extension):
    docstrings = extension("docstrings")
    text = docstrings.describe_fields(trl_sipo.DiffusionSIPOConfig.__doc__, trl_sipo.DiffusionSIPOConfig)
    assert "objective (str, default `'sipo'`): " in text and "poly_alpha (float, default `0.0`): " in text
    table = extension("reference").inherited("trl_sipo.DiffusionDPOConfig")
    assert "| `max_grad_norm` | `1.0` |" in table and "| `max_length` | prompts are cut" in table


# ------------------------------------------------------------------------------------------------------- docstrings


def test_docstrings_become_what_they_say(extension):
    from trl_sipo.core import transition

    text = (
        "Of `x_s`, x_t and *all*, 4 * 8 * 2 and a*b*c; see [`rho_squared`].\n\n"
        "    w = a_ * b\n\n"
        "Args:\n    level: t.\n    s: `s`."
    )
    shown = extension("docstrings").to_rest(text, transition)
    lines = shown.split("\n")
    assert lines[0] == (
        r"Of ``x_s``\ , x_t and *all*, 4 \* 8 \* 2 and a\*b\*c; "
        r"see :py:obj:`rho_squared <trl_sipo.core.transition.rho_squared>`\ ."
    )
    assert lines[2:5] == ["::", "", "    w = a_ * b"]  # a formula, to the letter
    assert lines[-2:] == [r"    level: t\.", r"    s: ``s``\ ."]  # no list that begins at t


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("NoiseLevel", "trl_sipo.core.noise_schedule.NoiseLevel"),  # of another module, imported by this one
        ("DiffusionSIPOTrainer", "trl_sipo.DiffusionSIPOTrainer"),  # public
        ("DatasetError", "trl_sipo.errors.DatasetError"),  # an error
        ("trl_sipo.core.beta.check_beta", "trl_sipo.core.beta.check_beta"),  # a full path
    ],
)
def test_names_are_found(name, target, extension):
    assert extension("docstrings").target_of(name, importlib.import_module("trl_sipo.core.transition")) == target


def test_a_name_that_is_nowhere_is_an_error(extension):
    with pytest.raises(LookupError, match="no_such_thing"):
        extension("docstrings").target_of("no_such_thing", importlib.import_module("trl_sipo.core.transition"))


# --------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning is an error. A process of its own, since Sphinx keeps much to itself."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-b", "html", "-c", "docs"]
    words = [*command, "-d", str(folder / "doctrees"), ".", str(folder / "html")]
    # Half a minute of one core; more where the machine is shared.
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture
def address(site):
    """Where the site is served: from the disk its search works too, but shows no excerpts."""
    with serve(site) as where:
        yield where


@contextmanager
def serve(folder):
    """A folder at a free port of this machine."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        """Say nothing."""


@pytest.mark.slow
def test_the_reference_has_every_public_name_of_what_it_describes(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    described = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    assert {f"trl_sipo.{name}" for name in trl_sipo.__all__ if name != "__version__"} <= described
    for package in ("core", "adapters", "rewards", "evaluation", "data"):
        for path in (ROOT / "trl_sipo" / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not any(part.startswith("_") for part in module.split(".")):
                assert _public(module) <= described, module


def _public(module):
    """Classes and functions that a module defines, with a docstring and without an underscore."""
    values = vars(importlib.import_module(module)).items()
    own = {name: value for name, value in values if getattr(value, "__module__", "") == module}
    return {
        f"{module}.{name}"
        for name, value in own.items()
        if (isclass(value) or isfunction(value)) and value.__doc__ and not name.startswith("_")
    }


@pytest.mark.slow
def test_links_to_code_lead_to_its_page(site):
    page = (site / "docs" / "source" / "paper_index.html").read_text(encoding="utf-8")
    assert 'href="../../source/trl_sipo/core/beta.py.html"' in page
    shown = (site / "source" / "trl_sipo" / "core" / "beta.py.html").read_text(encoding="utf-8")
    assert "BETA_CONVENTIONS" in shown
    assert "docs/source/index.html" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file_of_it(site):
    missing, seen = set(), 0
    for path in site.rglob("*.html"):
        for target in set(re.findall(r'(?:href|src)="([^"]+)"', path.read_text(encoding="utf-8"))):
            parts = urlsplit(unescape(target))
            if parts.path and not parts.scheme:
                seen += 1
                if not (path.parent / unquote(parts.path)).exists():
                    missing.add((path.relative_to(site).as_posix(), target))
    assert seen > 1000 and not missing


@pytest.mark.slow
def test_readers_find_their_way(address, browser):
    with open_context(browser) as context:
        page = context.new_page()
        page.goto(f"{address}/")
        page.wait_for_url("**/docs/source/index.html")
        page.fill("input[name=q]", "mask_threshold")
        page.press("input[name=q]", "Enter")
        page.wait_for_selector("ul.search a")
        assert page.locator("ul.search a").count() > 3
        assert context.failures == []
    for options in ({"dark": True}, {"viewport": PHONE, "is_phone": True}):
        with open_context(browser, **options) as context:
            page = context.new_page()
            for name in ("index", "math", "reference/commands", "troubleshooting"):
                page.goto(f"{address}/docs/source/{name}.html")
                width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                assert width[0] <= width[1], (name, options)
                # Fails for one that is not there; those further down are loaded when they are looked at.
                page.evaluate("Promise.all([...document.images].map(i => ((i.loading = 'eager'), i.decode())))")
            assert context.failures == []


@pytest.mark.slow
def test_code_is_copied(address, browser):
    with open_context(browser) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.goto(f"{address}/docs/source/index.html")
        block = page.locator("div.highlight").first
        block.hover()
        block.locator("button.copy").click()
        page.wait_for_function("document.querySelector('button.copy').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()").startswith("pip install trl-sipo\n")


def test_the_site_needs_no_network():
    """Nothing of the site's own loads anything from elsewhere; what the theme brings is on the disk."""
    own = [*EXTENSIONS.glob("*.py"), *(ROOT / "docs" / "_static").iterdir(), ROOT / "docs" / "conf.py"]
    assert len(own) > 5
    for path in own:
        assert "https://" not in Path(path).read_text(encoding="utf-8"), path
