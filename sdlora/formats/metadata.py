"""What a LoRA file says of itself: kohya's ``ss_*`` keys and ModelSpec 1.0.1, with true values or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

from ..families import Family


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
    total = _images(metadata)
    return tuple(tag for tag, count in stated_tags(metadata).items() if total and count >= total)


def _images(metadata: Mapping[str, str]) -> int:
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
