"""``sdlora generate``: images with any number of weighted LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config.choices import PRECISIONS
from ..errors import Interrupted
from ..files import check_target
from ..generation.request import ImageRequest, first_seed
from ..generation.saving import ImageTarget
from .app import BaseOption, JsonOption, app, emit, examples, guard, parse_size
from .generate_options import (
    ANY_PRECISION,
    AttentionOption,
    CfgOption,
    ClipSkipOption,
    CountOption,
    ImageOption,
    LoraDirOption,
    LoraOption,
    MaskBlurOption,
    MaskOption,
    NegativeOption,
    OutOption,
    PrecisionOption,
    PredictionOption,
    PromptArgument,
    SamplerOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StrengthOption,
    StripOption,
    TextEncoderOption,
    VaeOption,
    VaeTilingOption,
)

if TYPE_CHECKING:
    from ..generation.images import GeneratedImage


@app.command(
    epilog=examples(
        "sdlora generate 'zorb, a fox' --lora zorb.safetensors:0.8 --seed 1",
        "sdlora generate 'a fox in snow' --image fox.png --strength 0.6 --mask sky.png",
        "sdlora generate 'a fox' --base my-checkpoint.safetensors --size 512x768 --count 4 --out out/foxes",
    )
)
@guard
def generate(
    prompt: PromptArgument,
    base: BaseOption = "mini",
    lora: LoraOption = None,
    lora_dir: LoraDirOption = None,
    negative: NegativeOption = "",
    seed: SeedOption = None,
    steps: StepsOption = ImageRequest.steps,
    cfg: CfgOption = ImageRequest.cfg,
    size: SizeOption = None,
    count: CountOption = 1,
    sampler: SamplerOption = ImageRequest.sampler,
    image: ImageOption = None,
    strength: StrengthOption = None,
    mask: MaskOption = None,
    mask_blur: MaskBlurOption = None,
    strip: StripOption = False,
    precision: PrecisionOption = "auto",
    vae_tiling: VaeTilingOption = False,
    clip_skip: ClipSkipOption = None,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    prediction: PredictionOption = "auto",
    attention: AttentionOption = "auto",
    out: OutOption = "out/",
    as_json: JsonOption = False,
) -> None:
    """Generate images with any number of weighted LoRAs; each file contains its recipe."""
    shape = parse_size(size)
    if strip and count > 1:
        raise typer.BadParameter("a strip shows one seed; remove --count", param_hint="--strip")
    if strip and lora_dir is not None:
        raise typer.BadParameter("a strip shows the LoRAs of --lora; remove --lora-dir", param_hint="--strip")
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"{precision!r} is not {ANY_PRECISION}", param_hint="--precision")
    encoders = [*(text_encoder or ()), None, None]
    from ..config.loading import base_section

    section = base_section(
        path=base, vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], prediction=prediction,
        clip_skip=clip_skip, attention=attention,
    )  # fmt: skip
    target = ImageTarget.parse(out)
    first = first_seed(seed, count=count)
    options: dict[str, Any] = {"negative": negative, "seed": first, "steps": steps, "cfg": cfg}
    options |= {"size": shape, "sampler": sampler, "precision": precision, "base": section, "loras": lora or ()}
    drawing = {"image": image, "strength": strength, "mask": mask, "mask_blur": mask_blur}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if strip and drawing:
        raise typer.BadParameter(f"a strip is text to image; remove --{next(iter(drawing))}", param_hint="--strip")
    options |= drawing
    options |= {"vae_tiling": vae_tiling} | ({} if strip else {"lora_dir": lora_dir})
    check_target(target.path, "folder" if target.is_folder else "file")
    files = _write_strip(prompt, target, options) if strip else _write_images(prompt, count, target, options)
    if as_json:
        emit({"images": [str(file) for file in files], "seed": first, "prompts": prompt, "loras": list(lora or ())})
    else:
        _print_files(files, None if seed == first else first)


def _print_files(files: list[Path], random_seed: int | None) -> None:
    if random_seed is not None:
        typer.echo(f"seed {random_seed}", err=True)
    for file in files:
        typer.echo(str(file))


def _write_strip(prompts: list[str], target: ImageTarget, options: dict[str, Any]) -> list[Path]:
    from ..generation.studio import generate_strip

    image, parameters = generate_strip(prompts, scale=2, say=_say, **options)
    title = f"{_slug(prompts[0])}-strip"
    return [target.save(image, parameters, seed=options["seed"], title=title, alone=True)]


def _write_images(prompts: list[str], count: int, target: ImageTarget, options: dict[str, Any]) -> list[Path]:
    from ..generation.studio import generate

    files: list[Path] = []
    total = len(prompts) * count

    def write(image: GeneratedImage) -> None:
        request = image.request
        names = {"seed": request.seed, "title": _slug(request.prompt)}
        files.append(target.save(image.image, image.parameters, **names, alone=total == 1))

    try:
        generate(prompts, count=count, on_image=write, say=_say, **options)
    except (Interrupted, KeyboardInterrupt):
        done = f", the last is {files[-1]}" if files else ""
        raise Interrupted(f"interrupted: {len(files)} of {total} images are written{done}") from None
    return files


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "image"
