"""The ``sdlora`` command, and what its verbs share."""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
from typer.core import TyperGroup

from .._version import __version__
from ..errors import Interrupted, SdloraError


class PlainList(TyperGroup):
    """Lists the verbs as plain text with whole sentences: rich, which draws frames, takes longer to import than all
    else that this help needs."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As click does it; see the base class."""
        super(TyperGroup, self).format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """As click does it, with sentences that are not cut off."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(1000)) for name, verb in self.commands.items()])


app = typer.Typer(
    cls=PlainList,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train style LoRAs for Stable Diffusion, generate images with several of them, inspect and convert LoRA files.",
)

BaseOption = Annotated[
    str,
    typer.Option("--base", metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder."),
]
BaseNameOption = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The base they were made for, where the files do not show enough."),
]
PrecisionOption = Annotated[
    Literal["auto", "float16", "bfloat16", "float32"],
    typer.Option(help="Precision of the tensors; auto is the widest of the sources."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]


P = ParamSpec("P")


def guard(verb: Callable[P, None]) -> Callable[P, None]:
    """Decorate a verb: an error of its input is printed as one line for each fault, with exit code 1, and so is a file
    that cannot be read or written; Ctrl-C exits with 130, SIGTERM
    with 143."""

    @functools.wraps(verb)  # Typer reads the parameters of the verb through it.
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        try:
            verb(*args, **{name: _at_home(name, value) for name, value in kwargs.items()})
        except SdloraError as error:
            for problem in error.problems:
                typer.echo(f"error: {problem}", err=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # The reader of a pipe is gone; click ends quietly.
                raise
            place = f"{error.filename}: " if error.filename is not None else ""
            typer.echo(f"error: {place}{error.strerror or error}", err=True)
            raise typer.Exit(1) from None
        except (Interrupted, KeyboardInterrupt) as error:
            typer.echo(str(error) or "interrupted", err=True)
            raise typer.Exit(143 if getattr(error, "terminated", False) else 130) from None

    return guarded


def examples(*commands: str, more: str = "") -> str:
    """The end of a verb's help: commands that show its use, a line for each."""
    return "\n\n".join(["Examples:", *commands, *([more] if more else [])])


def emit(value: dict[str, Any]) -> None:
    """Print ``value`` as the one JSON object of ``--json``."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


_PATHS = {
    *("file", "images", "base", "lora", "loras", "source", "sources", "target", "out", "vae", "text_encoder", "tuned"),
    *("first", "second", "lora_dir", "wildcards", "prompts", "image", "mask", "embedding"),
}
"""Parameters of verbs that are paths, but not of the type ``Path``."""


def _at_home(name: str, value: Any) -> Any:
    """``value`` with the user's home for ``~``, which shells leave as it is in ``--out=~/x``."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if name in _PATHS and isinstance(value, str):
        return os.path.expanduser(value)
    if name in _PATHS and isinstance(value, list):
        return [os.path.expanduser(each) for each in value]
    return value


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # A console of Windows may lack a letter of a name.
    if version:
        typer.echo(f"sdlora {__version__}")
        raise typer.Exit()


def shown_cosine(cosine: float, form: str) -> str:
    """A cosine in a report; there is none of a change of zero."""
    return "undefined" if math.isnan(cosine) else format(cosine, form)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``128x160``, or ``128`` for a square, -> width and height in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(
            f"{text!r}: expected WIDTHxHEIGHT, for example 128x160, or one number", param_hint="--size"
        )
    return int(match[1]), int(match[2] or match[1])
