"""What a trained file states about itself: kohya's ``ss_*`` keys and ModelSpec 1.0.1, with true values or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .._version import __version__
from ..config.sections import Config
from ..families import WORDS_IN_CHUNK, Family, Prediction
from ..formats.hashes import FileHashes
from ..formats.metadata import MODELSPEC_PREDICTIONS, family_metadata
from .optimizers.choice import described


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """Images of one folder that are used in the same way."""

    name: str
    """Without the path."""
    repeats: int
    captions: Sequence[str]
    """One for each image, before anything is shuffled or dropped."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What the run was trained on."""

    folders: Sequence[FolderFacts]
    """Folders of training images."""
    regularisation: Sequence[FolderFacts]
    shuffle_caption: bool
    keep_tokens: int
    tag_dropout: float
    """These three are the highest values among the training sets."""
    validation_images: int
    validation_loss: float | None
    buckets: Mapping[tuple[int, int], int]
    """(width, height) in pixels -> images of that size in an epoch, with repeats and regularisation images."""
    mean_aspect_error: float
    """Mean difference of width / height between an image and its bucket, over the training images."""
    bucket_sides: tuple[int, int] | None
    """Least and greatest side of a bucket in pixels; None where only the images decide."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the configuration does not state already. Times are seconds since 1970."""

    title: str
    base_name: str
    """With the extension, if it is a file."""
    base_hashes: FileHashes | None
    """None for a folder."""
    vae_name: str | None
    """Name of the VAE that replaces the base's; None if there is none."""
    vae_hashes: FileHashes | None
    family: Family
    prediction: Prediction
    resolution: int
    modules: int
    rank: int | None
    """That of every module in the file; None where they differ."""
    alpha: float | None
    """That of every module in the file; None where they differ."""
    step: int
    """Steps after which the file was written."""
    warmup_steps: int
    epoch: int
    """Epochs that were started by then."""
    epochs: int
    """Epochs of the whole run; the last may be incomplete."""
    batches_per_epoch: int
    precision: str
    clip_skip: int | None
    """As set by the user; None is the family's default."""
    token_length: int
    """Most tokens of a caption that are read; a multiple of 75."""
    zero_terminal_snr: bool
    session: int
    started_at: float
    finished_at: float


def training_metadata(config: Config, run: RunFacts, data: DatasetFacts) -> dict[str, str]:
    """Metadata of the finished file, all values as text; no path, user or machine is named.

    With ``output.metadata = "minimal"`` only what kohya's ``--no_metadata`` keeps, what ModelSpec requires, the trigger and
    what the user wrote; with ``"none"`` nothing.
    """
    if config.output.metadata == "none":
        return {}
    values: dict[str, object] = {**family_metadata(run.family, run.prediction)}
    values |= _run_values(config, run, data) | _modelspec_values(config, run)
    if config.output.metadata == "minimal":
        values = {key: value for key, value in values.items() if key in _MINIMAL}
    return {key: json.dumps(v) if isinstance(v, dict) else str(v) for key, v in values.items()}


def stated_texts(config: Config) -> dict[str, str]:
    """Metadata key -> text, of the texts that ``config`` states for a file of its ``output.metadata``."""
    output = config.output
    texts = {
        "modelspec.title": output.title,
        "modelspec.author": output.author,
        "modelspec.license": output.license,
        "modelspec.description": output.description,
        "modelspec.tags": ", ".join(output.tags),
        "modelspec.usage_hint": output.usage_hint,
        "ss_training_comment": output.comment,
    }
    keys = {"none": frozenset[str](), "minimal": _MINIMAL, "full": texts.keys()}[output.metadata]
    return {key: text for key, text in texts.items() if text and key in keys}


_WRITTEN_BY_USERS = ("author", "license", "description", "tags", "usage_hint")
_MINIMAL = frozenset(
    {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
    | {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution")}
    | {f"modelspec.{key}" for key in ("prediction_type", "trigger_phrase", *_WRITTEN_BY_USERS)}
)


def _run_values(config: Config, run: RunFacts, data: DatasetFacts) -> dict[str, object]:
    """Kohya's keys and ours."""
    return (
        _OFF
        | _origin(config, run)
        | _network(config, run)
        | _optimization(config, run)
        | _objective(config)
        | _captions_and_views(config, data)
        | _images(run, data)
        | _buckets(config, data)
        | _ours(config, run, data)
    )


_OFF: dict[str, object] = {
    "ss_full_fp16": False,
    "ss_fp8_base": False,
    "ss_fp8_base_unet": False,
    "ss_lowram": False,
    "ss_noise_offset_random_strength": False,
    "ss_adaptive_noise_scale": None,
    "ss_ip_noise_gamma_random_strength": False,
    "ss_validation_seed": None,
    "ss_validation_split": 0.0,
    "ss_max_validation_steps": None,
    "ss_validate_every_n_epochs": None,
    "ss_caption_dropout_every_n_epochs": 0,
    "ss_face_crop_aug_range": None,
    "ss_color_aug": False,
}
"""What has no setting here, with the value by which kohya's trainer says that it is off."""


def _origin(config: Config, run: RunFacts) -> dict[str, object]:
    base, vae = run.base_hashes, run.vae_hashes
    return {
        "ss_session_id": run.session,
        "ss_training_started_at": run.started_at,
        "ss_training_finished_at": run.finished_at,
        "ss_output_name": run.title,
        "ss_training_comment": config.output.comment,
        "ss_sd_model_name": run.base_name,
        "ss_sd_model_hash": base and base.autov1,
        "ss_new_sd_model_hash": base and base.sha256,
        "ss_vae_name": run.vae_name,
        "ss_vae_hash": vae and vae.autov1,
        "ss_new_vae_hash": vae and vae.sha256,
        "ss_clip_skip": run.clip_skip,
        "ss_max_token_length": run.token_length if run.token_length > WORDS_IN_CHUNK else None,
        "ss_zero_terminal_snr": run.zero_terminal_snr,
    }


_ALGORITHMS: Mapping[str, Mapping[str, object]] = {
    "dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
}
"""Kind -> the arguments by which LyCORIS knows it."""


def _network(config: Config, run: RunFacts) -> dict[str, object]:
    lora, ratio = config.lora, config.optimizer.lora_plus_ratio
    arguments: dict[str, object] = {"targets": lora.targets, **_ALGORITHMS.get(lora.kind, {})}
    if lora.kind == "locon":
        arguments |= {"conv_dim": lora.conv_rank or lora.rank, "conv_alpha": lora.conv_alpha or lora.alpha}
    if lora.rslora:
        arguments["rslora"] = True
    if lora.rules:
        arguments["rules"] = [rule.model_dump(exclude_none=True) for rule in lora.rules]
    arguments |= lora.model_dump(include={"init", "rank_dropout", "module_dropout"}, exclude_defaults=True)
    if ratio != 1:
        arguments["loraplus_lr_ratio"] = ratio
    return {
        "ss_network_module": "lycoris.kohya" if lora.kind in _ALGORITHMS else "networks.lora",
        # What kohya's resize script writes where they differ.
        "ss_network_dim": "Dynamic" if run.rank is None else run.rank,
        "ss_network_alpha": "Dynamic" if run.alpha is None else run.alpha,
        "ss_network_args": arguments,
        "ss_network_dropout": lora.dropout or None,
        "ss_scale_weight_norms": lora.max_norm,
    }


def _optimization(config: Config, run: RunFacts) -> dict[str, object]:
    train, optimizer = config.train, config.optimizer
    rates = optimizer.text_encoder_rates(run.family)
    same = rates == (rates[0],) * len(rates)
    return {
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate,
        "ss_text_encoder_lr": (rates[0] or None) if same else list(rates),
        "ss_optimizer": described(optimizer),
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": run.warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_max_train_steps": train.steps,
        "ss_validate_every_n_steps": config.validation.every or None,
        "ss_steps": run.step,
        "ss_num_epochs": run.epochs,
        "ss_epoch": run.epoch,
        "ss_num_batches_per_epoch": run.batches_per_epoch,
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": train.batch_size,
        "ss_gradient_accumulation_steps": 1,
        "ss_gradient_checkpointing": train.gradient_checkpointing is True,
        "ss_mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(run.precision, "no"),
        "ss_seed": train.seed,
    }


def _objective(config: Config) -> dict[str, object]:
    objective = config.objective
    huber = objective.loss != "l2"
    return {
        "ss_loss_type": objective.loss,
        "ss_huber_schedule": objective.huber_schedule if huber else None,
        "ss_huber_scale": 1.0 if huber else None,
        "ss_huber_c": objective.huber_c if huber else None,
        "ss_min_snr_gamma": (objective.weighting == "min_snr" and objective.min_snr_gamma) or None,
        "ss_debiased_estimation": objective.weighting == "debiased",
        "ss_noise_offset": objective.noise_offset or None,
        "ss_multires_noise_iterations": objective.multires_noise_iterations or None,
        "ss_multires_noise_discount": objective.multires_noise_discount
        if objective.multires_noise_iterations
        else None,
        "ss_ip_noise_gamma": objective.input_perturbation or None,
        "ss_prior_loss_weight": objective.prior_loss_weight,
    }


def _captions_and_views(config: Config, data: DatasetFacts) -> dict[str, object]:
    sets = config.data.sets
    return {
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": config.data.caption_dropout,
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_cache_latents": True,
        "ss_resize_interpolation": "lanczos",
        "ss_flip_aug": any(section.flip for section in sets),
        "ss_random_crop": any(section.crop == "random" for section in sets),
    }


def _images(run: RunFacts, data: DatasetFacts) -> dict[str, object]:
    return {
        "ss_resolution": f"({run.resolution}, {run.resolution})",
        "ss_num_train_images": _shown(data.folders),
        "ss_num_reg_images": _shown(data.regularisation),
        "ss_num_validation_images": data.validation_images,
        "ss_dataset_dirs": _folder_table(data.folders),
        "ss_reg_dataset_dirs": _folder_table(data.regularisation),
        "ss_tag_frequency": {folder.name: tag_frequency(folder.captions) for folder in data.folders},
    }


def _buckets(config: Config, data: DatasetFacts) -> dict[str, object]:
    least, greatest = data.bucket_sides or (None, None)
    sizes = enumerate(sorted(data.buckets.items()))
    return {
        "ss_enable_bucket": config.data.enable_bucket,
        "ss_bucket_no_upscale": config.data.bucket_no_upscale,
        "ss_min_bucket_reso": least,
        "ss_max_bucket_reso": greatest,
        "ss_bucket_info": {
            "buckets": {str(number): {"resolution": list(size), "count": count} for number, (size, count) in sizes},
            "mean_img_ar_error": data.mean_aspect_error,
        },
    }


_NOT_STATED_BY_KOHYA = {
    *("weighting", "min_timestep", "max_timestep", "timestep_sampling", "timestep_shift", "logit_mean", "logit_std"),
}
"""Settings of ``[objective]`` that kohya's trainer does not state."""


def _ours(config: Config, run: RunFacts, data: DatasetFacts) -> dict[str, object]:
    values: dict[str, object] = {"sdlora_modules": run.modules, "sdlora_version": __version__}
    if objective := config.objective.model_dump(include=_NOT_STATED_BY_KOHYA, exclude_defaults=True):
        values["sdlora_objective"] = objective
    return values if data.validation_loss is None else values | {"sdlora_validation_loss": data.validation_loss}


def _modelspec_values(config: Config, run: RunFacts) -> dict[str, object]:
    """ModelSpec 1.0.1 without the hash, which is over the final bytes, and the thumbnail, which is made of a sample."""
    output, trigger = config.output, config.trigger
    optional = {
        "author": output.author,
        "license": output.license,
        "description": output.description,
        "tags": ", ".join(output.tags),
        "usage_hint": output.usage_hint or f"Put the word {trigger} into the prompt.",
        "encoder_layer": None if run.clip_skip is None else str(run.clip_skip),
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": output.title or run.title,
        "modelspec.resolution": f"{run.resolution}x{run.resolution}",
        "modelspec.date": datetime.fromtimestamp(int(run.finished_at), UTC).isoformat(),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": MODELSPEC_PREDICTIONS[run.prediction],
        **{f"modelspec.{key}": value for key, value in optional.items() if value},
    }


def _shown(folders: Sequence[FolderFacts]) -> int:
    """Number of images in an epoch."""
    return sum(folder.repeats * len(folder.captions) for folder in folders)


def _folder_table(folders: Sequence[FolderFacts]) -> dict[str, dict[str, int]]:
    return {folder.name: {"n_repeats": folder.repeats, "img_count": len(folder.captions)} for folder in folders}


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """Comma-separated tag -> how often it occurs in ``captions``, the most frequent first."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return dict(counts.most_common())
