"""The record of a dataset that was listed, decoded, placed and checked once; reports and plans are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.sections import DataSection
from ..data.buckets import BucketRules, Placement
from ..data.examine import ExaminedImage
from ..data.findings import Finding
from ..data.kept_images import KeptImages
from ..data.sources import Listing

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint


@dataclass(frozen=True, kw_only=True)
class ExaminedDataset:
    """Every image of a dataset as a run on ``base`` would use it, and every finding."""

    base: BaseCheckpoint
    data: DataSection
    """With every folder of images in ``sets``."""
    rules: tuple[BucketRules, ...]
    """One for each resolution."""
    listing: Listing
    images: tuple[ExaminedImage, ...]
    """Those that can be decoded."""
    placements: tuple[Placement, ...]
    """One for each of ``images``, at the largest resolution at which it is shown."""
    findings: tuple[Finding, ...]
    """Findings about files, images, captions and triggers; errors first."""
    kept: KeptImages
    """Decoded images that need not be decoded again."""

    @property
    def resolution(self) -> int:
        """Side in pixels of the square bucket's area; the largest of several."""
        return max(rules.resolution for rules in self.rules)
