"""What LoRA files say about themselves: the parts of kohya's ``ss_*`` keys and of ModelSpec 1.0.1 that are read here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

from ..families import Family, Prediction

MODELSPEC_PREDICTIONS: Mapping[Prediction, str] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""Prediction type -> the value of ``modelspec.prediction_type``."""
_READ_PREDICTIONS = {word: prediction for prediction, word in MODELSPEC_PREDICTIONS.items()} | {
    prediction: prediction for prediction in MODELSPEC_PREDICTIONS
}
"""Some files state it in diffusers' words, which are ours too."""


def stated_prediction(metadata: Mapping[str, str]) -> Prediction | None:
    """The prediction type that ModelSpec metadata of a LoRA or a checkpoint states; None where it states none."""
    if "-v/" in f"{metadata.get('modelspec.architecture', '')}/":
        return "v_prediction"
    return _READ_PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))


def family_metadata(family: Family, prediction: Prediction | None) -> dict[str, str]:
    """What says to A1111, Forge and kohya's tools which family a LoRA is for; a ``prediction`` of None is epsilon."""
    v = prediction == "v_prediction"
    return {
        "ss_base_model_version": family.kohya_version_v if v else family.kohya_version,
        "ss_v2": str(family.kohya_v2),
        "modelspec.architecture": family.modelspec_architecture_v if v else family.modelspec_architecture,
        "modelspec.implementation": family.modelspec_implementation,
    }


def with_family(metadata: Mapping[str, str], family: Family) -> dict[str, str]:
    """``metadata`` and what it lacks of ``family_metadata``, unless it states kohya's version of the base.

    A1111 assumes SD 1.x for a file that has other metadata and not this, and hides it from users of another family.
    """
    if "ss_base_model_version" in metadata:
        return dict(metadata)
    return family_metadata(family, stated_prediction(metadata)) | dict(metadata)


def stated_tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """Tag -> how often it occurs in the captions of all folders, the most frequent first; {} where none are stated."""
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
    total = _images(metadata)
    return tuple(tag for tag, count in stated_tags(metadata).items() if total and count >= total)


def _images(metadata: Mapping[str, str]) -> int:
    """Number of training images, each counted once, as its tags are; 0 where it is not stated."""
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
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "lora"
