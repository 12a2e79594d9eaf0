# SPDX-License-Identifier: Apache-2.0
"""Independently trained bases of the embedded model, beside the one that is shipped.

Denoiser and text encoder are trained from other random weights, on other draws of the data; the autoencoder and the
two verifiers are the shipped ones, so that measures of all bases are in the same units.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class Base:
    """How a base is trained.

    Attributes:
        name: Of its folder.
        seed: Of weights and data; None: the shipped base.
        steps, batch_size, learning_rate: Of the denoiser and the text encoder.
    """

    name: str
    seed: int | None = None
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3


#: The shipped one had 5000 steps of 128; the second half as many images per step and half as many steps; the third is
#: weak.
BASES = {
    "shipped": Base("shipped"),
    "second": Base("second", seed=1, steps=2500),
    "weak": Base("weak", seed=2, steps=900),
}


def folder_of(base: Base, root: Path) -> Path:
    """The folder with `pipeline/` and `verifier/`; a base that is not there yet is trained, minutes on one thread."""
    from trl_sipo.demo.images import IMAGES

    if base.seed is None:
        return IMAGES.base
    folder = root / base.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "verifier").is_dir():
            _train(base, folder)
            shutil.copytree(IMAGES.base / "verifier", folder / "verifier")
    return folder


def _train(base: Base, folder: Path) -> None:
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.demo.model import build_pipeline, load_pipeline_assets
    from trl_sipo.demo.pretrain import train_denoiser

    pipeline = build_pipeline(base.seed)
    pipeline.vae = load_pipeline_assets(IMAGES.base / "pipeline").vae.eval().requires_grad_(False)
    train_denoiser(
        pipeline,
        num_steps=base.steps,
        batch_size=base.batch_size,
        learning_rate=base.learning_rate,
        seed=base.seed + 3,
        device="cpu",
        state_file=folder / "training.pt",
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.half()
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "training.pt").unlink(missing_ok=True)
