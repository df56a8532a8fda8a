"""`rushes train`: a whole run, from the checks to the report."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import ConfigPath, Debug, Overrides, Resume, ResumeOrStart, make_console
from pipeline.core.errors import ConfigError


@command(Group.RUN)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what the run would do; load no model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a generator with rewards and write a report.

    Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.

    \b
    Examples:
      rushes train configs/quickstart.yaml
      rushes train configs/quickstart.yaml run.steps=20 optimizer.lr=3e-4 run.name=try
      rushes train configs/quickstart.yaml --dry-run
      rushes train configs/quickstart.yaml --resume run.name=try
      rushes train my.yaml --resume-or-start run.name=try
      rushes train my.yaml rewards.mine.scorer=my_rewards.py:score rewards.mine.weight=0.5
    """
    from pipeline.config.load import load_config

    cfg = load_config(config, overrides or [])
    if dry_run:
        from jobs.common.dry_run import print_dry_run

        if resume and resume_or_start:
            raise ConfigError("--resume and --resume-or-start: give one of them; the latter also resumes")
        print_dry_run(cfg, make_console(), config, "resume" if resume else "retry" if resume_or_start else "new")
        return
    from jobs.launch.training import run_training

    raise typer.Exit(
        run_training(cfg, config, resume=resume, or_start=resume_or_start, debug=debug, console=make_console())
    )
