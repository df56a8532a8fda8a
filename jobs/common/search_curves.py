"""`rushes evaluate --search`: score against denoiser calls of several searches and budgets, as a table and a plot."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.common.options import say
from jobs.common.searching import TakeSearcher, chunks, takes_wanted
from pipeline.config.schema import Config
from pipeline.core.statistics import estimate, with_error
from pipeline.core.types import PromptItem
from pipeline.rewards.runner import RewardRunner
from pipeline.rl.evaluation import summarise_scores
from pipeline.rl.group_plan import EVALUATION_SEED
from pipeline.rl.signals.group_relative import weighted_rewards
from pipeline.search.base import Search

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.generators.policy import Policy

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Point:
    """One search with one budget, on the same prompts and seeds as the others."""

    checkpoint: str
    search: str  # PLAIN, or a search's label
    passes: float  # denoiser calls that a take really cost, in those of a plain take
    scores: dict[str, np.ndarray]  # reward -> [N] of the takes that were found, NaN: does not apply


def labels_of_searches(searches: list[Search], options: list[str]) -> list[str]:
    """Names, or the options' own texts where two searches have one name."""
    names = [search.name for search in searches]
    return [text if names.count(name) > 1 else name for name, text in zip(names, options, strict=True)]


def run_points(
    cfg: Config,
    policy: Policy,
    checkpoint: str,
    searches: dict[str, list[Search]],
    runners: dict[str, RewardRunner],
    items: list[PromptItem],
    console: Console,
) -> list[Point]:
    """The plain takes first, then every search with each of its budgets."""
    from pipeline.search.methods.best_of_n import BestOfN

    prompts = items[: cfg.evaluation.prompts or len(items)]
    wanted = takes_wanted(cfg, prompts, cfg.evaluation.takes_per_prompt, EVALUATION_SEED)
    points = []
    plain: dict[str, list[Search]] = {PLAIN: [BestOfN(passes=1)]}
    for label, budgets in {**plain, **searches}.items():
        for search in budgets:
            searcher = TakeSearcher(policy, search, runners, cfg.evaluation.steps, items)
            scores: dict[str, list[np.ndarray]] = {name: [] for name in runners}
            calls = 0
            with console.status(f"{checkpoint}: {label}, {search.passes} passes"):
                for part in chunks(cfg, search, wanted):
                    result = searcher.find(part)
                    calls += sum(task.trace.calls for task in result.tasks)
                    for name, score in result.scores.items():
                        scores[name].append(score.values)
            passes = calls / len(wanted) / cfg.evaluation.steps
            points.append(Point(checkpoint, label, passes, {n: np.concatenate(v) for n, v in scores.items()}))
    return points


def summarise_points(points: list[Point], weights: dict[str, float], prompts: np.ndarray) -> list[dict[str, Any]]:
    """One row per point: the reward that steers, each reward, and against the checkpoint's plain takes the paired
    difference. `prompts`: index of each take's prompt [N]."""
    plain = {p.checkpoint: weighted_rewards(p.scores, weights).astype(np.float64) for p in points if p.search == PLAIN}
    rows = []
    for point in points:
        summary = summarise_scores(point.scores, weights, prompts)
        row: dict[str, Any] = {"checkpoint": point.checkpoint, "search": point.search, "passes": point.passes}
        row["reward"] = asdict(summary.reward.estimate)
        row["rewards"] = {name: asdict(value.estimate) for name, value in summary.rewards.items()}
        if point.search != PLAIN:
            difference = weighted_rewards(point.scores, weights).astype(np.float64) - plain[point.checkpoint]
            row["difference"] = asdict(estimate(difference, prompts))
        rows.append(row)
    return rows


def print_points(rows: list[dict[str, Any]], rewards: list[str], console: Console, prompts: int, takes: int) -> None:
    from rich.table import Table

    text = f"{prompts} prompts, {takes} takes, the same seeds in each row; ± is the standard error over prompts"
    say(console, f"{text}; passes: denoiser calls of a take, in those of a plain one")
    table = Table()
    several = len({row["checkpoint"] for row in rows}) > 1
    for column in [*(["checkpoint"] * several), "search", "passes", "reward"]:
        table.add_column(column, justify="right" if column in ("passes", "reward") else "left", overflow="fold")
    for column in [*(rewards if len(rewards) > 1 else []), f"against {PLAIN}"]:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [*([row["checkpoint"]] * several), row["search"], f"{row['passes']:.2f}", _text(row["reward"])]
        cells += [_text(row["rewards"].get(name)) for name in rewards] * (len(rewards) > 1)
        table.add_row(*cells, _text(row.get("difference"), "+"))
    console.print(table)


def _text(value: dict[str, Any] | None, sign: str = "") -> str:
    return with_error(value["mean"], value["se"], sign=sign) if value else ""


def plot_points(rows: list[dict[str, Any]], rewards: list[str], title: str) -> bytes:
    """PNG: for each reward a panel of its mean against passes, with 95 % intervals over the prompts."""
    from matplotlib.figure import Figure

    names = rewards if len(rewards) > 1 else ["reward"]
    figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        lines: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
        for row in rows:
            value = row["reward"] if name == "reward" else row["rewards"].get(name)
            if value is not None:
                lines.setdefault((row["checkpoint"], row["search"]), []).append((row["passes"], value))
        several = len({checkpoint for checkpoint, _ in lines}) > 1
        for (checkpoint, search), values in lines.items():
            x, means = [passes for passes, _ in values], [value["mean"] for _, value in values]
            errors = [value["ci95"] or 0.0 for _, value in values]
            label = f"{search}, {checkpoint}" if several else search
            style = {"marker": "o", "ms": 4, "lw": 1.4, "capsize": 2}
            axes.errorbar(x, means, yerr=errors, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("denoiser calls, in plain takes")
        axes.set_ylabel(name)
        axes.grid(True, lw=0.5, alpha=0.5)
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
