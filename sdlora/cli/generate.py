"""``sdlora generate``: images with any number of weighted LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Interrupted
from ..files import check_target
from ..generation.request import ImageRequest, first_seed
from ..generation.saving import ImageTarget
from .app import BaseOption, JsonOption, app, emit, examples, guard, parse_size
from .from_recipe import FromOption, from_recipe
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
    LoraOption,
    MaskBlurOption,
    MaskOption,
    NegativeOption,
    OutOption,
    PrecisionOption,
    RescaleOption,
    SamplerOption,
    ScheduleOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StrengthOption,
    StripOption,
    TextEncoderOption,
    VaeOption,
    VaeTilingOption,
    check_precision,
    stated,
)
from .preview import preview_progress
from .prompt_options import PreviewOption, PromptArgument, PromptsOption, WildcardsOption, prompt_lines

if TYPE_CHECKING:
    from ..config.sections import BaseSection
    from ..generation.images import GeneratedImage
    from ..generation.prompt_file import PromptLine


@app.command(
    epilog=examples(
        "sdlora generate 'zorb, a fox' --lora zorb.safetensors:0.8 --seed 1",
        "sdlora generate 'a fox in snow' --image fox.png --strength 0.6 --mask sky.png",
        "sdlora generate 'a fox' --hires 2 --hires-steps 10",
        "sdlora generate 'a fox' --base my-checkpoint.safetensors --size 512x768 --count 4 --out out/foxes",
    )
)
@guard
def generate(
    context: typer.Context,
    prompt: PromptArgument = None,
    prompts: PromptsOption = None,
    source: FromOption = None,
    base: BaseOption = "mini",
    lora: LoraOption = None,
    lora_dir: LoraDirOption = None,
    wildcards: WildcardsOption = None,
    negative: NegativeOption = "",
    seed: SeedOption = None,
    steps: StepsOption = ImageRequest.steps,
    cfg: CfgOption = ImageRequest.cfg,
    size: SizeOption = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each prompt, with the seeds N, N+1, ...")] = 1,
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
    strip: StripOption = False,
    preview: PreviewOption = None,
    precision: PrecisionOption = "auto",
    vae_tiling: VaeTilingOption = False,
    batch_size: BatchSizeOption = None,
    clip_skip: ClipSkipOption = None,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    prediction: Annotated[str, typer.Option(help="The base's: auto, epsilon, v_prediction or sample.")] = "auto",
    attention: Annotated[str, typer.Option(help="Implementation of attention: auto, sdpa or xformers.")] = "auto",
    out: OutOption = "out/",
    as_json: JsonOption = False,
) -> None:
    """Generate images with any number of weighted LoRAs; each file contains its recipe."""
    lines = prompt_lines(prompt or [], prompts, required=source is None)
    drawing = stated(
        image=image, strength=strength, mask=mask, mask_blur=mask_blur, hires=hires, hires_strength=hires_strength,
        hires_steps=hires_steps, hires_upscaler=hires_upscaler, embeddings=embedding,
    )  # fmt: skip
    folders = stated(lora_dir=lora_dir, wildcards=wildcards)
    if strip:
        _check_strip(count, **stated(source=source, prompts=prompts, preview=preview), **folders, **drawing)
    check_precision(precision)
    section = _base(text_encoder, path=base, vae=vae, prediction=prediction, clip_skip=clip_skip, attention=attention)
    target, first = ImageTarget.parse(out), first_seed(seed, count=max([count, *(line.count or 0 for line in lines)]))
    options: dict[str, Any] = {"negative": negative, "seed": first, "steps": steps, "cfg": cfg, "loras": lora or ()}
    options |= {"size": parse_size(size), "sampler": sampler, "precision": precision, "base": section}
    options |= {"vae_tiling": vae_tiling, "batch_size": batch_size}
    options |= stated(schedule=schedule, guidance_rescale=guidance_rescale) | drawing | folders
    if source is not None:
        lines, options = from_recipe(source, context, lines, options, _say)
    check_target(target.path, "folder" if target.is_folder else "file")
    files = _write_strip(lines, target, options) if strip else _write_images(lines, count, target, options, preview)
    if as_json:
        made = {"seed": options["seed"], "prompts": [line.prompt for line in lines], "loras": list(lora or ())}
        emit({"images": [str(file) for file in files], **made})
    else:
        _print_files(files, None if seed == options["seed"] else options["seed"])


def _base(text_encoders: list[str] | None, **stated: Any) -> BaseSection:
    from ..config.loading import base_section

    first, second, *_ = [*(text_encoders or ()), None, None]
    return base_section(text_encoder=first, text_encoder_2=second, **stated)


def _check_strip(count: int, **others: object) -> None:
    """Refuse what a strip does not follow."""
    reasons = {
        "lora_dir": "shows the LoRAs of --lora",
        "wildcards": "shows prompts as written",
        "prompts": "has the prompts of the command",
        "source": "has the prompts of the command",
        "preview": "has no preview",
    }
    found = [f"{reasons.get(name, 'is text to image in one pass')}; remove --{_option(name)}" for name in others]
    found += ["shows one seed; remove --count"] if count > 1 else []
    if found:
        raise typer.BadParameter(f"a strip {found[0]}", param_hint="--strip")


def _option(name: str) -> str:
    return {"source": "from", "embeddings": "embedding"}.get(name, name.replace("_", "-"))


def _print_files(files: list[Path], random_seed: int | None) -> None:
    if random_seed is not None:
        typer.echo(f"seed {random_seed}", err=True)
    for file in files:
        typer.echo(str(file))


def _write_strip(lines: list[PromptLine], target: ImageTarget, options: dict[str, Any]) -> list[Path]:
    from ..generation.generate import generate_strip

    prompts = [line.prompt for line in lines]
    image, parameters = generate_strip(prompts, scale=2, say=_say, **options)
    title = f"{_slug(prompts[0])}-strip"
    return [target.save(image, parameters, seed=options["seed"], title=title, alone=True)]


def _write_images(
    prompts: list[PromptLine], count: int, target: ImageTarget, options: dict[str, Any], preview: str | None
) -> list[Path]:
    from ..generation.generate import generate

    files: list[Path] = []
    total = sum(line.count or count for line in prompts)

    def write(image: GeneratedImage) -> None:
        request = image.request
        names = {"seed": request.seed, "title": _slug(request.prompt)}
        files.append(target.save(image.image, image.parameters, **names, alone=total == 1))

    try:
        with preview_progress(preview) as progress:
            generate(prompts, count=count, progress=progress, on_image=write, say=_say, **options)
    except (Interrupted, KeyboardInterrupt):
        done = f", the last is {files[-1]}" if files else ""
        raise Interrupted(f"interrupted: {len(files)} of {total} images are written{done}") from None
    return files


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "image"
