"""GenEval's rules (Ghosh et al., 2023) as pure functions: from detected boxes to right or wrong, and how nearly right.

Metadata of a prompt, as GenEval's files have it:

    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "color": "red",
     "position": ["right of", 0]}], "exclude": [{"class": "dog", "count": 2}]}

All `include` clauses must hold and no `exclude` clause may. Boxes are (x0, y0, x1, y1) in pixels, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.errors import RewardError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_SHRINK = 0.3, 0.9, 16, 0.1


@dataclass(frozen=True, slots=True)
class Detection:
    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    correct: bool
    partial: float  # 0..1: mean over the checks, each with partial credit
    reasons: tuple[str, ...]


def keep(detections: Sequence[Detection], counting: bool, max_overlap: float = 1.0) -> dict[str, list[Detection]]:
    """Per class the confident detections, best first, at most 16. `counting` prompts demand 0.9 instead of 0.3.

    `max_overlap` below 1 drops a box that overlaps a better one of its class by that IoU or more.
    """
    least = COUNTING_THRESHOLD if counting else THRESHOLD
    kept: dict[str, list[Detection]] = {}
    for label in {d.label for d in detections}:
        ranked = sorted((d for d in detections if d.label == label and d.score > least), key=lambda d: -d.score)
        chosen: list[Detection] = []
        for candidate in ranked[:MAX_OBJECTS]:
            if max_overlap == 1.0 or all(iou(candidate.box, other.box) < max_overlap for other in chosen):
                chosen.append(candidate)
        if chosen:
            kept[label] = chosen
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union, with GenEval's inclusive pixel edges."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies seen from box b: a subset of `RELATIONS`.

    The offset of the centres is shortened by 0.1 of both boxes' sizes and divided by the unshortened distance; a
    direction holds if its component is above 0.5.
    """
    (ax, ay), (bx, by) = (((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b))
    offset = np.array([ax - bx, ay - by])
    sizes = np.array([abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1])])
    short = np.maximum(np.abs(offset) - POSITION_SHRINK * sizes, 0.0) * np.sign(offset)
    if (np.abs(short) < 1e-3).all():
        return set()
    dx, dy = short / np.linalg.norm(offset)
    directions = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in directions.items() if holds}


def judge(
    objects: dict[str, list[Detection]],
    metadata: dict[str, Any],
    color_of: Callable[[Sequence[Detection]], Sequence[str]],
) -> Verdict:
    """Applies the clauses to what `keep` left. `color_of` names the colour of each detection it is given."""
    reasons: list[str] = []
    credits: list[float] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        label, count = clause["class"], clause["count"]
        present = objects.get(label, [])[:count]
        checks = [min(len(present), count) / count]
        problems: list[str] = []
        if len(present) < count:
            problems.append(f"expected {label}>={count}, found {len(present)}")
            checks += [0.0] * (("color" in clause) + ("position" in clause))
        else:
            if "color" in clause:
                colors = list(color_of(present))
                right = colors.count(clause["color"])
                checks.append(min(right, count) / count)
                if right < count:
                    problems.append(f"expected {clause['color']} {label}>={count}, found {', '.join(colors)}")
            if "position" in clause:
                relation, target = clause["position"]
                others = groups[target]
                pairs = [(a, b) for a in present for b in others or []]
                holding = [relation in relations(a.box, b.box) for a, b in pairs]
                checks.append(sum(holding) / len(holding) if holding else 0.0)
                # as in GenEval, the relation is only looked at if the clause holds so far
                if not problems and others is None:
                    problems.append(f"no target for {label} to be {relation}")
                elif not problems and not all(holding):
                    problems.append(f"expected {label} {relation} target")
        groups.append(None if problems else present)
        reasons += problems
        credits += checks
    for clause in metadata.get("exclude", []):
        found_count = len(objects.get(clause["class"], []))
        if found_count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found_count}")
        # one too many is half right, two too many a third …
        credits.append(1.0 if found_count < clause["count"] else 1.0 / (found_count - clause["count"] + 2))
    return Verdict(correct=not reasons, partial=float(np.mean(credits)) if credits else 1.0, reasons=tuple(reasons))


def check_metadata(metadata: dict[str, Any], labels: set[str]) -> None:
    """Raises `RewardError` if a prompt's metadata is not GenEval's or names a class the detector does not know."""
    clauses = metadata.get("include")
    if not isinstance(clauses, list) or not clauses:
        raise RewardError("the prompt's metadata has no 'include' list; geneval needs GenEval's metadata")
    excluded = metadata.get("exclude") or []
    for place, clause in [("include", c) for c in clauses] + [("exclude", c) for c in excluded]:
        count = clause.get("count") if isinstance(clause, dict) else None
        counted = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if not counted or not isinstance(clause.get("class"), str):
            raise RewardError(f"metadata {place}: {clause!r} needs 'class' and a 'count' of at least 1")
        if clause["class"] not in labels:
            raise RewardError(f"metadata {place}: the detector knows no class {clause['class']!r}")
        if "color" in clause and clause["color"] not in COLORS:
            raise RewardError(f"metadata {place}: unknown color {clause['color']!r}; there are {', '.join(COLORS)}")
    for i, clause in enumerate(clauses):
        if "position" not in clause:
            continue
        position = clause["position"]
        if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
            raise RewardError(f"metadata include: position {position!r} must be [relation, index of an earlier clause]")
        if not isinstance(position[1], int) or not 0 <= position[1] < i:
            raise RewardError(f"metadata include: position {position!r} must point to an earlier clause than {i}")
