"""``sdlora lint``: all faults of a dataset, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import check_target
from .app import JsonOption, app, emit, examples, guard
from .settings_options import merged

if TYPE_CHECKING:
    from ..lint.repair import RepairReport
    from ..lint.report import LintReport


@app.command(
    "lint",
    epilog=examples(
        "sdlora lint my-images --trigger zorb --sheet sheet.png",
        "sdlora lint my-images --trigger zorb --fix --out my-images-fixed",
        "sdlora lint run.toml",
    ),
)
@guard
def lint_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="DIR | CONFIG.toml | section.key=value...", show_default=False),
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of images, as train has it.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="Trigger word.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=64, max=4096, help="Side of a square image in pixels; default: the base's own.")
    ] = None,
    caption_extension: Annotated[
        str | None, typer.Option(metavar=".EXT", help="Extension of the caption files; default: .txt.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write a repaired copy to --out; originals stay untouched.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="COPY", help="New folder for the repaired copy.")] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Write a contact sheet: each image as it is trained on, with its caption."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find all faults of a dataset, without loading a model. Exit code 1 if one prevents training."""
    if not arguments and images is None:
        raise typer.BadParameter("Missing argument: name DIR or CONFIG.toml, or give --images DIR")
    _check_targets(sheet, out, fix=fix)
    options: dict[tuple[str, str], object] = {
        ("--images", "data.images"): images,
        ("--trigger", "data.trigger"): trigger,
        ("--resolution", "data.resolution"): resolution,
        ("--caption-extension", "data.caption_extension"): caption_extension,
        ("--base", "base.path"): base,
    }
    from ..lint.run import lint_data, linted_sections
    from ..progress import progress_bar

    data, section = linted_sections(merged(options, arguments or ()))
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
        emit(_as_json(report, sheets, copy))
    else:
        typer.echo(_as_text(report, sheets, copy))
    if report.has_errors:
        raise typer.Exit(1)


def _check_targets(sheet: Path | None, out: Path | None, *, fix: bool) -> None:
    if fix != (out is not None):
        raise typer.BadParameter("--fix and --out COPY go together", param_hint="--fix")
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise typer.BadParameter(f"{sheet} does not end in .png", param_hint="--sheet")
        check_target(sheet)
    if out is not None:
        check_target(out, "new folder")


def _as_json(report: LintReport, sheets: Sequence[Path], copy: RepairReport | None) -> dict[str, Any]:
    answer = report.to_json() | {"sheets": [str(file) for file in sheets]}
    if copy is not None:
        answer["copy"] = {"folder": str(copy.folder), "images": copy.images}
        answer["repairs"] = [vars(repair) for repair in copy.repairs]
    return answer


def _as_text(report: LintReport, sheets: Sequence[Path], copy: RepairReport | None) -> str:
    from ..lint.report import report_lines

    lines = report_lines(report)
    if sheets:
        lines += ["", *(f"{file}: contact sheet" for file in sheets)]
    if copy is not None:
        lines += ["", f"{copy.folder}: {copy.images} images, {len(copy.repairs)} repairs", *copy.lines()]
    return "\n".join(lines)
