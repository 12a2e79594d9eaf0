# SPDX-License-Identifier: Apache-2.0
"""Two independent judges of a picture: is it the garment asked for, and in the colour asked for?

Each is trained on photographs that the generator never sees, and that the other judge never sees either, in random
colours; a third of them are turned and mirrored, as in the off-policy pairs, and half of what it sees has gone through
the pipeline's autoencoder, so that it judges the garment and neither its pose nor the blur. A ninth class, "none of
these", is trained on spoiled pictures (double exposures of unlike garments, shuffled quarters, noise), so that a model
which has come apart cannot score by guessing. The primary judge ranks preference pairs and reports results; the
second, of another architecture, is there to expose gains that only please the first.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from trl_sipo.demo.fashion import ASSETS, CLASSES, COLOURS
from trl_sipo.errors import BackboneError

VERIFIER_ASSETS = ASSETS / "verifier"
NONE_CLASS = len(CLASSES)
CLASS_FEATURES, COLOUR_FEATURES = 64, 16
SCORING_BATCH = 256


class PlainTrunk(nn.Sequential):
    """Three convolutions with batch normalisation and pooling: (N, 3, 32, 32) -> (N, 64)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 48), (48, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, CLASS_FEATURES), nn.ReLU())


class ResidualBlock(nn.Module):
    """Depthwise 5x5 and pointwise convolutions around a skip connection; the shape is kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.body(hidden)


class ResidualTrunk(nn.Sequential):
    """Patches of 2x2, four residual blocks at two sizes, a mean over space: (N, 3, 32, 32) -> (N, 64)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 2, stride=2),
            ResidualBlock(32),
            ResidualBlock(32),
            nn.Conv2d(32, 64, 2, stride=2),
            ResidualBlock(64),
            ResidualBlock(64),
            nn.Conv2d(64, 64, 2, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, CLASS_FEATURES),
            nn.GELU(),
        )


class ConvColourTrunk(nn.Module):
    """Two strided convolutions, then maximum and mean over space: (N, 3, 32, 32) -> (N, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()
        )
        self.project = nn.Sequential(nn.Linear(48, COLOUR_FEATURES), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.body(images)
        return self.project(torch.cat([hidden.amax((2, 3)), hidden.mean((2, 3))], dim=1))


class PooledColourTrunk(nn.Sequential):
    """A two-layer perceptron on the image averaged to 8x8: (N, 3, 32, 32) -> (N, 16)."""

    def __init__(self) -> None:
        layers = (nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, COLOUR_FEATURES))
        super().__init__(*layers, nn.GELU())


TRUNKS = {"primary": (PlainTrunk, ConvColourTrunk), "second": (ResidualTrunk, PooledColourTrunk)}
#: The split of photographs that each judge learns from.
TRAINING_SPLITS = {"primary": "verifier", "second": "second_verifier"}


class Verifier(nn.Module):
    """A judge of class and colour; `name` is a key of `TRUNKS`. Weights are untrained."""

    def __init__(self, name: str) -> None:
        super().__init__()
        class_trunk, colour_trunk = TRUNKS[name]
        self.name = name
        self.class_trunk, self.colour_trunk = class_trunk(), colour_trunk()
        self.class_head = nn.Linear(CLASS_FEATURES, len(CLASSES) + 1)
        self.colour_head = nn.Linear(COLOUR_FEATURES, len(COLOURS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, 32, 32) in [-1, 1] -> logits of the 8 classes and "none" (N, 9), of the colours (N, 8)."""
        return self.class_head(self.class_trunk(images)), self.colour_head(self.colour_trunk(images))

    @torch.no_grad()
    def scores(
        self, images: torch.Tensor, class_ids: torch.Tensor, colour_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Judge images against what was asked for.

        Args:
            images: float (N, 3, 32, 32) in [-1, 1]; values beyond are clipped.
            class_ids: int64 (N,).
            colour_ids: int64 (N,).

        Returns:
            `class_correct`, `colour_correct`, `both_correct`: bool (N,); `log_prob`: float32 (N,), the log-probability
            of the class plus that of the colour, in nats, at most 0.
        """
        parts = [self(part.float().clamp(-1, 1)) for part in images.split(SCORING_BATCH)]
        class_logits, colour_logits = (torch.cat(logits) for logits in zip(*parts, strict=True))
        class_correct = class_logits.argmax(1) == class_ids
        colour_correct = colour_logits.argmax(1) == colour_ids
        log_prob = -F.cross_entropy(class_logits, class_ids, reduction="none")
        log_prob = log_prob - F.cross_entropy(colour_logits, colour_ids, reduction="none")
        return {
            "class_correct": class_correct,
            "colour_correct": colour_correct,
            "both_correct": class_correct & colour_correct,
            "log_prob": log_prob,
        }

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Activations before the last layers, float32 (N, 80): 64 that see the class, then 16 that see the colour."""
        parts = [part.float().clamp(-1, 1) for part in images.split(SCORING_BATCH)]
        return torch.cat([torch.cat([self.class_trunk(part), self.colour_trunk(part)], dim=1) for part in parts])


def save_verifier(verifier: Verifier, directory: Path) -> None:
    """Write `<directory>/<name>.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous().cpu() for key, value in verifier.state_dict().items()}
    save_file(weights, directory / f"{verifier.name}.safetensors")


def load_verifiers(directory: Path | None = None) -> tuple[Verifier, Verifier]:
    """The shipped judges (or those that `pretrain` wrote elsewhere), for inference: (primary, second).

    Raises:
        BackboneError: a file is missing.
    """
    folder = VERIFIER_ASSETS if directory is None else Path(directory)
    verifiers = []
    for name in TRUNKS:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise BackboneError(f"{path} does not exist; make it with `python -m trl_sipo.demo.pretrain`.")
        verifier = Verifier(name)
        verifier.load_state_dict(load_file(path))
        verifiers.append(verifier.eval().requires_grad_(False))
    return verifiers[0], verifiers[1]
