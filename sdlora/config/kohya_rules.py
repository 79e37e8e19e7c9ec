"""What each option of kohya's trainer is here, where it is more than another name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from .toml_file import parse_value

Settings = dict[str, Any]
"""``section.key`` -> value as TOML has it."""
UNET_TARGETS = ("unet.*.attentions",)
"""All linear layers and convolutions of a UNet's Transformer2DModel, which kohya's trainer always trains."""
CONVOLUTION_TARGETS = ("unet.*.resnets", "unet.*.downsamplers", "unet.*.upsamplers")
"""What it trains too where conv_dim is stated."""
TEXT_TARGETS = ("text_encoder*.self_attn", "text_encoder*.mlp")
DTYPES = {"no": "float32", "float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class RefusedError(ValueError):
    """A value that cannot be followed; the text says why, or what to do."""


def number(value: Any) -> int | float:
    """``value`` as a number, also where it is written as text."""
    parsed = parse_value(value) if isinstance(value, str) else value
    if isinstance(parsed, bool) or not isinstance(parsed, int | float):
        raise RefusedError("expected a number")
    return parsed


def dtype(value: Any) -> str:
    """The name of a precision here."""
    if value not in DTYPES:
        raise RefusedError(f"expected one of {', '.join(DTYPES)}")
    return DTYPES[value]


def _side(value: Any) -> Settings:
    sides = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    numbers = [int(number(side)) for side in sides]
    if len(numbers) == 2 and numbers[0] != numbers[1]:
        raise RefusedError("is not square; give the side of a square, whose area the buckets get")
    return {"data.resolution": numbers[0]}


def _epochs(value: Any) -> Settings:
    return {"train.epochs": float(number(value))}


def _schedule(value: Any) -> Settings:
    if value == "constant_with_warmup":
        return {"optimizer.schedule": "constant"}
    if value not in ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"):
        raise RefusedError(
            "expected constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial"
        )
    return {"optimizer.schedule": value}


def _module(value: Any) -> Settings:
    if value not in ("networks.lora", "Standard", "Kohya LoCon"):
        raise RefusedError("only networks.lora is translated; for other kinds state lora.kind and lora.targets")
    return {}


def _rates(value: Any) -> Settings:
    words = value if isinstance(value, list) else [value]
    rates = [float(number(word)) for word in words]
    # kohya_ss writes the same rate twice, for bases with one text encoder too.
    return {"optimizer.text_encoder_learning_rate": rates if len(set(rates)) > 1 else rates[0]}


def arguments_of(value: Any) -> dict[str, Any]:
    """Name -> value of ``name=value`` texts, as ``optimizer_args`` and ``network_args`` have them.

    Raises:
        RefusedError: one is of another form.
    """
    words = value.split() if isinstance(value, str) else value
    found = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if not equals:
            raise RefusedError(f"expected name=value, not {word!r}")
        try:
            found[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name.strip()] = text
    return {name: list(each) if isinstance(each, tuple) else each for name, each in found.items()}


def _optimizer_arguments(value: Any) -> Settings:
    return {"optimizer.arguments": arguments_of(value)}


def _tags(value: Any) -> Settings:
    words = value if isinstance(value, list) else str(value).split(",")
    return {"output.tags": [word.strip() for word in words]}


def _whole(name: str) -> Callable[[Any], Settings]:
    return lambda value: {name: value}


def _true(**settings: Any) -> Callable[[Any], Settings]:
    """For an option without a value: these settings."""
    return lambda value: {name.replace("__", "."): each for name, each in settings.items()}


def _only(*accepted: Any, instead: str) -> Callable[[Any], Settings]:
    """For an option that is not supported: values that change nothing, as numbers or texts."""

    def check(value: Any) -> Settings:
        if (parse_value(value) if isinstance(value, str) else value) not in accepted:
            raise RefusedError(f"cannot be followed; {instead}")
        return {}

    return check


RULES: Mapping[str, Callable[[Any], Settings]] = {
    "resolution": _side,
    "max_train_epochs": _epochs,
    "lr_scheduler": _schedule,
    "lr_scheduler_type": _only(instead="state optimizer.schedule"),
    "lr_warmup_percent": lambda value: {"optimizer.warmup_steps": float(number(value)) / 100 or 0},
    "network_module": _module,
    "text_encoder_lr": _rates,
    "unet_lr": lambda value: {"optimizer.learning_rate": float(number(value))},
    "optimizer_args": _optimizer_arguments,
    "use_8bit_adam": _true(optimizer__name="adamw8bit"),
    "use_lion_optimizer": _true(optimizer__name="lion"),
    "mixed_precision": lambda value: {"train.precision": dtype(value)},
    "save_precision": lambda value: {"output.precision": dtype(value)},
    "full_bf16": _true(train__precision="bfloat16"),
    "min_snr_gamma": lambda value: (
        {"objective.weighting": "min_snr", "objective.min_snr_gamma": float(number(value))} if number(value) else {}
    ),
    "debiased_estimation_loss": _true(objective__weighting="debiased"),
    "v_parameterization": _true(base__prediction="v_prediction"),
    "random_crop": _true(data__crop="random"),
    "alpha_mask": _true(data__mask="alpha"),
    "masked_loss": _only(instead='state data.mask = "alpha" or "files"'),
    "metadata_tags": _tags,
    "metadata_trigger_phrase": lambda value: {"data.trigger": str(value)},
    "no_metadata": _true(output__metadata="none"),
    "logging_dir": _true(output__log=True),
    "xformers": _true(base__attention="xformers"),
    "sdpa": _true(base__attention="sdpa"),
    "mem_eff_attn": _true(base__attention="sdpa"),
    "gradient_checkpointing": _true(train__gradient_checkpointing=True),
    "gradient_accumulation_steps": _only(1, instead="multiply train.batch_size by it"),
    "huber_scale": _only(1, instead="it must be 1"),
    # As in kohya's trainer, 0 is no limit.
    "scale_weight_norms": lambda value: {"lora.max_norm": float(number(value))} if number(value) else {},
    "stop_text_encoder_training": lambda value: {"optimizer.text_encoder_stop": number(value)} if number(value) else {},
    "multires_noise_iterations": lambda value: {"objective.multires_noise_iterations": int(number(value))},
    "caption_dropout_every_n_epochs": _only(0, instead="state data.caption_dropout"),
    "adaptive_noise_scale": _only(0, instead="it must be 0"),
    "validation_split": _only(0, instead="put validation images into [[data.sets]] with that role"),
}
"""Option -> the settings that its value is. All other options have one setting that is the same."""

HARMLESS = frozenset({
    "async_upload", "console_log_file", "console_log_level", "console_log_simple", "ddp_gradient_as_bucket_view",
    "ddp_static_graph", "ddp_timeout", "disable_mmap_load_safetensors", "dynamo_backend", "highvram", "log_config",
    "log_prefix", "log_tracker_config", "log_tracker_name", "log_with", "lowram", "metadata_thumbnail",
    "sample_at_first", "sample_every_n_epochs", "sample_every_n_steps", "sample_prompts", "sample_sampler",
    "save_last_n_epochs_state", "save_last_n_steps_state", "save_state", "save_state_on_train_end",
    "text_encoder_batch_size", "tokenizer_cache_dir", "validation_seed", "wandb_api_key",
    "wandb_run_name",
})  # fmt: skip
"""Options that change nothing of the LoRA and have no counterpart: they are left out, which is said."""

KOHYA_DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "lora.rank": ("network_dim", 4),
    "lora.alpha": ("network_alpha", 1.0),
    "optimizer.name": ("optimizer_type", "adamw"),
    "optimizer.learning_rate": ("learning_rate", 2e-6),
    "optimizer.schedule": ("lr_scheduler", "constant"),
    "optimizer.warmup_steps": ("lr_warmup_steps", 0),
    "train.steps": ("max_train_steps", 1600),
    "train.batch_size": ("train_batch_size", 1),
    "train.precision": ("mixed_precision", "float32"),
    "output.precision": ("save_precision", "float32"),
    "objective.weighting": ("min_snr_gamma", "none"),
    "base.prediction": ("v_parameterization", "epsilon"),
    "base.zero_terminal_snr": ("zero_terminal_snr", False),
    "data.max_token_length": ("max_token_length", 75),
    "data.enable_bucket": ("enable_bucket", False),
    "data.bucket_rule": ("enable_bucket", "kohya"),
    "data.caption_extension": ("caption_extension", ".caption"),
    "data.min_bucket_reso": ("min_bucket_reso", 256),
    "data.max_bucket_reso": ("max_bucket_reso", 1024),
    "data.bucket_reso_steps": ("bucket_reso_steps", 64),
}
"""Setting -> (option, value): what kohya's trainer does where its option is not stated."""
