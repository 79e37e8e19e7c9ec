"""The dataset configuration of kohya's trainer (``--dataset_config``), as settings of this one.

What stands in ``[[datasets.subsets]]`` goes before ``[[datasets]]``, and that before ``[general]``. What the file leaves
out is as ``[data]`` and ``[train]`` have it, as kohya takes it from the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import ConfigError
from .loading import nearest, place, read_toml
from .sections import DataSection, SetSection, TrainSection

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"


Location = tuple[str | int, ...]
S = TypeVar("S", DataSection, TrainSection)


@dataclass(frozen=True, kw_only=True)
class _Key:
    """One of kohya's keys."""

    kinds: tuple[type, ...]
    levels: tuple[str, ...]
    harmless: tuple[object, ...] | None = None
    """Of a key that means nothing here: values that change nothing. None where the key is followed."""
    instead: str = ""
    """What to do in place of a key that is not followed."""


_BOTH, _ALL, _OWN = (GENERAL, DATASET), (GENERAL, DATASET, SUBSET), (SUBSET,)
_NUMBER = (int, float)
_RESIZED = "images are scaled by Lanczos's filter; remove the key"
_ONE_BY_ONE = "only the comma separates tags here; write captions so and remove the key"

KEYS = {
    "resolution": _Key(kinds=(int, list), levels=_BOTH),
    "batch_size": _Key(kinds=(int,), levels=_BOTH),
    "enable_bucket": _Key(kinds=(bool,), levels=_BOTH),
    "min_bucket_reso": _Key(kinds=(int,), levels=_BOTH),
    "max_bucket_reso": _Key(kinds=(int,), levels=_BOTH),
    "bucket_reso_steps": _Key(kinds=(int,), levels=_BOTH),
    "bucket_no_upscale": _Key(kinds=(bool,), levels=_BOTH),
    "network_multiplier": _Key(kinds=_NUMBER, levels=_BOTH, harmless=(1,), instead="give the sets a loss_weight"),
    "validation_split": _Key(
        kinds=_NUMBER, levels=_ALL, harmless=(0,), instead="put validation images into [[data.sets]] of that role"
    ),
    "validation_seed": _Key(kinds=(int,), levels=_ALL, harmless=(0,), instead="remove the key"),
    "skip_image_resolution": _Key(
        kinds=(int, list, str), levels=_BOTH, harmless=(), instead="move small images away; sdlora lint names them"
    ),
    "resize_interpolation": _Key(kinds=(str,), levels=_ALL, harmless=("lanczos",), instead=_RESIZED),
    "image_dir": _Key(kinds=(str,), levels=_OWN),
    "metadata_file": _Key(kinds=(str,), levels=_OWN),
    "conditioning_data_dir": _Key(kinds=(str,), levels=_OWN),
    "is_reg": _Key(kinds=(bool,), levels=_OWN),
    "alpha_mask": _Key(kinds=(bool,), levels=_ALL),
    "class_tokens": _Key(kinds=(str,), levels=_ALL),
    "num_repeats": _Key(kinds=(int,), levels=_ALL),
    "caption_extension": _Key(kinds=(str,), levels=_ALL),
    "caption_prefix": _Key(kinds=(str,), levels=_ALL),
    "caption_suffix": _Key(kinds=(str,), levels=_ALL),
    "caption_dropout_rate": _Key(kinds=_NUMBER, levels=_ALL),
    "caption_tag_dropout_rate": _Key(kinds=_NUMBER, levels=_ALL),
    "enable_wildcard": _Key(kinds=(bool,), levels=_ALL),
    "shuffle_caption": _Key(kinds=(bool,), levels=_ALL),
    "keep_tokens": _Key(kinds=(int,), levels=_ALL),
    "flip_aug": _Key(kinds=(bool,), levels=_ALL),
    "random_crop": _Key(kinds=(bool,), levels=_ALL),
    "cache_info": _Key(kinds=(bool,), levels=_ALL, harmless=(True, False)),
    "color_aug": _Key(
        kinds=(bool,), levels=_ALL, harmless=(False,), instead="colours are never changed; remove the key"
    ),
    "face_crop_aug_range": _Key(
        kinds=(list,), levels=_ALL, harmless=(), instead='remove the key; data.crop = "salient" keeps the most detail'
    ),
    "caption_separator": _Key(kinds=(str,), levels=_ALL, harmless=(",", ", "), instead=_ONE_BY_ONE),
    "secondary_separator": _Key(kinds=(str,), levels=_ALL, harmless=("",), instead=_ONE_BY_ONE),
    "keep_tokens_separator": _Key(kinds=(str,), levels=_ALL, harmless=("",), instead="use keep_tokens"),
    "token_warmup_min": _Key(kinds=(int,), levels=_ALL, harmless=(1,), instead="remove the key"),
    "token_warmup_step": _Key(kinds=_NUMBER, levels=_ALL, harmless=(0,), instead="remove the key"),
    "caption_dropout_every_n_epochs": _Key(
        kinds=(int,), levels=_ALL, harmless=(0,), instead="use caption_dropout_rate"
    ),
    "custom_attributes": _Key(kinds=(dict,), levels=_ALL, harmless=({},), instead="remove the key"),
}
"""Every key that kohya's trainer knows, and where it may stand."""

_SET_KEYS = {
    "image_dir": "images",
    "metadata_file": "metadata",
    "conditioning_data_dir": "masks",
    "class_tokens": "class_prompt",
    "num_repeats": "repeats",
    "caption_extension": "caption_extension",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "enable_wildcard": "wildcards",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tokens",
    "caption_tag_dropout_rate": "tag_dropout",
    "flip_aug": "flip",
    "resolution": "resolution",
}
"""kohya's key -> ours, of what each set has for itself."""
_RUN_KEYS = {
    "batch_size": ("train", "batch_size"),
    "enable_bucket": ("data", "enable_bucket"),
    "min_bucket_reso": ("data", "min_bucket_reso"),
    "max_bucket_reso": ("data", "max_bucket_reso"),
    "bucket_reso_steps": ("data", "bucket_reso_steps"),
    "bucket_no_upscale": ("data", "bucket_no_upscale"),
    "caption_dropout_rate": ("data", "caption_dropout"),
}
"""kohya's key -> (section, key) of what all images of a run have alike."""


def read_dataset_config(data: DataSection, train: TrainSection) -> tuple[DataSection, TrainSection]:
    """``data`` and ``train`` with what the file ``data.dataset_config`` says, in which ``data.sets`` are the subsets.

    Raises:
        ConfigError: with one line for each key that is unknown, misplaced, wrong, cannot be followed, or says otherwise
            than one that stands in ``[data]`` or ``[train]``.
    """
    assert data.dataset_config is not None
    file = Path(data.dataset_config)
    tables, text = _read_json(file) if file.suffix.lower() == ".json" else read_toml(file)
    reading = _Reading(file, text, data, train)
    resolved = reading.sections(tables)
    if resolved is None or reading.problems:
        raise ConfigError(reading.problems)
    return resolved


@dataclass(frozen=True, kw_only=True)
class _Subset:
    """A subset with what it takes from its dataset and from ``[general]``."""

    location: Location
    values: Mapping[str, Any]
    places: Mapping[str, Location]
    """Of each of ``values``, the table that it stands in."""
    section: SetSection

    def place(self, key: str) -> Location:
        return (*self.places.get(key, self.location), key)


class _Reading:
    """One dataset configuration; ``problems`` grow as it is read."""

    def __init__(self, file: Path, text: str, data: DataSection, train: TrainSection):
        self._file, self._text, self._data, self._train = file, text, data, train
        self.problems: list[str] = []

    def sections(self, tables: Mapping[str, Any]) -> tuple[DataSection, TrainSection] | None:
        """None where something is wrong that is not told by keys and values alone."""
        subsets = list(self._subsets(tables))
        if self.problems:
            return None
        if not subsets:
            self._tell(("datasets",), f"no {SUBSET}; write one for each folder of images")
            return None
        told = {"data": dict(self._common_data(subsets)), "train": {}}
        for key, (section, name) in _RUN_KEYS.items():
            own = getattr(self._data if section == "data" else self._train, name)
            for value in self._one_value(key, [(one.place(key), one.values.get(key, own)) for one in subsets]):
                if any(key in one.values for one in subsets):
                    told[section][name] = value
        for section, given in (("data", self._data), ("train", self._train)):
            for name, value in told[section].items():
                if name in given.model_fields_set and getattr(given, name) != value:
                    self.problems.append(
                        f"{self._file}: asks for {section}.{name} = {value!r}, but the configuration of the run for "
                        f"{getattr(given, name)!r}; keep one of them"
                    )
        if self.problems:
            return None
        data = self._told_to(self._data, "data", {"dataset_config": None, **told["data"]})
        train = self._told_to(self._train, "train", told["train"])
        return None if data is None or train is None else (data, train)

    def _told_to(self, section: S, name: str, told: dict[str, Any]) -> S | None:
        """``section`` with what is ``told``, checked as if it had been written so."""
        given = {key: getattr(section, key) for key in section.model_fields_set}
        try:
            return type(section)(**(given | told))
        except ValidationError as error:
            for entry in error.errors():
                key = "".join(f"{part} " for part in entry["loc"])
                self.problems += [f"{self._file}: {name}.{key}{line}" for line in entry["msg"].split("\n")]
            return None

    def _common_data(self, subsets: Sequence[_Subset]) -> Iterator[tuple[str, Any]]:
        """Keys and values of ``[data]``, less those that stand in ``_RUN_KEYS``."""
        sides = tuple(dict.fromkeys(one.section.resolution for one in subsets))
        if len(sides) == 1 and sides[0] is not None:
            yield "resolution", sides[0]
        elif None not in sides and "resolution" in self._data.model_fields_set:
            self.problems.append(f"{self._file}: every dataset has its resolution, so remove data.resolution")
        yield "sets", tuple(one.section for one in subsets)
        masks = [(one.place("alpha_mask"), self._mask(one)) for one in subsets]
        if any(mask for _, mask in masks):
            if any(mask == "files" for _, mask in masks):
                # Where masks are files, a subset without any has images of which all counts.
                masks = [(at, "files" if mask in (None, "none") else mask) for at, mask in masks]
            for mask in self._one_value("alpha_mask", [(at, mask or self._data.mask) for at, mask in masks]):
                yield "mask", mask

    def _subsets(self, tables: Mapping[str, Any]) -> Iterator[_Subset]:
        for key in sorted(tables.keys() - {"general", "datasets"}):
            self._tell((key,), f"unknown key {key}{nearest(key, ['general', 'datasets'])}")
        general, datasets = tables.get("general", {}), tables.get("datasets", [])
        if not isinstance(general, dict) or not _is_tables(datasets):
            self._tell(("datasets",), f"expected tables {GENERAL} and {DATASET}")
            return
        general = self._checked(general, GENERAL, ("general",))
        for number, dataset in enumerate(datasets):
            location: Location = ("datasets", number)
            subsets = dataset.get("subsets", [])
            if not _is_tables(subsets):
                self._tell((*location, "subsets"), f"expected tables {SUBSET}")
                continue
            common = self._checked({k: v for k, v in dataset.items() if k != "subsets"}, DATASET, location)
            seen: set[tuple[str | None, str | None]] = set()
            for own_number, subset in enumerate(subsets):
                at = (*location, "subsets", own_number)
                levels = ((("general",), general), (location, common), (at, self._checked(subset, SUBSET, at)))
                values = {key: value for _, table in levels for key, value in table.items()}
                places = {key: where for where, table in levels for key in table}
                section = self._set(values, places, at)
                if section is not None:
                    if (section.images, section.metadata) in seen:
                        self._tell(at, f"{section.images} is in this dataset already; remove one of them")
                    seen.add((section.images, section.metadata))
                    yield _Subset(location=at, values=values, places=places, section=section)

    def _checked(self, table: Mapping[str, Any], level: str, location: Location) -> dict[str, Any]:
        """The keys of ``table`` that can be followed, with values of the right kind."""
        kept = {}
        for name, value in table.items():
            key, at = KEYS.get(name), (*location, name)
            if key is None:
                self._tell(at, f"unknown key {name}{nearest(name, list(KEYS))}")
            elif level not in key.levels:
                self._tell(at, f"{name} cannot stand in {level}, only in {' or '.join(key.levels)}")
            elif not any(_is_kind(value, kind) for kind in key.kinds):
                expected = " or ".join(_KIND_NAMES[kind] for kind in key.kinds)
                self._tell(at, f"{name} = {value!r}: expected {expected}")
            elif key.harmless is None:
                kept[name] = value
            elif value not in key.harmless:
                self._tell(at, f"{name} = {value!r} cannot be followed; {key.instead}")
        return kept

    def _set(self, values: Mapping[str, Any], places: Mapping[str, Location], location: Location) -> SetSection | None:
        told = {ours: values[key] for key, ours in _SET_KEYS.items() if key in values}
        if "images" not in told:
            if "metadata" not in told:
                self._tell(location, "image_dir is missing")
                return None
            told["images"] = str(Path(told["metadata"]).parent)
        if isinstance(sides := told.get("resolution"), list):
            told["resolution"] = sides[0] if len(sides) == 2 and sides[0] == sides[1] else None
            if told["resolution"] is None:
                problem = f"resolution = {sides!r} is no square; name the side of one, whose area the buckets have"
                self._tell((*places["resolution"], "resolution"), problem)
        if "random_crop" in values:
            told["crop"] = "random" if values["random_crop"] else "center" if self._data.crop == "random" else None
        if values.get("is_reg"):
            told["role"] = "regularisation"
        if "wildcards" in told or "caption_lines" not in self._data.model_fields_set:
            # kohya reads one line of a caption file: a drawn one with wildcards, the first without.
            told["caption_lines"] = "draw" if told.get("wildcards", self._data.wildcards) else "first"
        try:
            return SetSection(**told, subfolders=False)
        except ValidationError as error:
            kohyas = {ours: key for key, ours in _SET_KEYS.items()}
            for entry in error.errors():
                key = kohyas.get(str(entry["loc"][0]), str(entry["loc"][0]))
                where = (*places.get(key, location), key)
                self._tell(where, f"{key} = {entry.get('input')!r}: {entry['msg'].lower()}")
            return None

    def _mask(self, one: _Subset) -> str | None:
        if one.section.masks is not None:
            return "files"
        return {True: "alpha", False: "none"}.get(one.values.get("alpha_mask"))

    def _one_value(self, key: str, values: Sequence[tuple[Location, Any]]) -> Iterator[Any]:
        """The value that all have alike; nothing, and a problem, where they differ."""
        different = list(dict.fromkeys(value for _, value in values))
        if len(different) > 1:
            at = next(location for location, value in values if value == different[1])
            listed = " and ".join(map(str, different))
            self._tell(at, f"{key} is {listed} in different subsets, but is one for the whole run; make them equal")
        else:
            yield different[0]

    def _tell(self, location: Location, problem: str) -> None:
        line = f"{place(str(self._file), self._text, location)}: {problem}"
        # What stands in [general] is looked at with each subset.
        if line not in self.problems:
            self.problems.append(line)


_KIND_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a table",
}


def _is_kind(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _read_json(file: Path) -> tuple[dict[str, Any], str]:
    try:
        tables = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(tables, dict):
        raise ConfigError(f'{file}: expected a JSON object with "datasets"')
    return tables, ""
