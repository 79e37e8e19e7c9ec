"""Random numbers as a function of (seed, stream, position), so that no run depends on what was drawn before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are drawn for. A number never changes and never serves twice, or runs would not repeat."""

    ORDER = 0
    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    CAPTION_DROPOUT = 4
    CROP = 5
    FLIP = 6
    CAPTION_LINE = 10
    WILDCARD = 11
    TAG_SHUFFLE = 12
    TAG_DROPOUT = 13
    VALIDATION_NOISE = 20
    COMPARISON_NOISE = 21
    NOISE_OFFSET = 30
    MULTIRES_NOISE = 31
    INPUT_PERTURBATION = 32
    ADAPTER_DROPOUT = 33
    OPTIMIZER = 40
    MERGE_DROPOUT = 50


def generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """A fresh generator for ``stream`` at ``position``, such as (step, slot); equal arguments give equal numbers."""
    return np.random.default_rng([seed, stream, *position])
