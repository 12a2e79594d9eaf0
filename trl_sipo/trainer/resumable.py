# SPDX-License-Identifier: Apache-2.0
"""How a run of TRL's trainer is saved and continued. Nothing about preferences lives here.

A class of its own, below the trainer of the training step, so that each of the two can be read alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import HubStrategy, TrainOutput

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.errors import Preempted
from trl_sipo.trainer._trl_compat import DPOTrainer
from trl_sipo.trainer.checkpoint_files import (
    checkpoint_to_resume,
    last_complete_checkpoint,
    warn_of_earlier_run,
    written_whole,
)
from trl_sipo.trainer.checkpoint_reading import check_training_state, taking_up
from trl_sipo.trainer.checkpointing import (
    STORAGE_FAILURES,
    copy_weights,
    could_not_save,
    keep_to_limit,
    load_reference,
    load_weights,
    note_best,
    save_weights,
    write_checkpoint,
)
from trl_sipo.trainer.level_memory import LevelMemory
from trl_sipo.trainer.preemption import PreemptionCallback
from trl_sipo.trainer.process_group import end_in_time, release_process_group
from trl_sipo.trainer.processes import from_main
from trl_sipo.trainer.run_state import RunState
from trl_sipo.trainer.sharding import whole


class ResumableTrainer(DPOTrainer):
    """A [`trl.DPOTrainer`] of a diffusers denoiser that writes checkpoints and continues from them.

    The attributes below are those that its heir sets.
    """

    adapter: BackboneAdapter
    level_memory: LevelMemory

    def prepare_resuming(self) -> None:
        """Add what a run needs to be continued; to be called when all else is in place, before other callbacks."""
        self.run_state, self._preemption = RunState(self), PreemptionCallback(self)
        self.add_callback(self.run_state)
        self.add_callback(self._preemption)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A path; `True` or "latest" for the last complete checkpoint in `output_dir`;
                "auto" for the same if there is one.
            trial, ignore_keys_for_eval: As for `transformers.Trainer.train`.

        Raises:
            ConfigurationError: There is no such checkpoint, or it is damaged.
            CheckpointError: A checkpoint could not be written.
            Preempted: SIGTERM came. The run has saved itself, and leaves with a status of its own.
        """
        checkpoint = from_main(lambda: self._checkpoint_to_resume(resume_from_checkpoint))
        if checkpoint is None and self.args.should_save:
            warn_of_earlier_run(Path(self.args.output_dir))
        try:
            with self._preemption.watching():
                return super().train(checkpoint, trial, ignore_keys_for_eval)
        except Preempted:
            self.end()  # else a thread of the process group may abort a process that leaves
            raise
        except SystemExit as leaving:
            end_in_time(leaving, self.args.world_size)
            raise

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        checkpoint = checkpoint_to_resume(self.args.output_dir, wanted)
        if checkpoint is not None:
            check_training_state(Path(checkpoint))
        return checkpoint

    def get_train_dataloader(self) -> DataLoader:
        """The inherited one, whose workers outlive the SIGTERM that ends the run."""
        return self._preemption.spare_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The inherited one, likewise."""
        return self._preemption.spare_workers(super().get_eval_dataloader(eval_dataset))

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        """The trained module without the engine's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def end(self) -> None:
        """Finish the trackers and leave the group of processes, at the very end of a script."""
        release_process_group(self.accelerator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A LoRA as `pipe.load_lora_weights` reads it, or a whole pipeline as `from_pretrained` reads it.

        Other files of the folder stay. The folders of a pipeline (`unet`, `vae`) are replaced as they are.

        Args:
            output_dir: `args.output_dir` if not given.

        Raises:
            CheckpointError: It could not be written. What was there before is as it was.
        """
        try:
            super().save_model(output_dir, _internal_call)
        except STORAGE_FAILURES as error:
            if _internal_call:  # a part of a checkpoint, whose error says more
                raise
            run_dir = self.args.output_dir
            raise could_not_save(Path(output_dir or run_dir), Path(run_dir), error) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with whole(self.adapter, self.unwrapped_model) as model:
            if not self.args.should_save:
                return
            with written_whole(Path(output_dir or self.args.output_dir)) as folder:
                save_weights(self.adapter, model, str(folder))
                torch.save(self.args, folder / "training_args.bin")

    def _save_checkpoint(self, model, trial) -> None:
        """TRL's model card, then a checkpoint that is there as a whole or not at all."""
        checkpoint = write_checkpoint(self, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self.adapter, self.unwrapped_model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with taking_up(checkpoint, "optimizer.pt and scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with taking_up(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    @property
    def reads_stream(self) -> bool:
        """Whether the training data is a stream, of which only a counter knows how far it was read."""
        return isinstance(self.train_dataset, StreamingPreferenceDataset)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Epochs and batches to skip. Transformers takes `max_steps` for one epoch of a stream, and skips wrongly."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            if self.state.best_model_checkpoint is None:  # not where it was: the run's folder has been moved
                note_best(self, Path(resume_from_checkpoint).parent)
            self.level_memory.load(resume_from_checkpoint)
            if self.args.sync_ref_model:
                load_reference(self.adapter, self.ref_model, resume_from_checkpoint)
        return self.run_state.start_from(resume_from_checkpoint, start, num_update_steps_per_epoch, num_train_epochs)

    def _maybe_log_save_evaluate(
        self,
        tr_loss,
        grad_norm,
        model,
        trial,
        epoch,
        ignore_keys_for_eval,
        start_time,
        learning_rate=None,
    ) -> None:
        """The inherited one, which at the end of an epoch knows its last step even where that was before a break."""
        if learning_rate is None:
            grad_norm, learning_rate = self.run_state.last_step
        self.run_state.last_step = (grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        self._preemption.leave_if_saved()

    def _determine_best_metric(self, metrics, trial):
        # With `save_strategy="best"` the answer decides whether the step is saved, whatever else asks for it.
        return super()._determine_best_metric(metrics, trial) or self._preemption.is_stopping

    def _finalize_training(self, trial, num_train_samples, start_time):
        """The inherited one, of all parts of the run: its mean loss, and its time."""
        # With a limit of 1 it would leave the best checkpoint alone, and delete the last one, in place.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, self.run_state.start_time(start_time))
        finally:
            self.args.save_total_limit = limit
        # A run that was stopped after it had saved, and before it could delete, has nothing more to save.
        if limit and self.args.should_save and not self.args.save_only_model:
            newest = last_complete_checkpoint(Path(self._get_output_dir(trial=trial)))
            if newest is not None:
                keep_to_limit(self, newest)
        return output

    def _load_best_model(self) -> None:
        load_weights(self.adapter, self.unwrapped_model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # What is still being pushed must not change; transformers leaves this one out then.
        if self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done():
            # transformers copies files of transformers' and PEFT's names only: the model would be one without weights.
            copy_weights(checkpoint_folder, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
