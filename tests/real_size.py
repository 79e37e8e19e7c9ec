"""Checkpoint files of the published sizes that take no space on the disk: a header, and a hole that reads as zeros."""

from __future__ import annotations

import json
from pathlib import Path

from sdlora.families import FAMILIES
from tests.published import our_names, published
from tests.single_file import ldm_tensors


def write_hollow_checkpoint(file: Path, family: str) -> Path:
    """A single float16 file in LDM's or sgm's names, as published for ``family``; every weight is zero."""
    parts = {part: our_names(part, model) for part, model in published(family).items()}
    header, position = {}, 0
    for name, tensor in ldm_tensors(parts, FAMILIES[family]).items():
        span = [position, position + 2 * tensor.numel()]
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    return file
