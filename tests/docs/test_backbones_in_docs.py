# SPDX-License-Identifier: Apache-2.0
"""The adapter that the documentation writes keeps the contract of all, and its tables of backbones are the code's."""

import inspect
import re
import sys
import types
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from tests.adapters import test_contract, test_contract_media
from tests.adapters.backbone_cases import CASES
from tests.docs.pages import SOURCE, blocks, read
from trl_sipo.adapters import ADAPTERS, adapter_for
from trl_sipo.adapters.base import BackboneAdapter

_MODULE = "aura_flow_of_the_documentation"
_FIXTURES = {"case", "tmp_path", "monkeypatch"}

CONTRACT = {
    name: test
    for name, test in {**vars(test_contract), **vars(test_contract_media)}.items()
    if name.startswith("test_") and "case" in (arguments := set(inspect.signature(test).parameters)) <= _FIXTURES
}


@pytest.fixture
def aura_flow(monkeypatch):
    """The row of add_a_backbone.md, with its adapter in the table."""
    module: Any = types.ModuleType(_MODULE)
    for block in blocks(SOURCE / "add_a_backbone.md", "python"):
        exec(compile(block.code, str(block), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, _MODULE, module)
    monkeypatch.setitem(ADAPTERS, "AuraFlowPipeline", f"{_MODULE}:AuraFlowAdapter")
    return module.CASES[0]


@pytest.mark.parametrize("name", CONTRACT)
def test_the_example_adapter_keeps_the_contract(name, aura_flow, request):
    arguments = inspect.signature(CONTRACT[name]).parameters.keys() - {"case"}
    CONTRACT[name](aura_flow, **{argument: request.getfixturevalue(argument) for argument in arguments})


def test_the_contract_is_seen():
    assert len(CONTRACT) > 20
    assert "test_training_gives_the_denoiser_what_inference_gives_it" in CONTRACT


# The models

PAGE = SOURCE / "backbones.md"


def _rows(columns: int) -> list[list[str]]:
    """The cells of the page's tables of so many columns, without headings and rules."""
    tables = re.findall(r"^\| (.+) \|$", read(PAGE), re.M)
    rows = [cells for line in tables if len(cells := line.split(" | ")) == columns]
    return [cells for cells in rows if "`" in "".join(cells)]


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def _adapters(case_name: str) -> list[BackboneAdapter]:
    """Of all rows of one model: with other schedulers, without parts that it may lack, ..."""
    return [adapter_for(case.build()) for case in CASES if case.name.split("-")[0] == case_name]


MODELS = {cells[6].strip("`"): cells for cells in _rows(7)}
LORA_LAYERS = {name: cells[1] for cells in _rows(2) if (name := cells[0].strip("`")) in ADAPTERS}


def _published(**parts: dict[str, Any]) -> SimpleNamespace:
    """A pipeline of which only the configurations of parts are there, or attributes of its own."""
    own = parts.pop("own", {})
    return SimpleNamespace(**own, **{name: SimpleNamespace(config=SimpleNamespace(**c)) for name, c in parts.items()})


_FOUR_BLOCKS = {"block_out_channels": (128, 256, 512, 512)}
_EIGHT_PIXELS = _published(own={"vae_scale_factor": 8}, transformer={"patch_size": 2})
_COGVIDEOX = _published(
    own={"vae": SimpleNamespace(
        config=SimpleNamespace(**_FOUR_BLOCKS, temporal_compression_ratio=4), num_latent_frames_batch_size=2
    )},
    transformer={"patch_size": 2},
)  # fmt: skip
_WAN_PATCHES = {"patch_size": (1, 2, 2)}
_LTX = _published(own={"vae_spatial_compression_ratio": 32, "vae_temporal_compression_ratio": 8})

# What sizes and lengths depend on, in the published configurations.
PUBLISHED: dict[str, SimpleNamespace] = {
    "sd": _published(vae=_FOUR_BLOCKS),
    "sdxl": _EIGHT_PIXELS,
    "sd3": _EIGHT_PIXELS,
    "sd35": _EIGHT_PIXELS,
    "flux": _EIGHT_PIXELS,
    "flux2": _EIGHT_PIXELS,
    "flux2_klein": _EIGHT_PIXELS,
    "qwenimage": _EIGHT_PIXELS,
    "zimage": _EIGHT_PIXELS,
    "cogvideox_2b": _COGVIDEOX,
    "cogvideox_5b": _COGVIDEOX,
    "cogvideox_15": _COGVIDEOX,
    "wan21": _published(vae={"scale_factor_spatial": 8, "scale_factor_temporal": 4}, transformer=_WAN_PATCHES),
    "wan22_5b": _published(vae={"scale_factor_spatial": 16, "scale_factor_temporal": 4}, transformer=_WAN_PATCHES),
    "wan22_a14b": _published(vae={"scale_factor_spatial": 8, "scale_factor_temporal": 4}, transformer=_WAN_PATCHES),
    "ltx": _LTX,
    "ltx091": _LTX,
    "hunyuanvideo": _published(
        own={"vae_scale_factor_spatial": 8, "vae_scale_factor_temporal": 4}, transformer={"patch_size": 2}
    ),
    "hunyuanvideo15": _published(
        own={"vae_scale_factor_spatial": 16, "vae_scale_factor_temporal": 4}, transformer={"patch_size": 1}
    ),
}


def test_the_table_of_models_has_every_model_that_is_tested():
    assert set(MODELS) == {case.name.split("-")[0] for case in CASES} == set(PUBLISHED)
    assert {_code(cells[1])[0] for cells in MODELS.values()} == set(ADAPTERS) == set(LORA_LAYERS)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_table_says_of_a_model(name):
    _, pipeline, predicts, process, multiple, frames, _ = MODELS[name]
    adapters = _adapters(name)
    assert {adapter.pipeline_class_name for adapter in adapters} == set(_code(pipeline))
    assert {adapter.prediction_type for adapter in adapters} == set(_code(predicts))
    is_flow = predicts == "`flow_prediction`"
    assert process.startswith("flow, " if is_flow else "diffusion")

    adapter = adapters[0]
    published = object.__new__(type(adapter))
    published.pipeline = PUBLISHED[name]
    assert published.spatial_multiple == int(multiple)
    assert frames == (f"{published.frame_multiple}k + 1" if adapter.is_video else "image")

    if is_flow:
        num_frames = 17 if adapter.is_video else 1
        small, large = (adapter.noise_schedule_for(side, side, num_frames) for side in _two_sides(adapter))
        few = adapter.noise_schedule_for(*[_two_sides(adapter)[0]] * 2, num_frames, num_steps=4)
        assert (small.shift != large.shift) == ("by size" in process)
        assert (small.shift != few.shift) == ("and steps" in process)
        assert (small.shift_terminal is not None) == ("stretched" in process)


def _two_sides(adapter: BackboneAdapter) -> tuple[int, int]:
    """In pixels, of two squares that even a tiny table of positions holds."""
    return 2 * adapter.spatial_multiple, 6 * adapter.spatial_multiple


@pytest.mark.parametrize("pipeline", LORA_LAYERS)
def test_the_lora_layers_of_the_table_are_the_adapters(pipeline):
    name = next(name for name, cells in MODELS.items() if pipeline in cells[1])
    cell, targets = LORA_LAYERS[pipeline], _adapters(name)[0].lora_target_modules
    if isinstance(targets, str):
        assert targets == _adapters("flux2")[0].lora_target_modules
        named = _code(LORA_LAYERS["Flux2Pipeline"])
        assert "expression" in LORA_LAYERS["Flux2Pipeline"]
        assert all(re.fullmatch(targets, f"transformer_blocks.0.attn.{layer}") for layer in named[:-1])
        assert re.fullmatch(targets, f"single_transformer_blocks.0.{named[-1]}")
    else:
        of_sd3 = _code(LORA_LAYERS["StableDiffusion3Pipeline"]) if "those of SD3" in cell else []
        assert sorted([*of_sd3, *_code(cell)]) == sorted(targets)


def test_the_page_loads_a_lora_as_the_model_cards_do():
    shown = {line for block in blocks(PAGE, "python") for line in block.code.splitlines()}
    particular = {"wan22_a14b": "wan22-lora", "hunyuanvideo15": "hunyuan-video15-lora"}
    for name, folder in particular.items():
        assert {line.format(path=folder) for line in _adapters(name)[0].lora_loading_code} <= shown
    for name in MODELS.keys() - particular.keys():
        assert _adapters(name)[0].lora_loading_code == BackboneAdapter.lora_loading_code
