"""Sets of images with and without faults for ``sdlora lint``, and what it finds in them."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from sdlora.config.loading import load_config
from sdlora.lint.report import LintReport
from sdlora.lint.run import lint_data, lint_dataset, linted_sections
from sdlora.progress import Silence


def noise(seed: int | str, width: int = 128, height: int = 128) -> Image.Image:
    """A different blurred image for each ``seed``."""
    number = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def add(folder: Path, name: str, image: Image.Image | None = None, caption: str | None = None, **options) -> Path:
    """An image and a caption without faults, unless others are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (noise(name) if image is None else image).save(folder / name, **options)
    stem = Path(name).stem
    (folder / f"{stem}.txt").write_text(f"zorb, a thing of kind {stem}" if caption is None else caption, "utf-8")
    return folder / name


def clean(folder: Path, count: int = 6) -> Path:
    for number in range(count):
        add(folder, f"clean{number}.png")
    return folder


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A PNG of RGB with ``bits`` for each channel, whose size need not be true."""
    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def unreadable_images(folder: Path) -> list[tuple[str, str]]:
    for name in ("empty.png", "text.png", "cut.jpg", "damaged.png", "bomb.png", "phone.heic"):
        add(folder, name.replace(".heic", ".png"))
    (folder / "phone.png").unlink()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    data = bytearray((folder / "damaged.png").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (folder / "damaged.png").write_bytes(data)
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, bytes(1000)))
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    return [
        ("image-empty", "empty.png"),
        ("image-unknown", "text.png"),
        ("image-truncated", "cut.jpg"),
        ("image-damaged", "damaged.png"),
        ("image-too-large", "bomb.png"),
        ("image-needs-package", "phone.heic"),
    ]


def odd_images(folder: Path) -> list[tuple[str, str]]:
    add(folder, "lies.jpg")
    (folder / "lies.jpg").rename(folder / "lies.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    add(folder, "turned.jpg", exif=exif)
    add(folder, "moving.gif", save_all=True, append_images=[noise("second"), noise("third")])
    add(folder, "deep.png")
    levels = np.asarray(noise("deep.png")).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    (folder / "deep.png").write_bytes(png(128, 128, 16, rows))
    add(folder, "grey.png", noise("grey").convert("L"))
    add(folder, "print.jpg", noise("print").convert("CMYK"))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    add(folder, "profile.png", icc_profile=lab)
    clear = noise("clear").convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 64, 128))
    add(folder, "clear.png", clear)
    hidden = noise("hidden").convert("RGBA")
    hidden.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 64, axis=1).repeat(128, axis=0)))
    add(folder, "hidden.png", hidden)
    add(folder, "flat.png", Image.new("RGB", (128, 128), (90, 30, 60)))
    add(folder, "dark.png", noise("dark").point(lambda level: level // 24))
    add(folder, "small.png", noise("small", 64, 64))
    add(folder, "wide.png", noise("wide", 900, 90))
    return [
        ("image-extension", "lies.png"),
        ("image-turned", "turned.jpg"),
        ("image-animated", "moving.gif"),
        ("image-deep", "deep.png"),
        ("image-grey", "grey.png"),
        ("image-cmyk", "print.jpg"),
        ("image-profile", "profile.png"),
        ("image-alpha", "clear.png"),
        ("image-alpha", "hidden.png"),
        ("image-hidden-colour", "hidden.png"),
        ("image-flat", "flat.png"),
        ("image-dark", "dark.png"),
        ("image-small", "small.png"),
        ("image-cropped", "wide.png"),
    ]


def repeated_images(folder: Path) -> list[tuple[str, str]]:
    add(folder, "one.png")
    add(folder, "one-again.png", noise("one.png"), "zorb, a thing of kind one")
    add(folder, "two.png")
    add(folder, "two-again.bmp", noise("two.png"))
    add(folder, "three.png")
    add(folder, "three-again.jpg", noise("three.png"))
    return [
        ("image-duplicate", "one.png"),  # one-again.png comes first.
        ("image-duplicate-captions", "two.png"),
        ("image-near-duplicate", "three.png"),
    ]


def faulty_captions(folder: Path) -> list[tuple[str, str]]:
    def caption(name: str, text: str) -> None:
        add(folder, f"{name}.png", caption=text)

    add(folder, "uncaptioned.png")
    (folder / "uncaptioned.txt").unlink()
    caption("blank", " \n ")
    caption("elsewhere", "zorb, a thing of its own")
    (folder / "elsewhere.txt").rename(folder / "elsewhere.caption")
    caption("latin", "")
    (folder / "latin.txt").write_bytes("zorb, ein Bär".encode("latin-1"))
    caption("endless", "zorb, " + "word " * 300)
    caption("overflow", "zorb, " + "antidisestablishmentarianism " * 100)
    caption("long", "zorb, " + "a red apple on a table " * 20)
    caption("brackets", "zorb, (a thing:1.2")
    caption("turned brackets", "zorb, a thing) of (some kind")
    caption("braces", "zorb, a {red|blue} thing")
    caption("garbled", "zorb, ein BÃ¤r")
    caption("underscores", "zorb, long_hair in the wind")
    caption("twice", "zorb, a pear, a plum, A pear")
    caption("same1", "zorb, something green")
    caption("same2", "zorb, something green")
    caption("absent", "an owl in a tree")
    caption("inword", "a zorbing ball")
    caption("capitals", "Zorb, a wolf in a wood")
    (folder / "orphan.txt").write_text("zorb, nothing")
    (folder / "drawing.psd").write_bytes(b"8BPS")
    add(folder, "collision.png")
    add(folder, "collision.jpg", noise("another"))
    return [
        ("caption-missing", "uncaptioned.png"),
        ("caption-empty", "blank.txt"),
        ("caption-extension", "elsewhere.png"),
        ("caption-not-utf8", "latin.txt"),
        ("caption-too-long", "endless.txt"),
        ("caption-overflow", "overflow.txt"),
        ("caption-long", "long.txt"),
        ("caption-brackets", "brackets.txt"),
        ("caption-brackets", "turned brackets.txt"),
        ("caption-braces", "braces.txt"),
        ("caption-garbled", "garbled.txt"),
        ("caption-underscores", "underscores.txt"),
        ("caption-tag-twice", "twice.txt"),
        ("caption-duplicate", "same1.txt"),
        ("trigger-absent", "absent.txt"),
        ("trigger-in-word", "inword.txt"),
        ("trigger-case", "capitals.txt"),
        ("caption-unused", "orphan.txt"),
        ("image-format", "drawing.psd"),
        ("stem-collision", "collision.jpg"),
        ("caption-duplicate", "collision.txt"),
    ]


CONFIG = """
[data]
trigger = "zorb"
{more}
[output]
path = "x.safetensors"
"""


def sets_toml(*sets: str, more: str = "") -> str:
    tables = "".join(f"[[data.sets]]\n{table}\n" for table in sets)
    return CONFIG.format(more=more).replace("[output]", tables + "[output]")


def linted(file: Path) -> LintReport:
    return lint_dataset(load_config(file), progress=Silence())


def lint_folder(folder: Path, *overrides: str, trigger: str | None = "zorb", **options) -> LintReport:
    return lint_data(*linted_sections([str(folder), *overrides], trigger=trigger, **options), progress=Silence())


def found_codes(report: LintReport) -> Counter[tuple[str, str | None]]:
    return Counter((finding.code, finding.file) for finding in report.findings)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
