"""Facts about the training images, for the metadata of the finished file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..data.examine import ExaminedImage
from .metadata import DatasetFacts, FolderFacts
from .plan import RunPlan


def describe_data(plan: RunPlan, validation_loss: float | None) -> DatasetFacts:
    """Facts about the images of ``plan``; no path of a folder is among them."""
    training, rules = plan.training, plan.rules
    buckets: Counter[tuple[int, int]] = Counter()
    for views, times in zip(training.shown, training.batches.repeats, strict=True):
        if times:
            buckets[views.size] += times
    errors = [
        abs(views.size[0] / views.size[1] - item.width / item.height)
        for views in training.shown
        if (item := training.items[views.item]).source.role == "train"
    ]
    trained = [item for item in training.items if item.source.role == "train"]
    caption_rules = [item.source.rules for item in trained]
    return DatasetFacts(
        folders=_folders(trained),
        regularisation=_folders([item for item in training.items if item.source.role == "regularisation"]),
        shuffle_caption=any(rule.shuffle_tags for rule in caption_rules),
        keep_tokens=max(rule.keep_tokens for rule in caption_rules),
        tag_dropout=max(rule.tag_dropout for rule in caption_rules),
        validation_images=sum(item.source.role == "validation" for item in training.items),
        validation_loss=validation_loss,
        buckets=buckets,
        mean_aspect_error=sum(errors) / len(errors),
        bucket_sides=None
        if rules[0].no_upscale
        else (min(rule.min_size for rule in rules), max(rule.max_size for rule in rules)),
    )


def _folders(items: list[ExaminedImage]) -> list[FolderFacts]:
    """Grouped by folder and repeats; of the same names, the later ones are numbered, as in kohya's trainer."""
    grouped: dict[tuple[Path, int], list[str]] = {}
    for item in items:
        source = item.source
        captions = grouped.setdefault((source.file.parent.resolve(), source.repeats), [])
        captions.append(source.rules.plain(source.captions))
    facts: dict[str, FolderFacts] = {}
    for (folder, repeats), captions in grouped.items():
        name, number = folder.name, 2
        while name in facts:
            name, number = f"{folder.name} ({number})", number + 1
        facts[name] = FolderFacts(name=name, repeats=repeats, captions=captions)
    return list(facts.values())
