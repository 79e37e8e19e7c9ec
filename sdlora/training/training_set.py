"""What is shown in each step: which image, which part of it, which way round, and with which caption."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..config.sections import DataSection
from ..data.buckets import BucketRules, Placement
from ..data.images import open_image
from ..data.items import Item
from ..data.views import View, ViewSet, crop_positions, salient_crop
from ..errors import DataError
from .batches import BatchPlan, regularisation_repeats


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image as it is shown once."""

    view: View
    caption: str
    weight: float
    """What its loss is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Everything that a run shows. What it shows when is a function of the seed and the step, and of nothing else."""

    items: tuple[Item, ...]
    """Of all roles; a view's ``item`` is a place in here."""
    shown: tuple[ViewSet, ...]
    """Training and regularisation images, each at each resolution."""
    weights: tuple[float, ...]
    """Of the loss, for each of ``shown``."""
    batches: BatchPlan
    """Its numbers are places in ``shown``."""
    validation: tuple[View, ...]
    """Never trained on."""

    def batch(self, step: int) -> tuple[Sample, ...]:
        """What is shown in ``step`` (from 0)."""
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
        """Those that the first ``steps`` steps show, ordered by image, so that each need be opened once."""
        possible = sum(len(views.all()) for views, times in zip(self.shown, self.batches.repeats, strict=True) if times)
        found: set[View] = set()
        for step in range(steps):
            for showing in self.batches.batch(step):
                found.add(self.shown[showing.number].draw(seed=self.batches.seed, turn=showing.turn))
            if len(found) == possible:
                break
        return tuple(sorted(found, key=lambda view: (view.item, view.placement, view.flipped)))

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of training images, one for each at each resolution; a random crop's is the centred one."""
        return tuple(
            views.placements[len(views.placements) // 2]
            for views in self.shown
            if self.items[views.item].source.role == "train"
        )


def plan_training_set(
    items: Sequence[Item],
    rules: Sequence[BucketRules],
    data: DataSection,
    *,
    batch_size: int,
    seed: int,
    prior_loss_weight: float,
) -> TrainingSet:
    """Place every image at every resolution, and say how often it is shown and what its loss weighs.

    Raises:
        DataError: there is nothing to train on, or an image can no longer be read.
    """
    if not any(item.source.role == "train" for item in items):
        raise DataError("no image to train on: every one is for regularisation or validation")
    often = {own.resolution: _repeats(items, own.resolution) for own in rules}
    shown, weights, repeats, validation = [], [], [], []
    for number, (item, placed) in enumerate(zip(items, _placed(items, rules, data), strict=True)):
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


def _repeats(items: Sequence[Item], resolution: int) -> dict[int, int]:
    """How often each training and regularisation image is shown in an epoch at ``resolution``, if it is at all."""
    times: dict[str, dict[int, int]] = {"train": {}, "regularisation": {}, "validation": {}}
    for number, item in enumerate(items):
        if item.source.shown_at(resolution):
            times[item.source.role][number] = item.source.repeats
    regularisation = times["regularisation"]
    fill = regularisation_repeats(sum(times["train"].values()), list(regularisation.values()))
    return times["train"] | dict(zip(regularisation, fill, strict=True))


def _placed(items: Sequence[Item], rules: Sequence[BucketRules], data: DataSection) -> list[dict[int, Placement]]:
    """For each image, its placement at each resolution that it is shown at."""

    def place(item: Item) -> dict[int, Placement]:
        centred = {
            own.resolution: own.place(item.width, item.height) for own in rules if item.source.shown_at(own.resolution)
        }
        if item.source.crop != "salient" or not any(placement.cut_off for placement in centred.values()):
            return centred
        image = open_image(item.source.file, data.alpha_background)
        return {resolution: salient_crop(image, placement) for resolution, placement in centred.items()}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(place, items))
