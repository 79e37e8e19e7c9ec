"""``sdlora sweep``: many runs from one file, with their results in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .app import JsonOption, app, emit, examples, guard

if TYPE_CHECKING:
    from ..sweeps.results import SweepReport


@app.command(
    epilog=examples(
        "sdlora sweep ranks.toml",
        "sdlora sweep ranks.toml --jobs 2 train.steps=300",
        "sdlora sweep ranks.toml --engine slurm --jobs 8",
        more='A sweep file is a configuration with [grid], such as: "lora.rank" = [4, 16]',
    )
)
@guard
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of all runs; default: out/NAME, as in NAME.toml.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray", "slurm"], typer.Option(help="Where runs are trained: on this machine or on a cluster.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Runs at the same time; default: 1 on this machine, all on a cluster."),
    ] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", help="Processes that share each run, one for each GPU, as train has it.")
    ] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Run those again that failed.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check everything and list the runs; train nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA for each combination of settings or data sets. Run the same command to go on."""
    from ..progress import progress_bar
    from ..sweeps.run import sweep as run_sweep

    with progress_bar() as progress:
        report = run_sweep(
            file,
            settings or (),
            out=out,
            engine=engine,
            jobs=jobs,
            processes=processes,
            retry=retry,
            only_check=check,
            progress=progress,
        )
    if as_json:
        from ..sweeps.means import means_of

        emit({**report.to_json(), "means": [mean.to_json() for mean in means_of(report.runs)]})
    else:
        typer.echo("\n".join(_lines(report, checked=check)))
    if report.count("failed") and not check:
        _say_failed(report)
        raise typer.Exit(1)


def _lines(report: SweepReport, *, checked: bool) -> list[str]:
    from ..sweeps.results import CSV_NAME, table_lines

    table = table_lines(report.runs)
    return (
        table if checked else [*table, "", f"{report.folder / CSV_NAME}: this table; each LoRA is in its run's folder"]
    )


def _say_failed(report: SweepReport) -> None:
    failed = [run for run in report.runs if run.state == "failed"]
    for run in failed:
        typer.echo(f"error: {run.run}: {run.message}", err=True)
    typer.echo(f"{len(failed)} of {len(report.runs)} runs failed; --retry runs them again", err=True)
