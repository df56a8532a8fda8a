"""Several runs in one page: held-out rewards, verdicts, what differs in their configs, and takes of the same prompts.

Every run is compared with the first. Where both drew the same held-out prompts with the same seeds, the difference is
that of pairs by prompt (`pipeline.rl.evaluation`); else it is the difference of two independent means, which the page
says. The page embeds everything that it shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.core.errors import ConfigError
from pipeline.core.files import atomic_write
from pipeline.core.secrets import mask_tree
from pipeline.core.statistics import Estimate, unpaired_difference
from pipeline.rl.evaluation import changes
from pipeline.tools.report import facts, trust
from pipeline.tools.report.plots import Line, finite, plot
from pipeline.tools.report.record import RunRecord, read_run
from pipeline.tools.report.report import page_templates, time_made
from pipeline.tools.report.takes import MAX_EMBEDDED, KeptTake, Takes

MAX_PROMPTS = 24  # whose takes are shown
NARROWEST = 140  # pixels of a column of takes: small pictures are enlarged, others have their real size
Key = tuple[int, str, int]  # of a take: prompt's index, prompt, seed
WEIGHTED = "weighted reward"
# What may differ between two runs whose scores of a reward are still scores of the same thing.
NOT_SCORING = {"weight", "gradient", "normalize", "clip", "workers", "resources", "batch_items", "threads"}


def build_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the page to `out` and returns it. Raises `RushesError` when one of the folders is no run."""
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise ConfigError("report: the same run is given twice; name each run once")
    runs = [read_run(path) for path in run_dirs]
    kept = [Takes(run, MAX_EMBEDDED // len(runs)) for run in runs]
    keys = [takes.last_heldout() for takes in kept]
    names = _names(run_dirs)
    prompts, left_out = _takes(kept, keys, names)
    html = (
        page_templates()
        .get_template("compare.html.j2")
        .render(
            names=names,
            made=time_made(),
            runs=[_run_row(run) for run in runs],
            rewards=_rewards(runs, keys, names),
            plots=_plots(runs, names),
            differences=_config_differences(runs),
            without_config=[name for name, run in zip(names, runs, strict=True) if run.config is None],
            prompts=prompts,
            left_out=left_out,
            problems=mask_tree([problem for run in runs for problem in dict.fromkeys(run.problems)]),
        )
    )
    atomic_write(out, html.encode("utf-8"))
    return out


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _run_row(run: RunRecord) -> dict[str, Any]:
    return {"status": facts.status(run), "verdict": trust.verdict(run), "facts": dict(facts.facts(run))}


# ------------------------------------------------------------------------------------------------- held-out rewards


def _rewards(runs: list[RunRecord], keys: list[dict[Key, KeptTake]], names: list[str]) -> list[dict[str, Any]]:
    """Per reward a row for each run that measured it: before, after, its own change, and its lead over the first."""
    measured = list(dict.fromkeys(name for run in runs for row in run.evals for name in row.get("rewards") or {}))
    tables = []
    for reward in [*([WEIGHTED] if len(measured) != 1 else []), *measured]:
        rows = [
            {"run": name, **_result(run, reward), **_lead(runs[0], run, keys[0], keys[number], reward)}
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
        rows = [row for row in rows if row["before"] or row["after"]]
        if rows:
            gold = [bool(run.config and reward in run.config.gold_rewards) for run in runs]
            tables.append({"name": reward, "gold": all(gold), "gold_in_some": any(gold), "rows": rows})
    return tables


def _result(run: RunRecord, reward: str) -> dict[str, Any]:
    first, last = _part(run.evals[0], reward) if run.evals else None, None
    change: Any = None
    if len(run.evals) > 1:
        last = _part(run.evals[-1], reward)
        found = changes(run.evals[0], run.evals[-1])
        change = found.reward if reward == WEIGHTED else found.rewards.get(reward)
    return {
        "before": first,
        "after": last,
        "step": run.evals[-1]["step"] if run.evals else None,
        "change": trust.change_of(first, last, change),
    }


def _part(evaluation: Mapping[str, Any], reward: str) -> dict[str, Any] | None:
    return dict(evaluation) if reward == WEIGHTED else (evaluation.get("rewards") or {}).get(reward)


def _lead(
    first: RunRecord, other: RunRecord, first_keys: dict[Key, KeptTake], other_keys: dict[Key, KeptTake], reward: str
) -> dict[str, Any]:
    """`lead`: other - first of the last evaluations, and `how` it was compared, or why not."""
    if first is other:
        return {"lead": None, "how": "the first run"}
    if not first.evals or not other.evals:
        return {"lead": None, "how": "no evaluation yet"}
    if not _same_scores(first, other, reward):
        what = "weights or rewards differ" if reward == WEIGHTED else "is scored differently"
        return {"lead": None, "how": f"not compared: {what}"}
    mine, theirs = first.evals[-1], other.evals[-1]
    same = _same_prompts(first_keys, other_keys)
    found = changes(_only(mine, same), _only(theirs, same))
    paired = found.reward if reward == WEIGHTED else found.rewards.get(reward)
    if paired is not None:
        return {"lead": _shown(paired), "how": f"paired, {paired.n} prompt{'s' if paired.n != 1 else ''}"}
    one, two = _part(mine, reward), _part(theirs, reward)
    if one is None or two is None or not one.get("se") or not two.get("se"):
        return {"lead": None, "how": "not measured in both" if one is None or two is None else "no error is known"}
    estimates = [Estimate(mean=e["mean"], se=e["se"], ci95=e.get("ci95"), n=e.get("n") or 2) for e in (one, two)]
    return {"lead": _shown(unpaired_difference(*estimates)), "how": "not paired: other prompts or seeds"}


def _shown(difference: Estimate) -> dict[str, Any]:
    return {"mean": difference.mean, "ci95": difference.ci95, "shown": difference.direction()}


def _same_scores(first: RunRecord, other: RunRecord, reward: str) -> bool:
    """Whether both configs measure the same by this name. Without a config it cannot be told: they do not."""
    if first.config is None or other.config is None:
        return False
    one, two = (
        {name: each.model_dump(mode="json", exclude=NOT_SCORING) for name, each in run.config.rewards.items()}
        for run in (first, other)
        if run.config is not None
    )
    if reward == WEIGHTED:
        return one == two and first.config.reward_weights == other.config.reward_weights
    return reward in one and one.get(reward) == two.get(reward)


def _same_prompts(first: dict[Key, KeptTake], other: dict[Key, KeptTake]) -> set[int]:
    """Indices of the prompts that both runs drew with the same texts and seeds."""
    one, two = _seeds(first), _seeds(other)
    return {index for (index, text), seeds in one.items() if two.get((index, text)) == seeds}


def _seeds(keys: dict[Key, KeptTake]) -> dict[tuple[int, str], set[int]]:
    found: dict[tuple[int, str], set[int]] = {}
    for index, text, seed in keys:
        found.setdefault((index, text), set()).add(seed)
    return found


def _only(evaluation: Mapping[str, Any], prompts: set[int]) -> dict[str, Any]:
    """An evaluation of those prompts alone: what `changes` compares."""

    def part(found: Mapping[str, Any]) -> dict[str, Any]:
        means = found.get("prompt_means") or []
        indices = evaluation.get("prompts") or range(len(means))
        chosen = [mean for index, mean in zip(indices, means, strict=False) if index in prompts]
        return {"prompt_means": chosen}

    numbers = evaluation.get("prompts") or range(len(evaluation.get("prompt_means") or []))
    rewards = {name: part(found) for name, found in (evaluation.get("rewards") or {}).items()}
    return {**part(evaluation), "rewards": rewards, "prompts": [index for index in numbers if index in prompts]}


def _plots(runs: list[RunRecord], names: list[str]) -> list[Markup]:
    """Per reward, each run's held-out mean by step with its 95 % interval; a run has one colour in all of them."""
    measured = list(dict.fromkeys(name for run in runs for row in run.evals for name in row.get("rewards") or {}))
    comparable = all(_same_scores(runs[0], run, WEIGHTED) for run in runs)
    plots = []
    for reward in [*([WEIGHTED] if comparable and len(measured) != 1 else []), *measured]:
        lines = []
        for number, (name, run) in enumerate(zip(names, runs, strict=True)):
            points = [(row["step"], part) for row in run.evals if (part := _part(row, reward))]
            points = [(step, part) for step, part in points if finite(part.get("mean"))]
            x, y = [step for step, _ in points], [part["mean"] for _, part in points]
            error = [part.get("ci95") or 0.0 for _, part in points]
            lines.append(Line(label=name, x=x, y=y, error=error, bars=True, colour=number))
        if any(len(line.x) for line in lines):
            plots.append(plot(f"{reward}, held-out", lines))
    return plots


# ------------------------------------------------------------------------------------------------- configs and takes


def _config_differences(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """A row for each key that has not the same value in all runs (– : the run has no such key)."""
    if any(run.config is None for run in runs):
        return []
    flat = [_flat(mask_tree(run.config.model_dump(mode="json"))) for run in runs if run.config is not None]
    keys = sorted({key for each in flat for key in each} - {"run.name", "run.dir"})
    rows = [{"key": key, "values": [each.get(key, "–") for each in flat]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as it stands in a config."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def _takes(kept: list[Takes], keys: list[dict[Key, KeptTake]], names: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Per prompt and seed that at least two runs kept a take of: a cell for each run (None: it kept none). One seed
    of every prompt comes before the second of any. Also the number of those left out of the page."""
    with_file = [{key for key, take in found.items() if take.row.get("path")} for found in keys]
    shared = [key for key in dict.fromkeys(key for found in keys for key in found) if _count(with_file, key) > 1]
    rank: dict[tuple[int, str], int] = {}
    ordered = []
    for key in shared:
        number = rank[key[:2]] = rank.get(key[:2], -1) + 1
        ordered.append((number, key))
    ordered.sort()
    shown: list[dict[str, Any]] = []
    for _, key in ordered[:MAX_PROMPTS]:
        cells = [takes.cell(found[key]) if key in found else None for takes, found in zip(kept, keys, strict=True)]
        if any(cell and cell["src"] and not cell["src"].startswith("data:") for cell in cells):
            break  # no room left in the page
        sides = [{"run": name, "cell": cell} for name, cell in zip(names, cells, strict=True)]
        wide = max([NARROWEST, *(cell["width"] for cell in cells if cell and cell["src"])])
        playing = any(cell and cell["video"] and cell["src"] for cell in cells)
        shown.append({"prompt": key[1], "seed": key[2], "sides": sides, "playing": playing, "wide": wide})
    return shown, len(shared) - len(shown)


def _count(found: list[set[Key]], key: Key) -> int:
    return sum(key in each for each in found)
