"""What is said of image files that cannot be read: cut, damaged, of another kind, or too large."""

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
from PIL import Image

from sdlora.data import decoding
from sdlora.data.decoding import ImageError
from sdlora.data.image_facts import examine_image
from sdlora.data.images import open_image
from tests.drawn import ALWAYS, noise, quadrants


def fault_of(file: Path) -> str:
    """The code with which ``file`` is refused by both readers."""
    codes = []
    for reader in (examine_image, open_image):
        with pytest.raises(ImageError) as caught:
            reader(file)
        assert caught.value.finding.file == str(file)
        assert caught.value.finding.remedy
        assert str(caught.value).startswith(f"{file}: ")
        codes.append(caught.value.finding.code)
    assert codes[0] == codes[1]
    return codes[0]


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
    with pytest.raises(ImageError, match=f"pip install {package}$") as caught:
        examine_image(file)
    assert caught.value.finding.code == "image-needs-package"
    decoding._has_plugin.cache_clear()


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
    assert fault_of(file) in ("image-truncated", "image-damaged", "image-unknown")


def test_a_large_jpeg_that_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (1100, 1100, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    assert examine_image(tmp_path / "x.jpg").digest == hashlib.sha256(data).hexdigest()
    for share in (0.3, 0.9, 0.99):
        (tmp_path / "x.jpg").write_bytes(data[: int(len(data) * share)])
        assert fault_of(tmp_path / "x.jpg") == "image-truncated"


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
        codes = []
        for reader in (examine_image, open_image):
            try:
                reader(file)
                codes.append(None)
            except ImageError as error:
                codes.append(error.finding.code)
    # What is looked at is what is trained on.
    assert codes[0] == codes[1]


def test_what_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert fault_of(tmp_path / "empty.png") == "image-empty"
    (tmp_path / "text.png").write_text("not an image")
    assert fault_of(tmp_path / "text.png") == "image-unknown"
    assert fault_of(tmp_path / "none.png") == "image-unreadable"
    # A format that Pillow knows and this does not promise: its reader is not even tried.
    quadrants().save(tmp_path / "x.pcx")
    (tmp_path / "x.pcx").rename(tmp_path / "pcx.png")
    assert fault_of(tmp_path / "pcx.png") == "image-unknown"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    assert fault_of(tmp_path / "x.png") == "image-unreadable"


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
        assert fault_of(tmp_path / "bomb.png") == "image-too-large"
