"""The command line: verbs only. What a verb needs is imported when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Read when torch is imported. OpenMP threads that spin for work slow a step a hundred times when another process is
# busy; threads that sleep at once halve the speed of small steps. So they spin for some 50 microseconds, then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import typer

from . import __version__
from .errors import ConfigError, DataError, Interrupted, SdloraError

if TYPE_CHECKING:
    from .captioners import Captioner

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train style LoRAs for Stable Diffusion, generate pictures with several at once, inspect LoRA files.",
)

BaseOption = Annotated[
    str, typer.Option("--base", metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


def main() -> None:
    """The ``sdlora`` command. Exit codes: 0 done, 1 input at fault, 2 usage, 130 interrupted after a safe save."""
    app()


def _guard(run: Callable[[], None]) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        run()
    except SdloraError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(1) from None
    except (Interrupted, KeyboardInterrupt) as error:
        typer.echo(str(error) or "interrupted", err=True)
        raise typer.Exit(130) from None


def _emit(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def _quiet_libraries() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sdlora {__version__}")
        raise typer.Exit()


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of pictures with .txt captions.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="The word that calls the style.")] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="'mini', a file or a folder.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The LoRA file to write.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever an earlier run left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA from a folder of captioned pictures; the same command again resumes it."""

    def run() -> None:
        from .config import load_config

        given = list(arguments or ())
        file = given.pop(0) if given and "=" not in given[0] else None
        options = {"data.images": images, "data.trigger": trigger, "base.path": base, "output.path": out}
        if file is None and images is not None and out is None:
            options["output.path"] = f"out/{Path(images).resolve().name}.safetensors"
        # As TOML text, whatever it looks like: a trigger word of digits stays a word.
        given += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
        if file is None and not given:
            raise typer.BadParameter("name a CONFIG.toml, or give --images DIR and --trigger WORD")
        config = load_config(file, given)
        from . import api

        _quiet_libraries()
        report = api.train(config, restart=restart, say=lambda line: typer.echo(line, err=True))
        result = report.result
        if as_json:
            keys = ("output", "steps", "seconds", "loss", "validation_loss", "resumed_from")
            _emit({**{key: getattr(result, key) for key in keys}, "samples": report.samples})
        elif result.loss is None:
            typer.echo(f"{result.output}: this run is complete already; --restart would begin anew")
        else:
            done = f"{result.steps} steps, the last tenth at loss {result.loss:.4f}, {result.seconds:.0f} s"
            if result.validation_loss is not None:
                done += f", validation loss {result.validation_loss:.4f}"
            since = f", resumed from step {result.resumed_from}" if result.resumed_from else ""
            size = result.output.stat().st_size / 1e6
            typer.echo(f"{result.output}: {size:.1f} MB, {done}{since}")
            if report.samples:
                typer.echo(f"{report.samples}: samples")

    _guard(run)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Several make several pictures.")],
    base: BaseOption = "mini",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:UNET[:TE]]", help="A LoRA with its weight (default 1); may be repeated."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 5.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; default: the base's own.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, with seeds N, N+1, ...")] = 1,
    sampler: Annotated[str, typer.Option(help="dpm++2m, euler, euler-a or ddim.")] = "dpm++2m",
    strip: Annotated[
        bool, typer.Option("--strip", help="One labelled picture: each LoRA at 0, 0.5 and 1, then all together.")
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
    """Generate pictures with any number of weighted LoRAs; each PNG holds its own recipe."""

    def run() -> None:
        shape = _parse_size(size)
        if strip and count > 1:
            raise typer.BadParameter("a strip shows one seed; leave --count out", param_hint="--strip")
        if precision not in ("auto", "float32", "bfloat16"):
            raise typer.BadParameter(f"{precision!r} is not auto, float32 or bfloat16", param_hint="--precision")
        encoders = [*(text_encoder or ()), None, None]
        from .config import base_section

        section = base_section(
            path=base,
            vae=vae,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            prediction=prediction,
            clip_skip=clip_skip,
            attention=attention,
        )
        from . import api
        from .generation.infotext import save_png

        _quiet_libraries()
        options: dict[str, Any] = {"negative": negative, "seed": seed, "steps": steps, "cfg": cfg}
        options |= {"size": shape, "sampler": sampler, "precision": precision, "base": section, "loras": lora or ()}
        target = out or Path("out")
        single = target.suffix == ".png"
        if strip:
            image, parameters = api.generate_strip(prompt, scale=2, **options)
            files = [target if single else target / f"{_slug(prompt[0])}-strip.png"]
            save_png(image, files[0], parameters)
        else:
            pictures = api.generate(prompt, count=count, **options)
            files = []
            for number, picture in enumerate(pictures):
                name = f"{_slug(picture.request.prompt)}-{picture.request.seed}.png"
                if single:
                    name = target.name if len(pictures) == 1 else f"{target.stem}-{number}.png"
                files.append((target.parent if single else target) / name)
                save_png(picture.image, files[-1], picture.parameters)
        if as_json:
            _emit({"images": [str(file) for file in files], "seed": seed, "prompts": prompt, "loras": list(lora or ())})
        else:
            for file in files:
                typer.echo(str(file))

    _guard(run)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA, a checkpoint file or folder, or 'mini'.")],
    with_hashes: Annotated[
        bool,
        typer.Option("--hash", help="A checkpoint's SHA-256, AutoV1, AutoV2 and AutoV3 too; reads all of it once."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a LoRA file or a checkpoint is: family, modules, ranks, hashes, metadata, problems."""

    def run() -> None:
        # Not by way of the api, which brings diffusers: this verb answers in a second.
        from .inspection.files import inspect_file
        from .inspection.report import as_text
        from .progress import progress_bar

        with progress_bar() as progress:
            report = inspect_file(file, hashes=with_hashes, progress=progress)
        if as_json:
            _emit(report.to_json())
        else:
            typer.echo(as_text(report))

    _guard(run)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A LoRA file in any dialect, or a PEFT adapter's folder.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="DIALECT", help="kohya, diffusers or peft.")],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Where it is not of a published size.")] = None,
    precision: Annotated[str, typer.Option(help="auto (as it is), float16, bfloat16 or float32.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA in another dialect: the same changes under other names."""

    def run() -> None:
        if precision not in ("auto", "float16", "bfloat16", "float32"):
            raise typer.BadParameter(f"{precision!r} is not a precision", param_hint="--precision")
        from .conversion import convert as convert_file

        report = convert_file(source, target, to=to, base=base, precision=precision)
        if as_json:
            _emit(report.to_json())
        else:
            typer.echo(
                f"{report.output}: {report.modules} modules, {report.family}, {report.dialect} names, {report.dtype}"
            )
            for problem in report.left_out:
                typer.echo(f"  left out: {problem}")

    _guard(run)


@app.command()
def export(
    lora: Annotated[str, typer.Argument(metavar="LORA", help="A LoRA file in any dialect.")],
    civitai: Annotated[Path, typer.Option("--civitai", metavar="DIR", help="The folder to make: all an upload needs.")],
    base: BaseOption = "mini",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of a preview; may be repeated. Default: trigger and frequent tags.")
    ] = None,
    previews: Annotated[bool, typer.Option(help="Whether to draw pictures.")] = True,
    negative: Annotated[str, typer.Option(help="What the pictures should not show.")] = "",
    weight: Annotated[float, typer.Option(help="Of the pictures, and recommended.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 5.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; default: the base's own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the folder for an upload: the LoRA, previews that link to it, A1111's card and a model card."""

    def run() -> None:
        shape = _parse_size(size)
        from .civitai import export_civitai

        _quiet_libraries()
        package = export_civitai(
            lora,
            civitai,
            base=base,
            prompts=prompt if previews else (),
            negative=negative,
            weight=weight,
            seed=seed,
            steps=steps,
            cfg=cfg,
            size=shape,
        )
        if as_json:
            _emit(package.to_json())
        else:
            for name in (package.lora, *package.previews, package.sidecar, package.card):
                typer.echo(str(civitai / name))
            if package.redacted:
                typer.echo(f"{package.redacted} values of its metadata named folders or addresses, and no longer do")

    _guard(run)


@app.command("lint")
def lint_(
    arguments: Annotated[
        list[str], typer.Argument(metavar="DIR | CONFIG.toml [section.key=value]...", show_default=False)
    ],
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="The word that calls the style.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=64, max=4096, help="In pixels; default: the base's own.")
    ] = None,
    caption_extension: Annotated[str | None, typer.Option(metavar=".EXT", help="Default: .txt")] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="'mini', a file or a folder.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend, in a copy: --out names it.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="COPY", help="The new folder that --fix writes.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw each picture as it is trained on, with its caption.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for every fault of a dataset, before a model is loaded; exit code 1 where one forbids training."""

    def run() -> None:
        if fix != (out is not None):
            raise typer.BadParameter("--fix and --out COPY go together", param_hint="--fix")
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise typer.BadParameter(f"{sheet} does not end in .png", param_hint="--sheet")
        from .linting import lint_data, linted_sections, report_lines
        from .progress import progress_bar

        data, section = linted_sections(
            arguments, trigger=trigger, resolution=resolution, caption_extension=caption_extension, base=base
        )
        with progress_bar() as progress:
            report = lint_data(data, section, progress=progress)
            sheets, copy = (), None
            if sheet is not None and report.examined:
                from .data.sheet import write_sheets

                sheets = write_sheets(
                    report.examined,
                    report.placements,
                    background=report.data.alpha_background,
                    mask=report.data.mask,
                    file=sheet,
                    progress=progress,
                )
            if out is not None:
                from .data.repair import write_repaired

                copy = write_repaired(report.data, report.listing.sources, report.examined, out=out, progress=progress)
        if as_json:
            answer = report.to_json() | {"sheets": [str(file) for file in sheets]}
            if copy is not None:
                answer["copy"] = {"folder": str(copy.folder), "pictures": copy.pictures}
                answer["repairs"] = [vars(repair) for repair in copy.repairs]
            _emit(answer)
        else:
            lines = report_lines(report)
            if sheets:
                lines += ["", *(f"{file}: contact sheet" for file in sheets)]
            if copy is not None:
                lines += ["", f"{copy.folder}: {copy.pictures} pictures, {len(copy.repairs)} repairs"]
                lines += copy.lines()
            typer.echo("\n".join(lines))
        if report.has_errors:
            raise typer.Exit(1)

    _guard(run)


metadata_app = typer.Typer(no_args_is_help=True, help="Show, change or clean the metadata of a safetensors file.")
app.add_typer(metadata_app, name="metadata")
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Any safetensors file.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="OUT", help="May be FILE itself.")]


@metadata_app.command()
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print the metadata; no tensor is read."""

    def run() -> None:
        from .formats.metadata_file import read_metadata

        metadata = read_metadata(file)
        if as_json:
            _emit(metadata)
        for key, value in metadata.items() if not as_json else ():
            typer.echo(f"{key}: {value if len(value) <= 200 else value[:200] + '…'}")

    _guard(run)


@metadata_app.command("set")
def set_(
    file: FileArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="An empty VALUE takes the key away.")],
    out: OutOption,
) -> None:
    """Change keys; the tensors, and with them the hashes over the tensors, stay."""

    def run() -> None:
        from .formats.metadata_file import read_metadata, write_metadata

        split = [pair.partition("=") for pair in pairs]
        if wrong := [pair for pair, (key, equals, _) in zip(pairs, split, strict=True) if not (key and equals)]:
            raise typer.BadParameter(f"{wrong[0]!r}: expected KEY=VALUE", param_hint="KEY=VALUE")
        changed = read_metadata(file) | {key: value for key, _, value in split}
        write_metadata(file, out, {key: value for key, value in changed.items() if value})
        typer.echo(str(out))

    _guard(run)


@metadata_app.command()
def redact(file: FileArgument, out: OutOption) -> None:
    """Take folders and mail addresses out of the metadata, whoever wrote it."""

    def run() -> None:
        from .formats.metadata_file import read_metadata, redacted, write_metadata

        before = read_metadata(file)
        after = redacted(before)
        write_metadata(file, out, after)
        typer.echo(f"{out}: {sum(before[key] != after[key] for key in before)} of {len(before)} values changed")

    _guard(run)


@app.command()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures; those within it too.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="BLIP, Florence-2, or a WD14 tagger, on this disk.")],
    kind: Annotated[str, typer.Option(help="auto, blip, florence or wd14.")] = "auto",
    trigger: Annotated[str, typer.Option(metavar="WORD", help="Put in front of every caption written.")] = "",
    caption_extension: Annotated[str, typer.Option(metavar=".EXT", help="Of the caption files.")] = ".txt",
    as_json: JsonOption = False,
) -> None:
    """Write the captions that are missing beside the pictures, by a local model; no caption is ever changed."""

    def run() -> None:
        from .captioners import KINDS, find_kind, open_captioner

        if kind not in ("auto", *KINDS):
            raise typer.BadParameter(f"{kind!r} is not auto, {', '.join(KINDS)}", param_hint="--kind")
        found = find_kind(model, kind)
        from .captioning import caption_folder
        from .progress import progress_bar

        def load() -> Captioner:
            _quiet_libraries()
            return open_captioner(model, found)

        with progress_bar() as progress:
            report = caption_folder(
                folder, load, trigger=trigger.strip(), extension=caption_extension, progress=progress
            )
        if as_json:
            _emit({"kind": found, **report.to_json()})
        else:
            typer.echo(f"{folder}: {len(report.written)} captions written, {report.present} were there before")
        if report.problems:
            raise DataError(report.problems)

    _guard(run)


cache_app = typer.Typer(no_args_is_help=True, help="Look after what encoded pictures and captions take of the disk.")
app.add_typer(cache_app, name="cache")
FolderOption = Annotated[
    Path | None, typer.Option("--folder", metavar="DIR", help="As cache.folder; default: in the user's cache folder.")
]


@cache_app.command()
def info(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """Tell how many encoded pictures and captions are kept, and how large they are."""

    def run() -> None:
        from .data.cache_files import cache_info, encoded_folder

        told = cache_info(_existing(folder) or encoded_folder())
        if as_json:
            _emit(told.to_json())
            return
        typer.echo(f"{told.folder}: {told.entries:,} entries, {told.bytes / 1e6:,.1f} MB")
        for kind, size in told.kinds.items():
            typer.echo(f"  {kind:<8} {size.entries:,} entries, {size.bytes / 1e6:,.1f} MB")
        if told.entries:
            typer.echo(f"  last used between {told.oldest} and {told.newest}")

    _guard(run)


@cache_app.command("prune")
def prune_(
    max_gigabytes: Annotated[
        float | None,
        typer.Option("--max-gigabytes", min=0, metavar="N", help="How much may stay; default: cache.max_gigabytes."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was longest not used, until the rest fits."""

    def run() -> None:
        if everything and max_gigabytes is not None:
            raise typer.BadParameter("give --max-gigabytes or --all", param_hint="--all")
        from .config import CacheSection
        from .data.cache_files import cache_info, encoded_folder, prune

        place = _existing(folder) or encoded_folder()
        cap = 0 if everything else CacheSection().max_gigabytes if max_gigabytes is None else max_gigabytes
        removed, left = prune(place, cap * 1e9), cache_info(place)
        size = sum(entry.bytes for entry in removed)
        if as_json:
            _emit({"folder": str(place), "removed": len(removed), "removed_bytes": size, "left": left.to_json()})
        else:
            typer.echo(
                f"{place}: {len(removed):,} entries removed, {size / 1e6:,.1f} MB; "
                f"{left.entries:,} left, {left.bytes / 1e6:,.1f} MB"
            )

    _guard(run)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("out/quickstart"),
    as_json: JsonOption = False,
) -> None:
    """The three jobs in a row on the embedded base and the two sample sets; each step is shown as a command."""

    def run() -> None:
        from .quickstart import run_quickstart

        def command(arguments: list[str]) -> None:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                code = app(arguments, standalone_mode=False)
            if code:
                raise typer.Exit(code)

        report = run_quickstart(out, run=command, say=lambda line: typer.echo(line, err=as_json))
        if as_json:
            _emit(report.to_json())

    _guard(run)


def _existing(folder: Path | None) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    return folder


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected WIDTHxHEIGHT, for example 128x160", param_hint="--size")
    return int(match[1]), int(match[2])


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "picture"


if __name__ == "__main__":
    sys.exit(main())
