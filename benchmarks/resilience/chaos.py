"""A training run whose actors and nodes are killed again and again, against the same run undisturbed.

    make chaos
    python -m benchmarks.resilience.chaos [--steps 24] [--every 12] [--seed 0] [--report FILE]

Both runs train the shipped image generator on a cluster of three raylets on this machine. In the second one, every few
seconds, a random rollout worker, reward server, learner or controller process gets SIGKILL, or a worker node's raylet
is switched off with everything on it (another node joins a few seconds later). Nobody intervenes.

The last line of stdout is one JSON object. The exit code is 0 when the run finished, every group is accounted for
exactly once, the held-out reward rose, and the wall time is at most twice that of the undisturbed run.

Twelve seconds are for two cores: the undisturbed run keeps both busy, and a worker's start alone is 6 s of processor
time, 5 of them imports (torch, diffusers, transformers, peft), so that a kill costs the run about 4 s in all. With more
cores --every may be smaller.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.resilience.cluster import (
    Actor,
    Nodes,
    Result,
    Training,
    actors,
    cluster_experiment,
    image_config,
    kill_process,
    say,
)

LIMIT_S = 1500.0
# Relative frequencies. Losing a controller or learner costs a restart from the checkpoint, so they are hit less often
# than workers, of which there are more.
WEIGHTS = {"rollout": 6, "reward": 3, "learner": 2, "controller": 1, "node": 2}
REJOIN_S = 4.0  # a new node comes this long after one was lost


class Chaos:
    """Kills until the run has ended."""

    def __init__(self, nodes: Nodes, run: Training, every: float, seed: int, kinds: list[str]) -> None:
        self._nodes, self._run, self._every, self._random = nodes, run, every, random.Random(seed)
        self._weights = {kind: WEIGHTS[kind] for kind in kinds}
        self.kills: Counter[str] = Counter()
        self._missing: list[float] = []  # when nodes were lost that have not been replaced yet

    def unleash(self) -> None:
        next_kill = time.monotonic() + self._every
        while self._run.running and time.monotonic() - self._run.started < LIMIT_S:
            time.sleep(0.2)
            if self._missing and time.monotonic() - self._missing[0] > REJOIN_S:
                self._missing.pop(0)
                self._nodes.nodes.append(self._nodes.add())
                say("a node has joined")
            if time.monotonic() >= next_kill and self._kill():
                next_kill = time.monotonic() + self._random.uniform(0.6, 1.4) * self._every

    def _kill(self) -> bool:
        kind = self._random.choices(list(self._weights), list(self._weights.values()))[0]
        if kind == "node":
            if len(self._nodes.nodes) < 2:
                return False
            self._nodes.kill(self._random.randrange(len(self._nodes.nodes)))
            self._missing.append(time.monotonic())
            victim_name = "node"
        else:
            living: list[Actor] = [actor for actor in actors(self._run.name) if actor.role == kind]
            if not living:
                return False
            victim = self._random.choice(living)
            if not kill_process(victim.pid):
                return False
            victim_name = victim.name
        self.kills[kind] += 1
        say(f"killed {victim_name} ({self.kills.total()}); the run is at step {self._run.step}")
        return True


def accounts(run: Training, groups_per_step: int, steps: int) -> dict[str, Any]:
    """Groups by their end, and what is wrong with them (empty: nothing)."""
    summary = run.summary()
    groups = summary["groups"]
    lost = groups["admitted"] - groups["trained"] - groups["filtered"] - groups["failed"]
    seen = Counter(int(line["step"]) for line in run.metrics() if "loss" in line)
    wrong = []
    if seen != Counter(range(1, steps + 1)):
        wrong.append(f"steps recorded: {sorted(seen.elements())}, expected each of 1 to {steps} once")
    if groups["trained"] != groups_per_step * steps:
        wrong.append(f"{groups['trained']} groups trained, expected {groups_per_step * steps}")
    if lost:
        wrong.append(f"{lost} groups without an end")
    gain = summary["heldout"]["after"]["mean"] - summary["heldout"]["before"]["mean"]
    return {**groups, "lost": lost, "gain": gain, "wrong": wrong, "heldout": summary["heldout"]}


def run(options: argparse.Namespace, folder: Path) -> Result:
    with Nodes(workers=2) as nodes:
        config = image_config(folder, options.steps, nodes.address)
        say(f"undisturbed run of {options.steps} steps in {folder}")
        calm = Training(config, "calm")
        calm_s = calm.wait(LIMIT_S)
        say(f"undisturbed: {calm_s:.0f} s; now with a kill every {options.every:g} s or so")
        hit = Training(config, "chaos")
        chaos = Chaos(nodes, hit, options.every, options.seed, options.kinds)
        chaos.unleash()
        hit_s = hit.wait(LIMIT_S)
    before, after = accounts(calm, 6, options.steps), accounts(hit, 6, options.steps)
    result = {
        "kills": chaos.kills.total(),
        "groups_admitted": after["admitted"],
        "groups_trained": after["trained"],
        "groups_filtered": after["filtered"],
        "groups_failed": after["failed"],
        "groups_lost": after["lost"],
        "wall_ratio": round(hit_s / calm_s, 3),
        "reward_gain": round(after["gain"], 4),
        "reward_gain_undisturbed": round(before["gain"], 4),
        "wall_s": round(hit_s, 1),
        "wall_s_undisturbed": round(calm_s, 1),
        "kills_by_kind": dict(chaos.kills),
        "retries": hit.summary()["retries"],
        "steps": options.steps,
    }
    wrong = after["wrong"] + before["wrong"]
    if result["wall_ratio"] > 2:
        wrong.append(f"took {result['wall_ratio']} times as long as undisturbed, allowed are 2")
    if after["gain"] <= 0:
        wrong.append(f"the held-out reward did not rise ({after['gain']:+.4f})")
    return Result(result, wrong)


if __name__ == "__main__":
    sys.exit(
        cluster_experiment(
            run,
            __doc__,
            steps={"type": int, "default": 24},
            every={"type": float, "default": 12.0, "help": "seconds between kills, on average"},
            seed={"type": int, "default": 0},
            kinds={"nargs": "+", "choices": list(WEIGHTS), "default": list(WEIGHTS)},
        )
    )
