"""Every effective setting of a run: its value, where the value comes from, what it does."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..config.catalogue import SettingFacts, all_settings
from ..config.presets import PresetValue
from ..config.resolve import preset_in, resolve_config
from ..config.sections import SECTION_NAMES, TOP_LEVEL, Config
from ..config.toml_text import shown
from ..config.written import LoadedConfig
from .plan import RunPlan

Origin = Literal["stated", "preset", "dataset", "base", "images", "default"]
"""What a value comes from: the configuration or the command line; a preset; kohya's dataset configuration; the base
checkpoint; the images; or nothing but the default."""
_AS_STATED = ("data.images", "data.metadata", "data.sets", "data.dataset_config")
"""Shown as the configuration has them: a plan has all of them in ``data.sets``."""
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class ExplainedSetting:
    """One setting of a run."""

    name: str
    """``section.key``."""
    value: Any
    """As JSON has it."""
    origin: Origin
    source: str
    """The place or reason, in words."""
    documentation: str
    values: str
    """Which values are possible."""


def explain(loaded: LoadedConfig, plan: RunPlan) -> tuple[ExplainedSetting, ...]:
    """Every setting of ``plan``, which was made from ``loaded``, in the order of the reference."""
    sources = _Sources.of(loaded, plan)
    given, effective = loaded.config.flat(), plan.config.flat()
    found = []
    for setting in all_settings():
        if setting.section not in SECTION_NAMES and setting.name not in TOP_LEVEL:
            continue
        if setting.name in TOP_LEVEL:
            value = getattr(plan.config, setting.name)
        else:
            value = json.loads((given if setting.name in _AS_STATED else effective)[setting.name])
        if setting.name == "data.resolution" and value is None and plan.config.data.sides == ():
            value = plan.resolution
        origin, source = sources.origin(setting, value)
        found.append(
            ExplainedSetting(
                name=setting.name,
                value=value,
                origin=origin,
                source=source,
                documentation=setting.documentation.replace("``", ""),
                values=setting.values,
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """What the values of a run can come from."""

    loaded: LoadedConfig
    plan: RunPlan
    dataset: Config
    """``loaded.config`` with what kohya's dataset configuration says."""
    preset: dict[str, PresetValue]

    @classmethod
    def of(cls, loaded: LoadedConfig, plan: RunPlan) -> _Sources:
        dataset = resolve_config(loaded.config)
        values = {value.setting: value for value in preset_in(dataset, plan.base.family)}
        return cls(loaded=loaded, plan=plan, dataset=dataset, preset=values)

    def origin(self, setting: SettingFacts, value: Any) -> tuple[Origin, str]:
        """What ``value``, the effective one of ``setting``, comes from."""
        name = setting.name
        config, base = self.loaded.config, self.plan.base
        if where := self.loaded.stated.get(name):
            return "stated", where
        if name in self.preset:
            return "preset", f"preset {config.preset} for {base.name}: {self.preset[name].source}"
        if name in TOP_LEVEL or name in _AS_STATED:
            return "default", "default"
        section = getattr(self.dataset, setting.section)
        if setting.key in section.model_fields_set and section is not getattr(config, setting.section):
            return "dataset", str(config.data.dataset_config)
        if name == "data.resolution":
            return "base", f"{base.name}, {base.family.title}"
        if name == "optimizer.text_encoder_learning_rate":
            return "base", base.family.title
        if name == "train.steps" and value != setting.default:
            return "images", f"{self.plan.images} images, {self.plan.batches.batches_per_epoch} steps an epoch"
        return "default", "default"


def explained_lines(settings: tuple[ExplainedSetting, ...]) -> Iterator[str]:
    """The explanation as text: sections, and each setting with its value, its source, and what it does."""
    section = None
    for setting in settings:
        its_section, _, key = setting.name.rpartition(".")
        if its_section != section:
            section = its_section
            yield from ["", f"[{section}]"] if section else []
        yield f"{key} = {shown(setting.value)}"
        yield from _indented(f"from: {setting.source}")
        yield from _indented(setting.documentation)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def explained_json(settings: tuple[ExplainedSetting, ...]) -> dict[str, Any]:
    """What ``sdlora train --explain --json`` prints."""
    return {"settings": [asdict(setting) for setting in settings]}
