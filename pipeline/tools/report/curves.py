"""The report's curves over the training steps: rewards, diagnostics of the update, times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.tools.report.plots import Line, finite, plot, stacked
from pipeline.tools.report.record import RunRecord

DIAGNOSTICS: list[tuple[str, list[str], dict[str, bool]]] = [
    ("Policy ratio new / old", ["ratio/max", "ratio/mean", "ratio/min"], {}),
    ("Share of clipped ratios", ["clip/low", "clip/high"], {"zero": True}),
    ("KL to the reference", ["kl"], {"zero": True}),
    ("Groups with equal rewards", ["zero_std_ratio"], {"zero": True}),
    ("Spread of the rewards of a step's takes", ["reward/std"], {"zero": True}),
    ("Gradient norm (before clipping)", ["grad_norm"], {"zero": True}),
    ("On-policy check: max |log-ratio|", ["ratio/max_abs_log"], {"log": True}),
    ("Stale takes: rms log-ratio", ["offpolicy/rms_log_ratio"], {"zero": True}),
    ("Stale takes: correlation of log-ratio and advantage", ["offpolicy/advantage_correlation"], {}),
    ("Loss", ["loss", "policy_loss"], {}),
    ("Mean |advantage|", ["advantage/mean_abs"], {"zero": True}),
    ("Learning rate", ["lr"], {"zero": True}),
]
ROLES = ["time/rollout", "time/score", "time/learn", "time/sync"]


def _series(metrics: list[dict], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in metrics if finite(row.get(name))]
    return [p[0] for p in points], [p[1] for p in points]


def _train_line(run: RunRecord, name: str, label: str) -> Line:
    """Without an error: a step's takes share their prompts, which are too few to estimate one."""
    x, y = _series(run.metrics, name)
    return Line(label=label, x=x, y=y)


def _heldout_line(run: RunRecord, pick: Callable[[dict[str, Any]], Any], label: str) -> Line:
    """`pick`: from an evaluation's row to the result (`mean`, `se`) that is shown."""
    rows = [(row["step"], pick(row)) for row in run.evals]
    rows = [(step, value) for step, value in rows if value and finite(value.get("mean"))]
    return Line(
        label=label,
        x=[step for step, _ in rows],
        y=[value["mean"] for _, value in rows],
        error=[value.get("ci95") or 0.0 for _, value in rows],  # a bar of no length for a single prompt
        bars=True,
    )


def reward_curve(run: RunRecord) -> Markup | None:
    """The weighted sum of rewards in training and on held-out prompts."""
    lines = [
        _train_line(run, "reward/mean", "training prompts"),
        _heldout_line(run, lambda row: row, "held-out prompts (ODE, fixed seeds)"),
    ]
    if not any(len(line.x) for line in lines):
        return None
    return plot("Reward (held-out: mean and 95 % interval)", lines, size=(9.0, 3.0))


def reward_plots(run: RunRecord) -> list[Markup]:
    """A plot per reward, in training and on held-out prompts."""
    if run.config:
        names = list(run.config.rewards)
    else:
        keys = {key for row in run.metrics for key in row if key.startswith("reward/")}
        names = sorted({key.removeprefix("reward/") for key in keys} - {"mean", "std"})
    plots = []
    for name in names:
        lines = [
            _train_line(run, f"reward/{name}", "training"),
            _heldout_line(run, functools.partial(_result_of, name), "held-out"),
        ]
        if any(len(line.x) for line in lines):
            plots.append(plot(name, lines))
    return plots


def _result_of(name: str, row: dict[str, Any]) -> dict[str, Any] | None:
    return (row.get("rewards") or {}).get(name)


def diagnostics(run: RunRecord) -> list[Markup]:
    """A plot of each diagnostic that was measured and that varies; see `constants`."""
    return [
        plot(title, lines, size=(4.4, 2.2), log=options.get("log", False), zero=options.get("zero", False))
        for title, lines, options in _measured(run)
        if not _is_constant(lines)
    ]


def constants(run: RunRecord) -> list[str]:
    """`title: value` of diagnostics that were the same in every step: a flat curve is no proof of anything."""
    found = []
    for title, lines, _ in _measured(run):
        if _is_constant(lines):
            values = [f"{line.label} {line.y[0]:g}" if len(lines) > 1 else f"{line.y[0]:g}" for line in lines]
            found.append(f"{title}: {', '.join(values)}")
    return found


def _measured(run: RunRecord) -> list[tuple[str, list[Line], dict[str, bool]]]:
    found = []
    for title, names, options in DIAGNOSTICS:
        series = [(name, *_series(run.metrics, name)) for name in names]
        lines = [Line(label=name.split("/")[-1], x=x, y=y) for name, x, y in series if x]
        if lines:
            found.append((title, lines, options))
    return found


def _is_constant(lines: list[Line]) -> bool:
    """Whether nothing changes over several steps."""
    return all(len(line.x) > 2 and len(set(line.y)) == 1 for line in lines)


def times(run: RunRecord) -> list[Markup]:
    """Seconds per role in each step, and takes per second."""
    metrics = run.metrics
    measured = [name for name in ROLES if any(finite(row.get(name)) for row in metrics)]
    if not measured:
        return []
    steps = [row["step"] for row in metrics]
    series: dict[str, Sequence[float]] = {
        name.split("/")[1]: [row[name] if finite(row.get(name)) else 0.0 for row in metrics] for name in measured
    }
    plots = [stacked("Seconds per role in each step (roles may overlap)", steps, series)]
    x, y = _series(metrics, "takes_per_s")
    if x:
        plots.append(plot("Takes per second", [Line(label="takes/s", x=x, y=y)], size=(9.0, 1.9), zero=True))
    return plots
