"""What each rater of `rushes label` is shown next, and what becomes of the answers. No HTTP here.

All raters get the same pairs in the same order, so that those judged by several are many even if nobody ends. A share
of the pairs comes back to the same rater later, the sides swapped. Which take is on the left is drawn for each rater.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.common.label_answers import Answer, AnswerFile, Undo, now
from jobs.common.label_takes import Take, TakePair, pair_key
from pipeline.core.errors import InputError
from pipeline.core.reading import bad_text, shown

REPEAT_AFTER = 10  # pairs between the first time and the second
MAX_NAME = 40
_AGAIN = "-again"


@dataclass(frozen=True, slots=True)
class Task:
    """A pair to be shown. `id` stays the same when the server starts again."""

    pair: TakePair
    repeat: bool = False

    @property
    def id(self) -> str:
        return self.pair.key + (_AGAIN if self.repeat else "")


def schedule(pairs: Sequence[TakePair], repeats: float) -> list[Task]:
    """The pairs, and the share `repeats` of them a second time, at least `REPEAT_AFTER` pairs later if there are so
    many."""
    tasks: list[Task] = []
    due: deque[tuple[int, TakePair]] = deque()
    for index, pair in enumerate(pairs):
        while due and due[0][0] <= index:
            tasks.append(Task(due.popleft()[1], repeat=True))
        tasks.append(Task(pair))
        if int((index + 1) * repeats) > int(index * repeats):
            due.append((index + 1 + REPEAT_AFTER, pair))
    return tasks + [Task(pair, repeat=True) for _, pair in due]


def rater_name(name: object) -> str:
    """Raises `InputError`."""
    text = " ".join(name.split()) if isinstance(name, str) else ""
    if not text or len(text) > MAX_NAME or not text.isprintable() or bad_text(text):
        raise InputError(f"rater: found {shown(name)}; give a name of 1 to {MAX_NAME} characters")
    return text


class LabelSession:
    """`secret`: decides the sides, and names takes to browsers, which are not told their files."""

    def __init__(self, pairs: Sequence[TakePair], file: AnswerFile, repeats: float, secret: str) -> None:
        self.tasks = {task.id: task for task in schedule(pairs, repeats)}
        self.takes = {self.media_id(take, secret): take for pair in pairs for take in (pair.a, pair.b)}
        self.answers = list(file.answers)
        self.unusable: dict[str, str] = {}  # a take's name -> why it cannot be shown
        self._file, self._secret = file, secret
        self._given: dict[str, dict[str, Answer]] = {}  # rater -> id of the task -> answer, in order
        for answer in self.answers:
            self._given.setdefault(answer.rater, {})[_task_id(answer)] = answer

    @staticmethod
    def media_id(take: Take, secret: str) -> str:
        return hashlib.sha256(f"{secret}\0{take.name}".encode()).hexdigest()[:20]

    def next_task(self, rater: str) -> Task | None:
        given = self._given.get(rater, {})
        return next((task for task in self.tasks.values() if task.id not in given and self._ready(task, given)), None)

    def sides(self, rater: str, task: Task) -> tuple[Take, Take]:
        """(left, right): a function of the names, as a page may outlive its server."""
        draw = hashlib.sha256(f"{self._secret}\0{rater}\0{task.pair.key}".encode()).digest()[0]
        one, two = sorted((task.pair.a, task.pair.b), key=lambda take: take.name)
        return (one, two) if (draw & 1) ^ task.repeat else (two, one)

    def state(self, rater: str) -> dict[str, Any]:
        """What the page shows: JSON-able."""
        given = self._given.get(rater, {})
        task = self.next_task(rater)
        done = sum(task_id in given for task_id in self.tasks)
        left = sum(each.id not in given and self._possible(each, given) for each in self.tasks.values())
        state: dict[str, Any] = {"rater": rater, "done": done, "total": done + left, "task": None, "last": None}
        if given:
            state["last"] = list(given.values())[-1].id
        if task is not None:
            sides = [self.media_id(take, self._secret) for take in self.sides(rater, task)]
            state["task"] = {"id": task.id, "prompt": task.pair.a.prompt, "left": sides[0], "right": sides[1]}
        return state

    def answer(self, rater: str, task_id: object, choice: object) -> None:
        """Keeps the answer: `choice` is the `media_id` of the better take, "tie" or "skip". One that arrives twice is
        kept once. Raises `InputError`, and `RushesError` when it cannot be written."""
        task = self.tasks.get(task_id) if isinstance(task_id, str) else None
        if task is None:
            raise InputError(f"task: found {shown(task_id)}, which is no pair of this session; reload the page")
        words = {"tie": "tie", "skip": "skip"}
        words |= {self.media_id(take, self._secret): word for word, take in (("a", task.pair.a), ("b", task.pair.b))}
        word = words.get(choice) if isinstance(choice, str) else None
        if word is None:
            raise InputError(f"choice: found {shown(choice)}; allowed are one of the two takes, tie and skip")
        given = self._given.setdefault(rater, {})
        if task.id in given:
            if given[task.id].answer != word:
                raise InputError("this pair has another answer already, perhaps from another window; undo that first")
            return
        if not self._ready(task, given):
            raise InputError("this pair cannot be answered now; reload the page")
        first = given[task.pair.key].id if task.repeat else None
        names = {"path_a": task.pair.a.name, "path_b": task.pair.b.name, "prompt": task.pair.a.prompt}
        entry = Answer(id=secrets.token_hex(6), rater=rater, time=now(), answer=word, repeat_of=first, **names)  # type: ignore[arg-type]
        self._file.append(entry)
        given[task.id] = entry
        self.answers.append(entry)

    def undo(self, rater: str, answer_id: object) -> None:
        """Takes the rater's last answer back. Nothing happens if it is not the last one: a request that arrives twice.
        Raises `RushesError` when that cannot be written."""
        given = self._given.get(rater, {})
        if not given or list(given.values())[-1].id != answer_id:
            return
        entry = list(given.values())[-1]
        self._file.append(Undo(undo=entry.id, rater=rater, time=now()))
        del given[_task_id(entry)]
        self.answers.remove(entry)

    def _possible(self, task: Task, given: dict[str, Answer]) -> bool:
        """Whether it can still come up. What was skipped is not shown again."""
        first = given.get(task.pair.key)
        skipped = task.repeat and first is not None and first.answer == "skip"
        return not skipped and not any(take.name in self.unusable for take in (task.pair.a, task.pair.b))

    def _ready(self, task: Task, given: dict[str, Answer]) -> bool:
        return self._possible(task, given) and (not task.repeat or task.pair.key in given)


def _task_id(answer: Answer) -> str:
    key = pair_key(answer.prompt, answer.path_a, answer.path_b)
    return key if answer.repeat_of is None else key + _AGAIN
