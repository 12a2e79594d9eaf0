# SPDX-License-Identifier: Apache-2.0
"""DPO against SIPO for language models, on pairs that the policy could hardly have written.

    OMP_NUM_THREADS=1 python benchmarks/text_sipo.py

A small Llama learns to write the four letters of a prompt in any order, in small letters; one time in four they are
sorted. The preference pairs are another writer's, in capitals, of which the base model sees two in a hundred; the
sorted letters are preferred to unsorted ones. Every method gets the same pairs, steps and learning rate, for each of
some seeds (of pairs, order and samples). Prints a table of means, with the smallest and the largest value over the
seeds, and writes JSON. Nothing is downloaded.
"""

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

from trl_sipo import SIPOConfig, SIPOTrainer
from trl_sipo.scripts.env import environment

LETTERS = "abcdefgh"
WORDS = ["<end>", "sort", ":", *LETTERS, *LETTERS.upper()]
LENGTH = 4
SORTED_SHARE, CAPITALS_SHARE = 0.25, 0.02  # of what the base model learns from
WRITER_SORTED = 0.5  # of what the other writer writes
METRICS = ("accuracy", "well_formed", "capitals", "drift", "masked")


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    trainer: type
    config: type
    options: dict[str, Any] = field(default_factory=dict)
    has_writer: bool = False
    """Whether the data records the log-probabilities of the other writer."""


ARMS = (
    *(Arm(f"DPO, beta {beta}", DPOTrainer, DPOConfig, {"beta": beta}) for beta in (0.01, 0.1, 1.0)),
    *(Arm(f"SIPO, beta {beta}", SIPOTrainer, SIPOConfig, {"beta": beta}) for beta in (0.01, 0.1, 1.0)),
    Arm("SIPO, beta 0.1, mask below 0.5", SIPOTrainer, SIPOConfig, {"beta": 0.1, "mask_threshold": 0.5}),
    Arm("SIPO, beta 0.1, no mask", SIPOTrainer, SIPOConfig, {"beta": 0.1, "mask": False}),
    Arm("SIPO, beta 0.1, mask alone", SIPOTrainer, SIPOConfig, {"beta": 0.1, "reweight": False}),
    Arm("SIPO, beta 0.1, recorded", SIPOTrainer, SIPOConfig, {"beta": 0.1}, has_writer=True),
)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--base-steps", type=int, default=600, help="of 128 texts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of 32 pairs (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("text_sipo.json"), help="default: %(default)s")
    return parser


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def draw_letters(generator: torch.Generator) -> list[str]:
    """Different letters, in a random order."""
    return [LETTERS[index] for index in torch.randperm(len(LETTERS), generator=generator)[:LENGTH]]


def shuffled(letters: list[str], generator: torch.Generator) -> list[str]:
    """In a random order, which may be any."""
    return [letters[index] for index in torch.randperm(LENGTH, generator=generator)]


def prompt_of(letters: list[str]) -> str:
    """As it is given to the model."""
    return f"sort {' '.join(letters)} :"


def train_base(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """The base model: any order, mostly small letters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="base model"):
        texts = []
        for is_sorted, is_capital in zip(*torch.rand(2, 128, generator=generator).tolist(), strict=True):
            letters = draw_letters(generator)
            written = sorted(letters) if is_sorted < SORTED_SHARE else shuffled(letters, generator)
            text = " ".join(written).upper() if is_capital < CAPITALS_SHARE else " ".join(written)
            texts.append(f"{prompt_of(letters)} {text} <end>")
        ids = tokenizer(texts, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : LENGTH + 2] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def writers_pairs(count: int, seed: int) -> Dataset:
    """Pairs in capitals, with the log-probabilities of their writer: sorted half of the time, else any other order."""
    generator, rows = torch.Generator().manual_seed(1000 + seed), []
    others = math.factorial(LENGTH) - 1
    for _ in range(count):
        letters = draw_letters(generator)
        unsorted = [order for order in permutations(letters) if list(order) != sorted(letters)]
        rejected = unsorted[int(torch.randint(others, (1,), generator=generator))]
        rows.append(
            {
                "prompt": prompt_of(letters),
                "chosen": " " + " ".join(sorted(letters)).upper() + " ",
                "rejected": " " + " ".join(rejected).upper() + " ",
                "chosen_logps": math.log(WRITER_SORTED),
                "rejected_logps": math.log((1 - WRITER_SORTED) / others),
            }
        )
    return Dataset.from_list(rows)


@torch.no_grad()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 512) -> torch.Tensor:
    """(count, length) ids of held-out prompts with a sampled completion each, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    prompts = tokenizer([prompt_of(draw_letters(generator)) for _ in range(count)], return_tensors="pt").input_ids
    torch.manual_seed(seed)
    # Letters to spare, so that a text that does not end in time is seen.
    return model.eval().generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=LENGTH + 3, top_k=0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


@torch.no_grad()
def completion_logps(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability per token of sampled completions, up to their end, (count,)."""
    start = LENGTH + 2
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, start - 1 :]
    is_written = (ids[:, start:] == 0).cumsum(1) - (ids[:, start:] == 0).long() == 0
    return (logps * is_written).sum(1) / is_written.sum(1)


def judged(ids: torch.Tensor) -> dict[str, float]:
    """Shares of sampled texts: sorted, a permutation at all, and in capitals (of the permutations)."""
    right = whole = capital = 0
    for row in ids.tolist():
        words = [WORDS[index] for index in row]
        letters, written = words[1 : LENGTH + 1], words[LENGTH + 2 :]
        if "<end>" not in written:
            continue
        text = written[: written.index("<end>")]
        folded = [word.lower() for word in text]
        whole += sorted(folded) == sorted(letters)
        right += folded == sorted(letters)
        capital += sorted(folded) == sorted(letters) and all(word.isupper() for word in text)
    return {"accuracy": right / len(ids), "well_formed": whole / len(ids), "capitals": capital / max(whole, 1)}


def run(arm: Arm, seed: int, base: LlamaForCausalLM, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train one arm on one seed's pairs and look at its samples."""
    tokenizer, pairs = make_tokenizer(), writers_pairs(options.pairs, seed)
    policy, reference = (LlamaForCausalLM(base.config) for _ in range(2))
    for model in (policy, reference):
        model.load_state_dict(base.state_dict())
    began = time.process_time()
    trainer = arm.trainer(
        policy,
        ref_model=reference,
        args=arm.config(
            str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=max(1, options.steps // 4),
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            **arm.options,
        ),
        train_dataset=pairs if arm.has_writer else pairs.remove_columns(["chosen_logps", "rejected_logps"]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.process_time() - began
    of_base = samples(base, tokenizer, seed=seed)
    drift = (completion_logps(base, of_base) - completion_logps(policy.eval(), of_base)).mean().item()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    shares = judged(samples(policy, tokenizer, seed=seed))
    return {**shares, "drift": drift, "masked": last.get("sipo/masked_fraction", 0.0), "cpu_seconds": seconds}


def cell(rows: list[dict[str, float]], metric: str) -> str:
    """Mean, smallest and largest over the seeds."""
    values = [row[metric] for row in rows]
    if metric == "drift":
        return f"{statistics.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
    return f"{statistics.mean(values):.0%} [{min(values):.0%}, {max(values):.0%}]"


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Run all, print and write."""
    disable_progress_bars()
    tokenizer = make_tokenizer()
    base = train_base(tokenizer, options.base_steps)
    seeds = range(options.seeds)
    results = {"base model": [{**judged(samples(base, tokenizer, seed)), "drift": 0.0} for seed in seeds]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for arm in tqdm(ARMS, desc=f"seed {seed}"):
                results.setdefault(arm.name, []).append(run(arm, seed, base, options, Path(folder)))
    print(
        f"| {options.seeds} seeds | sorted | well-formed | in capitals | drift, nats per token | masked at the end |"
    )
    print("|---|---|---|---|---|---|")
    for name, rows in results.items():
        cells = [cell(rows, metric) if metric in rows[0] else "" for metric in METRICS]
        print(f"| {' | '.join([name, *cells])} |")
    record = {
        "settings": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "results": results,
        "environment": environment(),
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    logging.getLogger("trl_sipo").setLevel(logging.ERROR)  # that all is masked is in the table
    main(make_parser().parse_args())
