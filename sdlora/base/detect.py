"""What a checkpoint is, told from the names and shapes in its header; no weight is read.

The one exception: Stable Diffusion 2.x with and without v-prediction differ in nothing but their weights, so where no
metadata and no marker tells, one vector of some hundred numbers is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelError
from ..families import FAMILIES, SD2, Family
from ..formats.lora_file import is_lora
from ..formats.tensor_files import TensorFile, open_tensor_file, read_tensors
from .parts import PARTS, TITLES, Part, part_in_folder, parts_in_file, read_json
from .schedule import Prediction, ScheduleFacts

LATENT_FACTOR = 8
"""Pixels to a latent, of every published VAE of Stable Diffusion."""
SD2_V_BIAS_SPREAD = 0.09
"""The bound that ComfyUI uses for the same purpose (``supported_models.py``)."""
_USELESS = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar$|denoiser\.|first_stage_model\.loss"
    r"|.*(logit_scale|position_ids|text_projection|attn_mask)$|v_pred$|ztsnr$|cond_stage_model\.model\.transformer\.resblocks"
)
"""Tensors that files hold and that no image needs: schedules, averages kept by trainers, layers behind the one read."""
_OTHERS = {
    r"(.*\.)?joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"(.*\.)?(double_blocks|single_transformer_blocks)\.": "a Flux checkpoint",
    r"(.*\.)?clip_txt_mapper\.": "a Stable Cascade checkpoint",
    r"(.*\.)?adaln_single\.": "a PixArt checkpoint",
    r"(.*\.)?double_layers\.": "an AuraFlow checkpoint",
    r"(.*\.)?noise_refiner\.": "a Lumina or Z-Image checkpoint",
    r"(.*\.)?patchify_proj\.": "an LTX-Video checkpoint",
    r"(.*\.)?mlp_t5\.": "a Hunyuan-DiT checkpoint",
    r"(.*\.)?(time_stack|time_mixer)\.": "a Stable Video Diffusion checkpoint",
    r"(.*\.)?transformer_blocks\.\d+\.img_mod": "a Qwen-Image checkpoint",
    r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|zero_convs\.": "a ControlNet",
    r"emb_params$|string_to_param|clip_[lg]$": "a textual-inversion embedding",
    r"(.*\.)?motion_modules\.": "a motion module",
}
_UNET_INPUTS = {
    5: "a depth-to-image model: its UNet wants a depth map as a fifth channel",
    7: "an upscaler: its UNet wants the small image as three more channels",
    8: "an instruct-pix2pix model: its UNet wants the image to change as four more channels",
    9: "an inpainting model: its UNet wants a mask and the masked image as five more channels",
}
_DISTILLED = re.compile(r"turbo|lightning|hyper[-_ ]?sd|\blcm\b|\bdmd2?\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectedCheckpoint:
    """A checkpoint as it lies on the disk, complete or not, usable or not."""

    path: Path
    dialect: str
    """``diffusers`` (a folder), ``ldm``, ``diffusers-single-file``, or ``unet-only``."""
    family: Family | None
    parts: Mapping[str, Part]
    schedule: ScheduleFacts
    prediction_source: str
    """By what the prediction type was told."""
    zeros_for_empty_negative: bool | None
    """As the folder says; None where it does not."""
    ema_tensors: int
    files: tuple[TensorFile, ...]
    refusal: str | None
    """Why it cannot be used, as the end of a sentence that begins with its name."""
    notes: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def resolution(self) -> int | None:
        """Side in pixels of the square image that it was made for: as its folder says, or as all of its family were."""
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
        """Its family. Raises ``BaseModelError`` where it cannot be used."""
        if self.refusal is not None or self.family is None:
            raise BaseModelError(f"{self.path}: {self.refusal}")
        return self.family


def detect_checkpoint(path: Path) -> DetectedCheckpoint:
    """Look at a diffusers folder, a ``.safetensors`` file or a ``.ckpt`` file.

    Raises:
        BaseModelError: it is missing, damaged, or a pickle that is not trusted.
    """
    if path.is_dir():
        return _detect_folder(path)
    if not path.exists():
        raise BaseModelError(
            f"{path}: no such base; expected 'mini', a diffusers folder or a checkpoint file (.safetensors, .ckpt)"
        )
    file = open_tensor_file(path, BaseModelError)
    parts, dialect = parts_in_file(file)
    return _describe(path, dialect, parts, (file,), scheduler={}, index={})


def _detect_folder(path: Path) -> DetectedCheckpoint:
    parts = {part: part_in_folder(path / part, part) for part in PARTS if (path / part).is_dir()}
    if not parts:
        raise BaseModelError(f"{path}: not a checkpoint: none of its folders is called {', '.join(PARTS)}")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json", needed=False)
    index = read_json(path / "model_index.json", needed=False)
    files = {id(w.file): w.file for part in parts.values() for w in part.tensors.values()}
    return _describe(path, "diffusers", parts, tuple(files.values()), scheduler=scheduler, index=index)


def _describe(
    path: Path,
    dialect: str,
    parts: Mapping[str, Part],
    files: tuple[TensorFile, ...],
    *,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
) -> DetectedCheckpoint:
    read = {(id(w.file), w.stored.name) for part in parts.values() for w in part.tensors.values()}
    unread = [name for file in files for name in file.tensors if (id(file), name) not in read]
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    family, refusal = _identify(parts, unread)
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
        notes.append(f"{len(unknown)} of its tensors have no place in the model and are not read, such as {unknown[0]}")
    names = " ".join((path.stem, metadata.get("modelspec.title", "")))
    if refusal is None and (hint := _DISTILLED.search(names)):
        notes.append(f"its name says {hint[0]!r}: such distilled models want few steps and --cfg 1 to 2")
    return DetectedCheckpoint(
        path=path,
        dialect=dialect,
        family=family if refusal is None else None,
        parts=parts,
        schedule=schedule,
        prediction_source=source,
        zeros_for_empty_negative=index.get("force_zeros_for_empty_prompt"),
        ema_tensors=sum(name.startswith("model_ema.") for name in unread),
        files=files,
        refusal=refusal,
        notes=tuple(notes),
        metadata=metadata,
    )


def _identify(parts: Mapping[str, Part], unread: Sequence[str]) -> tuple[Family | None, str | None]:
    """The family, or why there is none."""
    if "unet" not in parts or "conv_in.weight" not in parts["unet"].tensors:
        names = [*unread, *(w.stored.name for part in parts.values() for w in part.tensors.values())]
        if is_lora(names):
            return None, "is a LoRA, not a base checkpoint; it goes with --lora"
        for pattern, what in _OTHERS.items():
            if any(re.match(pattern, name) for name in names):
                return None, f"is {what}; sdlora works with Stable Diffusion 1.x, 2.x and XL"
        if parts:
            return None, f"holds no UNet of Stable Diffusion, only {', '.join(TITLES[part] for part in parts)}"
        return None, f"is no checkpoint that sdlora knows; its tensors are named like {names[0] if names else '(none)'}"
    shapes = parts["unet"].shapes()
    inputs = shapes.get("conv_in.weight", ())
    width = next((s for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), ())
    projection = next((s for n, s in shapes.items() if n.endswith(".proj_in.weight")), ())
    if len(inputs) != 4 or len(width) != 2 or len(projection) not in (2, 4):
        return None, "is damaged or of an unknown kind: its UNet lacks what all of Stable Diffusion have"
    if any(re.search(r"motion_modules\.|time_stack\.|time_mixer\.", name) for name in (*unread, *shapes)):
        return None, "makes videos (AnimateDiff or Stable Video Diffusion), not images"
    if any("cond_proj" in name for name in (*unread, *shapes)):
        return None, "is an LCM distillation: its UNet wants the guidance scale as an input, which is not supported"
    if inputs[1] != 4:
        return None, f"is {_UNET_INPUTS.get(inputs[1], f'a UNet with {inputs[1]} input channels')}; not supported"
    if any(name.startswith("edm_") for name in unread):
        return None, "was trained on an EDM noise schedule (as Playground 2.5), which is not supported"
    size_conditioning, linear = "add_embedding.linear_1.weight" in shapes, len(projection) == 2
    if size_conditioning and any(name.startswith("down_blocks.0.attentions") for name in shapes):
        return None, "is unCLIP: its UNet wants an image's embedding, which is not supported"
    encoder = parts["text_encoder"].tensors.values() if "text_encoder" in parts else ()
    alone = any(w.stored.name.startswith("conditioner.embedders.0.model.") for w in encoder)
    if size_conditioning and (width[1] == 1280 or alone):
        return None, "is the SDXL refiner, which only finishes other images; use an SDXL base"
    for family in FAMILIES.values():
        if (family.unet.linear_projection, family.unet.size_conditioning) == (linear, size_conditioning):
            return family, None
    return None, "has a UNet unlike that of any Stable Diffusion"


def _prediction(
    family: Family | None,
    parts: Mapping[str, Part],
    unread: Sequence[str],
    metadata: Mapping[str, str],
    scheduler: Mapping[str, Any],
) -> tuple[Prediction, str, str | None]:
    """Prediction type, by what it was told, and a sentence where two sources contradict each other."""
    stated = metadata.get("modelspec.prediction_type", "")
    if "-v/" in f"{metadata.get('modelspec.architecture', '')}/":
        stated = "v"
    told: Prediction | None = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(stated)  # ty: ignore[invalid-assignment]
    if "v_pred" in unread:
        contradiction = "its metadata says epsilon, its v_pred tensor says v: v is taken" if told == "epsilon" else None
        return "v_prediction", "marker tensor", contradiction
    if scheduler:
        kind = scheduler.get("prediction_type", "epsilon")
        return ("v_prediction" if kind == "v_prediction" else "epsilon"), "scheduler configuration", None
    if told:
        return told, "metadata", None
    if family is SD2 and metadata.get("global_step") != "875000":
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
