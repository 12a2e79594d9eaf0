# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do, as their makers publish it, and what is taken off that for real work."""

from dataclasses import dataclass

from trl_sipo.cost.operations import Operation
from trl_sipo.errors import ConfigurationError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or another machine whose rates were measured.

    Attributes:
        name: For tables.
        memory: Bytes that PyTorch finds: the label's, less what the driver and error correction take.
        half: Floating point operations a second in 16 bits, dense (without structured sparsity), adding up in float32.
        tf32: The same in TF32; `None` without it.
        single: The same in float32.
        bandwidth: Bytes a second of its memory.
        link: Bytes a second to another GPU of the machine, in one direction.
        has_bfloat16: Whether the 16 bits may be bfloat16.
        calibration: Seconds of a real forward pass over those that were computed; `None`: none was measured.
    """

    name: str
    memory: float
    half: float
    tf32: float | None
    single: float
    bandwidth: float
    link: float
    has_bfloat16: bool = True
    calibration: float | None = None

    @property
    def has_rates(self) -> bool:
        """Whether times can be computed; of a machine that was not measured its memory alone is known."""
        return self.bandwidth > 0

    def rate(self, operation: Operation, allows_tf32: bool = False) -> float:
        """Published operations a second for an operation that computes.

        PyTorch takes TF32 for convolutions by itself, and for products of matrices when told to (`tf32=True`).
        """
        if operation.is_half:
            return self.half
        takes_tf32 = self.tf32 is not None and (operation.kind == "convolution" or allows_tf32)
        return self.tf32 if takes_tf32 and self.tf32 is not None else self.single


def _gpu(
    name: str, gib: float, half: float, tf32: float | None, single: float, bandwidth: float, link: float,
    has_bfloat16: bool = True,
) -> Device:  # fmt: skip
    """From tera (rates) and giga (bytes a second), as data sheets have them."""
    return Device(
        name, gib * GIB, half * TERA, tf32 if tf32 is None else tf32 * TERA, single * TERA, bandwidth * GIGA,
        link * GIGA, has_bfloat16,
    )  # fmt: skip


# Rates: NVIDIA's data sheets and architecture white papers (Volta 2017, Turing 2018, Ampere GA100 and GA102 2020,
# Hopper 2022, Ada 2022, Blackwell 2024 and 2025), those with sparsity halved; SXM modules of what has both kinds.
# GeForce: with accumulation in float32, which is half of the rate with float16. Links: NVLink where there is one, else
# PCIe x16 of the card's generation; half of what is quoted for both directions together. Memory: GiB of the device as
# PyTorch reports it.
GPUS: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("A100-40GB", 39.4, 312, 156, 19.5, 1555, 300),
        _gpu("A100-80GB", 79.2, 312, 156, 19.5, 2039, 300),
        _gpu("H100-80GB", 79.1, 989, 494.7, 66.9, 3350, 450),
        _gpu("H200-141GB", 139.8, 989, 494.7, 66.9, 4800, 450),
        _gpu("B200-180GB", 178.0, 2250, 1100, 75, 7700, 900),
        _gpu("L40S-48GB", 44.4, 362, 183, 91.6, 864, 32),
        _gpu("L4-24GB", 22.0, 121, 60, 30.3, 300, 32),
        _gpu("A10-24GB", 22.0, 125, 62.5, 31.2, 600, 32),
        _gpu("RTX-5090-32GB", 31.4, 209.5, 104.8, 104.8, 1792, 64),
        _gpu("RTX-4090-24GB", 23.5, 165.2, 82.6, 82.6, 1008, 32),
        _gpu("RTX-3090-24GB", 23.6, 71, 35.6, 35.6, 936, 32),
        _gpu("V100-32GB", 31.7, 125, None, 15.7, 900, 150, has_bfloat16=False),
        _gpu("T4-16GB", 14.6, 65, None, 8.1, 320, 16, has_bfloat16=False),
    )
}


def find_gpu(name: str) -> Device:
    """A GPU of the table by its name, or by the only one whose name begins so; case does not count.

    Raises:
        ConfigurationError: None or several are called so.
    """
    wanted = name.casefold().replace(" ", "-").removeprefix("nvidia-")
    found = [gpu for key, gpu in GPUS.items() if key.casefold().startswith(wanted)]
    exact = [gpu for gpu in found if gpu.name.casefold() == wanted]
    if len(exact or found) != 1:
        what = "Unknown GPU" if not found else "Several GPUs are called"
        named = ", ".join(gpu.name for gpu in found) or ", ".join(GPUS)
        raise ConfigurationError(f"{what} {name!r}: {'one of' if found else 'known are'} {named}.")
    return (exact or found)[0]


@dataclass(frozen=True)
class Efficiency:
    """Which shares of the published rates real operations reach, and what starting them costs.

    Attributes:
        shares: Of the rate of arithmetic, by kind of operation.
        bandwidth: Of that of the memory.
        link: Of that between GPUs.
        launch: Seconds that the host needs to start an operation; it does so while the GPU works.
        overlap: Share of what is sent between GPUs that is hidden behind the computation.
    """

    shares: dict[str, float]
    bandwidth: float
    link: float
    launch: float
    overlap: float


# ASSUMED, not measured here: what is seen in practice, from large products of matrices to small convolutions. Held to
# published throughputs in docs/source/cost.md and tests/cost.
FAST = Efficiency(
    {"matrix product": 0.7, "convolution": 0.55, "attention": 0.55}, bandwidth=0.85, link=0.8, launch=4e-6, overlap=0.9
)
SLOW = Efficiency(
    {"matrix product": 0.4, "convolution": 0.27, "attention": 0.3}, bandwidth=0.6, link=0.4, launch=12e-6, overlap=0.0
)
