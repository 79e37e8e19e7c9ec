"""A first configuration as TOML with comments, for people to read and change."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.locations import from_folder
from ..config.presets import MINI, PRESET_TITLES
from ..config.toml_text import shown
from ..files import printable
from ..lint.report import LintReport, summary_lines
from .explain import ExplainedSetting, explain
from .first_config import FirstConfig
from .samples import sample_prompts

SHOWN = (
    *(
        "data.resolution",
        "data.caption_extension",
        "data.shuffle_tags",
        "data.flip",
        "data.mask",
        "data.caption_dropout",
    ),
    *("lora.kind", "optimizer.name", "optimizer.schedule", "objective.noise_offset"),
    *("train.steps", "train.batch_size", "train.precision", "train.seed"),
    *("samples.prompts", "samples.every", "output.save_every_epochs", "output.log"),
)
"""Settings that are shown besides those that are stated or a preset's; all others: ``sdlora settings``."""
_PLACES = ("base.path", "data.images", "output.path")
_WIDTH = 110


def config_text(first: FirstConfig, file: Path) -> str:
    """The content of ``file``: what ``first`` states, and the other values that matter as comments.

    Paths in it go by its folder.
    """
    lines = [*_head(first, file), ""]
    values = [setting for setting in explain(first.loaded, first.plan) if _is_shown(setting)]
    section = ""
    for setting in values:
        its_section, _, key = setting.name.rpartition(".")
        if its_section != section:
            lines += ["", f"[{its_section}]"]
            section = its_section
        lines += _lines(setting, key, first, file)
    return "\n".join(lines) + "\n"


def _is_shown(setting: ExplainedSetting) -> bool:
    return setting.origin in ("stated", "preset") or setting.name in SHOWN


def _head(first: FirstConfig, file: Path) -> Iterator[str]:
    name = file.name
    yield "# Written by sdlora init. What is after a # is a remark, or the value in force: remove the # to change it."
    yield from _comment(
        f"  sdlora train {name}", f"  sdlora plan {name} --gpu 8     time, memory and disk before it starts"
    )
    yield from _comment(f"  sdlora train {name} --explain     every setting, and where its value comes from", "")
    yield from _comment(*described(first.report), f"Length: {first.plan.length_in_words}")
    images = first.loaded.config.data.images or ""
    here = from_folder(images, file.parent)
    # Paths of findings begin with the folder as it was named; a file names no folder above its own images.
    yield from _comment(*(line.replace(printable(Path(images)), here) for line in summary_lines(first.report)))


def described(report: LintReport) -> list[str]:
    """What the images are, in two lines."""
    sizes = sorted((image.width * image.height, image.width, image.height) for image in report.examined)
    smallest, largest = (f"{width} x {height}" for _, width, height in (sizes[0], sizes[-1]))
    extent = smallest if smallest == largest else f"{smallest} to {largest}"
    captioned = sum(any(image.source.captions) for image in report.examined)
    buckets = ", ".join(f"{bucket.width} x {bucket.height} ({bucket.count})" for bucket in report.buckets)
    return [
        f"Images: {len(report.examined)}, {extent} pixels, {captioned} with captions",
        f"Buckets at {report.resolution}: {buckets}",
    ]


def _lines(setting: ExplainedSetting, key: str, first: FirstConfig, file: Path) -> Iterator[str]:
    value: Any = setting.value
    if setting.name in _PLACES and value != MINI:
        value = from_folder(value, file.parent)
    if setting.name == "samples.prompts" and value is None:
        value = sample_prompts(first.plan)
    if setting.name == "preset":
        yield from _comment(*(f"{name}: {title}" for name, title in PRESET_TITLES.items()))
    elif setting.name not in _PLACES:
        yield from _comment(*textwrap.wrap(_first_sentence(setting.documentation), _WIDTH))
        if setting.origin != "default":
            yield from _comment(*textwrap.wrap(f"From: {setting.source}.", _WIDTH))
    mark = "" if setting.origin == "stated" else "# "
    yield f"{mark}{key} = {shown(value)}"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s+(?=[A-Z])", text)[0]


def _comment(*lines: str) -> Iterator[str]:
    for line in lines:
        yield f"# {_plain(line)}".rstrip()


def _plain(text: str) -> str:
    """``text`` on one line, without what a comment of TOML cannot hold."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def answer(first: FirstConfig, file: Path) -> Mapping[str, Any]:
    """What ``sdlora init --json`` prints."""
    return {
        "config": str(file),
        "preset": first.loaded.config.preset,
        "trigger": first.loaded.config.trigger,
        "steps": first.plan.steps,
        **first.report.to_json(),
    }
