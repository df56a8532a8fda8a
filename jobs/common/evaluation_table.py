"""Takes of several checkpoints on the same prompts and seeds, their scores, and the table of `rushes evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.common.load_trained import Trained, load_policy
from pipeline.config.schema import Config
from pipeline.core.statistics import Estimate, win_rate, with_error
from pipeline.core.takes_table import save_takes
from pipeline.core.types import TakeMeasurements
from pipeline.rewards import guards
from pipeline.rewards.runner import RewardRunner
from pipeline.rl.evaluation import changes, summarise_scores
from pipeline.rl.signals.group_relative import weighted_rewards
from pipeline.runs.verdict import judge

if TYPE_CHECKING:
    from rich.console import Console

BASE = "before training"


def labels_of(sources: list[Trained | None]) -> list[str]:
    labels: list[str] = []
    for source in sources:
        label = source.label if source else BASE
        labels.append(label if label not in labels else f"{label} ({labels.count(label) + 1})")
    return labels


def sample_and_score(
    cfg: Config,
    source: Trained | None,
    label: str,
    works: list,
    runners: dict[str, RewardRunner],
    ema: bool,
    folder: Path | None,
    console: Console,
) -> tuple[dict[str, np.ndarray], TakeMeasurements]:
    """Scores [N] of all takes per reward, in the order of `works` (NaN: the reward does not apply to the take's
    prompt), and what guards measure of them. `folder`: where the takes are written, or None."""
    from rich.progress import track

    weights = cfg.reward_weights
    policy = load_policy(cfg, source, ema)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    measured = []
    for work in track(works, description=f"sampling {label}", console=console, disable=not console.is_terminal):
        media, _, _ = policy.rollout(work)
        measured.append(guards.measure(media))
        scored = {name: runner.run(media, work.prompts, None) for name, runner in runners.items()}
        for name, score in scored.items():
            scores[name].append(score.values)
        if folder is not None:
            version = source.step or 0 if source else 0
            save_takes(folder, media, work.prompts, work.seeds, version, scored, weights=weights)
    return {name: np.concatenate(parts) for name, parts in scores.items()}, guards.merged(measured)


def summarise(
    results: dict[str, dict[str, np.ndarray]],
    weights: dict[str, float],
    prompts: np.ndarray,
    measured: dict[str, TakeMeasurements] | None = None,
    allowed: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One row per checkpoint from its scores (as of `sample_and_score`): the weighted reward and each reward (None: it
    applies to no take); against the first row, the paired differences, the win rate and the verdict. `prompts`: index
    of each take's prompt [N]; `measured`, `allowed`: what guards measure, by checkpoint, and their tolerances."""
    rewards = {label: weighted_rewards(scores, weights).astype(np.float64) for label, scores in results.items()}
    first = next(iter(rewards.values()))
    looks = _guards_of(measured or {}, prompts)
    summaries = {
        label: summarise_scores(scores, weights, prompts, looks.get(label)) for label, scores in results.items()
    }
    start = next(iter(summaries.values())).record()
    rows = []
    for number, label in enumerate(results):
        summary = summaries[label]
        row: dict[str, Any] = {"checkpoint": label, "reward": asdict(summary.reward.estimate)}
        row["rewards"] = {
            name: asdict(summary.rewards[name].estimate) if name in summary.rewards else None for name in weights
        }
        if number:
            record = {"step": number, **summary.record()}
            change = changes(start, record)
            verdict = judge([{"step": 0, **start}, record], weights, allowed or {})
            assert change.reward is not None and verdict is not None  # the same prompts in each row
            row["difference"] = asdict(change.reward)
            row["differences"] = {name: asdict(each) for name, each in change.rewards.items()}
            row["verdict"] = verdict.record()
            row["win_rate"] = asdict(win_rate(rewards[label], first, prompts))
        rows.append(row)
    return rows


def _guards_of(measured: dict[str, TakeMeasurements], prompts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Checkpoint -> measurement -> [N]; distances are those from the first checkpoint's takes."""
    first = next(iter(measured.values()), None)
    return {
        label: each.values
        | guards.across(each.descriptors, prompts, None if first is None or each is first else first.descriptors)
        for label, each in measured.items()
    }


def print_table(rows: list[dict], rewards: list[str], console: Console, prompts: int, takes: int) -> None:
    from rich.table import Table

    text = (
        f"{prompts} prompts, {takes} takes, the same seeds in each row; ± is the standard error over prompts, of "
        "differences the paired one; = means no change beyond the 95 % interval"
    )
    console.print(text, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("reward", justify="right")
    for name in rewards if len(rewards) > 1 else []:
        table.add_column(name, justify="right")
    if len(rows) > 1:
        table.add_column(f"against {rows[0]['checkpoint']}", justify="right")
        table.add_column("win rate", justify="right")
    for row in rows:
        cells = [row["checkpoint"], _text(row["reward"])]
        cells += [_of_reward(row, name) for name in rewards] * (len(rewards) > 1)
        if len(rows) > 1:
            cells += [_difference(row["difference"]) if "difference" in row else "", _percent(row.get("win_rate"))]
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        if "verdict" in row:
            line = f"{row['checkpoint']}: {row['verdict']['text']}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _text(value: dict[str, Any], sign: str = "") -> str:
    return with_error(value["mean"], value["se"], sign=sign)


def _of_reward(row: dict[str, Any], name: str) -> str:
    value, change = row["rewards"][name], row.get("differences", {}).get(name)
    if not value:
        return "–"
    return _text(value) + (f" ({_difference(change)})" if change else "")


def _difference(value: dict[str, Any]) -> str:
    """`+0.1500 ± 0.0200`, with `=` in front where that is no measurable change."""
    same = Estimate(**value).direction() == "same"
    return f"{'= ' if same else ''}{_text(value, '+')}"


def _percent(value: dict[str, Any] | None) -> str:
    if not value:
        return ""
    return f"{100 * value['mean']:.0f} %" + (f" ± {100 * value['se']:.0f}" if value["se"] is not None else "")
