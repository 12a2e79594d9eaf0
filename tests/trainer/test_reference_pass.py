# SPDX-License-Identifier: Apache-2.0
"""The pass of a reference over its data: once, of a stream what training will read, and never twice what is known."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from tests.trainer.runs import (
    DPO,
    SIPO,
    changed,
    largest_difference,
    logged,
    make_trainer,
    picture,
    preference_pairs,
    trained_weights,
)
from trl_sipo.data import preference_dataset
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.trainer import reference_bank, reference_errors, reference_pass
from trl_sipo.trainer.arms import arm_error
from trl_sipo.trainer.encoding import draw_pair_noise
from trl_sipo.trainer.passes import of_reference
from trl_sipo.trainer.reference_bank import BankDraws, precompute_reference
from trl_sipo.trainer.reference_errors import read_errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Banks of this test alone."""
    monkeypatch.setattr(reference_bank, "reference_folder", lambda: tmp_path / "banks")
    return tmp_path / "banks"


def banked(path, pairs, *, method=DPO, **options):
    """Small batches, so that there are several."""
    options = {"per_device_train_batch_size": 2, "precompute_ref_batch_size": 2, "num_ref_draws": 3, **options}
    return make_trainer(method, path, pairs=pairs, precompute_ref_log_probs=True, **options)


def stream_of(pairs, num_shards=1, seed=None):
    stream = pairs.to_iterable_dataset(num_shards=num_shards)
    return stream if seed is None else stream.shuffle(seed=seed, buffer_size=4)


def counted(monkeypatch, place, name):
    """The arguments of all calls of a function."""
    calls, function = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: calls.append(args) or function(*args, **options))
    return calls


def batches_of(trainer):
    """The pairs of each training step, in order, after training."""
    steps, encode = [], trainer._encoder

    def observed(inputs, *args, **options):
        steps.append(inputs["pair_index"].tolist())
        return encode(inputs, *args, **options)

    trainer._encoder = observed
    trainer.train()
    return steps


# -------------------------------------------------------------------------------------------------- once for all draws


@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "stream"])
def test_a_pair_is_read_and_encoded_once_for_all_draws(is_stream, tmp_path, monkeypatch):
    decoded = counted(monkeypatch, preference_dataset, "_pixels")
    measured = counted(monkeypatch, reference_pass, "_draw_errors")
    vae, text = [], []
    add_errors = reference_pass.add_errors

    def observed(trainer, *args):
        counted_vae = counted(monkeypatch, trainer.adapter, "encode_media")
        counted_text = counted(monkeypatch, trainer.adapter, "encode_prompts")
        decoded.clear()
        found = add_errors(trainer, *args)
        vae.extend(counted_vae)
        text.extend(counted_text)
        return found

    monkeypatch.setattr(reference_bank, "add_errors", observed)
    pairs = preference_pairs(6)
    monkeypatch.setattr("trl_sipo.trainer.encoding.PROMPT_CACHE_BYTES", 0)  # as if a prompt were larger than that
    banked(tmp_path, stream_of(pairs) if is_stream else pairs, num_ref_draws=5)
    assert len(decoded) == 6 and len(vae) == 2 * 3 and len(text) == 3
    assert [args[2] for args in measured] == 3 * [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"caption_dropout": 0.5, "share_noise": False}], ids=["plain", "random"])
def test_the_errors_are_those_of_one_draw_after_the_other(options, folder, tmp_path):
    """To the bit, in the file too: a bank that was made so is gone on with."""
    trainer = banked(tmp_path, preference_pairs(6), num_ref_draws=3, **options)
    live = make_trainer(DPO, tmp_path, pairs=preference_pairs(6), **options)
    draws = BankDraws(trainer.args, trainer.noise_schedule)
    expected = torch.empty(6, 3, 2)
    for draw, start in itertools.product(range(3), (0, 2, 4)):
        inputs = live.data_collator([live.train_dataset[index] for index in (start, start + 1)])
        level, generators = draws(inputs["pair_index"], torch.full((2,), draw))
        pairs = live._encoder(inputs, torch.device("cpu"), generators, training=True)
        noise = draw_pair_noise(pairs, generators, share=trainer.args.share_noise)
        arms = live.noised_arms(pairs, level, noise)
        expected[start : start + 2, draw] = torch.stack(of_reference(live, arms, arm_error), dim=1)
    assert torch.equal(trainer.reference.train.errors, expected)
    assert torch.equal(read_errors(next(folder.iterdir())).errors, expected)


def test_a_folder_that_cannot_be_written_is_said_before_the_work(folder, tmp_path, monkeypatch):
    measured = counted(monkeypatch, reference_pass, "_draw_errors")
    folder.write_text("a file in its place")
    with pytest.raises(ConfigurationError, match=r"banks', which cannot be written .* Set HF_HOME"):
        banked(tmp_path, preference_pairs(8))
    assert not measured


def test_a_reference_that_is_not_finite_is_refused(folder, tmp_path, monkeypatch):
    """The batches before it are kept, and it is not taken for one that is not computed yet."""
    measure = reference_pass._draw_errors

    def broken(trainer, inputs, draw, draws):
        found = measure(trainer, inputs, draw, draws)
        return found.masked_fill(inputs["pair_index"][:, None] == 4, torch.nan) if draw == 1 else found

    monkeypatch.setattr(reference_pass, "_draw_errors", broken)
    with pytest.raises(NumericalError, match=r"of the pairs \[4\] are not finite in draw 1"):
        banked(tmp_path, preference_pairs(8))
    assert read_errors(next(folder.iterdir())).ids.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- streams

STREAMS = {
    "part": (16, {}, {"max_steps": 3}),
    "accumulation": (16, {}, {"max_steps": 2, "gradient_accumulation_steps": 2}),
    "workers": (16, {"num_shards": 4}, {"max_steps": 3, "dataloader_num_workers": 2}),
    "shuffled": (16, {"seed": 3}, {"max_steps": 3}),
    "several passes": (6, {"seed": 3}, {"max_steps": 8}),
    "remainder": (5, {}, {"max_steps": 7, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", STREAMS)
def test_the_reference_reads_what_training_will(case, tmp_path):
    """Just those pairs; and training reads what it would without."""
    count, layout, options = STREAMS[case]
    pairs = preference_pairs(count)
    stored = banked(tmp_path / "stored", stream_of(pairs, **layout), **options)
    live = make_trainer(DPO, tmp_path, pairs=stream_of(pairs, **layout), per_device_train_batch_size=2, **options)
    batches = batches_of(stored)
    assert batches == batches_of(live)
    assert set(stored.reference.train.ids.tolist()) == set(itertools.chain(*batches))
    assert len(logged(stored, "loss")) == options["max_steps"]


def test_the_random_state_and_the_stream_are_left_as_they_were(tmp_path):
    trainer = make_trainer(DPO, tmp_path, pairs=stream_of(preference_pairs(8), seed=1), num_ref_draws=2)
    trainer.args.precompute_ref_log_probs = True
    engine = trainer.accelerator
    before = torch.random.get_rng_state(), engine.gradient_state.dataloader_references, list(engine._dataloaders)
    precompute_reference(trainer)
    after = torch.random.get_rng_state(), engine.gradient_state.dataloader_references, engine._dataloaders
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("saved_at", [1, 3])
def test_resuming_a_stream_is_exact(saved_at, tmp_path):
    """In the first pass over it and in a later one."""
    stream = stream_of(preference_pairs(5), seed=2)
    options = {"method": SIPO, "max_steps": 5, "is_lora": False, "learning_rate": 1e-3}
    whole = banked(tmp_path / "run", stream, save_strategy="steps", save_steps=saved_at, **options)
    whole.train()
    resumed = banked(tmp_path / "resumed", stream, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{saved_at}"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert not changed(trained_weights(whole), trained_weights(resumed))


def test_the_errors_of_a_stream_are_found_again(folder, tmp_path, monkeypatch, capsys):
    """By pair: in another order, in a longer run, for more draws; and what is known is not even decoded."""
    pairs = preference_pairs(8)
    decoded = counted(monkeypatch, preference_dataset, "_pixels")
    measured = counted(monkeypatch, reference_pass, "_draw_errors")

    def work(pairs=pairs, seed=None, **options):
        """How many pairs were decoded, and the draws that the reference was run on, batch by batch."""
        decoded.clear()
        measured.clear()
        banked(tmp_path / "run", stream_of(pairs, seed=seed), **{"num_ref_draws": 2, **options})
        return len(decoded), [args[2] for args in measured]

    assert work(max_steps=1)[1] == [0, 1]
    assert work(max_steps=3)[1] == 2 * [0, 1]
    assert work(max_steps=3) == (2, [])  # a loader is one batch ahead
    assert f"2 draws of 6 pairs, all found: {folder}" in capsys.readouterr().out
    assert work(max_steps=3, num_ref_draws=3)[1] == 3 * [2]
    assert work(max_steps=8, num_ref_draws=3)[1] == [0, 1, 2]
    for options in (
        {"seed": 5},
        {"method": SIPO},
        {"pairs": pairs.select([7, 2, 4])},
        {"precompute_ref_batch_size": 1, "per_device_train_batch_size": 4},
        {"num_ref_draws": 1},
    ):
        assert work(max_steps=8, **options) == (0, []), options
    assert len(list(folder.iterdir())) == 1
    assert work(max_steps=1, caption_dropout=0.5)[1] == [0, 1]
    assert work(max_steps=1, resolution=64)[1] == [0, 1]
    assert len(list(folder.iterdir())) == 3


def test_repeats_of_a_stream_share_their_draws(tmp_path, monkeypatch):
    measured = counted(monkeypatch, reference_pass, "_draw_errors")
    pairs = datasets.concatenate_datasets([preference_pairs(3), preference_pairs(3)])
    trainer = banked(tmp_path, stream_of(pairs), max_steps=6, num_ref_draws=1)
    assert len(trainer.reference.train.ids) == 3
    assert sorted(itertools.chain(*(args[1]["pair_index"].tolist() for args in measured))) == sorted(
        trainer.reference.train.ids.tolist()
    )
    trainer.train()


def test_a_stream_that_changes_is_refused(tmp_path):
    """Rows that are made at random have no errors to be found; the message says what to do."""
    count = itertools.count()

    def rows():
        for _ in range(4):
            number = 2 * next(count)
            yield {"prompt": "a cat", "chosen": picture(number), "rejected": picture(number + 1)}

    features = preference_pairs(1).features
    trainer = banked(tmp_path, datasets.IterableDataset.from_generator(rows, features=features))
    with pytest.raises(DatasetError, match="was not among those that the reference saw before training"):
        trainer.train()


def test_the_order_of_a_stream_must_be_kept(tmp_path):
    options = {"dataloader_in_order": False, "dataloader_num_workers": 2}
    with pytest.raises(ConfigurationError, match="leave `dataloader_in_order` on"):
        banked(tmp_path, stream_of(preference_pairs(4), num_shards=2), **options)


@pytest.mark.parametrize("options", [{"random_flip": True}, {"center_crop": False}], ids=["flip", "crop"])
def test_data_that_was_made_random_beforehand_is_refused(options, tmp_path):
    pairs = stream_of(preference_pairs(4))
    prepared = StreamingPreferenceDataset(pairs, transform=PairedTransform(32, **options))
    with pytest.raises(ConfigurationError, match="the train dataset has a random crop, flip or start"):
        banked(tmp_path, prepared)
    steady = StreamingPreferenceDataset(pairs, transform=prepared.transform.for_evaluation())
    with pytest.raises(ConfigurationError, match="the eval dataset has a random crop, flip or start"):
        banked(tmp_path, steady, trainer_options={"eval_dataset": prepared})


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_a_stream_is_evaluated_without_a_reference_too(is_lora, tmp_path):
    held_out = stream_of(preference_pairs(7, seed=3), num_shards=2)
    options = {"is_lora": is_lora, "trainer_options": {"eval_dataset": held_out}, "learning_rate": 1e-2}
    stored = banked(tmp_path / "stored", stream_of(preference_pairs(8)), **options)
    live = make_trainer(DPO, tmp_path / "live", is_lora=is_lora)
    stored.train()
    passes = []
    stored.reference.active = lambda *_: passes.append(1)
    metrics = stored.evaluate()
    assert not passes
    stored.reference.evaluation.clear()
    stored.reference.active = live.reference.active
    expected = stored.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


# -------------------------------------------------------------------------------------------------------- interruption


def _precompute_slowly(path, is_stream):
    """In a process of its own: it says when it is in the third batch, which takes long enough to be killed in."""
    measure, batches = reference_pass._draw_errors, itertools.count()

    def slow(*args):
        if next(batches) == 7:
            (path / "third batch").touch()
            time.sleep(60)
        return measure(*args)

    reference_pass._draw_errors = slow
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        banked(path, stream_of(preference_pairs(8)) if is_stream else preference_pairs(8), max_steps=4)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(
    ("sent", "save_every", "exit_code", "num_kept"),
    [
        (signal.SIGKILL, 0.0, -signal.SIGKILL, 4),
        (signal.SIGINT, 1e9, 130, 4),
        (signal.SIGKILL, 1e9, -signal.SIGKILL, 0),
    ],
    ids=["kill", "ctrl-c", "early kill"],
)
def test_an_interrupted_pass_goes_on(sent, save_every, exit_code, num_kept, is_stream, folder, tmp_path, monkeypatch):
    """To the same bits. A kill costs what was not written yet, Ctrl-C only the batch that it came in."""
    monkeypatch.setattr(reference_errors, "SAVE_EVERY", save_every)
    process = multiprocessing.get_context("fork").Process(target=_precompute_slowly, args=(tmp_path, is_stream))
    process.start()
    while process.is_alive() and not (tmp_path / "third batch").exists():
        time.sleep(0.02)
    os.kill(process.pid, sent)
    process.join()
    assert process.exitcode == exit_code
    assert sum(len(read_errors(file).ids) for file in folder.glob("*")) == num_kept

    def finish():
        pairs = preference_pairs(8)
        return banked(tmp_path, stream_of(pairs) if is_stream else pairs, max_steps=4).reference.train

    measured = counted(monkeypatch, reference_pass, "_draw_errors")
    resumed = finish()
    assert len(measured) == 3 * (8 - num_kept) / 2
    (file,) = folder.iterdir()
    written = file.read_bytes()
    file.unlink()
    undisturbed = finish()
    assert torch.equal(resumed.ids, undisturbed.ids) and torch.equal(resumed.errors, undisturbed.errors)
    assert file.read_bytes() == written


# ------------------------------------------------------------------------------------------------- several processes


def _results(processes, output, *arguments):
    """What every process wrote."""
    script = str(Path(__file__).with_name("reference_distributed_run.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, script, str(output), *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(output / f"result-{process}.pt", weights_only=False) for process in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_two_processes_know_what_one_does(kind, tmp_path):
    """All errors in each of them, although they share the work, which does not divide among them."""
    (one,) = _results(1, tmp_path / "one", kind, 4)
    two = _results(2, tmp_path / "two", kind, 2)
    for process in two:
        assert process["processes"] == 2 and torch.equal(process["ids"], one["ids"]) and len(one["ids"]) == 8
        assert torch.equal(process["errors"], two[0]["errors"]) and process["errors"].shape == (8, 3, 2)
        torch.testing.assert_close(process["errors"], one["errors"], rtol=1e-5, atol=0)
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-5
    assert two[0]["loss"] == pytest.approx(one["loss"], abs=1e-3)
    assert two[0]["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"], abs=1e-3)
    assert {path.name for path in (tmp_path / "one" / "banks").iterdir()} == {
        path.name for path in (tmp_path / "two" / "banks").iterdir()
    }
