# SPDX-License-Identifier: Apache-2.0
"""The package's outside: what ships, what it says about itself, and what importing it costs."""

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_sipo"
FOLDERS = ("trl_sipo", "tests", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SETUP_FILES = ["Makefile", ".ci/run", "constraints.txt", "setup.cfg", "setup.py", "pyproject.toml", "CONTRIBUTING.md"]
TEXT_SUFFIXES = {"", ".py", ".md", ".txt", ".json", ".yaml", ".yml", ".html", ".css", ".csv", ".log"}

REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|index-url", re.I)
MACHINE_PATH = re.compile(r"(?<![\w.<>{}/-])/(?:work|root|home|Users)/\w")
HEAVY = ["torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "numpy"]
IMPORT_OF_HEAVY = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"


def _config() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def _requirements(text: str) -> list[Requirement]:
    lines = (line.strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "%"))]


def _text_files() -> list[Path]:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [path for path in files if path.suffix in TEXT_SUFFIXES] + [ROOT / name for name in SETUP_FILES]


def _run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scan_sees_the_package():
    assert len(SOURCES) > 10
    assert {p.name for p in _text_files()} >= {"errors.py", "NOTICE", "Makefile"}


@pytest.mark.parametrize("pattern", [REGISTRY_HOST, MACHINE_PATH], ids=["registry_host", "machine_path"])
def test_no_file_names_a_registry_host_or_a_machine_path(pattern):
    hits = []
    for path in _text_files():
        found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            hits.append(f"{path.relative_to(ROOT)}: {found.group()}")
    assert not hits


def test_the_patterns_match_what_they_are_for():
    assert REGISTRY_HOST.search("see https://download.pytorch" + ".org/whl/cpu")
    assert MACHINE_PATH.search('open("/ro' + 'ot/model")')
    assert not MACHINE_PATH.search("trl_sipo/home/x, <a href=./work/x>, and/or")


def test_every_source_file_names_the_licence_first():
    wanted = "# SPDX-License-Identifier: Apache-2.0"
    bad = [str(p.relative_to(ROOT)) for p in SOURCES if wanted not in p.read_text(encoding="utf-8").splitlines()[:2]]
    assert not bad


def test_no_utils_module():
    assert not [str(p.relative_to(ROOT)) for p in SOURCES if p.stem in ("util", "utils", "_utils", "helpers", "misc")]


def test_no_file_over_500_lines():
    lengths = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8").count("\n") for p in PACKAGE.rglob("*.py")}
    assert not {name: lines for name, lines in lengths.items() if lines > 500}


def test_undefined_names_are_never_silenced():
    silenced = re.compile(r"#\s*(?:ruff:\s*|flake8[:=]\s*)?noqa(?:\s*$|(?!:)|:[\w, ]*F(?:821|82?\b))", re.I | re.M)
    assert silenced.search("x = y  # no" + "qa") and silenced.search("x  # no" + "qa: E501, F821")
    assert not silenced.search("x  # no" + "qa: E501")
    bad = [str(p.relative_to(ROOT)) for p in SOURCES if silenced.search(p.read_text(encoding="utf-8"))]
    assert not bad


@pytest.mark.parametrize("folder", ["trl_sipo/core", "trl_sipo/trainer", "tests", "examples", "."])
def test_undefined_names_are_an_error_everywhere(folder):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", f"{folder}/example.py", "-"]
    code = "value = undefined_name\n"
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and "F821" in done.stdout


def test_version_is_stated_once_and_readable():
    import trl_sipo

    stated = _config()["metadata"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", stated)
    assert trl_sipo.__version__ == version("trl-sipo") == stated
    assert f"## [{stated}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    copy = re.compile(rf'version\w*\s*=\s*"{re.escape(stated)}"')
    assert not [p.name for p in SOURCES if copy.search(p.read_text(encoding="utf-8"))]


def test_the_command_is_declared():
    (command,) = (point for point in entry_points(group="console_scripts") if point.name == "trl-sipo")
    assert command.value == "trl_sipo.cli.main:main"


def test_the_pinned_stack_satisfies_every_requirement():
    pins = {canonicalize_name(pin.name): pin for pin in _requirements((ROOT / "constraints.txt").read_text("utf-8"))}
    inexact = [str(pin) for pin in pins.values() if not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    assert not inexact  # nor a platform suffix such as +cpu
    config = _config()
    extras = config["options.extras_require"]
    wanted = _requirements(config["options"]["install_requires"])
    for extra in ("plots", "demo", "video", "test", "dev"):
        wanted += _requirements(extras.get(extra, raw=True))
    for requirement in wanted:
        pin = pins[canonicalize_name(requirement.name)]
        (pinned,) = pin.specifier
        assert requirement.specifier.contains(pinned.version), f"{pin} does not satisfy {requirement}"


def test_the_install_is_light():
    base = {canonicalize_name(Requirement(text).name) for text in requires("trl-sipo") or [] if "extra ==" not in text}
    assert not base & {"bitsandbytes", "deepspeed", "xformers", "torchvision", "matplotlib", "wandb", "av", "pytest"}
    assert {"trl", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets"} <= base


def test_every_import_is_a_stated_requirement():
    config = _config()
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    stated = {canonicalize_name(requirement.name) for text in texts for requirement in _requirements(text)}
    distribution = {"PIL": "pillow", "yaml": "pyyaml"}
    missing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - {"trl_sipo"} - sys.stdlib_module_names:
                if canonicalize_name(distribution.get(top, top)) not in stated:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing


@pytest.mark.parametrize(
    "code",
    [
        "import trl_sipo; trl_sipo.__version__; dir(trl_sipo)",
        "import sys; sys.argv = ['trl-sipo', '--help']\n"
        "from trl_sipo.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n",
    ],
    ids=["import", "help"],
)
def test_imports_nothing_heavy(code):
    assert _run("-c", f"{code}\n{IMPORT_OF_HEAVY}").splitlines()[-1] == "[]"
