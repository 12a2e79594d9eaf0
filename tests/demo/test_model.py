# SPDX-License-Identifier: Apache-2.0
"""The tiny pipeline: its tokenizer, its determinism, its way through the disk, and the shipped weights."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from trl_sipo.demo import model
from trl_sipo.demo.fashion import all_prompts
from trl_sipo.demo.sampling import prompt_ids, sample_images
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.errors import BackboneError


def test_every_word_of_a_prompt_is_one_token_and_prompts_stay_apart():
    tokenizer = model.build_tokenizer()
    for word in model.WORDS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids[1:-1]) == [f"{word}</w>"]
    encoded = {tuple(tokenizer(prompt.text).input_ids) for prompt in all_prompts()}
    assert len(encoded) == 64
    assert max(map(len, encoded)) <= 8


def test_tokenizer_spells_other_words_without_unknown_tokens():
    tokenizer = model.build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("2 odd zebras").input_ids)
    assert tokens[0] == model.START_TOKEN
    assert "".join(tokens[1:-1]) == "2</w>odd</w>zebras</w>"


def test_merging_words_leaves_earlier_words_whole():
    # Each word holds the start or the middle of another one.
    words = ("red", "dress", "re", "ess", "dressed", "an", "orange", "range")
    ranks = {pair: rank for rank, pair in enumerate(model.word_merges(words))}
    for word in words:
        assert model.merge_word([*word[:-1], word[-1] + "</w>"], ranks) == [word + "</w>"]


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = model.build_pipeline(1), model.build_pipeline(1), model.build_pipeline(2)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("unet", "vae", "text_encoder"):
        weights, same, different = (list(getattr(p, name).parameters()) for p in (first, again, other))
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(weights, different, strict=True))


def test_pipeline_round_trips_through_the_disk_and_samples(tmp_path):
    pipeline = model.build_pipeline(0)
    pipeline.save_pretrained(tmp_path)
    loaded = model.load_pipeline_assets(tmp_path)
    assert isinstance(loaded, StableDiffusionPipeline)
    texts = [prompt.text for prompt in all_prompts()[:3]]
    images = sample_images(pipeline, texts, seed=5, num_inference_steps=2)
    assert images.shape == (3, 3, 32, 32)
    assert torch.allclose(images, sample_images(loaded, texts, seed=5, num_inference_steps=2), atol=1e-5)


def test_samples_do_not_depend_on_the_batch_size_and_do_on_seed_and_prompt():
    pipeline = model.build_pipeline(0)
    texts = [prompt.text for prompt in all_prompts()[:5]]
    together = sample_images(pipeline, texts, seed=5, num_inference_steps=2)
    apart = sample_images(pipeline, texts, seed=5, num_inference_steps=2, batch_size=2)
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together, sample_images(pipeline, texts, seed=6, num_inference_steps=2), atol=1e-2)
    assert not torch.allclose(together, sample_images(pipeline, texts[::-1], seed=5, num_inference_steps=2), atol=1e-6)


def test_missing_pipeline_names_the_folder_and_the_way_out(tmp_path):
    with pytest.raises(BackboneError, match="pretrain"):
        model.load_pipeline_assets(tmp_path)


def test_shipped_pipeline_is_small_and_in_the_noise_schedule_of_stable_diffusion():
    files = [file for file in model.PIPELINE_ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    pipeline = model.load_pipeline_assets()
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    expected |= {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon"}
    assert expected.items() <= dict(pipeline.scheduler.config).items()


def test_shipped_pipeline_draws_what_it_is_asked_for():
    prompts = all_prompts()
    images = sample_images(model.load_pipeline_assets(), [prompt.text for prompt in prompts], seed=0)
    for verifier, floor in zip(load_verifiers(), (0.8, 0.7), strict=True):
        assert verifier.scores(images, *prompt_ids(prompts))["both_correct"].float().mean() >= floor
