"""The configuration as every stage of a run reads it: kohya's dataset configuration read, every set complete."""

from __future__ import annotations

from ..families import Family
from .kohya_dataset import read_dataset_config
from .optimizer_rules import finds_its_rate
from .presets import MINI, PresetValue, preset_values, unstated
from .sections import SECTION_NAMES, Config, DataSection, SetSection, TrainSection


def resolve_config(config: Config, family: Family | None = None) -> Config:
    """``config`` with resolved ``data`` and ``train``; resolving it again changes nothing.

    With the ``family`` of the base, the preset and the defaults that depend on it are resolved too.

    Raises:
        ConfigError: ``data.dataset_config`` is at fault.
    """
    data, train = _resolve(config.data, config.train)
    config = config.model_copy(update={"data": data, "train": train})
    if family is None:
        return config
    config = _with_values(config, preset_in(config, family))
    rates = config.optimizer.text_encoder_rates(family)
    same = rates == (rates[0],) * len(family.text_encoders)
    optimizer = config.optimizer.model_copy(update={"text_encoder_learning_rate": rates[0] if same else rates})
    return config.model_copy(update={"optimizer": optimizer})


def preset_in(config: Config, family: Family) -> tuple[PresetValue, ...]:
    """The values that ``config.preset`` has for a base of ``family`` and ``config`` does not state."""
    stated = {
        f"{name}.{key}"
        for name in SECTION_NAMES
        for key in getattr(config, name).model_fields_set
        if getattr(getattr(config, name), key) is not None
    }
    if finds_its_rate(config.optimizer.name):
        stated |= {"optimizer.learning_rate", "optimizer.text_encoder_learning_rate"}
    base = MINI if config.base.path == MINI else family.name
    return tuple(unstated(preset_values(config.preset, base), stated, rank=config.lora.rank))


def _with_values(config: Config, values: tuple[PresetValue, ...]) -> Config:
    for value in values:
        section, _, key = value.setting.partition(".")
        changed = getattr(config, section).model_copy(update={key: value.value})
        config = config.model_copy(update={section: changed})
    return config


def resolve_data(data: DataSection) -> DataSection:
    """``data`` with every folder in ``sets``, each of which states all image settings.

    Raises:
        ConfigError: ``data.dataset_config`` is at fault.
    """
    return _resolve(data, TrainSection())[0]


def _resolve(data: DataSection, train: TrainSection) -> tuple[DataSection, TrainSection]:
    if data.dataset_config is not None:
        data, train = read_dataset_config(data, train)
    sets = data.sets
    if data.images is not None:
        sets = (SetSection(images=data.images, metadata=data.metadata),)
    complete = tuple(data.complete(section) for section in sets)
    return data.model_copy(update={"images": None, "metadata": None, "sets": complete}), train
