"""The length of a run, in steps and in epochs."""

from __future__ import annotations

from ..config.sections import Config


def in_steps(config: Config, *, batches_per_epoch: int) -> Config:
    """``config`` with its length in ``train.steps`` alone, so that the same length is the same run.

    ``train.epochs`` becomes the nearest whole number of steps, at least one.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    steps = max(1, round(epochs * batches_per_epoch))
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "epochs": None})})


def length_in_words(*, images: int, steps: int, epochs: float) -> str:
    """How long a run on so many training images is."""
    return f"{images} images, {steps} steps, {epochs:.1f} epochs"
