# SPDX-License-Identifier: Apache-2.0
"""The settings of an online run: one nested YAML file, overridden by `--part.key value` on the command line."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trl_sipo.errors import ConfigurationError
from trl_sipo.feedback.feedback import FeedbackSettings
from trl_sipo.feedback.pairing import check_pairing
from trl_sipo.generation.models import DTYPES
from trl_sipo.generation.sampling import SamplingSettings
from trl_sipo.trainer.methods import method_classes
from trl_sipo.trainer.setting_types import check_numbers, check_types
from trl_sipo.yaml_files import parse_yaml, read_yaml

MODES = ("reward", "self_play")
REFERENCES = ("fixed", "refreshed")
# What a round decides for its training run.
_OWN_TRAINING_SETTINGS = ("output_dir", "seed", "resume_from_checkpoint", "lora_reference")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of the policy after each round, on prompts that training does not see.

    Args:
        prompts: A prompt set, as `trl_sipo.generation.prompt_sets` reads it.
        max_prompts: At most so many of them, at random; None takes all.
        rewards: Beside those of training, by which nothing is ranked: where these part, the reward is being hacked.
        samples_per_prompt: Drawn for each; the same noise in every round.
        level: Of the intervals.
    """

    prompts: str
    max_prompts: int | None = None
    rewards: list[str] = field(default_factory=list)
    samples_per_prompt: int = 4
    level: float = 0.95

    def __post_init__(self) -> None:
        check_types(self, object)
        if self.samples_per_prompt < 1 or not 0 < self.level < 1:
            raise ConfigurationError(
                "`evaluation` needs samples_per_prompt >= 1 and 0 < level < 1, got "
                f"{self.samples_per_prompt} and {self.level}."
            )


@dataclass(frozen=True)
class OnlineConfig:
    """An online run: in each round prompts, samples of the current policy, preference pairs, and training on them.

    Args:
        model: Hub id or folder of the pipeline that the first round starts from.
        output: Folder of the run.
        prompts: A prompt set, as `trl_sipo.generation.prompt_sets` reads it.
        method: A key of `trl_sipo.trainer.methods.METHODS`.
        training: Settings of the method's configuration for the training of one round, such as `beta`, `max_steps`
            or `num_train_epochs`.
        lora: Options of `peft.LoraConfig`, such as `r` and `lora_alpha`; None trains all weights of the denoiser.
        rounds: How many. A finished run goes on when there are more.
        prompts_per_round: Drawn from the set without replacement, anew in each round; None takes all.
        mode: "reward" ranks samples of the policy by `rewards`. "self_play" (SPIN-Diffusion, arXiv 2402.10210)
            prefers the image of a dataset's row with the same prompt to a sample of the policy.
        rewards: What ranks, in the mode "reward".
        reward_options: Options of the rewards that have some, by their names.
        real_data: Dataset of the mode "self_play", with columns `prompt` and `image`, or pairs, of which the chosen
            images are taken.
        real_data_split: Its split.
        sampling: How the policy is sampled; `samples_per_prompt` is 2 unless given. Seeds follow from `seed`.
        feedback: How pairs are made of scores.
        reference: "fixed", the base model in all rounds; or "refreshed", the policy at the start of the round. By
            default "fixed" in the mode "reward", "refreshed" in "self_play".
        replay: Share in [0, 1) of a round's training pairs that are drawn from the pairs of earlier rounds.
        evaluation: What is measured after each round; None measures nothing.
        weight_pairs: Pairs of each round on which the policy's importance weights are measured.
        weight_levels: Noise levels at which they are.
        sampling_batch_size, scoring_batch_size: Samples at once.
        dtype: Of the model where its weights are not trained: while it samples, and under a LoRA.
        device: Of sampling and rewards; by default the GPU of this process, if there is one.
        seed: Of prompts, noise, training and replay, in all rounds.
    """

    model: str
    output: str
    prompts: str
    method: str = "sipo"
    training: dict = field(default_factory=dict)
    lora: dict | None = None
    rounds: int = 5
    prompts_per_round: int | None = None
    mode: str = "reward"
    rewards: list[str] = field(default_factory=list)
    reward_options: dict = field(default_factory=dict)
    real_data: str | None = None
    real_data_split: str = "train"
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(samples_per_prompt=2))
    feedback: FeedbackSettings = field(default_factory=lambda: FeedbackSettings(sft_per_prompt=0))
    reference: str | None = None
    replay: float = 0.0
    evaluation: EvaluationSettings | None = None
    weight_pairs: int = 64
    weight_levels: int = 10
    sampling_batch_size: int = 4
    scoring_batch_size: int = 16
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, object)
        _check_choice("mode", self.mode, MODES)
        _check_choice("dtype", self.dtype, DTYPES)
        if self.reference is None:
            object.__setattr__(self, "reference", "refreshed" if self.mode == "self_play" else "fixed")
        _check_choice("reference", self.reference, REFERENCES)
        self._check_numbers()
        self._check_mode()
        self._check_training()

    def _check_numbers(self) -> None:
        counts = ("rounds", "prompts_per_round", "weight_pairs", "weight_levels")
        for name in (*counts, "sampling_batch_size", "scoring_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= self.replay < 1 or math.isnan(self.replay):
            raise ConfigurationError(f"`replay={self.replay}` must be a share in [0, 1) of a round's pairs.")

    def _check_mode(self) -> None:
        if self.mode == "reward":
            if not self.rewards:
                raise ConfigurationError("`rewards` names nothing to rank by: name one, or set `mode: self_play`.")
            if self.real_data is not None:
                raise ConfigurationError("`real_data` is of `mode: self_play` only. Set that, or remove it.")
            if self.sampling.samples_per_prompt < 2:
                raise ConfigurationError("`sampling.samples_per_prompt` must be at least 2: a pair is two samples.")
        elif self.real_data is None:
            raise ConfigurationError("`mode: self_play` needs `real_data`, a dataset with a `prompt` and an `image`.")
        check_pairing(self.feedback.selection, self.feedback.combine, {}, self.feedback.min_margin, ["any"])
        for name in ("held_out_share", "sft_per_prompt"):
            if getattr(self.feedback, name) != 0:
                raise ConfigurationError(
                    f"`feedback.{name}` has no use in rounds: every pair is trained on, and `evaluation` has prompts "
                    "of its own. Remove it."
                )
        strangers = set(self.reward_options) - set(self.all_rewards)
        if strangers:
            raise ConfigurationError(
                f"`reward_options` are given for {', '.join(sorted(strangers))}, but the rewards are "
                f"{', '.join(self.all_rewards) or 'none'}."
            )

    def _check_training(self) -> None:
        taken = [name for name in _OWN_TRAINING_SETTINGS if name in self.training]
        if taken:
            raise ConfigurationError(
                f"`training.{taken[0]}` is decided by the rounds: see `output`, `seed` and `reference`."
            )
        known = {part.name for part in fields(method_classes(self.method)[0]) if part.init}
        _check_known(self.training, known - set(_OWN_TRAINING_SETTINGS), "training.")
        check_numbers(self.training, method_classes(self.method)[0], "training.")
        if method_classes(self.method)[0].arms != "pair":
            raise ConfigurationError(f"`method: {self.method}` learns from single images, and rounds make pairs.")
        if method_classes(self.method)[0].reads_trajectories:
            raise ConfigurationError(f"`method: {self.method}` reads recorded trajectories, and rounds make images.")
        if not method_classes(self.method)[0].has_reference and self.reference == "refreshed":
            raise ConfigurationError(f"`reference: refreshed` does nothing: `method: {self.method}` has no reference.")
        self.training_arguments(Path(self.output), 0)

    @property
    def all_rewards(self) -> list[str]:
        """Those of training, then those that only measure; each once."""
        extra = [] if self.evaluation is None else self.evaluation.rewards
        return list(dict.fromkeys([*self.rewards, *extra]))

    def training_arguments(self, folder: Path, seed: int, **settings: Any) -> Any:
        """The method's configuration for one round.

        Raises:
            ConfigurationError: A setting that is none, or contradicts another.
        """
        options = {"report_to": "none", "save_total_limit": 1, **self.training, **settings}
        try:
            return method_classes(self.method)[0](output_dir=str(folder), seed=seed, **options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"`training`: {error}") from error

    def record(self) -> dict[str, Any]:
        """All that the results are a function of, as JSON has it."""
        other = ("output", "device", "rounds")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in other}


def config_differences(one: dict[str, Any], other: dict[str, Any], where: str = "") -> list[str]:
    """The settings in which two records differ, with both values, by their dotted names."""
    found = []
    for name in dict.fromkeys([*one, *other]):
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found += config_differences(first, second, f"{where}{name}.")
        elif first != second:
            found.append(f"{where}{name}: {first!r} there, {second!r} now")
    return found


_PARTS: Mapping[str, type] = {
    "sampling": SamplingSettings,
    "feedback": FeedbackSettings,
    "evaluation": EvaluationSettings,
}
_PART_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sampling": {"samples_per_prompt": 2},
    "feedback": {"sft_per_prompt": 0},
    "evaluation": {},
}


def make_config(settings: Mapping[str, Any]) -> OnlineConfig:
    """A configuration of nested settings, as YAML gives them.

    Raises:
        ConfigurationError: An unknown key, one that is missing, a value of another type, or a contradiction.
    """
    _check_known(settings, _field_names(OnlineConfig), "")
    made = {name: value for name, value in settings.items() if value is not None}
    for name, part in _PARTS.items():
        if name not in made:
            continue
        if not isinstance(made[name], Mapping):
            raise ConfigurationError(f"`{name}` must be settings by name, got {made[name]!r}.")
        known = _field_names(part) - ({"seed"} if name == "sampling" else set())
        _check_known(made[name], known, f"{name}.")
        made[name] = _made(part, {**_PART_DEFAULTS[name], **made[name]}, f"{name}.")
    return _made(OnlineConfig, made, "")


def _made(kind: type, settings: Mapping[str, Any], where: str) -> Any:
    required = [part.name for part in fields(kind) if part.default is part.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise ConfigurationError(f"`{where}{missing[0]}` is missing.")
    rewards = settings.get("rewards")
    listed = {"rewards": [rewards]} if isinstance(rewards, str) else {}  # one may stand for a list of one
    try:
        return kind(**{**settings, **listed})
    except TypeError as error:  # a text in place of a number
        raise ConfigurationError(f"`{where.rstrip('.') or 'settings'}`: {error}.") from error


def _field_names(kind: Any) -> set[str]:
    return {part.name for part in fields(kind)}


def _check_known(settings: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigurationError(f"Unknown setting `{where}{unknown[0]}`; known are {', '.join(sorted(known))}.")


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigurationError(f"`{name}` must be one of {', '.join(known)}; got {value!r}.")


# ------------------------------------------------------------------------------------------------------- YAML, argv


def read_settings(path: str | Path) -> dict[str, Any]:
    """Nested settings of a YAML file.

    Raises:
        ConfigurationError: It cannot be read, or is no mapping.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ConfigurationError(f"The configuration file {str(path)!r} holds no settings by name.")
    return settings


def with_overrides(settings: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Settings with those of a command line: `--rounds 3 --training.beta 2 --rewards pickscore hpsv2`.

    Raises:
        ConfigurationError: A word that belongs to no option, or an option without a value.
    """
    merged = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    for name, values in _options(words).items():
        if not values:
            raise ConfigurationError(f"`--{name}` needs a value.")
        try:
            parsed = [parse_yaml(value) for value in values]
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigurationError(f"`--{name} {' '.join(values)}` is not valid YAML: {error}") from error
        head, _, rest = name.partition(".")
        if not rest:
            merged[head] = parsed if len(parsed) > 1 else parsed[0]
            continue
        part = merged.get(head) or {}
        if not isinstance(part, Mapping):
            raise ConfigurationError(f"`--{name}`: `{head}` is {part!r}, which has no parts.")
        merged[head] = {**part, rest: parsed if len(parsed) > 1 else parsed[0]}
    return merged


def _options(words: Sequence[str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            current = options[name] = [value] if separator else []
        elif current is None:
            raise ConfigurationError(f"{word!r} belongs to no option: write --name value.")
        else:
            current.append(word)
    return options
