# SPDX-License-Identifier: Apache-2.0
"""Noise levels and the two families of schedules that make them.

Every backbone follows `x_t = alpha_t * x_0 + sigma_t * eps`, with signal-to-noise ratio `alpha_t^2 / sigma_t^2`:

- variance-preserving diffusion (Ho et al., 2020): `alpha_t^2 = alphas_cumprod[t]`, `sigma_t^2 = 1 - alpha_t^2`;
- rectified flow (Liu et al., 2022): `alpha_t = 1 - sigma`, `sigma_t = sigma`.

In both, `time` 0 is the clean end and 1 the noise end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_sipo.core.precision import per_sample, wide_dtype, widen
from trl_sipo.core.transfer import to_device
from trl_sipo.errors import ConfigurationError

_WIDE_DTYPES = (torch.float32, torch.float64)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _WIDE_DTYPES:
        raise ConfigurationError(
            f"dtype={dtype} is too narrow for noise coefficients: use torch.float32 or torch.float64. The model "
            "itself may run in any dtype."
        )


def _check_num_steps(num_steps: int, most: int | None = None) -> None:
    if num_steps < 1 or (most is not None and num_steps > most):
        limit = "at least 1" if most is None else f"between 1 and the schedule's {most} training timesteps"
        raise ConfigurationError(f"num_steps={num_steps} is not a sampler grid; it must be {limit} (usually 50).")


@dataclass(frozen=True)
class NoiseLevel:
    """One noise level per sample: what the latents are noised with, and what the network is told.

    Both live in one frozen object so that they cannot disagree.

    Args:
        alpha_t: `(batch,)` float32 or float64, the coefficient of the clean latents.
        sigma_t: `(batch,)`, same dtype and device, the coefficient of the noise.
        timestep: `(batch,)`, what the denoiser receives: integer steps for diffusion, scaled sigmas for flow.
    """

    alpha_t: Tensor
    sigma_t: Tensor
    timestep: Tensor

    def __post_init__(self) -> None:
        shape = self.alpha_t.shape
        assert self.alpha_t.ndim == 1 and self.sigma_t.shape == shape and self.timestep.shape == shape, "need (batch,)"
        assert self.alpha_t.dtype in _WIDE_DTYPES and self.sigma_t.dtype == self.alpha_t.dtype, self.alpha_t.dtype

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio `alpha_t^2 / sigma_t^2`, `(batch,)`; inf where `sigma_t = 0`."""
        return (self.alpha_t / self.sigma_t) ** 2

    @property
    def log_snr(self) -> Tensor:
        """Natural logarithm of `snr`, `(batch,)`; +inf at the clean end, -inf at zero terminal SNR."""
        return 2 * (self.alpha_t.log() - self.sigma_t.log())

    def coefficients_for(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha_t, sigma_t)` as `(batch, 1, ..., 1)` on the device of `latents` `(batch, ...)`."""
        return per_sample(self.alpha_t, latents), per_sample(self.sigma_t, latents)

    def add_noise(self, clean_latents: Tensor, noise: Tensor) -> Tensor:
        """`x_t = alpha_t * x_0 + sigma_t * eps`.

        Args:
            clean_latents: x_0, `(batch, ...)`, any floating dtype.
            noise: eps, same shape.

        Returns:
            x_t, same shape, float32 or wider (cast it to the model's dtype last).
        """
        assert clean_latents.shape == noise.shape, (clean_latents.shape, noise.shape)
        clean_latents, noise = widen(clean_latents, noise)
        alpha_t, sigma_t = self.coefficients_for(clean_latents)
        return alpha_t * clean_latents + sigma_t * noise

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "NoiseLevel":
        """A copy on `device`, with coefficients in `dtype` (float32 or float64; the timestep keeps its own).

        Raises:
            ConfigurationError: `dtype` is narrower than float32.
        """
        if dtype is not None:
            _check_dtype(dtype)
        device = self.alpha_t.device if device is None else device
        parts = (self.alpha_t.to(dtype=dtype), self.sigma_t.to(dtype=dtype), self.timestep)
        return NoiseLevel(*(to_device(part, device) for part in parts))

    def expand(self, batch: int) -> "NoiseLevel":
        """One level `(1,)` for each of `batch` samples, `(batch,)`."""
        return NoiseLevel(*(values.expand(batch) for values in (self.alpha_t, self.sigma_t, self.timestep)))

    def repeat_pair(self) -> "NoiseLevel":
        """The level twice, `(2 * batch,)`: for a batch of all chosen samples followed by all rejected ones."""
        return NoiseLevel(*(torch.cat([values, values]) for values in (self.alpha_t, self.sigma_t, self.timestep)))


class VPSchedule:
    """Variance-preserving diffusion over integer timesteps.

    Args:
        alphas_cumprod: `(num_train_timesteps,)`, cumulative products in [0, 1]. Take the table of a diffusers
            scheduler *as built from its config* (after `snr_shift_scale` and `rescale_betas_zero_snr`); a last
            entry of 0 (zero terminal SNR) is fine.
        dtype: of the levels made here, float32 or float64. The table itself is kept in float64 on the CPU.

    Raises:
        ConfigurationError: `alphas_cumprod` is not one-dimensional, empty or outside [0, 1]; `dtype` is too narrow.
    """

    def __init__(self, alphas_cumprod: Tensor, dtype: torch.dtype = torch.float32):
        _check_dtype(dtype)
        table = alphas_cumprod.detach().to(device="cpu", dtype=torch.float64)
        if table.ndim != 1 or table.numel() == 0 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ConfigurationError(
                f"alphas_cumprod of shape {tuple(table.shape)} must be a non-empty vector of values in [0, 1]; pass "
                "scheduler.alphas_cumprod."
            )
        self.alphas_cumprod = table
        self.dtype = dtype
        # The clean end, then the table. 1 - alphas_cumprod cancels near the clean end, hence float64 until here. Each
        # device gets a copy when it first needs one, so that a lookup in the training step does not wait for it.
        with_clean_end = torch.cat([torch.ones(1, dtype=torch.float64), table])
        self._coefficients: dict[torch.device, tuple[Tensor, ...]] = {
            torch.device("cpu"): (with_clean_end.sqrt().to(dtype), (1 - with_clean_end).sqrt().to(dtype))
        }

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.alphas_cumprod.numel()

    def level(self, timesteps: Tensor) -> NoiseLevel:
        """The noise levels of integer `timesteps` `(batch,)` in 0..T-1, on their device.

        Raises:
            ConfigurationError: a timestep is outside 0..T-1.
        """
        on_cpu = timesteps.cpu()
        last = self.num_train_timesteps - 1
        # A negative index would silently read the noisy end of the table.
        if on_cpu.numel() and (int(on_cpu.min()) < 0 or int(on_cpu.max()) > last):
            raise ConfigurationError(f"timesteps {on_cpu.tolist()} must lie in 0..{last}, the range of the schedule.")
        return self._level_from_table(timesteps)

    def level_at(self, time: Tensor) -> NoiseLevel:
        """The level of timestep `floor(time * T)` for `time` `(batch,)` in [0, 1); 1 itself gives the last step."""
        on_cpu = (time.cpu().double() * self.num_train_timesteps).floor().long()
        return self.level(on_cpu.clamp(max=self.num_train_timesteps - 1).to(time.device))

    def previous_level(self, level: NoiseLevel, num_steps: int = 50) -> NoiseLevel:
        """The less noisy neighbour on a sampler grid of `num_steps`: timestep `t - T // num_steps`.

        Below one stride there is no predecessor on the grid: alpha = 1, sigma = 0, timestep = -1.

        Raises:
            ConfigurationError: `num_steps` is not in 1..T.
        """
        _check_num_steps(num_steps, self.num_train_timesteps)
        stride = self.num_train_timesteps // num_steps
        previous = self._level_from_table((level.timestep - stride).clamp(min=-1))
        return previous.to(dtype=level.alpha_t.dtype)

    def _level_from_table(self, timesteps: Tensor) -> NoiseLevel:
        """Levels of `timesteps` `(batch,)`, where -1 is the clean end, looked up on their device."""
        if timesteps.device not in self._coefficients:
            self._coefficients[timesteps.device] = tuple(
                to_device(table, timesteps.device) for table in self._coefficients[torch.device("cpu")]
            )
        alpha_t, sigma_t = (table[timesteps + 1] for table in self._coefficients[timesteps.device])
        return NoiseLevel(alpha_t, sigma_t, timesteps)


class FlowSchedule:
    """Rectified flow over `sigma` in [0, 1], with the timestep shift of Stable Diffusion 3 (Esser et al., 2024).

    `sigma = shift * time / (1 + (shift - 1) * time)`.

    Args:
        shift: of the scheduler's config; for dynamic shifting with an exponential schedule pass `exp(mu)`.
        timestep_scale: the network is given `sigma * timestep_scale`.
        dtype: of the levels made here, float32 or float64.
        drawn_shift: the shift of `level_at`, where training draws its levels otherwise than the sampler's grid
            (1.0: uniform sigmas); None: the same shift.
        shift_terminal: the last sigma of the sampler's grid, in (0, 1), to which some models stretch it; None: not
            stretched. It changes which sigmas the grid holds, and not what a sigma means.

    Raises:
        ConfigurationError: a shift is not positive, `shift_terminal` is not in (0, 1), or `dtype` is too narrow.
    """

    def __init__(
        self,
        shift: float = 1.0,
        timestep_scale: float = 1000.0,
        dtype: torch.dtype = torch.float32,
        *,
        drawn_shift: float | None = None,
        shift_terminal: float | None = None,
    ):
        _check_dtype(dtype)
        self.shift = shift
        self.timestep_scale = timestep_scale
        self.dtype = dtype
        self.drawn_shift = shift if drawn_shift is None else drawn_shift
        self.shift_terminal = shift_terminal
        for name, value in (("shift", self.shift), ("drawn_shift", self.drawn_shift)):
            if not 0 < value < float("inf"):
                raise ConfigurationError(f"{name}={value} must be positive and finite; 1.0 means no shift.")
        if shift_terminal is not None and not 0 < shift_terminal < 1:
            raise ConfigurationError(f"shift_terminal={shift_terminal} must lie between 0 and 1; None: no stretching.")

    def level(self, sigmas: Tensor) -> NoiseLevel:
        """The noise levels of `sigmas` `(batch,)` in [0, 1], already shifted, on their device."""
        sigmas = sigmas.to(self.dtype)
        return NoiseLevel(1 - sigmas, sigmas, sigmas * self.timestep_scale)

    def level_at(self, time: Tensor) -> NoiseLevel:
        """The level at `sigma = shift(time)` for `time` `(batch,)` in [0, 1], with `drawn_shift`."""
        time = time.to(torch.promote_types(wide_dtype(time), self.dtype))
        return self.level(_shifted(time, self.drawn_shift))

    def previous_level(self, level: NoiseLevel, num_steps: int = 50) -> NoiseLevel:
        """The less noisy neighbour on a sampler grid of `num_steps`, uniform before the shift.

        `sigma_s = shift(max(shift_inverse(sigma_t) - 1 / num_steps, 0))`, stretched to `shift_terminal` where there is
        one; sigma_s = 0 means "no predecessor".

        Raises:
            ConfigurationError: `num_steps` is below 1.
        """
        _check_num_steps(num_steps)
        if self.shift_terminal is None or num_steps == 1:
            sigma_s = self._previous_sigma(level.sigma_t, num_steps)
        else:
            last = self.shift / (num_steps + self.shift - 1)  # the last sigma before stretching, shift(1 / num_steps)
            scale = (1 - last) / (1 - self.shift_terminal)
            unstretched = self._previous_sigma(1 - (1 - level.sigma_t) * scale, num_steps)
            # Of the last sigma, what is left is rounding, which stretching would make a sigma of its own.
            sigma_s = torch.where(unstretched > 1e-5, 1 - (1 - unstretched) / scale, 0.0).clamp(min=0)
        return NoiseLevel(1 - sigma_s, sigma_s, sigma_s * self.timestep_scale)

    def _previous_sigma(self, sigma_t: Tensor, num_steps: int) -> Tensor:
        time = sigma_t / (self.shift - (self.shift - 1) * sigma_t)
        return _shifted((time - 1 / num_steps).clamp(min=0), self.shift)


def _shifted(time: Tensor, shift: float) -> Tensor:
    return shift * time / (1 + (shift - 1) * time)
