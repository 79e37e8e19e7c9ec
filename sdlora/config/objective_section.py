"""The ``[objective]`` section: what a step learns from the images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .setting import Section, Setting

LossKind = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "snr", "exponential"]
Weighting = Literal["min_snr", "soft_min_snr", "debiased", "none"]


class ObjectiveSection(Section):
    """The loss of a step, and how noise levels and images are weighted."""

    loss: Annotated[LossKind, Setting(kohya="loss_type")] = "l2"
    """How the error of each latent value is measured. ``l2`` is its square. ``huber`` and ``smooth_l1`` are pseudo-Huber
    losses, in which large errors count by their size (Khrapov et al. 2024); ``huber`` shrinks with its threshold,
    ``smooth_l1`` does not."""
    huber_c: Annotated[float, Field(gt=0), Setting(kohya="huber_c")] = 0.1
    """Threshold of ``huber`` and ``smooth_l1``: smaller errors count by their square."""
    huber_schedule: Annotated[HuberSchedule, Setting(kohya="huber_schedule")] = "snr"
    """The threshold at each noise level: ``constant`` is ``huber_c``; ``snr`` and ``exponential`` go from 1 without noise
    to ``huber_c`` in pure noise."""
    weighting: Annotated[
        Weighting, Setting(values='"min_snr", "soft_min_snr", "debiased" (kohya: debiased_estimation_loss) or "none"')
    ] = "min_snr"
    """How noise levels are weighted: by min-SNR (Hang et al. 2023); by its smooth form (Crowson et al. 2024); by debiased
    estimation (Yu et al. 2024); or all the same."""
    min_snr_gamma: Annotated[float, Field(ge=0), Setting(kohya="min_snr_gamma")] = 5.0
    """Gamma of ``min_snr`` (Hang et al. 2023, who recommend 5) and ``soft_min_snr``; 0 weights every noise level the
    same."""
    prior_loss_weight: Annotated[float, Field(ge=0), Setting(kohya="prior_loss_weight")] = 1.0
    """Factor on the loss of regularisation images (Ruiz et al. 2023, equation 2)."""
