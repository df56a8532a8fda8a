"""What this product does on a GPU, in minutes and without a network: sections that do not depend on each other.

    python -m benchmarks.gpu.check [OUT.json] [--budget 480] [--only SECTION …] [--again]      (make gpu-check)
    python -m benchmarks.gpu.check OUT.json --device cpu --tiny        # tries the code where there is no GPU

Each section runs in a process of its own with a limit of its own, the most telling first, and its result is in the file
as soon as it is there, with the table beside it (OUT.md). One that fails leaves its last words, and the next one runs.
Sections that have succeeded are not run again. Needs neither Ray nor vLLM, but for the section `ray`, which is left out
without it. The exit status is 1 where a section failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.card import Card, facts
from benchmarks.gpu.families import families
from benchmarks.gpu.learning import learning
from benchmarks.gpu.roles import sharded, whole_run
from benchmarks.gpu.sizes import size, switches
from benchmarks.gpu.table import table
from benchmarks.learning.samples import ROOT
from pipeline.core.files import atomic_write

RESULTS = ROOT / "benchmarks/results/gpu"
_LEAST_S = 20.0  # no section is begun with less time left


@dataclass(frozen=True)
class Section:
    limit_s: float
    measure: Callable[[Card], dict[str, Any]]
    needs: str | None = None  # an importable package, without which there is nothing to measure


SECTIONS: dict[str, Section] = {  # in the order of their worth
    "facts": Section(60, facts),
    "image float32": Section(110, partial(learning, "image", "float32")),
    "image bfloat16": Section(110, partial(learning, "image", "bfloat16")),
    "sd3.5-medium": Section(150, partial(size, "sd3.5-medium")),
    "families": Section(150, partial(families, seconds=120)),
    "wan-1.3b": Section(150, partial(size, "wan-1.3b")),
    "sharded": Section(120, sharded),
    "switches": Section(200, switches),
    "video bfloat16": Section(110, partial(learning, "video", "bfloat16")),
    "ray": Section(150, whole_run, needs="ray"),
    "flux": Section(200, partial(size, "flux")),
    "sd3.5-medium compiled": Section(200, partial(size, "sd3.5-medium", compiled=True)),
    "video float32": Section(110, partial(learning, "video", "float32")),
}


def run_section(name: str, card: Card) -> dict[str, Any]:
    """The section's result in this process; where it fails, `failed`."""
    began = time.monotonic()
    try:
        result = SECTIONS[name].measure(card)
    except Exception:  # the other sections are worth having
        result = {"failed": traceback.format_exc()[-3000:]}
    return {**result, "section_s": round(time.monotonic() - began, 1)}


def run_apart(name: str, card: Card, limit_s: float) -> dict[str, Any]:
    """The section's result from a process of its own, or how that ended."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "section.json"
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.check", str(out), "--section", name]
        command += ["--device", card.device, *(["--tiny"] if card.tiny else [])]
        log = Path(scratch) / "log"
        with log.open("wb") as words:
            try:
                run = subprocess.run(command, cwd=ROOT, timeout=limit_s, stdout=words, stderr=subprocess.STDOUT)
            except subprocess.TimeoutExpired:
                return {"failed": f"ended after its limit of {limit_s:.0f} s: {_last_words(log)}"}
        if not out.exists():
            return {"failed": f"exit status {run.returncode}: {_last_words(log)}"}
        return json.loads(out.read_text())


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def check(out: Path, card: Card, names: list[str], budget_s: float, again: bool) -> dict[str, Any]:
    """Measures the sections `names`, as long as the budget lasts, and writes `out` and its table after each."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    began = time.monotonic()
    for name in names:
        left = budget_s - (time.monotonic() - began)
        if name in results and "failed" not in results[name] and not again:
            continue
        needs = SECTIONS[name].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            print(f"{name}: left out, {needs} is not installed", flush=True)
            continue
        if left < _LEAST_S:
            print(f"{name}: no time left; run it again with --only {name!r}", flush=True)
            continue
        results[name] = run_apart(name, card, min(left, SECTIONS[name].limit_s))
        atomic_write(out, (json.dumps(results, indent=1) + "\n").encode())
        atomic_write(out.with_suffix(".md"), table(results).encode())
        state = "failed" if "failed" in results[name] else "done"
        print(f"{name}: {state} after {time.monotonic() - began:.0f} s", flush=True)
    return results


def default_out(card: Card) -> Path:
    """`benchmarks/results/gpu/NVIDIA-H100-80GB-HBM3.json`, say."""
    name = torch.cuda.get_device_name() if card.is_gpu else "cpu"
    return RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help=f"default: the card's name in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=", ".join(SECTIONS))  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, few steps")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    card = Card(options.device, options.tiny)
    if card.is_gpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny tries the code without one")
    if options.section:
        atomic_write(options.out, json.dumps(run_section(options.section, card)).encode())
        return 0
    out = options.out or default_out(card)
    results = check(out, card, options.only, options.budget, options.again)
    print(out)
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
