"""What an export may replace: an earlier export, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.generators.checkpoint_files import ADAPTER_FILE, LORA_FILE

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "run.log")


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
    made = made or ("README.md" in names and any(folder.glob(f"*/{LORA_FILE}")))
    if kept or not made:
        problem = f"holds a run ({kept[0]})" if kept else "holds something else than an export"
        raise ConfigError(
            f"{key} {folder}: {problem}; --force replaces exports only: choose another folder, or empty it"
        )
