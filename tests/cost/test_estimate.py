# SPDX-License-Identifier: Apache-2.0
"""What a run is estimated to cost: counts by hand, published measurements, and what would have to change."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from tests.adapters.backbone_cases import BACKBONES
from trl_sipo.cost.architectures import ARCHITECTURES, HUB_MODELS
from trl_sipo.cost.devices import FAST, GPUS, SLOW, Device, find_gpu
from trl_sipo.cost.disk import DiskPlan, disk_parts
from trl_sipo.cost.duration import CALIBRATED_WITHIN, Seconds, computing, sending, updating
from trl_sipo.cost.estimate import RunPlan, beside_steps, estimate, first_that_fits, step_seconds
from trl_sipo.cost.memory import RESERVE, memory_parts
from trl_sipo.cost.memory_counting import count_step
from trl_sipo.cost.models import at_size, find_model, make_denoiser, published_model
from trl_sipo.cost.operations import Operation, OperationCounter, from_rows, to_rows
from trl_sipo.cost.passes import forward_loss
from trl_sipo.cost.step import StepCounts, StepPlan, count
from trl_sipo.errors import ConfigurationError

GIB = 2**30
GPU = Device("a GPU", 10 * GIB, half=100.0, tf32=50.0, single=10.0, bandwidth=1000.0, link=100.0)
PRODUCT = Operation("matrix product", flops=1000, traffic=10, is_half=True)
COPY = Operation("memory", flops=0, traffic=1000, is_half=True)


def _counts(**changed):
    """Small numbers that are told apart in sums."""
    numbers = {
        "parameters": 1000, "trained": 100, "outside_blocks": 50, "largest_block": 300, "weights": 2000,
        "first_peak": 5000, "later_peak": 4900, "reference_peak": 700, "vae_peak": 0, "vae": 400, "text_encoders": 600,
        "text_encoder_parameters": 300, "conditioning": 70, "latents": 16,
    }  # fmt: skip
    passes = {"policy": Counter({PRODUCT: 3, COPY: 2}), "reference": Counter({PRODUCT: 1}), "encoding": Counter()}
    return StepCounts(**{**numbers, **passes, **changed})


def _parts(plan=None, counts=None, *, strategy="DDP", processes=1, accumulation=1, optimizer="32 bits"):
    shared = {"strategy": strategy, "processes": processes, "accumulation": accumulation, "optimizer": optimizer}
    return memory_parts(counts or _counts(), plan or StepPlan(), **shared)


# ------------------------------------------------------------------------------------------------------------ counting


def test_operations_of_two_layers_by_hand():
    """Products of (2, 8) by (8, 16) forward, and of (16, 2) by (2, 8) backward for the weight: float32."""
    with torch.device("meta"):
        layer, inputs = nn.Linear(8, 16, bias=False), torch.ones(2, 8)
    counter = OperationCounter()
    count_step(layer, lambda: layer(inputs).sum(), None, counter)
    products = {entry: number for entry, number in counter.operations.items() if entry.kind == "matrix product"}
    flops, traffic = 2 * 2 * 8 * 16, 4 * (2 * 8 + 8 * 16 + 2 * 16)
    # The gradient of a sum is one number, expanded, and read from where it is.
    expanded = traffic - 4 * (2 * 16) + 4
    assert products == {Operation("matrix product", flops, size, False): 1 for size in (traffic, expanded)}
    # What moves nothing does not count: views, and memory that is not written.
    assert all(entry.traffic > 0 for entry in counter.operations)


def test_attention_is_seven_products():
    with torch.device("meta"):
        query, key, value = (torch.ones(1, 2, 5, 4, requires_grad=True) for _ in range(3))
        model = nn.Linear(1, 1)
    counter = OperationCounter()
    count_step(model, lambda: nn.functional.scaled_dot_product_attention(query, key, value).sum(), None, counter)
    assert sum(entry.flops * number for entry, number in counter.operations.items()) == 7 * (2 * 2 * 5 * 5 * 4)
    assert {entry.kind for entry in counter.operations if entry.flops} == {"attention"}


def test_counts_survive_a_file():
    counts = _counts()
    plain = counts.to_json()
    assert StepCounts.from_json(plain) == counts and from_rows(to_rows(counts.policy)) == counts.policy


def test_every_published_model_has_hub_ids_of_a_known_architecture():
    assert {key for key, _ in HUB_MODELS.values()} == ARCHITECTURES.keys()
    experts = find_model("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (480, 832, 5))
    assert experts.num_denoisers == 2 and experts.architecture.latents == (16, 2, 60, 104)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("Stable Diffusion 1.5", (516, 512, 1), "the height 516 is no multiple of 8"),
        ("Stable Diffusion 1.5", (512, 512, 5), "draws images"),
        ("Wan2.1-T2V-1.3B", (480, 832, 6), "not one more than a multiple of 4"),
    ],
)
def test_sizes_that_a_model_does_not_take(name, size, message):
    with pytest.raises(ConfigurationError, match=message):
        published_model(name, size)


# ------------------------------------------------------------------------------------------- what others have measured


def _stable_diffusion_2():
    config = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    return dataclasses.replace(ARCHITECTURES["Stable Diffusion 1.5"], config=config)


@pytest.mark.parametrize(
    ("pixels", "images_per_second"),
    [(512, 290 / 8), pytest.param(256, 1100 / 8, marks=pytest.mark.slow)],
)
def test_published_throughput_lies_in_the_range(pixels, images_per_second):
    """MosaicML, README of mosaicml/diffusion: a U-Net of Stable Diffusion 2, all weights, latents at hand, 8 A100."""
    architecture, samples = at_size(_stable_diffusion_2(), (pixels, pixels, 1)), 32
    model, counter = make_denoiser(architecture, "meta", torch.float32).train(), OperationCounter()
    loss = forward_loss(model, architecture, "meta", torch.float32, samples=samples)
    count_step(model, loss, torch.float16, counter)
    seconds = computing(counter.operations, GPUS["A100-80GB"])
    assert samples / seconds.high < images_per_second < samples / seconds.low
    assert seconds.high < 2.1 * seconds.low  # a range that says something


@pytest.mark.parametrize(
    ("name", "samples", "checkpointing", "measured"),
    [
        pytest.param("CogVideoX-2B", 1, False, 43.764, marks=pytest.mark.slow),
        pytest.param("CogVideoX-2B", 4, True, 21.803, marks=pytest.mark.slow),
        pytest.param("CogVideoX-5B", 4, True, 46.492, marks=pytest.mark.slow),
    ],
)
def test_published_memory_is_near(name, samples, checkpointing, measured):
    """README of a-r-r-o-w/cogvideox-factory: LoRA of rank 16 on one A100, GiB that the allocator held."""
    plan = StepPlan(pairs=samples, arms=1, has_reference=False, lora_rank=16, checkpointing=checkpointing)
    parts = _parts(plan, count(published_model(name), plan))
    assert 0.84 < (sum(parts.values()) - RESERVE) / GIB / measured < 1.05


# --------------------------------------------------------------------------------------------------------------- time


def test_an_operation_takes_its_arithmetic_or_its_traffic():
    moving, product = COPY.traffic / 1000, 1000 / 100
    found = computing(Counter({PRODUCT: 2, COPY: 3}), GPU)
    shares = [efficiency.shares["matrix product"] for efficiency in (FAST, SLOW)]
    assert found.low == pytest.approx(2 * product / shares[0] + 3 * moving / FAST.bandwidth)
    assert found.high == pytest.approx(2 * product / shares[1] + 3 * moving / SLOW.bandwidth)


def test_many_small_operations_wait_for_the_host():
    small = Operation("memory", 0, 1, True)
    found = computing(Counter({small: 1000}), dataclasses.replace(GPU, bandwidth=1e15))
    assert found == Seconds(pytest.approx(1000 * FAST.launch), pytest.approx(1000 * SLOW.launch))


def test_float32_takes_the_rate_that_pytorch_takes():
    convolution, product = (Operation(kind, 1, 1, False) for kind in ("convolution", "matrix product"))
    assert GPU.rate(convolution) == GPU.tf32 and GPU.rate(product) == GPU.single
    assert GPU.rate(product, allows_tf32=True) == GPU.tf32 and GPU.rate(PRODUCT) == GPU.half


def test_a_measured_machine_is_scaled():
    free = computing(Counter({PRODUCT: 1}), GPU)
    found = computing(Counter({PRODUCT: 1}), dataclasses.replace(GPU, calibration=2.0))
    assert found.middle == pytest.approx(2 * free.middle)
    assert found.high / found.low == pytest.approx(CALIBRATED_WITHIN**2)


def test_sending_is_hidden_or_not():
    busy = Seconds(100.0, 100.0)
    assert sending(80.0, 1.0, busy) == Seconds(pytest.approx(10.0), pytest.approx(200.0))  # all hidden but a tenth
    assert sending(800.0, 1.0, busy).low == pytest.approx(1000 - 90)  # more than the step can hide


def test_a_step_is_made_of_its_calls_and_the_update():
    counts, disk = _counts(), DiskPlan()
    call = computing(counts.policy, GPU).low + computing(counts.reference, GPU).low
    update = updating(counts.trained, GPU).low
    run = RunPlan(StepPlan(), disk, accumulation=4, steps=10, reference_samples=6, grid_samples=2)
    assert step_seconds(counts, run, GPU).low == pytest.approx(4 * call + update)
    precomputed = dataclasses.replace(run, step=StepPlan(has_reference=False))
    assert step_seconds(counts, precomputed, GPU).low == pytest.approx(4 * computing(counts.policy, GPU).low + update)
    # The reference's pass is on two samples.
    assert beside_steps(counts, run, GPU).low == pytest.approx(8 / 2 * computing(counts.reference, GPU).low)
    found = estimate(counts, run, GPU)
    assert found.run.low == pytest.approx(10 * found.step.low + beside_steps(counts, run, GPU).low)
    unmeasured = dataclasses.replace(GPU, bandwidth=0.0)
    assert estimate(counts, run, unmeasured).step is None


def test_many_gpus_send_and_share():
    alone = RunPlan(StepPlan(lora_rank=None), DiskPlan())
    for strategy in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"):
        many = dataclasses.replace(alone, processes=4, strategy=strategy)
        assert step_seconds(_counts(), many, GPU).high > step_seconds(_counts(), alone, GPU).high
    machines = dataclasses.replace(alone, processes=16, network=1.0)
    near = dataclasses.replace(alone, processes=8, network=1.0)
    assert step_seconds(_counts(), machines, GPU).high > 10 * step_seconds(_counts(), near, GPU).high


# ------------------------------------------------------------------------------------------------------------- memory


def test_parts_of_a_lora_by_hand():
    parts = _parts()
    assert parts == {
        "weights": 2000 + 4 * 100, "optimiser": 8 * 100, "gradients and activations": 5000, "reserve": RESERVE,
    }  # fmt: skip
    assert _parts(optimizer="8 bits")["optimiser"] == 200
    assert _parts(accumulation=2)["gradients and activations"] == 4900 + 4 * 100
    holding = _parts(StepPlan(holds_encoders=True, encodes=True), _counts(vae_peak=9000))
    assert holding["VAE and text encoders"] == 1000 and holding["gradients and activations"] == 9000


def test_parts_of_all_weights_under_each_strategy():
    plan = StepPlan(lora_rank=None, precision="bfloat16")
    counts = _counts(trained=1000, weights=4000, first_peak=9000, later_peak=5000)
    one = _parts(plan, counts)
    assert one["weights"] == 4000 and one["reference"] == 4000 and one["optimiser"] == 8000
    assert _parts(plan, counts, processes=4)["gradients to be sent"] == 4000
    fsdp = _parts(plan, counts, processes=4, strategy="FSDP2")
    assert (fsdp["weights"], fsdp["reference"], fsdp["optimiser"]) == (1000, 1000, 2000)
    assert fsdp["blocks put together"] == 2 * 2 * 300 and "gradients to be sent" not in fsdp
    zero = _parts(plan, counts, processes=4, strategy="ZeRO-2")
    assert (zero["weights"], zero["weights in float32 beside them"], zero["optimiser"]) == (2000, 1000, 2000)


def test_disk_by_hand():
    disk = DiskPlan(pairs=10, prompts=3, checkpoints=2, grids=4, grid_samples=2, reference_draws=5)
    parts = disk_parts(_counts(), StepPlan(), disk, (8, 8, 1))
    assert parts == {
        "cache of latents": 10 * 2 * 16 * 2, "cache of prompts": 3 * 70 * 2, "checkpoints": 2 * (400 + 800),
        "final model": 400, "samples": 4 * 2 * 64 * 1.5, "reference errors": 10 * 2 * 5 * 4,
    }  # fmt: skip
    stored = dataclasses.replace(disk, stores_predictions=True)
    for precision, size in {"float32": 4, "bfloat16": 2}.items():
        predictions = disk_parts(_counts(), StepPlan(precision=precision), stored, (8, 8, 1))["reference predictions"]
        assert predictions == 10 * 2 * 5 * 16 * size
    full = disk_parts(_counts(), StepPlan(lora_rank=None), dataclasses.replace(disk, strategy="FSDP2"), (8, 8, 1))
    assert full["checkpoints"] == 2 * (2 * 400 + 800 + 1000) and full["final model"] == 400 + 1000


# ------------------------------------------------------------------------------------------------------------- advice


def _with_room(size):
    return dataclasses.replace(GPU, memory=size)


def _needs(**bytes_of):
    """Counts of a plan: so many bytes less for each setting that it has."""

    def counts_of(plan):
        saved = sum(size for name, size in bytes_of.items() if getattr(plan, name))
        return _counts(first_peak=10_000 - saved, later_peak=10_000 - saved)

    return counts_of


def test_the_first_change_that_is_enough_is_advised_alone():
    run = RunPlan(StepPlan(checkpointing=False, holds_encoders=True, encodes=True), DiskPlan())
    counts_of = _needs(checkpointing=5000, split=4000)
    base = 2000 + 400 + 800 + RESERVE
    words, changed = first_that_fits(run, _with_room(base + 6000), counts_of)
    assert len(words) == 1 and "gradient_checkpointing" in words[0]  # and not to encode, which comes before it
    assert changed.step.checkpointing and changed.step.holds_encoders
    words, changed = first_that_fits(run, _with_room(base + 2000), counts_of)
    assert ["gradient_checkpointing" in words[0], "split_pair_backward" in words[1]] == [True, True]
    assert first_that_fits(run, _with_room(base), counts_of) is None


def test_nothing_is_advised_that_training_or_the_device_refuses():
    full = RunPlan(StepPlan(lora_rank=None, precision="float16"), DiskPlan(), processes=4)
    device = _with_room(sum(_parts(full.step, processes=4).values()) - 1000)
    _, changed = first_that_fits(full, device, lambda _: _counts())
    assert changed.strategy == "FSDP2" and changed.step.precision == "bfloat16" and changed.step.has_reference
    drawing = dataclasses.replace(full, grid_samples=5)
    assert first_that_fits(drawing, device, lambda _: _counts())[1].strategy == "DDP"
    old = dataclasses.replace(device, has_bfloat16=False)
    assert first_that_fits(full, old, lambda _: _counts())[1].strategy == "DDP"


@pytest.mark.parametrize("name", ["a100-80gb", "H100", "nvidia T4", "rtx 4090", "L4-24GB"])
def test_gpus_are_found_by_their_names(name):
    assert find_gpu(name).name.casefold().startswith(name.casefold().replace(" ", "-").removeprefix("nvidia-"))


@pytest.mark.parametrize(("name", "message"), [("A100", "Several GPUs"), ("GTX", "known are A100-40GB, ")])
def test_gpus_of_no_or_many_such_names(name, message):
    with pytest.raises(ConfigurationError, match=message):
        find_gpu(name)


# ------------------------------------------------------------------------------------------------- configuration files


def _kinds():
    """The first tiny pipeline of each class."""
    return list({case.name.split("-")[0]: case for case in reversed(BACKBONES)}.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", _kinds(), ids=lambda case: case.name)
def test_every_backbone_is_counted_from_its_configuration(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    frames = case.media_shape[1] if len(case.media_shape) == 4 else 1
    model = find_model(str(tmp_path), (*case.media_shape[-2:], frames))
    counts = count(model, StepPlan(lora_rank=2, encodes=True, holds_encoders=True))
    assert min(counts.trained, counts.first_peak, counts.vae_peak, counts.conditioning, counts.latents) > 0
