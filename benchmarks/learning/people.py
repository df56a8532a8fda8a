"""People in the loop, whole: takes, answers in a real browser, a reward fitted to them, a run that learns from it.

    python -m benchmarks.learning.people [--folder FOLDER] [--pairs 200] [--errors 0.1] [--seed 0] [--steps 30]

The commands are those of docs/labels.md. In the place of a person a script looks at the page in a headless Chromium: it
reads the prompt and the pixels that are shown, judges them by the scene checker, presses a key, and errs now and then.
The run is then judged by the same checker on held-out prompts. Results are merged into benchmarks/results/people.json.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.browser import Browser, Page
from benchmarks.learning.samples import ROOT
from pipeline.core.files import atomic_write
from pipeline.rewards.scorers.scene import check_image

RESULTS = ROOT / "benchmarks/results/people.json"
CONFIG = "configs/quickstart-image.yaml"
PROMPTS = "configs/prompts/image-train.txt"
BASE = "models/shapes-clip"
READY = "document.getElementById('skip')?.disabled === false && document.body.dataset.task"
COUNT = "document.getElementById('count').textContent"
DONE = "(document.getElementById('prompt')?.textContent ?? '').includes('judged')"
# The prompt, and the pixels of what is shown left and right.
LOOK = """({prompt: document.getElementById('prompt').textContent,
  takes: [...document.querySelectorAll('#takes > *')].map(shown => {
    const canvas = document.createElement('canvas');
    canvas.width = shown.naturalWidth; canvas.height = shown.naturalHeight;
    const brush = canvas.getContext('2d'); brush.drawImage(shown, 0, 0);
    return {height: canvas.height, pixels: [...brush.getImageData(0, 0, canvas.width, canvas.height).data]}; })})"""


def rushes(*args: object) -> str:
    """Standard output of a command, which must succeed."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"rushes {' '.join(command[3:])}: {done.stderr.strip()[-500:]}")
    return done.stdout


class Person:
    """Prefers the picture that shows more of what its prompt says, finds equal ones a tie, and presses the wrong key
    with probability `errors`."""

    def __init__(self, errors: float, seed: int) -> None:
        self.errors, self.rng = errors, np.random.default_rng(seed)
        self.answers = self.wrong = 0

    def key(self, prompt: str, left: np.ndarray, right: np.ndarray) -> str:
        """`left`, `right`: uint8 [H, W, 3]."""
        credits = [float(np.mean(list(check_image(take, prompt).values()))) for take in (left, right)]
        keys = ["ArrowLeft", "ArrowRight", " "]
        key = " " if abs(credits[0] - credits[1]) < 1e-6 else keys[int(credits[1] > credits[0])]
        self.answers += 1
        if self.rng.random() < self.errors:
            self.wrong += 1
            keys.remove(key)
            key = keys[self.rng.integers(2)]
        return key


def picture(shown: dict[str, Any]) -> np.ndarray:
    """RGBA values of a canvas -> uint8 [H, W, 3]."""
    return np.asarray(shown["pixels"], np.uint8).reshape(shown["height"], -1, 4)[..., :3]


def answer_all(page: Page, person: Person) -> None:
    """Judges whatever the page shows until it says that all is judged."""
    page.wait(READY)
    while not page.value(DONE):
        seen, count = page.value(LOOK), page.value(COUNT)
        page.key(person.key(seen["prompt"], *map(picture, seen["takes"])))
        page.wait(f"{COUNT} != {count!r} && document.getElementById('status').textContent == ''")
        page.wait(f"{READY} || {DONE}")


def label(takes: Path, pairs: int, person: Person, profile: Path) -> str:
    """`rushes label`, answered in a browser. Returns what the command printed."""
    command = [sys.executable, "-m", "jobs.cli", "label", str(takes), "--rater", "ada", "--pairs", str(pairs)]
    command += ["--repeats", "0.1", "--port", "0"]
    serving = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert serving.stdout is not None
    try:
        lines: list[str] = []
        while not (found := re.match(r"ada: (http://\S+)", lines[-1] if lines else "")):
            lines.append(serving.stdout.readline())
            if not lines[-1]:
                raise RuntimeError(f"rushes label ended: {''.join(lines)[-500:]}")
        with Browser(profile) as browser:
            answer_all(browser.open(found.group(1)), person)
        serving.send_signal(signal.SIGTERM)
        return "".join(lines) + serving.communicate(timeout=60)[0]
    finally:
        serving.kill()
        serving.wait()


def fit(takes: Path, reward: Path) -> dict[str, Any]:
    """`rushes fit-reward`. Returns its fit.json."""
    rushes("fit-reward", takes / "labels.parquet", "--base", BASE, "--out", reward)
    return json.loads((reward / "fit.json").read_text())


def overrides(reward: Path, steps: int, seed: int) -> list[str]:
    """Of the config: learn from the fitted reward, watch the checker."""
    return [
        "rewards.scene.weight=0", "rewards.people.scorer=fitted_clip", f"rewards.people.args.path={reward}",
        f"run.steps={steps}", f"run.seed={seed}",
    ]  # fmt: skip


def train(folder: Path, reward: Path, steps: int, seed: int) -> dict[str, Any]:
    """`rushes train`. Returns the rewards of its first and its last evaluation."""
    rushes("train", CONFIG, f"run.dir={folder}", "run.name=run", *overrides(reward, steps, seed))
    evaluations = [json.loads(line) for line in (folder / "run/evals.jsonl").read_text().splitlines()]
    changes = evaluations[-1]["changes"]["rewards"]
    return {
        name: {
            "before": round(evaluations[0]["rewards"][name]["mean"], 4),
            "after": round(evaluations[-1]["rewards"][name]["mean"], 4),
            "se": round(changes[name]["se"], 4),
        }
        for name in ("scene", "people")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/people"))
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--errors", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    folder = options.folder.absolute()
    takes, reward = folder / "takes", folder / f"reward-{options.seed}"
    times = {}

    def timed(name: str, call: Any, *args: Any) -> Any:
        started = time.monotonic()
        result = call(*args)
        times[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {times[name]} s", file=sys.stderr, flush=True)
        return result

    if not (takes / "takes.parquet").exists():
        timed("generate", rushes, "generate", CONFIG, "--prompts", PROMPTS, "--takes", 2, "--out", takes)
    person = Person(options.errors, options.seed)
    print(timed("label", label, takes, options.pairs, person, folder / "profile"), file=sys.stderr)
    fitted = timed("fit", fit, takes, reward)
    rewards = timed("train", train, folder, reward, options.steps, options.seed)
    result = {
        "pairs": options.pairs, "answers": person.answers, "wrong": person.wrong, "seed": options.seed,
        "steps": options.steps, "fit": {key: fitted[key] for key in ("pairs", "ties", "accuracy", "base_accuracy")},
        "rewards": rewards, "seconds": times,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    atomic_write(RESULTS, (json.dumps([*runs, result], indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
