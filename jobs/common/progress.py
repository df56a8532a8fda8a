"""What `rushes train` shows while it runs: a live view on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.core.statistics import with_error
from pipeline.runs.snapshot import RunSnapshot

TREND = 10  # steps on each side of the reward's trend


class View(Protocol):
    def update(self, snapshot: RunSnapshot) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def make_view(console: Console, name: str) -> View:
    return LiveView(console, name) if console.is_terminal else PlainView(console)


def trend(rewards: list[float]) -> float:
    """Mean of the last few steps minus that of the few before them (of the first ones, when there are few)."""
    if len(rewards) < 2:
        return 0.0
    width = min(TREND, len(rewards) // 2)
    late, early = rewards[-width:], rewards[-2 * width : -width]
    return sum(late) / width - sum(early) / width


def eta_s(records: list[dict[str, float]], steps: int) -> float | None:
    """Seconds left, from the recent steps; evaluations and the export come on top."""
    if not records:
        return None
    recent = [record["time/step"] for record in records[-TREND:]]
    return sum(recent) / len(recent) * (steps - int(records[-1]["step"]))


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def learned(record: dict[str, float], records: list[dict[str, float]]) -> tuple[str, float]:
    """`reward 0.5` and its trend over `records`; the loss, where no reward scores the takes that train."""
    name = "reward/mean" if "reward/mean" in record else "loss"
    return f"{name.split('/')[0]} {record[name]:.4f}", trend([r[name] for r in records if name in r])


def step_line(record: dict[str, float], records: list[dict[str, float]], steps: int) -> str:
    value, change = learned(record, records)
    return (
        f"step {int(record['step'])}/{steps}  {value} ({change:+.4f})  "
        f"{record['takes_per_s']:.1f} takes/s  {record['time/step']:.1f} s "
        f"(rollout {record['time/rollout']:.1f}, score {record['time/score']:.1f}, learn {record['time/learn']:.1f}, "
        f"sync {record['time/sync']:.2f})  ETA {clock(eta_s(records, steps))}"
    )


def eval_line(record: dict[str, Any]) -> str:
    reward = with_error(record["mean"], record["se"])
    verdict = f"; {record['verdict']['text']}" if record.get("verdict") else ""
    return f"held-out reward at step {record['step']}: {reward} ({record['n']} prompts){verdict}"


HEALTH = {  # metric -> what it is called in one line; those that a run does not have are left out
    "staleness/max": "staleness {:.0f}",
    "ratio/mean": "ratio {:.5f}",
    "clip/high": "clipped {:.0%}",
    "kl": "KL {:.2e}",
    "zero_std_ratio": "equal rewards {:.0%}",
    "retries": "retries {:.0f}",
    "groups/failed": "failed groups {:.0f}",
}


def health_line(record: dict[str, float], queues: dict[str, int]) -> str:
    parts = [text.format(record[name]) for name, text in HEALTH.items() if name in record]
    if queues:
        parts.append("queues " + ", ".join(f"{name} {depth}" for name, depth in queues.items()))
    return "  ".join(parts)


def starting_line(snapshot: RunSnapshot) -> str:
    """Whom a run that starts waits for, and what they do; "" for another state."""
    if snapshot.state != "starting":
        return ""
    waits = [f"{name} ({activity})" for name, activity in snapshot.activities.items() if name not in snapshot.pids]
    return f"starting: {', '.join(waits)}" if waits else "starting"


class PlainView:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._records: list[dict[str, float]] = []
        self._evals: set[int] = set()
        self._state, self._starting = "", ""

    def update(self, snapshot: RunSnapshot) -> None:
        starting = starting_line(snapshot)
        if snapshot.state != self._state:
            self._state = snapshot.state
            if self._state not in ("training", "saving") and not starting:
                self.note(self._state)
        if starting and starting != self._starting:
            self._starting = starting
            self.note(starting)
        evals = [record for record in snapshot.evals if record["step"] not in self._evals]
        for record in sorted([*snapshot.records, *evals], key=lambda r: (r["step"], "tag" in r)):
            if "tag" in record:
                self._evals.add(record["step"])
                self.note(eval_line(record))
            else:
                self._records = [*self._records, record][-2 * TREND :]
                self.note(step_line(record, self._records, snapshot.steps))

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Nothing to tidy up: every line is final."""


class LiveView:
    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name, self._started = console, name, time.monotonic()
        self._records: list[dict[str, float]] = []
        self.details = False  # `rushes watch` shows more
        self._live = Live(Text("starting"), console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, snapshot: RunSnapshot) -> None:
        self._records = [*self._records, *snapshot.records][-2 * TREND :]
        self._live.update(self._render(snapshot))

    def _render(self, snapshot: RunSnapshot) -> Group:
        steps, step = snapshot.steps, snapshot.step
        head = Table.grid(padding=(0, 1))
        left = clock(eta_s(self._records, steps))
        elapsed = clock(time.monotonic() - self._started)
        head.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=steps, completed=step, width=30),
            Text(f"{step}/{steps}  {starting_line(snapshot) or snapshot.state}  {elapsed} gone, about {left} left"),
        )
        lines: list[Any] = [head]
        if self._records:
            last = self._records[-1]
            value, change = learned(last, self._records)
            better = change if "reward/mean" in last else -change
            text = Text(f"{value} ", style="bold")
            text.append(f"({change:+.4f})", style="green" if better > 0 else "red" if better < 0 else "")
            text.append(f"   {last['takes_per_s']:.1f} takes/s   {last['time/step']:.1f} s a step")
            lines.append(text)
            if self.details:
                lines.append(Text(step_line(last, self._records, steps), style="dim"))
                lines.append(Text(health_line(last, snapshot.queues)))
        for record in snapshot.evals[-2:]:
            lines.append(Text(eval_line(record)))
        if snapshot.state == "evaluating":
            progress = snapshot.eval_progress
            lines.append(Text(f"evaluation: {progress.scored} of {progress.groups} batches"))
        actors = Table.grid(padding=(0, 2))
        for name, activity in snapshot.activities.items():
            actors.add_row(Text(name, style="dim"), Text(activity))
        lines.append(actors)
        return Group(*lines)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._live.stop()
