"""The modules of the published checkpoints, by which a LoRA file is read without a base."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path


@cache
def published_modules(family: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the weight, of every module of UNet and text encoders that has one.

    ``family`` is ``sd1``, ``sd2`` or ``sdxl``. Made by ``recipes/published_modules.py`` from the models themselves.
    """
    tables = json.loads(gzip.decompress((Path(__file__).parent / "published.json.gz").read_bytes()))
    return {name: tuple(shape) for name, shape in tables[family].items()}
