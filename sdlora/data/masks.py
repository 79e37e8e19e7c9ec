"""Masks, which weight the loss within an image, on the grid of its latents."""

from __future__ import annotations

import numpy as np

from .views import View


def mask_on_grid(mask: np.ndarray, view: View, cell: int) -> np.ndarray:
    """The part of ``mask`` that ``view`` shows, as means over cells of ``cell`` × ``cell`` shown pixels.

    ``mask`` is (h, w), in [0, 1], over the whole image at any size. Returns float32 (height / cell, width / cell).
    The means are exact: a pixel on the edge of a cell counts in proportion to its area within.
    """
    spot = view.placement
    rows = (spot.top + np.arange(spot.height // cell + 1) * cell) * (mask.shape[0] / spot.scaled_height)
    columns = (spot.left + np.arange(spot.width // cell + 1) * cell) * (mask.shape[1] / spot.scaled_width)
    grid = _means(_means(mask.astype(np.float64), rows).T, columns).T
    return np.ascontiguousarray(grid[:, ::-1] if view.flipped else grid, np.float32)


def _means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means along the first axis between neighbouring ``edges``, which are positions along it."""
    running = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
    whole = np.minimum(edges.astype(int), len(values) - 1)
    at_edges = running[whole] + (edges - whole)[:, None] * values[whole]
    return np.diff(at_edges, axis=0) / np.diff(edges)[:, None]
