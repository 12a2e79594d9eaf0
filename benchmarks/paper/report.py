# SPDX-License-Identifier: Apache-2.0
"""One page from the results of all questions: each claim, what the paper says, what was measured, and the verdict.

    python benchmarks/paper/report.py

Everything in it that says something about the runs is computed from the JSON files beside it.
"""

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rules
from claims import SIPO_PAPER, VIPO_PAPER, Claim
from question import REPORTS, guarded, read, table

QUESTIONS = (
    "beta_sensitivity",
    "long_training",
    "threshold_clip",
    "static_dynamic_mask",
    "ablation",
    "gradient_through_w",
    "on_off_policy",
    "label_noise",
    "overhead",
)
PAPERS = {"SIPO": SIPO_PAPER, "Poly-DPO (ViPO)": VIPO_PAPER}
VERDICTS = (rules.REPRODUCED, rules.PARTLY, rules.NOT_REPRODUCED, rules.CANNOT_BE_SAID)
#: With more of its pairs masked than this, a run has all but stopped.
BRAKED = 0.9
MARKS = {rules.HOLDS: "holds", rules.OPPOSITE: "opposite", rules.ALIKE: "alike", rules.UNDECIDED: "undecided"}

COMMANDS_TEXT = """```bash
python benchmarks/paper/beta_sensitivity.py    # one question; the command of each is in its row
python benchmarks/paper/report.py              # this page
```"""
ELSEWHERE = (
    "How to repeat a row, here and on real models: [reproducing the papers](../../docs/source/"
    "reproducing_the_papers.md). Configurations and costs for published weights: [real models](real_models.md)."
)
READING = (
    "The rules were in the repository before the runs that they judge were read. A check is of the accuracy by the "
    "second verifier, which did not rank the pairs, unless it says otherwise. Intervals are of 95 %. *Seeds*: "
    "Student's t over seeds; *prompts*: bootstrap-t over prompts; *p*: sign-flip test over prompts, Holm-corrected."
)
AFTERWARDS = (
    "Changed after three seeds had been read: the rebound of the loss, which could not be below zero and so could not "
    "be decided against, is now taken against the quarters before the last; the row on the mismatch compared SIPO "
    "twice where it meant both methods; the row on both methods at a good beta was added."
)
#: That were read before others were added.
FIRST_SEEDS = (0, 1, 2)
LIMITS = (
    "One tiny model (1.66 M weights in the denoiser, 32x32 px), all of whose weights are trained, at one learning "
    "rate; runs of 100 to 300 steps of 12 pairs. The papers train models a thousand times larger for thousands of "
    "steps. A claim that is not reproduced here may hold there, and the other way round.",
    "Few training seeds, so that intervals over them are wide and decide little; tests are over 64 prompts with four "
    "images each, given these seeds.",
    "Quality is what two small classifiers find, not what people prefer, and it can rise while images become alike: "
    "read it with the Frechet distance and the diversity beside it.",
    "The protocol was chosen so that Diffusion-DPO at a small beta collapses within a run, on one pilot seed that is "
    "not reported. It shows what the methods do then, not how often that happens.",
    "Weights and masks are defined on the sampler's grid of 10 steps; with the paper's of 50 the mask brakes later.",
    "Where the paper contradicts itself, the readings of [the mathematics](../../docs/source/math.md) are taken.",
)


@dataclass(frozen=True)
class Row:
    """A claim with its verdict and what it rests on."""

    claim: Claim
    verdict: str
    checks: Sequence[rules.Check]

    @property
    def measured(self) -> list[str]:
        """What was measured, a line per check; of a claim without, the reason."""
        if not self.checks:
            return [self.claim.reason]
        return [f"{check.text}: {MARKS[check.outcome]}" for check in self.checks]

    @property
    def command(self) -> str:
        """What makes the numbers."""
        if not self.claim.question:
            return ""
        return f"python benchmarks/{COMMANDS.get(self.claim.question, f'paper/{self.claim.question}.py')}"


#: Questions that another command answers.
COMMANDS = {"online": "online_rounds.py --output reports/online --runs runs/online"}


def decide(claims: Sequence[Claim], results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Each claim with its checks and its verdict."""
    rows = []
    for claim in claims:
        found = claim.decide(results[claim.question]) if claim.question else ()
        rows.append(Row(claim, rules.verdict(found), found))
    return rows


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of all questions, and of the rounds.

    Raises:
        ConfigurationError: One was not asked yet.
    """
    online = json.loads((REPORTS.parent / "online" / "online.json").read_text())
    return {**{name: read(name, folder) for name in QUESTIONS}, "online": online}


def summary(rows: Sequence[Row]) -> list[str]:
    """How many claims have which verdict, and which are not reproduced."""
    counts = Counter(row.verdict for row in rows)
    lines = [f"{len(rows)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS)}."]
    for name in VERDICTS[:3]:
        texts = [f"{row.claim.text} ({row.claim.place})" for row in rows if row.verdict == name]
        if texts:
            lines.append(f"{name.capitalize()}: {'; '.join(texts)}.")
    return lines


def best_of_both(result: Mapping[str, Any]) -> str:
    """Whether SIPO beats Diffusion-DPO, each at its best beta, in a sentence; of the result of `beta_sensitivity`."""
    import checks

    rows = checks.sipo_best_above(result)
    won = sum(row.outcome == rules.HOLDS for row in rows)
    lost = sum(row.outcome == rules.OPPOSITE for row in rows)
    return (
        "SIPO against Diffusion-DPO, each at its best beta, in accuracy and Frechet distance: "
        f"better in {won} of {len(rows)} comparisons, worse in {lost}, not told apart in {len(rows) - won - lost}."
    )


def added(seeds: Sequence[int]) -> str:
    """A sentence on the seeds that were added later; empty if none were."""
    later = [str(seed) for seed in seeds if seed not in FIRST_SEEDS]
    if not later:
        return ""
    return f" Added to every arm for narrower intervals, whatever the first had shown: seeds {' and '.join(later)}."


def brake(result: Mapping[str, Any]) -> str:
    """How much SIPO's mask leaves at the end of long training, in a sentence; of the result of `long_training`."""
    import long_training

    arm = result["arms"][long_training.SIPO]
    masked, steps = arm["final"]["masked_share"]["mean"], arm["run"]["steps"]
    reading = "it holds because training has all but stopped" if masked >= BRAKED else "training goes on"
    return f"In the last steps of {steps}, {masked:.0%} of SIPO's pairs are masked at a small beta: {reading}."


def seconds(results: Mapping[str, Mapping[str, Any]]) -> tuple[int, float]:
    """How many runs there are, and their processor seconds; runs that questions share count once."""
    found = {}
    for result in results.values():
        for arm in result.get("arms", {}).values():
            if "run" in arm:
                for seed, spent in enumerate(arm["seconds"]):
                    found[json.dumps(arm["run"], sort_keys=True), seed] = spent
    return len(found), sum(found.values())


def row_of(row: Row) -> str:
    """A line of the Markdown table."""
    claim = row.claim
    reason = f"<br>*{claim.reason}*" if claim.reason and row.checks else ""
    cells = [
        f"{claim.text}<br>({claim.place})",
        claim.paper or "-",
        "<br>".join(row.measured) + reason,
        f"**{row.verdict}**",
        f"`{row.command}`" if row.command else "-",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    rows = {paper: decide(claims, results) for paper, claims in PAPERS.items()}
    flat = [row for part in rows.values() for row in part]
    number, spent = seconds(results)
    protocol, base = results["ablation"]["protocol"], results["ablation"]["base"]
    parts = [
        "# The papers' claims on the embedded model",
        COMMANDS_TEXT,
        paragraph(f"{number} runs, {spent / 60:.0f} minutes of one core. {ELSEWHERE}"),
        "## In short",
        bullets([*summary(flat), best_of_both(results["beta_sensitivity"]), brake(results["long_training"])]),
        *(f"## {paper}\n\n{claims_table(part)}" for paper, part in rows.items()),
        "## How it was measured",
        paragraph(setting(protocol, base)),
        "## How verdicts are made",
        rules.__doc__.split("\n", 2)[2].strip(),
        paragraph(READING),
        paragraph(AFTERWARDS + added(results["ablation"]["seeds"])),
        "## What it does not say",
        bullets(LIMITS),
        *(section(results[name]) for name in QUESTIONS),
    ]
    return "\n\n".join(parts) + "\n"


def paragraph(text: str, first: str = "", later: str = "") -> str:
    """Lines of the width of the other pages; links stay whole."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 119, initial_indent=first, subsequent_indent=later, **options)


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(paragraph(line, "- ", "  ") for line in lines)


def setting(protocol: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The protocol in a paragraph."""
    over = base["second_accuracy_over_prompts"]
    return (
        "The model is [the demo's](../demo/README.md), a Stable Diffusion pipeline that draws tinted clothes. AdamW "
        f"at {protocol['learning_rate']:g}, {protocol['batch_size']} pairs a step, up to {protocol['num_pairs']} "
        "training pairs; per seed all arms see the same pairs with the same noise. A measurement is of 64 prompts "
        f"with {protocol['samples_per_prompt']} images each, from the same noise for all. Off-policy pairs are "
        "photographs, turned and mirrored, which the base could not have drawn; on-policy pairs are its own samples. "
        "`beta` is in the convention of Diffusion-DPO: the paper's is a thousandth of it. The base model draws what "
        f"the prompt says in {base['second_accuracy']:.0%} of its images by the second verifier [{over['low']:.0%}, "
        f"{over['high']:.0%}], with a Frechet distance of {base['frechet_distance']:.0f} and a diversity of "
        f"{base['diversity']:.2f}. Every number of the protocol: `benchmarks/paper/protocol.py`."
    )


def claims_table(rows: Sequence[Row]) -> str:
    """All claims of a paper as Markdown."""
    lines = ["| claim | what the paper says | what was measured here | verdict | command |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(row_of(row) for row in rows)])


def section(result: Mapping[str, Any]) -> str:
    """One question: its command, its table and its figure."""
    lines = [f"## {result['title']}", f"`{result['command']}`: [{result['question']}.json]({result['question']}.json)"]
    if result["question"] == "overhead":
        import overhead

        rounds = result["protocol"]["rounds"]
        return "\n\n".join(
            [*lines, overhead.table(result["objectives"]), f"Ratios to Diffusion-DPO; {rounds} rounds."]
        )
    pictures = [f"{result['question']}.png", *MORE_PICTURES.get(result["question"], ())]
    notes = "Means over seeds, smallest and largest in brackets; at the last step."
    return "\n\n".join([*lines, table(result), notes, *(f"![{result['title']}]({name})" for name in pictures)])


MORE_PICTURES = {"on_off_policy": ("on_off_policy_weights.png",)}


def html(results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """The page as one HTML file with its figures in it."""
    from trl_sipo.reporting.page import Page

    page = Page("The papers' claims on the embedded model")
    rows = {paper: decide(claims, results) for paper, claims in PAPERS.items()}
    page.paragraph(summary([row for part in rows.values() for row in part])[0], "verdict")
    page.paragraph(best_of_both(results["beta_sensitivity"]))
    page.paragraph(brake(results["long_training"]))
    for paper, part in rows.items():
        page.heading(paper)
        for row in part:
            page.paragraph(f"{row.claim.text} ({row.claim.place}): {row.verdict}.", "verdict")
            page.paragraph(f"The paper: {row.claim.paper}.")
            for text in row.measured:
                page.paragraph(text, "note")
            if row.command:
                page.code(row.command)
    for name in QUESTIONS:
        for picture in (f"{name}.png", *MORE_PICTURES.get(name, ())):
            path = folder / picture
            if path.is_file():
                page.figure(path.read_bytes(), f"{results[name]['title']}: {results[name]['command']}", name)
    page.heading("What it does not say")
    for limit in LIMITS:
        page.paragraph(limit)
    return page.render()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=REPORTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, help="folder of README.md; default: that of the results")
    parser.add_argument("--html", type=Path, help="also write the page as one HTML file")
    options = parser.parse_args(arguments)
    output = options.output or options.results
    results = load(options.results)
    output.mkdir(parents=True, exist_ok=True)
    (output / "README.md").write_text(markdown(results))
    if options.html:
        options.html.write_text(html(results, options.results))
    for paper, claims in PAPERS.items():
        for row in decide(claims, results):
            print(f"{row.verdict:<20}{paper}: {row.claim.text}")


if __name__ == "__main__":
    guarded(main)
