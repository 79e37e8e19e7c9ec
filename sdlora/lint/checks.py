"""All checks of a dataset: of its files, images, captions and triggers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.sections import DataSection
from ..data.buckets import Placement
from ..data.examine import ExaminedImage
from ..data.findings import SEVERITIES, Finding
from ..data.sources import Source
from ..files import printable
from . import caption_checks as captions
from . import image_checks as images
from .caption_checks import Vocabulary


def check_all(
    sources: Sequence[Source],
    examined: Sequence[ExaminedImage],
    placements: Sequence[Placement],
    *,
    found: Sequence[Finding],
    data: DataSection,
    vocabulary: Vocabulary,
    clip: Vocabulary,
) -> tuple[Finding, ...]:
    """What was ``found`` while files were listed and decoded, and all other findings; errors first, then by file.

    Args:
        placements: one for each of ``examined``.
        data: resolved, so that its sets are those that the sources number.
        vocabulary: of the base; the length of captions is counted in it.
        clip: CLIP's own; its order shows how common a trigger is.
    """
    findings = list(found)
    for image, placement in zip(examined, placements, strict=True):
        findings += images.check_format(image)
        findings += images.check_content(image, background=data.alpha_background, masked=data.mask == "alpha")
        findings += images.check_placement(image, placement)
        findings += images.check_mask(image, data.mask)
    findings += images.check_duplicates(examined)
    findings += _check_sets(examined, data)
    for source in sources:
        if any(source.captions):
            findings += captions.check_length(source, vocabulary, data.max_token_length)
            findings += captions.check_spelling(source)
            findings += captions.check_trigger_in(source)
    for number, section in enumerate(data.sets):
        of_set = [source for source in sources if source.set_number == number]
        findings += captions.check_absent_triggers(of_set, printable(Path(section.images)))
    findings += _check_triggers(sources, data, clip)
    order = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda finding: (order[finding.severity], finding.file or "", finding.code)))


def _check_sets(examined: Sequence[ExaminedImage], data: DataSection) -> Iterator[Finding]:
    trained = [image for image in examined if image.source.role == "train"]
    for number, section in enumerate(data.sets):
        if of_set := [image for image in trained if image.source.set_number == number]:
            yield from captions.check_repetition(_without_copies(of_set), printable(Path(section.images)))
    if trained:
        yield from images.check_size_of_set(len(trained), _folder_of(trained[0].source, data))


def _without_copies(images: Sequence[ExaminedImage]) -> list[Source]:
    """One source for each different image; copies have a finding of their own."""
    first: dict[str, Source] = {}
    for image in images:
        first.setdefault(image.facts.digest, image.source)
    return list(first.values())


def _check_triggers(sources: Sequence[Source], data: DataSection, clip: Vocabulary) -> Iterator[Finding]:
    places: dict[str, str] = {}
    for source in sources:
        if source.role == "train" and source.rules.trigger:
            places.setdefault(source.rules.trigger, _folder_of(source, data))
    for trigger, place in places.items():
        yield from captions.check_trigger(trigger, place, clip)


def _folder_of(source: Source, data: DataSection) -> str:
    return printable(Path(data.sets[source.set_number].images))
