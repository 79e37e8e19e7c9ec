"""The conditioning of each step: of plain prompts, of those that change over the steps, and of those of several parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..base.encode import encode_prompts
from ..base.tokens import padded, tokenize
from .prompt_editing import prompt_parts, texts_over_steps
from .prompts import parse_prompt
from .request import ImageRequest

_TEXTS_AT_ONCE = 16
"""Texts that are encoded together, so that a prompt of many variants needs no more memory than a few images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduledConditioning:
    """What the UNet receives in each step for b images.

    The UNet's batch holds a row for each negative prompt, if images are guided, then the parts of each image's prompt. Each
    distinct text is encoded once and is one of ``texts``.
    """

    texts: Conditioning
    order: tuple[tuple[int, ...], ...]
    """Number of the text in each row of the batch: one entry for each step of all passes, or a single one if nothing
    changes."""
    weights: tuple[tuple[float, ...], ...]
    """Weights of the parts of each image's prompt."""
    guided: bool
    _batches: dict[tuple[int, ...], Conditioning] = field(default_factory=dict, init=False, repr=False)

    @property
    def batch_size(self) -> int:
        """Number of rows of the UNet's batch."""
        return len(self.order[0])

    def at(self, step: int) -> Conditioning:
        """The UNet's batch in ``step``, counted from 0. Each is put together once, on the device."""
        order = self.order[min(step, len(self.order) - 1)]
        if order == tuple(range(self.texts.context.shape[0])):
            return self.texts
        if order not in self._batches:
            self._batches[order] = Conditioning.stack([self.texts.row(number) for number in order])
        return self._batches[order]

    def repeated(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) of the images -> those of the rows of the UNet's batch."""
        if not self.guided:
            return latents
        if self._is_plain:
            return torch.cat([latents] * 2)
        rows = [latents[number : number + 1] for number, parts in enumerate(self.weights) for _ in parts]
        return torch.cat([latents, *rows])

    def split(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the rows of the batch -> those without and with the prompt of each image, (b, 4, h, w) both.

        That of several parts is ε₀ + Σ wᵢ (εᵢ - ε₀) (Liu et al. 2022, eq. 11). With guidance g it becomes
        ε₀ + g Σ wᵢ (εᵢ - ε₀), as in A1111. The factors sum to 1, so v and x are combined alike.
        """
        count = len(self.weights)
        unconditional, parts = predicted[:count], predicted[count:]
        if self._is_plain:
            return unconditional, parts
        combined, position = [], 0
        for number, weights in enumerate(self.weights):
            without = unconditional[number : number + 1]
            total = without
            for weight in weights:
                total = total + weight * (parts[position : position + 1] - without)
                position += 1
            combined.append(total)
        return unconditional, torch.cat(combined)

    def of_image(self, number: int) -> ScheduledConditioning:
        """That of one of the images alone."""
        count = len(self.weights) if self.guided else 0
        start = count + sum(map(len, self.weights[:number]))
        rows = [*([number] if self.guided else []), *range(start, start + len(self.weights[number]))]
        order = tuple(tuple(step[row] for row in rows) for step in self.order)
        return replace(self, order=order, weights=(self.weights[number],))

    def after(self, steps: int) -> ScheduledConditioning:
        """That of the second pass, after ``steps`` of the first."""
        return self if len(self.order) == 1 else replace(self, order=self.order[steps:])

    def to(self, device: torch.device) -> ScheduledConditioning:
        """The same on ``device``."""
        return replace(self, texts=self.texts.to(device))

    @property
    def _is_plain(self) -> bool:
        return all(parts == (1.0,) for parts in self.weights)


def encode_requests(base: Base, requests: Sequence[ImageRequest]) -> ScheduledConditioning:
    """The conditioning of ``requests`` in all passes; they have the same steps and are all guided or all not."""
    first, guided = requests[0], requests[0].is_guided
    second_pass = first.all_steps - first.steps_taken

    def column(text: str, negative: bool) -> list[tuple[str, bool]]:
        return [(one, negative) for one in texts_over_steps(text, first.steps_taken, second_pass)]

    parts = [prompt_parts(request.prompt) for request in requests]
    columns = [column(request.negative, True) for request in requests if guided]
    columns += [column(part.text, False) for one in parts for part in one]
    by_step = list(zip(*columns, strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for keys in by_step for key in keys))}
    order = tuple(tuple(numbers[key] for key in keys) for keys in by_step)
    return ScheduledConditioning(
        texts=_encoded(base, list(numbers)),
        order=order[:1] if len(set(order)) == 1 else order,
        weights=tuple(tuple(part.weight for part in one) for one in parts),
        guided=guided,
    )


def _encoded(base: Base, texts: Sequence[tuple[str, bool]]) -> Conditioning:
    """A row for each text; the empty ones that are negative are zeros where the base was trained so."""
    prompts = [tokenize(base, parse_prompt(text)) for text, _ in texts]
    chunks = max(tokens.chunks for prompt in prompts for tokens in prompt)
    filled = [padded(base, prompt, chunks) for prompt in prompts]
    starts = range(0, len(filled), _TEXTS_AT_ONCE)
    groups = [encode_prompts(base, filled[start : start + _TEXTS_AT_ONCE]) for start in starts]
    encoded = groups[0] if len(groups) == 1 else Conditioning.stack(groups)
    zeroed = [negative and not text.strip() for text, negative in texts]
    if not (base.checkpoint.zeros_for_empty_negative and any(zeroed)):
        return encoded
    rows = [encoded.row(number) for number in range(len(texts))]
    return Conditioning.stack([row.zeros() if zero else row for row, zero in zip(rows, zeroed, strict=True)])
