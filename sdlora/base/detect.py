"""What a checkpoint is, detected from the names and shapes in its header; no weight is read.

The one exception: Stable Diffusion 2.x with and without v-prediction differ in nothing but their weights, so without
metadata and without a marker tensor one vector of some hundred numbers is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ..errors import BaseModelError
from ..families import PART_TITLES, PARTS, SD2, Family, Prediction, family_of_unet
from ..formats.lora_names import is_lora
from ..formats.metadata import stated_prediction
from ..formats.tensor_files import TensorFile, open_tensor_file, read_tensors
from .parts import Part, part_in_folder, parts_in_file, read_json
from .schedule import ScheduleFacts

LATENT_FACTOR = 8
"""Pixels to a latent, along a side, in every published VAE of Stable Diffusion."""
SD2_V_BIAS_SPREAD = 0.09
"""The bound that ComfyUI uses for the same purpose (``supported_models.py``)."""
SD2_BASE_STEPS = "875000"
"""``global_step`` of the published 2.x checkpoint that predicts epsilon."""
REFINER_TEXT_WIDTH = 1280
"""Channels of the text embeddings that SDXL's refiner attends to."""
_USELESS = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar$|denoiser\.|first_stage_model\.loss"
    r"|.*(logit_scale|position_ids|text_projection|attn_mask)$|v_pred$|ztsnr$|cond_stage_model\.model\.transformer\.resblocks"
)
"""Tensors that files hold and that no image needs: schedules, averages kept by trainers, layers after the one read."""
_CONTROLNET = r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|zero_convs\."
_OTHERS = {
    r"(.*\.)?joint_blocks\.": ("checkpoint", "a Stable Diffusion 3 checkpoint"),
    r"(.*\.)?(double_blocks|single_transformer_blocks)\.": ("checkpoint", "a Flux checkpoint"),
    r"(.*\.)?clip_txt_mapper\.": ("checkpoint", "a Stable Cascade checkpoint"),
    r"(.*\.)?adaln_single\.": ("checkpoint", "a PixArt checkpoint"),
    r"(.*\.)?double_layers\.": ("checkpoint", "an AuraFlow checkpoint"),
    r"(.*\.)?noise_refiner\.": ("checkpoint", "a Lumina or Z-Image checkpoint"),
    r"(.*\.)?patchify_proj\.": ("checkpoint", "an LTX-Video checkpoint"),
    r"(.*\.)?mlp_t5\.": ("checkpoint", "a Hunyuan-DiT checkpoint"),
    r"(.*\.)?(time_stack|time_mixer)\.": ("checkpoint", "a Stable Video Diffusion checkpoint"),
    r"(.*\.)?transformer_blocks\.\d+\.img_mod": ("checkpoint", "a Qwen-Image checkpoint"),
    _CONTROLNET: ("controlnet", "a ControlNet"),
    r"emb_params$|string_to_param|clip_[lg]$": ("embedding", "a textual-inversion embedding"),
    r"(.*\.)?motion_modules\.": ("motion-module", "a motion module"),
    r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.": ("text-encoder", "a T5 text encoder"),
}
"""Pattern of a tensor's name -> ``DetectedCheckpoint.kind`` and what it is, the first that matches."""
_EMBEDDING_WIDTHS = (768, 1024, 1280)
"""Numbers in the vector of a token, in the text encoders of Stable Diffusion."""
_SUPPORTED = "; sdlora works with Stable Diffusion 1.x, 2.x and XL"
_UNET_INPUTS = {
    5: "a depth-to-image model: its UNet needs a depth map as a fifth channel",
    7: "an upscaler: its UNet needs the small image as three more channels",
    8: "an instruct-pix2pix model: its UNet needs the image to change as four more channels",
    9: "an inpainting model: its UNet needs a mask and the masked image as five more channels",
}
_DISTILLED = re.compile(r"turbo|lightning|hyper[-_ ]?sd|\blcm\b|\bdmd2?\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectedCheckpoint:
    """A checkpoint on the disk, complete or not, usable or not."""

    path: Path
    format: str
    """``diffusers`` (a folder), ``ldm``, ``diffusers-single-file``, or ``unet-only``."""
    family: Family | None
    parts: Mapping[str, Part]
    schedule: ScheduleFacts
    prediction_source: str
    """What the prediction type is known from: ``marker tensor``, ``scheduler configuration``, ``metadata``, ``weights`` or
    ``family``."""
    zeros_for_empty_negative: bool | None
    """What a diffusers folder states; None if it states nothing."""
    ema_tensors: int
    """Number of tensors that hold averaged weights; they are not read."""
    files: tuple[TensorFile, ...]
    kind: str
    """``checkpoint`` (of any kind), ``controlnet``, ``embedding``, ``motion-module``, ``vae`` or ``text-encoder``."""
    title: str | None
    """What it is, such as ``a Flux checkpoint``, if it is no checkpoint of Stable Diffusion 1.x, 2.x or XL."""
    refusal: str | None
    """Why it cannot be used, as the end of a sentence that begins with its name."""
    notes: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def resolution(self) -> int | None:
        """Side in pixels of the square image that it was made for, as its folder states it or as is usual in its family."""
        size = (self.parts["unet"].config or {}).get("sample_size") if "unet" in self.parts else None
        if isinstance(size, int):
            return size * self.latent_factor
        return self.family.resolution_for(self.schedule.prediction) if self.family else None

    @property
    def latent_factor(self) -> int:
        """Pixels to a latent, along a side."""
        levels = self.parts["vae"].count(r"encoder\.down_blocks\.(\d+)\.") if "vae" in self.parts else 0
        return 2 ** (levels - 1) if levels else LATENT_FACTOR

    def require_family(self) -> Family:
        """Its family. Raises ``BaseModelError`` if the checkpoint cannot be used."""
        if self.refusal is not None or self.family is None:
            raise BaseModelError(f"{self.path}: {self.refusal}")
        return self.family


def detect_checkpoint(path: Path) -> DetectedCheckpoint:
    """Find out what a diffusers folder, a ``.safetensors`` file or a ``.ckpt`` file is.

    Raises:
        BaseModelError: it is missing, damaged, or a pickle that is not trusted.
    """
    if path.is_dir():
        return _detect_folder(path)
    if not path.exists():
        raise BaseModelError(
            f"{path}: no such base; expected 'mini', a diffusers folder or a checkpoint file (.safetensors, .ckpt); "
            "sdlora downloads nothing: give the path of the file or folder"
        )
    file = open_tensor_file(path, BaseModelError)
    parts, form = parts_in_file(file)
    return _describe(path, form, parts, (file,), scheduler={}, index={})


def _detect_folder(path: Path) -> DetectedCheckpoint:
    parts = {part: part_in_folder(path / part, part) for part in PARTS if (path / part).is_dir()}
    if not parts:
        raise BaseModelError(f"{path}: not a checkpoint: it has no folder called {' or '.join(PARTS)}")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json", needed=False)
    index = read_json(path / "model_index.json", needed=False)
    files = {id(w.file): w.file for part in parts.values() for w in part.tensors.values()}
    return _describe(path, "diffusers", parts, tuple(files.values()), scheduler=scheduler, index=index)


def _describe(
    path: Path,
    form: str,
    parts: Mapping[str, Part],
    files: tuple[TensorFile, ...],
    *,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
) -> DetectedCheckpoint:
    read = {(id(w.file), w.stored.name) for part in parts.values() for w in part.tensors.values()}
    unread = [name for file in files for name in file.tensors if (id(file), name) not in read]
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    kind, title = _other_kind(parts, unread, files)
    family, refusal = _identify(parts, unread, title)
    prediction, source, contradiction = _prediction(family, parts, unread, metadata, scheduler)
    zero_terminal = "ztsnr" in unread or bool(scheduler.get("rescale_betas_zero_snr"))
    try:
        schedule = ScheduleFacts.from_scheduler(
            scheduler,
            prediction=prediction,
            zero_terminal_snr=zero_terminal,
            timestep_spacing=None if scheduler or family is None else family.timestep_spacing,
        )
    except ValueError as fault:
        schedule, refusal = ScheduleFacts(prediction=prediction), refusal or f"its scheduler {fault}"
    notes = [contradiction] if contradiction else []
    unknown = [name for name in unread if not _USELESS.match(name)]
    if unknown and refusal is None:
        notes.append(f"{len(unknown)} of its tensors have no place in the model and are ignored, such as {unknown[0]}")
    names = " ".join((path.stem, metadata.get("modelspec.title", "")))
    if refusal is None and (hint := _DISTILLED.search(names)):
        notes.append(f"its name says {hint[0]!r}: such distilled models need few steps and --cfg 1 to 2")
    return DetectedCheckpoint(
        path=path,
        format=form,
        family=family if refusal is None else None,
        parts=parts,
        schedule=schedule,
        prediction_source=source,
        zeros_for_empty_negative=index.get("force_zeros_for_empty_prompt"),
        ema_tensors=sum(name.startswith("model_ema.") for name in unread),
        files=files,
        kind=kind,
        title=title,
        refusal=refusal,
        notes=tuple(notes),
        metadata=metadata,
    )


def _identify(parts: Mapping[str, Part], unread: Sequence[str], title: str | None) -> tuple[Family | None, str | None]:
    """The family, or why there is none; ``title`` is that of ``_other_kind``."""
    if not _has_unet(parts):
        return None, _no_unet(parts, unread, title)
    if title is not None:
        return None, f"is {title}{_SUPPORTED}"
    shapes = parts["unet"].shapes()
    inputs = shapes["conv_in.weight"]
    text = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), ())
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    if len(inputs) != 4 or len(text) != 2 or len(projection) not in (2, 4):
        return None, "is damaged or of an unknown kind: its UNet lacks what every Stable Diffusion has"
    size_conditioning = "add_embedding.linear_1.weight" in shapes
    refusal = _unsupported_unet([*unread, *shapes], input_channels=inputs[1])
    if refusal is None and size_conditioning:
        refusal = _unsupported_sdxl(parts, text_width=text[1])
    if refusal is not None:
        return None, refusal
    family = family_of_unet(linear_projection=len(projection) == 2, size_conditioning=size_conditioning)
    return family, None if family else "has a UNet unlike that of any Stable Diffusion"


def _has_unet(parts: Mapping[str, Part]) -> bool:
    return "unet" in parts and "conv_in.weight" in parts["unet"].tensors


def _other_kind(
    parts: Mapping[str, Part], unread: Sequence[str], files: Sequence[TensorFile]
) -> tuple[str, str | None]:
    """``DetectedCheckpoint.kind`` and ``title``."""
    names = _names(parts, unread)
    if _has_unet(parts):
        # A ControlNet is the first half of a UNet.
        half = "conv_out.weight" not in parts["unet"].tensors
        found = half and any(re.match(_CONTROLNET, name) for name in names)
        return _OTHERS[_CONTROLNET] if found else ("checkpoint", None)
    for pattern, found in _OTHERS.items():
        if any(re.match(pattern, name) for name in names):
            return found
    if set(parts) == {"vae"}:
        return "vae", "a VAE"
    if parts and all(part.startswith("text_encoder") for part in parts):
        return "text-encoder", "a text encoder" if len(parts) == 1 else "two text encoders"
    shapes = [stored.shape for file in files for stored in file.tensors.values()]
    if not parts and len(shapes) == 1 and len(shapes[0]) in (1, 2) and shapes[0][-1] in _EMBEDDING_WIDTHS:
        return "embedding", "a textual-inversion embedding"
    return "checkpoint", None


def _names(parts: Mapping[str, Part], unread: Sequence[str]) -> list[str]:
    """The names of all tensors as the files have them."""
    return [*unread, *(w.stored.name for part in parts.values() for w in part.tensors.values())]


def _no_unet(parts: Mapping[str, Part], unread: Sequence[str], title: str | None) -> str:
    """What a file is that holds no UNet of Stable Diffusion."""
    names = _names(parts, unread)
    if is_lora(names):
        return "is a LoRA, not a base checkpoint; use it with --lora"
    if title is not None:
        return f"is {title}{_SUPPORTED}"
    if parts:
        return f"holds no UNet of Stable Diffusion, only {', '.join(PART_TITLES[part] for part in parts)}"
    return f"is not a checkpoint that sdlora knows; its tensors have names such as {names[0] if names else '(none)'}"


def _unsupported_unet(names: Sequence[str], *, input_channels: int) -> str | None:
    """``names`` are those of the UNet's tensors, ours, and of all that have no place in the model."""
    if any(re.search(r"motion_modules\.|time_stack\.|time_mixer\.", name) for name in names):
        return "makes videos (AnimateDiff or Stable Video Diffusion), not images"
    if any("cond_proj" in name for name in names):
        return "is an LCM distillation: its UNet needs the guidance scale as an input, which is not supported"
    if input_channels != 4:
        kind = _UNET_INPUTS.get(input_channels, f"a UNet with {input_channels} input channels")
        return f"is {kind}; not supported"
    if any(name.startswith("edm_") for name in names):
        return "was trained on an EDM noise schedule (as Playground 2.5), which is not supported"
    return None


def _unsupported_sdxl(parts: Mapping[str, Part], *, text_width: int) -> str | None:
    """What else has SDXL's size conditioning; ``text_width`` is that of the embeddings that the UNet attends to."""
    if any(name.startswith("down_blocks.0.attentions") for name in parts["unet"].tensors):
        return "is unCLIP: its UNet needs an image's embedding, which is not supported"
    encoder = parts["text_encoder"].tensors.values() if "text_encoder" in parts else ()
    open_clip_alone = any(w.stored.name.startswith("conditioner.embedders.0.model.") for w in encoder)
    if text_width == REFINER_TEXT_WIDTH or open_clip_alone:
        return "is the SDXL refiner, which only finishes other images; use an SDXL base"
    return None


def _prediction(
    family: Family | None,
    parts: Mapping[str, Part],
    unread: Sequence[str],
    metadata: Mapping[str, str],
    scheduler: Mapping[str, Any],
) -> tuple[Prediction, str, str | None]:
    """Prediction type, what it is known from, and a sentence where two sources contradict each other."""
    stated = stated_prediction(metadata)
    if "v_pred" in unread:
        contradiction = (
            "its metadata says epsilon, its v_pred tensor says v: v is used" if stated == "epsilon" else None
        )
        return "v_prediction", "marker tensor", contradiction
    if scheduler:
        kind = scheduler.get("prediction_type")
        known = next((each for each in get_args(Prediction) if each == kind), "epsilon")
        return known, "scheduler configuration", None
    if stated:
        return stated, "metadata", None
    if family is SD2 and metadata.get("global_step") != SD2_BASE_STEPS:
        return _sd2_prediction(parts["unet"]), "weights", None
    return "epsilon", "family", None


def _sd2_prediction(unet: Part) -> Prediction:
    """By the spread of the last attention block's first bias, which is wider where v is predicted."""
    biases = [name for name in unet.tensors if re.match(r"up_blocks\.\d+\.attentions\..*\.norm1\.bias$", name)]
    if not biases:
        return "epsilon"
    last = max(biases)
    read = read_tensors({last: unet.tensors[last]}, dtype=torch.float32, device=torch.device("cpu"))
    return "v_prediction" if read[last].std(correction=0) > SD2_V_BIAS_SPREAD else "epsilon"
