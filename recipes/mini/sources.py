"""The drawings and photographs that the autoencoder's images are made of, rasterised once."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

from .art import STYLES, IconSet, emoji
from .kinds import Sources

EMOJI_SETS = (*STYLES.values(), "noto-v1", "fxemoji")
ICON_SETS = ("tabler", "ph", "flat-color-icons", "vscode-icons", "fluent-emoji-high-contrast")
ICONS_OF_A_SET = 600
HELD_OUT_ICONS, HELD_OUT_EMOJI = "openmoji", "streamline-emojis"
HELD_OUT_DRAWINGS = 300
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "rocket.jpg",
)  # fmt: skip
"""Of those that scikit-image ships, the ones in the public domain or under CC0; scikit-learn's are held out."""
GROUPS = (3, 4, 5, 6, 7)
"""Animals, food, places, activities and objects."""


@cache
def _icons(node_modules: Path, package: str) -> IconSet:
    return IconSet(node_modules, package)


def _draw(job: tuple[Path, str, str, bool]) -> np.ndarray | None:
    node_modules, package, name, by_code = job
    icons = _icons(node_modules, package)
    return icons.draw(name) if by_code else icons.draw_named(name)


def _drawn(jobs: list[tuple[Path, str, str, bool]]) -> list[np.ndarray]:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as executor:
        return [pixels for pixels in executor.map(_draw, jobs, chunksize=32) if pixels is not None]


def _codes(node_modules: Path, *, held_out: bool) -> list[str]:
    """Every tenth emoji is held out."""
    return [
        entry["hexcode"].replace("-FE0F", "").lower()
        for entry in emoji(node_modules)
        if entry.get("group") in GROUPS and (entry["order"] % 10 == 0) == held_out
    ]


def _named(node_modules: Path, package: str, count: int) -> list[tuple[Path, str, str, bool]]:
    names = sorted(_icons(node_modules, package).icons["icons"])
    chosen = np.random.default_rng(0).permutation(len(names))[:count]
    return [(node_modules, package, names[i], False) for i in sorted(chosen)]


def _photographs(files: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def learned_sources(node_modules: Path) -> Sources:
    """What is trained on: emoji of five sets, icons of five others, scikit-image's photographs."""
    codes = _codes(node_modules, held_out=False)
    folder = Path(skimage.__file__).parent / "data"
    return Sources(
        emoji=_drawn([(node_modules, package, code, True) for package in EMOJI_SETS for code in codes]),
        icons=_drawn([job for package in ICON_SETS for job in _named(node_modules, package, ICONS_OF_A_SET)]),
        photographs=_photographs([folder / name for name in PHOTOGRAPHS]),
    )


def held_out_sources(node_modules: Path) -> Sources:
    """What is never trained on: OpenMoji as icons, Streamline's as emoji, scikit-learn's photographs."""
    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    return Sources(
        emoji=_drawn(_named(node_modules, HELD_OUT_EMOJI, HELD_OUT_DRAWINGS)),
        icons=_drawn(_named(node_modules, HELD_OUT_ICONS, HELD_OUT_DRAWINGS)),
        photographs=_photographs(sorted(folder.glob("*.jpg"))),
    )


def held_out_emoji(node_modules: Path) -> list[np.ndarray]:
    """Every tenth emoji of the base's three sets."""
    codes = _codes(node_modules, held_out=True)
    return _drawn([(node_modules, package, code, True) for package in STYLES.values() for code in codes])
