# SPDX-License-Identifier: Apache-2.0
"""Train the video demo's base model from nothing: `python -m trl_sipo.demo.video.pretrain`.

The stages, each with its own seed: an autoencoder on clips of the generator half of the photographs
(`train_autoencoder`), denoiser and text encoder together on its latents (`train_denoiser`), then the two verifiers on
clips of photographs of their own (`train_verifiers`). The result is a `WanPipeline` folder, the verifiers' weights and
a log. One thread and a quarter of an hour are enough; an interrupted run continues with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tqdm.auto import tqdm

from trl_sipo.adapters import adapter_for
from trl_sipo.core.parameterization import prediction_target
from trl_sipo.demo.pretrain import environment, write_log
from trl_sipo.demo.training import Training
from trl_sipo.demo.verifier import TRAINING_SPLITS, load_verifiers, save_verifier
from trl_sipo.demo.video.coding import CODING_BATCH, sample_clips
from trl_sipo.demo.video.model import MAX_PROMPT_TOKENS, VIDEO_ASSETS, build_video_pipeline, load_video_pipeline
from trl_sipo.demo.video.sprites import all_video_prompts, moving_photographs, prompt_ids, random_clips
from trl_sipo.demo.video.verifier_training import clip_accuracies, clip_ceiling, train_clip_verifier

MODULE = "trl_sipo.demo.video.pretrain"
KL_WEIGHT = 1e-4
CAPTION_DROPOUT = 0.1
LOG_EVERY = 100
RESUME_EVERY = 250
#: Clips whose latents the denoiser learns from.
BANK_SIZE = 6000
#: The pipeline pads every prompt to 512 tokens, and so a step takes four times as long as with the words alone.
#: The denoiser sees that length in one step out of four.
PADDED_LENGTH = 512
PADDED_STEPS = 4


def reconstruct(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What the decoder gives before it is clipped to [-1, 1]: a clipped value has no gradient to come back by."""
    parts: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, arguments, output: parts.append(output))
    try:
        vae.decode(latents)
    finally:
        hook.remove()
    return unpatchify(torch.cat(parts, dim=2), vae.config.patch_size)


def train_autoencoder(vae: AutoencoderKLWan, *, num_steps: int, batch_size: int, seed: int, state: Path) -> list[dict]:
    """Train the autoencoder in place: reconstruction (squared and absolute error) plus a small KL term.

    The state is written to `state` as it goes; an existing file is continued. Returns the loss curve.
    """
    photographs = moving_photographs("generator")
    options = {"learning_rate": 3e-3, "weight_decay": 1e-4, "ema_decay": 0.998}
    training = Training({"vae": vae}, num_steps=num_steps, seed=seed, device="cpu", **options)
    if state.is_file():
        training.load(state)
    for _ in tqdm(range(training.step, num_steps), desc="autoencoder", unit="step"):
        clips, _ = random_clips(photographs, batch_size, training.generator)
        posterior = vae.encode(clips).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=training.generator)
        reconstruction = reconstruct(vae, posterior.mean + posterior.std * noise)
        squared, absolute = F.mse_loss(reconstruction, clips), F.l1_loss(reconstruction, clips)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        training.update(squared + 0.2 * absolute + KL_WEIGHT * kl)
        if training.step % LOG_EVERY == 0 or training.step == num_steps:
            values = {"mse": squared, "l1": absolute, "kl_per_latent": kl}
            training.log.append({"step": training.step, **{k: round(v.item(), 5) for k, v in values.items()}})
        if training.step % RESUME_EVERY == 0 or training.step == num_steps:
            training.save(state)
    return training.finish()


@torch.no_grad()
def latent_bank(vae: AutoencoderKLWan, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent means and deviations (N, 16, 2, 4, 4) of random clips, not normalised, and which prompt describes them.

    Which clips they are depends on `seed` alone.
    """
    photographs, generator = moving_photographs("generator"), torch.Generator().manual_seed(seed)
    rows = {prompt.ids: row for row, prompt in enumerate(all_video_prompts())}
    means, stds, prompt_ids = [], [], []
    for _ in tqdm(range(0, BANK_SIZE, CODING_BATCH), desc="latents", unit="batch"):
        clips, ids = random_clips(photographs, CODING_BATCH, generator)
        posterior = vae.encode(clips).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        prompt_ids += [rows[tuple(row)] for row in ids.tolist()]
    return torch.cat(means), torch.cat(stds), torch.tensor(prompt_ids)


def set_latent_statistics(vae: AutoencoderKLWan, means: torch.Tensor) -> None:
    """Write each channel's mean and standard deviation into the configuration, so that the denoiser sees unit ones."""
    flat = means.transpose(0, 1).flatten(1)
    statistics = {"latents_mean": flat.mean(1), "latents_std": flat.std(1)}
    vae.register_to_config(**{name: [round(v, 5) for v in values.tolist()] for name, values in statistics.items()})


def encode_text(pipeline: WanPipeline, texts: Sequence[str], length: int) -> torch.Tensor:
    """Embeddings with gradients, (len(texts), length, width), zero beyond a text's end as the pipeline makes them."""
    options = {"padding": "max_length", "max_length": MAX_PROMPT_TOKENS, "return_tensors": "pt"}
    tokens = pipeline.tokenizer(list(texts), **options)
    hidden = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    hidden = hidden * tokens.attention_mask[:, :, None]
    return F.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def train_denoiser(
    pipeline: WanPipeline, *, num_steps: int, batch_size: int, learning_rate: float, seed: int, state: Path
) -> list[dict]:
    """Train transformer and text encoder in place to predict the flow; one in ten captions is left empty.

    The state is written to `state` as it goes; an existing file is continued. Returns the loss curve.
    """
    means, stds, prompt_ids = latent_bank(pipeline.vae, seed)
    set_latent_statistics(pipeline.vae, means)
    adapter = adapter_for(pipeline)
    texts = [*(prompt.text for prompt in all_video_prompts()), ""]
    modules = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    options = {"learning_rate": learning_rate, "ema_decay": 0.998}
    training = Training(modules, num_steps=num_steps, seed=seed, device="cpu", **options)
    if state.is_file():
        training.load(state)
    draw = {"generator": training.generator}
    running = torch.zeros(())
    progress = tqdm(total=num_steps, initial=training.step, desc="denoiser", unit="step")
    while training.step < num_steps:
        chosen = torch.randint(len(means), (batch_size,), **draw)
        posterior_noise = torch.randn(batch_size, *means.shape[1:], **draw)
        clean = adapter.normalize_latents(means[chosen] + stds[chosen] * posterior_noise)
        dropped = torch.rand(batch_size, **draw) < CAPTION_DROPOUT
        captions = torch.where(dropped, len(texts) - 1, prompt_ids[chosen])
        noise = torch.randn(clean.shape, **draw)
        level = adapter.noise_schedule.level_at(torch.rand(batch_size, **draw))
        length = PADDED_LENGTH if training.step % PADDED_STEPS == 0 else MAX_PROMPT_TOKENS
        # The 65 distinct captions are encoded once, then shared out.
        conditioning = {"prompt_embeds": encode_text(pipeline, texts, length)[captions]}
        prediction = adapter.forward(pipeline.transformer, level.add_noise(clean, noise), level, conditioning)
        loss = F.mse_loss(prediction, prediction_target(clean, noise, level, adapter.prediction_type))
        training.update(loss)
        running += loss.detach()
        progress.update()
        if training.step % LOG_EVERY == 0:
            training.log.append({"step": training.step, "loss": round(running.item() / LOG_EVERY, 5)})
            progress.set_postfix(loss=f"{running.item() / LOG_EVERY:.4f}")
            running.zero_()
        if training.step % RESUME_EVERY == 0:
            training.save(state)
    progress.close()
    return training.finish()


def train_verifiers(args: argparse.Namespace) -> dict[str, dict]:
    """Train both judges and write them to `<output>/verifier`; returns the log entry of each."""
    # The written weights are 16-bit floats: the judges learn from what will be loaded.
    adapter = adapter_for(load_video_pipeline(args.output / "pipeline"))
    log: dict[str, dict] = {}
    for offset, name in enumerate(TRAINING_SPLITS):
        seed = args.seed + 5 + 10 * offset
        verifier, curve = train_clip_verifier(name, adapter, num_steps=args.verifier_steps, seed=seed)
        save_verifier(verifier, args.output / "verifier")
        log[name] = {"training_split": TRAINING_SPLITS[name], "loss_curve": curve}
        log[name]["accuracy_on_real_test_photographs"] = clip_ceiling(verifier, adapter, seed=args.seed + 6)
    return log


def judge_samples(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Judge samples of every prompt with 10 steps and without guidance: judge -> accuracies."""
    pipeline, verifiers = load_video_pipeline(args.output / "pipeline"), load_verifiers(args.output / "verifier")
    asked = [prompt for prompt in all_video_prompts() for _ in range(args.clips_per_prompt)]
    clips = sample_clips(pipeline, [prompt.text for prompt in asked], seed=args.seed + 7, num_inference_steps=10)
    return {verifier.name: clip_accuracies(verifier, clips, prompt_ids(asked)) for verifier in verifiers}


def make_parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults are those of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=VIDEO_ASSETS, help="receives pipeline/, verifier/, training_log.json"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=4000, help="denoiser (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="denoiser (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="denoiser (default: %(default)s)")
    parser.add_argument("--verifier-steps", type=int, default=500)
    parser.add_argument("--clips-per-prompt", type=int, default=4, help="in the final check of the samples")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    return parser


def pretrain_pipeline(args: argparse.Namespace, state: Path) -> dict[str, object]:
    """Train the pipeline and write it to `<output>/pipeline`; what an earlier run left in `state` is continued."""
    pipeline = build_video_pipeline(args.seed)
    autoencoder_log = train_autoencoder(
        pipeline.vae,
        num_steps=args.autoencoder_steps,
        batch_size=8,
        seed=args.seed + 1,
        state=state / "autoencoder.pt",
    )
    pipeline.vae.requires_grad_(False)
    denoiser_log = train_denoiser(
        pipeline,
        num_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed + 3,
        state=state / "denoiser.pt",
    )
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.half()
    pipeline.save_pretrained(args.output / "pipeline")
    return {"autoencoder_loss_curve": autoencoder_log, "denoiser_loss_curve": denoiser_log}


def main(argv: Sequence[str] | None = None) -> None:
    """Train everything and write it to `--output`."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    state = args.output / "pretrain_state"
    if not args.resume:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    log = {"pipeline": environment(args, MODULE), **pretrain_pipeline(args, state)}
    log["verifiers"] = {**environment(args, MODULE), **train_verifiers(args)}
    log["samples"] = judge_samples(args)
    write_log(args.output / "training_log.json", log)
    shutil.rmtree(state)
    print(json.dumps(log["samples"], indent=1))


if __name__ == "__main__":
    main()
