"""A LoRA as a folder to upload: the file, previews that link to it, A1111's card and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from ..errors import CompatibilityError, LoraFileError
from ..families import Family
from ..files import check_target, whole_folder
from ..formats.hashes import FileHashes, file_hashes
from ..formats.lora_file import LoraFile, read_lora
from ..formats.metadata import safe_title, stated_tags, trigger_words, with_family
from ..formats.metadata_file import read_metadata, write_metadata
from ..formats.readers import lost_elsewhere
from ..formats.redaction import redacted
from ..generation.alternatives import as_text
from ..generation.loras import LoraChoice, check_numbers
from ..generation.prompt_syntax import check_syntax
from ..generation.request import ImageRequest
from ..generation.saving import save_png
from ..generation.studio import Studio
from ..generation.wildcards import choose_texts
from ..progress import Progress, progress_or_bar
from ..tools.convert import convert
from .model_card import Presentation, model_card, sidecar, unpublished

PREVIEWS = 4
"""Images by default."""
MAX_WEIGHT = 10.0
_CARD = "MODEL_CARD.md"


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
    files: tuple[str, ...]
    """All of the above and what else was written, sorted."""
    warning: str | None
    """Why nobody else can use the LoRA, if it fits no published checkpoint."""
    redacted: int
    """Number of values in the metadata from which ``redacted`` took something out."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def export_civitai(
    lora: str | Path,
    folder: str | Path,
    *,
    base: str = "mini",
    prompts: Sequence[str] | None = None,
    negative: str = ImageRequest.negative,
    weight: float = 1.0,
    seed: int = ImageRequest.seed,
    steps: int = ImageRequest.steps,
    cfg: float = ImageRequest.cfg,
    size: tuple[int, int] | None = ImageRequest.size,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> Package:
    """Make ``folder``, which must be absent or empty, whole or not at all.

    Args:
        base: what the previews are drawn on; not used if ``prompts`` is empty.
        prompts: one preview each, drawn as by ``generate``; by default the trigger with each frequent tag, () for none.
        weight: LoRA weight for the previews, and recommended to users; above 0, as Civitai reads no other from a prompt.
        size: (width, height) of the previews in pixels; by default the base's own square.
        progress: a bar on standard error by default.
        stop: ends the drawing when it is set; nothing is left then.

    Raises:
        LoraFileError: the file cannot be read or holds NaN, its family is unknown, ``folder`` is in use, or there is
            neither a trigger word nor a prompt.
        BaseModelError, CompatibilityError: the previews cannot be drawn on ``base``.
        TargetError: ``folder`` cannot be made where it is.
        Interrupted: by ``stop``.
    """
    source, target = Path(lora), Path(folder)
    check_target(target, "new folder")
    file = read_lora(source)
    family = _check(file, target, weight)
    trigger = trigger_words(file.metadata)
    common = ImageRequest(prompt="", negative=negative, seed=seed, steps=steps, cfg=cfg, size=size)
    written = _default_prompts(file, trigger) if prompts is None else prompts
    requests = choose_texts([replace(common, prompt=prompt) for prompt in written])
    drawn = tuple(request.prompt for request in requests)
    check_syntax(() if prompts is None else drawn, [negative])
    shown = Presentation(
        name=safe_title(source.name if source.is_dir() else source.stem),
        family=family,
        trigger=trigger,
        weight=weight,
        negative=negative,
        prompts=drawn,
    )
    with progress_or_bar(progress) as reporting, whole_folder(target) as partial:
        packed = partial / f"{shown.name}.safetensors"
        changed = _pack(file, family, packed, base if requests else None, reporting)
        previews = _draw(requests, source, packed, shown, base=base, progress=reporting, stop=stop) if requests else ()
        hashes = file_hashes(packed)
        packed_lora = read_lora(packed)
        _write_cards(partial, file, packed_lora, shown, hashes)
        files = tuple(sorted(written.name for written in partial.iterdir()))
    return Package(
        folder=str(target),
        lora=packed.name,
        previews=previews,
        card=_CARD,
        sidecar=_sidecar_name(shown),
        trigger=trigger,
        hashes=hashes.by_name(),
        files=files,
        warning=unpublished(packed_lora, family),
        redacted=changed,
    )


def _check(file: LoraFile, target: Path, weight: float) -> Family:
    """The family of what can be exported. Raises as ``export_civitai``."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LoraFileError(f"{target}: exists already; choose another folder")
    if not 0 < weight <= MAX_WEIGHT:
        raise LoraFileError(f"weight {weight:g}: expected a number above 0 and up to {MAX_WEIGHT:g}")
    check_numbers(file)
    if file.family is None:
        raise LoraFileError(
            f"{file.path}: names, shapes and metadata do not show its family, which an upload must state"
        )
    return file.family


def _default_prompts(file: LoraFile, trigger: Sequence[str]) -> list[str]:
    if not trigger:
        raise LoraFileError(f"{file.path}: names no trigger word; give a prompt for the previews")
    call = ", ".join(trigger)
    known = {word.lower() for word in trigger}
    tags = [tag for tag in stated_tags(file.metadata) if tag.lower() not in known]
    return [as_text(prompt) for prompt in [f"{call}, {tag}" for tag in tags[:PREVIEWS]] or [call]]


def _pack(file: LoraFile, family: Family, packed: Path, base: str | None, progress: Progress) -> int:
    """Write the LoRA in kohya's format with clean metadata and correct hashes; returns how many values were cleaned."""
    if file.path.is_dir() or file.path.suffix != ".safetensors" or lost_elsewhere(file.modules, family):
        convert(file.path, packed, to="kohya", base=base, progress=progress)
    else:
        shutil.copyfile(file.path, packed)
    metadata = read_metadata(packed)
    clean = redacted(metadata)
    write_metadata(packed, packed, with_family(clean, family) | {"ss_output_name": packed.stem}, hashes=True)
    return sum(metadata[key] != clean[key] for key in metadata)


def _draw(
    requests: Sequence[ImageRequest],
    source: Path,
    packed: Path,
    shown: Presentation,
    *,
    base: str,
    progress: Progress,
    stop: Event | None,
) -> tuple[str, ...]:
    """Draw the previews beside ``packed``, which was made of ``source``; returns their names."""
    choice = LoraChoice(file=packed, unet=shown.weight, text_encoder=shown.weight)
    try:
        studio = Studio.open(base, [choice], requests=requests, precision="auto")
    except CompatibilityError as error:
        # Of the file that the caller knows.
        raise CompatibilityError([problem.replace(str(packed), str(source)) for problem in error.problems]) from None
    images = studio.images(requests, progress=progress, stop=stop)
    names = tuple(f"{shown.name}-{number}.png" for number in range(1, len(images) + 1))
    for image, name in zip(images, names, strict=True):
        save_png(image.image, packed.with_name(name), image.parameters)
    shutil.copyfile(packed.with_name(names[0]), packed.with_name(f"{shown.name}.preview.png"))
    return names


def _write_cards(folder: Path, source: LoraFile, packed: LoraFile, shown: Presentation, hashes: FileHashes) -> None:
    beside = json.dumps(sidecar(source, shown), indent=4, ensure_ascii=False)
    (folder / _sidecar_name(shown)).write_text(beside, encoding="utf-8")
    (folder / _CARD).write_text(model_card(packed, shown, hashes), encoding="utf-8")


def _sidecar_name(shown: Presentation) -> str:
    return f"{shown.name}.json"
