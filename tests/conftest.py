"""Fixtures: tiny random models, small folders of real image files, and a way to run the command as a user does."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each of the processes that share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

    from sdlora.cache.store import EncodedCache

ROOT = Path(__file__).parent.parent

# A busy machine makes any example slow; what must be fast has a benchmark.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


LONGEST_FIRST = (
    "test_style",
    "test_docs",
    "test_memory_presets",
    "test_recipes_benchmark",
    "test_front_door",
    "test_mini",
)
"""Files that start first where several processes share the tests, so that none is left alone with a long one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """Whole files go to a process, in the order above: what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests encode is kept in a folder of theirs, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Stable Diffusion 1.x's architecture with a few thousand random weights, for 64 px."""
    from tests.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a single file in LDM's names, of ``tests.tiny.tiny_pipeline`` of that family; not to be changed."""
    from sdlora.families import FAMILIES
    from tests.tiny import write_tiny_ldm

    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_tiny_ldm(folder / f"{family}.safetensors", family)
    return {family: folder / f"{family}.safetensors" for family in FAMILIES}


def write_images(folder: Path, count: int = 5, *, sizes: tuple[tuple[int, int], ...] = ((64, 64),)) -> Path:
    """``count`` PNGs of random colour fields with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a thing of kind {i}", encoding="utf-8")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def run_sdlora(*arguments: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "sdlora.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def sdlora(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_sdlora`` in an empty folder."""
    return partial(run_sdlora, cwd=tmp_path)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The finished ``sdlora quickstart --json``, as a newcomer runs it."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return run_sdlora("quickstart", "--out", out, "--json", cwd=ROOT, timeout=900)


@pytest.fixture
def cache(tmp_path: Path) -> EncodedCache:
    from sdlora.cache.store import EncodedCache

    return EncodedCache(tmp_path / "cache", 1e9)


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(images, output) of an uninterrupted run; not to be changed."""
    import sdlora as package
    from tests.training_runs import config_for

    folder = tmp_path_factory.mktemp("finished")
    images = write_images(folder / "images", 5, sizes=((64, 64), (80, 48)))
    package.train(config_for(tiny_base, images, folder / "x.safetensors"))
    return images, folder / "x.safetensors"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a folder of a random captioning model of it; not to be changed."""
    from tests.tiny_captioners import TAGS, write_tiny_blip, write_tiny_florence

    place = tmp_path_factory.mktemp("models")
    write_tiny_blip(place / "blip")
    write_tiny_florence(place / "florence")
    (place / "wd14").mkdir()
    (place / "wd14" / "model.onnx").write_bytes(b"not looked at")
    (place / "wd14" / "selected_tags.csv").write_text(TAGS)
    return {kind: place / kind for kind in ("blip", "florence", "wd14")}
