"""Files under a URL: in object stores, and wherever else pyarrow or fsspec can write.

A run whose `run.dir` is a URL is written to a scratch folder of the node and mirrored from there
(`pipeline.runs.remote_sync`). The scratch folder's name is the quoted URL, so that every process that knows a run's
path knows where it is mirrored to, on any node:

    s3://bucket/runs  ->  $RUSHES_SCRATCH/s3%3A%2F%2Fbucket%2Fruns

$RUSHES_SCRATCH is by default rushes-scratch-UID in the temporary folder.

s3, gs, abfss, hdfs and file come with pyarrow; other schemes need their fsspec package. Credentials come from the
environment, as those libraries document it, never from the URL.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pipeline.core.errors import ConfigError, RushesError, one_line
from pipeline.core.files import describe_os_error
from pipeline.core.safe_paths import relative_name

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
_CHUNK = 16 * 2**20


def is_url(text: str) -> bool:
    return bool(_URL.match(text))


def scratch_root() -> Path:
    """$RUSHES_SCRATCH, or a folder of this user's own in the temporary folder, where anyone may create any name."""
    named = os.environ.get("RUSHES_SCRATCH")
    return Path(named).absolute() if named else Path(tempfile.gettempdir()).absolute() / f"rushes-scratch-{os.getuid()}"


def own_folder(folder: Path) -> Path:
    """`folder`, created for this user alone if it is not there. ValueError if it belongs to another user or others may
    write it: a run's files in it would be theirs to make up."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise ValueError(f"the scratch folder {describe_os_error(error, folder)}; set RUSHES_SCRATCH") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o002:
        raise ValueError(
            f"the scratch folder {folder} is not this user's own; remove it, or set RUSHES_SCRATCH to a folder of yours"
        )
    return folder


def local_folder(value: Any) -> Any:
    """The folder in which `run.dir` is written: itself, or the scratch folder of a URL. ValueError for a URL with
    credentials or without a path, or a scratch folder of another user's."""
    if not isinstance(value, str) or not is_url(value):
        return value
    parts = urlsplit(value)
    if "@" in parts.netloc:
        raise ValueError("holds credentials; leave them to the environment (AWS_ACCESS_KEY_ID, ...)")
    if not (parts.netloc + parts.path).strip("/"):
        raise ValueError(f"{value} names no bucket or folder; use for example s3://bucket/runs")
    base, mark, query = value.partition("?")
    if not os.environ.get("RUSHES_SCRATCH"):
        own_folder(scratch_root())
    return own_folder(scratch_root() / quote(base.rstrip("/") + mark + query, safe=""))


def url_of(path: Path) -> str | None:
    """The URL that `path` is mirrored to; None for a path outside of the scratch folders."""
    for folder in (path, *path.parents):
        url = unquote(folder.name)
        if "%3A%2F%2F" in folder.name and is_url(url):
            rest = path.relative_to(folder).as_posix()
            base, mark, query = url.partition("?")
            return base + (f"/{rest}" if rest != "." else "") + mark + query
    return None


def display_path(path: Path) -> str:
    """A path as the user wrote it: the URL of a scratch folder, else the path."""
    return url_of(path) or str(path)


class Store:
    """Files below one URL, by relative name. Every method raises `RushesError` naming the URL and the cause."""

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.split("://", 1)[0]
        try:
            from pyarrow import fs

            if scheme in _ARROW:
                self._fs, self._root = fs.FileSystem.from_uri(url)
            else:
                import fsspec

                files, self._root = fsspec.core.url_to_fs(url)
                self._fs = fs.PyFileSystem(fs.FSSpecHandler(files))
        except (ImportError, ValueError) as error:  # an unknown scheme, or one whose package is missing
            raise ConfigError(f"run.dir: {url}: {one_line(error, 300)}; use s3://, gs:// or a folder") from None
        self._local = scheme == "file"

    @contextmanager
    def _named_errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # pyarrow's errors are both
            raise RushesError(f"cannot {verb} {self.url}/{name}: {one_line(error, 300)}") from error

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._root, name)) if name else self._root

    def files(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of all files below `below`; {} where there is nothing.

        Names are relative, without `..`: `InputError` for a store that lists others.
        """
        from pyarrow import fs

        with self._named_errors("list", below):
            selector = fs.FileSelector(self._path(below), recursive=True, allow_not_found=True)
            files = [info for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        root = self._path("").rstrip("/") + "/"
        sizes = {info.path.removeprefix(root): info.size for info in files}
        for name in sizes:
            relative_name(name, f"a file in {self.url}", "delete or rename it in the store")
        return sizes

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        from pyarrow import fs

        with self._named_errors("read", name):
            if self._fs.get_file_info(self._path(name)).type != fs.FileType.File:
                return None
            with self._fs.open_input_stream(self._path(name)) as stream:
                return stream.read()

    def write(self, name: str, data: bytes) -> None:
        """The whole file or nothing."""
        with self._named_errors("write", name), self._writing(name) as stream:
            stream.write(data)

    def upload(self, source: Path, name: str) -> None:
        """The whole file or nothing."""
        with self._named_errors("write", name), open(source, "rb") as file, self._writing(name) as stream:
            while data := file.read(_CHUNK):
                stream.write(data)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        """Object stores show an object once it is complete; in a folder, the file first gets another name."""
        path = self._path(name)
        if not self._local:
            with self._fs.open_output_stream(path) as stream:
                yield stream
            return
        self._fs.create_dir(str(PurePosixPath(path).parent), recursive=True)
        with self._fs.open_output_stream(f"{path}.partial") as stream:
            yield stream
        self._fs.move(f"{path}.partial", path)

    def download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with self._named_errors("read", name), self._fs.open_input_stream(self._path(name)) as stream:
            with open(partial, "wb") as file:
                while data := stream.read(_CHUNK):
                    file.write(data)
            os.replace(partial, target)

    def delete(self, name: str) -> None:
        """Deletes a file; a missing one is no error."""
        with self._named_errors("delete", name):
            try:
                self._fs.delete_file(self._path(name))
            except FileNotFoundError:
                pass


def check_store(url: str) -> None:
    """Writes and deletes a small file. Raises `ConfigError`."""
    if url.startswith("memory://"):
        raise ConfigError(
            f"run.dir: {url} lives in one process only, and a run has several; use a folder or s3://, gs://"
        )
    store = Store(url)
    try:
        store.write(".rushes-write-test", b"x")
        store.delete(".rushes-write-test")
    except RushesError as error:
        raise ConfigError(f"run.dir: {error}; check the bucket, the credentials and the region") from None
