# SPDX-License-Identifier: Apache-2.0
"""The two judges: their interface, and how good the shipped ones are on photographs nobody was trained on."""

import pytest
import torch

from trl_sipo.demo import verifier as verifier_module
from trl_sipo.demo.fashion import CLASSES, colour_values, load_split, tint, turn
from trl_sipo.demo.model import build_pipeline, load_pipeline_assets
from trl_sipo.demo.verifier import NONE_CLASS, TRAINING_SPLITS, Verifier, load_verifiers, save_verifier
from trl_sipo.demo.verifier_training import OUTLINE_GROUPS, accuracies, ceiling, spoil, train_verifier
from trl_sipo.errors import BackboneError


def test_scores_are_the_log_probabilities_of_what_was_asked(monkeypatch):
    monkeypatch.setattr(verifier_module, "SCORING_BATCH", 2)
    judge = Verifier("second").eval()
    images = 2 * torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    class_ids, colour_ids = torch.tensor([0, 1, 2, 3, 7]), torch.tensor([7, 0, 1, 2, 3])
    scores = judge.scores(images, class_ids, colour_ids)
    with torch.no_grad():
        class_probs, colour_probs = (logits.softmax(1) for logits in judge(images))
    rows = torch.arange(5)
    expected = (class_probs[rows, class_ids] * colour_probs[rows, colour_ids]).log()
    assert torch.allclose(scores["log_prob"], expected, atol=1e-5)
    assert torch.equal(scores["class_correct"], class_probs.argmax(1) == class_ids)
    assert torch.equal(scores["both_correct"], scores["class_correct"] & scores["colour_correct"])
    assert judge.features(images).shape == (5, 80)


def test_the_judges_share_neither_photographs_nor_architecture():
    assert len(set(TRAINING_SPLITS.values())) == len(TRAINING_SPLITS) == 2
    assert "generator" not in TRAINING_SPLITS.values()
    shapes = [{tuple(weight.shape) for weight in Verifier(name).class_trunk.parameters()} for name in TRAINING_SPLITS]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize("name", TRAINING_SPLITS)
def test_a_saved_judge_loads_as_it_was(name, tmp_path):
    judges = [Verifier(other).eval() for other in TRAINING_SPLITS]
    for judge in judges:
        save_verifier(judge, tmp_path)
    loaded = dict(zip(TRAINING_SPLITS, load_verifiers(tmp_path), strict=True))[name]
    original = dict(zip(TRAINING_SPLITS, judges, strict=True))[name]
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded.features(images), original.features(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_missing_judge_names_the_file(tmp_path):
    with pytest.raises(BackboneError, match=r"primary\.safetensors"):
        load_verifiers(tmp_path)


def test_double_exposures_join_unlike_outlines_only():
    # Constant latents tell which photographs went into a blend.
    class_ids = torch.arange(len(CLASSES)).repeat(25)
    latents = (10.0 ** torch.tensor(OUTLINE_GROUPS).float())[class_ids][:, None, None, None].expand(-1, 4, 8, 8)
    blends = spoil(latents, class_ids, torch.Generator().manual_seed(0))[:30, 0, 0, 0]
    pure = {10.0**group for group in OUTLINE_GROUPS}
    assert len(blends) == 30
    assert not any(value.item() in pure for value in blends)


def test_training_teaches_a_judge_most_classes_within_a_few_steps(few_photographs):
    judge, _ = train_verifier("primary", build_pipeline(0).vae, num_steps=40, seed=0, device="cpu")
    split = load_split("test")
    colour_ids = torch.arange(len(split)) % 8
    images = tint(split.images, colour_values(colour_ids, None))
    assert accuracies(judge, images, split.class_ids, colour_ids)["class"] > 0.5


@pytest.mark.parametrize(("index", "floor"), [(0, 0.9), (1, 0.87)])
def test_shipped_judges_recognise_real_photographs_and_reconstructions(index, floor):
    judge, vae = load_verifiers()[index], load_pipeline_assets().vae
    result = ceiling(judge, vae, seed=7, device="cpu")
    for kind in ("real", "reconstructed"):
        assert result[kind]["both"] >= floor
        assert result[kind]["both"] <= min(result[kind]["class"], result[kind]["colour"])


def test_shipped_judges_do_not_mark_down_turned_photographs():
    split = load_split("test")
    colour_ids = torch.arange(len(split)) % 8
    generator = torch.Generator().manual_seed(1)
    images = turn(tint(split.images, colour_values(colour_ids, generator)), generator)
    for judge, floor in zip(load_verifiers(), (0.87, 0.84), strict=True):
        assert accuracies(judge, images, split.class_ids, colour_ids)["both"] >= floor


def test_shipped_judges_reject_wrong_colours_wrong_classes_and_noise():
    split = load_split("test")
    colour_ids = torch.arange(len(split)) % 8
    images = tint(split.images, colour_values(colour_ids, torch.Generator().manual_seed(1)))
    noise = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for judge in load_verifiers():
        wrong_colour = accuracies(judge, images, split.class_ids, (colour_ids + 1) % 8)
        assert wrong_colour["colour"] < 0.05 and wrong_colour["class"] > 0.85
        assert accuracies(judge, images, (split.class_ids + 1) % 8, colour_ids)["class"] < 0.1
        right = judge.scores(images, split.class_ids, colour_ids)["log_prob"].mean()
        assert wrong_colour["log_prob"] < right - 3
        class_logits, _ = judge(noise)
        assert (class_logits.argmax(1) == NONE_CLASS).float().mean() > 0.5
