"""A run's files in the store: checkpoints completely or not at all, the rest as it grows, and one writer at a time.

Every function takes local paths and does nothing for a run that is not mirrored (`pipeline.core.storage.url_of`). A
checkpoint's manifest is uploaded last and deleted first, so one without it was cut off and does not count, like on
disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import CheckpointError, ConfigError, InputError, RushesError
from pipeline.core.safe_paths import path_inside
from pipeline.core.storage import Store, is_url, local_folder, shown, url_of

MANIFEST = "MANIFEST.json"
LEASE = "WRITER.json"
INTERVAL_S = 20.0  # between uploads of what has grown; also how often the lease is renewed
STALE_S = 75.0  # a lease that is not renewed in this time belonged to a process that is gone
_OWN = ("checkpoints", "export", "exports")  # uploaded by who writes them
_STEP = re.compile(r"step-(\d{6,})")
_PARTS = re.compile(
    r"(?P<runs>[a-z][a-z0-9+.-]*://.*?)/(?P<name>[^/?]+)(?P<part>/checkpoints/step-\d+|/exports?(/[^/?]+)?|)/?(?P<query>\?.*|)"
)
log = logging.getLogger("rushes.storage")


def store_of(run: Path) -> Store | None:
    url = url_of(run)
    return Store(url) if url is not None else None


# ------------------------------------------------------------------------------------------------- checkpoints


def push_checkpoint(folder: Path, kept: list[Path]) -> None:
    """Uploads a complete local checkpoint, then deletes the store's that are neither it nor in `kept`. Returns once it
    is there: what is called saved can be resumed from anywhere. Raises `CheckpointError`."""
    store = store_of(folder.parent.parent)
    if store is None:
        return
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        below = f"checkpoints/{folder.name}"
        for name in [name for name in names if name != MANIFEST] + [MANIFEST]:
            store.upload(folder / name, f"{below}/{name}")
        keep = {folder.name, *(path.name for path in kept)}
        there = list(store.files("checkpoints"))
        gone = [name for name in there if name.split("/")[1] not in keep]
        for name in sorted(gone, key=lambda name: not name.endswith(MANIFEST)):
            store.delete(name)
    except RushesError as error:
        raise CheckpointError(f"checkpoint {folder} is complete on this node, but {error}") from error


def fetch_checkpoint(folder: Path) -> None:
    """Makes `folder` a local copy of the store's, unless it is there. A checkpoint that the store does not have
    completely is left for the caller to miss. Raises `RushesError`."""
    store = store_of(folder.parent.parent)
    if store is None or not _STEP.fullmatch(folder.name) or (folder / MANIFEST).exists():
        return
    below = f"checkpoints/{folder.name}"
    names = [name.removeprefix(f"{below}/") for name in store.files(below)]
    if MANIFEST not in names:
        return
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in names:
        store.download(f"{below}/{name}", _local(partial, name))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def fetch_newest_checkpoint(checkpoints: Path) -> None:
    """Fetches the store's newest complete checkpoint where the local ones are older; also files of that time."""
    store = store_of(checkpoints.parent)
    if store is None:
        return
    there = _steps(name for name in store.files("checkpoints") if name.count("/") == 2)
    here = _steps(path.relative_to(checkpoints.parent).as_posix() for path in checkpoints.glob(f"step-*/{MANIFEST}"))
    if there and max(there) > max(here, default=-1):
        fetch_checkpoint(checkpoints / there[max(there)])
        fetch_files(checkpoints.parent)


def _steps(names: Iterable[str]) -> dict[int, str]:
    """Step -> folder of the `checkpoints/step-N/MANIFEST.json` among the names; other folders are no checkpoints."""
    parts = [name.split("/") for name in names if name.endswith(f"/{MANIFEST}")]
    return {int(found[1]): part[1] for part in parts if (found := _STEP.fullmatch(part[1]))}


def _local(folder: Path, name: str) -> Path:
    """Where a file that the store lists goes: inside the folder, whatever links lie there. Raises `InputError`."""
    return path_inside(
        folder, name, f"a file in {shown(folder)}", "delete it in the store, or the link on this machine"
    )


# ------------------------------------------------------------------------------------------------- other files


def push_tree(folder: Path, run: Path) -> None:
    """Uploads all files below `folder`, such as an export. Raises `RushesError`."""
    store = store_of(run)
    if store is not None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            store.upload(path, path.relative_to(run).as_posix())


def exists(run: Path) -> bool:
    """Whether the store has a run of this path's name."""
    store = store_of(run)
    return store is not None and store.read("config.yaml") is not None


def fetch_files(run: Path) -> None:
    """Everything but checkpoints, exports and kept takes that is missing here or of another size: what a report and a
    resumed run read. Raises `RushesError`."""
    store = store_of(run)
    if store is None:
        return
    for name, size in store.files().items():
        parts = name.split("/")
        if parts[0] in (*_OWN, "takes", LEASE) or any(part.startswith(".") for part in parts):
            continue
        target = _local(run, name)
        if not target.exists() or target.stat().st_size != size:
            store.download(name, target)


def local_run(given: str | Path) -> Path:
    """A run, checkpoint or export for reading: a path as it is, a URL's local copy (the newest checkpoint of a run
    included). What a process of this node is writing is not touched. Raises `RushesError`."""
    from pipeline.runs.paths import RunDir, writer_of

    text = re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", str(given))  # Path has made one slash of two
    text = re.sub(r"^file://(?!/)", "file:///", text)
    if not is_url(text) or Path(given).exists():
        return Path(given)
    found = _PARTS.fullmatch(text)
    if not found or ".." in text.split("?")[0].split("/"):
        raise InputError(f"{text}: names no run; give its folder and its name, such as s3://bucket/runs/NAME")
    try:
        run = local_folder(found["runs"] + found["query"]) / found["name"]
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from None
    path = run / found["part"].strip("/")
    if writer_of(RunDir(run)) is not None:
        return path
    store = store_of(run)
    assert store is not None  # it is a URL
    if not exists(run):
        raise InputError(f"{text}: there is no run (no config.yaml in {shown(run)}); check the URL")
    fetch_files(run)
    if path.parent.name == "checkpoints":
        fetch_checkpoint(path)
    elif path == run:
        fetch_newest_checkpoint(run / "checkpoints")
    else:
        for name in store.files(path.relative_to(run).as_posix()):
            store.download(name, _local(run, name))
    return path


class RemoteSync:
    """Holds the run's lease in the store and uploads what has changed, in a thread. `close` uploads the rest."""

    def __init__(self, run: Path, writer: str) -> None:
        self.run, self.writer = run, writer
        self._store = store_of(run)
        self._sent: dict[str, tuple[int, int]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def open(self) -> RemoteSync:
        """Takes the lease; waits for one whose owner may be gone. Raises `RushesError` naming an owner who is not."""
        if self._store is None:
            return self
        seen, since = self._store.read(LEASE), time.monotonic()
        if seen is not None and not _may_live(seen):
            seen = None
        if seen is not None:
            log.warning("%s may still be written by %s; waiting for a sign of it", shown(self.run), _owner(seen))
        while seen is not None and time.monotonic() - since < STALE_S:
            time.sleep(min(5.0, STALE_S / 4))
            now = self._store.read(LEASE)
            if now is not None and now != seen:
                raise RushesError(
                    f"run {self.run.name} is being written by {_owner(now)} (in {shown(self.run)}); wait for it, stop "
                    "it, or use another run.name"
                )
            seen = now
        self._renew()
        self._thread.start()
        return self

    def _renew(self) -> None:
        assert self._store is not None
        self._store.write(LEASE, json.dumps({"writer": self.writer, "time": time.time()}).encode())

    def _loop(self) -> None:
        while not self._done.wait(INTERVAL_S):
            try:
                self._renew()
                self.push()
            except RushesError as error:  # the next round tries again; a checkpoint's upload says more
                log.warning("not mirrored for now: %s", error)

    def push(self) -> None:
        """Uploads files that have changed since this was last called. Raises `RushesError`."""
        if self._store is None:
            return
        for path in sorted(self.run.rglob("*")):
            name = path.relative_to(self.run)
            if name.parts[0] in _OWN or any(part.startswith(".") for part in name.parts) or not path.is_file():
                continue
            state = path.stat()
            print_of = (state.st_size, state.st_mtime_ns)
            if self._sent.get(name.as_posix()) != print_of:
                self._store.upload(path, name.as_posix())
                self._sent[name.as_posix()] = print_of

    def close(self) -> None:
        """Uploads what is left and gives up the lease. Raises `RushesError`."""
        if self._store is None or self._done.is_set():
            return
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.push()
        self._store.delete(LEASE)


def _may_live(lease: bytes) -> bool:
    """Not one of this node, whose writer would hold the folder's lock, nor one that has not been renewed for long."""
    try:
        found = json.loads(lease)
        return not found["writer"].endswith(f" on {os.uname().nodename}") and time.time() - found["time"] < 600
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def _owner(lease: bytes) -> str:
    try:
        return str(json.loads(lease)["writer"])
    except (ValueError, KeyError, TypeError):
        return "another process"
