"""The command in a terminal of 80 columns, and what such a terminal shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

_PIECE = re.compile(r"\x1b\[(?P<number>[\d;?]*)(?P<code>[A-Za-z])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")
COLUMNS = 80


def in_a_terminal(*arguments: object, cwd: Path) -> tuple[int, list[str]]:
    """Exit code of ``sdlora ARGUMENTS``, and the lines on the screen of the terminal that all its output went to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "sdlora.cli", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command, cwd=cwd, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"})
    os.close(theirs)
    output = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Nobody holds the other end any more.
            break
        if not piece:
            break
        output += piece
    os.close(ours)
    return process.wait(60), screen(output.decode())


def screen(output: str) -> list[str]:
    """What a terminal shows that is high enough: cursor movements, carriage returns, erased lines, long lines wrapped."""
    lines, row, column = [""], 0, 0
    for piece in _PIECE.finditer(output):
        if piece["control"] == "\r":
            column = 0
        elif piece["control"] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece["code"] == "A":
            row = max(0, row - int(piece["number"] or 1))
        elif piece["code"] == "K":
            lines[row] = "" if piece["number"] == "2" else lines[row][:column]
        for character in piece["text"] or "":
            if column == COLUMNS:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
