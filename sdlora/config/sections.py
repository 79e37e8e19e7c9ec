"""What a training run is told: one frozen section for each concern, from TOML and ``section.key=value``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


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


MaskKind = Literal["none", "alpha", "files"]
"""What weights the loss within an image: nothing, its alpha channel, or a mask file."""
CaptionExtension = Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9]+$")]
Resolution = Annotated[int | tuple[int, ...] | None, BeforeValidator(_resolution)]


class SetSection(Section):
    """One folder of images among several; what it leaves out is as ``[data]`` has it."""

    images: str = Field(min_length=1)
    role: Literal["train", "regularisation", "validation"] = "train"
    """Regularisation images keep the base's own idea of a class (Ruiz et al. 2023, section 3.2: prior preservation);
    validation images are never trained on."""
    repeats: int = Field(1, ge=1)
    """How often each image is shown in an epoch; times what the name of a folder ``10_name`` within says."""
    loss_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    subfolders: bool = True
    """Whether the folders within are searched too."""
    trigger: str | None = Field(None, max_length=60)
    """Instead of ``data.trigger``; "" for none, which is the default of regularisation images."""
    class_prompt: str | None = None
    """The caption of images that have none; by default ``name`` in a folder ``10_name``, and nothing elsewhere."""
    metadata: str | None = Field(None, min_length=1)
    """A table of captions (.jsonl, .csv, or kohya's .json): only the images that it names are used. By default
    ``metadata.jsonl``, ``metadata.csv`` or ``meta_*.json`` in the folder, beside caption files."""
    masks: str | None = Field(None, min_length=1)
    """Folder of masks that have the names of their images, for ``data.mask = "files"``."""
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
    """Folder of training images. Or ``sets``, or ``dataset_config``."""
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
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the captions replaced by the empty one."""
    allow_missing_captions: bool = False
    """Whether an image without a caption is trained on the trigger alone, instead of being an error."""
    max_token_length: Literal[75, 150, 225] = 225
    """Tokens of a caption that are read, in chunks of 75."""
    resolution: Resolution = None
    """Pixels of a square image's side, or several: then each image is shown at each; by default the base's own."""
    enable_bucket: bool = True
    """Whether images get buckets of about their own shape, instead of all being cut to a square."""
    bucket_rule: Literal["least-crop", "kohya"] = "least-crop"
    """Which bucket an image gets: the one that cuts off least, or the one that kohya's trainer takes."""
    min_bucket_reso: int | None = Field(None, ge=32)
    max_bucket_reso: int | None = Field(None, ge=32)
    """Pixels of a bucket's shorter and longer side; by default half of ``resolution`` and twice as much."""
    bucket_reso_steps: int | None = Field(None, ge=8)
    """Pixels that a bucket's sides are multiples of; by default what the base needs."""
    bucket_no_upscale: bool = False
    """Whether small images get small buckets instead of being enlarged."""
    crop: Literal["center", "random", "salient"] = "center"
    """Which part of an image that does not fit its bucket is shown; ``salient`` keeps the most detail."""
    flip: bool = False
    """Whether each image is mirrored in half of the epochs."""
    mask: MaskKind = "none"
    """What weights the loss within an image: nothing, its transparency, or ``mask/NAME.png`` beside it."""
    alpha_background: Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")] = "#ffffff"
    """What transparent images are composited on."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Every resolution that images are shown at, those of the sets included; () where it is the base's own."""
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
            "images is missing: name the folder of training images, or several by [[data.sets]], "
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
    """Where encoded images and captions are kept between runs; it changes the time of a run and nothing else."""

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


class ObjectiveSection(Section):
    min_snr_gamma: float = Field(5.0, ge=0)
    """Hang et al. 2023; 0 weights every noise level alike."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Of regularisation images (Ruiz et al. 2023, eq. 2)."""


class OptimizerSection(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(3e-4, ge=0, lt=1)
    text_encoder_learning_rate: float = Field(5e-5, ge=0, lt=1)
    """0 leaves the text encoder as it is, and its embeddings are computed once."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainSection(Section):
    steps: int = Field(600, ge=1)
    batch_size: int = Field(4, ge=1)
    """Images in one step, over all processes."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; the LoRA itself is always trained in float32."""
    gradient_checkpointing: bool = False
    """Compute the UNet's inner values twice instead of keeping them: a quarter slower, and far less memory."""
    seed: int = Field(0, ge=0, lt=2**32)
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints."""


class SamplesSection(Section):
    prompts: tuple[str, ...] | None = None
    """Prompts for the sample sheet at the end; by default the first four captions, () for none."""


class OutputSection(Section):
    path: str = Field(pattern=r"\.safetensors$")
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the tensors in the file."""
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
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    samples: SamplesSection = SamplesSection()
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
