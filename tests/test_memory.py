"""The memory of a training step, computed on models without memory, against steps that really run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.conditioning import Framing
from sdlora.base.encode import encode_prompts
from sdlora.base.tokens import plain, tokenize
from sdlora.config.loading import load_config
from sdlora.config.sections import Config, ObjectiveSection
from sdlora.training.loss import denoising_loss
from sdlora.training.memory import StepMemory, measured, step_memory
from sdlora.training.new_adapter import new_adapter
from sdlora.training.step_shape import StepShape
from tests.published import UNET_PARAMETERS
from tests.real_size import write_hollow_checkpoint
from tests.tiny import opened

SIDE = 128


def config(*more: str) -> Config:
    return load_config(None, ["data.images=x", "data.trigger=zorb", "output.path=x.safetensors", *more])


def estimate(base: str, settings: Config, *, checkpointing: bool, images: int = 1, **more: Any) -> StepMemory:
    shape = StepShape(micro_batch=images, checkpointing=checkpointing)
    options = {"width": SIDE, "height": SIDE, "dtype": torch.float32, "device_type": "cpu"} | more
    return step_memory(find_base(base), settings, shape=shape, **options)


def loss_of(base: Base) -> Tensor:
    return denoising_loss(
        base,
        torch.randn(1, 4, SIDE // 8, SIDE // 8),
        torch.randn(1, 4, SIDE // 8, SIDE // 8),
        torch.tensor([500]),
        encode_prompts(base, [tokenize(base, plain("a fox"))]),
        [Framing.whole(SIDE, SIDE)],
        objective=ObjectiveSection(),
    ).sum()


class Saved:
    """Bytes of the distinct storages that the forward pass saves for the backward pass, except those of ``frozen``."""

    def __init__(self, frozen: list[Tensor]):
        self._frozen = {tensor.untyped_storage().data_ptr() for tensor in frozen}
        self._found: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self._frozen:
            self._found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


def frozen_in(base: Base, adapter: Any) -> list[Tensor]:
    models = [base.unet, *(encoder.model for encoder in base.text_encoders)]
    weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return [*weights, *adapter.parameters]


@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_activations_are_what_a_real_forward_pass_saves(rate: float) -> None:
    settings = config(f"optimizer.text_encoder_learning_rate={rate}")
    base = opened("mini")
    adapter = new_adapter(base, settings)
    adapter.attach(base.modules())
    saved = Saved(frozen_in(base, adapter))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = loss_of(base)
    assert loss.requires_grad
    # A few bytes more are constants that the text encoder's indices are compared with.
    assert saved.bytes - 64 <= estimate("mini", settings, checkpointing=False).activations <= saved.bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_the_allocator_hands_out(checkpointing: bool) -> None:
    settings = config()
    base = opened("mini")
    adapter = new_adapter(base, settings)
    adapter.attach(base.modules())
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
    loss_of(base).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss_of(base).backward()
    now = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    memory = estimate("mini", settings, checkpointing=checkpointing)
    # With checkpointing, the states of the CPU's random numbers are kept, 5 kB for each block.
    assert memory.activations + memory.temporary == pytest.approx(peak, rel=0.015)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_grows_in_proportion_to_the_micro_batch(checkpointing: bool) -> None:
    settings = config()
    double = estimate("mini", settings, checkpointing=checkpointing, images=2)
    real = measured(find_base("mini"), settings, 2, SIDE, SIDE, checkpointing, torch.float32, 1, "cpu")
    assert double.activations == pytest.approx(real.activations, rel=0.001)
    assert double.total == pytest.approx(real.total, rel=0.001)


def test_attention_keeps_no_matrix_on_cuda() -> None:
    """Twice the side is four times the memory at most; a matrix of all pixels by all pixels grows sixteenfold."""

    def growth(device_type: str) -> float:
        small, large = (
            estimate("mini", config(), checkpointing=False, width=side, height=side, device_type=device_type)
            for side in (256, 512)
        )
        return large.activations / small.activations

    assert growth("cuda") <= 4
    assert growth("mps") > 5


def test_trained_values_are_counted_with_gradients_moments_and_copies() -> None:
    settings = config("optimizer.text_encoder_learning_rate=0")
    adapter = new_adapter(opened("mini"), settings)
    (values,) = (parameter.numel() for parameter in adapter.parameters)
    assert estimate("mini", settings, checkpointing=False).trainable == values * 16
    assert estimate("mini", settings, checkpointing=False, dtype=torch.float16).trainable == values * (16 + 4)


def test_real_sizes_are_known_without_reading_weights(tmp_path: Path) -> None:
    """SDXL's UNet has 2,567,463,684 parameters; a step in 16 bits of one image, from a file that is a hole."""
    file = write_hollow_checkpoint(tmp_path / "sdxl.safetensors", "sdxl")
    checkpoint = find_base(str(file))
    settings = config("optimizer.text_encoder_learning_rate=0")
    memory = step_memory(
        checkpoint,
        settings,
        width=1024,
        height=1024,
        shape=StepShape(micro_batch=1, checkpointing=True),
        dtype=torch.bfloat16,
    )
    assert memory.weights == pytest.approx(2 * UNET_PARAMETERS["sdxl"], rel=1e-6)
    assert 0.3e9 < memory.activations < 1e9
