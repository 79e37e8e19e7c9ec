"""The options of ``sdlora train``."""

from __future__ import annotations

from typing import Annotated

import typer

DATA, LORA, TRAINING, OUTPUT = "Data", "LoRA", "Training", "Output"
ArgumentsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
]
ImagesOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of images with .txt captions.", rich_help_panel=DATA)
]
TriggerOption = Annotated[str | None, typer.Option(metavar="WORD", help="Trigger word.", rich_help_panel=DATA)]
ResolutionOption = Annotated[
    int | None,
    typer.Option(help="Side of a square image in pixels; default: the base's own.", rich_help_panel=DATA),
]
RankOption = Annotated[int | None, typer.Option(help="Rank of each module; lora.rank.", rich_help_panel=LORA)]
PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="style, character, concept or none. On mini without CONFIG.toml: style.",
        rich_help_panel=TRAINING,
    ),
]
FromKohyaOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|COMMAND",
        help="Configuration of kohya's trainer (TOML, or JSON of kohya_ss), or its command line.",
        rich_help_panel=TRAINING,
    ),
]
TrainBaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.", rich_help_panel=TRAINING
    ),
]
StepsOption = Annotated[int | None, typer.Option(help="Steps in all; train.steps.", rich_help_panel=TRAINING)]
EpochsOption = Annotated[
    float | None, typer.Option(help="Length in epochs, instead of --steps; train.epochs.", rich_help_panel=TRAINING)
]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Images in one step; train.batch_size.", rich_help_panel=TRAINING)
]
LearningRateOption = Annotated[
    float | None, typer.Option(help="Peak for the UNet; optimizer.learning_rate.", rich_help_panel=TRAINING)
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Start over, whatever an earlier run left.", rich_help_panel=TRAINING)
]
DeviceChangeOption = Annotated[
    bool,
    typer.Option(
        "--allow-device-change",
        help="Resume on another type of device or in another precision too.",
        rich_help_panel=TRAINING,
    ),
]
ExtendOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="N steps more for a finished or half-done run.", rich_help_panel=TRAINING),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Share each batch among N processes on this machine: one for each GPU.",
        rich_help_panel=TRAINING,
    ),
]
OutOption = Annotated[str | None, typer.Option(metavar="FILE", help="The LoRA file to write.", rich_help_panel=OUTPUT)]
ExplainOption = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Print every setting, where its value comes from and what it does, and train nothing.",
        rich_help_panel=OUTPUT,
    ),
]
TrainJsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)
]
