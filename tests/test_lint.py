"""sdlora lint: each fault is found, named by its file and with a remedy; nothing else is; repairs; the contact sheet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import sdlora as sdlora_package
from sdlora.base.words import clip_words, words_in
from sdlora.config import load_config
from sdlora.data import decoding
from sdlora.data.images import open_picture
from sdlora.data.items import load_items
from sdlora.data.repair import _decoded as decoded_caption
from sdlora.data.repair import write_repaired
from sdlora.data.sheet import COLUMNS, GAP, VEIL, picture_as_seen, write_sheets
from sdlora.errors import DataError
from sdlora.linting import LintReport, lint_config, lint_data, linted_sections, report_lines, summary_lines
from sdlora.progress import Silence
from tests.conftest import ROOT


def noise(seed: int | str, width: int = 128, height: int = 128) -> Image.Image:
    """A blurred picture of its own for each ``seed``."""
    number = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def add(folder: Path, name: str, picture: Image.Image | None = None, caption: str | None = None, **options) -> Path:
    """A picture with a caption that is at fault in nothing, unless other ones are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (noise(name) if picture is None else picture).save(folder / name, **options)
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


def unreadable_pictures(folder: Path) -> list[tuple[str, str]]:
    for name in ("empty.png", "text.png", "cut.jpg", "damaged.png", "bomb.png", "phone.heic"):
        add(folder, name.replace(".heic", ".png"))
    (folder / "phone.png").unlink()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    data = bytearray((folder / "damaged.png").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (folder / "damaged.png").write_bytes(data)
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, bytes(1000)))
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    return [
        ("picture-empty", "empty.png"),
        ("picture-unknown", "text.png"),
        ("picture-truncated", "cut.jpg"),
        ("picture-damaged", "damaged.png"),
        ("picture-too-large", "bomb.png"),
        ("picture-needs-package", "phone.heic"),
    ]


def odd_pictures(folder: Path) -> list[tuple[str, str]]:
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
        ("picture-extension", "lies.png"),
        ("picture-turned", "turned.jpg"),
        ("picture-animated", "moving.gif"),
        ("picture-deep", "deep.png"),
        ("picture-grey", "grey.png"),
        ("picture-cmyk", "print.jpg"),
        ("picture-profile", "profile.png"),
        ("picture-alpha", "clear.png"),
        ("picture-alpha", "hidden.png"),
        ("picture-hidden-colour", "hidden.png"),
        ("picture-flat", "flat.png"),
        ("picture-dark", "dark.png"),
        ("picture-small", "small.png"),
        ("picture-cropped", "wide.png"),
    ]


def repeated_pictures(folder: Path) -> list[tuple[str, str]]:
    add(folder, "one.png")
    add(folder, "one-again.png", noise("one.png"), "zorb, a thing of kind one")
    add(folder, "two.png")
    add(folder, "two-again.bmp", noise("two.png"))
    add(folder, "three.png")
    add(folder, "three-again.jpg", noise("three.png"))
    return [
        ("picture-duplicate", "one.png"),  # one-again.png comes first.
        ("picture-duplicate-captions", "two.png"),
        ("picture-near-duplicate", "three.png"),
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
        ("picture-format", "drawing.psd"),
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
    tables = "".join(f"[[data.sets]]\n{one}\n" for one in sets)
    return CONFIG.format(more=more).replace("[output]", tables + "[output]")


def linted(file: Path) -> LintReport:
    return lint_config(load_config(file), progress=Silence())


def lint_folder(folder: Path, *overrides: str, trigger: str | None = "zorb", **options) -> LintReport:
    return lint_data(*linted_sections([str(folder), *overrides], trigger=trigger, **options), progress=Silence())


def told(report: LintReport) -> Counter[tuple[str, str | None]]:
    return Counter((finding.code, finding.file) for finding in report.findings)


def test_one_of_each_fault_is_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._has_plugin.cache_clear()
    expected: Counter[tuple[str, str | None]] = Counter()
    sets = []

    def with_set(name: str, faults: list[tuple[str, str]], options: str = "") -> None:
        folder = tmp_path / name
        sets.append(f'images = "{folder}"\n{options}')
        expected.update((code, str(folder / file) if file else str(folder)) for code, file in faults)

    for build in (unreadable_pictures, odd_pictures, repeated_pictures, faulty_captions):
        with_set(build.__name__, build(clean(tmp_path / build.__name__, 0)) if build else [])
    for number in range(3):
        add(tmp_path / "alike", f"alike{number}.png", caption="zorb, a bird")
    with_set("alike", [("caption-all-same", "")])
    for number in range(5):
        add(tmp_path / "fused", f"fused{number}.png", caption=f"zorb, blue paper, fruit of kind {number}")
    with_set("fused", [("tag-in-every-caption", "")])
    add(tmp_path / "common", "common.png", caption="art, a church")
    with_set("common", [("trigger-common", "")], 'trigger = "art"')
    add(tmp_path / "spelled", "spelled.png", caption="xqzvwkjy, a bridge")
    with_set("spelled", [("trigger-many-tokens", "")], 'trigger = "xqzvwkjy"')
    clean(tmp_path / "held out", 1)
    add(tmp_path / "held out", "leak.png", noise("two.png"))
    with_set("held out", [("validation-in-training", "leak.png")], 'role = "validation"')
    add(tmp_path / "prior" / "250_thing", "250_prior.png", caption="a thing")
    with_set("prior", [("repeats-high", "250_thing")], 'role = "regularisation"')
    with_set("nowhere", [("folder-missing", "")])
    (tmp_path / "run.toml").write_text(sets_toml(*sets), "utf-8")

    report = linted(tmp_path / "run.toml")
    assert told(report) == expected
    assert len({code for code, _ in expected}) >= 45
    assert report.has_errors
    for finding in report.findings:
        assert finding.message
        assert finding.remedy
        assert finding.message[0].lower() == finding.message[0] or finding.message.startswith(("A ", "CMYK", "EXIF"))
        assert "\n" not in str(finding)
    decoding._has_plugin.cache_clear()


def test_what_forbids_training_is_what_lint_calls_an_error(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    for build in (unreadable_pictures, odd_pictures, repeated_pictures, faulty_captions):
        build(folder)
    (folder / "mask").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "mask" / "clean1.png")
    report = lint_folder(folder, "data.mask=files")
    _, faults = load_items(report.listing, background="#ffffff", mask="files")
    refused = {(own.code, own.file) for own in (*report.listing.findings, *faults) if own.severity == "error"}
    assert len(refused) > 12
    assert {(own.code, own.file) for own in report.findings if own.severity == "error"} == refused


@pytest.mark.parametrize("name", ["ü 空 a b", "-x"])
def test_a_clean_folder_yields_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    clean(Path(name))
    report = lint_folder(Path(name))
    assert report.findings == ()
    assert report.images == 6
    assert not report.has_errors
    assert [(own.width, own.height, own.count, own.worst_cut) for own in report.buckets] == [(128, 128, 6, 0)]
    assert summary_lines(report) == ["6 pictures: nothing to complain of"]


@pytest.mark.parametrize(("name", "trigger"), [("blueprint", "blupaper"), ("pixel", "pixgrid")])
def test_the_sample_sets_are_clean(name: str, trigger: str) -> None:
    report = lint_folder(ROOT / "datasets" / name, trigger=trigger)
    assert report.findings == ()
    assert report.images == 36


def test_masks(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    (folder / "mask").mkdir()
    for number in range(5):
        Image.new("L", (128, 128), 255).save(folder / "mask" / f"clean{number}.png")
    Image.new("L", (64, 64), 255).save(folder / "mask" / "clean1.png")
    Image.new("L", (128, 128), 0).save(folder / "mask" / "clean2.png")
    (folder / "mask" / "clean3.png").write_bytes(b"x")
    found = told(lint_folder(folder, "data.mask=files"))
    assert found == Counter(
        [
            ("mask-size", str(folder / "mask" / "clean1.png")),
            ("mask-empty", str(folder / "mask" / "clean2.png")),
            ("picture-unknown", str(folder / "mask" / "clean3.png")),
            ("mask-missing", str(folder / "clean5.png")),
        ]
    )
    picture = noise("x").convert("RGBA")
    picture.putalpha(0)
    folder = clean(tmp_path / "clear", 5)
    add(folder, "none.png", picture)
    found = told(lint_folder(folder, "data.mask=alpha"))
    missing = [("mask-missing", str(folder / f"clean{number}.png")) for number in range(5)]
    none = str(folder / "none.png")
    assert found == Counter([*missing, ("mask-empty", none), ("picture-flat", none), ("picture-hidden-colour", none)])


def test_small_and_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clean(tmp_path / "set", 4)
    (finding,) = lint_folder(folder).findings
    assert (finding.code, finding.file) == ("set-small", str(folder))
    assert "4 pictures" in finding.message
    monkeypatch.setattr("sdlora.data.picture_checks.FEW", 0)
    monkeypatch.setattr("sdlora.data.picture_checks.MANY", 3)
    assert [finding.code for finding in lint_folder(folder).findings] == ["set-large"]


def test_numbers_in_the_messages(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    add(folder, "wide.png", noise("wide", 500, 100))
    add(folder, "small.png", noise("small", 64, 64))
    add(folder, "long.png", caption="zorb, " + "w " * 80)
    by_code = {finding.code: finding for finding in lint_folder(folder, resolution=128).findings}
    # The widest bucket at 128 is 256 x 64: of 500 x 100, scaled to 320 x 64, it keeps 4/5.
    assert "picture-cropped" not in by_code
    assert "64 x 64 pixels, enlarged 2.0 times for its bucket of 128 x 128" in by_code["picture-small"].message
    tokens = words_in(ROOT / "sdlora/base/mini/tokenizer").count("zorb, " + "w " * 80)
    assert f"{tokens} tokens, read in 2 pieces of 75" in by_code["caption-long"].message
    found = {f.code: f for f in lint_folder(folder, "data.max_token_length=75").findings}
    assert f"the last {tokens - 75} are not read (data.max_token_length is 75)" in found["caption-overflow"].message


def test_triggers_by_clips_own_order() -> None:
    words = clip_words()
    # The numbers of two well known tokens: "a photo of a cat" is 320 1125 539 320 2368, "sks" is 48136.
    assert words.rank("photo") == 1125 - 511
    assert words.rank("cat") == 2368 - 511
    assert words.rank("sks") == 48136 - 511
    assert words.rank("zorb") is None
    assert words.pieces("zorb") == ("zor", "b ")


@settings(deadline=None)
@given(st.text(max_size=80).filter(lambda text: "<|" not in text))
def test_words_are_those_of_transformers(text: str) -> None:
    from sdlora.base.load import clip_tokenizer

    ours = clip_words().tokenizer.encode(text, add_special_tokens=False).ids
    assert ours == clip_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids
    assert clip_words().count(text) == len(ours)


def test_without_a_trigger_captions_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    for file in folder.glob("*.txt"):
        file.write_text(f"a {file.stem}, on paper")
    report = lint_folder(folder, trigger=None)
    assert [finding.code for finding in report.findings] == ["tag-in-every-caption"]
    assert "name it as the trigger" in report.findings[0].remedy
    assert dict(report.tags)["on paper"] == 6
    assert {own.source.rules.plain(own.source.captions) for own in report.examined} == {
        f"a clean{number}, on paper" for number in range(6)
    }


def test_what_is_meant_is_no_fault(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    for number, text in enumerate((r"my_style, a smile \(drawn\)", "my_style, [red] and (blue:1.2)", "my_style, {a}")):
        add(folder, f"{number}.png", caption=text)
    for number in range(6):
        (folder / f"clean{number}.txt").write_text(f"my_style, {number}")
    assert lint_folder(folder, trigger="my_style").findings == ()
    (folder / "0.txt").write_text("my_style, {red|blue}")
    assert lint_folder(folder, "data.wildcards=true", trigger="my_style").findings == ()


def test_regularisation_pictures_need_no_trigger(tmp_path: Path) -> None:
    clean(tmp_path / "style")
    for number in range(6):
        add(tmp_path / "class", f"class{number}.png", caption=f"a picture of kind {number}")
    clean(tmp_path / "held out", 0)
    for number in range(5):
        add(tmp_path / "held out", f"held{number}.png", noise(f"held{number}", 96, 160))
    sets = [
        f'images = "{tmp_path / "style"}"',
        f'images = "{tmp_path / "class"}"\nrole = "regularisation"\ntrigger = "art"',
        f'images = "{tmp_path / "held out"}"\nrole = "validation"\ntrigger = "art"',
    ]
    (tmp_path / "run.toml").write_text(sets_toml(*sets))
    report = linted(tmp_path / "run.toml")
    assert summary_lines(report) == ["17 pictures, 6 for regularisation, 5 for validation: nothing to complain of"]
    assert sum(count for _, count in report.tags) == 6
    # Nothing is trained on validation pictures, so no bucket holds them.
    assert [(own.width, own.height, own.count) for own in report.buckets] == [(128, 128, 12)]


def test_each_set_has_its_own_resolution(tmp_path: Path) -> None:
    for name in ("small", "large"):
        for number in range(5):
            add(tmp_path / name, f"{name}{number}.png")
    sets = [f'images = "{tmp_path / name}"\nresolution = {side}' for name, side in (("small", 64), ("large", 256))]
    (tmp_path / "run.toml").write_text(sets_toml(*sets))
    report = linted(tmp_path / "run.toml")
    assert told(report) == Counter(("picture-small", str(tmp_path / "large" / f"large{n}.png")) for n in range(5))
    assert [(own.width, own.height, own.count) for own in report.buckets] == [(64, 64, 5), (256, 256, 5)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


MENDED = {
    *("picture-empty", "picture-unknown", "picture-truncated", "picture-damaged", "picture-too-large"),
    *("picture-needs-package", "picture-extension", "picture-turned", "picture-duplicate", "caption-extension"),
    *("caption-not-utf8", "trigger-absent", "trigger-in-word", "stem-collision", "caption-unused", "picture-format"),
}


def test_repairs_go_into_a_copy(sdlora, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    clean(folder)
    for build in (unreadable_pictures, odd_pictures, repeated_pictures, faulty_captions):
        build(folder)
    before = content(folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    made = sdlora("lint", "set", "--trigger", "zorb", "--fix", "--out", "copy", "--json")
    assert made.returncode == 1, made.stderr
    assert made.stderr == ""
    assert content(folder) == before
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == stamps
    answer = json.loads(made.stdout)
    codes = {finding["code"] for finding in answer["findings"]}
    # Where its package is installed, a picture that needs one is damaged like another.
    assert codes >= MENDED - {"picture-needs-package"}
    again = json.loads(sdlora("lint", "copy", "--trigger", "zorb", "--json").stdout)
    left = {finding["code"] for finding in again["findings"]}
    assert left == codes - MENDED
    assert again["images"] == answer["copy"]["pictures"] == answer["images"] - 6 - 1
    copy = content(tmp_path / "copy")
    assert copy["latin.txt"].decode() == "zorb, ein Bär\n"
    assert copy["elsewhere.txt"] == b"zorb, a thing of its own\n"
    assert copy["absent.txt"] == b"zorb, an owl in a tree\n"
    assert {"lies.jpg", "collision.jpg", "collision-png.png", "collision-png.txt"} <= set(copy)
    assert copy["clean0.png"] == before["clean0.png"]
    assert copy["lies.jpg"] == before["lies.png"]
    with Image.open(tmp_path / "copy" / "turned.jpg") as picture:
        assert picture.getexif().get(0x0112, 1) == 1
    apart = np.asarray(open_picture(tmp_path / "copy" / "turned.jpg")).astype(int) - open_picture(folder / "turned.jpg")
    assert np.abs(apart).mean() < 2
    repaired = Counter(repair["code"] for repair in answer["repairs"])
    assert repaired["picture-unreadable"] == 6
    assert (repaired["picture-duplicate"], repaired["picture-turned"], repaired["stem-collision"]) == (1, 1, 1)
    assert not list(tmp_path.glob(".copy*"))


def repair_into(report: LintReport, out: Path) -> None:
    write_repaired(report.data, report.listing.sources, report.examined, out=out, progress=Silence())


def test_a_copy_has_the_shape_of_the_dataset(tmp_path: Path) -> None:
    add(tmp_path / "a" / "10_fox", "x.png")
    add(tmp_path / "a" / "deep" / "er", "x.png", noise("other"))
    (tmp_path / "a" / "10_fox" / "mask").mkdir()
    Image.new("L", (128, 128), 255).save(tmp_path / "a" / "10_fox" / "mask" / "x.png")
    add(tmp_path / "b" / "a", "y.png", caption="a fox")
    sets = [f'images = "{tmp_path / "a"}"', f'images = "{tmp_path / "b" / "a"}"\nrole = "regularisation"']
    (tmp_path / "run.toml").write_text(sets_toml(*sets, more='mask = "files"\ncaption_extension = "caption"'))
    for file in tmp_path.rglob("*.txt"):
        file.rename(file.with_suffix(".caption"))
    repair_into(linted(tmp_path / "run.toml"), tmp_path / "copy")
    assert set(content(tmp_path / "copy")) == {
        *("1-a/10_fox/x.png", "1-a/10_fox/x.caption", "1-a/10_fox/mask/x.png"),
        *("1-a/deep/er/x.png", "1-a/deep/er/x.caption", "2-a/y.png", "2-a/y.caption"),
    }
    assert (tmp_path / "copy" / "2-a" / "y.caption").read_text() == "a fox\n"


def test_captions_of_a_table_are_written_to_files(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set", 5)
    for file in folder.glob("*.txt"):
        file.unlink()
    rows = [json.dumps({"file_name": f"clean{number}.png", "text": f"zorb, {number}"}) for number in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    repair_into(lint_folder(folder), tmp_path / "copy")
    assert (tmp_path / "copy" / "clean3.txt").read_text() == "zorb, 3\n"
    assert lint_folder(tmp_path / "copy").findings == ()


@given(st.text(min_size=1, max_size=40), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
def test_captions_are_decoded_as_they_were_encoded(text: str, encoding: str) -> None:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        return
    decoded = decoded_caption(data)
    if encoding != "cp1252":
        assert decoded == text.removeprefix("\ufeff") or encoding == "utf-8"
    else:
        with contextlib.suppress(UnicodeDecodeError):
            # What is UTF-8 by its bytes is taken for UTF-8.
            assert decoded == data.decode("utf-8-sig")
            return
        assert decoded == text or data[:2] in (b"\xff\xfe", b"\xfe\xff")


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = lint_folder(clean(tmp_path / "set"))
    before = content(tmp_path)
    for out in (tmp_path / "set", tmp_path / "set" / "copy", tmp_path, tmp_path / "set" / "clean0.png"):
        with pytest.raises(DataError, match=r"exists already|cannot lie within"):
            repair_into(report, out)
    import shutil

    real, left = shutil.copyfile, [3]

    def failing(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("sdlora.data.repair.shutil.copyfile", failing)
    with pytest.raises(DataError, match=r"copy: cannot be written: No space left"):
        repair_into(report, tmp_path / "copy")
    assert content(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "copy").mkdir()
    repair_into(report, tmp_path / "copy")
    assert len(content(tmp_path / "copy")) == 12


def test_the_sheet_shows_what_is_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    # Left third red, middle green, right blue: the crop to 128 x 128 of 384 x 128 would keep the middle.
    stripes = Image.new("RGB", (192, 64), "lime")
    stripes.paste("red", (0, 0, 32, 64))
    stripes.paste("blue", (160, 0, 192, 64))
    add(folder, "a.png", stripes)
    masked = Image.new("RGBA", (64, 64), (0, 200, 100, 255))
    masked.paste((9, 9, 9, 0), (0, 0, 32, 64))
    add(folder, "b.png", masked)
    add(folder, "c.png", Image.new("RGB", (32, 32), "navy"), caption="w" * 900 + " " + "many words " * 200)
    report = lint_folder(folder, "data.mask=alpha", resolution=64)
    (sheet,) = write_sheets(
        report.examined,
        report.placements,
        background="#ffffff",
        mask="alpha",
        file=tmp_path / "new" / "sheet.png",
        progress=Silence(),
    )
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    first = report.placements[0]
    own = pixels[GAP : GAP + first.height, GAP : GAP + first.width]
    assert own.shape[1] > own.shape[0]
    assert own[first.height // 2, first.width // 2].tolist() == [0, 255, 0]
    share = (own[first.height // 2] == [255, 0, 0]).all(axis=1).mean()
    cut = first.cut_off
    assert share == pytest.approx((1 / 6 - cut / 2) / (1 - cut), abs=0.04)
    cell = max(128, *(place.width for place in report.placements)) + GAP
    second = pixels[GAP : GAP + 64, GAP + cell : GAP + cell + 64]
    assert second[32, 10].tolist() == list(VEIL)
    assert second[32, 60].tolist() == [0, 200, 100]
    third = pixels[GAP : GAP + 64, GAP + 2 * cell : GAP + 2 * cell + 64]
    assert (third == [0, 0, 128]).all()
    # Captions stand beneath, within their own columns.
    beneath = pixels[GAP + max(place.height for place in report.placements) :]
    for number in range(3):
        assert (beneath[:, GAP + number * cell : (number + 1) * cell] < 120).all(axis=2).any()
    gaps = [slice((number + 1) * cell, GAP + (number + 1) * cell) for number in range(2)]
    assert all((beneath[:, gap] == 255).all() for gap in gaps)


def test_the_sheet_shows_the_salient_part(tmp_path: Path) -> None:
    picture = Image.new("RGB", (640, 64), "grey")
    picture.paste(noise("busy", 100, 64), (540, 0))
    add(tmp_path / "set", "a.png", picture)
    for crop, busy in (("center", False), ("salient", True)):
        report = lint_folder(tmp_path / "set", f"data.crop={crop}", resolution=64)
        seen = picture_as_seen(report.examined[0], report.placements[0], background="#ffffff", mask="none")
        assert (max(np.asarray(seen).std(axis=(0, 1))) > 20) == busy


def test_a_large_set_has_several_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.data.sheet.ROWS", 1)
    report = lint_folder(clean(tmp_path / "set", COLUMNS + 1))
    sheets = write_sheets(
        report.examined,
        report.placements,
        background="#ffffff",
        mask="none",
        file=tmp_path / "s.png",
        progress=Silence(),
    )
    assert [sheet.name for sheet in sheets] == ["s.png", "s-2.png"]
    assert {file.name for file in tmp_path.glob("*.png")} == {"s.png", "s-2.png"}
    with pytest.raises(DataError, match=r"s.png/x.png: cannot be written"):
        write_sheets(
            report.examined,
            report.placements,
            background="#ffffff",
            mask="none",
            file=tmp_path / "s.png" / "x.png",
            progress=Silence(),
        )


def test_the_command(sdlora, tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    good = sdlora("lint", "set", "--trigger", "zorb", "--sheet", "sheet.png")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("6 pictures: nothing to complain of\n")
    assert "128 x 128         6     0%     0%" in good.stdout
    assert good.stdout.endswith("sheet.png: contact sheet\n")
    (folder / "clean0.png").write_bytes(b"")
    (folder / "clean1.txt").write_text("a tree")
    (tmp_path / "run.toml").write_text(CONFIG.format(more='images = "set"'))
    for arguments in (("set", "--trigger", "zorb"), ("run.toml",)):
        bad = sdlora("lint", *arguments, "--json")
        assert (bad.returncode, bad.stderr) == (1, "")
        answer = json.loads(bad.stdout)
        assert set(answer) >= {"images", "findings", "counts", "tags", "buckets", "base", "resolution"}
        assert answer["images"] == 6
        assert answer["counts"] == {"errors": 1, "warnings": 0, "notes": 1}
        empty = os.path.join("set", "clean0.png")
        assert [(f["severity"], f["code"], f["file"]) for f in answer["findings"]] == [
            ("error", "picture-empty", empty),
            ("note", "trigger-absent", os.path.join("set", "clean1.txt")),
        ]
        assert all(set(f) == {"code", "severity", "file", "message", "remedy"} for f in answer["findings"])
    text = sdlora("lint", "run.toml", "data.trigger=art")
    assert text.returncode == 1
    for part in ("error picture-empty (1)", f"  {empty}: empty file (0 bytes)", "  -> replace or remove it"):
        assert part in text.stdout
    assert "warning trigger-common (1)" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("set", "--fix"), 2, "--fix and --out COPY go together"),
        (("set", "--out", "copy"), 2, "--fix and --out COPY go together"),
        (("set", "--sheet", "sheet.jpg"), 2, "does not end in .png"),
        ((), 2, "Missing argument"),
        (("none.toml",), 1, "none.toml: no such configuration file"),
        (("set", "data.reslution=64"), 1, "did you mean data.resolution?"),
        (("set", "--base", "nowhere"), 1, "nowhere: no such base"),
    ],
)
def test_wrong_use(sdlora, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    clean(tmp_path / "set", 1)
    before = content(tmp_path)
    result = sdlora("lint", *arguments)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert content(tmp_path) == before


def test_a_missing_folder_is_a_finding(sdlora, tmp_path: Path) -> None:
    result = sdlora("lint", "nowhere", "--json")
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert [(f["code"], f["file"]) for f in answer["findings"]] == [("folder-missing", "nowhere")]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").touch()
    (finding,) = lint_folder(tmp_path / "bare").findings
    assert finding.message == "no picture among its 1 files"


def test_the_summary_is_short(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    for number in range(30):
        add(folder, f"small{number}.png", noise(f"s{number}", 32, 32))
    report = lint_folder(folder)
    lines = summary_lines(report)
    assert lines[0] == "36 pictures: 30 warnings"
    assert len(lines) == 5
    assert lines[-1].endswith("27 more; `sdlora lint` tells them all")
    full = report_lines(report)
    assert "  and 10 more, which --json tells" in full
    assert sum("enlarged" in line for line in full) == 20


def test_a_progress_bar_shows_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    clean(tmp_path / "set")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sdlora.cli", "lint", "set", "--trigger", "zorb", "--json"]
    made = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # The end of a terminal.
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert b"Looking at pictures" in shown
    assert b"6/6" in shown
    assert json.loads(made.stdout)["images"] == 6


def test_as_a_function(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    assert sdlora_package.lint_dataset(folder, trigger="zorb").findings == ()
    (tmp_path / "run.toml").write_text(CONFIG.format(more=f'images = "{folder}"'))
    assert sdlora_package.lint_dataset(tmp_path / "run.toml").findings == ()
    config = load_config(tmp_path / "run.toml", ["data.trigger=art"])
    assert "trigger-common" in {finding.code for finding in sdlora_package.lint_dataset(config).findings}


def test_lint_needs_neither_diffusers_nor_transformers(sdlora, tmp_path: Path) -> None:
    clean(tmp_path / "set")
    code = (
        "import sys; from sdlora.linting import *; from sdlora.progress import Silence;"
        "lint_data(*linted_sections(['set'], trigger='zorb'), progress=Silence());"
        "print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.split() == ["False", "False"]
