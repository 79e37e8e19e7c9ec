"""Pictures to train on: linted, captioned, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, DataError
from .app import JsonOption, app, emit, guard

if TYPE_CHECKING:
    from ..captioners import Captioner


@app.command("lint")
def lint_(
    arguments: Annotated[
        list[str], typer.Argument(metavar="DIR | CONFIG.toml [section.key=value]...", show_default=False)
    ],
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="The word that calls the style.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=64, max=4096, help="In pixels; default: the base's own.")
    ] = None,
    caption_extension: Annotated[str | None, typer.Option(metavar=".EXT", help="Default: .txt")] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="'mini', a file or a folder.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend, in a copy: --out names it.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="COPY", help="The new folder that --fix writes.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw each picture as it is trained on, with its caption.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for every fault of a dataset, before a model is loaded; exit code 1 where one forbids training."""

    def run() -> None:
        if fix != (out is not None):
            raise typer.BadParameter("--fix and --out COPY go together", param_hint="--fix")
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise typer.BadParameter(f"{sheet} does not end in .png", param_hint="--sheet")
        from ..linting import lint_data, linted_sections, report_lines
        from ..progress import progress_bar

        data, section = linted_sections(
            arguments, trigger=trigger, resolution=resolution, caption_extension=caption_extension, base=base
        )
        with progress_bar() as progress:
            report = lint_data(data, section, progress=progress)
            sheets, copy = (), None
            if sheet is not None and report.examined:
                from ..data.sheet import write_sheets

                sheets = write_sheets(
                    report.examined,
                    report.placements,
                    background=report.data.alpha_background,
                    mask=report.data.mask,
                    file=sheet,
                    progress=progress,
                )
            if out is not None:
                from ..data.repair import write_repaired

                copy = write_repaired(report.data, report.listing.sources, report.examined, out=out, progress=progress)
        if as_json:
            answer = report.to_json() | {"sheets": [str(file) for file in sheets]}
            if copy is not None:
                answer["copy"] = {"folder": str(copy.folder), "pictures": copy.pictures}
                answer["repairs"] = [vars(repair) for repair in copy.repairs]
            emit(answer)
        else:
            lines = report_lines(report)
            if sheets:
                lines += ["", *(f"{file}: contact sheet" for file in sheets)]
            if copy is not None:
                lines += ["", f"{copy.folder}: {copy.pictures} pictures, {len(copy.repairs)} repairs"]
                lines += copy.lines()
            typer.echo("\n".join(lines))
        if report.has_errors:
            raise typer.Exit(1)

    guard(run)


@app.command()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures; those within it too.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="BLIP, Florence-2, or a WD14 tagger, on this disk.")],
    kind: Annotated[str, typer.Option(help="auto, blip, florence or wd14.")] = "auto",
    trigger: Annotated[str, typer.Option(metavar="WORD", help="Put in front of every caption written.")] = "",
    caption_extension: Annotated[str, typer.Option(metavar=".EXT", help="Of the caption files.")] = ".txt",
    as_json: JsonOption = False,
) -> None:
    """Write the captions that are missing beside the pictures, by a local model; no caption is ever changed."""

    def run() -> None:
        from ..captioners import KINDS, find_kind, open_captioner

        if kind not in ("auto", *KINDS):
            raise typer.BadParameter(f"{kind!r} is not auto, {', '.join(KINDS)}", param_hint="--kind")
        found = find_kind(model, kind)
        from ..captioning import caption_folder
        from ..progress import progress_bar

        def load() -> Captioner:
            _quiet_libraries()
            return open_captioner(model, found)

        with progress_bar() as progress:
            report = caption_folder(
                folder, load, trigger=trigger.strip(), extension=caption_extension, progress=progress
            )
        if as_json:
            emit({"kind": found, **report.to_json()})
        else:
            typer.echo(f"{folder}: {len(report.written)} captions written, {report.present} were there before")
        if report.problems:
            raise DataError(report.problems)

    guard(run)


cache_app = typer.Typer(no_args_is_help=True, help="Look after what encoded pictures and captions take of the disk.")
app.add_typer(cache_app, name="cache")
FolderOption = Annotated[
    Path | None, typer.Option("--folder", metavar="DIR", help="As cache.folder; default: in the user's cache folder.")
]


@cache_app.command()
def info(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """Tell how many encoded pictures and captions are kept, and how large they are."""

    def run() -> None:
        from ..data.cache_files import cache_info, encoded_folder

        told = cache_info(_existing(folder) or encoded_folder())
        if as_json:
            emit(told.to_json())
            return
        typer.echo(f"{told.folder}: {told.entries:,} entries, {told.bytes / 1e6:,.1f} MB")
        for kind, size in told.kinds.items():
            typer.echo(f"  {kind:<8} {size.entries:,} entries, {size.bytes / 1e6:,.1f} MB")
        if told.entries:
            typer.echo(f"  last used between {told.oldest} and {told.newest}")

    guard(run)


@cache_app.command("prune")
def prune_(
    max_gigabytes: Annotated[
        float | None,
        typer.Option("--max-gigabytes", min=0, metavar="N", help="How much may stay; default: cache.max_gigabytes."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was longest not used, until the rest fits."""

    def run() -> None:
        if everything and max_gigabytes is not None:
            raise typer.BadParameter("give --max-gigabytes or --all", param_hint="--all")
        from ..config import CacheSection
        from ..data.cache_files import cache_info, encoded_folder, prune

        place = _existing(folder) or encoded_folder()
        cap = 0 if everything else CacheSection().max_gigabytes if max_gigabytes is None else max_gigabytes
        removed, left = prune(place, cap * 1e9), cache_info(place)
        size = sum(entry.bytes for entry in removed)
        if as_json:
            emit({"folder": str(place), "removed": len(removed), "removed_bytes": size, "left": left.to_json()})
        else:
            typer.echo(
                f"{place}: {len(removed):,} entries removed, {size / 1e6:,.1f} MB; "
                f"{left.entries:,} left, {left.bytes / 1e6:,.1f} MB"
            )

    guard(run)


def _existing(folder: Path | None) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    return folder


def _quiet_libraries() -> None:
    """Keep bars and warnings of diffusers and transformers off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
