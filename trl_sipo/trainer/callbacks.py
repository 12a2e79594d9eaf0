# SPDX-License-Identifier: Apache-2.0
"""What watches a run: sample grids on disk and in the tracker, and warnings when training goes wrong."""

import logging
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sipo.trainer._trl_compat import SyncRefModelCallback
from trl_sipo.trainer.checkpointing import (
    ReferenceCheckpointCallback,
    StreamPosition,
    load_stream_position,
    save_stream_position,
)

logger = logging.getLogger(__name__)

# Consecutive logs over which the winner's error must rise before a warning, and the rise that is worth one.
DRIFT_WINDOW = 5
DRIFT_RISE = 0.05
# Share of masked pairs, and of saturated logits, above which training has all but stopped; and the consecutive logs
# that must show the masked share, since a single small batch is masked altogether by chance.
MASKED_SHARE = 0.99
MASKED_WINDOW = 3
SATURATED_SHARE = 0.5


class EpochCallback(TrainerCallback):
    """Tells the trainer which epoch begins, on which the noise of a pair and its crop and flip depend.

    `state.epoch` alone will not do: of a stream it is a guess, and accelerate passes the epoch on to a dataset only
    when its sampler does not take it. For the same reason every checkpoint gets a file that says where a stream is.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._epoch: int | None = None
        self._steps = 0
        self._start: StreamPosition | None = None

    def start_from(self, checkpoint: str | None) -> StreamPosition | None:
        """Prepare for a run that resumes from `checkpoint`, or a new one; returns where in a stream it begins.

        `None` leaves it to the state, which knows where a dataset of known length is.
        """
        is_resumed_stream = checkpoint is not None and self.trainer.reads_stream
        self._start = load_stream_position(checkpoint) if is_resumed_stream else None
        return self._start

    def on_train_begin(self, args, state, control, **kwargs):
        """A new or a resumed run."""
        self._epoch = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Count."""
        self._steps = 0
        if self._epoch is not None:
            self._epoch += 1
        elif self._start is not None:
            self._epoch, self._steps = self._start.epoch, self._start.steps
        else:
            self._epoch = int(state.epoch or 0)
        self.trainer.set_epoch(self._epoch)

    def on_step_end(self, args, state, control, **kwargs):
        """Count the optimiser steps of this pass."""
        self._steps += 1

    def on_save(self, args, state, control, **kwargs):
        """Write the position of a stream into the checkpoint that was just saved."""
        if args.should_save and self.trainer.reads_stream:
            checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            save_stream_position(StreamPosition(self._epoch, self._steps), checkpoint)


class DivergenceWarningCallback(TrainerCallback):
    """Warns once, with advice, when the winner's error rises steadily, when all is masked, or when logits saturate.

    Reads the keys `drift/chosen_error`, `sipo/masked_fraction`, `sipo/empty_batches` and `rewards/saturated_fraction`
    of the training logs.
    """

    def __init__(self):
        self._drift: deque[float] = deque(maxlen=DRIFT_WINDOW)
        self._masked_logs = 0
        self._warned: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at one training log."""
        if not logs or "drift/chosen_error" not in logs or not state.is_world_process_zero:
            return
        self._drift.append(logs["drift/chosen_error"])
        drift = list(self._drift)
        steps = zip(drift, drift[1:], strict=False)
        rising = len(drift) == DRIFT_WINDOW and all(later > earlier for earlier, later in steps)
        if rising and drift[-1] > DRIFT_RISE:
            self._warn_once(
                "drift",
                f"Step {state.global_step}: the error on the chosen images has risen for {DRIFT_WINDOW} logs and is "
                f"{drift[-1]:.0%} above the reference's. The margin then grows by forgetting, and images degrade. "
                "Lower the learning rate, raise `beta`, stop earlier, or add `sft_weight`; SIPO and DPO-C&M mask such "
                "pairs.",
            )
        self._masked_logs = self._masked_logs + 1 if logs.get("sipo/masked_fraction", 0.0) >= MASKED_SHARE else 0
        if self._masked_logs >= MASKED_WINDOW:
            self._warn_once(
                "masked",
                f"Step {state.global_step}: for {MASKED_WINDOW} logs nearly all pairs have been masked, so training "
                "has all but stopped: a flat curve does not mean that it has converged. The policy has left the data: "
                "go back to an earlier checkpoint, lower the learning rate or raise `beta`; a lower `mask_threshold` "
                "lets more pairs in.",
            )
        if logs.get("sipo/empty_batches", 0) > 0:
            self._warn_once(
                "empty",
                f"Step {state.global_step}: {logs['sipo/empty_batches']:.0f} batch(es) so far were masked altogether "
                "and gave no gradient; `sipo/empty_batches` goes on counting. With few pairs per step this happens by "
                "chance: raise the batch size or `gradient_accumulation_steps`.",
            )
        if logs.get("rewards/saturated_fraction", 0.0) > SATURATED_SHARE:
            self._warn_once(
                "saturated",
                f"Step {state.global_step}: {logs['rewards/saturated_fraction']:.0%} of the logits are saturated, so "
                "most pairs give almost no gradient or a constant one. Lower `beta` or the learning rate, or stop "
                "here.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


class SampleGridCallback(TrainerCallback):
    """Draws the same prompts with the same seeds every `sample_every_steps`, the base model beside the current one.

    Writes `<output_dir>/samples/step-<step>.png` and hands the image to the active trackers. One row per prompt: the
    reference on the left, the current model on the right.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._base_rows: list[Image.Image] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw the reference's images once."""
        if state.is_world_process_zero:
            self._base_rows = self._draw(use_reference=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Draw a grid when its step has come."""
        if state.is_world_process_zero and state.global_step % args.sample_every_steps == 0:
            self.save(state.global_step)

    def save(self, step: int) -> Path:
        """Draw the grid of `step`, write it and report it; returns its path."""
        if self._base_rows is None:
            self._base_rows = self._draw(use_reference=True)
        grid = side_by_side(self._base_rows, self._draw(use_reference=False))
        path = Path(self.trainer.args.output_dir, "samples", f"step-{step:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        for reporter in _REPORTERS:
            reporter(self.trainer, grid, step)
        return path

    def _draw(self, *, use_reference: bool) -> list[Image.Image]:
        trainer, args = self.trainer, self.trainer.args
        generators = [torch.Generator().manual_seed(args.sample_seed + i) for i in range(len(args.sample_prompts))]
        with sampling_pipeline(trainer, use_reference=use_reference) as pipeline:
            latents = pipeline(
                list(args.sample_prompts),
                height=trainer.resolution,
                width=trainer.resolution,
                num_inference_steps=args.sample_num_inference_steps,
                guidance_scale=args.sample_guidance_scale,
                generator=generators,
                output_type="latent",
            ).images
            return to_images(trainer.adapter.decode(latents))


def watching_callbacks(trainer: Any) -> list[TrainerCallback]:
    """The callbacks that a trainer's configuration asks for, besides `EpochCallback`."""
    callbacks: list[TrainerCallback] = [DivergenceWarningCallback()]
    if trainer.args.sync_ref_model:
        callbacks.append(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=trainer.accelerator))
        callbacks.append(ReferenceCheckpointCallback(trainer))
    if trainer.args.sample_every_steps:
        callbacks.append(SampleGridCallback(trainer))
    return callbacks


@contextmanager
def sampling_pipeline(trainer: Any, *, use_reference: bool = False):
    """The trainer's pipeline, ready to sample from the current policy or its reference; all is restored afterwards."""
    adapter, model = trainer.adapter, trainer.unwrapped_model
    pipeline, was_training = adapter.pipeline, model.training
    progress = dict(getattr(pipeline, "_progress_bar_config", {}))
    trained = getattr(pipeline, adapter.denoiser_name)
    model.eval()
    pipeline.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            if not use_reference:
                yield pipeline
            else:
                with trainer.reference.active(trained, model) as denoiser:
                    setattr(pipeline, adapter.denoiser_name, trainer.accelerator.unwrap_model(denoiser))
                    yield pipeline
    finally:
        setattr(pipeline, adapter.denoiser_name, trained)
        pipeline.set_progress_bar_config(**{"disable": False, **progress})
        model.train(was_training)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels (n, 3, height, width) in [-1, 1] to PIL images."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def side_by_side(left: list[Image.Image], right: list[Image.Image], gap: int = 4) -> Image.Image:
    """Two columns of equally sized images, row by row, on white."""
    width, height = left[0].size
    grid = Image.new("RGB", (2 * width + gap, len(left) * (height + gap) - gap), "white")
    for row, (a, b) in enumerate(zip(left, right, strict=True)):
        grid.paste(a, (0, row * (height + gap)))
        grid.paste(b, (width + gap, row * (height + gap)))
    return grid


def _report_to_tensorboard(trainer: Any, grid: Image.Image, step: int) -> None:
    from numpy import asarray

    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image("samples", asarray(grid), step, dataformats="HWC")


def _report_to_wandb(trainer: Any, grid: Image.Image, step: int) -> None:
    if "wandb" not in trainer.args.report_to:
        return
    import wandb

    if wandb.run is not None:
        wandb.log({"samples": wandb.Image(grid), "train/global_step": step})


def _report_to_trackio(trainer: Any, grid: Image.Image, step: int) -> None:
    if "trackio" not in trainer.args.report_to:
        return
    import trackio

    trackio.log({"samples": trackio.Image(grid), "train/global_step": step})


_REPORTERS = (_report_to_tensorboard, _report_to_wandb, _report_to_trackio)
