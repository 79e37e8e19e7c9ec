"""sdlora: train style LoRAs for Stable Diffusion, generate with several at once, export files that every tool reads.

Importing this package imports nothing else; each public name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .captioning.folder import caption_folder
    from .config.loading import load_config
    from .config.sections import BaseSection, Config
    from .errors import Interrupted, SdloraError
    from .generation.generate import generate, generate_strip
    from .generation.prompt_file import read_prompts
    from .generation.studio import open
    from .grids.grid import grid
    from .library.listing import list_loras
    from .lint.run import lint_dataset
    from .pipelines.applying import applied, apply, restore
    from .progress import CallbackProgress, ProgressUpdate, Silence
    from .publish.civitai import export_civitai
    from .sweeps.run import sweep
    from .tools.average import average
    from .tools.bake import bake
    from .tools.convert import convert
    from .tools.diff import diff
    from .tools.extract import extract
    from .tools.inspect import inspect
    from .tools.interference import interference
    from .tools.merge import merge
    from .tools.resize import resize
    from .training.forecast import plan
    from .training.run import train


_HOMES = {
    "BaseSection": "config.sections",
    "CallbackProgress": "progress",
    "Config": "config.sections",
    "Interrupted": "errors",
    "ProgressUpdate": "progress",
    "SdloraError": "errors",
    "Silence": "progress",
    "applied": "pipelines.applying",
    "apply": "pipelines.applying",
    "restore": "pipelines.applying",
    "read_prompts": "generation.prompt_file",
    "caption_folder": "captioning.folder",
    "convert": "tools.convert",
    "export_civitai": "publish.civitai",
    "generate": "generation.generate",
    "generate_strip": "generation.generate",
    "grid": "grids.grid",
    "inspect": "tools.inspect",
    "resize": "tools.resize",
    "merge": "tools.merge",
    "interference": "tools.interference",
    "extract": "tools.extract",
    "diff": "tools.diff",
    "bake": "tools.bake",
    "average": "tools.average",
    "lint_dataset": "lint.run",
    "list_loras": "library.listing",
    "load_config": "config.loading",
    "open": "generation.studio",
    "plan": "training.forecast",
    "sweep": "sweeps.run",
    "train": "training.run",
}

__all__ = [
    "BaseSection",
    "CallbackProgress",
    "Config",
    "Interrupted",
    "ProgressUpdate",
    "SdloraError",
    "Silence",
    "__version__",
    "applied",
    "apply",
    "average",
    "bake",
    "caption_folder",
    "convert",
    "diff",
    "export_civitai",
    "extract",
    "generate",
    "generate_strip",
    "grid",
    "inspect",
    "interference",
    "lint_dataset",
    "list_loras",
    "load_config",
    "merge",
    "open",
    "plan",
    "read_prompts",
    "resize",
    "restore",
    "sweep",
    "train",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
