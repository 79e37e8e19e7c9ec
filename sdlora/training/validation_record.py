"""What a measurement of the validation loss found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One measurement on the validation images.

    Intervals are half the width of a 95 % confidence interval (``interval.half_width``) over the images, whose losses are
    means over the noise levels; None with one image. The images, their noise and its levels are the same in every
    measurement, so differences are taken image by image, and say far more than the losses themselves.
    """

    step: int
    """Steps that were done; 0 before the first."""
    loss: float
    """Mean over images and noise levels."""
    interval: float | None
    difference: float
    """Mean over the images of the difference from the first measurement, usually that of the base; negative is better."""
    difference_interval: float | None
    best: bool
    """Whether no earlier measurement is as low, except that before the first step, which is never the best."""
    risen: bool
    """Whether the loss is higher than the lowest before it, by more than the interval of the difference, or NaN or Inf."""
