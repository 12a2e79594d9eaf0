# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind loads in plain diffusers as exactly the trained model, and a run can be continued."""

import re
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    DPO_CM,
    LORA_ALPHA,
    LORA_RANK,
    METHODS,
    SIPO,
    changed,
    logged,
    make_trainer,
    predict,
    preference_pairs,
    snapshot,
    trained_weights,
)
from trl_sipo.errors import BackboneError, ConfigurationError
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE
from trl_sipo.trainer.checkpointing import copy_weights
from trl_sipo.trainer.description import describe_kappa

lora_and_full = pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])


@pytest.fixture
def base(tmp_path):
    """A tiny pipeline on disk."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _load(base, directory, is_lora):
    """What a user of plain diffusers gets."""
    if not is_lora:
        return DiffusionPipeline.from_pretrained(directory)
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(directory)
    return pipeline


@lora_and_full
def test_the_saved_model_is_the_trained_one(is_lora, base, tmp_path):
    trainer = make_trainer(SIPO, tmp_path / "run", model=base, is_lora=is_lora, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = _load(base, tmp_path / "out", is_lora)
    expected = predict(trainer.adapter.pipeline)
    assert LORA_RANK != LORA_ALPHA and torch.equal(predict(loaded), expected)
    difference = (expected - predict(DiffusionPipeline.from_pretrained(base))).abs().max()
    assert difference > 1e-3


@lora_and_full
def test_every_checkpoint_is_a_model(is_lora, base, tmp_path):
    trainer = make_trainer(
        DPO, tmp_path / "run", model=base, is_lora=is_lora, save_strategy="steps", save_steps=2, max_steps=4
    )
    trainer.train()
    assert torch.equal(
        predict(_load(base, tmp_path / "run" / "checkpoint-4", is_lora)), predict(trainer.adapter.pipeline)
    )
    assert not torch.equal(
        predict(_load(base, tmp_path / "run" / "checkpoint-2", is_lora)), predict(trainer.adapter.pipeline)
    )


def test_a_continued_lora_is_saved_as_one(base, tmp_path):
    """Train, save, load in diffusers, train further, save, load: the file holds the whole adapter, without "ref"."""
    first = make_trainer(DPO, tmp_path / "a", model=base, learning_rate=1e-2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    second = make_trainer(
        DPO, tmp_path / "b", model=_load(base, tmp_path / "first", True), is_lora=False, learning_rate=1e-2
    )
    second.train()
    second.save_model(str(tmp_path / "second"))
    torch.testing.assert_close(
        predict(_load(base, tmp_path / "second", True)), predict(second.adapter.pipeline), rtol=0, atol=0
    )


RESUMED = {
    "sipo": (SIPO, {}),
    "random_parts": (DPO, {"caption_dropout": 0.3, "random_flip": True, "center_crop": False}),
    "accumulation": (DPO_CM, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "schedule": (SIPO, {"lr_scheduler_type": "linear", "warmup_steps": 2}),
}


@lora_and_full
@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("saved_at", [2, 3])
def test_resuming_is_exact(case, is_lora, saved_at, base, tmp_path):
    """Five steps at once, and two or three and the rest after a new start: the same weights, to the bit."""
    method, options = RESUMED[case]
    options = {"model": base, "is_lora": is_lora, "pairs": preference_pairs(8, width=64), "max_steps": 5, **options}
    whole = make_trainer(method, tmp_path / "whole", save_strategy="steps", save_steps=saved_at, **options)
    whole.train()

    resumed = make_trainer(method, tmp_path / "resumed", **options)
    start = trained_weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved_at}"))

    assert resumed.state.global_step == 5 and len(logged(resumed, "loss")) == 5
    expected = trained_weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in trained_weights(resumed).items())
    assert changed(start, trained_weights(resumed))
    assert logged(resumed, "rewards/chosen") == logged(whole, "rewards/chosen")  # against the same reference


STREAMS = {
    "plain": (8, {}),
    "remainder": (7, {"per_device_train_batch_size": 2}),
    "accumulation": (9, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "workers": (8, {"dataloader_num_workers": 2, "per_device_train_batch_size": 2}),
    "shuffled": (8, {"per_device_train_batch_size": 2}),
}


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("saved_at", [3, 5])
def test_resuming_a_stream_is_exact(case, saved_at, base, tmp_path):
    """In the first pass or a later one, in the middle of it or where it ends."""
    count, options = STREAMS[case]
    stream = preference_pairs(count, width=64).to_iterable_dataset(num_shards=2 if case == "workers" else 1)
    if case == "shuffled":
        stream = stream.shuffle(seed=3, buffer_size=4)
    options = {"model": base, "pairs": stream, "max_steps": 7, "random_flip": True, "center_crop": False, **options}
    whole = make_trainer(SIPO, tmp_path / "whole", save_strategy="steps", save_steps=saved_at, **options)
    whole.train()
    resumed = make_trainer(SIPO, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved_at}"))
    assert resumed.state.global_step == 7 and len(logged(resumed, "loss")) == 7
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert not changed(trained_weights(whole), trained_weights(resumed))


def test_a_stream_whose_position_is_not_known_warns(base, tmp_path, caplog):
    options = {"model": base, "pairs": preference_pairs(8).to_iterable_dataset(), "max_steps": 2}
    make_trainer(DPO, tmp_path, save_strategy="steps", save_steps=1, **options).train()
    for name in ("stream_position.json", MANIFEST_FILE):  # as earlier versions wrote it
        (tmp_path / "checkpoint-1" / name).unlink()
    make_trainer(DPO, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [record for record in caplog.records if "where it was in the stream" in record.getMessage()]


def test_resuming_finds_the_last_checkpoint(base, tmp_path):
    options = {"model": base, "save_strategy": "steps", "save_steps": 1}
    make_trainer(DPO, tmp_path / "run", max_steps=2, **options).train()
    resumed = make_trainer(DPO, tmp_path / "run", max_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and len(logged(resumed, "loss")) == 3


def test_a_moving_reference_is_resumed_too(base, tmp_path):
    options = {
        "model": base,
        "is_lora": False,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 5,
    }
    whole = make_trainer(DPO, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(DPO, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not changed(snapshot(whole.ref_model), snapshot(resumed.ref_model))
    assert not changed(snapshot(whole.model), snapshot(resumed.model))

    still = {name: value for name, value in options.items() if "sync" not in name}
    make_trainer(DPO, tmp_path / "still", **still).train()
    with pytest.raises(ConfigurationError, match="sync_ref_model"):
        make_trainer(DPO, tmp_path / "other", **options).train(
            resume_from_checkpoint=str(tmp_path / "still" / "checkpoint-3")
        )


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_resuming_from_another_kind_of_checkpoint_is_an_error(is_lora, base, tmp_path):
    make_trainer(DPO, tmp_path / "run", model=base, is_lora=is_lora, save_strategy="steps", save_steps=1).train()
    other = make_trainer(DPO, tmp_path / "other", model=base, is_lora=not is_lora)
    with pytest.raises(BackboneError):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@lora_and_full
def test_the_best_model_is_loaded_at_the_end(is_lora, base, tmp_path):
    trainer = make_trainer(
        SIPO,
        tmp_path / "run",
        model=base,
        is_lora=is_lora,
        max_steps=4,
        learning_rate=3e-2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        trainer_options={"eval_dataset": preference_pairs(8)},
    )
    trainer.train()
    margins = logged(trainer, "eval_rewards/margins")
    best = max(range(4), key=margins.__getitem__)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best + 1}"
    assert torch.equal(
        predict(_load(base, trainer.state.best_model_checkpoint, is_lora)), predict(trainer.adapter.pipeline)
    )
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins[best], rel=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_model_card(method, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pipeline = tiny_stable_diffusion()
    pipeline.register_to_config(_name_or_path="someone/some-diffusion")
    trainer = make_trainer(method, tmp_path / "my-model", model=pipeline, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.create_model_card(dataset_name="someone/some-pairs", tags="extra")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == "someone/some-diffusion"
    assert {"lora", "trl", "extra", "text-to-image"} <= set(card.data.tags)
    assert card.data.datasets == "someone/some-pairs"
    assert trainer._paper["citation"] in card.text and re.search(r"@\w+\{", card.text)
    assert trainer.method_name in card.text and "load_lora_weights" in card.text
    assert f"beta = {trainer.beta:g}" in card.text and "kappa" not in card.text


def test_a_card_says_kappa_and_does_not_name_a_local_folder(base, tmp_path):
    trainer = make_trainer(DPO, tmp_path / "run", model=base, is_lora=False, proximal_kappa=0.625)
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "kappa = 0.625" in text and f"\n\n{describe_kappa(trainer)}\n" in text
    assert str(tmp_path) not in text and "base_model" not in text and "load_lora_weights" not in text


class _Hub:
    """A hub that looks at what it is given when it is given it."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def __call__(self, **kwargs):
        return self

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": f"someone/{repo_id}"})()

    def upload_folder(self, folder_path, **kwargs):
        self.seen.append(self.look(folder_path))
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


@lora_and_full
def test_what_is_pushed_while_training_holds_the_weights(is_lora, base, tmp_path, monkeypatch):
    """transformers copies files of its own names from a checkpoint into the folder that it pushes; ours differ."""
    hub = _Hub(lambda folder: (predict(_load(base, folder, is_lora)), {path.name for path in Path(folder).iterdir()}))
    monkeypatch.setattr("transformers.trainer.hf_api", hub)
    trainer = make_trainer(
        DPO,
        tmp_path / "run",
        model=base,
        is_lora=is_lora,
        push_to_hub=True,
        save_strategy="steps",
        save_steps=3,
        hub_strategy="every_save",
    )
    trainer.train()
    prediction, names = hub.seen[0]
    assert torch.equal(prediction, predict(trainer.adapter.pipeline))
    assert "README.md" in names and not any(name.startswith(("optimizer", "rng_state")) for name in names)

    trainer.push_to_hub(dataset_name="someone/some-pairs")
    assert torch.equal(hub.seen[-1][0], predict(trainer.adapter.pipeline))
    assert "someone/some-pairs" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(("strategy", "is_done"), [("every_save", False), ("end", True)])
def test_the_pushed_folder_stays_while_nothing_is_pushed_from_it(strategy, is_done, tmp_path, monkeypatch):
    """A push that is under way must not find other files; one that is left out needs none."""
    hub = _Hub(lambda folder: None)
    monkeypatch.setattr("transformers.trainer.hf_api", hub)
    trainer = make_trainer(DPO, tmp_path, push_to_hub=True, save_strategy="steps", save_steps=3, hub_strategy=strategy)
    trainer.push_in_progress = type(
        "Push", (), {"is_done": lambda self: is_done, "wait_until_done": lambda self: None}
    )()
    trainer.train()
    assert (tmp_path / "checkpoint-3").is_dir() and not hub.seen
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_what_deepspeed_saves_is_no_part_of_the_model(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    for name in ("unet/config.json", "global_step1/zero_pp_rank_0_optim_states.pt", "latest", "zero_to_fp32.py"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("")
    copy_weights(str(checkpoint), str(tmp_path / "pushed"))
    assert [path.name for path in (tmp_path / "pushed").iterdir()] == ["unet"]
