"""Checks of images that can be decoded: what is wrong with them, or worth knowing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..config.sections import MaskKind
from ..data.buckets import Placement
from ..data.decoding import SUFFIXES
from ..data.examine import ExaminedImage
from ..data.findings import Finding, findings_from
from ..data.image_facts import ImageFacts
from ..data.sources import Source
from ..files import printable
from .duplicates import FLAT, HASH_BITS, exact_groups, near_pairs

DARK = 8.0
"""Mean grey level, of 255, below which hardly anything can be seen."""
ENLARGED = 1.1
"""Factor, along a side, by which an image may be enlarged for its bucket."""
CUT_OFF = 0.25
"""Share of an image's area that a crop may remove."""
FEW, MANY = 5, 1000
"""Numbers of training images below and above which a set has a finding."""
_GREY = ("1", "L", "LA", "I", "F")


def enlargement(facts: ImageFacts, placement: Placement) -> float:
    """Factor by which the sides grow for the bucket; below 1 where the image is reduced."""
    return max(placement.scaled_width / facts.width, placement.scaled_height / facts.height)


def check_format(image: ExaminedImage) -> Iterator[Finding]:
    """Findings about the file: its name, orientation, frames, depth and colours."""
    facts, file = image.facts, image.source.file
    suffixes = SUFFIXES[facts.format]
    return findings_from(
        printable(file),
        (
            "image-extension",
            "warning",
            file.suffix.lower() not in suffixes and f"a {facts.format} file that ends in {file.suffix}",
            f"rename it to {file.stem}{suffixes[0]}",
        ),
        (
            "image-turned",
            "note",
            facts.orientation != 1
            and f"stored turned or mirrored (EXIF orientation {facts.orientation}) and shown upright here",
            "save it upright for programs that ignore EXIF, or use --fix",
        ),
        (
            "image-animated",
            "warning",
            facts.frames > 1 and f"{facts.frames} frames; only the first is used",
            "save the frame that you mean as an image of its own",
        ),
        (
            "image-deep",
            "note",
            facts.bits > 8 and f"{facts.bits} bits for each channel; only 8 are used",
            "save it with 8 bits if its tones come out wrong",
        ),
        (
            "image-grey",
            "note",
            (facts.mode in _GREY or facts.mode.startswith("I;16")) and "a greyscale image",
            "leave it out unless the style is greyscale",
        ),
        (
            "image-cmyk",
            "note",
            facts.mode == "CMYK" and "CMYK colours, which are converted without a profile",
            "save it as RGB if its colours come out wrong",
        ),
        (
            "image-profile",
            "note",
            facts.profile is not None and f"has the colour profile {facts.profile!r}, which is not applied",
            "convert it to sRGB if its colours matter",
        ),
    )


def check_content(image: ExaminedImage, *, background: str, masked: bool) -> Iterator[Finding]:
    """Findings about the pixels: transparency (unless it is the mask), a single colour, darkness."""
    facts = image.facts
    look = "remove it, or check whether it was saved as you meant"
    return findings_from(
        printable(image.source.file),
        (
            "image-alpha",
            "note",
            facts.alpha == "used"
            and not masked
            and f"has transparency ({facts.transparent:.1%} of it fully transparent), composited on {background}",
            'set data.alpha_background to another colour, or data.mask = "alpha" to leave transparent parts out of the '
            "loss",
        ),
        (
            "image-hidden-colour",
            "note",
            facts.hidden_colour
            and f"colours under the {facts.transparent:.1%} of it that is fully transparent; programs that drop alpha "
            "show them",
            "save it without them if you use it elsewhere; here they are not seen",
        ),
        (
            "image-flat",
            "warning",
            facts.spread < FLAT and f"one colour all over (its channels vary by {facts.spread:.1f} of 255)",
            look,
        ),
        (
            "image-dark",
            "warning",
            facts.spread >= FLAT and facts.mean < DARK and f"nearly black (mean level {facts.mean:.1f} of 255)",
            look,
        ),
    )


def check_placement(image: ExaminedImage, placement: Placement) -> Iterator[Finding]:
    """Findings about scaling and cropping for the bucket."""
    size, bucket = f"{image.width} x {image.height}", f"{placement.width} x {placement.height}"
    factor = enlargement(image.facts, placement)
    return findings_from(
        printable(image.source.file),
        (
            "image-small",
            "warning",
            factor > ENLARGED and f"{size} pixels, enlarged {factor:.1f} times for its bucket of {bucket}",
            "use a larger version, lower data.resolution, or set data.bucket_no_upscale = true",
        ),
        (
            "image-cropped",
            "warning",
            placement.cut_off > CUT_OFF
            and f"{size} pixels, of which its bucket of {bucket} cuts off {placement.cut_off:.0%}",
            "crop it to what matters, closer to the shape of a bucket in the table",
        ),
    )


def check_mask(image: ExaminedImage, kind: MaskKind) -> Iterator[Finding]:
    """Findings about the mask of an image that is trained on; missing mask files are reported by the listing."""
    if image.source.role == "validation":
        return
    file, empty = image.source.file, image.mask is not None and image.mask.empty
    if kind == "alpha":
        yield from findings_from(
            printable(file),
            (
                "mask-missing",
                "warning",
                image.facts.alpha != "used" and "no transparency to use as its mask, so all of it counts",
                "make transparent what does not count",
            ),
            ("mask-empty", "error", empty and "fully transparent: nothing of it would be trained on", "remove it"),
        )
    elif kind == "files":
        yield from findings_from(
            printable(image.source.mask or file),
            (
                "mask-empty",
                "error",
                empty and "the mask is black all over: nothing of the image would be trained on",
                "paint white what counts, or remove the image",
            ),
        )


def check_duplicates(images: Sequence[ExaminedImage]) -> Iterator[Finding]:
    """Findings about images that are the same, or nearly so, and validation images that are trained on."""
    facts = [image.facts for image in images]
    for first, *others in exact_groups(facts):
        for other in others:
            yield from _same(images[first].source, images[other].source, None)
    for pair in near_pairs(facts):
        yield from _same(images[pair.first].source, images[pair.second].source, pair.bits)


def _same(first: Source, second: Source, bits: int | None) -> Iterator[Finding]:
    """The finding for two images that are the same, or whose hashes differ in ``bits``."""
    if os.path.realpath(first.file) == os.path.realpath(second.file):
        return iter(())
    near = bits is not None
    difference = f" ({bits} of {HASH_BITS} bits of their perceptual hashes differ)" if near else ""
    if {first.role, second.role} == {"train", "validation"}:
        trained, held_out = (first, second) if first.role == "train" else (second, first)
        same = f"{'nearly ' * near}the same image as {printable(trained.file)}, which is trained on{difference}"
        remedy = "remove one of them; otherwise the validation loss means nothing"
        return findings_from(printable(held_out.file), ("validation-in-training", "warning", same, remedy))
    captions_differ = not near and first.captions != second.captions
    same = f"the same image as {printable(first.file)}"
    return findings_from(
        printable(second.file),
        (
            "image-near-duplicate",
            "warning",
            near and f"nearly {same}{difference}",
            "keep the better one, or it counts twice",
        ),
        (
            "image-duplicate-captions",
            "warning",
            captions_differ and f"{same}, with another caption",
            "remove one of them, or write both captions as lines of one file",
        ),
        (
            "image-duplicate",
            "warning",
            not (near or captions_differ) and same,
            "remove one of them, or it counts twice",
        ),
    )


def check_size_of_set(count: int, place: str) -> Iterator[Finding]:
    """A finding where there are too few of ``count`` training images to learn from, or more than anyone checks."""
    advice = "to train on; a style needs 5 to 100"
    return findings_from(
        place,
        (
            "set-small",
            "warning",
            0 < count < FEW and f"{count} image{'s' * (count > 1)} {advice}",
            "add more, or expect the LoRA to repeat these",
        ),
        (
            "set-large",
            "note",
            count > MANY and f"{count:,} images {advice}",
            "choose the best of them, or make sure that train.steps shows each often enough",
        ),
    )
