# SPDX-License-Identifier: Apache-2.0
"""Arm by arm gives what both arms at once give, with the activations of one of them."""

import pytest
import torch

from tests.trainer.runs import DPO, METHODS, SIPO, collate_first, logged, lora, make_trainer, preference_pairs

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def _gradients(trainer):
    """Of one step on the first pairs in float64, by name, after the policy has been made to differ from its reference.

    In float32 the two arms, which share their noise, cancel to within its rounding.
    """
    trainer.model.double()
    if trainer.ref_model is not None:
        trainer.ref_model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, collate_first(trainer))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@each_method
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_the_gradient_of_split_pairs_is_that_of_pairs(method, is_lora, checkpointing, tmp_path):
    """Also where it flows through the importance weight (SIPO's `weight_grad`); the mask is off, to let it."""
    # The policy is moved before, so that the two arms differ.
    options = {"beta": 20.0, "gradient_checkpointing": checkpointing, "check_reference": False}
    options |= {"mask": False, "mask_threshold": None} if method.is_weighted else {}
    (loss, joint), (split_loss, split) = (
        _gradients(make_trainer(method, tmp_path, is_lora=is_lora, split_pair_backward=split, **options))
        for split in (False, True)
    )
    torch.testing.assert_close(split_loss, loss, rtol=1e-9, atol=0)
    assert joint.keys() == split.keys() and joint
    scale = max(gradient.abs().max() for gradient in joint.values())
    for name, gradient in joint.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-7, atol=1e-9 * float(scale), msg=name)
    assert scale > 0


def test_split_pairs_with_dropout_compute_the_same_arm_again(tmp_path):
    """The recomputed pass draws the dropout of the first one, or autograd would see another function."""
    trainer = make_trainer(
        DPO, tmp_path, trainer_options={"peft_config": lora(lora_dropout=0.5)}, disable_dropout=False,
        split_pair_backward=True,
    )  # fmt: skip
    outputs = []
    forward = trainer.adapter.forward
    trainer.adapter.forward = lambda *args: outputs.append(forward(*args)) or outputs[-1]
    _gradients(trainer)
    *_, chosen, rejected, again = outputs
    assert torch.equal(chosen, again) and not torch.equal(chosen, rejected)


def test_split_pairs_keep_the_activations_of_one_arm(tmp_path):
    peaks = []
    for split in (False, True):
        trainer = make_trainer(SIPO, tmp_path, split_pair_backward=split, mask=False)
        trainer.model.train()
        with _counted_activations() as peak:
            trainer.compute_loss(trainer.model, collate_first(trainer)).backward()
        peaks.append(peak[0])
    assert peaks[1] < 0.6 * peaks[0]


class _counted_activations:
    """Bytes that autograd keeps for the backward pass, at their peak; each tensor once."""

    def __enter__(self):
        self.alive, self.peak = {}, [0]
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed[0])
        self.hooks.__enter__()
        return self.peak

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        counter = self.alive.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        counter[0] += 1
        self.peak[0] = max(self.peak[0], sum(size for _, size in self.alive.values()))
        return tensor, _Released(self, storage.data_ptr())

    def release(self, pointer):
        counter = self.alive[pointer]
        counter[0] -= 1
        if counter[0] == 0:
            del self.alive[pointer]

    def __exit__(self, *exception):
        return self.hooks.__exit__(*exception)


class _Released:
    def __init__(self, counter, pointer):
        self.counter, self.pointer = counter, pointer

    def __del__(self):
        self.counter.release(self.pointer)


@pytest.mark.parametrize("split", [False, True])
def test_arms_of_different_sizes_train_together(split, tmp_path):
    standard = make_trainer(DPO, tmp_path).data_collator

    def collate(items):
        batch = standard(items)
        return {**batch, "chosen_pixels": batch["chosen_pixels"][..., :16, :]}

    options = {"data_collator": collate}
    trainer = make_trainer(DPO, tmp_path, trainer_options=options, split_pair_backward=split, learning_rate=1e-2)
    shapes = []
    pair_errors = trainer.pair_errors
    trainer.pair_errors = lambda *args: shapes.append([noise.shape[1:] for noise in args[3]]) or pair_errors(*args)
    trainer.train()
    assert shapes[0] == [(4, 4, 8), (4, 8, 8)]
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    assert abs(logged(trainer, "rewards/margins")[-1]) > 1e-4
    assert "eval_loss" in trainer.evaluate(preference_pairs(4))
