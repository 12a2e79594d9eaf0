# SPDX-License-Identifier: Apache-2.0
"""The site of `make docs`. Its source is the whole checkout, so that a link that works on GitHub works here too."""

import logging
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
# That a kernel for CPUs is not installed is of no consequence here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_setup = ConfigParser()
_setup.read(ROOT / "setup.cfg", encoding="utf-8")
_METADATA = dict(_setup["metadata"])
project = _METADATA["name"].replace("-", "_")
author = _METADATA["author"]
release = version = _METADATA["version"]
copyright = f"{author}, {_METADATA['license']}"

root_doc = "docs/source/index"
include_patterns = ["docs/source/**.md", "examples/**.md", "reports/**.md", "[A-Z]*.md"]
exclude_patterns = [".*", "docs/_build", "build", "dist", "tests", "trl_sipo", "*_output", "runs"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    # Ours, in docs/extensions.
    "docstrings",
    "navigation",
    "reference",
    "source_pages",
]
# A link or an anchor that leads nowhere is a warning, and `make docs` turns warnings into errors.
nitpicky = True
myst_heading_anchors = 4
highlight_language = "none"

add_module_names = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
viewcode_line_numbers = True

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_copy_source = False
