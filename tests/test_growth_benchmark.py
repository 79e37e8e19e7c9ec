"""The benchmark of growth measures each thing at each size."""

from __future__ import annotations

from pathlib import Path

from benchmarks import growth


def test_each_thing_is_measured_at_each_size(tiny_base: Path, tmp_path: Path) -> None:
    rows = growth.measure(tmp_path, str(tiny_base), images=(2, 3), loras=(1, 2), ranks=(1, 2), rounds=1)
    found = [(row["what"], row.get("count") or row.get("rank")) for row in rows]
    counted = [("plan", "2"), ("plan", "3"), ("step", "2"), ("step", "3")]
    assert found == [
        *counted,
        ("stack", "1"),
        ("stack", "2"),
        ("forward", "1"),
        ("forward", "2"),
        ("step", "1"),
        ("step", "2"),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["over the first"][0] for row in rows[::2]] == [1.0] * 5
