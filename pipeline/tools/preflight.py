"""Everything that can be checked before a model is loaded, in the order in which a user would fix it.

The rules about the generator are in `preflight_generator`, those about this machine in `preflight_machine`. Each raises
one `ConfigError` or `InputError` that names the key or file and the fix. All together they take well under a second:
torch is imported only if the config uses a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.files import did_you_mean
from pipeline.core.prompts import load_prompts, prompt_locations
from pipeline.core.secrets import MASK
from pipeline.core.storage import check_store, url_of
from pipeline.core.types import PromptItem
from pipeline.rewards.function import is_function_spec
from pipeline.rewards.gradients import check_gradient
from pipeline.rewards.guards import GUARDS
from pipeline.rewards.registry import scorer_class
from pipeline.rewards.routing import KEY as ROUTING_KEY
from pipeline.rewards.routing import check_routing
from pipeline.rewards.runner import check_reward, check_reward_name
from pipeline.rl.recipe import check_recipe
from pipeline.rl.samplers import check_sampler
from pipeline.rl.sources import source_of
from pipeline.runs.paths import check_name
from pipeline.tools.preflight_generator import check_generator, check_quantize
from pipeline.tools.preflight_machine import check_devices, check_disk, check_ray, check_trackers, check_writable


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What the checks have read, for `train --dry-run`."""

    train: list[PromptItem]
    heldout: list[PromptItem]
    components: dict[str, str]  # of a local generator; {} for a hub id
    disk_needed: int  # bytes
    disk_free: int  # bytes
    lacking: str  # what the actors reserve and this machine does not have; "" if nothing


def check_all(cfg: Config, run_dir: Path | None = None, dry: bool = False) -> Preflight:
    """Raises for the first thing that is wrong.

    `run_dir`: the run's folder, if already chosen. `dry`: a machine too small for the config is reported in `lacking`
    instead of refused, so that recipes can be checked anywhere.
    """
    if cfg.run.name:
        check_name(cfg.run.name)
    check_sampler(cfg)
    check_recipe(cfg)
    check_samplers(cfg)
    train, heldout = check_prompts(cfg)
    check_guards(cfg)
    components = check_generator(cfg, train, heldout)
    check_quantize(cfg)
    check_rewards(cfg)
    check_trackers(cfg)
    check_devices(cfg)
    lacking = check_ray(cfg, dry)
    folder = Path(run_dir) if run_dir is not None else cfg.run.dir
    check_writable(folder)
    if cfg.generator.embedding_cache is not None:
        check_writable(cfg.generator.embedding_cache.expanduser(), "generator.embedding_cache")
    if url := url_of(folder):
        check_store(url)
    needed, free = check_disk(cfg, folder)
    return Preflight(
        train=train, heldout=heldout, components=components, disk_needed=needed, disk_free=free, lacking=lacking
    )


def check_samplers(cfg: Config) -> None:
    """Training rollouts draw noise: there are steps for it, and a sliding window of them moves."""
    if cfg.sampler.steps < 2:
        raise ConfigError(
            f"sampler.steps: {cfg.sampler.steps} leaves no step that draws noise (one-step and ODE rollouts cannot "
            "train); set 2 or more"
        )
    if cfg.generator.fps > 240:
        raise ConfigError(f"generator.fps: found {cfg.generator.fps:g}; expected at most 240 frames per second")
    window = cfg.sampler.window
    if window.kind == "sliding" and window.every >= cfg.run.steps and cfg.run.steps > 1:
        raise ConfigError(
            f"sampler.window.every: {window.every} means the sliding window never moves in run.steps = "
            f"{cfg.run.steps}; make it smaller or use sampler.window.kind=random"
        )


def check_prompts(cfg: Config) -> tuple[list[PromptItem], list[PromptItem]]:
    """Both sets parse and share no prompt."""
    train = _under_key("prompts.train", lambda: _routed(cfg, source_of(cfg).rows(cfg), cfg.prompts.train))
    if cfg.prompts.heldout is None:
        if cfg.evaluation.every:
            raise ConfigError(
                "evaluation.every: is set but prompts.heldout is not; give a file of prompts to evaluate on"
            )
        return train, []
    heldout_file = cfg.prompts.heldout
    heldout = _under_key("prompts.heldout", lambda: _routed(cfg, load_prompts(heldout_file), heldout_file))
    trained = {(p.text, p.negative, p.image): p.index for p in train}
    shared = [p for p in heldout if (p.text, p.negative, p.image) in trained]
    if shared:
        where = prompt_locations(cfg.prompts.heldout)[shared[0].index]
        other = prompt_locations(cfg.prompts.train)[trained[(shared[0].text, shared[0].negative, shared[0].image)]]
        raise ConfigError(
            f"prompts.heldout: {cfg.prompts.heldout}, {where}: {shared[0].text[:60]!r} is also trained on "
            f"({cfg.prompts.train}, {other}; {len(shared)} such prompts); remove it from one of the two files"
        )
    return train, heldout


def check_guards(cfg: Config) -> None:
    """The guards whose tolerance is set exist, and a factor is above 1."""
    for name, tolerance in cfg.evaluation.guards.items():
        if name not in GUARDS:
            raise ConfigError(
                f"evaluation.guards: there is no guard {name!r}{did_you_mean(name, GUARDS)}; there are "
                f"{', '.join(GUARDS)}"
            )
        if tolerance is not None and GUARDS[name].kind == "factor" and tolerance <= 1:
            raise ConfigError(
                f"evaluation.guards.{name}: found {tolerance:g}; expected a factor above 1 (2: from half to twice the "
                "value before training), or null to switch it off"
            )


def _routed(cfg: Config, prompts: Sequence[PromptItem], path: Path) -> list[PromptItem]:
    if any(ROUTING_KEY in prompt.metadata for prompt in prompts):
        check_routing(prompts, list(cfg.rewards), prompt_locations(path), path)
    return list(prompts)


def _under_key(key: str, load):
    try:
        return load()
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def check_rewards(cfg: Config) -> None:
    """Scorers exist, take their options, and fit the generator."""
    for name, reward in cfg.rewards.items():
        check_reward_name(name)
        check_reward(name, reward)
        if reward.gradient:
            check_gradient(name, reward)
        if not is_function_spec(reward.scorer) and cfg.prompts.heldout is not None:
            _check_relative(name, reward.scorer, cfg)
        for variable, value in reward.runtime_env.get("env_vars", {}).items():
            if value == MASK:
                raise ConfigError(
                    f"rewards.{name}.runtime_env.env_vars.{variable}: found {MASK}, which stands for a secret in a "
                    "run's config.yaml; set its value"
                )
        python = str(reward.runtime_env.get("py_executable", ""))
        if "/" in python and not cfg.ray.address and not Path(python.split()[0]).is_file():
            raise ConfigError(
                f"rewards.{name}.runtime_env.py_executable: there is no {python}; give an environment's bin/python "
                "that every node has"
            )
        if is_function_spec(reward.scorer) or cfg.generator.num_frames > 1:
            continue
        if scorer_class(reward.scorer).needs_clip:
            raise ConfigError(
                f"rewards.{name}.scorer: {reward.scorer} judges motion, but generator.num_frames is 1; "
                "take a frame scorer (`rushes score --list`) or a video generator"
            )


def _check_relative(name: str, scorer: str, cfg: Config) -> None:
    """A reward that compares the takes of a prompt sees all of them together, in evaluation too."""
    takes, batch = cfg.evaluation.takes_per_prompt, cfg.evaluation.batch
    if not scorer_class(scorer).relative:
        return
    if takes < 2:
        raise ConfigError(
            f"evaluation.takes_per_prompt: rewards.{name} ({scorer}) compares the takes of a prompt, and there is one; "
            "set 2 or more"
        )
    if batch % takes:
        raise ConfigError(
            f"evaluation.batch: rewards.{name} ({scorer}) compares the takes of a prompt: {batch} must be a multiple "
            f"of evaluation.takes_per_prompt ({takes}), such as {max(1, batch // takes) * takes}"
        )
