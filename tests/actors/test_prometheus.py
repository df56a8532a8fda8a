"""The Grafana dashboard and the alerts: every metric in them is one that is exported."""

from __future__ import annotations

import ast
import functools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from dashboard_queries import MONITORING, ROOT, expressions


@functools.cache
def exported() -> list[re.Pattern]:
    """Names on the metrics port, from the source of what sets them: `reward/{name}` -> ray_rushes_reward_.+"""
    from actors.prometheus import metric_name
    from actors.request_queue import RequestQueue
    from pipeline.config.parts import OBJECTIVES

    patterns = [f"ray_{metric_name('queue')}_.+_{key}" for key in RequestQueue("any", 1).drain_stats()]
    for file in (
        "actors/step_recorder.py",
        "actors/train_loop.py",
        "pipeline/learner/learner.py",
        "pipeline/rl/signals/group_relative.py",
    ):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "*" for part in parts]
            name = "".join(texts) if all(isinstance(text, str) for text in texts) else ""
            if re.fullmatch(r"[a-z][a-z0-9_/*]+", name) and not name.startswith("queue/"):
                patterns.append("ray_" + metric_name(name.replace("*", "ANY")).replace("ANY", ".+"))
    for cls in OBJECTIVES.all().values():  # with the KL to a reference, where there is one
        objective = cls.model_validate({"kl_beta": 0.1} if "kl_beta" in cls.model_fields else {})
        spreads = {spread: np.ones(2, np.float32) for spread in objective.spread}
        for metric in (*objective.logged, objective.requirements.replay_metric, *objective.summarise(spreads)):
            patterns.append("ray_" + metric_name(metric))
    tree = ast.parse((ROOT / "actors/prometheus.py").read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        if call.func.id in ("Gauge", "Counter") and isinstance(call.args[0], ast.Constant):
            patterns.append(f"ray_{call.args[0].value}" + ("_total" if call.func.id == "Counter" else ""))
    return [re.compile(pattern) for pattern in patterns]


def unknown(expr: str) -> list[str]:
    """Metric names in a PromQL expression that neither Rushes nor Ray itself exports."""
    import ray

    panels = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py"
    own, known = panels.read_text(), exported()
    exact = [pattern.pattern for pattern in known if ".+" not in pattern.pattern]
    names = re.findall(r"\bray_[a-z0-9_]+", re.sub(r'__name__[=!]~"[^"]+"', "", expr))
    wrong = [name for name in names if name not in exact and f"{name}{{{{" not in own]
    for text in re.findall(r'__name__=~"([^"]+)"', expr):  # one that any exported name could match
        if not any(pattern.fullmatch(text.replace(".+", "x")) for pattern in known):
            wrong.append(text)
    return wrong if names or "__name__" in expr else [expr]


def test_panels_and_alerts_use_metrics_that_exist():
    assert [name for expr in expressions() for name in unknown(expr)] == []


@pytest.mark.parametrize(
    "expr",
    [
        "ray_rushes_reward_men",
        "rate(ray_rushes_phase_seconds[5m])",
        '{__name__=~"ray_rushes_queue_.+_depht"}',
        '{__name__=~"ray_rushes_worker_.+"}',
        "up",
    ],
)
def test_a_wrong_metric_name_is_noticed(expr):
    assert unknown(expr)


def test_the_dashboard_covers_what_to_watch():
    text = " ".join(expressions())
    for part in ("reward_mean", "takes_per_s", "_depth", "_wait_s", "staleness", "ratio", "clip", "kl", "retries",
                 "workers_"):  # fmt: skip
        assert part in text
    board = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["title"] for panel in board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(at["x"] + i, at["y"] + j) for at in places for i in range(at["w"]) for j in range(at["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels overlap"


def test_gauges_are_set_again_before_ray_forgets_them(monkeypatch):
    from actors import prometheus

    seen = []

    class Gauge:
        def __init__(self, name, description, tags):
            self.name = name

        def set_default_tags(self, tags):
            assert tags == {"run": "try"}

        def set(self, value):
            seen.append((self.name, value))

    monkeypatch.setattr(prometheus, "Gauge", Gauge)
    monkeypatch.setattr(prometheus, "REFRESH_S", 0.01)
    metrics = prometheus.RunMetrics("try")
    metrics.set({"heldout/mean": 0.5, "step": 1})
    metrics.set({"step": 2})
    limit = time.monotonic() + 20
    while len(seen) < 7 and time.monotonic() < limit:
        time.sleep(0.01)
    assert set(seen[-2:]) == {("rushes_heldout_mean", 0.5), ("rushes_step", 2.0)}
