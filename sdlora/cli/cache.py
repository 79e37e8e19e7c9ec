"""``sdlora cache info|prune``: the encoded images and captions on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import JsonOption, app, emit, examples, guard

cache_app = typer.Typer(no_args_is_help=True, help="Show and reduce the encoded images and captions on disk.")
app.add_typer(cache_app, name="cache")
FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", metavar="DIR", help="Folder of the cache; default: that in the user's cache folder."),
]


@cache_app.command(
    epilog=examples(
        "sdlora cache info",
    )
)
@guard
def info(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """Show how many encoded images and captions are kept, and their size."""
    from ..cache.entries import cache_info, encoded_folder

    usage = cache_info(_existing(folder) or encoded_folder())
    if as_json:
        emit(usage.to_json())
        return
    typer.echo(f"{usage.folder}: {usage.entries:,} entries, {usage.bytes / 1e6:,.1f} MB")
    for kind, size in usage.kinds.items():
        typer.echo(f"  {kind:<8} {size.entries:,} entries, {size.bytes / 1e6:,.1f} MB")
    if usage.entries:
        typer.echo(f"  last used between {usage.oldest} and {usage.newest}")


@cache_app.command(
    "prune",
    epilog=examples(
        "sdlora cache prune --max-gigabytes 10",
    ),
)
@guard
def prune_(
    max_gigabytes: Annotated[
        float | None,
        typer.Option(
            "--max-gigabytes",
            min=0,
            metavar="N",
            help="Largest size of the rest; default: that of cache.max_gigabytes.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the least recently used entries, until the rest fits."""
    if everything and max_gigabytes is not None:
        raise typer.BadParameter("give --max-gigabytes or --all", param_hint="--all")
    from ..cache.entries import cache_info, encoded_folder, prune
    from ..config.sections import CacheSection

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


def _existing(folder: Path | None) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    return folder
