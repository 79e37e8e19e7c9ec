"""Where images go: names that count up, endings, seeds, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.generation import images as drawing
from sdlora.generation.request import MAX_SEED, first_seed
from sdlora.generation.saving import ImageTarget

SMALL = ("--steps", "1", "--size", "64x64")


def generate(base: Path, *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error."""
    result = CliRunner().invoke(app, ["generate", "a fox", "--base", str(base), *SMALL, *map(str, arguments)])
    return result.exit_code, result.stdout.splitlines(), result.stderr


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_folder_counts_up_and_nothing_is_replaced(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert generate(tiny_base, "--seed", 7, "--out", out)[0] == 0
    assert names(out) == ["00001-7-a-fox.png", "00002-7-a-fox.png"]
    (out / "00041-notes.txt").touch()
    (out / "00001-7-a-fox.png").unlink()
    generate(tiny_base, "--seed", 7, "--out", out, "--strip")
    assert "00042-7-a-fox-strip.png" in names(out)


def test_a_file_named_in_full_is_replaced_and_several_are_not(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(b"old")
    (tmp_path / "fox-4.png").write_bytes(b"kept")
    assert generate(tiny_base, "--seed", 3, "--out", file)[1] == [str(file)]
    with Image.open(file) as image:
        assert "Seed: 3," in image.text["parameters"]  # ty: ignore[unresolved-attribute]
    _, lines, _ = generate(tiny_base, "--seed", 3, "--count", 2, "--out", file)
    assert [Path(line).name for line in lines] == ["fox-3.png", "fox-4-2.png"]
    assert (tmp_path / "fox-4.png").read_bytes() == b"kept"


def test_the_seed_is_random_printed_and_in_the_file(tiny_base: Path, tmp_path: Path) -> None:
    seeds = set()
    for arguments in ((), ("--seed", "-1")):
        code, lines, shown = generate(tiny_base, *arguments, "--out", tmp_path / "out")
        seed = int(Path(lines[0]).name.split("-")[1])
        assert (code, f"seed {seed}" in shown) == (0, True)
        with Image.open(lines[0]) as image:
            assert f"Seed: {seed}," in image.text["parameters"]  # ty: ignore[unresolved-attribute]
        seeds.add(seed)
    assert len(seeds) == 2
    assert generate(tiny_base, "--seed", "-2")[0] == 2


@pytest.mark.parametrize("seed", [-2, 2**32, 1.5, -1.0, True, "1"])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(SdloraError, match="expected a whole number from 0 to 4294967295, or -1 for a random one"):
        sdlora.generate("a fox", seed=seed)  # ty: ignore[invalid-argument-type]


def test_seeds_are_kept_or_drawn_within_the_range() -> None:
    assert [first_seed(seed, count=3) for seed in (0, 7, MAX_SEED)] == [0, 7, MAX_SEED]
    assert all(0 <= first_seed(None, count=MAX_SEED + 1) == 0 for _ in range(3))
    assert len({first_seed(-1, count=1) for _ in range(20)}) > 15


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp", "x.PNG"])
def test_every_ending_holds_the_parameters(tmp_path: Path, name: str) -> None:
    image, text = Image.new("RGB", (64, 64), "red"), "zorb, é 狐\nSteps: 3"
    file = ImageTarget.parse(str(tmp_path / name)).save(image, text, seed=1, title="x", alone=True)
    assert file == tmp_path / name
    with Image.open(file) as written:
        comment = written.getexif().get_ifd(0x8769).get(0x9286, b"")
        assert written.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}[name[2:].lower()]
        if written.format == "PNG":
            assert written.text["parameters"] == text  # ty: ignore[unresolved-attribute]
        else:
            assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_targets_that_cannot_be_meant_are_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "set.png").mkdir()
    for name, message in (("x.bmp", "not written as .bmp"), ("plain", "is a file"), ("set.png", "is a folder")):
        code, _, shown = generate(tiny_base, "--out", tmp_path / name)
        assert (code, message in shown, len(shown.splitlines())) == (1, True, 1)
    for name in ("v1.5", "set.png/", "new.folder/", "plain-name"):
        assert ImageTarget.parse(f"{tmp_path}/{name}").is_folder


def test_an_interruption_keeps_what_is_done(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, denoise = [], drawing.denoise

    def interrupted(*arguments: object):
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return denoise(*arguments)  # ty: ignore[invalid-argument-type]

    monkeypatch.setattr(drawing, "denoise", interrupted)
    code, _, shown = generate(tiny_base, "--count", 9, "--seed", 1, "--out", tmp_path / "out")
    assert (code, len(names(tmp_path / "out"))) == (130, 4)
    assert "interrupted: 4 of 9 images are written, the last is" in shown


def test_images_are_handed_over_as_they_are_done(tiny_base: Path) -> None:
    seen: list[int] = []
    options = {"base": str(tiny_base), "size": (64, 64), "steps": 1, "count": 3, "seed": 5}
    made = sdlora.generate("a fox", on_image=lambda image: seen.append(image.request.seed), **options)  # ty: ignore[invalid-argument-type]
    assert seen == [image.request.seed for image in made] == [5, 6, 7]
