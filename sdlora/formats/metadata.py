"""What a LoRA file says of itself: kohya's ``ss_*`` keys and ModelSpec 1.0.1, with true values or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ..base.family import Family
from ..config import Config


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
    """Every value is text, as the format wants it; nothing in it names a folder's place, a user or a machine."""
    train, lora = config.train, config.lora
    trained_text_encoder = train.text_encoder_learning_rate > 0
    epsilon = run.prediction == "epsilon"
    values: dict[str, object] = {
        "ss_session_id": run.session,
        "ss_training_started_at": run.started_at,
        "ss_training_finished_at": run.finished_at,
        "ss_output_name": run.title,
        "ss_sd_model_name": run.base_name,
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
        "ss_seed": train.seed,
        "ss_min_snr_gamma": train.min_snr_gamma or None,
        "ss_loss_type": "l2",
        "ss_noise_offset": None,
        "ss_num_train_images": sum(folder.repeats * len(folder.captions) for folder in data.folders),
        "ss_num_reg_images": sum(folder.repeats * len(folder.captions) for folder in data.regularisation),
        "ss_num_validation_images": data.validation_images,
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
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_flip_aug": config.data.flip or any(one.flip for one in config.data.sets),
        "ss_color_aug": False,
        "ss_random_crop": any((one.crop or config.data.crop) == "random" for one in config.data.sets),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": run.family.modelspec_architecture if epsilon else run.family.modelspec_architecture_v,
        "modelspec.implementation": run.family.modelspec_implementation,
        "modelspec.title": run.title,
        "modelspec.resolution": f"{run.resolution}x{run.resolution}",
        "modelspec.date": datetime.fromtimestamp(int(run.finished_at), UTC).isoformat(),
        "modelspec.trigger_phrase": config.data.trigger,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(run.prediction, run.prediction),
        "modelspec.usage_hint": f"Put the word {config.data.trigger} into the prompt.",
        "sdlora_modules": run.modules,
    }
    if data.validation_loss is not None:
        values["sdlora_validation_loss"] = data.validation_loss
    return {key: json.dumps(v) if isinstance(v, dict) else str(v) for key, v in values.items()}


def _folder_table(folders: Sequence[FolderFacts]) -> dict[str, dict[str, int]]:
    return {folder.name: {"n_repeats": folder.repeats, "img_count": len(folder.captions)} for folder in folders}


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, the most frequent first."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return dict(counts.most_common())


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger phrase that the file names, or else the tags that all its training captions share."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    try:
        total = int(metadata["ss_num_train_images"])
        folders = json.loads(metadata["ss_tag_frequency"]).values()
        counts = Counter({tag: count for tags in folders for tag, count in tags.items()})
    except (KeyError, ValueError, TypeError, AttributeError):
        return ()
    return tuple(tag for tag, count in counts.items() if count >= total)


def safe_title(name: str) -> str:
    """A name that prompts can call, ``<lora:name:1>``: letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "lora"
