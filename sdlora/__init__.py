"""sdlora: train style LoRAs for Stable Diffusion, generate with several at once, export files that every tool reads.

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import inspect, train
    from .civitai import export_civitai
    from .config import BaseSection, Config, load_config
    from .conversion import convert
    from .errors import SdloraError
    from .linting import lint_dataset
    from .studio import generate, generate_strip

__version__ = "0.1.0"

_HOMES = {
    "BaseSection": "config",
    "Config": "config",
    "SdloraError": "errors",
    "convert": "conversion",
    "export_civitai": "civitai",
    "generate": "studio",
    "generate_strip": "studio",
    "inspect": "api",
    "lint_dataset": "linting",
    "load_config": "config",
    "train": "api",
}

__all__ = [
    "BaseSection",
    "Config",
    "SdloraError",
    "__version__",
    "convert",
    "export_civitai",
    "generate",
    "generate_strip",
    "inspect",
    "lint_dataset",
    "load_config",
    "train",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    from importlib import import_module

    # A folder of the package may bear the name of a function (sdlora.train): the function wins from here on.
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
