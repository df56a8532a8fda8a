"""The examples of docs/extending.md: each part is found by being a file in its folder, and its test passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from doc_examples import ROOT, doc_examples

# The example's folders become part of the packages, as if the files lay in the repository.
CONFTEST = """
import importlib
from pathlib import Path

for package in ("pipeline.rewards.scorers", "pipeline.rl.samplers", "pipeline.rl.objectives",
                "pipeline.rl.signals", "pipeline.rl.sources", "jobs.commands"):
    module = importlib.import_module(package)
    module.__path__.append(str(Path(__file__).parent.joinpath(*package.split("."))))
importlib.import_module("pipeline.rewards.scorers.colourfulness")  # names are read from the repository's own folder
"""


def test_every_example_passes_its_test(tmp_path):
    examples = doc_examples()
    tests = [path for path in examples if path.startswith("tests/")]
    parts = [path for path in examples if path not in tests]
    assert {Path(path).parent.as_posix() for path in parts} == {
        "pipeline/rewards/scorers",
        "pipeline/rl/samplers",
        "pipeline/rl/objectives",
        "pipeline/rl/signals",
        "pipeline/rl/sources",
        "jobs/commands",
    }
    assert len(tests) == len(parts)
    for path, source in examples.items():
        assert not (ROOT / path).exists(), f"{path} is no example any more: it is there"
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", *options, "--confcutdir", str(tmp_path), str(tmp_path / "tests")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
