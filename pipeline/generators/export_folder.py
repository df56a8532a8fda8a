"""The folder of an export: how plain diffusers loads it, and that it replaces earlier exports only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.generators.checkpoint_files import ADAPTER_FILE, LORA_FILE, lora_files, styled_files

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "run.log")


def load_lines(folder: Path, where: str = ".") -> list[str]:
    """The lines of Python that load an export in the format lora into `pipe`; [] for others. `where`: the folder, or
    the hub repository, as the lines name it."""
    return [_load_line(path, folder, where) for path in lora_files(folder)]


def copy_line(folder: Path) -> str:
    """Where the files of an export in another key style go."""
    files = ", ".join(path.name for path in styled_files(folder))
    return f"copy {files} to ComfyUI's models/loras, or the models/Lora of A1111 and Forge"


def _load_line(path: Path, folder: Path, where: str) -> str:
    name = path.parent.name
    if path.parent == folder:
        return f'pipe.load_lora_weights("{where}")'
    part = f'"{name}"' if where == "." else f'"{where}", subfolder="{name}"'
    if path.name == LORA_FILE:
        return f"pipe.{name}.load_lora_adapter({part}, prefix=None, use_safetensors=True)"
    return f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {part}).merge_and_unload()"


def check_replaceable(folder: Path, key: str, needed: Sequence[Path]) -> None:
    """Raises `ConfigError` unless `folder` holds an export and none of `needed` (files that are still used: the
    checkpoint, the generator), the working folder, or the home folder. Deletes nothing."""
    home = folder.resolve()
    for path in (Path.cwd(), Path.home(), *needed):
        if path.exists() and path.resolve().is_relative_to(home):
            raise ConfigError(f"{key} {folder}: holds {path}, which --force would delete; choose another folder")
    for path in needed:
        if path.exists() and home.is_relative_to(path.resolve()):
            raise ConfigError(
                f"{key} {folder}: lies in {path}, which is not an export's to change; choose another folder"
            )
    if folder.is_symlink():
        raise ConfigError(f"{key} {folder}: is a link to {home}; give that folder itself, or remove the link")
    names = {path.name for path in folder.iterdir()}
    kept = sorted(names.intersection(_OF_A_RUN))
    made = "model_index.json" in names or LORA_FILE in names or any(folder.glob(f"*/{ADAPTER_FILE}"))
    made = made or bool(styled_files(folder))
    made = made or ("README.md" in names and any(folder.glob(f"*/{LORA_FILE}")))
    if kept or not made:
        problem = f"holds a run ({kept[0]})" if kept else "holds something else than an export"
        raise ConfigError(
            f"{key} {folder}: {problem}; --force replaces exports only: choose another folder, or empty it"
        )
