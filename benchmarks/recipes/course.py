"""How the losses develop while a variant is trained."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.base.base import Base

from .measuring import Trained, level_losses, neutral_losses
from .samples import Sizes, held_out, split
from .training import config_of, full_loop, train_variant
from .variants import Variant


@dataclass(frozen=True, kw_only=True)
class Course:
    """Points (step, loss), from before the first step to after the last."""

    held_out: list[tuple[float, float]] = field(default_factory=list)
    neutral: list[tuple[float, float]] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    """The model after the last step, alone."""


def course(
    variant: Variant,
    style: str,
    base: Base,
    *,
    steps: int,
    every: int,
    rank: int,
    sizes: Sizes,
    folder: Path,
    seed: int = 0,
) -> Course:
    """Train ``variant``, a LoRA of ours or full fine-tuning, and measure it every ``every`` steps."""
    found, examples = Course(), held_out(base, split(style, folder)[1])

    def measure(step: int, model: Trained) -> None:
        found.held_out.append((step, statistics.fmean(level_losses(model, examples))))
        found.neutral.append((step, statistics.fmean(neutral_losses(model, base, sizes))))

    measure(0, Trained(base=base))
    own = folder / variant.name.replace(" ", "-")
    config = config_of(variant, style, seed, steps=steps, rank=rank, folder=own, more=(f"output.save_every={every}",))
    if variant.how == "full":
        tuned = full_loop(
            config,
            base,
            watch=lambda done, model: measure(done, Trained(base=model)) if done % every == 0 else None,
        )
        found.trained.append(Trained(base=tuned))
        return found
    last = train_variant(variant, config, base)
    output = Path(config.output.path)
    for file in sorted(output.parent.glob(f"{output.stem}-*.safetensors")):
        measure(int(file.stem.rpartition("-")[2]), Trained(base=base, files=(f"{file}:1",)))
    measure(steps, last)
    found.trained.append(last)
    return found
