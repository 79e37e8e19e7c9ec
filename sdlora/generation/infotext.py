"""The recipe of an image, written into the image in the form that A1111, Forge and Civitai read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .._version import __version__
from ..base.checkpoint import BaseCheckpoint
from .hires import UPSCALERS
from .inversions import used_inversions
from .loras import WeightedLora
from .request import ImageRequest
from .samplers import SAMPLERS, a1111_schedule

OWN_SCHEDULE = "Timestep spacing"
"""The field of a schedule that A1111 has no name for."""
RESCALE = "CFG Rescale"
"""The field of the guidance rescale, as A1111's extension for it writes it."""


def infotext(
    request: ImageRequest, *, base: BaseCheckpoint, base_autov2: str | None, loras: Sequence[WeightedLora]
) -> str:
    """Prompt with ``<lora:name:weight>`` tags, negative prompt, and one line of parameters.

    ``base_autov2`` is the first ten digits of the checkpoint file's SHA-256. Civitai finds base and LoRAs by
    ``Model hash``, ``Lora hashes`` and ``Hashes``.
    """
    width, height = request.size_on(base)
    schedule_type = a1111_schedule(SAMPLERS[request.sampler], base.schedule, request.steps, request.schedule)
    fields: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].a1111_name,
        "Schedule type": schedule_type,
        OWN_SCHEDULE: request.schedule if schedule_type is None else None,
        "CFG scale": f"{request.cfg:g}",
        RESCALE: f"{request.guidance_rescale:g}" if request.guidance_rescale else None,
        "Seed": request.seed,
        "Size": f"{width}x{height}",
    }
    if base_autov2:
        fields["Model hash"] = base_autov2
    fields["Model"] = re.sub(r"[\",:\s]+", " ", base.name).strip()
    fields["Denoising strength"] = _strength(request)
    if base.clip_skip != base.family.clip_skip:
        fields["Clip skip"] = base.clip_skip
    fields["Init image hash"] = None if request.start is None else request.start.digest
    fields["RNG"] = "CPU"
    fields |= _drawing_fields(request)
    # As A1111's extension for wildcards writes them.
    fields["Wildcard prompt"] = request.prompt_template or None
    fields["Wildcard negative prompt"] = request.negative_template or None
    used = {inversion.words[0]: inversion.sha256 for inversion in used_inversions(request) if inversion.sha256}
    if used:
        fields["TI hashes"] = ", ".join(f"{word}: {digest[:12]}" for word, digest in used.items())
    lora_hashes = {lora.tag_name: lora.fitted.autov3 for lora in loras if lora.fitted.autov3}
    if lora_hashes:
        fields["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in lora_hashes.items())
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items() if value is not None)
    all_hashes = {"model": base_autov2} if base_autov2 else {}
    all_hashes |= {f"lora:{name}": digest for name, digest in lora_hashes.items()}
    all_hashes |= {f"embed:{word}": digest[:10] for word, digest in used.items()}
    if all_hashes:
        # JSON without quotes around it, as Civitai's own extension writes it and its pattern reads it.
        line += f", Hashes: {json.dumps(all_hashes)}"
    line += f", Version: sdlora {__version__}"
    tags = "".join(f" <lora:{lora.tag_name}:{lora.choice.tag}>" for lora in loras)
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    return f"{request.prompt}{tags}{negative}\n{line}"


def _strength(request: ImageRequest) -> str | None:
    repainted = request.start or request.hires
    return None if repainted is None else f"{repainted.strength:g}"


def _drawing_fields(request: ImageRequest) -> dict[str, object]:
    """What A1111 writes of inpainting and of a second pass, where it differs from its defaults."""
    fields: dict[str, object] = {}
    if request.start is not None and request.start.mask is not None and request.start.mask_blur:
        fields["Mask blur"] = request.start.mask_blur
    if request.hires is not None:
        fields["Hires upscale"] = f"{request.hires.scale:g}"
        if request.hires.steps is not None:
            fields["Hires steps"] = request.hires.steps
        fields["Hires upscaler"] = UPSCALERS[request.hires.upscaler].a1111_name
    return fields


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
