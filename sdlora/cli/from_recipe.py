"""``sdlora generate --from``: the options of a command that repeats an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SdloraError

if TYPE_CHECKING:
    from ..generation.prompt_file import PromptLine

FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Repeat an image of sdlora, A1111 or Forge, by the recipe in it or in a .txt; other options go before it.",
    ),
]


def from_recipe(
    source: str, context: typer.Context, lines: list[PromptLine], options: dict[str, Any], say: Callable[[str], None]
) -> tuple[list[PromptLine], dict[str, Any]]:
    """Prompts and arguments of ``generate``: those of the recipe in the file ``source``, where the command states none.

    ``say`` is called with each respect in which the new image will differ.

    Raises:
        SdloraError: the file cannot be read, contains no recipe, or names LoRAs and the command says not where they are.
    """
    from ..base.checkpoint import find_base
    from ..generation.alternatives import as_text
    from ..generation.prompt_file import PromptLine
    from ..generation.repeat import differing_base, read_repetition

    again = read_repetition(Path(source))
    chosen = {name: value for name, value in again.options.items() if not _is_stated(context, name)}
    if "negative" in chosen:
        chosen["negative"] = as_text(chosen["negative"])
    if _is_stated(context, "sampler"):
        chosen.pop("schedule", None)
    if "image" not in options:
        chosen.pop("strength", None)
    if "mask" not in options:
        chosen.pop("mask_blur", None)
    notes, clip_skip, base = list(again.notes), again.clip_skip, find_base(options["base"])
    if clip_skip is not None and not _is_stated(context, "clip_skip"):
        if again.is_ours or base.family.clip_skip == 1:
            chosen["base"] = options["base"].model_copy(update={"clip_skip": clip_skip})
        elif clip_skip > 2:
            notes.append(f"Clip skip: {clip_skip} is left out; A1111 does not follow it on {base.family.title}")
    if not lines:
        if again.recipe.loras and not options["loras"] and options.get("lora_dir") is None:
            names = ", ".join(lora.name for lora in again.recipe.loras)
            raise SdloraError(
                f"{source}: has the LoRAs {names}; name their folder with --lora-dir, or them with --lora"
            )
        # A recipe has the prompt that was drawn: braces in it are text.
        lines = [PromptLine(prompt=as_text(again.recipe.prompt if options["loras"] else again.prompt))]
    if (hashes := again.recipe.fields.get("TI hashes")) and not options.get("embeddings"):
        words = ", ".join(entry.partition(":")[0].strip() for entry in hashes.split(","))
        notes.append(f"TI hashes: it has the textual inversions {words}; name their files with --embedding")
    notes += differing_base(again.recipe, base)
    for note in dict.fromkeys(notes):
        say(note)
    return lines, options | chosen


def _is_stated(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
