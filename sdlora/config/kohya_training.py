"""The training configuration of kohya's trainer as settings here, key by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .catalogue import SettingFacts, all_settings
from .kohya_names import ELSEWHERE, UNNECESSARY
from .kohya_options import KohyaOption, read_options
from .kohya_rules import (
    CONVOLUTION_TARGETS,
    HARMLESS,
    KOHYA_DEFAULTS,
    RULES,
    TEXT_TARGETS,
    UNET_TARGETS,
    RefusedError,
    Settings,
    arguments_of,
    number,
)
from .optimizer_rules import ADAMW, canonical_name, needs_no_schedule
from .toml_file import Location, parse_value
from .written import Written

_COMBINED = frozenset({
    "learning_rate", "network_train_unet_only", "network_train_text_encoder_only", "network_args", "output_dir",
    "output_name", "train_data_dir", "reg_data_dir",
})  # fmt: skip
"""Options whose meaning depends on others."""


@dataclass(frozen=True, kw_only=True)
class KohyaTraining:
    """A translated configuration."""

    written: Written
    left_out: tuple[str, ...]
    """A line on each option that changes nothing of the LoRA."""


def read_kohya(source: str, overridden: Collection[str] = ()) -> KohyaTraining:
    """The settings that ``source`` states: a TOML or JSON file of kohya's trainer, or a command line that starts it.

    What is not stated is as kohya's trainer has it, not as the defaults here are.

    Args:
        overridden: ``section.key`` of what is stated beside it; a length takes the place of the length in ``source``.

    Raises:
        ConfigError: with one line for each option that is unknown, wrong, or cannot be followed.
    """
    translation = _Translation(read_options(source))
    translation.run()
    if translation.problems:
        raise ConfigError(translation.problems)
    places = translation.places
    if {"train.steps", "train.epochs"} & set(overridden):
        translation.settings = {
            name: value for name, value in translation.settings.items() if name not in ("train.steps", "train.epochs")
        }

    def place(location: Location) -> str:
        parts = [part for part in location if isinstance(part, str)]
        return places.get(".".join(parts[:2]), f"translation of {source[:60]}")

    tables: dict[str, Any] = {}
    for name, value in translation.settings.items():
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = value
    # Kohya's trainer takes paths by the working folder.
    return KohyaTraining(written=Written(tables=tables, place=place), left_out=tuple(translation.left_out))


@cache
def same_settings() -> Mapping[str, SettingFacts]:
    """Option -> the setting that means the same, of those that take its value as it is."""
    return {
        setting.kohya: setting
        for setting in reversed(all_settings())
        if setting.kohya and setting.section != "data.sets"
    }


@dataclass
class _Translation:
    """Options on their way to settings."""

    options: Mapping[str, KohyaOption]
    settings: Settings = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Fill ``settings`` from ``options``."""
        for option in self.options.values():
            if option.name not in _COMBINED:
                self._translate(option)
        for combined in (
            self._network_arguments,
            self._rates,
            self._targets,
            self._weighting,
            self._images,
            self._output,
        ):
            try:
                combined()
            except RefusedError as error:
                self.problems.append(str(error))
        self._fill()

    def _translate(self, option: KohyaOption) -> None:
        name, same = option.name, same_settings().get(option.name)
        try:
            if name in RULES:
                self._set(RULES[name](option.value), option)
            elif name in UNNECESSARY:
                self.left_out.append(f"{option.place}: {name} is left out: {UNNECESSARY[name]}")
            elif name in HARMLESS:
                self.left_out.append(f"{option.place}: {name} is left out: it changes nothing of the LoRA")
            elif same is not None:
                self._set({same.name: _value_for(same, option.value)}, option)
            elif name in ELSEWHERE:
                self.problems.append(f"{option.place}: {name} cannot be followed: it is {ELSEWHERE[name]} here")
            else:
                self.problems.append(f"{option.place}: {name} = {option.value!r} cannot be followed; remove it")
        except RefusedError as error:
            self.problems.append(f"{option.place}: {name} = {option.value!r}: {error}")

    def _set(self, settings: Settings, option: KohyaOption) -> None:
        self.settings |= settings
        self.places |= dict.fromkeys(settings, f"{option.place} ({option.name})")

    def _network_arguments(self) -> None:
        option = self.options.get("network_args")
        for name, value in (arguments_of(option.value) if option else {}).items():
            assert option is not None
            self._translate(KohyaOption(name=name, value=value, place=f"{option.place}, network_args"))
        # As kohya's trainer has it, the alpha of convolutions is 1 where only their rank is stated.
        if "lora.conv_rank" in self.settings:
            self.settings.setdefault("lora.conv_alpha", 1.0)

    def _rates(self) -> None:
        default = self.options.get("learning_rate")
        rate = float(number(default.value)) if default else KOHYA_DEFAULTS["optimizer.learning_rate"][1]
        for name in ("optimizer.learning_rate", "optimizer.text_encoder_learning_rate"):
            self.settings.setdefault(name, rate)
            self.places.setdefault(
                name, f"{default.place} (learning_rate)" if default else _by_default("learning_rate")
            )
        for name, setting in (
            ("network_train_unet_only", "optimizer.text_encoder_learning_rate"),
            ("network_train_text_encoder_only", "optimizer.learning_rate"),
        ):
            if name in self.options:
                self._set({setting: 0.0}, self.options[name])

    def _targets(self) -> None:
        convolutions = CONVOLUTION_TARGETS if "lora.conv_rank" in self.settings else ()
        self.settings["lora.targets"] = [*UNET_TARGETS, *convolutions, *TEXT_TARGETS]
        self.places["lora.targets"] = "what kohya's networks.lora trains"

    def _weighting(self) -> None:
        if {"min_snr_gamma", "debiased_estimation_loss"} <= self.options.keys():
            raise RefusedError(
                f"{self.options['debiased_estimation_loss'].place}: debiased_estimation_loss and min_snr_gamma together "
                "cannot be followed; remove one of them"
            )

    def _images(self) -> None:
        training, regular = self.options.get("train_data_dir"), self.options.get("reg_data_dir")
        if training and regular:
            sets = [{"images": str(training.value)}, {"images": str(regular.value), "role": "regularisation"}]
            self._set({"data.sets": sets}, training)
        elif training:
            self._set({"data.images": str(training.value)}, training)

    def _output(self) -> None:
        folder, name = self.options.get("output_dir"), self.options.get("output_name")
        stated = name or folder
        if stated is None:
            return
        file = str(name.value) if name else "last"
        path = Path(str(folder.value) if folder else "") / f"{file.removesuffix('.safetensors')}.safetensors"
        self._set({"output.path": str(path)}, stated)

    def _fill(self) -> None:
        """What kohya's trainer does where an option is not stated."""
        optimizer = canonical_name(self.settings.get("optimizer.name", "adamw"))
        arguments = self.settings.get("optimizer.arguments", {})
        if optimizer in ADAMW and "betas" not in arguments:
            self.settings["optimizer.betas"] = [0.9, 0.999]
            self.places["optimizer.betas"] = "torch's default, which kohya's trainer takes"
        if optimizer == "adafactor" and arguments.get("relative_step", True):
            self.problems.append(
                f"{self.places['optimizer.name']}: Adafactor that finds its rate itself cannot be followed; state "
                "relative_step=False in optimizer_args"
            )
        schedule = self.options.get("lr_scheduler")
        if (schedule is None or schedule.value == "constant") and not needs_no_schedule(optimizer):
            # Kohya's "constant" has no warm-up, whatever lr_warmup_steps says.
            self.settings["optimizer.warmup_steps"] = 0
        if "train.epochs" in self.settings:
            self.settings.pop("train.steps", None)
        for setting, (option, value) in self._defaults():
            if setting not in self.settings:
                self.settings[setting] = value
                self.places[setting] = _by_default(option)

    def _defaults(self) -> Iterator[tuple[str, tuple[str, Any]]]:
        for setting, default in KOHYA_DEFAULTS.items():
            bucket = setting.startswith("data.") and "bucket" in setting and setting != "data.enable_bucket"
            from_file = "dataset_config" in self.options and setting.startswith("data.") and not bucket
            unneeded = setting == "train.steps" and "train.epochs" in self.settings
            batch = setting == "train.batch_size" and "dataset_config" in self.options
            square = setting.endswith("bucket_reso") and "enable_bucket" not in self.options
            if not (from_file or unneeded or batch or square):
                yield setting, default


def _by_default(option: str) -> str:
    return f"kohya's default of {option}"


def _value_for(setting: SettingFacts, value: Any) -> Any:
    """``value`` as ``setting`` takes it."""
    if setting.values.startswith(("text", "path", "a path", "mini", "a file", '"')):
        return value if isinstance(value, bool) else str(value)
    if setting.values.startswith("true"):
        return parse_value(str(value).lower())
    parsed = parse_value(value) if isinstance(value, str) else value
    whole = setting.values.startswith("whole")
    if isinstance(parsed, bool | list | dict) or not isinstance(parsed, int | float):
        raise RefusedError("expected a number")
    if whole and float(parsed).is_integer():
        return int(parsed)
    return parsed if whole else float(parsed) if setting.values.startswith("number") else parsed
