# SPDX-License-Identifier: Apache-2.0
"""Training from a cache is training from the images, without VAE and text encoders."""

import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from tests.adapters.backbone_cases import BACKBONES, BackboneCase
from tests.data.clips import write_frames
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded, saved
from tests.trainer.media import pairs_for
from tests.trainer.resuming import differences, end_of
from tests.trainer.runs import PROMPTS, Method, changed, collate_first, logged, picture, snapshot, trained_weights
from trl_sipo import DiffusionKTOConfig, DiffusionKTOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_sipo.adapters import adapter_for, load_pipeline
from trl_sipo.adapters.weightless import ENCODER_NAMES
from trl_sipo.data.cache.buckets import BucketSampler
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.encoding import pair_generators

SFT = Method("sft", DiffusionSFTTrainer, DiffusionSFTConfig)
KTO = Method("kto", DiffusionKTOTrainer, DiffusionKTOConfig)
FLOAT32 = ("--dtype", "float32")
CPU = torch.device("cpu")


def _case(name: str) -> BackboneCase:
    return next(case for case in BACKBONES if case.name.split("-")[0] == name)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Encoded in float32, with the posterior's deviation."""
    encoded = saved(_case("sd"), tmp_path_factory.mktemp("sd"))
    encoded.encode(*FLOAT32, "--posterior_std")
    return encoded


# One of each kind: one text encoder; several and pooled; prompts trimmed and masked; video with a frame rate.
@pytest.mark.parametrize("name", ["sd", "sd3", "qwenimage", "ltx", "wan21"])
def test_the_losses_are_those_of_the_images(name, tmp_path):
    encoded = saved(_case(name), tmp_path)
    cache = encoded.encode(*FLOAT32)
    # With a plain denoising term and a beta of 1, the loss is as exact as the errors are.
    options = {"caption_dropout": 0.5, "max_steps": 3, "optim": "sgd", "beta": 1.0, "sft_weight": 1.0}
    images = encoded.trainer(tmp_path / "images", encoded.pairs, **options)
    cached = encoded.trainer(tmp_path / "cached", cache, **options)
    assert images.adapter.has_encoders and not cached.adapter.has_encoders
    one, other = (trainer._encoder(collate_first(trainer), CPU, [], training=False) for trainer in (images, cached))
    torch.testing.assert_close(other.latents, one.latents, rtol=0, atol=1e-6)
    assert other.conditioning.keys() == one.conditioning.keys()
    for key, value in one.conditioning.items():
        torch.testing.assert_close(other.conditioning[key], value, rtol=0, atol=1e-6)
    assert (other.frame_rate is None) == (one.frame_rate is None)
    for trainer in (images, cached):
        trainer.train()
    assert logged(cached, "loss") == pytest.approx(logged(images, "loss"), abs=1e-6)
    trained, expected = trained_weights(cached), trained_weights(images)
    for weight in expected:
        torch.testing.assert_close(trained[weight], expected[weight], rtol=0, atol=1e-6)


def test_workers_read_what_the_process_itself_reads(stable_diffusion, tmp_path):
    runs = [
        stable_diffusion.trainer(tmp_path / str(workers), stable_diffusion.cache, dataloader_num_workers=workers)
        for workers in (0, 2)
    ]
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


def test_a_sample_of_the_stored_posterior_is_that_of_the_vae(stable_diffusion, tmp_path):
    encoded = stable_diffusion
    trainers = [
        encoded.trainer(tmp_path / data.name, data, sample_posterior=True) for data in (encoded.pairs, encoded.cache)
    ]
    one, other = (
        trainer._encoder(collate_first(trainer), CPU, pair_generators(torch.arange(4), 0), training=True)
        for trainer in trainers
    )
    torch.testing.assert_close(other.latents, one.latents, rtol=0, atol=1e-5)
    mean = trainers[1]._encoder(collate_first(trainers[1]), CPU, [], training=False)
    assert (mean.latents - one.latents).abs().max() > 1e-3


def test_encoders_are_never_loaded(stable_diffusion, tmp_path, monkeypatch):
    """Their weights are not even there, and still the adapter knows what their configuration says."""
    model = tmp_path / "model"
    shutil.copytree(stable_diffusion.model, model, ignore=shutil.ignore_patterns("vae*", "text_encoder*"))
    for part in ("vae", "text_encoder"):
        (model / part).mkdir()
        shutil.copy(stable_diffusion.model / part / "config.json", model / part)
    pipeline = load_pipeline(model, weightless=ENCODER_NAMES)
    assert pipeline.vae.device.type == pipeline.text_encoder.device.type == "meta"
    assert adapter_for(pipeline).latent_shape(32, 32) == (4, 8, 8)
    assert [module for module in adapter_for(pipeline).frozen_modules()] == []


@pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)
def test_every_backbone_trains_without_its_encoders(case, tmp_path):
    encoded = saved(case, tmp_path, count=2)
    trainer = encoded.trainer(tmp_path / "run", encoded.encode(), caption_dropout=0.5, max_steps=1)
    assert not trainer.adapter.has_encoders and not trainer.adapter.frozen_modules()
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])
    trainer.save_model()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_saved_pipeline_has_the_encoders_of_its_source(stable_diffusion, tmp_path):
    trainer = stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, is_lora=False)
    trainer.train()
    trainer.save_model()
    loaded = load_pipeline(tmp_path / "run")
    assert not changed(snapshot(trainer.model), snapshot(loaded.unet))
    original = load_pipeline(stable_diffusion.model)
    assert changed(snapshot(original.unet), snapshot(loaded.unet))
    for part in ("vae", "text_encoder"):
        assert not changed(snapshot(getattr(original, part)), snapshot(getattr(loaded, part)))
    # What was trained from the cache has its encoders, and so may be trained from it further.
    stable_diffusion.trainer(tmp_path / "again", stable_diffusion.cache, model=str(tmp_path / "run"))


def test_weights_of_a_variant_are_copied_under_their_plain_name(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", variant="fp16")
    pairs_for(_case("sd"), tmp_path, 4).to_parquet(tmp_path / "pairs.parquet")
    encoded = Encoded(tmp_path / "model", tmp_path / "pairs.parquet", tmp_path / "cache", _case("sd").size)
    options = {"is_lora": False, "model_init_kwargs": {"variant": "fp16"}}
    trainer = encoded.trainer(tmp_path / "run", encoded.encode("--variant", "fp16"), **options)
    trainer.save_model()
    assert not changed(snapshot(tiny_stable_diffusion().vae), snapshot(load_pipeline(tmp_path / "run").vae))


def test_without_a_local_source_the_denoiser_is_saved_alone_and_a_warning_says_so(stable_diffusion, tmp_path, caplog):
    trainer = stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, is_lora=False)
    trainer.adapter.pipeline.register_to_config(_name_or_path="org/model")
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert "unet=UNet2DConditionModel.from_pretrained" in caplog.text and "org/model" in caplog.text
    assert (tmp_path / "run" / "unet").is_dir() and not (tmp_path / "run" / "model_index.json").exists()


def test_sample_grids_load_the_encoders_after_all(stable_diffusion, tmp_path):
    options = {"sample_prompts": ["a red cat"], "sample_every_steps": 1, "sample_num_inference_steps": 1}
    trainer = stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, **options)
    trainer.train()
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_held_out_pairs_may_be_a_cache_too(stable_diffusion, tmp_path):
    trainer = stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache)
    metrics = trainer.evaluate(CachedPairs(stable_diffusion.cache))
    expected = stable_diffusion.trainer(tmp_path / "images", stable_diffusion.pairs)
    assert metrics["eval_loss"] == pytest.approx(
        expected.evaluate(load_preference_dataset(stable_diffusion.pairs))["eval_loss"], abs=1e-6
    )
    with pytest.raises(ConfigurationError, match="not encoded, and the VAE and the text encoders were not loaded"):
        trainer.evaluate(load_preference_dataset(stable_diffusion.pairs))


def test_a_precomputed_reference_works_from_a_cache(stable_diffusion, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.reference_folder", lambda: tmp_path / "banks")
    options = {"precompute_ref_log_probs": True, "num_ref_draws": 2}
    trainers = [
        stable_diffusion.trainer(tmp_path / data.name, data, **options)
        for data in (stable_diffusion.pairs, stable_diffusion.cache)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "loss") == pytest.approx(logged(trainers[1], "loss"), abs=1e-3)


def test_predictions_of_a_reference_are_stored_for_a_cache(stable_diffusion, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.reference_folder", lambda: tmp_path / "banks")
    options = {"proximal_kappa": 0.5, "precompute_ref_log_probs": True, "precompute_ref_predictions": True}
    trainer = stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, num_ref_draws=1, **options)
    trainer.train()
    assert trainer.reference.train.predictions.shape == (4, 8, 8)
    terms = logged(trainer, "proximal/loss")
    assert terms[0] == pytest.approx(0, abs=1e-6) and terms[-1] > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": [16, 16]}, r"encoded with resolution \(32, 32\), but `resolution` is \(16, 16\)"),
        ({"random_flip": True}, "random_flip=True would have no effect"),
        ({"precompute_latents": True}, "a cache of latents already"),
        ({"soft_labels": True}, "encoded with soft_labels False"),
    ],
)
def test_settings_that_contradict_the_cache_are_refused(options, message, stable_diffusion, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        stable_diffusion.trainer(tmp_path, stable_diffusion.cache, **options)


def test_the_posterior_is_not_sampled_where_only_its_mean_is_stored(tmp_path):
    encoded = saved(_case("sd"), tmp_path, count=2)
    with pytest.raises(ConfigurationError, match="--posterior_std"):
        encoded.trainer(tmp_path / "run", encoded.encode(), sample_posterior=True)


def test_another_model_is_refused(stable_diffusion, tmp_path):
    tiny_stable_diffusion(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="was made with .*/model .*but the model in training is .*/other"):
        stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, model=str(tmp_path / "other"))
    _case("sd3").build().save_pretrained(tmp_path / "sd3")
    with pytest.raises(ConfigurationError, match="StableDiffusion3Pipeline"):
        stable_diffusion.trainer(tmp_path / "run", stable_diffusion.cache, model=str(tmp_path / "sd3"))


_SQUARE = {"height": 32, "width": 32, "num_frames": 1}


def _pairs_of_shapes(count: int) -> datasets.Dataset:
    """In turns wide, high and square pairs, and ones whose arms differ."""
    sizes = [((80, 48), (80, 48)), ((48, 80), (48, 80)), ((64, 64), (64, 64)), ((80, 48), (64, 64))]
    arms = [[picture(2 * i + arm).resize(sizes[i % 4][arm]) for i in range(count)] for arm in (0, 1)]
    prompts = [PROMPTS[i % 4] for i in range(count)]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": arms[0], "rejected": arms[1]})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pairs of three shapes, and pairs whose arms differ in theirs, in buckets."""
    folder = tmp_path_factory.mktemp("shapes")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    _pairs_of_shapes(14).to_parquet(folder / "pairs.parquet")
    encoded = Encoded(folder / "model", folder / "pairs.parquet", folder / "cache", _SQUARE)
    encoded.encode(*FLOAT32, "--buckets")
    return encoded


def test_each_arm_is_encoded_in_its_own_bucket(shapes):
    pairs = CachedPairs(shapes.cache)
    found = [tuple(pairs[i][f"{arm}_latents"].shape[1:] for arm in ("chosen", "rejected")) for i in range(4)]
    assert found == [((6, 10), (6, 10)), ((10, 6), (10, 6)), ((8, 8), (8, 8)), ((6, 10), (8, 8))]
    assert pairs.num_buckets == 4 and all(pairs[i]["prompt"] == PROMPTS[i % 4] for i in range(14))
    expected = adapter_for(tiny_stable_diffusion())
    wide = PairedTransform((24, 40)).centred(load_preference_dataset(shapes.pairs)[12]["chosen"])
    torch.testing.assert_close(pairs[12]["chosen_latents"], expected.encode_media(wide[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [SFT, KTO], ids=lambda method: method.name)
def test_arms_of_several_shapes_are_not_taken_apart(method, shapes, tmp_path):
    with pytest.raises(ConfigurationError, match="4 pairs of shapes, whose arms cannot be batched apart"):
        shapes.trainer(tmp_path, shapes.cache, method=method)


def test_batches_of_one_shape_train_and_resume(shapes, tmp_path):
    """A run that is resumed in the middle of an epoch ends where one without a break does, to the bit."""
    options = {"per_device_train_batch_size": 2, "max_steps": 12, "caption_dropout": 0.2, "logging_steps": 3}
    whole = shapes.trainer(tmp_path / "whole", shapes.cache, **options)
    seen = []
    step = whole._training_loss
    whole._training_loss = lambda model, inputs: (seen.append(inputs), step(model, inputs))[1]
    whole.train()
    assert len({(i["chosen_latents"].shape, i["rejected_latents"].shape) for i in seen}) == 4
    epoch = len(whole.get_train_dataloader())
    assert epoch == 8 and {int(k) for i in seen[:epoch] for k in i["pair_index"]} == set(range(14))
    saving = {**options, "save_strategy": "steps", "save_steps": 5}
    shapes.trainer(tmp_path / "part", shapes.cache, **{**saving, "max_steps": 5}).train()
    resumed = shapes.trainer(tmp_path / "part", shapes.cache, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-5"))
    assert differences(end_of(whole), end_of(resumed)) == []


def test_two_processes_take_batches_of_one_shape(shapes):
    """As accelerate shares a sampler's batches out."""
    pairs = CachedPairs(shapes.cache)
    sampler = BucketSampler(pairs.index.bucket, 2, 0, pairs.epoch)
    batches = BatchSampler(sampler, 2, drop_last=False)
    shares = [list(BatchSamplerShard(batches, num_processes=3, process_index=rank)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    for batch in sum(shares, []):
        assert len(batch) == 2 and len({int(pairs.index.bucket[index]) for index in batch}) == 1
    assert {index for share in shares for batch in share for index in batch} == set(range(14))


def test_evaluation_of_several_shapes_takes_pairs_one_by_one(shapes, tmp_path):
    trainer = shapes.trainer(tmp_path / "run", shapes.cache, per_device_eval_batch_size=1)
    assert math.isfinite(trainer.evaluate(CachedPairs(shapes.cache))["eval_loss"])
    trainer = shapes.trainer(tmp_path / "run", shapes.cache)
    with pytest.raises(ConfigurationError, match="4 pairs of shapes.*`per_device_eval_batch_size=1`"):
        trainer.evaluate(CachedPairs(shapes.cache))
    with pytest.raises(ConfigurationError, match="`precompute_ref_batch_size=1`"):
        shapes.trainer(tmp_path / "run", shapes.cache, precompute_ref_log_probs=True)
    with pytest.raises(ConfigurationError, match="train_sampling_strategy='sequential'"):
        shapes.trainer(tmp_path / "run", shapes.cache, train_sampling_strategy="sequential").train()


def test_evaluation_and_a_precomputed_reference_have_batch_sizes_of_their_own(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.reference_folder", lambda: tmp_path / "banks")
    # Of a reference that is not precomputed, no batch size matters.
    trainer = shapes.trainer(tmp_path / "run", shapes.cache, per_device_eval_batch_size=1, precompute_ref_batch_size=4)
    assert math.isfinite(trainer.evaluate(CachedPairs(shapes.cache))["eval_loss"])
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1, "num_ref_draws": 1}
    with pytest.raises(ConfigurationError, match="the train cache has arms of .* Encode it without `--buckets`"):
        shapes.trainer(tmp_path, shapes.cache, proximal_kappa=0.5, precompute_ref_predictions=True, **options)
    trainer = shapes.trainer(tmp_path / "run", shapes.cache, **options)
    with pytest.raises(ConfigurationError, match="The eval cache .* set `per_device_eval_batch_size=1`."):
        trainer.evaluate(CachedPairs(shapes.cache))


def test_the_order_of_batches_follows_the_datas_own_seed(shapes, tmp_path):
    orders = []
    for data_seed in (0, None):
        trainer = shapes.trainer(tmp_path / "run", shapes.cache, per_device_train_batch_size=2, data_seed=data_seed)
        orders.append(list(trainer._get_train_sampler()))
    expected = BucketSampler(CachedPairs(shapes.cache).index.bucket, 2, 0, trainer.train_dataset.epoch)
    assert orders[0] == list(expected) != orders[1]


def test_videos_of_different_lengths_train_together(tmp_path):
    """Each arm takes the most frames that it has; a pair's arms may differ."""
    case = _case("ltx")
    case.build().save_pretrained(tmp_path / "model")
    height, width = case.size["height"], case.size["width"]
    frames = [[9, 17], [20, 9], [17, 30], [10, 16]]
    arms = [
        [
            str(write_frames(tmp_path / f"{i}{k}.mp4", [picture(i + k, width).resize((width, height))] * n, rate=12))
            for i, n in enumerate(lengths)
        ]
        for k, lengths in enumerate(zip(*frames, strict=True))
    ]
    rows = datasets.Dataset.from_dict({"prompt": list(PROMPTS), "chosen": arms[0], "rejected": arms[1]})
    rows.to_parquet(tmp_path / "pairs.parquet")
    encoded = Encoded(tmp_path / "model", tmp_path / "pairs.parquet", tmp_path / "cache", case.size)
    pairs = CachedPairs(encoded.encode("--frame_buckets", 17))
    shapes = [tuple(pairs[i][f"{arm}_latents"].shape[1] for arm in ("chosen", "rejected")) for i in range(4)]
    assert shapes == [(2, 3), (3, 2), (3, 3), (2, 2)] and all(pairs[i]["frame_rate"] == 12 for i in range(4))
    trainer = encoded.trainer(tmp_path / "run", encoded.cache, per_device_train_batch_size=1, max_steps=4)
    trainer.train()
    assert len(logged(trainer, "loss")) == 4 and all(map(math.isfinite, logged(trainer, "loss")))


@pytest.mark.slow
def test_processes_that_see_other_shapes_train_one_model(tmp_path):
    """One calls the model twice, for arms of two shapes, while another calls it once; and the model has buffers."""
    _case("sd3").build().save_pretrained(tmp_path / "model")
    encoded = Encoded(tmp_path / "model", tmp_path / "pairs.parquet", tmp_path / "cache", _SQUARE)
    _pairs_of_shapes(16).to_parquet(encoded.pairs)
    encoded.encode("--buckets")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("cached_distributed_run.py"))
    root = str(Path(__file__).resolve().parents[2])
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [*launcher, script, str(encoded.model), str(encoded.cache), str(tmp_path / "run")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    one, other = (torch.load(tmp_path / "run" / f"result-{rank}.pt", weights_only=False) for rank in range(2))
    calls = [(len(set(mine)), len(set(theirs))) for mine, theirs in zip(one["shapes"], other["shapes"], strict=True)]
    assert len(calls) == 16 and any(mine != theirs for mine, theirs in calls)
    assert not changed(one["weights"], other["weights"]) and all(map(math.isfinite, one["loss"]))
