"""What a LoRA file says of itself: kohya's ``ss_*`` keys and ModelSpec 1.0.1, with true values or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .. import __version__
from ..base.family import Family
from ..config import Config
from .hashes import FileHashes


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """Pictures of one folder that have one part in training."""

    name: str
    """Bare."""
    repeats: int
    captions: Sequence[str]
    """One for each picture, with nothing drawn."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    folders: Sequence[FolderFacts]
    """Of training pictures."""
    regularisation: Sequence[FolderFacts]
    shuffle_caption: bool
    keep_tokens: int
    tag_dropout: float
    """These three of the training set where they are highest."""
    validation_images: int
    validation_loss: float | None
    buckets: Mapping[tuple[int, int], int]
    """(width, height) -> how many pictures are shown at that size in an epoch, repeats and regularisation counted."""
    mean_aspect_error: float
    """Of the buckets' aspects (width / height) against the pictures', over the training pictures."""
    bucket_sides: tuple[int, int] | None
    """Least and greatest side of a bucket in pixels; None where pictures alone decide."""


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
    train, lora = config.train, config.lora
    trained_text_encoder = train.text_encoder_learning_rate > 0
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
        "ss_learning_rate": train.learning_rate,
        "ss_unet_lr": train.learning_rate,
        "ss_text_encoder_lr": train.text_encoder_learning_rate if trained_text_encoder else None,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={train.weight_decay},betas=(0.9, 0.99))",
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_max_grad_norm": train.max_grad_norm,
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
        "ss_min_snr_gamma": train.min_snr_gamma or None,
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
        "ss_prior_loss_weight": train.prior_loss_weight,
        "ss_resolution": f"({run.resolution}, {run.resolution})",
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": train.batch_size,
        "ss_enable_bucket": config.data.enable_bucket,
        "ss_cache_latents": True,
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": train.caption_dropout,
        "ss_caption_dropout_every_n_epochs": 0,
        "ss_face_crop_aug_range": None,
        "ss_resize_interpolation": "lanczos",
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_flip_aug": config.data.flip or any(one.flip for one in config.data.sets),
        "ss_color_aug": False,
        "ss_random_crop": any((one.crop or config.data.crop) == "random" for one in config.data.sets),
        "sdlora_modules": run.modules,
        "sdlora_version": __version__,
        **({} if data.validation_loss is None else {"sdlora_validation_loss": data.validation_loss}),
    }


def _modelspec_values(config: Config, run: RunFacts) -> dict[str, object]:
    """ModelSpec 1.0.1, less the hash, which is over the final bytes, and the thumbnail, which is made of a sample."""
    epsilon, output, trigger = run.prediction == "epsilon", config.output, config.data.trigger
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


def with_family(metadata: Mapping[str, str], family: Family) -> dict[str, str]:
    """``metadata``, saying to A1111, Forge and kohya's tools which family the file is for, where it does not say so.

    Of a file that has other metadata and not this, A1111 takes SD 1.x for granted and hides it from users of another.
    """
    if "ss_base_model_version" in metadata:
        return dict(metadata)
    v = metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
    own = {
        "ss_base_model_version": family.kohya_version_v if v else family.kohya_version,
        "ss_v2": str(family.name == "sd2"),
        "modelspec.architecture": family.modelspec_architecture_v if v else family.modelspec_architecture,
        "modelspec.implementation": family.modelspec_implementation,
    }
    return own | dict(metadata)


def stated_tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """Tag -> how often it stood in the captions, over all folders, the most frequent first; {} where nothing is told."""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return dict(counts.most_common())


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger phrase that the file names, or else the tags that all its training captions share."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    total = _pictures(metadata)
    return tuple(tag for tag, count in stated_tags(metadata).items() if total and count >= total)


def _pictures(metadata: Mapping[str, str]) -> int:
    """How many there were, repeats not counted, as tags are counted; 0 where nothing tells."""
    try:
        return sum(int(folder["img_count"]) for folder in json.loads(metadata["ss_dataset_dirs"]).values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    try:
        return int(metadata["ss_num_train_images"])
    except (KeyError, ValueError):
        return 0


def safe_title(name: str) -> str:
    """A name that prompts can call, ``<lora:name:1>``: letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "lora"
