"""Load the models of a base checkpoint: offline, in a given dtype, on a given device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from ..errors import BaseModelError
from ..families import PART_TITLES, TOKENS_IN_CHUNK, TextEncoderFacts
from ..formats.tensor_files import read_tensors
from .architecture import Shapes, clip_config, unet_config, vae_config
from .attention import use_attention
from .base import Base, TextEncoder
from .checkpoint import BaseCheckpoint
from .device import multiplies_bfloat16
from .models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from .quantize import quantize_unet
from .schedule import NoiseSchedule
from .words import clip_merges, clip_vocabulary


def load_base(
    checkpoint: BaseCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
    home: torch.device | None = None,
) -> Base:
    """Load every part, frozen and in evaluation mode.

    Args:
        device: where the base works. On the ``meta`` device nothing is read, and the models have shapes alone.
        vae_dtype: by default that of ``decoding_dtype``.
        home: where the parts are loaded to, if not to ``device``: a caller who needs one part at a time brings each to the
            device (``base.device_memory``).

    Raises:
        BaseModelError: a part cannot be built from its tensors; the message names the part and the reason.
    """
    parts, home = checkpoint.parts, home or device
    encoders = tuple(_load_encoder(checkpoint, facts, home, dtype) for facts in checkpoint.family.text_encoders)
    pooled = [encoder.model.config.projection_dim for encoder in encoders if encoder.facts.pooled]
    unet = parts["unet"].config or _inferred(
        checkpoint,
        "unet",
        lambda shapes: unet_config(
            shapes,
            checkpoint.family,
            pooled_width=pooled[0] if pooled else None,
            sample_size=checkpoint.resolution // checkpoint.latent_factor,
        ),
    )
    vae = parts["vae"].config or _inferred(
        checkpoint, "vae", lambda shapes: vae_config(shapes, checkpoint.latent_scale)
    )
    base = Base(
        checkpoint=checkpoint,
        unet=_filled_unet(checkpoint, lambda: UNet2DConditionModel.from_config(dict(unet)), device, dtype, home=home),
        text_encoders=encoders,
        vae=_filled(
            checkpoint,
            "vae",
            lambda: AutoencoderKL.from_config(dict(vae)),
            home,
            vae_dtype or decoding_dtype(dtype, device),
        ),
        schedule=NoiseSchedule.of(checkpoint.schedule).to(device),
        device=device,
        dtype=dtype,
    )
    use_attention(base.unet, checkpoint.attention)
    return base


def decoding_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the VAE beside a UNet of ``dtype``, never float16, in which SDXL's overflows.

    It is bfloat16 with bfloat16, and with float16 on a GPU that multiplies bfloat16 in hardware: decoding needs half the
    memory of float32 there. Else it is float32.
    """
    in_hardware = device.type == "cuda" and multiplies_bfloat16(device)
    halved = dtype == torch.bfloat16 or (dtype == torch.float16 and in_hardware)
    return torch.bfloat16 if halved else torch.float32


def _filled_unet(
    checkpoint: BaseCheckpoint,
    build: Callable[[], Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    home: torch.device,
) -> Any:
    """The UNet in ``home``. If ``checkpoint`` says so, it is quantised on ``device``, which never holds all of it."""
    if checkpoint.quantization == "none":
        return _filled(checkpoint, "unet", build, home, dtype)
    unet = _filled(checkpoint, "unet", build, device if device.type == "meta" else torch.device("cpu"), dtype)
    quantize_unet(unet, checkpoint.quantization, device)
    return unet.to(home)


def _load_encoder(
    checkpoint: BaseCheckpoint, facts: TextEncoderFacts, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    part = checkpoint.parts[facts.part]
    tokenizer, pad_id = _tokenizer(checkpoint, facts)
    config = part.config or _inferred(
        checkpoint,
        facts.part,
        lambda shapes: clip_config(shapes, facts, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=pad_id),
    )
    kind = CLIPTextModelWithProjection if facts.pooled else CLIPTextModel
    model = _filled(checkpoint, facts.part, lambda: kind(CLIPTextConfig(**config)), device, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise BaseModelError(
            f"{checkpoint.name}: its {PART_TITLES[facts.part]} has {model.config.vocab_size} tokens, its tokenizer "
            f"{len(tokenizer)}; name the folder of a matching text encoder with base.{facts.part}"
        )
    return TextEncoder(facts=facts, model=model, tokenizer=tokenizer, pad_id=pad_id)


def _tokenizer(checkpoint: BaseCheckpoint, facts: TextEncoderFacts) -> tuple[CLIPTokenizer, int]:
    """The tokenizer, and the id of the token that pads prompts."""
    folder = checkpoint.tokenizers[facts.part]
    if folder is None:
        tokenizer = clip_tokenizer()
        return tokenizer, tokenizer.get_vocab()[facts.pad_token]
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(f"{checkpoint.name}: its {folder.name} cannot be loaded: {reason}") from None
    return tokenizer, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens, made from the list of merges in this package."""
    merges = clip_merges()
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(clip_vocabulary(merges))},
        merges=[tuple(merge.split()) for merge in merges],  # ty: ignore[invalid-argument-type]
        model_max_length=TOKENS_IN_CHUNK,
    )


def _inferred(checkpoint: BaseCheckpoint, part: str, infer: Callable[[Shapes], dict[str, Any]]) -> Mapping[str, Any]:
    try:
        return infer(checkpoint.parts[part].shapes())
    except (KeyError, IndexError, ValueError, ArithmeticError, StopIteration) as fault:
        raise BaseModelError(
            f"{checkpoint.name}: its {PART_TITLES[part]} is damaged or of an unknown layout (at {fault})"
        ) from None


def _filled(
    checkpoint: BaseCheckpoint, part: str, build: Callable[[], Any], device: torch.device, dtype: torch.dtype
) -> Any:
    """Build a model on the meta device, then read its tensors into place."""
    title, found = PART_TITLES[part], checkpoint.parts[part]
    if empty := [name for name, place in found.tensors.items() if 0 in place.shape]:
        raise BaseModelError(f"{checkpoint.name}: its {title} is damaged: tensor {empty[0]} is empty")
    try:
        with torch.device("meta"):
            model = build()
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"{checkpoint.name}: its {title} has a configuration that cannot be built: {reason}"
        ) from None
    flat = part.startswith("text_encoder") and not hasattr(model, "text_model")
    wanted, problems, surplus = {}, [], set(found.tensors)
    for name, expected in model.state_dict().items():
        ours = f"text_model.{name}" if flat else name
        surplus.discard(ours)
        place = found.tensors.get(ours)
        if place is None:
            problems.append(f"tensor {ours} is missing")
        elif place.shape != tuple(expected.shape):
            problems.append(f"tensor {ours} has shape {place.shape}, expected {tuple(expected.shape)}")
        else:
            wanted[name] = place
    if part in ("unet", "vae"):
        problems += [f"tensor {name} is unknown" for name in sorted(surplus)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BaseModelError(f"{checkpoint.name}: its {title} cannot be built: {problems[0]}{more}")
    try:
        tensors = (
            {name: torch.empty(place.shape, dtype=dtype, device=device) for name, place in wanted.items()}
            if device.type == "meta"
            else read_tensors(wanted, dtype=dtype, device=device)
        )
    except OSError as fault:
        raise BaseModelError(f"{checkpoint.name}: its {title} cannot be read: {fault}") from None
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            length = module.position_ids.shape[-1]
            module.position_ids = torch.arange(length, device=device).expand(1, -1)
    return model.requires_grad_(False).eval()
