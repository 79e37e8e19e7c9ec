"""A base checkpoint on disk -> its parts, offline, in the wanted dtype and on the wanted device."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextModel

from ..errors import BaseModelError
from ..formats.safetensors_file import read_header
from .family import SD1, SD2, Family
from .schedule import NoiseSchedule

MINI = "mini"
MINI_FOLDER = Path(__file__).parent / "mini"
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BaseFolder:
    """A diffusers folder whose parts are all there; no weight has been read."""

    name: str
    folder: Path
    family: Family
    resolution: int
    """Side in pixels of the square picture that the base was made for."""
    latent_factor: int
    """Pixels to a latent, along a side."""
    size_step: int
    """Pixels that width and height must be multiples of, so that every level of the UNet halves evenly."""
    unet_parameters: int
    schedule: dict[str, Any]
    fingerprint: str
    """Over the parts' configurations and tensor headers: tells bases apart without reading their weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The frozen parts of a checkpoint. ``unet`` and ``text_encoder`` share one dtype; ``vae`` is float32."""

    folder: BaseFolder
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    schedule: NoiseSchedule

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def modules(self) -> dict[str, nn.Module]:
        """Canonical name -> module, of the UNet and the text encoder, containers too."""
        # transformers >= 5.6 has no ``text_model`` between the encoder and its layers; canonical names do.
        nesting = "" if hasattr(self.text_encoder, "text_model") else "text_model."
        named = {f"unet.{name}": module for name, module in self.unet.named_modules() if name}
        for name, module in self.text_encoder.named_modules():
            if name:
                named[f"text_encoder.{nesting}{name}"] = module
        return named


def find_base(path: str) -> BaseFolder:
    """Look at ``mini`` or a diffusers folder without loading it.

    Raises:
        BaseModelError: the folder is missing or incomplete, or it is not Stable Diffusion 1.x or 2.x.
    """
    folder = MINI_FOLDER if path == MINI else Path(path)
    if folder.is_file():
        raise BaseModelError(f"{path}: a single-file checkpoint; this version reads diffusers folders and 'mini'")
    if not folder.is_dir():
        raise BaseModelError(f"{path}: no such base; expected 'mini' or the folder of a diffusers checkpoint")
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(f"{path}: not a complete diffusers checkpoint: it lacks {', '.join(missing)}")
    unet, vae, schedule = (
        _read_json(folder / part) for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    width = unet.get("cross_attention_dim")
    if unet.get("in_channels") != 4 or unet.get("addition_embed_type") or not isinstance(width, int):
        raise BaseModelError(f"{path}: its UNet is not one of Stable Diffusion 1.x or 2.x")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return BaseFolder(
        name=path if path == MINI else folder.resolve().name,
        folder=folder,
        family=SD2 if width == SD2.cross_attention_dim else SD1,
        resolution=unet["sample_size"] * factor,
        latent_factor=factor,
        size_step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        unet_parameters=_count_parameters(folder / "unet"),
        schedule=schedule,
        fingerprint=_fingerprint(folder),
    )


def load_base(folder: BaseFolder, *, device: torch.device, dtype: torch.dtype) -> Base:
    """Load every part, frozen and in evaluation mode.

    Raises:
        BaseModelError: a part cannot be loaded; the message names the part and the reason.
    """
    where = folder.folder
    prediction = folder.schedule.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"{folder.name}: prediction type {prediction!r} is not supported")

    def loaded(part: str, kind: Callable[..., T], **options: Any) -> T:
        try:
            return kind(str(where / part), local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BaseModelError(f"{folder.name}: its {part} cannot be loaded: {reason}") from None

    parts = {
        "unet": loaded("unet", UNet2DConditionModel.from_pretrained, torch_dtype=dtype, use_safetensors=True),
        "text_encoder": loaded("text_encoder", CLIPTextModel.from_pretrained, dtype=dtype, use_safetensors=True),
        "vae": loaded("vae", AutoencoderKL.from_pretrained, torch_dtype=torch.float32, use_safetensors=True),
    }
    for part in parts.values():
        part.to(device).requires_grad_(False).eval()
    return Base(
        folder=folder,
        tokenizer=loaded("tokenizer", CLIPTokenizer.from_pretrained),
        schedule=NoiseSchedule.scaled_linear(
            start=folder.schedule.get("beta_start", 0.00085),
            end=folder.schedule.get("beta_end", 0.012),
            timesteps=folder.schedule.get("num_train_timesteps", 1000),
            prediction=prediction,
        ).to(device),
        **parts,
    )


def choose_device() -> torch.device:
    """The first of CUDA, Apple's Metal and the CPU that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{file}: missing from the checkpoint") from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file}: cannot be read as JSON: {error}") from None


def _count_parameters(part: Path) -> int:
    headers = [read_header(file, BaseModelError) for file in part.iterdir() if file.suffix == ".safetensors"]
    return sum(math.prod(info.shape) for header in headers for info in header.tensors.values())


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for part in ("unet", "text_encoder", "vae"):
        for file in sorted((folder / part).iterdir()):
            if file.suffix == ".safetensors":
                header = read_header(file, BaseModelError)
                with file.open("rb") as stream:
                    digest.update(stream.read(header.payload_start + 65536))
            elif file.suffix == ".json":
                digest.update(file.read_bytes())
    return digest.hexdigest()
