"""``inspect`` of an image: the recipe that it contains."""

from __future__ import annotations

from pathlib import Path

from ..formats.image_text import image_text
from ..formats.recipe import Recipe, parse_recipe
from .inspect_report import InspectReport

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def image_report(file: Path) -> InspectReport:
    """The report on an image. Raises ``DataError`` if it is missing or cannot be read."""
    found = image_text(file)
    text, size, form = found.text, found.size, found.format
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
