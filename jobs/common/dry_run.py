"""What `rushes train --dry-run` prints: what the run would do, after every check that needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.schema import Config
from pipeline.generators.checkpoint_files import DENOISERS
from pipeline.rl.group_plan import default_end, stochastic_steps, trained_steps
from pipeline.rl.noise_grid import LEAST_SIGMA_NEXT
from pipeline.rl.objectives import objective_of
from pipeline.rl.sources import source_of
from pipeline.runs.resume import check_new, check_resume
from pipeline.tools.preflight import check_all

if TYPE_CHECKING:
    from rich.console import Console


def print_dry_run(
    cfg: Config, console: Console, config_path: Path, mode: Literal["new", "resume", "retry"] = "new"
) -> None:
    """Raises what `check_all` raises, and what the run itself would before it loads a model. `mode`: a new run,
    --resume, or --resume-or-start."""
    checks = check_all(cfg, dry=True)
    resumed = ""
    if mode == "new":
        check_new(cfg, cfg.run.name)
    else:
        resumed = check_resume(cfg, config_path, or_start=mode == "retry")
    generator, size_of_step, sampler = cfg.generator, cfg.step, cfg.sampler
    takes = size_of_step.takes * size_of_step.groups
    steps = ", ".join(map(str, stochastic_steps(sampler, cfg.run.seed, 0, default_end(cfg, None))))
    if not source_of(cfg).draws:
        levels = ", ".join(map(str, trained_steps(cfg, 0, 0)))
        sampling = f"of data, trained at the noise levels of {sampler.steps} sampler steps: {levels} at first"
    elif objective_of(cfg).requirements.unit == "tail":
        tail = ", ".join(map(str, trained_steps(cfg, 0, 0)))
        sampling = f"ode with {sampler.steps} sampler steps, no noise, trained through steps {tail} at first"
    elif objective_of(cfg).requirements.draws_noise:
        sampling = f"{sampler.kind} with {sampler.steps} sampler steps, noise at steps {steps}"
        if sampler.window.range is None:
            sampling += f" as far as they end at a noise level of {LEAST_SIGMA_NEXT} or more (rushes inspect)"
    else:
        sampling = f"ode with {sampler.steps} sampler steps, no noise, trained at the noise levels of steps {steps}"
    heldout = min(cfg.evaluation.prompts or len(checks.heldout), len(checks.heldout))
    size = f"{generator.width}x{generator.height}" + (
        f", {generator.num_frames} frames" if generator.num_frames > 1 else ""
    )
    if checks.components:
        kinds = [checks.components[name] for name in DENOISERS if name in checks.components]
        source = f"{generator.pretrained} ({', '.join(kinds)}; files complete)"
    else:
        source = f"{generator.pretrained} (hub id, not here)"
    if generator.pipeline:
        source += f" called through {generator.pipeline}"
    rows = {"resume": resumed} if resumed else {}
    rows |= {
        "generator": f"{source}, {size}",
        "training": cfg.trainable.description,
        "prompts": f"{len(checks.train)} to train on, {len(checks.heldout)} held out",
        "each step": f"{size_of_step.groups} prompts x {size_of_step.takes} takes = {takes} takes, {sampling}",
        "whole run": f"{cfg.run.steps} steps, {takes * cfg.run.steps:,} takes",
        "rewards": ", ".join(
            f"{name} ({r.scorer}) x {r.weight:g}" + (", through its gradient" if r.gradient else "")
            for name, r in cfg.rewards.items()
        ),
        "evaluation": f"{heldout * cfg.evaluation.takes_per_prompt} takes before and after"
        + (f" and every {cfg.evaluation.every} steps" if cfg.evaluation.every else "")
        if heldout
        else "none (prompts.heldout is not set)",
        "workers": f"{cfg.rollout.workers} rollout, "
        + ", ".join(f"{cfg.rewards[name].workers} reward.{name}" for name in cfg.served_rewards)
        + (", 1 learner" if cfg.learner.ranks == 1 else f", {cfg.learner.ranks} learner ranks"),
        "disk": f"about {checks.disk_needed / 2**20:,.0f} MiB needed, {checks.disk_free / 2**30:,.1f} GiB free",
    }
    for name, text in rows.items():
        console.print(f"{name:<11} {text}", highlight=False, markup=False, soft_wrap=True)
    checked, unchecked = what_was_checked(checks.components, cfg)
    rows = {"checked": checked, "not checked": unchecked}
    if checks.lacking:
        rows["machine"] = (
            f"too small: the actors reserve {checks.lacking}; rushes train would stop here, so join a cluster "
            "(ray.address) or lower the reservations"
        )
    for name, text in rows.items():
        console.print(f"{name:<11} {text}", highlight=False, markup=False, soft_wrap=True)
    console.print("all checks passed; no model was loaded", highlight=False)


def what_was_checked(components: dict[str, str], cfg: Config) -> tuple[str, str]:
    """What the checks covered, and what they could not cover, as text. `components`: empty for a hub id."""
    done = ["keys and values", "prompt files", "scorers and their options", "trackers", "disk"]
    later = ["whether the checkpoint can be a policy (rushes inspect)", "the scorers' own weights", "memory"]
    if components:
        done[2:2] = ["the checkpoint's files, sizes and scheduler", "prompt lengths"]
    else:
        later.insert(0, f"the checkpoint ({cfg.generator.pretrained} is no folder here): files, sizes, prompt lengths")
    return ", ".join(done), "; ".join(later)
