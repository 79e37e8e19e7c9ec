"""What a finished file says of the images that it was trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..data.items import Item
from .metadata import DatasetFacts, FolderFacts
from .plan import RunPlan


def describe_data(plan: RunPlan, validation_loss: float | None) -> DatasetFacts:
    """Of ``plan``'s images; nothing in it names a folder's place."""
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
    captions = [item.source.rules for item in trained]
    return DatasetFacts(
        folders=_folders(trained),
        regularisation=_folders([item for item in training.items if item.source.role == "regularisation"]),
        shuffle_caption=any(own.shuffle_tags for own in captions),
        keep_tokens=max(own.keep_tokens for own in captions),
        tag_dropout=max(own.tag_dropout for own in captions),
        validation_images=sum(item.source.role == "validation" for item in training.items),
        validation_loss=validation_loss,
        buckets=buckets,
        mean_aspect_error=sum(errors) / len(errors),
        bucket_sides=None
        if rules[0].no_upscale
        else (min(own.min_size for own in rules), max(own.max_size for own in rules)),
    )


def _folders(items: list[Item]) -> list[FolderFacts]:
    """By folder and repeats; where names are alike, the later ones are numbered, as kohya's trainer does."""
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
