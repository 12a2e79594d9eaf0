# SPDX-License-Identifier: Apache-2.0
"""Train the demo's base model from nothing: `python -m trl_sipo.demo.pretrain`.

The stages, each with its own seed: an autoencoder on the generator half of the photographs (`train_autoencoder`),
denoiser and text encoder together on its latents (`train_denoiser`), then the two verifiers on photographs of their
own (`train_verifiers`). The result is a `StableDiffusionPipeline` folder, the verifiers' weights and a log.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tqdm.auto import tqdm

from trl_sipo.demo.fashion import ASSETS, COLOURS, FashionPrompt, all_prompts, colour_values, load_split, tint
from trl_sipo.demo.latents import encode
from trl_sipo.demo.model import build_pipeline, load_pipeline_assets
from trl_sipo.demo.sampling import prompt_ids, sample_images
from trl_sipo.demo.training import Training, WeightAverage, learning_rate_at, set_learning_rate
from trl_sipo.demo.verifier import TRAINING_SPLITS, load_verifiers, save_verifier
from trl_sipo.demo.verifier_training import accuracies, ceiling, train_verifier

MODULE = "trl_sipo.demo.pretrain"
KL_WEIGHT = 1e-4
CAPTION_DROPOUT = 0.1
LOG_EVERY = 100
RESUME_EVERY = 500


def random_tints(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Tint each photograph uint8 (N, 28, 28) with a colour of its own -> float32 (N, 3, 32, 32) in [-1, 1]."""
    colour_ids = torch.randint(len(COLOURS), (len(images),), generator=generator)
    return tint(images, colour_values(colour_ids, generator))


def train_autoencoder(vae: AutoencoderKL, *, num_steps: int, batch_size: int, seed: int, device: str) -> list[dict]:
    """Train the autoencoder in place: reconstruction (squared and absolute error) plus a small KL term.

    The scaling factor is set so that the latents it gives have unit standard deviation. Returns the loss curve.
    """
    log = []
    generator = torch.Generator().manual_seed(seed)
    photographs = load_split("generator").images
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    average = WeightAverage([vae], decay=0.998)
    for step in tqdm(range(num_steps), desc="autoencoder", unit="step"):
        set_learning_rate(optimizer, learning_rate_at(step, num_steps, 2e-3))
        chosen = torch.randint(len(photographs), (batch_size,), generator=generator)
        pixels = random_tints(photographs[chosen], generator).to(device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        squared, absolute = F.mse_loss(reconstruction, pixels), F.l1_loss(reconstruction, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (squared + 0.2 * absolute + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == num_steps:
            values = {"mse": squared, "l1": absolute, "kl_per_latent": kl}
            log.append({"step": step + 1, **{name: round(value.item(), 5) for name, value in values.items()}})
    average.copy_to_modules()
    vae.eval()
    vae.register_to_config(scaling_factor=1.0)
    means, _ = encode(vae, random_tints(photographs, generator), device)
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return log


def latent_bank(vae: AutoencoderKL, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every photograph of the generator half in every colour: scaled latent means and deviations, and prompt index."""
    generator = torch.Generator().manual_seed(seed)
    split = load_split("generator")
    means, stds, prompt_ids = [], [], []
    for colour_id in tqdm(range(len(COLOURS)), desc="latents", unit="colour"):
        colour_ids = torch.full((len(split),), colour_id)
        mean, std = encode(vae, tint(split.images, colour_values(colour_ids, generator)), device)
        means.append(mean)
        stds.append(std)
        prompt_ids.append(split.class_ids * len(COLOURS) + colour_id)
    return torch.cat(means), torch.cat(stds), torch.cat(prompt_ids)


def tokenize(pipeline: StableDiffusionPipeline, prompts: Sequence[FashionPrompt]) -> torch.Tensor:
    """Token ids int64 (len(prompts) + 1, 16); the last row is the empty prompt."""
    texts = [*(prompt.text for prompt in prompts), ""]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return pipeline.tokenizer(texts, max_length=pipeline.tokenizer.model_max_length, **options).input_ids


def train_denoiser(
    pipeline: StableDiffusionPipeline,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    state_file: Path,
) -> list[dict]:
    """Train UNet and text encoder in place to predict the noise; one in ten captions is left empty.

    The state is written to `state_file` every 500 steps; an existing file is continued. Returns the loss curve.
    """
    bank = latent_bank(pipeline.vae, seed, device)
    means, stds, prompt_ids = (part.to(device) for part in bank)
    tokens = tokenize(pipeline, all_prompts()).to(device)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    training = Training(
        {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder},
        learning_rate=learning_rate,
        num_steps=num_steps,
        seed=seed,
        device=device,
    )
    if state_file.is_file():
        training.load(state_file)
    draw = {"generator": training.generator, "device": device}
    running = torch.zeros((), device=device)
    progress = tqdm(total=num_steps, initial=training.step, desc="denoiser", unit="step")
    while training.step < num_steps:
        chosen = torch.randint(len(means), (batch_size,), **draw)
        clean = means[chosen] + stds[chosen] * torch.randn(batch_size, *means.shape[1:], **draw)
        dropped = torch.rand(batch_size, **draw) < CAPTION_DROPOUT
        captions = torch.where(dropped, len(tokens) - 1, prompt_ids[chosen])
        noise = torch.randn(clean.shape, **draw)
        timesteps = torch.randint(len(alphas_cumprod), (batch_size,), **draw)
        signal = alphas_cumprod[timesteps][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        # The 65 distinct captions are encoded once, then shared out.
        hidden = pipeline.text_encoder(tokens).last_hidden_state[captions]
        loss = F.mse_loss(pipeline.unet(noisy, timesteps, hidden, return_dict=False)[0], noise)
        training.update(loss)
        running += loss.detach()
        progress.update()
        if training.step % LOG_EVERY == 0:
            training.log.append({"step": training.step, "loss": round(running.item() / LOG_EVERY, 5)})
            progress.set_postfix(loss=f"{running.item() / LOG_EVERY:.4f}")
            running.zero_()
        if training.step % RESUME_EVERY == 0:
            training.save(state_file)
    progress.close()
    return training.finish()


def train_verifiers(vae: AutoencoderKL, *, num_steps: int, seed: int, device: str, output: Path) -> dict[str, dict]:
    """Train both judges and write them to `output`; returns the log entry of each."""
    log: dict[str, dict] = {}
    for offset, name in enumerate(TRAINING_SPLITS):
        verifier, curve = train_verifier(name, vae, num_steps=num_steps, seed=seed + 10 * offset, device=device)
        save_verifier(verifier, output)
        log[name] = {"training_split": TRAINING_SPLITS[name], "loss_curve": curve}
        log[name]["accuracy_on_real_test_photographs"] = ceiling(verifier, vae, seed=seed + 20, device=device)
    return log


def judge_samples(output: Path, *, images_per_prompt: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Judge samples of every prompt with 25 DDIM steps: guidance scale (1.0 is none) -> judge -> accuracies."""
    pipeline, verifiers = load_pipeline_assets(output / "pipeline"), load_verifiers(output / "verifier")
    asked = [prompt for prompt in all_prompts() for _ in range(images_per_prompt)]
    texts = [prompt.text for prompt in asked]
    result = {}
    for guidance_scale in (1.0, 2.0):
        images = sample_images(pipeline, texts, seed, num_inference_steps=25, guidance_scale=guidance_scale)
        judged = {verifier.name: accuracies(verifier, images, *prompt_ids(asked)) for verifier in verifiers}
        result[f"guidance_{guidance_scale}"] = judged
    return result


def environment(args: argparse.Namespace, module: str, device: str = "cpu") -> dict[str, object]:
    """What made this checkpoint, in words that fit any machine; the command spells out the defaults, without paths."""
    machine = f"CPU, {args.threads} thread(s)" if device == "cpu" else f"one {device} device"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    options = []
    for name, value in vars(args).items():
        if name not in ("output", "resume") and value is not False:
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return {"command": shlex.join(["python", "-m", module, *options]), "machine": machine, "versions": versions}


def make_parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults are those of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS, help="receives pipeline/, verifier/, training_log.json")
    parser.add_argument("--device", default="cpu", help="where to train, as torch names it (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000, help="denoiser (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="denoiser (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="denoiser (default: %(default)s)")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--verifier-steps", type=int, default=1200)
    parser.add_argument("--images-per-prompt", type=int, default=8, help="in the final check of the samples")
    parser.add_argument(
        "--verifiers-only", action="store_true", help="keep the pipeline in --output, retrain its judges"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    return parser


def prepare_autoencoder(pipeline: StableDiffusionPipeline, args: argparse.Namespace, state_file: Path) -> list[dict]:
    """Train the pipeline's autoencoder, or take it from `state_file` where an earlier run left it."""
    vae = pipeline.vae
    if state_file.is_file():
        saved = torch.load(state_file, weights_only=True)
        vae.load_state_dict(saved["weights"])
        vae.register_to_config(scaling_factor=saved["scaling_factor"])
        log = saved["log"]
    else:
        log = train_autoencoder(
            vae, num_steps=args.autoencoder_steps, batch_size=64, seed=args.seed + 1, device=args.device
        )
        saved = {"weights": vae.state_dict(), "scaling_factor": vae.config.scaling_factor, "log": log}
        torch.save(saved, state_file)
    vae.to(args.device).eval().requires_grad_(False)
    return log


def pretrain_pipeline(args: argparse.Namespace, state: Path) -> dict[str, object]:
    """Train the pipeline and write it to `<output>/pipeline`; a stage whose result lies in `state` is not repeated."""
    pipeline = build_pipeline(args.seed)
    autoencoder_log = prepare_autoencoder(pipeline, args, state / "autoencoder.pt")
    denoiser_log = train_denoiser(
        pipeline,
        num_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed + 3,
        device=args.device,
        state_file=state / "denoiser.pt",
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.cpu().half()
    pipeline.save_pretrained(args.output / "pipeline")
    return {"autoencoder_loss_curve": autoencoder_log, "denoiser_loss_curve": denoiser_log}


def write_log(path: Path, entries: dict[str, object]) -> None:
    """Write the log as JSON, one entry a line deep enough to be read and compared by eye."""
    path.write_text(json.dumps(entries, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Train everything and write it to `--output`."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    state, log_file = args.output / "pretrain_state", args.output / "training_log.json"
    if not args.resume:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if args.verifiers_only:
        log = json.loads(log_file.read_text())
    else:
        log = {"pipeline": environment(args, MODULE, args.device), **pretrain_pipeline(args, state)}
        log["pipeline"]["wall_seconds"] = round(time.perf_counter() - started)
    # The written weights are 16-bit floats: the judges learn from what will be loaded.
    vae = load_pipeline_assets(args.output / "pipeline").vae.to(args.device)
    started = time.perf_counter()
    verifiers = train_verifiers(
        vae, num_steps=args.verifier_steps, seed=args.seed + 2, device=args.device, output=args.output / "verifier"
    )
    made_by = environment(args, MODULE, args.device)
    log["verifiers"] = {**made_by, "wall_seconds": round(time.perf_counter() - started), **verifiers}
    log["samples"] = judge_samples(args.output, images_per_prompt=args.images_per_prompt, seed=args.seed + 4)
    write_log(log_file, log)
    shutil.rmtree(state)
    print(json.dumps(log["samples"], indent=1))


if __name__ == "__main__":
    main()
