"""An image small enough to live in a file's metadata, as ModelSpec has it."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from .metadata_file import read_metadata, write_metadata

SIDE = 256
"""Width and height in pixels."""


def add_thumbnail(file: Path, image: Image.Image) -> None:
    """Put ``image``, cut to a square and scaled, into ``modelspec.thumbnail`` of a safetensors file.

    ``image`` is of any size and mode. No hash over the tensors changes. Raises as ``write_metadata``.
    """
    small, buffer = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS), BytesIO()
    small.save(buffer, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    write_metadata(file, file, read_metadata(file) | {"modelspec.thumbnail": url})
