"""Images that are the same, or nearly so: by digest, and by a perceptual hash of what is left at 32 x 32 grey levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.image_facts import THUMBNAIL_SIDE, ImageFacts

HASH_BITS = 256
NEAR_BITS = 64
"""Hashes that differ in at most so many bits are compared closer. Of unrelated images 128 bits differ, give or take 8."""
NEAR_LEVELS = 0.2
"""Mean difference of two thumbnails, brought to equal mean and contrast, up to which images count as nearly the same."""
FLAT = 2.0
"""A spread below which an image is one colour, and has nothing to be compared by."""
_BLOCK = 256
_FREQUENCIES = 16


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two numbers of images, ``first`` < ``second``."""

    first: int
    second: int
    bits: int
    """In how many of ``HASH_BITS`` their hashes differ."""


def exact_groups(facts: Sequence[ImageFacts]) -> list[tuple[int, ...]]:
    """Numbers of the images that are the same, in groups of two or more, in order."""
    by_digest: dict[str, list[int]] = {}
    for number, own in enumerate(facts):
        by_digest.setdefault(own.digest, []).append(number)
    return [tuple(group) for group in by_digest.values() if len(group) > 1]


def near_pairs(facts: Sequence[ImageFacts]) -> list[Pair]:
    """Images that are nearly the same as an earlier one: scaled, saved again, brightened, cropped by a few per cent.

    Each with the earliest such image alone, so that a thousand frames of one film make a thousand pairs. Images of one
    colour are in no pair, and of images with the same digest only the first is compared.
    """
    by_digest: dict[str, int] = {}
    for number, own in enumerate(facts):
        if own.spread >= FLAT:
            by_digest.setdefault(own.digest, number)
    numbers = list(by_digest.values())
    if len(numbers) < 2:
        return []
    thumbnails = np.stack([np.frombuffer(facts[number].thumbnail, np.uint8) for number in numbers])
    return [
        Pair(first=numbers[first], second=numbers[second], bits=bits)
        for first, second, bits in _close(perceptual_hashes(thumbnails), thumbnails)
    ]


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 (n, 1024) -> uint64 (n, 4): which of the 16 x 16 lowest frequencies lie above their median.

    The cosine transform of Zauner 2010 (section 3.2.1), of more frequencies than his 8 x 8. The mean, the lowest of them, is
    taken for the median, so that brightness does not count.
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


def _close(hashes: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, second, differing bits) for each image that is close to an earlier one; in order of the second.

    A block of hashes is compared with all behind its first at once: 10,000 images are 50 million comparisons.
    """
    nearest: dict[int, tuple[int, int]] = {}
    for start in range(0, len(hashes), _BLOCK):
        block, rest = hashes[start : start + _BLOCK], hashes[start:]
        bits = np.zeros((len(block), len(rest)), np.uint16)
        for word in range(hashes.shape[1]):
            bits += np.bitwise_count(block[:, None, word] ^ rest[None, :, word])
        alike = np.triu(bits <= NEAR_BITS, 1)
        alike[:, [second - start for second in nearest if second >= start]] = False
        while (seconds := np.flatnonzero(alike.any(axis=0))).size:
            firsts = alike[:, seconds].argmax(axis=0)
            for part in range(0, len(seconds), _BLOCK):
                own, others = firsts[part : part + _BLOCK], seconds[part : part + _BLOCK]
                apart = np.abs(_evened(thumbnails[start + own]) - _evened(thumbnails[start + others])).mean(axis=1)
                for first, second in zip(own[apart <= NEAR_LEVELS], others[apart <= NEAR_LEVELS], strict=True):
                    nearest[start + int(second)] = (start + int(first), int(bits[first, second]))
                    alike[:, second] = False
            alike[firsts, seconds] = False
    return [(first, second, bits) for second, (first, bits) in sorted(nearest.items())]


def _evened(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 1024) -> float32 of the same shape, of mean 0 and, but for the faintest, standard deviation 1."""
    levels = thumbnails.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    levels /= levels.std(axis=1, keepdims=True) + 4
    return levels
