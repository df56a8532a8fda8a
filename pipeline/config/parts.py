"""The parts of a recipe that a config chooses by name: where takes come from, what they teach, and the loss.

A part is a class in one file of its folder, which registers it; its fields are the options that the config may set
beside `name`. So a new method adds no key to the schema:

    objective: {name: grpo, kl_beta: 0.04}

`Config.objective` is then an object of the registered class, checked like every other section.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BeforeValidator, ValidationError, model_serializer

from pipeline.config.sections.base import Section
from pipeline.core.errors import ConfigError
from pipeline.core.registry import Registry


class Part(Section):
    """Base of the parts. Fields are options, each with a default (or required) and a description."""

    name: ClassVar[str]  # set by `register`

    @model_serializer(mode="wrap")
    def _with_name(self, options: Any) -> dict[str, Any]:
        return {"name": self.name, **options(self)}


SOURCES: Registry[type[Part]] = Registry("source.name", "pipeline.rl.sources")
SIGNALS: Registry[type[Part]] = Registry("signal.name", "pipeline.rl.signals")
OBJECTIVES: Registry[type[Part]] = Registry("objective.name", "pipeline.rl.objectives")
PARTS = {"source": SOURCES, "signal": SIGNALS, "objective": OBJECTIVES}
DEFAULTS = {"source": "rollout", "signal": "advantages", "objective": "grpo"}  # the name, where none is given


class WrongOptions(ValueError):
    """Options that a part does not take: pydantic's findings, to be worded with the part's own fields."""

    def __init__(self, part: type[Part], error: ValidationError) -> None:
        super().__init__(str(error))
        self.part, self.error = part, error


def chosen_from(section: str) -> BeforeValidator:
    """Reads `{name: …, options}` as an object of the class registered under that name."""
    registry = PARTS[section]

    def choose(value: Any) -> Part:
        if isinstance(value, Part):
            return value
        if not isinstance(value, dict):
            names = ", ".join(registry.all())
            raise ValueError(f"{section}: found {value!r:.80}; write {section}: {{name: …}} with one of {names}")
        try:
            part = registry.get(str(value.get("name", DEFAULTS[section])))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        try:
            return part.model_validate({key: option for key, option in value.items() if key != "name"})
        except ValidationError as error:
            raise WrongOptions(part, error) from None

    return BeforeValidator(choose)


def chosen_class(section: str, data: Any) -> type[Part] | None:
    """The class that the section of a config (as read) chooses; None where it names none that exists."""
    chosen = data.get(section) if isinstance(data, dict) else None
    name = chosen.get("name", DEFAULTS[section]) if isinstance(chosen, dict) else DEFAULTS[section]
    return PARTS[section].all().get(str(name))
