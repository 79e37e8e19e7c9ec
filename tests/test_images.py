"""Image files of every kind as pixels and as facts."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdlora.data import decoding
from sdlora.data.decoding import ImageError
from sdlora.data.image_facts import examine_image
from sdlora.data.images import open_image, open_mask, write_upright
from sdlora.lint.duplicates import near_pairs
from tests.drawn import ALWAYS, LOSSLESS, noise, quadrants


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    right, bottom = image.width - 6, image.height - 6
    return [image.getpixel(spot) for spot in ((5, 5), (right, 5), (5, bottom), (right, bottom))]  # ty: ignore


@pytest.mark.parametrize("kind", ALWAYS)
def test_every_format_is_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"ü 空 a b.{kind}"
    quadrants().save(file, **ALWAYS[kind])
    facts = examine_image(file)
    assert (facts.width, facts.height, facts.frames, facts.alpha, facts.orientation) == (60, 40, 1, "none", 1)
    assert file.suffix in decoding.SUFFIXES[facts.format]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert np.abs(np.array(corners(open_image(file))) - expected).max() <= (0 if kind in LOSSLESS else 12)


@pytest.mark.parametrize(("package", "suffix"), [("pillow_heif", "heic"), ("pillow_jxl", "jxl")])
def test_formats_of_plug_ins(tmp_path: Path, package: str, suffix: str) -> None:
    module = pytest.importorskip(package)
    if package == "pillow_heif":
        module.register_heif_opener()
    file = tmp_path / f"x.{suffix}"
    quadrants(64, 48).save(file, quality=95)
    assert (examine_image(file).width, examine_image(file).height) == (64, 48)
    assert np.abs(np.array(corners(open_image(file))[0]) - (255, 0, 0)).max() <= 12


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    # What undoes each orientation, by the table of the EXIF standard: where row 0 and column 0 are.
    undo = {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: p[::-1, ::-1],
        4: np.flipud,
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(48, 32)
    options = {"quality": 95} if kind in ("jpg", "avif") else {"lossless": True} if kind == "webp" else {}
    stored.save(tmp_path / f"x.{kind}", exif=exif, **options)
    expected = undo[orientation](np.asarray(stored)).astype(int)
    shown = np.asarray(open_image(tmp_path / f"x.{kind}")).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < (0.01 if kind in LOSSLESS else 10)
    facts = examine_image(tmp_path / f"x.{kind}")
    assert (facts.width, facts.height) == expected.shape[1::-1]
    assert facts.orientation == orientation
    # The thumbnail and the digest are of the upright image too.
    Image.fromarray(shown.astype(np.uint8)).save(tmp_path / "upright.png")
    upright = examine_image(tmp_path / "upright.png")
    apart = np.frombuffer(facts.thumbnail, np.uint8).astype(int) - np.frombuffer(upright.thumbnail, np.uint8)
    assert np.abs(apart).max() <= 2
    assert facts.digest == upright.digest


def test_a_large_jpeg_is_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1200, 800).save(tmp_path / "large.jpg", exif=exif)
    facts = examine_image(tmp_path / "large.jpg")
    assert (facts.width, facts.height) == (800, 1200) == open_image(tmp_path / "large.jpg").size
    open_image(tmp_path / "large.jpg").save(tmp_path / "upright.png")
    assert near_pairs([facts, examine_image(tmp_path / "upright.png")])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background_not_hidden_colour(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    file = tmp_path / "clear.png"
    image.convert(mode).save(file)
    flat = open_image(file, "#00ff00")
    assert flat.mode == "RGB"
    assert flat.getpixel((6, 4)) == (0, 255, 0)
    assert flat.getpixel((1, 4)) == (0, 0, 0)
    assert examine_image(file).alpha == "used"
    assert examine_image(file).transparent == pytest.approx(0.5)
    assert not examine_image(file).hidden_colour


def test_alpha_is_known_by_its_effect(tmp_path: Path) -> None:
    image = noise(32, 32).convert("RGBA")
    image.save(tmp_path / "opaque.png")
    image.convert("RGB").save(tmp_path / "plain.png")
    assert examine_image(tmp_path / "opaque.png").alpha == "opaque"
    assert examine_image(tmp_path / "plain.png").alpha == "none"
    assert examine_image(tmp_path / "opaque.png").digest == examine_image(tmp_path / "plain.png").digest
    image.putalpha(Image.new("L", (32, 32), 0))
    image.save(tmp_path / "hidden.png")
    facts = examine_image(tmp_path / "hidden.png")
    assert (facts.alpha, facts.transparent, facts.hidden_colour) == ("used", 1.0, True)
    # Hidden colour is not part of the image.
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert facts.digest == examine_image(tmp_path / "clear.png").digest
    assert (facts.mean, facts.spread) == (255, 0)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        values = np.asarray(open_image(tmp_path / name))[..., 0]
        assert (values.min(), values.max()) == (0, 255)
        assert len(np.unique(values)) == 256
        assert examine_image(tmp_path / name).bits == 16
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "float.tiff")
    assert np.asarray(open_image(tmp_path / "float.tiff")).max() == 255
    assert examine_image(tmp_path / "float.tiff").bits == 32


def test_sixteen_bits_of_colour(tmp_path: Path) -> None:
    # Pillow does not write these: 2 x 1 pixels, by hand.
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 0, 65535)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert np.asarray(open_image(tmp_path / "x.png")).tolist() == [[[255, 128, 0], [1, 0, 255]]]
    facts = examine_image(tmp_path / "x.png")
    assert (facts.mode, facts.bits) == ("RGB", 16)


@pytest.mark.parametrize(
    ("mode", "name"), [("1", "x.png"), ("L", "x.png"), ("P", "x.gif"), ("CMYK", "x.jpg"), ("YCbCr", "x.jpg")]
)
def test_every_mode_becomes_colour(tmp_path: Path, mode: str, name: str) -> None:
    quadrants().convert(mode).save(tmp_path / name)
    flat = open_image(tmp_path / name)
    assert (flat.mode, flat.size) == ("RGB", (60, 40))
    assert np.asarray(flat)[-6, -6].min() > 240
    assert examine_image(tmp_path / name).mode == ("RGB" if mode == "YCbCr" else mode)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tiff"])
def test_the_first_of_several_frames(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name == "x.webp" else {}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert examine_image(tmp_path / name).frames == 3
    assert open_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_a_profile_is_named_unless_it_is_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in (("srgb", srgb), ("lab", lab), ("broken", b"nothing")):
        quadrants().save(tmp_path / f"{name}.png", icc_profile=profile)
    assert examine_image(tmp_path / "srgb.png").profile is None
    assert "Lab" in (examine_image(tmp_path / "lab.png").profile or "")
    assert examine_image(tmp_path / "broken.png").profile is None


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_written_upright(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 8, "a description"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise(48, 32).save(tmp_path / f"x.{kind}", exif=exif, icc_profile=srgb)
    assert write_upright(tmp_path / f"x.{kind}", tmp_path / f"y.{kind}")
    before, after = examine_image(tmp_path / f"x.{kind}"), examine_image(tmp_path / f"y.{kind}")
    assert (after.width, after.height, after.orientation, after.format) == (32, 48, 1, before.format)
    if kind in LOSSLESS:
        assert after.digest == before.digest
    apart = np.asarray(open_image(tmp_path / f"x.{kind}")).astype(int) - open_image(tmp_path / f"y.{kind}")
    assert np.abs(apart).mean() < 1.5
    with Image.open(tmp_path / f"y.{kind}") as image:
        assert image.info["icc_profile"] == srgb
        assert image.getexif().get(0x0112, 1) == 1


def test_masks_from_files_and_from_alpha(tmp_path: Path) -> None:
    ramp = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(ramp).save(tmp_path / "mask.png")
    image = quadrants(3, 2)
    image.putalpha(Image.fromarray(ramp))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "x.png", exif=exif)
    file, mask = tmp_path / "x.png", tmp_path / "mask.png"
    by_file = open_mask(file, mask, (3, 2), "files")
    assert by_file is not None
    assert (by_file.dtype, by_file.shape) == (np.float32, (2, 3))
    np.testing.assert_allclose(by_file, ramp / 255, rtol=1e-6)
    np.testing.assert_allclose(open_mask(file, None, (3, 2), "alpha"), ramp[::-1, ::-1] / 255, rtol=1e-6)
    assert open_mask(file, mask, (3, 2), "none") is None
    assert open_mask(file, None, (3, 2), "files") is None
    assert open_mask(mask, None, (3, 2), "alpha") is None
    with pytest.raises(ImageError, match=r"mask.png: a mask of 3 x 2 pixels for an image of 2 x 3; ") as caught:
        open_mask(file, mask, (2, 3), "files")
    assert caught.value.finding.code == "mask-size"
