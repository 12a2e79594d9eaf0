# SPDX-License-Identifier: Apache-2.0
"""A training step never waits for the device.

The step runs on PyTorch's meta device, which stands for a GPU: its tensors have no values, so that whatever would
fetch one (`.item()`, `if tensor`, `nonzero`, an index by a mask, a copy to main memory) raises there. A copy to the
device does not; two modes find those that are not queued, and operations that bring a tensor of main memory along.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.adapters.backbone_cases import BACKBONES
from tests.trainer.runs import DPO, METHODS, SIPO, collate_first, logged, make_trainer, preference_pairs
from tests.trainer.test_backbones import trainer_for
from trl_sipo.adapters import base
from trl_sipo.core import transfer

DEVICE = torch.device("meta")


class Waiting(AssertionError):
    """The step waits for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises [`Waiting`] where the host hands the device something in a way that waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_device = any(leaf.device == DEVICE for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if not is_on_device:
            return result
        # Tensors without dimensions are handed over as numbers, with the kernel.
        from_host = [tuple(tensor.shape) for tensor in given if tensor.device.type == "cpu" and tensor.ndim]
        is_copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if from_host and not (is_copy and kwargs.get("non_blocking")):
            raise Waiting(f"{func} takes {from_host} from main memory")
        return result


class NoNumbers(TorchFunctionMode):
    """Raises [`Waiting`] where a tensor on the device is made of numbers: a copy out of sight of [`NoWaiting`]."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor) and result.device == DEVICE:
            raise Waiting(f"{func.__name__} copies numbers to the device")
        return result


def _moved(value):
    """A batch as accelerate sends it."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    return [_moved(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def step(monkeypatch):
    """Runs one training step of a trainer on the device, forward and backward."""
    # Nothing can be pinned where there is no GPU, and the meta device has no autocast.
    monkeypatch.setattr(transfer, "QUEUEING_DEVICES", (DEVICE.type,))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(base.torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())

    def run(trainer, count=2):
        inputs = collate_first(trainer, count)
        # Prompts wait when they are first met.
        trainer._encoder(inputs, torch.device("cpu"), [], training=False)
        trainer._encoder.null = _moved(trainer.adapter.null_conditioning())
        cache = trainer._encoder._prompt_cache
        cache.update({prompt: _moved(row) for prompt, row in cache.items()})
        for module in (trainer.model, trainer.ref_model, *trainer.adapter.frozen_modules()):
            if module is not None:
                module.to(DEVICE)
        trainer.level_memory.weight = trainer.level_memory.weight.to(DEVICE)
        monkeypatch.setattr(type(trainer.accelerator), "device", DEVICE)
        trainer.recorder.is_deferred = True
        trainer.model.train()
        inputs = _moved(inputs)
        with NoWaiting(), NoNumbers():
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
        assert loss.device == DEVICE and len(trainer.recorder._pending) == 1
        gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
        assert gradients and all(gradient is not None for gradient in gradients)

    return run


SETTINGS = {
    "plain": {},
    "split": {"split_pair_backward": True},
    "checkpointed": {"gradient_checkpointing": True},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_latents": True},
    "latents": {"precompute_latents": True},
    "random": {"sample_posterior": True, "caption_dropout": 0.5, "share_noise": False, "sft_weight": 1.0},
    "stratified": {"timestep_sampling": "stratified"},
    "timesteps": {"timesteps": [100, 300]},
}


each_run = pytest.mark.parametrize(
    ("method", "setting"),
    [(method, "plain") for method in METHODS] + [(SIPO, setting) for setting in SETTINGS if setting != "plain"],
    ids=lambda value: getattr(value, "name", value),
)


@each_run
def test_a_step_does_not_wait(method, setting, step, tmp_path):
    step(make_trainer(method, tmp_path, is_lora=setting != "split", **SETTINGS[setting]))


@pytest.mark.parametrize("method", [DPO, SIPO], ids=lambda method: method.name)
def test_soft_labels_do_not_wait(method, step, tmp_path):
    pairs = preference_pairs().add_column("label", [1.0, 0.7, 0.5, 0.2] * 2)
    step(make_trainer(method, tmp_path, pairs=pairs, soft_labels=True))


def test_masked_levels_that_are_drawn_anew_do_not_wait(step, tmp_path):
    step(make_trainer(SIPO, tmp_path, mask_redraws=3))


# By what they decide on the host: which expert a level takes, where a prompt ends, whether there is an image.
WAITING = ("wan22_a14b", "qwenimage", "zimage", "hunyuanvideo15")


QUICK = ("sd3", "flux-dev", "wan21", "zimage")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow) for case in BACKBONES],
)
def test_a_step_of_a_backbone_does_not_wait(case, step, tmp_path):
    trainer = trainer_for(case, tmp_path, max_steps=1)
    if case.name not in WAITING:
        step(trainer)
        return
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        step(trainer)


INTERRUPTIONS = {
    "item": lambda loss: loss.sum().item(),
    "list": lambda loss: loss.tolist(),
    "condition": lambda loss: bool((loss > 0).any()),
    "indices": lambda loss: loss.nonzero(),
    "mask": lambda loss: loss[loss > 0],
    "copy": lambda loss: loss.detach().cpu(),
    "numpy": lambda loss: loss.detach().numpy(),
    "print": lambda loss: f"{loss.sum():.3f}",
    "blocking": lambda loss: loss + torch.ones(len(loss)).to(loss.device),
    "numbers": lambda loss: loss + torch.tensor([1.0] * len(loss), device=loss.device),
    "like": lambda loss: loss + loss.new_tensor([1.0] * len(loss)),
    "index": lambda loss: loss[torch.arange(len(loss))],
    "into": lambda loss: torch.zeros_like(loss).copy_(torch.ones(len(loss))),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_what_waits_is_found(name, step, tmp_path, monkeypatch):
    trainer = make_trainer(DPO, tmp_path, precompute_latents=True)
    pair_loss = trainer.pair_loss

    def interrupted(*args):
        loss, statistics = pair_loss(*args)
        INTERRUPTIONS[name](loss)
        return loss, statistics

    trainer.pair_loss = interrupted
    with pytest.raises((Waiting, RuntimeError, NotImplementedError, TypeError)):
        step(trainer)


@pytest.mark.gpu
@each_run
def test_steps_on_a_gpu_do_not_wait(method, setting, tmp_path):
    """From the second epoch on, when each prompt has been met; and not in the step that is logged."""
    options = {"use_cpu": False, "bf16": None, "max_steps": 6, "logging_steps": 6, **SETTINGS[setting]}
    trainer = make_trainer(method, tmp_path, is_lora=setting != "split", **options)
    training_step, unwatched = trainer.training_step, []

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.epoch >= 1 else "default")
        try:
            return training_step(*args, **kwargs)
        finally:
            unwatched.append(torch.cuda.get_sync_debug_mode() == 0)
            torch.cuda.set_sync_debug_mode("default")

    trainer.training_step = watched
    trainer.train()
    assert unwatched == [True, True, False, False, False, False]
    assert len(logged(trainer, "loss")) == 1
