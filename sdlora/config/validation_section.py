"""The configuration of the loss on validation images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .setting import Section, Setting


class ValidationSection(Section):
    """When the loss on the images of validation sets (``role = "validation"``) is measured, and what follows from it."""

    every: Annotated[int, Field(ge=0), Setting(kohya="validate_every_n_steps", affects="nothing")] = 0
    """Steps between measurements of the validation loss, the first before the first step; 0 measures at the end alone."""
    stop: Annotated[int, Field(ge=0)] = 0
    """Number of measurements in a row, each higher than the lowest by more than the 95 % confidence interval of the
    difference, after which the run stops. The file then has the weights of the lowest loss, also where the run is not
    stopped. 0 never stops, and the file has the weights of the last step."""

    @model_validator(mode="after")
    def _stop_needs_measurements(self) -> ValidationSection:
        if self.stop and not self.every:
            problem = f"stop = {self.stop}: validation.every is 0; set the steps between measurements too"
            raise PydanticCustomError("settings", "{problems}", {"problems": problem})
        return self
