"""Atomic checkpoints: written to a temporary folder, synced, then renamed; a manifest with checksums is written last.

    checkpoints/step-000025/
        tensors.safetensors   everything that is a tensor (trained weights, optimiser moments, EMA)
        state.json            {"learner": {...}, "controller": {...}}
        identity.json         the config values that a resume must share
        MANIFEST.json         sizes and sha256 of the files above; without it a folder does not count

Under a `run.dir` that is a URL, a checkpoint counts as saved once it is in the store too (`pipeline.runs.remote_sync`).

A folder without a manifest was interrupted while being written or deleted, and is skipped. One whose files do not match
its manifest is corrupt: a resume takes the store's copy of it or the newest good one before, and says so. No pickle.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.core.errors import CheckpointError, InputError
from pipeline.core.files import describe_os_error, sync
from pipeline.core.prompts import content_digest, load_prompts
from pipeline.core.reading import read_json_object, shown
from pipeline.core.records import check_record
from pipeline.core.safe_paths import file_inside
from pipeline.core.secrets import mask_tree
from pipeline.runs import remote_sync
from pipeline.runs.records import IdentityRecord, read_state_file

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST, TENSORS, STATE, IDENTITY = remote_sync.MANIFEST, "tensors.safetensors", "state.json", "identity.json"
_NAME = re.compile(r"step-(\d{6,})$")
_PARTIAL = re.compile(r"\.partial-step-\d+-\d+|\..+\.\d+\.partial")
log = logging.getLogger("rushes.checkpoint")


def identity(cfg: Config) -> dict[str, Any]:
    """The config values that must not change between a run and its resume: they decide which takes are drawn and what
    they train. Prompt sets count by what they hold (`prompts_of`), a local generator by where its path leads."""
    plain = cfg.model_dump(mode="json")
    sections = {
        name: plain[name] for name in ("generator", "trainable", "source", "signal", "objective", "step", "sampler")
    }
    for name in ("embedding_cache", "offload"):  # no effect on the result
        sections["generator"].pop(name)
    sections["generator"]["pretrained"] = resolved(cfg.generator.pretrained)
    return {**sections, "run": {"seed": cfg.run.seed}}


def resolved(pretrained: str) -> str:
    """The absolute path of a local folder, links followed; a hub id as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained


def prompts_of(cfg: Config) -> dict[str, str]:
    """`prompts.train` and `prompts.heldout` -> digest of what the file held when this process first read it; a file
    that cannot be read is left out."""
    files = {"prompts.train": cfg.prompts.train, "prompts.heldout": cfg.prompts.heldout}
    digests = {key: _prompts_digest(Path(path).absolute()) for key, path in files.items() if path is not None}
    return {key: digest for key, digest in digests.items() if digest is not None}


@functools.lru_cache(maxsize=16)
def _prompts_digest(path: Path) -> str | None:
    try:
        return content_digest(load_prompts(path))
    except InputError:
        return None


def changes(old: Config, new: Config) -> list[str]:
    """'optimizer.lr: 0.0001 -> 0.001' for each key with another value, but for paths that lead to the same."""
    before, after = mask_tree(old.model_dump(mode="json")), mask_tree(new.model_dump(mode="json"))
    before["generator"]["pretrained"] = resolved(old.generator.pretrained)
    after["generator"]["pretrained"] = resolved(new.generator.pretrained)
    for plain in (before, after):
        plain.pop("prompts")  # `check_config` compares what they hold
        for key in ("name", "dir"):
            plain["run"].pop(key)
    return [
        f"{difference.key}: {json.dumps(difference.old)} -> {json.dumps(difference.new)}"
        for difference in _differences(before, after)
    ]


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Difference:
    """A config key with another value than the checkpoint's."""

    key: str
    old: Any
    new: Any


def _differences(old: Any, new: Any, key: str = "") -> list[_Difference]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [_Difference(key, old, new)]
    names = [*old, *(name for name in new if name not in old)]
    return [
        difference
        for name in names
        for difference in _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    ]


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    learner: Mapping[str, Any],
    controller: Mapping[str, Any],
    cfg: Config,
    keep: int,
    best: int | None = None,
) -> Path:
    """Writes `root/step-<step>` completely or not at all, then deletes all but the newest `keep` and that of `best`.

    `learner` and `controller` must be JSON-able. Raises `CheckpointError` (disk full, no permission) with the
    previous checkpoint untouched.
    """
    from safetensors.torch import save_file

    final, partial = folder_of(root, step), root / f".partial-step-{step:06d}-{os.getpid()}"
    resumable = identity(cfg)
    texts = {
        STATE: json.dumps({"learner": learner, "controller": controller}, allow_nan=True),
        IDENTITY: json.dumps({"digest": _digest(resumable), "config": resumable, "prompts": prompts_of(cfg)}, indent=1),
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        for name, text in texts.items():
            (partial / name).write_text(text)
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        for path in (*partial.iterdir(), partial):
            sync(path)
        if final.exists():  # the same step again (stopped right after a periodic save): replace it
            _remove(final)
        os.rename(partial, final)
        sync(root)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = _os_error(error)
        if cause is None:
            raise
        last = next((p for p in complete(root) if p != final), None)
        kept = f"the previous checkpoint {last} is intact" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write checkpoint {describe_os_error(cause, final)} ({kept})") from error
    _prune(root, keep, best)
    remote_sync.push_checkpoint(final, complete(root))
    return final


def _os_error(error: Exception) -> OSError | None:
    """The system's error behind an exception: safetensors raises its own kind for a full disk."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)|code: (\d+)", str(error))
    if type(error).__name__ == "SafetensorError" and code:
        number = int(code.group(1) or code.group(2))
        return OSError(number, os.strerror(number))
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _remove(folder: Path) -> None:
    """Deletes the manifest first: a kill half-way leaves the folder incomplete, not corrupt."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _prune(root: Path, keep: int, best: int | None) -> None:
    for folder in complete(root)[keep:]:
        try:
            if step_of(folder) != best:
                _remove(folder)
        except OSError as error:
            log.warning("old checkpoint not deleted: %s", describe_os_error(error, folder))


def complete(root: Path) -> list[Path]:
    """Folders with a manifest, newest first. Others are remains of an interrupted save."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if _NAME.match(path.name) and path.is_dir()]
    for path in folders:
        if not (path / MANIFEST).exists():
            log.warning("%s has no %s (it was interrupted): skipped", path, MANIFEST)
    finished = [path for path in folders if (path / MANIFEST).exists()]
    return sorted(finished, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the folder's name; -1 where it is not a checkpoint's name."""
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else -1


def verify(folder: Path) -> None:
    """Compares every file with the manifest. Raises `CheckpointError` naming the previous good checkpoint."""
    problem = _problem(folder)
    if problem is None:
        return
    older = [p for p in complete(folder.parent) if step_of(p) < step_of(folder)] if _NAME.match(folder.name) else []
    good = next((path for path in older if _problem(path) is None), None)
    advice = (
        f"the previous good one is {good}; use that one"
        if good
        else "there is no earlier good one; delete the folder to start over"
    )
    raise CheckpointError(f"checkpoint {folder} is corrupt: {problem}; {advice}")


def _problem(folder: Path) -> str | None:
    try:
        manifest = read_json_object(folder / MANIFEST, "copy the checkpoint again")
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {shown(manifest['format'])}, this version of Rushes reads {FORMAT}"
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if not all(isinstance(size, int) and isinstance(checksum, str) for size, checksum in files.values()):
            raise TypeError
    except InputError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable JSON of the expected form"
    missing = {TENSORS, STATE, IDENTITY} - set(files)
    if missing:
        return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
    for name, (size, sha) in files.items():
        try:
            path = file_inside(folder, name, MANIFEST, "copy the checkpoint again")
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if _fingerprint(path)["sha256"] != sha:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except InputError as error:
            return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint that can be used, and a line for each corrupt one that was passed over or replaced."""

    folder: Path | None
    notes: list[str]


def newest(root: Path, writing: bool = False) -> Newest:
    """The newest good checkpoint, here or in the store, every byte checked; no folder when there is no checkpoint.

    A corrupt one is replaced by the store's copy if that is good, else passed over. `writing`: the caller writes the
    run, so that corrupt ones are renamed to `corrupt-step-N`: they would count as the newest ones that are kept. Raises
    `CheckpointError` when all are corrupt.
    """
    remote_sync.fetch_newest_checkpoint(root)
    local = {folder.name: folder for folder in complete(root)}
    candidates = local | {name: root / name for name in remote_sync.stored_checkpoints(root)}
    corrupt: dict[Path, str] = {}
    notes = []
    for folder in sorted(candidates.values(), key=step_of, reverse=True):
        if folder.name not in local:
            remote_sync.fetch_checkpoint(folder)
        problem = _problem(folder)
        if problem is None:
            break
        if remote_sync.replace_checkpoint(folder, lambda copy: _problem(copy) is None):
            notes.append(f"checkpoint {folder.name} was corrupt here ({problem}); its copy in the store is used")
            break
        corrupt[folder] = problem
    else:
        if not corrupt:
            return Newest(None, [])
        listed = "; ".join(f"checkpoint {folder} is corrupt: {problem}" for folder, problem in corrupt.items())
        raise CheckpointError(f"{listed}; there is no earlier good one: copy it again, or delete the folder")
    for bad, problem in corrupt.items():
        aside = bad.with_name(f"corrupt-{bad.name}")
        if writing and bad.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(bad, aside)
        notes.append(
            f"checkpoint {bad.name} is corrupt ({problem}); continuing from {folder.name}"
            + (f" ({bad.name} is now {aside.name})" if writing else "")
        )
    return Newest(folder, notes)


def latest(root: Path, writing: bool = False) -> Path | None:
    """The folder of `newest`, whose notes are logged."""
    found = newest(root, writing)
    for note in found.notes:
        log.warning("%s", note)
    return found.folder


def remove_partial(run: Path) -> None:
    """Deletes what killed processes left half-written in a run's folder: saves, downloads, exports, files. The caller
    holds the run's lock, and no other process of the run is alive."""
    for folder, folders, files in os.walk(run):
        for name in [name for name in folders if _PARTIAL.fullmatch(name)]:
            log.info("removing %s, which was interrupted", Path(folder, name))
            shutil.rmtree(Path(folder, name), ignore_errors=True)
            folders.remove(name)
        for name in [name for name in files if _PARTIAL.fullmatch(name)]:
            Path(folder, name).unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """{"learner": ..., "controller": ...} without reading any tensor."""
    remote_sync.fetch_checkpoint(folder)
    return read_state_file(folder / STATE)


def _with_defaults(old: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """`old` as this version would have written it, with the defaults of keys that did not exist yet."""
    try:
        plain = cfg.model_dump(mode="json")
        return identity(Config.model_validate({"prompts": plain["prompts"], **old, "rewards": plain["rewards"]}))
    except ValueError:  # a key or value that no longer exists
        return {name: section for name, section in old.items() if name != "prompts"}


def check_config(folder: Path, cfg: Config) -> None:
    """Refuses to resume with another config. Raises `CheckpointError` naming the first key that differs."""
    saved = read_json_object(folder / IDENTITY, "copy the checkpoint again", error=CheckpointError)
    check_record(IdentityRecord, saved, str(folder / IDENTITY), CheckpointError)
    old, digest = saved["config"], saved["digest"]
    _prompts_digest.cache_clear()
    new, contents = identity(cfg), prompts_of(cfg)
    for key, content in saved.get("prompts", {}).items():
        if contents.get(key, content) != content:
            raise CheckpointError(
                f"cannot resume from {folder}: {key} ({getattr(cfg.prompts, key.partition('.')[2], None)}) holds other "
                "prompts than when it was saved; restore the file, or start a new run"
            )
    if digest == _digest(new):
        return
    changed = _differences(_with_defaults(old, cfg), new)
    if not changed:
        return  # written by a version that lacked some keys
    first, *others = changed
    also = f" (also {', '.join(other.key for other in others[:3])})" if others else ""
    raise CheckpointError(
        f"cannot resume from {folder}: {first.key} was {json.dumps(first.old)} and is now "
        f"{json.dumps(first.new)}{also}; use the value it was started with, or start a new run"
    )


def load(folder: Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, {"learner": ..., "controller": ...}), after checking every byte. Raises `CheckpointError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remote_sync.fetch_checkpoint(folder)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist; check the path")
    verify(folder)
    try:
        return load_file(folder / TENSORS, device=device), read_state(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder}: {TENSORS} cannot be read: {error}") from error
