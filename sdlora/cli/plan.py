"""``sdlora plan``: what a run will take, before it starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..families import PART_TITLES
from .app import JsonOption, app, emit, examples, guard
from .settings_options import run_config

if TYPE_CHECKING:
    from ..training.forecast import Forecast


@app.command(
    "plan",
    epilog=examples(
        "sdlora plan run.toml",
        "sdlora plan run.toml --gpu 8 --no-probe",
        "sdlora plan --images my-images --trigger zorb --base my-checkpoint.safetensors --gpu 12",
    ),
)
@guard
def plan_(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of images, as train has it.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="Trigger word.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of a square image in pixels; default: the base's own.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.")
    ] = None,
    gpu: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Say whether a run fits into a GPU of this size, and what to set if not."),
    ] = None,
    probe: Annotated[
        bool, typer.Option(help="Measure the time of two steps on the device at hand, which loads the base.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Steps, time, memory and disk of a run, before it starts. Exit code 1 if the data prevent training."""
    options: dict[tuple[str, str], object] = {
        ("--images", "data.images"): images,
        ("--trigger", "data.trigger"): trigger,
        ("--resolution", "data.resolution"): resolution,
        ("--base", "base.path"): base,
    }
    config = run_config(arguments or (), options).config
    from ..progress import progress_bar
    from ..training.forecast import plan

    with progress_bar() as progress:
        forecast = plan(config, gpu=gpu, probe=probe, progress=progress, say=progress.say)
    if as_json:
        emit(forecast.to_json())
    else:
        typer.echo("\n".join(_lines(forecast)))


def _lines(forecast: Forecast) -> list[str]:
    step, sampling = forecast.step, forecast.sampling
    cache, checkpoints = _gb(forecast.cache_bytes), _gb(forecast.checkpoint_bytes)
    encoding = [f"{PART_TITLES[part]} {_gb(size)}" for part, size in forecast.encoding.items()]
    lines = [
        forecast.length,
        f"time: {_time(forecast)}",
        f"step: {forecast.shape}, {forecast.precision}, {forecast.device}",
        f"memory while training: {_gb(step.total)} (weights {_gb(step.weights)}, LoRA {_gb(step.trainable)}, "
        f"activations {_gb(step.activations)}, temporary {_gb(step.temporary)})",
        f"memory while encoding: {', '.join(encoding)}",
        f"memory while sampling: {_gb(sampling.total)}, or {_gb(sampling.least)} where it is short",
        f"disk: {_gb(forecast.disk_bytes)} (cache {cache}, checkpoints {checkpoints})",
        f"LoRA file: {forecast.file_bytes / 1e6:.1f} MB",
    ]
    if forecast.gpu_gb is None:
        return lines
    gpu = f"{forecast.gpu_gb:g} GB"
    if forecast.fits:
        return [*lines, f"fits into {gpu}"]
    if not forecast.settings:
        return [*lines, f"does not fit into {gpu}, whatever is set; lower data.resolution or lora.rank"]
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in forecast.settings.items())
    return [*lines, f"does not fit into {gpu}; it does with {settings}"]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _time(forecast: Forecast) -> str:
    if forecast.seconds is None:
        return "unknown"
    minutes, seconds = divmod(round(forecast.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    length = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    return f"{length} for the steps, {forecast.seconds / forecast.steps:.2f} s each"
