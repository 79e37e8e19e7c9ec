"""Find a base checkpoint and all its parts; no weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.sections import BaseSection
from ..errors import BaseModelError
from ..families import PART_TITLES, Family
from .detect import DetectedCheckpoint, detect_checkpoint
from .parts import Part, find_part
from .schedule import ScheduleFacts

MINI = "mini"
MINI_FOLDER = Path(__file__).parent / "mini"


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseCheckpoint:
    """A complete checkpoint of a supported family."""

    name: str
    file: Path | None
    """None for a folder."""
    family: Family
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, Path | None]
    """Text encoder's part -> folder of its tokenizer; None for CLIP's, which is in this package."""
    schedule: ScheduleFacts
    resolution: int
    """Side in pixels of the square images that the base was trained on."""
    latent_factor: int
    """Side of a latent cell in pixels."""
    latent_scale: float
    """Factor between the VAE's latents and the UNet's."""
    size_step: int
    """Width and height of training images are multiples of this number of pixels, so that every level of the UNet halves
    evenly. Images of any whole latents can be drawn."""
    clip_skip: int
    """Layer of the text encoders that is read; 1 is the last."""
    zeros_for_empty_negative: bool
    attention: str
    """``auto``, ``sdpa`` or ``xformers``."""
    quantization: str
    """``none``, ``int8`` or ``nf4``: how the UNet's weights are kept once they are loaded."""
    fingerprint: str
    """SHA-256 over names, shapes, configurations and samples of the weights, to recognize a base without reading it all."""

    @property
    def unet_parameters(self) -> int:
        """Number of parameters of the UNet, from its shapes alone."""
        return self.parts["unet"].parameters()

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the weight, for every linear layer, convolution and norm that a LoRA can change."""
        return {
            f"{part}.{name.removesuffix('.weight')}": shape
            for part, found in self.parts.items()
            if part != "vae"
            for name, shape in found.shapes().items()
            if name.endswith(".weight") and len(shape) in (1, 2, 4) and "embeddings." not in name
        }


def base_path(name: str | Path) -> Path:
    """Where a base lies that a user calls ``name``: ``mini``, or a path."""
    return MINI_FOLDER if str(name) == MINI else Path(name)


def find_base(base: str | BaseSection) -> BaseCheckpoint:
    """Examine a base without loading it: ``mini``, a diffusers folder, or a checkpoint file.

    Raises:
        BaseModelError: it is missing, incomplete, damaged or not supported; the message says what to do.
    """
    section = BaseSection(path=base) if isinstance(base, str) else base
    path = base_path(section.path)
    found = detect_checkpoint(path)
    family = found.require_family()
    encoders = [facts.part for facts in family.text_encoders]
    parts, sources = _gather(section, found, family)
    schedule = _overridden(found.schedule, section)
    own_vae = (found.parts["vae"].config if "vae" in found.parts else None) or {}
    zeros = found.zeros_for_empty_negative
    found = replace(found, parts=parts, schedule=schedule)
    return BaseCheckpoint(
        name=MINI if section.path == MINI else path.resolve().stem if path.is_file() else path.resolve().name,
        file=path if path.is_file() else None,
        family=family,
        parts=parts,
        tokenizers={part: _tokenizer_folder(sources[part], part) for part in encoders},
        schedule=schedule,
        resolution=found.resolution or family.resolution,
        latent_factor=found.latent_factor,
        latent_scale=own_vae.get("scaling_factor", family.latent_scale),
        size_step=found.latent_factor * 2 ** (max(1, parts["unet"].count(r"down_blocks\.(\d+)\.")) - 1),
        clip_skip=_clip_skip(section, family, [parts[part] for part in encoders]),
        zeros_for_empty_negative=family.zeros_for_empty_negative if zeros is None else zeros,
        attention=section.attention,
        quantization=section.quantization,
        fingerprint=hashlib.sha256(b"".join(parts[part].digest() for part in sorted(parts))).hexdigest(),
    )


def _gather(section: BaseSection, found: DetectedCheckpoint, family: Family) -> tuple[dict[str, Part], dict[str, Path]]:
    """The parts that the family needs, with the user's replacements, and the path of each."""
    given = {"vae": section.vae, "text_encoder": section.text_encoder, "text_encoder_2": section.text_encoder_2}
    unread_layers = {facts.part: facts.unread_layers for facts in family.text_encoders}
    needed = ("unet", "vae", *unread_layers)
    parts, sources, problems = {}, {}, []
    for part in needed:
        replacement = given.get(part)
        if replacement is not None:
            sources[part] = Path(replacement)
            parts[part] = find_part(sources[part], part, unread_layers=unread_layers.get(part, 0))
        elif part in found.parts:
            parts[part], sources[part] = found.parts[part], found.path
        else:
            problems.append(f"{section.path}: holds no {PART_TITLES[part]}; name a file or folder with base.{part}")
    unneeded = [part for part, path in given.items() if path is not None and part not in needed]
    problems += [f"base.{part}: {section.path} does not use a {PART_TITLES[part]}; remove it" for part in unneeded]
    if problems:
        raise BaseModelError(problems)
    return parts, sources


def _overridden(schedule: ScheduleFacts, section: BaseSection) -> ScheduleFacts:
    if section.prediction != "auto":
        schedule = replace(schedule, prediction=section.prediction)
    if section.zero_terminal_snr is not None:
        schedule = replace(schedule, zero_terminal_snr=section.zero_terminal_snr)
    if not schedule.zero_terminal_snr or schedule.prediction != "epsilon":
        return schedule
    if section.zero_terminal_snr:
        raise BaseModelError(
            f"{section.path}: zero-terminal SNR needs v-prediction: at the last timestep, which is pure noise, "
            "epsilon does not determine the image; set base.prediction=v_prediction or base.zero_terminal_snr=false"
        )
    # A folder's scheduler may be rescaled only for sampling.
    return replace(schedule, zero_terminal_snr=False)


def _clip_skip(section: BaseSection, family: Family, encoders: list[Part]) -> int:
    """The layer to read. SDXL was trained on the last but one, so 1 and 2 mean the same there, as in A1111."""
    layer = max(section.clip_skip or 1, family.clip_skip)
    layers = min(encoder.count(r"text_model\.encoder\.layers\.(\d+)\.") for encoder in encoders)
    if layer > layers:
        raise BaseModelError(f"{section.path}: clip skip {layer}: its text encoder has {layers} layers")
    return layer


def _tokenizer_folder(source: Path, part: str) -> Path | None:
    """Folder of the tokenizer for a text encoder in ``source``, a diffusers folder or the folder of the encoder itself."""
    if not source.is_dir():
        return None
    name = part.replace("text_encoder", "tokenizer")
    folder = source / name if (source / part).is_dir() else source.parent / name
    return folder if folder.is_dir() else None
