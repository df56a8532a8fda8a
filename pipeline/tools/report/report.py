"""The run's report: one self-contained HTML file that opens without a network, also while the run is going on.

Reads only what lies in the run folder; what is not there yet is said to be missing, not left blank.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.errors import InputError, RushesError
from pipeline.core.files import atomic_write
from pipeline.core.media import encode_png, enlarge, read_media
from pipeline.core.safe_paths import file_inside
from pipeline.core.statistics import with_error
from pipeline.core.takes_table import read_takes
from pipeline.rl.evaluation import paired_difference
from pipeline.rl.group_plan import EVALUATION_SEED, SHOWN_PROMPTS
from pipeline.rl.objectives import get_objective
from pipeline.runs.tracking import METRICS_FILE, read_jsonl, read_metrics
from pipeline.tools.report.plots import Line, finite, plot, stacked
from pipeline.tools.report.rewards import RULES, combining_plots, combining_table

TEMPLATE = Path(__file__).parent / "templates"
READ = ("config.yaml", METRICS_FILE, "evals.jsonl", "summary.json")  # what of a run is shown, besides takes
_COPY = "a report shows what lies in the run's own folder: copy the file there"
MAX_EMBEDDED = 40 * 2**20  # bytes of media inside the file; beyond it they are linked
THUMBNAIL = 72  # pixels, longer side of a segment's frame

DIAGNOSTICS: list[tuple[str, list[str], dict[str, bool]]] = [
    ("Policy ratio new / old", ["ratio/max", "ratio/mean", "ratio/min"], {}),
    ("Share of clipped ratios", ["clip/low", "clip/high"], {"zero": True}),
    ("KL to the reference", ["kl"], {"zero": True}),
    ("Groups with equal rewards", ["zero_std_ratio"], {"zero": True}),
    ("Gradient norm (before clipping)", ["grad_norm"], {"zero": True}),
    ("On-policy check: max |log-ratio|", ["ratio/max_abs_log"], {"log": True}),
    ("Loss", ["loss", "policy_loss"], {}),
    ("Mean |advantage|", ["advantage/mean_abs"], {"zero": True}),
    ("Learning rate", ["lr"], {"zero": True}),
]
ROLES = ["time/rollout", "time/score", "time/learn", "time/sync"]


def build_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns its path. Raises `RushesError` when it is no run folder."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    if not (run_dir / "config.yaml").exists() and not (run_dir / "metrics.jsonl").exists():
        raise InputError(f"{run_dir}: is not a run folder (it has neither config.yaml nor metrics.jsonl)")
    for name in READ:
        if (run_dir / name).exists():
            file_inside(run_dir, name, str(run_dir), _COPY)
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["with_error"] = lambda value: with_error(value["mean"], value.get("se"), digits=3)
    html = environment.get_template("report.html.j2").render(**_collect(run_dir))
    path = run_dir / "report.html"
    atomic_write(path, html.encode("utf-8"))
    return path


def _collect(run_dir: Path) -> dict[str, Any]:
    config = load_config(run_dir / "config.yaml") if (run_dir / "config.yaml").exists() else None
    metrics = [row for row in read_metrics(run_dir) if "reward/mean" in row]  # evaluations have lines of their own
    evals = read_jsonl(run_dir / "evals.jsonl")
    summary = _read_summary(run_dir)
    problems: list[str] = []
    return {
        "name": run_dir.resolve().name,
        "made": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "status": _status(summary, metrics, config),
        "facts": _facts(config, summary, metrics),
        "headline": _headline(summary, evals),
        "rewards_table": _rewards_table(summary, evals),
        "reward_curve": _reward_curve(metrics, evals, config),
        "reward_plots": _reward_plots(metrics, evals, config),
        "combining": combining_table(config, metrics),
        "combining_rule": RULES[config.algorithm.advantage.combine] if config else "",
        "combining_plots": combining_plots(config, metrics),
        "diagnostics": _diagnostics(metrics),
        "times": _times(metrics),
        "pairs": _pairs(run_dir, config, problems),
        "problems": problems,
        "config_text": (run_dir / "config.yaml").read_text("utf-8") if config else None,
        "versions": (summary or {}).get("versions") or {},
        "seeds": (summary or {}).get("seeds")
        or ({"run": config.run.seed, "evaluation": EVALUATION_SEED} if config else {}),
        "summary": summary,
    }


def _read_summary(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}); remove it and run `rushes report` again") from None


# ------------------------------------------------------------------------------------------------- the numbers


def _status(summary: dict | None, metrics: list[dict], config: Config | None) -> dict[str, str]:
    if summary and summary.get("status") == "finished":
        return {"text": "finished", "kind": "done"}
    total = f" of {config.run.steps}" if config else ""
    if summary and summary.get("status"):
        return {"text": str(summary["status"]), "kind": "stopped"}
    if not metrics:
        return {"text": "started, no step done yet", "kind": "running"}
    return {"text": f"going on (or stopped): {len(metrics)}{total} steps done", "kind": "running"}


def _facts(config: Config | None, summary: dict | None, metrics: list[dict]) -> list[tuple[str, str]]:
    facts = []
    if config:
        generator = config.generator
        shape = f"{generator.width}×{generator.height}" + (
            f"×{generator.num_frames} frames" if generator.num_frames > 1 else ""
        )
        facts += [
            ("generator", f"{generator.pretrained} ({shape})"),
            ("trained", config.trainable.description),
            ("sampler", _sampler(config)),
            (
                "algorithm",
                f"{config.algorithm.objective}, {config.algorithm.groups_per_step} × "
                f"{config.algorithm.group_size} takes a step",
            ),
        ]
    if metrics and metrics[-1].get("time") and metrics[0].get("time"):
        facts.append(("steps", f"{len(metrics)} in {duration(metrics[-1]['time'] - metrics[0]['time'])}"))
    if summary:
        if finite(summary.get("wall_s")):
            facts.append(("whole run", duration(summary["wall_s"])))
        if finite(summary.get("peak_rss_mb")):
            facts.append(("peak memory", f"{summary['peak_rss_mb'] / 1024:.1f} GiB, all processes"))
        if finite(summary.get("takes")):
            facts.append(("takes", f"{summary['takes']:,}"))
        groups = summary.get("groups")
        if isinstance(groups, dict):
            facts.append(("groups", ", ".join(f"{count} {name}" for name, count in groups.items())))
    return facts


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _headline(summary: dict | None, evals: list[dict]) -> dict[str, Any] | None:
    """Held-out before and after; None when there is no evaluation yet."""
    heldout = (summary or {}).get("heldout") or {}
    before, after = heldout.get("before"), heldout.get("after")
    if before is None and evals:
        before = evals[0]
    if after is None and len(evals) > 1:
        after = evals[-1]
    if not before:
        return None
    result: dict[str, Any] = {"before": before, "after": after, "delta": None}
    if after:
        paired = paired_difference(before, after)
        error = paired.se if paired else (heldout.get("difference") or {}).get("se")
        result["delta"] = after["mean"] - before["mean"]
        result["error"] = error
        result["in_se"] = result["delta"] / error if error else None
    return result


def _rewards_table(summary: dict | None, evals: list[dict]) -> list[dict[str, Any]]:
    rewards = ((summary or {}).get("heldout") or {}).get("rewards") or {}
    if not rewards and evals:
        last = evals[-1].get("rewards") or {} if len(evals) > 1 else {}
        rewards = {
            name: {"before": value, "after": last.get(name)} for name, value in (evals[0].get("rewards") or {}).items()
        }
    rows = []
    for name, pair in rewards.items():
        before, after = pair.get("before"), pair.get("after")
        delta = after["mean"] - before["mean"] if before and after else None
        rows.append({"name": name, "before": before, "after": after, "delta": delta})
    return rows


def _series(metrics: list[dict], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in metrics if finite(row.get(name))]
    return [p[0] for p in points], [p[1] for p in points]


def _train_line(metrics: list[dict], name: str, label: str, config: Config | None, std: str | None = None) -> Line:
    x, y = _series(metrics, name)
    error = None
    if std and config:
        takes = config.algorithm.group_size * config.algorithm.groups_per_step
        by_step = {row["step"]: row[std] / math.sqrt(takes) for row in metrics if finite(row.get(std))}
        error = [by_step.get(step, 0.0) for step in x] if by_step else None
    return Line(label=label, x=x, y=y, error=error)


def _heldout_line(evals: list[dict], pick, label: str) -> Line:
    rows = [(row["step"], pick(row)) for row in evals]
    rows = [(step, value) for step, value in rows if value and finite(value.get("mean"))]
    return Line(
        label=label,
        x=[step for step, _ in rows],
        y=[value["mean"] for _, value in rows],
        error=[value.get("se") or 0.0 for _, value in rows],  # a bar of no length for a single prompt
        bars=True,
    )


def _reward_curve(metrics: list[dict], evals: list[dict], config: Config | None) -> Markup | None:
    lines = [
        _train_line(metrics, "reward/mean", "training prompts", config, "reward/std"),
        _heldout_line(evals, lambda row: row, "held-out prompts (ODE, fixed seeds)"),
    ]
    if not any(len(line.x) for line in lines):
        return None
    return plot("Reward (mean ± standard error)", lines, size=(9.0, 3.0))


def _reward_plots(metrics: list[dict], evals: list[dict], config: Config | None) -> list[Markup]:
    names = (
        list(config.rewards)
        if config
        else sorted({k[7:] for row in metrics for k in row if k.startswith("reward/")} - {"mean", "std"})
    )
    plots = []
    for name in names:
        lines = [
            _train_line(metrics, f"reward/{name}", "training", config),
            _heldout_line(evals, lambda row, name=name: (row.get("rewards") or {}).get(name), "held-out"),
        ]
        if any(len(line.x) for line in lines):
            plots.append(plot(name, lines))
    return plots


def _diagnostics(metrics: list[dict]) -> list[Markup]:
    plots = []
    for title, names, options in DIAGNOSTICS:
        lines = [Line(label=name.split("/")[-1], x=x, y=y) for name in names for x, y in [_series(metrics, name)] if x]
        if lines:
            plots.append(plot(title, lines, size=(4.4, 2.2), **options))
    return plots


def _sampler(config: Config) -> str:
    steps = f"{config.sampler.steps} steps"
    if not get_objective(config.algorithm.objective).draws_noise:
        return f"ODE, {steps}"
    return f"{config.sampler.kind}, {steps}, noise {config.sampler.noise_level:g}"


def _times(metrics: list[dict]) -> list[Markup]:
    known = [name for name in ROLES if any(finite(row.get(name)) for row in metrics)]
    if not known:
        return []
    steps = [row["step"] for row in metrics]
    series: dict[str, Sequence[float]] = {
        name.split("/")[1]: [row[name] if finite(row.get(name)) else 0.0 for row in metrics] for name in known
    }
    plots = [stacked("Seconds per role in each step (roles may overlap)", steps, series)]
    x, y = _series(metrics, "takes_per_s")
    if x:
        plots.append(plot("Takes per second", [Line(label="takes/s", x=x, y=y)], size=(9.0, 1.9), zero=True))
    return plots


# -------------------------------------------------------------------------------------------------- the takes


def eval_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the kept evaluations, in order."""
    found = []
    for folder in (run_dir / "eval").glob("step-*") if (run_dir / "eval").is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / "takes.parquet").exists():
            found.append((int(match.group(1)), folder))
    return sorted(found)


def _pairs(run_dir: Path, config: Config | None, problems: list[str]) -> list[dict[str, Any]]:
    """Per prompt: the first kept evaluation beside the last one, same prompt and seed."""
    folders = eval_folders(run_dir)
    if not folders:
        return []
    ends = [folders[0]] if len(folders) == 1 else [folders[0], folders[-1]]
    budget = [MAX_EMBEDDED]
    cells: dict[tuple[int, int], dict[str, Any]] = defaultdict(lambda: {"before": None, "after": None})
    for column, (step, folder) in zip(("before", "after"), ends, strict=False):
        try:
            table = f"{folder.relative_to(run_dir)}/takes.parquet"
            file_inside(run_dir, table, str(run_dir), _COPY)
            rows = read_takes(folder)
        except InputError as error:
            problems.append(str(error))
            continue
        for row in rows:
            if row.get("path") and row.get("take", 0) == 0:
                key = (row["prompt_index"], row["seed"])
                cells[key][column] = _cell(run_dir, folder, step, row, budget, problems)
                cells[key]["prompt"], cells[key]["seed"] = row["prompt"], row["seed"]
    pairs = [cells[key] for key in sorted(cells)][:SHOWN_PROMPTS]
    for pair in pairs:
        if pair.get("before") and pair.get("after"):
            pair["delta"] = pair["after"]["reward"] - pair["before"]["reward"]
    return pairs


def _cell(run_dir: Path, folder: Path, step: int, row: dict, budget: list[int], problems: list[str]) -> dict[str, Any]:
    try:
        path = file_inside(folder, row["path"], f"{folder / 'takes.parquet'}: path", _COPY)
    except InputError as error:
        problems.append(str(error))
        path = None
    cell: dict[str, Any] = {
        "step": step,
        "reward": row["reward"],
        "scores": {key[7:]: value for key, value in row.items() if key.startswith("reward/") and value is not None},
        "video": path is not None and path.suffix == ".mp4",
        "src": None,
        "segments": [],
    }
    if path is None:
        return cell
    try:
        media = read_media(path)
        data = path.read_bytes()
    except (RushesError, OSError) as error:
        problems.append(str(error))
        return cell
    if len(data) <= budget[0]:
        budget[0] -= len(data)
        kind = "video/mp4" if cell["video"] else "image/png"
        cell["src"] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    else:
        cell["src"] = path.relative_to(run_dir.absolute()).as_posix()
    cell["segments"] = _segments(row, media.frames[0])
    return cell


def _segments(row: dict, frames: np.ndarray) -> list[dict[str, Any]]:
    """Per frame reward: the frames that were looked at, with score and weight of their segment."""
    found = []
    for key in row:
        if not key.startswith("segments/") or row[key] is None:
            continue
        name = key.removeprefix("segments/")
        weights, picks = row[f"segment_weights/{name}"], row[f"segment_frames/{name}"]
        total = sum(weights) or 1.0
        parts = [
            {
                "frames": [{"index": i, "src": thumbnail(frames[i])} for i in chosen if i < len(frames)],
                "score": score,
                "weight": weight,
                "share": weight / total,
            }
            for score, weight, chosen in zip(row[key], weights, picks, strict=True)
        ]
        found.append({"name": name, "parts": parts})
    return found


def thumbnail(frame: np.ndarray) -> str:
    """PNG data URI of uint8 [H, W, 3], about THUMBNAIL pixels."""
    longer = max(frame.shape[:2])
    if longer <= THUMBNAIL:
        small = enlarge(frame, max(1, round(THUMBNAIL / longer)))
    else:
        from PIL import Image

        scale = THUMBNAIL / longer
        size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
        small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    return f"data:image/png;base64,{base64.b64encode(encode_png(small)).decode()}"
