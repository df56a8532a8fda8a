"""What all sections of the config are built from: their base class, and the types of number that their keys take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Annotation of a type that reads its own values: what it accepts, for error messages and docs/config.md."""

    text: str
    numeric: bool = False  # accepts a number, so `true` is a mistake


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values do not change once the config is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
