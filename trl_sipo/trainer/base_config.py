# SPDX-License-Identifier: Apache-2.0
"""Fields that every diffusion preference trainer shares. A `DPOConfig`; language-model-only fields are rejected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from trl_sipo.core.beta import BETA_CONVENTIONS, check_beta
from trl_sipo.core.objectives._preference_nll import check_label_smoothing
from trl_sipo.core.objectives.proximal import check_kappa
from trl_sipo.core.timestep_sampling import TIME_SAMPLERS
from trl_sipo.data.formats import Arms
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import without_secrets
from trl_sipo.trainer._trl_compat import DPOConfig
from trl_sipo.trainer.compilation import check_compile_backend
from trl_sipo.trainer.rejected_fields import REJECTED_FIELDS, default_of, reject_fields
from trl_sipo.trainer.safety_config import SafetyConfig
from trl_sipo.trainer.setting_types import check_types

MAX_TIMESTEP = 999


@dataclass
class DiffusionPreferenceConfig(SafetyConfig, DPOConfig):
    """Settings shared by all diffusion preference trainers, on top of [`trl.DPOConfig`] and [`SafetyConfig`].

    Fields of `DPOConfig` that only concern language models raise [`ConfigurationError`] when set.

    Args:
        beta: Strength of the pull to the reference, in the Diffusion-DPO convention (Wallace et al. 2024):
            `logit = beta * (chosen_logratio - rejected_logratio)` with
            `logratio = (reference error - policy error) / 2` and the error a mean over latent dimensions. Larger means
            closer to the reference. `None` takes the method's default: 5000, the published value for Stable Diffusion,
            in Diffusion-DPO, 1000 in SIPO and Poly-DPO.
        beta_convention: The convention in which `beta` is given; one of `trl_sipo.core.beta.BETA_CONVENTIONS`.
            Converted once, and printed at the start of the run. Any but the default needs a `beta`, since the defaults
            are in the Diffusion-DPO convention.
        label_smoothing: Probability in [0, 0.5) that a preference label is flipped (conservative DPO).
        soft_labels: Train labels as probabilities, which the dataset must then have: a pair with label p has p times
            the loss plus 1 - p times that of the exchanged pair, and ties (0.5) are trained. Otherwise only the side
            of 0.5 counts, and ties are dropped.
        sft_weight: Weight of an added denoising loss (mean squared error) on the chosen image.
        proximal_kappa: Weight kappa of an added pull to the reference, `(beta * kappa / 2) * (d_chosen + d_rejected)`
            with d the mean squared distance of the policy's prediction from the reference's. Above 0.5 Diffusion-DPO
            has an optimum however small beta is, with any pairs; at 0.5 with pairs of two samples of the reference.
            Another loss has another threshold, as the run says at its start. 0, the default, switches the term off.
            Needs no forward pass more, but the reference's predictions: of a live reference, or stored
            (`precompute_ref_predictions`).
        timestep_sampling: How noise levels are drawn: one of `trl_sipo.core.timestep_sampling.TIME_SAMPLERS`. With
            "stratified", and with it alone, the level of a pair depends on its batch.
        timestep_range: Part of the schedule that is trained, as two fractions: 0 is the clean end, 1 pure noise.
            `[0.06, 1.0]` is the static cut of the SIPO paper, Fig. 2 (b).
        logit_mean, logit_std: Parameters of the logit-normal sampler; larger means are noisier.
        share_noise: Whether both images of a pair receive the same noise, as in the Diffusion-DPO code.
        split_pair_backward: Run the arms of a pair through the policy one after the other, with the activations of one
            arm alive at a time: the same gradient in about half the memory of activations, for one more forward pass
            of one arm.
        precompute_ref_log_probs: Compute the errors of the reference before training, on `num_ref_draws` fixed draws
            of noise level and noise per pair, and train on these draws alone: no reference pass in a step, and no
            reference model. They are kept on disk for other runs with the same reference, data and noise. Of a stream,
            what training will read is read before.
        num_ref_draws: Draws per pair of `precompute_ref_log_probs`. Each is seen once in as many epochs.
        precompute_ref_predictions: With `precompute_ref_log_probs` and a `proximal_kappa`, store the reference's
            predictions on disk as well. What they take is said, and refused where there is no room for it, before
            anything is computed: for Stable Diffusion 1.5 at 512 px in bfloat16, 65 KB a draw of a pair.
        lora_reference: What a LoRA that came with the model, and is trained further, is compared with: "copy", a
            frozen copy of it, or "base", the model with its adapter switched off, as for a new LoRA.
        attention_backend: The kernel that computes attention, by diffusers' names ("native", "flash",
            "_native_cudnn"); it is tried before anything is loaded. `None` leaves the choice to PyTorch. U-Nets,
            Stable Diffusion 3 and CogVideoX take no other.
        importance_steps: Number of steps of the sampler grid on which importance weights are defined (the neighbour of
            t is one stride less noisy). 50 reproduces the SIPO paper's Fig. 4.
        caption_dropout: Probability in [0, 1) of replacing a prompt by the empty one.
        timestep_shift: Shift of the drawn noise levels of a flow model, `sigma = shift * u / (1 + (shift - 1) * u)`; 1
            draws sigma itself evenly. `None` takes the shift of the model's sampler, for this resolution where it
            depends on it. The grid of the importance weights keeps the sampler's shift.
        timesteps: Train on these timesteps only, evenly: those of a few-step distilled model, such as [249, 499, 749,
            999] for SDXL-Turbo. Integers in 0 .. 999; for flow models thousandths of sigma. `None`: all.
        embedded_guidance_scale: The guidance scale that a guidance-distilled model (FLUX.1-dev, HunyuanVideo) is told
            while training. `None` takes that of the pipeline's call; other models are told none.
        resolution: Height and width in pixels; one number for a square. `None` takes the model's own.
        num_frames: Frames of the training clips. 1 trains on images, which video models may take too.
        frame_rate: Frames per second at which clips are taken from videos, the same for both arms. `None` takes
            consecutive frames, at the video's own rate.
        random_start: Take each clip from a random position in the video, the same for both arms; else its beginning.
        center_crop: Crop at the centre (`True`) or at a random position, the same for both images.
        random_flip: Flip both images of a pair horizontally with probability one half.
        sample_posterior: Draw latents from the VAE's posterior (`True`) or take its mean (`False`).
        num_checked_images: Number of pairs, evenly spaced, whose images are decoded before training starts; all
            of a dataset that has no more. Of the other pairs it is only checked that the images are there and not
            empty: one of them that is broken ends the run when it comes to it. Of videos the index is read, and the
            frames of some are decoded.
        precompute_latents: Encode every image once, before training, and keep the latents in memory. Contradicts
            `center_crop=False`, `random_flip=True`, `random_start=True` and `sample_posterior=True`. Every process
            encodes and keeps the whole dataset.
        eval_noise_levels: Number of noise levels, evenly spaced over the schedule, at which `evaluate()` measures each
            held-out pair.
        eval_noise_seed: Seed of the noise in `evaluate()`. The same pairs see the same noise in every evaluation.
        sample_prompts: Prompts of the sample grids drawn during training.
        sample_every_steps: Steps between two sample grids; 0 draws none.
        sample_num_inference_steps: Sampler steps of the grids.
        sample_guidance_scale: Guidance scale of the grids. `None` takes that of the pipeline's call.
        sample_seed: Seed of the grids; the same for every grid and for the base model beside it.
        sample_rewards: Rewards, by the names of `trl_sipo.rewards` or as `load_reward` takes them, that score the
            pictures of every grid: their means are logged as `samples/<reward>` and, of the base model,
            `samples/<reward>_base`. They run on the CPU, in the main process.
        run_log: Write what `trl-sipo report` shows into `<output_dir>/run_log` while training: settings, command and
            environment of every start, every row of the log, and errors, importance weights and margins by noise
            level.
    """

    default_beta: ClassVar[float | None] = 5000.0
    """The method's `beta` where none is given, in the Diffusion-DPO convention; `None`: it has no beta."""
    rejected_fields: ClassVar[Mapping[str, str]] = REJECTED_FIELDS
    """Fields that mean nothing to the method, each with the way out."""
    arms: ClassVar[Arms] = "pair"
    """What a sample of the method is made of."""
    has_reference: ClassVar[bool] = True
    """Whether the method compares with a reference."""
    reads_trajectories: ClassVar[bool] = False
    """Whether the arms are the states that a sampler went through, recorded, instead of images."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Pull to the reference, in the Diffusion-DPO convention (with the 1/2, mean over latent "
            "dimensions). Larger stays closer to the reference. 5000 if not given; 1000 in SIPO and Poly-DPO."
        },
    )
    hub_token: str | None = field(
        default=None,
        repr=False,  # as in TRL, but for this
        metadata={"help": "Token for pushing to the hub; better logged in with, or set as HF_TOKEN."},
    )
    beta_convention: str = field(
        default="diffusion_dpo",
        metadata={"help": f"Convention in which beta is given: one of {', '.join(BETA_CONVENTIONS)}."},
    )
    soft_labels: bool = field(
        default=False, metadata={"help": "Train labels as probabilities, ties included; otherwise only their side."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of a denoising loss on the chosen image, added to the objective."}
    )
    proximal_kappa: float = field(
        default=0.0,
        metadata={"help": "Weight, in units of beta, of a pull to the reference's predictions; 0: none."},
    )
    timestep_sampling: str = field(
        default="uniform", metadata={"help": f"Sampling of noise levels: one of {', '.join(TIME_SAMPLERS)}."}
    )
    timestep_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Part of the schedule to train on, as two fractions; 0 is the clean end, 1 pure noise."},
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit-normal sampler; larger is noisier."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit-normal sampler."})
    share_noise: bool = field(default=True, metadata={"help": "Whether both images of a pair receive the same noise."})
    split_pair_backward: bool = field(
        default=False,
        metadata={"help": "Keep the activations of one arm of a pair at a time: less memory, one more forward pass."},
    )
    num_ref_draws: int = field(
        default=8,
        metadata={"help": "Draws of noise level and noise per pair for which the reference is precomputed."},
    )
    precompute_ref_predictions: bool = field(
        default=False,
        metadata={"help": "Store the predictions of a precomputed reference on disk, for the proximal term."},
    )
    lora_reference: str = field(
        default="copy",
        metadata={"help": "Reference of a LoRA that came with the model: a frozen copy of it, or the base model."},
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Kernel of the attention, by diffusers' name (native, flash, ...); PyTorch's choice if not given."
        },
    )
    importance_steps: int = field(
        default=50, metadata={"help": "Steps of the sampler grid on which importance weights are defined."}
    )
    caption_dropout: float = field(
        default=0.0, metadata={"help": "Probability of replacing a prompt by the empty one."}
    )
    timestep_shift: float | None = field(
        default=None,
        metadata={"help": "Shift of the drawn noise levels of a flow model; that of its sampler if not given."},
    )
    timesteps: list[int] | None = field(
        default=None,
        metadata={"help": "Train on these timesteps only (few-step models; SDXL-Turbo: 249 499 749 999)."},
    )
    embedded_guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance scale that a guidance-distilled model is told; its pipeline's if not given."},
    )
    resolution: list[int] | None = field(
        default=None,
        metadata={"help": "Height and width in pixels, one number for a square; the model's own if not given."},
    )
    num_frames: int = field(default=1, metadata={"help": "Frames of the training clips; 1 trains on images."})
    frame_rate: float | None = field(
        default=None,
        metadata={"help": "Frames per second at which clips are taken from videos; the video's own if not given."},
    )
    random_start: bool = field(
        default=False, metadata={"help": "Take each clip from a random position, the same for both videos."}
    )
    center_crop: bool = field(
        default=True, metadata={"help": "Crop at the centre; otherwise at a random place, the same for both images."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Flip both images of a pair horizontally with probability one half."}
    )
    sample_posterior: bool = field(
        default=False, metadata={"help": "Draw latents from the VAE's posterior; otherwise take its mean."}
    )
    num_checked_images: int = field(
        default=2000, metadata={"help": "Number of pairs whose images are decoded before training starts."}
    )
    precompute_latents: bool = field(
        default=False, metadata={"help": "Encode every image once before training and keep the latents in memory."}
    )
    eval_noise_levels: int = field(
        default=8, metadata={"help": "Number of evenly spaced noise levels at which evaluate() measures each pair."}
    )
    eval_noise_seed: int = field(default=0, metadata={"help": "Seed of the noise in evaluate()."})
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the sample grids drawn during training."}
    )
    sample_every_steps: int = field(default=0, metadata={"help": "Steps between two sample grids; 0 draws none."})
    sample_num_inference_steps: int = field(default=25, metadata={"help": "Sampler steps of the grids."})
    sample_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of the grids; that of the pipeline's call if not given."}
    )
    sample_seed: int = field(default=0, metadata={"help": "Seed of the sample grids."})
    sample_rewards: list[str] | None = field(
        default=None, metadata={"help": "Rewards that score the pictures of the grids (names of trl_sipo.rewards)."}
    )
    run_log: bool = field(
        default=True, metadata={"help": "Write down in output_dir/run_log what a report of the run shows."}
    )

    def __post_init__(self):
        # Before TRL's own __post_init__, which rewrites some of these fields.
        reject_fields(self)
        for name in ("sample_prompts", "sample_rewards"):  # one text, and not one per letter
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        for name in ("resolution", "timesteps"):  # one number may stand for a list of one
            if isinstance(value := getattr(self, name), int):
                setattr(self, name, [value])
        check_types(self, DPOConfig, label_smoothing=float)
        self._check_beta()
        self._check_objective()
        self._check_noise()
        self._check_data()
        self._check_samples()
        self._check_speed()
        self.check_safety()
        if self.bf16 is None:
            # TRL takes bfloat16 unless told otherwise, and then fails on a machine that has no accelerator for it.
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None:
            # The newer name of the same switch; set here, transformers does not warn about TRL's default.
            self.activation_checkpointing = self.gradient_checkpointing
        # Pinned memory speeds copies to an accelerator up; without one, PyTorch would warn at every data loader.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
        self._check_secrets()

    def __getstate__(self) -> dict[str, Any]:
        """Without `hub_token`: transformers pickles the arguments into checkpoints, and pushes them to the hub."""
        return {**self.__dict__, "hub_token": None}

    def _check_secrets(self) -> None:
        options = self.model_init_kwargs or {}
        if not isinstance(options, dict):
            raise ConfigurationError(f"`model_init_kwargs` must be a dict, got {type(options).__name__}.")
        secret = _secret_in(options)
        if secret is not None:
            raise ConfigurationError(
                f"`model_init_kwargs` holds a secret (`{secret}`), which would be written down with others, by "
                "trackers and in checkpoints. Log in instead (`hf auth login`), or set the variable HF_TOKEN (of a "
                "proxy: HTTPS_PROXY)."
            )

    def _check_beta(self) -> None:
        if self.default_beta is None:
            return
        if self.beta_convention not in BETA_CONVENTIONS:
            raise ConfigurationError(
                f"Unknown `beta_convention` {self.beta_convention!r}; known are {sorted(BETA_CONVENTIONS)}."
            )
        if self.beta is None:
            if self.beta_convention != "diffusion_dpo":
                raise ConfigurationError(
                    f"`beta_convention={self.beta_convention!r}` needs a `beta` in that convention: the default, "
                    f"{self.default_beta:g}, is in the Diffusion-DPO convention. Give `beta`, or remove "
                    "`beta_convention`."
                )
            self.beta = self.default_beta
        check_beta(self.beta)

    def _check_objective(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if not (math.isfinite(self.sft_weight) and self.sft_weight >= 0):
            raise ConfigurationError(f"`sft_weight` must be zero or positive, got {self.sft_weight}.")
        check_kappa(self.proximal_kappa)
        if self.lora_reference not in ("copy", "base"):
            raise ConfigurationError(f"`lora_reference` must be 'copy' or 'base', got {self.lora_reference!r}.")
        if not self.sync_ref_model:
            for config_field in fields(self):
                value, default = getattr(self, config_field.name), default_of(config_field)
                if config_field.name in ("ref_model_sync_steps", "ref_model_mixup_alpha") and value != default:
                    raise ConfigurationError(
                        f"`{config_field.name}={value}` only acts with `sync_ref_model=True`, which moves the "
                        f"reference while training. Set it, or remove `{config_field.name}`."
                    )

    def _check_noise(self) -> None:
        if self.timestep_sampling not in TIME_SAMPLERS:
            raise ConfigurationError(
                f"Unknown `timestep_sampling` {self.timestep_sampling!r}; known are {sorted(TIME_SAMPLERS)}."
            )
        ordered = len(self.timestep_range) == 2 and 0.0 <= self.timestep_range[0] < self.timestep_range[1] <= 1.0
        if not ordered:
            raise ConfigurationError(
                "`timestep_range` must be two increasing fractions of the schedule within [0, 1], such as [0.06, "
                f"1.0]; got {self.timestep_range}."
            )
        if not math.isfinite(self.logit_mean):
            raise ConfigurationError(f"`logit_mean` must be finite, got {self.logit_mean}.")
        if not (math.isfinite(self.logit_std) and self.logit_std > 0):
            raise ConfigurationError(f"`logit_std` must be positive and finite, got {self.logit_std}.")
        if self.timestep_sampling != "logit_normal" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ConfigurationError(
                f"`logit_mean={self.logit_mean}` and `logit_std={self.logit_std}` only act with "
                f"`timestep_sampling='logit_normal'`, but it is {self.timestep_sampling!r}. Set it, or remove them."
            )
        self._check_timesteps()
        if self.importance_steps < 1:
            raise ConfigurationError(f"`importance_steps` must be at least 1, got {self.importance_steps}.")
        if self.num_ref_draws < 1:
            raise ConfigurationError(f"`num_ref_draws` must be at least 1, got {self.num_ref_draws}.")
        if self.eval_noise_levels < 1:
            raise ConfigurationError(f"`eval_noise_levels` must be at least 1, got {self.eval_noise_levels}.")
        if self.do_eval and self.eval_strategy == "no":  # transformers itself sets it beside an `eval_strategy`
            raise ConfigurationError(
                "`do_eval=True` evaluates nothing by itself. Set `eval_strategy` to evaluate during training, or call "
                "`evaluate()`; otherwise remove `do_eval`."
            )

    def _check_timesteps(self) -> None:
        if self.timestep_shift is not None and not 0 < self.timestep_shift < math.inf:
            raise ConfigurationError(f"`timestep_shift` must be positive and finite, got {self.timestep_shift}.")
        if self.timesteps is None:
            return
        if not self.timesteps or any(not 0 <= timestep <= MAX_TIMESTEP for timestep in self.timesteps):
            raise ConfigurationError(
                f"`timesteps` must be whole numbers within 0 .. {MAX_TIMESTEP}, got {self.timesteps}."
            )
        others = {
            "timestep_sampling": self.timestep_sampling == "uniform",
            "timestep_range": list(self.timestep_range) == [0.0, 1.0],
            "timestep_shift": self.timestep_shift is None,
        }
        for name, is_default in others.items():
            if not is_default:
                raise ConfigurationError(
                    f"`timesteps={self.timesteps}` are drawn evenly, which contradicts "
                    f"`{name}={getattr(self, name)!r}`. Remove one of the two."
                )

    def _check_data(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"`seed` must be a whole number within [0, 2**32), got {self.seed}.")
        if not 0.0 <= self.caption_dropout < 1.0:
            raise ConfigurationError(
                f"`caption_dropout` is a probability and must lie in [0, 1), got {self.caption_dropout}."
            )
        if self.resolution is not None and (len(self.resolution) not in (1, 2) or min(self.resolution) < 1):
            raise ConfigurationError(
                "`resolution` must be a positive number of pixels, or height and width such as [480, 832]; got "
                f"{self.resolution}."
            )
        self._check_clips()
        if self.num_checked_images < 0:
            raise ConfigurationError(f"`num_checked_images` must be zero or more, got {self.num_checked_images}.")
        conflicts = self.random_encoding_settings()
        if self.precompute_latents and conflicts:
            raise ConfigurationError(
                f"`precompute_latents=True` encodes each image once, which contradicts {', '.join(conflicts)}. Set "
                "the opposite, or turn `precompute_latents` off."
            )

    def _check_clips(self) -> None:
        if self.num_frames < 1:
            raise ConfigurationError(f"`num_frames` must be at least 1, got {self.num_frames}.")
        if self.frame_rate is not None and not 0 < self.frame_rate < math.inf:
            raise ConfigurationError(f"`frame_rate` must be positive and finite, got {self.frame_rate}.")
        if self.num_frames == 1 and (self.frame_rate is not None or self.random_start):
            name = "frame_rate" if self.frame_rate is not None else "random_start"
            raise ConfigurationError(
                f"`{name}={getattr(self, name)}` only acts on videos, but `num_frames` is 1, which trains on images. "
                f"Set `num_frames`, or remove `{name}`."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the training media; `None`: the model's own."""
        return None if self.resolution is None else (self.resolution[0], self.resolution[-1])

    def clip_sampler(self) -> ClipSampler | None:
        """How clips are taken from videos; `None` where the data are images."""
        if self.num_frames == 1:
            return None
        return ClipSampler(self.num_frames, frame_rate=self.frame_rate, random_start=self.random_start)

    def random_encoding_settings(self) -> list[str]:
        """The settings under which an image or video has other latents each time, as they are written."""
        settings = {
            "center_crop=False": not self.center_crop,
            "random_flip=True": self.random_flip,
            "random_start=True": self.random_start,
            "sample_posterior=True": self.sample_posterior,
        }
        return [setting for setting, is_set in settings.items() if is_set]

    def latent_shape_of(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the latents of an arm are stored in, from that of one image or clip."""
        return latent_shape

    def check_rows(self, dataset: Any, name: str) -> None:
        """Raise [`DatasetError`] when a dataset lacks what the method needs beside prompts and arms; here nothing."""

    def _check_samples(self) -> None:
        if self.sample_every_steps < 0:
            raise ConfigurationError(f"`sample_every_steps` must be zero or more, got {self.sample_every_steps}.")
        if self.sample_num_inference_steps < 1:
            raise ConfigurationError(
                f"`sample_num_inference_steps` must be at least 1, got {self.sample_num_inference_steps}."
            )
        if self.sample_every_steps and not self.sample_prompts:
            raise ConfigurationError(
                "`sample_every_steps` is set but `sample_prompts` is empty: give the prompts to draw, or set it to 0."
            )
        if self.sample_prompts and not self.sample_every_steps:
            raise ConfigurationError(
                "`sample_prompts` are only drawn with `sample_every_steps`, which is 0: set it to the number of steps "
                "between two grids, or remove the prompts."
            )
        if self.sample_rewards and not self.sample_every_steps:
            raise ConfigurationError(
                f"`sample_rewards={self.sample_rewards}` score the pictures of sample grids, and none are drawn: set "
                "`sample_prompts` and `sample_every_steps`, or remove the rewards."
            )

    def _check_speed(self) -> None:
        check_compile_backend(self.torch_compile_backend)
        if self.tf32 and not is_torch_tf32_available():
            raise ConfigurationError(
                "`tf32=True` needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and none is here. "
                "Remove it: no result depends on it."
            )


def _secret_in(options: dict[str, Any]) -> str | None:
    """The name of an option, at any depth, that is a token or holds one, or a password within an address."""
    for name, value in options.items():
        if isinstance(value, dict):
            if (found := _secret_in(value)) is not None:
                return found
        elif isinstance(value, str) and value and ("token" in str(name) or without_secrets(value) != value):
            return str(name)
    return None
