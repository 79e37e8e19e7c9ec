"""Images that are decoded once, and the digest of all that alters training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.config.sections import DataSection, SetSection
from sdlora.data.images import open_alpha
from sdlora.data.items import dataset_digest, load_items
from sdlora.data.sources import find_sources
from tests.conftest import write_images
from tests.sets import listed, loaded, put


def test_items_are_decoded_upright_and_in_order(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 9, sizes=((40, 20), (30, 60)))
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "4.png", exif=exif)
    Image.new("RGBA", (5, 7), (255, 0, 0, 0)).save(folder / "5.png")
    items, findings = loaded(listed(folder))
    assert findings == ()
    assert [item.source.name for item in items] == [f"{i}.png" for i in range(9)]
    sizes = [(40, 20), (30, 60)] * 5
    sizes[4:6] = [(20, 40), (5, 7)]
    assert [(item.width, item.height) for item in items] == sizes[:9]
    assert [open_alpha(item.source.file) is not None for item in items] == [i == 5 for i in range(9)]


def test_a_image_that_cannot_be_decoded_is_a_finding_and_no_item(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 4)
    put(folder / "2.png", (folder / "2.png").read_bytes()[:70])
    put(folder / "3.png", "text")
    items, findings = loaded(listed(folder))
    assert [item.source.name for item in items] == ["0.png", "1.png"]
    assert [Path(one.file or "").name for one in findings] == ["2.png", "3.png"]
    assert {one.severity for one in findings} == {"error"}


class Counted:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.total = total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def test_a_image_in_two_sets_is_decoded_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3)
    one = SetSection(images=str(folder))
    listing = find_sources(DataSection(sets=(one, one), trigger="zorb"))
    progress = Counted()
    items, _ = load_items(listing, background="#ffffff", mask="none", progress=progress)
    assert (progress.total, progress.done) == (3, 3)
    assert [item.source.set_number for item in items] == [0, 0, 0, 1, 1, 1]
    assert items[0].digest == items[3].digest


def digests(folder: Path, **settings: Any) -> tuple[str, ...]:
    mask = settings.get("mask", "none")
    return tuple(f"{item.digest} {item.mask_digest}" for item in loaded(listed(folder, **settings), mask=mask)[0])


def test_digests_of_images_cover_what_is_shown_and_what_is_weighted(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(put(tmp_path / "a.png", b"x")), put(tmp_path / "a.txt", "a")
    put(tmp_path / "mask" / "a.png")
    plain, weighted, masked = digests(tmp_path), digests(tmp_path, mask="alpha"), digests(tmp_path, mask="files")
    assert len({plain, weighted, masked}) == 3
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "a.png")
    assert digests(tmp_path) == plain, "colour that nothing shows"
    listing = listed(tmp_path)
    assert load_items(listing, background="#000000", mask="none")[0][0].digest != plain[0].split()[0]
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    assert digests(tmp_path) == plain, "what transparency on white looks like"
    assert digests(tmp_path, mask="alpha") != weighted
    Image.new("L", (8, 8), 9).save(tmp_path / "mask" / "a.png")
    edited = digests(tmp_path, mask="files")
    assert edited != masked
    assert edited[0].split()[0] == masked[0].split()[0], "the image, by which its latents are found, is as it was"


def test_the_digest_of_a_dataset_tells_apart_whatever_alters_training(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3)
    one = SetSection(images=str(folder))

    def digest(one: SetSection = one, **settings: Any) -> str:
        return dataset_digest(loaded(find_sources(DataSection(**{"sets": (one,), "trigger": "zorb", **settings})))[0])

    before = digest()
    assert digest() == before
    changes: list[Callable[[], str]] = [
        lambda: digest(trigger="blup"),
        lambda: digest(one.model_copy(update={"repeats": 2})),
        lambda: digest(one.model_copy(update={"loss_weight": 0.5})),
        lambda: digest(one.model_copy(update={"keep_tokens": 1})),
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
