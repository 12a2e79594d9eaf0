# SPDX-License-Identifier: Apache-2.0
"""Where NaN and infinity arise: the chain of a training step, its first link that broke, and what to do about it.

latents -> embeddings -> error of the reference -> error of the policy -> loss -> gradient. Whatever follows a number
that is not finite is not finite either, so it is the first link that names the cause.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trl_sipo.errors import NumericalError
from trl_sipo.trainer.encoding import EncodedPairs
from trl_sipo.trainer.statistics import PairErrors

# Link -> (what is not finite, what to do), in the order of the step.
CHAIN: dict[str, tuple[str, str]] = {
    "latents": (
        "the latents are",
        "Look at the media of these pairs, or encode them anew. A VAE in float16 overflows: have it in float32.",
    ),
    "embeddings": (
        "the embeddings of the prompt are",
        "Look at these prompts. Text encoders in float16 overflow, T5 above all: use `bf16=True`, or have them in "
        "float32.",
    ),
    "reference": (
        "the prediction error of the reference is",
        "The reference never changes, so look at its weights (NaN in a file?) and at the size of these pairs' "
        "latents. With `fp16=True` activations overflow: use `bf16=True`.",
    ),
    "policy": (
        "the prediction error of the policy is",
        "If the run was healthy until here, the policy has diverged: lower `learning_rate`, or go back to an earlier "
        "checkpoint. With `fp16=True` activations overflow: use `bf16=True`. If it is always the same few pairs, look "
        "at their media or latents.",
    ),
    "loss": (
        "the loss or the logit is",
        "The errors are finite, so it is their difference times `beta` that overflows: lower `beta`, and look at the "
        "size of these pairs' latents.",
    ),
    "gradient": (
        "the gradient is",
        "The loss is finite, so it is the backward pass that overflows: lower `learning_rate`, or go back to an "
        "earlier checkpoint; in half precision use `bf16=True`, or float32.",
    ),
}
LINKS = tuple(CHAIN)

# Pairs and parameters that an error names.
_NAMED = 8


@dataclass(frozen=True)
class BrokenPairs:
    """The pairs of a global batch of which something is not finite.

    Attributes:
        link: The first of `LINKS` that broke for any of them.
        pair_index: Those pairs of which it is this link.
        timestep: Of these pairs.
        count: Their number.
        total: Pairs of the batch.
    """

    link: str
    pair_index: list[int]
    timestep: list[float]
    count: int
    total: int


def first_broken(pairs: EncodedPairs, errors: PairErrors, loss: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """Which link broke first for each pair, (batch,) float32: 0 for none, else 1 + its position in `LINKS`.

    Nothing here waits for the device.

    Args:
        pairs: What the errors were computed from.
        errors: Of policy and reference.
        loss: Per pair, (batch,).
        logit: (batch,); it may be infinite where a mask makes the loss 0.
    """
    embeddings = [_finite_rows(rows) for rows in pairs.conditioning.values() if rows.is_floating_point()]

    def all_of(is_finite: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.ones(len(loss), dtype=torch.bool, device=loss.device), *is_finite]).all(0)

    finite = torch.stack(
        [
            all_of([_finite_rows(latents) for latents in pairs.arms]),
            all_of(embeddings),
            all_of([error.isfinite() for error in errors.reference]),
            all_of([error.isfinite() for error in errors.policy]),
            loss.isfinite() & logit.isfinite(),
        ]
    )
    # The largest value that comes first: the first link that is not finite.
    return torch.where(finite.all(0), 0, (~finite).int().argmax(0) + 1).float()


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    return values.isfinite().flatten(start_dim=1).all(1)


def broken_pairs(broken: torch.Tensor, pair_index: torch.Tensor, timestep: torch.Tensor) -> BrokenPairs:
    """The pairs of the first link that broke, from what [`first_broken`] gives for all pairs; (batch,) each."""
    first = broken[broken > 0].min()
    at_first = broken == first
    indices, timesteps = pair_index[at_first].tolist(), timestep[at_first].tolist()
    return BrokenPairs(LINKS[int(first) - 1], indices, timesteps, len(indices), len(broken))


def pairs_message(where: str, broken: BrokenPairs) -> str:
    """What is not finite for which pairs, and what to do; `where` is the step, as a sentence begins."""
    what, advice = CHAIN[broken.link]
    named = zip(broken.pair_index[:_NAMED], broken.timestep, strict=False)
    listed = _listed([f"{pair} (timestep {time:g})" for pair, time in named], broken.count)
    return (
        f"{where}: {what} not finite for {broken.count} of {broken.total} pairs: pair_index {listed}. All that comes "
        f"before it in the step is finite. {advice}"
    )


def gradient_message(where: str, parameters: list[str], num_parameters: int) -> str:
    """That the gradient is not finite, of which of so many parameters, and what to do."""
    what, advice = CHAIN["gradient"]
    if parameters:
        named = f"that of {len(parameters)} of {num_parameters} parameters: "
        named += _listed(parameters[:_NAMED], len(parameters))
    else:
        named = "its norm overflows" if num_parameters else "of which parameters, the engine does not tell"
    return f"{where}: {what} not finite, with finite losses; {named}. {advice}"


def numerical_error(message: str, folder: str | None) -> NumericalError:
    """The error to raise, which says where the reproduction lies; `None`: there is none."""
    saved = (
        ""
        if folder is None
        else f" What the step was given is in {folder}; `trl_sipo.trainer.reproduction.replay` computes it again."
    )
    return NumericalError(message + saved)


def gradient_norms(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The norm of the gradient of every parameter that has one, by name, on its device. Of shards, that of ours."""
    with_gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    local = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in with_gradient.values()]
    return dict(zip(with_gradient, torch._foreach_norm(local), strict=True)) if local else {}


def _listed(named: list[str], count: int) -> str:
    more = f" and {count - len(named)} more" if count > len(named) else ""
    return ", ".join(named) + more
