# SPDX-License-Identifier: Apache-2.0
"""What is not finite is caught at the link of the step where it arises, and is computed again from what is saved."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open

from tests.trainer.runs import DPO, PROMPTS, SIPO, changed, make_trainer, preference_pairs, trained_weights
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import ConfigurationError, NumericalError
from trl_sipo.trainer import reproduction
from trl_sipo.trainer.encoding import EncodedPairs
from trl_sipo.trainer.nonfinite import LINKS, first_broken
from trl_sipo.trainer.reproduction import StepBatch, load_reproduction, replay
from trl_sipo.trainer.statistics import PairErrors

NAN, INF = float("nan"), float("inf")


# ---------------------------------------------------------------------------------------------------- the chain


def _step(batch=3):
    latents = torch.ones(batch, 2, 2, 2)
    pairs = EncodedPairs(
        latents, latents.clone(), {"embeds": torch.ones(batch, 5), "mask": torch.ones(batch, 5).bool()}
    )
    errors = PairErrors(*torch.ones(4, batch).unbind())
    return pairs, errors, torch.ones(batch), torch.ones(batch)


PLACES = {
    "chosen latents": ("latents", lambda p, e, loss, logit: p.chosen_latents),
    "rejected latents": ("latents", lambda p, e, loss, logit: p.rejected_latents),
    "embeddings": ("embeddings", lambda p, e, loss, logit: p.conditioning["embeds"]),
    "reference, chosen": ("reference", lambda p, e, loss, logit: e.ref_chosen),
    "reference, rejected": ("reference", lambda p, e, loss, logit: e.ref_rejected),
    "policy, chosen": ("policy", lambda p, e, loss, logit: e.chosen),
    "policy, rejected": ("policy", lambda p, e, loss, logit: e.rejected),
    "loss": ("loss", lambda p, e, loss, logit: loss),
    "logit": ("loss", lambda p, e, loss, logit: logit),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", PLACES)
def test_the_first_link_is_found(place, value):
    """Whatever comes later is broken too."""
    names = list(PLACES)
    step = _step()
    for later in names[names.index(place) :]:
        PLACES[later][1](*step)[1] = value
    link = LINKS.index(PLACES[place][0]) + 1
    assert first_broken(*step).tolist() == [0, link, 0]


def test_all_finite_is_none():
    assert first_broken(*_step()).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------- real runs, broken at each link


def _break_latents(trainer):
    encode, calls = trainer.adapter.encode_media, []

    def encode_media(pixels, **kwargs):
        calls.append(encode(pixels, **kwargs))
        if len(calls) % 2:  # the chosen arm
            calls[-1][2, 0, 0, 0] = NAN
        return calls[-1]

    trainer.adapter.encode_media = encode_media


def _break_embeddings(trainer):
    encode = trainer.adapter.encode_prompts

    def encode_prompts(prompts):
        rows = encode(prompts)
        rows[prompts.index(PROMPTS[1])]["prompt_embeds"][0, 0] = INF
        return rows

    trainer.adapter.encode_prompts = encode_prompts


def _break_weights(denoiser):
    with torch.no_grad():
        denoiser.conv_out.weight.view(-1)[0] = NAN


def _break_loss(trainer):
    compute = trainer.compute_pair_loss
    trainer.compute_pair_loss = lambda logit, **options: compute(logit, **options) + torch.tensor([0.0, INF, 0.0, 0.0])


def _break_gradient(trainer):
    trainer.adapter.denoiser.conv_in.weight.register_hook(lambda gradient: gradient * NAN)


# Link -> (how to break it in a full fine-tuning, pairs that it concerns, advice).
BREAKS = {
    "latents": (_break_latents, 1, "VAE in float16"),
    "embeddings": (_break_embeddings, 1, "T5"),
    "reference": (lambda trainer: _break_weights(trainer.ref_model), 4, "reference never changes"),
    "policy": (lambda trainer: _break_weights(trainer.adapter.denoiser), 4, "learning_rate"),
    "loss": (_break_loss, 1, "beta"),
    "gradient": (_break_gradient, None, "backward pass"),
}


def _trainer(tmp_path, **options):
    pairs = preference_pairs(4)  # one batch, of four prompts
    return make_trainer(SIPO, tmp_path, is_lora=False, pairs=pairs, **options)


def test_every_link_is_broken_below():
    assert tuple(BREAKS) == LINKS


@pytest.mark.parametrize("link", LINKS)
def test_a_run_ends_at_the_link_and_replays(link, tmp_path):
    trainer = _trainer(tmp_path)
    break_it, count, advice = BREAKS[link]
    break_it(trainer)
    before = trained_weights(trainer)
    with pytest.raises(NumericalError, match=rf"^Step 1: .*{advice}.*_nonfinite; .*replay") as caught:
        trainer.train()
    if count is not None:
        assert f"for {count} of 4 pairs: pair_index" in str(caught.value) and "timestep" in str(caught.value)
    else:
        assert "that of 1 of " in str(caught.value) and "conv_in.weight" in str(caught.value)
    assert {name for name in changed(before, trained_weights(trainer)) if not name.startswith("conv_out")} == set()

    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    description = json.loads(file.read_text())
    assert file.name == "step-000001-process-0-part-0.json"
    assert description["link"] == link and description["step"] == 1 and len(description["pairs"]) == 4
    assert description["settings"]["beta"] == 1000 and description["settings"]["importance_steps"] == 50
    assert "hub_token" not in description["settings"] and "output_dir" not in description["settings"]

    again = _trainer(tmp_path / "again")
    if link in ("reference", "policy", "loss", "gradient"):  # latents and embeddings are in the file
        break_it(again)
    for path in (file, file.with_suffix(".safetensors")):
        result = replay(path, again)
        if link == "gradient":
            assert result.broken == {} and result.parameters == ["conv_in.weight"]
            assert "gradient of conv_in.weight" in str(result)
        else:
            assert set(result.broken.values()) == {link} and len(result.broken) == count
            assert f"{link} is the first" in str(result)


def test_a_sound_step_replays_as_sound(tmp_path):
    """The same numbers come out."""
    trainer = _trainer(tmp_path)
    _break_gradient(trainer)
    with pytest.raises(NumericalError):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    again = _trainer(tmp_path / "again")
    seen = []
    pair_errors = again.pair_errors
    again.pair_errors = lambda *args, **kwargs: seen.append(pair_errors(*args, **kwargs)) or seen[-1]
    result = replay(file, again)
    assert result.is_finite and "All is finite" in str(result)
    stored, description = load_reproduction(file)
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        torch.testing.assert_close(getattr(seen[0], name), getattr(stored.errors, name), rtol=1e-6, atol=0)
    key = description["pairs"][0]["key"]
    assert key == [0, 42, 0, description["pairs"][0]["pair_index"]]
    assert all(p.grad is None for p in again.model.parameters())


def test_a_precomputed_reference_replays_from_the_file(tmp_path, monkeypatch):
    """Its errors are in the file, so that a live reference, or none, gives the same."""
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.constants.HF_HOME", str(tmp_path / "home"))
    options = {"precompute_ref_log_probs": True, "num_ref_draws": 1, "max_steps": 1}
    trainer = _trainer(tmp_path, **options)
    _break_gradient(trainer)
    with pytest.raises(NumericalError):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    assert "key" not in json.loads(file.read_text())["pairs"][0]  # its draws have keys of their own
    banked, live = _trainer(tmp_path / "banked", **options), _trainer(tmp_path / "live")
    for again in (banked, live):
        _break_gradient(again)
        assert replay(file, again).parameters == ["conv_in.weight"]


def test_all_that_a_step_may_have_is_kept():
    pairs, errors, *_ = _step()
    pairs = replace(pairs, frame_rate=torch.tensor([8.0, 12.0, 16.0]))
    level = NoiseLevel(torch.full((3,), 0.6), torch.full((3,), 0.8), torch.tensor([1, 2, 3]))
    noise, index = (torch.zeros(3, 2, 2, 2), torch.ones(3, 2, 2, 2)), torch.tensor([7, 8, 9])
    batch = StepBatch(pairs, level, noise, errors, index, torch.tensor([1.0, 0.5, 0.7]))
    again = StepBatch.of_tensors(batch.tensors())
    before, after = batch.tensors(), again.tensors()
    assert before.keys() == after.keys() and {"rejected_noise", "label", "frame_rate"} < before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    shared = StepBatch(pairs, level, (noise[0], noise[0]), errors, index)
    again = StepBatch.of_tensors(shared.tensors())
    assert again.noise[0] is again.noise[1] and again.label is None
    assert shared.num_bytes == sum(value.nbytes for value in shared.tensors().values()) < batch.num_bytes


def test_a_diverged_lora_is_saved_with_the_step(tmp_path):
    """Its weights are what broke the step, and a new trainer would not have them."""
    options = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(DPO, tmp_path, learning_rate=1e30, **options)
    with pytest.raises(NumericalError, match=r"Step 2: .*learning_rate"):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    assert (tmp_path / "_nonfinite" / "step-000002-weights" / "pytorch_lora_weights.safetensors").is_file()
    again = make_trainer(DPO, tmp_path / "again")
    result = replay(file, again)
    assert len(result.broken) == 4 and set(result.broken.values()) == {"policy"}
    sound = make_trainer(DPO, tmp_path / "sound", save_strategy="steps", save_steps=1, max_steps=1)
    sound.train()
    assert replay(file, again, checkpoint=tmp_path / "sound" / "checkpoint-1").is_finite


def test_an_evaluation_is_saved_too(tmp_path):
    trainer = _trainer(tmp_path, trainer_options={"eval_dataset": preference_pairs(4, seed=3)})
    _break_weights(trainer.adapter.denoiser)
    with pytest.raises(NumericalError, match=r"^Evaluation: .*for 4 of 4 pairs.*_nonfinite"):
        trainer.evaluate()
    (file,) = (tmp_path / "_nonfinite").glob("evaluation-*.json")
    again = _trainer(tmp_path / "again")
    assert replay(file, again).is_finite
    _break_weights(again.adapter.denoiser)
    assert set(replay(file, again).broken.values()) == {"policy"}


# ------------------------------------------------------------------------------------------- bounds and faults


def test_what_is_left_behind_is_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reproduction, "MAX_STEPS", 2)
    trainer = _trainer(tmp_path, on_nonfinite="skip", max_steps=5)
    _break_loss(trainer)
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        trainer.train()
    files = sorted(path.name for path in (tmp_path / "_nonfinite").iterdir())
    stems = {name.rsplit(".", 1)[0] for name in files}
    assert stems == {"step-000001-process-0-part-0", "step-000002-process-0-part-0"} and len(files) == 4
    notes = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert ["replay" in note for note in notes] == [True, True, False, False, False]


def test_a_batch_that_is_too_large_keeps_the_pairs_that_broke(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path)
    _break_embeddings(trainer)
    monkeypatch.setattr(reproduction, "MAX_BYTES", 6_000)
    with pytest.raises(NumericalError, match="pair_index 1 "):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.safetensors")
    with safe_open(file, "pt") as content:
        assert content.get_tensor("pair_index").tolist() == [1]
    assert set(replay(file, _trainer(tmp_path / "again")).broken) == {1}


def test_a_gradient_has_the_micro_batches_of_its_step(tmp_path):
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    trainer = _trainer(tmp_path, **options)
    _break_gradient(trainer)
    with pytest.raises(NumericalError, match="Step 1: the gradient"):
        trainer.train()
    pairs = [load_reproduction(path)[0].pair_index.tolist() for path in (tmp_path / "_nonfinite").glob("*.json")]
    assert sorted(pairs) == [[0], [1], [2], [3]]


def test_a_folder_that_cannot_be_written_does_not_hide_the_fault(tmp_path, caplog):
    trainer = _trainer(tmp_path)
    _break_weights(trainer.adapter.denoiser)
    (tmp_path / "_nonfinite").write_text("a file in the way")
    with pytest.raises(NumericalError, match="Step 1: the prediction error of the policy") as caught:
        trainer.train()
    assert "replay" not in str(caught.value)
    assert any("cannot be written" in record.getMessage() for record in caplog.records)


def test_a_full_disk_does_not_hide_the_fault(tmp_path, monkeypatch, caplog):
    """safetensors, which writes the file itself, tells of it by an error of its own, which is no `OSError`."""

    def save_file(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reproduction, "save_file", save_file)
    trainer = _trainer(tmp_path, on_nonfinite="skip", max_steps=2)
    _break_loss(trainer)
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 2


def test_weights_that_another_run_left_are_not_taken(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    trainer.recorder.reproduce.folder.mkdir()
    trainer.recorder.reproduce._write_weights(tmp_path / "_nonfinite" / "step-000001-weights")
    _break_loss(trainer)
    with pytest.raises(NumericalError):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    again = make_trainer(DPO, tmp_path / "again")
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "load_weights", lambda *args: loaded.append(args))
        replay(file, again)
        said, unsaid = [f'"weights_are_those_of_the_step": {value}' for value in ("true", "false")]
        file.write_text(file.read_text().replace(said, unsaid))
        replay(file, again)
    assert len(loaded) == 1


def test_parts_of_weights_are_not_taken_for_weights(tmp_path):
    """DeepSpeed ZeRO-3 leaves a weight without numbers where its part is elsewhere."""
    trainer = make_trainer(DPO, tmp_path)
    next(trainer.model.parameters()).ds_id = 0
    trainer.recorder.reproduce._write_weights(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_files_that_are_none(tmp_path):
    trainer = _trainer(tmp_path)
    with pytest.raises(ConfigurationError, match="is no reproduction: .*'_nonfinite'"):
        replay(tmp_path / "missing.json", trainer)
    _break_weights(trainer.adapter.denoiser)
    with pytest.raises(NumericalError):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ConfigurationError, match="has format 7"):
        replay(file, trainer)
    tensors = file.with_suffix(".safetensors")
    for torn in (tensors, file):
        torn.write_bytes(torn.read_bytes()[:50])
        with pytest.raises(ConfigurationError, match="is no reproduction: .*'_nonfinite'"):
            replay(file, trainer)


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("is_deferred", [False, True], ids=["at_once", "deferred"])
def test_a_gradient_is_noticed_in_its_own_step(max_grad_norm, value, is_deferred, tmp_path):
    """Deferred, at the latest when the step is logged: nothing is saved after it."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 50}
    trainer = _trainer(tmp_path, max_grad_norm=max_grad_norm, **options)
    trainer.recorder.is_deferred = is_deferred

    def broken_in_step_2(gradient):
        return gradient * value if trainer.state.global_step == 1 else gradient

    trainer.adapter.denoiser.conv_in.weight.register_hook(broken_in_step_2)
    with pytest.raises(NumericalError, match=r"^Step 2: the gradient is not finite.*conv_in\.weight"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    weights_are_sound = all(value.isfinite().all() for value in trained_weights(trainer).values())
    assert weights_are_sound is not is_deferred
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    description = json.loads(file.read_text())
    assert description["parameters_with_a_gradient_that_is_not_finite"] == ["conv_in.weight"]
    assert description["epoch"] == 1  # of the step, and not of the moment when it is noticed


def test_a_norm_that_overflows_alone(tmp_path):
    """Every gradient is finite, and the norm of all of them is not."""
    trainer = _trainer(tmp_path)
    for parameter in trainer.adapter.denoiser.parameters():
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 1.8e19 / gradient.numel() ** 0.5))
    with pytest.raises(NumericalError, match="Step 1: the gradient is not finite.*its norm overflows"):
        trainer.train()


@pytest.mark.gpu
def test_on_a_gpu_it_is_noticed_two_micro_batches_later(tmp_path):
    """Without waiting for the device, and long before the log."""
    options = {"use_cpu": False, "bf16": None, "max_steps": 20, "logging_steps": 20}
    trainer = make_trainer(SIPO, tmp_path, pairs=preference_pairs(4), **options)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * NAN if trainer.state.global_step == 4 else gradient)
    with pytest.raises(NumericalError, match="^Step 5: the gradient is not finite"):
        trainer.train()
    assert 5 <= trainer.state.global_step <= 7
