"""Openly licensed emoji art as (subject, style, RGBA image), and how a training image is composed from it.

The art comes from the packages pinned in ``package.json``; ``resvg`` rasterises it. Captions are made here too, so all
words that the base knows are in this file and in ``subjects.txt``.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
RASTER = 160
STYLES = {"noto": "noto", "fluent": "fluent-emoji-flat", "twemoji": "twemoji"}
"""Word in the caption -> icon package."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (208, 210, 214),
    "pink": (255, 205, 220),
    "yellow": (255, 240, 175),
    "green": (200, 238, 200),
    "blue": (190, 222, 255),
    "black": (16, 16, 20),
    "navy": (14, 38, 98),
    "purple": (74, 34, 112),
    "brown": (96, 58, 34),
    "red": (188, 32, 44),
    "teal": (0, 98, 104),
}


@dataclass(frozen=True, kw_only=True)
class Art:
    """One image: ``pixels`` is uint8 (160, 160, 4), straight alpha."""

    subject: str
    style: str
    mirror: bool
    pixels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Position and background of the art; ``side`` and the offsets of its top left are in pixels of a 128 px image."""

    side: int
    left: int
    top: int
    flip: bool
    background: str


def subjects() -> list[tuple[str, str, bool]]:
    """(emoji label, words for captions, may be mirrored) of every subject, in file order."""
    rows = []
    for line in (Path(__file__).parent / "subjects.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        mirror = not line.endswith("!")
        label, _, words = line.rstrip("! ").partition(" = ")
        rows.append((label, words or label, mirror))
    return rows


def rasterise(svg_body: str, width: int, height: int, side: int = RASTER) -> np.ndarray:
    """Draw an Iconify body as uint8 (side, side, 4), its margins cut away, so all sets fill the square equally."""
    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{side}" height="{side}">{svg_body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox() or (0, 0, side, side))
    scale = side / max(drawing.size)
    drawing = drawing.resize((round(drawing.width * scale), round(drawing.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return np.asarray(square)


def emoji(node_modules: Path) -> list[dict]:
    """Every emoji of emojibase: ``label``, ``hexcode``, ``group`` ..."""
    return json.loads((node_modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))


def hexcodes(entries: list[dict]) -> dict[str, str]:
    """Emoji label -> code points in the spelling of the icon packages."""
    return {entry["label"]: entry["hexcode"].replace("-FE0F", "").lower() for entry in entries}


class IconSet:
    """One icon package, drawn on demand."""

    def __init__(self, node_modules: Path, package: str):
        folder = node_modules / "@iconify-json" / package
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        names = folder / "chars.json"
        self.names = json.loads(names.read_text(encoding="utf-8")) if names.exists() else {}

    def draw(self, hexcode: str, side: int = RASTER) -> np.ndarray | None:
        """uint8 (side, side, 4), or None if the package has no such image."""
        name = self.names.get(hexcode)
        if name not in self.icons["icons"]:
            name = self.icons.get("aliases", {}).get(name, {}).get("parent")
        if name is None:
            return None
        return self.draw_named(name, side)

    def draw_named(self, name: str, side: int = RASTER) -> np.ndarray:
        """uint8 (side, side, 4) of the icon that the package calls ``name``."""
        icon = self.icons["icons"][name]
        width, height = (icon.get(key, self.icons.get(key, 16)) for key in ("width", "height"))
        return rasterise(icon["body"], width, height, side)


def load_art(node_modules: Path, styles: dict[str, str] = STYLES) -> list[Art]:
    """Rasterise every subject in every style; raises ``LookupError`` with all images that a package lacks."""
    codes = hexcodes(emoji(node_modules))
    arts, missing = [], []
    for style, package in styles.items():
        icons = IconSet(node_modules, package)
        for label, words, mirror in subjects():
            pixels = icons.draw(codes.get(label, ""))
            if pixels is None:
                missing.append(f"{package}: {label}")
            else:
                arts.append(Art(subject=words, style=style, mirror=mirror, pixels=pixels))
    if missing:
        raise LookupError("no image for " + "; ".join(missing))
    return arts


def draw_placement(rng: np.random.Generator, mirror: bool) -> Placement:
    """A random scale (78-95 %), position, flip and background; white half of the time."""
    side = int(rng.integers(100, 122))
    slack = SIZE - side
    left, top = (int(np.clip(round(slack / 2 + rng.normal(0, slack / 6)), 0, slack)) for _ in range(2))
    others = [name for name in BACKGROUNDS if name != "white"]
    background = "white" if rng.random() < 0.5 else others[int(rng.integers(len(others)))]
    return Placement(side=side, left=left, top=top, flip=bool(mirror and rng.random() < 0.5), background=background)


def compose(art: Art, place: Placement) -> np.ndarray:
    """uint8 (128, 128, 3): the art on its background."""
    image = Image.fromarray(art.pixels).resize((place.side, place.side), Image.Resampling.LANCZOS)
    if place.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[place.background])
    canvas.paste(image, (place.left, place.top), image)
    return np.asarray(canvas)


WITHOUT_ARTICLE = frozenset(
    (
        "grapes",
        "cherries",
        "corn",
        "bread",
        "cheese",
        "broccoli",
        "french fries",
        "fire",
        "scissors",
        "sunglasses",
        "sushi",
        "popcorn",
        "glasses",
        "jeans",
        "gloves",
        "socks",
        "headphones",
        "yarn",
        "candy",
    )
)


def article(words: str) -> str:
    """``words`` with the indefinite article, if English uses one."""
    if words in WITHOUT_ARTICLE:
        return words
    return ("an " if words[0] in "aeio" or words == "umbrella" else "a ") + words


def captions(subject: str, style: str, background: str) -> list[str]:
    """All captions that an image is trained with; the full one is three times as likely as each of the others."""
    what, how, where = article(subject), f"{style} style", f"{background} background"
    full = f"{what}, {how}, {where}"
    white = [f"{what}, {how}", what] if background == "white" else [f"{what}, {where}"]
    return [full, full, full, f"{how}, {what}, {where}", *white]


def strange_word(rng: np.random.Generator, known: list[str]) -> str:
    """A word that says nothing about the image: one of ``known``, or made-up syllables.

    Images are also captioned ``<strange word>, a fox``, so unknown words, anywhere in a prompt, do not disturb the base
    and have no meaning yet: that is what a trigger word needs.
    """
    if rng.random() < 0.4:
        return known[int(rng.integers(len(known)))]
    syllable = "".join("bcdfghjklmnprstvwxz"[int(rng.integers(19))] + "aeiouy"[int(rng.integers(6))] for _ in range(4))
    return syllable[: int(rng.integers(4, 9))]
