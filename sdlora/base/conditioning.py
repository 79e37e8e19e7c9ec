"""What the UNet receives besides the noisy latents: embeddings of prompts, and sizes of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """Embeddings of b prompts in the base's dtype.

    ``context`` is (b, 77 · chunks, width); ``pooled`` is (b, width) where a text encoder of the family has a pooled
    output, else None.
    """

    context: Tensor
    pooled: Tensor | None

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """All rows in one batch; they must have the same number of chunks."""
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return cls(context=torch.cat([row.context for row in rows]), pooled=torch.cat(pooled) if pooled else None)

    def to(self, device: torch.device) -> Conditioning:
        """The same on ``device``; a copy from pinned memory makes nobody wait."""
        unwaited = device.type == "cuda"
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=unwaited)
        return Conditioning(context=self.context.to(device, non_blocking=unwaited), pooled=pooled)

    def row(self, number: int) -> Conditioning:
        """The embeddings of one prompt, as a batch of one."""
        pooled = None if self.pooled is None else self.pooled[number : number + 1]
        return Conditioning(context=self.context[number : number + 1], pooled=pooled)

    def zeroed(self, rows: Tensor) -> Conditioning:
        """The same with zeros in the rows where ``rows``, (b,) bool on its device, is true; see ``zeros``."""
        pooled = None if self.pooled is None else self.pooled.masked_fill(rows[:, None], 0)
        return Conditioning(context=self.context.masked_fill(rows[:, None, None], 0), pooled=pooled)

    def zeros(self) -> Conditioning:
        """Zeros of the same shapes, which SDXL reads as an empty negative prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Conditioning(context=torch.zeros_like(self.context), pooled=pooled)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """SDXL's size conditioning of one image, in pixels: size before scaling, corner of the crop, and size now."""

    original_width: int
    original_height: int
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def whole(cls, width: int, height: int) -> Framing:
        """An image that was neither scaled nor cropped."""
        return cls(original_width=width, original_height=height, left=0, top=0, width=width, height=height)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The six numbers in the order that SDXL was trained with (Podell et al. 2023, section 2.2; heights first)."""
        return (self.original_height, self.original_width, self.top, self.left, self.height, self.width)


def time_ids(framings: Sequence[Framing]) -> Tensor:
    """(b, 6) float32, on the CPU: ``numbers`` of each, which diffusers calls so.

    float32 whatever the base computes in: bfloat16 represents whole numbers exactly only up to 256.
    """
    return torch.tensor([framing.numbers for framing in framings], dtype=torch.float32)
