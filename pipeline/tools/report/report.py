"""The run's report: one self-contained HTML file that opens without a network, also while the run is going.

Reads only what lies in the run folder, and says what is missing. `record` reads the folder; `facts`, `curves`,
`rewards` and `takes` make the parts of the page.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.core.files import atomic_write
from pipeline.core.reading import MAX_YAML, read_text
from pipeline.core.secrets import mask, mask_tree
from pipeline.core.statistics import with_error
from pipeline.rl.group_plan import EVALUATION_SEED
from pipeline.rl.signals import signal_of
from pipeline.tools.report import curves, facts, rewards, takes, trust
from pipeline.tools.report.record import RunRecord, read_run

TEMPLATE = Path(__file__).parent / "templates"


def build_report(run_dir: Path, summary: dict[str, Any] | None = None, stamp: str | None = None) -> Path:
    """Writes `run_dir/report.html` and returns its path. `summary`: instead of summary.json, of a run that is about to
    write it. `stamp`: of a page that is followed and renews itself (`pipeline.tools.report.follow`). Raises
    `RushesError` when it is no run folder."""
    run = read_run(Path(run_dir))
    if summary is not None:
        run = replace(run, summary=summary)
    html = page_templates().get_template("report.html.j2").render(**_context(run), stamp=stamp)
    atomic_write(run.folder.report, html.encode("utf-8"))
    return run.folder.report


def page_templates() -> Any:
    """The jinja2 environment of the pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["with_error"] = lambda value: with_error(value["mean"], value.get("se"), digits=3)
    return environment


def time_made() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M")


def _context(run: RunRecord) -> dict[str, Any]:
    """What the template shows, from the top of the page to its end."""
    config, kept = run.config, takes.Takes(run)
    configured_seeds = {"run": config.run.seed, "evaluation": EVALUATION_SEED} if config else {}
    return {
        "name": run.folder.path.resolve().name,
        "made": time_made(),
        "status": facts.status(run),
        "facts": facts.facts(run),
        "verdict": trust.verdict(run),
        "showing": kept.showing(trust.columns_that_show(run)),
        "headline": facts.headline(run),
        "two_points": facts.two_points(run),
        "rewards_table": facts.rewards_table(run),
        "gold_plots": trust.gold_plots(run),
        "guards_table": trust.guards_table(run),
        "guard_plots": trust.guard_plots(run),
        "reward_curve": curves.reward_curve(run),
        "reward_plots": curves.reward_plots(run),
        "combining": rewards.combining_table(config, run.metrics),
        "combining_rule": signal_of(config).describe() if config else "",
        "combining_plots": rewards.combining_plots(config, run.metrics),
        "diagnostics": curves.diagnostics(run),
        "constants": curves.constants(run),
        "times": curves.times(run),
        "pairs": kept.pairs(),
        "gallery": kept.gallery(),
        "training_takes": kept.training(),
        "problems": mask_tree(list(dict.fromkeys(run.problems))),
        "config_text": mask(read_text(run.folder.config, MAX_YAML)) if config else None,
        "versions": run.summary.get("versions") or {},
        "seeds": run.summary.get("seeds") or configured_seeds,
        "summary": mask_tree(run.summary),
    }
