"""What each step shows: which image, which crop, flipped or not, with which caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..data.buckets import BucketRules, Placement
from ..data.examine import ExaminedImage
from ..data.kept_images import KeptImages
from ..data.views import View, ViewSet, crop_positions, salient_crop
from ..errors import DataError
from .batches import BatchPlan, regularisation_repeats


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One showing of an image."""

    view: View
    caption: str
    weight: float
    """Factor of its loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Everything that a run shows; what a step shows depends on the seed and the step alone."""

    items: tuple[ExaminedImage, ...]
    """Images of all roles; ``View.item`` is an index into it."""
    shown: tuple[ViewSet, ...]
    """Training and regularisation images, each at each resolution."""
    weights: tuple[float, ...]
    """Loss weight of each of ``shown``."""
    batches: BatchPlan
    """Its numbers are indices into ``shown``."""
    validation: tuple[View, ...]
    """Never trained on."""

    def batch(self, step: int) -> tuple[Sample, ...]:
        """Samples of ``step`` (from 0)."""
        samples = []
        for showing in self.batches.batch(step):
            views = self.shown[showing.number]
            source = self.items[views.item].source
            samples.append(
                Sample(
                    view=views.draw(seed=self.batches.seed, turn=showing.turn),
                    caption=source.rules.caption(
                        source.captions, seed=self.batches.seed, epoch=showing.turn, image=views.item
                    ),
                    weight=self.weights[showing.number],
                )
            )
        return tuple(samples)

    def views(self, steps: int) -> tuple[View, ...]:
        """Views that the first ``steps`` steps show, ordered by image, so that each is opened once."""
        possible = sum(len(views.all()) for views, times in zip(self.shown, self.batches.repeats, strict=True) if times)
        found: set[View] = set()
        for step in range(steps):
            for showing in self.batches.batch(step):
                found.add(self.shown[showing.number].draw(seed=self.batches.seed, turn=showing.turn))
            if len(found) == possible:
                break
        return tuple(sorted(found, key=lambda view: (view.item, view.placement, view.flipped)))

    def captions(self, steps: range) -> Iterator[str]:
        """Captions that ``steps`` show, then those of the validation images; some come again."""
        for step in steps:
            for sample in self.batch(step):
                yield sample.caption
        for view in self.validation:
            source = self.items[view.item].source
            yield source.rules.plain(source.captions)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Placements of training images, one for each resolution; for random crops the centred one."""
        return tuple(
            views.placements[len(views.placements) // 2]
            for views in self.shown
            if self.items[views.item].source.role == "train"
        )


def plan_training_set(
    items: Sequence[ExaminedImage],
    rules: Sequence[BucketRules],
    *,
    kept: KeptImages,
    batch_size: int,
    seed: int,
    prior_loss_weight: float,
) -> TrainingSet:
    """Place every image at every resolution, and set how often it is shown and the weight of its loss.

    Args:
        kept: opens the images whose crop depends on their pixels.

    Raises:
        DataError: there is nothing to train on, or an image can no longer be read.
    """
    if not any(item.source.role == "train" for item in items):
        raise DataError("no image to train on: every one is for regularisation or validation")
    often = {rule.resolution: _repeats(items, rule.resolution) for rule in rules}
    shown, weights, repeats, validation = [], [], [], []
    for number, (item, placed) in enumerate(zip(items, _placed(items, rules, kept), strict=True)):
        source = item.source
        for resolution, placement in placed.items():
            if source.role == "validation":
                validation.append(View(item=number, placement=placement, flipped=False))
                continue
            crops = crop_positions(placement) if source.crop == "random" else (placement,)
            shown.append(ViewSet(item=number, placements=crops, flips=source.flip))
            weights.append(source.loss_weight * (prior_loss_weight if source.role == "regularisation" else 1.0))
            repeats.append(often[resolution][number])
    sizes = [views.size for views in shown]
    return TrainingSet(
        items=tuple(items),
        shown=tuple(shown),
        weights=tuple(weights),
        batches=BatchPlan.of(sizes, repeats=repeats, batch_size=batch_size, seed=seed),
        validation=tuple(validation),
    )


def _repeats(items: Sequence[ExaminedImage], resolution: int) -> dict[int, int]:
    """Number of times an epoch shows each training and regularisation image that has this ``resolution``."""
    times: dict[str, dict[int, int]] = {"train": {}, "regularisation": {}, "validation": {}}
    for number, item in enumerate(items):
        if item.source.shown_at(resolution):
            times[item.source.role][number] = item.source.repeats
    regularisation = times["regularisation"]
    fill = regularisation_repeats(sum(times["train"].values()), list(regularisation.values()))
    return times["train"] | dict(zip(regularisation, fill, strict=True))


def _placed(
    items: Sequence[ExaminedImage], rules: Sequence[BucketRules], kept: KeptImages
) -> list[dict[int, Placement]]:
    """For each image, resolution -> placement, of the resolutions at which it is shown."""

    def place(image: ExaminedImage) -> dict[int, Placement]:
        centred = {
            rule.resolution: rule.place(image.width, image.height)
            for rule in rules
            if image.source.shown_at(rule.resolution)
        }
        if image.source.crop != "salient" or not any(placement.cut_off for placement in centred.values()):
            return centred
        pixels = kept.open(image.source.file)
        return {resolution: salient_crop(pixels, placement) for resolution, placement in centred.items()}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(place, items))
