"""Draws the Grafana dashboard's panels from a Prometheus that scrapes a run, for the docs: its layout, titles, queries
and legends, but matplotlib's lines. Every query is a real one, so it also shows which panels have data.

    python -m benchmarks.resilience.dashboard_picture --prometheus http://127.0.0.1:9090 --minutes 10
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

DASHBOARD = Path(__file__).parents[2] / "k8s/components/monitoring/dashboard.json"
UNIT = 0.5  # inches a grid column is wide; rows are a third of it


def query(prometheus: str, expr: str, minutes: float) -> list[dict]:
    """Series of `expr` over the last minutes."""
    end = time.time()
    arguments = {"query": expr, "start": end - 60 * minutes, "end": end, "step": max(1, round(minutes * 60 / 240))}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def draw(board: dict, prometheus: str, minutes: float, run: str, out: Path) -> list[str]:
    """Returns the titles of panels without any data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    height = rows * UNIT / 3
    figure = plt.figure(figsize=(24 * UNIT, height), dpi=100, facecolor="white")
    empty = []
    for panel in panels:
        at = panel["gridPos"]
        x, y, w, h = at["x"] / 24, 1 - (at["y"] + at["h"]) / rows, at["w"] / 24, at["h"] / rows
        if panel["type"] == "row":
            figure.text(x + 0.005, y + h / 2, panel["title"], fontsize=9, weight="bold", va="center")
            continue
        axes = figure.add_axes((x + 0.035, y + 0.012, w - 0.045, h - 0.026))
        in_bytes = panel["fieldConfig"]["defaults"]["unit"] == "bytes"
        axes.set_title(panel["title"] + (" (MiB)" if in_bytes else ""), fontsize=7, loc="left", pad=3)
        axes.tick_params(labelsize=5, length=2, pad=1)
        axes.grid(alpha=0.25, linewidth=0.4)
        drawn = 0
        for target in panel["targets"]:
            for series in query(prometheus, target["expr"].replace("$run", run), minutes):
                labels = series["metric"]
                text = re.sub(
                    r"\{\{(\w+)\}\}", lambda m, labels=labels: labels.get(m.group(1), ""), target["legendFormat"]
                )
                times = [(float(t) - time.time()) / 60 for t, _ in series["values"]]
                axes.plot(
                    times,
                    [float(v) / (2**20 if in_bytes else 1) for _, v in series["values"]],
                    linewidth=0.9,
                    label=text.strip()[-42:],
                )
                drawn += 1
        if drawn:
            axes.set_xlim(-minutes, 0)
            if drawn <= 9:
                axes.legend(
                    fontsize=4.5, framealpha=0.7, edgecolor="none", loc="upper left", handlelength=1, labelspacing=0.2
                )
        else:
            empty.append(panel["title"])
            axes.text(0.5, 0.5, "no data", fontsize=6, ha="center", transform=axes.transAxes, color="grey")
    figure.savefig(out)
    Image.open(out).convert("RGB").quantize(48).save(out, optimize=True)
    return empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--run", default=".*", help="regular expression, as the dashboard's variable")
    parser.add_argument("--out", type=Path, default=Path("docs/images/dashboard.png"))
    options = parser.parse_args()
    empty = draw(json.loads(DASHBOARD.read_text()), options.prometheus, options.minutes, options.run, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB; without data: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
