# SPDX-License-Identifier: Apache-2.0
"""The model card written beside every checkpoint."""

import json
import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from trl_sipo import __version__
from trl_sipo.trainer._trl_compat import get_comet_experiment_url, get_trackio_space_url
from trl_sipo.trainer.description import describe_kappa

_REPORTED_PACKAGES = ("trl", "diffusers", "transformers", "peft", "torch", "datasets")


def save_run_card(
    trainer: Any, *, model_name: str | None, dataset_name: str | None, tags: list[str], paper: dict[str, str]
) -> None:
    """The model card of a trainer's run, in its output directory, with its last sample grid.

    Args:
        trainer: A diffusion preference trainer.
        model_name: By default the name of the output directory.
        paper: `title`, `citation`, and optionally `id` (arXiv) of the method.
    """
    args, pipeline = trainer.args, trainer.adapter.pipeline
    base_model = pipeline.config.get("_name_or_path")
    grids = sorted(Path(args.output_dir, "samples").glob("step-*.png"))
    save_model_card(
        args.output_dir,
        model_name=model_name or Path(args.output_dir).name,
        base_model=None if not base_model or os.path.isdir(base_model) else base_model,
        dataset_name=dataset_name,
        tags=tags,
        method=trainer.method_name,
        paper=paper,
        beta_description=trainer.beta_description,
        kappa_description=describe_kappa(trainer) if args.proximal_kappa else "",
        pipeline_class=type(pipeline).__name__,
        is_lora=isinstance(trainer.unwrapped_model, PeftModel),
        is_video=trainer.adapter.is_video,
        lora_loading_code=trainer.adapter.lora_loading_code,
        prompt=(args.sample_prompts or [None])[0],
        sample_grid=f"samples/{grids[-1].name}" if grids else None,
    )


def save_model_card(
    directory: str | Path,
    *,
    model_name: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: list[str],
    method: str,
    paper: dict[str, str],
    beta_description: str,
    kappa_description: str,
    pipeline_class: str,
    is_lora: bool,
    is_video: bool,
    lora_loading_code: tuple[str, ...],
    prompt: str | None,
    sample_grid: str | None,
) -> None:
    """Write `README.md` into `directory`: how to load the model, what it was trained with, and what to cite.

    Args:
        lora_loading_code: Lines of Python; `{path}` stands for the model's name.
        beta_description, kappa_description: What the two mean, a line each; empty where there is none.
        base_model: Hub id of the base, or `None` when it came from a local folder.
        paper: `title`, `citation`, and optionally `id` (arXiv) of the method.
        prompt: A prompt of the sample grids, for the loading example.
        sample_grid: Path of a sample grid, relative to `directory`.
    """
    task = "text-to-video" if is_video else "text-to-image"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base_model,
        datasets=dataset_name,
        model_name=model_name,
        tags=["generated_from_trainer", task, *tags, *(["lora"] if is_lora else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(files("trl_sipo").joinpath("templates/diffusion_model_card.md")),
        base_model=base_model,
        model_name=model_name,
        dataset_name=dataset_name,
        method=method,
        paper_title=paper.get("title"),
        paper_id=paper.get("id"),
        citation=paper.get("citation"),
        beta_description=beta_description,
        kappa_description=kappa_description,
        pipeline_class=pipeline_class,
        is_lora=is_lora,
        is_video=is_video,
        lora_loading_code="\n".join(lora_loading_code).format(path=model_name),
        prompt=json.dumps(prompt or "a photo of a cat", ensure_ascii=False),  # within code, which it must not end
        sample_grid=sample_grid,
        trackio_url=get_trackio_space_url(),
        comet_url=get_comet_experiment_url(),
        versions={"trl-sipo": __version__, **{name: version(name) for name in _REPORTED_PACKAGES}},
    )
    card.save(str(Path(directory) / "README.md"))
