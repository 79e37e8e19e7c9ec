"""The noise schedule: how a latent is noised, what a model is to predict, and how errors are weighted.

Shapes: latents and noise (b, 4, h, w); timesteps (b,) int64; per-sample factors (b,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """``alphas_cumprod`` is (timesteps,) float32: the share of signal variance at each timestep (ᾱ in Ho et al. 2020)."""

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def scaled_linear(
        cls, *, start: float = 0.00085, end: float = 0.012, timesteps: int = 1000, prediction: Prediction = "epsilon"
    ) -> NoiseSchedule:
        """Betas linear in their square roots, as Stable Diffusion was trained (Rombach et al. 2022)."""
        betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float32) ** 2
        return cls(alphas_cumprod=torch.cumprod(1 - betas, 0), prediction=prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(alphas_cumprod=self.alphas_cumprod.to(device), prediction=self.prediction)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4)."""
        signal = self.alphas_cumprod[timesteps][:, None, None, None]
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε, or v = √ᾱ ε - √(1 - ᾱ) x (Salimans & Ho 2022, section 4)."""
        if self.prediction == "epsilon":
            return noise
        signal = self.alphas_cumprod[timesteps][:, None, None, None]
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ) / SNR for ε, / (SNR + 1) for v (Hang et al. 2023, section 3.4); γ = 0 weights all alike."""
        signal = self.alphas_cumprod[timesteps]
        if gamma == 0:
            return torch.ones_like(signal)
        snr = signal / (1 - signal)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)
