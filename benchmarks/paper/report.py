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
from options import guarded
from question import REPORTS, read, table

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
    "A check is of the accuracy by the second verifier, which did not rank the pairs, unless it says otherwise. "
    "Intervals are of 95 %. *Seeds*: Student's t over seeds; *prompts*: bootstrap-t over prompts, with the seeds as "
    "they are, and where nearly all prompts agree a wider one that allows for others that were not drawn; *p*: "
    "sign-flip test over prompts, Holm-corrected. The base model is one, and measured once. Measures with one value "
    "per run are not corrected for their number."
)
BEFORE = (
    "The protocol was in the repository before the first run; rules and checks before a question had all its runs."
)
AFTERWARDS = (
    "Arms were taken out twice for want of time, the second time with three quarters of the first runs made, and with "
    "them the checks that needed them.",
    "After three seeds: the rebound of the loss, which could not be below zero and so could not be decided against, "
    "is taken against the quarters before the last; the row on the mismatch compared SIPO twice where it meant both "
    "methods; the row on both methods at a good beta was added. Seeds 3 and 4 were added to every arm, whatever the "
    "first had shown.",
    "After five seeds arms were put back, with the checks that they had had: an epsilon of 0.2, 0.3 and 0.4, an alpha "
    "of 2, mask, weight and DPO-C&M at the good beta, the gradient through w at the good beta, and Diffusion-DPO at "
    "its own beta in long training, where collapse is now checked as well. Five rows that the smaller protocol called "
    "reproduced were so no more: four held at the small beta alone, and Diffusion-DPO's early gain is within what "
    "more comparisons let chance do. Not put back: other betas on the base's own samples, labels exchanged at 20 and "
    "40 % (now 30 %), and a clip of 0.5 with the mask at 0.9, which no weight reaches: a wide clip is judged with the "
    "mask at 0.5.",
    "After five seeds faults were mended. The static mask was the paper's alone, which on the grid of these runs "
    "leaves out a sixth of the levels with a w below 0.9: one of all of them stands beside it. And 2, at which "
    "Diffusion-DPO falls, is below all betas of the paper: the rows on beta are now decided on the paper's, too. "
    "Three rows that had been reproduced are so only partly now. The last quarter of a run's loss had left out its "
    "last steps; that changed no verdict.",
)
LIMITS = (
    "One tiny model (1.66 M weights in the denoiser, 32x32 px), all of whose weights are trained, at one learning "
    "rate, five times the paper's; runs of 100 to 300 steps of 12 pairs. The papers train models a thousand times "
    "larger for thousands of steps. A claim that is not reproduced here may hold there, and the other way round.",
    "Few training seeds, so that intervals over them are wide and decide little; tests are over 64 prompts with four "
    "images each, given these seeds.",
    "Quality is what two small classifiers find, not what people prefer, and it can rise while images become alike: "
    "read it with the Frechet distance and the diversity beside it.",
    "The protocol was chosen so that Diffusion-DPO at a small beta collapses within a run, on one pilot seed that is "
    "not reported. It shows what the methods do then, not how often that happens.",
    "Weights and masks are defined on the sampler's grid of 10 steps, on which the mask leaves out far more levels "
    "from the start than on one of 50, with which the paper's figure is found: the row on w(t) has both.",
    "A beta says little by itself: how far a policy may go with it depends on the model and the learning rate. That a "
    "method fails at a beta here says nothing on that number elsewhere.",
    "A difference that is sure can be small: a method that helps may still lie far below the base model.",
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
    def note(self) -> list[str]:
        """What to know about the measurement; nothing where the reason is all there is."""
        return [self.claim.reason] if self.claim.reason and self.checks else []

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
        texts = [f"{row.claim.text} ({row.claim.place}{_share(row)})" for row in rows if row.verdict == name]
        if texts:
            lines.append(f"{name.capitalize()}: {'; '.join(texts)}.")
    return lines


def _share(row: Row) -> str:
    """Of a claim that is partly reproduced, how many of its checks hold."""
    if row.verdict != rules.PARTLY:
        return ""
    return f", {sum(check.outcome == rules.HOLDS for check in row.checks)} of {len(row.checks)} checks"


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


def at_the_same_beta(result: Mapping[str, Any]) -> str:
    """How often SIPO beats Diffusion-DPO at one beta, in a sentence; of the result of `beta_sensitivity`."""
    import beta_sensitivity as beta

    parts = []
    for measure, sign, words in ((rules.QUALITY, 1, "accuracy"), ("frechet_distance", -1, "Frechet distance")):
        found: dict[str, list[str]] = {name: [] for name in (rules.HOLDS, rules.OPPOSITE)}
        for value in beta.BETAS:
            check = rules.higher(result, beta.label("SIPO", value), beta.label("DPO", value), measure, sign=sign)
            found.setdefault(check.outcome, []).append(f"{value:g}")
        better, worse = (", ".join(found[name]) or "none" for name in (rules.HOLDS, rules.OPPOSITE))
        parts.append(f"in {words} better at {better}, worse at {worse}")
    betas = ", ".join(f"{value:g}" for value in beta.BETAS)
    return f"SIPO against Diffusion-DPO at the same beta, of {betas}: {'; '.join(parts)}."


def brake(result: Mapping[str, Any]) -> str:
    """How much SIPO's mask leaves at the end of long training, in a sentence; of the result of `long_training`."""
    import long_training

    arm = result["arms"][long_training.SIPO]
    masked, steps = arm["final"]["masked_share"]["mean"], arm["run"]["steps"]
    reading = "training has all but stopped" if masked >= BRAKED else "training goes on"
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
    reason = "".join(f"<br>*{note}*" for note in row.note)
    cells = [
        f"{claim.text}<br>({claim.place})",
        claim.paper or "-",
        "<br>".join(row.measured) + reason,
        f"**{row.verdict}**",
        f"`{row.command}`" if row.command else "-",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def warning(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """That a page of quick runs says nothing, as a paragraph; of others none."""
    quick = [name for name in QUESTIONS if results[name]["protocol"]["is_quick"]]
    if not quick:
        return []
    return [paragraph(f"**Made with `--quick`: numbers and verdicts mean nothing ({', '.join(quick)}).**")]


def in_sentences(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the table of claims does not say at a glance."""
    betas = results["beta_sensitivity"]
    return [best_of_both(betas), at_the_same_beta(betas), brake(results["long_training"])]


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    rows = {paper: decide(claims, results) for paper, claims in PAPERS.items()}
    flat = [row for part in rows.values() for row in part]
    number, spent = seconds(results)
    protocol, base = results["ablation"]["protocol"], results["ablation"]["base"]
    parts = [
        "# The papers' claims on the embedded model",
        *warning(results),
        COMMANDS_TEXT,
        paragraph(f"{number} runs, {spent / 60:.0f} minutes of one core. {ELSEWHERE}"),
        "## In short",
        bullets([*summary(flat), *in_sentences(results)]),
        *(f"## {paper}\n\n{claims_table(part)}" for paper, part in rows.items()),
        "## How it was measured",
        paragraph(setting(protocol, base)),
        "## How verdicts are made",
        rules.__doc__.split("\n", 2)[2].strip(),
        paragraph(READING),
        "## What was changed, and when",
        paragraph(BEFORE),
        bullets(AFTERWARDS),
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
            [*lines, overhead.table(result["objectives"]), paragraph(OVERHEAD_NOTE.format(rounds=rounds))]
        )
    pictures = [f"{result['question']}.png", *MORE_PICTURES.get(result["question"], ())]
    notes = "Means over seeds, smallest and largest in brackets; at the last step."
    return "\n\n".join([*lines, table(result), notes, *(f"![{result['title']}]({name})" for name in pictures)])


OVERHEAD_NOTE = (
    "Ratios to Diffusion-DPO, taken within each of {rounds} rounds, since rounds differ in what else the machine "
    "does; one thread of a processor. Operations are those of products and convolutions, bytes those kept for the "
    "backward pass."
)
MORE_PICTURES = {"on_off_policy": ("on_off_policy_weights.png",)}


def _put(row: Row, page: Any) -> None:
    """One claim of the HTML page."""
    page.paragraph(f"{row.claim.text} ({row.claim.place}): {row.verdict}.", "verdict")
    page.paragraph(f"The paper: {row.claim.paper}.")
    for text in (*row.measured, *row.note):
        page.paragraph(text, "note")
    if row.command:
        page.code(row.command)


def html(results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """The page as one HTML file with its figures in it."""
    from trl_sipo.reporting.page import Page

    page = Page("The papers' claims on the embedded model")
    rows = {paper: decide(claims, results) for paper, claims in PAPERS.items()}
    page.paragraph(summary([row for part in rows.values() for row in part])[0], "verdict")
    for sentence in (*warning(results), *in_sentences(results)):
        page.paragraph(sentence)
    for paper, part in rows.items():
        page.heading(paper)
        for row in part:
            _put(row, page)
    for name in QUESTIONS:
        for picture in (f"{name}.png", *MORE_PICTURES.get(name, ())):
            path = folder / picture
            if path.is_file():
                page.figure(path.read_bytes(), f"{results[name]['title']}: {results[name]['command']}", name)
    for title, texts in (("What was changed, and when", (BEFORE, *AFTERWARDS)), ("What it does not say", LIMITS)):
        page.heading(title)
        for text in texts:
            page.paragraph(text)
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
