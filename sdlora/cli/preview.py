"""``--preview``: images under way, in the bar's place where the terminal can show them, or in a file."""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..errors import SdloraError
from ..files import check_target
from ..progress import Progress, Task, progress_bar

if TYPE_CHECKING:
    from PIL import Image

TERMINAL = "terminal"
_ROWS = 16
"""Lines of the terminal that an image fills."""
_PIXELS_IN_ROW = 18
_CHUNK = 4096
"""Bytes of an escape sequence of kitty's at most."""
_SIXEL_COLOURS = 64
_SIXEL_ROWS = 6
_SAVE, _RESTORE, _CLEAR = "\x1b7", "\x1b8", "\r\x1b[2K"


@contextmanager
def preview_progress(where: str | None) -> Generator[Progress | None]:
    """What shows the progress, and images under way at ``where``: ``terminal`` or a PNG file; None where nothing is asked.

    Raises:
        SdloraError: the terminal shows no images, or the file is no PNG.
        TargetError: the file cannot be written.
    """
    if where is None:
        yield None
    elif where == TERMINAL:
        protocol = image_protocol(os.environ) if sys.stderr.isatty() else None
        if protocol is None:
            raise SdloraError(
                "--preview terminal: this terminal is not known to show images (kitty, iTerm2, WezTerm, Ghostty, foot and "
                "mlterm do, outside tmux and screen); name a file that ends in .png"
            )
        with TerminalPreview(sys.stderr, protocol) as shown:
            yield shown
    else:
        from ..generation.preview import FilePreview

        file = Path(where).expanduser()
        if file.suffix.lower() != ".png":
            raise SdloraError(f"--preview {where}: expected {TERMINAL}, or a file that ends in .png")
        check_target(file, "file")
        with progress_bar() as bar:
            yield FilePreview(bar, file)


def image_protocol(environment: Mapping[str, str]) -> str | None:
    """How the terminal of these variables shows images: ``kitty``, ``iterm2`` or ``sixel``; None if that is not known."""
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or terminal.startswith(("screen", "tmux")):
        return None
    if "KITTY_WINDOW_ID" in environment or terminal in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if terminal.startswith(("foot", "mlterm", "yaft", "contour")) or "sixel" in terminal else None


class TerminalPreview:
    """A ``Progress`` of one line, with the newest image above it, which is drawn over the one before."""

    def __init__(self, stream: TextIO, protocol: str):
        self._stream, self._protocol = stream, protocol
        self._task: Task | None = None
        self._has_room = False

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._end_line()
        self._task, self._has_room = Task(name=task, total=total, first=done), False
        self._write_line()

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._task is not None:
            self._task.advance(count, note)
            self._write_line()

    def show(self, image: Image.Image) -> None:
        """Draw ``image`` above the line."""
        if not self._has_room:
            self._stream.write(_CLEAR + "\n" * _ROWS)
            self._has_room = True
        drawn = image_sequence(image, self._protocol)
        self._stream.write(f"\r\x1b[{_ROWS}A{_SAVE}{drawn}{_RESTORE}\x1b[{_ROWS}B")
        self._write_line()

    def __enter__(self) -> TerminalPreview:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def _write_line(self) -> None:
        if self._task is not None:
            # A line that is wrapped could not be drawn over.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(_CLEAR + self._task.as_bar()[:width])
            self._stream.flush()

    def _end_line(self) -> None:
        if self._task is not None:
            self._stream.write("\n")
            self._stream.flush()


def image_sequence(image: Image.Image, protocol: str) -> str:
    """What a terminal is sent to show ``image`` in ``_ROWS`` lines from the cursor on."""
    height = _ROWS * _PIXELS_IN_ROW
    scaled = image.convert("RGB").resize((max(1, round(image.width * height / image.height)), height))
    if protocol == "sixel":
        return sixels(scaled)
    buffer = BytesIO()
    scaled.save(buffer, "PNG")
    data = base64.standard_b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        size = len(buffer.getvalue())
        return f"\x1b]1337;File=inline=1;size={size};height={_ROWS};preserveAspectRatio=1:{data}\x07"
    # kitty: transmit and show at once (a=T) as image 1, which replaces the one before; no answer (q=2); the cursor stays.
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    heads = [f"a=T,f=100,i=1,q=2,C=1,r={_ROWS},", *[""] * (len(chunks) - 1)]
    more = [*[1] * (len(chunks) - 1), 0]
    return "".join(f"\x1b_G{head}m={flag};{chunk}\x1b\\" for head, flag, chunk in zip(heads, more, chunks, strict=True))


def sixels(image: Image.Image) -> str:
    """``image`` in DEC's sixel format (VT330/VT340 Programmer Reference Manual, chapter 14): six rows a band."""
    import numpy as np

    indexed = image.quantize(_SIXEL_COLOURS)
    pixels = np.asarray(indexed)
    palette = np.array(indexed.getpalette()).reshape(-1, 3)
    colours = [int(colour) for colour in np.unique(pixels)]
    written = [f'\x1bPq"1;1;{image.width};{image.height}']
    for colour in colours:
        red, green, blue = (round(value * 100 / 255) for value in palette[colour])
        written.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, image.height, _SIXEL_ROWS):
        band = pixels[top : top + _SIXEL_ROWS]
        bits = (1 << np.arange(len(band)))[:, None]
        for colour in np.unique(band):
            row = ((band == colour) * bits).sum(0) + ord("?")
            written.append(f"#{int(colour)}{''.join(map(chr, row))}$")
        written.append("-")
    return "".join(written) + "\x1b\\"
