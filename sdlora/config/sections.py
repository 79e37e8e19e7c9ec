"""The configuration of a training run: one frozen section for each concern, from TOML and ``section.key=value``."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import get_args

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from .base_section import BaseSection, CacheSection
from .data_section import DataSection, ImageSettings, MaskKind, SetSection
from .lora_section import LoraSection
from .objective_section import ObjectiveSection
from .optimizer_section import OptimizerSection
from .output_section import OutputSection
from .presets import PresetName
from .samples_section import SamplesSection
from .setting import Affects, Section, setting_of
from .train_section import TrainSection
from .validation_section import ValidationSection

__all__ = [
    "SECTION_NAMES",
    "TOP_LEVEL",
    "BaseSection",
    "CacheSection",
    "Config",
    "DataSection",
    "DatasetConfig",
    "LoraSection",
    "MaskKind",
    "ObjectiveSection",
    "OptimizerSection",
    "OutputSection",
    "SamplesSection",
    "Section",
    "SetSection",
    "TrainSection",
    "ValidationSection",
]


MISSING_TRIGGER = "data.trigger is missing; name the trigger word: --trigger WORD"
NOT_DETERMINISTIC = (
    'train.deterministic = true is not possible with base.attention = "xformers"; set base.attention to "sdpa", or '
    "train.deterministic to false"
)


class DatasetConfig(Section):
    """A configuration of which only the dataset and the base are used: it needs neither a trigger word nor an output."""

    preset: PresetName = "none"
    """Values for what is trained, where nothing else is stated; they depend on the base. A run with the same values is the
    same run. ``sdlora train --images`` on mini, without a file, takes ``style``."""
    base: BaseSection = BaseSection()
    data: DataSection
    cache: CacheSection = CacheSection()
    lora: LoraSection = LoraSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    samples: SamplesSection = SamplesSection()
    validation: ValidationSection = ValidationSection()
    output: OutputSection | None = None


class Config(DatasetConfig):
    """A training run. Sections left out take their defaults; ``data`` and ``output`` are needed."""

    output: OutputSection

    @property
    def trigger(self) -> str:
        """The trigger word, which every run has."""
        assert self.data.trigger is not None
        return self.data.trigger

    @model_validator(mode="after")
    def _has_a_trigger(self) -> Config:
        if self.data.trigger is None:
            raise PydanticCustomError("settings", "{problems}", {"problems": MISSING_TRIGGER})
        return self

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Config:
        if self.train.deterministic and self.base.attention == "xformers":
            raise PydanticCustomError("settings", "{problems}", {"problems": NOT_DETERMINISTIC})
        return self

    def flat(self, affecting: Collection[Affects] = get_args(Affects)) -> dict[str, str]:
        """``section.key`` -> value as JSON, sorted, of the settings that affect one of ``affecting``.

        A set is written without what it does not state and without what is the same in ``[data]``.
        """
        settings = {}
        for name in sorted(SECTION_NAMES):
            section = getattr(self, name)
            values = _values(section, affecting)
            if "sets" in values:
                values["sets"] = [_stated(each, section, affecting) for each in section.sets]
            settings |= {f"{name}.{key}": json.dumps(values[key]) for key in sorted(values)}
        return settings


TOP_LEVEL = ("preset",)
"""Keys above all sections."""
SECTION_NAMES = tuple(name for name in Config.model_fields if name not in TOP_LEVEL)


def _values(section: Section, affecting: Collection[Affects]) -> dict[str, object]:
    """Key -> value as JSON has it, of the settings of ``section`` that affect one of ``affecting``."""
    keys = {key for key, field in type(section).model_fields.items() if setting_of(field).affects in affecting}
    return section.model_dump(mode="json", include=keys)


def _stated(section: SetSection, data: DataSection, affecting: Collection[Affects]) -> dict[str, object]:
    """What ``section`` adds to ``data``: neither None nor an image setting of the same value."""
    shared = _values(data, affecting)
    return {
        key: value
        for key, value in _values(data.complete(section), affecting).items()
        if value is not None and not (key in ImageSettings.model_fields and shared[key] == value)
    }
