"""``sdlora quickstart``: train, generate and inspect on the embedded base, each printed as the command a user types."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError
from ..files import check_target
from .app import JsonOption, app, emit, examples, guard

FOLDER = Path("out/quickstart")
CONFIGS = (Path("configs/quickstart-blueprint.toml"), Path("configs/quickstart-pixel.toml"))
"""Their ``output.path`` lies in ``FOLDER``."""
PROMPTS = ("blupaper, pixgrid, a fox", "blupaper, pixgrid, a tomato", "blupaper, pixgrid, a penguin")


@app.command(
    epilog=examples(
        "sdlora quickstart",
        "sdlora quickstart --out out/again",
    )
)
@guard
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = FOLDER,
    as_json: JsonOption = False,
) -> None:
    """Train two styles, generate images with both, inspect the files; each step is shown as a command."""
    if missing := [str(config) for config in CONFIGS if not config.is_file()]:
        raise DataError([f"{config}: not here; run quickstart in a clone of the repository" for config in missing])
    check_target(out, "folder")
    loras = [out / f"{config.stem.removeprefix('quickstart-')}.safetensors" for config in CONFIGS]
    strip = out / "strip.png"
    commands = [
        *(_train(config, lora) for config, lora in zip(CONFIGS, loras, strict=True)),
        _generate(loras, strip),
        *(["inspect", str(lora)] for lora in loras),
    ]
    began = time.monotonic()
    for arguments in commands:
        typer.echo(f"\n$ {_spelled(arguments)}", err=as_json)
        _run(arguments, quiet=as_json)
    seconds = time.monotonic() - began
    lines = (
        f"\nDone in {seconds:.0f} s. Look at {strip}: no LoRA, each style at half and full weight, both together.",
        f"Try another prompt: sdlora generate 'blupaper, a snail' --lora {loras[0]}",
    )
    typer.echo("\n".join(lines), err=as_json)
    if as_json:
        emit(
            {
                "loras": [str(lora) for lora in loras],
                "strip": str(strip),
                "commands": [_spelled(arguments) for arguments in commands],
                "seconds": round(seconds, 1),
            }
        )


def _train(config: Path, lora: Path) -> list[str]:
    elsewhere = [f"output.path={lora}"] if lora.parent != FOLDER else []
    return ["train", str(config), *elsewhere]


def _generate(loras: list[Path], strip: Path) -> list[str]:
    stacked = [word for lora in loras for word in ("--lora", f"{lora}:1")]
    return ["generate", *PROMPTS, *stacked, "--strip", "--seed", "1", "--out", str(strip)]


def _spelled(arguments: list[str]) -> str:
    return shlex.join(["sdlora", *arguments])


def _run(arguments: list[str], *, quiet: bool) -> None:
    """Run one ``sdlora`` command in this process; ``quiet`` sends its standard output to standard error."""
    with redirect_stdout(sys.stderr) if quiet else nullcontext():
        code = app(arguments, standalone_mode=False)
    if code:
        raise typer.Exit(code)
