"""Reward after N takes: compares samplers, windows and objectives on both shipped generators and several seeds.

    python -m benchmarks.learning.samples [--steps 16] [--seeds 0 1 2] [--generators image video] [--arms …]
    python -m benchmarks.learning.samples --plot        # benchmarks/results/samples.jsonl -> docs/images/samples.png
    and a table
    python -m benchmarks.learning.samples --steps 30 --every 10 --generators video --out
    benchmarks/results/less_work.jsonl \
        --arms awm awm_6_steps awm_6_steps_0.6 awm_5_steps_0.75         # work-saving recipes, as long as a quickstart

Runs rollout, scoring and update in this one process, with the library that the actors call: what is learned does not
depend on the number of workers. Every arm of a generator draws the same prompts in the same order and equally many
takes; learning rates (`RATES`) are not tuned per arm. Rises are paired: the same held-out prompts and seeds before and
after, the prompt being the unit, so a rise has a standard error of its own. Finished runs are appended to the file and
not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.prompts import PromptCursor, load_prompts
from pipeline.core.statistics import Estimate, estimate_of_means
from pipeline.core.types import GroupBatch, GroupWork, Media, WeightSet
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rewards import guards
from pipeline.rewards.runner import build_reward
from pipeline.rl.evaluation import summarise_scores
from pipeline.rl.group_plan import eval_works, scoring_seed
from pipeline.rl.signals import signal_of
from pipeline.rl.signals.base import Scores, labels_of
from pipeline.rl.sources import source_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/samples.jsonl"
PICTURE = ROOT / "docs/images/samples.png"
CONFIGS = {"image": "configs/quickstart-image.yaml", "video": "configs/quickstart.yaml"}
LOG_PROBS = ["objective.kl_beta=0", "sampler.timestep_fraction=1"]
GRPO = ["objective.name=grpo", *LOG_PROBS]
WINDOW = [*GRPO, "sampler.window.size=2", "sampler.window.range=[0,5]"]
ARMS: dict[str, list[str]] = {
    "awm": [],  # the quickstart's own recipe
    # Less work per take: fewer than eight sampler steps, of which the same share is trained, or three (0.6, 0.75);
    # kl_3: the KL at every third trained step only.
    "awm_6_steps": ["sampler.steps=6"],
    "awm_6_steps_0.6": ["sampler.steps=6", "sampler.timestep_fraction=0.6"],
    "awm_6_steps_0.6_kl_3": ["sampler.steps=6", "sampler.timestep_fraction=0.6", "objective.kl_every=3"],
    "awm_5_steps_0.75": ["sampler.steps=5", "sampler.timestep_fraction=0.75"],
    "flow_sde": [*GRPO, "sampler.kind=flow_sde", "sampler.noise_level=0.7"],
    "flow_sde_all_steps": [*GRPO, "sampler.window.range=[0,7]"],  # the step into sigma 0.004 too
    "dance_sde": [*GRPO, "sampler.kind=dance_sde", "sampler.noise_level=0.3", "sampler.same_initial_noise=true"],
    "cps": [*GRPO, "sampler.kind=cps", "sampler.noise_level=0.7"],
    "mix_grpo": [*WINDOW, "sampler.window.kind=sliding", "sampler.window.every=4", "sampler.same_initial_noise=true"],
    "flow_grpo_fast": [*WINDOW, "sampler.window.kind=random"],
}
RATES = {"image": 3e-4, "video": 1.5e-4}  # of the GRPO arms; the others keep the quickstart's


def config(generator: str, arm: str, seed: int, steps: int) -> Config:
    """The quickstart's config with the arm's sampler."""
    rate = [f"optimizer.lr={RATES[generator]}"] if set(LOG_PROBS) <= set(ARMS[arm]) else []
    overrides = [*ARMS[arm], *rate, f"run.seed={seed}", f"run.steps={steps}", "rollout.merge_lora=false"]
    return load_config(ROOT / CONFIGS[generator], overrides)


class Loop:
    """One recipe, in one process."""

    def __init__(self, cfg: Config, device: str = "cpu") -> None:
        self.cfg = cfg
        self.policy = Policy.load(cfg, device, 1 if device == "cpu" else 0)
        self.source = source_of(cfg)
        prompts = list(self.source.rows(cfg))
        self.policy.probe(prompts)
        self.policy.add_adapters()
        self.learner = Learner(cfg, device)
        self.scorers = {name: build_reward(name, reward) for name, reward in cfg.rewards.items()}
        self.cursor = PromptCursor(prompts, cfg.run.seed)
        self.heldout = load_prompts(cfg.prompts.heldout) if cfg.prompts.heldout else []
        self.signal = signal_of(cfg).begin(cfg.rewards)
        self.group = 0
        self.guard_s = 0.0  # CPU seconds that guards took so far
        self.start: np.ndarray | None = None  # descriptors of the first evaluation's takes
        self.takes_of_prompt: dict[int, np.ndarray] = {}  # of the last evaluation, uint8 [F, H, W, 3]: a take of each
        self.versions: deque[WeightSet] = deque(maxlen=cfg.step.max_staleness + 1)  # the oldest one draws

    def _scores(self, media: Media, work: GroupWork, seed: int | None) -> Scores:
        names = self.cfg.server_rewards(work.purpose)
        return {name: self.scorers[name].run(media, work.prompts, seed) for name in names}

    def step(self, number: int) -> dict[str, float]:
        """One optimisation step. Returns the learner's metrics."""
        return self.learner.train_step(self.draw(number))

    def draw(self, number: int) -> list[GroupBatch]:
        """Draws and scores the groups of step `number`; groups of equal rewards are filtered, as in a run."""
        self.versions.append(self.learner.weights(self.learner.objective.requirements.rollout_policy))
        self.policy.load_weights(self.versions[0])
        kept, prompts, scores = [], [], []
        while len(kept) < self.cfg.step.groups:
            work = self.source.work(self.cfg, self.group, number, self.cursor.next(), self.policy.grid)
            self.group += 1
            media, trajectory, _ = self.policy.rollout(work)
            group_scores = labels_of(work) or self._scores(media, work, scoring_seed(self.cfg, work.group))
            if not self.signal.is_flat(group_scores):
                kept.append(trajectory)
                prompts.append(work.prompts)
                scores.append(group_scores)
        result = self.signal.step(scores)
        self.signal.commit()
        return [
            GroupBatch(trajectory=t, feedback=feedback, staleness=len(self.versions) - 1, prompts=of_takes)
            for t, feedback, of_takes in zip(kept, result.feedback, prompts, strict=True)
            if t
        ]

    def record(self) -> dict[str, Any]:
        """A line of evals.jsonl, but for step and tag: rewards and guards with the run's own prompts, seeds and
        sampler. The first call is the one that distances are measured from."""
        self.policy.load_weights(self.learner.weights(self.cfg.eval_weights_tag))
        scores: dict[str, list[np.ndarray]] = defaultdict(list)
        measured = []
        works = eval_works(self.cfg, self.heldout, 0)
        for work in works:
            media = self.policy.rollout(work)[0]
            self.takes_of_prompt |= {prompt.index: media.frames[k] for k, prompt in enumerate(work.prompts)}
            began = time.process_time()
            measured.append(guards.measure(media))
            self.guard_s += time.process_time() - began
            for name, each in self._scores(media, work, None).items():
                scores[name].append(each.values)
        prompts = np.array([prompt.index for work in works for prompt in work.prompts])
        takes = guards.merged(measured)
        self.start = takes.descriptors if self.start is None else self.start
        began = time.process_time()
        values = takes.values | guards.across(takes.descriptors, prompts, self.start)
        self.guard_s += time.process_time() - began
        joined = {name: np.concatenate(each) for name, each in scores.items()}
        return summarise_scores(joined, self.cfg.reward_weights, prompts, values).record()

    def evaluate(self) -> dict[str, Any]:
        """Mean held-out reward, and each reward's mean by prompt."""
        record = self.record()
        by_prompt = {name: np.round(each["prompt_means"], 4).tolist() for name, each in record["rewards"].items()}
        return {"mean": record["mean"], "se": record["se"], "n": record["n"], "rewards": by_prompt}


def measure(generator: str, arm: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """One run: held-out reward after each `every` steps."""
    started = time.monotonic()
    loop = Loop(config(generator, arm, seed, steps))
    takes = loop.cfg.step.takes
    curve = [{"takes": 0, **loop.evaluate()}]
    for number in range(steps):
        loop.step(number)
        if (number + 1) % every == 0 or number + 1 == steps:
            curve.append({"takes": loop.group * takes, **loop.evaluate()})
    return {"generator": generator, "arm": arm, "seed": seed, "steps": steps, "curve": curve,
            "seconds": round(time.monotonic() - started)}  # fmt: skip


def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def paired_rises(run: dict[str, Any]) -> dict[str, Estimate]:
    """Of each reward from the first evaluation to the last, with the standard error over prompts."""
    first, last = run["curve"][0].get("rewards", {}), run["curve"][-1].get("rewards", {})
    return {name: estimate_of_means(np.subtract(last[name], first[name])) for name in first}


def each_reward(runs: list[dict[str, Any]]) -> str:
    """`scene +0.152 ± 0.018, motion …`: means over seeds, with the larger standard error of prompts and of seeds."""
    rises = [paired_rises(run) for run in runs]
    texts = []
    for name in rises[0] if all(rises) else ():
        means = np.array([rise[name].mean for rise in rises])
        over_prompts = np.sqrt(sum((rise[name].se or 0.0) ** 2 for rise in rises)) / len(rises)
        over_seeds = means.std(ddof=1) / np.sqrt(len(rises)) if len(rises) > 1 else 0.0
        texts.append(f"{name} {means.mean():+.3f} ± {max(over_prompts, over_seeds):.3f}")
    return ", ".join(texts)


def rows(runs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Per generator and arm: takes, and mean and standard deviation over seeds of the rise in held-out reward."""
    runs_of: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        runs_of[run["generator"], run["arm"]].append(run)
    summaries = {}
    for key, seeds in runs_of.items():
        rises = np.array([[point["mean"] - run["curve"][0]["mean"] for point in run["curve"]] for run in seeds])
        summaries[key] = {
            "takes": np.mean([[point["takes"] for point in run["curve"]] for run in seeds], axis=0),
            "rise": rises.mean(0),
            "std": rises.std(0, ddof=1) if len(seeds) > 1 else np.zeros(rises.shape[1]),
            "seeds": len(seeds),
            "rewards": each_reward(seeds),
        }
    return summaries


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, best first."""
    lines = [
        "| generator | arm | takes | rise in held-out reward (mean ± std over seeds) | each reward (± standard error) "
        "| seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (generator, arm), row in sorted(rows(runs).items(), key=lambda item: (item[0][0], -item[1]["rise"][-1])):
        lines.append(
            f"| {generator} | {arm} | {row['takes'][-1]:.0f} | {row['rise'][-1]:+.3f} ± {row['std'][-1]:.3f} "
            f"| {row['rewards']} | {row['seeds']} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generators = sorted({run["generator"] for run in runs})
    figure, axes = plt.subplots(
        1, len(generators), figsize=(2 + 5 * len(generators), 3.6), squeeze=False, layout="constrained"
    )
    for axis, generator in zip(axes[0], generators, strict=True):
        for arm in ARMS:
            if (row := rows(runs).get((generator, arm))) is not None:
                axis.errorbar(row["takes"], row["rise"], row["std"], label=arm, marker="o", markersize=3, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(title=generator, xlabel="takes", ylabel="rise in held-out reward")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every", type=int, default=8, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generators", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="measure nothing: plot the results and print a table")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where --plot draws it")
    options = parser.parse_args()
    if options.plot:
        runs = finished(options.out)
        plot(runs, options.picture)
        print(table(runs))
        return 0
    for seed in options.seeds:
        for generator in options.generators:
            for arm in options.arms:
                key = (generator, arm, seed, options.steps)
                if key in {(r["generator"], r["arm"], r["seed"], r["steps"]) for r in finished(options.out)}:
                    continue
                run = measure(generator, arm, seed, options.steps, options.every)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with open(options.out, "a") as file:
                    file.write(json.dumps(run) + "\n")
                print(f"{generator} {arm} seed {seed}: {run['curve'][0]['mean']:.4f} -> {run['curve'][-1]['mean']:.4f} "
                      f"({run['seconds']} s)", file=sys.stderr, flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
