"""Captions of several images at once are those of one by one; half precision and providers on a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.base import precision
from sdlora.captioning import models as captioners
from sdlora.captioning.folder import write_captions
from sdlora.captioning.models import IMAGES_AT_ONCE, Captioner, Sentences, Tag, Wd14, open_captioner
from sdlora.errors import CaptionerError
from sdlora.progress import Silence
from tests.conftest import write_images


def random_images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = [(20 + 7 * number, 60 - 5 * number) for number in range(count)]
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def opened(folder: Path, kind: Any) -> Sentences:
    captioner = open_captioner(folder, kind)
    assert isinstance(captioner, Sentences)
    return captioner


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_sentences_in_a_batch_are_those_of_one_by_one(models: dict[str, Path], kind: str) -> None:
    captioner, images = opened(models[kind], kind), random_images(5)
    assert captioner.at_once == 1
    assert captioner.captions(images) == [captioner.caption(image) for image in images]


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_half_precision_describes_images(models: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose_precision", lambda *_, **__: torch.float16)
    captioner, images = opened(models[kind], kind), random_images(3)
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.float16}
    said = captioner.captions(images)
    assert len(said) == 3
    assert all(text.strip() for text in said)


def test_a_gpu_gets_half_precision_and_batches(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for a GPU."""
    asked: list[Any] = []

    def choose(requested: str, device: torch.device, **more: Any) -> torch.dtype:
        asked.append((requested, device.type, more["generating"]))
        return torch.float16

    monkeypatch.setattr(precision, "choose_device", lambda: torch.device("meta"))
    monkeypatch.setattr(precision, "choose_precision", choose)
    captioner = opened(models["blip"], "blip")
    assert (captioner.at_once, captioner.model.device.type, captioner.model.dtype) == (8, "meta", torch.float16)
    assert asked == [("auto", "meta", True)]


class Session:
    """A tagger whose probabilities are the mean of each colour; ``first`` is the number of images that it takes."""

    class Input:
        name = "pixels"

        def __init__(self, first: object):
            self.shape = [first, 16, 16, 3]

    def __init__(self, first: object = "batch", providers: Sequence[str] = ()):
        self.first, self.providers = first, list(providers)

    def get_inputs(self) -> list[Input]:
        return [self.Input(self.first)]

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [given["pixels"].mean((1, 2)) / 255]


def test_tags_in_a_batch_are_those_of_one_by_one() -> None:
    tags = [Tag(name=name, category=0) for name in ("blue", "green", "red")]
    tagger = Wd14(session=Session(), tags=tags)
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "black", "white")]
    assert tagger.captions(images) == [tagger.caption(image) for image in images]
    assert tagger.captions(images)[2] != tagger.captions(images)[3]
    with pytest.raises(CaptionerError, match="3 probabilities for 2 tags"):
        Wd14(session=Session(), tags=tags[:2]).captions(images)


def test_cuda_is_named_before_the_cpu_and_nothing_else(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    named: list[list[str]] = []

    def session(file: str, *, providers: list[str]) -> Session:
        named.append(providers)
        return Session(providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for available in (["TensorrtExecutionProvider", cuda, cpu], ["AzureExecutionProvider", cpu]):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda available=available: available)
        named.append([str(open_captioner(models["wd14"], "wd14").at_once)])
    assert named == [[cuda, cpu], [str(IMAGES_AT_ONCE)], [cpu], ["1"]]
    assert captioners._images_at_once(Session(first=1, providers=[cuda])) == 1


class Several(Captioner):
    """Three at once; fails on several if one is ``bad``, by its width."""

    def __init__(self, bad: int = 0):
        self.bad, self.calls = bad, []

    @property
    def at_once(self) -> int:
        return 3

    def caption(self, image: Image.Image) -> str:
        raise AssertionError("one by one")

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        self.calls.append([image.width for image in images])
        if self.bad in self.calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return [f"width {image.width}" for image in images]


def described(folder: Path, captioner: Several) -> list[str]:
    report = write_captions(folder, lambda: captioner, trigger="", extension=".txt", progress=Silence())
    texts = {file.stem: file.read_text().strip() for file in folder.glob("*.txt")}
    assert [Path(file).stem for file in report.written] == sorted(texts)
    assert [int(texts[stem].split()[1]) for stem in sorted(texts)] == [8 + int(stem) for stem in sorted(texts)]
    return list(report.problems)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0 to 4, of 8 to 12 pixels' width, without captions."""
    made = write_images(tmp_path / "x", 5, sizes=tuple((8 + number, 8) for number in range(5)))
    for file in made.glob("*.txt"):
        file.unlink()
    return made


def test_a_folder_is_described_in_batches(folder: Path) -> None:
    captioner = Several()
    assert described(folder, captioner) == []
    assert captioner.calls == [[8, 9, 10], [11, 12]]


def test_an_unreadable_image_leaves_its_batch(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    captioner = Several()
    (problem,) = described(folder, captioner)
    assert problem.startswith(str(folder / "1.png"))
    assert captioner.calls == [[8, 10], [11, 12]]


def test_a_batch_that_fails_is_tried_one_by_one_and_the_image_is_named(folder: Path) -> None:
    captioner = Several(bad=9)
    with pytest.raises(CaptionerError, match=re.escape("1.png: the model failed on this image: CUDA out of memory")):
        described(folder, captioner)
    assert captioner.calls == [[8, 9, 10], [8], [9]]
    assert (folder / "0.txt").read_text() == "width 8\n"
