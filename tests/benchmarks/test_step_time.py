# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a step runs on each kind of model, and counts what it says."""

import json
from math import prod

import diffusers
import pytest
import torch
from torch import nn

OURS = ("Diffusion-DPO", "split arms", "precomputed reference")


def test_every_variant_is_measured_and_split_arms_keep_half(script, tmp_path, capsys):
    path = tmp_path / "out.json"
    script("step_time").main(["--model", "tiny", "--rounds", "1", "--device", "cpu", "--output", str(path)])
    result = json.loads(path.read_text())
    trainers = script("step_variants").TRAINERS
    assert result["seconds"].keys() == {*trainers, "bare", "bare, no reference", "peer"}
    assert all(len(values) == 1 and values[0] > 0 for values in result["seconds"].values())
    ratios = {name: entry["ratio"] for name, entry in result["ratios"].items()}
    assert ratios.keys() == script("step_time").TIME_RATIOS.keys() | script("step_time").MEMORY_RATIOS.keys()
    assert 0.4 < ratios["split / both arms at once, activations"] < 0.6
    # Of the times only what they are made of: how long a step takes is the machine's business.
    seconds, flops = result["seconds"], result["flops"]
    for name, (above, below, *_) in script("step_time").TIME_RATIOS.items():
        assert ratios[name] == pytest.approx(seconds[above][0] / seconds[below][0])
    # The proximal term is no pass more, and keeps the predictions of the policy's and the reference's arms at most.
    assert flops["proximal term"] == flops["Diffusion-DPO"]
    assert flops["proximal term, stored predictions"] == flops["precomputed reference"]
    kept = result["activation_bytes"]
    latents = 2 * 4 * 4 * prod(side // 8 for side in result["settings"]["size"][:2]) * 4
    assert 0 < kept["proximal term"] - kept["Diffusion-DPO"] <= 2 * latents + 1024
    assert flops["peer"] > 1.5 * flops["precomputed reference"]
    assert flops["precomputed reference"] < 0.9 * flops["Diffusion-DPO"]
    printed = capsys.readouterr().out
    assert "step / bare loop" in printed and "target <= 1.03" in printed


@pytest.mark.parametrize("model", ["sdxl-tiny", "wan-tiny"])
def test_our_step_computes_what_a_bare_one_does(model, script, tmp_path):
    """To the operation, with and without a reference; split arms add the policy's forward pass on one arm."""
    options = ["--model", model, "--pairs", "1", "--rounds", "1", "--device", "cpu", "--trainers", *OURS]
    result = script("step_time").main([*options, "--output", str(tmp_path / "out.json")])
    flops = result["flops"]
    assert flops["Diffusion-DPO"] == flops["bare"] and flops["precomputed reference"] == flops["bare, no reference"]
    reference = flops["bare"] - flops["bare, no reference"]  # without the LoRA
    assert reference / 2 < flops["split arms"] - flops["bare"] < reference
    assert flops["peer"] > flops["bare"]
    for name, share in result["share_of_matrix_rate"].items():
        seconds = sum(result["seconds"][name])
        assert share == pytest.approx(flops[name] / seconds / result["matrix_flops_per_second"])


def test_the_peer_passes_both_arms_at_once_and_encodes_in_each_step(script, tmp_path):
    """As the script of diffusers does: its step is the bare one, with the VAE and the text encoder in it."""
    options = script("step_time").make_parser().parse_args(["--model", "tiny", "--pairs", "3", "--device", "cpu"])
    options.size = (64, 64, 1)
    pipelines = script("random_pipelines")
    steps = script("step_variants").make_steps(
        pipelines.make_pipeline(pipelines.PIPELINES["tiny"]), [], options, tmp_path
    )
    for name, encoded in (("bare", 0), ("peer", 1)):
        seen, calls = [], []
        steps[name].model.get_base_model().register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(len(args[0]))
        )
        encoder = steps[name].pipeline.text_encoder
        hook = encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        steps[name]()
        hook.remove()
        assert seen == [6, 6] and len(calls) == encoded


def test_bf16_with_checkpointing(script, tmp_path):
    """Checkpointing is in force in the bare loop and in the trainer alike: both keep less, and compute more."""
    results = {}
    for extra in ((), ("--checkpointing",)):
        options = ["--model", "tiny", "--dtype", "bf16", "--pairs", "1", "--rounds", "1", "--device", "cpu", *extra]
        options += ["--trainers", "Diffusion-DPO", "--output", str(tmp_path / "out.json")]
        results[extra] = script("step_time").main(options)
    plain, checkpointed = results.values()
    for name in ("bare", "Diffusion-DPO"):
        assert checkpointed["activation_bytes"][name] < 0.7 * plain["activation_bytes"][name]
        assert checkpointed["flops"][name] > plain["flops"][name]


def test_operations_counted_by_hand(script):
    """A product of (2, 8) and (8, 16) matrices forward; backward that of the weight, since the input needs none."""
    layer = nn.Linear(8, 16, bias=False)
    inputs = torch.ones(2, 8)
    assert script("step_counting").count_flops(lambda: layer(inputs).sum().backward()) == 2 * (2 * 2 * 8 * 16)


def test_attention_on_a_cpu_is_counted(script):
    """Two products forward, five backward."""
    query, key, value = (torch.ones(1, 2, 5, 4, requires_grad=True) for _ in range(3))

    def step():
        nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    assert script("step_counting").count_flops(step) == 7 * (2 * 2 * 5 * 5 * 4)


def test_what_is_kept_for_the_backward_pass_by_hand(script):
    """The inputs of both layers, and not their weights."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))

    def step():
        model(torch.ones(2, 8)).sum().backward()

    assert script("step_counting").activation_bytes(step, model, "cpu") == 4 * (2 * 8 + 2 * 16)


def test_a_size_of_no_known_kind_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script("step_time").main(["--model", "tiny", "--size", "64"])
    assert "--size takes a height and a width" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "billions"), [("sd15", 0.86), ("sdxl", 2.57), ("wan-1.3b", 1.42)])
def test_real_models_have_their_published_size(name, billions, script):
    """Counted without memory for them."""
    parts = script("random_pipelines").PIPELINES[name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, parts.denoiser[0])(**parts.denoiser[1])
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_variants_share_weights_and_not_modules(script):
    """So that a LoRA in one is none in the others, and a model of real size is in memory once."""
    pipelines = script("random_pipelines")
    pipeline = pipelines.make_pipeline(pipelines.PIPELINES["wan-tiny"])
    beside = pipelines.with_own_denoiser(pipeline)
    assert beside.transformer is not pipeline.transformer and beside.vae is pipeline.vae
    ours, theirs = dict(beside.transformer.named_parameters()), dict(pipeline.transformer.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


def test_what_a_narrower_dtype_does_to_the_proximal_term(script, tmp_path):
    """Nothing where the reference predicts in it; else the policy is pulled from where it is, though it is there."""
    found = {}
    for dtype in ("fp32", "bf16"):
        options = ["--model", "tiny", "--dtype", dtype, "--draws", "2", "--device", "cpu"]
        found[dtype] = script("stored_predictions").main([*options, "--output", str(tmp_path / "out.json")])
    full, half = (result["stored"] for result in found.values())
    assert (found["fp32"]["predicted"], found["bf16"]["predicted"]) == ("float32", "bfloat16")
    for row in (full["float32"], half["float32"], half["bfloat16"]):
        assert row == {"distance": 0, "term": 0, "gradient_share": 0}
    for name, bits in (("float16", 11), ("bfloat16", 8)):
        assert 0.01 < full[name]["distance"] * 4**bits < 1  # of predictions of about one
        assert full[name]["term"] == pytest.approx(5000 / 2 * full[name]["distance"])
        assert full[name]["gradient_share"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny", "sdxl-tiny", "wan-tiny"])
def test_steps_on_a_gpu(model, script, tmp_path):
    options = ["--model", model, "--pairs", "1", "--rounds", "1", "--device", "cuda", "--dtype", "bf16"]
    result = script("step_time").main([*options, "--output", str(tmp_path / "out.json")])
    assert result["environment"]["gpu"] and all(size > 0 for size in result["activation_bytes"].values())
    assert result["flops"]["Diffusion-DPO"] == result["flops"]["bare"] > 0
