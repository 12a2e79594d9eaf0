# SPDX-License-Identifier: Apache-2.0
"""`proximal_kappa` in real training steps: what it adds to every loss, what leaves it alone, and who refuses it."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    DPO_CM,
    METHODS,
    POLY_DPO,
    SIPO,
    collate_first,
    largest_difference,
    logged,
    make_config,
    make_trainer,
    preference_pairs,
    trained_weights,
)
from tests.trainer.test_backbones import _case, trainer_for
from tests.trainer.test_baselines import KTO, MAPO, SFT
from tests.trainer.test_d3po import D3PO, STEPS, trajectories
from trl_sipo.core.transition import rho_squared
from trl_sipo.errors import ConfigurationError, NumericalError
from trl_sipo.scripts.train import parse
from trl_sipo.trainer.reproduction import load_reproduction, replay
from trl_sipo.trainer.statistics import PairErrors

BETA, KAPPA = 40.0, 0.7
AWAY = {"beta": BETA, "proximal_kappa": KAPPA, "check_reference": False}  # the policy is moved before the first step
UNMASKED = {"mask": False, "mask_threshold": None}
LOSS_TYPES = [
    replace(DPO, name=loss_type, options={"loss_type": loss_type, **options})
    for loss_type, options in {"ipo": {}, "hinge": {}, "robust": {"label_smoothing": 0.1}}.items()
]
SMOOTHED = replace(DPO, name="smoothed", options={"label_smoothing": 0.2, "sft_weight": 0.1})
TARGETS = {
    "epsilon": lambda clean, noise, a, b: noise,
    "v_prediction": lambda clean, noise, a, b: a * noise - b * clean,
    "flow_prediction": lambda clean, noise, a, b: noise - clean,
}


def moved(trainer, size=0.05):
    """The trainer, its policy away from the reference, in the mode of training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    trainer.model.train()
    return trainer


def step(trainer, count=4):
    """The loss of one step, its gradients by name, and what the errors were measured of and are."""
    seen = []
    pair_errors = trainer.pair_errors
    trainer.pair_errors = lambda *args, **known: seen.append((args, pair_errors(*args, **known))) or seen[-1][1]
    loss = trainer.compute_loss(trainer.model, collate_first(trainer, count))
    gradients = torch.autograd.grad(
        loss, [p for p in trainer.model.parameters() if p.requires_grad], allow_unused=True
    )
    trainer.pair_errors = pair_errors
    return loss.detach(), [one for one in gradients if one is not None], seen[0]


def reference_prediction(trainer, predict):
    if trainer.ref_model is not None:
        return predict(trainer.ref_model)
    with trainer.model.disable_adapter():
        return predict(trainer.model)


def by_hand(trainer, pairs, level, noise):
    """Errors of the policy, of the reference, and distances, of each arm, from the two predictions."""
    found = []
    a, b = (coefficient.view(-1, 1, 1, 1) for coefficient in (level.alpha_t, level.sigma_t))
    with torch.no_grad():
        for clean, eps in zip(pairs.arms, noise, strict=True):
            noisy = a * clean + b * eps
            predict = lambda model, noisy=noisy: trainer.adapter.forward(model, noisy, level, pairs.conditioning, {})  # noqa: E731
            target = TARGETS[trainer.adapter.prediction_type](clean, eps, a, b)
            policy, reference = predict(trainer.model), reference_prediction(trainer, predict)
            differences = (policy - target, reference - target, policy - reference)
            found.append([difference.square().flatten(1).mean(1) for difference in differences])
    return [list(column) for column in zip(*found, strict=True)]


# ------------------------------------------------------------------------------------------------- what it adds


@pytest.mark.parametrize("method", [*METHODS, *LOSS_TYPES, SMOOTHED, KTO], ids=lambda method: method.name)
def test_the_loss_is_the_objective_and_the_term(method, tmp_path):
    """From the two predictions, by hand; the objective is that of the same errors without the term."""
    options = UNMASKED if method.is_weighted else {}
    trainer = moved(make_trainer(method, tmp_path, **AWAY, **options))
    loss, _, ((_, pairs, level, noise), measured) = step(trainer)
    errors, ref_errors, distances = by_hand(trainer, pairs, level, noise)
    torch.testing.assert_close(list(measured.distances), distances, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(list(measured.policy), errors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(measured.reference), ref_errors, rtol=1e-5, atol=1e-6)

    term = BETA * KAPPA / 2 * sum(distances)
    label = collate_first(trainer).get("label")
    objective, statistics = trainer.pair_loss(PairErrors.of_arms(measured.policy, measured.reference), level, label)
    torch.testing.assert_close(loss, (objective + term).mean().detach(), rtol=1e-4, atol=1e-6)
    assert term.mean() > 1e-2 and not any(name.startswith("proximal/") for name in statistics)
    if method is DPO:
        z = BETA / 2 * ((ref_errors[0] - errors[0]) - (ref_errors[1] - errors[1]))
        torch.testing.assert_close(loss, (term - logsigmoid(z)).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "v_prediction", "flow_prediction"])
def test_all_weights_and_other_kinds_of_prediction(kind, tmp_path):
    options = AWAY
    if kind == "flow_prediction":
        trainer, count = trainer_for(_case("sd3"), tmp_path, DPO, **options), 2
    else:
        model = tiny_stable_diffusion("epsilon" if kind == "full" else kind)
        trainer, count = make_trainer(DPO, tmp_path, model=model, is_lora=kind != "full", **options), 4
    assert kind == "full" or trainer.adapter.prediction_type == kind
    loss, _, ((_, pairs, level, noise), _) = step(moved(trainer), count)
    errors, ref_errors, distances = by_hand(trainer, pairs, level, noise)
    z = BETA / 2 * ((ref_errors[0] - errors[0]) - (ref_errors[1] - errors[1]))
    term = BETA * KAPPA / 2 * sum(distances)
    torch.testing.assert_close(loss, (term - logsigmoid(z)).mean(), rtol=1e-4, atol=1e-6)
    assert term.mean() > 1e-3


def test_d3po_has_the_distance_of_a_step_over_its_variance(tmp_path):
    """Of the guided predictions, times rho^2 as its errors are: twice the divergence of the steps per dimension."""
    options = {**AWAY, "guidance_scale": 3.0}
    trainer = moved(make_trainer(D3PO, tmp_path, pairs=trajectories(), **options))
    loss, _, ((_, pairs, level, _), measured) = step(trainer)
    steps = [trainer.args.timesteps.index(int(timestep)) for timestep in level.timestep]
    scale = rho_squared(level, trainer.noise_schedule.previous_level(level, STEPS), "epsilon")
    for states, distance in zip(pairs.arms, measured.distances, strict=True):
        noisy = states[torch.arange(len(steps)), steps]

        def predict(model, noisy=noisy):
            return trainer.predictor.forward(model, noisy, level, pairs.conditioning)

        with torch.no_grad():
            difference = predict(trainer.model) - reference_prediction(trainer, predict)
        torch.testing.assert_close(
            distance.detach(), scale * difference.square().flatten(1).mean(1), rtol=1e-3, atol=1e-6
        )
    term = BETA * KAPPA / 2 * sum(measured.distances)
    torch.testing.assert_close(loss, (trainer.pair_loss(measured, level)[0] + term).mean().detach())
    assert term.mean() > 1e-3


# --------------------------------------------------------------------------------------------- what leaves it alone


@pytest.mark.parametrize("method", [SIPO, DPO_CM], ids=lambda method: method.name)
def test_a_mask_and_a_weight_leave_the_term(method, tmp_path):
    """A coarse grid masks all pairs: what is left is the term, and its gradient, which pulls to the reference."""
    options = {**AWAY, "importance_steps": 2, "mask_threshold": 0.99}
    trainer = moved(make_trainer(method, tmp_path, **options))
    loss, gradients, ((_, _, level, _), measured) = step(trainer)
    term = BETA * KAPPA / 2 * sum(measured.distances)
    objective, statistics = trainer.pair_loss(measured, level)
    assert statistics["sipo/masked_fraction"].tolist() == [1.0] * 4 and objective.tolist() == [0.0] * 4
    assert torch.equal(loss, term.mean().detach())
    assert sum(gradient.square().sum() for gradient in gradients) > 0
    plain_loss, plain, _ = step(moved(make_trainer(method, tmp_path, **{**options, "proximal_kappa": 0.0})))
    assert plain_loss == 0 and sum(gradient.square().sum() for gradient in plain) == 0


def _errors():
    """A chosen arm that is better and worse than the reference's, of pairs of every importance weight."""
    values = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) * 0.01
    return PairErrors(*(values[:4] + 0.2).unbind(), *values[4:].unbind())


def test_weights_labels_and_smoothing_leave_the_term(tmp_path):
    """`objective` is `pair_loss` plus one and the same term, whatever is done to the loss."""
    trainers = [
        make_trainer(method, tmp_path, beta=BETA, proximal_kappa=KAPPA, **options)
        for method, options in ((POLY_DPO, {"label_smoothing": 0.2, "sft_weight": 0.3}), (SIPO, UNMASKED))
    ]
    errors = _errors()
    expected = BETA * KAPPA / 2 * (errors.chosen_distance + errors.rejected_distance)
    for trainer in trainers:
        level = trainer.noise_schedule.level(torch.full((16,), 100))
        for label in (None, torch.linspace(0, 1, 16)):
            loss, statistics = trainer.pair_loss(errors, level, label)
            whole, with_term = trainer.objective(errors, level, label)
            torch.testing.assert_close(whole - loss, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(with_term.pop("proximal/loss"), expected)
            distance = (errors.chosen_distance + errors.rejected_distance) / 2
            torch.testing.assert_close(with_term.pop("proximal/distance"), distance)
            assert with_term.keys() == statistics.keys()
            assert all(torch.equal(with_term[name], value) for name, value in statistics.items())
    assert trainers[1].pair_loss(errors, level)[1]["sipo/weight"].max() > 1


def test_without_kappa_no_distance_is_measured(tmp_path, monkeypatch):
    """And the other way through the reference changes nothing: a kappa too small to matter gives the same run."""
    runs = {}
    for kappa in (0.0, 1e-32):
        if kappa == 0:
            monkeypatch.setattr("trl_sipo.trainer.base_trainer.errors_and_distances_of", None)
        trainer = make_trainer(DPO, tmp_path / str(kappa), proximal_kappa=kappa, learning_rate=1e-2)
        trainer.train()
        runs[kappa] = trainer
        monkeypatch.undo()
    plain, other = runs.values()
    for key in ("loss", "rewards/margins", "grad_norm"):
        assert logged(plain, key) == logged(other, key)
    assert largest_difference(trained_weights(plain), trained_weights(other)) == 0.0
    keys = [set(trainer.state.log_history[1]) for trainer in (plain, other)]
    assert keys[1] - keys[0] == {"proximal/distance", "proximal/loss"} and keys[0] < keys[1]
    assert "proximal" not in plain.describe_run() and "proximal term: kappa = 1e-32" in other.describe_run()


# ------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_split_arms_have_the_same_gradient(is_lora, tmp_path):
    found = []
    for split in (False, True):
        options = {**AWAY, "split_pair_backward": split}
        trainer = make_trainer(DPO, tmp_path, is_lora=is_lora, **options)
        for model in {trainer.model, trainer.ref_model} - {None}:
            model.double()
        found.append(step(moved(trainer)))
    (loss, gradients, _), (split_loss, split_gradients, _) = found
    torch.testing.assert_close(split_loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(split_gradients, gradients, rtol=1e-7, atol=1e-9)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_a_run_starts_at_distance_zero_accumulates_evaluates_and_stays_nearer(tmp_path):
    options = {"beta": BETA, "learning_rate": 1e-2, "max_steps": 4}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = {
        name: make_trainer(DPO, tmp_path / name, **options, **more)
        for name, more in {
            "plain": {"proximal_kappa": 1e-32},
            "kappa": {"proximal_kappa": 5.0},
            "accumulated": {"proximal_kappa": 5.0, **split},
        }.items()
    }
    for trainer in runs.values():
        trainer.train()
    plain, kappa, accumulated = runs.values()
    distances = logged(kappa, "proximal/distance")
    assert distances[0] == 0.0 and min(distances[1:]) > 0
    assert logged(kappa, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    # Whichever noise a step draws, the loss of a pair and its term are both in the log.
    assert logged(kappa, "proximal/loss") == pytest.approx([BETA * 5.0 * distance for distance in distances], rel=1e-5)
    assert distances[-1] < 0.8 * logged(plain, "proximal/distance")[-1]
    assert logged(accumulated, "loss") == pytest.approx(logged(kappa, "loss"), rel=1e-4)
    assert largest_difference(trained_weights(kappa), trained_weights(accumulated)) < 1e-3

    metrics, others = (trainer.evaluate(preference_pairs(3, seed=7)) for trainer in (kappa, plain))
    assert metrics["eval_proximal/distance"] < others["eval_proximal/distance"]
    assert metrics["eval_proximal/loss"] == pytest.approx(BETA * 5.0 * metrics["eval_proximal/distance"], rel=1e-5)
    kappa.args.proximal_kappa = 0.0
    without = kappa.evaluate(preference_pairs(3, seed=7))
    assert "eval_proximal/loss" not in without
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"] + metrics["eval_proximal/loss"], rel=1e-5)


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_in_bfloat16_it_starts_at_zero_too_and_is_float32(is_lora, tmp_path):
    trainer = make_trainer(
        SIPO, tmp_path, is_lora=is_lora, bf16=True, proximal_kappa=KAPPA, max_steps=2, learning_rate=1e-2, **UNMASKED
    )
    trainer.train()
    first, second = logged(trainer, "proximal/distance")
    assert first == 0.0 < second
    assert {value.dtype for value in step(trainer)[2][1].named().values()} == {torch.float32}


def test_a_reference_that_follows_takes_the_distance_along(tmp_path):
    options = {"is_lora": False, "proximal_kappa": KAPPA, "learning_rate": 1e-2}
    synced = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    still, following = (make_trainer(DPO, tmp_path / str(len(more)), **options, **more) for more in ({}, synced))
    for trainer in (still, following):
        trainer.train()
    assert min(logged(still, "proximal/distance")[1:]) > 0
    assert logged(following, "proximal/distance") == pytest.approx([0.0] * 3, abs=1e-12)


def test_a_step_that_was_not_finite_is_computed_again_with_its_term(tmp_path):
    """Of the second step, when the policy has left the reference."""
    options = {"pairs": preference_pairs(4), "proximal_kappa": KAPPA, "beta": BETA, "learning_rate": 1e-2}

    def broken_at(trainer, step):
        name, weight = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
        weight.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == step else 1.0))
        return name, trainer

    name, trainer = broken_at(make_trainer(DPO, tmp_path, **options), 1)
    with pytest.raises(NumericalError, match=r"^Step 2: "):
        trainer.train()
    (file,) = (tmp_path / "_nonfinite").glob("*.json")
    stored = load_reproduction(file)[0].errors
    assert len(stored.distances) == 2 and stored.chosen_distance.min() > 0

    _, again = broken_at(make_trainer(DPO, tmp_path / "again", **options), 0)  # it stays at its first step
    seen, objective = [], again.objective
    again.objective = lambda *args: seen.append((args[0], objective(*args))) or seen[-1][1]
    assert replay(file, again).parameters == [name]
    ((errors, (_, statistics)),) = seen
    torch.testing.assert_close(errors.chosen_distance, stored.chosen_distance, rtol=1e-4, atol=0)
    assert statistics["proximal/loss"].min() > 0


@pytest.mark.parametrize(
    ("method", "kappa", "expected"),
    [
        (DPO, 0.5, "the least with .* of two samples of the reference, which wins up to 66.7% against it; for other"),
        (DPO, 0.6, "above 0.5: .* whatever .*; for pairs of two samples of the reference it wins up to 63.9%"),
        (DPO, 0.4, "below 0.5: no optimum is sure"),
        (replace(SMOOTHED, options={"label_smoothing": 0.2}), 0.6, "above 0.3: .* wins up to 58.3%"),
        (replace(SMOOTHED, options={"label_smoothing": 0.4999}), 0.0001, "the least with .* 66.7%"),
        (SMOOTHED, 0.5, r"above 0.3: this loss has an optimum whatever the pairs are\)"),
        (POLY_DPO, 0.5, "below 2.5: "),
        (POLY_DPO, 2.5, "the least with .* 66.7%"),
        (LOSS_TYPES[0], 0.5, "below 1: "),
        (LOSS_TYPES[2], 0.625, "the least with .* 66.7%"),
        (SIPO, 0.5, "below 0.55: "),
        (
            SIPO,
            0.55,
            "the least with which this loss, its mask and weights taken as they are, .* reference; for other",
        ),
        (
            DPO_CM,
            0.5,
            "the least with which this loss, its mask and weights taken as they are, .* reference; for other",
        ),
        (replace(DPO_CM, options={"importance_steps": 2, "mask_threshold": 0.999999}), 0.5, r"kappa = 0.5\n"),
        (D3PO, 0.5, "the least with which .* has an optimum for pairs of two samples of the reference; for other"),
        (KTO, 0.5, r"kappa = 0.5\n"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_run_says_at_its_start_what_its_kappa_promises(method, kappa, expected, tmp_path):
    """The threshold is the slope of the loss: of the log-sigmoid 1/2, whatever else differs."""
    options = {"pairs": trajectories()} if method is D3PO else {}
    description = make_trainer(method, tmp_path, proximal_kappa=kappa, **options).describe_run()
    assert re.search(
        f"proximal term: kappa = {kappa:g}.*{expected}" if "kappa" not in expected else expected, description
    )


# ---------------------------------------------------------------------------------------------- where it cannot be


@pytest.mark.parametrize("method", [SFT, MAPO], ids=lambda method: method.name)
def test_methods_without_a_reference_refuse_it(method, tmp_path):
    message = f"`proximal_kappa=0.5` has no meaning in {method.config_class.__name__}: the method compares with no ref"
    with pytest.raises(ConfigurationError, match=message):
        make_config(method, tmp_path, proximal_kappa=0.5)


@pytest.mark.parametrize("kappa", [-0.1, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5]], ids=str)
def test_a_kappa_that_is_none_is_named(kappa, tmp_path):
    with pytest.raises(ConfigurationError, match="`?proximal_kappa(=|` must be a number)") as caught:
        make_config(DPO, tmp_path, proximal_kappa=kappa)
    assert str(kappa) in str(caught.value)


def test_a_reference_of_which_only_errors_are_kept_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="precompute_ref_log_probs=True.*proximal_kappa=0.5"):
        make_trainer(DPO, tmp_path, precompute_ref_log_probs=True, proximal_kappa=0.5)


@pytest.mark.parametrize("command", ["dpo", "sipo", "poly-dpo", "kto", "d3po"])
def test_the_command_line_has_it(command, tmp_path):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    options = ["--trajectory_steps", "4"] if command == "d3po" else []
    _, training, _ = parse(command, [*argv, *options, "--proximal_kappa", "0.5"])
    assert training.proximal_kappa == 0.5 and parse(command, [*argv, *options])[1].proximal_kappa == 0
