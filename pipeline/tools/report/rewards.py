"""The report's part on how several rewards become one advantage: the configuration and its effect."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from pipeline.config.schema import Config, RewardConfig
from pipeline.tools.report.plots import Line, finite, plot

_PLOTS: list[tuple[str, str]] = [
    ("combine/share/", "Share of each reward in the advantages"),
    ("combine/trust/", "Trust exp(-u) in repeated scores"),
    ("combine/clipped/", "Share of clipped scores"),
    ("combine/applies/", "Share of groups a reward applies to"),
    ("combine/std/", "Std that scores are divided by"),
]
_SINGLE = [("combine/non_dominated", "Takes kept: not dominated in their group"), ("combine/trust", _PLOTS[1][1])]


def combining_table(config: Config | None, metrics: list[dict]) -> list[dict[str, Any]]:
    """A row per reward; [] for a single reward that is used as it is."""
    if config is None:
        return []
    plain = all(r.normalize == "none" and r.clip is None and r.score_repeats == 1 for r in config.rewards.values())
    if len(config.rewards) == 1 and plain:
        return []
    return [_row(name, reward, metrics) for name, reward in config.rewards.items()]


def _row(name: str, reward: RewardConfig, metrics: list[dict]) -> dict[str, Any]:
    return {
        "name": name,
        "weight": f"{reward.weight:g}",
        "normalize": "–" if reward.normalize == "none" else reward.normalize,
        "clip": f"{reward.clip[0]:g} to {reward.clip[1]:g}" if reward.clip else "–",
        "repeats": str(reward.score_repeats) if reward.score_repeats > 1 else "–",
        "share": _last(metrics, f"combine/share/{name}"),
        "trust": _last(metrics, f"combine/trust/{name}"),
        "applies": _last(metrics, f"combine/applies/{name}"),
    }


def _last(metrics: list[dict], name: str) -> str:
    """Mean over the last ten steps that have the metric, as a percentage."""
    values = [row[name] for row in metrics if finite(row.get(name))][-10:]
    return f"{100 * sum(values) / len(values):.0f} %" if values else "–"


def combining_plots(config: Config | None, metrics: list[dict]) -> list[Markup]:
    names = list(config.rewards) if config else []
    plots = []
    for prefix, title in _PLOTS:
        lines = [_line(metrics, f"{prefix}{name}", name) for name in names]
        lines = [line for line in lines if len(line.x)]
        if lines:
            full_title = f"{title}: {lines[0].label}" if len(lines) == 1 else title  # one curve has no legend
            plots.append(plot(full_title, lines, size=(4.4, 2.2), zero=True))
    for name, title in _SINGLE:
        line = _line(metrics, name, name)
        if len(line.x):
            plots.append(plot(title, [line], size=(4.4, 2.2), zero=True))
    return plots


def _line(metrics: list[dict], name: str, label: str) -> Line:
    points = [(row["step"], row[name]) for row in metrics if finite(row.get(name))]
    return Line(label=label, x=[x for x, _ in points], y=[y for _, y in points])
