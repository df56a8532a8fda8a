"""The report's first question, did the model get better: verdict, guards, proxy against gold."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.core.statistics import Estimate
from pipeline.rewards.guards import GUARDS
from pipeline.rl.evaluation import changes
from pipeline.runs.verdict import tolerances
from pipeline.tools.report.plots import Line, plot
from pipeline.tools.report.record import RunRecord

TITLES = {"improved": "improved", "worse": "worse", "same": "no measurable change", "suspect": "suspect"}


def verdict(run: RunRecord) -> dict[str, Any] | None:
    """Of the last evaluation: `kind`, `title`, `detail`, and `ended`: why the run ended before its last step."""
    judged = [row for row in run.evals if row.get("verdict")]
    found = judged[-1]["verdict"] if judged else None
    if found is None or found["kind"] not in TITLES:
        return None
    title = TITLES[found["kind"]]
    detail = found["text"].removeprefix(f"{title}: ").removeprefix(title).strip()
    if detail.startswith("("):
        detail = detail[1:-1]
    earlier = [row["step"] for row in judged[:-1] if row["verdict"]["kind"] == "suspect"]
    return {
        "kind": found["kind"],
        "title": title,
        "detail": detail,
        "step": judged[-1]["step"],
        "earlier": earlier,
        "ended": run.summary.get("ended") or "",
        "exported": run.summary.get("exported_step"),
        "steps": run.summary.get("steps"),
        "suspects": found["suspects"],
    }


def columns_that_show(run: RunRecord) -> list[tuple[str, float]]:
    """Columns of takes.parquet in which the takes show what is suspect, and the sign of the change for the worse."""
    found = verdict(run)
    columns = []
    for suspect in found["suspects"] if found else []:
        part = "guard" if suspect["kind"] == "guard" else "reward"
        name = "reward" if suspect["name"] == "reward" else f"{part}/{suspect['name']}"
        columns.append((name, 1.0 if suspect["after"] > suspect["before"] else -1.0))
    return columns


def change_of(before: dict[str, Any] | None, after: dict[str, Any] | None, difference: Any) -> dict[str, Any]:
    """For a table: the change, half its 95 % interval, and how it is shown: up, down, same or unknown."""
    if not before or not after:
        return {"mean": None, "ci95": None, "shown": "unknown"}
    if difference is None:
        return {"mean": after["mean"] - before["mean"], "ci95": None, "shown": "unknown"}
    found = difference if isinstance(difference, Estimate) else Estimate(**_estimate(difference))
    return {"mean": found.mean, "ci95": found.ci95, "shown": found.direction()}


def _estimate(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("mean", "se", "ci95")} | {"n": record.get("n") or 0}


def guards_table(run: RunRecord) -> list[dict[str, Any]]:
    """A row per guard that was measured before and after: means, change, allowed range, whether it left it."""
    if len(run.evals) < 2:
        return []
    first, last = run.evals[0], run.evals[-1]
    found, allowed = changes(first, last).guards, tolerances(run.config) if run.config else {}
    suspects = {each["name"] for each in (last.get("verdict") or {}).get("suspects", []) if each["kind"] == "guard"}
    rows = []
    for name, after in (last.get("guards") or {}).items():
        before = (first.get("guards") or {}).get(name)
        if name not in GUARDS or (before is None and GUARDS[name].kind != "limit"):
            continue
        low, high = GUARDS[name].allowed(before["mean"] if before else 0.0, allowed.get(name, np.inf))
        shown = change_of(before, after, found.get(name))
        state = "suspect" if name in suspects else "off" if name not in allowed else "ok"
        rows.append({
            "name": name, "about": GUARDS[name].about, "before": before, "after": after, "change": shown,
            "allowed": _range(low, high), "state": state,
        })  # fmt: skip
    return rows


def _range(low: float, high: float) -> str:
    if np.isinf(low) and np.isinf(high):
        return "–"
    if np.isinf(low) or low < 0:
        return f"up to {high:.3g}"
    return f"from {low:.3g}" if np.isinf(high) else f"{low:.3g} to {high:.3g}"


def gold_plots(run: RunRecord) -> list[Markup]:
    """Per gold reward: its change and the proxy's since the first evaluation, with 95 % intervals, in standard
    deviations of the prompts' means before training; the highest gold is marked."""
    if run.config is None or len(run.evals) < 2:
        return []
    plots = []
    for name in run.config.gold_rewards:
        if name not in (run.evals[0].get("rewards") or {}):
            continue
        proxy = _since_start(run, None, "weighted rewards (trained on)")
        gold = _since_start(run, name, f"{name} (gold)")
        if proxy is not None and gold is not None:
            best = int(np.argmax(gold.y))
            title = f"Proxy against {name}, which peaked at step {gold.x[best]:.0f}"
            plots.append(plot(title, [proxy, gold], size=(9.0, 3.0), marked=(gold.x[best], gold.y[best])))
    return plots


def _since_start(run: RunRecord, name: str | None, label: str) -> Line | None:
    first = run.evals[0]
    start = first if name is None else first["rewards"][name]
    spread = float(np.std([mean for mean in start.get("prompt_means") or [] if mean is not None] or [0.0]))
    if spread == 0:
        return None
    points: list[tuple[float, Estimate]] = []
    for row in run.evals:
        found = changes(first, row)
        change = found.reward if name is None else found.rewards.get(name)
        points += [(row["step"], change)] if change is not None else []
    return Line(
        label=label,
        x=[step for step, _ in points],
        y=[change.mean / spread for _, change in points],
        error=[(change.ci95 or 0.0) / spread for _, change in points],
        bars=True,
    )


def guard_plots(run: RunRecord) -> list[Markup]:
    """A small curve per guard, where there are three evaluations or more and it changes at all."""
    if len(run.evals) < 3:
        return []
    plots = []
    for name in GUARDS:
        rows = [(row["step"], row["guards"][name]) for row in run.evals if name in (row.get("guards") or {})]
        means = [value["mean"] for _, value in rows]
        if len(rows) > 2 and np.ptp(means) > 0:
            errors = [value.get("ci95") or 0.0 for _, value in rows]
            line = Line(label=name, x=[step for step, _ in rows], y=means, error=errors, bars=True)
            plots.append(plot(name, [line], size=(4.4, 2.0)))
    return plots
