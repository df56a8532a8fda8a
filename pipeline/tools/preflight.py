"""Everything that can be checked before a model is loaded, in the order in which a user would fix it.

Each check raises one `ConfigError` or `InputError` naming the key or file and the fix. Takes well under a second
(torch is imported only if a GPU is asked for).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.resources import ROLE_RESOURCES, WorkerRange, total_resources
from pipeline.config.schema import Config
from pipeline.core.cluster_address import cluster_address
from pipeline.core.code_names import pipeline_names
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.files import describe_os_error, did_you_mean
from pipeline.core.prompts import check_prompt_lengths, load_prompts, prompt_locations
from pipeline.core.storage import check_store, url_of
from pipeline.core.types import PromptItem
from pipeline.generators.checkpoint_files import DENOISERS, check_diffusers_folder, is_local, read_json, weight_bytes
from pipeline.rewards.function import is_function_spec
from pipeline.rewards.registry import scorer_class
from pipeline.rewards.routing import KEY as ROUTING_KEY
from pipeline.rewards.routing import check_routing
from pipeline.rewards.runner import check_reward
from pipeline.rl.objectives import check_objective
from pipeline.rl.samplers import check_sampler, samplers_for
from pipeline.runs.paths import check_name

_TRACKERS = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}
_FLOW_CLASSES = ("FlowMatch",)


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What the checks read, for the plan that `train --dry-run` prints."""

    train: list[PromptItem]
    heldout: list[PromptItem]
    components: dict[str, str]  # of a local generator; {} for a hub id
    disk_needed: int  # bytes
    disk_free: int  # bytes
    lacking: str  # what the actors reserve and this machine does not have; "" if nothing


def check_all(cfg: Config, run_dir: Path | None = None, dry: bool = False) -> Preflight:
    """Raises the first thing that is wrong. `run_dir`: the run's folder, if it is known already. `dry`: a machine that
    is too small for the config is noted (`lacking`) and not refused, so that recipes can be checked anywhere."""
    if cfg.run.name:
        check_name(cfg.run.name)
    check_sampler(cfg)
    check_objective(cfg)
    check_samplers(cfg)
    train, heldout = check_prompts(cfg)
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
    """A training rollout must draw noise; what makes that impossible is refused."""
    steps = cfg.sampler.steps
    if steps < 2:
        raise ConfigError(
            f"sampler.steps: {steps} leaves no step that draws noise (one-step and ODE rollouts cannot train)"
        )
    if cfg.generator.fps > 240:
        raise ConfigError(f"generator.fps: found {cfg.generator.fps:g}; expected at most 240 frames per second")
    lengths = cfg.sampler.window
    if lengths.kind == "sliding" and lengths.every >= cfg.run.steps and cfg.run.steps > 1:
        raise ConfigError(
            f"sampler.window.every: {lengths.every} means the sliding window never moves in run.steps "
            f"= {cfg.run.steps}; "
            "make it smaller or use sampler.window.kind=random"
        )


def check_prompts(cfg: Config) -> tuple[list[PromptItem], list[PromptItem]]:
    """Both sets parse and share no prompt."""
    train = _under_key("prompts.train", lambda: _routed(cfg, cfg.prompts.train))
    if cfg.prompts.heldout is None:
        if cfg.evaluation.every:
            raise ConfigError(
                "evaluation.every: is set but prompts.heldout is not; give a file of prompts to evaluate on"
            )
        return train, []
    heldout_file = cfg.prompts.heldout
    heldout = _under_key("prompts.heldout", lambda: _routed(cfg, heldout_file))
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


def _routed(cfg: Config, path: Path) -> list[PromptItem]:
    prompts = load_prompts(path)
    if any(ROUTING_KEY in prompt.metadata for prompt in prompts):
        check_routing(prompts, list(cfg.rewards), prompt_locations(path), path)
    return prompts


def _under_key(key: str, load):
    try:
        return load()
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def check_generator(cfg: Config, train: list[PromptItem], heldout: list[PromptItem]) -> dict[str, str]:
    """A local folder is complete and fits the sizes asked for; a hub id passes."""
    _check_pipeline_name(cfg.generator.pipeline)
    if not is_local(cfg.generator.pretrained):
        return {}
    folder = Path(cfg.generator.pretrained).expanduser()
    components = _under_key(
        "generator.pretrained", lambda: check_diffusers_folder(folder, cfg.generator.pipeline is None)
    )
    if not set(DENOISERS) & set(components):
        raise ConfigError(
            f"generator.pretrained: {folder} has none of {', '.join(DENOISERS)} (components: "
            f"{', '.join(components)}); "
            "only diffusion pipelines can be trained"
        )
    _check_sizes(cfg, folder, components)
    _check_scheduler(cfg, folder, components)
    for prompts, path in ((train, cfg.prompts.train), (heldout, cfg.prompts.heldout)):
        check_prompt_lengths(prompts, str(folder), cfg.generator.call_kwargs, path)
    return components


def check_quantize(cfg: Config) -> None:
    """Raises `ConfigError` where the package for `generator.quantize` is missing."""
    if cfg.generator.quantize != "none" and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"generator.quantize: {cfg.generator.quantize} needs the package torchao; pip install 'rushes[quantize]', "
            "or use none"
        )


def _check_pipeline_name(name: str | None) -> None:
    """diffusers lists its classes in its __init__, which is read and not imported."""
    if name is None:
        return
    if name not in pipeline_names():
        hint = did_you_mean(name, sorted(pipeline_names()))
        hint = hint or "; it must be one of diffusers' own, such as LTXImageToVideoPipeline"
        raise ConfigError(f"generator.pipeline: diffusers has no pipeline class {name!r}{hint}")


def _check_sizes(cfg: Config, folder: Path, components: dict[str, str]) -> None:
    if "vae" not in components:
        return
    vae = read_json(folder / "vae" / "config.json")
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    if spatial is None and isinstance(vae.get("block_out_channels"), list):
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = 1
    if "transformer" in components:
        size = read_json(folder / "transformer" / "config.json").get("patch_size", 1)
        size = size[-1] if isinstance(size, list) and size else size
        patch = size if isinstance(size, int) else 1
    if isinstance(spatial, int | float):
        unit = int(spatial) * patch
        for key, value in (("height", cfg.generator.height), ("width", cfg.generator.width)):
            if value % unit:
                below, above = value // unit * unit, (value // unit + 1) * unit
                raise ConfigError(
                    f"generator.{key}: found {value}; {folder} needs a multiple of {unit} (VAE "
                    f"{int(spatial)} x patch {patch}), "
                    f"such as {below or above} or {above if below else above + unit}"
                )
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    frames = cfg.generator.num_frames
    if isinstance(temporal, int | float) and (frames - 1) % int(temporal):
        step = int(temporal)
        below = (frames - 1) // step * step + 1
        raise ConfigError(
            f"generator.num_frames: found {frames}; {folder} needs {step} n + 1, such as {below} or {below + step}"
        )


def _check_scheduler(cfg: Config, folder: Path, components: dict[str, str]) -> None:
    if "scheduler" not in components:
        return
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    flow = (
        components["scheduler"].startswith(_FLOW_CLASSES)
        or scheduler.get("prediction_type") == "flow_prediction"
        or bool(scheduler.get("use_flow_sigmas"))
    )
    prediction = "flow" if flow else scheduler.get("prediction_type")
    fitting = samplers_for(str(prediction), components["scheduler"])
    if fitting and cfg.sampler.kind not in fitting:
        raise ConfigError(
            f"sampler.kind: {cfg.sampler.kind} does not fit {folder}, which predicts {prediction} "
            f"({components['scheduler']}); use {' or '.join(fitting)}"
        )


def check_rewards(cfg: Config) -> None:
    """Scorers exist, take their options, and fit the generator."""
    for name, reward in cfg.rewards.items():
        check_reward(name, reward)
        if not is_function_spec(reward.scorer) and cfg.prompts.heldout is not None:
            _check_relative(name, reward.scorer, cfg)
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
    """A reward that compares the takes of a prompt must be shown all of them together, in evaluation too."""
    takes, batch = cfg.evaluation.takes_per_prompt, cfg.evaluation.batch
    if not getattr(scorer_class(scorer), "relative", False):
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


def check_trackers(cfg: Config) -> None:
    for backend in cfg.tracking.backends:
        module, extra = _TRACKERS[backend]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"tracking.backends: {backend} needs the package {module}, which is not installed; "
                f"run pip install 'rushes[{extra}]' or remove it from the list"
            )


def check_devices(cfg: Config) -> None:
    for key, device in (("learner.device", cfg.learner.device), ("rollout.device", cfg.rollout.device)):
        found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
        if not found:
            raise ConfigError(f"{key}: found {device!r}; expected auto, cpu, cuda or cuda:N")
        if not device.startswith("cuda") or _joins_cluster(cfg):
            continue
        count = _gpu_count()
        if count == 0:
            raise ConfigError(
                f"{key}: {device} is asked for, but torch finds no GPU here; use auto or cpu, or install a CUDA build"
            )
        if found.group(1) and int(found.group(1)) >= count:
            raise ConfigError(
                f"{key}: {device} is asked for, but there are only {count} GPUs (cuda:0..cuda:{count - 1})"
            )


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _joins_cluster(cfg: Config) -> bool:
    """Whether the run will use an existing Ray instead of starting a local one."""
    return cluster_address(cfg.ray.address) is not None


def check_ray(cfg: Config, dry: bool = False) -> str:
    """A local Ray has the CPUs and GPUs that the actors reserve (else they would wait for ever), and a free port.

    `dry`: what only the machine lacks is returned in words instead of raised.
    """
    if _joins_cluster(cfg):
        return ""
    rewards = cfg.rewards.values()
    needs = total_resources(
        [
            (WorkerRange(cfg.learner.ranks, cfg.learner.ranks), cfg.learner.resources),
            (cfg.rollout.workers, cfg.rollout.resources),
            *((reward.workers, reward.resources) for reward in rewards),
        ]
    )
    cpus, gpus = needs.get("CPU", 0.0), needs.get("GPU", 0.0)
    have = cfg.ray.num_cpus or os.cpu_count() or 1
    lacking = []
    if cpus > have + 1e-6:
        if not dry or cfg.ray.num_cpus:
            raise ConfigError(
                f"ray.init.num_cpus: the actors reserve {cpus:g} CPUs (rollout.workers x rollout.resources.CPU + "
                "learner.ranks x learner.resources.CPU + rewards), "
                f"but the local Ray has {have}; lower them or set ray.init.num_cpus={int(-(-cpus // 1))}"
            )
        lacking.append(f"{cpus:g} CPUs (it has {have})")
    if gpus > 0 and gpus > _gpu_count() + 1e-6:
        if not dry:
            raise ConfigError(
                f"learner.resources.GPU, rollout.resources.GPU: the actors reserve {gpus:g} GPUs, but torch finds "
                f"{_gpu_count()} here; "
                "set them to 0 or join a cluster with ray.address"
            )
        lacking.append(f"{gpus:g} GPUs (it has {_gpu_count()})")
    known = {"CPU", "GPU", "memory", *ROLE_RESOURCES, *cfg.ray.init.get("resources", {})}
    unknown = [name for name, amount in needs.items() if amount and name not in known]
    if unknown:
        raise ConfigError(
            f"resources.{unknown[0]}: a local Ray announces no such resource (it has {', '.join(sorted(known))}); "
            "leave it out or join a cluster with ray.address"
        )
    port = cfg.ray.dashboard_port
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise ConfigError(
                    f"ray.init.dashboard_port: port {port} is taken by another program; choose another one, such as "
                    f"ray.init.dashboard_port={port + 1}, or leave it out"
                ) from None
    return " and ".join(lacking)


def check_writable(folder: Path, key: str = "run.dir") -> None:
    """Creates the folder and writes into it. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rushes-write-test-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise ConfigError(f"{key}: cannot write {describe_os_error(error, folder)}") from None


def check_disk(cfg: Config, folder: Path) -> tuple[int, int]:
    """(bytes a run needs at most, roughly; bytes free). Raises `ConfigError`."""
    denoisers = 0
    if is_local(cfg.generator.pretrained):
        root = Path(cfg.generator.pretrained).expanduser()
        denoisers = sum(weight_bytes(root / name) for name in DENOISERS)
    share = 1.0 if cfg.trainable.kind == "full" else 0.05
    one = int(denoisers * share * 4)  # weights, two Adam moments, EMA
    needed = 50 * 2**20 + one * (cfg.checkpoint.keep + 1) + int(denoisers * share) * 2
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.dir: {folder} has {free / 2**20:,.0f} MiB free, a run needs about "
            f"{needed / 2**20:,.0f} MiB; free some "
            "space, choose another run.dir or lower checkpoint.keep"
        )
    return needed, free
