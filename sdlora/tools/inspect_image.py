"""``inspect`` of an image: the recipe that it contains."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..formats.recipe import Recipe, parse_recipe
from .inspect_report import InspectReport

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_CODE = 8
"""Bytes at the start of EXIF's comment that name its encoding."""


def image_report(file: Path) -> InspectReport:
    """The report on an image. Raises ``DataError`` if it is missing or cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                text = {
                    key: value for key, value in image.info.items() if isinstance(value, str) and isinstance(key, str)
                }
                comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
                size, form = image.size, image.format or "unknown"
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image: {error}") from None
    if "parameters" not in text and isinstance(comment, bytes | str) and comment:
        text["parameters"] = _comment(comment)
    recipe = parse_recipe(text["parameters"]) if "parameters" in text else None
    return InspectReport(
        kind="image",
        file=file.name,
        family=None,
        format=f"{form}, {size[0]} x {size[1]} pixels",
        modules={},
        dtype=None,
        prediction=None,
        problems=recipe.problems if recipe else (),
        notes=_notes(recipe),
        recipe=recipe,
        hashes={},
        metadata=text,
    )


def _notes(recipe: Recipe | None) -> tuple[str, ...]:
    """Which weight of a LoRA is whose, where its two differ."""
    if recipe is None:
        return ("it contains no recipe: no parameters of A1111, Forge or sdlora",)
    return tuple(
        f"{lora.name}: UNet {lora.unet:g}, text encoder {lora.text_encoder:g} (--lora {lora.option})"
        for lora in recipe.loras
        if lora.unet != lora.text_encoder
    )


def _comment(comment: bytes | str) -> str:
    """EXIF's comment as A1111 writes it: a code of eight bytes, then UTF-16 with the most significant byte first."""
    if isinstance(comment, str):
        return comment
    encoding = "utf-16-be" if comment.startswith(b"UNICODE") else "utf-8"
    return comment[_CODE:].decode(encoding, errors="replace").rstrip("\0")
