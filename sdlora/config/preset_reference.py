"""The page of all presets: ``python -m sdlora.config.preset_reference > docs/presets.md``."""

from __future__ import annotations

from collections.abc import Iterator

from ..families import FAMILIES
from .presets import PRESET_TITLES, PRESETS, PresetName, PresetValue
from .toml_text import toml_value

_ABOUT = """\
# Presets

<!-- Generated: python -m sdlora.config.preset_reference > docs/presets.md -->

A preset has values for what is trained, by the family of the base. Choose one by `--preset NAME`, or in a file by
`preset = "NAME"` above all sections:

```console
$ sdlora train --images my-images --trigger zorb --base my-checkpoint.safetensors --preset style
```

Without one, and with `none`, the plain defaults are used. Only `sdlora train --images …` on `mini`, without a file, takes
`style` itself, so that a first run shows what it can do. What a file, an option or `section.key=value` states is always
stronger than a preset; with another rank, its alpha keeps the ratio. An optimizer that finds its learning rate itself
keeps its own. `--explain` shows each value of a run, where it comes from and what it does, and trains nothing:

```console
$ sdlora train --images my-images --trigger zorb --explain
```
"""


def preset_markdown() -> str:
    """The page ``docs/presets.md``."""
    titles = (f"- `{name}`: {title}." for name, title in PRESET_TITLES.items())
    return "\n".join([_ABOUT, *titles, "", *_tables()])


def _tables() -> Iterator[str]:
    """A table for each group of bases that have the same values."""
    groups: dict[int, list[str]] = {}
    for base, presets in PRESETS.items():
        groups.setdefault(id(presets), []).append(base)
    for bases in groups.values():
        presets = PRESETS[bases[0]]
        yield f"## {', '.join(FAMILIES[base].title if base in FAMILIES else base for base in bases)}"
        yield ""
        yield f"| setting | {' | '.join(presets)} | source |"
        yield f"|---|{'---|' * len(presets)}---|"
        rows: dict[str, dict[PresetName, PresetValue]] = {}
        for name, values in presets.items():
            for value in values:
                rows.setdefault(value.setting, {})[name] = value
        for setting, row in rows.items():
            cells = [f"`{toml_value(row[name].value)}`" if name in row else "" for name in presets]
            sources = dict.fromkeys(value.source for value in row.values())
            yield f"| `{setting}` | {' | '.join(cells)} | {'; '.join(sources)} |"
        yield ""


if __name__ == "__main__":
    print(preset_markdown(), end="")
