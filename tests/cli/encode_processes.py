# SPDX-License-Identifier: Apache-2.0
"""What `test_encode.py` starts: `trl-sipo encode` in forked processes, which need not import everything each time.

encode_processes.py kill <kills> <seed> <argv...>      one process after the other, each killed at a random moment
encode_processes.py share <processes> <argv...>        processes that share the work, at the same time
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
        time.sleep(moments.uniform(0.2, 0.8) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written = len(list(output.rglob("[!.]*.safetensors")))
        partial += 0 < written < whole
        if written == whole:
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in IMPORTED:
        import_module(module)
    if sys.argv[1] == "kill":
        kill_at_random(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        share(int(sys.argv[2]), sys.argv[3:])
