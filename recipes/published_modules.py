"""Write ``sdlora/formats/published.json.gz``: every module of the published checkpoints that a LoRA can change.

python -m recipes.published_modules
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

from tests.published import UNETS, our_names, published

TARGET = Path(__file__).parent.parent / "sdlora" / "formats" / "published.json.gz"


def modules_of(family: str) -> dict[str, list[int]]:
    """Canonical name of each module -> shape of its weight."""
    return {
        f"{part}.{name.removesuffix('.weight')}": list(tensor.shape)
        for part, model in published(family).items()
        if part != "vae"
        for name, tensor in our_names(part, model).items()
        if name.endswith(".weight") and "embeddings." not in name
    }


def main() -> None:
    text = json.dumps({family: modules_of(family) for family in UNETS}, separators=(",", ":"))
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0, filename="") as stream:
        stream.write(text.encode())
    TARGET.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    main()
