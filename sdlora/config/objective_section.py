"""The ``[objective]`` section: what a step learns from the images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .setting import Section, Setting

LossKind = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "snr", "exponential"]
Weighting = Literal["min_snr", "soft_min_snr", "debiased", "none"]
TimestepSampling = Literal["uniform", "logit_normal", "shifted"]


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
    noise_offset: Annotated[float, Field(ge=0), Setting(kohya="noise_offset")] = 0.0
    """Standard deviation of a number for each channel that is added to the noise, so that dark and bright images can be
    learned (Guttenberg 2023). kohya's users take 0.03 to 0.1."""
    multires_noise_iterations: Annotated[int, Field(ge=0, le=10), Setting(kohya="multires_noise_iterations")] = 0
    """Noise of so many coarser resolutions that is added to the noise, whose variance stays (Whitaker 2023). 0 adds none;
    kohya's users take 6 to 10."""
    multires_noise_discount: Annotated[float, Field(ge=0, le=1), Setting(kohya="multires_noise_discount")] = 0.3
    """Strength of each of these resolutions, as a factor on that of the one before."""
    input_perturbation: Annotated[float, Field(ge=0, le=1), Setting(kohya="ip_noise_gamma")] = 0.0
    """Noise in the input of the UNet that it is not to predict, as a share of the noise: it learns to correct its own
    errors (Ning et al. 2023, who recommend 0.1)."""
    min_timestep: Annotated[int, Field(ge=0), Setting(kohya="min_timestep")] = 0
    """Lowest noise level that is trained, from 0."""
    max_timestep: Annotated[int | None, Field(ge=1), Setting(kohya="max_timestep")] = None
    """Noise levels below this one are trained. By default all, which are 1000 in Stable Diffusion."""
    timestep_sampling: TimestepSampling = "uniform"
    """How noise levels are drawn from that range: evenly; ``logit_normal``, with more from its middle; ``shifted``, with
    more from its end (Esser et al. 2024)."""
    logit_mean: Annotated[float, Field(ge=-10, le=10), Setting(kohya="logit_mean")] = 0.0
    """Mean of ``logit_normal``, before the sigmoid: above 0 more noise is drawn, below 0 more detail."""
    logit_std: Annotated[float, Field(gt=0, le=10), Setting(kohya="logit_std")] = 1.0
    """Standard deviation of ``logit_normal``, before the sigmoid."""
    timestep_shift: Annotated[float, Field(gt=0)] = 3.0
    """Shift of ``shifted``: 1 is even; above 1 more noise is drawn, below 1 more detail."""

    @model_validator(mode="after")
    def _has_a_range(self) -> ObjectiveSection:
        low, high = self.min_timestep, self.max_timestep
        if high is not None and low >= high:
            problem = f"min_timestep = {low}: must be less than objective.max_timestep, which is {high}"
            raise PydanticCustomError("settings", "{problems}", {"problems": problem})
        return self
