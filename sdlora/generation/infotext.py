"""The recipe of an image, written into the image, in the form that A1111, Forge and Civitai read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..files import write_png
from ..formats.metadata import safe_title

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import ImageRequest

SAMPLERS = {"dpm++2m": "DPM++ 2M", "euler": "Euler", "euler-a": "Euler a", "ddim": "DDIM"}
"""Our name -> the name in image parameters."""


@dataclass(frozen=True, kw_only=True)
class UsedLora:
    """A LoRA that took part in an image."""

    name: str
    unet: float
    text_encoder: float
    autov3: str | None
    """12 digits of the hash over the file's tensors."""


def infotext(
    request: ImageRequest,
    *,
    base_name: str,
    base_autov2: str | None,
    loras: Sequence[UsedLora],
    clip_skip: int | None = None,
) -> str:
    """Prompt with ``<lora:name:weight>`` tags, negative prompt, and one line of parameters.

    ``base_autov2`` is ten digits of the checkpoint file's hash. Civitai finds base and LoRAs by ``Model hash``,
    ``Lora hashes`` and ``Hashes``.
    """
    tags = "".join(f" <lora:{safe_title(lora.name)}:{_weights(lora)}>" for lora in loras)
    fields = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler],
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
    }
    if base_autov2:
        fields["Model hash"] = base_autov2
    fields["Model"] = base_name
    if clip_skip is not None:
        fields["Clip skip"] = clip_skip
    hashes = {safe_title(lora.name): lora.autov3 for lora in loras if lora.autov3}
    if hashes:
        fields["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
    own = {"model": base_autov2} if base_autov2 else {}
    linked = own | {f"lora:{name}": digest for name, digest in hashes.items()}
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items())
    if linked:
        # As JSON without quotes around it, which is how Civitai's own extension writes it and its pattern reads it.
        line += f", Hashes: {json.dumps(linked)}"
    line += f", Version: sdlora {__version__}"
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    return f"{request.prompt}{tags}{negative}\n{line}"


def save_png(image: Image.Image, file: Path, parameters: str) -> None:
    """Write ``image`` with ``parameters`` as its text chunk of that name. Raises as ``files.write_whole``."""
    write_png(file, image, [("parameters", parameters)])


def _weights(lora: UsedLora) -> str:
    same = lora.unet == lora.text_encoder
    return f"{lora.unet:g}" if same else f"{lora.unet:g}:{lora.text_encoder:g}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
