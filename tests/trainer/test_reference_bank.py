# SPDX-License-Identifier: Apache-2.0
"""A reference computed once: the same losses as the live one on the same draws, and no reference pass in a step."""

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded
from tests.trainer.runs import (
    DPO,
    METHODS,
    SIPO,
    collate_first,
    logged,
    lora,
    make_trainer,
    picture,
    preference_pairs,
    trained_weights,
)
from trl_sipo.adapters import adapter_for
from trl_sipo.core.noise_schedule import FlowSchedule
from trl_sipo.core.timestep_sampling import logit_normal_time, time_quantile
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import reference_bank, reference_key, reference_pass
from trl_sipo.trainer.preference_data import LatentPairs
from trl_sipo.trainer.reference import AdapterReference, FrozenModelReference
from trl_sipo.trainer.reference_bank import BankDraws, BankedReference

ARMS = ("chosen", "rejected")
SIZE = ("height", "width", "num_frames")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Banks of this test alone."""
    monkeypatch.setattr(reference_bank, "reference_folder", lambda: tmp_path / "banks")
    return tmp_path / "banks"


def banked(method, path, **options):
    return make_trainer(method, path, precompute_ref_log_probs=True, **{"num_ref_draws": 3, **options})


def draws_measured(monkeypatch):
    """The draws that the reference is run on, batch by batch, as they come."""
    measured = []
    measure = reference_pass._draw_errors
    monkeypatch.setattr(reference_pass, "_draw_errors", lambda *args: measured.append(args[2]) or measure(*args))
    return measured


def _live_on_the_banks_draws(trainer, reference):
    """The same trainer with a live reference: what it knows of the reference is forgotten, the draws are kept."""
    draw = trainer._draw

    def without_known(pair_index):
        level, generators, known = draw(pair_index)
        assert known.keys() == {"ref_errors"}
        return level, generators, {}

    trainer._draw = without_known
    trainer.reference.active = reference.active
    return trainer


def _latents(pairs):
    """The same pairs, as latents that somebody has made of them."""
    adapter = adapter_for(tiny_stable_diffusion())
    items = PreferenceDataset(pairs, transform=PairedTransform(adapter.default_size))
    rows = [
        {
            "prompt": item["prompt"],
            **{f"{arm}_latents": adapter.encode_media(item[f"{arm}_pixels"][None])[0].numpy() for arm in ARMS},
        }
        for item in (items[index] for index in range(len(items)))
    ]
    return datasets.Dataset.from_list(rows)


def _cache(pairs, folder, cache=None):
    size = adapter_for(tiny_stable_diffusion()).default_size
    encoded = Encoded(
        folder / "model", folder / "pairs.parquet", folder / "cache", dict(zip(SIZE, (*size, 1), strict=True))
    )
    tiny_stable_diffusion().save_pretrained(encoded.model)
    pairs.to_parquet(encoded.pairs)
    return {"pairs": CachedPairs(encoded.encode(cache=cache)), "model": str(encoded.model)}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The same pairs in every form in which they train."""
    pairs = preference_pairs()
    stream = pairs.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=4)
    return {
        "images": {"pairs": pairs},
        "latents": {"pairs": _latents(pairs)},
        "kept latents": {"pairs": pairs, "precompute_latents": True},
        "stream": {"pairs": stream},
        "stream of latents": {"pairs": _latents(pairs).to_iterable_dataset()},
        "cache": _cache(pairs, tmp_path_factory.mktemp("cache")),
    }


# Every method on rows and on a stream; the other forms, which all methods read alike, with one of them.
_CASES = [
    *((method, kind, is_lora) for method in METHODS for kind in ("images", "stream") for is_lora in (True, False)),
    *((SIPO, kind, is_lora) for kind in ("latents", "cache") for is_lora in (True, False)),
    *((DPO, kind, True) for kind in ("kept latents", "stream of latents")),
]


@pytest.mark.parametrize(
    ("method", "kind", "is_lora"), _CASES, ids=[f"{m.name}-{k}-{'lora' if x else 'full'}" for m, k, x in _CASES]
)
def test_losses_are_those_of_the_live_reference_on_the_same_draws(method, is_lora, kind, kinds, tmp_path):
    options = {"is_lora": is_lora, "max_steps": 6, "per_device_train_batch_size": 4, "caption_dropout": 0.3}
    options |= kinds[kind]
    stored = banked(method, tmp_path / "stored", **options)
    live = banked(method, tmp_path / "live", **options)
    plain = make_trainer(method, tmp_path / "plain", is_lora=is_lora, model=options.get("model"))
    _live_on_the_banks_draws(live, plain.reference)
    for trainer in (stored, live):
        trainer.train()
    assert logged(stored, "loss") == pytest.approx(logged(live, "loss"), rel=1e-5)
    assert logged(stored, "rewards/margins") == pytest.approx(logged(live, "rewards/margins"), rel=1e-3, abs=1e-3)
    assert logged(stored, "rewards/margins")[0] == pytest.approx(0, abs=1e-3)
    assert abs(logged(stored, "rewards/margins")[-1]) > 1e-3
    weights, others = trained_weights(stored), trained_weights(live)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_a_step_runs_no_reference_and_holds_none(is_lora, tmp_path):
    trainer = banked(DPO, tmp_path, is_lora=is_lora, max_steps=2)
    assert isinstance(trainer.reference, BankedReference) and trainer.ref_model is None
    assert isinstance(trainer.reference.live, AdapterReference) == is_lora
    passes = []
    trainer.adapter.denoiser.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    assert passes == [True, True]
    assert "precomputed errors of 3 draws per pair" in trainer.describe_run()


def test_all_draws_of_a_pair_come_once_in_as_many_epochs(tmp_path):
    trainer = banked(DPO, tmp_path, num_ref_draws=5)
    draws = BankDraws(trainer.args, trainer.noise_schedule)
    pairs = torch.arange(40)
    chosen = torch.stack([draws.choose(pairs, epoch) for epoch in range(10)])
    for half in (chosen[:5], chosen[5:]):
        assert (half.sort(dim=0).values == torch.arange(5)[:, None]).all()
    assert not torch.equal(chosen[:5], chosen[5:]) and len(set(chosen[0].tolist())) == 5


@pytest.mark.parametrize("num_draws", [2, 5, 8, 13])
def test_the_levels_of_any_first_draws_are_spread_evenly(num_draws, tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    draws = BankDraws(trainer.args, trainer.noise_schedule)
    for pair in range(20):
        index = torch.full((num_draws,), pair)
        time = draws(index, torch.arange(num_draws))[0].timestep.sort().values / 1000
        gaps = torch.diff(torch.cat([time, time[:1] + 1]))
        assert gaps.max() < 2.7 / num_draws and gaps.min() > 0.3 / num_draws


def test_levels_follow_the_settings(tmp_path):
    options = {"timestep_sampling": "logit_normal", "logit_mean": 0.7, "timestep_range": [0.2, 0.9]}
    trainer = make_trainer(DPO, tmp_path, **options)
    draws = BankDraws(trainer.args, FlowSchedule(shift=3.0))
    pairs = torch.arange(2000)
    levels, _ = draws(pairs, torch.zeros(2000, dtype=torch.long))
    time = logit_normal_time(20000, generator=torch.Generator().manual_seed(0), mean=0.7)
    expected = FlowSchedule(shift=3.0).level_at(0.2 + 0.7 * time).sigma_t
    for quantile in (0.1, 0.5, 0.9):
        assert levels.sigma_t.quantile(quantile) == pytest.approx(expected.quantile(quantile).item(), abs=0.02)
    few = make_trainer(DPO, tmp_path, timesteps=[100, 900])
    levels, _ = BankDraws(few.args, few.noise_schedule)(pairs, torch.zeros(2000, dtype=torch.long))
    assert set(levels.timestep.tolist()) == {100, 900}


def test_quantiles_invert_the_samplers():
    quantiles = torch.linspace(0, 0.999, 500)
    assert torch.equal(time_quantile("uniform", quantiles), quantiles)
    times = time_quantile("logit_normal", quantiles, mean=0.3, std=1.5)
    share = 0.5 * (1 + torch.erf((torch.logit(times.double()) - 0.3) / 1.5 / 2**0.5))
    torch.testing.assert_close(share[1:], quantiles[1:].double(), rtol=1e-4, atol=1e-5)


def test_a_bank_is_kept_grows_and_is_shared_by_runs(folder, tmp_path, monkeypatch):
    """More draws are added to what is there; another rank, method or length of run needs none."""
    measured = draws_measured(monkeypatch)
    first = banked(DPO, tmp_path / "1", num_ref_draws=2)
    assert measured == 2 * [0, 1] and len(list(folder.iterdir())) == 1
    grown = banked(SIPO, tmp_path / "2", num_ref_draws=4, trainer_options={"peft_config": lora(r=2)})
    assert measured == 2 * [0, 1] + 2 * [2, 3] and len(list(folder.iterdir())) == 1
    measured.clear()
    assert torch.equal(grown.reference.train.errors[:, :2], first.reference.train.errors)
    again = banked(DPO, tmp_path / "3", num_ref_draws=3, max_steps=9, is_lora=False)
    assert not measured and torch.equal(again.reference.train.errors, grown.reference.train.errors[:, :3])
    (stored,) = folder.iterdir()
    assert load_file(stored)["errors"].shape == (8, 4, 2) and stored.stat().st_size < 1024 + 8 * 4 * 2 * 4 + 4096


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"caption_dropout": 0.1},
        {"timestep_range": [0.1, 1.0]},
        {"share_noise": False},
        {"pairs": "others"},
        {"model": "other"},
        {"vae": "other"},
        {"vae": "other scale"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_bank_is_not_that_of_another_run(options, folder, tmp_path):
    banked(DPO, tmp_path / "1", num_ref_draws=1)
    if "pairs" in options:
        options = {"pairs": preference_pairs(seed=5)}
    if "vae" in options:
        pipeline = tiny_stable_diffusion()
        if options["vae"] == "other scale":
            pipeline.vae.register_to_config(scaling_factor=0.5)
        else:
            with torch.no_grad():
                pipeline.vae.encoder.conv_in.weight.mul_(1.01)
        options = {"model": pipeline}
    elif "model" in options:
        options = {"model": tiny_stable_diffusion(seed=7)}
    banked(DPO, tmp_path / "2", num_ref_draws=1, **options)
    assert len(list(folder.iterdir())) == 2


def test_the_precision_of_encoders_counts_and_not_only_their_values():
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.half()
    half = reference_key._hash_of_encoders(adapter_for(pipeline))
    pipeline.text_encoder.float()
    assert reference_key._hash_of_encoders(adapter_for(pipeline)) != half


def test_a_trained_lora_is_told_by_its_alpha_too(folder, tmp_path):
    """Rank and matrices are the same: the reference differs by the scale alone."""
    for alpha in (4, 8):
        pipeline = tiny_stable_diffusion()
        torch.manual_seed(5)
        adapted = lora(target_modules=["to_q"], init_lora_weights=False, lora_alpha=alpha)
        pipeline.unet = get_peft_model(pipeline.unet, adapted)
        banked(DPO, tmp_path / f"{alpha}", num_ref_draws=1, model=pipeline, is_lora=False)
    assert len(list(folder.iterdir())) == 2


def test_files_that_were_made_anew_are_other_pairs(folder, tmp_path):
    """Rows that hold paths are the same, and so is all that a cache's manifest knows of such files."""
    rows = {"prompt": ["a red cat", "two dogs"]}
    for arm in ARMS:
        rows[arm] = [str(tmp_path / f"{arm}{number}.bmp") for number in range(2)]
    pairs, caches = datasets.Dataset.from_dict(rows), []
    for version in range(2):
        for number, path in enumerate(rows["chosen"] + rows["rejected"]):
            picture(10 * version + number).save(path)
        trainer = banked(DPO, tmp_path / f"run{version}", num_ref_draws=1, pairs=pairs, max_steps=1)
        trainer.train()
        assert logged(trainer, "rewards/margins") == pytest.approx([0], abs=1e-3)
        caches.append(_cache(pairs, tmp_path, tmp_path / f"cache{version}")["pairs"])
    assert len(list(folder.iterdir())) == 2
    assert caches[0].manifest.fingerprint == caches[1].manifest.fingerprint
    assert caches[0].fingerprint != caches[1].fingerprint


def test_what_held_out_pairs_do_not_depend_on_leaves_their_bank(folder, tmp_path, monkeypatch):
    measured = draws_measured(monkeypatch)
    for seed in (0, 1):
        options = {"eval_dataset": preference_pairs(4, seed=3)}
        banked(DPO, tmp_path / f"{seed}", num_ref_draws=1, seed=seed, trainer_options=options)
    assert measured == [0, 0, 0, 1, 2, 0, 0]  # two batches of training pairs, one of three levels, and anew the first
    assert len(list(folder.iterdir())) == 3


def test_kept_latents_are_told_apart_by_what_models_see():
    latents = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    plain = LatentPairs(["a", "b"], *latents)
    others = [
        LatentPairs(["a", "c"], *latents),
        LatentPairs(["a", "b"], *reversed(latents)),
        LatentPairs(["a", "b"], *latents, frame_rate=torch.tensor([24.0, 24.0])),
        LatentPairs(["a", "b"], *latents, frame_rate=torch.tensor([24.0, 12.0])),
    ]
    assert len({pairs.fingerprint for pairs in (plain, *others)}) == 5
    labelled = LatentPairs(["a", "b"], *latents, label=torch.tensor([0.5, 1.0]))
    assert labelled.fingerprint == plain.fingerprint


def test_a_torn_bank_is_computed_anew(folder, tmp_path):
    expected = banked(DPO, tmp_path / "1").reference.train.errors
    (stored,) = folder.iterdir()
    stored.write_bytes(stored.read_bytes()[:-20])
    assert torch.equal(banked(DPO, tmp_path / "2").reference.train.errors, expected)


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_evaluation_needs_no_reference_either(is_lora, tmp_path):
    held_out = preference_pairs(7, seed=3)
    options = {"is_lora": is_lora, "trainer_options": {"eval_dataset": {"near": held_out}}, "learning_rate": 1e-2}
    stored = banked(DPO, tmp_path / "stored", **options)
    stored.train()
    metrics = stored.evaluate()
    plain = make_trainer(DPO, tmp_path / "plain", is_lora=is_lora)
    passes = []
    stored.reference.active = lambda *_: passes.append(1)
    stored.evaluate()
    assert not passes
    stored.reference.evaluation.clear()
    stored.reference.active = plain.reference.active
    live = stored.evaluate()
    for name in ("eval_near_loss", "eval_near_rewards/margins", "eval_near_rewards/accuracies"):
        assert metrics[name] == pytest.approx(live[name], rel=1e-3, abs=1e-4), name


def test_other_data_is_evaluated_live_where_the_reference_costs_nothing(tmp_path):
    others = preference_pairs(4, seed=9)
    assert "eval_loss" in banked(DPO, tmp_path / "lora").evaluate(others)
    with pytest.raises(ConfigurationError, match="keeps no reference model"):
        banked(DPO, tmp_path / "full", is_lora=False).evaluate(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_flip": True}, "contradicts random_flip=True"),
        ({"is_lora": False, "sync_ref_model": True}, "contradicts `sync_ref_model=True`"),
        ({"is_lora": False, "sample_every_steps": 1, "sample_prompts": ["a cat"]}, "keeps no reference model"),
        ({"num_ref_draws": 0}, "`num_ref_draws` must be at least 1"),
    ],
)
def test_what_a_bank_contradicts_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        banked(DPO, tmp_path, **options)


def test_a_resumed_run_finds_the_bank_of_its_beginning(folder, tmp_path):
    """All weights: the policy has moved when the run is resumed, and could not be the reference."""
    options = {"is_lora": False, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-3}
    whole = banked(DPO, tmp_path / "run", **options)
    whole.train()
    resumed = banked(DPO, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(list(folder.iterdir())) == 1
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]
    assert collate_first(resumed)["pair_index"].tolist() == [0, 1, 2, 3]
    assert isinstance(make_trainer(DPO, tmp_path / "live", is_lora=False).reference, FrozenModelReference)
