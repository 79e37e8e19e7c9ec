"""The configuration of the base checkpoint, and of the cache of what it encodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .setting import Section, Setting


class BaseSection(Section):
    """The base checkpoint that is trained on or generated with."""

    path: Annotated[
        str,
        Field(min_length=1),
        Setting(kohya="pretrained_model_name_or_path", affects="place", values="mini, or a path"),
    ] = "mini"
    """``mini`` (embedded, for trying things out), a checkpoint file (.safetensors, .ckpt), or the folder of a diffusers
    checkpoint. What the checkpoint contains decides resuming, not where it is."""
    vae: Annotated[str | None, Field(min_length=1), Setting(kohya="vae", affects="place")] = None
    """A VAE that replaces the checkpoint's own, or that it lacks: a file or a folder."""
    text_encoder: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """A text encoder that replaces the checkpoint's own, or that it lacks: a file or a folder. SDXL's first."""
    text_encoder_2: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """The same for the second text encoder of SDXL."""
    prediction: Annotated[Literal["auto", "epsilon", "v_prediction", "sample"], Setting(kohya="v_parameterization")] = (
        "auto"
    )
    """What the UNet predicts: the noise, v, or the image without noise. ``auto`` is what the checkpoint says, by its
    metadata, marker keys or weights."""
    zero_terminal_snr: Annotated[bool | None, Setting(kohya="zero_terminal_snr")] = None
    """Whether the last timestep is pure noise (Lin et al. 2024). By default what the checkpoint says."""
    clip_skip: Annotated[int | None, Field(ge=1, le=24), Setting(kohya="clip_skip")] = None
    """Layer of the text encoder that is read, counted from the end: 1 is the last. By default 1, and 2 for SDXL."""
    attention: Annotated[Literal["auto", "sdpa", "xformers"], Setting(kohya="xformers", affects="nothing")] = "auto"
    """Implementation of attention. ``auto`` is torch's own (sdpa); where xformers cannot run, a warning says why and
    sdpa is used."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the weights of the frozen UNet's transformer blocks are kept in memory: in 8 bits (Dettmers et al. 2022) or 4
    bits (QLoRA, Dettmers et al. 2023). That saves 2.2 or 3.2 GB of SDXL's 5.1, and 0.2 or 0.4 GB of SD 1.5's 1.7, and
    makes steps slower. The LoRA is trained in float32 beside them; sample images are generated on the quantised UNet."""


class CacheSection(Section):
    """Where encoded images and captions are kept between runs. It changes the time of a run and nothing else."""

    disk: Annotated[bool, Setting(kohya="cache_latents_to_disk", affects="nothing")] = True
    """Whether encoded images and captions are kept on disk. Within a run they are encoded once in any case."""
    folder: Annotated[str | None, Field(min_length=1), Setting(affects="place")] = None
    """Folder of the cache; runs share it. By default ``sdlora/encoded`` in the user's cache folder."""
    max_gigabytes: Annotated[float, Field(gt=0), Setting(affects="nothing")] = 20.0
    """Largest size of the cache in gigabytes. What was not used for longest is removed first."""
