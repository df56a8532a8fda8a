"""Runs against the data-parallel baseline (`benchmarks.speed.peer`), with the same options: eager with eager, compiled
with compiled. A run and the baseline take turns; a ratio is the median over the rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.standing import MeasurementServer, together

Run = Callable[[str, list[str]], list[dict[str, float]]]  # (config, overrides) -> metrics of its steps after the first
PROCESSES, STEPS, WARM = 2, 3, 2
IMAGE, VIDEO = "configs/quickstart-image.yaml", "configs/quickstart.yaml"
# GRPO as others have it: the first four of eight steps draw noise and train; no KL term.
GRPO = ["objective.name=grpo", "objective.kl_beta=0", "sampler.timestep_fraction=1", "sampler.window.range=[0,4]"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "image, grpo": (IMAGE, GRPO),
    "image, awm": (IMAGE, []),
    "video, awm": (VIDEO, []),
}


def against_peers(run_steps: Run, say: Callable[[str], None], rounds: int) -> dict[str, Any]:
    """`{arm: {eager | compiled: {run_s, peer_s, speedup, by_round}}}`; seconds are medians of steps."""
    return {
        arm: {
            kind: _compare(run_steps, config, [*overrides, f"generator.compile={compiled}"], rounds, say, arm, kind)
            for kind, compiled in (("eager", "false"), ("compiled", "true"))
        }
        for arm, (config, overrides) in ARMS.items()
    }


def _compare(
    run_steps: Run, config: str, overrides: list[str], rounds: int, say: Callable[[str], None], arm: str, kind: str
) -> dict[str, Any]:
    fast = ["--fast"] if kind == "compiled" else []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = ["benchmarks.speed.peer", config, *overrides, *fast, "--meet", str(Path(folder) / "meet")]
        base += ["--world", str(PROCESSES), "--rank"]
        peers = [stack.enter_context(MeasurementServer([*base, str(rank)])) for rank in range(PROCESSES)]
        for _ in range(WARM):
            together(peers)
        pairs = []
        for number in range(rounds):
            say(f"{arm}, {kind}: round {number + 1} of {rounds}")
            run_s = float(np.median([row["time/step"] for row in run_steps(config, overrides)]))
            steps = [max(answer["time/step"] for answer in together(peers)) for _ in range(STEPS)]
            pairs.append((run_s, float(np.median(steps))))
    by_round = [peer_s / run_s for run_s, peer_s in pairs]
    run_s, peer_s = np.median(pairs, axis=0).tolist()
    return {"run_s": run_s, "peer_s": peer_s, "speedup": float(np.median(by_round)), "by_round": by_round}
