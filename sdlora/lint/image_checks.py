"""What is wrong with images that can be decoded, or worth knowing of them: one small function for each kind of fault."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.buckets import Placement
from ..data.decoding import SUFFIXES, ImageError
from ..data.findings import Finding, Severity
from ..data.image_facts import ImageFacts
from ..data.images import open_mask
from ..data.sources import Source
from ..files import printable
from .duplicates import FLAT, exact_groups, near_pairs

DARK = 8.0
"""Mean grey level, of 255, below which hardly anything is seen."""
ENLARGED = 1.1
"""Times along a side that an image may be enlarged for its bucket."""
CUT_OFF = 0.25
"""Share of an image's area that a crop may take away."""
FEW, MANY = 5, 1000
"""Images to train on, below and above which a set is told of."""
_GREY = ("1", "L", "LA", "I", "F")


@dataclass(frozen=True, kw_only=True)
class Examined:
    """An image that can be decoded."""

    source: Source
    facts: ImageFacts


def enlargement(facts: ImageFacts, placement: Placement) -> float:
    """How many times its sides grow for its bucket; below 1 where it is made smaller."""
    return max(placement.scaled_width / facts.width, placement.scaled_height / facts.height)


def check_format(own: Examined) -> Iterator[Finding]:
    """What the file is like: its name, orientation, depth, colours, frames."""
    facts, file = own.facts, own.source.file
    suffixes = SUFFIXES[facts.format]
    if file.suffix.lower() not in suffixes:
        yield _finding(
            own,
            "image-extension",
            "warning",
            f"a {facts.format} file that ends in {file.suffix}",
            f"rename it to {file.stem}{suffixes[0]}",
        )
    if facts.orientation != 1:
        yield _finding(
            own,
            "image-turned",
            "note",
            f"stored turned or mirrored (EXIF orientation {facts.orientation}) and shown upright here",
            "save it upright for programs that ignore EXIF, or use --fix",
        )
    if facts.frames > 1:
        yield _finding(
            own,
            "image-animated",
            "warning",
            f"{facts.frames} frames, of which the first is used",
            "save the frame that you mean as an image of its own",
        )
    if facts.bits > 8:
        yield _finding(
            own,
            "image-deep",
            "note",
            f"{facts.bits} bits for each channel, of which 8 are used",
            "save it with 8 bits if its tones come out wrong",
        )
    if facts.mode in _GREY or facts.mode.startswith("I;16"):
        yield _finding(
            own, "image-grey", "note", "an image of greys", "leave it out if the style has colours, else nothing"
        )
    if facts.mode == "CMYK":
        yield _finding(
            own,
            "image-cmyk",
            "note",
            "colours for print (CMYK), which are converted without a profile",
            "save it as RGB to see to its colours yourself",
        )
    if facts.profile is not None:
        yield _finding(
            own,
            "image-profile",
            "note",
            f"its colours are in the profile {facts.profile!r}, which is not applied",
            "convert it to sRGB if its colours matter",
        )


def check_content(own: Examined, *, background: str, masked: bool) -> Iterator[Finding]:
    """What is seen: transparency (unless it is the mask), one colour alone, next to nothing."""
    facts = own.facts
    if facts.alpha == "used" and not masked:
        yield _finding(
            own,
            "image-alpha",
            "note",
            f"transparent in parts ({facts.transparent:.1%} of it is not seen at all), so it is put on {background}",
            'set data.alpha_background to another colour, or data.mask = "alpha" to leave the clear parts out of the loss',
        )
    if facts.hidden_colour:
        yield _finding(
            own,
            "image-hidden-colour",
            "note",
            f"colours under the {facts.transparent:.1%} of it that are clear, which programs that drop alpha would show",
            "save it without them if you use it elsewhere; here they are not seen",
        )
    if facts.spread < FLAT:
        yield _finding(
            own,
            "image-flat",
            "warning",
            f"one colour all over (its channels vary by {facts.spread:.1f} of 255)",
            "remove it, or look whether it was saved as you meant",
        )
    elif facts.mean < DARK:
        yield _finding(
            own,
            "image-dark",
            "warning",
            f"nearly black (mean level {facts.mean:.1f} of 255)",
            "remove it, or look whether it was saved as you meant",
        )


def check_placement(own: Examined, placement: Placement) -> Iterator[Finding]:
    """What becomes of it in its bucket."""
    facts = own.facts
    size, bucket = f"{facts.width} x {facts.height}", f"{placement.width} x {placement.height}"
    if (factor := enlargement(facts, placement)) > ENLARGED:
        yield _finding(
            own,
            "image-small",
            "warning",
            f"{size} pixels, enlarged {factor:.1f} times for its bucket of {bucket}",
            "replace it by a larger one, lower data.resolution, or set data.bucket_no_upscale = true",
        )
    if placement.cut_off > CUT_OFF:
        yield _finding(
            own,
            "image-cropped",
            "warning",
            f"{size} pixels, of which its bucket of {bucket} cuts off {placement.cut_off:.0%}",
            "crop it to what matters, nearer to a shape in the table of buckets",
        )


def check_mask(own: Examined, kind: Literal["none", "alpha", "files"]) -> Iterator[Finding]:
    """What weighs its loss, where something should; that there is no file for it is told when it is listed."""
    facts, source = own.facts, own.source
    if kind == "none" or source.role == "validation":
        return
    if kind == "alpha" and facts.alpha in ("none", "opaque"):
        message, remedy = "no transparency to be its mask, so all of it counts", "make clear what does not count"
        yield _finding(own, "mask-missing", "warning", message, remedy)
        return
    try:
        mask = open_mask(source.file, source.mask, (facts.width, facts.height), kind)
    except ImageError as error:
        yield error.finding
        return
    if mask is not None and not mask.any():
        yield Finding(
            code="mask-empty",
            severity="error",
            file=printable(source.mask if kind == "files" and source.mask else source.file),
            message="its mask is black all over; nothing of the image would be trained on"
            if kind == "files"
            else "all of it is clear; nothing of it would be trained on",
            remedy="paint white what counts, or remove the image" if kind == "files" else "remove it",
        )


def check_duplicates(examined: Sequence[Examined]) -> Iterator[Finding]:
    """The same image twice, nearly the same twice, and validation images that are trained on."""
    facts = [own.facts for own in examined]
    for first, *others in exact_groups(facts):
        for other in others:
            yield from _same(examined[first], examined[other], None)
    for pair in near_pairs(facts):
        yield from _same(examined[pair.first], examined[pair.second], pair.bits)


def _same(first: Examined, second: Examined, bits: int | None) -> Iterator[Finding]:
    one, other = first.source, second.source
    if os.path.realpath(one.file) == os.path.realpath(other.file):
        return
    nearly = "" if bits is None else "nearly "
    near = "" if bits is None else f" ({bits} of 256 bits of their perceptual hashes differ)"
    if {one.role, other.role} == {"train", "validation"}:
        trained, held_out = (one, other) if one.role == "train" else (other, one)
        yield Finding(
            code="validation-in-training",
            severity="warning",
            file=printable(held_out.file),
            message=f"{nearly}the same image as {printable(trained.file)}, which is trained on{near}",
            remedy="remove one of them, or the validation loss tells nothing",
        )
    elif bits is not None:
        yield Finding(
            code="image-near-duplicate",
            severity="warning",
            file=printable(other.file),
            message=f"nearly the same image as {printable(one.file)}{near}",
            remedy="keep the better one, or it counts twice",
        )
    elif one.captions != other.captions:
        yield Finding(
            code="image-duplicate-captions",
            severity="warning",
            file=printable(other.file),
            message=f"the same image as {printable(one.file)}, with another caption",
            remedy="remove one of them, or write both captions as lines of one file",
        )
    else:
        yield Finding(
            code="image-duplicate",
            severity="warning",
            file=printable(other.file),
            message=f"the same image as {printable(one.file)}",
            remedy="remove one of them, or it counts twice",
        )


def check_size_of_set(examined: Sequence[Examined], place: str) -> Iterator[Finding]:
    """Whether there are too few images to learn from, or more than anyone looks through."""
    count = sum(own.source.role == "train" for own in examined)
    if 0 < count < FEW:
        yield Finding(
            code="set-small",
            severity="warning",
            file=place,
            message=f"{count} image{'s' * (count > 1)} to train on; a style wants 5 to 100",
            remedy="add more, or expect the LoRA to repeat these",
        )
    if count > MANY:
        yield Finding(
            code="set-large",
            severity="note",
            file=place,
            message=f"{count:,} images to train on; a style wants 5 to 100",
            remedy="choose the best of them, or see that train.steps shows each often enough",
        )


def _finding(own: Examined, code: str, severity: Severity, message: str, remedy: str) -> Finding:
    return Finding(code=code, severity=severity, file=printable(own.source.file), message=message, remedy=remedy)
