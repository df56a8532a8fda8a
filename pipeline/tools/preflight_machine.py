"""Preflight rules about this machine: packages, devices, Ray's resources, folders and disk space."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from pipeline.config.messages import show
from pipeline.config.resources import ROLE_RESOURCES, WorkerRange, total_resources
from pipeline.config.schema import Config
from pipeline.core.cluster_address import cluster_address
from pipeline.core.errors import ConfigError
from pipeline.core.files import describe_os_error
from pipeline.generators.checkpoint_files import DENOISERS, is_local, weight_bytes

_TRACKERS = {  # backend -> (module, extra of the package rushes)
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


def check_trackers(cfg: Config) -> None:
    """The packages of the configured trackers are installed."""
    for backend in cfg.tracking.backends:
        module, extra = _TRACKERS[backend]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"tracking.backends: {backend} needs the package {module}, which is not installed; "
                f"run pip install 'rushes[{extra}]' or remove it from the list"
            )


def check_devices(cfg: Config) -> None:
    """Devices are well-formed, and for a local run they exist on this machine."""
    for key, device in (("learner.device", cfg.learner.device), ("rollout.device", cfg.rollout.device)):
        match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
        if not match:
            raise ConfigError(f"{key}: found {show(device)}; expected auto, cpu, cuda or cuda:N")
        if not device.startswith("cuda") or joins_cluster(cfg):
            continue
        count = gpu_count()
        if count == 0:
            raise ConfigError(
                f"{key}: found {device}, but torch finds no GPU here; use auto or cpu, or install a CUDA build"
            )
        if match.group(1) and int(match.group(1)) >= count:
            raise ConfigError(f"{key}: found {device}, but there are only {count} GPUs (cuda:0..cuda:{count - 1})")


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def joins_cluster(cfg: Config) -> bool:
    """Whether the run will use an existing Ray instead of starting a local one."""
    return cluster_address(cfg.ray.address) is not None


def check_ray(cfg: Config, dry: bool = False) -> str:
    """A local Ray has the resources that the actors reserve (they would wait forever for the rest), and a free port.

    `dry`: what only this machine lacks is returned as text instead of raised.
    """
    if joins_cluster(cfg):
        return ""
    lacking = _lacking_resources(cfg, dry)
    _check_dashboard_port(cfg.ray.dashboard_port)
    return " and ".join(lacking)


def _lacking_resources(cfg: Config, dry: bool) -> list[str]:
    reserved = total_resources(
        [
            (WorkerRange(cfg.learner.ranks, cfg.learner.ranks), cfg.learner.resources),
            (cfg.rollout.workers, cfg.rollout.resources),
            *((cfg.rewards[name].workers, cfg.rewards[name].resources) for name in cfg.served_rewards),
        ]
    )
    cpus, gpus = reserved.get("CPU", 0.0), reserved.get("GPU", 0.0)
    available_cpus = cfg.ray.num_cpus or os.cpu_count() or 1
    lacking = []
    if cpus > available_cpus + 1e-6:
        if not dry or cfg.ray.num_cpus:
            raise ConfigError(
                f"ray.init.num_cpus: the actors reserve {cpus:g} CPUs (rollout.workers x rollout.resources.CPU + "
                f"learner.ranks x learner.resources.CPU + rewards), but the local Ray has {available_cpus}; lower them "
                f"or set ray.init.num_cpus={math.ceil(cpus)}"
            )
        lacking.append(f"{cpus:g} CPUs (it has {available_cpus})")
    if gpus > 0 and gpus > gpu_count() + 1e-6:
        if not dry:
            raise ConfigError(
                f"learner.resources.GPU, rollout.resources.GPU: the actors reserve {gpus:g} GPUs, but torch finds "
                f"{gpu_count()} here; set them to 0 or join a cluster with ray.address"
            )
        lacking.append(f"{gpus:g} GPUs (it has {gpu_count()})")
    announced = {"CPU", "GPU", "memory", *ROLE_RESOURCES, *cfg.ray.init.get("resources", {})}
    for name, amount in reserved.items():
        if amount and name not in announced:
            raise ConfigError(
                f"resources.{name}: a local Ray announces no such resource (it has {', '.join(sorted(announced))}); "
                "leave it out or join a cluster with ray.address"
            )
    return lacking


def _check_dashboard_port(port: int | None) -> None:
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(
                f"ray.init.dashboard_port: port {port} is taken by another program; choose another one, such as "
                f"ray.init.dashboard_port={port + 1}, or leave it out"
            ) from None


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
    """(upper estimate of the bytes a run writes, bytes free). Raises `ConfigError`."""
    denoisers = 0
    if is_local(cfg.generator.pretrained):
        root = Path(cfg.generator.pretrained).expanduser()
        denoisers = sum(weight_bytes(root / name) for name in DENOISERS)
    share = 1.0 if cfg.trainable.kind == "full" else 0.05
    checkpoint = int(denoisers * share * 4)  # weights, two Adam moments, EMA
    needed = 50 * 2**20 + checkpoint * (cfg.checkpoint.keep + 1) + int(denoisers * share) * 2
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.dir: {folder} has {free / 2**20:,.0f} MiB free, a run needs about {needed / 2**20:,.0f} MiB; free "
            "some space, choose another run.dir or lower checkpoint.keep"
        )
    return needed, free
