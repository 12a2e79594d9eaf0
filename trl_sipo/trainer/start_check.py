# SPDX-License-Identifier: Apache-2.0
"""The check that a run starts where its reference is: before the first update every logit must be 0.

Where the reference is made from the policy, both predict the same at the start. If they do not, every reward, every
margin and the loss itself measure something else than what was learned, and nothing in the logs tells.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.reference import AdapterReference, FrozenModelReference
from trl_sipo.trainer.reference_bank import BankedReference, reference_folder
from trl_sipo.trainer.statistics import PairErrors

# How far the root mean squared errors of two predictions that should be the same may be apart, of targets of variance
# 1: many times the rounding of a network in float32, and the spacing of bfloat16 numbers near 1.
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-3
# Ten times that where policy and reference are not computed by the same kernels.
_OTHER_KERNELS = 10.0
_NAMED = 3


def start_gap(errors: PairErrors) -> torch.Tensor:
    """How far apart the predictions of policy and reference are at least, (batch,), the largest of all arms.

    The difference of the roots of their mean squared errors: by the triangle inequality, it is at most the root mean
    square of the difference of their predictions. No pass more is needed, and a small difference stays small whatever
    the error is.
    """
    arms = zip(errors.policy, errors.reference, strict=True)
    return torch.stack([(policy.detach().sqrt() - ref.sqrt()).abs() for policy, ref in arms]).amax(0)


class StartCheck:
    """Checks the first optimiser step that a run takes; afterwards, in a resumed run, and where the policy starts
    elsewhere it does nothing.

    Args:
        trainer: A diffusion preference trainer.
        starts_at_reference: Whether the reference is what the policy is before the first step.
    """

    def __init__(self, trainer: Any, *, starts_at_reference: bool):
        self.trainer = trainer
        self._is_over = not (starts_at_reference and trainer.args.check_reference)
        self._left_out = 0

    @property
    def is_due(self) -> bool:
        """Whether no weight was changed yet."""
        return not self._is_over and self.trainer.state.global_step == self._left_out

    def begin(self) -> None:
        """A run begins."""
        self._left_out = 0

    def postpone(self) -> None:
        """The step is left out, though it counts: the weights stay as they are."""
        if self.is_due:
            self._left_out += 1

    def end(self) -> None:
        """The weights change now, and with them policy and reference part."""
        self._is_over = True

    @property
    def tolerance(self) -> float:
        """The largest gap that rounding explains."""
        trainer, args = self.trainer, self.trainer.args
        is_half = trainer.accelerator.mixed_precision != "no" or torch.float32 != trainer.adapter.input_dtype(
            trainer.unwrapped_model
        )
        has_other_kernels = (
            isinstance(trainer.reference, BankedReference)
            or args.split_pair_backward
            or args.torch_compile
            or trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
        )
        return (HALF_TOLERANCE if is_half else TOLERANCE) * (_OTHER_KERNELS if has_other_kernels else 1.0)

    def __call__(self, gap: float, where: str) -> None:
        """Raise [`ConfigurationError`], with the cause as far as it can be told, when the gap is too large."""
        tolerance = self.tolerance
        if gap <= tolerance:
            return
        raise ConfigurationError(
            f"{where}: policy and reference should predict the same before the first update, but their predictions "
            f"are at least {gap:.2g} apart (root mean square; up to {tolerance:.0e} would be rounding). So margins "
            "and rewards would not start at 0, and the loss would measure more than what is learned. "
            f"{self._cause()} If this is meant, set `check_reference=False`."
        )

    def _cause(self) -> str:
        trainer, model = self.trainer, self.trainer.unwrapped_model
        found = [_dropout(model), _stored_errors(trainer.reference)]
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # a shard cannot be compared with a whole
            found.append(_weights(trainer.reference, model, trainer.accelerator))
        return " ".join(filter(None, found)) or (
            "Weights and dtypes of the two agree, and the policy has no dropout: it holds something else that is "
            "random, or that tells training from evaluation (a hook, an attention processor, a layer of its own), or "
            "runs in another precision than its reference."
        )


def _dropout(model: nn.Module) -> str | None:
    active = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]
    if not active:
        return None
    return (
        f"The policy has dropout, which the reference has not: {_listed(active)}. Set `disable_dropout=True` (the "
        "default), or the `dropout` of the model to 0."
    )


def _stored_errors(reference: Any) -> str | None:
    if not isinstance(reference, BankedReference):
        return None
    return (
        "The errors of the reference were stored before: by other versions of PyTorch or diffusers, or on another "
        f"machine? Remove {reference_folder()} to compute them anew."
    )


def _weights(reference: Any, model: nn.Module, accelerator: Any) -> str | None:
    if isinstance(reference, AdapterReference):
        return _lora_that_acts(model) if reference.adapter_name is None else _copy(model, reference.adapter_name)
    if isinstance(reference, FrozenModelReference):
        frozen = unwrap_denoiser(accelerator.unwrap_model(reference.ref_model, keep_torch_compile=False))
        pairs = zip(unwrap_denoiser(model).named_parameters(), frozen.parameters(), strict=True)
        return _differences([(name, policy, other) for (name, policy), other in pairs])
    return None


def _lora_that_acts(model: nn.Module) -> str | None:
    """A new LoRA does nothing at first, because one of its factors is zero; the reference is the model without it."""
    acting = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for factors in (getattr(layer, "lora_B", {}), getattr(layer, "lora_embedding_B", {}))
        if any(bool(getattr(factor, "weight", factor).any()) for factor in factors.values())
    ]
    if not acting:
        return None
    return (
        "The new LoRA changes the model from the start, while its reference is the model without it: "
        f"{_listed(acting)}. Use PEFT's default `init_lora_weights=True`; a LoRA that was trained before belongs into "
        "the pipeline (`pipe.load_lora_weights`), and its frozen copy is the reference."
    )


def _copy(model: nn.Module, adapter_name: str) -> str | None:
    parameters = dict(model.named_parameters())
    return _differences(
        [
            (name, value, parameters[name.replace(".default.", f".{adapter_name}.")])
            for name, value in parameters.items()
            if ".default." in name
        ]
    )


def _differences(triples: list[tuple[str, torch.Tensor, torch.Tensor]]) -> str | None:
    """That weights of policy and reference differ, in dtype or in value."""
    dtypes = [
        f"{name} ({policy.dtype} and {other.dtype})" for name, policy, other in triples if policy.dtype != other.dtype
    ]
    if dtypes:
        return f"The weights of policy and reference have different dtypes: {_listed(dtypes)}. Load both in one."
    values = [name for name, policy, other in triples if not torch.equal(policy, other.to(policy.device))]
    if not values:
        return None
    return (
        f"The reference has other weights than the policy, which it should be a copy of: {_listed(values)}. Something "
        "changed one of the two after the trainer was made: give the model its weights before, or pass the reference "
        "that you mean as `ref_model`."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
