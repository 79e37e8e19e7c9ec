"""The configuration of a training run: one frozen section for each concern, from TOML and ``section.key=value``."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..families import Family
from .choices import Precision
from .data_section import DataSection, ImageSettings, MaskKind, SetSection
from .objective_section import ObjectiveSection
from .setting import Affects, Section, Setting, setting_of

__all__ = [
    "BaseSection",
    "CacheSection",
    "Config",
    "DataSection",
    "DatasetConfig",
    "LoraSection",
    "MaskKind",
    "ObjectiveSection",
    "OptimizerSection",
    "OutputSection",
    "SamplesSection",
    "Section",
    "SetSection",
    "TrainSection",
]


class BaseSection(Section):
    """The base checkpoint that is trained on or generated with."""

    path: Annotated[
        str,
        Field(min_length=1),
        Setting(kohya="pretrained_model_name_or_path", affects="place", values="mini, or a path"),
    ] = "mini"
    """``mini`` (embedded, for trying things out), a checkpoint file (.safetensors, .ckpt), or the folder of a diffusers
    checkpoint. What the checkpoint contains decides resuming, not where it is."""
    vae: Annotated[str | None, Field(min_length=1), Setting(kohya="vae", affects="place")] = None
    """A VAE that replaces the checkpoint's own, or that it lacks: a file or a folder."""
    text_encoder: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """A text encoder that replaces the checkpoint's own, or that it lacks: a file or a folder. SDXL's first."""
    text_encoder_2: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """The same for the second text encoder of SDXL."""
    prediction: Annotated[Literal["auto", "epsilon", "v_prediction"], Setting(kohya="v_parameterization")] = "auto"
    """What the UNet predicts. ``auto`` is what the checkpoint says, by its metadata, marker keys or weights."""
    zero_terminal_snr: Annotated[bool | None, Setting(kohya="zero_terminal_snr")] = None
    """Whether the last timestep is pure noise (Lin et al. 2024). By default what the checkpoint says."""
    clip_skip: Annotated[int | None, Field(ge=1, le=24), Setting(kohya="clip_skip")] = None
    """Layer of the text encoder that is read, counted from the end: 1 is the last. By default 1, and 2 for SDXL."""
    attention: Annotated[Literal["auto", "sdpa", "xformers"], Setting(kohya="xformers", affects="nothing")] = "auto"
    """Implementation of attention. ``auto`` is torch's own (sdpa); where xformers cannot run, a warning says why and
    sdpa is used."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the weights of the frozen UNet's transformer blocks are kept in memory: in 8 bits (Dettmers et al. 2022) or 4
    bits (QLoRA, Dettmers et al. 2023). That saves 2.2 or 3.2 GB of SDXL's 5.1, and 0.2 or 0.4 GB of SD 1.5's 1.7, and
    makes steps slower. The LoRA is trained in float32 beside them; sample images are generated on the quantised UNet."""


class CacheSection(Section):
    """Where encoded images and captions are kept between runs. It changes the time of a run and nothing else."""

    disk: Annotated[bool, Setting(kohya="cache_latents_to_disk", affects="nothing")] = True
    """Whether encoded images and captions are kept on disk. Within a run they are encoded once in any case."""
    folder: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """Folder of the cache; runs share it. By default ``sdlora/encoded`` in the user's cache folder."""
    max_gigabytes: Annotated[float, Field(gt=0), Setting(affects="nothing")] = 20.0
    """Largest size of the cache in gigabytes. What was not used for longest is removed first."""


class LoraSection(Section):
    """The LoRA: its size, and the modules it changes."""

    rank: Annotated[int, Field(ge=1, le=1024), Setting(kohya="network_dim")] = 16
    """Rank of the change of each module. A higher rank can learn more, and makes a larger file."""
    alpha: Annotated[float, Field(gt=0), Setting(kohya="network_alpha")] = 8.0
    """The change of each module is scaled by alpha / rank. Keep the ratio when you change the rank, or adapt the
    learning rate."""
    targets: Literal["attention", "attention-mlp"] = "attention"
    """Modules that are changed: the attention projections q, k, v and out; or these and the feed-forward layers."""


Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
"""How learning rates develop, by the names of diffusers and of kohya's trainer."""


def _steps_or_share(value: Any, least: int = 0) -> Any:
    if not (type(value) is int and value >= least) and not (type(value) is float and 0 < value < 1):
        raise PydanticCustomError(
            "steps_or_share",
            "must be a whole number of steps, for example 20, or a share of them below 1, such as 0.05",
        )
    return value


def _end(value: Any) -> Any:
    return None if value is None else _steps_or_share(value, least=1)


def _betas(value: Any) -> Any:
    numbers = value if isinstance(value, tuple) else ()
    if len(numbers) != 2 or not all(type(each) is float and 0 < each < 1 for each in numbers):
        raise PydanticCustomError("betas", "must be two numbers between 0 and 1, for example [0.9, 0.999]")
    return value


class OptimizerSection(Section):
    """The optimizer, the learning rates and their schedule."""

    name: Annotated[Literal["adamw"], Setting(kohya="optimizer_type")] = "adamw"
    """The optimizer."""
    learning_rate: Annotated[float, Field(ge=0, lt=1), Setting(kohya="learning_rate")] = 3e-4
    """Peak learning rate of the UNet's modules."""
    text_encoder_learning_rate: Annotated[float | None, Field(ge=0, lt=1), Setting(kohya="text_encoder_lr")] = None
    """Peak learning rate of the text encoder's modules. 0 does not train the text encoder; captions are then encoded
    once, which is faster. By default 5e-5, and 0 for SDXL."""
    text_encoder_stop: Annotated[
        int | float | None,
        BeforeValidator(_end),
        Setting(
            kohya="stop_text_encoder_training",
            values="whole number, at least 1; or a share, more than 0, less than 1",
        ),
    ] = None
    """Steps after which the text encoder's modules stay as they are, as a number or as a share of all steps, rounded down.
    By default they are trained to the end. It does not make the steps after it faster."""
    schedule: Annotated[Schedule, Setting(kohya="lr_scheduler")] = "cosine"
    """How the learning rates develop after warmup: they stay, or fall to 0 at the end along a line, a cosine, several
    cosines or a power of what is left."""
    schedule_cycles: Annotated[int, Field(ge=1), Setting(kohya="lr_scheduler_num_cycles")] = 1
    """Number of cosines of ``cosine_with_restarts``; each starts at the peak. 1 is ``cosine``."""
    schedule_power: Annotated[float, Field(gt=0), Setting(kohya="lr_scheduler_power")] = 1.0
    """Exponent of ``polynomial``: above 1 the learning rates fall fast at first and slowly at the end; 1 is a line."""
    warmup_steps: Annotated[
        int | float,
        BeforeValidator(_steps_or_share),
        Setting(kohya="lr_warmup_steps", values="whole number, at least 0; or a share, more than 0, less than 1"),
    ] = 20
    """Steps in which the learning rates rise from 0 to their peak. A number below 1 is a share of all steps, rounded down:
    0.05 of 300 steps are 15."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW. In kohya's trainer it is one of the ``optimizer_args``, as are the next two."""
    betas: Annotated[
        tuple[float, float], BeforeValidator(_betas), Setting(values="two numbers, more than 0, less than 1")
    ] = (0.9, 0.99)
    """Decay rates of AdamW's means of the gradients and of their squares. torch's default is [0.9, 0.999]."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """What AdamW adds to the root of the mean square; ``eps`` in torch."""
    max_grad_norm: Annotated[float, Field(gt=0), Setting(kohya="max_grad_norm")] = 1.0
    """Gradients are scaled down to this norm, over all modules together."""

    def text_encoder_rate(self, family: Family) -> float:
        """``text_encoder_learning_rate``, or the default for ``family``."""
        stated = self.text_encoder_learning_rate
        return family.text_encoder_learning_rate if stated is None else stated


class TrainSection(Section):
    """Length, batch size, precision and checkpoints of a run."""

    steps: Annotated[int, Field(ge=1), Setting(kohya="max_train_steps")] = 600
    """Optimizer steps in all."""
    epochs: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Setting(kohya="max_train_epochs")] = None
    """Length of the run in epochs instead of ``train.steps``, rounded to whole steps. An epoch shows each image as often as
    its repeats say. A run with the same number of steps is the same run."""
    batch_size: Annotated[int, Field(ge=1), Setting(kohya="train_batch_size")] = 4
    """Images in one step, over all processes together."""
    precision: Annotated[Precision, Setting(kohya="mixed_precision")] = "auto"
    """Precision of the frozen base. ``auto`` is bfloat16 on a GPU that multiplies it in hardware, float16 on other NVIDIA
    GPUs and on Apple's, and on a CPU float32, or bfloat16 where the CPU multiplies it in hardware and the base is large
    enough to gain from it. With float16 the loss is scaled so that small gradients are kept. The LoRA itself is always
    trained in float32."""
    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        Setting(kohya="gradient_checkpointing", affects="nothing", values='"auto", true or false'),
    ] = "auto"
    """Whether activations of the UNet are computed a second time for the gradients instead of kept: about a quarter
    slower, with far less memory. ``auto`` does so on a GPU on which a step would not fit otherwise."""
    micro_batch: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)],
        Setting(affects="nothing", values='"auto", or a whole number, at least 1'),
    ] = "auto"
    """Images of a batch that are computed at once; their gradients are added up in float32, so the result is that of the
    whole batch, up to rounding. ``auto`` is the whole batch, or as many images as fit on the GPU. Unlike kohya's gradient
    accumulation, this does not change the size of a batch."""
    fit: Annotated[bool, Setting(affects="nothing")] = False
    """What to do where the device runs out of memory: stop and say what to change, or, with true, halve the micro-batch,
    then turn gradient checkpointing on, and go on with the same batches."""
    deterministic: Annotated[bool, Setting(affects="nothing")] = False
    """Whether a GPU uses deterministic algorithms alone, so that repeating or resuming a run gives the same bits on the
    same model of GPU. That is slower, and not possible with xformers. On a CPU results are the same in any case."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Setting(kohya="seed")] = 0
    """Seed of everything that is drawn: order, captions, crops, flips, noise and timesteps."""
    save_every: Annotated[int, Field(ge=1), Setting(affects="nothing")] = 100
    """Steps between checkpoints to resume from. They are removed when the run is complete."""

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainSection:
        if self.epochs is not None and "steps" in self.model_fields_set:
            problem = f"epochs = {self.epochs:g}: train.steps = {self.steps} is given too; give one of them"
            raise PydanticCustomError("settings", "{problems}", {"problems": problem})
        return self


class SamplesSection(Section):
    """The sample images at the end of a run."""

    prompts: Annotated[tuple[str, ...] | None, Setting(kohya="sample_prompts", affects="samples")] = None
    """Prompts of the sample sheet. By default the first four captions; [] draws none."""


MISSING_TRIGGER = "data.trigger is missing; name the trigger word: --trigger WORD"
NOT_DETERMINISTIC = (
    'train.deterministic = true is not possible with base.attention = "xformers"; set base.attention to "sdpa", or '
    "train.deterministic to false"
)


def _lora_file(value: str) -> str:
    if not value.endswith(".safetensors"):
        raise PydanticCustomError("lora_file", "must end in .safetensors")
    return value


class OutputSection(Section):
    """The LoRA file, and what it says about itself."""

    path: Annotated[
        str,
        AfterValidator(_lora_file),
        Setting(kohya="output_name", affects="place", values="a path that ends in .safetensors"),
    ]
    """The LoRA file to write. Checkpoints and samples are written beside it."""
    precision: Annotated[Literal["float16", "bfloat16", "float32"], Setting(kohya="save_precision")] = "float16"
    """Precision of the tensors in the file."""
    save_every: Annotated[int, Field(ge=0), Setting(kohya="save_every_n_steps", affects="nothing")] = 0
    """Steps between LoRA files on the way, ``NAME-000500.safetensors`` beside the output; 0 writes none. Each can be used
    as it is. Checkpoints to resume from are ``train.save_every``."""
    keep: Annotated[int | None, Field(ge=1), Setting(affects="nothing")] = None
    """Number of LoRA files on the way that are kept, the newest. By default all."""
    log: Annotated[bool, Setting(kohya="logging_dir", affects="nothing")] = False
    """Whether the loss and the learning rates of each step are written beside the output, as ``NAME.log.csv``, with a
    curve of the loss, ``NAME.log.svg``."""
    metadata: Annotated[Literal["none", "minimal", "full"], Setting(kohya="no_metadata", affects="text")] = "full"
    """What the file says about its training: ``full`` is everything; ``minimal`` is what loaders need, the trigger word
    and the texts below; ``none`` is nothing."""
    title: Annotated[str | None, Setting(kohya="metadata_title", affects="text")] = None
    """Title of the LoRA. By default the name of the file."""
    author: Annotated[str | None, Setting(kohya="metadata_author", affects="text")] = None
    """Author of the LoRA."""
    license: Annotated[str | None, Setting(kohya="metadata_license", affects="text")] = None
    """License of the LoRA."""
    description: Annotated[str | None, Setting(kohya="metadata_description", affects="text")] = None
    """Description of the LoRA."""
    tags: Annotated[tuple[str, ...], Setting(kohya="metadata_tags", affects="text")] = ()
    """Tags of the LoRA, for people who search."""
    usage_hint: Annotated[str | None, Setting(kohya="metadata_usage_hint", affects="text")] = None
    """How the LoRA is used. By default it says to put the trigger word into the prompt."""
    comment: Annotated[str | None, Setting(kohya="training_comment", affects="text")] = None
    """A note, stored as ``ss_training_comment``, where kohya's tools look for it."""
    thumbnail: Annotated[bool, Setting(kohya="metadata_thumbnail", affects="text")] = True
    """Whether the first sample is stored in the file, 256 pixels wide. Only with ``metadata = "full"``."""


class DatasetConfig(Section):
    """A configuration of which only the dataset and the base are used: it needs neither a trigger word nor an output."""

    base: BaseSection = BaseSection()
    data: DataSection
    cache: CacheSection = CacheSection()
    lora: LoraSection = LoraSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    samples: SamplesSection = SamplesSection()
    output: OutputSection | None = None


class Config(DatasetConfig):
    """A training run. Sections left out take their defaults; ``data`` and ``output`` are needed."""

    output: OutputSection

    @property
    def trigger(self) -> str:
        """The trigger word, which every run has."""
        assert self.data.trigger is not None
        return self.data.trigger

    @model_validator(mode="after")
    def _has_a_trigger(self) -> Config:
        if self.data.trigger is None:
            raise PydanticCustomError("settings", "{problems}", {"problems": MISSING_TRIGGER})
        return self

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Config:
        if self.train.deterministic and self.base.attention == "xformers":
            raise PydanticCustomError("settings", "{problems}", {"problems": NOT_DETERMINISTIC})
        return self

    def flat(self, affecting: Collection[Affects] = get_args(Affects)) -> dict[str, str]:
        """``section.key`` -> value as JSON, sorted, of the settings that affect one of ``affecting``.

        A set is written without what it does not state and without what is the same in ``[data]``.
        """
        settings = {}
        for name in sorted(type(self).model_fields):
            section = getattr(self, name)
            values = _values(section, affecting)
            if "sets" in values:
                values["sets"] = [_stated(each, section, affecting) for each in section.sets]
            settings |= {f"{name}.{key}": json.dumps(values[key]) for key in sorted(values)}
        return settings


def _values(section: Section, affecting: Collection[Affects]) -> dict[str, object]:
    """Key -> value as JSON has it, of the settings of ``section`` that affect one of ``affecting``."""
    keys = {key for key, field in type(section).model_fields.items() if setting_of(field).affects in affecting}
    return section.model_dump(mode="json", include=keys)


def _stated(section: SetSection, data: DataSection, affecting: Collection[Affects]) -> dict[str, object]:
    """What ``section`` adds to ``data``: neither None nor an image setting of the same value."""
    shared = _values(data, affecting)
    return {
        key: value
        for key, value in _values(data.complete(section), affecting).items()
        if value is not None and not (key in ImageSettings.model_fields and shared[key] == value)
    }
