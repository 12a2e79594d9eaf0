# SPDX-License-Identifier: Apache-2.0
"""The interface between a diffusers pipeline and everything else in the package.

An adapter never samples noise or time and never computes a target: it encodes prompts and media, calls the denoiser
the way the pipeline calls it in inference, and saves and loads what was trained.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trl_sipo.adapters import lora, weightless
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.sampling import draw_batch
from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.errors import BackboneError, ConfigurationError

Conditioning = dict[str, Tensor]


class BackboneAdapter(ABC):
    """What a trainer needs of one pipeline class.

    Latents are normalised, of shape (B, C, h, w) for image models and (B, C, f, h, w) for video models; a layout that
    only the denoiser knows (packing, frames before channels) exists inside [`forward`] and the VAE calls alone.

    Args:
        pipeline: a loaded pipeline of the class named by `pipeline_class_name`.

    Raises:
        BackboneError: if the pipeline is of another class, misses a component, or has a configuration that the adapter
            does not support.
    """

    pipeline_class_name: ClassVar[str]
    denoiser_name: ClassVar[str]
    frozen_names: ClassVar[tuple[str, ...]]
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer",)
    optional_names: ClassVar[tuple[str, ...]] = ()
    """Frozen modules and tokenizers that a pipeline of this class may have been saved without."""
    is_video: ClassVar[bool] = False
    lora_target_modules: ClassVar[tuple[str, ...] | str]
    """The field's conventional layers: ends of their names, or one regular expression for their whole names."""
    lora_loading_code: ClassVar[tuple[str, ...]] = ('pipe.load_lora_weights("{path}")',)
    """How a user of plain diffusers loads what [`save_lora`] wrote, for the model card."""
    frame_rate: float = 16.0
    """Frames per second at which the published model's videos play; of no meaning for image models."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """Argument of the pipeline's call that sets the strength of guidance."""
    sampling_options: ClassVar[Mapping[str, Any]] = {}
    """What the pipeline's call has no default for, and its users give it when they sample."""
    input_layer_name: str
    """First layer of the denoiser; the dtype of its weight is the one that the denoiser's inputs are cast to."""
    calls_all_blocks: ClassVar[bool] = True
    """Whether every call runs all blocks of the denoiser, as engines that spread its weights need."""
    vae_slice_size: ClassVar[int] = 8
    """Media that the VAE encodes or decodes at a time, so that memory does not grow with the batch."""

    def __init__(self, pipeline: DiffusionPipeline):
        if type(pipeline).__name__ != self.pipeline_class_name:
            raise BackboneError(
                f"{type(self).__name__} is for {self.pipeline_class_name}, not for {type(pipeline).__name__}."
            )
        names = (self.denoiser_name, *self.frozen_names, *self.tokenizer_names, "scheduler")
        needed = [name for name in names if name not in self.optional_names]
        missing = [name for name in needed if getattr(pipeline, name, None) is None]
        if missing:
            raise BackboneError(
                f"The {self.pipeline_class_name} has no {', '.join(missing)}. Load the whole pipeline: training needs "
                f"{', '.join(needed)}."
            )
        self.pipeline: Any = pipeline
        self.check_configuration()

    @abstractmethod
    def check_configuration(self) -> None:
        """Raise [`BackboneError`] if the pipeline's configuration is not one that the adapter can train."""

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the denoiser predicts: a member of `core.parameterization.PREDICTION_TYPES`."""

    @property
    @abstractmethod
    def noise_schedule(self) -> VPSchedule | FlowSchedule:
        """The training noise process at the default size, from the scheduler's configuration, never from its state."""

    def noise_schedule_for(
        self, height: int, width: int, num_frames: int = 1, num_steps: int = 50
    ) -> VPSchedule | FlowSchedule:
        """The training noise process at a size in pixels, whose neighbours are those of a sampler of `num_steps`.

        Differs from [`noise_schedule`] for flow models whose shift depends on the size.
        """
        return self.noise_schedule

    @property
    def time_range(self) -> tuple[float, float]:
        """The times of the noise schedule that the denoiser takes; (0, 1), unless a part of it is not loaded."""
        return 0.0, 1.0

    @property
    @abstractmethod
    def spatial_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""

    @property
    def frame_multiple(self) -> int:
        """A number of frames must be one more than a multiple of this; 1 for image models, which take one frame."""
        return 1

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the pipeline draws when no size is given."""

    @property
    def default_num_frames(self) -> int:
        """Frames that the pipeline draws when no number is given: its call's default, and 1 for image models."""
        return call_default(self.pipeline, "num_frames") if self.is_video else 1

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser is told a guidance scale (a guidance-distilled model)."""
        return False

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser, the module that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    def install_denoiser(self, denoiser: nn.Module) -> None:
        """Let the pipeline sample with another denoiser of the same kind (a plain module, without wrappers)."""
        setattr(self.pipeline, self.denoiser_name, denoiser)

    def frozen_modules(self) -> list[nn.Module]:
        """The VAE and the text encoders, without those that the pipeline was saved or loaded without."""
        modules = (getattr(self.pipeline, name) for name in self.frozen_names)
        return [module for module in modules if module is not None and not weightless.is_weightless(module)]

    @property
    def has_encoders(self) -> bool:
        """Whether VAE and text encoders hold their weights, so that media and prompts can be encoded."""
        return not weightless.is_weightless(self.pipeline.vae)

    def freeze(self) -> None:
        """Put everything but the denoiser in eval mode, without gradients. The denoiser is left as it is."""
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    # Prompts

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode each prompt as the pipeline does in inference, without gradients.

        Returns:
            One dict of tensors per prompt, without a batch dimension, on the text encoder's device. What a prompt
            gives does not depend on the others.
        """

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Batch the dicts of [`encode_prompts`]: every tensor gets a leading batch dimension."""
        return {key: torch.stack([item[key] for item in conditioning]) for key in conditioning[0]}

    def null_conditioning(self) -> Conditioning:
        """What an unconditional sample is given in place of a prompt, without a batch dimension (caption dropout)."""
        return self.encode_prompts([""])[0]

    # Media

    @abstractmethod
    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """Shape of the latents of one sample, without the batch dimension, for a size in pixels.

        Raises:
            ConfigurationError: as [`validate_size`].
        """

    @abstractmethod
    def normalize_latents(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the denoiser takes them."""

    @abstractmethod
    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`], the way the pipeline undoes it."""

    def validate_size(self, height: int, width: int, num_frames: int = 1) -> None:
        """Raise [`ConfigurationError`], with the nearest valid values, unless the model takes this size and length.

        Args:
            height, width: in pixels.
            num_frames: 1 for images.
        """
        multiple = self.spatial_multiple
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                below = max(size // multiple, 1) * multiple
                nearest = sorted({below, below + multiple} if size > multiple else {below})
                raise ConfigurationError(
                    f"{name} {size} is not a positive multiple of {multiple}, which {self.pipeline_class_name} needs. "
                    f"Nearest valid: {' or '.join(map(str, nearest))}."
                )
        if not self.is_video and num_frames != 1:
            raise ConfigurationError(
                f"num_frames {num_frames}, but {self.pipeline_class_name} draws images: leave num_frames at 1."
            )
        if num_frames < 1 or (num_frames - 1) % self.frame_multiple:
            below = max(num_frames - 1, 0) // self.frame_multiple * self.frame_multiple + 1
            nearest = [below, below + self.frame_multiple] if num_frames > 1 else [1]
            raise ConfigurationError(
                f"num_frames {num_frames} is not one more than a multiple of {self.frame_multiple}, which "
                f"{self.pipeline_class_name} needs. Nearest valid: {' or '.join(map(str, nearest))}."
            )

    def encode_media(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode media by the VAE, in the VAE's own dtype, without gradients.

        Args:
            pixels: (B, 3, H, W), or (B, 3, F, H, W) for video, in [-1, 1]. A video model takes images for single
                frames.
            noise: standard normal, of the latents' shape: sample the posterior, mean + std * noise. None: its mean.

        Returns:
            Normalised latents, float32, on the VAE's device.
        """
        with self._frozen_inference("vae"):
            mean, std = self._posterior(pixels)
            return self.normalize_latents(mean if noise is None else mean + std * noise.to(mean))

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of [`encode_media`]: what it gives for `noise` is mean + std * noise, to rounding.

        Returns:
            Mean and standard deviation of the normalised latents, float32, on the VAE's device.
        """
        with self._frozen_inference("vae"):
            mean, std = self._posterior(pixels)
            # Normalising is affine in each number, so that of a deviation it leaves the slope.
            return self.normalize_latents(mean), self.normalize_latents(std) - self.normalize_latents(
                torch.zeros_like(std)
            )

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before normalisation, float32."""
        if self.is_video and pixels.ndim == 4:
            pixels = pixels.unsqueeze(2)
        vae = self.pipeline.vae
        posteriors = [
            self._vae_encode(vae, part.to(vae.device, vae.dtype)) for part in pixels.split(self.vae_slice_size)
        ]
        mean = torch.cat([posterior.mean for posterior in posteriors]).float()
        return mean, torch.cat([posterior.std for posterior in posteriors]).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents as the pipeline does, without gradients.

        Returns:
            Pixels (B, 3, H, W), or (B, 3, F, H, W) for video, float32 in [-1, 1].
        """
        with self._frozen_inference("vae") as vae:
            parts = self.denormalize_latents(latents.to(vae.device)).to(vae.dtype).split(self.vae_slice_size)
            return torch.cat([self._vae_decode(vae, part) for part in parts]).float().clamp(-1, 1)

    def _vae_encode(self, vae: Any, pixels: Tensor) -> Any:
        """The posterior of some media, with `mean` and `std` in the layout of the latents, before normalisation."""
        return vae.encode(pixels).latent_dist

    def _vae_decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels of some latents that are no longer normalised."""
        return vae.decode(latents, return_dict=False)[0]

    @contextmanager
    def _frozen_inference(self, name: str) -> Iterator[Any]:
        """A frozen module in eval mode, without gradients, in its own dtype even inside a training step's autocast."""
        module = getattr(self.pipeline, name)
        if module.training:
            module.eval()
        with torch.no_grad(), torch.autocast(module.device.type, enabled=False):
            yield module

    # Denoiser

    @abstractmethod
    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Call the denoiser as the pipeline does in inference.

        Args:
            denoiser: the pipeline's own, or one of its kind under any wrapper (PEFT, compiled, distributed).
            noisy_latents: as [`encode_media`] gives them, noised; any float dtype.
            level: noise level of each sample, fields of shape (B,).
            conditioning: batched, as [`collate`] gives it.
            extra: what some backbones are told beside it; others ignore it. `"guidance_scale"` (float): the scale that
                a guidance-distilled model embeds. `"frame_rate"` (float, or (B,) tensor): frames per second. Where
                absent, the default of the pipeline's `__call__`.

        Returns:
            The prediction, of the shape of `noisy_latents`, in the denoiser's output dtype.
        """

    def input_dtype(self, denoiser: nn.Module) -> torch.dtype:
        """The dtype that the denoiser's inputs must have.

        `denoiser.dtype` is not it in general: on a PEFT model it may be that of a float32 LoRA layer over a bfloat16
        base, and some models keep single layers in float32.
        """
        base = unwrap_denoiser(denoiser)
        layer: Any = base.get_submodule(self.input_layer_name)
        weight: Any = layer.get_base_layer().weight if isinstance(layer, BaseTunerLayer) else layer.weight
        if weight.is_floating_point():
            return weight.dtype
        # Quantised weights are stored as integers: the dtype of what was not quantised, and is not a LoRA. If there is
        # nothing, any float will do, and is that of the LoRA.
        rest = (p.dtype for name, p in base.named_parameters() if p.is_floating_point() and "lora_" not in name)
        return next(rest, base.dtype)

    def enable_gradient_checkpointing(self, denoiser: nn.Module) -> None:
        """Recompute activations in the backward pass; works for a denoiser under any wrapper."""
        unwrap_denoiser(denoiser).enable_gradient_checkpointing()

    # Sampling

    def sample(
        self, prompt: str, height: int, width: int, *, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Draw one prompt: (3, H, W), or (3, F, H, W) of a video model. See [`sample_batch`]."""
        generators = None if generator is None else [generator]
        return self.sample_batch([prompt], height, width, generators=generators, **options)[0]

    def sample_batch(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        *,
        num_frames: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        frame_rate: float | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw some prompts at once with the pipeline itself.

        The VAE decodes in its own dtype, whatever the denoiser's and inside autocast too.

        Args:
            guidance_scale: None takes the default of the pipeline's call.
            frame_rate: frames per second, for pipelines that are told them; None takes the default of the call.
            generators: one per prompt, so that its noise does not depend on the others. None: torch's global one.

        Returns:
            Pixels (B, 3, H, W), or (B, 3, F, H, W) of a video model, float32 in [-1, 1], on the CPU.

        Raises:
            ConfigurationError: a guidance scale for a pipeline whose call takes none; not one generator per prompt.
        """
        steps, scale = num_inference_steps, guidance_scale
        return draw_batch(self, prompts, height, width, num_frames, steps, scale, frame_rate, generators)

    # LoRA

    def check_lora(self, denoiser: nn.Module) -> None:
        """Raise [`ConfigurationError`], before training, if [`save_lora`] could not save this PEFT model exactly."""
        lora.check_exportable(denoiser)

    def save_lora(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Save the `"default"` adapter of a PEFT model for `pipeline.load_lora_weights(directory)`.

        The loaded pipeline is the trained model exactly, whatever its rank and alpha. Errors: see [`lora.save_lora`].
        """
        lora.save_lora(type(self.pipeline), self.denoiser_name, denoiser, directory)

    def load_lora(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Restore the `"default"` adapter of a PEFT model, in place, from what [`save_lora`] wrote."""
        lora.load_lora(self.denoiser_name, denoiser, directory)

    def peft_denoiser(self) -> PeftModel:
        """The PEFT model of a denoiser that came with a LoRA: wrapped by the user, or injected by diffusers.

        The pipeline itself keeps the plain module inside, in which the LoRA acts all the same, so that it can sample.

        Raises:
            ConfigurationError: as [`adopt_injected_lora`].
        """
        if not isinstance(denoiser := self.denoiser, PeftModel):
            return self.adopt_injected_lora()
        self.install_denoiser(denoiser.get_base_model())
        return denoiser

    def adopt_injected_lora(self) -> PeftModel:
        """Turn a LoRA loaded with `pipeline.load_lora_weights` into a PEFT model that training continues.

        Returns:
            A PEFT model around the pipeline's denoiser with the same weights, trainable, as adapter `"default"`.

        Raises:
            ConfigurationError: if there is not exactly one such LoRA, or it could not be saved again as it is.
        """
        for name in self.frozen_names:
            if getattr(getattr(self.pipeline, name, None), "_hf_peft_config_loaded", False):
                raise ConfigurationError(
                    f"The pipeline's {name} carries a LoRA too, which training would neither change nor save. Load "
                    f"the LoRA of the {self.denoiser_name} alone."
                )
        return lora.adopt_injected_lora(self.denoiser)

    # Full weights

    def save_pipeline(self, directory: str | os.PathLike[str]) -> None:
        """Save the whole pipeline, its fully fine-tuned denoiser included, for `from_pretrained`.

        Of a pipeline loaded without the weights of its encoders, see [`weightless.save_pipeline`].

        Raises:
            ConfigurationError: if the denoiser carries LoRA layers, which would make the folder unloadable.
        """
        if any(isinstance(module, BaseTunerLayer) for module in self.denoiser.modules()):
            raise ConfigurationError(
                f"The {self.denoiser_name} carries LoRA layers: save them with save_lora, or merge them first "
                "(merge_and_unload) to save a pipeline."
            )
        weightless.save_pipeline(self.pipeline, Path(directory))

    def save_denoiser(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Save a denoiser alone, where [`save_pipeline`] has it in its folder; for [`load_denoiser`]."""
        unwrap_denoiser(denoiser).save_pretrained(Path(directory) / self.denoiser_name)

    def load_denoiser(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Restore a fully fine-tuned denoiser, in place, from a folder that [`save_pipeline`] wrote.

        Raises:
            BackboneError: if the folder holds no such denoiser, or one of another architecture.
        """
        restore_weights(unwrap_denoiser(denoiser), Path(directory) / self.denoiser_name)


def restore_weights(model: Any, folder: Path) -> None:
    """Restore a diffusers model, in place, from the folder that its `save_pretrained` wrote.

    Raises:
        BackboneError: if there is no such folder, or it holds a model of another architecture.
    """
    if not folder.is_dir():
        raise BackboneError(f"There is no {folder.name} in {os.fspath(folder.parent)!r}: {folder} is missing.")
    try:
        saved = type(model).from_pretrained(folder, local_files_only=True, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise BackboneError(f"{folder} does not fit the {type(model).__name__} in training: {error}") from error
