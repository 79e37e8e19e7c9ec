"""Images that are the same or nearly the same are found, and others are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.data.image_facts import examine_image
from sdlora.lint.duplicates import exact_groups, near_pairs, perceptual_hashes
from tests.drawn import noise


def direct_hash(grey: np.ndarray) -> np.ndarray:
    """The perceptual hash by its definition, in float64, term by term."""
    side = len(grey)
    bits = []
    for u in range(16):
        for v in range(16):
            total = 0.0
            for y in range(side):
                wave = np.cos(np.pi * (2 * y + 1) * u / (2 * side))
                total += float((grey[y] * wave * np.cos(np.pi * (2 * np.arange(side) + 1) * v / (2 * side))).sum())
            bits.append(total)
    rest = np.array(bits[1:])
    return np.concatenate([[False], rest > np.median(rest)])


def test_perceptual_hash_is_the_cosine_transform() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    ours = np.unpackbits(perceptual_hashes(grey.reshape(2, -1)).view(np.uint8), axis=1).astype(bool)
    assert not ours[:, 0].any()
    for bits, image in zip(ours, grey, strict=True):
        assert (bits != direct_hash(image.astype(np.float64))).sum() <= 1


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    originals = [noise(256, 192, seed) for seed in range(12)]
    files = []

    def add(image: Image.Image, name: str, **options) -> None:
        image.save(tmp_path / name, **options)
        files.append(tmp_path / name)

    for number, image in enumerate(originals):
        add(image, f"{number}.png")
    add(originals[0].resize((128, 96), Image.Resampling.LANCZOS), "smaller.png")
    add(originals[1], "again.jpg", quality=60)
    add(originals[2].point(lambda level: min(255, round(level * 1.1))), "brighter.png")
    add(originals[3].crop((4, 3, 252, 189)), "cropped.png")
    add(originals[4], "same.bmp")
    add(originals[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT), "mirrored.png")
    add(Image.new("RGB", (64, 64), "red"), "red.png")
    add(Image.new("RGB", (64, 64), "blue"), "blue.png")
    facts = [examine_image(file) for file in files]
    assert exact_groups(facts) == [(4, files.index(tmp_path / "same.bmp"))]
    pairs = {(files[pair.first].name, files[pair.second].name) for pair in near_pairs(facts)}
    assert pairs == {
        *(("0.png", "smaller.png"), ("1.png", "again.jpg"), ("2.png", "brighter.png"), ("3.png", "cropped.png")),
    }


def test_equal_hashes_alone_make_no_duplicates(tmp_path: Path) -> None:
    # Coefficients on the same sides of their median, but of different sizes: one hash, two images.
    waves = np.cos(np.pi * (2 * np.arange(32)[None] + 1) * np.arange(32)[:, None] / 64)
    waves *= np.where(np.arange(32)[:, None] == 0, 1, np.sqrt(2)) / np.sqrt(32)
    rng = np.random.default_rng(0)

    def drawn(signs: np.ndarray) -> np.ndarray:
        sizes = np.zeros((32, 32))
        sizes[:16, :16] = signs * (0.2 + rng.exponential(1, (16, 16)) ** 2)
        image = waves.T @ sizes @ waves
        return (128 + image / np.abs(image).max() * 120).round().astype(np.uint8)

    signs = np.where(rng.permutation(256).reshape(16, 16) < 128, -1, 1)
    other, original = drawn(signs), drawn(signs)
    again = (original + rng.integers(-2, 3, original.shape)).clip(0, 255).astype(np.uint8)
    facts = []
    for number, levels in enumerate((other, original, again)):
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
        facts.append(examine_image(tmp_path / f"{number}.png"))
    hashes = perceptual_hashes(np.stack([np.frombuffer(image.thumbnail, np.uint8) for image in facts]))
    assert np.bitwise_count(hashes[0] ^ hashes[2]).sum() < 64
    assert [(pair.first, pair.second) for pair in near_pairs(facts)] == [(1, 2)]


def test_a_film_makes_as_many_pairs_as_frames(tmp_path: Path) -> None:
    image = np.asarray(noise(64, 64)).astype(int)
    rng = np.random.default_rng(1)
    facts = []
    for number in range(40):
        frame = Image.fromarray((image + rng.integers(-3, 4, image.shape)).clip(0, 255).astype(np.uint8))
        frame.save(tmp_path / f"{number}.png")
        facts.append(examine_image(tmp_path / f"{number}.png"))
    assert [(pair.first, pair.second) for pair in near_pairs(facts)] == [(0, number) for number in range(1, 40)]
