"""The keys of kohya's dataset configuration: where each may be, what it holds, and what it is called here."""

from __future__ import annotations

from dataclasses import dataclass

from .sections import SetSection
from .setting import setting_of

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"


@dataclass(frozen=True, kw_only=True)
class KohyaKey:
    """One key of the file."""

    kinds: tuple[type, ...]
    levels: tuple[str, ...]
    """Tables that it may be in."""
    harmless: tuple[object, ...] | None = None
    """For a key that is not supported: values that change nothing. None for a supported key."""
    instead: str = ""
    """What to do instead of using a key that is not supported."""

    def accepts(self, value: object) -> bool:
        """Whether ``value`` is of a right kind; true and false are not numbers."""
        return any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in self.kinds)

    @property
    def expected(self) -> str:
        """``kinds`` in words."""
        return " or ".join(_KIND_NAMES[kind] for kind in self.kinds)


_KIND_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a table",
}
_BOTH, _ALL, _SUBSET_ONLY = (GENERAL, DATASET), (GENERAL, DATASET, SUBSET), (SUBSET,)
_NUMBER = (int, float)
_RESIZED = "images are always resized with a Lanczos filter; remove the key"
_COMMA_ONLY = "only commas separate tags here; write the captions that way and remove the key"

KEYS = {
    "resolution": KohyaKey(kinds=(int, list), levels=_BOTH),
    "batch_size": KohyaKey(kinds=(int,), levels=_BOTH),
    "enable_bucket": KohyaKey(kinds=(bool,), levels=_BOTH),
    "min_bucket_reso": KohyaKey(kinds=(int,), levels=_BOTH),
    "max_bucket_reso": KohyaKey(kinds=(int,), levels=_BOTH),
    "bucket_reso_steps": KohyaKey(kinds=(int,), levels=_BOTH),
    "bucket_no_upscale": KohyaKey(kinds=(bool,), levels=_BOTH),
    "network_multiplier": KohyaKey(kinds=_NUMBER, levels=_BOTH, harmless=(1,), instead="give the sets a loss_weight"),
    "validation_split": KohyaKey(
        kinds=_NUMBER, levels=_ALL, harmless=(0,), instead="put validation images into [[data.sets]] with that role"
    ),
    "validation_seed": KohyaKey(kinds=(int,), levels=_ALL, harmless=(0,), instead="remove the key"),
    "skip_image_resolution": KohyaKey(
        kinds=(int, list, str), levels=_BOTH, harmless=(), instead="move small images away; sdlora lint names them"
    ),
    "resize_interpolation": KohyaKey(kinds=(str,), levels=_ALL, harmless=("lanczos",), instead=_RESIZED),
    "image_dir": KohyaKey(kinds=(str,), levels=_SUBSET_ONLY),
    "metadata_file": KohyaKey(kinds=(str,), levels=_SUBSET_ONLY),
    "conditioning_data_dir": KohyaKey(kinds=(str,), levels=_SUBSET_ONLY),
    "is_reg": KohyaKey(kinds=(bool,), levels=_SUBSET_ONLY),
    "alpha_mask": KohyaKey(kinds=(bool,), levels=_ALL),
    "class_tokens": KohyaKey(kinds=(str,), levels=_ALL),
    "num_repeats": KohyaKey(kinds=(int,), levels=_ALL),
    "caption_extension": KohyaKey(kinds=(str,), levels=_ALL),
    "caption_prefix": KohyaKey(kinds=(str,), levels=_ALL),
    "caption_suffix": KohyaKey(kinds=(str,), levels=_ALL),
    "caption_dropout_rate": KohyaKey(kinds=_NUMBER, levels=_ALL),
    "caption_tag_dropout_rate": KohyaKey(kinds=_NUMBER, levels=_ALL),
    "enable_wildcard": KohyaKey(kinds=(bool,), levels=_ALL),
    "shuffle_caption": KohyaKey(kinds=(bool,), levels=_ALL),
    "keep_tokens": KohyaKey(kinds=(int,), levels=_ALL),
    "flip_aug": KohyaKey(kinds=(bool,), levels=_ALL),
    "random_crop": KohyaKey(kinds=(bool,), levels=_ALL),
    "cache_info": KohyaKey(kinds=(bool,), levels=_ALL, harmless=(True, False)),
    "color_aug": KohyaKey(
        kinds=(bool,), levels=_ALL, harmless=(False,), instead="colours are never changed; remove the key"
    ),
    "face_crop_aug_range": KohyaKey(
        kinds=(list,), levels=_ALL, harmless=(), instead='remove the key; data.crop = "salient" keeps the most detail'
    ),
    "caption_separator": KohyaKey(kinds=(str,), levels=_ALL, harmless=(",", ", "), instead=_COMMA_ONLY),
    "secondary_separator": KohyaKey(kinds=(str,), levels=_ALL, harmless=("",), instead=_COMMA_ONLY),
    "keep_tokens_separator": KohyaKey(kinds=(str,), levels=_ALL, harmless=("",), instead="use keep_tokens"),
    "token_warmup_min": KohyaKey(kinds=(int,), levels=_ALL, harmless=(1,), instead="remove the key"),
    "token_warmup_step": KohyaKey(kinds=_NUMBER, levels=_ALL, harmless=(0,), instead="remove the key"),
    "caption_dropout_every_n_epochs": KohyaKey(
        kinds=(int,), levels=_ALL, harmless=(0,), instead="use caption_dropout_rate"
    ),
    "custom_attributes": KohyaKey(kinds=(dict,), levels=_ALL, harmless=({},), instead="remove the key"),
}
"""Every key that kohya's trainer has."""

SET_KEYS = {
    setting.kohya: key
    for key, field in SetSection.model_fields.items()
    if (setting := setting_of(field)).kohya is not None and setting.kohya not in ("is_reg", "random_crop")
}
"""Kohya's key -> ours, of what each set has for itself. The two that are left out have other values there."""
RUN_KEYS = {
    "batch_size": ("train", "batch_size"),
    "enable_bucket": ("data", "enable_bucket"),
    "min_bucket_reso": ("data", "min_bucket_reso"),
    "max_bucket_reso": ("data", "max_bucket_reso"),
    "bucket_reso_steps": ("data", "bucket_reso_steps"),
    "bucket_no_upscale": ("data", "bucket_no_upscale"),
    "caption_dropout_rate": ("data", "caption_dropout"),
}
"""Kohya's key -> (section, key), of what is the same for all images of a run."""
