# SPDX-License-Identifier: Apache-2.0
"""What this machine does: how fast it multiplies, copies, and passes a denoiser of the size in question."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl_sipo.cost.architectures import Architecture
from trl_sipo.cost.devices import GIB, GPUS, Device
from trl_sipo.cost.models import make_denoiser
from trl_sipo.cost.passes import forward_loss
from trl_sipo.errors import ConfigurationError

_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes; many times what caches hold
_TRIES = 7
_PASSES = 3


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds of a call; processor seconds on a CPU, where others may be at work."""
    if device == "cpu":
        began = time.process_time()
        function()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Floating point operations a second of the best of some products of large matrices."""
    side = _MATRIX_SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        best = min(timed(lambda: left @ right, device) for _ in range(_TRIES))
    return 2 * side**3 / best


def copy_rate(device: str) -> float:
    """Bytes a second that the memory gives and takes, of the best of some copies."""
    source = torch.zeros(_COPIED[device], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(_TRIES))
    return 2 * source.nbytes / best


def this_machine() -> tuple[str, str, float]:
    """Kind of device ("cpu" or "cuda"), its name, and its bytes of memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return "cuda", properties.name, float(properties.total_memory)
    return "cpu", f"this CPU, {torch.get_num_threads()} threads", _memory_of_the_system()


def _memory_of_the_system() -> float:
    """Bytes; in a container those that it may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return float(min(whole, int(text)) if text.isdigit() else whole)


def unmeasured_machine() -> Device:
    """This machine with its memory alone: its rates are not known, and 0."""
    _, name, memory = this_machine()
    return Device(name, memory, half=0.0, tf32=None, single=0.0, bandwidth=0.0, link=0.0)


def measured_machine() -> Device:
    """This machine, its rates measured in about a second. A processor second is shared by all threads."""
    kind, name, memory = this_machine()
    threads = torch.get_num_threads() if kind == "cpu" else 1
    known = next((gpu for gpu in GPUS.values() if kind == "cuda" and gpu.name.split("-")[0] in name), None)
    return Device(
        name=name,
        memory=memory,
        half=threads * matrix_rate(torch.bfloat16, kind),
        tf32=None,
        single=threads * matrix_rate(torch.float32, kind),
        bandwidth=threads * copy_rate(kind),
        link=0.0 if known is None else known.link,
    )


def forward_seconds(
    architecture: Architecture, samples: int, precision: str, *, progress: Callable[[int], Any] | None = None
) -> float:
    """Seconds of a real forward pass, the shortest of a few after the first; random weights take as long as others.

    Args:
        architecture: Of the denoiser, and the size of its samples.
        samples: In one call.
        precision: "float32", "bfloat16" or "float16".
        progress: Told of each pass.

    Raises:
        ConfigurationError: The weights do not fit into the memory that is free.
    """
    kind, _, _ = this_machine()
    dtype = getattr(torch, precision)
    needed, free = architecture.parameters * 1e9 * dtype.itemsize, _free_memory(kind)
    if needed > 0.8 * free:
        raise ConfigurationError(
            f"`--measure` would put {needed / GIB:.1f} GiB of weights into {free / GIB:.1f} GiB of free memory. Leave "
            "it out, or measure a smaller model."
        )
    denoiser = make_denoiser(architecture, kind, dtype).eval().requires_grad_(False)
    run = forward_loss(denoiser, architecture, kind, dtype, samples=samples)
    seconds = []
    with torch.no_grad():
        for _ in range(1 + _PASSES):
            seconds.append(timed(run, kind))
            if progress is not None:
                progress(1)
    return min(seconds[1:]) / (torch.get_num_threads() if kind == "cpu" else 1)


def _free_memory(kind: str) -> float:
    if kind == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return min(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")), _memory_of_the_system())
