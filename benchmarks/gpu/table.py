"""The results of a check of a GPU as Markdown."""

from __future__ import annotations

from typing import Any

_SIZES = ("takes_per_s_rollout", "takes_per_s_in_turn", "mfu_rollout", "mfu_learn", "bare_share_rollout",
          "bare_share_learn", "rollout_peak_gib", "rollout_peak_over_plan", "learner_peak_gib",
          "learner_peak_over_plan", "replay")  # fmt: skip
_SWITCHES = ("rollout_s ratio", "learn_s ratio", "rollout_peak_gib ratio", "learner_peak_gib ratio", "replay")


def table(results: dict[str, Any]) -> str:
    """`results`: section -> its result, as `benchmarks.gpu.check` keeps them."""
    lines = [f"# {results.get('facts', {}).get('name', 'No GPU')}", ""]
    facts = results.get("facts", {})
    lines += [f"* {name}: {_number(value)}" for name, value in facts.items() if name != "section_s"]
    done = {name: result for name, result in results.items() if "failed" not in result}
    lines += _learning({name: result for name, result in done.items() if "rewards" in result})
    lines += _grid("Sizes", {name: result for name, result in done.items() if "mfu_rollout" in result}, _SIZES)
    lines += _grid("Switches", done.get("switches", {}), _SWITCHES)
    lines += _grid("One rank of FSDP2", done.get("sharded", {}), ("learn_s", "push_s", "push_mib", "learner_peak_gib"))
    lines += _families(done.get("families", {}))
    for name, result in results.items():
        if "failed" in result:
            lines += ["", f"## {name}: failed", "", "```", result["failed"], "```"]
    return "\n".join(lines) + "\n"


def _learning(sections: dict[str, Any]) -> list[str]:
    if not sections:
        return []
    lines = [
        "",
        "## Learning",
        "",
        "| section | reward | before | after | se | takes/s | replay, first | replay, most |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, result in sections.items():
        for reward, row in result["rewards"].items():
            cells = [row["before"], row["after"], row["se"], result["takes_per_s"], result["replay_first"],
                     result["replay_max"]]  # fmt: skip
            lines.append(f"| {name} | {reward} | {' | '.join(_number(cell) for cell in cells)} |")
    return lines


def _grid(title: str, rows: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    rows = {name: row for name, row in rows.items() if isinstance(row, dict)}
    if not rows:
        return []
    lines = ["", f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {_cell(row['failed'])} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {name} | {' | '.join(_number(row.get(column)) for column in columns)} |")
    return lines


def _families(rows: dict[str, Any]) -> list[str]:
    rows = {name: row for name, row in rows.items() if isinstance(row, dict)}
    if not rows:
        return []
    dtypes = list(next(iter(rows.values())))
    lines = ["", "## Families: the replay check", "", f"| | {' | '.join(dtypes)} |", "|---" * (len(dtypes) + 1) + "|"]
    for name, row in rows.items():
        cells = [_cell(row[dtype].get("failed") or _number(next(iter(row[dtype].values())))) for dtype in dtypes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
