"""The report's numbers: state and setting of the run, held-out results before and after."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.rl.evaluation import changes
from pipeline.rl.objectives import objective_of
from pipeline.tools.report.plots import finite
from pipeline.tools.report.record import RunRecord
from pipeline.tools.report.trust import change_of


def status(run: RunRecord) -> dict[str, str]:
    """`text` to show, and `kind`: done, stopped or running."""
    if run.summary.get("status") == "finished":
        return {"text": "finished", "kind": "done"}
    if run.summary.get("status"):
        return {"text": str(run.summary["status"]), "kind": "stopped"}
    if not run.metrics:
        return {"text": "started, no step done yet", "kind": "running"}
    total = f" of {run.config.run.steps}" if run.config else ""
    return {"text": f"running (or stopped): {len(run.metrics)}{total} steps done", "kind": "running"}


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of the run's setting and of what it took."""
    config, metrics, summary = run.config, run.metrics, run.summary
    rows = []
    if config:
        generator = config.generator
        shape = f"{generator.width}×{generator.height}" + (
            f"×{generator.num_frames} frames" if generator.num_frames > 1 else ""
        )
        rows += [
            ("generator", f"{generator.pretrained} ({shape})"),
            ("trained", config.trainable.description),
            ("sampler", _sampler(config)),
            (
                "objective",
                f"{config.objective.name}, {config.step.groups} × {config.step.takes} takes a step",
            ),
        ]
    if metrics and metrics[-1].get("time") and metrics[0].get("time"):
        rows.append(("steps", f"{len(metrics)} in {duration(metrics[-1]['time'] - metrics[0]['time'])}"))
    if finite(summary.get("wall_s")):
        rows.append(("whole run", duration(summary["wall_s"])))
    if finite(summary.get("peak_rss_mb")):
        rows.append(("peak memory", f"{summary['peak_rss_mb'] / 1024:.1f} GiB, all processes"))
    if finite(summary.get("takes")):
        rows.append(("takes", f"{summary['takes']:,}"))
    groups = summary.get("groups")
    if isinstance(groups, dict):
        rows.append(("groups", ", ".join(f"{count} {name}" for name, count in groups.items())))
    return rows


def duration(seconds: float) -> str:
    """Such as `3 min 05 s`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def headline(run: RunRecord) -> dict[str, Any] | None:
    """Held-out before and after; None when there is no evaluation yet."""
    before, after, difference = (run.heldout.get(key) for key in ("before", "after", "difference"))
    if before is None and run.evals:
        before = run.evals[0]
    if after is None and len(run.evals) > 1:
        after, difference = run.evals[-1], changes(run.evals[0], run.evals[-1]).reward
    if not before:
        return None
    error = difference.get("se") if isinstance(difference, dict) else difference.se if difference else None
    change = change_of(before, after, difference)
    in_se = change["mean"] / error if error and change["mean"] is not None else None
    return {"before": before, "after": after, "change": change, "in_se": in_se}


def rewards_table(run: RunRecord) -> list[dict[str, Any]]:
    """Held-out mean of each reward, before and after, and its paired change."""
    rewards = run.heldout.get("rewards") or {}
    if not rewards and run.evals:
        first, last = run.evals[0], run.evals[-1]
        found = changes(first, last).rewards
        after = (last.get("rewards") or {}) if len(run.evals) > 1 else {}
        rewards = {
            name: {"before": value, "after": after.get(name), "difference": found.get(name)}
            for name, value in (first.get("rewards") or {}).items()
        }
    golds = run.config.gold_rewards if run.config else []
    return [
        {
            "name": name,
            "gold": name in golds,
            "before": pair.get("before"),
            "after": pair.get("after"),
            "change": change_of(pair.get("before"), pair.get("after"), pair.get("difference")),
        }
        for name, pair in rewards.items()
    ]


def two_points(run: RunRecord) -> bool:
    """Whether the held-out curve has no points between the first one and the last one, by the config."""
    return run.config is not None and not run.config.evaluation.every and bool(run.evals)


def _sampler(config: Config) -> str:
    steps = f"{config.sampler.steps} steps"
    if not objective_of(config).requirements.draws_noise:
        return f"ODE, {steps}"
    return f"{config.sampler.kind}, {steps}, noise {config.sampler.noise_level:g}"
