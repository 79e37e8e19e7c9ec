"""``sdlora generate``: images under any number of weighted LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..generation.request import ImageRequest
from ..generation.samplers import SAMPLERS
from .app import BaseOption, JsonOption, app, emit, guard, parse_size


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Several make several images.")],
    base: BaseOption = "mini",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:UNET[:TE]]", help="A LoRA with its weight (default 1); may be repeated."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What the image should not show.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = ImageRequest.steps,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = ImageRequest.cfg,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; default: the base's own.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each prompt, with seeds N, N+1, ...")] = 1,
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")] = ImageRequest.sampler,
    strip: Annotated[
        bool, typer.Option("--strip", help="One labelled image: each LoRA at 0, 0.5 and 1, then all together.")
    ] = False,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    clip_skip: Annotated[int | None, typer.Option(help="Text encoder's layer, 1 being the last.")] = None,
    vae: Annotated[str | None, typer.Option(metavar="FILE", help="Instead of the base's own.")] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Instead of the base's own; SDXL's second comes second.")
    ] = None,
    prediction: Annotated[str, typer.Option(help="auto, epsilon or v_prediction.")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa or xformers.")] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="A .png file or a folder; default: out/.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images with any number of weighted LoRAs; each PNG holds its own recipe."""

    def run() -> None:
        shape = parse_size(size)
        if strip and count > 1:
            raise typer.BadParameter("a strip shows one seed; leave --count out", param_hint="--strip")
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
        from ..generation import studio
        from ..generation.infotext import save_png

        options: dict[str, Any] = {"negative": negative, "seed": seed, "steps": steps, "cfg": cfg}
        options |= {"size": shape, "sampler": sampler, "precision": precision, "base": section, "loras": lora or ()}
        target = out or Path("out")
        single = target.suffix == ".png"
        if strip:
            image, parameters = studio.generate_strip(prompt, scale=2, **options)
            files = [target if single else target / f"{_slug(prompt[0])}-strip.png"]
            save_png(image, files[0], parameters)
        else:
            images = studio.generate(prompt, count=count, **options)
            files = []
            for number, image in enumerate(images):
                name = f"{_slug(image.request.prompt)}-{image.request.seed}.png"
                if single:
                    name = target.name if len(images) == 1 else f"{target.stem}-{number}.png"
                files.append((target.parent if single else target) / name)
                save_png(image.image, files[-1], image.parameters)
        if as_json:
            emit({"images": [str(file) for file in files], "seed": seed, "prompts": prompt, "loras": list(lora or ())})
        else:
            for file in files:
                typer.echo(str(file))

    guard(run)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "image"
