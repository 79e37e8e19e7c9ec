"""Everything that is decided, and every fault that is found, before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.checkpoint import BaseCheckpoint, find_base
from ..config.resolve import resolve_config
from ..config.sections import Config
from ..data.buckets import BucketRules, Placement, bucket_rules
from ..data.findings import Finding, raise_errors
from ..data.items import Item, dataset_digest, load_items
from ..data.sources import find_sources
from ..errors import ConfigError
from ..progress import Progress
from .batches import BatchPlan
from .checkpoint import RunIdentity
from .training_set import TrainingSet, plan_training_set


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that can begin."""

    config: Config
    """With every folder of images in ``data.sets``, and with what ``data.dataset_config`` says."""
    base: BaseCheckpoint
    rules: tuple[BucketRules, ...]
    """Of the buckets, at each resolution."""
    training: TrainingSet
    findings: tuple[Finding, ...]
    """What is worth knowing of the images and captions; none of it is an error."""
    identity: RunIdentity

    @property
    def resolution(self) -> int:
        """Side in pixels of the square bucket's area; the largest of several."""
        return max(rules.resolution for rules in self.rules)

    @property
    def items(self) -> tuple[Item, ...]:
        return self.training.items

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of each training image, at each resolution."""
        return self.training.placements

    @property
    def batches(self) -> BatchPlan:
        return self.training.batches


def plan_run(config: Config, progress: Progress | None = None) -> RunPlan:
    """Check the base, the images and the captions, and place every image.

    Raises:
        BaseModelError, DataError, ConfigError: with everything that is wrong with that input.
    """
    base = find_base(config.base)
    config = resolve_config(config)
    data, train = config.data, config.train
    if config.optimizer.learning_rate == 0 and config.optimizer.text_encoder_learning_rate == 0:
        raise ConfigError(
            "optimizer.learning_rate and optimizer.text_encoder_learning_rate are both 0: nothing would be trained"
        )
    rules = bucket_rules(data, resolution=base.resolution, step=base.size_step)
    listing = find_sources(data)
    items, faults = load_items(listing, background=data.alpha_background, mask=data.mask, progress=progress)
    findings = (*listing.findings, *faults)
    raise_errors(findings)
    training = plan_training_set(
        items,
        rules,
        data,
        batch_size=train.batch_size,
        seed=train.seed,
        prior_loss_weight=config.objective.prior_loss_weight,
    )
    return RunPlan(
        config=config,
        base=base,
        rules=rules,
        training=training,
        findings=(*findings, *_unused_regularisation(training)),
        identity=RunIdentity.of(config, dataset=dataset_digest(items), base=base),
    )


def _unused_regularisation(training: TrainingSet) -> list[Finding]:
    """Kohya's trainer, too, shows no more regularisation images in an epoch than training images."""
    every = {number for number, item in enumerate(training.items) if item.source.role == "regularisation"}
    never = every - {views.item for views, times in zip(training.shown, training.batches.repeats, strict=True) if times}
    if not never:
        return []
    return [
        Finding(
            code="regularisation-unused",
            severity="warning",
            file=None,
            message=f"{len(never)} of {len(every)} regularisation images are never shown: an epoch shows as many as "
            "training images",
            remedy="raise the repeats of the training sets, or remove what is not needed",
        )
    ]
