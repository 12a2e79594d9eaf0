# SPDX-License-Identifier: Apache-2.0
"""What the documentation says of the code is true: blocks, names, settings, commands, links, keys and figures."""

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import fields

import numpy as np
import pytest
import torch
from trl import DPOConfig

import trl_sipo
from tests.docs.pages import PAGES, ROOT, SOURCE, anchors, blocks, inline_code, links, read
from tests.oracles import sd15_profile
from trl_sipo import (
    DiffusionD3POConfig,
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    DiffusionMaPOConfig,
    DiffusionPolyDPOConfig,
    DiffusionSFTConfig,
    DiffusionSIPOConfig,
    SIPOConfig,
)
from trl_sipo.core.beta import BETA_CONVENTIONS, describe_beta
from trl_sipo.core.importance import log_importance_weight, timestep_mask
from trl_sipo.core.noise_schedule import VPSchedule
from trl_sipo.core.transition import rho_squared
from trl_sipo.online.config import EvaluationSettings, OnlineConfig, make_config, read_settings, with_overrides
from trl_sipo.scripts import encode, evaluate, feedback, report
from trl_sipo.scripts.audit import AUDITS
from trl_sipo.scripts.sampling_options import check_sampling_options
from trl_sipo.scripts.study import STUDY_COMMANDS
from trl_sipo.scripts.train import parse
from trl_sipo.trainer.base_config import REJECTED_FIELDS
from trl_sipo.trainer.methods import METHODS
from trl_sipo.trainer.statistics import PairErrors, pair_statistics, proximal_statistics

CONFIGS = (
    DiffusionDPOConfig, DiffusionSIPOConfig, DiffusionPolyDPOConfig, DiffusionKTOConfig, DiffusionMaPOConfig,
    DiffusionSFTConfig, DiffusionD3POConfig,
)  # fmt: skip
PYTHON = [block for page in PAGES for block in blocks(page, "python")]
SHELL = [block for page in PAGES for block in blocks(page, "bash")]
CODE = [code for page in PAGES for code in inline_code(page)]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
each_block = pytest.mark.parametrize("block", PYTHON, ids=str)


def test_the_tests_see_the_documentation():
    names = {page.stem for page in PAGES}
    assert names >= {"index", "quickstart", "diffusion_dpo", "sipo", "poly_dpo", "math", "beta", "data", "metrics"}
    assert names >= {"troubleshooting", "add_a_backbone", "add_an_objective", "paper_index"}
    assert len(PYTHON) >= 8 and len(SHELL) >= 3


@each_block
def test_python_compiles_and_what_it_imports_exists(block):
    tree = ast.parse(block.code, filename=str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@each_block
def test_settings_in_python_exist(block):
    """Keyword arguments of our configurations and trainers, wherever they are called."""
    for node in ast.walk(ast.parse(block.code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id in trl_sipo.__all__:
            known = inspect.signature(getattr(trl_sipo, node.func.id)).parameters
            assert {keyword.arg for keyword in node.keywords} <= known.keys(), node.func.id


def test_settings_in_running_text_exist():
    """`DiffusionSIPOConfig(...)` in backticks, and `name=value` of a setting; capitals are the shell's."""
    known = {field.name for config in (*CONFIGS, SIPOConfig) for field in fields(config)} | {"None"}
    calls = [code for code in CODE if re.match(r"Diffusion\w+Config\(", code)]
    settings = [code for code in CODE if re.match(r"\w+=", code)]
    assert len(calls) >= 2 and len(settings) > 10
    for name in re.findall(r"(\w+)=", " ".join([*calls, *settings])):
        assert name in known or name.isupper(), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_is_described(config):
    """Ours in the pages, by name in backticks; TRL's there too, unless they are refused."""
    inherited = {field.name for field in fields(DPOConfig)}
    ours = {field.name for field in fields(config)} - inherited
    of_trl = {name for name in DPOConfig.__annotations__ if name in inherited} - set(REJECTED_FIELDS)
    named = {code.split("=")[0] for code in CODE}
    assert len(ours) > 15 and not (ours | of_trl) - named


def test_every_refused_setting_says_why():
    assert all(REJECTED_FIELDS.values()) and set(REJECTED_FIELDS) <= {field.name for field in fields(DPOConfig)}


def _commands() -> list[list[str]]:
    lines = [line for block in SHELL for line in block.code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_training_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = 0
    for words in _commands():
        if words[0] == "trl-sipo" and words[1] in METHODS:
            method, argv = words[1], words[2:]
        elif "trl_sipo.scripts.train" in words:
            method, *argv = words[words.index("trl_sipo.scripts.train") + 1 :]
        else:
            continue
        data, training, _ = parse(method, argv)
        assert data.dataset_name in ("your/preferences", "cache", "runs/study_pairs/pairs.parquet")
        assert training.max_steps > 0
        seen += 1
    assert seen >= 3


def test_audit_commands_parse():
    audits = [words[2:] for words in _commands() if words[:2] == ["trl-sipo", "audit"]]
    assert audits
    for name, *argv in audits:
        assert importlib.import_module(AUDITS[name][0]).make_parser().parse_args(argv)


def test_study_commands_parse():
    lines = [words[2:] for words in _commands() if words[:2] == ["trl-sipo", "study"]]
    assert {name for name, *_ in lines} == set(STUDY_COMMANDS)
    for name, *argv in lines:
        assert importlib.import_module(STUDY_COMMANDS[name][0]).make_parser().parse_args(argv)


def test_encode_commands_parse():
    lines = [words for words in _commands() if {"encode", "trl_sipo.scripts.encode"} & set(words)]
    assert len(lines) >= 3
    for words in lines:
        place = next(i for i, word in enumerate(words) if word in ("encode", "trl_sipo.scripts.encode"))
        encode.check_arguments(encode.make_parser().parse_args(words[place + 1 :]))


@pytest.mark.parametrize("name, command", [("feedback", feedback), ("evaluate", evaluate)])
def test_commands_that_sample_parse(name, command):
    lines = [words[2:] for words in _commands() if words[:2] == ["trl-sipo", name]]
    assert lines
    for argv in lines:
        check_sampling_options(command.make_parser().parse_args(argv))


def test_report_commands_parse():
    lines = [words[2:] for words in _commands() if words[:2] == ["trl-sipo", "report"]]
    assert len(lines) >= 3
    assert all(report.make_parser().parse_args(argv).runs for argv in lines)


def test_online_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [words[2:] for words in _commands() if words[:2] == ["trl-sipo", "online"]]
    assert len(lines) >= 3
    for flag, path, *overrides in lines:
        assert flag == "--config"
        on_a_cpu = ["--training.use_cpu", "true", "--training.bf16", "false"]
        assert make_config(with_overrides(read_settings(path), [*overrides, *on_a_cpu])).rounds > 0


def test_files_in_commands_exist():
    for words in _commands():
        for word in words:
            if word.startswith(("examples/", "benchmarks/")):
                assert (ROOT / word).exists(), word


def test_options_in_running_text_exist(extension):
    """Of a command, of a setting of rounds, of a script of ours, or of a launcher."""
    parsers = [parser for _, _, parser in extension("command_line").commands()]
    known = {
        string.removeprefix("--")
        for parser in parsers
        for action in parser._actions
        for string in action.option_strings
    }
    known |= {field.name for settings in (OnlineConfig, EvaluationSettings) for field in fields(settings)} | {
        "training"
    }
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    known |= {name for path in scripts for name in re.findall(r'"--([\w-]+)"', read(path))}
    launchers = {"nproc_per_node", "num_processes", "cpu"}
    options = re.findall(r"(?<!\S)--([\w-]+)", " ".join(CODE))
    assert len(options) > 10
    for option in set(options) - {"no_"}:  # `--no_<name>`
        assert {option, option.removeprefix("no_")} & (known | launchers), option


@each_page
def test_links_lead_somewhere(page):
    for text, target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"[{text}]({target})"
        assert goal.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(goal), f"[{text}]({target}): {sorted(anchors(goal))}"


def test_every_page_is_reached_from_the_index():
    reached = {(SOURCE / target.partition("#")[0]).resolve() for _, target in links(SOURCE / "index.md")}
    assert not [page.name for page in PAGES if page.stem != "index" and page.resolve() not in reached]


def test_the_paper_index_points_at_the_names_it_gives():
    count = 0
    for text, target in links(SOURCE / "paper_index.md"):
        name = re.fullmatch(r"`([\w.]+)`", text)
        if name is None or not target.endswith(".py"):
            continue
        tree = ast.parse((SOURCE / target).resolve().read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)]
        for node in assigned:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {part.id for part in targets if isinstance(part, ast.Name)}
        assert set(name[1].split(".")) <= defined, (text, target)
        count += 1
    assert count > 25


def test_every_logged_key_is_explained():
    one = torch.ones(1)
    keep = one.bool()
    keys = set(pair_statistics(PairErrors(one, one, one, one), one, one, one, keep, beta=1.0, clip_range=0.1))
    keys |= set(proximal_statistics(PairErrors(one, chosen_distance=one), one))
    page = read(SOURCE / "metrics.md")
    explained = set(re.findall(r"^\| `([\w/]+)`", page, re.M))
    of_text = {"sipo/chosen_importance_weight", "sipo/rejected_importance_weight"}
    of_runs = {"sipo/empty_batches", "sipo/masked_levels", "sipo/skipped_steps"}
    assert explained >= keys | of_runs | {"loss", "grad_norm", "kl"}
    prefixes = "rewards|logps|sipo|drift|proximal"
    mentioned = set(re.findall(rf"(?<![\w/])(?:eval_)?((?:{prefixes})/\w+)", " ".join(CODE)))
    assert len(mentioned) > 8 and mentioned <= keys | of_runs | of_text


def test_conversions_of_beta_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+?) \|", read(SOURCE / "beta.md"), re.M))
    assert rows.pop("beta_convention") == "times"  # the heading
    assert rows.keys() == BETA_CONVENTIONS.keys()
    for name, factor in BETA_CONVENTIONS.items():
        assert rows[name] == ("number of latent dimensions" if factor is None else f"{factor:g}")
    printed = " ".join(read(SOURCE / "beta.md").split())
    assert " ".join(describe_beta(1000.0).split()) in printed


def _sd15_weight(num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w of Stable Diffusion 1.5 at every timestep, and by how much the error may grow before it is below 0.9."""
    schedule = VPSchedule(sd15_profile.alphas_cumprod(), torch.float64)
    level = schedule.level(torch.arange(1000))
    rho2 = rho_squared(level, schedule.previous_level(level, num_steps), "epsilon")
    error = sd15_profile.epsilon_error(np.arange(1000))
    return log_importance_weight(error, rho2).exp(), -2 * np.log(0.9) / (rho2 * error)


def test_the_table_of_grids_is_what_the_formula_gives():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) % \| (.+?) times", read(SOURCE / "sipo.md"), re.M)
    assert [int(row[0]) for row in rows] == [100, 50, 40, 25, 20, 10]
    for steps, last, share, growth in rows:
        weight, may_grow = _sd15_weight(int(steps))
        masked = ~timestep_mask(weight.log(), 0.9)
        assert masked.nonzero().max() == int(last)
        assert 100 * masked.double().mean() == pytest.approx(int(share), abs=0.5)
        for timestep, stated in zip((100, 300, 500), growth.split(" / "), strict=True):
            value = may_grow[timestep].item()
            assert value < 1 if stated == "masked" else f"{value:.2g}" == f"{float(stated):.2g}", (steps, timestep)


def test_the_weights_given_for_sd15():
    page = " ".join(read(SOURCE / "math.md").split())
    stated = re.search(r"`w` at t = ([\d, ]+) is ([\d., ]+), and the last masked timestep is (\d+)", page)
    weight, _ = _sd15_weight(50)
    for timestep, value in zip(stated[1].split(", "), stated[2].split(", "), strict=True):
        assert weight[int(timestep)].item() == pytest.approx(float(value), abs=0.00051)
    assert (weight < 0.9).nonzero().max() == int(stated[3])
    kept = weight >= 0.9
    assert (kept.double().mean() * np.log(2)).item() == pytest.approx(0.645, abs=0.001)  # the first loss of SIPO
    assert weight.mean().item() == pytest.approx(0.95, abs=0.01)  # metrics.md
