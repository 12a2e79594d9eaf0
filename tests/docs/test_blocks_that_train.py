# SPDX-License-Identifier: Apache-2.0
"""The Python of the pages that trains a model does so: on a tiny one, for two steps, with nothing else changed."""

import re
import sys
from types import ModuleType

import pytest
from datasets import Dataset

from tests.docs.pages import ROOT, SOURCE, blocks
from tests.tiny.language_model import tiny_language_model, tiny_tokenizer
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import preference_pairs

# Page -> which of its Python blocks, by number, one after the other in one namespace.
IMAGE_PAGES = {
    "quickstart.md": (0, 3),
    "baselines.md": (0,),
    "migrate_from_diffusers.md": (0,),
    "migrate_from_trl.md": (1,),
    "add_an_objective.md": (0, 1),
    "proximal.md": (0,),
}
TEXT_PAGES = {"sipo_text.md": (0,), "migrate_from_trl.md": (0,)}
# What is made small: pattern -> replacement.
SMALLER = {
    r"max_steps=\d+": "max_steps=2",
    r"per_device_train_batch_size=\d+": "per_device_train_batch_size=2",
    r"gradient_accumulation_steps=\d+": "gradient_accumulation_steps=1",
    r"(save|eval|sample_every)_steps=\d+": r"\1_steps=2",
    r"resolution=512": "resolution=32",
    r"range\(200": "range(2",
    # TRL alone takes bfloat16 unless told otherwise, and then fails on a machine without an accelerator.
    r"args=DPOConfig\(": "args=DPOConfig(bf16=False, use_cpu=True, output_dir=",
}


def _code(page, numbers, model, data):
    text = "\n".join(blocks(page, "python")[number].code for number in numbers)
    text, models = re.subn(r'model="[\w./-]+"', f"model={str(model)!r}", text)
    text, loads = re.subn(r'load_dataset\(".+?"', f'load_dataset("parquet", data_files={str(data)!r}', text)
    assert models and loads
    for pattern, replacement in SMALLER.items():
        text = re.sub(pattern, replacement, text)
    return text


def _run(code, monkeypatch, folder):
    """The trainer that the code leaves behind, after its training."""
    module = ModuleType("documentation")
    monkeypatch.setitem(sys.modules, "documentation", module)  # a checkpoint finds the page's classes there
    monkeypatch.chdir(folder)
    exec(compile(code, "documentation", "exec"), module.__dict__)
    trainer = module.trainer
    if trainer.state.global_step == 0:  # the last block of a page may only construct it
        trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    preference_pairs(8).to_parquet(folder / "pairs.parquet")
    return folder / "model", folder / "pairs.parquet"


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_language_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": "the cat", "chosen": " sat on a red mat", "rejected": " ran in the rain"}] * 8
    Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    return folder / "model", folder / "pairs.parquet"


@pytest.mark.parametrize("page", IMAGE_PAGES)
def test_images(page, image_files, tmp_path, monkeypatch):
    _run(_code(SOURCE / page, IMAGE_PAGES[page], *image_files), monkeypatch, tmp_path)


def test_the_quickstart_of_the_readme(image_files, tmp_path, monkeypatch):
    _run(_code(ROOT / "README.md", (0,), *image_files), monkeypatch, tmp_path)
    assert (tmp_path / "sd15-sipo" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("page", TEXT_PAGES)
def test_texts(page, text_files, tmp_path, monkeypatch):
    _run(_code(SOURCE / page, TEXT_PAGES[page], *text_files), monkeypatch, tmp_path)
