# SPDX-License-Identifier: Apache-2.0
"""Rounds train as the trainers' own tests do: one thread, no network. A tiny model and prompts on disk."""

import pytest

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.conftest import _modules_out_of_the_collectors_way, _one_quiet_thread
from trl_sipo.online.config import make_config

__all__ = ["_modules_out_of_the_collectors_way", "_one_quiet_thread"]

REDNESS, BRIGHTNESS = "tests.feedback.rewards:redness", "tests.feedback.rewards:brightness"


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with `base` and `prompts.txt`."""
    folder = tmp_path_factory.mktemp("material")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a cat\na dog\na boat\n")
    (folder / "others.txt").write_text("a house\na red tree\n")
    return folder


@pytest.fixture(scope="session")
def tiny_config(material):
    """Makes the configuration of a tiny run; what is given replaces the settings, parts and all."""

    def make(output, **settings):
        return make_config(tiny_settings(material, output, **settings))

    return make


def tiny_settings(material, output, **settings):
    """Nested settings of two rounds of two steps on LoRA weights."""
    training = {
        "max_steps": 2, "learning_rate": 1e-2, "beta": 50.0, "per_device_train_batch_size": 2, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True,
        **settings.pop("training", {}),
    }  # fmt: skip
    return {
        "model": str(material / "base"),
        "output": str(output),
        "prompts": str(material / "prompts.txt"),
        "rewards": [REDNESS],
        "rounds": 2,
        "sampling": {"num_inference_steps": 1, "samples_per_prompt": 2, "height": 32, "width": 32},
        "training": training,
        "lora": {"r": 2, "lora_alpha": 4},
        "weight_pairs": 2,
        "weight_levels": 2,
        "device": "cpu",
        **settings,
    }
