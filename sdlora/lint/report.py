"""The report of ``sdlora lint`` as a record, as text and as JSON: findings, tags and buckets of a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..config.sections import DataSection
from ..data.buckets import BucketUse, Placement, bucket_table
from ..data.examine import ExaminedImage
from ..data.findings import SEVERITIES, Finding, Severity
from ..data.sources import Listing
from .caption_checks import tag_counts
from .dataset import ExaminedDataset

_IN_SUMMARY = 3
"""Findings of one code that a summary writes out; it counts the others."""
_IN_REPORT = 20
"""Findings of one code that a full report writes out."""
_TAGS = 12
"""Tags that a full report lists."""


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """A view of an examined dataset."""

    dataset: ExaminedDataset

    @property
    def images(self) -> int:
        """Number of image files that were found, readable or not."""
        return len(self.dataset.listing.sources)

    @property
    def base(self) -> str:
        """Name of the base that the data are for."""
        return self.dataset.base.name

    @property
    def resolution(self) -> int:
        """Side in pixels of the square bucket's area; the largest of several."""
        return self.dataset.resolution

    @property
    def data(self) -> DataSection:
        """The settings by which the data were read."""
        return self.dataset.data

    @property
    def listing(self) -> Listing:
        """Every image file that was found, with its captions."""
        return self.dataset.listing

    @property
    def examined(self) -> tuple[ExaminedImage, ...]:
        """Images that can be decoded."""
        return self.dataset.images

    @property
    def placements(self) -> tuple[Placement, ...]:
        """One for each of ``examined``."""
        return self.dataset.placements

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Errors first."""
        return self.dataset.findings

    @cached_property
    def tags(self) -> tuple[tuple[str, int], ...]:
        """Each tag and the number of training images that have it, frequent ones first."""
        return tag_counts(self.listing.sources)

    @cached_property
    def buckets(self) -> tuple[BucketUse, ...]:
        """Buckets of the images that are trained on."""
        pairs = zip(self.examined, self.placements, strict=True)
        return bucket_table(placement for image, placement in pairs if image.source.role != "validation")

    def count(self, severity: Severity) -> int:
        """Number of findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        """Whether a finding forbids training."""
        return self.count("error") > 0

    def to_json(self) -> dict[str, Any]:
        """What ``sdlora lint --json`` prints."""
        return {
            "images": self.images,
            "findings": [asdict(finding) for finding in self.findings],
            "counts": {f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "tags": dict(self.tags),
            "base": self.base,
            "resolution": self.resolution,
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }


def summary_lines(report: LintReport) -> list[str]:
    """The report in short, for the start of a run: counts, then errors and warnings, a few of each code."""
    lines = [_headline(report)]
    for severity in ("error", "warning"):
        for group in _by_code(report, severity):
            lines += [f"{severity}: {finding}" for finding in group[:_IN_SUMMARY]]
            if len(group) > _IN_SUMMARY:
                more = len(group) - _IN_SUMMARY
                lines.append(f"{severity}: {group[0].code}: {more} more; `sdlora lint` lists them all")
    return lines


def report_lines(report: LintReport) -> list[str]:
    """The full report as text: findings by code, tags, buckets."""
    lines = [_headline(report)]
    for severity in SEVERITIES:
        for group in _by_code(report, severity):
            lines += ["", f"{severity} {group[0].code} ({len(group)})"]
            remedies = {finding.remedy for finding in group}
            for finding in group[:_IN_REPORT]:
                line = f"  {finding.file or 'dataset'}: {finding.message}"
                lines.append(line if len(remedies) == 1 else f"{line}; {finding.remedy}")
            if len(group) > _IN_REPORT:
                lines.append(f"  and {len(group) - _IN_REPORT} more; --json lists them all")
            if len(remedies) == 1:
                lines.append(f"  -> {group[0].remedy}")
    return [*lines, *_tag_lines(report), *_bucket_lines(report)]


def _headline(report: LintReport) -> str:
    counts = ", ".join(
        f"{count} {severity}{'s' * (count != 1)}" for severity in SEVERITIES if (count := report.count(severity))
    )
    roles = Counter(image.source.role for image in report.examined)
    parts = "".join(f", {roles[role]} for {role}" for role in ("regularisation", "validation") if roles[role])
    return f"{report.images} image{'s' * (report.images != 1)}{parts}: {counts or 'no problems found'}"


def _by_code(report: LintReport, severity: Severity) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.severity == severity:
            groups.setdefault(finding.code, []).append(finding)
    return list(groups.values())


def _tag_lines(report: LintReport) -> Iterator[str]:
    shared = [(tag, count) for tag, count in report.tags if count > 1][:_TAGS]
    if shared:
        yield ""
        yield "number of images with each tag"
        yield from (f"  {count:>6}  {tag}" for tag, count in shared)


def _bucket_lines(report: LintReport) -> Iterator[str]:
    if report.buckets:
        yield ""
        yield f"buckets for {report.base} at {report.resolution}, and the share of an image that they cut off"
        yield f"  {'size':>11}  {'images':>8}  {'mean':>5}  {'worst':>5}"
        for bucket in report.buckets:
            size = f"{bucket.width} x {bucket.height}"
            yield f"  {size:>11}  {bucket.count:>8}  {bucket.mean_cut:>5.0%}  {bucket.worst_cut:>5.0%}"
