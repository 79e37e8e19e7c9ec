"""``sdlora generate``: images with any number of weighted LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..generation.request import ImageRequest
from ..generation.samplers import SAMPLERS
from .app import BaseOption, JsonOption, app, emit, examples, guard, parse_size


@app.command(
    epilog=examples(
        "sdlora generate 'zorb, a fox' --lora zorb.safetensors:0.8 --seed 1",
        "sdlora generate 'a fox' --base my-checkpoint.safetensors --size 512x768 --count 4 --out out/foxes",
    )
)
@guard
def generate(
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Several prompts make several images.")],
    base: BaseOption = "mini",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:UNET[:TE]]", help="A LoRA with its weight (default 1); may be repeated."),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first image.")] = ImageRequest.seed,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = ImageRequest.steps,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = ImageRequest.cfg,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; default: the base's own.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each prompt, with the seeds N, N+1, ...")] = 1,
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")] = ImageRequest.sampler,
    strip: Annotated[
        bool,
        typer.Option(
            "--strip", help="One labelled image: without LoRA, each LoRA at half and full weight, all together."
        ),
    ] = False,
    precision: Annotated[str, typer.Option(help="Precision of the base: auto, float32 or bfloat16.")] = "auto",
    clip_skip: Annotated[int | None, typer.Option(help="Layer of the text encoder, counted from the end.")] = None,
    vae: Annotated[str | None, typer.Option(metavar="FILE", help="Replaces the base's own.")] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Replaces the base's own; repeat for SDXL's second.")
    ] = None,
    prediction: Annotated[str, typer.Option(help="What the base predicts: auto, epsilon or v_prediction.")] = "auto",
    attention: Annotated[str, typer.Option(help="Implementation of attention: auto, sdpa or xformers.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File (.png) or folder to write; default: out/.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images with any number of weighted LoRAs; each PNG contains its recipe."""
    shape = parse_size(size)
    if strip and count > 1:
        raise typer.BadParameter("a strip shows one seed; remove --count", param_hint="--strip")
    if precision not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"{precision!r} is not auto, float32 or bfloat16", param_hint="--precision")
    encoders = [*(text_encoder or ()), None, None]
    from ..config.loading import base_section

    section = base_section(
        path=base,
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        prediction=prediction,
        clip_skip=clip_skip,
        attention=attention,
    )
    options: dict[str, Any] = {"negative": negative, "seed": seed, "steps": steps, "cfg": cfg}
    options |= {"size": shape, "sampler": sampler, "precision": precision, "base": section, "loras": lora or ()}
    target = out or Path("out")
    files = _write_strip(prompt, target, options) if strip else _write_images(prompt, count, target, options)
    if as_json:
        emit({"images": [str(file) for file in files], "seed": seed, "prompts": prompt, "loras": list(lora or ())})
    else:
        for file in files:
            typer.echo(str(file))


def _write_strip(prompts: list[str], target: Path, options: dict[str, Any]) -> list[Path]:
    from ..generation.infotext import save_png
    from ..generation.studio import generate_strip

    image, parameters = generate_strip(prompts, scale=2, **options)
    file = target if target.suffix == ".png" else target / f"{_slug(prompts[0])}-strip.png"
    save_png(image, file, parameters)
    return [file]


def _write_images(prompts: list[str], count: int, target: Path, options: dict[str, Any]) -> list[Path]:
    from ..generation.infotext import save_png
    from ..generation.studio import generate

    images = generate(prompts, count=count, **options)
    files = _files(target, [f"{_slug(image.request.prompt)}-{image.request.seed}" for image in images])
    for image, file in zip(images, files, strict=True):
        save_png(image.image, file, image.parameters)
    return files


def _files(target: Path, names: list[str]) -> list[Path]:
    """A file for each image: in the folder ``target`` by its name, or ``target`` itself, numbered if they are several."""
    if target.suffix != ".png":
        return [target / f"{name}.png" for name in names]
    if len(names) == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{number}.png") for number in range(len(names))]


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "image"
