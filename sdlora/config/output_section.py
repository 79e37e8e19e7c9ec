"""The configuration of what a run writes: the LoRA file, and what it says about itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from .setting import Section, Setting


def _lora_file(value: str) -> str:
    if not value.endswith(".safetensors"):
        raise PydanticCustomError("lora_file", "must end in .safetensors")
    return value


class OutputSection(Section):
    """The LoRA file, and what it says about itself."""

    path: Annotated[
        str,
        AfterValidator(_lora_file),
        Setting(kohya="output_name", affects="place", values="a path that ends in .safetensors"),
    ]
    """The LoRA file to write. Checkpoints and samples are written beside it."""
    precision: Annotated[Literal["float16", "bfloat16", "float32"], Setting(kohya="save_precision")] = "float16"
    """Precision of the tensors in the file."""
    save_every: Annotated[int, Field(ge=0), Setting(kohya="save_every_n_steps", affects="nothing")] = 0
    """Steps between LoRA files on the way, ``NAME-000500.safetensors`` beside the output; 0 writes none. Each can be used
    as it is. Checkpoints to resume from are ``train.save_every``."""
    save_every_epochs: Annotated[int, Field(ge=0), Setting(kohya="save_every_n_epochs", affects="nothing")] = 0
    """Epochs between LoRA files on the way, as well as or instead of ``output.save_every``; 0 writes none."""
    keep: Annotated[int | None, Field(ge=1), Setting(affects="nothing")] = None
    """Number of LoRA files on the way that are kept, the newest. By default all."""
    log: Annotated[bool, Setting(kohya="logging_dir", affects="nothing")] = False
    """Whether the loss and the learning rates of each step are written beside the output, as ``NAME.log.csv``, with a
    curve of the loss, ``NAME.log.svg``. With ``validation.every`` the measurements are in ``NAME.validation.csv``."""
    tracker: Annotated[Literal["none", "tensorboard", "wandb"], Setting(kohya="log_with", affects="nothing")] = "none"
    """Where losses, learning rates and validation losses are sent too: ``tensorboard`` writes event files into
    ``NAME.tracker`` beside the output; ``wandb`` sends them to Weights & Biases. Each needs the extra of its name."""
    metadata: Annotated[Literal["none", "minimal", "full"], Setting(kohya="no_metadata", affects="text")] = "full"
    """What the file says about its training: ``full`` is everything; ``minimal`` is what loaders need, the trigger word
    and the texts below; ``none`` is nothing."""
    title: Annotated[str | None, Setting(kohya="metadata_title", affects="text")] = None
    """Title of the LoRA. By default the name of the file."""
    author: Annotated[str | None, Setting(kohya="metadata_author", affects="text")] = None
    """Author of the LoRA."""
    license: Annotated[str | None, Setting(kohya="metadata_license", affects="text")] = None
    """License of the LoRA."""
    description: Annotated[str | None, Setting(kohya="metadata_description", affects="text")] = None
    """Description of the LoRA."""
    tags: Annotated[tuple[str, ...], Setting(kohya="metadata_tags", affects="text")] = ()
    """Tags of the LoRA, for people who search."""
    usage_hint: Annotated[str | None, Setting(kohya="metadata_usage_hint", affects="text")] = None
    """How the LoRA is used. By default it says to put the trigger word into the prompt."""
    comment: Annotated[str | None, Setting(kohya="training_comment", affects="text")] = None
    """A note, stored as ``ss_training_comment``, where kohya's tools look for it."""
    thumbnail: Annotated[bool, Setting(kohya="metadata_thumbnail", affects="text")] = True
    """Whether the first sample is stored in the file, 256 pixels wide. Only with ``metadata = "full"``."""
