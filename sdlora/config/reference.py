"""The reference of all settings, as text and as Markdown: ``python -m sdlora.config.reference > docs/settings.md``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence

from ..errors import ConfigError
from .catalogue import SectionFacts, SettingFacts, all_sections
from .setting import Affects
from .unknown_keys import answer_unknown

AFFECTS_IN_WORDS: dict[Affects, str] = {
    "weights": "the weights",
    "samples": "the samples",
    "text": "the text in the file",
    "place": "where files are",
    "nothing": "nothing of the result",
}
ABOVE = "Above all sections"
WIDTH = 100
"""Characters in a line of text."""
_ABOUT = """\
# Settings

<!-- Generated: python -m sdlora.config.reference > docs/settings.md -->

A configuration is a TOML file with these tables, all optional except `[data]` and `[output]`. On the command line write
`section.key=value`, for example `sdlora train run.toml lora.rank=8 train.steps=1000`; it overrides the file.
`sdlora settings [SECTION]` prints this page.

**Affects** says what changes with a setting. A half-done run resumes only if everything that affects the weights is
the same: settings, images, captions and base. All other settings may change, and files may move.

**kohya** is the name of the same setting in kohya's trainer (sd-scripts), or in its dataset configuration.
"""


def select_sections(name: str | None) -> tuple[SectionFacts, ...]:
    """All sections; those within ``name``; or the one setting ``name`` (``section.key``) in its section.

    Raises:
        ConfigError: there is no such section or setting.
    """
    if name is None:
        return all_sections()
    sections = tuple(section for section in all_sections() if f"{section.name}.".startswith(f"{name}."))
    for section in all_sections():
        if found := tuple(setting for setting in section.settings if setting.name == name):
            sections = sections or (SectionFacts(name=section.name, documentation="", settings=found),)
    if not sections:
        raise ConfigError(f"no section or setting {name}{answer_unknown(name)}")
    return sections


def reference_text(sections: Sequence[SectionFacts]) -> str:
    """The sections for a terminal."""
    return "\n\n".join("\n".join(_section_lines(section)) for section in sections)


def reference_markdown() -> str:
    """The page ``docs/settings.md``."""
    return "\n".join([_ABOUT, *(line for section in all_sections() for line in _markdown_lines(section))])


def _section_lines(section: SectionFacts) -> Iterator[str]:
    yield _header(section)
    if section.documentation:
        yield _plain(section.documentation)
    for setting in section.settings:
        yield ""
        yield f"{setting.name} ({'required' if setting.required else f'default {_default(setting)}'})"
        kohya = f" | kohya: {setting.kohya}" if setting.kohya else ""
        facts = f"{setting.values} | affects {AFFECTS_IN_WORDS[setting.affects]}{kohya}"
        for paragraph in (_plain(setting.documentation), facts):
            yield textwrap.fill(
                paragraph, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )


def _markdown_lines(section: SectionFacts) -> Iterator[str]:
    yield f"## {_header(section)}"
    yield ""
    yield _markdown(section.documentation)
    yield ""
    yield "| key | default | values | | affects | kohya |"
    yield "|---|---|---|---|---|---|"
    for setting in section.settings:
        default = "required" if setting.required else f"`{_default(setting)}`"
        cells = (
            f"`{setting.key}`",
            default if setting.default is not None or setting.required else "",
            setting.values,
            _markdown(setting.documentation),
            AFFECTS_IN_WORDS[setting.affects],
            f"`{setting.kohya}`" if setting.kohya else "",
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _header(section: SectionFacts) -> str:
    if not section.name:
        return ABOVE
    return f"[[{section.name}]]" if "." in section.name else f"[{section.name}]"


def _default(setting: SettingFacts) -> str:
    """The default as TOML has it; "none" where the documentation says what happens by default."""
    return "none" if setting.default is None else json.dumps(setting.default)


def _plain(documentation: str) -> str:
    return documentation.replace("``", "")


def _markdown(documentation: str) -> str:
    return documentation.replace("``", "`")


if __name__ == "__main__":
    print(reference_markdown(), end="")
