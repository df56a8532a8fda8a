"""A page that shows searches: every particle or tree node at its level, with its picture, its score and its ancestry.

One HTML file without scripts or links, which opens without a network.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

from pipeline.core.files import atomic_write
from pipeline.search.record import SHOWN, read_search

PAGE = "search.html"
_CELL, _ROW, _COLUMN = 56, 78, 118  # pixels: of a picture, between two in a column, between levels
_STYLE = """body{font:14px system-ui,sans-serif;margin:24px;color:#1f2933;background:#fff}
h2{font-size:15px;margin:28px 0 4px}p{margin:2px 0 10px;color:#52606d}svg{display:block}
text{font:11px system-ui,sans-serif;fill:#52606d}.kept{fill:#0b6e4f;font-weight:700}
div{overflow-x:auto}"""


def write_page(folder: Path, title: str) -> Path:
    """Writes `search.html` from the folder's table; returns its path. Raises `InputError`."""
    searches: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in read_search(folder):
        searches[row["prompt_index"], row["take_seed"]].append(row)
    shown = [rows for rows in searches.values() if any(row["picture"] for row in rows)][:SHOWN]
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1><p>From left to right: the noise falls. Green: the take that was kept, and ")
    parts.append("what it came from. Under a picture: the reward of what the model predicts there, or of the take.</p>")
    for rows in shown:
        finished = [row["score"] for row in rows if row["level"] == max(r["level"] for r in rows)]
        best = max(score for score in finished if score is not None)
        parts.append(f"<h2>{escape(rows[0]['prompt'])}</h2><p>best {best:.3f} of {len(finished)} finished takes, ")
        parts.append(f"{rows[-1]['calls']} denoiser calls</p><div>{_drawing(rows)}</div>")
    path = Path(folder) / PAGE
    atomic_write(path, "".join(parts).encode())
    return path


def _drawing(rows: list[dict[str, Any]]) -> str:
    """The ancestry of one search as SVG."""
    columns = {level: number for number, level in enumerate(sorted({row["level"] for row in rows}))}
    heights = _heights(rows)
    place = {row["node"]: (20 + columns[row["level"]] * _COLUMN, 24 + heights[row["node"]] * _ROW) for row in rows}
    last = max(columns)
    lines, nodes = [], []
    for level, number in columns.items():
        name = "finished" if level == last else f"level {level}"
        nodes.append(f'<text x="{20 + number * _COLUMN}" y="14">{name}</text>')
    for row in rows:
        x, y = place[row["node"]]
        colour, width = ("#0b6e4f", 2.5) if row["kept"] else ("#cbd2d9", 1.2)
        if row["parent"] in place:
            px, py = place[row["parent"]]
            middle, half = px + _CELL, _CELL / 2
            lines.append(
                f'<path d="M{middle} {py + half} C{middle + 30} {py + half} {x - 30} {y + half} {x} {y + half}" '
                f'fill="none" stroke="{colour}" stroke-width="{width}"/>'
            )
        if row["picture"]:
            data = base64.b64encode(row["picture"]).decode()
            nodes.append(
                f'<image x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" href="data:image/png;base64,{data}" '
                'style="image-rendering:pixelated"/>'
            )
        else:
            nodes.append(f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="#f5f7fa"/>')
        nodes.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"/>'
        )
        if row["score"] is not None:
            kept = ' class="kept"' if row["kept"] else ""
            nodes.append(f'<text x="{x}" y="{y + _CELL + 13}"{kept}>{row["score"]:.3f}</text>')
    width, height = 40 + len(columns) * _COLUMN, 40 + (max(heights.values()) + 1) * _ROW
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(lines + nodes)}</svg>'


def _heights(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Node -> its row in the drawing: ends are counted, others stand in the middle of their children."""
    children: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        children[row["parent"]].append(row["node"])
    heights: dict[int, float] = {}
    ends = 0
    stack = [(node, False) for node in reversed(children[-1])]
    while stack:
        node, seen = stack.pop()
        if children[node] and not seen:
            stack += [(node, True), *((child, False) for child in reversed(children[node]))]
            continue
        if children[node]:
            heights[node] = sum(heights[child] for child in children[node]) / len(children[node])
        else:
            heights[node], ends = float(ends), ends + 1
    return heights
