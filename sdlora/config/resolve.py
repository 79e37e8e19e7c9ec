"""The configuration as every stage of a run reads it: kohya's dataset configuration read, every set complete."""

from __future__ import annotations

from ..families import Family
from .kohya_dataset import read_dataset_config
from .sections import Config, DataSection, SetSection, TrainSection


def resolve_config(config: Config, family: Family | None = None) -> Config:
    """``config`` with resolved ``data`` and ``train``; resolving it again changes nothing.

    With the ``family`` of the base, the defaults that depend on it are resolved too.

    Raises:
        ConfigError: ``data.dataset_config`` is at fault.
    """
    data, train = _resolve(config.data, config.train)
    optimizer = config.optimizer
    if family is not None:
        rates = optimizer.text_encoder_rates(family)
        same = rates == (rates[0],) * len(family.text_encoders)
        optimizer = optimizer.model_copy(update={"text_encoder_learning_rate": rates[0] if same else rates})
    return config.model_copy(update={"data": data, "train": train, "optimizer": optimizer})


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
