"""The first configuration of a folder of images, chosen by looking at them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from ..base.words import clip_words
from ..config.loading import load_stated
from ..config.sections import DataSection, SetSection
from ..config.written import LoadedConfig
from ..data.caption_files import CAPTION_EXTENSIONS
from ..data.findings import raise_errors
from ..data.sources import Source, find_sources
from ..errors import ConfigError
from ..lint.caption_checks import COMMON_RANK, check_trigger
from ..lint.image_checks import ENLARGED
from ..lint.report import LintReport
from ..lint.run import lint_data
from ..progress import Progress
from .plan import RunPlan, plan_run

SHARED = 0.9
"""Share of the captions that have a word in common which may be the trigger."""
SHORTEST = 3
"""Letters of such a word, at least."""
STEP = 64
"""Pixels that a suggested resolution is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """What was chosen for a folder of images, and what that would train."""

    loaded: LoadedConfig
    """Where each value is stated is the reason for it."""
    report: LintReport
    plan: RunPlan
    """The run as it is once the errors of ``report`` are fixed."""


def first_config(
    folder: Path,
    *,
    file: Path,
    base: str,
    preset: str,
    trigger: str | None,
    progress: Progress,
) -> FirstConfig:
    """Look at the images in ``folder`` and choose what a configuration has to state; all else is the preset's.

    Args:
        file: the configuration that it is for; the output is named after it.
        trigger: None for a word that the captions have in common, or else one that is made up.

    Raises:
        ConfigError: ``base`` or ``preset`` is wrong.
        BaseModelError: ``base`` cannot be used.
        DataError: the folder has no image that can be trained on.
    """
    images = str(folder)
    extension, masked = _caption_extension(images), _has_masks(images)
    sources = _sources(images, extension)
    word, why = (
        (trigger, "named by --trigger") if trigger is not None else choose_trigger(sources, folder.resolve().name)
    )
    stated: dict[str, tuple[object, str]] = {
        "preset": (preset, "what it is for"),
        "base.path": (base, "the base"),
        "data.images": (images, "the images"),
        "data.trigger": (word, why),
        "output.path": (str(file.with_name("out") / f"{file.stem}.safetensors"), "the file that is written"),
    }
    if extension != DataSection.model_fields["caption_extension"].default:
        stated["data.caption_extension"] = (extension, f"most images have a caption in NAME{extension}")
    if masked:
        stated["data.mask"] = ("files", "there are masks")
    loaded = _loaded(stated)
    report = lint_data(loaded.config.data, loaded.config.base, progress=progress)
    if not report.examined:
        raise_errors(report.findings)
    side = _smaller_resolution(report)
    if side is not None:
        stated["data.resolution"] = (side, f"most images are smaller than {report.resolution} x {report.resolution}")
        loaded = _loaded(stated)
        report = lint_data(loaded.config.data, loaded.config.base, progress=progress)
    return FirstConfig(loaded=loaded, report=report, plan=plan_run(loaded.config, replace(report.dataset, findings=())))


def choose_trigger(sources: Sequence[Source], name: str) -> tuple[str, str]:
    """A trigger for images with these captions, and why: a rare word in most of them, or one made up from ``name``.

    Rare is what CLIP's vocabulary has not as one token, or has among its last.
    """
    captions = [" ".join(source.captions) for source in sources if any(source.captions)]
    spelled: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in captions:
        words = re.findall(r"[^\W_]+(?:[-_][^\W_]+)*", caption)
        counts.update({word.lower() for word in words})
        for word in words:
            spelled.setdefault(word.lower(), word)
    shared = [word for word in spelled if counts[word] >= max(2, SHARED * len(captions)) and _is_rare(word)]
    if shared:
        word = max(shared, key=lambda each: counts[each])
        return spelled[word], f"a rare word in {counts[word]} of {len(captions)} captions"
    return _made_up(name, taken=spelled), "made up: a word that nothing else means, put in front of each caption"


def _is_rare(word: str) -> bool:
    rank = clip_words().rank(word)
    return len(word) >= SHORTEST and not word.isdigit() and (rank is None or rank > COMMON_RANK)


def _made_up(name: str, *, taken: Mapping[str, str]) -> str:
    """A short word that reminds of ``name``, means nothing to CLIP, and is in no caption."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    made = (letters[:length] + end for length in (4, 3, 2, 0) for end in ("zor", "quix", "vrel", "zorb"))
    usable = (word for word in made if _is_rare(word) and word not in taken)
    return next(word for word in usable if not any(check_trigger(word, name, clip_words())))


def _sources(images: str, extension: str, mask: str = "none") -> Sequence[Source]:
    data = DataSection.model_validate({"images": images, "caption_extension": extension, "mask": mask})
    return find_sources(data).sources


def _caption_extension(images: str) -> str:
    """The extension with which most images have a caption; the default where there are none, or as many."""
    usual = SetSection.model_fields["caption_extension"].default
    found = {
        extension: sum(bool(source.captions) for source in _sources(images, extension))
        for extension in (usual, *(each for each in CAPTION_EXTENSIONS if each not in (usual, ".json")))
    }
    return max(found, key=lambda extension: found[extension])


def _has_masks(images: str) -> bool:
    extension = DataSection.model_fields["caption_extension"].default
    return any(source.mask for source in _sources(images, extension, "files"))


def _smaller_resolution(report: LintReport) -> int | None:
    """The resolution that most images have, where that of the base would enlarge them; at least half of it."""
    sides = [(image.width * image.height) ** 0.5 for image in report.examined]
    usual = median(sides)
    if usual * ENLARGED >= report.resolution:
        return None
    side = max(int(usual) // STEP * STEP, report.resolution // 2)
    return side if side < report.resolution else None


def _loaded(stated: Mapping[str, tuple[object, str]]) -> LoadedConfig:
    """The configuration that states this, checked as a file is."""
    settings = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, (value, _) in stated.items()]
    return load_stated(None, settings, {name: why for name, (_, why) in stated.items()})


def check_new_config(file: Path) -> None:
    """Raise ``ConfigError`` where ``file`` is there already, or is no TOML file."""
    if file.suffix != ".toml":
        raise ConfigError(f"{file}: the name of the configuration must end in .toml")
    if file.exists():
        raise ConfigError(f"{file}: exists already; choose another name with --out, or remove it")
