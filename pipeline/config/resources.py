"""The types of the config keys `workers` and `resources`: how many actors a role has, and what each of them reserves.

`workers: 2` is a pool of fixed size, `workers: {min: 1, max: 8}` an elastic one. `resources` is in Ray's terms: CPU,
GPU, memory (bytes) and any custom resource that nodes announce, such as the roles' own (`rushes_rollout: 0.01` ties a
rollout worker to nodes that announce `rushes_rollout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from pipeline.config.sections.base import Allowed
from pipeline.core.files import nearest
from pipeline.core.secrets import mask

ROLES = ("rollout", "reward", "learner", "controller")
ROLE_RESOURCES = tuple(f"rushes_{role}" for role in ROLES)  # announced by worker groups, see docs/kubernetes.md
RESOURCE_ALIASES = {
    "cpu": "CPU", "cpus": "CPU", "num_cpus": "CPU", "gpu": "GPU", "gpus": "GPU", "num_gpus": "GPU", "memory": "memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorkerRange:
    """Size of a pool: at least `min` actors, at most `max`."""

    min: int
    max: int

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


def _show(value: Any) -> str:
    text = mask(repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read_workers(value: Any) -> WorkerRange:
    if isinstance(value, WorkerRange):
        return value
    if _is_count(value):
        return WorkerRange(value, value)
    expected = "expected a whole number >= 1, or {min: 1, max: 4} for a pool that grows and shrinks"
    if not isinstance(value, dict) or not set(value) <= {"min", "max"} or "max" not in value:
        raise ValueError(f"found {_show(value)}; {expected}")
    low, high = value.get("min", 1), value["max"]
    if not (_is_count(low) and _is_count(high)):
        raise ValueError(f"found {_show(value)}; {expected}")
    if low > high:
        raise ValueError(f"min {low} is above max {high}; swap them, or write one number for a fixed size")
    return WorkerRange(low, high)


def _read_resources(default: dict[str, float], value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"found {_show(value)}; expected a mapping of Ray resources, such as {{CPU: 1, GPU: 0.5}}")
    for name, amount in value.items():
        right_name = RESOURCE_ALIASES.get(str(name).lower(), name)  # other names may be ones that nodes announce
        if str(name).startswith("rushes_") and name not in ROLE_RESOURCES:
            right_name = nearest(name, ROLE_RESOURCES) or ROLE_RESOURCES[0]
        if right_name != name:
            raise ValueError(f"unknown resource {name!r}; did you mean {right_name}?")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
            raise ValueError(f"{name}: found {_show(amount)}; expected a number >= 0")
        if name == "GPU" and amount > 1 and amount != int(amount):
            raise ValueError(
                f"GPU: found {_show(amount)}; Ray shares one GPU or gives whole ones: below 1, or a whole number"
            )
    return {**default, **{str(name): float(amount) for name, amount in value.items()}}


WorkerCount = Annotated[
    WorkerRange,
    PlainValidator(_read_workers),
    PlainSerializer(lambda w: w.min if w.min == w.max else {"min": w.min, "max": w.max}),
    Allowed("whole number >= 1 or {min: …, max: …}", numeric=True),
]
_ALLOWED = Allowed("mapping such as {CPU: 1, GPU: 0.5}")
# A mapping that leaves out CPU keeps the default's.
HalfCpu = Annotated[dict[str, float], PlainValidator(partial(_read_resources, {"CPU": 0.5})), _ALLOWED]
TenthCpu = Annotated[dict[str, float], PlainValidator(partial(_read_resources, {"CPU": 0.1})), _ALLOWED]


def total_resources(pools: Iterable[tuple[WorkerRange, Mapping[str, float]]]) -> dict[str, float]:
    """Amount of each resource that pools reserve in all, at their largest size."""
    totals: dict[str, float] = {}
    for workers, resources in pools:
        for name, amount in resources.items():
            totals[name] = totals.get(name, 0.0) + workers.max * amount
    return totals


def describe_resources(resources: Mapping[str, float]) -> str:
    """`0.5 CPU, 1 GPU and 0.01 rushes_rollout`."""
    needs = [f"{amount:g} {name}" for name, amount in resources.items() if amount]
    return " and ".join(filter(None, [", ".join(needs[:-1]), needs[-1] if needs else ""])) or "nothing"
