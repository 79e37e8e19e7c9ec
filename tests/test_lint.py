"""sdlora lint: each fault is found and named by its file with a remedy, and nothing else is."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.base.words import clip_words, words_in
from sdlora.config.sections import Config, OutputSection
from sdlora.data import decoding
from sdlora.errors import DataError
from sdlora.lint.report import summary_lines
from sdlora.training.plan import plan_run
from tests.conftest import ROOT
from tests.lint_sets import (
    add,
    clean,
    faulty_captions,
    found_codes,
    lint_folder,
    linted,
    noise,
    odd_images,
    repeated_images,
    sets_toml,
    unreadable_images,
)
from tests.sets import examined


def test_one_of_each_fault_is_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._has_plugin.cache_clear()
    expected: Counter[tuple[str, str | None]] = Counter()
    sets = []

    def with_set(name: str, faults: list[tuple[str, str]], options: str = "") -> None:
        folder = tmp_path / name
        sets.append(f'images = "{folder}"\n{options}')
        expected.update((code, str(folder / file) if file else str(folder)) for code, file in faults)

    for build in (unreadable_images, odd_images, repeated_images, faulty_captions):
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
    assert found_codes(report) == expected
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
    for build in (unreadable_images, odd_images, repeated_images, faulty_captions):
        build(folder)
    (folder / "mask").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "mask" / "clean1.png")
    report = lint_folder(folder, "data.mask=files")
    _, faults = examined(report.listing, mask="files")
    refused = {(f.code, f.file) for f in (*report.listing.findings, *faults) if f.severity == "error"}
    assert len(refused) > 12
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert {(finding.code, finding.file) for finding in errors} == refused
    config = Config(data=report.data, output=OutputSection(path=str(tmp_path / "x.safetensors")))
    with pytest.raises(DataError) as caught:
        plan_run(config, report.dataset)
    assert caught.value.problems == tuple(map(str, errors))


@pytest.mark.parametrize("name", ["ü 空 a b", "-x"])
def test_a_clean_folder_yields_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    clean(Path(name))
    report = lint_folder(Path(name))
    assert report.findings == ()
    assert report.images == 6
    assert not report.has_errors
    assert [(bucket.width, bucket.height, bucket.count, bucket.worst_cut) for bucket in report.buckets] == [
        (128, 128, 6, 0)
    ]
    assert summary_lines(report) == ["6 images: no problems found"]


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
    found = found_codes(lint_folder(folder, "data.mask=files"))
    assert found == Counter(
        [
            ("mask-size", str(folder / "mask" / "clean1.png")),
            ("mask-empty", str(folder / "mask" / "clean2.png")),
            ("image-unknown", str(folder / "mask" / "clean3.png")),
            ("mask-missing", str(folder / "clean5.png")),
        ]
    )
    image = noise("x").convert("RGBA")
    image.putalpha(0)
    folder = clean(tmp_path / "clear", 5)
    add(folder, "none.png", image)
    found = found_codes(lint_folder(folder, "data.mask=alpha"))
    missing = [("mask-missing", str(folder / f"clean{number}.png")) for number in range(5)]
    none = str(folder / "none.png")
    assert found == Counter([*missing, ("mask-empty", none), ("image-flat", none), ("image-hidden-colour", none)])


def test_small_and_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clean(tmp_path / "set", 4)
    (finding,) = lint_folder(folder).findings
    assert (finding.code, finding.file) == ("set-small", str(folder))
    assert "4 images" in finding.message
    monkeypatch.setattr("sdlora.lint.image_checks.FEW", 0)
    monkeypatch.setattr("sdlora.lint.image_checks.MANY", 3)
    assert [finding.code for finding in lint_folder(folder).findings] == ["set-large"]


def test_numbers_in_the_messages(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    add(folder, "wide.png", noise("wide", 500, 100))
    add(folder, "small.png", noise("small", 64, 64))
    add(folder, "long.png", caption="zorb, " + "w " * 80)
    by_code = {finding.code: finding for finding in lint_folder(folder, resolution=128).findings}
    # The widest bucket at 128 is 256 x 64: of 500 x 100, scaled to 320 x 64, it keeps 4/5.
    assert "image-cropped" not in by_code
    assert "64 x 64 pixels, enlarged 2.0 times for its bucket of 128 x 128" in by_code["image-small"].message
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
    assert {image.source.rules.plain(image.source.captions) for image in report.examined} == {
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


def test_regularisation_images_need_no_trigger(tmp_path: Path) -> None:
    clean(tmp_path / "style")
    for number in range(6):
        add(tmp_path / "class", f"class{number}.png", caption=f"an image of kind {number}")
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
    assert summary_lines(report) == ["17 images, 6 for regularisation, 5 for validation: no problems found"]
    assert sum(count for _, count in report.tags) == 6
    # Nothing is trained on validation images, so no bucket holds them.
    assert [(bucket.width, bucket.height, bucket.count) for bucket in report.buckets] == [(128, 128, 12)]


def test_each_set_has_its_own_resolution(tmp_path: Path) -> None:
    for name in ("small", "large"):
        for number in range(5):
            add(tmp_path / name, f"{name}{number}.png")
    sets = [f'images = "{tmp_path / name}"\nresolution = {side}' for name, side in (("small", 64), ("large", 256))]
    (tmp_path / "run.toml").write_text(sets_toml(*sets))
    report = linted(tmp_path / "run.toml")
    assert found_codes(report) == Counter(("image-small", str(tmp_path / "large" / f"large{n}.png")) for n in range(5))
    assert [(bucket.width, bucket.height, bucket.count) for bucket in report.buckets] == [(64, 64, 5), (256, 256, 5)]
