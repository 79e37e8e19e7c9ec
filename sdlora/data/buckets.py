"""Aspect-ratio buckets: their sizes, and the bucket of each image. All sizes are whole pixels.

The sizes are those of kohya's trainer (``make_bucket_resolutions`` of sd-scripts): every width that is a multiple of the
step, with the largest height that keeps the area within ``resolution``², and each of these with sides exchanged. Under
the rule ``kohya`` an image goes into the bucket of the nearest aspect (``BucketManager.select_bucket``); under
``least-crop`` into the one that cuts off least of it, so no image loses more than under kohya's rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..config.sections import DataSection
from ..errors import ConfigError

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True, order=True)
class Placement:
    """An image is scaled to ``scaled_*``, then cropped to ``width`` × ``height`` at (left, top); all in pixels."""

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int

    @property
    def cut_off(self) -> float:
        """Share of the image's area that is not shown."""
        return 1 - self.width * self.height / (self.scaled_width * self.scaled_height)


@dataclass(frozen=True, kw_only=True)
class BucketRules:
    """How images are put into buckets at one resolution."""

    resolution: int
    """Side of a square whose area a bucket does not exceed; with ``no_upscale`` by half a pixel at most, as kohya's trainer
    rounds."""
    min_size: int
    max_size: int
    """Limits of a bucket's sides, multiples of ``step``; ignored with ``no_upscale``, as in kohya's trainer."""
    step: int
    rule: Literal["least-crop", "kohya"] = "least-crop"
    no_upscale: bool = False

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every bucket, sorted; not used with ``no_upscale``, where the image decides."""
        return _sizes(self)

    def place(self, width: int, height: int) -> Placement:
        """Placement of an image of this size, cropped about its centre."""
        return _place(self, width, height)


def bucket_rules(data: DataSection, *, resolution: int, step: int) -> tuple[BucketRules, ...]:
    """The rules for each resolution of ``data``; ``resolution`` and ``step`` are those of the base, in pixels.

    The smallest size is rounded down to the step and the largest up, as kohya's trainer does.

    Raises:
        ConfigError: sizes that contradict each other or the base; one line for each.
    """
    bucket_step = data.bucket_reso_steps or step
    problems, rules = [], []
    if bucket_step % step:
        problems.append(f"data.bucket_reso_steps = {bucket_step}: the base needs a multiple of {step}")
    for side in data.sides or (resolution,):
        least, most = (data.min_bucket_reso or side // 2, data.max_bucket_reso or side * 2)
        if not data.enable_bucket:
            least, most = side, side // bucket_step * bucket_step
        if side < bucket_step:
            problems.append(f"data.resolution = {side}: at least one step of {bucket_step} is needed")
        if least > side:
            problems.append(f"data.min_bucket_reso = {least}: greater than the resolution {side}")
        if most < side and data.enable_bucket:
            problems.append(f"data.max_bucket_reso = {most}: less than the resolution {side}")
        rules.append(
            BucketRules(
                resolution=side,
                min_size=max(bucket_step, least // bucket_step * bucket_step),
                max_size=-(-most // bucket_step) * bucket_step,
                step=bucket_step,
                rule=data.bucket_rule,
                no_upscale=data.bucket_no_upscale and data.enable_bucket,
            )
        )
    if problems:
        raise ConfigError(problems)
    return tuple(rules)


@dataclass(frozen=True, kw_only=True)
class BucketUse:
    """Number of images in a bucket, and how much of them it cuts off."""

    width: int
    height: int
    count: int
    mean_cut: float
    worst_cut: float
    """Shares of an image's area."""


def bucket_table(placements: Iterable[Placement]) -> tuple[BucketUse, ...]:
    """Every bucket that is used, sorted by width and height."""
    cuts: dict[Size, list[float]] = {}
    for placement in placements:
        cuts.setdefault((placement.width, placement.height), []).append(placement.cut_off)
    return tuple(
        BucketUse(width=w, height=h, count=len(shares), mean_cut=sum(shares) / len(shares), worst_cut=max(shares))
        for (w, h), shares in sorted(cuts.items())
    )


@lru_cache(maxsize=64)
def _sizes(rules: BucketRules) -> tuple[Size, ...]:
    area, step = rules.resolution * rules.resolution, rules.step
    square = rules.resolution // step * step
    found = {(square, square)}
    for width in range(rules.min_size, rules.max_size + 1, step):
        height = min(rules.max_size, area // width // step * step)
        if height >= rules.min_size:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


@lru_cache(maxsize=65536)
def _place(rules: BucketRules, width: int, height: int) -> Placement:
    image = (width, height)
    if rules.no_upscale:
        kohya = _kohya_shrunk(rules, image)
        if rules.rule == "kohya":
            return kohya
        largest = _sizes_within(rules, image)
        return min(kohya, _covering(image, _least_cut(largest, image)), key=lambda placement: placement.cut_off)
    choose = _nearest_aspect if rules.rule == "kohya" else _least_cut
    return _covering(image, choose(rules.sizes, image))


def _least_cut(sizes: Iterable[Size], image: Size) -> Size:
    """The bucket that cuts off least; of equals, the largest."""

    def kept(size: Size) -> tuple[float, int]:
        (width, height), area = _scaled(image, size), size[0] * size[1]
        return area / (width * height), area

    return max(sizes, key=kept)


def _covering(image: Size, bucket: Size) -> Placement:
    return _centred(_scaled(image, bucket), bucket)


def _scaled(image: Size, bucket: Size) -> Size:
    """Size of an image that just covers the bucket; in doubles with halves rounded up, which equals kohya's to the pixel."""
    width, height = image
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def _centred(scaled: Size, bucket: Size) -> Placement:
    return Placement(
        width=bucket[0],
        height=bucket[1],
        scaled_width=scaled[0],
        scaled_height=scaled[1],
        left=(scaled[0] - bucket[0]) // 2,
        top=(scaled[1] - bucket[1]) // 2,
    )


def _nearest_aspect(sizes: tuple[Size, ...], image: Size) -> Size:
    if image in sizes:
        return image
    aspect = image[0] / image[1]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def _kohya_shrunk(rules: BucketRules, image: Size) -> Placement:
    """Shrink an image that is too large until a side is a multiple of the step, and cut off the rest.

    An image that is not too large keeps its size. One that is smaller than a step, which kohya's trainer cannot use, is
    enlarged to it.
    """
    (width, height), area, step = image, rules.resolution * rules.resolution, rules.step
    scaled = image
    if width * height > area:
        aspect = width / height
        ideal = math.sqrt(area * aspect)
        by_width, by_height = _whole_steps(ideal, step), _whole_steps(area / ideal, step)
        height_then, width_then = _whole_steps(by_width / aspect, step), _whole_steps(by_height * aspect, step)
        if not (by_height and height_then and by_width and width_then):
            return _covering(image, (max(step, by_width), max(step, by_height)))
        if abs(by_width / height_then - aspect) < abs(width_then / by_height - aspect):
            scaled = (by_width, int(by_width / aspect + 0.5))
        else:
            scaled = (int(by_height * aspect + 0.5), by_height)
    bucket = (scaled[0] // step * step, scaled[1] // step * step)
    if 0 in bucket:
        return _covering(image, (max(step, bucket[0]), max(step, bucket[1])))
    return _centred(scaled, bucket)


def _whole_steps(length: float, step: int) -> int:
    return int(length + 0.5) // step * step


def _sizes_within(rules: BucketRules, image: Size) -> list[Size]:
    """Buckets that the image covers without enlargement, each as large as fits; the smallest bucket where there is none."""
    (width, height), area, step = image, rules.resolution * rules.resolution, rules.step
    found = [(wide, min(height, area // wide) // step * step) for wide in range(step, width + 1, step)]
    found += [(min(width, area // high) // step * step, high) for high in range(step, height + 1, step)]
    return [size for size in found if 0 not in size] or [(step, step)]
