# SPDX-License-Identifier: Apache-2.0
"""Sample grids during training: the same prompts and seeds each time, the base model beside the current one."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from trl_sipo.errors import ConfigurationError, DatasetError, RewardError, StorageError
from trl_sipo.generation.media_files import to_frames
from trl_sipo.trainer._trl_compat import log_by_itself
from trl_sipo.trainer.compilation import uncompiled
from trl_sipo.trainer.sample_files import (
    BASE_FOLDER,
    samples_folder,
    set_samples_aside,
    step_name,
    write_animation,
    write_picture,
    write_samples,
    write_settings,
)

logger = logging.getLogger(__name__)

# Frames of each clip that a contact sheet shows, evenly spaced.
SHEET_FRAMES = 6
_GAP = 4
_MAX_ANIMATION_SIDE = 16383  # of the WebP format


class SampleGridCallback(TrainerCallback):
    """Draws the same prompts with the same seeds every `sample_every_steps`, the base model beside the current one.

    Writes `<output_dir>/samples/step-<step>.png` and hands this image to the active trackers. Of images it is one row
    per prompt, the reference on the left and the current model on the right. Of videos it is a contact sheet, two rows
    of frames per prompt with the reference above the current model, and `step-<step>.webp` beside it plays both. The
    single pictures are beside it too (see `trl_sipo.trainer.sample_files`), and rewards score them where
    `sample_rewards` asks for it. A full disk costs pictures, and not the run.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        check_grids(trainer)
        self.trainer = trainer
        self._base: list[np.ndarray] | None = None
        self._base_scores: dict[str, float] = {}
        self._has_warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw the reference's samples once."""
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            self._written(lambda: set_samples_aside(args.output_dir))
        self._draw_base()

    def on_step_end(self, args, state, control, **kwargs):
        """Draw a grid when its step has come."""
        if state.is_world_process_zero and state.global_step % args.sample_every_steps == 0:
            self.save(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Let scorers outside of this process go."""
        if self.trainer.sample_rewards is not None:
            self.trainer.sample_rewards.close()

    def save(self, step: int) -> Path:
        """Draw the grid of `step`, write, report and score it; returns its path."""
        base = self._draw_base() if self._base is None else self._base
        current = self._draw(use_reference=False)
        path = self._folder / f"{step_name(step)}.png"
        grid = side_by_side([clip[0] for clip in base], [clip[0] for clip in current])
        if self._frame_rate is not None:
            grid = contact_sheet(base, current)
            self._written(lambda: save_animation(path.with_suffix(".webp"), base, current, self._frame_rate))
        self._written(lambda: write_picture(path, grid))
        self._written(lambda: write_samples(path.with_suffix(""), current, self._frame_rate))
        for reporter in _REPORTERS:
            reporter(self.trainer, grid, step)
        self._log_scores(step, current)
        return path

    @property
    def _folder(self) -> Path:
        return samples_folder(self.trainer.args.output_dir)

    @cached_property
    def _frame_rate(self) -> float | None:
        """Of videos; `None`: images are drawn."""
        args = self.trainer.args
        return None if args.num_frames == 1 else args.frame_rate or self.trainer.adapter.frame_rate

    def _draw_base(self) -> list[np.ndarray]:
        """The reference's samples, drawn, written and scored."""
        trainer, args = self.trainer, self.trainer.args
        base = self._base = self._draw(use_reference=True)
        settings = {
            "prompts": args.sample_prompts,
            "seed": args.sample_seed,
            "num_inference_steps": args.sample_num_inference_steps,
            "guidance_scale": args.sample_guidance_scale,
            "size": trainer.size,
            "num_frames": args.num_frames,
            "frame_rate": self._frame_rate,
        }
        self._written(lambda: write_settings(self._folder, settings))
        self._written(lambda: write_samples(self._folder / BASE_FOLDER, base, self._frame_rate))
        if trainer.sample_rewards is not None:  # what cannot be scored raises here, before the first step
            self._base_scores = trainer.sample_rewards.score(base, args.sample_prompts)
        return base

    def _log_scores(self, step: int, current: list[np.ndarray]) -> None:
        """Log the rewards of a grid; a scorer that fails in the middle of a run leaves a gap, and a warning."""
        if self.trainer.sample_rewards is None:
            return
        try:
            scores = self.trainer.sample_rewards.score(current, self.trainer.args.sample_prompts)
        except (RewardError, DatasetError) as error:  # the prompts could be scored before; a picture may be at fault
            logger.warning("Step %d: the samples could not be scored, and training goes on. %s", step, error)
            return
        base = {f"samples/{name}_base": score for name, score in self._base_scores.items()}
        log_by_itself(self.trainer, {f"samples/{name}": score for name, score in scores.items()} | base)

    def _written(self, write: Callable[[], None]) -> None:
        """Write pictures; where that fails say so, the first time: training is worth more than its pictures."""
        try:
            write()
        except (OSError, StorageError) as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("Samples are missing, and training goes on: %s", error)

    def _draw(self, *, use_reference: bool) -> list[np.ndarray]:
        """One clip (frames, height, width, 3) uint8 per prompt; a single frame of image models.

        Prompt by prompt: a decoder's memory does not then grow with their number.
        """
        trainer, args = self.trainer, self.trainer.args
        with sampling_pipeline(trainer, use_reference=use_reference):
            return [
                to_frames(
                    trainer.adapter.sample(
                        prompt,
                        *trainer.size,
                        num_frames=args.num_frames,
                        num_inference_steps=args.sample_num_inference_steps,
                        guidance_scale=args.sample_guidance_scale,
                        frame_rate=args.frame_rate,
                        generator=torch.Generator().manual_seed(args.sample_seed + index),
                    )
                )
                for index, prompt in enumerate(args.sample_prompts)
            ]


def check_grids(trainer: Any) -> None:
    """Raise [`ConfigurationError`], before training, when the grids that are asked for cannot be drawn or stored."""
    args, (height, _) = trainer.args, trainer.size
    if args.num_frames > 1 and len(args.sample_prompts) * (height + _GAP) > _MAX_ANIMATION_SIDE:
        raise ConfigurationError(
            f"An animation of {len(args.sample_prompts)} `sample_prompts`, {height} px each, is higher than the "
            f"{_MAX_ANIMATION_SIDE} px that a WebP file may have. Draw at most "
            f"{_MAX_ANIMATION_SIDE // (height + _GAP)} prompts."
        )
    if args.sample_num_inference_steps < 2 and getattr(trainer.noise_schedule, "shift_terminal", None) is not None:
        raise ConfigurationError(
            f"`sample_num_inference_steps={args.sample_num_inference_steps}`, but this model's sampler stretches its "
            "last step, for which it needs at least 2."
        )


@contextmanager
def sampling_pipeline(trainer: Any, *, use_reference: bool = False):
    """The trainer's pipeline, ready to sample from the current policy or its reference; all is restored afterwards."""
    adapter, model = trainer.adapter, trainer.unwrapped_model
    pipeline, was_training = adapter.pipeline, model.training
    progress = dict(getattr(pipeline, "_progress_bar_config", {}))
    trained = adapter.denoiser
    model.eval()
    pipeline.set_progress_bar_config(disable=True)
    try:
        # Uncompiled: graphs of the shapes of sampling would take the place of those of training, and be slower there.
        with torch.no_grad(), trainer.accelerator.autocast(), uncompiled():
            if not use_reference:
                yield pipeline
            else:
                with trainer.reference.active(trained, model) as denoiser:
                    adapter.install_denoiser(trainer.accelerator.unwrap_model(denoiser))
                    yield pipeline
    finally:
        adapter.install_denoiser(trained)
        pipeline.set_progress_bar_config(**{"disable": False, **progress})
        model.train(was_training)


def side_by_side(left: list[np.ndarray], right: list[np.ndarray]) -> Image.Image:
    """Two columns of equally sized images (height, width, 3), row by row, on white."""
    return _tiles([[a, b] for a, b in zip(left, right, strict=True)])


def contact_sheet(base: list[np.ndarray], current: list[np.ndarray], num_frames: int = SHEET_FRAMES) -> Image.Image:
    """Evenly spaced frames of clips (frames, height, width, 3): per prompt a row of the base, then the current one."""
    rows = []
    for clips in zip(base, current, strict=True):
        for clip in clips:
            chosen = np.linspace(0, len(clip) - 1, min(num_frames, len(clip))).round().astype(int)
            rows.append([clip[index] for index in chosen])
    return _tiles(rows)


def save_animation(path: Path, base: list[np.ndarray], current: list[np.ndarray], frame_rate: float) -> None:
    """An animated WebP of clips (frames, height, width, 3): per prompt a row, the base on the left."""
    frames = [
        side_by_side([clip[index] for clip in base], [clip[index] for clip in current])
        for index in range(len(base[0]))
    ]
    write_animation(path, frames, frame_rate)


def _tiles(rows: list[list[np.ndarray]]) -> Image.Image:
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (x * (width + _GAP), y * (height + _GAP)))
    return sheet


def _report_to_tensorboard(trainer: Any, grid: Image.Image, step: int) -> None:
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")


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
