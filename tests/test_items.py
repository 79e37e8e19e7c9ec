"""Images that are decoded once, and the digest of everything that affects training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora.config.sections import DataSection, SetSection
from sdlora.data.decoding import ImageError
from sdlora.data.examine import dataset_digest
from sdlora.data.image_facts import examine_image
from sdlora.data.images import open_alpha, open_image
from sdlora.data.kept_images import KeptImages
from sdlora.data.sources import find_sources
from tests.conftest import write_images
from tests.sets import examined, listed, put


def test_images_are_decoded_upright_and_in_order(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 9, sizes=((40, 20), (30, 60)))
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "4.png", exif=exif)
    Image.new("RGBA", (5, 7), (255, 0, 0, 0)).save(folder / "5.png")
    images, findings = examined(listed(folder))
    assert findings == ()
    assert [image.source.name for image in images] == [f"{i}.png" for i in range(9)]
    sizes = [(40, 20), (30, 60)] * 5
    sizes[4:6] = [(20, 40), (5, 7)]
    assert [(image.width, image.height) for image in images] == sizes[:9]
    assert [open_alpha(image.source.file) is not None for image in images] == [i == 5 for i in range(9)]


def test_an_image_that_cannot_be_decoded_is_a_finding(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 4)
    put(folder / "2.png", (folder / "2.png").read_bytes()[:70])
    put(folder / "3.png", "text")
    images, findings = examined(listed(folder))
    assert [image.source.name for image in images] == ["0.png", "1.png"]
    assert [Path(finding.file or "").name for finding in findings] == ["2.png", "3.png"]
    assert {finding.severity for finding in findings} == {"error"}


class Counted:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.total = total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def test_an_image_in_two_sets_is_decoded_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3)
    section = SetSection(images=str(folder))
    listing = find_sources(DataSection(sets=(section, section), trigger="zorb"))
    progress = Counted()
    images, _ = examined(listing, progress=progress)
    assert (progress.total, progress.done) == (3, 3)
    assert [image.source.set_number for image in images] == [0, 0, 0, 1, 1, 1]
    assert images[0].facts.digest == images[3].facts.digest


def digests(folder: Path, **settings: Any) -> tuple[str, ...]:
    images, _ = examined(listed(folder, **settings), mask=settings.get("mask", "none"))
    return tuple(f"{image.facts.digest} {image.mask and image.mask.digest}" for image in images)


def test_digests_of_images_cover_what_is_shown_and_what_is_weighted(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(put(tmp_path / "a.png", b"x")), put(tmp_path / "a.txt", "a")
    put(tmp_path / "mask" / "a.png")
    plain, weighted, masked = digests(tmp_path), digests(tmp_path, mask="alpha"), digests(tmp_path, mask="files")
    assert len({plain, weighted, masked}) == 3
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "a.png")
    assert digests(tmp_path) == plain, "colour that nothing shows"
    (image,), _ = examined(listed(tmp_path))
    assert image.shown_digest("#000000") != image.shown_digest("#ffffff")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    assert digests(tmp_path) != plain, "what looks the same on white alone"
    assert digests(tmp_path, mask="alpha") != weighted
    (image,), _ = examined(listed(tmp_path))
    assert image.shown_digest("#000000") == image.shown_digest("#ffffff")
    clear.save(tmp_path / "a.png")
    Image.new("L", (8, 8), 9).save(tmp_path / "mask" / "a.png")
    edited = digests(tmp_path, mask="files")
    assert edited != masked
    assert edited[0].split()[0] == masked[0].split()[0], "the image, by which its latents are found, is as it was"


def test_the_digest_of_a_dataset_changes_with_whatever_affects_training(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3)
    section = SetSection(images=str(folder))

    def digest(section: SetSection = section, **settings: Any) -> str:
        data = DataSection(**{"sets": (section,), "trigger": "zorb", **settings})
        return dataset_digest(examined(find_sources(data))[0])

    before = digest()
    assert digest() == before
    changes: list[Callable[[], str]] = [
        lambda: digest(trigger="blup"),
        lambda: digest(section.model_copy(update={"repeats": 2})),
        lambda: digest(section.model_copy(update={"loss_weight": 0.5})),
        lambda: digest(section.model_copy(update={"keep_tokens": 1})),
        lambda: digest(caption_replace=(("thing", "being"),)),
        lambda: digest(tag_dropout=0.5),
    ]
    seen = {before, *(change() for change in changes)}
    (folder / "1.txt").write_text("something else")
    seen.add(digest())
    pixels = np.asarray(Image.open(folder / "2.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    seen.add(digest())
    (folder / "2.png").rename(folder / "9.png"), (folder / "2.txt").rename(folder / "9.txt")
    seen.add(digest())
    assert len(seen) == 1 + len(changes) + 3
    last = digest()
    folder.rename(tmp_path / "moved")
    assert digest(SetSection(images=str(tmp_path / "moved"))) == last, "where the folder lies"


def test_kept_images_are_those_that_opening_the_file_yields(tmp_path: Path) -> None:
    half = Image.linear_gradient("L").resize((40, 20))
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, mode, options in (
        ("rgb.png", "RGB", {}),
        ("clear.png", "RGBA", {}),
        ("film.gif", "P", {"save_all": True, "append_images": [Image.new("RGB", (40, 20), "blue")]}),
        ("film.webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 20), "blue")]}),
        ("turned.jpg", "RGB", {"exif": turned}),
    ):
        image = Image.merge("RGB", (half, half.rotate(180), half)).convert(mode)
        if mode == "RGBA":
            image.putalpha(half)
        image.save(tmp_path / name, **options)
        kept = KeptImages("#00ff00", limit=40 * 20 * 4)
        examine_image(tmp_path / name, kept)
        opened = open_image(tmp_path / name, "#00ff00")
        (tmp_path / name).unlink()
        stored = kept.open(tmp_path / name)
        assert (stored.mode, stored.size) == (opened.mode, opened.size)
        assert stored.tobytes() == opened.tobytes()
        kept.clear()
        with pytest.raises(ImageError):
            kept.open(tmp_path / name)


def test_images_are_kept_up_to_a_limit(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3)
    kept = KeptImages("#ffffff", limit=2 * 64 * 64 * 4)
    files = [folder / f"{number}.png" for number in range(3)]
    for file in files:
        examine_image(file, kept)
    assert kept.open(files[0]) is kept.open(files[0])
    assert kept.open(files[1]) is kept.open(files[1])
    assert kept.open(files[2]) is not kept.open(files[2])
