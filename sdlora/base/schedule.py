"""The noise schedule: how latents are noised, what the model predicts, and how errors are weighted.

Shapes: latents and noise (b, 4, h, w); timesteps (b,) int64; per-sample factors (b,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..families import Prediction

BetaSchedule = Literal["scaled_linear", "linear"]
_LEADING_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
"""diffusers' schedulers that space their steps by ``leading``; the others use ``linspace``."""


@dataclass(frozen=True, kw_only=True)
class ScheduleFacts:
    """The schedule that a checkpoint was trained with. The defaults are those of every published Stable Diffusion."""

    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    timesteps: int = 1000
    steps_offset: int = 1
    timestep_spacing: str | None = None
    """How a sampler spaces its steps; None is the sampler's default."""

    @classmethod
    def from_scheduler(
        cls,
        config: Mapping[str, Any],
        *,
        prediction: Prediction,
        zero_terminal_snr: bool,
        timestep_spacing: str | None,
    ) -> ScheduleFacts:
        """Read a diffusers scheduler's configuration, which may be empty.

        Raises:
            ValueError: a schedule that Stable Diffusion does not have; the message names it.
        """
        shape = config.get("beta_schedule", cls.beta_schedule)
        if shape not in ("scaled_linear", "linear"):
            raise ValueError(f"has beta_schedule {shape!r}; supported are scaled_linear and linear")
        kind = config.get("prediction_type", prediction)
        if kind not in get_args(Prediction):
            raise ValueError(f"has prediction_type {kind!r}; supported are {', '.join(get_args(Prediction))}")
        numbers = {
            key: config.get(name, getattr(cls, key))
            for key, name in (
                ("beta_start", "beta_start"),
                ("beta_end", "beta_end"),
                ("timesteps", "num_train_timesteps"),
                ("steps_offset", "steps_offset"),
            )
        }
        wrong = [key for key, value in numbers.items() if not isinstance(value, int | float) or value < 0]
        if wrong or not 0 < numbers["beta_start"] < numbers["beta_end"] < 1 or numbers["timesteps"] < 1:
            raise ValueError(f"has impossible values: {numbers}")
        return cls(
            prediction=prediction,
            zero_terminal_snr=zero_terminal_snr,
            beta_schedule=shape,
            timestep_spacing=_chosen_spacing(config) or timestep_spacing,
            **numbers,
        )


def _chosen_spacing(config: Mapping[str, Any]) -> str | None:
    """The spacing if somebody chose it: a scheduler's default is saved as well, and is no property of the checkpoint."""
    default = "leading" if config.get("_class_name") in _LEADING_BY_DEFAULT else "linspace"
    spacing = config.get("timestep_spacing")
    return None if spacing == default else spacing


LARGEST_SNR = 1000.0
"""Signal-to-noise ratio above which debiased weights stay the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """``alphas_cumprod``, (timesteps,) float32, is the share of signal variance at each timestep (ᾱ in Ho et al. 2020)."""

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, facts: ScheduleFacts) -> NoiseSchedule:
        """Betas linear, or linear in their square roots as Stable Diffusion was trained (Rombach et al. 2022).

        With zero-terminal SNR, √ᾱ is shifted and scaled so that its last value is 0 and its first stays (Lin et al. 2024,
        algorithm 1).
        """
        power = 0.5 if facts.beta_schedule == "scaled_linear" else 1.0
        betas = torch.linspace(
            facts.beta_start**power, facts.beta_end**power, facts.timesteps, dtype=torch.float32
        ) ** (1 / power)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        if facts.zero_terminal_snr:
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        return cls(alphas_cumprod=alphas_cumprod, prediction=facts.prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule with its tensor on ``device``."""
        return NoiseSchedule(alphas_cumprod=self.alphas_cumprod.to(device), prediction=self.prediction)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents √ᾱ x + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4)."""
        signal = self.alphas_cumprod[timesteps][:, None, None, None]
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is trained to predict: ε, v = √ᾱ ε - √(1 - ᾱ) x (Salimans & Ho 2022, section 4), or x itself."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal = self.alphas_cumprod[timesteps][:, None, None, None]
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ) / SNR for ε, / (SNR + 1) for v, / 1 for x (Hang et al. 2023, section 3.4).

        γ = 0 gives equal weights.
        """
        signal = self.alphas_cumprod[timesteps]
        if gamma == 0:
            return torch.ones_like(signal)
        snr = signal / (1 - signal)
        return snr.clamp(max=gamma) / self._image_error(snr)

    def soft_min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """γ / (SNR + γ) for ε, γ SNR / ((SNR + γ) (SNR + 1)) for v, γ SNR / (SNR + γ) for x: min-SNR without its corner.

        From Crowson et al. 2024. All weight the error of the denoised image by 1 / (1 / SNR + 1 / γ), where min-SNR's weigh
        it by min(SNR, γ).
        """
        signal = self.alphas_cumprod[timesteps]
        if self.prediction == "sample":
            return gamma * signal / (signal + gamma * (1 - signal))
        soft = gamma * (1 - signal) / (signal + gamma * (1 - signal))
        return soft if self.prediction == "epsilon" else soft * signal

    def debiased_weight(self, timesteps: Tensor) -> Tensor:
        """1 / √SNR for ε (Yu et al. 2024) and 1 / (SNR + 1) for v, with SNR at most 1000, as in kohya's trainer.

        √SNR for x, whose error is that of ε over √SNR: the same as for ε.
        """
        signal = self.alphas_cumprod[timesteps]
        snr = (signal / (1 - signal)).clamp(max=LARGEST_SNR)
        if self.prediction == "sample":
            return snr.sqrt()
        return snr.rsqrt() if self.prediction == "epsilon" else 1 / (snr + 1)

    def _image_error(self, snr: Tensor) -> Tensor | float:
        """Square of the prediction's error over that of the denoised image."""
        return {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[self.prediction]
