"""A run lists its folders, finds its base and decodes its images once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageFile

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.data.sources import find_sources
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.training_runs import config_for


class FirstStepError(Exception):
    """Everything before the first step is done."""


def count_calls(patch: pytest.MonkeyPatch, function: Callable, counts: Counter[str]) -> None:
    """Count the calls of ``function`` wherever a module of the package has imported it."""

    def counted(*arguments, **options):
        counts[function.__name__] += 1
        return function(*arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("sdlora.") and vars(module).get(function.__name__) is function:
            patch.setattr(module, function.__name__, counted)


def test_each_image_is_decoded_once_before_the_first_step(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 6, sizes=((64, 64), (200, 60)))
    Image.effect_noise((64, 64), 50).convert("RGB").save(images / "5.png", format="PNG")
    with Image.open(images / "4.png") as image:
        image.save(images / "4.jpg", quality=95)
    (images / "4.png").unlink()
    config = config_for(
        tiny_base, images, tmp_path / "x.safetensors", f"cache.folder={tmp_path / 'cache'}", "data.crop=salient"
    )
    opened: Counter[str] = Counter()
    loaded: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    real_open, real_load = Image.open, ImageFile.ImageFile.load

    def counted_open(source, *arguments, **options):
        opened[Path(source).name] += 1
        return real_open(source, *arguments, **options)

    def counted_load(self, *arguments):
        if self.tile:  # What is decoded already has none.
            loaded[Path(self.filename).name] += 1
        return real_load(self, *arguments)

    def stop(*_):
        raise FirstStepError

    files = {file.name for file in images.iterdir() if file.suffix != ".txt"}
    for cache in ("empty", "full"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "open", counted_open)
            patch.setattr(ImageFile.ImageFile, "load", counted_load)
            patch.setattr(TrainingSession, "step", stop)
            count_calls(patch, find_base, calls)
            count_calls(patch, find_sources, calls)
            with pytest.raises(FirstStepError):
                sdlora.train(config, restart=True)
        assert opened == dict.fromkeys(files, 1), f"{cache} cache"
        assert loaded == dict.fromkeys(files, 1), f"{cache} cache"
        assert calls == {"find_base": 1, "find_sources": 1}
        for counter in (opened, loaded, calls):
            counter.clear()
