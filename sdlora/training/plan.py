"""Everything that is decided, and every fault that is found, before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..base.checkpoint import BaseCheckpoint, find_base
from ..config import Config
from ..data.batches import BatchPlan
from ..data.buckets import Placement, bucket_sizes, place_in_bucket
from ..data.items import Item, dataset_digest, scan
from ..errors import ConfigError
from .checkpoint import RunIdentity


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that can begin: ``placements[i]`` is where ``items[i]`` is cut out."""

    config: Config
    base: BaseCheckpoint
    resolution: int
    """Side in pixels of the square bucket's area."""
    items: tuple[Item, ...]
    placements: tuple[Placement, ...]
    batches: BatchPlan
    identity: RunIdentity


def plan_run(config: Config) -> RunPlan:
    """Check the base, the pictures and the captions, and place every picture.

    Raises:
        BaseModelError, DataError, ConfigError: with everything that is wrong with that input.
    """
    base = find_base(config.base)
    if config.train.learning_rate == 0 and config.train.text_encoder_learning_rate == 0:
        raise ConfigError(
            "train.learning_rate and train.text_encoder_learning_rate are both 0: nothing would be trained"
        )
    data = config.data
    items = scan(
        Path(data.images),
        trigger=data.trigger,
        caption_extension=data.caption_extension,
        background=data.alpha_background,
    )
    resolution = data.resolution or base.resolution
    sizes = bucket_sizes(resolution, base.size_step)
    placements = tuple(place_in_bucket(item.width, item.height, sizes) for item in items)
    return RunPlan(
        config=config,
        base=base,
        resolution=resolution,
        items=tuple(items),
        placements=placements,
        batches=BatchPlan.of(placements, batch_size=config.train.batch_size, seed=config.train.seed),
        identity=RunIdentity.of(config, dataset=dataset_digest(items), base=base),
    )
