"""Presets: values for what is trained, for each family of bases, each with its source.

A preset is below everything that a configuration states: defaults, then the preset, then the file, then options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

PresetName = Literal["style", "character", "concept", "none"]
PRESET_TITLES: Mapping[PresetName, str] = {
    "style": "a way of drawing or photographing, whatever is shown",
    "character": "one person, animal or figure in any scene",
    "concept": "an object, a garment, a pose or an action",
}
"""Name of a preset -> what it is for."""
MINI = "mini"
"""The base that has values of its own; other bases have those of their family."""


@dataclass(frozen=True, kw_only=True)
class PresetValue:
    """One value of a preset."""

    setting: str
    """``section.key``."""
    value: Any
    source: str
    """Who recommends it, or how it was measured."""


_MEASURED = "measured on mini's first edition by benchmarks.recipes: 0.7 of the defaults' loss, a clear style"
_NO_TEXT = "measured on mini's first edition by benchmarks.recipes: the loss of 3e-4 to 2e-3, a sixth faster"
_ALL_LEVELS = "measured on mini: min-SNR gives pure noise no weight, where the brightness of a background is decided"
_SUBJECT_KEPT = (
    "measured on mini: as clear a style as with 2e-3, and the subject is recognised more often at half weight"
)
_SUBJECT = "as the style, which was measured; a smaller file for one subject"
_COLAB = "hollowstrawberry/kohya-colab, Lora_Trainer.ipynb"
_COLAB_XL = "hollowstrawberry/kohya-colab, Lora_Trainer_XL.ipynb"
_CIVITAI = "Civitai's trainer for SD 1.5, TrainingParams.tsx"
_CIVITAI_XL = "Civitai's trainer for SDXL, TrainingParams.tsx"
_KOHYA = "kohya's trainer always trains the feed-forward layers too, and so do the recipes that are made for it"
_MIN_SNR = "Hang et al. 2023; kohya-colab and Civitai's trainer have 5 too"
_NO_TEXT_XL = "kohya-colab recommends 0 for a style on SDXL"
_WARMUP = "5 %: hollowstrawberry/kohya-colab, both notebooks"
_CAREFUL = "between OneTrainer's 3e-4 (alpha 1) and kohya_ss' 1e-4: two text encoders and more layers overfit sooner"


def _values(**settings: tuple[Any, str]) -> tuple[PresetValue, ...]:
    """One for each ``section__key=(value, source)``."""
    return tuple(
        PresetValue(setting=name.replace("__", "."), value=value, source=source)
        for name, (value, source) in settings.items()
    )


_SD_SHARED = _values(
    lora__targets=("attention-mlp", _KOHYA),
    optimizer__warmup_steps=(0.05, _WARMUP),
    objective__min_snr_gamma=(5.0, _MIN_SNR),
    train__batch_size=(2, "kohya-colab for SD 1.5; Civitai's trainer for photographs"),
)
_SDXL_SHARED = _values(
    lora__targets=("attention-mlp", _KOHYA),
    optimizer__warmup_steps=(0.05, _WARMUP),
    objective__min_snr_gamma=(5.0, "Hang et al. 2023; Civitai's trainer has 5 too"),
    train__batch_size=(4, "kohya-colab and Civitai's trainer for SDXL"),
)
_SD: Mapping[PresetName, tuple[PresetValue, ...]] = {
    "style": (
        *_values(
            lora__rank=(16, _COLAB),
            lora__alpha=(8.0, _COLAB),
            optimizer__learning_rate=(5e-4, f"{_COLAB}; {_CIVITAI}"),
            optimizer__text_encoder_learning_rate=(5e-5, _CIVITAI),
        ),
        *_SD_SHARED,
    ),
    "character": (
        *_values(
            lora__rank=(16, _COLAB),
            lora__alpha=(8.0, _COLAB),
            optimizer__learning_rate=(5e-4, f"{_COLAB}; {_CIVITAI}"),
            optimizer__text_encoder_learning_rate=(1e-4, f"{_COLAB}: the trigger word must mean one subject"),
        ),
        *_SD_SHARED,
    ),
    "concept": (
        *_values(
            lora__rank=(32, _CIVITAI),
            lora__alpha=(16.0, _CIVITAI),
            optimizer__learning_rate=(5e-4, _CIVITAI),
            optimizer__text_encoder_learning_rate=(5e-5, _CIVITAI),
        ),
        *_SD_SHARED,
    ),
}
_SDXL: Mapping[PresetName, tuple[PresetValue, ...]] = {
    "style": (
        *_values(
            lora__rank=(16, f"{_COLAB_XL}, for a style"),
            lora__alpha=(8.0, f"{_COLAB_XL}, for a style"),
            optimizer__learning_rate=(3e-4, _COLAB_XL),
            optimizer__text_encoder_learning_rate=(0.0, _NO_TEXT_XL),
        ),
        *_SDXL_SHARED,
    ),
    "character": (
        *_values(
            lora__rank=(8, _COLAB_XL),
            lora__alpha=(4.0, _COLAB_XL),
            optimizer__learning_rate=(3e-4, _COLAB_XL),
            optimizer__text_encoder_learning_rate=(6e-5, _COLAB_XL),
        ),
        *_SDXL_SHARED,
    ),
    "concept": (
        *_values(
            lora__rank=(32, _CIVITAI_XL),
            lora__alpha=(16.0, _CIVITAI_XL),
            optimizer__learning_rate=(2e-4, _CAREFUL),
            optimizer__text_encoder_learning_rate=(5e-5, _CIVITAI_XL),
        ),
        *_SDXL_SHARED,
    ),
}
_MINI_SHARED = _values(
    lora__targets=("attention-mlp", _MEASURED),
    optimizer__learning_rate=(1.5e-3, _SUBJECT_KEPT),
    optimizer__text_encoder_learning_rate=(0.0, _NO_TEXT),
    objective__min_snr_gamma=(0.0, _ALL_LEVELS),
    train__batch_size=(4, _MEASURED),
    train__steps=(300, _MEASURED),
)
_MINI: Mapping[PresetName, tuple[PresetValue, ...]] = {
    "style": (*_values(lora__rank=(16, _MEASURED), lora__alpha=(16.0, _MEASURED)), *_MINI_SHARED),
    "character": (*_values(lora__rank=(8, _SUBJECT), lora__alpha=(8.0, _SUBJECT)), *_MINI_SHARED),
    "concept": (*_values(lora__rank=(16, _MEASURED), lora__alpha=(16.0, _MEASURED)), *_MINI_SHARED),
}
PRESETS: Mapping[str, Mapping[PresetName, tuple[PresetValue, ...]]] = {
    MINI: _MINI,
    "sd1": _SD,
    "sd2": _SD,
    "sdxl": _SDXL,
}
"""``mini``, or the name of a family -> preset -> its values."""
_ONE_OF = ({"train.steps", "train.epochs"},)
"""Settings of which only one can be stated: a preset's is left out where the configuration has another."""


def preset_values(name: PresetName, base: str) -> tuple[PresetValue, ...]:
    """The values of a preset; nothing for "none".

    Args:
        base: a key of ``PRESETS``.
    """
    return PRESETS[base].get(name, ())


def unstated(values: tuple[PresetValue, ...], stated: set[str], *, rank: int) -> Iterator[PresetValue]:
    """Those of ``values`` that do not contradict what the configuration has ``stated`` (``section.key``).

    Args:
        rank: where it is stated, the preset's alpha keeps its ratio to it, for which the learning rate was chosen.
    """
    ranks = {value.value for value in values if value.setting == "lora.rank"}
    for value in values:
        taken = stated | {each for group in _ONE_OF if group & stated for each in group}
        if value.setting in taken:
            continue
        if value.setting == "lora.alpha" and "lora.rank" in stated:
            (its_rank,) = ranks
            yield replace(value, value=value.value * rank / its_rank, source=f"{value.source}; for the stated rank")
        else:
            yield value
