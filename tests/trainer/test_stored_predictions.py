# SPDX-License-Identifier: Apache-2.0
"""A precomputed reference for the proximal term: the losses of a live one, a cost that is said first, no torn row."""

import itertools
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tests.adapters.backbone_cases import BACKBONES
from tests.trainer.media import pairs_for
from tests.trainer.processes import run_ranks
from tests.trainer.runs import DPO, SIPO, changed, logged, make_trainer, preference_pairs, trained_weights
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError, StorageError
from trl_sipo.trainer import reference_bank, reference_errors, reference_pass
from trl_sipo.trainer.reference_predictions import PredictionStore
from trl_sipo.trainer.reproduction import load_reproduction, replay

KAPPA = 0.5
SHAPE = (4, 8, 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Banks of this test alone."""
    monkeypatch.setattr(reference_bank, "reference_folder", lambda: tmp_path / "banks")
    return tmp_path / "banks"


def stored(path, *, method=DPO, **options):
    """Small batches, so that there are several."""
    defaults = {"per_device_train_batch_size": 2, "precompute_ref_batch_size": 2, "num_ref_draws": 2}
    needed = {"precompute_ref_log_probs": True, "precompute_ref_predictions": True, "proximal_kappa": KAPPA}
    return make_trainer(method, path, **{**needed, **defaults, **options})


def passes_kept(monkeypatch):
    """The pairs and the draws that the reference is run on, as they come."""
    kept, keep = [], reference_pass._keep_draw

    def observed(trainer, inputs, draw, *rest):
        kept.append((inputs["pair_index"].tolist(), draw))
        return keep(trainer, inputs, draw, *rest)

    monkeypatch.setattr(reference_pass, "_keep_draw", observed)
    return kept


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ what training sees


@pytest.mark.parametrize(
    ("method", "is_lora", "bf16"),
    [(DPO, True, False), (SIPO, False, False), (DPO, True, True)],
    ids=["dpo-lora", "sipo-full", "dpo-lora-bf16"],
)
def test_losses_are_those_of_the_live_reference_on_the_same_draws(method, is_lora, bf16, tmp_path):
    """The pass had other batches than training has: in bfloat16 this rounds some predictions to another number."""
    options = {"method": method, "is_lora": is_lora, "bf16": bf16, "max_steps": 4, "caption_dropout": 0.3}
    trainer, live = (stored(tmp_path / name, **options) for name in ("stored", "live"))
    plain = make_trainer(method, tmp_path / "plain", is_lora=is_lora, bf16=bf16, proximal_kappa=KAPPA)
    live.reference.active = plain.reference.active
    draw = live._draw
    live._draw = lambda pair_index: (*draw(pair_index)[:2], {})
    trainer.reference.live = None  # there is no other reference than what is stored
    for one in (trainer, live):
        one.train()
    assert trainer.reference.train.predictions.dtype == (torch.bfloat16 if bf16 else torch.float32)
    tolerance = {"rel": 2e-3, "abs": 2e-3} if bf16 else {"rel": 1e-5, "abs": 1e-6}
    for name in ("loss", "proximal/distance", "proximal/loss"):
        assert logged(trainer, name) == pytest.approx(logged(live, name), **tolerance), name
    assert logged(trainer, "proximal/loss")[0] == pytest.approx(0, abs=1e-2 if bf16 else 1e-6)
    assert logged(trainer, "proximal/loss")[-1] > 1e-4
    weights, others = trained_weights(trainer), trained_weights(live)
    for name in weights:
        bounds = {"rtol": 0.1, "atol": 2e-3} if bf16 else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(weights[name], others[name], **bounds)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)
def test_every_backbone_predicts_in_the_dtype_that_is_stored(case, bf16, tmp_path):
    """Nothing is rounded: the first step, with the batches of the pass, finds the policy where the reference is."""
    size = {"resolution": [case.size["height"], case.size["width"]], "num_frames": case.size["num_frames"]}
    options = {"model": case.build(), "pairs": pairs_for(case, tmp_path, count=2), "bf16": bf16, "max_steps": 2}
    trainer = stored(tmp_path, num_ref_draws=1, **size, **options)
    trainer.train()
    first, second = logged(trainer, "proximal/distance")
    assert first == pytest.approx(0, abs=1e-4 if bf16 else 1e-10) and second > first


def test_the_errors_are_those_of_the_predictions_that_are_stored(tmp_path):
    """Which are the live ones, to the bit, at the level and with the noise of their draw."""
    trainer = stored(tmp_path, max_steps=1)
    seen, pair_errors = [], trainer.pair_errors
    trainer.pair_errors = lambda *args, **known: seen.append((args, known)) or pair_errors(*args, **known)
    trainer.train()
    (((model, *given), known),) = seen
    with torch.no_grad(), trainer.reference.active(model, trainer.unwrapped_model):
        live = pair_errors(model, *given)
    rows = zip(known["ref_errors"], known["ref_predictions"], trainer.noised_arms(*given), live.reference, strict=True)
    for error, predicted, arm, live_error in rows:
        assert torch.equal(error, (predicted - arm.target).square().mean((1, 2, 3)))
        assert torch.equal(error, live_error)


def test_evaluation_reads_its_own(tmp_path):
    options = {"is_lora": False, "trainer_options": {"eval_dataset": preference_pairs(5, seed=3)}}
    trainer = stored(tmp_path / "stored", max_steps=2, **options)
    trainer.train()
    assert trainer.reference.live is None  # all weights: no other reference is left
    metrics = trainer.evaluate()
    plain = make_trainer(DPO, tmp_path / "plain", is_lora=False)
    trainer.reference.evaluation.clear()
    trainer.reference.active = plain.reference.active
    live = trainer.evaluate()
    assert metrics["eval_proximal/loss"] > 1e-4
    for name in ("eval_loss", "eval_rewards/margins", "eval_proximal/distance", "eval_proximal/loss"):
        assert metrics[name] == pytest.approx(live[name], rel=1e-4, abs=1e-6), name


def test_a_resumed_run_reads_what_its_beginning_stored(folder, tmp_path, monkeypatch):
    options = {"is_lora": False, "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = stored(tmp_path / "run", **options)
    whole.train()
    kept = passes_kept(monkeypatch)
    resumed = stored(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not kept and not changed(trained_weights(whole), trained_weights(resumed))


def test_a_step_that_is_not_finite_replays_with_the_predictions_of_its_file(tmp_path):
    options = {"is_lora": False, "max_steps": 1}
    trainer = stored(tmp_path / "run", **options)
    weight = next(trainer.unwrapped_model.parameters())
    weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NumericalError):
        trainer.train()
    (file,) = (tmp_path / "run" / "_nonfinite").glob("*.json")
    batch, _ = load_reproduction(file)
    expected = trainer.reference.train.predictions.read(batch.pair_index, 0)[0].shape
    assert [one.shape for one in batch.ref_predictions] == [expected, expected]
    again = stored(tmp_path / "again", **options)
    shutil.rmtree(tmp_path / "banks")
    assert replay(file, again).is_finite
    next(again.unwrapped_model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    assert len(replay(file, again).parameters) == 1


# --------------------------------------------------------------------------------------------------------- on the disk


def test_the_cost_is_said_before_anything_is_computed(folder, tmp_path, monkeypatch, capsys):
    said, keep = [], reference_pass._keep_draw

    def observed(*args):
        said.append(capsys.readouterr().out)
        return keep(*args)

    monkeypatch.setattr(reference_pass, "_keep_draw", observed)
    stored(tmp_path, trainer_options={"eval_dataset": {"near": preference_pairs(3, seed=3)}})
    row = 2 * 4 * 8 * 8 * 4 + 4  # two arms of float32 and a checksum
    total = (8 * 2 + 3 * 3) * row
    assert f"on disk: {total:,} bytes (0.05 MB, 0.05 MiB), of which {total:,} bytes" in said[0]
    assert "train: 8 pairs x 2 draws x 2 arms x 4x8x8 x 4 bytes (float32) =" in said[0]
    assert "near: 3 pairs x 3 draws x 2 arms" in said[0]
    assert sum(path.stat().st_size for path in folder.glob("*.predictions/*")) == total
    said.clear()
    trainer = stored(tmp_path, num_ref_draws=3)
    assert f"on disk: {8 * 3 * row:,} bytes (0.05 MB, 0.05 MiB), of which {8 * row:,} bytes" in said[0]
    assert "precomputed errors and predictions of 3 draws per pair" in trainer.describe_run()


def test_a_disk_without_room_is_refused_before_anything_is_computed(folder, tmp_path, monkeypatch):
    kept = passes_kept(monkeypatch)
    needed = 8 * 2 * (2 * 4 * 8 * 8 * 4 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    message = rf"needs {needed:,} bytes .* more in .*banks.*, and {needed - 1:,} bytes .* lower `num_ref_draws`"
    with pytest.raises(ConfigurationError, match=message):
        stored(tmp_path)
    assert not kept and not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert stored(tmp_path).reference.train.num_draws == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    stored(tmp_path)  # nothing is missing


def test_what_is_whole_is_only_read(tmp_path, monkeypatch):
    """As of a folder that others share and that is not ours to write, of which root would not be told."""
    stored(tmp_path)
    made, make = [], PredictionStore.make
    monkeypatch.setattr(PredictionStore, "make", lambda store, count: made.append(count) or make(store, count))
    monkeypatch.setattr(reference_errors.Bank, "check_is_writable", lambda bank: made.append(bank.path))
    stored(tmp_path)
    assert not made
    stored(tmp_path, num_ref_draws=3)
    assert 3 in made


def test_draws_are_added_to_those_that_are_there(folder, tmp_path, monkeypatch):
    kept = passes_kept(monkeypatch)
    stored(tmp_path / "1", num_ref_draws=1)
    before = contents(folder)
    kept.clear()
    stored(tmp_path / "2", num_ref_draws=3, method=SIPO, proximal_kappa=2.0)
    assert [draw for _, draw in kept] == 4 * [1, 2]
    assert all(contents(folder)[name] == content for name, content in before.items() if name.endswith(".bin"))
    make_trainer(DPO, tmp_path / "3", precompute_ref_log_probs=True, num_ref_draws=1)  # has errors of its own
    assert len(list(folder.glob("*.safetensors"))) == 2 and len(list(folder.glob("*.predictions"))) == 1


def _precompute_slowly(path):
    """In a process of its own: it says when it is in the third batch, which takes long enough to be killed in."""
    keep, passes = reference_pass._keep_draw, itertools.count()

    def slow(*args):
        found = keep(*args)
        if next(passes) == 5:  # the first draw of the batch is written, and so is the second
            (path / "third batch").touch()
            time.sleep(60)
        return found

    reference_pass._keep_draw = slow
    stored(path)


@pytest.mark.parametrize(("save_every", "num_kept"), [(0.0, 4), (1e9, 0)], ids=["kill", "early kill"])
def test_a_killed_pass_goes_on_to_the_same_bytes(save_every, num_kept, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_errors, "SAVE_EVERY", save_every)
    process = multiprocessing.get_context("fork").Process(target=_precompute_slowly, args=(tmp_path,))
    process.start()
    while process.is_alive() and not (tmp_path / "third batch").exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = passes_kept(monkeypatch)
    stored(tmp_path)
    assert sorted({pair for pairs, _ in kept for pair in pairs}) == list(range(num_kept, 8))
    resumed = contents(folder)
    shutil.rmtree(folder)
    stored(tmp_path)
    assert contents(folder) == resumed and len(resumed) == 3


@pytest.mark.parametrize("damage", ["cut short", "removed"])
def test_files_that_are_not_whole_are_not_used(damage, folder, tmp_path, caplog):
    expected = stored(tmp_path / "1").reference.train
    first, second = sorted(folder.glob("*.predictions/*"))
    before = contents(folder)
    if damage == "removed":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again = stored(tmp_path / "2").reference.train
    assert "is not whole: the reference is computed anew" in caplog.text
    assert contents(folder) == before and torch.equal(again.errors, expected.errors)


def test_computing_anew_may_be_interrupted(folder, tmp_path, monkeypatch):
    """What the errors of before would call known is not there: the file is as long as it should be, and empty."""
    stored(tmp_path)
    max(folder.glob("*.predictions/*")).unlink()
    keep, passes = reference_pass._keep_draw, itertools.count()

    def interrupted(*args):
        if next(passes) == 4:
            raise KeyboardInterrupt
        return keep(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference_pass, "_keep_draw", interrupted)
        stored(tmp_path)
    predictions = stored(tmp_path).reference.train.predictions
    for draw in range(2):
        predictions.read(torch.arange(8), draw)


def test_a_damaged_row_is_an_error_and_no_prediction(folder, tmp_path):
    trainer = stored(tmp_path, num_ref_draws=1)
    (file,) = folder.glob("*.predictions/*")
    rows = bytearray(file.read_bytes())
    rows[5 * len(rows) // 8 + 10] ^= 1  # a bit of the sixth row
    file.write_bytes(rows)
    store = trainer.reference.train.predictions
    store.read(torch.tensor([4, 6]), 0)
    with pytest.raises(DatasetError, match=r"for the pair 5 in draw 0 cannot be read .* Remove .*predictions'"):
        store.read(torch.tensor([4, 5]), 0)


def _store(path, count=3, dtype=torch.bfloat16):
    store = PredictionStore(path / "s.predictions", count, SHAPE, dtype)
    store.make(2)
    return store


def test_a_row_that_was_never_written_is_no_prediction(tmp_path):
    store = _store(tmp_path)
    one = torch.randn(2, *SHAPE).bfloat16()
    store.write(torch.tensor([2, 0]), 1, (one, -one))
    chosen, rejected = store.read(torch.tensor([0, 2]), torch.tensor([1, 1]))
    assert torch.equal(chosen, one.flip(0)) and torch.equal(rejected, -one.flip(0))
    for pair, draw in ((1, 1), (0, 0), (0, 2)):
        with pytest.raises(DatasetError, match=f"the pair {pair} in draw {draw} cannot be read"):
            store.read(torch.tensor([pair]), draw)


def test_numbers_are_never_rounded(tmp_path):
    store, one = _store(tmp_path), torch.randn(1, *SHAPE)
    exact = one.bfloat16().float()  # as a model that computes in bfloat16 and answers in float32
    store.write(torch.tensor([0]), 0, (exact, exact))
    assert torch.equal(store.read(torch.tensor([0]), 0)[0].float(), exact)
    with pytest.raises(ConfigurationError, match="stores bfloat16, and the reference predicts numbers of float32"):
        store.write(torch.tensor([0]), 0, (one, one))
    with pytest.raises(ConfigurationError, match=re.escape("shape (4, 8, 8), and the reference predicts (4, 4, 8)")):
        store.write(torch.tensor([0]), 0, (exact[:, :, :4], exact[:, :, :4]))


def test_a_disk_that_fills_up_is_said_with_the_way_out(tmp_path):
    """A limit on the size of files, which the system holds writes to as it does on a full disk."""
    store, one = _store(tmp_path), torch.zeros(1, *SHAPE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.row_bytes, before[1]))
    try:
        store.write(torch.tensor([0]), 0, (one, one))
        with pytest.raises(StorageError, match=r"cannot be written into .* the next run goes on from there"):
            store.write(torch.tensor([1]), 0, (one, one))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.read(torch.tensor([0]), 0)


def test_files_that_cannot_be_made_are_said_before_anything_is_computed(folder, tmp_path, monkeypatch):
    """A limit on the size of files, as a file system may have one, and a file in the place of the folder."""
    kept, before = passes_kept(monkeypatch), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be kept in .*predictions', in files of 16,416 bytes"):
            stored(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (place,) = folder.glob("*.predictions")
    shutil.rmtree(place)
    place.touch()
    with pytest.raises(StorageError, match="cannot be kept in .* Set HF_HOME"):
        stored(tmp_path)
    assert not kept


def test_a_disk_on_which_the_errors_have_no_room_is_said_too(tmp_path):
    """They are written last, when the predictions have taken what there was; what is left of them is removed."""
    known = reference_errors.ReferenceErrors(torch.arange(1000), torch.zeros(1000, 2, 2))
    path, before = tmp_path / "bank.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match="errors of the reference cannot be written .* the next run goes on"):
            reference_errors.write_errors(path, known, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    reference_errors.write_errors(path, known, {})
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_predictions": False}, "store them too, with `precompute_ref_predictions=True`"),
        ({"proximal_kappa": 0.0}, "`proximal_kappa=0` .* nothing would read them"),
        ({"precompute_ref_log_probs": False}, "`precompute_ref_log_probs=False`: nothing would read them"),
        ({"random_flip": True}, "contradicts random_flip=True"),
        ({"pairs": "stream"}, "the train dataset is a stream"),
        ({"eval": "stream"}, "the held out dataset is a stream"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_stored_is_refused(options, message, folder, tmp_path):
    stream = preference_pairs(4).to_iterable_dataset()
    if options.pop("eval", None):
        options = {"trainer_options": {"eval_dataset": {"held out": stream}}}
    if "pairs" in options:
        options = {"pairs": stream}
    with pytest.raises(ConfigurationError, match=message):
        stored(tmp_path, **options)
    assert not folder.exists()


# --------------------------------------------------------------------------------------------------- several processes


def _in_each_process(path, count, batch_size):
    reference_bank.reference_folder = lambda: path / "banks"
    options = {"pairs": preference_pairs(count), "per_device_train_batch_size": batch_size}
    trainer = stored(path, max_steps=3, optim="sgd", precompute_ref_batch_size=2, **options)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"loss": logged(trainer, "loss"), "errors": trainer.reference.train.errors}, path / "result.pt")


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 3])
def test_two_processes_store_what_one_does(count, tmp_path):
    """Of three pairs, the loader fills the batch up with one that the other process has: training sees it twice."""
    (tmp_path / "one").mkdir()
    _in_each_process(tmp_path / "one", count, 2)
    run_ranks(_in_each_process, tmp_path / "two", count, 1, directory=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "result.pt") for name in ("one", "two"))
    assert count == 3 or two["loss"] == pytest.approx(one["loss"], abs=1e-3)
    torch.testing.assert_close(two["errors"], one["errors"], rtol=1e-5, atol=0)
    assert not two["errors"].isnan().any()
    (path,) = (tmp_path / "two" / "banks").glob("*.predictions")
    store = PredictionStore(path, count, SHAPE, torch.float32)
    for draw in range(2):
        store.read(torch.arange(count), draw)
