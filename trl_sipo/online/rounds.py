# SPDX-License-Identifier: Apache-2.0
"""Rounds of preference training on what the policy itself draws (SIPO paper, appendix F.2).

<output>/config.json                 what the results are a function of
<output>/evaluation/base/            what the base model draws of the evaluation's prompts
<output>/round-000/prompts.jsonl     the prompts of the round
<output>/round-000/samples/          what the policy drew of them
<output>/round-000/scores.parquet    what each reward says of each sample
<output>/round-000/pairs.parquet     the pairs that were made of them
<output>/round-000/data.json         the mark that all of these are there
<output>/round-000/run/              the trainer's folder, with its checkpoints
<output>/round-000/model/            the policy after the round: a LoRA, or a whole pipeline
<output>/round-000/training.json     the mark that it is there
<output>/round-000/evaluation/       what it draws of the evaluation's prompts
<output>/round-000/round.json        the mark that the round is complete
<output>/online.json                 all rounds, and the importance weights of each policy on the data of each round

A run that was stopped goes on where it was: at the next missing sample, the last checkpoint, or the next part.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.data.seeding import mix_seed
from trl_sipo.errors import ConfigurationError, StorageError
from trl_sipo.evaluation.comparison import StatisticsSettings, compare_models
from trl_sipo.evaluation.diversity import pixel_features
from trl_sipo.evaluation.evaluate import as_json, folder_features
from trl_sipo.feedback.feedback import write_feedback
from trl_sipo.generation.models import ModelSpec, check_models, load_model
from trl_sipo.generation.processes import chosen_device, process_state
from trl_sipo.generation.prompt_sets import PromptRecord, load_prompts
from trl_sipo.generation.sampling import draw_samples
from trl_sipo.generation.scoring import ScoredSamples, score_samples
from trl_sipo.online.config import OnlineConfig, config_differences
from trl_sipo.online.off_policy import off_policy_weights
from trl_sipo.online.pairs import (
    TRAINING,
    RealImages,
    read_pairs,
    round_prompts,
    round_sampling,
    round_seed,
    training_rows,
    write_self_play_pairs,
)
from trl_sipo.online.stopping import leaving_on_sigterm
from trl_sipo.online.training import MODEL_FOLDER, RUN_FOLDER, free_memory, lora_config, policy_spec, train_round
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.opening import open_rewards
from trl_sipo.trainer.model_preparation import check_lora_targets
from trl_sipo.trainer.processes import from_main

logger = logging.getLogger(__name__)

_BASE = "base"
_SCORES_CACHE = "scores.sqlite"
_EVALUATION_SEED = -1  # in place of a round's number
_WEIGHTS_SEED = -2


@dataclass(frozen=True)
class Measured:
    """What a policy draws of the evaluation's prompts."""

    scored: ScoredSamples
    features: Tensor


@dataclass(frozen=True)
class _Run:
    """What all rounds share."""

    config: OnlineConfig
    ranking: Sequence[Reward]
    measuring: Sequence[Reward]
    real: RealImages | None
    evaluation_prompts: Sequence[PromptRecord]

    def folder(self, number: int) -> Path:
        return round_folder(self.config, number)

    def trained(self, number: int) -> Path | None:
        """What was saved when so many rounds had been trained; None: the base."""
        return self.folder(number - 1) / MODEL_FOLDER if number else None

    def spec(self, number: int) -> ModelSpec:
        """The policy that so many rounds have trained."""
        return policy_spec(self.config, f"policy-{number}" if number else _BASE, self.trained(number))

    def load(self, number: int) -> BackboneAdapter:
        """The same, to sample with. What an earlier one held is given back first.

        Raises:
            ConfigurationError: The LoRA to be trained finds no place in it.
        """
        free_memory()
        model = load_model(self.spec(number), dtype=self.config.dtype, device=chosen_device(self.config.device))
        if number == 0 and (lora := lora_config(self.config)) is not None:
            check_lora_targets(model, lora)
        return model

    @property
    def is_main(self) -> bool:
        return process_state().is_main_process


def round_folder(config: OnlineConfig, number: int) -> Path:
    """The folder of a round."""
    return Path(config.output) / f"round-{number:03d}"


def run_rounds(config: OnlineConfig, *, on_round: Callable[[dict[str, Any]], None] = lambda record: None) -> dict:
    """Run what is missing of an online run; every process must call it.

    Args:
        config: Its settings.
        on_round: Called on the main process with the record of each round.

    Returns:
        What `online.json` holds: "config"; "rounds", the record of each; and "weights", an entry for each policy and
        each round's data that it was measured on.

    Raises:
        ConfigurationError: Settings that make no sense, or another run's folder.
        Preempted: SIGTERM came. The same call continues.
        BackboneError, DatasetError, NumericalError, RewardError, StorageError: As the parts do.
    """
    with leaving_on_sigterm(config.output), ExitStack() as stack:
        run = _prepare(config, stack)
        from_main(lambda: _claim(config))
        base = _measure_base(run)
        records = []
        for number in range(config.rounds):
            records.append(_run_round(run, number, base))
            if run.is_main:
                on_round(records[-1])
        summary = {
            "config": {**config.record(), "rounds": config.rounds},
            "rounds": records,
            "weights": sorted(
                (entry for record in records for entry in record["weights"]),
                key=lambda entry: (entry["policy"], entry["data"]),
            ),
        }
        from_main(lambda: _write_json(Path(config.output) / "online.json", summary))
        return summary


def _prepare(config: OnlineConfig, stack: ExitStack) -> _Run:
    """Open the rewards, read the prompts, and look for contradictions, before anything long starts."""
    lora_config(config)
    check_models([policy_spec(config, _BASE, None)])
    device = chosen_device(config.device)
    cache = Path(config.output) / _SCORES_CACHE
    rewards = open_rewards(config.all_rewards, config.reward_options, cache=cache, device=device, stack=stack)
    ranking = rewards[: len(config.rewards)]
    if config.mode == "reward":
        config.feedback.check([reward.info.name for reward in ranking])
    real = None if config.real_data is None else RealImages(config.real_data, config.real_data_split)
    trained = {record.prompt for number in range(config.rounds) for record in _checked_prompts(config, number, real)}
    settings, held_out = config.evaluation, []
    if settings is not None:
        if not rewards:
            raise ConfigurationError("`evaluation` has no rewards to measure by: name some in `evaluation.rewards`.")
        held_out = load_prompts(settings.prompts, limit=settings.max_prompts, seed=config.seed)
        if seen := [record.prompt for record in held_out if record.prompt in trained]:
            logger.warning(
                "%d of %d evaluation prompts are trained on too, such as %r: they do not tell whether what was "
                "learned carries over.",
                *(len(seen), len(held_out), seen[0]),
            )
    return _Run(config, ranking, rewards, real, held_out)


def _checked_prompts(config: OnlineConfig, number: int, real: RealImages | None) -> list[PromptRecord]:
    prompts = round_prompts(config, number)
    if real is not None:
        real.check(prompts)
    return prompts


def _claim(config: OnlineConfig) -> None:
    """Write down whose folder it is; refuse that of another run, unless that ended before its first sample."""
    path, record = Path(config.output) / "config.json", json.loads(json.dumps(config.record(), default=str))
    if path.is_file() and _has_samples(Path(config.output)):
        differences = config_differences(_read_json(path), record)
        if differences:
            raise ConfigurationError(
                f"{config.output!r} holds a run with other settings ({'; '.join(differences)}). Give another "
                "`output`, or the settings of that run."
            )
        return
    _write_json(path, record)


def _has_samples(output: Path) -> bool:
    """Whether there is anything that other settings would have made differently."""
    return any(any(output.glob(pattern)) for pattern in ("round-*/samples/*", f"evaluation/{_BASE}/*"))


def _run_round(run: _Run, number: int, base: Measured | None) -> dict[str, Any]:
    """The record of a round; what is missing of it is done."""
    folder = run.folder(number)
    if from_main((folder / "round.json").is_file):
        return from_main(lambda: _read_json(folder / "round.json"))
    data = _marked(folder / "data.json", lambda: _make_data(run, number))
    training = _marked(folder / "training.json", lambda: _train(run, number))
    return _marked(folder / "round.json", lambda: _joined(data, training, _measure_policy(run, number, base)))


def _joined(*records: dict[str, Any]) -> dict[str, Any]:
    """One record of the parts of a round."""
    weights = [entry for record in records for entry in record.get("weights", [])]
    return {**{name: value for record in records for name, value in record.items()}, "weights": weights}


def _marked(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` says, and how long it took; read instead where it is done. The file is written when it is."""
    known = from_main(lambda: _read_json(path) if path.is_file() else None)
    if known is not None:
        return known
    started = time.perf_counter()
    record = work()

    def write() -> dict[str, Any]:
        timed = {**record, f"{path.stem}_seconds": round(time.perf_counter() - started, 2)}
        _write_json(path, timed)
        return timed

    return from_main(write)


def _make_data(run: _Run, number: int) -> dict[str, Any]:
    """Prompts, samples, scores and pairs of a round."""
    config, folder, prompts = run.config, run.folder(number), round_prompts(run.config, number)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in prompts)
    from_main(lambda: _write_text(folder / "prompts.jsonl", lines))
    policy, samples = run.load(number), folder / "samples"
    name, sampling = run.spec(number).name, round_sampling(config, number)
    draw_samples(policy, prompts, samples, sampling, batch_size=config.sampling_batch_size, name=name)
    scored = score_samples(samples, run.ranking, batch_size=config.scoring_batch_size) if run.ranking else None
    return {
        "round": number,
        "prompts": len(prompts),
        "samples": len(prompts) * config.sampling.samples_per_prompt,
        "rewards": {name: float(values.mean()) for name, values in scored.scores.items()} if scored else {},
        "pairs": from_main(lambda: _write_pairs(run, number, scored)),
        "weights": _weights(run, policy, number, [number]),
    }


def _write_pairs(run: _Run, number: int, scored: ScoredSamples | None) -> int:
    """Scores and pairs of a round; returns the number of pairs."""
    config, folder = run.config, run.folder(number)
    if scored is not None:
        scored.write(folder / "scores.parquet")
    if run.real is not None:
        return write_self_play_pairs(config, number, folder, run.real)
    assert scored is not None, "the mode `reward` has rewards"
    return write_feedback(scored, folder, config.feedback, source=run.spec(number).name)["pairs"]


def _train(run: _Run, number: int) -> dict[str, Any]:
    config = run.config
    rows, replayed = training_rows(config, number, [run.folder(earlier) for earlier in range(number + 1)])
    log = train_round(config, number, rows, run.trained(number), run.folder(number))
    return {"training_pairs": len(rows), "replayed": replayed, "log": log}


def _measure_base(run: _Run) -> Measured | None:
    folder = Path(run.config.output) / "evaluation" / _BASE
    return None if run.config.evaluation is None else _measure(run, run.load(0), 0, folder)


def _measure_policy(run: _Run, number: int, base: Measured | None) -> dict[str, Any]:
    """The evaluation of the policy after a round, and its importance weights on the data of all rounds so far."""
    policy = run.load(number + 1)
    record: dict[str, Any] = {"weights": _weights(run, policy, number + 1, range(number + 1))}
    measured = _measure(run, policy, number + 1, run.folder(number) / "evaluation")
    if base is not None and measured is not None:
        record["evaluation"] = _compared(run, base, measured)
    return record


def _weights(run: _Run, policy: BackboneAdapter, number: int, rounds: Iterable[int]) -> list[dict[str, Any]]:
    """Importance weights of the policy of so many rounds on the pairs of some; measured by the main process alone."""
    config, found = run.config, []
    for data in rounds if run.is_main else ():
        folder = run.folder(data)
        measured = off_policy_weights(
            policy,
            read_pairs(folder),
            config.training_arguments(folder / RUN_FOLDER, round_seed(config, data, TRAINING)),
            policy=number,
            data=data,
            num_pairs=config.weight_pairs,
            num_levels=config.weight_levels,
            seed=mix_seed(config.seed, _WEIGHTS_SEED),
        )
        found.append(as_json(measured))
    return found


def _measure(run: _Run, policy: BackboneAdapter, number: int, folder: Path) -> Measured | None:
    """What the policy of so many rounds draws of the evaluation's prompts; None without an evaluation."""
    config, settings = run.config, run.config.evaluation
    if settings is None:
        return None
    sampling = replace(
        config.sampling,
        samples_per_prompt=settings.samples_per_prompt,
        seed=mix_seed(config.seed, _EVALUATION_SEED),  # of all rounds, so that policies are compared on the same noise
    )
    options = {"batch_size": config.sampling_batch_size, "name": run.spec(number).name}
    draw_samples(policy, run.evaluation_prompts, folder, sampling, **options)
    scored = score_samples(folder, run.measuring, batch_size=config.scoring_batch_size)
    return Measured(scored, folder_features(folder, pixel_features))


def _compared(run: _Run, base: Measured, measured: Measured) -> dict[str, Any]:
    """Scores of the policy and the base, and the first beside the second."""
    models = {_BASE: base, "policy": measured}
    comparison = compare_models(
        {name: model.scored for name, model in models.items()},
        {name: model.features for name, model in models.items()},
        {},
        base=_BASE,
        beta=1.0,  # of implicit preferences, which are not measured here
        settings=StatisticsSettings(level=run.config.evaluation.level),
    )
    return {"metrics": as_json(comparison.metrics), "variety": as_json(comparison.variety.get("policy"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}. Delete it: what it says is made again.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
