"""``generate --from``: what repeats an image, from the recipe in it or in a text file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..base.checkpoint import BaseCheckpoint
from ..errors import DataError
from ..formats.hashes import file_hashes
from ..formats.image_text import image_text
from ..formats.recipe import Recipe, parse_recipe, tagged_prompt
from .a1111_recipe import a1111_differences, a1111_sampler
from .hires import Hires, find_upscaler
from .infotext import OWN_SCHEDULE, RESCALE
from .request import MAX_SEED
from .samplers import read_sampler

_OURS = "sdlora "
_TEXTS = (".txt", ".text")
_LONGEST = 1 << 20
"""Bytes of a text file that are read, at most."""


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """What repeats an image."""

    prompt: str
    """With the tags of its LoRAs."""
    recipe: Recipe
    options: Mapping[str, Any]
    """Arguments of ``generate``; what the recipe does not state is left out."""
    clip_skip: int | None
    notes: tuple[str, ...]
    """One line for each respect in which the new image will differ, or may."""

    @property
    def is_ours(self) -> bool:
        """Whether sdlora wrote it."""
        return _is_ours(self.recipe.fields)


def read_repetition(file: Path) -> Repetition:
    """Read the recipe in ``file``: an image of sdlora, A1111 or Forge, or a text file with its parameters.

    Raises:
        DataError: the file cannot be read, or contains no recipe.
    """
    is_text = file.suffix.lower() in _TEXTS
    text = _text_of(file) if is_text else image_text(file).text.get("parameters", "")
    recipe = parse_recipe(text)
    if not recipe.fields:
        raise DataError(f"{file}: contains no recipe; expected the parameters of sdlora, A1111 or Forge")
    return repetition(recipe, tagged_prompt(text))


def repetition(recipe: Recipe, prompt: str) -> Repetition:
    """What repeats the image of ``recipe``, whose prompt with tags is ``prompt``."""
    fields, notes = recipe.fields, list(recipe.problems)

    def number(key: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(fields[key]) if key in fields else None
        except ValueError:
            notes.append(f"{key}: {fields[key]!r} is not a number; it is left out")
            return None

    rescale = "CFG Rescale φ" if RESCALE not in fields else RESCALE
    options = {
        "negative": recipe.negative,
        "seed": number("Seed", int),
        "steps": number("Steps", int),
        "cfg": number("CFG scale", float),
        "size": _size(fields.get("Size"), notes),
        "guidance_rescale": number(rescale, float),
        "mask_blur": number("Mask blur", int),
        **_second_pass(fields, number, notes),
    }
    if options["seed"] is not None and not 0 <= options["seed"] <= MAX_SEED:
        notes.append(f"Seed: {options['seed']} is not from 0 to {MAX_SEED}; the seed is random")
        options["seed"] = None
    options["strength"] = None if "hires" in options else number("Denoising strength", float)
    if _is_ours(fields):
        options["sampler"], options["schedule"] = read_sampler(
            fields.get("Sampler", ""), fields.get("Schedule type", fields.get(OWN_SCHEDULE))
        )
        if fields["Version"] != f"{_OURS}{__version__}":
            notes.append(f"Version: it was made by {fields['Version']}; this is {__version__}")
    else:
        sampler, schedule, different = a1111_sampler(fields)
        options |= {"sampler": sampler, "schedule": schedule}
        notes += [*different, *a1111_differences(fields, sampler)]
    if options["strength"] is not None:
        notes.append("Denoising strength: it was drawn over another image; name that image with --image")
    return Repetition(
        prompt=prompt,
        recipe=recipe,
        options={key: value for key, value in options.items() if value is not None},
        clip_skip=number("Clip skip", int),
        notes=tuple(dict.fromkeys(notes)),
    )


def differing_base(recipe: Recipe, base: BaseCheckpoint) -> list[str]:
    """A line if the image was made with another checkpoint than ``base``, as far as name and hash say."""
    name, digest = recipe.fields.get("Model"), recipe.fields.get("Model hash")
    if base.file is not None and digest is not None and len(digest) >= 10:
        own = file_hashes(base.file).sha256
        same = own.startswith(digest.lower())
    else:
        same = name is None or re.sub(r"\W+", " ", name) == re.sub(r"\W+", " ", base.name)
    if same:
        return []
    called = " ".join(text for text in (name, None if digest is None else f"({digest})") if text)
    return [f"Model: it was made with {called}; this is {base.name}"]


def _second_pass(
    fields: Mapping[str, str], number: Callable[[str, Callable[[str], Any]], Any], notes: list[str]
) -> dict[str, Any]:
    """The arguments of a second pass."""
    scale, resized = number("Hires upscale", float), fields.get("Hires resize")
    first = _size(fields.get("Size"), [])
    if scale is None and resized is not None:
        target = _size(resized, notes)
        if target and first and abs(target[0] / first[0] - target[1] / first[1]) < 0.02:
            scale = target[0] / first[0]
        else:
            notes.append(f"Hires resize: {resized} is not a multiple of the first pass; there is no second pass")
    if scale is None:
        return {}
    stated = fields.get("Hires upscaler", "Latent")
    upscaler = find_upscaler(stated)
    if upscaler is None:
        notes.append(f"Hires upscaler: {stated} is not available here; lanczos is taken")
    steps = number("Hires steps", int)
    return {
        "hires": scale,
        "hires_upscaler": "lanczos" if upscaler is None else upscaler.name,
        "hires_steps": steps or None,  # A1111 writes 0 for as many as the first pass.
        "hires_strength": number("Denoising strength", float) or Hires.strength,
    }


def _size(text: str | None, notes: list[str]) -> tuple[int, int] | None:
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*", text or "")
    if match is None:
        if text is not None:
            notes.append(f"Size: {text!r} is not WIDTHxHEIGHT; it is left out")
        return None
    return int(match[1]), int(match[2])


def _is_ours(fields: Mapping[str, str]) -> bool:
    return fields.get("Version", "").startswith(_OURS)


def _text_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_LONGEST).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is no text in UTF-8") from None
