"""The time of a training step, measured on the device at hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from ..base.device_memory import move_to, out_of_memory
from ..base.load import load_base
from ..base.precision import choose_device, choose_precision
from ..progress import Progress, raise_if_stopped
from .caption_embeddings import chunks_of
from .memory import stand_in_loss
from .new_adapter import new_adapter
from .optimizer import GuardedAdamW
from .plan import RunPlan
from .step_shape import StepShape

PROBED_STEPS = 2
"""Steps whose time is measured, after one that is not: the first of all pays for what the device prepares."""


def step_seconds(
    plan: RunPlan,
    shape: StepShape,
    *,
    progress: Progress,
    stop: threading.Event | None,
    say: Callable[[str], None],
) -> float | None:
    """Mean time of a step of ``plan`` in the shape ``shape``, in seconds; None where the device runs out of memory.

    The base is loaded, and real steps are done on images of zeros, of the sizes of the first batches.

    Raises:
        Interrupted: ``stop`` was set.
    """
    device = choose_device()
    say(f"measuring {PROBED_STEPS} steps on the {device.type}, which loads the base; --no-probe leaves it out")
    try:
        return _measured(plan, shape, device, progress, stop)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    say(f"a step does not fit into the memory of the {device.type} as it is now; its time is unknown")
    return None


def _measured(
    plan: RunPlan, shape: StepShape, device: torch.device, progress: Progress, stop: threading.Event | None
) -> float:
    config = plan.config
    dtype = choose_precision(config.train.precision, device, unet_parameters=plan.base.unet_parameters)
    progress.start("Measuring steps", PROBED_STEPS + 1)
    base = load_base(plan.base, device=device, dtype=dtype, home=torch.device("cpu"))
    move_to(device, base.unet)
    if config.optimizer.text_encoder_rate(plan.base.family):
        move_to(device, *base.encoder_models())
    chunks = chunks_of(base, plan.items, config.data.max_token_length)
    adapter = new_adapter(base, config)
    rates = [group.rate for group in adapter.groups]
    optimizer = GuardedAdamW(
        adapter.parameters, rates, config.optimizer, steps=plan.steps, shapes=adapter.shapes, dtype=dtype
    )
    adapter.attach(base.modules())
    if shape.checkpointing:
        base.unet.enable_gradient_checkpointing()
    times = []
    for step in range(PROBED_STEPS + 1):
        raise_if_stopped(stop, "stopped while measuring steps; nothing was written")
        samples = plan.training.batch(step)
        placement = samples[0].view.placement
        began = time.perf_counter()
        adapter.begin_step()
        for first in range(0, len(samples), shape.micro_batch):
            images = min(shape.micro_batch, len(samples) - first)
            loss = stand_in_loss(base, config, images, width=placement.width, height=placement.height, chunks=chunks)
            optimizer.scaled(loss).backward()
            adapter.end_backward()
        optimizer.step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        progress.advance()
    return sum(times[1:]) / PROBED_STEPS
