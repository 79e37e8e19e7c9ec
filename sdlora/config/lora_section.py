"""The configuration of the LoRA: its size, the modules it changes, and what it starts from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from .setting import Section, Setting

Kind = Literal["lora", "locon", "dora", "loha", "lokr"]
TargetsPreset = Literal["attention", "attention-mlp", "linear", "all"]
Patterns = tuple[Annotated[str, Field(min_length=1)], ...]


def _targets(value: Any) -> Any:
    patterns = isinstance(value, tuple) and value and all(isinstance(each, str) and each for each in value)
    if not (patterns or value in get_args(TargetsPreset)):
        presets = ", ".join(f'"{each}"' for each in get_args(TargetsPreset))
        raise PydanticCustomError(
            "targets", "{problem}", {"problem": f'must be {presets}, or patterns such as ["unet.*.attn2.to_k"]'}
        )
    return value


class RuleSection(Section):
    """What is different for some of the modules that ``lora.targets`` chooses. Where several rules match, what a later one
    states wins."""

    pattern: Annotated[str, Field(min_length=1)]
    """Names of modules, as for ``lora.targets``: ``text_encoder``, ``unet.up_blocks.1`` or ``unet.*.attn2.*``."""
    rank: Annotated[int | None, Field(ge=1, le=1024)] = None
    """Rank of these modules. It does not change their alpha."""
    alpha: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Alpha of these modules."""
    learning_rate: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Peak learning rate of these modules."""
    train: bool | None = None
    """``false`` leaves these modules as they are in the base; ``true`` takes that back for some of them."""

    @model_validator(mode="after")
    def _says_something(self) -> RuleSection:
        if (self.rank, self.alpha, self.learning_rate, self.train) == (None, None, None, None):
            raise PydanticCustomError(
                "settings", "{problems}", {"problems": "pattern has no rank, alpha, learning_rate or train beside it"}
            )
        return self


class LoraSection(Section):
    """The LoRA: its size, the modules it changes, and what it starts from."""

    rank: Annotated[int, Field(ge=1, le=1024), Setting(kohya="network_dim")] = 16
    """Rank of the change of each module. A higher rank can learn more, and makes a larger file."""
    alpha: Annotated[float, Field(gt=0), Setting(kohya="network_alpha")] = 8.0
    """The change of each module is scaled by alpha / rank. Keep the ratio when you change the rank, or adapt the
    learning rate."""
    kind: Kind = "lora"
    """How the modules are changed. ``lora``: a product of two matrices (Hu et al. 2021). ``locon``: the same, and for the
    UNet's convolutions too. ``dora``: with a magnitude of its own (Liu et al. 2024), slower. ``loha`` and ``lokr``: Hadamard
    and Kronecker products (Yeh et al. 2023)."""
    rslora: bool = False
    """Whether the change is scaled by alpha / √rank (Kalajdzievski 2023). The file holds the alpha that makes every reader
    apply that scale."""
    conv_rank: Annotated[int | None, Field(ge=1, le=1024), Setting(kohya="conv_dim")] = None
    """Rank of convolutions larger than 1 x 1. By default ``lora.rank``."""
    conv_alpha: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Setting(kohya="conv_alpha")] = None
    """Alpha of these. By default ``lora.alpha``."""
    factor: Annotated[int, Field(ge=-1, le=1024)] = -1
    """Size of the first factor of ``lokr`` where it divides a layer's; -1 makes both as equal as possible."""
    targets: Annotated[
        TargetsPreset | Patterns,
        BeforeValidator(_targets),
        Setting(values='"attention", "attention-mlp", "linear", "all", or a list of patterns'),
    ] = "attention"
    """Modules that are changed: the attention projections q, k, v and out; these and the feed-forward layers; all linear
    layers, with those of the timestep and around the attention; these and the convolutions. Or patterns for their names:
    ``*`` is any text, and the name of a block means all in it, such as ``["unet.up_blocks.1", "unet.*.attn2.to_k"]``."""
    rules: Annotated[tuple[RuleSection, ...], Setting(values="tables [[lora.rules]]")] = ()
    """Another rank, alpha or learning rate for some modules, each a table ``[[lora.rules]]``."""
    init: Literal["default", "gaussian", "pissa", "orthogonal"] = "default"
    """What training starts from: a random ``down``, uniform as kohya's, and an ``up`` of zero; with ``gaussian`` a ``down``
    as in diffusers' training scripts, which learns faster at the same low rate; with ``pissa`` the principal singular
    vectors of each weight (Meng et al. 2024); with ``orthogonal`` random vectors at right angles. The change is zero at the
    start in each case. The last two write files of twice the rank."""
    start_from: Annotated[str | None, Field(min_length=1), Setting(kohya="network_weights", affects="place")] = None
    """LoRA file of any readable format whose weights training starts from. Modules of another rank are padded or
    truncated. What is in it decides resuming, not where it is."""

    dropout: Annotated[float, Field(ge=0, lt=1), Setting(kohya="network_dropout")] = 0.0
    """Share of the values between the two matrices of each module that is left out of a step, drawn again for each image;
    the others are divided by 1 minus this. For the kinds lora, locon and dora."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1), Setting(kohya="rank_dropout")] = 0.0
    """Share of the ranks of each module that is left out of a step, drawn again for each image; the others are divided by 1
    minus this. For loha and lokr: share of the outputs of ΔW, for all images of a step and without that division."""
    module_dropout: Annotated[float, Field(ge=0, lt=1), Setting(kohya="module_dropout")] = 0.0
    """Share of the modules that is left out of a step, as if they were not trained."""
    max_norm: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Setting(kohya="scale_weight_norms")] = None
    """Largest norm of the change ΔW of each module. After each step a larger change is scaled down to it. kohya's users
    take 1. By default there is no limit."""

    @model_validator(mode="after")
    def _fits_together(self) -> LoraSection:
        problems = []
        if self.init != "default" and self.start_from is not None:
            problems.append(f'init = "{self.init}" and lora.start_from contradict each other; choose one of them')
        if self.kind not in ("lora", "locon"):
            if self.init != "default":
                problems.append(f'init = "{self.init}": only for the kinds lora and locon, not for {self.kind}')
            if self.start_from is not None:
                problems.append(f"start_from: only for the kinds lora and locon, not for {self.kind}")
            if self.dropout and self.kind != "dora":
                problems.append(
                    f"dropout: not for the kind {self.kind}, as in LyCORIS; use rank_dropout or module_dropout"
                )
        if self.init in ("pissa", "orthogonal") and self.max_norm is not None:
            problems.append(f'max_norm: not with init = "{self.init}", whose change is a difference of two products')
        if self.factor == 0:
            problems.append("factor = 0: must be -1, or at least 1")
        if self.factor != -1 and self.kind != "lokr":
            problems.append(f"factor = {self.factor}: only for the kind lokr, not for {self.kind}")
        if problems:
            raise PydanticCustomError("settings", "{problems}", {"problems": "\n".join(problems)})
        return self
