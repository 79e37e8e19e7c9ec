"""``[data]`` and ``[[data.sets]]``: the images, their captions, and how both are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from .setting import Section, Setting

MaskKind = Literal["none", "alpha", "files"]
"""What weights the loss within an image: nothing, its alpha channel, or a mask file."""


def _resolution(value: Any) -> Any:
    sides = value if isinstance(value, tuple) else (value,)
    if value is not None and not (sides and all(type(side) is int and 64 <= side <= 4096 for side in sides)):
        raise PydanticCustomError("resolution", "expected pixels from 64 to 4096, or several: 512 or [512, 768]")
    if len(set(sides)) < len(sides):
        raise PydanticCustomError("resolution", "the same resolution twice; name each once")
    return value


def _extension(value: str) -> str:
    if not re.fullmatch(r"\.?[A-Za-z0-9]+", value):
        raise PydanticCustomError("extension", "must be a file extension, for example .txt")
    return value


def _colour(value: str) -> str:
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", value):
        raise PydanticCustomError("colour", "must be a colour in hexadecimal, for example #ffffff")
    return value


def _replacements(value: Any) -> Any:
    def is_pair(entry: Any) -> bool:
        return isinstance(entry, tuple) and len(entry) == 2 and all(isinstance(text, str) for text in entry)

    if not (isinstance(value, tuple) and all(is_pair(entry) and entry[0] for entry in value)):
        raise PydanticCustomError("pairs", 'expected pairs of old and new text, such as [["grey", "gray"]]')
    return value


class ImageSettings(Section):
    """How images and captions are read and shown. ``[data]`` states it for all sets; a set may state its own."""

    caption_extension: Annotated[
        str, AfterValidator(_extension), Setting(kohya="caption_extension", values="a file extension")
    ] = ".txt"
    """Extension of the caption files, with or without the dot. Kohya's own default is ``.caption``; most datasets have
    ``.txt``."""
    caption_lines: Literal["join", "draw", "first"] = "join"
    """What several lines in a caption file are: ``join`` makes one caption of all lines, ``draw`` draws one of the
    lines in each epoch, ``first`` reads only the first line."""
    wildcards: Annotated[bool, Setting(kohya="enable_wildcard")] = False
    """Whether ``{a|b}`` in a caption draws one of its alternatives in each epoch."""
    caption_prefix: Annotated[str, Setting(kohya="caption_prefix")] = ""
    """Text that is put before every caption, with a space between."""
    caption_suffix: Annotated[str, Setting(kohya="caption_suffix")] = ""
    """Text that is put after every caption, with a space between."""
    shuffle_tags: Annotated[bool, Setting(kohya="shuffle_caption")] = False
    """Whether the comma-separated tags of a caption are shuffled in each epoch."""
    keep_tokens: Annotated[int, Field(ge=0), Setting(kohya="keep_tokens")] = 0
    """Number of tags at the start of a caption that are neither shuffled nor dropped. The trigger word never is."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1), Setting(kohya="caption_tag_dropout_rate")] = 0.0
    """Probability that a tag is left out of its caption, drawn for each tag in each epoch."""
    resolution: Annotated[
        int | tuple[int, ...] | None,
        BeforeValidator(_resolution),
        Setting(kohya="resolution", values="pixels from 64 to 4096, or a list of several"),
    ] = None
    """Side of a square image in pixels; buckets of other shapes have the same area. With several, each image is shown
    at each. By default the base's own: 512 for SD 1.5, 1024 for SDXL."""
    crop: Annotated[Literal["center", "random", "salient"], Setting(kohya="random_crop")] = "center"
    """Which part of an image that does not fit its bucket is shown: the center, a random part in each epoch, or with
    ``salient`` the part with the most detail."""
    flip: Annotated[bool, Setting(kohya="flip_aug")] = False
    """Whether each image is mirrored in half of the epochs. Do not use it where left and right matter, as in text."""

    @property
    def own_sides(self) -> tuple[int, ...]:
        """The values of ``resolution``; () where it is the base's own."""
        if self.resolution is None:
            return ()
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)


class SetSection(ImageSettings):
    """One folder of images among several. Caption and image settings that it leaves out are as ``[data]`` has them."""

    images: Annotated[str, Field(min_length=1), Setting(kohya="image_dir", affects="place")]
    """Folder of images. Which images are in it decides resuming, not where it is."""
    role: Annotated[Literal["train", "regularisation", "validation"], Setting(kohya="is_reg")] = "train"
    """``regularisation`` images preserve what the base knows about a class (prior preservation, Ruiz et al. 2023);
    ``validation`` images are never trained on, and the loss on them is reported."""
    repeats: Annotated[int, Field(ge=1), Setting(kohya="num_repeats")] = 1
    """How often each image is shown in an epoch. Multiplied by the number of a subfolder named like ``10_name``."""
    loss_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Factor on the loss of these images."""
    subfolders: bool = True
    """Whether images in subfolders are used too."""
    trigger: Annotated[str | None, Field(max_length=60)] = None
    """Trigger word of this set. By default ``data.trigger``, and none for regularisation images; "" is none."""
    class_prompt: Annotated[str | None, Setting(kohya="class_tokens")] = None
    """Caption of images without one. By default ``name`` in a subfolder named like ``10_name``, and otherwise none."""
    metadata: Annotated[str | None, Field(min_length=1), Setting(kohya="metadata_file", affects="place")] = None
    """Table of captions (.jsonl, .csv, or kohya's .json): only images in it are used. By default ``metadata.jsonl``,
    ``metadata.csv`` or ``meta_*.json`` in the folder, together with caption files."""
    masks: Annotated[str | None, Field(min_length=1), Setting(kohya="conditioning_data_dir", affects="place")] = None
    """Folder of masks with the names of their images, for ``data.mask = "files"``."""


class DataSection(ImageSettings):
    """The images and captions. Name them by ``images``, by several ``[[data.sets]]``, or by ``dataset_config``."""

    images: Annotated[str | None, Field(min_length=1), Setting(kohya="train_data_dir", affects="place")] = None
    """Folder of training images. Which images are in it decides resuming, not where it is."""
    sets: Annotated[tuple[SetSection, ...], Setting(values="tables [[data.sets]]")] = ()
    """Several folders, each a table ``[[data.sets]]``."""
    metadata: Annotated[str | None, Field(min_length=1), Setting(kohya="in_json", affects="place")] = None
    """Table of captions (.jsonl, .csv, or kohya's .json) for ``images``: only images in it are used. By default
    ``metadata.jsonl``, ``metadata.csv`` or ``meta_*.json`` in the folder, together with caption files."""
    dataset_config: Annotated[str | None, Field(min_length=1), Setting(kohya="dataset_config", affects="place")] = None
    """A dataset configuration of kohya's trainer (.toml or .json). What it leaves out is as ``[data]`` has it."""
    trigger: Annotated[str | None, Field(min_length=1, max_length=60)] = None
    """Trigger word: a prompt that contains it gets the style. Training needs one; an invented word works best."""
    trigger_as: Literal["word", "prefix", "template"] = "word"
    """How captions get the trigger word: ``word`` puts it before every caption without it; ``prefix`` before every
    caption, and removes it elsewhere; ``template`` makes every caption from ``caption_template``."""
    caption_template: str = "{trigger}, {caption}"
    """The caption for ``trigger_as = "template"``; must contain ``{trigger}`` and ``{caption}``."""
    caption_replace: Annotated[
        tuple[tuple[str, str], ...], BeforeValidator(_replacements), Setting(values="list of pairs of texts")
    ] = ()
    """Pairs of old and new text, replaced in every caption in this order before anything else."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1), Setting(kohya="caption_dropout_rate")] = 0.0
    """Probability that a caption is replaced by the empty one, drawn for each image in each epoch."""
    allow_missing_captions: bool = False
    """Whether an image without a caption is trained on the trigger word alone, instead of being an error."""
    max_token_length: Annotated[Literal[75, 150, 225], Setting(kohya="max_token_length")] = 225
    """Number of tokens that are read of a caption, in chunks of 75."""
    enable_bucket: Annotated[bool, Setting(kohya="enable_bucket")] = True
    """Whether images are trained in buckets of about their own aspect ratio, instead of all being cut to a square."""
    bucket_rule: Literal["least-crop", "kohya"] = "least-crop"
    """How the bucket of an image is chosen: the one that cuts off least, or the one that kohya's trainer chooses."""
    min_bucket_reso: Annotated[int | None, Field(ge=32), Setting(kohya="min_bucket_reso")] = None
    """Shortest side of a bucket in pixels. By default half of ``resolution``."""
    max_bucket_reso: Annotated[int | None, Field(ge=32), Setting(kohya="max_bucket_reso")] = None
    """Longest side of a bucket in pixels. By default twice ``resolution``."""
    bucket_reso_steps: Annotated[int | None, Field(ge=8), Setting(kohya="bucket_reso_steps")] = None
    """The sides of buckets are multiples of this many pixels. By default the least that the base allows."""
    bucket_no_upscale: Annotated[bool, Setting(kohya="bucket_no_upscale")] = False
    """Whether small images get small buckets, instead of being enlarged."""
    mask: Annotated[MaskKind, Setting(kohya="alpha_mask")] = "none"
    """What weights the loss within an image: nothing; its transparency; or ``files``, the images ``mask/NAME.png`` in
    its folder or those in the ``masks`` folder of its set."""
    alpha_background: Annotated[
        str, AfterValidator(_colour), Setting(values="a colour in hexadecimal, such as #ffffff")
    ] = "#ffffff"
    """Background colour of transparent images."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Every resolution that images are shown at, also those of the sets; () where it is the base's own."""
        every = [self.complete(section) for section in self.sets] or [self]
        return tuple(dict.fromkeys(side for section in every for side in section.own_sides))

    def complete(self, section: SetSection) -> SetSection:
        """``section`` with this section's value for every image setting that it does not state."""
        unstated = ImageSettings.model_fields.keys() - section.model_fields_set
        return section.model_copy(update={key: getattr(self, key) for key in unstated})

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
    if data.sets and not any(section.role == "train" for section in data.sets):
        yield 'sets has no set to train on; give one of them role = "train"'


def _setting_problems(data: DataSection) -> Iterator[str]:
    """Sentences that begin with the key at fault."""
    for trigger in dict.fromkeys((data.trigger or "", *(section.trigger or "" for section in data.sets))):
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
    # Without this, nothing says at which resolution the remaining sets are shown.
    if data.sides and not all(data.complete(section).own_sides for section in data.sets):
        yield "resolution is missing: some sets have one of their own, and the others need this"
    for section in data.sets:
        if section.masks and data.mask != "files":
            yield f'mask = {data.mask!r} leaves the masks in {section.masks} unused; set data.mask = "files"'
