"""The dataset configuration of kohya's trainer (``--dataset_config``), read as ``[data]`` and ``[train]``.

What is in ``[[datasets.subsets]]`` overrides ``[[datasets]]``, and that overrides ``[general]``. What the file leaves
out is as ``[data]`` and ``[train]`` have it, where kohya's trainer takes it from the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import ConfigError
from .kohya_dataset_keys import DATASET, GENERAL, KEYS, RUN_KEYS, SET_KEYS, SUBSET
from .messages import expectation
from .sections import Config, DataSection, SetSection, TrainSection
from .toml_file import place, read_toml
from .unknown_keys import near_spelling

Location = tuple[str | int, ...]
S = TypeVar("S", DataSection, TrainSection)


def read_dataset_config(data: DataSection, train: TrainSection) -> tuple[DataSection, TrainSection]:
    """``data`` and ``train`` with what the file ``data.dataset_config`` says; its subsets become ``data.sets``.

    Raises:
        ConfigError: with one line for each key that is unknown, misplaced, wrong or not supported, or contradicts one
            in ``[data]`` or ``[train]``.
    """
    assert data.dataset_config is not None
    file = Path(data.dataset_config)
    tables, text = _read(file)
    reading = _Reading(file, text, data, train)
    resolved = reading.sections(tables)
    if resolved is None or reading.problems:
        raise ConfigError(reading.problems)
    return resolved


def is_kohya_dataset(file: Path) -> bool:
    """Whether ``file`` is a dataset configuration of kohya's trainer, by its content."""
    try:
        tables, _ = _read(file)
    except ConfigError:
        return False
    return "datasets" in tables and not tables.keys() & Config.model_fields.keys()


def _read(file: Path) -> tuple[dict[str, Any], str]:
    return _read_json(file) if file.suffix.lower() == ".json" else read_toml(file)


@dataclass(frozen=True, kw_only=True)
class _Subset:
    """A subset, with what it takes from its dataset and from ``[general]``."""

    location: Location
    values: Mapping[str, Any]
    places: Mapping[str, Location]
    """Key -> the table that its value is in."""
    section: SetSection

    def place(self, key: str) -> Location:
        return (*self.places.get(key, self.location), key)

    @property
    def mask(self) -> str | None:
        """What ``data.mask`` is for it; None where it does not say."""
        if self.section.masks is not None:
            return "files"
        return {True: "alpha", False: "none"}.get(self.values.get("alpha_mask"))


class _Reading:
    """One dataset configuration; ``problems`` grow as it is read."""

    def __init__(self, file: Path, text: str, data: DataSection, train: TrainSection):
        self._file, self._text, self._data, self._train = file, text, data, train
        self.problems: list[str] = []

    def sections(self, tables: Mapping[str, Any]) -> tuple[DataSection, TrainSection] | None:
        """None where something is wrong; ``problems`` say what."""
        subsets = list(self._subsets(tables))
        if self.problems:
            return None
        if not subsets:
            self._report(("datasets",), f"no {SUBSET}; write one for each folder of images")
            return None
        data, train = self._run_values(subsets, "data"), self._run_values(subsets, "train")
        data |= self._common_data(subsets)
        self._check_contradictions("data", self._data, data)
        self._check_contradictions("train", self._train, train)
        if self.problems:
            return None
        new_data = self._replaced(self._data, "data", data | {"dataset_config": None})
        new_train = self._replaced(self._train, "train", train)
        return None if new_data is None or new_train is None else (new_data, new_train)

    def _run_values(self, subsets: Sequence[_Subset], section: str) -> dict[str, Any]:
        """Key -> value, of what the file says about ``[data]`` or ``[train]`` and must be the same in all subsets."""
        given = self._data if section == "data" else self._train
        found = {}
        for kohya, (its_section, key) in RUN_KEYS.items():
            if its_section == section and any(kohya in subset.values for subset in subsets):
                default = getattr(given, key)
                values = [(subset.place(kohya), subset.values.get(kohya, default)) for subset in subsets]
                if self._all_equal(kohya, values):
                    found[key] = values[0][1]
        return found

    def _common_data(self, subsets: Sequence[_Subset]) -> dict[str, Any]:
        """Key -> value of ``[data]``, except those that ``RUN_KEYS`` has."""
        found: dict[str, Any] = {"sets": tuple(subset.section for subset in subsets)}
        resolutions = {subset.section.resolution for subset in subsets}
        if len(resolutions) == 1 and None not in resolutions:
            found["resolution"] = subsets[0].section.resolution
        elif None not in resolutions and "resolution" in self._data.model_fields_set:
            self.problems.append(f"{self._file}: every dataset has its resolution, so remove data.resolution")
        masks = [(subset.place("alpha_mask"), subset.mask) for subset in subsets]
        if any(mask == "files" for _, mask in masks):
            # A subset without mask files is then a set of images that count in full.
            masks = [(location, "files" if mask in (None, "none") else mask) for location, mask in masks]
        if any(mask for _, mask in masks):
            values = [(location, mask or self._data.mask) for location, mask in masks]
            if self._all_equal("alpha_mask", values):
                found["mask"] = values[0][1]
        return found

    def _all_equal(self, key: str, values: Sequence[tuple[Location, Any]]) -> bool:
        """Whether all subsets have the same value; where they do not, that is a problem at the first that differs."""
        different = list(dict.fromkeys(value for _, value in values))
        if len(different) > 1:
            location = next(location for location, value in values if value == different[1])
            listed = " and ".join(map(str, different))
            self._report(location, f"{key} is {listed} in different subsets, but must be the same for the whole run")
        return len(different) == 1

    def _check_contradictions(self, name: str, given: DataSection | TrainSection, asked: Mapping[str, Any]) -> None:
        for key in asked.keys() & given.model_fields_set:
            if getattr(given, key) != asked[key]:
                self.problems.append(
                    f"{self._file}: asks for {name}.{key} = {asked[key]!r}, but the configuration of the run for "
                    f"{getattr(given, key)!r}; keep one of them"
                )

    def _replaced(self, section: S, name: str, values: dict[str, Any]) -> S | None:
        """``section`` with ``values``, checked as if it had been written so."""
        stated = {key: getattr(section, key) for key in section.model_fields_set}
        try:
            return type(section)(**(stated | values))
        except ValidationError as error:
            for entry in error.errors():
                key = "".join(f"{part} " for part in entry["loc"])
                expected = expectation(entry)
                self.problems += [f"{self._file}: {name}.{key}{line}" for line in expected.split("\n")]
            return None

    def _subsets(self, tables: Mapping[str, Any]) -> Iterator[_Subset]:
        for key in sorted(tables.keys() - {"general", "datasets"}):
            expected = near_spelling(key, ("general", "datasets")) or f"; expected {GENERAL} or {DATASET}"
            self._report((key,), f"unknown key {key}{expected}")
        general, datasets = tables.get("general", {}), tables.get("datasets", [])
        if not isinstance(general, dict) or not _is_tables(datasets):
            self._report(("datasets",), f"expected tables {GENERAL} and {DATASET}")
            return
        general = self._checked(general, GENERAL, ("general",))
        for number, dataset in enumerate(datasets):
            location: Location = ("datasets", number)
            subsets = dataset.get("subsets", [])
            if not _is_tables(subsets):
                self._report((*location, "subsets"), f"expected tables {SUBSET}")
                continue
            common = self._checked({k: v for k, v in dataset.items() if k != "subsets"}, DATASET, location)
            outer = ((("general",), general), (location, common))
            yield from self._subsets_of(subsets, outer, location)

    def _subsets_of(
        self,
        subsets: Sequence[Mapping[str, Any]],
        outer: tuple[tuple[Location, dict[str, Any]], ...],
        dataset: Location,
    ) -> Iterator[_Subset]:
        """The subsets of one dataset; ``outer`` are the tables whose values they take, later ones first."""
        seen: set[tuple[str | None, str | None]] = set()
        for number, subset in enumerate(subsets):
            location = (*dataset, "subsets", number)
            levels = (*outer, (location, self._checked(subset, SUBSET, location)))
            values = {key: value for _, table in levels for key, value in table.items()}
            places = {key: where for where, table in levels for key in table}
            section = self._set_section(values, places, location)
            if section is None:
                continue
            if (section.images, section.metadata) in seen:
                self._report(location, f"{section.images} is in this dataset already; remove one of them")
            seen.add((section.images, section.metadata))
            yield _Subset(location=location, values=values, places=places, section=section)

    def _checked(self, table: Mapping[str, Any], level: str, location: Location) -> dict[str, Any]:
        """The keys of ``table`` that are supported, with values of the right kind."""
        kept = {}
        for name, value in table.items():
            key, where = KEYS.get(name), (*location, name)
            if key is None:
                self._report(where, f"unknown key {name}{near_spelling(name, KEYS)}")
            elif level not in key.levels:
                self._report(where, f"{name} cannot be in {level}, only in {' or '.join(key.levels)}")
            elif not key.accepts(value):
                self._report(where, f"{name} = {value!r}: expected {key.expected}")
            elif key.harmless is None:
                kept[name] = value
            elif value not in key.harmless:
                self._report(where, f"{name} = {value!r} is not supported; {key.instead}")
        return kept

    def _set_section(
        self, values: Mapping[str, Any], places: Mapping[str, Location], location: Location
    ) -> SetSection | None:
        """The set that a subset with these values is; None, and problems, where something is wrong."""
        keys = {ours: values[kohya] for kohya, ours in SET_KEYS.items() if kohya in values}
        if "images" not in keys:
            if "metadata" not in keys:
                self._report(location, "image_dir is missing")
                return None
            keys["images"] = str(Path(keys["metadata"]).parent)
        if isinstance(sides := keys.get("resolution"), list):
            keys["resolution"] = sides[0] if len(sides) == 2 and sides[0] == sides[1] else None
            if keys["resolution"] is None:
                problem = f"resolution = {sides!r} is not square; give the side of a square, whose area the buckets get"
                self._report((*places["resolution"], "resolution"), problem)
        if values.get("random_crop"):
            keys["crop"] = "random"
        elif "random_crop" in values and self._data.crop == "random":
            keys["crop"] = "center"
        if values.get("is_reg"):
            keys["role"] = "regularisation"
        if "wildcards" in keys or "caption_lines" not in self._data.model_fields_set:
            # kohya's trainer reads one line of a caption file: a drawn one with wildcards, the first without.
            keys["caption_lines"] = "draw" if keys.get("wildcards", self._data.wildcards) else "first"
        try:
            return SetSection(**keys, subfolders=False)
        except ValidationError as error:
            kohya_names = {ours: kohya for kohya, ours in SET_KEYS.items()}
            for entry in error.errors():
                key = kohya_names.get(str(entry["loc"][0]), str(entry["loc"][0]))
                self._report((*places.get(key, location), key), f"{key} = {entry['input']!r}: {expectation(entry)}")
            return None

    def _report(self, location: Location, problem: str) -> None:
        line = f"{place(str(self._file), self._text, location)}: {problem}"
        # What is in [general] is checked with each subset.
        if line not in self.problems:
            self.problems.append(line)


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
