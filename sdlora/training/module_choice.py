"""Which modules of a base a run trains, and how: from ``lora.targets``, ``[[lora.rules]]`` and the learning rates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ..base.checkpoint import BaseCheckpoint
from ..config.lora_section import RuleSection
from ..config.sections import Config
from ..families import PART_TITLES
from ..lora.patterns import matches, near_misses
from ..lora.targets import chosen_names, trainable_names


@dataclass(frozen=True, kw_only=True)
class ModuleChoice:
    """How one module is trained."""

    rank: int
    alpha: float
    rate: float
    """Peak learning rate."""
    trained: bool = True

    def by(self, rule: RuleSection) -> ModuleChoice:
        """This choice, with what ``rule`` states."""
        stated = {"rank": rule.rank, "alpha": rule.alpha, "rate": rule.learning_rate, "trained": rule.train}
        return replace(self, **{key: value for key, value in stated.items() if value is not None})


def part_of(name: str) -> str:
    """Part of the base that the module with this canonical name belongs to."""
    return name.partition(".")[0]


def part_rates(checkpoint: BaseCheckpoint, config: Config) -> dict[str, float]:
    """Part of ``checkpoint`` -> its peak learning rate, of those that are trained, in the order of an adapter's modules."""
    encoders = [encoder.part for encoder in checkpoint.family.text_encoders]
    rates = {"unet": config.optimizer.learning_rate}
    rates |= zip(encoders, config.optimizer.text_encoder_rates(checkpoint.family), strict=True)
    return {part: rate for part, rate in rates.items() if rate}


def changeable_shapes(checkpoint: BaseCheckpoint) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the weight, of every module of ``checkpoint`` that a run can change.

    A checkpoint may hold the projection of a text encoder whose summary of the prompt nothing reads; no model has it.
    """
    unread = {f"{e.part}.text_projection" for e in checkpoint.family.text_encoders if not e.pooled}
    return {name: shape for name, shape in checkpoint.module_shapes().items() if name not in unread}


def choose_modules(checkpoint: BaseCheckpoint, config: Config) -> dict[str, ModuleChoice]:
    """Canonical name -> how the module is trained: part after part, sorted within."""
    lora, rates = config.lora, part_rates(checkpoint, config)
    shapes = changeable_shapes(checkpoint)
    names = targeted_names(shapes, config)
    chosen = {}
    for part, rate in rates.items():
        for name in (name for name in names if part_of(name) == part):
            choice = ModuleChoice(rank=lora.rank, alpha=lora.alpha, rate=rate)
            if any(side > 1 for side in shapes[name][2:]):
                choice = replace(choice, rank=lora.conv_rank or lora.rank, alpha=lora.conv_alpha or lora.alpha)
            for rule in lora.rules:
                if matches(rule.pattern, name):
                    choice = choice.by(rule)
            if lora.rslora:  # Every reader of the file takes alpha / rank for the scale.
                choice = replace(choice, alpha=choice.alpha * math.sqrt(choice.rank))
            if choice.trained:
                chosen[name] = choice
    return chosen


def targeted_names(shapes: Mapping[str, tuple[int, ...]], config: Config) -> list[str]:
    """The modules of ``shapes`` that ``lora.targets`` means, sorted; for LoCon the UNet's convolutions too."""
    names = set(chosen_names(shapes, config.lora.targets))
    if config.lora.kind == "locon":
        names |= {name for name, shape in shapes.items() if name.startswith("unet.") and len(shape) == 4}
    return sorted(names)


def with_unchosen_frozen(checkpoint: BaseCheckpoint, config: Config) -> Config:
    """``config`` with a learning rate of 0 for the text encoders of which no module is chosen: their captions are encoded
    once then."""
    chosen = {part_of(name) for name in choose_modules(checkpoint, config)}
    family = checkpoint.family
    rates = tuple(
        rate if encoder.part in chosen else 0.0
        for encoder, rate in zip(family.text_encoders, config.optimizer.text_encoder_rates(family), strict=True)
    )
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(
                update={"text_encoder_learning_rate": rates if len(set(rates)) > 1 else rates[0]}
            )
        }
    )


def choice_problems(checkpoint: BaseCheckpoint, config: Config) -> Iterator[str]:
    """A sentence on each setting of ``[lora]`` and each learning rate that does not fit ``checkpoint``."""
    family, stated = checkpoint.family, config.optimizer.text_encoder_learning_rate
    if len(config.optimizer.text_encoder_rates(family)) != len(family.text_encoders):
        yield (
            f"optimizer.text_encoder_learning_rate = {list(stated) if isinstance(stated, tuple) else stated}: "
            f"{family.title} has {len(family.text_encoders)} text encoder{'s' * (len(family.text_encoders) > 1)}; "
            "state one number, or one for each"
        )
        return
    shapes, targets = changeable_shapes(checkpoint), config.lora.targets
    names = trainable_names(shapes)
    for pattern in targets if isinstance(targets, tuple) else ():
        if not any(matches(pattern, name) for name in names):
            yield f"lora.targets: {_matches_nothing(pattern, names)}"
    chosen, rates = targeted_names(shapes, config), part_rates(checkpoint, config)
    for number, rule in enumerate(config.lora.rules, 1):
        if problem := _rule_problem(rule.pattern, names, chosen, rates):
            yield f"lora.rules, number {number}: {problem}"
    if rates and chosen and not choose_modules(checkpoint, config):
        yield "lora.targets and lora.rules leave no module of the trained parts: nothing would be trained"


def _rule_problem(pattern: str, names: Collection[str], chosen: Collection[str], rates: Collection[str]) -> str:
    """Why a rule with ``pattern`` would change nothing; "" where it does."""
    in_base = [name for name in names if matches(pattern, name)]
    if not in_base:
        return _matches_nothing(pattern, names)
    targets = [name for name in chosen if matches(pattern, name)]
    if not targets:
        return (
            f'pattern "{pattern}" matches {len(in_base)} modules, such as {in_base[0]}, but lora.targets chooses none of '
            "them; add them to lora.targets, or remove the rule"
        )
    if not any(part_of(name) in rates for name in targets):
        part = PART_TITLES[part_of(targets[0])]
        return (
            f'pattern "{pattern}" matches only modules of the {part}, which is not trained (its learning rate is 0); '
            "raise that, or remove the rule"
        )
    return ""


def _matches_nothing(pattern: str, names: Collection[str]) -> str:
    near = near_misses(pattern, names)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"modules have names such as {next(iter(names))}"
    return f'pattern "{pattern}" matches no linear layer or convolution of the base; {remedy}'
