"""The CPU part of the suite: both quickstarts against the bare passes and the plain loop, and the small costs between.

Every number is a ratio of times measured in the same call, interleaved (run, plain loop, bare passes, and again), each
the median over its steps and rounds. Sections can be measured one at a time; the JSON keeps the others.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actors.common import actor_env
from pipeline.errors import RushesError
from pipeline.files import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
CONFIGS = {"quickstart": "configs/quickstart.yaml", "quickstart_image": "configs/quickstart-image.yaml"}
# The work-saving recipe: fewer sampler steps, three of their five noise levels trained. Here only its speed is measured.
LESS_WORK = ["sampler.steps=6", "sampler.timestep_fraction=0.6"]
# No evaluations, checkpoints or trackers: they are not part of a step.
BARE_RUN = ["prompts.heldout=null", "checkpoint.every=0", "tracking.backends=[]", "ray.address=local"]
ROUNDS, RUN_STEPS, WARM, PLAIN_STEPS = 2, 7, 2, 2  # steps of a run count after the first WARM
SIZES = (1, 4, 16, 64, 256)
Say = Callable[[str], None]


def _python(args: list[str], threads: int = 1) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **actor_env(threads)}  # the same for all that is compared
    return subprocess.Popen(
        [sys.executable, "-m", *args], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _lines(process: subprocess.Popen) -> list[dict[str, float]]:
    out, err = process.communicate()
    if process.returncode != 0:
        raise RushesError(f"bench: {process.args!r} failed: {err.strip()[-400:]}")
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def run_steps(config: str, overrides: list[str], steps: int = RUN_STEPS) -> list[dict[str, float]]:
    """Metrics of the steps of a run after the first `WARM`."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["run.name=bench", f"run.dir={folder}", f"run.steps={steps}", *BARE_RUN, *overrides]
        _lines(_python(["jobs.cli", "train", config, *args]))
        lines = (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM:]


def plain_steps(config: str, threads: int, *options: str) -> list[dict[str, float]]:
    """Metrics of the steps of the plain loop after the first."""
    args = ["benchmarks.plain_loop", config, "--steps", str(PLAIN_STEPS + 1), "--threads", str(threads), *options]
    return _lines(_python(args, threads))[1:]


def bare_times(config: str, copies: int) -> list[dict[str, float]]:
    """Bare passes, timed by `copies` processes at the same time."""
    processes = [_python(["benchmarks.bare", config]) for _ in range(copies)]
    return [_lines(process)[0] for process in processes]


def _median(rows: list[dict[str, float]], key: str) -> float:
    return float(np.median([row[key] for row in rows]))


def quickstart(config: str, say: Say, rounds: int, less_work: bool = False) -> dict[str, Any]:
    """Efficiency, roles' times and the comparison with the plain loop of one quickstart."""
    cores = len(os.sched_getaffinity(0))
    ours, less, bare, alone = [], [], [], []
    plain: dict[int, list[dict[str, float]]] = {1: [], cores: []}
    for number in range(rounds):
        say(f"{config}: round {number + 1} of {rounds}")
        ours += run_steps(config, [])
        for threads in _still_open(plain):
            plain[threads] += plain_steps(config, threads)
        bare += bare_times(config, cores)
        if number == 0:
            alone += bare_times(config, 1)
        if less_work:
            less += run_steps(config, LESS_WORK)
    step = _median(ours, "time/step")
    threads = _best(plain)
    plain_s = _median(plain[threads], "time/step")
    fast = _median(plain_steps(config, threads, "--fast"), "time/step")
    found: dict[str, Any] = {
        "cores": cores,
        "rounds": rounds,
        "step_s": step,
        "takes_per_s": _median(ours, "takes_per_s"),
        "efficiency": _median(bare, "step_s") / (step * cores),
        "efficiency_against_bare_alone": _median(alone, "step_s") / (step * cores),
        "efficiency_against_compiled_bare": _median(bare, "compiled_step_s") / (step * cores),
        "bare": {key: _median(bare, key) for key in bare[0]},
        "roles": {name: _median(ours, f"time/{name}") for name in ("rollout", "score", "learn", "sync")},
        "plain_loop": {
            "threads": threads,
            "step_s": plain_s,
            "compiled_step_s": fast,
            "efficiency": _median(bare, "step_s") / plain_s / threads,
            **{name: _median(plain[threads], f"time/{name}") for name in ("rollout", "score", "learn")},
        },
        "speedup_vs_plain_loop": plain_s / step,
        "speedup_vs_compiled_plain_loop": fast / step,
        "between_roles": between_roles(ours, cores),
    }
    if less:
        less_s = _median(less, "time/step")
        found["less_work"] = {
            "overrides": LESS_WORK,
            "step_s": less_s,
            "speedup_vs_plain_loop": plain_s / less_s,
        }
    return found


def _best(plain: dict[int, list[dict[str, float]]]) -> int:
    """The thread count with which the plain loop is fastest."""
    return min(plain, key=lambda threads: _median(plain[threads], "time/step"))


def _still_open(plain: dict[int, list[dict[str, float]]]) -> list[int]:
    """The thread counts that may still be the best: all, until each has been measured; then those within 10 %."""
    if not all(plain.values()):
        return list(plain)
    limit = 1.1 * _median(plain[_best(plain)], "time/step")
    return [threads for threads, rows in plain.items() if _median(rows, "time/step") <= limit]


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
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for section in sections:
        facts = machine()
        found[section] = {**SECTIONS[section](say, rounds), "machine": facts}
        found |= _summary(found)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _simulated(say: Say, _rounds: int) -> dict[str, Any]:
    from benchmarks.simulator import simulate_all

    return simulate_all(SIZES, say)


def _small(say: Say, _rounds: int) -> dict[str, Any]:
    from benchmarks.small import small_costs

    return small_costs(say)


SECTIONS: dict[str, Callable[[Say, int], dict[str, Any]]] = {
    "quickstart": lambda say, rounds: quickstart(CONFIGS["quickstart"], say, rounds, less_work=True),
    "quickstart_image": lambda say, rounds: quickstart(CONFIGS["quickstart_image"], say, rounds),
    "simulated": _simulated,
    "small": _small,
}


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """The headline keys, from the sections that have been measured."""
    result: dict[str, Any] = {
        "efficiency": {name: found[name]["efficiency"] for name in CONFIGS if name in found},
        "speedup_vs_plain_loop": {},
    }
    if "quickstart" in found:
        result["speedup_vs_plain_loop"] = {
            "same_recipe": found["quickstart"]["speedup_vs_plain_loop"],
            "less_work": found["quickstart"]["less_work"]["speedup_vs_plain_loop"],
        }
    return result
