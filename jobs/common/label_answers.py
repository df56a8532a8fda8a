"""The answers of `rushes label` as they are given: JSON lines that are only ever appended to, each on the disk before
its rater is told that it is saved.

A line is an answer or the undoing of one. A last line that was cut off by a crash was never confirmed and is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from jobs.common.rater_statistics import RaterAnswer
from pipeline.core.errors import InputError, RushesError
from pipeline.core.files import describe_os_error, sync
from pipeline.core.labelled_pairs import LABELS, LabelledPair
from pipeline.core.reading import parse_json_object, read_bytes, shown

MAX_BYTES = 512 * 2**20
_FIX = "only `rushes label` writes this file: restore the line from a copy, or remove it"


class Answer(BaseModel):
    """`answer`: the better take, or skip. Paths are relative to the file."""

    model_config = ConfigDict(extra="forbid")

    id: str
    rater: str
    time: AwareDatetime
    prompt: str
    path_a: str
    path_b: str
    answer: Literal["a", "b", "tie", "skip"]
    repeat_of: str | None = None


class Undo(BaseModel):
    model_config = ConfigDict(extra="forbid")

    undo: str  # the answer's id
    rater: str
    time: AwareDatetime


def now() -> datetime:
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def read_answers(path: Path) -> tuple[list[Answer], int]:
    """(the answers that were not undone, in order; the bytes of all whole lines). Raises `InputError` with the line."""
    data = read_bytes(path, MAX_BYTES)
    answers: dict[str, Answer] = {}
    size = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        end = size + len(line) + 1
        if end > len(data):  # nothing, or what a crash has left of a line
            break
        size = end
        entry = _entry(line, f"{path}, line {number}")
        if isinstance(entry, Answer):
            answers[entry.id] = entry
        elif answers.pop(entry.undo, None) is None:
            raise InputError(f"{path}, line {number}: undoes {shown(entry.undo)}, which is no answer; {_FIX}")
    return list(answers.values()), size


def _entry(line: bytes, where: str) -> Answer | Undo:
    row = parse_json_object(line, where, _FIX)
    try:
        return Undo.model_validate(row) if "undo" in row else Answer.model_validate(row)
    except ValidationError as problems:
        first = problems.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {key}: {first['msg']}; {_FIX}") from None


class AnswerFile:
    """The file, open for appending by this process alone. Raises `InputError` for lines that are none of ours, and
    `RushesError` when another process has it open or it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RushesError(f"cannot write {describe_os_error(error, path)}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync(path.parent)  # a new file's name is on the disk, too
            self.answers, self._size = read_answers(path)
            self.dropped = os.fstat(self._handle).st_size - self._size  # bytes of a line that a crash cut off
            os.ftruncate(self._handle, self._size)
        except BlockingIOError:
            os.close(self._handle)
            raise RushesError(
                f"{path}: is served by another `rushes label`; raters share one server, or give another --out"
            ) from None
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, entry: Answer | Undo) -> None:
        """Returns once the line is on the disk. Raises `RushesError` (a full disk); the file is then as it was."""
        line = json.dumps(entry.model_dump(mode="json", exclude_none=True)).encode() + b"\n"
        try:
            written = os.write(self._handle, line)
            if written != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, self._size)
            raise RushesError(f"cannot write {describe_os_error(error, self.path)}") from error
        self._size += len(line)

    def close(self) -> None:
        os.close(self._handle)


def labelled_pairs(answers: Sequence[Answer], origin: str) -> list[LabelledPair]:
    """The rows of the table: all answers but skips."""
    given = [answer for answer in answers if answer.answer != "skip"]
    return [
        LabelledPair(
            row=row, a=answer.path_a, b=answer.path_b, label=LABELS[answer.answer], prompt=answer.prompt,
            rater=answer.rater, time=answer.time, origin=origin, id=answer.id, repeat_of=answer.repeat_of,
        )
        for row, answer in enumerate(given, start=1)
    ]  # fmt: skip


def rater_answers(pairs: Sequence[LabelledPair]) -> list[RaterAnswer]:
    """The same, for statistics about raters."""
    rows: list[Any] = [(p.rater, p.prompt, p.a, p.b, p.label, p.id, p.repeat_of) for p in pairs]
    return [RaterAnswer(*row) for row in rows]


def session_token(path: Path) -> str:
    """The token in the page's address: kept beside the answers, for their owner alone, so that an open page and the
    links that raters were given work again when the server has been restarted. Raises `RushesError`."""
    file = path.with_name(f".{path.stem}.token")
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "r+b") as opened:
            os.fchmod(handle, 0o600)
            token = opened.read(100).decode("ascii", "replace")
            if not re.fullmatch(r"[A-Za-z0-9_-]{22,64}", token):
                token = secrets.token_urlsafe(24)
                opened.seek(0)
                opened.truncate()
                opened.write(token.encode())
    except OSError as error:
        raise RushesError(f"cannot write {describe_os_error(error, file)}") from error
    return token
