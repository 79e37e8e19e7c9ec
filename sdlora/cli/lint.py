"""``sdlora lint``: every fault of a dataset, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import JsonOption, app, emit, guard

if TYPE_CHECKING:
    pass


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
        Path | None, typer.Option(metavar="FILE.png", help="Draw each image as it is trained on, with its caption.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for every fault of a dataset, before a model is loaded; exit code 1 where one forbids training."""

    def run() -> None:
        if fix != (out is not None):
            raise typer.BadParameter("--fix and --out COPY go together", param_hint="--fix")
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise typer.BadParameter(f"{sheet} does not end in .png", param_hint="--sheet")
        from ..lint.report import report_lines
        from ..lint.run import lint_data, linted_sections
        from ..progress import progress_bar

        data, section = linted_sections(
            arguments, trigger=trigger, resolution=resolution, caption_extension=caption_extension, base=base
        )
        with progress_bar() as progress:
            report = lint_data(data, section, progress=progress)
            sheets, copy = (), None
            if sheet is not None and report.examined:
                from ..lint.sheet import write_sheets

                sheets = write_sheets(
                    report.examined,
                    report.placements,
                    background=report.data.alpha_background,
                    mask=report.data.mask,
                    file=sheet,
                    progress=progress,
                )
            if out is not None:
                from ..lint.repair import write_repaired

                copy = write_repaired(report.data, report.listing.sources, report.examined, out=out, progress=progress)
        if as_json:
            answer = report.to_json() | {"sheets": [str(file) for file in sheets]}
            if copy is not None:
                answer["copy"] = {"folder": str(copy.folder), "images": copy.images}
                answer["repairs"] = [vars(repair) for repair in copy.repairs]
            emit(answer)
        else:
            lines = report_lines(report)
            if sheets:
                lines += ["", *(f"{file}: contact sheet" for file in sheets)]
            if copy is not None:
                lines += ["", f"{copy.folder}: {copy.images} images, {len(copy.repairs)} repairs"]
                lines += copy.lines()
            typer.echo("\n".join(lines))
        if report.has_errors:
            raise typer.Exit(1)

    guard(run)
