"""The length of a run, in steps, in epochs and in words; by default from the number of its images."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.sections import Config
from .training_set import TrainingSet

PASSES = 100
"""Times that each image is shown, by default: the epochs of OneTrainer's presets for SD 1.5 and SDXL."""
FEWEST_SHOWINGS, MOST_SHOWINGS = 2000, 4000
"""Bounds of what is shown in all: 200 to 400 images times repeats in each of 10 epochs, as hollowstrawberry's notebook
for kohya's trainer recommends."""
FEWEST_PASSES = 10
"""Times that each of many images is shown at least: the epochs of Civitai's trainer and of that notebook."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """The steps of a run, and of which length it was before each of its extensions."""

    ends: tuple[int, ...]
    """Steps in all: as planned, then after each extension."""

    @classmethod
    def of(cls, planned: int, extensions: tuple[int, ...] = ()) -> Length:
        """That of a run of ``planned`` steps that was extended by each of ``extensions``."""
        return cls(ends=tuple(planned + sum(extensions[:number]) for number in range(len(extensions) + 1)))

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.ends[-1]

    @property
    def planned(self) -> int:
        """Steps before any extension."""
        return self.ends[0]

    def in_force(self, step: int) -> int:
        """The length that counts for the schedule in ``step`` (from 0): an extension changes no step before it."""
        return next((end for end in self.ends if step < end), self.steps)


def planned_steps(config: Config, training: TrainingSet) -> int:
    """``train.steps``; or ``train.epochs`` as the nearest number of steps, at least one; or by the number of images."""
    train, per_epoch = config.train, training.batches.batches_per_epoch
    if train.steps is not None:
        return train.steps
    epochs = _usual_epochs(training) if train.epochs is None else train.epochs
    return max(1, round(epochs * per_epoch))


def _usual_epochs(training: TrainingSet) -> int:
    """Whole epochs, at least one, that show each training image ``PASSES`` times, within the bounds above."""
    images = _images(training)
    showings = min(max(PASSES * images, FEWEST_SHOWINGS), MOST_SHOWINGS)
    return max(1, round(max(showings, FEWEST_PASSES * images) / _shown_each_epoch(training)))


def _images(training: TrainingSet) -> int:
    return sum(item.source.role == "train" for item in training.items)


def _shown_each_epoch(training: TrainingSet) -> int:
    """Training images of an epoch, each as often as it is shown."""
    shown = zip(training.shown, training.batches.repeats, strict=True)
    return sum(times for views, times in shown if training.items[views.item].source.role == "train")


def length_in_words(length: Length, training: TrainingSet, *, by_images: bool) -> str:
    """How long a run is; ``by_images`` where nothing but the number of images decided it."""
    images, steps, batches = _images(training), length.steps, training.batches
    epochs = steps / batches.batches_per_epoch
    if by_images and length.ends == (steps,):
        passes = epochs * _shown_each_epoch(training) / images
        return (
            f"{steps} steps: {images} images × {passes:.3g} passes in batches of {batches.batch_size}, "
            "since neither train.steps nor train.epochs is set"
        )
    more = "".join(f" + {end - start}" for start, end in zip(length.ends, length.ends[1:], strict=False))
    extended = f" ({length.planned}{more})" if more else ""
    return f"{images} images, {steps} steps{extended}, {epochs:.1f} epochs"
