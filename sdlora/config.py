"""What a training run is told: one frozen section for each concern, from TOML and ``section.key=value``."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseSection(Section):
    path: str = Field("mini", min_length=1)
    """``mini``, a checkpoint file (.safetensors, .ckpt), or the folder of a diffusers checkpoint."""
    vae: str | None = Field(None, min_length=1)
    """A VAE to use in the place of the checkpoint's own, or where it has none: a file or a folder."""
    text_encoder: str | None = Field(None, min_length=1)
    """The same for the text encoder; of SDXL, for the first."""
    text_encoder_2: str | None = Field(None, min_length=1)
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts; ``auto`` is what the checkpoint says, by metadata, markers or weights."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep is noise alone (Lin et al. 2024); by default what the checkpoint says."""
    clip_skip: int | None = Field(None, ge=1, le=24)
    """The text encoder's layer that is read, 1 being the last; by default 1, for SDXL 2."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """``auto`` is torch's own (sdpa); xformers is probed first, and where it cannot run a warning says why."""


class SetSection(Section):
    """One folder of pictures among several; what it leaves out is as ``[data]`` has it."""

    images: str = Field(min_length=1)
    role: Literal["train", "regularisation", "validation"] = "train"
    """Regularisation pictures keep the base's own idea of a class (Ruiz et al. 2023, section 3.2: prior preservation);
    validation pictures are never trained on."""
    repeats: int = Field(1, ge=1)
    """How often each picture is shown in an epoch."""
    loss_weight: float = Field(1.0, ge=0)
    trigger: str | None = Field(None, max_length=60)
    """Instead of ``data.trigger``; "" for none."""
    caption_extension: Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9]+$")] | None = None


class DataSection(Section):
    images: str | None = Field(None, min_length=1)
    """Folder of training pictures; several stand in ``[[data.sets]]`` instead."""
    sets: tuple[SetSection, ...] = ()
    trigger: str = Field(min_length=1, max_length=60)
    """The word that calls the style."""
    trigger_as: Literal["word", "prefix", "template"] = "word"
    """``word`` puts it in front of every caption that lacks it, ``prefix`` in front of every caption (taking it out where
    it stood), ``template`` makes every caption from ``caption_template``."""
    caption_template: str = "{trigger}, {caption}"
    caption_extension: Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9]+$")] = ".txt"
    caption_lines: Literal["join", "draw"] = "join"
    """Whether the lines of a caption file are one caption, or captions of which each epoch draws one."""
    wildcards: bool = False
    """Whether ``{a|b}`` in a caption draws one of its alternatives in each epoch."""
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_replace: tuple[tuple[str, str], ...] = ()
    """Pairs of what is replaced and by what, in order, before anything else."""
    shuffle_tags: bool = False
    keep_tokens: int = Field(0, ge=0)
    """How many tags in front are neither shuffled nor dropped; the trigger never is."""
    tag_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the tags that are left out in each epoch."""
    allow_missing_captions: bool = False
    """Whether a picture without a caption is trained on the trigger alone, instead of being an error."""
    max_token_length: Literal[75, 150, 225] = 225
    """Tokens of a caption that are read, in chunks of 75."""
    resolution: Annotated[int, Field(ge=64, le=4096)] | tuple[Annotated[int, Field(ge=64, le=4096)], ...] | None = None
    """Pixels of a square picture's side, or several: then each picture is shown at each; by default the base's own."""
    bucket_rule: Literal["least-crop", "kohya"] = "least-crop"
    """Which bucket a picture gets: the one that cuts off least, or the one that kohya's trainer takes."""
    min_bucket_reso: int | None = Field(None, ge=32)
    max_bucket_reso: int | None = Field(None, ge=32)
    """Pixels of a bucket's shorter and longer side; by default half of ``resolution`` and twice as much."""
    bucket_reso_steps: int | None = Field(None, ge=8)
    """Pixels that a bucket's sides are multiples of; by default what the base needs."""
    bucket_no_upscale: bool = False
    """Whether small pictures get small buckets instead of being enlarged."""
    crop: Literal["center", "random", "salient"] = "center"
    """Which part of a picture that does not fit its bucket is shown; ``salient`` keeps the most detail."""
    flip: bool = False
    """Whether each picture is mirrored in half of the epochs."""
    mask: Literal["none", "alpha", "files"] = "none"
    """What weights the loss within a picture: nothing, its transparency, or ``mask/NAME.png`` beside it."""
    alpha_background: Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")] = "#ffffff"
    """What transparent pictures are composited on."""


class CacheSection(Section):
    """Where encoded pictures and captions are kept between runs; it changes the time of a run and nothing else."""

    disk: bool = True
    folder: str | None = Field(None, min_length=1)
    """By default ``sdlora/encoded`` in the user's cache folder; runs share it."""
    max_gigabytes: float = Field(20.0, gt=0)


class LoraSection(Section):
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(8.0, gt=0)
    """The change of a module is scaled by alpha / rank."""
    targets: Literal["attention", "attention-mlp"] = "attention"
    """Attention projections q, k, v, out; or these and the feed-forward layers between them."""


class TrainSection(Section):
    steps: int = Field(600, ge=1)
    batch_size: int = Field(4, ge=1)
    """Pictures in one step, over all processes."""
    learning_rate: float = Field(3e-4, ge=0, lt=1)
    text_encoder_learning_rate: float = Field(5e-5, ge=0, lt=1)
    """0 leaves the text encoder as it is, and its embeddings are computed once."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    min_snr_gamma: float = Field(5.0, ge=0)
    """Hang et al. 2023; 0 weights every noise level alike."""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the captions replaced by the empty one."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Of regularisation pictures (Ruiz et al. 2023, eq. 2)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; the LoRA itself is always trained in float32."""
    gradient_checkpointing: bool = False
    """Compute the UNet's inner values twice instead of keeping them: a quarter slower, and far less memory."""
    seed: int = Field(0, ge=0, lt=2**32)
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints."""


class OutputSection(Section):
    path: str = Field(pattern=r"\.safetensors$")
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the tensors in the file."""
    samples: tuple[str, ...] | None = None
    """Prompts for the sample sheet at the end; by default the first four captions, () for none."""


class Config(Section):
    """A training run. Sections left out take their defaults; ``data`` and ``output`` are needed."""

    base: BaseSection = BaseSection()
    data: DataSection
    cache: CacheSection = CacheSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    output: OutputSection

    def flat(self) -> dict[str, str]:
        """``section.key`` -> value as JSON, sorted."""
        sections = self.model_dump(mode="json")
        return {f"{s}.{k}": json.dumps(v) for s in sorted(sections) for k, v in sorted(sections[s].items())}


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read ``file`` and apply ``section.key=value`` overrides.

    Values of overrides are TOML where they parse as TOML and text otherwise, so quotes are not needed.

    Raises:
        ConfigError: with one line for each unknown key (and the nearest known one), wrong value or missing key.
    """
    tables, text = {}, ""
    if file is not None:
        tables, text = _read_toml(Path(file))
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            problems.append(f"{override!r}: expected section.key=value, for example train.steps=300")
            continue
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            table[name] = _toml_value(value.strip())
    try:
        config = Config.model_validate(_as_tuples(tables))
    except ValidationError as error:
        problems += [_explain(entry, str(file or "configuration"), text) for entry in error.errors()]
        config = None
    if config is None or problems:
        raise ConfigError(problems)
    return config


def base_section(**options: Any) -> BaseSection:
    """The ``[base]`` section from its keys; those that are None take their defaults.

    Raises:
        ConfigError: with one line for each wrong value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return BaseSection(**given)
    except ValidationError as error:
        lines = [
            f"base.{entry['loc'][0]} = {entry.get('input')!r}: {_lowered(entry['msg'])}" for entry in error.errors()
        ]
        raise ConfigError(lines) from None


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _read_toml(file: Path) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as_tuples(value: Any) -> Any:
    """TOML's lists as tuples and its whole numbers as they are, for strict validation."""
    if isinstance(value, dict):
        return {key: _as_tuples(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _explain(entry: Any, source: str, text: str) -> str:
    location = [str(part) for part in entry["loc"]]
    name = ".".join(location)
    line = _line_of(text, location)
    where = f"{source}:{line}" if line else source
    if entry["type"] == "extra_forbidden":
        known = _known_keys()
        siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
        near = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(name, siblings, 1, 0.0)
        return f"{where}: unknown key {name}" + (f"; did you mean {near[0]}?" if near else "")
    if entry["type"] == "missing":
        return f"{where}: {name} is missing"
    given = entry.get("input")
    return f"{where}: {name} = {given!r}: {_lowered(entry['msg'])}"


def _known_keys() -> list[str]:
    keys = []
    for section, field in Config.model_fields.items():
        keys.append(section)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += [f"{section}.{key}" for key in kind.model_fields]
    return keys


def _line_of(text: str, location: list[str]) -> int | None:
    """The line that sets ``location``, or that opens its section; None where the file has neither."""
    section, found = "", None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            section = header[1].strip()
            if section == location[0]:
                found = found or number
        assignment = re.match(r"\s*([A-Za-z0-9_.\-\"']+)\s*=", line)
        for key in re.findall(r"([A-Za-z0-9_\-]+)\s*=", line) if assignment else ():
            if [*filter(None, [section]), key] == location[:2] or [section, key] == location[:2]:
                return number
    return found
