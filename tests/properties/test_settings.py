# SPDX-License-Identifier: Apache-2.0
"""Any combination of settings makes a configuration, or is refused as one: nothing else comes out."""

import math
import tempfile
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DPOConfig

from trl_sipo import (
    DiffusionD3POConfig,
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    DiffusionMaPOConfig,
    DiffusionPolyDPOConfig,
    DiffusionSFTConfig,
    DiffusionSIPOConfig,
)
from trl_sipo.core.beta import BETA_CONVENTIONS
from trl_sipo.core.timestep_sampling import TIME_SAMPLERS
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import ConfigurationError

CONFIGS = (
    DiffusionDPOConfig, DiffusionSIPOConfig, DiffusionPolyDPOConfig, DiffusionKTOConfig, DiffusionMaPOConfig,
    DiffusionSFTConfig, DiffusionD3POConfig,
)  # fmt: skip
OF_TRL = {field.name for field in fields(DPOConfig)} - {"beta", "label_smoothing", "precompute_ref_log_probs"}
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}

numbers = st.one_of(
    st.floats(-2, 2),
    st.integers(-2, 2000),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, 10**30, 0, 1, 0.5, 1.0]),
)
words = st.sampled_from([*BETA_CONVENTIONS, *TIME_SAMPLERS, "sipo", "dpo_cm", "", "none", "\0", "1e-4", "a" * 99])
cells = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.one_of(cells, st.lists(cells, max_size=3), st.dictionaries(words, cells, max_size=2))


def ours(config):
    """The names of our settings, and of those of TRL's that mean something else here."""
    return sorted(field.name for field in fields(config) if field.name not in OF_TRL)


def made(config, options):
    """The configuration; None when it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return config(folder, **QUIET, **options)
        except ConfigurationError as error:
            assert len(str(error)) > 20
            return None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
@settings(max_examples=150)
@given(data=st.data())
def test_settings_of_any_kind(config, data):
    names = data.draw(st.lists(st.sampled_from(ours(config)), min_size=1, max_size=4, unique=True))
    args = made(config, {name: data.draw(anything, label=name) for name in names})
    if args is not None:
        assert args.size is None or all(side > 0 for side in args.size)
        assert args.beta is None or (args.beta > 0 and math.isfinite(args.beta))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_each_setting_alone(config):
    """Every setting with every odd value, one at a time."""
    odd = [
        None,
        True,
        -1,
        0,
        3,
        10**30,
        0.5,
        -0.5,
        math.nan,
        math.inf,
        "",
        "word",
        [],
        [1, 2],
        [None],
        ["a"],
        {},
        {"a": 1},
    ]
    for name in ours(config):
        for value in odd:
            made(config, {name: value})


@given(resolution=anything)
def test_resolutions_of_any_kind(resolution):
    try:
        transform = PairedTransform(resolution)
    except ConfigurationError:
        return
    assert len(transform.size) == 2 and all(type(side) is int and side > 0 for side in transform.size)


@given(num_frames=anything, frame_rate=anything)
def test_clips_of_any_kind(num_frames, frame_rate):
    try:
        sampler = ClipSampler(num_frames, frame_rate)
    except ConfigurationError:
        return
    assert sampler.num_frames > 0 and (sampler.rate is None or sampler.rate > 0)


def test_the_same_values_are_drawn_in_every_run():
    drawn = []

    @settings(max_examples=5)
    @given(st.integers())
    def look(value):
        drawn.append(value)

    look()
    first, drawn[:] = list(drawn), []
    look()
    assert drawn == first and len(first) == 5
