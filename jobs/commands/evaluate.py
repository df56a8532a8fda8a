"""`rushes evaluate`: several checkpoints on the same prompts and seeds, with confidence intervals and win rates.

Runs in this process, without Ray. The first row is the generator before training; the others are compared with it
take by take.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.common.estimates import Estimate, estimate, win_rate
from jobs.common.load_trained import Trained, find_trained, load_policy
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.files import atomic_write
from pipeline.core.media import save_takes
from pipeline.core.prompts import check_prompt_lengths, load_prompts, prompt_locations
from pipeline.rewards.routing import check_routing
from pipeline.rewards.runner import RewardRunner, build_reward
from pipeline.rl.group_plan import eval_works
from pipeline.tools import preflight

if TYPE_CHECKING:
    from rich.console import Console

BASE = "before training"


def evaluate(
    cfg: Config,
    *,
    checkpoints: list[Path],
    prompts_file: Path | None,
    out: Path | None,
    ema: bool,
    base: bool,
    console: Console,
) -> int:
    """Prints the table; `out`: a folder for results.json and the takes of each row."""
    path = prompts_file or cfg.prompts.heldout
    if path is None:
        raise ConfigError("evaluate: the config has no prompts.heldout; set it or give --prompts FILE")
    if not checkpoints and not base:
        raise ConfigError("evaluate: nothing to evaluate; give --checkpoint or leave --no-base out")
    prompts = load_prompts(path)
    preflight.check_devices(cfg)
    preflight.check_rewards(cfg)
    preflight.check_generator(cfg, [], [])
    check_routing(prompts, list(cfg.rewards), prompt_locations(path), path)
    check_prompt_lengths(prompts, cfg.generator.pretrained, cfg.generator.call_kwargs, path)
    if out is not None:
        preflight.check_writable(out, "--out")
    sources: list[Trained | None] = ([None] if base else []) + [find_trained(c) for c in checkpoints]
    labels = _labels(sources)

    runners = {name: build_reward(name, reward) for name, reward in cfg.rewards.items()}
    weights = cfg.reward_weights
    works = eval_works(cfg, prompts, step=0)
    index = np.array([prompt.index for work in works for prompt in work.prompts])
    results = {}
    for number, (label, source) in enumerate(zip(labels, sources, strict=True)):
        folder = out / f"{number:02d}-takes" if out is not None else None
        results[label] = _run_one(cfg, source, label, works, runners, weights, ema, folder, console)
    rows = summarise(results, index, list(runners))
    _print(rows, list(runners), console, len(np.unique(index)), len(index))
    if out is not None:
        atomic_write(out / "results.json", json.dumps(rows, indent=1).encode())
        console.print(f"written to {out / 'results.json'}", soft_wrap=True)
    return 0


def _labels(sources: list[Trained | None]) -> list[str]:
    labels: list[str] = []
    for source in sources:
        label = source.label if source else BASE
        labels.append(label if label not in labels else f"{label} ({labels.count(label) + 1})")
    return labels


def _run_one(
    cfg: Config,
    source: Trained | None,
    label: str,
    works: list,
    runners: dict[str, RewardRunner],
    weights: dict[str, float],
    ema: bool,
    folder: Path | None,
    console: Console,
) -> dict[str, np.ndarray]:
    """Scores [N] per reward and 'reward' (weighted), in the order of `works`."""
    from rich.progress import track

    policy = load_policy(cfg, source, ema)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    for work in track(works, description=f"sampling {label}", console=console, disable=not console.is_terminal):
        media, _, _ = policy.rollout(work)
        found = {name: runner.run(media, work.prompts, None) for name, runner in runners.items()}
        for name, score in found.items():
            scores[name].append(score.values)
        if folder is not None:
            version = source.step or 0 if source else 0
            save_takes(folder, media, work.prompts, work.seeds, version, found, weights=weights)
    columns = {name: np.concatenate(parts).astype(np.float64) for name, parts in scores.items()}
    # NaN: the reward does not apply to the take's prompt.
    terms = [np.where(np.isnan(columns[name]), 0.0, weights[name] * columns[name]) for name in runners]
    columns["reward"] = np.sum(terms, axis=0)
    return columns


def summarise(results: dict[str, dict[str, np.ndarray]], index: np.ndarray, rewards: list[str]) -> list[dict]:
    """One row per checkpoint: means of the weighted reward and of each reward (NaN: it does not apply to the take;
    None: to no take); against the first row: paired difference and win rate."""
    first = next(iter(results.values()))
    rows = []
    for number, (label, columns) in enumerate(results.items()):
        row: dict = {"checkpoint": label, "reward": asdict(estimate(columns["reward"], index))}
        row["rewards"] = {}
        for name in rewards:
            known = ~np.isnan(columns[name])
            row["rewards"][name] = asdict(estimate(columns[name][known], index[known])) if known.any() else None
        if number:
            row["difference"] = asdict(estimate(columns["reward"] - first["reward"], index))
            row["win_rate"] = asdict(win_rate(columns["reward"], first["reward"], index))
        rows.append(row)
    return rows


def _print(rows: list[dict], rewards: list[str], console: Console, prompts: int, takes: int) -> None:
    from rich.table import Table

    text = f"{prompts} prompts, {takes} takes, the same seeds in each row; ± is the 95 % confidence interval"
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
        cells += [_text(row["rewards"][name]) if row["rewards"][name] else "–" for name in rewards] * (len(rewards) > 1)
        if len(rows) > 1:
            cells += [
                _text(row["difference"], "+") if "difference" in row else "",
                _percent(row.get("win_rate")),
            ]
        table.add_row(*cells)
    console.print(table)


def _text(value: dict, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f}" + (f" ± {value['half']:.3f}" if value["half"] is not None else "")


def _percent(value: dict | None) -> str:
    if not value:
        return ""
    return f"{100 * value['mean']:.0f} %" + (f" ± {100 * value['half']:.0f}" if value["half"] is not None else "")


__all__ = ["Estimate", "evaluate", "summarise"]
