"""What a training run is told: one frozen section for each concern, from TOML and ``section.key=value``."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

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


def _resolution(value: Any) -> Any:
    sides = value if isinstance(value, tuple) else (value,)
    if value is not None and not (sides and all(type(side) is int and 64 <= side <= 4096 for side in sides)):
        raise PydanticCustomError("resolution", "expected pixels from 64 to 4096, or several: 512 or [512, 768]")
    if len(set(sides)) < len(sides):
        raise PydanticCustomError("resolution", "the same resolution twice; name each once")
    return value


CaptionExtension = Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9]+$")]
Resolution = Annotated[int | tuple[int, ...] | None, BeforeValidator(_resolution)]


class SetSection(Section):
    """One folder of pictures among several; what it leaves out is as ``[data]`` has it."""

    images: str = Field(min_length=1)
    role: Literal["train", "regularisation", "validation"] = "train"
    """Regularisation pictures keep the base's own idea of a class (Ruiz et al. 2023, section 3.2: prior preservation);
    validation pictures are never trained on."""
    repeats: int = Field(1, ge=1)
    """How often each picture is shown in an epoch; times what the name of a folder ``10_name`` within says."""
    loss_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    subfolders: bool = True
    """Whether the folders within are searched too."""
    trigger: str | None = Field(None, max_length=60)
    """Instead of ``data.trigger``; "" for none, which is the default of regularisation pictures."""
    class_prompt: str | None = None
    """The caption of pictures that have none; by default ``name`` in a folder ``10_name``, and nothing elsewhere."""
    metadata: str | None = Field(None, min_length=1)
    """A table of captions (.jsonl, .csv, or kohya's .json): only the pictures that it names are used. By default
    ``metadata.jsonl``, ``metadata.csv`` or ``meta_*.json`` in the folder, beside caption files."""
    masks: str | None = Field(None, min_length=1)
    """Folder of masks that have the names of their pictures, for ``data.mask = "files"``."""
    caption_extension: CaptionExtension | None = None
    caption_lines: Literal["join", "draw", "first"] | None = None
    wildcards: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    shuffle_tags: bool | None = None
    keep_tokens: int | None = Field(None, ge=0)
    tag_dropout: float | None = Field(None, ge=0, lt=1)
    resolution: Resolution = None
    crop: Literal["center", "random", "salient"] | None = None
    flip: bool | None = None


def _replacements(value: Any) -> Any:
    def is_pair(entry: Any) -> bool:
        return isinstance(entry, tuple) and len(entry) == 2 and all(isinstance(text, str) for text in entry)

    if not (isinstance(value, tuple) and all(is_pair(entry) and entry[0] for entry in value)):
        raise PydanticCustomError("pairs", 'expected pairs of old and new text, such as [["grey", "gray"]]')
    return value


class DataSection(Section):
    images: str | None = Field(None, min_length=1)
    """Folder of training pictures. Or ``sets``, or ``dataset_config``."""
    sets: tuple[SetSection, ...] = ()
    """Several folders, each a table ``[[data.sets]]``."""
    metadata: str | None = Field(None, min_length=1)
    """Of ``images``: as in a set."""
    dataset_config: str | None = Field(None, min_length=1)
    """A dataset configuration of kohya's trainer (.toml), read as it is; what it leaves out is as here."""
    trigger: str = Field(min_length=1, max_length=60)
    """The word that calls the style."""
    trigger_as: Literal["word", "prefix", "template"] = "word"
    """``word`` puts it in front of every caption that lacks it, ``prefix`` in front of every caption (taking it out where
    it stood), ``template`` makes every caption from ``caption_template``."""
    caption_template: str = "{trigger}, {caption}"
    caption_extension: CaptionExtension = ".txt"
    caption_lines: Literal["join", "draw", "first"] = "join"
    """Whether the lines of a caption file are one caption, or captions of which each epoch draws one; ``first`` reads
    the first line alone."""
    wildcards: bool = False
    """Whether ``{a|b}`` in a caption draws one of its alternatives in each epoch."""
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_replace: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_replacements)] = ()
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
    resolution: Resolution = None
    """Pixels of a square picture's side, or several: then each picture is shown at each; by default the base's own."""
    enable_bucket: bool = True
    """Whether pictures get buckets of about their own shape, instead of all being cut to a square."""
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

    @property
    def sides(self) -> tuple[int, ...]:
        """Every resolution that pictures are shown at, those of the sets included; () where it is the base's own."""
        return tuple(dict.fromkeys(side for one in self.sets or (None,) for side in self.sides_of(one)))

    def sides_of(self, one: SetSection | None) -> tuple[int, ...]:
        """The resolutions of a set; () where it is the base's own."""
        own = self.resolution if one is None or one.resolution is None else one.resolution
        return own if isinstance(own, tuple) else () if own is None else (own,)

    @model_validator(mode="after")
    def _fit_together(self) -> DataSection:
        if problems := [*_source_problems(self), *_setting_problems(self)]:
            raise PydanticCustomError("settings", "{problems}", {"problems": "\n".join(problems)})
        return self


def _source_problems(data: DataSection) -> Iterator[str]:
    """Sentences that begin with the key at fault."""
    given = [key for key in ("images", "sets", "dataset_config") if getattr(data, key)]
    if not given:
        yield (
            "images is missing: name the folder of training pictures, or several by [[data.sets]], "
            "or a kohya dataset configuration by data.dataset_config"
        )
    if len(given) > 1:
        yield f"{given[-1]} and data.{given[0]} are both set; keep one of them"
    if data.metadata and not data.images:
        yield "metadata belongs to data.images; give each set, or kohya subset, its own"
    if data.sets and not any(one.role == "train" for one in data.sets):
        yield 'sets has no set to train on; give one of them role = "train"'


def _setting_problems(data: DataSection) -> Iterator[str]:
    for trigger in dict.fromkeys((data.trigger, *(one.trigger or "" for one in data.sets))):
        if trigger != " ".join(trigger.split()):
            yield f"trigger = {trigger!r} has white space that no caption keeps; write {' '.join(trigger.split())!r}"
    for placeholder in ("{trigger}", "{caption}"):
        if placeholder not in data.caption_template:
            yield f"caption_template = {data.caption_template!r} lacks {placeholder}"
    low, high = data.min_bucket_reso, data.max_bucket_reso
    sides = data.sides or (low or high or 0,)
    if low is not None and high is not None and low > high:
        yield f"min_bucket_reso = {low} is more than data.max_bucket_reso = {high}"
    elif low is not None and low > min(sides):
        yield f"min_bucket_reso = {low} is more than data.resolution = {min(sides)}"
    elif high is not None and high < max(sides):
        yield f"max_bucket_reso = {high} is less than data.resolution = {max(sides)}"
    # With some sets at the base's own resolution, nothing here would say which.
    if data.sides and not all(map(data.sides_of, data.sets)):
        yield "resolution is missing: some sets have one of their own, and the others need this"
    for one in data.sets:
        if one.masks and data.mask != "files":
            yield f'mask = {data.mask!r} leaves the masks in {one.masks} unused; set data.mask = "files"'


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
    metadata: Literal["none", "minimal", "full"] = "full"
    """What the file says of its making: all; or what loaders need, the trigger and the five fields below; or nothing."""
    title: str | None = None
    """By default the file's name."""
    author: str | None = None
    license: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    usage_hint: str | None = None
    """By default that the trigger word goes into the prompt."""
    comment: str | None = None
    """``ss_training_comment``, where kohya's tools look for notes."""
    thumbnail: bool = True
    """Whether the first sample goes into the file, 256 pixels wide, under the level ``full``."""


class Config(Section):
    """A training run. Sections left out take their defaults; ``data`` and ``output`` are needed."""

    base: BaseSection = BaseSection()
    data: DataSection
    cache: CacheSection = CacheSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    output: OutputSection

    def flat(self, *, paths: bool = True) -> dict[str, str]:
        """``section.key`` -> value as JSON, sorted; without ``paths``, less what names a place on this machine."""
        sections = self.model_dump(mode="json")
        hidden = () if paths else SET_PATHS
        sections["data"]["sets"] = [
            {key: value for key, value in one.items() if value is not None and key not in hidden}
            for one in sections["data"]["sets"]
        ]
        for section, key in () if paths else PATHS:
            del sections[section][key]
        return {f"{s}.{k}": json.dumps(v) for s in sorted(sections) for k, v in sorted(sections[s].items())}


PATHS = (
    *(("base", key) for key in ("path", "vae", "text_encoder", "text_encoder_2")),
    *(("data", key) for key in ("images", "dataset_config", "metadata")),
    ("cache", "folder"),
    ("output", "path"),
)
"""(section, key) of what names a file or folder."""
SET_PATHS = ("images", "metadata", "masks")


def default_settings() -> dict[str, str]:
    """``section.key`` -> its default as JSON, of every key that has one."""
    found: dict[str, str] = {}
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys = {key: own for key, own in kind.model_fields.items() if not own.is_required()}
            found |= {f"{section}.{key}": json.dumps(own.default) for key, own in keys.items()}
    return found


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read ``file`` and apply ``section.key=value`` overrides.

    Values of overrides are TOML where they parse as TOML and text otherwise, so quotes are not needed.

    Raises:
        ConfigError: with one line for each unknown key (and the nearest known one), wrong value or missing key.
    """
    tables, text = {}, ""
    if file is not None:
        tables, text = read_toml(Path(file))
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
        for entry in error.errors():
            problems += _explain(entry, str(file or "configuration"), text)
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


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """The tables of ``file``, and its text.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, or not TOML.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _as_tuples(value: Any) -> Any:
    """TOML's lists as tuples and its whole numbers as they are, for strict validation."""
    if isinstance(value, dict):
        return {key: _as_tuples(entry) for key, entry in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _explain(entry: Any, source: str, text: str) -> Iterator[str]:
    location = list(entry["loc"])
    name = ".".join(part for part in location if isinstance(part, str))
    where = place(source, text, location)
    if entry["type"] == "settings":
        for problem in entry["ctx"]["problems"].split("\n"):
            key = re.match(r"\w+", problem)
            assert key is not None
            yield f"{place(source, text, [*location, key[0]])}: {name}.{problem}"
    elif entry["type"] == "extra_forbidden":
        yield f"{where}: unknown key {name}{nearest(name, _known_keys(Config))}"
    elif entry["type"] == "missing":
        yield f"{where}: {name} is missing"
    else:
        yield f"{where}: {name} = {entry.get('input')!r}: {_lowered(entry['msg'])}"


def nearest(name: str, known: Sequence[str]) -> str:
    """A question for the one of ``known`` that ``name`` might have meant; "" where ``known`` has nothing beside it."""
    siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    near = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(name, siblings, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for key, field in section.model_fields.items():
        keys.append(prefix + key)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += _known_keys(kind, f"{prefix}{key}.")
    return keys


def place(source: str, text: str, location: Sequence[str | int]) -> str:
    """``source`` and the line of TOML ``text`` that sets ``location``, or that comes nearest to it.

    A number in ``location`` counts the tables of one name ``[[...]]``, from 0.
    """
    line, nearest_yet = 0, 0
    table: list[str | int] = []
    tables: dict[tuple[str | int, ...], int] = {}
    for number, content in enumerate(text.splitlines(), 1):
        path: list[str | int] = []
        if header := re.match(r"\s*(\[\[?)([^\[\]]+)\]", content):
            parts = _key_parts(header[2])
            for i, part in enumerate(parts, 1):
                path.append(part)
                if i == len(parts) and header[1] == "[[":
                    tables[tuple(path)] = tables.get(tuple(path), -1) + 1
                if tuple(path) in tables:
                    path.append(tables[tuple(path)])
            table = path
        elif assignment := re.match(r"([^=#]+?)\s*=", content):
            path = [*table, *_key_parts(assignment[1])]
        shared = next((i for i, pair in enumerate(zip(path, location, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(path), len(location)) if shared is None else shared
        if shared > nearest_yet:
            line, nearest_yet = number, shared
    return f"{source}:{line}" if line else source


def _key_parts(key: str) -> list[str]:
    return [part.strip(" \t\"'") for part in key.split(".")]
