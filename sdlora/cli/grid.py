"""``sdlora grid``: one prompt over axes of weights, LoRAs, seeds and settings."""

from __future__ import annotations

from typing import Annotated

import typer

from ..generation.request import MAX_SEED, ImageRequest
from .app import BaseOption, JsonOption, app, emit, examples, guard, parse_size
from .generate_options import (
    BatchSizeOption,
    CfgOption,
    ClipSkipOption,
    EmbeddingOption,
    HiresOption,
    HiresStepsOption,
    HiresStrengthOption,
    HiresUpscalerOption,
    ImageOption,
    LoraDirOption,
    MaskBlurOption,
    MaskOption,
    NegativeOption,
    PrecisionOption,
    RescaleOption,
    SamplerOption,
    ScheduleOption,
    SizeOption,
    StepsOption,
    StrengthOption,
    VaeOption,
    VaeTilingOption,
    check_precision,
    stated,
)
from .prompt_options import WildcardsOption

_AXIS = "KIND:V,V"


@app.command(
    epilog=examples(
        "sdlora grid 'zorb, a fox' --lora zorb.safetensors --x weight:0,0.5,1 --y seed:1-3",
        "sdlora grid 'a fox' --lora zorb.safetensors --x step:500,1000,last --y prompt:fox,cat,tower --out out/steps.png",
        more="Kinds of axes: lora, weight, step, prompt, seed, cfg, steps, strength, sampler, schedule, size. Ranges: "
        "1-5, 1-9 (+2), 0-1 [5].",
    )
)
@guard
def grid(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    x: Annotated[str | None, typer.Option("--x", metavar=_AXIS, help="Columns, for example weight:0,0.5,1.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar=_AXIS, help="Rows, for example seed:1,2,3.")] = None,
    z: Annotated[str | None, typer.Option("--z", metavar=_AXIS, help="Grids below each other.")] = None,
    base: BaseOption = "mini",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:UNET[:TE]]", help="A LoRA in all cells with its weight (default 1); may be repeated."
        ),
    ] = None,
    lora_dir: LoraDirOption = None,
    wildcards: WildcardsOption = None,
    negative: NegativeOption = "",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all cells.")] = ImageRequest.seed,
    steps: StepsOption = ImageRequest.steps,
    cfg: CfgOption = ImageRequest.cfg,
    size: SizeOption = None,
    sampler: SamplerOption = ImageRequest.sampler,
    schedule: ScheduleOption = None,
    guidance_rescale: RescaleOption = None,
    image: ImageOption = None,
    strength: StrengthOption = None,
    mask: MaskOption = None,
    mask_blur: MaskBlurOption = None,
    hires: HiresOption = None,
    hires_strength: HiresStrengthOption = None,
    hires_steps: HiresStepsOption = None,
    hires_upscaler: HiresUpscalerOption = None,
    embedding: EmbeddingOption = None,
    scale: Annotated[int, typer.Option(min=1, max=8, help="Enlarge the labelled image.")] = 1,
    precision: PrecisionOption = "auto",
    vae_tiling: VaeTilingOption = False,
    batch_size: BatchSizeOption = None,
    clip_skip: ClipSkipOption = None,
    vae: VaeOption = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The labelled image; cells go to NAME.cells.")
    ] = "out/grid.png",
    as_json: JsonOption = False,
) -> None:
    """Draw a grid of images over two or three axes; an interrupted grid goes on where it stopped."""
    shape = parse_size(size)
    check_precision(precision)
    from ..config.loading import base_section
    from ..grids.grid import grid as draw

    drawing = stated(
        image=image, strength=strength, mask=mask, mask_blur=mask_blur, hires=hires, hires_strength=hires_strength,
        hires_steps=hires_steps, hires_upscaler=hires_upscaler, schedule=schedule, guidance_rescale=guidance_rescale,
        embeddings=embedding,
    )  # fmt: skip
    section = base_section(path=base, clip_skip=clip_skip, vae=vae)
    made = draw(
        prompt, x=x, y=y, z=z, out=out, base=section, loras=lora or (), lora_dir=lora_dir, wildcards=wildcards,
        negative=negative, seed=seed, steps=steps, cfg=cfg, size=shape, sampler=sampler, scale=scale,
        precision=precision, vae_tiling=vae_tiling, batch_size=batch_size,
        say=lambda line: typer.echo(line, err=True), **drawing,
    )  # fmt: skip
    if as_json:
        emit(made.to_json())
        return
    used = len(made.cells) - made.drawn
    typer.echo(f"{made.file}: {len(made.cells)} cells{f', {used} of them drawn before' if used else ''}")
    typer.echo(f"{made.folder}: the cells, and grid.json with their recipes")
