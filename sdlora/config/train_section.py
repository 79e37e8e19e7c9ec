"""The configuration of the length, batch size, precision and checkpoints of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .choices import Precision
from .setting import Section, Setting


class TrainSection(Section):
    """Length, batch size, precision and checkpoints of a run."""

    steps: Annotated[int | None, Field(ge=1), Setting(kohya="max_train_steps")] = None
    """Optimizer steps in all. By default each image is shown 100 times: 24 images in batches of 4 are 600 steps. Few images
    are shown more often, 2000 images in all, and many less often, 4000 in all, but each at least 10 times."""
    epochs: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Setting(kohya="max_train_epochs")] = None
    """Length of the run in epochs instead of ``train.steps``, rounded to whole steps. An epoch shows each image as often as
    its repeats say. A run with the same number of steps is the same run."""
    batch_size: Annotated[int, Field(ge=1), Setting(kohya="train_batch_size")] = 4
    """Images in one step, over all processes together."""
    precision: Annotated[Precision, Setting(kohya="mixed_precision")] = "auto"
    """Precision of the frozen base. ``auto`` is bfloat16 on a GPU that multiplies it in hardware, float16 on other NVIDIA
    GPUs and on Apple's, and on a CPU float32, or bfloat16 where the CPU multiplies it in hardware and the base is large
    enough to gain from it. With float16 the loss is scaled so that small gradients are kept. The LoRA itself is always
    trained in float32."""
    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        Setting(kohya="gradient_checkpointing", affects="nothing", values='"auto", true or false'),
    ] = "auto"
    """Whether activations of the UNet are computed a second time for the gradients instead of kept: about a quarter
    slower, with far less memory. ``auto`` does so on a GPU on which a step would not fit otherwise."""
    micro_batch: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)],
        Setting(affects="nothing", values='"auto", or a whole number, at least 1'),
    ] = "auto"
    """Images of a batch that are computed at once; their gradients are added up in float32, so the result is that of the
    whole batch, up to rounding. ``auto`` is the whole batch, or as many images as fit on the GPU. Unlike kohya's gradient
    accumulation, this does not change the size of a batch."""
    fit: Annotated[bool, Setting(affects="nothing")] = False
    """What to do where the device runs out of memory: stop and say what to change, or, with true, halve the micro-batch,
    then turn gradient checkpointing on, and go on with the same batches."""
    compile: Annotated[bool, Setting(kohya="torch_compile", affects="nothing")] = False
    """Whether the transformer blocks of the UNet are compiled. The first step, and the first of each size of bucket, then
    takes a minute or so longer, and every other is faster on a GPU. The result is the same up to rounding. Where compiling
    does not work, a warning says why, and the run goes on without it."""
    deterministic: Annotated[bool, Setting(affects="nothing")] = False
    """Whether a GPU uses deterministic algorithms alone, so that repeating or resuming a run gives the same bits on the
    same model of GPU. That is slower, and not possible with xformers. On a CPU results are the same in any case."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Setting(kohya="seed")] = 0
    """Seed of everything that is drawn: order, captions, crops, flips, noise and timesteps."""
    save_every: Annotated[int, Field(ge=1), Setting(affects="nothing")] = 100
    """Steps between checkpoints to resume from. They are removed when the run is complete, except the last."""
    keep_state: Annotated[bool, Setting(kohya="save_state_on_train_end", affects="nothing")] = True
    """Whether the last checkpoint is kept when the run is complete, so that ``--extend`` can go on from it: three times the
    LoRA in float32 with ``adamw``, for a rank of 16 about 20 MB with SD 1.5."""

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainSection:
        if self.epochs is not None and self.steps is not None:
            problem = f"epochs = {self.epochs:g}: train.steps = {self.steps} is given too; give one of them"
            raise PydanticCustomError("settings", "{problems}", {"problems": problem})
        return self
