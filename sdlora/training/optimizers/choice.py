"""Which class of which package an optimizer is, and whether it takes its arguments: found out before a run."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...config.optimizer_rules import OWN_NAMES
from ...config.optimizer_section import OptimizerSection
from ...errors import ConfigError

NAMES_THERE = {"schedule-free": "schedulefreeadamw"}
"""Names here -> those in pytorch-optimizer, where they differ."""
OWN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    # Without a mean of the gradients, which is what it saves; learning rates come from the settings.
    "adafactor": {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False},
    # Low rates of the warm-up would else make the found rate too large (Mishchenko & Defazio, readme of prodigy).
    "prodigy": {"safeguard_warmup": True},
}
"""Arguments that differ from the package's defaults; those of the configuration go before."""
SPELLINGS = {"use_bias_correction": "bias_correction", "decouple": "weight_decouple"}
"""Arguments of the package prodigyopt, which kohya's trainer uses -> those of pytorch-optimizer."""
ELEMENTWISE = frozenset({
    "accsgd", "adabelief", "adabound", "adadelta", "adai", "adam", "adamax", "adamc", "adamg", "adamod", "adams",
    "adamw8bit", "adan", "adapnm", "adasmooth", "ademamix", "adopt", "ano", "avagrad", "bcos", "diffgrad",
    "dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "dadaptsgd", "dualadam", "exadam", "grams",
    "grokfastadamw", "kate", "laprop", "lion", "madgrad", "nadam", "padam", "pid", "pnm", "prodigy", "qhadam", "qhm",
    "radam", "rmsprop", "schedule-free", "schedulefreeradam", "schedulefreesgd", "sgd", "sgdw", "signsgd", "swats",
    "tiger", "vsgd", "yogi",
})  # fmt: skip
"""Optimizers to which the shapes of the tensors mean nothing, so one flat tensor serves; the others get each tensor."""
MATRICES = frozenset({"adago", "adamuon", "muon", "normuon"})
"""Optimizers that ask which tensors are matrices, and use AdamW for the others."""
DRAWS = frozenset({"racs", "sara", "scion", "scionlight", "galore", "alice", "fira"})
"""Optimizers that draw random numbers, or may."""
UNSUITABLE = {
    **dict.fromkeys(("alig", "bsam", "lbfgs"), "computes the loss several times in a step"),
    **dict.fromkeys(("adahessian", "sophiah"), "needs second derivatives"),
    **dict.fromkeys(("lomo", "adalomo", "adammini"), "needs the whole model"),
    **dict.fromkeys(("demo", "distributedmuon"), "exchanges gradients between processes itself"),
    **dict.fromkeys(
        ("adashift", "conda", "magma", "scalableshampoo", "spam", "stablespam"),
        "has state that a checkpoint cannot hold",
    ),
    **dict.fromkeys(("kron", "ranger21", "soap", "splus"), "does not go on exactly from a checkpoint"),
    **dict.fromkeys(("lorarite", "muonclip"), "needs to know what each tensor is for"),
}
"""Optimizers of pytorch-optimizer that cannot be used here, and why."""


@dataclass(frozen=True, kw_only=True)
class LibraryChoice:
    """A class of another package, with arguments that it takes."""

    name: str
    made_by: Any
    """A subclass of ``torch.optim.Optimizer`` whose first two arguments are ``params`` and ``lr``."""
    arguments: Mapping[str, Any]

    @property
    def elementwise(self) -> bool:
        """Whether the shapes of the tensors mean nothing to it."""
        return self.name in ELEMENTWISE

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers."""
        return self.name in DRAWS

    def made(self, tensors: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer of ``tensors``; its learning rate is set before each step."""
        groups: list[dict[str, Any]] = [{"params": list(tensors)}]
        if self.name in MATRICES:
            groups = [
                {"params": [each for each in tensors if (each.ndim > 1) == matrices], "use_muon": matrices}
                for matrices in (True, False)
            ]
        return self.made_by(groups, lr=1e-4, **self.arguments)


def choose(section: OptimizerSection) -> LibraryChoice:
    """The class and the arguments for ``section``, whose name is not ``adamw``.

    Raises:
        ConfigError: there is no such optimizer, its package is not installed, or it has no such arguments.
    """
    name = section.name
    made_by = _bitsandbytes() if name == "adamw8bit" else _pytorch_optimizer(name)
    known = _arguments_of(made_by)
    if problems := [_unknown(key, name, known) for key in section.arguments if key not in known]:
        raise ConfigError(problems)
    own = _of_adamw(section) if name == "adamw8bit" else OWN_ARGUMENTS.get(name, {})
    return LibraryChoice(name=name, made_by=made_by, arguments={**own, **section.arguments})


def described(section: OptimizerSection) -> str:
    """The class and its arguments, as kohya's trainer writes them into a file.

    Raises:
        ConfigError: as ``choose``.
    """
    if section.name == "adamw":
        place, arguments = "torch.optim.AdamW", _of_adamw(section)
    else:
        choice = choose(section)
        place, arguments = f"{choice.made_by.__module__}.{choice.made_by.__qualname__}", choice.arguments
    return f"{place}({','.join(f'{key}={value}' for key, value in arguments.items())})"


def _of_adamw(section: OptimizerSection) -> dict[str, Any]:
    values = section.adamw
    return {"weight_decay": values.weight_decay, "betas": values.betas, "eps": values.epsilon}


def _bitsandbytes() -> type[torch.optim.Optimizer]:
    module = _imported("bitsandbytes", 'optimizer.name = "adamw8bit"', "quant")
    return module.optim.AdamW8bit


def _pytorch_optimizer(name: str) -> type[torch.optim.Optimizer]:
    stated = f'optimizer.name = "{name}"'
    if find_spec("pytorch_optimizer") is None and name not in OWN_NAMES:
        near = _nearest(name, OWN_NAMES)
        raise ConfigError(
            f"{stated}: not one of {', '.join(OWN_NAMES)}{near}; other names are those of the package pytorch-optimizer: "
            "pip install 'sdlora[optimizers]'"
        )
    library = _imported("pytorch_optimizer", stated, "optimizers")
    name_there = NAMES_THERE.get(name, name)
    known = [each for each in library.get_supported_optimizers() if each not in UNSUITABLE]
    if reason := UNSUITABLE.get(name_there):
        raise ConfigError(f"{stated}: cannot be used, since it {reason}")
    if name_there not in known:
        near = _nearest(name, (*OWN_NAMES, *known))
        raise ConfigError(f"{stated}: unknown{near or '; docs/optimizers.md says where the names are listed'}")
    return library.load_optimizer(name_there)


def _imported(package: str, stated: str, extra: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About GPUs and kernels that are not there.
            return importlib.import_module(package)
    except ImportError as error:
        reason = "" if find_spec(package) is None else f" ({error})"
        raise ConfigError(
            f"{stated}: needs the package {package.replace('_', '-')}{reason}: pip install 'sdlora[{extra}]'"
        ) from None


def _arguments_of(made_by: type) -> list[str]:
    parameters = inspect.signature(made_by).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in named and each.name not in ("params", "lr")]


def _unknown(key: str, name: str, known: Sequence[str]) -> str:
    if spelling := SPELLINGS.get(key):
        return f"optimizer.arguments.{key}: it is {spelling} here"
    near = _nearest(key, known) or f"; it takes {', '.join(known)}"
    return f"optimizer.arguments.{key}: {name} has no such argument{near}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(known), 2)
    return f"; did you mean {' or '.join(near)}?" if near else ""
