"""Names of the tensors in checkpoints: LDM's and sgm's to and from ours, by one table for both directions.

Ours are diffusers' names for UNet and VAE and those of transformers before 5.6 for the text encoders
(``text_model.encoder.layers.0.self_attn.q_proj.weight``). How many levels, blocks and layers a model has is read off the
names, so pruned and distilled models, and tiny ones, need no other table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The place of one of our tensors in a file."""

    name: str
    third: int | None = None
    """Number of the third of its rows, from 0, where the file keeps q, k and v in one tensor."""
    transposed: bool = False


Table = dict[str, Stored]
"""Our name, without the part -> its place in a file."""

_UNET_PLAIN = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_PLAIN = {
    **{f"{side}.{name}": f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{side}.norm_out": f"{side}.conv_norm_out" for side in ("encoder", "decoder")},
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True, kw_only=True)
class _Level:
    resnets: int
    attention: bool
    sampler: bool


@dataclass(frozen=True, kw_only=True)
class _UnetLayout:
    down: tuple[_Level, ...]
    up: tuple[_Level, ...]
    mid_attention: bool


def unet_table_from_ldm(names: Collection[str]) -> Table:
    """From names as in ``input_blocks.1.1.proj_in.weight``."""
    down, up = _ldm_levels("input_blocks", 1, names), _ldm_levels("output_blocks", 0, names)
    mid_attention = "middle_block.1.norm.weight" in names
    return _renamed(names, _unet_modules(_UnetLayout(down=down, up=up, mid_attention=mid_attention)))


def unet_table_to_ldm(names: Collection[str]) -> Table:
    """From our names, of tensors or of modules: where an LDM file of this UNet keeps each of them."""
    layout = _UnetLayout(
        down=_our_levels("down_blocks", "downsamplers", names),
        up=_our_levels("up_blocks", "upsamplers", names),
        mid_attention=any(name.startswith("mid_block.attentions.0.") for name in names),
    )
    return _turned(names, _unet_modules(layout))


def _ldm_levels(stem: str, first: int, names: Collection[str]) -> tuple[_Level, ...]:
    levels, resnets, attention = [], 0, False
    count = _count(rf"{stem}\.(\d{{1,3}})\.", names)
    for block in range(first, count):
        sampler = any(f"{stem}.{block}.{tail}.weight" in names for tail in ("0.op", "1.conv", "2.conv"))
        if f"{stem}.{block}.0.in_layers.0.weight" in names:
            resnets += 1
            attention = attention or f"{stem}.{block}.1.norm.weight" in names
        if sampler or block == count - 1:
            levels.append(_Level(resnets=resnets, attention=attention, sampler=sampler))
            resnets, attention = 0, False
    return tuple(levels)


def _our_levels(stem: str, sampler: str, names: Collection[str]) -> tuple[_Level, ...]:
    found: dict[int, dict[str, set[str]]] = {}
    for name in names:
        if match := re.match(rf"{stem}\.(\d{{1,3}})\.(\w+)\.(\d{{1,3}})\.", name):
            found.setdefault(int(match[1]), {}).setdefault(match[2], set()).add(match[3])
    return tuple(
        _Level(
            resnets=len(found[i].get("resnets", ())),
            attention="attentions" in found[i],
            sampler=sampler in found[i],
        )
        for i in sorted(found)
    )


def _unet_modules(layout: _UnetLayout) -> dict[str, str]:
    modules = dict(_UNET_PLAIN)

    def resnet(ldm: str, ours: str) -> None:
        modules.update({f"{ldm}.{a}": f"{ours}.{b}" for a, b in _UNET_RESNET.items()})

    block = 1
    for i, level in enumerate(layout.down):
        for j in range(level.resnets):
            resnet(f"input_blocks.{block}.0", f"down_blocks.{i}.resnets.{j}")
            if level.attention:
                modules[f"input_blocks.{block}.1"] = f"down_blocks.{i}.attentions.{j}"
            block += 1
        if level.sampler:
            modules[f"input_blocks.{block}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            block += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    if layout.mid_attention:
        modules["middle_block.1"] = "mid_block.attentions.0"
        resnet("middle_block.2", "mid_block.resnets.1")
    block = 0
    for i, level in enumerate(layout.up):
        for j in range(level.resnets):
            resnet(f"output_blocks.{block}.0", f"up_blocks.{i}.resnets.{j}")
            if level.attention:
                modules[f"output_blocks.{block}.1"] = f"up_blocks.{i}.attentions.{j}"
            block += 1
        if level.sampler:
            place = 2 if level.attention else 1
            modules[f"output_blocks.{block - 1}.{place}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return modules


def vae_table_from_ldm(names: Collection[str]) -> Table:
    """From names as in ``encoder.down.0.block.0.conv1.weight``."""
    levels = _count(r"encoder\.down\.(\d{1,3})\.", names)
    return _renamed(names, _vae_modules(levels, _count(r"decoder\.up\.\d+\.block\.(\d{1,3})\.", names)))


def vae_table_to_ldm(names: Collection[str]) -> Table:
    """From our names: where an LDM file of this VAE keeps each of them."""
    levels = _count(r"encoder\.down_blocks\.(\d{1,3})\.", names)
    return _turned(names, _vae_modules(levels, _count(r"decoder\.up_blocks\.\d+\.resnets\.(\d{1,3})\.", names)))


def vae_table_from_diffusers(names: Collection[str]) -> Table:
    """From our names, and from those of diffusers before 0.18, which named the attention's projections differently."""
    old = {
        f"{side}.mid_block.attentions.0.{a}": f"{side}.mid_block.attentions.0.{b}"
        for side in ("encoder", "decoder")
        for a, b in _VAE_OLD_ATTENTION.items()
    }
    return {name: Stored(name=name) for name in names} | _renamed(names, old)


def _vae_modules(levels: int, resnets: int) -> dict[str, str]:
    modules = dict(_VAE_PLAIN)

    def resnet(ldm: str, ours: str) -> None:
        modules.update({f"{ldm}.{a}": f"{ours}.{b}" for a, b in _VAE_RESNET.items()})

    for side in ("encoder", "decoder"):
        resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        for a, b in _VAE_ATTENTION.items():
            modules[f"{side}.mid.attn_1.{a}"] = f"{side}.mid_block.attentions.0.{b}"
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        modules[f"encoder.down.{i}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        modules[f"decoder.up.{i}.upsample.conv"] = f"{up}.upsamplers.0.conv"
        for j in range(resnets):
            resnet(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}")
            resnet(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}")
    return modules


def clip_table_from_transformers(names: Collection[str]) -> Table:
    """Nested names, and the flat ones of transformers 5.6 and of some merged checkpoints."""
    flat = ("embeddings.", "encoder.", "final_layer_norm.")
    return {
        f"text_model.{name}" if name.startswith(flat) else name: Stored(name=name)
        for name in names
        if not name.endswith("position_ids")
    }


def clip_table_from_open_clip(names: Collection[str], *, unread_layers: int) -> Table:
    """From names as in ``transformer.resblocks.0.attn.in_proj_weight``; the last ``unread_layers`` are left out."""
    layers = _count(r"transformer\.resblocks\.(\d{1,3})\.", names) - unread_layers
    return {ours: stored for ours, stored in _open_clip_tensors(layers) if stored.name in names}


def clip_table_to_open_clip(names: Collection[str]) -> Table:
    """From our names: where an open_clip file of this text encoder keeps each of them."""
    layers = _count(r"text_model\.encoder\.layers\.(\d{1,3})\.", names)
    return {ours: stored for ours, stored in _open_clip_tensors(layers) if ours in names}


def _open_clip_tensors(layers: int) -> Iterator[tuple[str, Stored]]:
    yield "text_model.embeddings.token_embedding.weight", Stored(name="token_embedding.weight")
    yield "text_model.embeddings.position_embedding.weight", Stored(name="positional_embedding")
    yield "text_projection.weight", Stored(name="text_projection", transposed=True)
    for kind in ("weight", "bias"):
        yield f"text_model.final_layer_norm.{kind}", Stored(name=f"ln_final.{kind}")
        for i in range(layers):
            ldm, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
            for a, b in _OPEN_CLIP_LAYER.items():
                yield f"{ours}.{b}.{kind}", Stored(name=f"{ldm}.{a}.{kind}")
            for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                fused = Stored(name=f"{ldm}.attn.in_proj_{kind}", third=third)
                yield f"{ours}.self_attn.{projection}.{kind}", fused


def _count(pattern: str, names: Iterable[str]) -> int:
    """One more than the largest number that ``pattern`` finds at the start of a name."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _renamed(names: Iterable[str], modules: Mapping[str, str]) -> Table:
    """Our name -> file's name, for each of the file's ``names`` whose module, or a parent of it, is in ``modules``."""
    return {ours: Stored(name=name) for name in names if (ours := _swap_prefix(name, modules))}


def _turned(names: Iterable[str], modules: Mapping[str, str]) -> Table:
    """The inverse of ``_renamed``, for our ``names``."""
    back = {ours: theirs for theirs, ours in modules.items()}
    return {name: Stored(name=theirs) for name in names if (theirs := _swap_prefix(name, back))}


def _swap_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    cut = len(name)
    while cut > 0:
        head = prefixes.get(name[:cut])
        if head is not None:
            return head + name[cut:]
        cut = name.rfind(".", 0, cut)
    return None
