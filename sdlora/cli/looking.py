"""LoRA files and checkpoints: inspected, converted, their metadata changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, guard


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA, a checkpoint file or folder, or 'mini'.")],
    with_hashes: Annotated[
        bool,
        typer.Option("--hash", help="A checkpoint's SHA-256, AutoV1, AutoV2 and AutoV3 too; reads all of it once."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a LoRA file or a checkpoint is: family, modules, ranks, hashes, metadata, problems."""

    def run() -> None:
        # Not by way of the api, which brings diffusers: this verb answers in a second.
        from ..inspection.files import inspect_file
        from ..inspection.report import as_text
        from ..progress import progress_bar

        with progress_bar() as progress:
            report = inspect_file(file, hashes=with_hashes, progress=progress)
        if as_json:
            emit(report.to_json())
        else:
            typer.echo(as_text(report))

    guard(run)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A LoRA file in any dialect, or a PEFT adapter's folder.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="DIALECT", help="kohya, diffusers or peft.")],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Where it is not of a published size.")] = None,
    precision: Annotated[str, typer.Option(help="auto (as it is), float16, bfloat16 or float32.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA in another dialect: the same changes under other names."""

    def run() -> None:
        if precision not in ("auto", "float16", "bfloat16", "float32"):
            raise typer.BadParameter(f"{precision!r} is not a precision", param_hint="--precision")
        from ..conversion import convert as convert_file

        report = convert_file(source, target, to=to, base=base, precision=precision)
        if as_json:
            emit(report.to_json())
        else:
            typer.echo(
                f"{report.output}: {report.modules} modules, {report.family}, {report.dialect} names, {report.dtype}"
            )
            for problem in report.left_out:
                typer.echo(f"  left out: {problem}")

    guard(run)


metadata_app = typer.Typer(no_args_is_help=True, help="Show, change or clean the metadata of a safetensors file.")
app.add_typer(metadata_app, name="metadata")
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Any safetensors file.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="OUT", help="May be FILE itself.")]


@metadata_app.command()
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print the metadata; no tensor is read."""

    def run() -> None:
        from ..formats.metadata_file import read_metadata

        metadata = read_metadata(file)
        if as_json:
            emit(metadata)
        for key, value in metadata.items() if not as_json else ():
            typer.echo(f"{key}: {value if len(value) <= 200 else value[:200] + '…'}")

    guard(run)


@metadata_app.command("set")
def set_(
    file: FileArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="An empty VALUE takes the key away.")],
    out: OutOption,
) -> None:
    """Change keys; the tensors, and with them the hashes over the tensors, stay."""

    def run() -> None:
        from ..formats.metadata_file import read_metadata, write_metadata

        split = [pair.partition("=") for pair in pairs]
        if wrong := [pair for pair, (key, equals, _) in zip(pairs, split, strict=True) if not (key and equals)]:
            raise typer.BadParameter(f"{wrong[0]!r}: expected KEY=VALUE", param_hint="KEY=VALUE")
        changed = read_metadata(file) | {key: value for key, _, value in split}
        write_metadata(file, out, {key: value for key, value in changed.items() if value})
        typer.echo(str(out))

    guard(run)


@metadata_app.command()
def redact(file: FileArgument, out: OutOption) -> None:
    """Take folders and mail addresses out of the metadata, whoever wrote it."""

    def run() -> None:
        from ..formats.metadata_file import read_metadata, redacted, write_metadata

        before = read_metadata(file)
        after = redacted(before)
        write_metadata(file, out, after)
        typer.echo(f"{out}: {sum(before[key] != after[key] for key in before)} of {len(before)} values changed")

    guard(run)
