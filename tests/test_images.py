"""Picture files of every kind as pixels and as facts, and what is said of those that cannot be read."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sdlora.data import decoding
from sdlora.data.decoding import PictureError
from sdlora.data.duplicates import exact_groups, near_pairs, perceptual_hashes
from sdlora.data.images import open_mask, open_picture, write_upright
from sdlora.data.picture_facts import examine

ALWAYS = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "bmp": {}, "tiff": {}, "gif": {}, "avif": {}}
LOSSLESS = ("png", "webp", "bmp", "tiff")


def quadrants(width: int = 60, height: int = 40) -> Image.Image:
    """Red, green above blue, white: told apart from each of its turns and mirror images."""
    picture = Image.new("RGB", (width, height), "red")
    picture.paste("lime", (width // 2, 0, width, height // 2))
    picture.paste("blue", (0, height // 2, width // 2, height))
    picture.paste("white", (width // 2, height // 2, width, height))
    return picture


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def corners(picture: Image.Image) -> list[tuple[int, ...]]:
    right, bottom = picture.width - 6, picture.height - 6
    return [picture.getpixel(spot) for spot in ((5, 5), (right, 5), (5, bottom), (right, bottom))]  # ty: ignore


def fault_of(file: Path) -> str:
    """The code with which ``file`` is refused by both readers."""
    codes = []
    for reader in (examine, open_picture):
        with pytest.raises(PictureError) as caught:
            reader(file)
        assert caught.value.finding.file == str(file)
        assert caught.value.finding.remedy
        assert str(caught.value).startswith(f"{file}: ")
        codes.append(caught.value.finding.code)
    assert codes[0] == codes[1]
    return codes[0]


@pytest.mark.parametrize("kind", ALWAYS)
def test_every_format_is_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"ü 空 a b.{kind}"
    quadrants().save(file, **ALWAYS[kind])
    facts = examine(file)
    assert (facts.width, facts.height, facts.frames, facts.alpha, facts.orientation) == (60, 40, 1, "none", 1)
    assert file.suffix in decoding.SUFFIXES[facts.format]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert np.abs(np.array(corners(open_picture(file))) - expected).max() <= (0 if kind in LOSSLESS else 12)


@pytest.mark.parametrize(("package", "suffix"), [("pillow_heif", "heic"), ("pillow_jxl", "jxl")])
def test_formats_of_plug_ins(tmp_path: Path, package: str, suffix: str) -> None:
    module = pytest.importorskip(package)
    if package == "pillow_heif":
        module.register_heif_opener()
    file = tmp_path / f"x.{suffix}"
    quadrants(64, 48).save(file, quality=95)
    assert (examine(file).width, examine(file).height) == (64, 48)
    assert np.abs(np.array(corners(open_picture(file))[0]) - (255, 0, 0)).max() <= 12


@pytest.mark.parametrize(
    ("head", "module", "package"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow_heif", "pillow-heif"),
        (b"\xff\x0a\xfa\x1f", "pillow_jxl", "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "pillow_jxl", "pillow-jxl-plugin"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    decoding._has_plugin.cache_clear()
    # By content: phones send HEIF files that are called .jpg.
    file = tmp_path / "x.jpg"
    file.write_bytes(head + bytes(100))
    with pytest.raises(PictureError, match=f"pip install {package}$") as caught:
        examine(file)
    assert caught.value.finding.code == "picture-needs-package"
    decoding._has_plugin.cache_clear()


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
    shown = np.asarray(open_picture(tmp_path / f"x.{kind}")).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < (0.01 if kind in LOSSLESS else 10)
    facts = examine(tmp_path / f"x.{kind}")
    assert (facts.width, facts.height) == expected.shape[1::-1]
    assert facts.orientation == orientation
    # The thumbnail and the digest are of the upright picture too.
    Image.fromarray(shown.astype(np.uint8)).save(tmp_path / "upright.png")
    upright = examine(tmp_path / "upright.png")
    apart = np.frombuffer(facts.thumbnail, np.uint8).astype(int) - np.frombuffer(upright.thumbnail, np.uint8)
    assert np.abs(apart).max() <= 2
    assert facts.digest == upright.digest


def test_a_large_jpeg_is_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1200, 800).save(tmp_path / "large.jpg", exif=exif)
    facts = examine(tmp_path / "large.jpg")
    assert (facts.width, facts.height) == (800, 1200) == open_picture(tmp_path / "large.jpg").size
    open_picture(tmp_path / "large.jpg").save(tmp_path / "upright.png")
    assert near_pairs([facts, examine(tmp_path / "upright.png")])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background_not_hidden_colour(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    file = tmp_path / "clear.png"
    picture.convert(mode).save(file)
    flat = open_picture(file, "#00ff00")
    assert flat.mode == "RGB"
    assert flat.getpixel((6, 4)) == (0, 255, 0)
    assert flat.getpixel((1, 4)) == (0, 0, 0)
    assert examine(file).alpha == "used"
    assert examine(file).transparent == pytest.approx(0.5)
    assert not examine(file).hidden_colour


def test_alpha_is_told_by_what_it_does(tmp_path: Path) -> None:
    picture = noise(32, 32).convert("RGBA")
    picture.save(tmp_path / "opaque.png")
    picture.convert("RGB").save(tmp_path / "plain.png")
    assert examine(tmp_path / "opaque.png").alpha == "opaque"
    assert examine(tmp_path / "plain.png").alpha == "none"
    assert examine(tmp_path / "opaque.png").digest == examine(tmp_path / "plain.png").digest
    picture.putalpha(Image.new("L", (32, 32), 0))
    picture.save(tmp_path / "hidden.png")
    facts = examine(tmp_path / "hidden.png")
    assert (facts.alpha, facts.transparent, facts.hidden_colour) == ("used", 1.0, True)
    # What is hidden is not part of the picture: a clear one is a white one.
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    assert facts.digest == examine(tmp_path / "white.png").digest
    assert (facts.mean, facts.spread) == (255, 0)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        values = np.asarray(open_picture(tmp_path / name))[..., 0]
        assert (values.min(), values.max()) == (0, 255)
        assert len(np.unique(values)) == 256
        assert examine(tmp_path / name).bits == 16
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "float.tiff")
    assert np.asarray(open_picture(tmp_path / "float.tiff")).max() == 255
    assert examine(tmp_path / "float.tiff").bits == 32


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
    assert np.asarray(open_picture(tmp_path / "x.png")).tolist() == [[[255, 128, 0], [1, 0, 255]]]
    facts = examine(tmp_path / "x.png")
    assert (facts.mode, facts.bits) == ("RGB", 16)


@pytest.mark.parametrize(
    ("mode", "name"), [("1", "x.png"), ("L", "x.png"), ("P", "x.gif"), ("CMYK", "x.jpg"), ("YCbCr", "x.jpg")]
)
def test_every_mode_becomes_colour(tmp_path: Path, mode: str, name: str) -> None:
    quadrants().convert(mode).save(tmp_path / name)
    flat = open_picture(tmp_path / name)
    assert (flat.mode, flat.size) == ("RGB", (60, 40))
    assert np.asarray(flat)[-6, -6].min() > 240
    assert examine(tmp_path / name).mode == ("RGB" if mode == "YCbCr" else mode)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tiff"])
def test_the_first_of_several_frames(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name == "x.webp" else {}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert examine(tmp_path / name).frames == 3
    assert open_picture(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_a_profile_is_named_unless_it_is_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in (("srgb", srgb), ("lab", lab), ("broken", b"nothing")):
        quadrants().save(tmp_path / f"{name}.png", icc_profile=profile)
    assert examine(tmp_path / "srgb.png").profile is None
    assert "Lab" in (examine(tmp_path / "lab.png").profile or "")
    assert examine(tmp_path / "broken.png").profile is None


@pytest.mark.parametrize("kind", ALWAYS)
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.02, 0.9))
def test_a_cut_file_is_never_taken_for_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, kind: str, share: float
) -> None:
    whole = io.BytesIO()
    noise(200, 150).save(whole, Image.registered_extensions()[f".{kind}"], **ALWAYS[kind])
    file = tmp_path_factory.mktemp("cut") / f"x.{kind}"
    file.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    assert fault_of(file) in ("picture-truncated", "picture-damaged", "picture-unknown")


def test_a_large_jpeg_that_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (1100, 1100, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    assert examine(tmp_path / "x.jpg").digest == hashlib.sha256(data).hexdigest()
    for share in (0.3, 0.9, 0.99):
        (tmp_path / "x.jpg").write_bytes(data[: int(len(data) * share)])
        assert fault_of(tmp_path / "x.jpg") == "picture-truncated"


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=200),
    kind=st.sampled_from([*ALWAYS, "large", "film"]),
    at=st.floats(0, 1),
)
def test_no_bytes_bring_a_reader_down(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str, at: float
) -> None:
    whole = io.BytesIO()
    if kind == "large":
        noise(520, 520).save(whole, "JPEG")
    elif kind == "film":
        form = ("GIF", "PNG", "WEBP", "TIFF")[len(data) % 4]
        quadrants().save(whole, form, save_all=True, append_images=[noise(60, 40, 1), noise(60, 40, 2)])
    else:
        quadrants().save(whole, Image.registered_extensions()[f".{kind}"])
    start = int(at * len(whole.getvalue()))
    file = tmp_path_factory.mktemp("odd") / "x"
    file.write_bytes(whole.getvalue()[:start] + data + whole.getvalue()[start + len(data) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = []
        for reader in (examine, open_picture):
            try:
                reader(file)
                told.append(None)
            except PictureError as error:
                told.append(error.finding.code)
    # What is looked at is what is trained on.
    assert told[0] == told[1]


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert fault_of(tmp_path / "empty.png") == "picture-empty"
    (tmp_path / "text.png").write_text("not a picture")
    assert fault_of(tmp_path / "text.png") == "picture-unknown"
    assert fault_of(tmp_path / "none.png") == "picture-unreadable"
    # A format that Pillow knows and this does not promise: its reader is not even tried.
    quadrants().save(tmp_path / "x.pcx")
    (tmp_path / "x.pcx").rename(tmp_path / "pcx.png")
    assert fault_of(tmp_path / "pcx.png") == "picture-unknown"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    assert fault_of(tmp_path / "x.png") == "picture-unreadable"


def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (13400, 60000):
        (tmp_path / "bomb.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b"")
        )
        assert fault_of(tmp_path / "bomb.png") == "picture-too-large"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_written_upright(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 8, "a description"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise(48, 32).save(tmp_path / f"x.{kind}", exif=exif, icc_profile=srgb)
    assert write_upright(tmp_path / f"x.{kind}", tmp_path / f"y.{kind}")
    before, after = examine(tmp_path / f"x.{kind}"), examine(tmp_path / f"y.{kind}")
    assert (after.width, after.height, after.orientation, after.format) == (32, 48, 1, before.format)
    if kind in LOSSLESS:
        assert after.digest == before.digest
    apart = np.asarray(open_picture(tmp_path / f"x.{kind}")).astype(int) - open_picture(tmp_path / f"y.{kind}")
    assert np.abs(apart).mean() < 1.5
    with Image.open(tmp_path / f"y.{kind}") as picture:
        assert picture.info["icc_profile"] == srgb
        assert picture.getexif().get(0x0112, 1) == 1


def test_masks_from_files_and_from_alpha(tmp_path: Path) -> None:
    ramp = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(ramp).save(tmp_path / "mask.png")
    picture = quadrants(3, 2)
    picture.putalpha(Image.fromarray(ramp))
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "x.png", exif=exif)
    file, mask = tmp_path / "x.png", tmp_path / "mask.png"
    by_file = open_mask(file, mask, (3, 2), "files")
    assert by_file is not None
    assert (by_file.dtype, by_file.shape) == (np.float32, (2, 3))
    np.testing.assert_allclose(by_file, ramp / 255, rtol=1e-6)
    np.testing.assert_allclose(open_mask(file, None, (3, 2), "alpha"), ramp[::-1, ::-1] / 255, rtol=1e-6)
    assert open_mask(file, mask, (3, 2), "none") is None
    assert open_mask(file, None, (3, 2), "files") is None
    assert open_mask(mask, None, (3, 2), "alpha") is None
    with pytest.raises(PictureError, match=r"mask.png: a mask of 3 x 2 pixels for a picture of 2 x 3; ") as caught:
        open_mask(file, mask, (2, 3), "files")
    assert caught.value.finding.code == "mask-size"


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
    for own, picture in zip(ours, grey, strict=True):
        assert (own != direct_hash(picture.astype(np.float64))).sum() <= 1


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    originals = [noise(256, 192, seed) for seed in range(12)]
    files = []

    def add(picture: Image.Image, name: str, **options) -> None:
        picture.save(tmp_path / name, **options)
        files.append(tmp_path / name)

    for number, picture in enumerate(originals):
        add(picture, f"{number}.png")
    add(originals[0].resize((128, 96), Image.Resampling.LANCZOS), "smaller.png")
    add(originals[1], "again.jpg", quality=60)
    add(originals[2].point(lambda level: min(255, round(level * 1.1))), "brighter.png")
    add(originals[3].crop((4, 3, 252, 189)), "cropped.png")
    add(originals[4], "same.bmp")
    add(originals[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT), "mirrored.png")
    add(Image.new("RGB", (64, 64), "red"), "red.png")
    add(Image.new("RGB", (64, 64), "blue"), "blue.png")
    facts = [examine(file) for file in files]
    assert exact_groups(facts) == [(4, files.index(tmp_path / "same.bmp"))]
    pairs = {(files[pair.first].name, files[pair.second].name) for pair in near_pairs(facts)}
    assert pairs == {
        *(("0.png", "smaller.png"), ("1.png", "again.jpg"), ("2.png", "brighter.png"), ("3.png", "cropped.png")),
    }


def test_what_is_alike_by_its_hash_alone_is_no_duplicate(tmp_path: Path) -> None:
    # Coefficients on the same sides of their median, but of other sizes: one hash, two pictures.
    waves = np.cos(np.pi * (2 * np.arange(32)[None] + 1) * np.arange(32)[:, None] / 64)
    waves *= np.where(np.arange(32)[:, None] == 0, 1, np.sqrt(2)) / np.sqrt(32)
    rng = np.random.default_rng(0)

    def drawn(signs: np.ndarray) -> np.ndarray:
        sizes = np.zeros((32, 32))
        sizes[:16, :16] = signs * (0.2 + rng.exponential(1, (16, 16)) ** 2)
        picture = waves.T @ sizes @ waves
        return (128 + picture / np.abs(picture).max() * 120).round().astype(np.uint8)

    signs = np.where(rng.permutation(256).reshape(16, 16) < 128, -1, 1)
    other, one = drawn(signs), drawn(signs)
    again = (one + rng.integers(-2, 3, one.shape)).clip(0, 255).astype(np.uint8)
    facts = []
    for number, levels in enumerate((other, one, again)):
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
        facts.append(examine(tmp_path / f"{number}.png"))
    hashes = perceptual_hashes(np.stack([np.frombuffer(own.thumbnail, np.uint8) for own in facts]))
    assert np.bitwise_count(hashes[0] ^ hashes[2]).sum() < 64
    assert [(pair.first, pair.second) for pair in near_pairs(facts)] == [(1, 2)]


def test_a_film_makes_as_many_pairs_as_frames(tmp_path: Path) -> None:
    picture = np.asarray(noise(64, 64)).astype(int)
    rng = np.random.default_rng(1)
    facts = []
    for number in range(40):
        frame = Image.fromarray((picture + rng.integers(-3, 4, picture.shape)).clip(0, 255).astype(np.uint8))
        frame.save(tmp_path / f"{number}.png")
        facts.append(examine(tmp_path / f"{number}.png"))
    assert [(pair.first, pair.second) for pair in near_pairs(facts)] == [(0, number) for number in range(1, 40)]
