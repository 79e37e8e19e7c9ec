"""What a finished file states about its run and about the images that it was trained on."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from ..base.base import Base
from ..data.examine import ExaminedImage
from ..formats.hashes import FileHashes, file_hashes
from ..formats.metadata import safe_title
from ..lora.change import Change
from ..progress import Progress
from .metadata import DatasetFacts, FolderFacts, RunFacts, training_metadata
from .plan import RunPlan
from .rates import warmup_length

V = TypeVar("V")


def describe_run(
    plan: RunPlan,
    base: Base,
    *,
    weights: Mapping[str, Change],
    step: int,
    tokens: int,
    started_at: float,
    validation_loss: float | None,
    progress: Progress,
) -> dict[str, str]:
    """Metadata of the file of ``step``, which holds ``weights``, canonical name -> change.

    Captions were read up to ``tokens`` tokens; ``started_at`` is seconds since 1970.
    """
    section, train, batches = plan.config.base, plan.config.train, plan.batches
    run = RunFacts(
        title=safe_title(Path(plan.config.output.path).stem),
        base_name=Path(section.path).name,
        base_hashes=_hashes(section.path, progress),
        vae_name=section.vae and Path(section.vae).name,
        vae_hashes=_hashes(section.vae, progress),
        family=plan.base.family,
        prediction=base.schedule.prediction,
        resolution=plan.resolution,
        modules=len(weights),
        rank=_only(change.rank for change in weights.values()),
        alpha=_only(change.alpha for change in weights.values()),
        step=step,
        warmup_steps=warmup_length(plan.config.optimizer, steps=plan.length.planned),
        epoch=math.ceil(step / batches.batches_per_epoch),
        epochs=math.ceil(plan.epochs),
        batches_per_epoch=batches.batches_per_epoch,
        precision=str(base.dtype).removeprefix("torch."),
        clip_skip=section.clip_skip,
        token_length=tokens,
        zero_terminal_snr=plan.base.schedule.zero_terminal_snr,
        session=int(plan.identity.dataset[:8], 16) ^ train.seed,
        started_at=started_at,
        finished_at=time.time(),
    )
    return training_metadata(plan.config, run, describe_data(plan, validation_loss))


def _only(values: Iterable[V]) -> V | None:
    """The value that all of ``values`` have; None where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _hashes(path: str | None, progress: Progress) -> FileHashes | None:
    """Hashes of a checkpoint file; None for a folder."""
    return file_hashes(Path(path), progress) if path is not None and Path(path).is_file() else None


def describe_data(plan: RunPlan, validation_loss: float | None) -> DatasetFacts:
    """Facts about the images of ``plan``, without the path of any folder."""
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
