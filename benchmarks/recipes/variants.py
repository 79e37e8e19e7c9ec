"""What is compared: a plain table of settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["ours", "peft", "full", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    name: str
    settings: tuple[str, ...] = ()
    """``section.key=value`` in addition to ``COMMON``; ``{rank}`` and ``{half}`` are the rank and half of it."""
    how: How = "ours"
    """``ours``: the public ``train``; ``peft``: the plain loop of ``plain_loop``; ``full``: the same modules without a
    LoRA, by ``full_loop``; ``nothing``: the base as it is."""
    learning_rate: float | None = None
    """That of ``peft``; the others have it in ``settings``."""
    averaged: int = 0
    """Number of the last files on the way, with the output among them, whose changes are averaged; 0 takes the output."""
    neutral_images: bool = False
    """Whether images of neutral captions are drawn too."""

    def stated(self, rank: int) -> tuple[str, ...]:
        """Settings with the numbers in place."""
        return tuple(setting.format(rank=rank, half=rank / 2) for setting in self.settings)


COMMON = (
    "train.batch_size=4", "lora.rank={rank}", "samples.prompts=[]", "output.precision=float32", "output.metadata=none",
    "output.thumbnail=false",
)  # fmt: skip
DEFAULTS = ("lora.targets=attention", "lora.alpha={half}")
"""The defaults when this was written: UNet 3e-4, text encoder 5e-5, min-SNR 5, a cosine after 20 steps of warm-up."""
DEFAULT_RATES = ("optimizer.learning_rate=3e-4", "optimizer.text_encoder_learning_rate=5e-5")
QUICKSTART = (
    "lora.targets=attention-mlp", "lora.alpha={rank}", "optimizer.learning_rate=1.5e-3",
    "optimizer.text_encoder_learning_rate=0", "objective.min_snr_gamma=0",
)  # fmt: skip
EXAMPLE = (
    "lora.targets=attention", "lora.alpha={rank}", "optimizer.text_encoder_learning_rate=0", "objective.min_snr_gamma=0",
    "optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.betas=[0.9, 0.999]",
)  # fmt: skip
"""The diffusers example's, but for the learning rate and the random numbers."""


def quickstart(name: str, *settings: str, averaged: int = 0) -> Variant:
    """The quickstart's settings with some others."""
    return Variant(name=name, settings=(*QUICKSTART, *settings), averaged=averaged)


PRESET = (
    Variant(name="nothing", how="nothing"),
    Variant(name="today's defaults", settings=(*DEFAULTS, *DEFAULT_RATES)),
    quickstart("quickstart"),
    quickstart("min-SNR 5", "objective.min_snr_gamma=5"),
    quickstart("UNet 1e-3", "optimizer.learning_rate=1e-3"),
    quickstart("UNet 4e-3", "optimizer.learning_rate=4e-3"),
    quickstart("text encoder 1e-3", "optimizer.text_encoder_learning_rate=1e-3"),
    quickstart("text encoder 3e-4", "optimizer.text_encoder_learning_rate=3e-4"),
    quickstart("text encoder 2e-3", "optimizer.text_encoder_learning_rate=2e-3"),
    quickstart("UNet 8e-3", "optimizer.learning_rate=8e-3"),
    quickstart("attention alone", "lora.targets=attention"),
    quickstart("alpha = rank / 2", "lora.alpha={half}"),
    quickstart("min-SNR 1", "objective.min_snr_gamma=1"),
    quickstart("logit-normal", "objective.timestep_sampling=logit_normal"),
    quickstart("shifted 3", "objective.timestep_sampling=shifted"),
    quickstart("last 5 of every 5 steps averaged", "output.save_every=5", averaged=5),
    quickstart("noise offset 0.05", "objective.noise_offset=0.05"),
    quickstart("caption dropout 0.1", "data.caption_dropout=0.1"),
    quickstart("constant rate", "optimizer.schedule=constant"),
    quickstart("debiased", "objective.weighting=debiased"),
    quickstart("Huber", "objective.loss=huber"),
    quickstart("input perturbation 0.1", "objective.input_perturbation=0.1"),
    quickstart("weight decay 0.1", "optimizer.weight_decay=0.1"),
    quickstart("beta 0.999", "optimizer.betas=[0.9, 0.999]"),
    quickstart("LoRA+ 16", "optimizer.lora_plus_ratio=16", "optimizer.learning_rate=5e-4"),
    quickstart("LoRA+ 4", "optimizer.lora_plus_ratio=4", "optimizer.learning_rate=1e-3"),
    quickstart("rsLoRA", "lora.rslora=true"),
    quickstart("PiSSA", "lora.init=pissa", "optimizer.learning_rate=1e-3"),
    quickstart("gaussian start", "lora.init=gaussian"),
    quickstart("orthogonal start", "lora.init=orthogonal"),
    quickstart("DoRA", "lora.kind=dora"),
    quickstart("LoHa", "lora.kind=loha"),
    quickstart("LoKr", "lora.kind=lokr"),
    quickstart("LoCon", "lora.kind=locon"),
    quickstart("linear", "lora.targets=linear"),
    quickstart("dropout 0.1", "lora.dropout=0.1"),
    quickstart("rank dropout 0.1", "lora.rank_dropout=0.1"),
    quickstart("module dropout 0.1", "lora.module_dropout=0.1"),
    quickstart("EMA 0.95", "optimizer.ema=0.95"),
    quickstart(
        "Lion", "optimizer.name=lion", "optimizer.learning_rate=4e-4", "optimizer.text_encoder_learning_rate=2e-4"
    ),
    quickstart("Prodigy", "optimizer.name=prodigy", "optimizer.learning_rate=0.99"),
    quickstart("Adafactor", "optimizer.name=adafactor"),
    quickstart("schedule-free", "optimizer.name=schedule-free", "optimizer.schedule=constant"),
)
"""Each differs from the quickstart in what its name says; the rates that came with it are in its settings."""


def _same(rate: str) -> tuple[Variant, Variant]:
    plain = Variant(name=f"diffusers example {rate}", how="peft", learning_rate=float(rate))
    return plain, Variant(
        name=f"ours as example {rate}", settings=(*EXAMPLE, "lora.init=gaussian", f"optimizer.learning_rate={rate}")
    )


SAME = (*_same("1e-4"), *_same("1e-3"))
RANKS = (
    *(
        quickstart(f"rank {rank}, {rate}", f"lora.rank={rank}", f"lora.alpha={rank}", f"optimizer.learning_rate={rate}")
        for rate in ("1.5e-3", "5e-4")
        for rank in (1, 4, 16, 64, 128)
    ),
    *(
        Variant(name=f"full {rate}", how="full", settings=(*QUICKSTART, f"optimizer.learning_rate={rate}"))
        for rate in ("3e-4", "1e-4", "3e-5")
    ),
)
FORGETTING = (
    Variant(name="the base", how="nothing", neutral_images=True),
    Variant(name="LoRA", settings=QUICKSTART, neutral_images=True),
    Variant(
        name="full fine-tuning",
        how="full",
        settings=(*QUICKSTART, "optimizer.learning_rate=1e-4"),
        neutral_images=True,
    ),
)
PARTS = {"preset": PRESET, "same": SAME, "ranks": RANKS, "forgetting": FORGETTING}
REFERENCE = {
    "preset": "quickstart",
    "same": "diffusers example 1e-4",
    "ranks": "rank 16, 1.5e-3",
    "forgetting": "the base",
}
"""Part -> the variant whose loss, with the same set and seed, the others' are divided by."""
