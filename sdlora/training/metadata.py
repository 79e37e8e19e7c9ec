"""What a trained file says of itself: kohya's ``ss_*`` keys and ModelSpec 1.0.1, with true values or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .._version import __version__
from ..config.sections import Config
from ..families import Family
from ..formats.hashes import FileHashes
from .optimizer import BETAS


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """Images of one folder that have one part in training."""

    name: str
    """Bare."""
    repeats: int
    captions: Sequence[str]
    """One for each image, with nothing drawn."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    folders: Sequence[FolderFacts]
    """Of training images."""
    regularisation: Sequence[FolderFacts]
    shuffle_caption: bool
    keep_tokens: int
    tag_dropout: float
    """These three of the training set where they are highest."""
    validation_images: int
    validation_loss: float | None
    buckets: Mapping[tuple[int, int], int]
    """(width, height) -> how many images are shown at that size in an epoch, repeats and regularisation counted."""
    mean_aspect_error: float
    """Of the buckets' aspects (width / height) against the images', over the training images."""
    bucket_sides: tuple[int, int] | None
    """Least and greatest side of a bucket in pixels; None where images alone decide."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What happened, as far as the configuration does not say it already. Times are seconds since 1970."""

    title: str
    base_name: str
    """With its ending, where it is a file."""
    base_hashes: FileHashes | None
    """None where it is a folder."""
    vae_name: str | None
    """Of a VAE that the user put in the place of the base's own."""
    vae_hashes: FileHashes | None
    family: Family
    prediction: str
    resolution: int
    modules: int
    epochs: int
    batches_per_epoch: int
    precision: str
    clip_skip: int | None
    """As the user set it; None is the family's own."""
    token_length: int
    """Tokens of a caption that were read, at most; a multiple of 75."""
    zero_terminal_snr: bool
    session: int
    started_at: float
    finished_at: float


def training_metadata(config: Config, run: RunFacts, data: DatasetFacts) -> dict[str, str]:
    """Every value is text, as the format wants it; nothing in it names a folder's place, a user or a machine.

    Of ``output.metadata``'s levels, ``minimal`` is what kohya's ``--no_metadata`` keeps, what ModelSpec demands, the trigger
    and what the user wrote; ``none`` is nothing.
    """
    if config.output.metadata == "none":
        return {}
    values = _run_values(config, run, data) | _modelspec_values(config, run)
    if config.output.metadata == "minimal":
        values = {key: value for key, value in values.items() if key in _MINIMAL}
    return {key: json.dumps(v) if isinstance(v, dict) else str(v) for key, v in values.items()}


_WRITTEN_BY_USERS = ("author", "license", "description", "tags", "usage_hint")
_MINIMAL = frozenset(
    {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
    | {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution")}
    | {f"modelspec.{key}" for key in ("prediction_type", "trigger_phrase", *_WRITTEN_BY_USERS)}
)


def _run_values(config: Config, run: RunFacts, data: DatasetFacts) -> dict[str, object]:
    """Kohya's keys. What this program has no setting for stands with the value by which kohya says that it is off."""
    train, lora, optimizer = config.train, config.lora, config.optimizer
    trained_text_encoder = optimizer.text_encoder_learning_rate > 0
    epsilon = run.prediction == "epsilon"
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
        "ss_base_model_version": run.family.kohya_version if epsilon else run.family.kohya_version_v,
        "ss_v2": run.family.name == "sd2",
        "ss_clip_skip": run.clip_skip,
        "ss_max_token_length": run.token_length if run.token_length > 75 else None,
        "ss_zero_terminal_snr": run.zero_terminal_snr,
        "ss_network_module": "networks.lora",
        "ss_network_dim": lora.rank,
        "ss_network_alpha": lora.alpha,
        "ss_network_dropout": None,
        "ss_network_args": {"targets": lora.targets},
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate,
        "ss_text_encoder_lr": optimizer.text_encoder_learning_rate if trained_text_encoder else None,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={optimizer.weight_decay},betas={BETAS})",
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": optimizer.warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_max_train_steps": train.steps,
        "ss_steps": train.steps,
        "ss_num_epochs": run.epochs,
        "ss_epoch": run.epochs,
        "ss_num_batches_per_epoch": run.batches_per_epoch,
        "ss_gradient_accumulation_steps": 1,
        "ss_gradient_checkpointing": train.gradient_checkpointing,
        "ss_mixed_precision": {"bfloat16": "bf16"}.get(run.precision, "no"),
        "ss_full_fp16": False,
        "ss_fp8_base": False,
        "ss_fp8_base_unet": False,
        "ss_lowram": False,
        "ss_seed": train.seed,
        "ss_min_snr_gamma": config.objective.min_snr_gamma or None,
        "ss_debiased_estimation": False,
        "ss_loss_type": "l2",
        "ss_huber_schedule": None,
        "ss_huber_scale": None,
        "ss_huber_c": None,
        "ss_scale_weight_norms": None,
        "ss_noise_offset": None,
        "ss_noise_offset_random_strength": False,
        "ss_adaptive_noise_scale": None,
        "ss_multires_noise_iterations": None,
        "ss_multires_noise_discount": None,
        "ss_ip_noise_gamma": None,
        "ss_ip_noise_gamma_random_strength": False,
        "ss_num_train_images": sum(folder.repeats * len(folder.captions) for folder in data.folders),
        "ss_num_reg_images": sum(folder.repeats * len(folder.captions) for folder in data.regularisation),
        "ss_num_validation_images": data.validation_images,
        "ss_validation_seed": None,
        "ss_validation_split": 0.0,
        "ss_max_validation_steps": None,
        "ss_validate_every_n_epochs": None,
        "ss_validate_every_n_steps": None,
        "ss_dataset_dirs": _folder_table(data.folders),
        "ss_reg_dataset_dirs": _folder_table(data.regularisation),
        "ss_tag_frequency": {folder.name: tag_frequency(folder.captions) for folder in data.folders},
        "ss_bucket_info": {
            "buckets": {
                str(i): {"resolution": list(size), "count": count}
                for i, (size, count) in enumerate(sorted(data.buckets.items()))
            },
            "mean_img_ar_error": data.mean_aspect_error,
        },
        "ss_min_bucket_reso": data.bucket_sides[0] if data.bucket_sides else None,
        "ss_max_bucket_reso": data.bucket_sides[1] if data.bucket_sides else None,
        "ss_bucket_no_upscale": config.data.bucket_no_upscale,
        "ss_prior_loss_weight": config.objective.prior_loss_weight,
        "ss_resolution": f"({run.resolution}, {run.resolution})",
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": train.batch_size,
        "ss_enable_bucket": config.data.enable_bucket,
        "ss_cache_latents": True,
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": config.data.caption_dropout,
        "ss_caption_dropout_every_n_epochs": 0,
        "ss_face_crop_aug_range": None,
        "ss_resize_interpolation": "lanczos",
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_flip_aug": config.data.flip or any(one.flip for one in config.data.sets),
        "ss_color_aug": False,
        "ss_random_crop": any(one.crop == "random" for one in config.data.sets),
        "sdlora_modules": run.modules,
        "sdlora_version": __version__,
        **({} if data.validation_loss is None else {"sdlora_validation_loss": data.validation_loss}),
    }


def _modelspec_values(config: Config, run: RunFacts) -> dict[str, object]:
    """ModelSpec 1.0.1, less the hash, which is over the final bytes, and the thumbnail, which is made of a sample."""
    epsilon, output, trigger = run.prediction == "epsilon", config.output, config.trigger
    written = {
        "author": output.author,
        "license": output.license,
        "description": output.description,
        "tags": ", ".join(output.tags),
        "usage_hint": output.usage_hint or f"Put the word {trigger} into the prompt.",
        "encoder_layer": None if run.clip_skip is None else str(run.clip_skip),
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": run.family.modelspec_architecture if epsilon else run.family.modelspec_architecture_v,
        "modelspec.implementation": run.family.modelspec_implementation,
        "modelspec.title": output.title or run.title,
        "modelspec.resolution": f"{run.resolution}x{run.resolution}",
        "modelspec.date": datetime.fromtimestamp(int(run.finished_at), UTC).isoformat(),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(run.prediction, run.prediction),
        **{f"modelspec.{key}": value for key, value in written.items() if value},
    }


def _folder_table(folders: Sequence[FolderFacts]) -> dict[str, dict[str, int]]:
    return {folder.name: {"n_repeats": folder.repeats, "img_count": len(folder.captions)} for folder in folders}


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, the most frequent first."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return dict(counts.most_common())
