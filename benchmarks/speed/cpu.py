"""The CPU part of the suite: both quickstarts against the bare passes and the plain loop, and the small costs between.

Every number is a ratio of times measured in the same call, interleaved (bare passes, run, bare passes, plain loop, and
again), each the median over its rounds. Sections can be measured one at a time; the JSON keeps the others.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.speed.standing import ROOT, MeasurementServer, python, together
from pipeline.core.errors import RushesError
from pipeline.core.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
CONFIGS = {"quickstart": "configs/quickstart.yaml", "quickstart_image": "configs/quickstart-image.yaml"}
# The work-saving recipes: fewer sampler steps, of whose five noise levels three or four train, and the KL at one of a
# group's. Here only their speed is measured; for their reward see docs/benchmarks.md.
LESS_WORK = {
    "quickstart": ["sampler.steps=6", "sampler.timestep_fraction=0.6", "objective.kl_every=3"],
    "quickstart_image": ["sampler.steps=6"],
}
# No evaluations, checkpoints or trackers: they are not part of a step.
BARE_RUN = ["prompts.heldout=null", "checkpoint.every=0", "tracking.backends=[]", "ray.address=local"]
ROUNDS, RUN_STEPS, WARM, PLAIN_STEPS = 2, 7, 2, 2  # steps of a run count after the first WARM
FORMAT = 2  # of the file: sections of another one are not kept
SIZES = (1, 4, 16, 64, 256)
Say = Callable[[str], None]


def run_steps(config: str, overrides: list[str], steps: int = RUN_STEPS) -> list[dict[str, float]]:
    """Metrics of the steps of a run after the first `WARM`."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["run.name=bench", f"run.dir={folder}", f"run.steps={steps}", *BARE_RUN, *overrides]
        process = python(["jobs.cli", "train", config, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, err = process.communicate()
        if process.returncode != 0:
            raise RushesError(f"bench: {process.args!r} failed: {err.strip()[-400:]}")
        lines = (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM:]


def _median(rows: list[dict[str, float]], key: str) -> float:
    return float(np.median([row[key] for row in rows]))


def quickstart(name: str, say: Say, rounds: int) -> dict[str, Any]:
    """Efficiency, roles' times and the comparison with the plain loop of one quickstart.

    The machine's speed changes by the minute. So a run is compared with the bare passes just before and after it and
    with the plain loop right after these, and what counts is the median of the rounds' ratios.
    """
    cores, config = len(os.sched_getaffinity(0)), CONFIGS[name]
    plain = ["pipeline.plain_loop", config, "--steps", "0", "--threads"]
    with ExitStack() as stack:
        say(f"{config}: getting ready")
        copies = [stack.enter_context(MeasurementServer(["benchmarks.speed.bare", config])) for _ in range(cores)]
        loops = {n: stack.enter_context(MeasurementServer([*plain, str(n)], n)) for n in sorted({1, cores})}
        tried = {n: [loop.measure() for _ in range(2)][1]["time/step"] for n, loop in loops.items()}
        threads = min(tried, key=lambda n: tried[n])
        results = [_round(name, copies, loops[threads]) for _ in _announced(rounds, config, say)]
        less_s = _median(run_steps(config, LESS_WORK[name], RUN_STEPS - 1), "time/step")
        fast = stack.enter_context(MeasurementServer([*plain, str(threads), "--fast"], threads))
        fast.measure()  # warms up
        compiled_plain_s = _plain_step(fast)["time/step"]
    ours = [row for each in results for row in each["run"]]
    step, plain_s = _median(ours, "time/step"), float(np.median([each["plain"]["time/step"] for each in results]))
    bare = [row for each in results for row in each["bare"]]
    by_round = [each["bare_s"] / (each["run_s"] * cores) for each in results]
    return {
        "cores": cores,
        "rounds": rounds,
        "step_s": step,
        "takes_per_s": _median(ours, "takes_per_s"),
        "efficiency": float(np.median(by_round)),
        "efficiency_by_round": by_round,
        "efficiency_against_compiled_bare": float(
            np.median([each["compiled_s"] / (each["run_s"] * cores) for each in results])
        ),
        "bare": {key: _median(bare, key) for key in bare[0]},
        "roles": {name: _median(ours, f"time/{name}") for name in ("rollout", "score", "learn", "sync")},
        "plain_loop": {
            "threads": threads,
            "step_s": plain_s,
            "compiled_step_s": compiled_plain_s,
            "efficiency": _median(bare, "step_s") / plain_s / threads,
            **{n: float(np.median([e["plain"][f"time/{n}"] for e in results])) for n in ("rollout", "score", "learn")},
        },
        "speedup_vs_plain_loop": float(np.median([each["plain"]["time/step"] / each["run_s"] for each in results])),
        "speedup_vs_compiled_plain_loop": compiled_plain_s / step,
        "between_roles": between_roles(ours, cores),
        "less_work": {
            "overrides": LESS_WORK[name],
            "step_s": less_s,
            "speedup_vs_plain_loop": results[-1]["plain"]["time/step"] / less_s,  # the plain loop had just run
        },
    }


def _announced(rounds: int, config: str, say: Say) -> Iterator[int]:
    for number in range(rounds):
        say(f"{config}: round {number + 1} of {rounds}")
        yield number


def _round(name: str, copies: list[MeasurementServer], loop: MeasurementServer) -> dict[str, Any]:
    """A run and what it is compared with, within a minute or two."""
    before = together(copies)
    run = run_steps(CONFIGS[name], [])
    bare = before + together(copies)
    return {
        "run": run,
        "bare": bare,
        "plain": _plain_step(loop),
        "run_s": _median(run, "time/step"),
        "bare_s": float(np.mean([row["step_s"] for row in bare])),
        "compiled_s": float(np.mean([row["compiled_step_s"] for row in bare])),
    }


def _plain_step(loop: MeasurementServer) -> dict[str, float]:
    """Mean of `PLAIN_STEPS` steps of the plain loop."""
    rows = [loop.measure() for _ in range(PLAIN_STEPS)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def between_roles(rows: list[dict[str, float]], cores: int) -> float:
    """Median share of a step that goes to what is between the roles: the controller's computing (loop, queues, ledger,
    files, Ray's threads in its process), and weights on their way, during which all cores may wait."""
    return float(np.median([(r["time/controller"] / cores + r["time/sync"]) / r["time/step"] for r in rows]))


def machine() -> dict[str, Any]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = {name: version(name) for name in ("torch", "ray", "diffusers", "transformers", "numpy")}
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": packages,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def measure(sections: list[str], say: Say, out: Path = RESULTS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measures `sections` (of SECTIONS) and writes `out`, keeping what it holds of others."""
    measured: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if measured.get("format") != FORMAT:
        measured = {"format": FORMAT}
    for section in sections:
        facts = machine()
        measured[section] = {**SECTIONS[section](say, rounds), "machine": facts}
        measured |= _summary(measured)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, (json.dumps(measured, indent=2) + "\n").encode())
    return measured


def _simulated(say: Say, _rounds: int) -> dict[str, Any]:
    from benchmarks.speed.simulator import simulate_all

    return simulate_all(SIZES, say)


def _small(say: Say, _rounds: int) -> dict[str, Any]:
    from benchmarks.speed.small import small_costs

    return small_costs(say)


def _peers(say: Say, rounds: int) -> dict[str, Any]:
    from benchmarks.speed.peers import against_peers

    return against_peers(run_steps, say, rounds)


SECTIONS: dict[str, Callable[[Say, int], dict[str, Any]]] = {
    "peers": _peers,
    "quickstart": partial(quickstart, "quickstart"),
    "quickstart_image": partial(quickstart, "quickstart_image"),
    "simulated": _simulated,
    "small": _small,
}


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    """The headline keys, from the sections that have been measured."""
    result: dict[str, Any] = {
        "efficiency": {name: measured[name]["efficiency"] for name in CONFIGS if name in measured},
        "speedup_vs_plain_loop": {},
    }
    if "quickstart" in measured:
        result["speedup_vs_plain_loop"] = {
            "same_recipe": measured["quickstart"]["speedup_vs_plain_loop"],
            "less_work": measured["quickstart"]["less_work"]["speedup_vs_plain_loop"],
        }
    if "quickstart_image" in measured:
        image = measured["quickstart_image"]
        result["speedup_vs_plain_loop"] |= {
            "same_recipe_image": image["speedup_vs_plain_loop"],
            "less_work_image": image["less_work"]["speedup_vs_plain_loop"],
        }
    return result
