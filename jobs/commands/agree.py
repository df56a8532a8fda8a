"""`rushes agree`: how well rewards agree with people's judgements of pairs, so that one knows which reward to trust.

The files are scored as by `rushes score` (`scores.parquet` in the output folder, resumable); the statistics are in
`jobs.common.preference_statistics`.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.commands.score import Item, Rows, checked_item, read_scores, score_items
from jobs.common.estimates import t_quantile
from jobs.common.preference_statistics import (
    Proportion,
    accuracy_with_ties,
    calibration,
    clustered_variance,
    hits,
    proportion,
)
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, InputError, RushesError
from pipeline.core.files import atomic_write, did_you_mean
from pipeline.rewards.runner import build_reward
from pipeline.tools import preflight

if TYPE_CHECKING:
    from rich.console import Console

LABELS = {"a": 1, "b": -1, "tie": 0}
COLUMNS = ("prompt", "path_a", "path_b", "bytes_a", "bytes_b", "label", "image", "metadata")
ROWS_AT_ONCE = 64
# What a file begins with (at an offset) -> its suffix.
_KINDS = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
)


@dataclass(frozen=True)
class Pair:
    row: int  # in the table, from 1
    a: Item
    b: Item
    label: int  # +1: a is better, -1: b, 0: tie


def agreement(pairs_file: Path, *, rewards: list[RewardConfig], out: Path, console: Console) -> int:
    """Prints the table; writes `out`/agreement.json. Raises `RushesError` (exit 1) after it when pairs failed."""
    names = [reward.scorer for reward in rewards]
    if not names:
        raise ConfigError("agree: give at least one --reward NAME (`rushes score --list` shows them)")
    if len(set(names)) < len(names):
        raise ConfigError(f"--reward {max(names, key=names.count)}: is given twice; keep one")
    check_columns(pairs_file)
    preflight.check_writable(out, "--out")
    runners = {name: build_reward(name, cfg) for name, cfg in zip(names, rewards, strict=True)}
    rows = read_scores(out / "scores.parquet")
    with tempfile.TemporaryDirectory(prefix="rushes-agree-") as folder:
        pairs = list(read_pairs(pairs_file, Path(folder)))
        if not pairs:
            raise InputError(f"{pairs_file}: holds no pairs; write one a row")
        items = list({(item.name, item.prompt): item for pair in pairs for item in (pair.a, pair.b)}.values())
        score_items(items, runners, rows, out / "scores.parquet", console)
    report = summarise(pairs, rows, names)
    atomic_write(out / "agreement.json", json.dumps(report, indent=1).encode())
    _print(report, console)
    console.print(f"written to {out / 'agreement.json'}", soft_wrap=True, highlight=False)
    failures = [(pair.row, error) for pair in pairs for error in _errors(pair, rows, names)]
    if failures:
        row, error = failures[0]
        count = len({row for row, _ in failures})
        raise RushesError(
            f"{count} of {len(pairs)} pairs could not be scored by every reward and are left out there, the first in "
            f"row {row}: {error}; the others are in the column 'error' of {out / 'scores.parquet'}"
        )
    return 0


# ------------------------------------------------------------------------------------------------- the pairs


def check_columns(path: Path) -> None:
    """Raises `InputError` naming the column, what is there and the nearest fix."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise InputError(f"{path}: {'is a folder; give a parquet file' if path.is_dir() else 'no such file'}")
    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0][:120]})") from None
    kind = "bytes" if any(name.startswith("bytes_") for name in columns) else "path"
    for wanted in ("label", f"{kind}_a", f"{kind}_b"):
        if wanted not in columns:
            unused = [name for name in columns if name not in COLUMNS]
            hint = did_you_mean(wanted, unused).replace("did you mean", "rename").rstrip("?")
            raise InputError(
                f"{path}: has no column {wanted!r} (columns: {', '.join(columns) or 'none'}){hint}; expected path_a "
                "and path_b, or bytes_a and bytes_b; label (a, b or tie); and mostly prompt"
            )


def read_pairs(path: Path, folder: Path) -> Iterator[Pair]:
    """The rows of the table; bytes are written to `folder`, a few rows at a time. Raises `InputError` with the row."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    kept = [name for name in table.schema_arrow.names if name in COLUMNS]
    number = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=kept):
        for row in batch.to_pylist():
            number += 1
            where = f"{path}, row {number}"
            label = str(row["label"]).strip().lower()
            if label not in LABELS:
                raise InputError(f"{where}: label {row['label']!r:.40} is none of {', '.join(LABELS)}")
            prompt = row.get("prompt") or ""
            if not isinstance(prompt, str):
                raise InputError(f"{where}: prompt must be text, found {prompt!r:.40}")
            a, b = (_item(row, side, prompt, path, folder, where) for side in "ab")
            yield Pair(number, a, b, LABELS[label])


def _item(row: dict[str, Any], side: str, prompt: str, path: Path, folder: Path, where: str) -> Item:
    data = row.get(f"bytes_{side}")
    if isinstance(data, dict):  # an image of the `datasets` library
        data = data.get("bytes")
    if isinstance(data, bytes):
        name = f"sha256:{hashlib.sha256(data).hexdigest()[:24]}"
        kind = next((suffix for at, magic, suffix in _KINDS if data[at : at + len(magic)] == magic), ".unknown")
        file = folder / f"{name[7:]}{kind}"
        if not file.exists():
            file.write_bytes(data)
        return checked_item(name, file, prompt, row.get("metadata"), where, row.get("image"), path.parent)
    given = row.get(f"path_{side}")
    if not isinstance(given, str) or not given:
        column = f"bytes_{side}" if f"bytes_{side}" in row else f"path_{side}"
        raise InputError(f"{where}: {column} must be {'bytes' if column[0] == 'b' else 'a path'}, found {given!r:.40}")
    file = path.parent / given
    return checked_item(str(file), file, prompt, row.get("metadata"), where, row.get("image"), path.parent)


# ----------------------------------------------------------------------------------------------- the summary


def _errors(pair: Pair, rows: Rows, names: list[str]) -> list[str]:
    found = [rows[item.name, item.prompt, name]["error"] for name in names for item in (pair.a, pair.b)]
    return [error for error in found if error is not None]


def _difference(pair: Pair, rows: Rows, name: str) -> float:
    """score(a) - score(b); NaN where one of them failed."""
    a, b = (rows[item.name, item.prompt, name]["score"] for item in (pair.a, pair.b))
    return math.nan if a is None or b is None else a - b


def summarise(pairs: list[Pair], rows: Rows, names: list[str]) -> dict[str, Any]:
    """JSON-able: counts, and per reward its agreement, best first."""
    label = np.array([pair.label for pair in pairs])
    prompts = np.array([pair.a.prompt or f"\x00{pair.row}" for pair in pairs])  # without prompts, each pair for itself
    differences = {name: np.array([_difference(pair, rows, name) for pair in pairs]) for name in names}
    found = {name: one_reward(differences[name], label, prompts) for name in names}
    order = sorted(names, key=lambda name: -(found[name]["accuracy"] or {"mean": -1.0})["mean"])
    best = order[0]
    for name in order[1:]:
        found[name]["against_best"] = compared(differences[name], differences[best], label, prompts)
    return {
        "pairs": len(pairs),
        "prompts": len(np.unique(prompts)),
        "labels": {key: int((label == value).sum()) for key, value in LABELS.items()},
        "rewards": [{"reward": name, **found[name]} for name in order],
    }


def one_reward(difference: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """`difference` [N] of scores (NaN: failed), `label` [N]; None for what the pairs do not allow to say."""
    known = ~np.isnan(difference)
    decided = known & (label != 0)
    result: dict[str, Any] = {
        "failed": int((~known).sum()),
        "equal_scores": int((difference[known] == 0).sum()),
        "accuracy": None,
        "with_ties": None,
        "tie_threshold": None,
        "calibration": None,
        "against_best": None,
    }
    if decided.any():
        d, y, p = difference[decided], label[decided], prompts[decided]
        result["accuracy"] = asdict(proportion(hits(d, y), p))
        result["calibration"] = asdict(calibration(d, y, p))
    if (label[known] == 0).any():
        share, threshold = accuracy_with_ties(difference[known], label[known], prompts[known])
        result["with_ties"] = asdict(share)
        result["tie_threshold"] = threshold if threshold >= 0 else None
    return result


def compared(one: np.ndarray, other: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> dict[str, Any] | None:
    """Accuracy of `one` minus that of `other` on the decided pairs that both have scored, with its 95 % half width."""
    both = ~np.isnan(one) & ~np.isnan(other) & (label != 0)
    groups = len(np.unique(prompts[both]))
    if groups < 2:
        return None
    gain = hits(one[both], label[both]) - hits(other[both], label[both])
    half = t_quantile(groups - 1) * math.sqrt(clustered_variance(gain, prompts[both]))
    return {"mean": float(gain.mean()), "half": half, "n": int(both.sum())}


def _print(report: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    labels = ", ".join(f"{count} {key}" for key, count in report["labels"].items())
    text = f"{report['pairs']} pairs of {report['prompts']} prompts ({labels}); intervals are 95 %, prompts the units"
    console.print(text, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("reward", overflow="fold")
    titles = ["agrees with people", "against the best", "with ties", "log loss", "calibration error", "failed"]
    for title in titles:
        table.add_column(title, justify="right")
    for row in report["rewards"]:
        gap, fit = row["against_best"], row["calibration"]
        table.add_row(
            row["reward"],
            _share(row["accuracy"]),
            f"{100 * gap['mean']:+.1f} ± {100 * gap['half']:.1f}" if gap else "",
            _share(row["with_ties"]),
            f"{fit['log_loss']:.3f}" if fit else "–",
            f"{fit['error']:.3f}" if fit else "–",
            str(row["failed"]),
        )
    console.print(table)
    console.print("agreement: 50 % is chance. log loss: 0.693 is knowing nothing.", highlight=False, soft_wrap=True)


def _share(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    interval = "" if value["low"] is None else f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
    return f"{100 * value['mean']:.1f} %{interval}"


__all__ = ["Pair", "Proportion", "agreement", "one_reward", "summarise"]
