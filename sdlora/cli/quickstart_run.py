"""The three jobs in a row, on the embedded base and the two sample sets, each as the command that a user would type."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

STYLES = ("blueprint", "pixel")
PROMPTS = ("blupaper, pixgrid, a fox", "blupaper, pixgrid, a tomato", "blupaper, pixgrid, a penguin")
STRENGTH = "1"


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    loras: tuple[str, ...]
    strip: str
    commands: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_quickstart(out: Path, *, run: Callable[[list[str]], None], say: Callable[[str], None]) -> QuickstartReport:
    """Train both styles, generate the strip, inspect the files. ``run`` executes the arguments of one ``sdlora`` command.

    Raises:
        DataError: this is not the folder of a clone, where the sample sets and their configurations are.
    """
    configs = [Path("configs") / f"quickstart-{style}.toml" for style in STYLES]
    missing = [
        f"{path}: not here; run quickstart in a clone of the repository" for path in configs if not path.is_file()
    ]
    if missing:
        raise DataError(missing)
    loras = [out / f"{style}.safetensors" for style in STYLES]
    strip = out / "strip.png"
    commands = [
        ["train", str(config), *([f"output.path={lora}"] if lora.parent != Path("out/quickstart") else [])]
        for config, lora in zip(configs, loras, strict=True)
    ]
    stacked = [word for lora in loras for word in ("--lora", f"{lora}:{STRENGTH}")]
    commands.append(["generate", *PROMPTS, *stacked, "--strip", "--seed", "1", "--out", str(strip)])
    commands += [["inspect", str(lora)] for lora in loras]

    began, spoken = time.monotonic(), []
    for arguments in commands:
        spoken.append(shlex.join(["sdlora", *arguments]))
        say(f"\n$ {spoken[-1]}")
        run(arguments)
    seconds = time.monotonic() - began
    say(f"\nDone in {seconds:.0f} s. Look at {strip}: no LoRA, each style at half and full strength, both together.")
    say(f"Draw something else: sdlora generate 'blupaper, a snail' --lora {loras[0]}")
    return QuickstartReport(
        loras=tuple(map(str, loras)), strip=str(strip), commands=tuple(spoken), seconds=round(seconds, 1)
    )
