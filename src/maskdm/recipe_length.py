"""How long a run is: settings in steps or in parts of the whole, and budgets."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from maskdm.settings import Settings


def _steps_or_part(value: int | str) -> int | str:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value) if isinstance(value, str) else None
    if match is None and (isinstance(value, str) or value < 0):
        raise ValueError(f"expected a number of steps, or a part such as 2%, not {value}")
    if match is None:
        return value
    if float(match[1]) > 100:
        raise ValueError(f"at most 100%, not {value}")
    return f"{match[1]}%"


def _above_zero(value: int | str) -> int | str:
    if value == 0 or (isinstance(value, str) and float(value.rstrip("%")) == 0):
        raise ValueError(f"expected more than 0 steps, not {value}")
    return value


# A number of steps, or a part of a stage or of the run: 100, 2%.
Steps = Annotated[int | str, AfterValidator(_steps_or_part)]
SomeSteps = Annotated[int | str, AfterValidator(_steps_or_part), AfterValidator(_above_zero)]


def steps_of(value: int | str, total: int) -> int:
    """A number of steps: a part of `total` is rounded, but is at least one unless it is 0 %."""
    if isinstance(value, int):
        return value
    part = float(value.rstrip("%")) / 100
    return max(round(part * total), 1) if part else 0


class Budget(Settings):
    """How much a whole run may cost; at most one of these. Its stages divide it."""

    hours: float | None = Field(None, gt=0)
    """Hours on this machine, with previews and measuring."""
    flops: float | None = Field(None, gt=0)
    """Floating-point operations of all training steps."""
    images: float | None = Field(None, gt=0)
    """Images seen in all stages together."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training images, in all stages together."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(given := [name for name, value in self if value is not None]) > 1:
            raise ValueError(f"give one budget, not {' and '.join(given)}")
        return self

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return any(value is not None for _, value in self)
