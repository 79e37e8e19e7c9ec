"""The modules that a LoRA changes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .quantized import FrozenLinear

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
TARGETS = {"attention": ATTENTION, "attention-mlp": ATTENTION + FEED_FORWARD}
"""Value of ``lora.targets`` -> endings of the names of the modules that it means."""


def choose_targets(modules: Mapping[str, nn.Module], targets: str) -> dict[str, FrozenLinear]:
    """The linear modules of ``modules`` (canonical name -> module) that ``targets``, a key of ``TARGETS``, means; sorted."""
    endings = tuple(f".{ending}" for ending in TARGETS[targets])
    return {
        name: module
        for name, module in sorted(modules.items())
        if isinstance(module, FrozenLinear) and name.endswith(endings)
    }
