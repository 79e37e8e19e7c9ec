"""The model classes of diffusers and transformers, imported without the hundreds of modules that come with them.

Each of the packages in ``_PACKAGES`` imports every model that it has when one is asked for. Here they are empty shells while
the two modules are imported, and garbage collection pauses, since nearly all that an import makes stays. Afterwards the
shells are gone: whoever imports the packages gets them whole, with the same classes (``benchmarks/start.py``).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import diffusers

_PACKAGES = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")


@contextmanager
def _shells() -> Generator[None]:
    shells = {name: ModuleType(name) for name in _PACKAGES if name not in sys.modules}
    for name, shell in shells.items():
        shell.__path__ = [str(Path(diffusers.__file__).parent.joinpath(*name.split(".")[1:]))]
    collects = gc.isenabled()
    gc.disable()
    sys.modules.update(shells)
    try:
        yield
    finally:
        for name, shell in shells.items():
            if sys.modules.get(name) is shell:
                del sys.modules[name]
        if collects:
            gc.enable()


with _shells():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "DiagonalGaussianDistribution",
    "UNet2DConditionModel",
]
