"""Every fault of a dataset at once: the listing's, the images', the captions' and the trigger's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..config.sections import DataSection
from ..data.buckets import Placement
from ..data.decoding import ImageError
from ..data.findings import Finding
from ..data.image_facts import ImageFacts, examine
from ..data.sources import Listing, Source
from ..files import printable
from ..progress import Progress
from . import caption_checks as captions
from . import image_checks as images
from .caption_checks import Vocabulary
from .image_checks import Examined

_SEVERITIES = ("error", "warning", "note")
_AHEAD = 64
"""Images that are begun before the first of them is asked for; so many are finished when the user interrupts."""


def examine_all(sources: Sequence[Source], progress: Progress) -> tuple[tuple[Examined, ...], tuple[Finding, ...]]:
    """Decode every image once, in threads; those that cannot be decoded are findings instead.

    Only facts are kept, a kilobyte or two of each image.
    """
    files = list(dict.fromkeys(source.file for source in sources))
    progress.start("Looking at images", len(files))
    facts: dict[Path, ImageFacts] = {}
    findings: list[Finding] = []
    # As many as there are cores: more would hold more images in memory and be no faster.
    # Pillow warns of what it reads all the same; what matters of it is found otherwise.
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(0, len(files), _AHEAD):
            some = files[start : start + _AHEAD]
            for file, result in zip(some, pool.map(_examined, some), strict=True):
                if isinstance(result, Finding):
                    findings.append(result)
                else:
                    facts[file] = result
                progress.advance()
    examined = tuple(Examined(source=own, facts=facts[own.file]) for own in sources if own.file in facts)
    return examined, tuple(findings)


def lint(
    listing: Listing,
    examined: Sequence[Examined],
    placements: Sequence[Placement],
    *,
    data: DataSection,
    vocabulary: Vocabulary,
    clip: Vocabulary,
) -> tuple[Finding, ...]:
    """What ``find_sources`` found, and all that is found beyond it; errors first, then by file.

    Args:
        data: resolved, so that its sets are those that the sources number.
        placements: one for each of ``examined``.
        vocabulary: of the base, which captions are counted in.
        clip: CLIP's own, whose order tells how common a trigger is.
    """
    findings = list(listing.findings)
    trained = [own for own in examined if own.source.role != "validation"]
    for own, placement in zip(examined, placements, strict=True):
        findings += images.check_format(own)
        findings += images.check_content(own, background=data.alpha_background, masked=data.mask == "alpha")
        findings += images.check_placement(own, placement)
        findings += images.check_mask(own, data.mask)
    findings += images.check_duplicates(examined)
    for place, of_set in _by_set(data, [own.source for own in trained if own.source.role == "train"]):
        findings += captions.check_repetition(_each_image_once(examined, of_set), place)
    if trained:
        findings += images.check_size_of_set(trained, printable(Path(data.sets[trained[0].source.set_number].images)))
    for source in listing.sources:
        if any(source.captions):
            findings += captions.check_length(source, vocabulary, data.max_token_length)
            findings += captions.check_spelling(source)
            findings += captions.check_trigger_in(source)
    findings += _trigger_findings(listing.sources, data, clip)
    return tuple(
        sorted(dict.fromkeys(findings), key=lambda own: (_SEVERITIES.index(own.severity), own.file or "", own.code))
    )


def _examined(file: Path) -> ImageFacts | Finding:
    try:
        return examine(file)
    except ImageError as error:
        return error.finding


def _by_set(data: DataSection, sources: Sequence[Source]) -> Iterator[tuple[str, list[Source]]]:
    for number, one in enumerate(data.sets):
        if of_set := [source for source in sources if source.set_number == number]:
            yield printable(Path(one.images)), of_set


def _each_image_once(examined: Sequence[Examined], sources: Sequence[Source]) -> list[Source]:
    """Less the copies of an image, which are told of as such."""
    digests = {own.source.file: own.facts.digest for own in examined}
    return list({digests.get(source.file, printable(source.file)): source for source in reversed(sources)}.values())[
        ::-1
    ]


def _trigger_findings(sources: Sequence[Source], data: DataSection, clip: Vocabulary) -> Iterator[Finding]:
    places: dict[str, str] = {}
    for source in sources:
        if source.role == "train" and source.rules.trigger:
            places.setdefault(source.rules.trigger, printable(Path(data.sets[source.set_number].images)))
    for trigger, place in places.items():
        yield from captions.check_trigger(trigger, place, clip)
