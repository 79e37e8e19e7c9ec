"""Grids: what axes say and refuse, cells against images drawn alone, few changes of LoRAs, and going on after a stop."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.cli import app
from sdlora.errors import Interrupted, SdloraError
from sdlora.generation.lora_choice import LoraChoice
from sdlora.generation.prompt_folders import PromptFolders
from sdlora.generation.request import ImageRequest
from sdlora.grids import drawing
from sdlora.grids.axes import KINDS, read_axes
from sdlora.grids.cells import Cell, in_drawing_order, make_cells
from sdlora.grids.sheet import labelled_sheet
from sdlora.grids.values import numbers, split_values
from sdlora.lora.stack import Stack
from sdlora.progress import Silence
from tests.test_generation import random_lora
from tests.test_samples import counted_loads

SMALL: dict[str, Any] = {"steps": 2, "progress": Silence(), "precision": "float32"}


@pytest.fixture(scope="module")
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [
        random_lora(tiny_base, folder / f"{name}.safetensors", seed=seed) for seed, name in enumerate(("one", "two"), 1)
    ]


def cells_of(prompt: str = "a fox", loras: tuple[str, ...] = (), *, negative: str = "", **axes: Any) -> list[Cell]:
    request = ImageRequest(prompt=prompt, negative=negative)
    return make_cells(request, [LoraChoice.parse(lora) for lora in loras], read_axes(axes), PromptFolders())


@pytest.mark.parametrize(
    ("text", "whole", "expected"),
    [
        ("1, 2,5", True, [1, 2, 5]),
        ("1-3", True, [1, 2, 3]),
        ("1-6 (+2), 9", True, [1, 3, 5, 9]),
        ("3-1", True, [3, 2, 1]),
        ("10-1 (-4)", True, [10, 6, 2]),
        ("1-10 [4]", True, [1, 4, 7, 10]),
        ("0-1 [5]", False, [0, 0.25, 0.5, 0.75, 1]),
        ("0-0.3 (+0.1)", False, [0, 0.1, 0.2, 0.3]),
        ("-1--0.5 (+0.25)", False, [-1, -0.75, -0.5]),
        ("-0.5, 1e-1", False, [-0.5, 0.1]),
    ],
)
def test_numbers_and_ranges_are_those_of_a1111(text: str, whole: bool, expected: list[float]) -> None:
    assert numbers(split_values(text), whole=whole) == expected


def test_values_with_commas_are_quoted() -> None:
    assert split_values('fox, "cat, small" ,dog,') == ["fox", "cat, small", "dog"]


WRONG = {
    "wight:0,1": f"x: 'wight' is no axis; expected one of {', '.join(KINDS)}",
    "weight": "x: 'weight' is not an axis; expected KIND:VALUE,VALUE, for example weight:0,0.5,1",
    "weight:": "x: weight has no values; expected weights of all LoRAs; weight@NAME of one, with commas between them",
    "weight:0,abc": "x: weight: 'abc' is not a number",
    "weight:0,nan": "x: weight: 'nan' is not a number",
    "weight:0,11": "x: weight: 11 is not a weight from -10 to 10",
    "seed:1.5": "x: seed: '1.5' is not a whole number",
    "seed:-1": "x: seed: -1 is not a seed from 0 to 4294967295",
    "seed:1-9 (-1)": "x: seed: '1-9 (-1)' never ends: its step leads away from 9",
    "seed:1-99999": "x: seed: '1-99999' has 99,999 values; at most 1000 are allowed",
    "strength:0": "x: strength: 0 is not a strength above 0 and at most 1",
    "size:12x": "x: size: '12x' is not a size; expected 512 or 512x768",
    "seed@one:1": "x: 'seed@one' names no LoRA; expected weight@NAME or step@NAME",
    "step:5k": "x: step: '5k' is not a step; expected a whole number, or last",
    "lora:fox": "x: lora: fox: expected FILE.safetensors (or .pt, .ckpt, .bin), "
    "FILE:WEIGHT or FILE:UNET:TE, or a PEFT folder",
}


@pytest.mark.parametrize(("axis", "problem"), WRONG.items())
def test_an_axis_that_cannot_be_read_is_one_line(axis: str, problem: str) -> None:
    with pytest.raises(SdloraError) as error:
        read_axes({"x": axis})
    assert error.value.problems == (problem,)


def test_all_wrong_axes_are_reported_at_once() -> None:
    with pytest.raises(SdloraError) as error:
        read_axes({"x": "seed:1", "y": "seed:2", "z": "cfg:?"})
    assert error.value.problems == ("z: cfg: '?' is not a number", "y: seed is the axis x already")
    with pytest.raises(SdloraError, match="a grid needs an axis"):
        read_axes({"x": None})
    with pytest.raises(SdloraError) as error:
        cells_of(x="weight:1", y="prompt:cat,dog")
    assert len(error.value.problems) == 2
    assert "y: the prompt does not have the text 'cat', which is to be replaced" in error.value.problems


def test_which_lora_an_axis_means() -> None:
    two = ("a/one.safetensors:0.8:0.4", "two.pt")
    with pytest.raises(SdloraError, match="x: three is none of the LoRAs; they are one, two"):
        cells_of(loras=two, x="weight@three:1")
    with pytest.raises(SdloraError, match="x: step is that of which LoRA"):
        cells_of(loras=two, x="step:1")
    cells = cells_of(loras=two, x="weight@one:0,0.4", y="step@two:500,last")
    assert [[(lora.file.as_posix(), lora.unet, lora.text_encoder) for lora in cell.loras] for cell in cells] == [
        [("two-000500.pt", 1, 1)],
        [("a/one.safetensors", 0.4, 0.2), ("two-000500.pt", 1, 1)],
        [("two.pt", 1, 1)],
        [("a/one.safetensors", 0.4, 0.2), ("two.pt", 1, 1)],
    ]


def test_a_file_is_chosen_before_it_is_weighed_whichever_axis_is_first() -> None:
    files = ("lora", ["none", Path("dir/one.safetensors"), "two.safetensors:0.5"])
    for axes in ({"x": files, "y": "weight:0.5"}, {"y": files, "x": "weight:0.5"}):
        cells = cells_of(**axes)
        assert [[(lora.name, lora.unet) for lora in cell.loras] for cell in cells] == [
            [],
            [("one", 0.5)],
            [("two", 0.5)],
        ]
    axes = read_axes({"x": files})
    assert axes[0].labels == ("no LoRA", "one", "two 0.5")


def test_every_kind_changes_what_it_names() -> None:
    values: dict[str, list[Any]] = {
        "lora": ["a.safetensors"], "weight": [0.5], "step": [500], "prompt": ["fox", "cat"], "seed": [3], "cfg": [7.5],
        "steps": [9], "strength": [0.5], "sampler": ["euler"], "schedule": ["karras"], "size": [(64, 96)],
    }  # fmt: skip
    assert set(values) == set(KINDS)
    for kind, given in values.items():
        if kind == "strength":
            continue  # See below.
        cell = cells_of("a fox", ("b.safetensors",), negative="red fox", x=(kind, given))[-1]
        made, plain = cell.request, ImageRequest(prompt="a fox", negative="red fox")
        if kind in ("lora", "weight", "step"):
            assert made == plain
            assert cell.loras != (LoraChoice.parse("b.safetensors"),)
        elif kind == "prompt":
            assert (made.prompt, made.negative) == ("a cat", "red cat")
        else:
            assert getattr(made, kind) == given[0]


def test_a_sampler_may_bring_its_schedule() -> None:
    cells = cells_of(x=("sampler", ["DPM++ 2M Karras", "euler"]), y="schedule:auto")
    assert [(cell.request.sampler, cell.request.schedule) for cell in cells] == [("dpm++2m", None), ("euler", None)]
    cells = cells_of(x=("sampler", ["DPM++ 2M Karras", "euler"]))
    assert [(cell.request.sampler, cell.request.schedule) for cell in cells] == [("dpm++2m", "karras"), ("euler", None)]


def test_loras_change_as_seldom_as_there_are_different_sets() -> None:
    cells = cells_of(loras=("a.safetensors",), x="seed:1,2,3", y="steps:5,9", z="weight:0,0.5,1")
    rearranged = cells_of(loras=("a.safetensors",), x="weight:0,0.5,1", y="seed:1,2,3", z="steps:5,9")
    for given in (cells, rearranged):
        order = in_drawing_order(given)
        assert sorted(cell.place for cell in order) == sorted(cell.place for cell in given)
        sets = [cell.loras for cell in order]
        assert sum(one != other for one, other in pairwise(sets)) == 2
        settings = [(cell.loras, cell.request.steps) for cell in order]
        assert sum(one != other for one, other in pairwise(settings)) == 5


def test_cells_are_the_images_drawn_alone(tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "g.png"
    made = sdlora.grid(
        "a fox",
        x="weight@one:0,0.5",
        y="seed:3,4",
        z="prompt:fox,cat",
        loras=[*map(str, loras)],
        base=tiny_base,
        out=out,
        **SMALL,
    )
    report = json.loads((tmp_path / "g.cells" / "grid.json").read_text())
    assert (len(report["cells"]), made.drawn, report["axes"][0]["values"]) == (8, 8, ["one 0", "one 0.5"])
    for cell in report["cells"]:
        weight, seed, animal = cell["x"].split()[-1], int(cell["y"].split()[-1]), cell["z"]
        own = [f"{loras[0]}:{weight}"] if weight != "0" else []
        (alone,) = sdlora.generate(f"a {animal}", loras=[*own, str(loras[1])], base=tiny_base, seed=seed, **SMALL)
        with Image.open(tmp_path / "g.cells" / cell["file"]) as image:
            difference = max(abs(a - b) for a, b in zip(image.tobytes(), alone.image.tobytes(), strict=True))
            # Drawn two at a time.
            assert (difference <= 1, image.info["parameters"]) == (True, alone.parameters)
        assert (cell["seed"], cell["prompt"], cell["parameters"]) == (seed, f"a {animal}", alone.parameters)
    with Image.open(out) as sheet:
        assert sheet.size == made.image.size
        # The last cell is at the bottom right.
        last = sheet.convert("RGB").crop((sheet.width - 64, sheet.height - 64, sheet.width, sheet.height))
    with Image.open(tmp_path / "g.cells" / report["cells"][-1]["file"]) as image:
        assert last.tobytes() == image.tobytes()
    assert str(tmp_path) not in json.dumps(report)


def test_textual_inversions_are_part_of_a_cell(tiny_base: Path, tmp_path: Path) -> None:
    width = load_file(tiny_base / "text_encoder" / "model.safetensors")[
        "text_model.embeddings.token_embedding.weight"
    ].shape[1]
    drawn, file = [], tmp_path / "stil.safetensors"
    for seed in (1, 1, 2):
        save_file({"emb_params": torch.randn(2, width, generator=torch.Generator().manual_seed(seed))}, file)
        made = sdlora.grid("stil", x="seed:1,2", out=tmp_path / "g.png", base=tiny_base, embeddings=file, **SMALL)
        drawn.append(made.drawn)
    assert drawn == [2, 0, 2]
    assert json.loads((tmp_path / "g.cells" / "grid.json").read_text())["cells"][0]["inversions"] == ["stil"]


def test_what_is_drawn_is_not_drawn_again(
    tiny_base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"loras": str(loras[0]), "base": tiny_base, "out": tmp_path / "g.png", **SMALL}
    first = sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given)
    loaded = counted_loads(monkeypatch)
    again = sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given)
    assert (again.drawn, loaded, again.cells) == (0, [], first.cells)
    assert again.image.tobytes() == first.image.tobytes()
    turned = sdlora.grid("a fox", y="weight:0,1", x="seed:1,2,3", **given)
    assert turned.drawn == 2
    # A cell that was cut off, and a LoRA that is another one now.
    cell = tmp_path / "g.cells" / first.cells[0]["file"]
    whole = cell.read_bytes()
    cell.write_bytes(whole[: len(whole) // 2])
    assert sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given).drawn == 1
    other = random_lora(tiny_base, tmp_path / "one.safetensors", seed=9)
    assert sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given | {"loras": str(other)}).drawn == 2
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(loras[0].read_bytes())
    assert sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given | {"loras": str(moved)}).drawn == 0
    assert sdlora.grid("a fox", x="weight:0,1", y="seed:1,2", **given | {"steps": 1}).drawn == 4


def test_a_stopped_grid_goes_on(
    tiny_base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "loras": str(loras[0]),
        "base": tiny_base,
        "x": "weight:0,0.5,1",
        "y": "size:64,64x96",
        **SMALL,
    }
    expected = sdlora.grid("a fox", out=tmp_path / "whole.png", **given)
    stop, saved = threading.Event(), []
    save = drawing.save_png

    def save_and_stop(*what: Any) -> None:
        save(*what)
        saved.append(what[1].name)
        if len(saved) == 4:
            stop.set()

    monkeypatch.setattr(drawing, "save_png", save_and_stop)
    with pytest.raises(Interrupted, match="interrupted: 4 of 6 cells are drawn; the same command goes on"):
        sdlora.grid("a fox", out=tmp_path / "cut.png", stop=stop, **given)
    assert not (tmp_path / "cut.png").exists()
    again = sdlora.grid("a fox", out=tmp_path / "cut.png", **given)
    assert (again.drawn, len(saved), len(set(saved))) == (2, 6, 6)
    assert again.image.tobytes() == expected.image.tobytes()
    assert (tmp_path / "cut.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_strengths_of_an_image_that_is_drawn_over(tiny_base: Path, tmp_path: Path) -> None:
    over = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    given: dict[str, Any] = {"base": tiny_base, "out": tmp_path / "g.png", "y": "seed:1,2"} | SMALL | {"steps": 4}
    made = sdlora.grid("a fox", x="strength:0.5,1", image=over, **given)
    (alone,) = sdlora.generate("a fox", base=tiny_base, image=over, strength=0.5, seed=2, **SMALL | {"steps": 4})
    assert made.cells[2]["parameters"] == alone.parameters
    with Image.open(made.folder / made.cells[2]["file"]) as image:
        assert max(abs(a - b) for a, b in zip(image.tobytes(), alone.image.tobytes(), strict=True)) <= 1
    assert sdlora.grid("a fox", x="strength:0.5,1", image=over.copy(), **given).drawn == 0
    assert sdlora.grid("a fox", x="strength:0.5,1", image=over.rotate(90), **given).drawn == 4
    with pytest.raises(SdloraError, match="x: strength is that of an image to draw over; name one with image"):
        sdlora.grid("a fox", x="strength:0.5", **given)


def test_loras_are_set_once_for_each_weight(
    tiny_base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, said, whole = [], list[str](), Stack.set
    monkeypatch.setattr(Stack, "set", lambda self, *given, **more: (sets.append(given), whole(self, *given, **more))[1])
    sdlora.grid(
        "a fox",
        x="seed:1-6",
        y="weight:0,1",
        loras=str(loras[0]),
        base=tiny_base,
        out=tmp_path / "g.webp",
        negative="blue",
        say=said.append,
        **SMALL | {"steps": 1, "cfg": 1},
    )
    assert len(sets) == 2
    # Once for all cells, after the device and the memory.
    assert said[1:] == ["cfg 1 switches guidance off: the negative prompt has no effect"]


def test_faults_are_found_before_anything_is_loaded(
    tiny_base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = counted_loads(monkeypatch)
    given: dict[str, Any] = {"base": tiny_base, "out": tmp_path / "g.png", "x": "seed:1,2"} | SMALL
    for wrong, problem in (
        ({"x": "sampler:euler,fast"}, "sampler 'fast' is unknown"),
        ({"x": "schedule:karras,fast"}, "schedule 'fast' is unknown"),
        ({"x": "size:64,63"}, "size 63x63: width and height must be multiples"),
        ({"x": "lora:none.safetensors"}, "none.safetensors: no such file"),
        ({"x": "step:500", "loras": str(loras[0])}, "one-000500.safetensors: no such file"),
        ({"loras": [str(loras[0])], "x": f"lora:{loras[0]}"}, "is named more than once"),
        ({"out": tmp_path / "g.bmp"}, "name an image file to write"),
        ({"seed": -1}, "a cell of a grid is known again by its seed"),
        ({"x": "seed:1-1000", "size": 1024}, "are over 300 million pixels"),
    ):
        with pytest.raises(SdloraError, match=problem.replace("(", r"\(")):
            sdlora.grid("a fox", **given | wrong)
    assert loaded == []
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    tiny_base: Path,
    loras: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["grid", "a fox", "--base", str(tiny_base), "--lora", str(loras[0]), "--x", "weight=0,1", "--steps", "1"]
    command += ["--out", "g.jpg"]
    assert not app(command, standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == [
        "g.jpg: 2 cells",
        "g.cells: the cells, and grid.json with their recipes",
    ]
    assert not app([*command, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert (report["drawn"], len(report["cells"]), report["image"]) == (0, 2, "g.jpg")
    assert (tmp_path / report["folder"] / report["cells"][1]["file"]).is_file()
    assert app([*command, "--y", "weight:1", "--z", "foo:1"], standalone_mode=False) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"error: z: 'foo' is no axis; expected one of {', '.join(KINDS)}",
        "error: y: weight is the axis x already",
    ]


def test_long_labels_of_rows_are_wrapped(tiny_base: Path, tmp_path: Path) -> None:
    images = {(0, y, 0): Image.new("RGB", (64, 64)) for y in range(2)}
    axes = read_axes(
        {"y": ("prompt", ["a fox", "a very long text that would take more room than the image itself " * 3])}
    )
    assert labelled_sheet(images, axes, scale=1).width < 3 * 64
