"""``sdlora train``: a LoRA from a folder of captioned images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from .app import app, emit, examples, guard
from .settings_options import run_config
from .train_options import (
    ArgumentsArgument,
    BatchSizeOption,
    DeviceChangeOption,
    EpochsOption,
    ExplainOption,
    ExtendOption,
    FromKohyaOption,
    ImagesOption,
    LearningRateOption,
    OutOption,
    PresetOption,
    ProcessesOption,
    RankOption,
    ResolutionOption,
    RestartOption,
    StepsOption,
    TrainBaseOption,
    TrainJsonOption,
    TriggerOption,
)

if TYPE_CHECKING:
    from ..config.sections import Config
    from ..config.written import LoadedConfig
    from ..training.report import TrainReport, TrainResult


@app.command(
    epilog=examples(
        "sdlora train --images my-images --trigger zorb --out out/zorb.safetensors",
        "sdlora train --images my-images --trigger zorb --base my-checkpoint.safetensors --steps 1500 --rank 32",
        "sdlora train run.toml train.seed=1",
        "sdlora train run.toml --explain",
        "sdlora train run.toml --extend 500",
        "sdlora train run.toml --processes 2",
        "sdlora train --from-kohya kohya.toml --trigger zorb",
        more="All settings, for a TOML file or as section.key=value: sdlora settings",
    )
)
@guard
def train(
    arguments: ArgumentsArgument = None,
    images: ImagesOption = None,
    trigger: TriggerOption = None,
    resolution: ResolutionOption = None,
    rank: RankOption = None,
    base: TrainBaseOption = None,
    preset: PresetOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    learning_rate: LearningRateOption = None,
    extend: ExtendOption = None,
    restart: RestartOption = False,
    allow_device_change: DeviceChangeOption = False,
    processes: ProcessesOption = None,
    out: OutOption = None,
    from_kohya: FromKohyaOption = None,
    explain: ExplainOption = False,
    as_json: TrainJsonOption = False,
) -> None:
    """Train a LoRA from a folder of captioned images. Run the same command to resume."""
    options: dict[tuple[str, str], object] = {
        ("--images", "data.images"): images,
        ("--trigger", "data.trigger"): trigger,
        ("--resolution", "data.resolution"): resolution,
        ("--rank", "lora.rank"): rank,
        ("--base", "base.path"): base,
        ("--preset", "preset"): preset,
        ("--steps", "train.steps"): steps,
        ("--epochs", "train.epochs"): epochs,
        ("--batch-size", "train.batch_size"): batch_size,
        ("--learning-rate", "optimizer.learning_rate"): learning_rate,
        ("--out", "output.path"): out,
    }
    if processes is not None and processes > 1 and not explain:
        flags = {"--restart": restart, "--allow-device-change": allow_device_change, "--json": as_json}
        more = {"--extend": extend, "--from-kohya": from_kohya}
        given = {name: value for (name, _), value in options.items()} | more
        _shared(processes, given, [name for name, is_set in flags.items() if is_set], arguments or [])
        return
    loaded = run_config(arguments or (), options, from_kohya)
    if explain:
        _explain(loaded, as_json=as_json)
        return
    report = _trained(loaded.config, restart=restart, extend=extend, allow_device_change=allow_device_change)
    from accelerate import Accelerator

    if not Accelerator().is_main_process:
        return
    check = report.result.check
    if as_json:
        answer = {key: getattr(report.result, key) for key in ANSWER}
        emit({**answer, "check": check and check.to_json(), "samples": report.samples})
        return
    typer.echo(f"{report.result.output}: {_summary(report.result)}")
    if check:
        typer.echo(f"{report.result.output}: {check.in_words}")
    if report.samples:
        typer.echo(f"{report.samples}: samples")


ANSWER = (
    "output", "steps", "file_step", "seconds", "loss", "validation_loss", "resumed_from", "warning", "texts_written",
)  # fmt: skip
"""Fields of the result that ``--json`` prints."""


def _shared(processes: int, options: Mapping[str, object], flags: Sequence[str], arguments: Sequence[str]) -> None:
    """Run this command as several processes, the first of which answers for them."""
    from ..training.launch import run_processes

    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    ended = run_processes(processes, [sys.executable, "-m", "sdlora", "train", *given, *flags, "--", *arguments])
    for problem in ended.problems:
        typer.echo(f"error: {problem}", err=True)
    if ended.code:
        raise typer.Exit(ended.code)


def _explain(loaded: LoadedConfig, *, as_json: bool) -> None:
    """Print every setting of a run that is only planned."""
    from ..progress import progress_bar
    from ..training.explain import explain, explained_json, explained_lines
    from ..training.plan import plan_config

    with progress_bar() as progress:
        settings = explain(loaded, plan_config(loaded.config, progress))
    if as_json:
        emit(explained_json(settings))
    else:
        typer.echo("\n".join(explained_lines(settings)))


def _trained(config: Config, *, restart: bool, extend: int | None, allow_device_change: bool) -> TrainReport:
    from ..progress import progress_bar
    from ..training.launch import end_with_launcher
    from ..training.run import train as train_lora

    end_with_launcher()
    with progress_bar() as progress:
        return train_lora(
            config,
            restart=restart,
            extend=extend,
            allow_device_change=allow_device_change,
            progress=progress,
            say=progress.say,
        )


def _summary(result: TrainResult) -> str:
    if result.loss is None and not result.resumed_from:
        if result.texts_written:
            return "this run is complete already; the changed texts of [output] are written into the file"
        return "this run is complete already; --restart starts over"
    parts = [
        f"{result.output.stat().st_size / 1e6:.1f} MB",
        f"{result.steps} steps",
        f"{result.seconds:.0f} s",
    ]
    if result.loss is not None:
        parts.insert(2, f"loss {result.loss:.4f} (mean of the last 10 %)")
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f}")
    if result.file_step < result.steps:
        parts.append(f"with the weights of step {result.file_step}, which had the lowest validation loss")
    if result.resumed_from:
        parts.append(f"resumed from step {result.resumed_from}")
    return ", ".join(parts)
