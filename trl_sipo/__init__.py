# SPDX-License-Identifier: Apache-2.0
"""Preference optimization for diffusion models, beside TRL: Diffusion-DPO, DPO-C&M, SIPO and Poly-DPO.

The names below are resolved on first use, so that `import trl_sipo` and `trl-sipo --help` load neither torch nor
diffusers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "DiffusionDPOConfig": "trl_sipo.trainer.diffusion_dpo_config",
    "DiffusionDPOTrainer": "trl_sipo.trainer.diffusion_dpo_trainer",
    "DiffusionSIPOConfig": "trl_sipo.trainer.diffusion_sipo_config",
    "DiffusionSIPOTrainer": "trl_sipo.trainer.diffusion_sipo_trainer",
    "DiffusionPolyDPOConfig": "trl_sipo.trainer.diffusion_poly_dpo_config",
    "DiffusionPolyDPOTrainer": "trl_sipo.trainer.diffusion_poly_dpo_trainer",
    "SIPOConfig": "trl_sipo.trainer.text_sipo_config",
    "SIPOTrainer": "trl_sipo.trainer.text_sipo_trainer",
    "DiffusionD3POConfig": "trl_sipo.trainer.diffusion_d3po_config",
    "DiffusionD3POTrainer": "trl_sipo.trainer.diffusion_d3po_trainer",
    "DiffusionKTOConfig": "trl_sipo.trainer.diffusion_kto_config",
    "DiffusionKTOTrainer": "trl_sipo.trainer.diffusion_kto_trainer",
    "DiffusionMaPOConfig": "trl_sipo.trainer.diffusion_mapo_config",
    "DiffusionMaPOTrainer": "trl_sipo.trainer.diffusion_mapo_trainer",
    "DiffusionSFTConfig": "trl_sipo.trainer.diffusion_sft_config",
    "DiffusionSFTTrainer": "trl_sipo.trainer.diffusion_sft_trainer",
    "load_preference_dataset": "trl_sipo.data.loading",
}

try:
    __version__ = version("trl-sipo")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from trl_sipo.data.loading import load_preference_dataset as load_preference_dataset
    from trl_sipo.trainer.diffusion_d3po_config import DiffusionD3POConfig as DiffusionD3POConfig
    from trl_sipo.trainer.diffusion_d3po_trainer import DiffusionD3POTrainer as DiffusionD3POTrainer
    from trl_sipo.trainer.diffusion_dpo_config import DiffusionDPOConfig as DiffusionDPOConfig
    from trl_sipo.trainer.diffusion_dpo_trainer import DiffusionDPOTrainer as DiffusionDPOTrainer
    from trl_sipo.trainer.diffusion_kto_config import DiffusionKTOConfig as DiffusionKTOConfig
    from trl_sipo.trainer.diffusion_kto_trainer import DiffusionKTOTrainer as DiffusionKTOTrainer
    from trl_sipo.trainer.diffusion_mapo_config import DiffusionMaPOConfig as DiffusionMaPOConfig
    from trl_sipo.trainer.diffusion_mapo_trainer import DiffusionMaPOTrainer as DiffusionMaPOTrainer
    from trl_sipo.trainer.diffusion_poly_dpo_config import DiffusionPolyDPOConfig as DiffusionPolyDPOConfig
    from trl_sipo.trainer.diffusion_poly_dpo_trainer import DiffusionPolyDPOTrainer as DiffusionPolyDPOTrainer
    from trl_sipo.trainer.diffusion_sft_config import DiffusionSFTConfig as DiffusionSFTConfig
    from trl_sipo.trainer.diffusion_sft_trainer import DiffusionSFTTrainer as DiffusionSFTTrainer
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig as DiffusionSIPOConfig
    from trl_sipo.trainer.diffusion_sipo_trainer import DiffusionSIPOTrainer as DiffusionSIPOTrainer
    from trl_sipo.trainer.text_sipo_config import SIPOConfig as SIPOConfig
    from trl_sipo.trainer.text_sipo_trainer import SIPOTrainer as SIPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_sipo' has no attribute {name!r}; it has {sorted(__all__)}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
