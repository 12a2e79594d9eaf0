# SPDX-License-Identifier: Apache-2.0
"""What the demo's models are trained from nothing with: learning rate, weight average, and a state that continues."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def learning_rate_at(step: int, num_steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a half cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class WeightAverage:
    """Exponential moving average of the parameters of some modules, warmed up over the first steps."""

    def __init__(self, modules: Sequence[torch.nn.Module], decay: float) -> None:
        self.modules = list(modules)
        self.decay = decay
        self.num_updates = 0
        self.averages = [copy.deepcopy(list(module.parameters())) for module in self.modules]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for module, averages in zip(self.modules, self.averages, strict=True):
            torch._foreach_lerp_(averages, list(module.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to_modules(self) -> None:
        """Overwrite the parameters with their averages."""
        for module, averages in zip(self.modules, self.averages, strict=True):
            for parameter, average in zip(module.parameters(), averages, strict=True):
                parameter.copy_(average)


class Training:
    """State of the training of some modules: everything that has to be restored to continue it exactly.

    Args:
        modules: What is trained, by name; moved to `device` and put in train mode.
        learning_rate: The peak of `learning_rate_at`.
        num_steps: Length of the training.
        seed: Of `generator`, from which all draws of the training come.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        *,
        learning_rate: float,
        num_steps: int,
        seed: int,
        device: str,
        weight_decay: float = 0.01,
        ema_decay: float = 0.9995,
    ) -> None:
        self.modules = {name: module.to(device).train() for name, module in modules.items()}
        self.parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        self.learning_rate, self.num_steps = learning_rate, num_steps
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.average = WeightAverage(list(self.modules.values()), ema_decay)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.step = 0
        self.log: list[dict] = []

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimiser, and of the weight average."""
        set_learning_rate(self.optimizer, learning_rate_at(self.step, self.num_steps, self.learning_rate))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1

    def finish(self) -> list[dict]:
        """Leave the averaged weights in the modules, in eval mode; returns the log."""
        self.average.copy_to_modules()
        for module in self.modules.values():
            module.eval()
        return self.log

    def save(self, path: Path) -> None:
        """Write the state to one file, replacing it only when the new one is complete."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "averages": self.average.averages,
            "generator": self.generator.get_state(),
            "step": self.step,
            "log": self.log,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file that `save` wrote."""
        state = torch.load(path, map_location=self.generator.device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.averages = state["averages"]
        self.average.num_updates = self.step = state["step"]
        self.generator.set_state(state["generator"].cpu())
        self.log = state["log"]
