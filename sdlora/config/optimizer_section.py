"""The configuration of the optimizer, the learning rates and their schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ..families import Family
from .optimizer_rules import (
    AdamWSettings,
    Arguments,
    adamw_settings,
    are_betas,
    as_arguments,
    canonical_name,
    finds_its_rate,
    own_defaults,
    problems_of,
)
from .setting import Section, Setting

Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
"""How learning rates develop, by the names of diffusers and of kohya's trainer."""


def _steps_or_share(value: Any, least: int = 0) -> Any:
    if not (type(value) is int and value >= least) and not (type(value) is float and 0 < value < 1):
        raise PydanticCustomError(
            "steps_or_share",
            "must be a whole number of steps, for example 20, or a share of them below 1, such as 0.05",
        )
    return value


def _rates(value: Any) -> Any:
    rates = value if isinstance(value, tuple) else (value,)
    if value is not None and not (rates and all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates)):
        raise PydanticCustomError(
            "rates",
            "must be a number from 0 to 1, or one for each text encoder, such as [5e-5, 1e-5]",
        )
    return value


def _end(value: Any) -> Any:
    return None if value is None else _steps_or_share(value, least=1)


def _betas(value: Any) -> Any:
    if not are_betas(value):
        raise PydanticCustomError("betas", "must be two numbers between 0 and 1, for example [0.9, 0.999]")
    return value


class OptimizerSection(Section):
    """The optimizer, the learning rates and their schedule."""

    name: Annotated[
        str,
        BeforeValidator(canonical_name),
        Setting(
            kohya="optimizer_type",
            values='"adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule-free", or one of pytorch-optimizer',
        ),
    ] = "adamw"
    """The optimizer. ``adamw8bit`` needs the extra ``quant``; all others except ``adamw`` need the extra ``optimizers``,
    which brings every optimizer of the package pytorch-optimizer by its name there. Names of kohya's trainer work too."""
    arguments: Annotated[
        Arguments, PlainValidator(as_arguments), Setting(kohya="optimizer_args", values="table of arguments and values")
    ] = Arguments()
    """Further arguments of the optimizer, by the names in its package, such as ``{ d_coef = 2.0 }`` for ``prodigy``."""
    learning_rate: Annotated[float, Field(ge=0, le=1), Setting(kohya="learning_rate")] = 3e-4
    """Peak learning rate of the UNet's modules. ``prodigy`` finds the rate itself: this is then a factor, by default 1."""
    text_encoder_learning_rate: Annotated[
        float | tuple[float, ...] | None,
        BeforeValidator(_rates),
        Setting(kohya="text_encoder_lr", values="number, at least 0, at most 1; or a list, one for each text encoder"),
    ] = None
    """Peak learning rate of the text encoder's modules. 0 does not train the text encoder; captions are then encoded
    once, which is faster. With SDXL ``[5e-5, 1e-5]`` are those of the first and the second text encoder. By default 5e-5,
    and 0 for SDXL; for ``prodigy`` 1 instead of 5e-5."""
    lora_plus_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False), Setting(kohya="loraplus_lr_ratio")] = 1.0
    """The learning rate of the ``up`` matrices over that of the ``down`` matrices (LoRA+, Hayou et al. 2024, who
    recommend 16 with a lower ``learning_rate``)."""
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
    cosines or a power of what is left. For ``schedule-free`` always constant."""
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
    """Weight decay of ``adamw`` and ``adamw8bit``; for others it is one of ``arguments``, as are the next two."""
    betas: Annotated[
        tuple[float, float], BeforeValidator(_betas), Setting(values="two numbers, more than 0, less than 1")
    ] = (0.9, 0.99)
    """Decay rates of AdamW's means of the gradients and of their squares. torch's default is [0.9, 0.999]."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """What AdamW adds to the root of the mean square; ``eps`` in torch."""
    max_grad_norm: Annotated[float, Field(ge=0), Setting(kohya="max_grad_norm")] = 1.0
    """Gradients are scaled down to this norm, over all modules together; 0 leaves them as they are."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay rate of an average of the weights over the steps, such as 0.999, which is then saved, sampled and validated in
    place of the last weights. At step n it is at most (1 + n) / (10 + n), so that the first weights are soon forgotten. 0
    keeps no average."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_optimizer(cls, stated: Any) -> Any:
        return {**own_defaults(stated), **stated} if isinstance(stated, dict) else stated

    @model_validator(mode="after")
    def _fits_together(self) -> OptimizerSection:
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        if problems := problems_of(dict(self), defaults):
            raise PydanticCustomError("settings", "{problems}", {"problems": "\n".join(problems)})
        return self

    @property
    def adamw(self) -> AdamWSettings:
        """What AdamW computes with: ``arguments`` where they state it, else the settings."""
        return adamw_settings(self.arguments, self.weight_decay, self.betas, self.epsilon)

    def text_encoder_rate(self, family: Family) -> float:
        """The highest of ``text_encoder_rates``; 0 where no text encoder is trained."""
        return max(self.text_encoder_rates(family))

    def text_encoder_rates(self, family: Family) -> tuple[float, ...]:
        """``text_encoder_learning_rate``, or the default for ``family``: one for each of its text encoders."""
        rate = self.text_encoder_learning_rate
        if rate is None:
            rate = family.text_encoder_learning_rate
            rate = 1.0 if rate and finds_its_rate(self.name) else rate
        return rate if isinstance(rate, tuple) else (rate,) * len(family.text_encoders)
