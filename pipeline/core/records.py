"""Typed records of what was written to files earlier, perhaps by another version or another program.

A record states the keys that its readers rely on; `check_record` compares a row with it and names the first difference.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import InputError, RushesError
from pipeline.core.reading import shown

FIX = "that is not what Rushes writes, so restore the file from a copy, or remove it"

Whole = Annotated[int, Field(ge=0, le=10**12)]  # a step, an index or a count


class Record(BaseModel):
    """Other keys than those named pass as they are: another version may write more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def check_record(kind: type[BaseModel], row: dict[str, Any], where: str, error: type[RushesError] = InputError) -> None:
    """Raises `error` naming the first key that is missing or of another type."""
    try:
        kind.model_validate(row)
    except ValidationError as problems:
        first = problems.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
        raise error(f"{where}: {shown(key)}: {first['msg'][0].lower()}{first['msg'][1:]}{value}; {FIX}") from None
