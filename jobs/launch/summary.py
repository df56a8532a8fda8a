"""The end of a run: summary.json, the report, and the lines that `rushes train` prints last."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jobs.common.options import say
from pipeline.config.schema import Config
from pipeline.core.errors import one_line
from pipeline.core.files import atomic_write
from pipeline.core.secrets import mask_tree
from pipeline.core.statistics import with_error
from pipeline.core.storage import display_path
from pipeline.rl.evaluation import paired_difference
from pipeline.rl.group_plan import EVALUATION_SEED
from pipeline.runs.paths import RunDir

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("rushes.driver")
PACKAGES = ("rushes", "torch", "diffusers", "transformers", "peft", "ray")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def summarise(cfg: Config, run: RunDir, result: dict[str, Any], peak: int, console: Console) -> None:
    """The report, and then summary.json, which says that the run has finished. The last line shown is the report's
    path."""
    from pipeline.tools.report.report import build_report

    evals = result["evals"]
    heldout = None
    if evals:
        first, last = evals[0], evals[-1]
        keys = ("mean", "se", "n")
        difference = paired_difference(first, last)
        heldout = {
            "before": {key: first[key] for key in keys},
            "after": {key: last[key] for key in keys},
            "difference": asdict(difference) if difference else None,
            "rewards": {
                name: {"before": first["rewards"][name], "after": last["rewards"][name]} for name in last["rewards"]
            },
        }
    started = psutil.Process().create_time()
    missing: list[str] = list(result.get("missing", []))

    def summary() -> dict[str, Any]:
        values = {
            "status": "finished",
            "run": run.name,
            "heldout": heldout,
            "steps": result["step"],
            "takes": result["takes"],
            "groups": result["groups"],
            "retries": result["retries"],
            "wall_s": round(time.time() - started, 2),
            "peak_rss_mb": round(peak / 2**20, 1),
            "peak_rss_mb_roles": {name: round(size / 2**20, 1) for name, size in sorted(result["peaks"].items())},
            "seeds": {"run": cfg.run.seed, "evaluation": EVALUATION_SEED},
            "versions": _versions(),
            "checkpoint": result["checkpoint"],
            "export": result["export"],
            "report": str(run.report),
            "missing": missing,
        }
        return mask_tree(values)

    try:
        build_report(run.path, summary())
    except Exception as error:  # the run itself is complete, and the report can be made again
        log.warning("the report failed", exc_info=error)
        missing.append(f"report: {type(error).__name__}: {one_line(error)}; make it with: rushes report {run.name}")
    # Last: whoever finds a finished run finds its report. With the report's own time.
    atomic_write(run.summary, json.dumps(summary(), indent=2).encode())
    if evals:
        gain = with_error(last["mean"] - first["mean"], difference.se if difference else None, sign="+")
        say(console, f"held-out reward {first['mean']:.4f} -> {last['mean']:.4f} ({gain}, {last['n']} prompts)")
    say(console, f"export  {display_path(Path(result['export']))}")
    for line in missing:
        console.print(f"warning: missing: {line}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    if not any(line.startswith("report: ") for line in missing):
        say(console, f"report  {display_path(run.report)}")
