"""Decoded images that stay in memory between their examination and their encoding."""

from __future__ import annotations

import threading
from pathlib import Path

from PIL import Image

from .images import flattened, open_image

KEPT_BYTES = 2**28
"""Memory for the images of a run before they are encoded."""
_BYTES_PER_PIXEL = 4
"""Pillow stores RGB in 32 bits."""


class KeptImages:
    """Upright RGB images on ``background``: the first ones that fit into ``limit`` bytes. Safe with threads."""

    def __init__(self, background: str, *, limit: int) -> None:
        self._background = background
        self._free = limit
        self._images: dict[Path, Image.Image] = {}
        self._lock = threading.Lock()

    def offer(self, file: Path, upright: Image.Image) -> None:
        """Keep what ``open_image`` would return for ``file``, if there is room; ``upright`` may have any mode."""
        size = upright.width * upright.height * _BYTES_PER_PIXEL
        with self._lock:
            if file in self._images or size > self._free:
                return
            self._free -= size
        image = flattened(upright, self._background)
        # Counting the frames of an open file overwrites its first one.
        self._images[file] = image.copy() if image is upright else image

    def open(self, file: Path) -> Image.Image:
        """The kept image, or the file decoded again: upright, RGB.

        Raises:
            ImageError: as ``open_image``.
        """
        kept = self._images.get(file)
        return open_image(file, self._background) if kept is None else kept

    def clear(self) -> None:
        """Free the memory; ``open`` decodes files again from here on."""
        self._images.clear()
        self._free = 0
