# SPDX-License-Identifier: Apache-2.0
"""The training steps that `step_time.py` compares: this library's trainers, a bare loop, and the step of others."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline, WanPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from random_pipelines import T5_TOKENS, with_own_denoiser
from step_counting import RepeatedStep
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._pytree import tree_map_only

from trl_sipo.adapters import adapter_for
from trl_sipo.trainer.methods import method_classes

PROMPTS = ("a red cat", "two dogs on a boat", "a house by the sea", "an old man")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FRAME_RATE = 16.0

# Name -> (method, settings of the trainer). The data are latents, unless the name says otherwise.
_BANK = {"precompute_ref_log_probs": True, "num_ref_draws": 1}
_SPLIT = {"split_pair_backward": True}
_PROXIMAL = {"proximal_kappa": 0.5}
IMAGES = "images encoded in the step"
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Diffusion-DPO": ("dpo", {}),
    "SIPO": ("sipo", {}),
    "SIPO, no run log": ("sipo", {"run_log": False}),
    "DPO-C&M": ("sipo", {"objective": "dpo_cm"}),
    "Poly-DPO": ("poly-dpo", {}),
    "split arms": ("dpo", _SPLIT),
    "SIPO, split arms": ("sipo", _SPLIT),
    "proximal term": ("dpo", _PROXIMAL),
    "proximal term, split arms": ("dpo", {**_PROXIMAL, **_SPLIT}),
    "precomputed reference": ("dpo", _BANK),
    "SIPO, precomputed reference": ("sipo", _BANK),
    "precomputed reference, split arms": ("dpo", {**_BANK, **_SPLIT}),
    "proximal term, stored predictions": ("dpo", {**_BANK, **_PROXIMAL, "precompute_ref_predictions": True}),
    IMAGES: ("dpo", {}),
    f"{IMAGES}, precomputed reference": ("dpo", _BANK),
}


def make_lora() -> LoraConfig:
    """The LoRA that every variant trains."""
    return LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def make_pairs(pipeline: DiffusionPipeline, options: argparse.Namespace, *, of_images: bool) -> datasets.Dataset:
    """One batch of random pairs: latents, images, or lists of frames."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.pairs)]
    height, width, frames = options.size
    generator = np.random.default_rng(0)
    if of_images:
        # Small pictures made large: noise of full size would take long to store, and longer for a clip.
        draw = lambda: Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))  # noqa: E731
        medium = draw if frames == 1 else lambda: [draw() for _ in range(frames)]
        return datasets.Dataset.from_dict(
            {"prompt": prompts, "chosen": [medium() for _ in prompts], "rejected": [medium() for _ in prompts]}
        )
    shape = adapter_for(pipeline).latent_shape(*options.size)
    feature = {3: datasets.Array3D, 4: datasets.Array4D}[len(shape)](shape, "float32")
    arms = {f"{arm}_latents": feature for arm in ("chosen", "rejected")}
    return datasets.Dataset.from_dict(
        {"prompt": prompts, **{arm: generator.standard_normal((len(prompts), *shape), "float32") for arm in arms}},
        features=datasets.Features({"prompt": datasets.Value("string"), **arms}),
    )


def trainer_step(name: str, pipeline: DiffusionPipeline, options: argparse.Namespace, folder: Path) -> RepeatedStep:
    """A step of one of this library's trainers.

    Args:
        name: A key of `TRAINERS`.
        pipeline: Its weights are shared, and stay as they are.
        options: Of `step_time.py`.
        folder: For what the trainer writes.
    """
    method, settings = TRAINERS[name]
    config_class, trainer_class = method_classes(method)
    height, width, frames = options.size
    trainer = trainer_class(
        with_own_denoiser(pipeline),
        args=config_class(
            str(folder / name),
            max_steps=1000,
            per_device_train_batch_size=options.pairs,
            lr_scheduler_type="constant",
            bf16=options.dtype == "bf16",
            gradient_checkpointing=options.checkpointing,
            use_cpu=options.device == "cpu",
            resolution=[height, width],
            num_frames=frames,
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=make_pairs(pipeline, options, of_images=name.startswith(IMAGES)),
        peft_config=make_lora(),
    )
    return RepeatedStep(trainer)


class BareStep:
    """The same passes without a library, or a peer's.

    Args:
        pipeline: Its weights are shared, and stay as they are.
        options: Of `step_time.py`.
        with_reference: Whether the reference passes the network too.
        as_peer: Encode images and prompts in the step.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        options: argparse.Namespace,
        *,
        with_reference: bool = True,
        as_peer: bool = False,
    ):
        self.pipeline = with_own_denoiser(pipeline)
        self.is_flow = isinstance(pipeline, WanPipeline)
        denoiser = self.pipeline.transformer if self.is_flow else self.pipeline.unet
        for part in (self.pipeline.vae, self.pipeline.text_encoder, denoiser):
            part.requires_grad_(False)
        if options.checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.model = get_peft_model(denoiser, make_lora()).to(options.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)  # as the trainers' default
        self.with_reference, self.as_peer = with_reference, as_peer
        self.device, self.pairs, self.dtype = options.device, options.pairs, DTYPES[options.dtype]
        if not self.is_flow:
            self.alphas_cumprod = self.pipeline.scheduler.alphas_cumprod.to(self.device)
        height, width, frames = options.size
        shape = (3, frames, height, width) if self.is_flow else (3, height, width)
        self.pixels = torch.rand(2 * options.pairs, *shape, device=self.device) * 2 - 1
        latent_shape = adapter_for(self.pipeline).latent_shape(*options.size)
        self.latents = torch.randn(2 * options.pairs, *latent_shape, device=self.device)
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.pairs)]
        with torch.no_grad():
            self.conditioning = self._encode_prompts()

    def _encode_prompts(self) -> dict[str, Any]:
        """What the denoiser is given of the prompts, for both arms."""
        encode = {"device": self.device, "do_classifier_free_guidance": False}
        if self.is_flow:
            embeds, _ = self.pipeline.encode_prompt(self.prompts, max_sequence_length=T5_TOKENS, **encode)
            found: dict[str, Any] = {"encoder_hidden_states": embeds}
        elif hasattr(self.pipeline, "text_encoder_2"):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(self.prompts, **encode)
            time_ids = torch.zeros(self.pairs, 6, device=self.device, dtype=pooled.dtype)
            added = {"text_embeds": pooled, "time_ids": time_ids}
            found = {"encoder_hidden_states": embeds, "added_cond_kwargs": added}
        else:
            embeds, _ = self.pipeline.encode_prompt(self.prompts, num_images_per_prompt=1, **encode)
            found = {"encoder_hidden_states": embeds}
        return tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), found)

    def _encode_media(self) -> Tensor:
        """Latents of both arms; clips one by one. The scale stands for what models differ in."""
        parts = self.pixels.split(1 if self.is_flow else len(self.pixels))
        latents = torch.cat([self.pipeline.vae.encode(part).latent_dist.sample() for part in parts])
        return latents * 0.18215

    def _noised(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timestep and target; level and noise are those of the pair."""
        noise = torch.randn_like(latents[: self.pairs]).repeat(2, *[1] * (latents.ndim - 1))
        shape = (-1, *[1] * (latents.ndim - 1))
        if self.is_flow:
            sigma = torch.rand(self.pairs, device=self.device).repeat(2)
            weight = sigma.view(shape)
            return (1 - weight) * latents + weight * noise, 1000 * sigma, noise - latents
        timestep = torch.randint(1000, (self.pairs,), device=self.device).repeat(2)
        alpha = self.alphas_cumprod[timestep].view(shape)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timestep, noise

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        latents, conditioning = self.latents, self.conditioning
        autocast = partial(torch.autocast, self.device, torch.bfloat16, enabled=self.dtype != torch.float32)
        if self.as_peer:
            with torch.no_grad(), autocast():
                latents, conditioning = self._encode_media().float(), self._encode_prompts()
        noisy_latents, timestep, target = self._noised(latents)
        batch = {"inputs": (noisy_latents.to(self.dtype), timestep), "kwargs": conditioning, "target": target}
        ref_errors = torch.ones(2 * self.pairs, device=self.device)
        with autocast():
            if self.with_reference:
                with torch.no_grad(), self.model.disable_adapter():
                    ref_errors = self._errors(**batch)
            errors = self._errors(**batch)
        chosen, rejected = ((ref_errors - errors) / 2).chunk(2)
        loss = -logsigmoid(5000 * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _errors(self, inputs: tuple[Tensor, Tensor], kwargs: dict[str, Any], target: Tensor) -> Tensor:
        """Mean squared errors, (2 * pairs,)."""
        prediction = self.model(*inputs, return_dict=False, **kwargs)[0]
        return (prediction.float() - target).square().flatten(1).mean(1)


def make_steps(
    pipeline: DiffusionPipeline, trainers: list[str], options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], None]]:
    """All steps by name, the bare ones and the peer's first."""
    return {
        "bare": BareStep(pipeline, options),
        "bare, no reference": BareStep(pipeline, options, with_reference=False),
        "peer": BareStep(pipeline, options, as_peer=True),
        **{name: trainer_step(name, pipeline, options, folder) for name in trainers},
    }
