"""Images that are the same, or nearly so: by digest, and by a perceptual hash of 32 x 32 grey levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.image_facts import THUMBNAIL_SIDE, ImageFacts

HASH_BITS = 256
NEAR_BITS = 64
"""Images are compared closely where at most so many bits of their hashes differ; of unrelated images 128 ± 8 do."""
NEAR_LEVELS = 0.2
"""Mean difference of two thumbnails of equal mean and contrast, up to which images count as nearly the same."""
FLAT = 2.0
"""A spread below which an image is one colour, with nothing to compare."""
_BLOCK = 256
_FREQUENCIES = 16


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Positions of two images, ``first`` < ``second``."""

    first: int
    second: int
    bits: int
    """Number of bits, of ``HASH_BITS``, in which their hashes differ."""


def exact_groups(facts: Sequence[ImageFacts]) -> list[tuple[int, ...]]:
    """Positions of the images that are the same, in groups of two or more, in order."""
    by_digest: dict[str, list[int]] = {}
    for number, image in enumerate(facts):
        by_digest.setdefault(image.digest, []).append(number)
    return [tuple(group) for group in by_digest.values() if len(group) > 1]


def near_pairs(facts: Sequence[ImageFacts]) -> list[Pair]:
    """Images that are nearly the same as an earlier one: scaled, saved again, brightened, cropped by a few per cent.

    Each is paired with the earliest such image alone, so that a thousand frames of one film make a thousand pairs. Images
    of one colour are in no pair, and of images with the same digest only the first is compared.
    """
    by_digest: dict[str, int] = {}
    for number, image in enumerate(facts):
        if image.spread >= FLAT:
            by_digest.setdefault(image.digest, number)
    numbers = list(by_digest.values())
    if len(numbers) < 2:
        return []
    thumbnails = np.stack([np.frombuffer(facts[number].thumbnail, np.uint8) for number in numbers])
    return [
        Pair(first=numbers[first], second=numbers[second], bits=bits)
        for first, second, bits in _earlier_neighbours(perceptual_hashes(thumbnails), thumbnails)
    ]


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 (n, 1024) -> uint64 (n, 4): which of the 16 x 16 lowest frequencies lie above their median.

    The cosine transform of Zauner 2010 (section 3.2.1), with more frequencies than his 8 x 8. The lowest of them, the mean,
    is replaced by the median, so that brightness does not count.
    """
    side = THUMBNAIL_SIDE
    places = np.arange(side)
    waves = np.cos(np.pi * (2 * places[None] + 1) * places[:_FREQUENCIES, None] / (2 * side)).astype(np.float32)
    hashes = np.empty((len(thumbnails), HASH_BITS // 64), np.uint64)
    for start in range(0, len(thumbnails), _BLOCK):
        grey = thumbnails[start : start + _BLOCK].reshape(-1, side, side).astype(np.float32)
        lowest = (waves @ grey @ waves.T).reshape(len(grey), HASH_BITS)
        median = np.median(lowest[:, 1:], axis=1, keepdims=True)
        lowest[:, :1] = median
        hashes[start : start + _BLOCK] = np.packbits(lowest > median, axis=1).view(np.uint64)
    return hashes


def _earlier_neighbours(hashes: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, second, differing bits) for each image that is close to an earlier one; in order of the second.

    A block of hashes is compared with itself and all later ones at once: 10,000 images are 50 million comparisons.
    """
    found: dict[int, tuple[int, int]] = {}
    for start in range(0, len(hashes), _BLOCK):
        bits = _differing_bits(hashes[start : start + _BLOCK], hashes[start:])
        candidates = np.triu(bits <= NEAR_BITS, 1)
        candidates[:, [second - start for second in found if second >= start]] = False
        # Each round compares every image that still has candidates with the earliest of them.
        while (seconds := np.flatnonzero(candidates.any(axis=0))).size:
            firsts = candidates[:, seconds].argmax(axis=0)
            near = _near(thumbnails, start + firsts, start + seconds)
            for first, second in zip(firsts[near], seconds[near], strict=True):
                found[start + int(second)] = (start + int(first), int(bits[first, second]))
                candidates[:, second] = False
            candidates[firsts, seconds] = False
    return [(first, second, bits) for second, (first, bits) in sorted(found.items())]


def _differing_bits(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """uint64 (n, 4), (m, 4) -> uint16 (n, m)."""
    bits = np.zeros((len(hashes), len(others)), np.uint16)
    for word in range(hashes.shape[1]):
        bits += np.bitwise_count(hashes[:, None, word] ^ others[None, :, word])
    return bits


def _near(thumbnails: np.ndarray, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """For each pair of places in ``thumbnails``, whether the two are nearly the same: bool, as long as ``firsts``."""
    near = np.empty(len(firsts), bool)
    for start in range(0, len(firsts), _BLOCK):
        part = slice(start, start + _BLOCK)
        difference = _evened(thumbnails[firsts[part]]) - _evened(thumbnails[seconds[part]])
        near[part] = np.abs(difference).mean(axis=1) <= NEAR_LEVELS
    return near


def _evened(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 (n, 1024) -> float32 of the same shape, with mean 0 and (except for the faintest) standard deviation 1."""
    levels = thumbnails.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    levels /= levels.std(axis=1, keepdims=True) + 4
    return levels
