"""How consistent people are: each rater with themselves on repeated pairs, and raters with each other.

Agreement between raters is given as a share and as Krippendorff's alpha for nominal data with missing values
("Computing Krippendorff's alpha-reliability", 2011): 1 is perfect, 0 what chance would give.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.core.preference_statistics import proportion

if TYPE_CHECKING:
    from rich.console import Console


class RaterAnswer(NamedTuple):
    """`label`: +1 take `a` is better, -1 `b`, 0 a tie. `repeat_of`: the id of the same rater's first answer."""

    rater: str
    prompt: str
    a: str
    b: str
    label: int
    id: str | None = None
    repeat_of: str | None = None

    @property
    def unit(self) -> tuple[str, str, str]:
        """The prompt and the two takes, in whatever order they were shown."""
        return self.prompt, min(self.a, self.b), max(self.a, self.b)

    @property
    def value(self) -> int:
        """The label, +1 for the take whose name sorts first."""
        return self.label if self.a <= self.b else -self.label


def summarise_raters(answers: Sequence[RaterAnswer]) -> dict[str, Any]:
    """JSON-able. `raters`: of each its answers, ties, repeats, and `consistency`, the share of repeats answered as the
    first time. `shared`: pairs that several raters judged; `agreement`: the share of equal answers among two raters'
    answers to one pair; `alpha`: Krippendorff's. None where there is nothing to compute it from."""
    firsts = {answer.id: answer for answer in answers if answer.id is not None}
    votes: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)  # unit -> rater -> first answer
    by_rater: dict[str, list[RaterAnswer]] = defaultdict(list)
    for answer in answers:
        by_rater[answer.rater].append(answer)
        if answer.repeat_of is None:
            votes[answer.unit].setdefault(answer.rater, answer.value)
    shared = {unit: list(values.values()) for unit, values in votes.items() if len(values) > 1}
    equal = [(unit[0], float(one == two)) for unit, values in shared.items() for one, two in combinations(values, 2)]
    raters = []
    for rater, given in sorted(by_rater.items()):
        again = [(answer, firsts[answer.repeat_of]) for answer in given if answer.repeat_of in firsts]
        raters.append(
            {
                "rater": rater,
                "answers": sum(answer.repeat_of is None for answer in given),
                "ties": sum(answer.repeat_of is None and answer.label == 0 for answer in given),
                "repeats": len(again),
                "consistency": _proportion([(one.prompt, float(one.value == two.value)) for one, two in again]),
            }
        )
    alpha = krippendorff_alpha(shared.values())
    return {"raters": raters, "shared": len(shared), "agreement": _proportion(equal), "alpha": alpha}


def _proportion(hits: list[tuple[str, float]]) -> dict[str, Any] | None:
    """Of (prompt, 0 or 1)."""
    if not hits:
        return None
    prompts, values = zip(*hits, strict=True)
    return asdict(proportion(np.array(values), np.array(prompts)))


def krippendorff_alpha(units: Iterable[Sequence[int]]) -> float | None:
    """Nominal alpha of the values that the raters gave to each unit; units with one value are left out.

    alpha = 1 - (n - 1) sum_c (n_c - o_cc) / sum_c n_c (n - n_c), o_cc the coincidences of value c. None where nothing
    is shared, or where all values are equal, so that agreement cannot be told from chance.
    """
    totals: Counter[int] = Counter()
    coincidences: dict[int, float] = defaultdict(float)
    for values in units:
        if len(values) < 2:
            continue
        for value, count in Counter(values).items():
            totals[value] += count
            coincidences[value] += count * (count - 1) / (len(values) - 1)
    n = sum(totals.values())
    expected = sum(count * (n - count) for count in totals.values())
    if expected == 0:
        return None
    observed = sum(totals[value] - coincidences[value] for value in totals)
    return 1.0 - (n - 1) * observed / expected


def print_raters(summary: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("rater", overflow="fold")
    for title in ("answers", "ties", "repeats", "same answer again"):
        table.add_column(title, justify="right")
    for row in summary["raters"]:
        numbers = (str(row[key]) for key in ("answers", "ties", "repeats"))
        table.add_row(Text(row["rater"]), *numbers, share_text(row["consistency"]))
    console.print(table)
    if summary["agreement"] is not None:
        alpha = "undefined (all answers are equal)" if summary["alpha"] is None else f"{summary['alpha']:.2f}"
        console.print(
            f"raters agree with each other: {share_text(summary['agreement'])} on {summary['shared']} shared pairs, "
            f"Krippendorff's alpha {alpha} (1: perfect, 0: chance)",
            highlight=False,
            soft_wrap=True,
        )


def share_text(value: dict[str, Any] | None) -> str:
    """'83.0 % (71.2 to 90.6)' of a `Proportion` as a dict; '–' for None."""
    if value is None:
        return "–"
    interval = "" if value["low"] is None else f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
    return f"{100 * value['mean']:.1f} %{interval}"
