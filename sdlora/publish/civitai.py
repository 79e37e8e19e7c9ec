"""A LoRA as a folder that can be uploaded: the file, images that link to it, and what A1111 and people want to know."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraFileError
from ..families import Family
from ..formats.hashes import file_hashes
from ..formats.lora_file import LoraFile, read_lora
from ..formats.metadata import safe_title, stated_tags, trigger_words, with_family
from ..formats.metadata_file import read_metadata, redacted, write_metadata
from ..formats.readers import lost_elsewhere
from ..generation.infotext import save_png
from ..generation.loras import LoraChoice
from ..generation.request import ImageRequest
from ..generation.studio import generate
from ..progress import Progress
from ..tools.convert import convert
from .model_card import model_card, sidecar

PREVIEWS = 4


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was made; file names are within ``folder``."""

    folder: str
    lora: str
    previews: tuple[str, ...]
    card: str
    sidecar: str
    trigger: tuple[str, ...]
    hashes: dict[str, str]
    redacted: int
    """Values of the metadata out of which folders or addresses were taken."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_civitai(
    lora: str | Path,
    folder: str | Path,
    *,
    base: str = "mini",
    prompts: Sequence[str] | None = None,
    negative: str = "",
    weight: float = 1.0,
    seed: int = 0,
    steps: int = ImageRequest.steps,
    cfg: float = ImageRequest.cfg,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Package:
    """Make ``folder``, which must not be there or be empty, whole or not at all.

    Args:
        base: what the images are drawn on; not looked at where ``prompts`` is empty.
        prompts: of the images; by default the trigger with each of the most frequent tags, () for no images.
        weight: that the images have and that is recommended, above 0: Civitai reads no other from a prompt.

    Raises:
        LoraFileError: the file cannot be read or its family not be told; ``folder`` is in use; there is no trigger and no
            prompt.
        BaseModelError, CompatibilityError: the images cannot be drawn on ``base``.
    """
    source, target = Path(lora), Path(folder)
    file = read_lora(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LoraFileError(f"{target}: is there already; choose another folder")
    if not 0 < weight <= 10:
        raise LoraFileError(f"weight {weight:g}: expected a number above 0 and up to 10")
    if file.family is None:
        raise LoraFileError(
            f"{source}: its family cannot be told from names, shapes or metadata, so it cannot be listed"
        )
    trigger = trigger_words(file.metadata)
    if prompts is None:
        prompts = _default_prompts(file, trigger)
        if not prompts:
            raise LoraFileError(f"{source}: names no trigger word; give a prompt for the images")
    name = safe_title(source.name if source.is_dir() else source.stem)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        packed = partial / f"{name}.safetensors"
        changed = _pack(file, file.family, packed, base if prompts else None)
        drawing: dict[str, Any] = {"negative": negative, "seed": seed, "steps": steps, "cfg": cfg, "size": size}
        choice = LoraChoice(file=packed, unet=weight, text_encoder=weight)
        images = generate(prompts, base=base, loras=[choice], progress=progress, **drawing) if prompts else []
        previews = [f"{name}-{number}.png" for number in range(1, len(images) + 1)]
        for image, preview in zip(images, previews, strict=True):
            save_png(image.image, partial / preview, image.parameters)
        if images:
            shutil.copyfile(partial / previews[0], partial / f"{name}.preview.png")
        hashes = file_hashes(packed)
        beside = sidecar(file, file.family, trigger, weight, negative)
        (partial / f"{name}.json").write_text(json.dumps(beside, indent=4, ensure_ascii=False), encoding="utf-8")
        card = model_card(name, read_lora(packed), file.family, trigger, weight, hashes, prompts)
        (partial / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Package(
        folder=str(target),
        lora=f"{name}.safetensors",
        previews=tuple(previews),
        card="MODEL_CARD.md",
        sidecar=f"{name}.json",
        trigger=trigger,
        hashes=hashes.by_name(),
        redacted=changed,
    )


def _default_prompts(file: LoraFile, trigger: Sequence[str]) -> list[str]:
    if not trigger:
        return []
    call = ", ".join(trigger)
    known = {word.lower() for word in trigger}
    tags = [tag for tag in stated_tags(file.metadata) if tag.lower() not in known]
    return [f"{call}, {tag}" for tag in tags[:PREVIEWS]] or [call]


def _pack(file: LoraFile, family: Family, packed: Path, base: str | None) -> int:
    """Write the file in kohya's names with metadata that is clean and hashes that hold; returns how much was cleaned."""
    if file.path.is_dir() or file.path.suffix != ".safetensors" or lost_elsewhere(file.modules, family):
        convert(file.path, packed, to="kohya", base=base)
    else:
        shutil.copyfile(file.path, packed)
    metadata = read_metadata(packed)
    clean = redacted(metadata)
    write_metadata(packed, packed, with_family(clean, family) | {"ss_output_name": packed.stem}, hashes=True)
    return sum(metadata[key] != clean[key] for key in metadata)
