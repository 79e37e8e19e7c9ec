"""Latents of every view of the images, encoded once: in this run, or read from the cache of an earlier one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Framing
from ..base.device_memory import Room, working_on
from ..base.encode import encode_pixels
from ..base.fingerprints import vae_fingerprint
from ..cache.filling import Job, fill
from ..cache.keys import latent_key
from ..cache.store import EncodedCache
from ..config.sections import Config
from ..data.buckets import Placement
from ..data.examine import ExaminedImage
from ..data.images import as_pixels, cut_out, open_mask, scale
from ..data.kept_images import KeptImages
from ..data.masks import mask_on_grid
from ..data.views import View
from ..progress import Progress

SCALED_IMAGES = 16
"""Number of scaled images kept for further crops of them; a few more than threads load at once."""
PIXELS_AT_ONCE = 2**20
"""Pixels that several cores encode at once: about three gigabytes of activations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """Latent distribution of a view: ``mean`` and ``std`` are (4, h, w) float32, at the latent scale and resolution.

    ``mask``, (1, h, w) float32 in [0, 1], weights the loss; None without a mask. All are on the base's device, or all in
    main memory.
    """

    mean: Tensor
    std: Tensor
    framing: Framing
    mask: Tensor | None


def encode_views(
    base: Base,
    items: Sequence[ExaminedImage],
    views: Sequence[View],
    config: Config,
    cache: EncodedCache,
    kept: KeptImages,
    progress: Progress,
    room: Room,
) -> dict[View, EncodedImage]:
    """Look up or encode ``views`` of ``items``: mean and standard deviation (4, h / 8, w / 8) of each view of h x w pixels.

    Threads open images while others are encoded. Latents are on the base's device as far as ``room`` allows; the VAE is
    there while it encodes.

    Raises:
        DataError: an image or mask can no longer be read.
        BaseModelError: the VAE produced NaN or Inf.
    """
    masks = _masks(items, views, config, base.checkpoint.latent_factor)
    images: dict[View, EncodedImage] = {}
    jobs = latent_jobs(base, items, views, config, kept)
    with working_on(base.device, base.vae):
        encoded = fill(
            cache,
            jobs,
            partial(encode_crop, base),
            progress=progress,
            task="Encoding images",
            encoders=encoders_for(base, views),
        )
        for view, tensors in zip(views, encoded, strict=True):
            mask = masks.get(view)
            mean, std, *masked = room.keep([tensors["mean"], tensors["std"], *([] if mask is None else [mask])])
            images[view] = EncodedImage(
                mean=mean,
                std=std,
                framing=framing_of(items[view.item], view),
                mask=masked[0] if masked else None,
            )
    return images


def encoders_for(base: Base, views: Sequence[View]) -> int:
    """Number of images to encode at once: on a CPU one on each core, if memory allows for that many of this size.

    Then no core waits for another or for an image to be opened: a quarter faster than all cores on one image.
    """
    largest = max((view.placement.width * view.placement.height for view in views), default=0)
    threads = torch.get_num_threads()
    return threads if base.device.type == "cpu" and threads * largest <= PIXELS_AT_ONCE else 1


def latent_jobs(
    base: Base, items: Sequence[ExaminedImage], views: Sequence[View], config: Config, kept: KeptImages
) -> list[Job[np.ndarray]]:
    """One job for each view. It loads uint8 (h, w, 3): the pixels of the crop, mirrored for a flipped view.

    Loading does not use torch, whose threads belong to the encoder.
    """
    vae = vae_fingerprint(base) if config.cache.disk else ""
    crops = _Crops(items, kept)
    return [
        Job(
            key=latent_key(
                pixels=items[view.item].shown_digest(config.data.alpha_background),
                placement=view.placement,
                flipped=view.flipped,
                vae=vae,
                dtype=base.vae.dtype,
                device=base.device,
            ),
            load=partial(crops.load, view),
        )
        for view in views
    ]


class _Crops:
    """Loads views. Crops of one image share its scaled copy, of which the last few are kept."""

    def __init__(self, items: Sequence[ExaminedImage], kept: KeptImages):
        self._items, self._kept = items, kept
        self._scaled = lru_cache(maxsize=SCALED_IMAGES)(self._new_scaled)

    def load(self, view: View) -> np.ndarray:
        """The pixels of ``view``, uint8 (h, w, 3)."""
        uncropped = replace(view.placement, left=0, top=0)
        return cut_out(self._scaled(view.item, uncropped).get(), view.placement, flipped=view.flipped)

    def _new_scaled(self, item: int, placement: Placement) -> _ScaledImage:
        return _ScaledImage(self._items[item].source.file, self._kept, placement)


class _ScaledImage:
    """An image that the first thread that needs it opens and scales; other threads wait for it."""

    def __init__(self, file: Path, kept: KeptImages, placement: Placement):
        self._file, self._kept, self._placement = file, kept, placement
        self._lock = threading.Lock()
        self._image: Image.Image | None = None

    def get(self) -> Image.Image:
        with self._lock:
            if self._image is None:
                self._image = scale(self._kept.open(self._file), self._placement)
            return self._image


def encode_crop(base: Base, pixels: np.ndarray) -> dict[str, Tensor]:
    """uint8 (h, w, 3), as loaded by ``latent_jobs`` -> ``mean`` and ``std``, (4, h / 8, w / 8) float32, latent scale.

    Raises:
        BaseModelError: the VAE produced NaN or Inf.
    """
    posterior = encode_pixels(base, as_pixels(pixels)[None])
    return {"mean": posterior.mean[0], "std": posterior.std[0]}


def framing_of(item: ExaminedImage, view: View) -> Framing:
    """Size conditioning of SDXL for ``view``, in pixels. For a mirrored view, ``left`` counts in the mirrored image."""
    return Framing(
        original_width=item.width,
        original_height=item.height,
        left=view.left,
        top=view.placement.top,
        width=view.placement.width,
        height=view.placement.height,
    )


def _masks(items: Sequence[ExaminedImage], views: Sequence[View], config: Config, cell: int) -> dict[View, Tensor]:
    """The masks of the views that have one, (1, h, w) float32 in [0, 1]; the mask of each image is opened once.

    ``cell`` is the side in pixels of the square that one latent value covers.
    """
    if config.data.mask == "none":
        return {}

    def masks_of_item(item: ExaminedImage, views: Sequence[View]) -> dict[View, Tensor]:
        mask = open_mask(item.source.file, item.source.mask, (item.width, item.height), config.data.mask)
        if mask is None:
            return {}
        return {view: torch.from_numpy(mask_on_grid(mask, view, cell))[None] for view in views}

    by_item: dict[int, list[View]] = {}
    for view in views:
        by_item.setdefault(view.item, []).append(view)
    with ThreadPoolExecutor() as pool:
        found = pool.map(masks_of_item, [items[number] for number in by_item], by_item.values())
        return {view: mask for masks in found for view, mask in masks.items()}
