"""The public functions ``apply``, ``applied`` and ``restore``: LoRAs on a pipeline of diffusers, and off without a trace."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import BaseModelError
from ..families import Family, family_of_text_width, family_of_unet
from ..generation.arguments import LoraArgument, constant_choices
from ..generation.loras import WeightedLora, fit_loras
from ..generation.tags import check_named_once
from ..lora.stack import Stack

_STATE = "_sdlora"
"""Attribute of a UNet. Pipelines that share the UNet share what is on it; it goes when the UNet goes."""


def apply(pipe: Any, loras: LoraArgument | Sequence[LoraArgument]) -> None:
    """Put exactly ``loras`` on the UNet and the text encoders of ``pipe``, whatever ``apply`` put there before.

    Weights are changed in place, each W + Σ w · ΔW summed in float32 and rounded once; only those that differ from before
    are computed. On quantised and offloaded models the changes are computed beside the layers.

    Args:
        pipe: a pipeline of diffusers with a UNet of SD 1.x, SD 2.x or SDXL, such as text to image, image to image,
            inpainting or ControlNet. Pipelines made from its components share the UNet, and so the LoRAs.
        loras: one or several, each ``FILE[:UNET[:TE]]`` with ``lbw=`` where blocks differ, a path or a ``LoraChoice``.

    Raises:
        SdloraError: with one line for each LoRA that cannot be used; the pipeline is as it was.
    """
    state = _state(pipe)
    choices = constant_choices(loras)
    check_named_once(choices)
    fitted = fit_loras(state.base, choices, known=[lora.fitted for lora in state.loras])
    state.put(fitted)


@contextmanager
def applied(pipe: Any, loras: LoraArgument | Sequence[LoraArgument]) -> Generator[None]:
    """Within the block, ``loras`` are on ``pipe`` as by ``apply``; afterwards what was there before. Raises as ``apply``."""
    state = _state(pipe)
    before = state.loras
    apply(pipe, loras)
    try:
        yield
    finally:
        state.put(before)


def restore(pipe: Any) -> None:
    """Take all LoRAs of ``apply`` off ``pipe``: every weight has its bits from before. Raises as ``apply``."""
    _state(pipe).put(())


@dataclass(frozen=True, kw_only=True, eq=False)
class _PipelineBase:
    """What LoRAs are matched with."""

    name: str
    family: Family
    modules: Mapping[str, nn.Module]

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the weight, as ``BaseCheckpoint`` has it."""
        shapes = {name: _shape(module) for name, module in self.modules.items() if "embeddings." not in name}
        return {name: shape for name, shape in shapes.items() if shape is not None and len(shape) in (1, 2, 4)}


@dataclass(kw_only=True, eq=False)
class _State:
    """The LoRAs on a UNet and its text encoders."""

    base: _PipelineBase
    stack: Stack
    loras: tuple[WeightedLora, ...] = field(default=())

    def put(self, loras: tuple[WeightedLora, ...]) -> None:
        """Put ``loras`` on the modules in the place of the others; after an error there are none."""
        self.loras = ()
        self.stack.set([lora.changes() for lora in loras])
        self.loras = loras


def _state(pipe: Any) -> _State:
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise BaseModelError(
            f"pipe is a {type(pipe).__name__}; expected a pipeline of diffusers with a UNet, such as StableDiffusionPipeline"
        )
    known = vars(unet).get(_STATE)
    if isinstance(known, _State) and known.base.modules["unet"] is unet:
        return known
    modules: dict[str, nn.Module] = {f"unet.{name}" if name else "unet": each for name, each in unet.named_modules()}
    for part in ("text_encoder", "text_encoder_2"):
        model = getattr(pipe, part, None)
        if isinstance(model, nn.Module):
            nesting = "" if hasattr(model, "text_model") else "text_model."
            modules[part] = model
            modules |= {f"{part}.{nesting}{name}": each for name, each in model.named_modules() if name}
    if any(hasattr(each, "base_layer") for each in modules.values()):
        raise BaseModelError("the pipeline holds LoRAs that diffusers loaded; call pipe.unload_lora_weights() first")
    base = _PipelineBase(name=type(pipe).__name__, family=_family(unet), modules=modules)
    state = _State(base=base, stack=Stack(modules))
    setattr(unet, _STATE, state)
    return state


def _family(unet: Any) -> Family:
    config = unet.config
    sized = config.get("addition_embed_type") == "text_time"
    linear = bool(config.get("use_linear_projection"))
    by_width = None if sized else family_of_text_width(config.get("cross_attention_dim"))
    family = by_width or family_of_unet(linear_projection=linear, size_conditioning=sized)
    if family is None:
        raise BaseModelError("the pipeline's UNet is of no known family; expected SD 1.x, SD 2.x or SDXL")
    return family


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of the weight, that of a linear layer also where a library keeps it packed."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None
