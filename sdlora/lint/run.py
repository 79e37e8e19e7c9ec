"""Examining a dataset, for ``lint`` and for a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.words import Words, clip_words, words_in
from ..config.kohya_dataset import is_kohya_dataset
from ..config.loading import load_config, load_dataset
from ..config.resolve import resolve_config, resolve_data
from ..config.sections import BaseSection, Config, DataSection
from ..config.toml_file import parse_value
from ..data.buckets import BucketRules, bucket_rules
from ..data.examine import ExaminedImage, examine_images
from ..data.kept_images import KEPT_BYTES, KeptImages
from ..data.sources import find_sources
from ..errors import ConfigError
from ..progress import Progress, progress_or_bar
from .checks import check_all
from .dataset import ExaminedDataset
from .report import LintReport

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint


def lint_dataset(
    dataset: str | Path | Config,
    *,
    trigger: str | None = None,
    resolution: int | None = None,
    caption_extension: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
) -> LintReport:
    """Check a folder of images, a configuration file, or a configuration, as ``sdlora lint`` does.

    Args:
        trigger, resolution, caption_extension, base: override what a file says; a ``Config`` has its own.
        progress: by default a bar on standard error, if that is a terminal.

    Raises:
        SdloraError: a configuration or base that cannot be used. Faults of the images are findings of the report.
    """
    with progress_or_bar(progress) as reporting:
        if isinstance(dataset, Config):
            return lint_data(resolve_config(dataset).data, dataset.base, progress=reporting)
        data, section = linted_sections(
            [str(dataset)], trigger=trigger, resolution=resolution, caption_extension=caption_extension, base=base
        )
        return lint_data(data, section, progress=reporting)


def lint_data(data: DataSection, base: BaseSection, *, progress: Progress) -> LintReport:
    """Check the images of ``data`` as a run on ``base`` would use them.

    Raises:
        BaseModelError: ``base`` cannot be used.
        ConfigError: sizes that ``base`` cannot have, or a table of captions that cannot be read.
    """
    # Imported here since it brings torch: wrong arguments are reported without it.
    from ..base.checkpoint import find_base

    data = resolve_data(data)
    kept = KeptImages(data.alpha_background, limit=0)
    return LintReport(dataset=_examine(data, find_base(base), kept, progress))


def examine_dataset(config: Config, *, progress: Progress, base: BaseCheckpoint | None = None) -> ExaminedDataset:
    """List, decode and check everything that ``config`` trains on; decoded images are kept for their encoding.

    Args:
        base: what ``find_base`` returned for ``config.base``, if it was called already.

    Raises:
        BaseModelError: ``config.base`` cannot be used.
        ConfigError: sizes that the base cannot have, or a table of captions that cannot be read. Faults of the images
            are findings.
    """
    from ..base.checkpoint import find_base

    base = base or find_base(config.base)
    data = resolve_config(config).data
    return _examine(data, base, KeptImages(data.alpha_background, limit=KEPT_BYTES), progress)


def _examine(data: DataSection, base: BaseCheckpoint, kept: KeptImages, progress: Progress) -> ExaminedDataset:
    rules = bucket_rules(data, resolution=base.resolution, step=base.size_step)
    listing = find_sources(data)
    images, unusable = examine_images(listing.sources, mask=data.mask, kept=kept, progress=progress)
    placements = tuple(_largest(rules, image).place(image.width, image.height) for image in images)
    findings = check_all(
        listing.sources,
        images,
        placements,
        found=(*listing.findings, *unusable),
        data=data,
        vocabulary=_vocabulary(base),
        clip=clip_words(),
    )
    return ExaminedDataset(
        base=base,
        data=data,
        rules=rules,
        listing=listing,
        images=images,
        placements=placements,
        findings=findings,
        kept=kept,
    )


def _largest(rules: Sequence[BucketRules], image: ExaminedImage) -> BucketRules:
    """Rules of the largest resolution that ``image`` has: what is too small for the others is too small for it."""
    shown = [rule for rule in rules if image.source.shown_at(rule.resolution)]
    return max(shown, key=lambda rule: rule.resolution)


def _vocabulary(checkpoint: BaseCheckpoint) -> Words:
    """Words of the first text encoder; the second one of SDXL counts the same."""
    folder = checkpoint.tokenizers[checkpoint.family.text_encoders[0].part]
    return clip_words() if folder is None else words_in(folder)


def linted_sections(
    arguments: Sequence[str],
    *,
    trigger: str | None = None,
    resolution: int | None = None,
    caption_extension: str | None = None,
    base: str | None = None,
) -> tuple[DataSection, BaseSection]:
    """Sections of the configuration that ``arguments`` name: as ``sdlora lint`` has them, all of which may be
    ``section.key=value``. The first may be a folder of images, a configuration file, or a kohya dataset file.

    A folder without ``trigger`` is checked without one. The options override what a file says.

    Raises:
        ConfigError: a file, key or value that is wrong.
    """
    target, overrides = _target_of(arguments)
    options: dict[str, object] = {
        "data.trigger": trigger,
        "data.resolution": resolution,
        "data.caption_extension": caption_extension,
        "base.path": base,
    }
    overrides += [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None
    ]
    if target is None:
        return load_dataset(None, overrides)
    path = Path(target).expanduser()
    is_kohya = path.is_file() and is_kohya_dataset(path)
    if target.endswith(".toml") and not path.is_dir() and not is_kohya:
        config = load_config(target, overrides)
        return config.data, config.base
    key = "data.dataset_config" if is_kohya else "data.images"
    for name, _, value in (override.partition("=") for override in overrides):
        if name.strip() == key and parse_value(value.strip()) != target:
            raise ConfigError(
                f"{target} and {key}={parse_value(value.strip())} contradict each other; keep one of them"
            )
    return load_dataset(None, [*overrides, f"{key}={json.dumps(target, ensure_ascii=False)}"])


def _target_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """What ``arguments`` name, None where they are settings alone; and the settings."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).expanduser().exists()):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)
