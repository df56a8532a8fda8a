"""`rushes doctor`: checks everything a run needs and prints, line by line, what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import RushesError, one_line

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "ray",
    "safetensors",
    "av",
    "decord",
    "pyarrow",
    "tensorboardX",
)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    level: str  # OK | WARN | FAIL
    subject: str
    detail: str


@command(Group.LOOK)
def doctor(
    run_dir: Annotated[Path, typer.Option("--dir", help="Where runs will be written.")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """Check the installation and this machine.

    Packages, devices, codecs, Ray, disk and memory: one line each, with what to do. The exit status is 1 if one failed.

    \b
    Example:
      rushes doctor
    """
    colours = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    console = make_console()
    failed = warned = 0
    for finding in findings(run_dir):
        failed += finding.level == "FAIL"
        warned += finding.level == "WARN"
        console.print(f"[{colours[finding.level]}]{finding.level:<4}[/] {finding.subject:<14} ", end="")
        console.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
    if failed:
        say(console, f"{failed} of the checks failed: do what their lines say, then run `rushes doctor` again")
        raise typer.Exit(1)
    say(console, f"ready{f', with {warned} warnings' if warned else ''}; try: rushes train configs/quickstart.yaml")


def findings(run_dir: Path) -> Iterator[Finding]:
    """Runs each check by itself, so that one that breaks does not hide the others."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python, check_packages, check_decord, check_devices, check_ray, check_codecs,
        lambda: check_disk(run_dir), check_memory, check_shared_memory,
    ]  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation can raise anything
            name = getattr(check, "__name__", "check").removeprefix("check_").removeprefix("<lambda>") or "disk"
            yield Finding(
                "FAIL",
                name,
                f"{type(error).__name__}: {one_line(error)}; reinstall: pip install -e .",
            )


def check_python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    fix = "" if ok else "; Rushes needs 3.11 or newer"
    yield Finding(
        "OK" if ok else "FAIL",
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}{fix}",
    )


def check_packages() -> Iterator[Finding]:
    working, broken = [], []
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a wheel for another platform may raise anything on import
            broken.append(
                Finding(
                    "FAIL",
                    name,
                    f"cannot be imported ({type(error).__name__}: {str(error)[:120]}); pip install -e .",
                )
            )
            continue
        working.append(f"{name} {getattr(module, '__version__', '') or _version(name)}".strip())
    yield Finding("OK" if not broken else "WARN", "packages", ", ".join(working))
    yield from broken


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_decord() -> Iterator[Finding]:
    if _version("decord") and _version("decord2"):
        yield Finding(
            "FAIL",
            "decord",
            "decord and decord2 are both installed and overwrite each other; pip uninstall -y decord "
            "decord2 && pip install decord2",
        )


def check_devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("OK", "cpu", f"{cores} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(i)
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: set generator.dtype=float16"
            yield Finding("OK", f"cuda:{i}", f"{props.name}, {props.total_memory / GIB:.0f} GiB, {bf16}")
        (torch.ones(8, device="cuda") * 2).sum().item()
    elif torch.version.cuda:
        yield Finding(
            "WARN",
            "gpu",
            f"torch is built for CUDA {torch.version.cuda} but finds no GPU; check nvidia-smi and the driver",
        )
    else:
        yield Finding("OK", "gpu", "none (CPU build of torch); the quickstarts do not need one")


def check_ray() -> Iterator[Finding]:
    from pipeline.core.cluster_address import cluster_address

    address = cluster_address()
    if address is None:
        yield Finding("OK", "ray", "none running: each run starts a local one")
    elif os.environ.get("RAY_ADDRESS"):
        yield Finding("OK", "ray", f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: runs join this cluster")
    else:
        yield Finding(
            "OK", "ray", f"a cluster runs at {address}: runs join it (ray.address=local makes them start their own)"
        )


def check_codecs() -> Iterator[Finding]:
    from pipeline.core.media import h264_round_trip

    try:
        error = h264_round_trip()
    except RushesError as problem:
        yield Finding("FAIL", "h264", str(problem))
        return
    good = error < 24
    fix = "" if good else "; colours come back wrong: pip install --force-reinstall av"
    yield Finding(
        "OK" if good else "FAIL",
        "h264",
        f"PyAV writes it and reads it back, largest pixel error {error:.0f} of 255{fix}",
    )


def check_disk(run_dir: Path) -> Iterator[Finding]:
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        yield Finding("FAIL", "runs folder", f"{folder} cannot be written; set run.dir to a folder of yours")
    free = shutil.disk_usage(folder).free / GIB
    level = "OK" if free > 5 else "WARN" if free > 0.5 else "FAIL"
    fix = "" if level == "OK" else "; free some space or set run.dir to another disk"
    yield Finding(level, "disk", f"{free:.1f} GiB free in {folder}{fix}")


def check_memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free = memory.available / GIB
    level = "OK" if free > 6 else "WARN" if free > 3 else "FAIL"
    fix = "" if level == "OK" else "; the quickstarts need up to 6 GiB: close other programs"
    yield Finding(level, "memory", f"{free:.1f} of {memory.total / GIB:.1f} GiB available{fix}")


def check_shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding(
            "WARN",
            "shared memory",
            "no /dev/shm: Ray's object store will use the disk, slower; in Docker add --shm-size=2g",
        )
        return
    free = shutil.disk_usage(shm).free / GIB
    level = "OK" if free > 0.6 else "WARN"
    fix = (
        ""
        if level == "OK"
        else "; Ray will use the disk, slower: in Docker add --shm-size=2g, or lower ray.init.object_store_memory"
    )
    yield Finding(level, "shared memory", f"{free:.1f} GiB free in /dev/shm{fix}")
