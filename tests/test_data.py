"""A folder of pictures: what is read, and that every fault is found at once, before anything else happens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora.data.batches import BatchPlan, draw
from sdlora.data.buckets import bucket_sizes, place_in_bucket
from sdlora.data.captions import has_word, with_trigger
from sdlora.data.images import place
from sdlora.data.items import Item, dataset_digest, scan
from sdlora.errors import DataError
from tests.conftest import write_pictures


def scanned(folder: Path, trigger: str = "zorb") -> list[Item]:
    return scan(folder, trigger=trigger, caption_extension=".txt", background="#ffffff")


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a party", "art", "art, a party"),
        ("modern art, a cat", "art", "modern art, a cat"),
        ("ART deco", "art", "ART deco"),
        ("a fox (zorb)", "zorb", "a fox (zorb)"),
        ("zorbs", "zorb", "zorb, zorbs"),
        ("ein Bär", "är", "är, ein Bär"),
        ("c++ code", "c++", "c++ code"),
    ],
)
def test_trigger_is_a_word_not_a_substring(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected


@given(st.text(max_size=60), st.text(min_size=1, max_size=20).filter(lambda text: text.strip() == text))
def test_trigger_is_in_every_caption_and_added_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert has_word(once, trigger) or not trigger[0].isalnum() or not trigger[-1].isalnum()
    if has_word(once, trigger):
        assert with_trigger(once, trigger) == once


def test_pairs_pictures_with_captions(tmp_path: Path) -> None:
    items = scanned(write_pictures(tmp_path / "ü 空 a b", 3))
    assert [item.caption for item in items] == [f"zorb, a thing of kind {i}" for i in range(3)]
    assert {(item.width, item.height) for item in items} == {(64, 64)}


def test_every_fault_in_one_report(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 10)
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "2.png").write_text("not a picture")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("word " * 300)
    (folder / "5.txt").write_bytes("Bär".encode("latin-1"))
    (folder / "6.txt").write_text("  \n ")
    (folder / "7.txt").rename(folder / "7.caption")
    Image.new("RGB", (64, 64)).save(folder / "8.jpg")
    with pytest.raises(DataError) as caught:
        scanned(folder)
    problems = dict.fromkeys(caught.value.problems)
    expected = {
        "0.png": "empty file",
        "1.png": "damaged picture",
        "2.png": "not a picture",
        "3.png": "no caption; write 3.txt",
        "4.txt": "300 words",
        "5.txt": "not UTF-8",
        "6.txt": "empty; write what",
        "7.png": "found 7.caption; set data.caption_extension",
        "8.jpg": "shares its caption file with 8.png",
    }
    assert len(problems) == len(expected)
    for name, message in expected.items():
        assert [p for p in problems if f"{os.sep}{name}: " in p and message in p], (name, message, problems)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scanned(tmp_path / "none")
    with pytest.raises(DataError, match="no picture among its 0 entries"):
        scanned(tmp_path)


@given(st.integers(64, 2048), st.sampled_from([8, 32, 64]))
def test_buckets_are_multiples_of_the_step_within_the_area(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert any(width == height for width, height in sizes)
    for width, height in sizes:
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution * resolution or (width, height) == (step, step)
        assert (height, width) in sizes


def test_mini_has_buckets_beside_the_square() -> None:
    assert bucket_sizes(128, 32) == [(96, 160), (128, 128), (160, 96)]


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(128, 32), (512, 64), (1024, 64), (768, 8)]))
def test_placement_covers_the_bucket_and_wastes_least(width: int, height: int, rule: tuple[int, int]) -> None:
    sizes = bucket_sizes(*rule)
    spot = place_in_bucket(width, height, sizes)
    assert (spot.width, spot.height) in sizes
    assert 0 <= spot.left <= spot.scaled_width - spot.width
    assert 0 <= spot.top <= spot.scaled_height - spot.height
    assert spot.scaled_width == spot.width or spot.scaled_height == spot.height

    def kept(bucket: tuple[int, int]) -> float:
        scale = max(bucket[0] / width, bucket[1] / height)
        return bucket[0] * bucket[1] / (width * scale * height * scale)

    assert kept((spot.width, spot.height)) >= max(map(kept, sizes)) - 1e-9


def test_placed_pixels_are_the_scaled_and_cropped_picture() -> None:
    picture = Image.new("RGB", (320, 96), "white")
    spot = place_in_bucket(320, 96, bucket_sizes(128, 32))
    pixels = place(picture, spot)
    assert tuple(pixels.shape) == (3, 96, 160)
    assert pixels.min() == pixels.max() == 1.0


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_each_picture_once(counts: list[int], batch_size: int, seed: int, epoch: int) -> None:
    numbers = iter(range(sum(counts)))
    buckets = tuple(tuple(next(numbers) for _ in range(count)) for count in counts)
    plan = BatchPlan(buckets=buckets, batch_size=batch_size, seed=seed)
    batches = plan.epoch(epoch)
    assert sorted(n for batch in batches for n in batch) == list(range(sum(counts)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(any(set(batch) <= set(bucket) for bucket in buckets) for batch in batches)
    first = epoch * plan.batches_per_epoch
    assert [plan.batch(first + i) for i in range(plan.batches_per_epoch)] == list(batches)


def test_epochs_and_seeds_differ() -> None:
    plan = BatchPlan(buckets=(tuple(range(20)),), batch_size=4, seed=1)
    other = BatchPlan(buckets=plan.buckets, batch_size=4, seed=2)
    assert plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != other.epoch(0)


def test_draws_depend_on_nothing_but_seed_step_and_slot() -> None:
    def one(step: int, slot: int, seed: int = 3):
        return draw(seed=seed, step=step, slot=slot, slots=4, shape=(4, 8, 8), timesteps=1000, caption_dropout=0.5)

    again = one(5, 2)
    assert np.array_equal(one(5, 2).noise, again.noise)
    for other in (one(6, 2), one(5, 3), one(5, 2, seed=4)):
        assert not np.array_equal(other.noise, again.noise)
    assert not np.array_equal(again.noise, again.posterior)


def test_timesteps_are_spread_evenly_and_reach_both_ends() -> None:
    drawn = [
        draw(seed=0, step=step, slot=slot, slots=4, shape=(1,), timesteps=1000, caption_dropout=0.25)
        for step in range(500)
        for slot in range(4)
    ]
    counts = np.histogram([d.timestep for d in drawn], bins=10, range=(0, 1000))[0]
    assert counts.min() > 150
    assert counts.max() < 250
    assert min(d.timestep for d in drawn) < 5
    assert max(d.timestep for d in drawn) > 994
    assert 0.2 < np.mean([d.drop_caption for d in drawn]) < 0.3


def test_digest_tells_pixels_and_captions_apart(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3)
    before = dataset_digest(scanned(folder))
    assert dataset_digest(scanned(folder)) == before
    (folder / "1.txt").write_text("something else")
    changed = dataset_digest(scanned(folder))
    assert changed != before
    pixels = np.asarray(Image.open(folder / "2.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    assert dataset_digest(scanned(folder)) not in (before, changed)
