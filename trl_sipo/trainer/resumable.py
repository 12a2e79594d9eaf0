# SPDX-License-Identifier: Apache-2.0
"""How a run of TRL's trainer is saved and continued. Nothing about preferences lives here.

A class of its own, below the trainer of the training step, so that each of the two can be read alone.
"""

import os

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.trainer._trl_compat import DPOTrainer
from trl_sipo.trainer.callbacks import EpochCallback
from trl_sipo.trainer.checkpointing import copy_weights, load_reference, load_weights, save_weights
from trl_sipo.trainer.level_memory import LevelMemory
from trl_sipo.trainer.process_group import release_process_group


class ResumableTrainer(DPOTrainer):
    """A [`trl.DPOTrainer`] of a diffusers denoiser that writes checkpoints and continues from them.

    The attributes below are those that its heir sets.
    """

    adapter: BackboneAdapter
    level_memory: LevelMemory
    _epoch_callback: EpochCallback

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        """The trained module without the engine's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def end(self) -> None:
        """Finish the trackers and leave the group of processes, at the very end of a script."""
        release_process_group(self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A LoRA as `pipe.load_lora_weights` reads it, or a whole pipeline as `from_pretrained` reads it."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        save_weights(self.adapter, self.unwrapped_model, output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self.adapter, self.unwrapped_model, resume_from_checkpoint)
        self.level_memory.load(resume_from_checkpoint)
        if self.args.sync_ref_model:
            load_reference(self.adapter, self.ref_model, resume_from_checkpoint)

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
        position = self._epoch_callback.start_from(resume_from_checkpoint)
        if position is None:
            return start
        steps = 0 if self.args.ignore_data_skip else position.steps
        return position.epoch, steps * self.args.gradient_accumulation_steps

    def _load_best_model(self) -> None:
        load_weights(self.adapter, self.unwrapped_model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers copies files of transformers' and PEFT's names only, and would push a model without weights.
        if self.is_world_process_zero():
            copy_weights(checkpoint_folder, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
