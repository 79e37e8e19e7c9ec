"""The modules that a LoRA changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .patterns import matches
from .quantized import QuantizedLinear

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PROJECTIONS = ("proj_in", "proj_out")
"""Linear layers around a UNet's attention; in SD 1.x convolutions of 1 x 1, which are the same."""
ENDINGS = {"attention": ATTENTION, "attention-mlp": ATTENTION + FEED_FORWARD}
"""Values of ``lora.targets`` that mean linear layers whose names have one of these endings."""

Targets = str | tuple[str, ...]
"""A value of ``lora.targets``: ``attention``, ``attention-mlp``, ``linear``, ``all``, or patterns."""


def choose_targets(modules: Mapping[str, nn.Module], targets: Targets) -> dict[str, nn.Module]:
    """The modules of ``modules`` (canonical name -> module) that ``targets`` means; sorted."""
    shapes = {name: shape for name, module in modules.items() if (shape := weight_shape(module)) is not None}
    return {name: modules[name] for name in chosen_names(shapes, targets)}


def chosen_names(shapes: Mapping[str, tuple[int, ...]], targets: Targets) -> list[str]:
    """The modules that ``targets`` means, sorted, among ``shapes``: canonical name -> shape of the weight."""
    return [name for name in trainable_names(shapes) if _is_chosen(name, shapes[name], targets)]


def trainable_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linear layers and convolutions of ``shapes``; sorted."""
    return sorted(name for name, shape in shapes.items() if len(shape) in (2, 4))


def _is_chosen(name: str, shape: tuple[int, ...], targets: Targets) -> bool:
    if isinstance(targets, tuple):
        return any(matches(pattern, name) for pattern in targets)
    if targets in ENDINGS:
        return len(shape) == 2 and _ends_in(name, ENDINGS[targets])
    return targets == "all" or len(shape) == 2 or _ends_in(name, PROJECTIONS)


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return name.endswith(tuple(f".{ending}" for ending in endings))


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution; None for any other module."""
    if isinstance(module, QuantizedLinear):
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape) if isinstance(module, nn.Linear | nn.Conv2d) else None
