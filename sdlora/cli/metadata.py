"""``sdlora metadata show|set|redact``: the metadata of a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard

metadata_app = typer.Typer(no_args_is_help=True, help="Show, change or redact the metadata of a safetensors file.")
app.add_typer(metadata_app, name="metadata")
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Any safetensors file.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="OUT", help="File to write; may be FILE itself.")]


@metadata_app.command(
    epilog=examples(
        "sdlora metadata show zorb.safetensors",
    )
)
@guard
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print the metadata, without reading the tensors."""
    from ..formats.metadata_file import read_metadata

    metadata = read_metadata(file)
    if as_json:
        emit(metadata)
    for key, value in metadata.items() if not as_json else ():
        typer.echo(f"{key}: {value if len(value) <= 200 else value[:200] + '…'}")


@metadata_app.command(
    "set",
    epilog=examples(
        "sdlora metadata set zorb.safetensors 'modelspec.author=A. Painter' --out zorb.safetensors",
    ),
)
@guard
def set_(
    file: FileArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="An empty VALUE removes the key.")],
    out: OutOption,
) -> None:
    """Change keys; the tensors stay the same, and so do hashes of the tensors."""
    from ..formats.metadata_file import read_metadata, write_metadata

    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (key, equals, _) in zip(pairs, split, strict=True) if not (key and equals)]:
        raise typer.BadParameter(f"{wrong[0]!r}: expected KEY=VALUE", param_hint="KEY=VALUE")
    changed = read_metadata(file) | {key: value for key, _, value in split}
    write_metadata(file, out, {key: value for key, value in changed.items() if value})
    typer.echo(str(out))


@metadata_app.command(
    epilog=examples(
        "sdlora metadata redact zorb.safetensors --out clean.safetensors",
    )
)
@guard
def redact(file: FileArgument, out: OutOption) -> None:
    """Remove folders, hosts, mail addresses, tokens and keys from the metadata, whichever program wrote it."""
    from ..formats.metadata_file import read_metadata, write_metadata
    from ..formats.redaction import changed_keys, redacted

    before = read_metadata(file)
    after = redacted(before)
    write_metadata(file, out, after)
    changed = changed_keys(before, after)
    typer.echo(f"{out}: {len(changed)} of {len(before)} values changed")
    for key in changed:
        typer.echo(f"  {key}")
