# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo <command>`. Only the chosen command's module is imported, so that `--help` answers at once."""

import logging
import os
import sys
from importlib import import_module

from trl_sipo.printing import printable
from trl_sipo.scripts.subcommands import usage_of

# Command -> (module with `run(command, argv)`, one line of help).
COMMANDS = {
    "dpo": ("trl_sipo.scripts.train", "train with Diffusion-DPO"),
    "sipo": ("trl_sipo.scripts.train", "train with SIPO or DPO-C&M"),
    "poly-dpo": ("trl_sipo.scripts.train", "train with Poly-DPO"),
    "kto": ("trl_sipo.scripts.train", "train with Diffusion-KTO, on images that are liked or not"),
    "mapo": ("trl_sipo.scripts.train", "train with MaPO, on pairs, without a reference"),
    "d3po": ("trl_sipo.scripts.train", "train with D3PO, on pairs of recorded trajectories"),
    "sft": ("trl_sipo.scripts.train", "fine-tune on liked images, or on the chosen ones of pairs"),
    "sipo-text": ("trl_sipo.scripts.train_text", "train a language model with SIPO"),
    "encode": ("trl_sipo.scripts.encode", "encode pairs once, to train without the VAE and the text encoders"),
    "demo": ("trl_sipo.scripts.demo", "watch Diffusion-DPO collapse and SIPO hold, on a CPU, in minutes"),
    "feedback": ("trl_sipo.scripts.feedback", "sample a model, score the samples, and make preference pairs"),
    "evaluate": ("trl_sipo.scripts.evaluate", "compare models by rewards and held-out pairs, with error bars"),
    "online": ("trl_sipo.scripts.online", "rounds of sampling, ranking and training on what the policy draws"),
    "study": ("trl_sipo.scripts.study", "a blind comparison of models by people: build, serve, report, import"),
    "label": ("trl_sipo.scripts.label", "choose between the files of two folders, and get preference pairs"),
    "report": ("trl_sipo.scripts.report", "see what runs did, or do: one HTML page of rewards, noise levels, samples"),
    "audit": ("trl_sipo.scripts.audit", "look before training: at noise levels, beta, data and cost"),
    "data": ("trl_sipo.scripts.data", "look at preference data on its own: what is broken, repeated or noisy"),
    "env": ("trl_sipo.scripts.env", "print versions, for a bug report"),
}


def usage() -> str:
    """The text of `trl-sipo --help`."""
    purpose = "Preference optimization for diffusion models, beside TRL."
    hint = "`trl-sipo <command> --help` lists a command's options; training commands take `--config file.yaml`."
    return usage_of("trl-sipo <command>", purpose, COMMANDS, hint)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error that a line of text explains)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from trl_sipo import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"trl-sipo: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        # On import it warns that image processors do without torchvision, which is of no consequence here.
        logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
        # And bitsandbytes, which peft imports, that a kernel of its own for CPUs is not installed.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_sipo.errors import EXPECTED_ERRORS

    try:
        import_module(COMMANDS[argv[0]][0]).run(argv[0], argv[1:])
    except EXPECTED_ERRORS as error:
        print(f"trl-sipo {argv[0]}: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # its text, if any, says how to go on
        print(f"\ntrl-sipo {argv[0]}: interrupted. {error}".rstrip(), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
