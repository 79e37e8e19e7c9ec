"""A written LoRA file, read as generating reads it: is it what was trained, and what does it change?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.base import Base
from ..base.conditioning import Conditioning, Framing, time_ids
from ..base.device_memory import out_of_memory, release_memory, working_on
from ..base.encode import encode_prompts
from ..base.tokens import padded, plain, tokenize
from ..errors import LoraFileError
from ..families import PART_TITLES
from ..files import printable
from ..generation.lora_choice import LoraChoice
from ..generation.loras import fit_loras
from ..lora.change import Change
from ..lora.quantized import FrozenLinear, dense_weight
from ..lora.stack import temporarily_applied
from ..progress import Progress
from ..randomness import Stream, generator
from .course import RATE_TOO_HIGH
from .module_choice import part_of
from .objective import trained_levels
from .plan import RunPlan
from .samples import training_captions

LARGEST_CHANGE = 2.0
"""Times the norm of a layer's weights that its change reaches at most. In runs that work it stays below a half."""
LEAST_DIFFERENCE = 1e-5
"""Share of a prediction below which no pixel of an image changes: they have 256 values, and 20 steps add up."""
LEVELS = 3
"""Noise levels at which the base predicts with and without the file: the middles of equal parts of those trained."""
LARGEST_SIDE = 32
"""Side of the latents that are predicted on: a comparison needs no more, whatever the size of the base's images."""


@dataclass(frozen=True, kw_only=True)
class PartChange:
    """What a LoRA changes in one part of a base."""

    modules: int
    norm: float
    """‖ΔW‖, the Frobenius norm over all modules together."""
    relative: float
    """‖ΔW‖ / ‖W‖ over the same modules."""


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What a written file changes in its base."""

    parts: Mapping[str, PartChange]
    """Part -> its change, of the parts that were trained."""
    typical: float
    """Median over the linear layers of ‖ΔW‖ / ‖W‖; 0 where there are none."""
    difference: float | None
    """‖ε' - ε‖ / ‖ε‖ of the base's predictions with and without the file; NaN or Inf where those are. None where there
    was not enough memory to predict."""

    @property
    def in_words(self) -> str:
        """What is reported of a file, without its end."""
        shares = (
            f"{PART_TITLES[part]} by {_percent(change.relative)} % of its weights (‖ΔW‖ {change.norm:.3g})"
            for part, change in self.parts.items()
        )
        effect = "" if self.difference is None else f"; predictions by {_percent(self.difference)} %"
        return f"read back, it changes the {', the '.join(shares)}{effect}"

    def to_json(self) -> dict[str, Any]:
        """All fields by their names; NaN and Inf, which JSON has not, are null."""
        answer = asdict(self)
        if self.difference is not None and not math.isfinite(self.difference):
            answer["difference"] = None
        return answer

    def warning(self, steps: int) -> str | None:
        """A sentence on a file of a run of ``steps`` steps that does nothing, or that has diverged; None for others."""
        idle = [PART_TITLES[part] for part, change in self.parts.items() if change.norm == 0]
        few = f"the run was too short ({steps} step{'s' * (steps != 1)}) or optimizer.learning_rate is too low"
        remedy = "do more steps with --extend, or raise the rate and start over with --restart"
        if self.difference is not None and not math.isfinite(self.difference):
            return f"with the LoRA the base predicts NaN or Inf: {RATE_TOO_HIGH}"
        if not self.typical <= LARGEST_CHANGE:
            times = f"{self.typical:.3g} times as large as the layer's weights"
            return f"the LoRA's change of a layer is {times}: {RATE_TOO_HIGH}"
        if len(idle) == len(self.parts):
            return f"the LoRA does nothing, every change in it is zero: {few}; {remedy}"
        if idle:
            rate = (
                "optimizer.learning_rate" if idle[0] == PART_TITLES["unet"] else "optimizer.text_encoder_learning_rate"
            )
            return (
                f"the LoRA does not change the {' and the '.join(idle)}, which was trained: {rate} is probably too low"
            )
        if self.difference is not None and self.difference < LEAST_DIFFERENCE:
            by = f"predictions differ by {self.difference:.1e} of their size"
            return f"the LoRA does nothing that an image could show, {by}: {few}; {remedy}"
        return None


@torch.no_grad()
def check_file(file: Path, plan: RunPlan, base: Base, trained: Mapping[str, Change], progress: Progress) -> FileCheck:
    """Read ``file`` by the code that generating reads it with, and measure what it changes in ``base``.

    ``base`` is unchanged on return. It costs two predictions for ``LEVELS`` small latents each, and merging the LoRA once.

    Raises:
        LoraFileError, CompatibilityError: it cannot be used on the base, or is not what was ``trained`` (canonical name ->
            change, on the CPU), rounded to ``output.precision``.
    """
    progress.start("Checking the file", 2)
    (lora,) = fit_loras(base.checkpoint, [LoraChoice(file=file)])
    dtype = getattr(torch, plan.config.output.precision)
    different = different_modules(lora.fitted.modules, trained, dtype)
    if different:
        raise LoraFileError(
            f"{printable(file)}: {len(different)} of {len(trained)} modules, read back, are not what was trained, such as "
            f"{different[0]}"
        )
    modules = base.modules()
    norms = {name: _norms(lora.fitted.modules[name], modules[name]) for name in trained}
    return FileCheck(
        parts={part: _part([norms[name] for name in trained if part_of(name) == part]) for part in _parts(trained)},
        typical=typical_change([norms[name] for name in trained if isinstance(modules[name], FrozenLinear)]),
        difference=_difference(plan, base, lora.changes(), progress),
    )


def different_modules(read: Mapping[str, Change], trained: Mapping[str, Change], dtype: torch.dtype) -> list[str]:
    """The modules of ``trained`` that ``read`` lacks or has otherwise than rounded to ``dtype``.

    Modules that are only in ``read`` count if they change anything: the format of a file may need some that do not.
    """
    different = [name for name in read.keys() - trained.keys() if read[name].norm() != 0]
    for name, change in trained.items():
        ours = {role: tensor.to(dtype) for role, tensor in change.tensors().items()}
        theirs = read[name].tensors() if name in read else {}
        same = ours.keys() == theirs.keys() and all(torch.equal(theirs[role], tensor) for role, tensor in ours.items())
        if not same or _rounded(change.alpha, dtype) != read[name].alpha:
            different.append(name)
    return sorted(different)


def _rounded(alpha: float | None, dtype: torch.dtype) -> float | None:
    """``alpha`` as a file of ``dtype`` has it: a tensor like the others."""
    return None if alpha is None else torch.tensor(alpha, dtype=torch.float32).to(dtype).item()


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """‖ΔW‖ and ‖W‖ of one module."""

    change: float
    weight: float


def typical_change(norms: Sequence[LayerNorms]) -> float:
    """The median of ‖ΔW‖ / ‖W‖; 0 without any."""
    return float(np.median([each.change / each.weight for each in norms])) if norms else 0.0


def _norms(change: Change, layer: nn.Module) -> LayerNorms:
    weight = dense_weight(layer) if isinstance(layer, FrozenLinear) else layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    known = change.norm()
    # Kinds whose change depends on the weight compute it whole.
    length = _norm(change.delta(weight.float().cpu())) if known is None else known
    return LayerNorms(change=length, weight=max(_norm(weight), 1e-12))


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).item()


def _parts(names: Mapping[str, Change]) -> list[str]:
    return list(dict.fromkeys(map(part_of, names)))


def _part(norms: Sequence[LayerNorms]) -> PartChange:
    change, weight = math.hypot(*(each.change for each in norms)), math.hypot(*(each.weight for each in norms))
    return PartChange(modules=len(norms), norm=change, relative=change / weight)


def _difference(
    plan: RunPlan, base: Base, changes: Mapping[str, tuple[Change, float]], progress: Progress
) -> float | None:
    """``FileCheck.difference`` with ``changes``; None where there is too little memory to predict."""
    try:
        alone = _predictions(plan, base, progress)
        with temporarily_applied(base.modules(), [changes]):
            together = _predictions(plan, base, progress)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release_memory(base.device)
        return None
    return float((together - alone).norm() / alone.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _predictions(plan: RunPlan, base: Base, progress: Progress) -> Tensor:
    """What the base predicts as it is now, on noise, with a training caption: (``LEVELS``, 4, h, w) float64 on the CPU."""
    factor = base.checkpoint.latent_factor
    side = min(LARGEST_SIDE, base.checkpoint.resolution // factor)
    caption = next(iter(training_captions(plan)), plan.config.trigger)
    tokens = tokenize(base, plain(caption), limit=plan.config.data.max_token_length)
    with working_on(base.device, *base.encoder_models()):
        prompt = encode_prompts(base, [padded(base, tokens, max(each.chunks for each in tokens))])
    levels = trained_levels(plan.config.objective, len(base.schedule.alphas_cumprod))
    timesteps = [levels[(2 * number + 1) * len(levels) // (2 * LEVELS)] for number in range(LEVELS)]
    rng = generator(plan.config.train.seed, Stream.COMPARISON_NOISE)
    noise = rng.standard_normal((LEVELS, base.unet.config["in_channels"], side, side), dtype=np.float32)
    predicted = base.predict(
        torch.from_numpy(noise).to(base.device),
        torch.tensor(timesteps, device=base.device),
        Conditioning.stack([prompt] * LEVELS),
        time_ids([Framing.whole(side * factor, side * factor)] * LEVELS).to(base.device),
    )
    progress.advance()
    return predicted.cpu().double()


def _percent(share: float) -> str:
    """Two digits, or all before the point."""
    return f"{100 * share:.2g}" if share < 0.995 else f"{100 * share:.0f}"
