# SPDX-License-Identifier: Apache-2.0
"""The bytes that `scaling.py` computes are those that two processes send, and what follows from them is sensible."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OPTIONS = ["--model", "tiny", "--steps", "1", "--pairs", "1"]


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scaling
    finally:
        sys.path.remove(str(BENCHMARKS))
    return scaling


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_computed_bytes_are_those_that_are_sent(strategy, kind, scaling):
    run = scaling.launch(scaling.make_parser().parse_args(OPTIONS), strategy, kind, 2)
    assert run["measured_bytes"] > 0
    assert run["computed_bytes"] == pytest.approx(run["measured_bytes"], rel=1e-6)
    assert run["pairs_per_second"] > 0


def test_bytes_by_hand(scaling):
    work = scaling.Workload(parameters=1000, trained=100, outside=40)
    sent = {name: scaling.sent_per_step(name, work, 4) for name in scaling.STRATEGIES}
    assert sent["DDP"] == {"gradients": 2 * 0.75 * 4 * 100}
    assert sent["ZeRO-2"] == {"gradients": 2 * 0.75 * 2 * 100, "weights after the step": 0.75 * 2 * 100}
    passes = {"weights, policy forward": 1500, "weights, policy backward": 1500, "weights, reference": 1500}
    assert sent["ZeRO-3"] == {**passes, "gradients": 150}
    passes |= {"weights, policy backward": 1440, "weights, reference": 1440}
    assert sent["FSDP2"] == {**passes, "gradients": 150}


def test_one_process_sends_nothing_and_accumulation_gathers_again(scaling):
    work = scaling.Workload(parameters=1000, trained=1000, outside=0)
    assert all(sum(scaling.sent_per_step(name, work, 1).values()) == 0 for name in scaling.STRATEGIES)
    twice = scaling.Workload(parameters=1000, trained=1000, outside=0, accumulation=2, has_reference_pass=False)
    assert sum(scaling.sent_per_step("FSDP2", twice, 2).values()) == 0.5 * 2 * (2 * 2 * 1000 + 1000)
    assert sum(scaling.sent_per_step("DDP", twice, 2).values()) == sum(scaling.sent_per_step("DDP", work, 2).values())


@pytest.mark.parametrize(
    ("strategy", "accumulation", "all_reduced", "scattered", "gathered_after"),
    [("ZeRO-2", 1, 52004, 0, 52004), ("ZeRO-2", 2, 104008, 0, 52004), ("ZeRO-3", 2, 0, 104008, 0)],
)
def test_gradients_are_those_that_deepspeed_sends(
    strategy, accumulation, all_reduced, scattered, gathered_after, scaling
):
    """Numbers given to the collectives in a step, counted on two processes in float32 with DeepSpeed 0.19.8."""
    work = scaling.Workload(52004, 52004, 0, weight_bytes=4, gradient_bytes=4, accumulation=accumulation)
    sent = scaling.sent_per_step(strategy, work, 2)
    assert sent["gradients"] == 4 * (2 * all_reduced + scattered) / 2
    assert sent.get("weights after the step", 0) == 4 * gathered_after / 2


def test_the_plan_counts_the_published_models(scaling, monkeypatch):
    name = "Stable Diffusion 1.5"
    monkeypatch.setattr(scaling, "ARCHITECTURES", {name: scaling.ARCHITECTURES[name]})
    plan = scaling.planning()[name]
    assert plan["parameters"] == 859520964 and plan["lora_parameters"] == 3188736
    assert plan["lora"]["DDP"][8] == pytest.approx(2 * 7 / 8 * 4 * 3188736)
    assert plan["full"]["FSDP2"][1024] < plan["full"]["ZeRO-3"][1024] < 4 * 2 * 859520964
