"""The samplers that diffusers lacks, or has only with further packages, as schedulers of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from numpy.polynomial import Polynomial
from torch import Tensor


class EulerAncestral(EulerAncestralDiscreteScheduler):
    """Diffusers' own, which takes noise levels too: where ``_convert_to_karras`` is set, as on the other schedulers."""

    _convert_to_karras: Callable[[], np.ndarray] | None = None
    _convert_to_exponential: Callable[[], np.ndarray] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set ``sigmas`` and ``timesteps`` for a run."""
        super().set_timesteps(num_inference_steps, device)
        formula = self._convert_to_karras or self._convert_to_exponential
        if formula is not None:
            levels = formula()
            self.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)
            self.timesteps = torch.tensor(_timesteps_of(levels, np.log(noise_levels(self))), dtype=torch.float32)


class LinearMultistep(EulerDiscreteScheduler):
    """LMS of k-diffusion: Adams-Bashforth of up to fourth order over the noise levels, with exact integrals.

    diffusers' ``LMSDiscreteScheduler`` integrates by quadrature and needs scipy.
    """

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        """Set ``sigmas`` and ``timesteps`` for a run."""
        super().set_timesteps(*arguments, **named)
        self._slopes: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **named: Any) -> tuple[Tensor]:
        """The latents of the next noise level, (b, 4, h, w) float32."""
        if self.step_index is None:
            self._init_step_index(timestep)
        number = self.step_index
        denoised = _denoised(self, model_output, sample, self.sigmas[number])
        self._slopes = [(sample - denoised) / self.sigmas[number], *self._slopes][:4]
        used = self.sigmas.double().numpy()[number - len(self._slopes) + 1 : number + 1][::-1]
        begin, end = float(self.sigmas[number]), float(self.sigmas[number + 1])
        for place, slope in enumerate(self._slopes):
            others = np.delete(used, place)
            basis = Polynomial.fromroots(others) / np.prod(used[place] - others) if len(others) else Polynomial([1.0])
            integral = basis.integ()
            sample = sample + float(integral(end) - integral(begin)) * slope
        self._step_index = number + 1
        return (sample,)


class _QuickTimesteps:
    """Finds the timesteps of noise levels as diffusers does, in a thousandth of the time.

    Diffusers looks for a thousand of them whenever a scheduler of second order is made, and hands numpy tensors.
    """

    def _sigma_to_t(self, sigma: Any, log_sigmas: Any) -> Any:
        return _timesteps_of(np.asarray(sigma), np.asarray(log_sigmas))


class Heun(_QuickTimesteps, HeunDiscreteScheduler):
    """Diffusers' own."""


class Dpm2(_QuickTimesteps, KDPM2DiscreteScheduler):
    """Diffusers' own."""


class DpmSde(EulerDiscreteScheduler):
    """DPM-Solver++ (stochastic) of k-diffusion, ``sample_dpmpp_sde``, with r = 1/2 and η = 1.

    A step calls the UNet at its noise level and at one in between; the last step, to 0, once. ``sigmas`` holds the noise
    level of each call, and 0. The noise of a whole step contains that of its first part, as on the one Brownian path that
    k-diffusion draws with torchsde; here each part's own noise comes from the image's generator.
    """

    order = 2

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        """Set ``sigmas`` and ``timesteps`` for a run, with two entries for each step except the last."""
        super().set_timesteps(*arguments, **named)
        table = np.log(noise_levels(self))
        levels, timesteps = self.sigmas.double().tolist()[:-1], self.timesteps.tolist()
        calls, at = levels[:1], timesteps[:1]
        for high, low, timestep in zip(levels, levels[1:], timesteps[1:], strict=False):
            between = self._between(high, low)
            calls += [between, low]
            at += [float(_timesteps_of(np.asarray(between), table)), timestep]
        self.sigmas = torch.tensor([*calls, 0.0], dtype=torch.float32)
        self.timesteps = torch.tensor(at, dtype=torch.float32)
        self._kept: tuple[Tensor, ...] = ()

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, generator: Any = None, **named: Any
    ) -> tuple[Tensor]:
        """The latents for the next call, (b, 4, h, w) float32."""
        if self.step_index is None:
            self._init_step_index(timestep)
        number = self.step_index
        self._step_index = number + 1
        denoised = _denoised(self, model_output, sample, self.sigmas[number])
        if self.sigmas[number + 1] == 0:
            return (denoised,)

        def noise() -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

        if number % 2 == 0:
            return (self._first(sample, denoised, noise, *self.sigmas[number : number + 2].tolist()),)
        return (self._second(sample, denoised, noise, *self.sigmas[number - 1 : number + 2].tolist()),)

    def _between(self, high: float, low: float) -> float:
        """The noise level of a step's second call."""
        return (high * low) ** 0.5

    def _first(
        self, sample: Tensor, denoised: Tensor, noise: Callable[[], Tensor], high: float, between: float
    ) -> Tensor:
        drawn = noise()
        self._kept = (sample, drawn)
        down, up = _ancestral(high, between)
        return denoised + down / high * (sample - denoised) + up * drawn

    def _second(
        self, sample: Tensor, denoised: Tensor, noise: Callable[[], Tensor], high: float, between: float, low: float
    ) -> Tensor:
        sample, first = self._kept
        down, up = _ancestral(high, low)
        share = (high - between) / (high - low)
        path = share**0.5 * first + (1 - share) ** 0.5 * noise()
        return denoised + down / high * (sample - denoised) + up * path


class DpmAncestral(DpmSde):
    """Ancestral steps of second-order DPM-Solver++ of k-diffusion, ``sample_dpmpp_2s_ancestral``, with η = 1."""

    def _between(self, high: float, low: float) -> float:
        return (high * _ancestral(high, low)[0]) ** 0.5

    def _first(
        self, sample: Tensor, denoised: Tensor, noise: Callable[[], Tensor], high: float, between: float
    ) -> Tensor:
        self._kept = (sample,)
        return denoised + between / high * (sample - denoised)

    def _second(
        self, sample: Tensor, denoised: Tensor, noise: Callable[[], Tensor], high: float, between: float, low: float
    ) -> Tensor:
        (sample,) = self._kept
        down, up = _ancestral(high, low)
        return denoised + down / high * (sample - denoised) + up * noise()


class Dpm2Ancestral(DpmAncestral):
    """Ancestral steps of DPM-Solver-2 of k-diffusion, ``sample_dpm_2_ancestral``, with η = 1.

    diffusers' ``KDPM2AncestralDiscreteScheduler`` computes NaN between the noise levels of zero-terminal SNR.
    """

    def _second(
        self, sample: Tensor, denoised: Tensor, noise: Callable[[], Tensor], high: float, between: float, low: float
    ) -> Tensor:
        (first,) = self._kept
        down, up = _ancestral(high, low)
        return first + (down - high) / between * (sample - denoised) + up * noise()


OWN_SCHEDULERS: dict[str, type] = {
    "euler-a": EulerAncestral,
    "heun": Heun,
    "dpm2": Dpm2,
    "dpm2-a": Dpm2Ancestral,
    "lms": LinearMultistep,
    "dpm++sde": DpmSde,
    "dpm++2s-a": DpmAncestral,
}
"""Name of a sampler -> its scheduler here."""


def _ancestral(high: float, low: float) -> tuple[float, float]:
    """The noise level to step down to, and that of the noise to add, with η = 1: k-diffusion's ``get_ancestral_step``."""
    up = min(low, (low**2 * (high**2 - low**2) / high**2) ** 0.5)
    return (low**2 - up**2) ** 0.5, up


def noise_levels(scheduler: Any) -> list[float]:
    """The base's noise levels, from low to high."""
    signal = scheduler.alphas_cumprod.double()
    return ((1 - signal) / signal).sqrt().tolist()


def _timesteps_of(levels: np.ndarray, log_table: np.ndarray) -> np.ndarray:
    """The timesteps of noise levels, linear in log σ between whole ones: k-diffusion's ``sigma_to_t``.

    ``log_table`` has the logarithm of the base's noise level of each timestep; levels outside get the first or the last.
    """
    return np.interp(np.log(np.maximum(levels, 1e-10)), log_table, np.arange(len(log_table)))


def _denoised(scheduler: Any, output: Tensor, sample: Tensor, level: Tensor) -> Tensor:
    """The image without noise that ``output`` predicts at ``sample``, which is unscaled."""
    if scheduler.config.prediction_type == "epsilon":
        return sample - level * output
    if scheduler.config.prediction_type == "sample":
        return output
    return sample / (level**2 + 1) - level / (level**2 + 1) ** 0.5 * output
