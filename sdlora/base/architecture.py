"""The configuration of a model from the shapes of its tensors.

What shapes leave open (how many attention heads, which activation) is in the family's table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..families import Family, TextEncoderFacts

Shapes = Mapping[str, tuple[int, ...]]
NORM_GROUPS = 32


def unet_config(shapes: Shapes, family: Family, *, pooled_width: int | None, sample_size: int) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel``. ``pooled_width`` is the width of the pooled text, None if unknown.

    Raises:
        KeyError, IndexError, ValueError: tensors are missing or have another number of axes than in all UNets.
    """
    levels = _numbers(r"down_blocks\.(\d+)\.", shapes)
    channels = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
    depths_down = [_depths(f"down_blocks.{i}", shapes) for i in levels]
    depths_up = [_depths(f"up_blocks.{i}", shapes) for i in levels]
    resnets = [len(_numbers(rf"down_blocks\.{i}\.resnets\.(\d+)\.", shapes)) for i in levels]
    layers_down, layers_up = (
        [_one_or_all(depths) if depths else 1 for depths in side] for side in (depths_down, depths_up)
    )
    facts = family.unet
    heads = [facts.heads or max(1, width // (facts.head_width or width)) for width in channels]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _one_or_all(resnets),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in depths_down),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in depths_up),
        "mid_block_type": _mid_block(shapes),
        "transformer_layers_per_block": _one_or_all(layers_down),
        "cross_attention_dim": next(s for n, s in shapes.items() if n.endswith("attn2.to_k.weight"))[1],
        "attention_head_dim": _one_or_all(heads),
        "use_linear_projection": len(next(s for n, s in shapes.items() if n.endswith(".proj_in.weight"))) == 2,
        "norm_num_groups": math.gcd(NORM_GROUPS, *channels),
    }
    if depths_up != [depths[:1] * (n + 1) for depths, n in zip(reversed(depths_down), reversed(resnets), strict=True)]:
        config |= {"transformer_layers_per_block": layers_down, "reverse_transformer_layers_per_block": layers_up}
    if facts.size_conditioning:
        width = shapes["add_embedding.linear_1.weight"][1]
        size_width = facts.size_embedding_width if pooled_width is None else (width - pooled_width) // 6
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_width,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def vae_config(shapes: Shapes, latent_scale: float) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL``. Raises as ``unet_config``."""
    levels = _numbers(r"encoder\.down_blocks\.(\d+)\.", shapes)
    channels = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "block_out_channels": channels,
        "layers_per_block": len(_numbers(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", shapes)),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": math.gcd(NORM_GROUPS, *channels),
        "mid_block_add_attention": any("mid_block.attentions" in name for name in shapes),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": latent_scale,
    }


def clip_config(shapes: Shapes, facts: TextEncoderFacts, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
    """Arguments of ``CLIPTextConfig``. Raises as ``unet_config``."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(_numbers(r"text_model\.encoder\.layers\.(\d+)\.", shapes)),
        "num_attention_heads": max(1, width // facts.head_width),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "hidden_act": facts.activation,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def _mid_block(shapes: Shapes) -> str | None:
    if any(name.startswith("mid_block.attentions.") for name in shapes):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in shapes) else None


def _depths(block: str, shapes: Shapes) -> list[int]:
    """Transformer layers of each attention of a level."""
    stem = re.escape(block)
    return [
        len(_numbers(rf"{stem}\.attentions\.{j}\.transformer_blocks\.(\d+)\.", shapes))
        for j in _numbers(rf"{stem}\.attentions\.(\d+)\.", shapes)
    ]


def _numbers(pattern: str, shapes: Shapes) -> list[int]:
    return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})


def _one_or_all(values: list[Any]) -> Any:
    """The value that all share, or all of them: diffusers takes either."""
    return values[0] if len(set(map(str, values))) == 1 else tuple(values)
