# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit beta`: how strong a beta is for a model and its pairs, before anything is trained."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.core.beta import BETA_CONVENTIONS
from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser
from trl_sipo.scripts.audit_inputs import (
    AuditedLevels,
    add_adapter_option,
    add_data_options,
    add_level_options,
    add_model_options,
    check_adapter,
    load_adapter,
    load_rows,
    measure,
    open_pairs,
    settings_of,
    settings_words,
    training_settings,
    with_adapter,
)
from trl_sipo.scripts.audit_kappa import (
    add_kappa_options,
    check_kappa_options,
    is_asked,
    kappa_reading,
    kappa_section,
    kappa_table,
    label_noises,
)
from trl_sipo.scripts.audit_report import (
    prepare_output,
    print_sentences,
    print_tables,
    recorded_command,
    write_audit,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trl_sipo.evaluation.beta_range import BetaRange, MarginScale, RealMargins
    from trl_sipo.evaluation.importance_curve import PairWeights
    from trl_sipo.evaluation.kappa_choice import LabelNoise
    from trl_sipo.reporting.evaluation_tables import Table

_SHOWN_LEVELS = 10


def make_parser(prog: str = "trl-sipo audit beta") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names."""
    parser = ArgumentParser(
        prog=prog,
        description="Print how far a policy goes before each beta lets go of its pairs, a range, and what to think of "
        "the beta that is given; and which weight of the proximal term wins how often.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_adapter_option(parser)
    add_data_options(parser, num_pairs=32)
    add_level_options(parser, num_levels=20)
    add = parser.add_argument
    add("--beta", type=float, help="the one that you are going to train with")
    add(
        "--beta_convention",
        choices=tuple(BETA_CONVENTIONS),
        default="diffusion_dpo",
        help="in which --beta is given, as in training (default: %(default)s)",
    )
    add("--betas", type=float, nargs="+", metavar="BETA", help="of the table (default: three decades)")
    add_kappa_options(parser)
    add("--output", type=Path, metavar="DIR", help="folder for beta.json, beta.html and beta.png")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on betas that are none, and on what is asked of the proximal term."""
    from trl_sipo.core.beta import check_beta

    for beta in [*([] if arguments.beta is None else [arguments.beta]), *(arguments.betas or [])]:
        check_beta(beta)
    if arguments.beta is None and arguments.beta_convention != "diffusion_dpo":
        raise ConfigurationError(f"`--beta_convention {arguments.beta_convention}` converts a `--beta`: give one.")
    check_kappa_options(arguments)


def run(command: str, argv: list[str]) -> None:
    """Measure, print, and write when asked to.

    Raises:
        ConfigurationError: Options that make no sense, or contradict the data or the model.
        BackboneError, DatasetError, NumericalError, StorageError: As the parts do.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    training_settings(arguments)  # before anything is loaded
    draws = prepare_output(arguments.output)
    check_adapter(arguments)
    adapter, rows = load_adapter(arguments), load_rows(arguments)
    settings, size, audited, pairs = open_pairs(arguments, adapter, rows)
    weights, tuned = measure(adapter, pairs, audited, settings), None
    if arguments.adapter is not None:
        tuned = measure(with_adapter(arguments, adapter), pairs, audited, settings, what="With the adapter")
    latent_dims = math.prod(pairs[0].encoded.chosen_latents.shape[1:])
    noises = label_noises(arguments, rows, pairs) if is_asked(arguments) else []
    found = numbers(arguments, audited, [pair.prompt for pair in pairs], weights, tuned, latent_dims, noises)
    shared = settings_of(arguments, adapter, settings, audited, size, len(pairs)) | {"latent_dims": latent_dims}
    report = {"command": recorded_command(command, argv), "settings": shared, **found}
    tables = tables_of(report)
    print_sentences(report["reading"])
    print_tables(tables)
    print(f"\n{settings_words(shared)}.")
    if arguments.output is not None:
        figures = figures_of(report, audited) if draws else {}
        write_audit(arguments.output, "beta", report, report["reading"], tables, figures)


# ----------------------------------------------------------------------------------------------------------- numbers


def numbers(
    arguments: argparse.Namespace,
    audited: AuditedLevels,
    prompts: Sequence[str],
    weights: "PairWeights",
    tuned: "PairWeights | None",
    latent_dims: int,
    noises: Sequence["LabelNoise"] = (),
) -> dict[str, Any]:
    """The report without command and settings; of the proximal term where noises of the labels are given."""
    from trl_sipo.evaluation.beta_range import beta_grid, beta_range, conversions, margin_scale, opposed_scale
    from trl_sipo.evaluation.policy_distance import as_numbers

    scale = margin_scale(weights.chosen_error, weights.rejected_error, prompts)
    found = beta_range(scale)
    given = given_beta(arguments, latent_dims)
    betas = sorted({*(arguments.betas or beta_grid(found.middle)), *([] if given is None else [given])})
    by_draw = opposed_scale(weights.chosen_error, weights.rejected_error)
    real = real_of(weights, tuned, prompts) if tuned else None
    report = {
        "scale": as_numbers(scale.typical),
        "range": {"low": found.low, "high": found.high, "middle": found.middle},
        "conversions": {
            name: conversions(beta, latent_dims)
            for name, beta in [("low", found.low), ("middle", found.middle), ("high", found.high)]
            + ([] if given is None else [("given", given)])
        },
        "betas": [saturation(beta, by_draw, found, real) for beta in betas],
        "levels": level_rows(audited, scale, given),
    }
    if real is not None:
        report["adapter"] = {
            name: as_numbers(getattr(real, name)) for name in ("accuracy", "chosen_drift", "rejected_drift")
        }
        report["adapter"]["margin_by_level"] = real.margin.mean(1).tolist()
    report["reading"] = reading(arguments, audited, scale, found, given, real, latent_dims)
    if given is not None:
        from trl_sipo.evaluation.beta_range import verdict

        report["given"] = {"beta": given, "verdict": verdict(given, found)[0]}
    if noises:
        report["kappa"] = kappa_section(arguments, noises)
        report["reading"] += kappa_reading(report["kappa"], noises, given, found)
    return report


def given_beta(arguments: argparse.Namespace, latent_dims: int) -> float | None:
    """`--beta` in the Diffusion-DPO convention; None: none was given."""
    from trl_sipo.core.beta import to_diffusion_dpo_beta

    if arguments.beta is None:
        return None
    return to_diffusion_dpo_beta(arguments.beta, arguments.beta_convention, latent_dims=latent_dims)


def real_of(weights: "PairWeights", tuned: "PairWeights", prompts: Sequence[str]) -> "RealMargins":
    """The margins of the second state of the model."""
    from trl_sipo.evaluation.beta_range import real_margins

    base, after = ((part.chosen_error, part.rejected_error) for part in (weights, tuned))
    return real_margins(base, after, prompts)


def saturation(beta: float, scale: "Tensor", found: "BetaRange", real: "RealMargins | None") -> dict[str, Any]:
    """One row of the table of betas."""
    from trl_sipo.evaluation.beta_range import DRIFTS, saturated_share, saturating_drift, verdict

    row = {
        "beta": beta,
        "let_go_at_drift": saturating_drift(found.scale.estimate, beta),
        "saturated": {f"{drift:g}": saturated_share(scale, beta, drift) for drift in DRIFTS},
        "verdict": verdict(beta, found)[0],
    }
    if real is not None:
        row |= {"adapter_saturated": real.saturated(beta), "adapter_margin": beta * float(real.margin.mean())}
    return row


def level_rows(audited: AuditedLevels, scale: "MarginScale", given: float | None) -> list[dict[str, Any]]:
    """One row per level."""
    from trl_sipo.evaluation.beta_range import saturating_drift

    rows = []
    for place, time in enumerate(audited.times.tolist()):
        row = {
            "time": time,
            audited.unit: audited.positions[place],
            "scale": scale.by_level[place],
            "common": scale.common_by_level[place],
        }
        if given is not None:
            row["let_go_at_drift"] = saturating_drift(scale.by_level[place], given)
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------- reading


def reading(
    arguments: argparse.Namespace,
    audited: AuditedLevels,
    scale: "MarginScale",
    found: "BetaRange",
    given: float | None,
    real: "RealMargins | None",
    latent_dims: int,
) -> list[str]:
    """What was found, the verdict on the beta that was given first."""
    from trl_sipo.evaluation.beta_range import LEAST_DRIFT, MOST_DRIFT, mixed_up_conventions, rounded, verdict

    sentences = []
    if given is not None:
        sentences.append(verdict(given, found)[1])
        names = mixed_up_conventions(arguments.beta, arguments.beta_convention, found, latent_dims)
        if names and not found.holds(given):
            sentences.append(mix_up_words(arguments, names))
    ends = scale.typical
    sentences.append(
        f"Recommended: beta from {rounded(found.low)} to {rounded(found.high)} (Diffusion-DPO convention). At the one "
        f"end a typical draw is let go at a drift of {MOST_DRIFT:.0%}, chosen error down and rejected error up, at "
        f"the other at {LEAST_DRIFT:.0%}. The margin moves by {ends.estimate:.3g} [{ends.low:.3g}, {ends.high:.3g}] "
        "a beta and unit of drift."
    )
    sentences.append(level_words(scale.by_level, audited))
    if real is not None:
        sentences.append(adapter_words(real))
    return sentences


def level_words(scale: Sequence[float], audited: AuditedLevels) -> str:
    """Which levels are let go first: the clean ones of noise prediction, and others of other kinds of models."""
    largest, smallest = scale.index(max(scale)), scale.index(min(scale))
    first, last = (f"{audited.unit} {audited.shown(place)}" for place in (largest, smallest))
    return (
        f"The scale is largest, {scale[largest]:.2g}, at {first}, where pairs are let go first, and smallest, "
        f"{scale[smallest]:.2g}, at {last}, where they are pushed longest ({audited.unit} 0 is clean)."
    )


def mix_up_words(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """That the number would be a good one in other conventions."""
    return (
        f"Is another convention meant? Taken as `beta_convention={' or '.join(names)}`, and not as "
        f"{arguments.beta_convention}, {arguments.beta:g} would be in the range."
    )


def adapter_words(real: "RealMargins") -> str:
    """How the second state of the model compares."""
    chosen, rejected, accuracy = real.chosen_drift, real.rejected_drift, real.accuracy
    return (
        f"The adapter has moved the error by {chosen.estimate:+.1%} [{chosen.low:+.1%}, {chosen.high:+.1%}] on chosen "
        f"and {rejected.estimate:+.1%} [{rejected.low:+.1%}, {rejected.high:+.1%}] on rejected samples, and ranks "
        f"{accuracy.estimate:.0%} [{accuracy.low:.0%}, {accuracy.high:.0%}] of the pairs right."
    )


def tables_of(report: dict[str, Any]) -> list["Table"]:
    """The report as tables of text."""
    tables = [beta_table(report["betas"]), level_table(report["levels"]), conversion_table(report["conversions"])]
    return [kappa_table(report["kappa"]), *tables] if "kappa" in report else tables


def beta_table(rows: Sequence[dict[str, Any]]) -> "Table":
    """Saturation by beta and drift."""
    from trl_sipo.evaluation.beta_range import drift_words
    from trl_sipo.reporting.evaluation_tables import Table

    drifts = list(rows[0]["saturated"])
    header = ["beta", "let go at drift", *(f"saturated at {float(drift):.0%}" for drift in drifts), "verdict"]
    cells = []
    for row in rows:
        cell = [f"{row['beta']:g}", drift_words(row["let_go_at_drift"])]
        cell += [f"{row['saturated'][drift]:.0%}" for drift in drifts]
        cell.append(row["verdict"].replace("_", " "))
        if "adapter_saturated" in row:
            cell += [f"{row['adapter_margin']:.3g}", f"{row['adapter_saturated']:.0%}"]
        cells.append(cell)
    if "adapter_saturated" in rows[0]:
        header += ["adapter's margin", "adapter saturated"]
    note = (
        "Saturated: share of pairs and levels whose logit passes ln 99 when the chosen error has fallen, and the "
        "rejected one risen, by so much. Let go: where a typical draw does."
    )
    return Table("Betas", note, header, cells)


def level_table(rows: Sequence[dict[str, Any]]) -> "Table":
    """The scale by noise level."""
    from trl_sipo.evaluation.beta_range import drift_words
    from trl_sipo.reporting.evaluation_tables import Table

    unit = "timestep" if "timestep" in rows[0] else "sigma"
    has_given = "let_go_at_drift" in rows[0]
    shown = {place * len(rows) // _SHOWN_LEVELS for place in range(_SHOWN_LEVELS)} | {len(rows) - 1}
    cells = []
    for row in (rows[place] for place in sorted(shown)):
        level = f"{row[unit]:d}" if unit == "timestep" else f"{row[unit]:.4f}"
        cell = [f"{row['time']:.3f}", level, f"{row['scale']:.4g}", f"{row['common']:.1%}"]
        cells.append([*cell, drift_words(row["let_go_at_drift"])] if has_given else cell)
    header = ["time", unit, "margin scale", "common", *(["let go at drift"] if has_given else [])]
    note = (
        "Margin scale: of the logit, by beta and drift. Common: what a drift that is the same on both arms gives, "
        "relative to one that is opposed. Let go: with the beta that was given."
    )
    return Table("Noise levels", note, header, cells)


def conversion_table(rows: dict[str, dict[str, float]]) -> "Table":
    """The range in every convention."""
    from trl_sipo.reporting.evaluation_tables import Table

    names = {"low": "smallest", "middle": "middle", "high": "largest", "given": "given"}
    cells = [[name, *(f"{rows[key][name]:.4g}" for key in names if key in rows)] for name in next(iter(rows.values()))]
    header = ["beta_convention", *(names[key] for key in names if key in rows)]
    return Table("The range in other conventions", "", header, cells)


def figures_of(report: dict[str, Any], audited: AuditedLevels) -> dict[str, tuple[Any, str]]:
    """Saturation over beta, and the scale over noise levels."""
    from trl_sipo.reporting.audit_figures import beta_figure

    given = report.get("given")
    figure = beta_figure(
        [row["beta"] for row in report["betas"]],
        {drift: [row["saturated"][drift] for row in report["betas"]] for drift in report["betas"][0]["saturated"]},
        (report["range"]["low"], report["range"]["high"]),
        None if given is None else given["beta"],
        levels=audited.positions,
        scale=[row["scale"] for row in report["levels"]],
        level_label=f"{audited.unit} (0 is clean)",
    )
    caption = "Left: share of draws that are let go, by beta and drift; grey: the range. Right: the margin scale."
    return {"beta": (figure, caption)}
