# SPDX-License-Identifier: Apache-2.0
"""TRL's own script for DPO, with the class and the configuration exchanged and images for data, as a user would do."""

import pytest
import torch
import trl
import trl.scripts.dpo
from diffusers import DiffusionPipeline

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import METHODS, predict, preference_pairs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_trls_script_with_the_class_exchanged(method, is_lora, tmp_path, monkeypatch, capsys):
    base, pairs, out = tmp_path / "base", tmp_path / "pairs", tmp_path / "out"
    tiny_stable_diffusion().save_pretrained(base)
    pairs.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        preference_pairs(4, seed=seed).to_parquet(pairs / f"{split}.parquet")
    parser = trl.TrlParser((trl.ScriptArguments, method.config_class, trl.ModelConfig, trl.DatasetMixtureConfig))
    argv = (
        f"--dataset_name {pairs} --model_name_or_path {base} --output_dir {out} --learning_rate 1e-2 --max_steps 2 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_strategy steps --eval_steps 1 "
        "--no_remove_unused_columns --use_cpu --eval_noise_levels 2"
    ).split()
    argv += ["--use_peft", "--lora_r", "4", "--lora_alpha", "8"] * is_lora
    arguments = parser.parse_args_and_config(argv)
    monkeypatch.setattr(trl, "DPOTrainer", method.trainer_class)

    trl.scripts.dpo.main(*arguments)

    assert "Model saved" in capsys.readouterr().out
    trained = DiffusionPipeline.from_pretrained(base if is_lora else out)
    if is_lora:
        trained.load_lora_weights(out)
    assert not torch.allclose(predict(trained), predict(DiffusionPipeline.from_pretrained(base)), atol=1e-5)
