# SPDX-License-Identifier: Apache-2.0
"""Rewards that are a cosine of CLIP embeddings: CLIPScore, PickScore, HPSv2 and HPSv2.1.

They differ in weights, in how an image is made square, in what stands before the prompt, and in what is done to the
cosine; each of these changes the number, so `info.convention` says them.
"""

from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from transformers import CLIPConfig, CLIPModel

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.clip_encoder import load_encoder
from trl_sipo.rewards.open_clip import VIT_H_14, load_open_clip
from trl_sipo.rewards.pixels import CropRounding, cropped_pixels, padded_pixels
from trl_sipo.rewards.weights import weights_file


@dataclass(frozen=True)
class _CLIPScoreConvention:
    """One of the two ways in which CLIPScore is printed: `scale * max(cos, 0)`, and all that goes with it."""

    scale: float
    model: str
    prefix: str
    unescape: bool
    rounding: CropRounding


CLIPSCORE_CONVENTIONS: dict[str, _CLIPScoreConvention] = {
    "hessel": _CLIPScoreConvention(2.5, "openai/clip-vit-base-patch32", "A photo depicts ", True, "torchvision"),
    "torchmetrics": _CLIPScoreConvention(100.0, "openai/clip-vit-large-patch14", "", False, "transformers"),
}


class CLIPScore(BatchedReward):
    """How well an image fits its prompt, by CLIP (Hessel et al. 2021, 2104.08718, Eq. 1).

    Args:
        convention: `"hessel"`: 2.5 max(cos, 0) with ViT-B/32 and "A photo depicts " before the prompt, as the paper's
            code; `"torchmetrics"`: 100 max(cos, 0) with ViT-L/14 and the bare prompt, as most papers on generation
            print. (torchmetrics takes the maximum of the mean; here it is taken of each score.)
        model: folder or model id of a CLIP model, or the model; by default the convention's.
        tokenizer: the same of its tokenizer; by default what lies with the model.
        prompt_prefix: another text before each prompt.
        revision: of the model in the hub.
        device: where it computes.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        batch_size: images at once.
        frames_per_video: see `BatchedReward`.

    Raises:
        ConfigurationError: another convention, or weights that do not load.
    """

    def __init__(
        self,
        convention: str = "hessel",
        *,
        model: str | CLIPModel | None = None,
        tokenizer: Any = None,
        prompt_prefix: str | None = None,
        revision: str | None = None,
        device: Any = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        if convention not in CLIPSCORE_CONVENTIONS:
            raise ConfigurationError(
                f"`convention` of clipscore must be one of {', '.join(CLIPSCORE_CONVENTIONS)}, got {convention!r}."
            )
        self._convention = CLIPSCORE_CONVENTIONS[convention]
        self.prompt_prefix = self._convention.prefix if prompt_prefix is None else prompt_prefix
        self._encoder = load_encoder(
            self._convention.model if model is None else model,
            tokenizer,
            revision=revision,
            unescape=self._convention.unescape,
            device=device,
            dtype=dtype,
        )
        text = f"{self.prompt_prefix!r} + prompt" if self.prompt_prefix else "prompt"
        super().__init__(
            RewardInfo(
                name="clipscore",
                convention=f"{self._convention.scale:g} max(cos(image, {text}), 0), {convention}",
                licence="MIT",
            ),
            models=[self._encoder.model],
            tokenizer=self._encoder.tokenizer,
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """(b,) scores; see `BatchedReward`."""
        pixels = cropped_pixels(images, self._encoder.side, rounding=self._convention.rounding)
        cosine = self._encoder.cosine(pixels, [self.prompt_prefix + prompt for prompt in prompts])
        return self._convention.scale * cosine.clamp(min=0)


class PickScore(BatchedReward):
    """What people who tried a text-to-image demo preferred (Kirstain et al. 2023, 2305.01569), by a CLIP ViT-H/14.

    Args:
        model: folder or model id of the weights, or a CLIP model.
        bare_cosine: leave out the factor exp(logit_scale), about 100; papers print either.
        tokenizer: see `CLIPScore`, as the rest is.
        revision: of the model in the hub.
        device: where it computes.
        dtype: of the weights.
        batch_size: images at once.
        frames_per_video: see `BatchedReward`.

    Raises:
        ConfigurationError: weights that do not load.
    """

    def __init__(
        self,
        model: str | CLIPModel = "yuvalkirstain/PickScore_v1",
        *,
        bare_cosine: bool = False,
        tokenizer: Any = None,
        revision: str | None = None,
        device: Any = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        self.bare_cosine = bare_cosine
        self._encoder = load_encoder(model, tokenizer, revision=revision, unescape=False, device=device, dtype=dtype)
        super().__init__(
            RewardInfo(
                name="pickscore",
                convention="cos(image, prompt)" if bare_cosine else "exp(logit_scale) cos(image, prompt)",
                licence="MIT",
            ),
            models=[self._encoder.model],
            tokenizer=self._encoder.tokenizer,
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """(b,) scores; see `BatchedReward`."""
        pixels = cropped_pixels(images, self._encoder.side, rounding="transformers")
        cosine = self._encoder.cosine(pixels, prompts)
        return cosine if self.bare_cosine else self._encoder.model.logit_scale.float().exp() * cosine


class HPSv2(BatchedReward):
    """Human Preference Score v2 (Wu et al. 2023, 2306.09341): the cosine of a CLIP ViT-H/14. Papers print it x100.

    Compare scores of the same prompt; those of version 2 and 2.1 do not compare. Published numbers are in half
    precision, and means over the benchmark's four styles of prompts.

    Args:
        model: repository of the hub, folder or file with the published weights, of open_clip's ViT-H-14; or a CLIP
            model of transformers. The published files are pickles, read by `weights_only`.
        tokenizer: folder or model id of CLIP's tokenizer, or the tokenizer.
        antialias: how images are scaled, see `padded_pixels`; the published code does as its torchvision.
        revision: of the weights in the hub.
        device: where it computes.
        dtype: of the weights.
        batch_size: images at once.
        frames_per_video: see `BatchedReward`.

    Raises:
        ConfigurationError: weights that do not load.
    """

    name = "hpsv2"
    file_name = "HPS_v2_compressed.pt"

    def __init__(
        self,
        model: str | CLIPModel = "xswu/HPSv2",
        *,
        tokenizer: Any = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        revision: str | None = None,
        device: Any = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        if isinstance(model, str):
            file = weights_file(model, self.file_name, revision=revision)
            model = load_open_clip(file, CLIPConfig(**VIT_H_14))
        self.antialias = antialias
        self._encoder = load_encoder(model, tokenizer, revision=None, unescape=True, device=device, dtype=dtype)
        super().__init__(
            RewardInfo(name=self.name, convention="cos(image, prompt)", licence="Apache-2.0"),
            models=[self._encoder.model],
            tokenizer=self._encoder.tokenizer,
            settings={"antialias": antialias},
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """(b,) scores; see `BatchedReward`."""
        return self._encoder.cosine(padded_pixels(images, self._encoder.side, antialias=self.antialias), prompts)


class HPSv21(HPSv2):
    """HPSv2.1: the same network and formula, with weights from better data."""

    name = "hpsv2.1"
    file_name = "HPS_v2.1_compressed.pt"
