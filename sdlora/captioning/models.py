"""Captioning models, from a folder on this disk. Nothing is fetched, and no code from the folder is run.

BLIP (Li et al. 2022) and Florence-2 (Xiao et al. 2023) write sentences; the WD14 taggers (SmilingWolf) write Danbooru
tags.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from ..errors import CaptionerError

CaptionerKind = Literal["blip", "florence", "wd14"]
KINDS: tuple[CaptionerKind, ...] = get_args(CaptionerKind)

MAX_NEW_TOKENS = 75
"""About the length of one chunk of the text encoder."""
BEAMS = 3
FLORENCE_TASK = "<DETAILED_CAPTION>"
GENERAL_THRESHOLD, CHARACTER_THRESHOLD = 0.35, 0.85
"""Lowest probabilities at which a tag is written, as the taggers' author recommends."""

_MODEL_TYPES = {"blip": "blip", "florence2": "florence"}
"""``model_type`` in config.json -> kind."""
_ONNX, _TAGS = "model.onnx", "selected_tags.csv"
_CUDA = "CUDAExecutionProvider"
_PROVIDERS = (_CUDA, "CPUExecutionProvider")
"""What onnxruntime computes with, the first that works. Named, since it would try TensorRT first, which builds an engine."""
IMAGES_AT_ONCE = 8
"""On a GPU. On the CPU it is one: a batch is not faster there."""


class Captioner(Protocol):
    """A model that describes images."""

    @property
    def at_once(self) -> int:
        """How many images are worth describing together."""
        return 1

    def caption(self, image: Image.Image) -> str:
        """Describe an RGB image of any size; equal images get equal captions. May be empty."""
        ...

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """``caption`` of each, of ``at_once`` at most."""
        return [self.caption(image) for image in images]


def find_kind(folder: Path, requested: str = "auto") -> CaptionerKind:
    """Detect the kind of the model in ``folder`` from its files, without reading weights.

    Raises:
        CaptionerError: there is no model, its kind is unknown or not the ``requested`` one, or its weights are pickled.
    """
    if not folder.is_dir():
        raise CaptionerError(f"{folder}: no such folder; pass the folder of a captioning model with --model")
    found = _found_kind(folder)
    if found is None:
        raise CaptionerError(
            f"{folder}: no captioning model: expected a config.json of BLIP or Florence-2, or {_ONNX} with {_TAGS}"
        )
    if requested not in ("auto", found):
        raise CaptionerError(f"{folder}: holds a model of kind {found}, not {requested}; leave out --kind")
    if found != "wd14" and not any(folder.glob("*.safetensors")):
        raise CaptionerError(
            f"{folder}: holds no .safetensors weights, and pickled ones are not read, since they can run code; "
            "save the model again with save_pretrained"
        )
    return found


def _found_kind(folder: Path) -> CaptionerKind | None:
    if (folder / _ONNX).is_file() and (folder / _TAGS).is_file():
        return "wd14"
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    kind = _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    return next((known for known in KINDS if known == kind), None)


def open_captioner(folder: Path, kind: CaptionerKind) -> Captioner:
    """Load the model, onto a GPU if there is one.

    Raises:
        CaptionerError: it is damaged or incomplete, or a package that it needs is not installed.
    """
    if kind == "wd14":
        session = _onnx_session(folder / _ONNX)
        return Wd14(session=session, tags=read_tags(folder / _TAGS), at_once=_images_at_once(session))
    _quiet_libraries()
    import transformers

    names = {"blip": "Blip", "florence": "Florence2"}
    model_class = getattr(transformers, f"{names[kind]}ForConditionalGeneration")
    processor_class = getattr(transformers, f"{names[kind]}Processor")
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # The library raises many types for a folder that is not what it claims to be.
        raise CaptionerError(f"{folder}: the model cannot be loaded: {first_line(error)}") from None
    # The library fills missing tensors with random numbers.
    if missing := sorted(report["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CaptionerError(f"{folder}: the model is incomplete: tensor {missing[0]}{more} is missing")
    from ..base.precision import choose_device, choose_precision

    device = choose_device()
    dtype = choose_precision("auto", device, unet_parameters=0, generating=True)
    return Sentences(
        model=model.to(dtype).eval().to(device),
        processor=processor,
        task=FLORENCE_TASK if kind == "florence" else None,
        at_once=1 if device.type == "cpu" else IMAGES_AT_ONCE,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sentences(Captioner):
    """BLIP or Florence-2 of transformers, with beam search and no sampling. ``task`` is Florence-2's prompt."""

    model: Any
    processor: Any
    task: str | None
    at_once: int = 1

    def caption(self, image: Image.Image) -> str:
        return self.captions([image])[0]

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        import torch

        prompts = {"text": [self.task] * len(images)} if self.task else {}
        inputs = self.processor(images=list(images), return_tensors="pt", **prompts)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs.to(self.model.device, self.model.dtype),
                max_new_tokens=MAX_NEW_TOKENS,
                num_beams=BEAMS,
                do_sample=False,
            )
        return self.processor.batch_decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One of the tags that a tagger knows."""

    name: str
    category: int
    """0 general, 4 character, 9 rating."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wd14(Captioner):
    """A tagger: (b, side, side, 3) float32, BGR, 0 to 255 -> a probability for each of ``tags``, (b, tags)."""

    session: Any
    """An ``onnxruntime.InferenceSession``."""
    tags: Sequence[Tag]
    at_once: int = 1

    def caption(self, image: Image.Image) -> str:
        return self.captions([image])[0]

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        (model_input,) = self.session.get_inputs()
        _, height, width, _ = model_input.shape
        if not (isinstance(height, int) and height == width):
            raise CaptionerError(f"{_ONNX}: takes images of {height} x {width}; expected a square of a fixed size")
        pixels = np.concatenate([tagger_pixels(image, height) for image in images])
        (probabilities,) = self.session.run(None, {model_input.name: pixels})
        if probabilities.shape != (len(images), len(self.tags)):
            counts = f"{probabilities.shape[-1]} probabilities for {len(self.tags)} tags"
            raise CaptionerError(f"{_ONNX}: returns {counts}; {_TAGS} belongs to another model")
        return [", ".join(choose_tags(self.tags, row)) for row in probabilities.tolist()]


def read_tags(file: Path) -> tuple[Tag, ...]:
    """The tags in the order of the model's outputs.

    Raises:
        CaptionerError: the file is unreadable, or lacks the columns ``name`` and ``category``.
    """
    tags: tuple[Tag, ...] = ()
    with (
        suppress(OSError, ValueError, KeyError, TypeError, csv.Error),
        file.open(encoding="utf-8", newline="") as stream,
    ):
        tags = tuple(Tag(name=row["name"], category=int(row["category"])) for row in csv.DictReader(stream))
    if not tags:
        raise CaptionerError(f"{file}: expected a table with the columns name and category")
    return tags


def choose_tags(tags: Sequence[Tag], probabilities: Sequence[float]) -> list[str]:
    """Names of the likely tags, characters first, each category by falling probability; ratings are left out.

    Underscores become spaces, except in faces of up to three letters such as ``^_^``.
    """
    chosen = []
    for category, threshold in ((4, CHARACTER_THRESHOLD), (0, GENERAL_THRESHOLD)):
        pairs = zip(probabilities, tags, strict=True)
        likely = [(p, tag.name) for p, tag in pairs if tag.category == category and p >= threshold]
        chosen += [name for _, name in sorted(likely, key=lambda pair: -pair[0])]
    return [name.replace("_", " ") if len(name) > 3 else name for name in chosen]


def tagger_pixels(image: Image.Image, side: int) -> np.ndarray:
    """``image`` on a white square -> (1, side, side, 3) float32, BGR, 0 to 255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32)[None, :, :, ::-1].copy()


def _onnx_session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as fault:
        absent = isinstance(fault, ModuleNotFoundError) and fault.name == "onnxruntime"
        reason = "is not installed (pip install 'sdlora[caption]')" if absent else f"cannot be imported: {fault}"
        raise CaptionerError(f"{file}: needs onnxruntime, which {reason}") from None
    available = onnxruntime.get_available_providers()
    try:
        return onnxruntime.InferenceSession(str(file), providers=[name for name in _PROVIDERS if name in available])
    except Exception as error:  # Its own types, which share no base class.
        raise CaptionerError(f"{file}: the model cannot be loaded: {first_line(error)}") from None


def _images_at_once(session: Any) -> int:
    """One on the CPU, and where the model takes no more."""
    (model_input,) = session.get_inputs()
    takes_one = isinstance(model_input.shape[0], int)
    return 1 if takes_one or _CUDA not in session.get_providers() else IMAGES_AT_ONCE


def first_line(error: Exception) -> str:
    """The first line of the message of ``error``; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _quiet_libraries() -> None:
    """Keep progress bars and warnings of diffusers and transformers off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
