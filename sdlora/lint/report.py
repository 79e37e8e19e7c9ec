"""What ``sdlora lint`` reports: every fault of a dataset, its tags and its buckets, before any weight is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.words import Words, clip_words, words_in
from ..config.loading import load_config, load_dataset
from ..config.resolve import resolve_config, resolve_data
from ..config.sections import BaseSection, Config, DataSection
from ..data.buckets import BucketUse, Placement, bucket_rules, bucket_table
from ..data.findings import Finding, Severity
from ..data.sources import Listing, find_sources
from ..progress import Progress, progress_bar
from .caption_checks import tag_counts
from .checks import examine_all, lint
from .image_checks import Examined

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_EXAMPLES = 3
"""Findings of one code that are written out; the others are counted."""
_SHOWN = 20
"""The same, where all of the report is asked for."""
_TAGS = 12


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """What was found. ``examined`` and ``placements`` go together, one for each image that can be decoded."""

    base: str
    resolution: int
    data: DataSection
    listing: Listing
    examined: tuple[Examined, ...]
    placements: tuple[Placement, ...]
    findings: tuple[Finding, ...]
    """Errors first."""
    tags: tuple[tuple[str, int], ...]
    """How many training images have each tag, frequent ones first."""
    buckets: tuple[BucketUse, ...]

    @property
    def images(self) -> int:
        """Image files that were looked at, whole or not."""
        return len(self.listing.sources)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        return self.count("error") > 0

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "findings": [asdict(finding) for finding in self.findings],
            "counts": {f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "tags": dict(self.tags),
            "base": self.base,
            "resolution": self.resolution,
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }


def linted_sections(
    arguments: Sequence[str],
    *,
    trigger: str | None = None,
    resolution: int | None = None,
    caption_extension: str | None = None,
    base: str | None = None,
) -> tuple[DataSection, BaseSection]:
    """The configuration that ``arguments`` name: a folder of images or a file, and ``section.key=value``.

    A folder without ``trigger`` is looked at without one. The options win over what a file says.

    Raises:
        ConfigError: a file, key or value that is wrong.
    """
    target, overrides = arguments[0], list(arguments[1:])
    options: dict[str, object] = {
        "data.trigger": trigger,
        "data.resolution": resolution,
        "data.caption_extension": caption_extension,
        "base.path": base,
    }
    file = target if target.endswith(".toml") and not Path(target).is_dir() else None
    if file is None:
        options["data.images"] = target
    overrides += [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None
    ]
    if file is None:
        return load_dataset(None, overrides)
    config = load_config(file, overrides)
    return config.data, config.base


def lint_dataset(
    dataset: str | Path | Config,
    *,
    trigger: str | None = None,
    resolution: int | None = None,
    caption_extension: str | None = None,
    base: str | None = None,
    show_progress: bool = True,
) -> LintReport:
    """What ``sdlora lint`` tells: of a folder of images, of a configuration file, or of a configuration.

    Args:
        trigger, resolution, caption_extension, base: instead of what the file says; a ``Config`` has its own.

    Raises:
        SdloraError: a configuration or base that cannot be used. What is wrong with the images is in the report.
    """
    with progress_bar(show_progress) as progress:
        if isinstance(dataset, Config):
            return lint_config(dataset, progress=progress)
        sections = linted_sections(
            [str(dataset)], trigger=trigger, resolution=resolution, caption_extension=caption_extension, base=base
        )
        return lint_data(*sections, progress=progress)


def lint_config(config: Config, *, progress: Progress) -> LintReport:
    """Look through everything that ``config`` trains on; raises what ``lint_data`` raises."""
    config = resolve_config(config)
    return lint_data(config.data, config.base, progress=progress)


def lint_data(data: DataSection, base: BaseSection, *, progress: Progress) -> LintReport:
    """Look through the images of ``data`` as a run on ``base`` would use them.

    Raises:
        BaseModelError: ``base`` cannot be used.
        ConfigError: sizes that ``base`` cannot have, or a table of captions that cannot be read.
    """
    # It brings torch, and what is wrong with the arguments is told without.
    from ..base.checkpoint import find_base

    checkpoint = find_base(base)
    data = resolve_data(data)
    # The largest first: what is too small for the others is too small for it.
    rules = sorted(
        bucket_rules(data, resolution=checkpoint.resolution, step=checkpoint.size_step),
        key=lambda own: own.resolution,
        reverse=True,
    )
    listing = find_sources(data)
    examined, damaged = examine_all(listing.sources, progress)
    largest = [next(rule for rule in rules if own.source.shown_at(rule.resolution)) for own in examined]
    placements = tuple(
        rule.place(own.facts.width, own.facts.height) for rule, own in zip(largest, examined, strict=True)
    )
    findings = lint(
        Listing(sources=listing.sources, findings=(*listing.findings, *damaged)),
        examined,
        placements,
        data=data,
        vocabulary=_vocabulary(checkpoint),
        clip=clip_words(),
    )
    trained = [place for own, place in zip(examined, placements, strict=True) if own.source.role != "validation"]
    return LintReport(
        base=checkpoint.name,
        resolution=rules[0].resolution,
        data=data,
        listing=listing,
        examined=examined,
        placements=placements,
        findings=findings,
        tags=tag_counts(listing.sources),
        buckets=bucket_table(trained),
    )


def summary_lines(report: LintReport) -> list[str]:
    """The report in short, for the start of a run: a count, then each warning, a few of each kind."""
    lines = [_headline(report)]
    for severity in ("error", "warning"):
        for group in _by_code(report, severity):
            lines += [f"{severity}: {finding}" for finding in group[:_EXAMPLES]]
            if len(group) > _EXAMPLES:
                lines.append(
                    f"{severity}: {group[0].code}: {len(group) - _EXAMPLES} more; `sdlora lint` tells them all"
                )
    return lines


def report_lines(report: LintReport) -> list[str]:
    """All of the report, as text: findings by their codes, tags, buckets."""
    lines = [_headline(report)]
    for severity in SEVERITIES:
        for group in _by_code(report, severity):
            lines += ["", f"{severity} {group[0].code} ({len(group)})"]
            remedies = {finding.remedy for finding in group}
            for finding in group[:_SHOWN]:
                line = f"  {finding.file or 'dataset'}: {finding.message}"
                lines.append(line if len(remedies) == 1 else f"{line}; {finding.remedy}")
            if len(group) > _SHOWN:
                lines.append(f"  and {len(group) - _SHOWN} more, which --json tells")
            if len(remedies) == 1:
                lines.append(f"  -> {group[0].remedy}")
    return [*lines, *_tag_lines(report), *_bucket_lines(report)]


def _headline(report: LintReport) -> str:
    counts = ", ".join(
        f"{count} {severity}{'s' * (count != 1)}" for severity in SEVERITIES if (count := report.count(severity))
    )
    roles = Counter(own.source.role for own in report.examined)
    parts = "".join(f", {roles[role]} for {role}" for role in ("regularisation", "validation") if roles[role])
    return f"{report.images} image{'s' * (report.images != 1)}{parts}: {counts or 'nothing to complain of'}"


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
        yield "tags, by the images that have them"
        yield from (f"  {count:>6}  {tag}" for tag, count in shared)


def _bucket_lines(report: LintReport) -> Iterator[str]:
    if report.buckets:
        yield ""
        yield f"buckets for {report.base} at {report.resolution}, and how much of an image they cut off"
        yield f"  {'size':>11}  {'images':>8}  {'mean':>5}  {'worst':>5}"
        for bucket in report.buckets:
            size = f"{bucket.width} x {bucket.height}"
            yield f"  {size:>11}  {bucket.count:>8}  {bucket.mean_cut:>5.0%}  {bucket.worst_cut:>5.0%}"


def _vocabulary(checkpoint: BaseCheckpoint) -> Words:
    """Of its first text encoder; that of SDXL's second counts the same."""
    folder = checkpoint.tokenizers[checkpoint.family.text_encoders[0].part]
    return clip_words() if folder is None else words_in(folder)
