"""Mirrors a run to the store of a `run.dir` that is a URL, and fetches it from there on other machines.

Checkpoints are uploaded as a whole, other files as they grow, by one writer at a time. Every function takes local paths
and does nothing for a run that is not mirrored (`pipeline.core.storage.url_of`). A checkpoint's manifest is uploaded
last and deleted first: as on disk, a checkpoint without one is incomplete and does not count.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.core.errors import CheckpointError, ConfigError, InputError, RushesError
from pipeline.core.reading import parse_json_object
from pipeline.core.safe_paths import path_inside
from pipeline.core.storage import Store, display_path, is_url, local_folder, url_of
from pipeline.runs.lock import this_process, writer_of
from pipeline.runs.paths import RunDir

MANIFEST = "MANIFEST.json"
LEASE = "WRITER.json"
CONFIRM_S = 1.0  # after which a lease that was taken is read back
INTERVAL_S = 20.0  # between uploads of changed files; also how often the lease is renewed
STALE_S = 75.0  # a lease that is not renewed for this long belonged to a process that has died
_UPLOADED_BY_THEIR_WRITERS = ("checkpoints", "export", "exports")
_STEP = re.compile(r"step-(\d{6,})")
_RUN_URL = re.compile(
    r"(?P<runs>[a-z][a-z0-9+.-]*://.*?)/(?P<name>[^/?]+)(?P<part>/checkpoints/step-\d+|/exports?(/[^/?]+)?|)/?(?P<query>\?.*|)"
)
log = logging.getLogger("rushes.storage")


def store_of(run: Path) -> Store | None:
    """The store that the run's folder is mirrored to, or None."""
    url = url_of(run)
    return Store(url) if url is not None else None


# ------------------------------------------------------------------------------------------------- checkpoints


def push_checkpoint(folder: Path, kept: list[Path]) -> None:
    """Uploads a complete local checkpoint, then deletes those in the store that are neither it nor in `kept`. Blocks
    until it is uploaded: a saved checkpoint can be resumed from any machine. Raises `CheckpointError`."""
    store = store_of(folder.parent.parent)
    if store is None:
        return
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        below = f"checkpoints/{folder.name}"
        for name in [name for name in names if name != MANIFEST] + [MANIFEST]:
            store.upload(folder / name, f"{below}/{name}")
        keep = {folder.name, *(path.name for path in kept)}
        outdated = [name for name in store.files("checkpoints") if name.split("/")[1] not in keep]
        for name in sorted(outdated, key=lambda name: not name.endswith(MANIFEST)):
            store.delete(name)
    except RushesError as error:
        raise CheckpointError(f"checkpoint {folder} is complete on this node, but {error}") from error


def fetch_checkpoint(folder: Path) -> None:
    """Downloads a checkpoint to `folder`, unless it is there already or incomplete in the store (the caller then finds
    no folder). Raises `RushesError`."""
    store = store_of(folder.parent.parent)
    if store is None or not _STEP.fullmatch(folder.name) or (folder / MANIFEST).exists():
        return
    partial = _download(store, folder)
    if partial is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)


def replace_checkpoint(folder: Path, is_good: Callable[[Path], bool]) -> bool:
    """Replaces a corrupt local checkpoint by the store's copy, if that `is_good`. Returns whether it did."""
    store = store_of(folder.parent.parent)
    partial = _download(store, folder) if store is not None else None
    if partial is None:
        return False
    if not is_good(partial):
        shutil.rmtree(partial, ignore_errors=True)
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return True


def _download(store: Store, folder: Path) -> Path | None:
    """The store's copy of a checkpoint, in a folder beside it; None when it is incomplete there."""
    below = f"checkpoints/{folder.name}"
    names = [name.removeprefix(f"{below}/") for name in store.files(below)]
    if MANIFEST not in names:
        return None
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in names:
        store.download(f"{below}/{name}", _local(partial, name))
    return partial


def stored_checkpoints(checkpoints: Path) -> list[str]:
    """Names of the complete checkpoints in the store; [] for a run that is not mirrored."""
    store = store_of(checkpoints.parent)
    return [] if store is None else list(_steps(store.files("checkpoints")).values())


def fetch_newest_checkpoint(checkpoints: Path) -> None:
    """Downloads the store's newest complete checkpoint if the local ones are older, and the run's other files with
    it."""
    store = store_of(checkpoints.parent)
    if store is None:
        return
    remote = _steps(name for name in store.files("checkpoints") if name.count("/") == 2)
    local = _steps(path.relative_to(checkpoints.parent).as_posix() for path in checkpoints.glob(f"step-*/{MANIFEST}"))
    if remote and max(remote) > max(local, default=-1):
        fetch_checkpoint(checkpoints / remote[max(remote)])
        fetch_files(checkpoints.parent)


def _steps(names: Iterable[str]) -> dict[int, str]:
    """Step -> folder of the `checkpoints/step-N/MANIFEST.json` among the names; other folders are no checkpoints."""
    parts = [name.split("/") for name in names if name.endswith(f"/{MANIFEST}")]
    return {int(match[1]): part[1] for part in parts if (match := _STEP.fullmatch(part[1]))}


def _local(folder: Path, name: str) -> Path:
    """Where a file that the store lists goes: inside the folder, whatever links lie there. Raises `InputError`."""
    return path_inside(
        folder, name, f"a file in {display_path(folder)}", "delete it in the store, or the link on this machine"
    )


# ------------------------------------------------------------------------------------------------- other files


def push_tree(folder: Path, run: Path) -> None:
    """Uploads all files below `folder`, such as an export. Raises `RushesError`."""
    push_files(sorted(path for path in folder.rglob("*") if path.is_file()), run)


def push_files(paths: Iterable[Path], run: Path) -> None:
    """Uploads files of the run's folder. Raises `RushesError`."""
    store = store_of(run)
    if store is not None:
        for path in paths:
            store.upload(path, path.relative_to(run).as_posix())


def exists(run: Path) -> bool:
    """Whether the store has a run of this path's name."""
    store = store_of(run)
    return store is not None and store.read("config.yaml") is not None


def fetch_files(run: Path) -> None:
    """Downloads what a report and a resumed run read: all files that are missing here or differ in size, but no
    checkpoints, exports and training takes. Raises `RushesError`."""
    store = store_of(run)
    if store is None:
        return
    for name, size in store.files().items():
        parts = name.split("/")
        if parts[0] in (*_UPLOADED_BY_THEIR_WRITERS, "takes", LEASE) or any(part.startswith(".") for part in parts):
            continue
        target = _local(run, name)
        if not target.exists() or target.stat().st_size != size:
            store.download(name, target)


def local_run(given: str | Path) -> Path:
    """A run, checkpoint or export for reading: a path as it is, or the local copy of a URL (with a run's newest
    checkpoint). A run that a process of this node is writing is not touched. Raises `RushesError`."""
    text = re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", str(given))  # Path has made one slash of two
    text = re.sub(r"^file://(?!/)", "file:///", text)
    if not is_url(text) or Path(given).exists():
        return Path(given)
    match = _RUN_URL.fullmatch(text)
    if not match or ".." in text.split("?")[0].split("/"):
        raise InputError(f"{text}: names no run; give its folder and its name, such as s3://bucket/runs/NAME")
    try:
        run = local_folder(match["runs"] + match["query"]) / match["name"]
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from None
    path = run / match["part"].strip("/")
    if writer_of(RunDir(run)) is not None:
        return path
    store = store_of(run)
    assert store is not None  # it is a URL
    if not exists(run):
        raise InputError(f"{text}: there is no run (no config.yaml in {display_path(run)}); check the URL")
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
    """`with RemoteSync(run):` holds the run's lease in the store and uploads changed files, in a thread; leaving it
    uploads the rest. The run's local lock (`pipeline.runs.lock`) must be held."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._store, self._me, self._place = store_of(run.path), this_process(), _place(run)
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> size and mtime
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="remote sync", daemon=True)

    def __enter__(self) -> RemoteSync:
        """Takes the lease. Raises `RushesError` naming another machine's process that holds it."""
        if self._store is not None:
            self._wait_for_the_lease(self._store)
            self._renew()
            time.sleep(CONFIRM_S)
            lease = self._store.read(LEASE)
            if lease is not None and _field(lease, "place") != self._place:  # the last of those who start at once stays
                raise self._taken(lease)
            self._thread.start()
        return self

    def _taken(self, lease: bytes) -> RushesError:
        return RushesError(
            f"run {self.run.name} is being written by {_writer(lease)} (in {display_path(self.run.path)}); "
            "wait for it, stop it, or use another run.name"
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises `RushesError` when the last files cannot be uploaded."""
        try:
            self._close()
        except RushesError as error:
            if kind is None:
                raise
            log.error("%s", error)  # must not mask the exception that ended the run

    def _wait_for_the_lease(self, store: Store) -> None:
        """Returns once nobody renews the lease. Its own time says nothing: the writer's clock may be wrong."""
        lease, since = store.read(LEASE), time.monotonic()
        if lease is None or _field(lease, "place") == self._place:  # its writer would hold the local lock
            return
        log.warning(
            "%s may still be written by %s; waiting to see whether it renews its lease",
            display_path(self.run.path),
            _writer(lease),
        )
        while lease is not None and time.monotonic() - since < STALE_S:
            time.sleep(min(5.0, STALE_S / 4))
            current = store.read(LEASE)
            if current is not None and current != lease:
                raise self._taken(current)
            lease = current

    def _renew(self) -> None:
        assert self._store is not None
        lease = {"writer": self._me, "place": self._place, "time": time.time()}
        self._store.write(LEASE, json.dumps(lease).encode())

    def _loop(self) -> None:
        while not self._done.wait(INTERVAL_S):
            try:
                self._renew()
                self.push()
            except RushesError as error:  # retried in the next round; a checkpoint that is not uploaded is an error
                log.warning("not mirrored for now: %s", error)

    def push(self) -> None:
        """Uploads files that have changed since this was last called. Raises `RushesError`."""
        if self._store is None:
            return
        for path in sorted(self.run.path.rglob("*")):
            name = path.relative_to(self.run.path)
            if (
                name.parts[0] in _UPLOADED_BY_THEIR_WRITERS
                or any(part.startswith(".") for part in name.parts)
                or not path.is_file()
            ):
                continue
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if self._uploaded.get(name.as_posix()) != version:
                self._store.upload(path, name.as_posix())
                self._uploaded[name.as_posix()] = version

    def _close(self) -> None:
        """Uploads the rest and gives up the lease."""
        if self._store is None or self._done.is_set():
            return
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.push()
        self._store.delete(LEASE)


def _place(run: RunDir) -> str:
    """Names the local lock, as no other machine's or container's: two of them may have the same host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        lock = run.lock.stat()
    except OSError:
        return uuid.uuid4().hex
    return f"{os.uname().nodename} {boot} {lock.st_dev}:{lock.st_ino}"


def _field(lease: bytes, name: str) -> str | None:
    """A text of a lease; None for a lease of another version, or for what is none."""
    try:
        value = parse_json_object(lease, LEASE, "delete it")[name]
    except (InputError, KeyError):
        return None
    return value if isinstance(value, str) else None


def _writer(lease: bytes) -> str:
    return _field(lease, "writer") or "another process"
