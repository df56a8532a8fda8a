"""The PromQL expressions of the shipped dashboard and rules."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


MONITORING = ROOT / "k8s" / "components" / "monitoring"


def expressions() -> list[str]:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += [board["templating"]["list"][1]["definition"]]
    return found + [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
