"""The tables of docs/benchmarks.md, made from the JSON of the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import marked_block

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: begin (rushes bench --tables) -->", "<!-- tables: end -->"


def renew(results: Path, docs: Path = DOCS) -> Path:
    """Writes the tables of `results` between the markers of `docs`. Raises InputError where they are missing."""
    marked_block.renew(docs, BEGIN, END, "\n\n".join(render(json.loads(results.read_text()))))
    return docs


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(results: dict[str, Any]) -> list[str]:
    """Markdown tables of the sections that were measured."""
    blocks = []
    names = [name for name in ("quickstart", "quickstart_image") if name in results]
    if names:
        rows = [
            ["efficiency (bare passes on all cores at once)", *(f"{results[n]['efficiency']:.2f}" for n in names)],
            ["in each round", *(", ".join(f"{e:.2f}" for e in results[n]["efficiency_by_round"]) for n in names)],
            ["the same against bare passes with compiled blocks and the VAE layout of a run"]
            + [f"{results[n]['efficiency_against_compiled_bare']:.2f}" for n in names],
            ["efficiency of the plain loop", *(f"{results[n]['plain_loop']['efficiency']:.2f}" for n in names)],
            ["takes per second, against the plain loop's best thread count"]
            + [f"{results[n]['speedup_vs_plain_loop']:.2f} x" for n in names],
            ["the same against a plain loop with compiled blocks and the same VAE layout"]
            + [f"{results[n]['speedup_vs_compiled_plain_loop']:.2f} x" for n in names],
            ["takes per second", *(f"{results[n]['takes_per_s']:.1f}" for n in names)],
            ["step (s)", *(f"{results[n]['step_s']:.2f}" for n in names)],
        ]
        for role in ("rollout", "score", "learn", "sync"):
            rows.append([f"{role} (s per step and worker)", *(f"{results[n]['roles'][role]:.2f}" for n in names)])
        rows.append(["controller, queues, sync", *(f"{results[n]['between_roles']:.1%}" for n in names)])
        blocks.append(_table(["", *(f"`{n}`" for n in names)], rows))
        for name, less in ((name, results[name]["less_work"]) for name in names):
            blocks.append(
                f"Work-saving recipe for `{name}` (`{' '.join(less['overrides'])}`): "
                f"{less['speedup_vs_plain_loop']:.2f} x the plain loop's takes per second with the quickstart's own."
            )
    if "peers" in results:
        rows = [
            [f"{arm}, {kind}", f"{row['run_s']:.2f}", f"{row['peer_s']:.2f}", f"{row['speedup']:.2f} x"]
            for arm, kinds in results["peers"].items()
            if arm != "machine"
            for kind, row in kinds.items()
        ]
        header = ["against two processes of one thread each", "step of a run (s)", "of the baseline (s)", "speedup"]
        blocks.append(_table(header, rows))
    if "simulated" in results:
        simulated = results["simulated"]
        shown = {key: row for key, row in simulated.items() if key.isdigit()}
        if (lockstep := simulated.get("lockstep")) is not None:
            shown[f"{lockstep['workers']}, one group per worker and step"] = lockstep
        rows = [
            [
                label,
                f"{row['efficiency']:.3f}",
                f"{row['groups_per_s']:.1f}",
                f"{row['controller_ms_per_group']:.2f}",
            ]
            for label, row in shown.items()
        ]
        header = ["simulated workers", "share of the ideal speed", "groups per second", "controller CPU ms per group"]
        blocks.append(_table(header, rows))
    if "small" in results:
        small = results["small"]
        rows = [
            ["request for a worker, to its end, 1 worker", f"{1e6 * small['queue_round_trip_s_1_workers']:.0f} µs"],
            [
                "request for a worker, to its end, 256 workers",
                f"{1e6 * small['queue_round_trip_s_256_workers']:.0f} µs",
            ],
            ["reward server call beyond the scorer", f"{1e3 * small['reward_server_overhead_s']:.1f} ms"],
        ]
        for label, entry in small["weights"].items():
            rows.append([f"weights, {label}: pack, put, pull, apply, checksum", f"{1e3 * entry['total_s']:.0f} ms"])
            rows.append([f"weights, {label}: as a plain copy", f"{1e3 * entry['plain_copy_s']:.0f} ms"])
        blocks.append(_table(["between the roles", "time"], rows))
    last = next((results[name]["machine"] for name in reversed(list(results)) if "machine" in results[name]), None)
    if last:
        packages = ", ".join(f"{name} {number}" for name, number in last["packages"].items())
        blocks.append(f"Measured {last['when'][:10]} on {last['cores']} cores ({last['cpu']}), {packages}.")
    return blocks
