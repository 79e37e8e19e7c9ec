"""Captioning models: BLIP and Florence-2 from folders, WD14 tags, and models that are refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.captioning.models import Tag, Wd14, choose_tags, find_kind, open_captioner, read_tags, tagger_pixels
from sdlora.errors import CaptionerError
from tests.tiny_captioners import TAGS, write_tiny_blip

# Models


@pytest.mark.parametrize("kind", ["blip", "florence", "wd14"])
def test_the_kind_of_a_folder(models: dict[str, Path], kind: str) -> None:
    assert find_kind(models[kind]) == find_kind(models[kind], kind) == kind
    other = "blip" if kind != "blip" else "wd14"
    with pytest.raises(CaptionerError, match=f"of kind {kind}, not {other}"):
        find_kind(models[kind], other)


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_a_model_says_the_same_of_the_same_image(models: dict[str, Path], kind: str) -> None:
    captioner = open_captioner(models[kind], kind)  # ty: ignore[invalid-argument-type]
    colours = np.random.default_rng(1).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    said = [captioner.caption(Image.fromarray(pixels)) for pixels in (*colours, *colours)]
    assert said[:2] == said[2:]
    assert all(isinstance(text, str) and text.strip() for text in said)
    again = open_captioner(models[kind], kind)  # ty: ignore[invalid-argument-type]
    assert again.caption(Image.fromarray(colours[0])) == said[0]


def test_blip_says_what_its_decoder_was_taught(models: dict[str, Path], tmp_path: Path) -> None:
    """A decoder whose bias makes one word certain says that word: the loaded weights alone decide."""
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
    """Stands in for ``onnxruntime.InferenceSession``; keeps its inputs."""

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


def test_a_tagger_gets_bgr_pixels_on_a_white_square() -> None:
    image = Image.new("RGB", (8, 4), (200, 100, 50))
    pixels = tagger_pixels(image, 8)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8, 3), np.float32)
    assert pixels[0, 4, 4].tolist() == [50, 100, 200]
    assert (pixels[0, :2] == 255).all()
    assert (pixels[0, 6:] == 255).all()
    assert (pixels[0, 2:6] == [50, 100, 200]).all()
    assert tagger_pixels(image, 5).shape == (1, 5, 5, 3)


def test_a_tagger_writes_its_tags(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text(TAGS, encoding="utf-8")
    tags = read_tags(tmp_path / "tags.csv")
    session = FakeSession([0.9, 0.6, 0.8, 0.2, 0.1])
    assert Wd14(session=session, tags=tags).caption(Image.new("RGB", (30, 20))) == "red hair, 1girl"
    assert session.given["input_1:0"].shape == (1, 8, 8, 3)
    with pytest.raises(CaptionerError, match="4 probabilities for 5 tags"):
        Wd14(session=FakeSession([0.1] * 4), tags=tags).caption(Image.new("RGB", (30, 20)))
    with pytest.raises(CaptionerError, match="square of a fixed size"):
        Wd14(session=FakeSession([0.1] * 5, side="height"), tags=tags).caption(Image.new("RGB", (30, 20)))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "name,category\nx,y\n", "name,category\nx\n", "\0"])
def test_files_that_are_no_table_of_tags(tmp_path: Path, text: str) -> None:
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
    """The probability of each tag is the mean of one colour: blue, green, red."""
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
