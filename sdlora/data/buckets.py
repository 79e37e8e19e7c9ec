"""Aspect-ratio buckets: which sizes are trained, and which picture goes where. Whole numbers of pixels throughout."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ASPECT = 2
"""A bucket is at most this many times longer than wide."""


@dataclass(frozen=True, kw_only=True, order=True)
class Placement:
    """A picture is scaled to ``scaled_*``, then ``width`` × ``height`` is cut out at (left, top)."""

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes (width, height): multiples of ``step``, of at most ``resolution``² pixels, each as large as fits.

    The square is always among them; sorted by aspect.
    """
    area, sizes = resolution * resolution, set()
    square = max(step, resolution // step * step)
    sizes.add((square, square))
    for width in range(step, resolution * MAX_ASPECT + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= MAX_ASPECT * min(width, height):
            sizes.add((width, height))
            sizes.add((height, width))

    def is_needed(size: tuple[int, int]) -> bool:
        inside_another = any(size != other and size[0] <= other[0] and size[1] <= other[1] for other in sizes)
        return size == (square, square) or not inside_another

    largest = filter(is_needed, sizes)
    return sorted(largest, key=lambda size: (size[0] / size[1], size))


def place_in_bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> Placement:
    """Put a ``width`` × ``height`` picture where least of it is cut off; the larger bucket where that is equal.

    The picture is scaled to cover the bucket and cropped about its centre.
    """

    def kept(size: tuple[int, int]) -> float:
        # The bucket's share of the scaled picture: the smaller aspect over the larger.
        wide, high = size[0] * height, size[1] * width
        return min(wide, high) / max(wide, high)

    bucket = max(sizes, key=lambda size: (kept(size), size[0] * size[1]))
    if bucket[0] * height >= bucket[1] * width:
        scaled = (bucket[0], max(bucket[1], round(height * bucket[0] / width)))
    else:
        scaled = (max(bucket[0], round(width * bucket[1] / height)), bucket[1])
    return Placement(
        width=bucket[0],
        height=bucket[1],
        scaled_width=scaled[0],
        scaled_height=scaled[1],
        left=(scaled[0] - bucket[0]) // 2,
        top=(scaled[1] - bucket[1]) // 2,
    )
