# SPDX-License-Identifier: Apache-2.0
"""Where the reference prediction comes from: an adapter switched off, a frozen adapter, or a frozen model.

One interface for the training step: `with reference.active() as denoiser:` gives the module to call.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel

from trl_sipo.trainer._trl_compat import prepare_reference_model, use_adapter
from trl_sipo.trainer.attention import use_attention_backend
from trl_sipo.trainer.model_preparation import REFERENCE_ADAPTER_NAME, load_reference_denoiser


class Reference(Protocol):
    """Something that can lend the reference denoiser for the duration of a `with` block."""

    description: str

    def active(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Lend the module to call; the policy is as before when the block ends."""


class AdapterReference:
    """The policy with another adapter in force: none (a new LoRA), or a frozen copy of a trained one.

    Costs no second model. Raises nothing of its own; the policy's adapter is restored when the block ends.

    Args:
        adapter_name: `None` to switch adapters off, else the name of the frozen adapter.
    """

    def __init__(self, adapter_name: str | None):
        self.adapter_name = adapter_name
        self.description = (
            "the base model (adapter switched off)"
            if adapter_name is None
            else f"a frozen copy of the given adapter (adapter {adapter_name!r})"
        )

    @contextmanager
    def active(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Yield `model` with the reference adapter in force; `unwrapped` is the PeftModel inside it."""
        was_training, trained = unwrapped.training, [one for one in unwrapped.parameters() if one.requires_grad]
        unwrapped.eval()  # a reference has no dropout, whatever the policy has
        try:
            with use_adapter(unwrapped, self.adapter_name):
                # PEFT freezes an adapter that is off, and FSDP2 settles at the first call what has a gradient.
                for weight in trained:
                    weight.requires_grad_(True)
                yield model
        finally:
            unwrapped.train(was_training)


class FrozenModelReference:
    """A denoiser of its own that is never trained.

    Args:
        ref_model: The frozen denoiser, already placed (and sharded) by the trainer.
        description: What it is, for the start of the run's log.
    """

    def __init__(self, ref_model: torch.nn.Module, description: str):
        self.ref_model = ref_model
        self.description = description

    @contextmanager
    def active(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Yield the frozen denoiser."""
        yield self.ref_model


class NoReference:
    """The reference of a method that has none: no pass of it, and no model.

    Args:
        live: The base of a LoRA, which costs nothing to keep and is shown in sample grids; `None` without one.
    """

    description = "none"

    def __init__(self, live: Reference | None):
        self.live = live

    def active(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Lend the base of the LoRA."""
        assert self.live is not None, "check_model_arguments refuses what would need one"
        return self.live.active(model, unwrapped)


def make_reference(trainer: Any, ref_model: Any, was_adapted: bool, *, is_precomputed: bool = False) -> Reference:
    """The reference of a trainer whose model is placed: the given one, the adapter's base or copy, or a frozen copy.

    Args:
        trainer: The trainer, initialised as far as its `adapter`, `model` and `accelerator`.
        ref_model: The user's `ref_model` argument, or `None`.
        was_adapted: Whether the model came with a trained LoRA; `lora_reference` says what that is compared with.
        is_precomputed: Whether the reference is needed before training alone, when the policy itself can be it.
    """
    name = REFERENCE_ADAPTER_NAME if was_adapted and trainer.args.lora_reference == "copy" else None
    if not trainer.args.has_reference:
        return NoReference(AdapterReference(name) if isinstance(trainer.model, PeftModel) else None)
    if ref_model is not None:
        frozen = load_reference_denoiser(ref_model, trainer.model, trainer.adapter).to(trainer.args.device)
        use_attention_backend(frozen, trainer.args.attention_backend)
        return FrozenModelReference(prepare_reference_model(trainer, frozen), "the given `ref_model`")
    if isinstance(trainer.model, PeftModel):
        return AdapterReference(name)
    if is_precomputed:
        return FrozenModelReference(trainer.model.eval(), "the model at the start")
    frozen = copy.deepcopy(trainer.model).requires_grad_(False).eval()
    return FrozenModelReference(prepare_reference_model(trainer, frozen), "a frozen copy of the model at the start")
