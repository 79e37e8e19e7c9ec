"""Captions by local models: what is missing is written, what is there is never touched, whatever goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.captioners import Tag, Wd14, choose_tags, find_kind, open_captioner, read_tags, tagger_pixels
from sdlora.captioning import CaptionReport, caption_folder
from sdlora.data.images import open_picture
from sdlora.errors import CaptionerError, ConfigError, DataError, Interrupted
from sdlora.progress import Silence
from tests.conftest import ROOT, write_pictures
from tests.tiny_captioners import write_tiny_blip, write_tiny_florence

TAGS = "tag_id,name,category,count\n9,general,9,5\n1,1girl,0,9\n2,red_hair,0,8\n3,^_^,0,7\n4,some_hero_(series),4,6\n"


class Colours:
    """Says what the mean colour of a picture is."""

    def __init__(self) -> None:
        self.seen = 0

    def caption(self, picture: Image.Image) -> str:
        self.seen += 1
        return " a picture\n of colour {} {} {} ".format(*np.asarray(picture).mean((0, 1)).astype(int))


def run(folder: Path, captioner: Colours | None = None, *, trigger: str = "", extension: str = ".txt") -> CaptionReport:
    chosen = captioner or Colours()
    return caption_folder(folder, lambda: chosen, trigger=trigger, extension=extension, progress=Silence())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0 to 4, of which 1 and 3 have captions."""
    made = write_pictures(tmp_path / "ü 空 a b", 5)
    for number in (0, 2, 4):
        (made / f"{number}.txt").unlink()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# The folder


def test_only_what_is_missing_is_written(folder: Path) -> None:
    before = contents(folder)
    report = run(folder)
    assert report.written == tuple(str(folder / f"{number}.txt") for number in (0, 2, 4))
    assert (report.present, report.problems) == (2, ())
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"0.txt", "2.txt", "4.txt"}
    assert re.fullmatch(rb"a picture of colour \d+ \d+ \d+\n", after["2.txt"])


def test_captions_belong_to_their_pictures(folder: Path) -> None:
    run(folder)
    for number in (0, 2, 4):
        mean = np.asarray(open_picture(folder / f"{number}.png")).mean((0, 1)).astype(int)
        assert (folder / f"{number}.txt").read_text() == "a picture of colour {} {} {}\n".format(*mean)


def test_nothing_to_do_loads_no_model(folder: Path) -> None:
    run(folder)

    def load() -> Colours:
        raise AssertionError("a model was loaded")

    report = caption_folder(folder, load, trigger="", extension="txt", progress=Silence())
    assert (report.written, report.present, report.problems) == ((), 5, ())


def test_the_trigger_stands_in_front_of_what_lacks_it(folder: Path) -> None:
    run(folder, trigger="zorb")
    assert (folder / "0.txt").read_text().startswith("zorb, a picture of")
    for number in (0, 2, 4):
        (folder / f"{number}.txt").unlink()
    run(folder, trigger="Picture")
    assert (folder / "0.txt").read_text().startswith("a picture of")


def test_folders_within_tables_and_other_extensions(folder: Path) -> None:
    inner = write_pictures(folder / "10_thing", 2)
    (inner / "0.txt").unlink()
    (inner / "1.txt").rename(inner / "1.caption")
    (folder / "metadata.jsonl").write_text('{"file_name": "4.png", "text": "from a table"}\n')
    report = run(folder)
    assert set(report.written) == {str(folder / name) for name in ("0.txt", "2.txt", "10_thing/0.txt")}
    (problem,) = report.problems
    assert (
        problem
        == f"{inner / '1.png'}: has a caption in 1.caption already; give --caption-extension .caption, or rename it"
    )
    report = run(folder, extension="caption")
    assert report.written == ()
    assert not list(folder.rglob("4.txt"))


def test_every_picture_that_gets_none_is_told_once_and_the_others_are_done(folder: Path) -> None:
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "1.txt").write_text(" \n")
    (folder / "3.txt").write_bytes("Bär".encode("latin-1"))
    Image.new("RGB", (8, 8)).save(folder / "4.jpg")

    class Mute(Colours):
        def caption(self, picture: Image.Image) -> str:
            return " \n" if super().caption(picture) and picture.size == (8, 8) else "said"

    captioner = Mute()
    before = contents(folder)
    report = run(folder, captioner)
    expected = {
        "0.png": "truncated picture",
        "1.txt": "remove it to have one written",
        "3.txt": "remove it to have one written",
        "4.png": "shares its caption file with 4.jpg",
        "4.jpg": "nothing to say",
    }
    assert len(report.problems) == len(expected)
    for name, message in expected.items():
        assert [one for one in report.problems if one.startswith(str(folder / name)) and message in one], name
    assert report.written == (str(folder / "2.txt"),)
    after = contents(folder)
    assert {name: after[name] for name in before} == before


def test_a_caption_that_appears_meanwhile_is_left_alone(folder: Path) -> None:
    class Slow(Colours):
        def caption(self, picture: Image.Image) -> str:
            (folder / "2.txt").write_text("by hand")
            return super().caption(picture)

    report = run(folder, Slow())
    assert (folder / "2.txt").read_text() == "by hand"
    assert report.written == (str(folder / "0.txt"), str(folder / "4.txt"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_without_links_captions_are_whole_and_never_overwritten_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    test_a_caption_that_appears_meanwhile_is_left_alone(folder)


def test_a_disk_that_is_full_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", fsync)
    report = run(folder)
    assert [problem.rpartition(": ")[2] for problem in report.problems] == ["No space left on device"] * 3
    assert contents(folder) == before


def test_an_interruption_keeps_what_is_written_and_the_same_call_goes_on(folder: Path) -> None:
    class Interrupting(Colours):
        def caption(self, picture: Image.Image) -> str:
            if self.seen == 1:
                raise KeyboardInterrupt
            return super().caption(picture)

    with pytest.raises(Interrupted, match="1 of 3 captions are written; the same command goes on"):
        run(folder, Interrupting())
    assert (folder / "0.txt").exists()
    assert not (folder / "2.txt").exists()
    captioner = Colours()
    assert len(run(folder, captioner).written) == captioner.seen == 2


def test_a_model_that_fails_is_told_with_the_picture(folder: Path) -> None:
    class Failing(Colours):
        def caption(self, picture: Image.Image) -> str:
            raise RuntimeError("out of memory\nTried to allocate")

    with pytest.raises(CaptionerError, match=re.escape("0.png: the model fails on it: out of memory")):
        run(folder, Failing())


def test_wrong_folders_and_extensions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "none")
    with pytest.raises(DataError, match="no picture among its 0 files"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="not a file extension"):
        run(tmp_path, extension="../x")


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a folder of a random model of it; not to be changed."""
    place = tmp_path_factory.mktemp("models")
    write_tiny_blip(place / "blip")
    write_tiny_florence(place / "florence")
    (place / "wd14").mkdir()
    (place / "wd14" / "model.onnx").write_bytes(b"not looked at")
    (place / "wd14" / "selected_tags.csv").write_text(TAGS)
    return {kind: place / kind for kind in ("blip", "florence", "wd14")}


@pytest.mark.parametrize("kind", ["blip", "florence", "wd14"])
def test_the_kind_of_a_folder(models: dict[str, Path], kind: str) -> None:
    assert find_kind(models[kind]) == find_kind(models[kind], kind) == kind
    other = "blip" if kind != "blip" else "wd14"
    with pytest.raises(CaptionerError, match=f"of kind {kind}, not {other}"):
        find_kind(models[kind], other)


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_a_model_says_the_same_of_the_same_picture(models: dict[str, Path], kind: str) -> None:
    captioner = open_captioner(models[kind], kind)  # ty: ignore[invalid-argument-type]
    colours = np.random.default_rng(1).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    said = [captioner.caption(Image.fromarray(own)) for own in (*colours, *colours)]
    assert said[:2] == said[2:]
    assert all(isinstance(text, str) and text.strip() for text in said)
    again = open_captioner(models[kind], kind)  # ty: ignore[invalid-argument-type]
    assert again.caption(Image.fromarray(colours[0])) == said[0]


def test_blip_says_what_its_decoder_was_taught(models: dict[str, Path], tmp_path: Path) -> None:
    """A decoder whose bias makes one word certain says that word; nothing but the loaded weights decides."""
    taught = write_tiny_blip(tmp_path / "taught", word="hill")
    text = open_captioner(taught, "blip").caption(Image.new("RGB", (20, 20)))
    assert set(text.split()) == {"hill"}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "query.bias" in name)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if "query.bias" in name)] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, r"incomplete: tensor \S*query.bias is missing"),
        (of_another_shape, "cannot be loaded"),
        (truncated, "cannot be loaded"),
        (pickled, "pickled ones are not read"),
        (lambda folder: (folder / "config.json").write_text("{"), "no captioning model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": ["blip"]}'), "no captioning model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "no captioning model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "blip", "vision_config": 5}'), "cannot be"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_a_damaged_model_is_refused(
    models: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    place = copied(models["blip"], tmp_path / "damaged")
    damage(place)
    with pytest.raises(CaptionerError, match=message) as caught:
        open_captioner(place, find_kind(place))
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


# WD14


class FakeSession:
    """Of onnxruntime, as far as it is used; keeps what it was given."""

    class Input:
        def __init__(self, name: str, shape: Sequence[object]):
            self.name, self.shape = name, shape

    def __init__(self, probabilities: Sequence[float], side: object = 8):
        self.probabilities, self.side = probabilities, side
        self.given: dict[str, np.ndarray] = {}

    def get_inputs(self) -> list[Input]:
        return [self.Input("input_1:0", ["batch", self.side, self.side, 3])]

    def run(self, outputs: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.given = given
        return [np.array([self.probabilities], np.float32)]


def test_tags_are_read_and_chosen(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text(TAGS, encoding="utf-8")
    tags = read_tags(tmp_path / "tags.csv")
    assert tags[2] == Tag(name="red_hair", category=0)
    assert choose_tags(tags, [0.99, 0.35, 0.8, 0.5, 0.9]) == ["some hero (series)", "red hair", "^_^", "1girl"]
    assert choose_tags(tags, [0.99, 0.34, 0.8, 0.1, 0.84]) == ["red hair"]
    assert choose_tags(tags, [1, 0, 0, 0, 0]) == []


@given(st.lists(st.tuples(st.sampled_from([0, 4, 9]), st.floats(0, 1)), max_size=20))
def test_chosen_tags_are_the_likely_ones(drawn: list[tuple[int, float]]) -> None:
    tags = [Tag(name=f"tag_{number}", category=category) for number, (category, _) in enumerate(drawn)]
    chosen = choose_tags(tags, [probability for _, probability in drawn])
    numbers = [int(name.removeprefix("tag ")) for name in chosen]
    likely = {n for n, (category, p) in enumerate(drawn) if (category, p) >= (0, 0.35) and category == 0}
    likely |= {n for n, (category, p) in enumerate(drawn) if category == 4 and p >= 0.85}
    assert len(numbers) == len(set(numbers))
    assert set(numbers) == likely
    assert numbers == sorted(numbers, key=lambda n: (drawn[n][0] != 4, -drawn[n][1]))


def test_a_tagger_gets_blue_first_on_a_white_square() -> None:
    picture = Image.new("RGB", (8, 4), (200, 100, 50))
    pixels = tagger_pixels(picture, 8)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8, 3), np.float32)
    assert pixels[0, 4, 4].tolist() == [50, 100, 200]
    assert (pixels[0, :2] == 255).all()
    assert (pixels[0, 6:] == 255).all()
    assert (pixels[0, 2:6] == [50, 100, 200]).all()
    assert tagger_pixels(picture, 5).shape == (1, 5, 5, 3)


def test_a_tagger_writes_its_tags(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text(TAGS, encoding="utf-8")
    tags = read_tags(tmp_path / "tags.csv")
    session = FakeSession([0.9, 0.6, 0.8, 0.2, 0.1])
    assert Wd14(session=session, tags=tags).caption(Image.new("RGB", (30, 20))) == "red hair, 1girl"
    assert session.given["input_1:0"].shape == (1, 8, 8, 3)
    with pytest.raises(CaptionerError, match="4 numbers for 5 tags"):
        Wd14(session=FakeSession([0.1] * 4), tags=tags).caption(Image.new("RGB", (30, 20)))
    with pytest.raises(CaptionerError, match="square of a fixed size"):
        Wd14(session=FakeSession([0.1] * 5, side="height"), tags=tags).caption(Image.new("RGB", (30, 20)))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "name,category\nx,y\n", "name,category\nx\n", "\0"])
def test_tables_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tags.csv").write_text(text)
    for name in ("tags.csv", "none.csv"):
        with pytest.raises(CaptionerError, match=f"{name}: expected a table with the columns name and category"):
            read_tags(tmp_path / name)


def test_a_missing_onnxruntime_is_named_with_its_extra(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CaptionerError, match="onnxruntime"):
        open_captioner(models["wd14"], "wd14")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(CaptionerError, match=re.escape("is not installed (pip install 'sdlora[caption]')")):
        open_captioner(models["wd14"], "wd14")


def test_a_real_onnx_model(tmp_path: Path) -> None:
    """Whose probability of a tag is the mean of a colour: blue, green, red."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", kind, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("probabilities", kind, ["batch", 3])],
        [
            helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("scale", kind, [1], [1 / 255]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "selected_tags.csv").write_text("tag_id,name,category\n1,blue_sky,0\n2,green,0\n3,red_hat,0\n")
    assert find_kind(tmp_path) == "wd14"
    captioner = open_captioner(tmp_path, "wd14")
    assert captioner.caption(Image.new("RGB", (40, 40), (255, 10, 130))) == "red hat, blue sky"
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(CaptionerError, match="cannot be loaded"):
        open_captioner(tmp_path, "wd14")


# The verb


def test_the_verb_as_a_user_runs_it(sdlora, folder: Path, models: dict[str, Path]) -> None:
    (folder / "0.png").write_bytes(b"")
    command = ("caption", folder, "--model", models["blip"], "--trigger", "zorb")
    result = sdlora(*command, "--json")
    assert result.returncode == 1
    told = json.loads(result.stdout)
    assert (told["kind"], told["present"]) == ("blip", 2)
    assert told["written"] == [str(folder / "2.txt"), str(folder / "4.txt")]
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "0.png" in lines[0]
    assert "Traceback" not in result.stderr
    assert (folder / "2.txt").read_text().startswith("zorb, ")
    (folder / "0.png").unlink()
    again = sdlora(*command)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.strip() == f"{folder}: 0 captions written, 4 were there before"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{folder}", "--model", "nowhere"), 1, "nowhere: no such folder"),
        (("nowhere", "--model", "{blip}"), 1, "nowhere: no such folder"),
        (("{folder}", "--model", "{folder}"), 1, "no captioning model"),
        (("{folder}", "--model", "{blip}", "--kind", "wd14"), 1, "of kind blip, not wd14"),
        (("{folder}", "--model", "{blip}", "--kind", "git"), 2, "git"),
        (("{folder}",), 2, "--model"),
    ],
)
def test_wrong_uses_of_the_verb(
    sdlora, folder: Path, models: dict[str, Path], arguments: tuple[str, ...], code: int, message: str
) -> None:
    before = contents(folder)
    result = sdlora("caption", *(one.format(folder=folder, **models) for one in arguments))
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(folder) == before


SLOW_CAPTIONER = """
import signal, sys, time
from pathlib import Path
import typer
from sdlora.captioning import caption_folder
from sdlora.cli.app import guard
from sdlora.progress import Silence

# Where the tests run as a shell's background job, Ctrl-C is ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Slow:
    def caption(self, picture):
        time.sleep(0.02)
        return "word " * 200

def run():
    caption_folder(Path(sys.argv[1]), Slow, trigger="", extension=".txt", progress=Silence())

try:
    guard(run)
except typer.Exit as exit:
    sys.exit(exit.exit_code)
"""


def test_ctrl_c_and_kill_leave_whole_captions_and_the_command_goes_on(tmp_path: Path) -> None:
    """Real processes with a stand-in for the model, interrupted and killed while they write."""
    folder = write_pictures(tmp_path / "many", 200, sizes=((16, 16),))
    for file in folder.glob("*.txt"):
        file.unlink()
    whole = " ".join(["word"] * 200) + "\n"
    written = 0
    for wanted in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CAPTIONER, folder], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while len(list(folder.glob("*.txt"))) < written + 5:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(wanted)
        _, error = process.communicate(timeout=30)
        written = len(list(folder.glob("*.txt")))
        assert 0 < written < 200
        if wanted == signal.SIGINT:
            assert process.returncode == 130
            assert error.strip() == f"interrupted: {written} of 200 captions are written; the same command goes on"
        assert {file.read_text() for file in folder.glob("*.txt")} == {whole}
    assert len(run(folder).written) == 200 - written
