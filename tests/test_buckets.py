"""Which bucket an image gets: kohya's rule to the pixel where it is chosen, and nothing lost against it where not."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sdlora.config.sections import DataSection
from sdlora.data.buckets import BucketRules, Placement, bucket_rules, bucket_table
from sdlora.data.images import place
from sdlora.data.views import CROPS, View, ViewSet, crop_positions, salient_crop
from sdlora.errors import ConfigError

SETTINGS = [
    (512, 256, 1024, 64),
    (1024, 512, 2048, 32),
    (1024, 256, 1024, 64),
    (768, 320, 1536, 8),
    (500, 192, 832, 64),
]


def rules(resolution: int, least: int, most: int, step: int, rule: str, *, no_upscale: bool = False) -> BucketRules:
    data = DataSection(
        images="x", trigger="zorb", resolution=resolution, bucket_rule=rule, min_bucket_reso=least,  # ty: ignore[invalid-argument-type]
        max_bucket_reso=most, bucket_reso_steps=step, bucket_no_upscale=no_upscale,
    )  # fmt: skip
    (only,) = bucket_rules(data, resolution=64, step=8)
    return only


def random_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Of images: most between thumbnails and large photographs of every aspect, some exact multiples and squares."""
    rng = np.random.default_rng(seed)
    area, aspect = 10 ** rng.uniform(4.0, 7.6, count), np.exp(rng.normal(0, 0.45, count))
    sizes = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1).astype(int).clip(40, 16000)
    sizes[: count // 10] = rng.integers(1, 40, (count // 10, 2)) * 64
    sizes[count // 10 : count // 8, 1] = sizes[count // 10 : count // 8, 0]
    return [(int(width), int(height)) for width, height in sizes]


class Kohya:
    """The rule of sd-scripts, restated from its description: sizes, nearest aspect, cover; or shrink only."""

    def __init__(self, resolution: int, least: int, most: int, step: int):
        self.area, self.step = resolution**2, step
        least, most = least - least % step, math.ceil(most / step) * step
        square = resolution - resolution % step
        widths = np.arange(least, most + step, step)
        heights = np.minimum(most, self.area // widths - self.area // widths % step)
        pairs = [(int(w), int(h)) for w, h in zip(widths, heights, strict=True) if h >= least]
        self.sizes = sorted({(square, square), *pairs, *((h, w) for w, h in pairs)})
        self.aspects = np.array([w / h for w, h in self.sizes])

    def enlarging(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(bucket, scaled size)."""
        if (width, height) in self.sizes:
            bucket = (width, height)
        else:
            bucket = self.sizes[int(np.argmin(np.abs(self.aspects - width / height)))]
        wider = width / height > bucket[0] / bucket[1]
        scale = bucket[1] / height if wider else bucket[0] / width
        return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))

    def shrinking(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        scaled = (width, height)
        if width * height > self.area:
            aspect = width / height
            wide = math.sqrt(self.area * aspect)
            first = self.rounded(wide)
            second = self.rounded(self.area / wide)
            error = abs(first / self.rounded(first / aspect) - aspect)
            other = abs(self.rounded(second * aspect) / second - aspect)
            scaled = (first, int(first / aspect + 0.5)) if error < other else (int(second * aspect + 0.5), second)
        return (scaled[0] - scaled[0] % self.step, scaled[1] - scaled[1] % self.step), scaled

    def rounded(self, length: float) -> int:
        whole = int(length + 0.5)
        return whole - whole % self.step


def as_kohya_has_it(spot: Placement) -> tuple[tuple[int, int], tuple[int, int]]:
    return (spot.width, spot.height), (spot.scaled_width, spot.scaled_height)


@pytest.mark.parametrize("settings", SETTINGS)
def test_kohyas_rule_is_kohyas_to_the_pixel(settings: tuple[int, int, int, int]) -> None:
    kohya, ours = Kohya(*settings), rules(*settings, "kohya")
    assert list(ours.sizes) == kohya.sizes
    for width, height in random_sizes(10_000, seed=settings[0]):
        spot = ours.place(width, height)
        assert as_kohya_has_it(spot) == kohya.enlarging(width, height), (width, height)
        assert (spot.left, spot.top) == ((spot.scaled_width - spot.width) // 2, (spot.scaled_height - spot.height) // 2)


def test_aspects_halfway_between_two_buckets_go_where_kohya_sends_them() -> None:
    settings = (1024, 512, 2048, 64)
    kohya, ours = Kohya(*settings), rules(*settings, "kohya")
    for (w, h), (v, g) in zip(kohya.sizes, kohya.sizes[1:], strict=False):
        width, height = w * g + v * h, 2 * h * g
        assert as_kohya_has_it(ours.place(width, height)) == kohya.enlarging(width, height)


@pytest.mark.parametrize("settings", SETTINGS)
def test_kohyas_rule_without_upscaling(settings: tuple[int, int, int, int]) -> None:
    kohya, ours = Kohya(*settings), rules(*settings, "kohya", no_upscale=True)
    seen = 0
    for width, height in random_sizes(10_000, seed=settings[0]):
        try:
            expected = kohya.shrinking(width, height)
        except ZeroDivisionError:
            continue
        if 0 not in expected[0]:
            seen += 1
            assert as_kohya_has_it(ours.place(width, height)) == expected, (width, height)
    assert seen > 9000


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_default_loses_no_more_of_any_image(settings: tuple[int, int, int, int], no_upscale: bool) -> None:
    kohya = rules(*settings, "kohya", no_upscale=no_upscale)
    ours = rules(*settings, "least-crop", no_upscale=no_upscale)
    lost = np.array(
        [
            (kohya.place(width, height).cut_off, ours.place(width, height).cut_off)
            for width, height in random_sizes(2_000 if no_upscale else 10_000, seed=1)
        ]
    )
    assert (lost[:, 1] <= lost[:, 0]).all()
    assert lost[:, 1].sum() < lost[:, 0].sum()


@pytest.mark.parametrize("rule", ["kohya", "least-crop"])
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    settings=st.sampled_from(SETTINGS),
    no_upscale=st.booleans(),
)
@example(width=294, height=2352, settings=(768, 320, 1536, 8), no_upscale=True)
def test_the_bucket_lies_within_the_scaled_image(
    rule: str, width: int, height: int, settings: tuple[int, int, int, int], no_upscale: bool
) -> None:
    bucketing = rules(*settings, rule, no_upscale=no_upscale)
    spot = bucketing.place(width, height)
    assert spot.width % bucketing.step == spot.height % bucketing.step == 0
    assert 0 <= spot.left <= spot.scaled_width - spot.width
    assert 0 <= spot.top <= spot.scaled_height - spot.height
    assert 0 <= spot.cut_off < 1
    if not no_upscale:
        assert (spot.width, spot.height) in bucketing.sizes
        assert spot.scaled_width == spot.width or spot.scaled_height == spot.height
    elif min(width, height) >= bucketing.step and max(width, height) <= 8 * min(width, height):
        assert spot.scaled_width <= width
        assert spot.scaled_height <= height
        area, aspect = bucketing.resolution**2, width / height
        if width * height > area:
            # kohya's trainer rounds the ideal side to whole pixels, and the other side after it, before it cuts to steps.
            wide, high = math.sqrt(area * aspect) + 0.5, math.sqrt(area / aspect) + 0.5
            area = max(wide * (wide / aspect + 0.5), high * (high * aspect + 0.5))
        assert spot.width * spot.height <= area


@given(st.integers(64, 2048), st.sampled_from([8, 32, 64]))
def test_buckets_are_multiples_of_the_step_within_the_area(resolution: int, step: int) -> None:
    sizes = rules(resolution, resolution // 2 or 32, resolution * 2, step, "least-crop").sizes
    assert any(width == height for width, height in sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution
        assert (height, width) in sizes


def test_sizes_stay_within_the_given_sides() -> None:
    sizes = rules(1024, 640, 1280, 64, "least-crop").sizes
    assert {min(size) for size in sizes} | {max(size) for size in sizes} <= set(range(640, 1281, 64))
    assert rules(512, 300, 700, 64, "kohya").min_size == 256
    assert rules(512, 300, 700, 64, "kohya").max_size == 704


def test_several_resolutions_and_defaults() -> None:
    data = DataSection(images="x", trigger="zorb", resolution=(512, 768))
    assert [(r.resolution, r.min_size, r.max_size, r.step) for r in bucket_rules(data, resolution=64, step=64)] == [
        (512, 256, 1024, 64),
        (768, 384, 1536, 64),
    ]
    bucketing = bucket_rules(DataSection(images="x", trigger="zorb"), resolution=128, step=32)
    assert bucketing[0].sizes[:2] == ((64, 192), (64, 224))
    assert (128, 128) in bucketing[0].sizes


def test_without_buckets_there_is_the_square_alone() -> None:
    data = DataSection(images="x", trigger="zorb", enable_bucket=False, bucket_no_upscale=True, resolution=500)
    (bucketing,) = bucket_rules(data, resolution=64, step=64)
    assert bucketing.sizes == ((448, 448),)
    assert (bucketing.place(300, 100).width, bucketing.place(300, 100).height) == (448, 448)


def test_contradictions_are_reported_all_at_once() -> None:
    data = DataSection(images="x", trigger="zorb", min_bucket_reso=600, max_bucket_reso=800, bucket_reso_steps=48)
    for resolution, message in (
        (512, "data.min_bucket_reso = 600: greater than the resolution 512"),
        (1024, "data.max_bucket_reso = 800: less than the resolution 1024"),
    ):
        with pytest.raises(ConfigError) as caught:
            bucket_rules(data, resolution=resolution, step=64)
        assert caught.value.problems == ("data.bucket_reso_steps = 48: the base needs a multiple of 64", message)
    with pytest.raises(ConfigError, match=r"data\.resolution = 64: at least one step of 128"):
        bucket_rules(DataSection(images="x", trigger="zorb", resolution=64), resolution=512, step=128)


def test_the_table_says_what_is_cut_off() -> None:
    bucketing = rules(512, 256, 1024, 64, "least-crop")
    table = bucket_table(
        [bucketing.place(512, 512), bucketing.place(1000, 900), bucketing.place(1024, 1024), bucketing.place(300, 900)]
    )
    assert [(use.width, use.height, use.count) for use in table] == [(256, 832, 1), (512, 512, 3)]
    assert table[1].worst_cut == pytest.approx(1 - 512 * 512 / (569 * 512))
    assert table[1].mean_cut == pytest.approx(table[1].worst_cut / 3)


def test_placed_pixels_are_the_scaled_and_cropped_image() -> None:
    spot = rules(128, 64, 256, 32, "least-crop").place(320, 200)
    pixels = place(Image.new("RGB", (320, 200), "white"), spot)
    assert tuple(pixels.shape) == (3, 96, 160)
    assert pixels.min() == pixels.max() == 1.0


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_random_crops_are_few_and_reach_from_end_to_end(width: int, height: int) -> None:
    spot = rules(512, 256, 1024, 64, "kohya").place(width, height)
    crops = crop_positions(spot)
    room = (spot.scaled_width - spot.width, spot.scaled_height - spot.height)
    assert len(crops) == min(CROPS, max(room) + 1)
    assert spot in crops
    starts = [crop.left if room[0] >= room[1] else crop.top for crop in crops]
    assert (starts[0], starts[-1]) == (0, max(room))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("turned", [False, True])
def test_salient_crop_goes_where_the_detail_is(turned: bool) -> None:
    image = Image.new("L", (300, 100), 128)
    noise = np.random.default_rng(0).integers(0, 256, (60, 40), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (220, 20))
    image = image.convert("RGB")
    spot = Placement(width=96, height=96, scaled_width=288, scaled_height=96, left=96, top=0)
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        spot = Placement(width=96, height=96, scaled_width=96, scaled_height=288, left=0, top=96)
    found = salient_crop(image, spot)
    start = found.top if turned else found.left
    assert start <= 211
    assert start + 96 >= 250
    assert found == salient_crop(image, spot)
    flat = Image.new("RGB", image.size, "grey")
    assert salient_crop(flat, spot) == spot


def test_every_view_that_is_drawn_is_among_all_and_all_are_drawn() -> None:
    spot = rules(512, 256, 1024, 64, "kohya").place(900, 640)
    views = ViewSet(item=3, placements=crop_positions(spot), flips=True)
    assert views.size == (spot.width, spot.height)
    drawn = [views.draw(seed=5, turn=turn) for turn in range(200)]
    assert set(drawn) == set(views.all())
    assert len(views.all()) == 2 * CROPS
    assert drawn == [views.draw(seed=5, turn=turn) for turn in range(200)]
    assert drawn != [views.draw(seed=6, turn=turn) for turn in range(200)]
    assert abs(np.mean([view.flipped for view in drawn]) - 0.5) < 0.15
    still = ViewSet(item=3, placements=(spot,), flips=False)
    assert {still.draw(seed=s, turn=t) for s, t in product(range(3), range(3))} == set(still.all())


def test_a_mirrored_part_lies_at_the_other_side() -> None:
    spot = Placement(width=64, height=64, scaled_width=100, scaled_height=64, left=10, top=0)
    assert View(item=0, placement=spot, flipped=False).left == 10
    assert View(item=0, placement=spot, flipped=True).left == 26
