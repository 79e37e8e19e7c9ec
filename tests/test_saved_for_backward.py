"""What comes before the first trained module keeps nothing for the backward pass, which ends there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from sdlora.base.base import Base
from sdlora.base.conditioning import Framing, time_ids
from sdlora.base.encode import encode_prompts
from sdlora.base.tokens import plain, tokenize
from sdlora.config.loading import load_config
from sdlora.config.sections import ObjectiveSection
from sdlora.training.loss import denoising_loss
from sdlora.training.new_adapter import new_adapter
from tests.tiny import opened


class Watch:
    """Bytes that each of ``parts`` saves in a forward pass, and the parts whose outputs the backward pass comes back to."""

    def __init__(self, parts: dict[str, nn.Module]):
        self._parts, self._within = parts, list[str]()
        self.saved: Counter[str] = Counter()
        self.visited: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        for name, part in self._parts.items():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._within.append(name)))
            handles.append(part.register_forward_hook(self._leave))
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def _leave(self, module: nn.Module, given: object, output: object) -> None:
        name = self._within.pop()
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_iter(output)):
            self.visited.add(name)

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._within:
            self.saved[self._within[-1]] += tensor.nbytes
        return tensor


def watched(base: Base, parts: dict[str, nn.Module], *settings: str) -> Watch:
    """A step of the adapter of ``settings``, forward and backward."""
    stated = ["data.images=x", "data.trigger=zorb", "output.path=x.safetensors", *settings]
    adapter = new_adapter(base, load_config(None, stated))
    adapter.attach(base.modules())
    watch = Watch(parts)
    with watch.watching():
        loss = denoising_loss(
            base,
            torch.randn(1, 4, 8, 8),
            torch.randn(1, 4, 8, 8),
            torch.tensor([500]),
            encode_prompts(base, [tokenize(base, plain("a fox"))]),
            time_ids([Framing.whole(64, 64)]),
            objective=ObjectiveSection(),
        )
        loss.sum().backward()
    adapter.end_backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters)
    return watch


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return opened(tiny_base)


FROZEN_TEXT = "optimizer.text_encoder_learning_rate=0"


def test_the_unet_before_the_first_trained_module_saves_nothing(base: Base) -> None:
    unet = base.unet
    first = unet.down_blocks[0]
    parts = {
        "conv_in": unet.conv_in,
        "time_embedding": unet.time_embedding,
        "first resnet": first.resnets[0],
        "first norm": first.attentions[0].norm,
        "first attention": first.attentions[0].transformer_blocks[0],
        "mid_block": unet.mid_block,
        "conv_out": unet.conv_out,
    }
    watch = watched(base, parts, FROZEN_TEXT)
    assert {name for name in parts if watch.saved[name]} == {"first attention", "mid_block", "conv_out"}
    assert watch.visited == {"first attention", "mid_block", "conv_out"}


def test_blocks_before_the_first_trained_one_save_nothing(base: Base) -> None:
    unet = base.unet
    parts = {"down": unet.down_blocks[0], "mid": unet.mid_block, "up 0": unet.up_blocks[0], "up 1": unet.up_blocks[1]}
    watch = watched(base, parts, FROZEN_TEXT, 'lora.targets=["unet.up_blocks.1"]')
    assert {name for name in parts if watch.saved[name]} == {"up 1"}
    assert watch.visited == {"up 1"}


def test_lower_layers_of_a_text_encoder_save_nothing(base: Base) -> None:
    model = base.text_encoders[0].model
    layers = dict(enumerate(model.get_submodule("encoder.layers")))
    parts = {"embeddings": model.get_submodule("embeddings"), **{f"layer {n}": layer for n, layer in layers.items()}}
    watch = watched(base, parts, 'lora.targets=["text_encoder.text_model.encoder.layers.1"]')
    assert {name for name in parts if watch.saved[name]} == watch.visited == {"layer 1"}
