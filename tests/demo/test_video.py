# SPDX-License-Identifier: Apache-2.0
"""The clips of the video demo: sprites, judges, the tiny Wan pipeline, and pairs."""

import pytest
import torch
from diffusers import WanPipeline

from trl_sipo.adapters import adapter_for
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.demo.video import sprites
from trl_sipo.demo.video.clips import CLIPS
from trl_sipo.demo.video.coding import decode_many, encode_many, sample_clips
from trl_sipo.demo.video.model import VIDEO_ASSETS, build_tokenizer, build_video_pipeline, load_video_pipeline
from trl_sipo.demo.video.pairs import FEATURES, off_policy_pairs, on_policy_pairs, spoil_one_attribute
from trl_sipo.demo.video.verifier import close_ups, judge_clips, moves_towards, velocities
from trl_sipo.demo.video.verifier_training import clip_accuracies, spoil_latents
from trl_sipo.errors import BackboneError


@pytest.fixture(scope="module")
def pipeline():
    return load_video_pipeline()


@pytest.fixture(scope="module")
def primary():
    return load_verifiers(VIDEO_ASSETS / "verifier")[0]


@pytest.fixture(scope="module")
def real():
    """Clips of test photographs, and their ids."""
    return sprites.random_clips(sprites.moving_photographs("test"), 200, torch.Generator().manual_seed(0))


def square_at(places: list[tuple[float, float]]) -> torch.Tensor:
    """One clip of a black square, centred at these (x, y)."""
    picture = torch.ones(1, 3, 32, 32)
    picture[:, :, 4:28, 4:28] = -1
    frames = sprites.place(picture.expand(len(places), 3, 32, 32), torch.tensor(places), 0.3)
    return frames.transpose(0, 1)[None]


def test_prompts_say_what_moves_and_where_to():
    prompts = sprites.all_video_prompts()
    assert len({prompt.text for prompt in prompts}) == 64
    assert prompts[0].text == "a red t-shirt moving left"
    assert "green trousers moving down" in {prompt.text for prompt in prompts}


def test_prompt_split_is_a_partition_that_covers_each_attribute_evenly():
    train, held_out = sprites.split_video_prompts()
    assert set(train) | set(held_out) == set(sprites.all_video_prompts())
    assert not set(train) & set(held_out)
    for column, count in zip(sprites.prompt_ids(held_out).T, (4, 4, 4), strict=True):
        assert column.unique(return_counts=True)[1].tolist() == [count] * 4


def test_clips_are_whole_sprites_on_white_that_repeat_with_the_seed(real):
    clips, ids = real
    assert clips.shape == (200, 3, 5, 32, 32) and ids.shape == (200, 3)
    assert clips.min() >= -1 - 1e-5 and clips.max() <= 1 + 1e-5
    edges = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., :, 0], clips[..., :, -1]], dim=-1)
    assert (edges > 0.9).float().mean() > 0.99
    again, _ = sprites.random_clips(sprites.moving_photographs("test"), 200, torch.Generator().manual_seed(0))
    assert torch.equal(clips, again)


def test_velocity_is_that_of_the_path():
    clips = square_at([(-5.0 + 2 * i, 3.0 - 0.5 * i) for i in range(5)])
    assert torch.allclose(velocities(clips), torch.tensor([[2.0, -0.5]]), atol=0.02)


@pytest.mark.parametrize(
    ("step", "moves"),
    [((-2.0, 0.0), True), ((-2.0, 0.8), True), ((2.0, 0.0), False), ((-1.5, 1.5), False), ((-0.3, 0.0), False)],
)
def test_a_clip_moves_left_when_it_does_and_not_when_it_stands_or_goes_askew(step, moves):
    clips = square_at([((i - 2) * step[0], (i - 2) * step[1]) for i in range(5)])
    assert moves_towards(clips, torch.tensor([0])).item() is moves


def test_directions_of_real_clips_are_always_found_even_under_noise(real):
    clips, ids = real
    noisy = clips + 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    for shown in (clips, noisy):
        assert moves_towards(shown, ids[:, 2]).all()
        assert not moves_towards(shown, (ids[:, 2] + 1) % 4).any()


def test_close_ups_hold_a_sprite_still_and_enlarge_it():
    frames = close_ups(square_at([(-6.0, 4.0), (0.0, 0.0), (6.0, -4.0)]))
    assert frames.shape == (3, 3, 32, 32)
    assert (frames[0] - frames[1]).abs().mean() < 0.05
    assert (frames[2] - frames[1]).abs().mean() < 0.05
    # A square of 7.2 pixels becomes one of 10.3.
    assert ((1 - frames[1, 0]) / 2).sum().item() == pytest.approx((7.2 / 0.7) ** 2, rel=0.15)


@pytest.mark.parametrize("index", [0, 1])
def test_shipped_judges_recognise_real_clips_and_reconstructions_and_nothing_else(pipeline, real, index):
    clips, ids = real
    judge, adapter = load_verifiers(VIDEO_ASSETS / "verifier")[index], adapter_for(pipeline)
    latents = encode_many(adapter, clips)
    for shown in (clips, decode_many(adapter, latents)):
        assert clip_accuracies(judge, shown, ids)["all"] >= 0.9
    for column, name in enumerate(("class", "colour", "direction")):
        wrong = ids.clone()
        wrong[:, column] = ids.roll(1, 0)[:, column]
        differs = wrong[:, column] != ids[:, column]
        judged = judge_clips(judge, clips[differs], wrong[differs])
        assert judged[f"{name}_correct"].float().mean() < 0.1
        right = judge_clips(judge, clips[differs], ids[differs])
        assert judged["log_prob"].mean() < right["log_prob"].mean() - 2
    spoiled = decode_many(adapter, spoil_latents(latents, torch.Generator().manual_seed(0)))
    assert judge_clips(judge, spoiled, ids)["class_correct"].float().mean() < 0.25


def test_every_word_of_a_prompt_is_one_token_and_others_are_spelled():
    tokenizer = build_tokenizer()
    encoded = [tokenizer(prompt.text).input_ids for prompt in sprites.all_video_prompts()]
    assert len({tuple(ids) for ids in encoded}) == 64
    for prompt, ids in zip(sprites.all_video_prompts(), encoded, strict=True):
        assert len(ids) == len(prompt.text.split()) + 1
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(tokenizer("2 odd zebras").input_ids)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (build_video_pipeline(seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name in ("transformer", "vae", "text_encoder"):
        weights, same, different = (list(getattr(p, name).parameters()) for p in (first, again, other))
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(weights, different, strict=True))


def test_shipped_pipeline_is_a_small_wan_with_the_sampler_of_480p(pipeline):
    assert sum(file.stat().st_size for file in VIDEO_ASSETS.rglob("*") if file.is_file()) <= 5_000_000
    assert isinstance(pipeline, WanPipeline)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    expected = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert expected.items() <= dict(pipeline.scheduler.config).items()


def test_shipped_pipeline_draws_what_it_is_asked_for(pipeline, primary):
    prompts = sprites.all_video_prompts()
    clips = sample_clips(pipeline, [prompt.text for prompt in prompts], seed=0, num_inference_steps=10)
    assert judge_clips(primary, clips, sprites.prompt_ids(prompts))["correct"].float().mean() >= 0.75


def test_samples_do_not_depend_on_the_batch_size_and_do_on_seed_and_prompt(pipeline):
    texts = [prompt.text for prompt in sprites.all_video_prompts()[:5]]
    together = sample_clips(pipeline, texts, seed=5, num_inference_steps=2)
    assert together.shape == (5, 3, 5, 32, 32)
    apart = sample_clips(pipeline, texts, seed=5, num_inference_steps=2, batch_size=2)
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together, sample_clips(pipeline, texts, seed=6, num_inference_steps=2), atol=1e-2)
    assert not torch.allclose(together, sample_clips(pipeline, texts[::-1], seed=5, num_inference_steps=2), atol=1e-2)


def test_missing_pipeline_names_the_folder_and_the_way_out(tmp_path):
    with pytest.raises(BackboneError, match=r"video\.pretrain"):
        load_video_pipeline(tmp_path)


def test_a_spoiled_prompt_is_wrong_in_one_attribute():
    ids = sprites.prompt_ids(sprites.all_video_prompts() * 10)
    spoiled = spoil_one_attribute(ids, torch.Generator().manual_seed(0))
    assert ((spoiled != ids).sum(1) == 1).all()
    assert (spoiled != ids).float().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert torch.isin(spoiled[:, 0], torch.tensor(sprites.MOVING_CLASSES)).all()
    assert torch.isin(spoiled[:, 1], torch.tensor(sprites.MOVING_COLOURS)).all()


def test_off_policy_pairs_show_the_prompt_against_something_else(pipeline, primary):
    adapter, prompts = adapter_for(pipeline), sprites.split_video_prompts()[0]
    pairs = off_policy_pairs(adapter, primary, prompts, pairs_per_prompt=1, seed=0)
    assert pairs.features == FEATURES
    assert len(pairs) > 0.8 * len(prompts)
    ids = sprites.prompt_ids([{p.text: p for p in prompts}[text] for text in pairs["prompt"]])
    chosen, rejected = (
        judge_clips(primary, decode_many(adapter, torch.tensor(pairs[f"{arm}_latents"])), ids)
        for arm in ("chosen", "rejected")
    )
    # After the autoencoder, which has never seen turned photographs.
    assert chosen["correct"].float().mean() > 0.8
    assert rejected["correct"].float().mean() < 0.1


def test_on_policy_pairs_are_ranked_by_the_verifier_and_repeatable(pipeline, primary):
    adapter, prompts = adapter_for(pipeline), sprites.split_video_prompts()[0][:3]
    options = {"groups_per_prompt": 2, "samples_per_group": 3, "num_inference_steps": 2, "min_gap": 0.0, "seed": 1}
    pairs = on_policy_pairs(adapter, primary, prompts, **options)
    assert pairs["prompt"] == [prompt.text for prompt in prompts for _ in range(2)]
    again = on_policy_pairs(adapter, primary, prompts, **options)
    assert torch.equal(torch.tensor(pairs["chosen_latents"]), torch.tensor(again["chosen_latents"]))
    ids = sprites.prompt_ids([prompt for prompt in prompts for _ in range(2)])
    chosen, rejected = (
        judge_clips(primary, decode_many(adapter, torch.tensor(pairs[f"{arm}_latents"])), ids)["log_prob"]
        for arm in ("chosen", "rejected")
    )
    assert (chosen > rejected).float().mean() > 0.8  # after the autoencoder, so not all of them


def test_the_sample_sheet_shows_every_attribute_evenly():
    shown = [sprites.all_video_prompts()[row] for row in CLIPS.sheet_rows()]
    for column in sprites.prompt_ids(shown).T:
        assert column.unique(return_counts=True)[1].tolist() == [2] * 4
    sample = torch.zeros(3, 5, 32, 32, dtype=torch.uint8)
    sample[0, 4] = 255
    picture = CLIPS.picture(sample)
    assert picture.size == (5 * 32, 32)
    assert picture.getpixel((4 * 32 + 1, 5)) == (255, 0, 0) and picture.getpixel((1, 5)) == (0, 0, 0)
