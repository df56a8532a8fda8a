"""The report's takes: each held-out prompt before and after training, with the frames that frame rewards scored."""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import InputError, RushesError
from pipeline.core.media import encode_png, enlarge, read_media
from pipeline.core.safe_paths import file_inside
from pipeline.core.takes_table import read_takes
from pipeline.rl.group_plan import SHOWN_PROMPTS
from pipeline.tools.report.record import COPY_IT, RunRecord

MAX_EMBEDDED = 40 * 2**20  # bytes of media inside the file; beyond it they are linked
THUMBNAIL = 72  # pixels, longer side of a segment's frame


def eval_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the kept evaluations, in order."""
    folders = []
    for folder in (run_dir / "eval").glob("step-*") if (run_dir / "eval").is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / "takes.parquet").exists():
            folders.append((int(match.group(1)), folder))
    return sorted(folders)


def pairs(run: RunRecord) -> list[dict[str, Any]]:
    """Per prompt: the first kept evaluation beside the last one, same prompt and seed."""
    run_dir, problems = run.folder.path, run.problems
    folders = eval_folders(run_dir)
    if not folders:
        return []
    ends = [folders[0]] if len(folders) == 1 else [folders[0], folders[-1]]
    budget = [MAX_EMBEDDED]
    cells: dict[tuple[int, int], dict[str, Any]] = defaultdict(lambda: {"before": None, "after": None})
    for column, (step, folder) in zip(("before", "after"), ends, strict=False):
        try:
            table = f"{folder.relative_to(run_dir)}/takes.parquet"
            file_inside(run_dir, table, str(run_dir), COPY_IT)
            rows = read_takes(folder)
        except InputError as error:
            problems.append(str(error))
            continue
        for row in rows:
            if row.get("path") and row.get("take", 0) == 0:
                key = (row["prompt_index"], row["seed"])
                cells[key][column] = _cell(run_dir, folder, step, row, budget, problems)
                cells[key]["prompt"], cells[key]["seed"] = row["prompt"], row["seed"]
    shown = [cells[key] for key in sorted(cells)][:SHOWN_PROMPTS]
    for pair in shown:
        if all(pair.get(side) and pair[side]["reward"] is not None for side in ("before", "after")):
            pair["delta"] = pair["after"]["reward"] - pair["before"]["reward"]
    return shown


def _cell(run_dir: Path, folder: Path, step: int, row: dict, budget: list[int], problems: list[str]) -> dict[str, Any]:
    try:
        path = file_inside(folder, row["path"], f"{folder / 'takes.parquet'}: path", COPY_IT)
    except InputError as error:
        problems.append(str(error))
        path = None
    cell: dict[str, Any] = {
        "step": step,
        "reward": row.get("reward"),
        "scores": {key[7:]: value for key, value in row.items() if key.startswith("reward/") and value is not None},
        "video": path is not None and path.suffix == ".mp4",
        "src": None,
        "segments": [],
    }
    if path is None:
        return cell
    try:
        media = read_media(path)
        data = path.read_bytes()
    except (RushesError, OSError) as error:
        problems.append(str(error))
        return cell
    if len(data) <= budget[0]:
        budget[0] -= len(data)
        kind = "video/mp4" if cell["video"] else "image/png"
        cell["src"] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    else:
        cell["src"] = path.relative_to(run_dir.absolute()).as_posix()
    cell["segments"] = _segments(row, media.frames[0])
    return cell


def _segments(row: dict, frames: np.ndarray) -> list[dict[str, Any]]:
    """Per frame reward: the scored frames, with score and weight of their segment."""
    segments = []
    for key in row:
        if not key.startswith("segments/") or row[key] is None:
            continue
        name = key.removeprefix("segments/")
        weights, picks = row[f"segment_weights/{name}"], row[f"segment_frames/{name}"]
        total = sum(weights) or 1.0
        parts = [
            {
                "frames": [{"index": i, "src": thumbnail(frames[i])} for i in chosen if i < len(frames)],
                "score": score,
                "weight": weight,
                "share": weight / total,
            }
            for score, weight, chosen in zip(row[key], weights, picks, strict=True)
        ]
        segments.append({"name": name, "parts": parts})
    return segments


def thumbnail(frame: np.ndarray) -> str:
    """PNG data URI of uint8 [H, W, 3], about THUMBNAIL pixels."""
    longer = max(frame.shape[:2])
    if longer <= THUMBNAIL:
        small = enlarge(frame, max(1, round(THUMBNAIL / longer)))
    else:
        from PIL import Image

        scale = THUMBNAIL / longer
        size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
        small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    return f"data:image/png;base64,{base64.b64encode(encode_png(small)).decode()}"
