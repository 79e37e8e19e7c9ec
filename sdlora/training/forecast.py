"""The public function ``plan``: what a run will take, before it starts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.load import load_base
from ..base.precision import choose_device, choose_precision
from ..config.loading import as_config
from ..config.sections import Config
from ..data.findings import Finding
from ..errors import ConfigError
from ..families import TOKENS_IN_CHUNK
from ..files import check_target
from ..formats.lora_writer import kohya_file_bytes
from ..lint.report import LintReport, summary_lines
from ..lint.run import examine_dataset
from ..lora.change import Change
from ..lora.quantized import QUANTIZED
from ..progress import Progress, progress_or_bar
from .checkpoint import KEPT
from .fit import choose_fit, taken
from .memory import META, StepMemory
from .new_adapter import new_trainables
from .optimizers.trial import optimizer_memory
from .part_memory import SamplingMemory, encoding_memory, sampling_memory
from .plan import RunPlan, plan_run
from .probe import step_seconds
from .step_shape import StepShape
from .step_sizes import StepSizes

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take. A gigabyte is 10^9 bytes; a GPU that is sold with 8 has a little more."""

    images: int
    """Training images."""
    steps: int
    epochs: float
    length: str
    """Images, steps and epochs in words."""
    seconds: float | None
    """Time of the steps, as measured on two; None where they were not measured."""
    device: str
    """Type of the device that this is about: cuda, mps or cpu."""
    precision: str
    shape: StepShape
    step: StepMemory
    encoding: Mapping[str, int]
    """Part of the base -> bytes on the device while it encodes; text encoders that are trained are not among them."""
    sampling: SamplingMemory
    cache_bytes: int
    """Encoded images and captions on the disk, if none is there yet."""
    checkpoint_bytes: int
    """Checkpoints to resume from, at most."""
    file_bytes: int
    """The LoRA file without its metadata, which are a few kilobytes."""
    gpu_gb: float | None
    """Memory of the GPU that was asked about."""
    fits: bool | None
    """Whether the run fits into ``gpu_gb``; None without one."""
    settings: Mapping[str, Any]
    """``section.key`` -> value with which it fits, where it does not as it is; empty if nothing helps."""
    findings: tuple[Finding, ...]
    """Findings about images and captions; none is an error."""

    @property
    def disk_bytes(self) -> int:
        """What is written in all."""
        return self.cache_bytes + self.checkpoint_bytes + self.file_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that training or encoding needs on the device."""
        return max(self.step.total, *self.encoding.values())

    def to_json(self) -> dict[str, Any]:
        """What ``sdlora plan --json`` prints; GB are 10^9 bytes."""
        step = {key: _gb(value) for key, value in vars(self.step).items()}
        return {
            "images": self.images,
            "steps": self.steps,
            "epochs": round(self.epochs, 2),
            "seconds": self.seconds,
            "device": self.device,
            "precision": self.precision,
            "micro_batch": self.shape.micro_batch,
            "gradient_checkpointing": self.shape.checkpointing,
            "peak_gb": _gb(self.peak_bytes),
            "step_gb": step | {"total": _gb(self.step.total)},
            "encoding_gb": {part: _gb(size) for part, size in self.encoding.items()},
            "sampling_gb": _gb(self.sampling.total),
            "sampling_least_gb": _gb(self.sampling.least),
            "disk_gb": _gb(self.disk_bytes),
            "file_mb": round(self.file_bytes / 1e6, 3),
            "gpu_gb": self.gpu_gb,
            "fits": self.fits,
            "set": dict(self.settings),
        }


def _gb(size: float) -> float:
    return round(size / GIGABYTE, 3)


def plan(
    config: Config | str | Path,
    *,
    gpu: float | None = None,
    probe: bool = True,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """What the training of ``config`` will take: steps, time, memory, disk. Nothing is encoded or written.

    Memory is computed from the real models without reading their weights.

    Args:
        config: a configuration, or the path of its TOML file.
        gpu: memory of a GPU in gigabytes: whether the run fits, and what to set if it does not. By default that of the
            GPU at hand.
        probe: measure the time of two steps on the device at hand, which loads the base. With ``gpu`` only where a GPU is
            at hand, since the time on a CPU would say nothing.
        progress: receives reports; by default a bar in a terminal.
        stop: set it, from any thread, to stop.
        say: called with what is worth knowing about the images and captions, and about what is measured, line by line.

    Raises:
        SdloraError: a fault of the input, as ``train`` raises it.
        Interrupted: ``stop`` was set.
    """
    config = as_config(config, "plan")
    if gpu is not None and not (isinstance(gpu, (int, float)) and 0 < gpu < math.inf):
        raise ConfigError(f"--gpu {gpu}: expected the memory of a GPU in gigabytes, such as 8")
    check_target(Path(config.output.path))
    with progress_or_bar(progress) as reports:
        dataset = examine_dataset(config, progress=reports)
        run = plan_run(config, dataset)
        for line in summary_lines(LintReport(dataset=dataset)):
            say(line)
        forecast = forecast_run(run, choose_device(), gpu=gpu)
        if probe and (gpu is None or choose_device().type != "cpu"):
            seconds = step_seconds(run, forecast.shape, progress=reports, stop=stop, say=say)
            forecast = replace(forecast, seconds=seconds and round(seconds * run.steps, 1))
    return forecast


def forecast_run(run: RunPlan, device: torch.device, *, gpu: float | None) -> Forecast:
    """The forecast of ``run`` on ``device``, or on a GPU with ``gpu`` gigabytes; without its time."""
    kind = "cuda" if gpu is not None else device.type
    if gpu is None and device.type == "cuda":
        gpu = round(torch.cuda.get_device_properties(device).total_memory / GIGABYTE, 1)
    requested = run.config.train.precision
    dtype = (
        getattr(torch, "bfloat16" if requested == "auto" else requested)
        if kind != device.type
        else choose_precision(requested, device, unet_parameters=run.base.unet_parameters)
    )
    base = load_base(replace(run.base, attention="sdpa"), device=META, dtype=dtype)
    sizes = StepSizes.of(run, base, kind)
    budget = math.inf if gpu is None else gpu * GIGABYTE
    shape, step = _fitted(sizes, run.config, run.base, budget)
    sampling = sampling_memory(base, width=run.base.resolution, height=run.base.resolution, device_type=kind)
    encoding = encoding_memory(base, width=sizes.width, height=sizes.height, chunks=sizes.chunks, device_type=kind)
    if run.config.optimizer.text_encoder_rate(run.base.family):
        encoding = {"vae": encoding["vae"]}
    fits = None if gpu is None else taken(max(step.total, *encoding.values())) <= budget
    changes = _changes(run, base)
    return Forecast(
        images=run.images,
        steps=run.steps,
        epochs=run.epochs,
        length=run.length_in_words,
        seconds=None,
        device=kind,
        precision=str(dtype).removeprefix("torch."),
        shape=shape,
        step=step,
        encoding=encoding,
        sampling=sampling,
        cache_bytes=_cache_bytes(run, base, sizes.chunks) if run.config.cache.disk else 0,
        # One more than are kept, since a new one is written before the oldest is removed.
        checkpoint_bytes=round(
            (KEPT + 1) * (1 + optimizer_memory(run.config.optimizer).state) * torch.float32.itemsize * _values(changes)
        ),
        file_bytes=kohya_file_bytes(
            changes,
            dtype=getattr(torch, run.config.output.precision),
            family=run.base.family,
            base_modules=run.base.module_shapes(),
        ),
        gpu_gb=gpu,
        fits=fits,
        settings={} if fits is not False else _remedy(sizes, run, budget, max(encoding.values())),
        findings=run.findings,
    )


def _fitted(
    sizes: StepSizes, config: Config, checkpoint: BaseCheckpoint, budget: float
) -> tuple[StepShape, StepMemory]:
    """The shape that a run takes on a device of ``budget`` bytes, and what it needs."""
    fit = choose_fit(
        config.train,
        images=config.train.batch_size,
        free=budget,
        needed=lambda shape: sizes.needed(checkpoint, config, shape).total,
        recorded=None,
    )
    return fit.shape, sizes.needed(checkpoint, config, fit.shape)


def _remedy(sizes: StepSizes, run: RunPlan, budget: float, encoding: int) -> dict[str, Any]:
    """The least change of settings with which the run fits: first what changes its time alone."""
    if taken(encoding) > budget:
        return {}
    frozen = {"optimizer.text_encoder_learning_rate": 0.0}
    changes: list[dict[str, Any]] = [{}, frozen]
    changes += [{**frozen, "base.quantization": kind} for kind in QUANTIZED]
    for change in changes:
        config = with_settings(
            run.config, change | {"train.micro_batch": "auto", "train.gradient_checkpointing": "auto"}
        )
        checkpoint = replace(run.base, quantization=config.base.quantization)
        shape, step = _fitted(sizes, config, checkpoint, budget)
        if taken(step.total) <= budget:
            found = change | {
                "train.micro_batch": shape.micro_batch,
                "train.gradient_checkpointing": shape.checkpointing,
            }
            return {key: value for key, value in found.items() if setting(run.config, key) != value}
    return {}


def setting(config: Config, key: str) -> Any:
    """The value of ``section.key``."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """``config`` with other values of ``section.key``."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def _changes(run: RunPlan, base: Base) -> dict[str, Change]:
    """What the file will hold, without memory."""
    return {
        name: trainable.change({tensor: torch.empty(shape, device=META) for tensor, shape in trainable.shapes.items()})
        for name, trainable in new_trainables(base, run.config).items()
    }


def _values(changes: Mapping[str, Change]) -> int:
    return sum(tensor.numel() for change in changes.values() for tensor in change.tensors().values())


def _cache_bytes(run: RunPlan, base: Base, chunks: int) -> int:
    """Mean and standard deviation of each view, and the embedding of each caption where text encoders are frozen."""
    views = (*run.training.views(run.steps), *run.training.validation)
    factor, channels = run.base.latent_factor, base.vae.config["latent_channels"]
    cells = sum(view.placement.width * view.placement.height // factor**2 for view in views)
    latents = 2 * channels * cells * torch.float32.itemsize
    if run.config.optimizer.text_encoder_rate(run.base.family):
        return latents
    width = base.unet.config["cross_attention_dim"]
    captions = set(run.training.captions(range(run.steps)))
    return latents + len(captions) * chunks * TOKENS_IN_CHUNK * width * base.dtype.itemsize
