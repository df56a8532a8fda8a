"""How well the scores of judged pairs agree with the judgements, per reward: the summary that `rushes agree` prints."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.common.judged_pairs import Pair
from jobs.common.rater_statistics import print_raters, share_text, summarise_raters
from jobs.common.score_files import Rows
from pipeline.core.labelled_pairs import LABELS
from pipeline.core.preference_statistics import accuracy_with_ties, calibration, clustered_variance, hits, proportion
from pipeline.core.statistics import t_quantile

if TYPE_CHECKING:
    from rich.console import Console


def errors_of(pair: Pair, rows: Rows, names: list[str]) -> list[str]:
    errors = [rows[item.name, item.prompt, name]["error"] for name in names for item in (pair.a, pair.b)]
    return [error for error in errors if error is not None]


def _difference(pair: Pair, rows: Rows, name: str) -> float:
    """score(a) - score(b); NaN where one of them failed."""
    a, b = (rows[item.name, item.prompt, name]["score"] for item in (pair.a, pair.b))
    return math.nan if a is None or b is None else a - b


def summarise(pairs: list[Pair], rows: Rows, names: list[str]) -> dict[str, Any]:
    """JSON-able: counts, per reward its agreement, best first, and how consistent the raters are, where the pairs name
    them. A pair that a rater was shown again counts once, with the first answer."""
    answers = [pair.answer for pair in pairs if pair.answer is not None]
    pairs = [pair for pair in pairs if pair.answer is None or pair.answer.repeat_of is None]
    label = np.array([pair.label for pair in pairs])
    prompts = np.array(
        [pair.a.prompt or f"\x00{pair.row}" for pair in pairs]
    )  # without a prompt, a pair is a unit by itself
    differences = {name: np.array([_difference(pair, rows, name) for pair in pairs]) for name in names}
    agreement = {name: one_reward(differences[name], label, prompts) for name in names}
    order = sorted(names, key=lambda name: -(agreement[name]["accuracy"] or {"mean": -1.0})["mean"])
    best = order[0]
    for name in order[1:]:
        agreement[name]["against_best"] = compared(differences[name], differences[best], label, prompts)
    return {
        "pairs": len(pairs),
        "prompts": len(np.unique(prompts)),
        "labels": {key: int((label == value).sum()) for key, value in LABELS.items()},
        "rewards": [{"reward": name, **agreement[name]} for name in order],
        "raters": summarise_raters(answers) if answers else None,
    }


def summarise_subsets(pairs: list[Pair], rows: Rows, names: list[str], values: list[Any]) -> list[dict[str, Any]]:
    """JSON-able: of each of `values` (of all rows of the table, in order) the agreement of each reward on the decided
    pairs with it, the most frequent value first. Repeats count once, as in `summarise`."""
    subsets: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.answer is None or pair.answer.repeat_of is None:
            value = values[pair.row - 1]
            subsets.setdefault("" if value is None else str(value), []).append(pair)
    result = []
    for value, chosen in sorted(subsets.items(), key=lambda item: -len(item[1])):
        report = summarise(chosen, rows, names)
        accuracy = {row["reward"]: row["accuracy"] for row in report["rewards"]}
        result.append({"value": value, "pairs": len(chosen), "accuracy": {name: accuracy[name] for name in names}})
    return result


def one_reward(difference: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """`difference` [N] of scores (NaN: failed), `label` [N]; None where the pairs allow no statement."""
    scored = ~np.isnan(difference)
    decided = scored & (label != 0)
    result: dict[str, Any] = {
        "failed": int((~scored).sum()),
        "equal_scores": int((difference[scored] == 0).sum()),
        "accuracy": None,
        "with_ties": None,
        "tie_threshold": None,
        "calibration": None,
        "against_best": None,
    }
    if decided.any():
        d, y, p = difference[decided], label[decided], prompts[decided]
        result["accuracy"] = asdict(proportion(hits(d, y), p))
        result["calibration"] = asdict(calibration(d, y, p))
    if (label[scored] == 0).any():
        share, threshold = accuracy_with_ties(difference[scored], label[scored], prompts[scored])
        result["with_ties"] = asdict(share)
        result["tie_threshold"] = threshold if threshold >= 0 else None
    return result


def compared(
    difference: np.ndarray, other: np.ndarray, label: np.ndarray, prompts: np.ndarray
) -> dict[str, Any] | None:
    """Accuracy of the reward with score differences `difference` minus that of `other`, on the decided pairs that both
    have scored, with the half width `ci95` of its 95 % interval."""
    both = ~np.isnan(difference) & ~np.isnan(other) & (label != 0)
    groups = len(np.unique(prompts[both]))
    if groups < 2:
        return None
    gain = hits(difference[both], label[both]) - hits(other[both], label[both])
    ci95 = t_quantile(groups - 1) * math.sqrt(clustered_variance(gain, prompts[both]))
    return {"mean": float(gain.mean()), "ci95": ci95, "n": int(both.sum())}


def print_report(report: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    labels = ", ".join(f"{count} {key}" for key, count in report["labels"].items())
    text = f"{report['pairs']} pairs of {report['prompts']} prompts ({labels}); intervals are 95 %, prompts the units"
    console.print(text, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("reward", overflow="fold")
    titles = ["agrees with people", "against the best", "with ties", "log loss", "calibration error", "failed"]
    for title in titles:
        table.add_column(title, justify="right")
    for row in report["rewards"]:
        gap, fit = row["against_best"], row["calibration"]
        table.add_row(
            row["reward"],
            share_text(row["accuracy"]),
            f"{100 * gap['mean']:+.1f} ± {100 * gap['ci95']:.1f}" if gap else "",
            share_text(row["with_ties"]),
            f"{fit['log_loss']:.3f}" if fit else "–",
            f"{fit['error']:.3f}" if fit else "–",
            str(row["failed"]),
        )
    console.print(table)
    if report.get("by"):
        _print_subsets(report["by"], console)
    console.print("agreement: 50 % is chance. log loss: 0.693 is knowing nothing.", highlight=False, soft_wrap=True)
    if report["raters"] is not None:
        print_raters(report["raters"], console)


def _print_subsets(by: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    names = list(by["subsets"][0]["accuracy"])
    table = Table()
    table.add_column(Text(by["column"]), overflow="fold")
    for title in ("pairs", *names):
        table.add_column(title, justify="right")
    for row in by["subsets"]:
        shares = [share_text(row["accuracy"][name]) for name in names]
        table.add_row(Text(row["value"] or "–"), str(row["pairs"]), *shares)
    console.print(table)
