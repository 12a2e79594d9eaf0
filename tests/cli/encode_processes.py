# SPDX-License-Identifier: Apache-2.0
"""What `test_encode.py` starts: `trl-sipo encode` in forked processes, which need not import everything each time.

encode_processes.py kill <kills> <seed> <argv...>      one process after the other, each killed at a random moment
encode_processes.py share <processes> <argv...>        processes that share the work, at the same time
encode_processes.py interrupt <argv...>                one process, that gets Ctrl-C when it has begun to write

Several of these, with `then` between them, need one start.
"""

import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from trl_sipo.scripts.encode import main

# What the command imports when it runs: here once, and not in every process.
IMPORTED = (
    "datasets", "trl_sipo.adapters.stable_diffusion", "trl_sipo.data.cache.encode", "trl_sipo.data.loading",
    "transformers.models.clip.modeling_clip", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)  # fmt: skip


def fork(argv: list[str], **environment: str) -> int:
    """Encode in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        os._exit(main(argv))
    return child


def kill_at_random(kills: int, seed: int, argv: list[str]) -> None:
    """Kill processes one after the other; prints after how many kills there was a part of what is to be written.

    The moments are spread over what an undisturbed process takes, and begin anew when all is written.
    """
    output = Path(argv[argv.index("--output") + 1])
    elsewhere = [f"{word}-undisturbed" if word == str(output) else word for word in argv]
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(elsewhere), 0)[1]) == 0
    duration, moments, partial = time.monotonic() - begun, random.Random(seed), 0
    whole = len(list(Path(f"{output}-undisturbed").rglob("*.safetensors")))
    for _ in range(kills):
        child = fork(argv)
        time.sleep(moments.uniform(0.1, 1.05) * duration)  # some also while the last files are written, or after
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written = len(list(output.rglob("[!.]*.safetensors")))
        partial += 0 < written < whole
        if written == whole:
            assert os.waitstatus_to_exitcode(os.waitpid(fork(argv), 0)[1]) == 0
            assert same_files(output, Path(f"{output}-undisturbed"))
            shutil.rmtree(output)
    print(f"partial {partial}")
    assert os.waitstatus_to_exitcode(os.waitpid(fork(argv), 0)[1]) == 0


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes."""
    names = [
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} for folder in (one, other)
    ]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def share(processes: int, argv: list[str]) -> None:
    """Start the processes as torchrun does, the first one last."""
    ranks = reversed(range(processes))
    children = [fork(argv, RANK=str(rank), WORLD_SIZE=str(processes)) for rank in ranks]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * processes


def interrupt(argv: list[str]) -> None:
    """Interrupt a process that has begun to write; prints its exit status."""
    begun = Path(argv[argv.index("--output") + 1], "cache.json")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this was started in the background
    child = fork(argv)
    while not begun.is_file():
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    print(f"status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in IMPORTED:
        import_module(module)
    words = [*sys.argv[1:], "then"]
    while words:
        end = words.index("then")
        (command, *options), words = words[:end], words[end + 1 :]
        if command == "kill":
            kill_at_random(int(options[0]), int(options[1]), options[2:])
        elif command == "share":
            share(int(options[0]), options[1:])
        else:
            interrupt(options)
