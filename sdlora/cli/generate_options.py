"""The options of ``sdlora generate``, many of which other verbs that draw have too."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..config.choices import PRECISIONS
from ..generation.hires import UPSCALERS, Hires
from ..generation.request import MAX_SEED, RANDOM_SEED
from ..generation.samplers import SAMPLERS
from ..generation.saving import FORMATS
from ..generation.schedules import SCHEDULES
from ..generation.start_image import StartImage

_ANY_PRECISION = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"

LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:UNET[:TE]]", help="A LoRA with its weight (default 1); may be repeated."),
]
LoraDirOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder in which tags of prompts, <lora:name:0.8>, find their files."),
]
NegativeOption = Annotated[str, typer.Option(help="Negative prompt.")]
SeedOption = Annotated[
    int | None,
    typer.Option(min=RANDOM_SEED, max=MAX_SEED, help="Seed of the first image; by default, and by -1, a random one."),
]
StepsOption = Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")]
CfgOption = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")]
SizeOption = Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; default: the base's own.")]
SamplerOption = Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}, or as A1111 names it.")]
ScheduleOption = Annotated[
    str | None, typer.Option(help=f"Spread of the steps: {', '.join(SCHEDULES)}. By default the sampler's own.")
]
RescaleOption = Annotated[
    float | None,
    typer.Option(metavar="PHI", help="0 to 1: give guided images the contrast of unguided ones back, such as 0.7."),
]
ImageOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Image to image: draw over this one, by default at its own size."),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(help=f"How much of --image is repainted, above 0 to 1 (all); default {StartImage.strength}."),
]
MaskOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Inpainting: what is white here is repainted, what is black stays."),
]
MaskBlurOption = Annotated[
    int | None, typer.Option(help=f"Pixels over which the edge of --mask is mixed; default {StartImage.mask_blur}.")
]
HiresOption = Annotated[
    float | None,
    typer.Option(metavar="FACTOR", help="Second pass: enlarge what was drawn by this, and draw over it (Hires. fix)."),
]
HiresStrengthOption = Annotated[
    float | None,
    typer.Option(help=f"How much of it the second pass repaints, above 0 to 1; default {Hires.strength}."),
]
HiresStepsOption = Annotated[
    int | None, typer.Option(help="Steps that the second pass takes; default: as many as the first.")
]
HiresUpscalerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"One of {', '.join(UPSCALERS)}; default {Hires.upscaler}."),
]
EmbeddingOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A textual inversion; prompts use it by the file's name. May be repeated."),
]
StripOption = Annotated[
    bool,
    typer.Option("--strip", help="One labelled image: without LoRA, each LoRA at half and full weight, all together."),
]
PrecisionOption = Annotated[str, typer.Option(help=f"Precision of the base: {_ANY_PRECISION}.")]
VaeTilingOption = Annotated[
    bool, typer.Option("--vae-tiling", help="Encode and decode in strips: less memory, slower.")
]
BatchSizeOption = Annotated[
    int | None, typer.Option(min=1, help="The most images that are drawn together. By default up to 4, by their size.")
]
ClipSkipOption = Annotated[int | None, typer.Option(help="Layer of the text encoder, counted from the end.")]
VaeOption = Annotated[str | None, typer.Option(metavar="FILE", help="Replaces the base's own.")]
TextEncoderOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Replaces the base's own; repeat for SDXL's second.")
]
OutOption = Annotated[
    str,
    typer.Option(metavar="PATH", help=f"File ({', '.join(FORMATS)}) to write, or folder, whose names count up."),
]


def check_precision(precision: str) -> None:
    """Raise ``typer.BadParameter`` where there is no such precision."""
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"{precision!r} is not {_ANY_PRECISION}", param_hint="--precision")


def stated(**values: Any) -> dict[str, Any]:
    """Those of ``values`` that are stated: all but None."""
    return {name: value for name, value in values.items() if value is not None}
