# SPDX-License-Identifier: Apache-2.0
"""Seeds that depend on what a number is for, never on the order in which numbers are drawn."""

import hashlib
import operator

import torch


def mix_seed(*integers: int) -> int:
    """Hash integers of any size and sign, in order, to one seed in `[0, 2**63)`.

    The value is the same on every machine, process and Python version (BLAKE2b of the decimal digits), so that what is
    drawn for `(seed, epoch, index)` does not depend on workers, batch size or number of processes. Equal seeds mean
    equal integers for all practical purposes; on CPU, `torch.Generator` keeps only the low 32 bits.

    Raises:
        TypeError: no integers, or one that is not an integer.
    """
    if not integers:
        raise TypeError("mix_seed needs at least one integer")
    text = ",".join(str(operator.index(integer)) for integer in integers)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*integers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device`, seeded with `mix_seed(*integers)`."""
    return torch.Generator(device=device).manual_seed(mix_seed(*integers))
