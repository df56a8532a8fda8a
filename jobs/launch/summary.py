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
from pipeline.core.statistics import Estimate, with_error
from pipeline.core.storage import display_path
from pipeline.rl.evaluation import changes
from pipeline.rl.group_plan import EVALUATION_SEED
from pipeline.runs.paths import RunDir
from pipeline.runs.remote_sync import push_files

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
    """The report, and then summary.json, which says that the run has finished. The last line shown is the verdict."""
    from pipeline.tools.model_card import write_card
    from pipeline.tools.report.report import build_report

    evals = result["evals"]
    heldout = before_and_after(evals[0], evals[-1]) if evals else None
    verdict = evals[-1].get("verdict") if evals else None
    started = psutil.Process().create_time()
    missing: list[str] = list(result.get("missing", []))

    def summary() -> dict[str, Any]:
        values = {
            "status": "finished",
            "run": run.name,
            "verdict": verdict,
            "heldout": heldout,
            "ended": result.get("ended", ""),
            "exported_step": result.get("exported_step"),
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
    export, exported = Path(result["export"]), result.get("exported_step")
    try:
        if export.is_dir():  # else it lies on the learner's machine and in the store
            card = write_card(run.path, export, cfg, result["step"] if exported is None else exported, summary())
            push_files([card, *export.glob("card/*")], run.path)
    except Exception as error:  # as above
        log.warning("the model card failed", exc_info=error)
        missing.append(f"model card: {type(error).__name__}: {one_line(error)}; make it with: rushes export {run.name}")
    # Last: whoever finds a finished run finds its report. With the report's own time.
    atomic_write(run.summary, json.dumps(summary(), indent=2).encode())
    if heldout is not None:
        say(console, heldout_line(heldout))
    other = f" (step {exported}, the best by {cfg.best_by})" if exported not in (None, result["step"]) else ""
    say(console, f"export  {display_path(Path(result['export']))}{other}")
    for line in missing:
        console.print(f"warning: missing: {line}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    if not any(line.startswith("report: ") for line in missing):
        say(console, f"report  {display_path(run.report)}")
    if result.get("ended"):
        say(console, f"ended at step {result['step']} of {cfg.run.steps}: {result['ended']}")
    say(console, f"verdict: {verdict['text'] if verdict else 'none, the run has no two evaluations to compare'}")


def before_and_after(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Held-out results of two evaluations' records: of the weighted reward, each reward and each guard, with the paired
    difference (null where they have no prompts in common)."""
    change = changes(first, last)

    def pairs(part: str, differences: dict[str, Estimate]) -> dict[str, Any]:
        names = [name for name in last.get(part, {}) if name in first.get(part, {})]
        return {name: _pair(first[part][name], last[part][name], differences.get(name)) for name in names}

    rewards, guards = pairs("rewards", change.rewards), pairs("guards", change.guards)
    return {**_pair(first, last, change.reward), "rewards": rewards, "guards": guards}


def _pair(first: dict[str, Any], last: dict[str, Any], difference: Estimate | None) -> dict[str, Any]:
    keys = ("mean", "se", "ci95", "n")
    before, after = ({key: record.get(key) for key in keys} for record in (first, last))
    return {"before": before, "after": after, "difference": asdict(difference) if difference else None}


def heldout_line(heldout: dict[str, Any]) -> str:
    """`held-out reward 0.5100 -> 0.6600 (+0.1500 ± 0.0200, 40 prompts)`; ± is the paired standard error."""
    before, after, change = heldout["before"], heldout["after"], heldout["difference"]
    gain = with_error(change["mean"], change["se"], sign="+") if change else f"{after['mean'] - before['mean']:+.4f}"
    return f"held-out reward {before['mean']:.4f} -> {after['mean']:.4f} ({gain}, {after['n']} prompts)"
