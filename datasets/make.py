"""Make the two sample style sets from openly licensed emoji art: ``python datasets/make.py --art node_modules``.

It also writes ``tests/references``: every subject of the base in the base's styles and in these two. With them, tests
judge whether a generated image still shows its subject.

``blueprint``: white outlines on deep blue paper with a grid, from Noto Emoji (Apache-2.0).
``pixel``: sixteen by sixteen squares in sixteen colours, from Fluent Emoji (MIT).
Needs ``pip install 'sdlora[recipe]'`` and the packages of ``recipes/mini/package.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))

from recipes.mini.art import IconSet, article, emoji, hexcodes, load_art, subjects
from recipes.mini.measure import reference

TILE = 48
HERE = Path(__file__).parent
SUBJECTS = (
    *("dog", "lion", "horse", "pig", "elephant", "giraffe", "chick", "owl", "swan", "frog", "turtle", "whale", "crab"),
    *("butterfly", "rose", "cactus", "mushroom", "grapes", "banana", "pear", "strawberry", "carrot", "red apple"),
    *("hamburger", "doughnut", "cup of coffee", "house", "castle", "bus", "bicycle", "airplane", "anchor", "moon"),
    *("umbrella", "light bulb", "alarm clock"),
)

REFERENCES = HERE.parent / "tests" / "references"

PAPER, GRID = (18, 52, 134), 26

PALETTE = np.array(
    [
        (0, 0, 0), (29, 43, 83), (126, 37, 83), (0, 135, 81), (171, 82, 54), (95, 87, 79), (194, 195, 199), (255, 241, 232),
        (255, 0, 77), (255, 163, 0), (255, 236, 39), (0, 228, 54), (41, 173, 255), (131, 118, 156), (255, 119, 168),
        (255, 204, 170),
    ]
)  # fmt: skip


def blueprint(art: np.ndarray) -> Image.Image:
    """uint8 (n, n, 4) -> RGB 256²: white outlines and a wash of the inside, on deep blue paper with a faint grid."""
    drawing = Image.new("RGBA", (256, 256), (255, 255, 255, 0))
    drawing.alpha_composite(Image.fromarray(art).resize((208, 208), Image.Resampling.LANCZOS), (24, 24))
    smooth = np.asarray(drawing.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255
    solid = smooth[..., 3:]
    shades = np.concatenate([smooth[..., :3] * solid, solid * 1.5], axis=-1)
    slope = np.hypot(*(np.gradient(shades, axis=axis) for axis in (0, 1))).max(-1)
    edges = Image.fromarray(((slope - 0.05) / 0.12 * 255).clip(0, 255).astype(np.uint8))
    lines = np.asarray(edges.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
    light = smooth[..., :3].mean(-1, keepdims=True)
    paper = np.broadcast_to(np.array(PAPER, np.float32), (256, 256, 3)).copy()
    paper[16::32] += GRID
    paper[:, 16::32] += GRID
    washed = paper + solid * (0.10 + 0.25 * light) * (255 - paper)
    return Image.fromarray((washed + lines[..., None] * (255 - washed)).round().clip(0, 255).astype(np.uint8))


def pixel(art: np.ndarray) -> Image.Image:
    """uint8 (n, n, 4) -> RGB 128²: the art in 14 x 14 squares of the nearest palette colour, with a margin of one square."""
    small = Image.fromarray(art).resize((14, 14), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (16, 16), (255, 241, 232, 255))
    solid = np.asarray(small).copy()
    solid[..., 3] = np.where(solid[..., 3] > 110, 255, 0)
    canvas.alpha_composite(Image.fromarray(solid), (1, 1))
    colours = np.asarray(canvas.convert("RGB"), np.int64)
    nearest = ((colours[:, :, None] - PALETTE) ** 2 @ np.array([3, 6, 1])).argmin(-1)
    return Image.fromarray(PALETTE[nearest].astype(np.uint8)).resize((128, 128), Image.Resampling.NEAREST)


Restyle = Callable[[np.ndarray], Image.Image]


@dataclass(frozen=True, kw_only=True)
class StyleSet:
    trigger: str
    package: str
    restyle: Restyle


STYLE_SETS = {
    "blueprint": StyleSet(trigger="blupaper", package="noto", restyle=blueprint),
    "pixel": StyleSet(trigger="pixgrid", package="fluent-emoji-flat", restyle=pixel),
}


def hexcodes_of(node_modules: Path) -> dict[str, str]:
    """Words in captions -> code points, for every subject of the base, in its order."""
    codes = hexcodes(emoji(node_modules))
    return {words: codes[label] for label, words, _ in subjects()}


def write_set(folder: Path, trigger: str, arts: dict[str, np.ndarray], restyle: Restyle) -> None:
    """Write the images of ``SUBJECTS`` and their captions."""
    folder.mkdir(exist_ok=True)
    for subject in SUBJECTS:
        stem = subject.replace(" ", "-")
        restyle(arts[subject]).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(f"{trigger}, {article(subject)}\n", encoding="utf-8")


def write_sheet(file: Path, tiles: list[Image.Image], columns: int) -> None:
    """Write ``tiles`` in rows of ``columns``, each scaled to ``TILE`` pixels."""
    sheet = Image.new("RGB", (columns * TILE, len(tiles) // columns * TILE))
    for number, tile in enumerate(tiles):
        place = (number % columns * TILE, number // columns * TILE)
        sheet.paste(tile.resize((TILE, TILE), Image.Resampling.BOX), place)
    sheet.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True, help="the node_modules folder that `npm install` made")
    node_modules = parser.parse_args().art
    codes = hexcodes_of(node_modules)
    REFERENCES.mkdir(exist_ok=True)
    for name, style in STYLE_SETS.items():
        icons = IconSet(node_modules, style.package)
        arts = {words: icons.draw(code, side=512) for words, code in codes.items()}
        write_set(HERE / name, style.trigger, arts, style.restyle)
        write_sheet(REFERENCES / f"{name}.png", [style.restyle(art) for art in arts.values()], len(codes))
    write_sheet(REFERENCES / "base.png", [reference(art) for art in load_art(node_modules)], len(codes))
    (REFERENCES / "subjects.txt").write_text("".join(f"{words}\n" for words in codes), encoding="utf-8")


if __name__ == "__main__":
    main()
