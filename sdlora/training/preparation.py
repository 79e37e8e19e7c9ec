"""What a step computes with, made ready while the device does the step before.

Everything that a step draws is a function of (seed, step), so a thread prepares it in main memory, and one copy brings it
to the device. Nothing in a step then makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..base.base import Base
from ..data.views import View
from ..lora.dropout import DropoutRates
from .batches import Draws, draw, dropout_keys, share
from .caption_embeddings import CaptionEmbeddings
from .latents import EncodedImage
from .new_adapter import dropout_rates
from .packing import Packed, pack
from .plan import RunPlan
from .training_set import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What a step, or a part of it, computes with: n images, every tensor on the device."""

    latents: Tensor
    """(n, 4, h, w) float32, drawn from the encoder's posterior."""
    noise: Tensor
    """(n, 4, h, w) float32."""
    input_noise: Tensor | None
    """(n, 4, h, w) float32: the noise in the UNet's input; None where it is ``noise``."""
    timesteps: Tensor
    """(n,) int64."""
    time_ids: Tensor
    """(n, 6) float32, see ``Base.predict``."""
    weights: Tensor
    """(n,) float32: factors of the losses."""
    masks: Tensor | None
    """(n, 1, h, w) float32; None without masks."""
    captions: tuple[str, ...]
    """n captions; "" where the caption is dropped."""
    token_ids: tuple[Tensor, ...]
    """(n, chunks, 77) int64 for each text encoder; () where the text encoders are frozen."""
    zeroed: Tensor | None
    """(n,) bool: rows whose conditioning is all zeros; None where there are none."""
    dropout_keys: Tensor | None
    """(n, 2) int64, see ``AdapterDropout.drawn_by``; None where nothing is left out of the adapter."""

    def part(self, rows: slice) -> StepInputs:
        """Views of some of the images."""
        return StepInputs(
            latents=self.latents[rows],
            noise=self.noise[rows],
            input_noise=None if self.input_noise is None else self.input_noise[rows],
            timesteps=self.timesteps[rows],
            time_ids=self.time_ids[rows],
            weights=self.weights[rows],
            masks=None if self.masks is None else self.masks[rows],
            captions=self.captions[rows],
            token_ids=tuple(ids[rows] for ids in self.token_ids),
            zeroed=None if self.zeroed is None else self.zeroed[rows],
            dropout_keys=None if self.dropout_keys is None else self.dropout_keys[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedStep:
    """A process's share of a step: n images, with all that is drawn for them, in main memory."""

    images: tuple[EncodedImage, ...]
    """Latents are on the device, or in ``packed`` if they are kept elsewhere."""
    captions: tuple[str, ...]
    packed: Packed
    batch_size: int
    """Images that all processes together compute in this step."""

    def parts(self, device: torch.device, size: int) -> list[StepInputs]:
        """The images on ``device``, at most ``size`` in each part; [] if this process has none. Makes one copy."""
        count = len(self.images)
        if not count:
            return []
        brought = self.packed.on(device)
        images = [_with_brought(image, number, brought) for number, image in enumerate(self.images)]
        mean, std = torch.stack([image.mean for image in images]), torch.stack([image.std for image in images])
        whole = StepInputs(
            latents=mean + std * brought["posterior"],
            noise=brought["noise"],
            input_noise=brought.get("input_noise"),
            timesteps=brought["timesteps"],
            time_ids=brought["time_ids"],
            weights=brought["weights"],
            masks=stack_masks(images),
            captions=self.captions,
            token_ids=tuple(tensor for name, tensor in brought.items() if name.startswith("token_ids.")),
            zeroed=brought.get("zeroed"),
            dropout_keys=brought.get("dropout_keys"),
        )
        if size >= count:
            return [whole]
        return [whole.part(slice(first, first + size)) for first in range(0, count, size)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """What steps are prepared from."""

    plan: RunPlan
    base: Base
    images: Mapping[View, EncodedImage]
    embeddings: CaptionEmbeddings
    process: int
    processes: int

    def prepare(self, step: int) -> PreparedStep:
        """This process's share of ``step`` (from 0). NumPy alone computes: torch's threads belong to the step before."""
        samples = self.plan.training.batch(step)
        slots = share(len(samples), process=self.process, processes=self.processes)
        images = tuple(self.images[samples[slot].view] for slot in slots)
        draws = [self._draw(step, slot, samples, image) for slot, image in zip(slots, images, strict=True)]
        captions = tuple(
            "" if drawn.drop_caption else samples[slot].caption for drawn, slot in zip(draws, slots, strict=True)
        )
        arrays = self._arrays([samples[slot] for slot in slots], images, draws, captions) if images else {}
        config = self.plan.config
        if images and dropout_rates(config.lora) != DropoutRates():
            arrays["dropout_keys"] = dropout_keys(seed=config.train.seed, step=step, slots=slots)
        return PreparedStep(
            images=images,
            captions=captions,
            packed=pack(arrays, self.base.device),
            batch_size=len(samples),
        )

    def _draw(self, step: int, slot: int, samples: Sequence[Sample], image: EncodedImage) -> Draws:
        config = self.plan.config
        return draw(
            seed=config.train.seed,
            step=step,
            slot=slot,
            slots=len(samples),
            shape=tuple(image.mean.shape),
            timesteps=len(self.base.schedule.alphas_cumprod),
            caption_dropout=config.data.caption_dropout,
            objective=config.objective,
        )

    def _arrays(
        self,
        samples: Sequence[Sample],
        images: Sequence[EncodedImage],
        draws: Sequence[Draws],
        captions: Sequence[str],
    ) -> dict[str, np.ndarray]:
        arrays = {
            "noise": np.stack([drawn.noise for drawn in draws]),
            "posterior": np.stack([drawn.posterior for drawn in draws]),
            "timesteps": np.array([drawn.timestep for drawn in draws], np.int64),
            "weights": np.array([sample.weight for sample in samples], np.float32),
            "time_ids": np.array([image.framing.numbers for image in images], np.float32),
        }
        perturbed = [drawn.input_noise for drawn in draws if drawn.input_noise is not None]
        if perturbed:
            arrays["input_noise"] = np.stack(perturbed)
        for number, ids in enumerate(self.embeddings.token_ids(captions)):
            arrays[f"token_ids.{number}"] = ids
        zeroed = [drawn.drop_caption and self.base.checkpoint.zeros_for_empty_negative for drawn in draws]
        if any(zeroed):
            arrays["zeroed"] = np.array(zeroed, np.bool_)
        for number, image in enumerate(images):
            for name in ("mean", "std", "mask"):
                tensor = getattr(image, name)
                if tensor is not None and tensor.device.type != self.base.device.type:
                    arrays[f"{name}.{number}"] = tensor.numpy()
        return arrays


class StepsAhead:
    """Gives prepared steps, each while a thread prepares the one after it."""

    def __init__(self, preparation: Preparation, *, steps: int):
        """Nothing is prepared ahead after the last of ``steps``."""
        self._preparation, self._steps = preparation, steps
        self._pool: ThreadPoolExecutor | None = None
        self._futures: dict[int, Future[PreparedStep]] = {}

    def take(self, step: int) -> PreparedStep:
        """``step`` (from 0), any number of times; raises whatever its preparation raised."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "sdlora-prepare")
        wanted = [step, step + 1] if step + 1 < self._steps else [step]
        prepare = self._preparation.prepare
        self._futures = {number: self._futures.get(number) or self._pool.submit(prepare, number) for number in wanted}
        return self._futures[step].result()

    def close(self) -> None:
        """End the thread; ``take`` starts another."""
        pool, self._pool, self._futures = self._pool, None, {}
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def stack_masks(images: Sequence[EncodedImage]) -> Tensor | None:
    """Masks at latent size, (n, 1, h, w) float32, all ones for images without one; None if no image has a mask."""
    if all(image.mask is None for image in images):
        return None
    return torch.stack(
        [image.mean.new_ones(1, *image.mean.shape[1:]) if image.mask is None else image.mask for image in images]
    )


def _with_brought(image: EncodedImage, number: int, brought: Mapping[str, Tensor]) -> EncodedImage:
    """``image`` with those of its tensors that came with the step."""
    names = [name for name in ("mean", "std", "mask") if f"{name}.{number}" in brought]
    return replace(image, **{name: brought[f"{name}.{number}"] for name in names}) if names else image
