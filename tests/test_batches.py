"""What is shown when: each image as often as it should be, sizes never mixed, the same for any number of processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.config.sections import DataSection
from sdlora.data.buckets import Placement, bucket_rules
from sdlora.data.captions import CaptionRules
from sdlora.data.examine import ExaminedImage
from sdlora.data.image_facts import ImageFacts
from sdlora.data.kept_images import KeptImages
from sdlora.data.masks import mask_on_grid
from sdlora.data.sources import Role, Source
from sdlora.data.views import View, crop_positions
from sdlora.errors import DataError
from sdlora.training.batches import BatchPlan, Showing, draw, regularisation_repeats, share
from sdlora.training.training_set import Sample, TrainingSet, plan_training_set

BUCKETS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=4)
"""For each bucket, how often each of its images is shown."""


def plan_of(buckets: list[list[int]], batch_size: int, seed: int) -> BatchPlan:
    sizes = [(64 * i + 64, 64) for i, bucket in enumerate(buckets) for _ in bucket]
    repeats = [times for bucket in buckets for times in bucket]
    return BatchPlan.of(sizes, repeats=repeats, batch_size=batch_size, seed=seed)


@given(buckets=BUCKETS, batch_size=st.integers(1, 5), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_shows_each_image_as_often_as_it_should(
    buckets: list[list[int]], batch_size: int, seed: int, epoch: int
) -> None:
    plan = plan_of(buckets, batch_size, seed)
    batches = plan.epoch(epoch)
    repeats = [times for bucket in buckets for times in bucket]
    shown = [showing for batch in batches for showing in batch]
    assert Counter(showing.number for showing in shown) == Counter({n: t for n, t in enumerate(repeats) if t})
    turns = {n: set(range(epoch * t, (epoch + 1) * t)) for n, t in enumerate(repeats)}
    assert all({s.turn for s in shown if s.number == n} == expected for n, expected in turns.items())
    bucket_of = [i for i, bucket in enumerate(buckets) for _ in bucket]
    assert all(len({bucket_of[showing.number] for showing in batch}) == 1 for batch in batches)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    needed = sum(-(-sum(bucket) // batch_size) for bucket in buckets)
    assert len(batches) == plan.batches_per_epoch == needed
    first = epoch * plan.batches_per_epoch
    assert [plan.batch(first + i) for i in range(plan.batches_per_epoch)] == list(batches)


def test_epochs_and_seeds_differ() -> None:
    plan, other = (BatchPlan.of([(64, 64)] * 20, batch_size=4, seed=seed) for seed in (1, 2))
    numbers = [[s.number for batch in p.epoch(e) for s in batch] for p, e in ((plan, 0), (plan, 1), (other, 0))]
    assert numbers[0] != numbers[1]
    assert numbers[0] != numbers[2]
    assert plan.batch(0)[0] == Showing(number=numbers[0][0], turn=0)


@given(st.integers(0, 60), st.lists(st.integers(1, 12), max_size=9))
def test_regularisation_images_match_the_training_images(wanted: int, repeats: list[int]) -> None:
    times = regularisation_repeats(wanted, repeats)
    assert sum(times) == (wanted if repeats else 0)
    unseen = [n for n, t in enumerate(times) if t < repeats[n]]
    if sum(repeats) <= wanted:
        assert not unseen
        extra = [t - r for t, r in zip(times, repeats, strict=True)]
        assert extra == sorted(extra, reverse=True)
        assert not extra or max(extra) - min(extra) <= 1
    else:
        assert all(times[n] == 0 for n in unseen[1:])


def test_regularisation_as_kohyas_loop_has_it() -> None:
    """Register all with their repeats, then one more each in turn until there are enough (sd-scripts, DreamBoothDataset)."""
    for wanted, repeats in ((10, [1, 1, 1]), (23, [2, 3, 1, 1]), (3, [1, 1, 1, 1]), (7, [1])):
        counts, n, first = [0] * len(repeats), 0, True
        while n < wanted:
            for i, times in enumerate(repeats):
                counts[i] += times if first else 1
                n += times if first else 1
                if n >= wanted:
                    break
            first = False
        assert list(regularisation_repeats(wanted, repeats)) == counts


@given(st.integers(0, 12), st.integers(1, 5))
def test_processes_share_a_batch_without_gap_or_double(count: int, processes: int) -> None:
    slots = [slot for process in range(processes) for slot in share(count, process=process, processes=processes)]
    assert sorted(slots) == list(range(count))


def item(number: int, *, size: tuple[int, int] = (100, 100), role: Role = "train", **more: object) -> ExaminedImage:
    rules = CaptionRules(trigger="zorb", shuffle_tags=True, wildcards=True, tag_dropout=0.3)
    fields: dict[str, object] = {
        "file": Path(f"{number}.png"), "name": f"{number}.png", "set_number": 0, "caption_file": None, "mask": None,
        "captions": (f"a {{red|blue}} thing, kind {number}, on paper", "something else, of old"), "rules": rules,
        "repeats": 1, "loss_weight": 1.0, "role": role, "resolution": (), "crop": "center", "flip": False,
    }  # fmt: skip
    source = Source(**(fields | more))  # ty: ignore[invalid-argument-type]
    facts = ImageFacts(
        width=size[0], height=size[1], format="PNG", mode="RGB", bits=8, orientation=1, frames=1, alpha="none",
        transparent=0.0, hidden_colour=False, profile=None, digest=str(number), thumbnail=b"", mean=128.0, spread=64.0,
    )  # fmt: skip
    return ExaminedImage(source=source, facts=facts, mask=None)


def training_set(items: list[ExaminedImage], *, batch_size: int = 3, seed: int = 7, **settings: object) -> TrainingSet:
    data = DataSection(images="x", trigger="zorb", **settings)  # ty: ignore[invalid-argument-type]
    rules = bucket_rules(data, resolution=64, step=16)
    shown = {key: getattr(data, key) for key in ("crop", "flip") if key in settings}
    items = [replace(image, source=replace(image.source, **shown)) for image in items]
    kept = KeptImages(data.alpha_background, limit=0)
    return plan_training_set(items, rules, kept=kept, batch_size=batch_size, seed=seed, prior_loss_weight=0.5)


EVERYTHING = {"crop": "random", "flip": True, "resolution": (64, 96)}


def mixed() -> list[ExaminedImage]:
    return [
        *(item(i, size=((100, 100), (150, 90), (60, 130))[i % 3], repeats=1 + i % 2) for i in range(5)),
        *(item(i, role="regularisation", loss_weight=2.0) for i in (5, 6)),
        *(item(i, role="validation", size=(120, 80)) for i in (7, 8)),
    ]


Shown = tuple[int, Placement, bool, str, bool]


def shown_in(step: int, slot: int, slots: int, sample: Sample) -> Shown:
    dropped = draw(
        seed=7, step=step, slot=slot, slots=slots, shape=(1,), timesteps=1000, caption_dropout=0.3
    ).drop_caption
    return sample.view.item, sample.view.placement, sample.view.flipped, sample.caption, dropped


def sequence(steps: range, *, processes: int) -> list[list[Shown]]:
    """What all processes together show, as each of them, knowing nothing but the step and its number, would say it."""
    batches: list[dict[int, Shown]] = [{} for _ in steps]
    for process in range(processes):
        training = training_set(mixed(), **EVERYTHING)
        for shown, step in zip(batches, steps, strict=True):
            samples = training.batch(step)
            for slot in share(len(samples), process=process, processes=processes):
                shown[slot] = shown_in(step, slot, len(samples), samples[slot])
    return [[batch[slot] for slot in sorted(batch)] for batch in batches]


STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted() -> list[list[Shown]]:
    return sequence(range(STEPS), processes=1)


@settings(max_examples=12)
@given(start=st.integers(0, STEPS - 1), processes=st.sampled_from([1, 2, 3]))
def test_the_sequence_is_the_same_for_any_processes_and_after_a_resume(
    uninterrupted: list[list[Shown]], start: int, processes: int
) -> None:
    assert sequence(range(start, STEPS), processes=processes) == uninterrupted[start:]


def test_the_sequence_has_variety(uninterrupted: list[list[Shown]]) -> None:
    shown = [entry for batch in uninterrupted for entry in batch]
    for number in range(5):
        entries = [entry for entry in shown if entry[0] == number]
        assert len({entry[2] for entry in entries}) == 2
        assert len({entry[3] for entry in entries}) > 3
    assert len({entry[1] for entry in shown if entry[0] == 1}) > 5
    assert {entry[4] for entry in shown} == {True, False}
    assert not {entry[0] for entry in shown} & {7, 8}


def test_roles_repeats_resolutions_and_weights() -> None:
    training = training_set(mixed(), **EVERYTHING)
    epoch = [training.batch(step) for step in range(training.batches.batches_per_epoch)]
    assert all(len({(s.view.placement.width, s.view.placement.height) for s in batch}) == 1 for batch in epoch)
    samples = [sample for batch in epoch for sample in batch]
    counts = Counter(sample.view.item for sample in samples)
    assert counts == Counter({0: 2, 1: 4, 2: 2, 3: 4, 4: 2, 5: 8, 6: 6})
    assert {s.weight for s in samples if s.view.item < 5} == {1.0}
    assert {s.weight for s in samples if s.view.item >= 5} == {1.0}  # 2.0 of the set, times 0.5.
    assert [(view.item, view.flipped) for view in training.validation] == [
        (7, False),
        (7, False),
        (8, False),
        (8, False),
    ]
    assert len({view.placement for view in training.validation}) == 2


def test_regularisation_is_filled_at_each_resolution_by_itself() -> None:
    training = training_set(
        [item(0, repeats=5, resolution=(64,)), item(1, repeats=2), *(item(n, role="regularisation") for n in (2, 3))],
        resolution=(64, 96),
        enable_bucket=False,
    )
    often = {(v.item, v.size[0]): t for v, t in zip(training.shown, training.batches.repeats, strict=True)}
    assert often == {(0, 64): 5, (1, 64): 2, (2, 64): 4, (3, 64): 3, (1, 96): 2, (2, 96): 1, (3, 96): 1}


def test_views_are_those_that_are_shown_and_no_others() -> None:
    training = training_set(mixed(), **EVERYTHING)
    for steps in (1, 5, 1200):
        shown = {sample.view for step in range(steps) for sample in training.batch(step)}
        views = training.views(steps)
        assert set(views) == shown
        assert len(views) == len(shown)
        assert [view.item for view in views] == sorted(view.item for view in views)
    every = {view for entry in training.shown for view in entry.all()}
    assert set(training.views(1200)) == every
    assert len(training_set(mixed()).views(100)) == 7


def test_each_image_is_shown_as_its_set_has_it() -> None:
    training = training_set(
        [item(0, resolution=(96,), flip=True), item(1, crop="random", size=(300, 100)), item(2, resolution=(96, 64))],
        resolution=(64, 96),
        enable_bucket=False,
    )
    shown = [(views.item, views.size, views.flips, len(views.placements)) for views in training.shown]
    assert shown == [
        (0, (96, 96), True, 1),
        (1, (64, 64), False, 5),
        (1, (96, 96), False, 5),
        (2, (64, 64), False, 1),
        (2, (96, 96), False, 1),
    ]


def test_nothing_but_validation_is_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no image to train on"):
        training_set([item(0, role="validation")])


def test_salient_crops_are_placed_from_the_pixels(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "grey")
    noise = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (200, 0))
    image.save(tmp_path / "a.png")
    source = {"size": (300, 100), "file": tmp_path / "a.png"}
    for crop, expected in (("center", 64), ("salient", 116)):
        training = training_set([item(0, **source)], crop=crop, enable_bucket=False)  # ty: ignore[invalid-argument-type]
        (views,) = training.shown
        assert views.size == (64, 64)
        assert abs(views.placements[0].left - expected) <= 12


def test_draws_depend_on_nothing_but_seed_step_and_slot() -> None:
    def drawn_at(step: int, slot: int, seed: int = 3):
        return draw(seed=seed, step=step, slot=slot, slots=4, shape=(4, 8, 8), timesteps=1000, caption_dropout=0.5)

    again = drawn_at(5, 2)
    assert np.array_equal(drawn_at(5, 2).noise, again.noise)
    for other in (drawn_at(6, 2), drawn_at(5, 3), drawn_at(5, 2, seed=4)):
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


@pytest.mark.parametrize("flipped", [False, True])
def test_masks_are_exact_means_over_each_cell(flipped: bool) -> None:
    """Against the mean of an image that is enlarged so far that every edge falls between its pixels."""
    mask = np.random.default_rng(0).random((30, 50)).astype(np.float32)
    spot = Placement(width=48, height=32, scaled_width=60, scaled_height=36, left=7, top=3)
    # 60 / 50 and 36 / 30 are both 6 / 5: one pixel of the mask is 6 small ones, one that is shown 5.
    fine = mask.astype(np.float64).repeat(6, 0).repeat(6, 1)
    shown = fine[3 * 5 : (3 + 32) * 5, 7 * 5 : (7 + 48) * 5]
    expected = shown.reshape(4, 40, 6, 40).mean((1, 3))
    grid = mask_on_grid(mask, View(item=0, placement=spot, flipped=flipped), 8)
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid, expected[:, ::-1] if flipped else expected, rtol=1e-6)


@given(st.integers(1, 400), st.integers(1, 400))
def test_masks_stay_within_their_range(width: int, height: int) -> None:
    data = DataSection(images="x", trigger="zorb")
    (rules,) = bucket_rules(data, resolution=64, step=16)
    mask = np.ones((height, width), np.float32)
    for placement in crop_positions(rules.place(width, height)):
        grid = mask_on_grid(mask, View(item=0, placement=placement, flipped=False), 8)
        assert grid.shape == (placement.height // 8, placement.width // 8)
        np.testing.assert_allclose(grid, 1.0, rtol=1e-6)
