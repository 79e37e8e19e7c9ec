"""Every view of the images as the UNet needs it: encoded once, in this run or in an earlier one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Framing
from ..base.encode import encode_pixels
from ..base.fingerprints import vae_fingerprint
from ..cache.store import EncodedCache, Job, fill, latent_key
from ..config.sections import Config
from ..data.buckets import Placement
from ..data.images import as_pixels, cut_out, open_image, open_mask, scale
from ..data.items import Item
from ..data.masks import mask_on_grid
from ..data.views import View
from ..progress import Progress

SCALED_IMAGES = 16
"""That are kept for further views of the same; a few more than threads load at once."""
PIXELS_AT_ONCE = 2**20
"""That several cores encode: some three gigabytes of inner values."""
DEVICE_BYTES = 2**31
"""Of latents, that are kept on the device; what is beyond that stays in main memory and is copied when it is needed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """``mean`` and ``std`` are (4, h, w) float32; ``mask``, (1, h, w) float32 in [0, 1], weights the loss where it is."""

    mean: Tensor
    std: Tensor
    framing: Framing
    mask: Tensor | None


def encode_views(
    base: Base, items: Sequence[Item], views: Sequence[View], config: Config, cache: EncodedCache, progress: Progress
) -> dict[View, EncodedImage]:
    """Look up or encode ``views`` of ``items``; images are opened by threads while others are encoded.

    Raises:
        DataError: an image or mask can no longer be read.
        BaseModelError: the VAE gives no number.
    """
    masks = _masks(items, views, config, base.checkpoint.latent_factor)
    cached: dict[View, EncodedImage] = {}
    kept = 0
    jobs = latent_jobs(base, items, views, config)
    encoded = fill(
        cache,
        jobs,
        encode_with(base),
        progress=progress,
        task="Encoding images",
        encoders=encoders_for(base, views),
    )
    for view, tensors in zip(views, encoded, strict=True):
        mask = masks.get(view)
        kept += sum(tensor.nbytes for tensor in tensors.values())
        device = base.device if kept <= DEVICE_BYTES else torch.device("cpu")
        cached[view] = EncodedImage(
            mean=tensors["mean"].to(device),
            std=tensors["std"].to(device),
            framing=framing_of(items[view.item], view),
            mask=None if mask is None else mask.to(device),
        )
    return cached


def encoders_for(base: Base, views: Sequence[View]) -> int:
    """How many images are encoded at once: on a CPU one on each core, where there is memory for so many of this size.

    No core waits for another then, and none for an image to be opened: a quarter faster than all cores on one image.
    """
    largest = max((view.placement.width * view.placement.height for view in views), default=0)
    threads = torch.get_num_threads()
    return threads if base.device.type == "cpu" and threads * largest <= PIXELS_AT_ONCE else 1


def latent_jobs(base: Base, items: Sequence[Item], views: Sequence[View], config: Config) -> list[Job[np.ndarray]]:
    """One for each view; what it loads is uint8 (h, w, 3), without computing with torch, whose threads the encoder has."""
    vae = vae_fingerprint(base) if config.cache.disk else ""

    @lru_cache(maxsize=SCALED_IMAGES)
    def scaled(item: int, placement: Placement) -> _Once:
        return _Once(lambda: scale(open_image(items[item].source.file, config.data.alpha_background), placement))

    def loader(view: View) -> Callable[[], np.ndarray]:
        # Crops of the same scaled image differ in nothing else.
        whole = replace(view.placement, left=0, top=0)
        return lambda: cut_out(scaled(view.item, whole)(), view.placement, flipped=view.flipped)

    return [
        Job(
            key=latent_key(
                pixels=items[view.item].digest,
                placement=view.placement,
                flipped=view.flipped,
                vae=vae,
                dtype=base.vae.dtype,
                device=base.device,
            ),
            load=loader(view),
        )
        for view in views
    ]


class _Once:
    """An image that is made by the first thread that asks for it; the others wait."""

    def __init__(self, make: Callable[[], Image.Image]):
        self._make, self._lock = make, threading.Lock()
        self._made: Image.Image | None = None

    def __call__(self) -> Image.Image:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def encode_with(base: Base) -> Callable[[np.ndarray], Mapping[str, Tensor]]:
    """What encodes what ``latent_jobs`` load: mean and standard deviation, (4, h, w) float32 at the latent scale."""

    def encode(cut: np.ndarray) -> Mapping[str, Tensor]:
        posterior = encode_pixels(base, as_pixels(cut)[None])
        return {"mean": posterior.mean[0], "std": posterior.std[0]}

    return encode


def framing_of(item: Item, view: View) -> Framing:
    """What SDXL is told of ``view``; of a mirrored image, where the part lies in the mirrored whole."""
    return Framing(
        original_width=item.width,
        original_height=item.height,
        left=view.left,
        top=view.placement.top,
        width=view.placement.width,
        height=view.placement.height,
    )


def _masks(items: Sequence[Item], views: Sequence[View], config: Config, cell: int) -> dict[View, Tensor]:
    """Of the views that have one; each image's is opened once."""
    if config.data.mask == "none":
        return {}

    def grids(group: tuple[int, list[View]]) -> dict[View, Tensor]:
        number, own = group
        item = items[number]
        mask = open_mask(item.source.file, item.source.mask, (item.width, item.height), config.data.mask)
        if mask is None:
            return {}
        return {view: torch.from_numpy(mask_on_grid(mask, view, cell))[None] for view in own}

    by_item = [(number, list(own)) for number, own in groupby(views, key=lambda view: view.item)]
    with ThreadPoolExecutor() as pool:
        return {view: mask for found in pool.map(grids, by_item) for view, mask in found.items()}
