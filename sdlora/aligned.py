"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[str]) -> list[str]:
    """``rows``, the first of which has the titles, as lines with columns side by side; those titled as in ``right`` are
    aligned to the right."""
    columns = [_padded(cells, right=cells[0] in right) for cells in zip(*rows, strict=True)]
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _padded(cells: Sequence[str], *, right: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
