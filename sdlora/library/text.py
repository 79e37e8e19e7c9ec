"""A library as lines to print."""

from __future__ import annotations

from ..aligned import aligned
from .entry import LoraEntry, LoraLibrary

_TRIGGER = 40
"""Characters of a trigger that are shown; ``to_json`` has all of it."""
_HEADS = ("name", "family", "rank", "size", "trigger", "hash", "preview")


def as_text(library: LoraLibrary, *, fits: bool = False) -> str:
    """A table, then a line for each broken file and for each group of equal files. ``fits`` adds a column."""
    rows = [_row(entry, fits=fits) for entry in library.loras]
    heads = (*_HEADS, *(("fits",) if fits else ()))
    lines = aligned([heads, *rows], right=("size",)) if rows else []
    lines += [f"broken: {file.file}: {file.problem}" for file in library.broken]
    lines += [f"equal tensors: {', '.join(group)}" for group in library.duplicates]
    others = f", {library.others:,} other safetensors files" if library.others else ""
    lines.append(f"{library.folder}: {len(library.loras):,} LoRAs{others}")
    return "\n".join(lines)


def _row(entry: LoraEntry, *, fits: bool) -> tuple[str, ...]:
    kinds = [kind for kind in entry.kinds if kind != "lora"]
    trigger = ", ".join(entry.trigger)
    row = (
        entry.file.removesuffix(".safetensors"),
        entry.family or f"({entry.made_for or 'unknown'})",
        " ".join([*([entry.rank] if entry.rank else []), *kinds]),
        _size(entry.bytes),
        trigger if len(trigger) <= _TRIGGER else f"{trigger[: _TRIGGER - 1]}…",
        entry.autov3 or "",
        entry.preview.rpartition("/")[2] if entry.preview else "",
    )
    if not fits:
        return row
    return (*row, f"{'yes' if entry.fits else 'no'}{f': {entry.reason}' if entry.reason else ''}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
