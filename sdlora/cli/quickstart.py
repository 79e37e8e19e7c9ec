"""``sdlora quickstart``: the three jobs in a row on the embedded base."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, guard


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("out/quickstart"),
    as_json: JsonOption = False,
) -> None:
    """The three jobs in a row on the embedded base and the two sample sets; each step is shown as a command."""

    def run() -> None:
        from .quickstart_run import run_quickstart

        def command(arguments: list[str]) -> None:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                code = app(arguments, standalone_mode=False)
            if code:
                raise typer.Exit(code)

        report = run_quickstart(out, run=command, say=lambda line: typer.echo(line, err=as_json))
        if as_json:
            emit(report.to_json())

    guard(run)
