"""``sdlora export``: the folder for an upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..generation.request import ImageRequest
from .app import BaseOption, JsonOption, app, emit, examples, guard, parse_size
from .generate_options import CfgOption, NegativeOption, SizeOption, StepsOption


@app.command(
    epilog=examples(
        "sdlora export zorb.safetensors --civitai upload --base my-checkpoint.safetensors --weight 0.9",
    )
)
@guard
def export(
    lora: Annotated[str, typer.Argument(metavar="LORA", help="A LoRA file in any format.")],
    civitai: Annotated[
        Path, typer.Option("--civitai", metavar="DIR", help="Folder to create, with everything that an upload needs.")
    ],
    base: BaseOption = "mini",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt of a preview; may be repeated. Default: the trigger word and frequent tags."),
    ] = None,
    previews: Annotated[bool, typer.Option(help="Generate preview images.")] = True,
    negative: NegativeOption = "",
    weight: Annotated[float, typer.Option(help="LoRA weight for the previews, and recommended to users.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the previews.")] = ImageRequest.seed,
    steps: StepsOption = ImageRequest.steps,
    cfg: CfgOption = ImageRequest.cfg,
    size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create the folder for an upload: the LoRA, previews with its hash, A1111's card and a model card."""
    shape = parse_size(size)
    from ..publish.civitai import export_civitai

    package = export_civitai(
        lora,
        civitai,
        base=base,
        prompts=prompt if previews else (),
        negative=negative,
        weight=weight,
        seed=seed,
        steps=steps,
        cfg=cfg,
        size=shape,
    )
    if as_json:
        emit(package.to_json())
    else:
        for name in package.files:
            typer.echo(str(civitai / name))
        if package.redacted:
            typer.echo(f"{package.redacted} metadata values without the folders and addresses that they contained")
    if package.warning:
        typer.echo(f"warning: {package.lora}: {package.warning}", err=True)
