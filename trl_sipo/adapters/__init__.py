# SPDX-License-Identifier: Apache-2.0
"""What each backbone knows of diffusers, and nothing else.

[`adapter_for`] gives the adapter of a loaded pipeline, [`load_pipeline`] loads one with errors a user can act on. A
new backbone is one module and one row of `ADAPTERS`.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl_sipo.errors import BackboneError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from trl_sipo.adapters.base import BackboneAdapter

ADAPTERS: dict[str, str] = {
    "CogVideoXPipeline": "trl_sipo.adapters.cogvideox:CogVideoXAdapter",
    "Flux2KleinPipeline": "trl_sipo.adapters.flux2:Flux2KleinAdapter",
    "Flux2Pipeline": "trl_sipo.adapters.flux2:Flux2Adapter",
    "FluxPipeline": "trl_sipo.adapters.flux:FluxAdapter",
    "HunyuanVideo15Pipeline": "trl_sipo.adapters.hunyuan_video15:HunyuanVideo15Adapter",
    "HunyuanVideoPipeline": "trl_sipo.adapters.hunyuan_video:HunyuanVideoAdapter",
    "LTXPipeline": "trl_sipo.adapters.ltx:LTXAdapter",
    "QwenImagePipeline": "trl_sipo.adapters.qwen_image:QwenImageAdapter",
    "StableDiffusion3Pipeline": "trl_sipo.adapters.stable_diffusion_3:StableDiffusion3Adapter",
    "StableDiffusionPipeline": "trl_sipo.adapters.stable_diffusion:StableDiffusionAdapter",
    "StableDiffusionXLPipeline": "trl_sipo.adapters.stable_diffusion_xl:StableDiffusionXLAdapter",
    "WanPipeline": "trl_sipo.adapters.wan:wan_adapter",
    "ZImagePipeline": "trl_sipo.adapters.z_image:ZImageAdapter",
}

_SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")
_DENOISER_NAMES = ("unet", "transformer", "transformer_2")
_NO_PICKLES = (
    "Weights are read from safetensors files alone, since others are pickles, which may run what they like. If you "
    "trust these, load the pipeline with diffusers once, `save_pretrained` it, and give that folder; a trainer takes "
    'them as they are with `model_init_kwargs={"use_safetensors": None}`.'
)
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def adapter_for(pipeline: "DiffusionPipeline") -> "BackboneAdapter":
    """The adapter of a loaded pipeline, chosen by the name of its class.

    Raises:
        BackboneError: if no adapter knows the class, or the pipeline's configuration is not supported.
    """
    class_name = type(pipeline).__name__
    if class_name not in ADAPTERS:
        raise BackboneError(
            f"No adapter for {class_name}. Give a loaded diffusers pipeline of one of these classes: {_known()}."
        )
    module_name, adapter_name = ADAPTERS[class_name].split(":")
    return getattr(importlib.import_module(module_name), adapter_name)(pipeline)


def load_pipeline(
    name_or_path: str | os.PathLike[str], *, weightless: Sequence[str] = (), **init_kwargs: Any
) -> "DiffusionPipeline":
    """Load a pipeline from a local folder or a model id of the Hugging Face Hub.

    The class is checked before any weight is read or downloaded. Weights are read from safetensors files, unless
    `use_safetensors` says otherwise.

    Args:
        name_or_path: local folder with a `model_index.json` (`~` is the home folder), or a model id such as
            `"org/model"`.
        weightless: components of which only the configuration is loaded; those that it does not have are passed over.
        init_kwargs: passed to `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `revision`, ...).

    Raises:
        BackboneError: if the folder or model cannot be found or read, or no adapter knows its pipeline class.
    """
    import diffusers

    from trl_sipo.adapters.weightless import weightless_component

    hub_kwargs = {key: init_kwargs[key] for key in _HUB_KEYWORDS if key in init_kwargs}
    name, loader = os.path.expanduser(name_or_path), cast(Any, diffusers.DiffusionPipeline)
    index = _read_index(name, hub_kwargs)
    # Parts that it was saved without, such as Stable Diffusion 3's T5: diffusers wants to be told of some of them.
    given: dict[str, Any] = {part: None for part, origin in index.items() if origin == [None, None]}
    for part in weightless:
        if part not in init_kwargs and (origin := _origin(name, index, part)) is not None:
            given[part] = weightless_component(name, part, origin, hub_kwargs)
    try:
        return loader.from_pretrained(name, **{"use_safetensors": True, **given, **init_kwargs})
    except Exception as error:  # of files that are broken or cut off the libraries raise errors of any kind
        message = f"The pipeline {name!r} is there but does not load: {error}"
        if "safetensors" in message and "use_safetensors" not in init_kwargs:
            message += f" {_NO_PICKLES}"
        raise BackboneError(message) from error


def denoiser_names(name_or_path: str | os.PathLike[str], revision: str | None = None) -> list[str]:
    """The components of a pipeline that are trained, and may be quantized: one, or two experts.

    Raises:
        BackboneError: as [`load_pipeline`].
    """
    index = _read_index(os.path.expanduser(name_or_path), {} if revision is None else {"revision": revision})
    name = os.fspath(name_or_path)
    return [part for part in _DENOISER_NAMES if _origin(name, index, part) is not None]


def _origin(name: str, index: dict[str, Any], part: str) -> list[str] | None:
    """Library and class of a component, as `model_index.json` has them; `None`: the pipeline has none."""
    origin = index.get(part)
    if origin is None or origin == [None, None]:
        return None
    if isinstance(origin, list) and len(origin) == 2 and all(isinstance(word, str) for word in origin):
        return origin
    raise BackboneError(
        f"The model_index.json of {name!r} has {origin!r:.80} for the {part}, which is no library and class."
    )


def _read_index(name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_index.json` of a pipeline that some adapter knows."""
    import diffusers

    _check_location(name)
    try:
        index = cast(Any, diffusers.DiffusionPipeline).load_config(name, **hub_kwargs)
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(_unreachable(name, error)) from error
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(class_name, str) or class_name not in ADAPTERS:  # a list names code that comes with the model
        raise BackboneError(f"{name!r} is a {class_name!s:.80}, which no adapter knows. Known classes: {_known()}.")
    return index


def _known() -> str:
    return ", ".join(sorted(ADAPTERS))


def _check_location(name: str) -> None:
    """Refuse what is plainly a path, but not that of a pipeline's folder."""
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise BackboneError(
                f"The folder {name!r} has no model_index.json, so it is not a saved pipeline. Give the folder that "
                "`pipeline.save_pretrained` wrote; for LoRA weights, load the base pipeline and call "
                "`pipeline.load_lora_weights`."
            )
        return
    if path.is_file() or name.endswith(_SINGLE_FILE_SUFFIXES):
        raise BackboneError(
            f"{name!r} is a single file, not a pipeline's folder. Load it with `StableDiffusionPipeline."
            "from_single_file` and give the loaded pipeline instead of its path."
        )
    if name.startswith((".", "/", "\\")) or len(Path(name).parts) != 2:
        raise BackboneError(
            f"There is no folder {name!r} (seen from {os.getcwd()}), and it is not a model id of the form 'org/model'."
        )


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"The pipeline {name!r} is not a local folder, and the Hugging Face Hub did not give its model_index.json. If "
        "it is a folder, check the path; if it is a model id, check its spelling, the connection (HF_HUB_OFFLINE=1 "
        f"allows only models already in the cache) and, for a gated model, `hf auth login`. Cause: {error}"
    )
