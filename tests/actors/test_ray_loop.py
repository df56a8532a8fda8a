"""The whole loop on a real local Ray, with a tiny random-weight generator."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
from ray.util import placement_group_table
from ray_run import Run, make_config, write_files
from rich.console import Console

from actors import learner_group
from actors.ray_options import RunContext, to_bytes
from actors.rollout_worker import RolloutWorker
from jobs.launch.supervise import supervise
from pipeline.config.schema import Config
from pipeline.core.errors import RunFailed, UnsupportedPolicyError
from pipeline.core.tensors import checksum, tree_bytes
from pipeline.core.types import PolicyVersion, PromptItem
from pipeline.rl.group_plan import train_work
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_sd3, files, tmp_path_factory) -> Run:
    runs = tmp_path_factory.mktemp("runs")
    cfg = make_config(tiny_sd3, files, runs, "slow", run={"steps": 4}, evaluation={"every": 2})
    run = Run(cfg, "undisturbed")
    run.outcome = run.result()
    return run


def same_results(run: Run, other: Run) -> None:
    assert run.metrics() == other.metrics()
    assert run.evals() == other.evals()
    mine, theirs = run.tensors(4), other.tensors(4)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def test_a_run_ends_with_all_its_artefacts(undisturbed):
    run, outcome = undisturbed, undisturbed.outcome
    assert outcome["status"] == "finished" and outcome["step"] == 4 and outcome["takes"] == 32
    assert outcome["groups"] == {"admitted": 8, "trained": 8, "filtered": 0, "failed": 0}
    steps = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["onpolicy/max_abs_log_ratio"] < 1e-5 and line["staleness/max"] == 0 for line in steps)
    assert steps[0]["reward/mean"] == steps[0]["reward/own"] and steps[0]["grad_norm"] > 0
    evals = run.evals()
    assert [(e["step"], e["tag"], e["n"]) for e in evals] == [(0, "ema", 4), (2, "ema", 4), (4, "ema", 4)]
    assert evals[0]["mean"] != evals[2]["mean"]
    for step in (0, 2, 4):
        assert len(list(run.dir.eval_takes(step).glob("*.png"))) == 4
    assert [checkpoint.step_of(p) for p in checkpoint.complete(run.dir.checkpoints)] == [4, 3, 2, 1]
    assert list(Path(outcome["export"]).iterdir())
    log = run.dir.log.read_text()
    assert "role=rollout worker=rollout-0" in log and "role=controller" in log


def test_a_run_is_scaled_seen_in_the_metrics_and_loses_a_stuck_worker(cluster, tiny_sd3, files, tmp_path, capsys):
    """`rushes scale` reaches the controller, a second worker comes and works. Every metric of ours in the Grafana
    dashboard, the pool's new size among them, is in the Prometheus endpoint that Ray itself serves. Then the second
    worker stands still, alive: its group goes to the other one, and it is replaced."""
    from command import run as rushes
    from dashboard_queries import expressions

    absent = {"ray_rushes_gpu_bytes"}  # no GPU here
    absent |= {"ray_rushes_onpolicy_max_abs_gap", "ray_rushes_onpolicy_max_abs_tail_gap"}  # of other objectives
    absent |= {"ray_rushes_verdict_suspect"}  # known with the second evaluation
    wanted = set(re.findall(r"\bray_rushes_\w+", re.sub(r"__name__=[^,}]+", "", " ".join(expressions())))) - absent
    patterns = [re.compile(text) for text in re.findall(r'__name__=~"([^"]+)"', " ".join(expressions()))]
    assert len(wanted) > 20 and len(patterns) > 3
    cfg = make_config(
        tiny_sd3,
        files,
        tmp_path,
        "slow",
        run={"steps": 500},
        checkpoint={"every": 0},
        step={"max_staleness": 1},
        objective={"kl_beta": 1e-3},  # the KL is a metric then
        faults={"call_timeout_s": 6},
    )
    run = Run(cfg, "seen")
    run.until(lambda s: s["step"] >= 1)
    at = ["--address", ray.get_runtime_context().gcs_address]
    status, said, _ = rushes(capsys, "scale", "seen", "rollout=2", *at)
    assert (status, said) == (0, "rollout: 1 -> 2 workers\n")
    status, _, error = rushes(capsys, "scale", "seen", "reward.onw=2", *at)
    assert status == 2 and "did you mean reward.own?" in error and error.count("\n") == 1
    status, _, error = rushes(capsys, "scale", "sene", "rollout=2", *at)
    assert status == 2 and "did you mean seen?" in error
    status, said, _ = rushes(capsys, "status", "seen", *at)
    assert status == 0 and "rollout-1" in said
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    limit, missing, lines = time.monotonic() + 120, ["not scraped yet"], []
    while missing and time.monotonic() < limit:
        time.sleep(1)
        with contextlib.suppress(OSError):  # Ray's agent comes up after the actors
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            lines = [line for line in text.splitlines() if 'run="seen"' in line]
        found = {re.match(r"\w+", line).group() for line in lines}
        missing = sorted(wanted - found) + [p.pattern for p in patterns if not any(p.fullmatch(n) for n in found)]
        labels = {label for line in lines for label in re.findall(r'(?:worker|phase)="[^"]+"', line)}
        takes = {label for line in lines if "takes_total" in line for label in re.findall(r'worker="[^"]+"', line)}
        missing += sorted({f'phase="{phase}"' for phase in ("starting", "generating", "scoring", "training")} - labels)
        missing += sorted({'worker="rollout-0"', 'worker="rollout-1"', 'worker="reward.own-0"'} - takes)
        missing += [] if workers_of(lines) == 2 else ["the second worker"]
    assert not missing
    pid = run.until(lambda s: s["activities"]["rollout-1"].startswith("train group"))["pids"]["rollout-1"]
    os.kill(pid, signal.SIGSTOP)
    run.until(lambda s: s["pids"].get("rollout-1") not in (None, pid))
    _gone(pid)
    assert re.search(r"replacing rollout-1 on .* within 6 s \(faults.call_timeout_s\)", run.dir.log.read_text())
    ray.get(run.controller.stop.remote())
    outcome = run.result()
    assert outcome["status"] == "stopped" and outcome["groups"]["failed"] == 0
    assert outcome["groups"]["trained"] == 2 * outcome["step"]
    steps = [line["staleness/max"] for line in run.metrics() if "staleness/max" in line]
    assert max(steps) == 1


def workers_of(lines: list[str]) -> float:
    """The size of the rollout pool in scraped lines."""
    return max([float(line.split()[-1]) for line in lines if line.startswith("ray_rushes_workers_rollout")] or [0.0])


def test_two_learner_ranks_train_as_one_and_are_lost_as_one(cluster, undisturbed):
    """The second rank dies before there is a checkpoint: both start from the beginning."""
    sections = {**undisturbed.cfg.model_dump(mode="json"), "checkpoint": {"every": 0, "keep": 1}}
    sections["learner"]["ranks"] = 2
    run = Run(Config.model_validate(sections), "ranks")
    pids = run.until(lambda s: s["step"] >= 1)["pids"]
    os.kill(pids["learner-1"], signal.SIGKILL)
    outcome = run.result()
    assert outcome["groups"] == undisturbed.outcome["groups"]
    log = run.dir.log.read_text()
    assert "learner-1 on" in log and "starting it again from the beginning" in log
    assert log.count("learner-0 is process") == 2 and not psutil.pid_exists(pids["learner-0"])
    for mine, theirs in zip(run.metrics(), undisturbed.metrics(), strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("loss", "grad_norm", "reward/mean", "heldout/mean", "ratio/mean"):
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-2, abs=1e-3), key
    one, two = undisturbed.tensors(4), run.tensors(4)
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)


def test_a_learner_that_always_dies_ends_the_run_by_name(cluster, tiny_sd3, files, tmp_path):
    cfg = make_config(tiny_sd3, files, tmp_path, prompts={"heldout": None}, faults={"max_restarts": 0})
    run = Run(cfg, "hopeless")
    os.kill(run.until(lambda s: "learner" in s["pids"])["pids"]["learner"], signal.SIGKILL)
    error = run.failure()
    assert isinstance(error, RunFailed) and str(error).startswith("learner on ")
    assert "its process died" in str(error) and "continue with --resume" in str(error)


def test_a_learner_group_says_what_it_waits_for(cluster, tiny_sd3, files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(learner_group, "MAX_WAIT_S", 0.6)
    monkeypatch.setattr(learner_group, "FIRST_WARNING_S", 0.3)
    cfg = make_config(tiny_sd3, files, tmp_path, learner={"ranks": 2, "resources": {"CPU": 5}})
    group = learner_group.LearnerGroup(RunContext(cfg=cfg, run_path=str(tmp_path), cwd=os.getcwd()))
    try:
        with pytest.raises(RunFailed, match=r"no resources .* waiting for 2 × \{CPU: 5\}; the cluster has CPU 8 \("):
            asyncio.run(group.start(None))
    finally:
        group.stop()
    assert "waiting for 2 × {CPU: 5}" in caplog.text


def test_a_killed_worker_learner_and_controller_change_nothing(cluster, undisturbed):
    """One after the other: the worker is replaced, the learner restarts from the checkpoint, and so does a controller
    in place of the killed one."""
    run = object.__new__(Run)
    run.dir = RunDir(undisturbed.cfg.run.dir / "killed")
    run.dir.path.mkdir()
    said, signals = io.StringIO(), SimpleNamespace(stop_requested=False)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(supervise, undisturbed.cfg, run.dir, None, signals, Console(file=said), False)
        while (controller := _named("killed/controller")) is None:
            assert not ended.done(), ended.result()
            time.sleep(0.05)
        run.controller = controller
        seen = run.until(lambda s: s["step"] >= 1 and s["activities"]["rollout-0"].startswith("train group"))
        os.kill(seen["pids"]["rollout-0"], signal.SIGKILL)
        seen = run.until(lambda s: s["step"] >= 2 and s["activities"]["rollout-0"].startswith("train group"))
        os.kill(seen["pids"]["learner"], signal.SIGKILL)
        run.until(lambda s: s["pids"].get("learner") not in (None, seen["pids"]["learner"]) and s["step"] >= 2)
        log = run.dir.log.read_text()
        assert "replacing rollout-0" in log and "starting it again from" in log
        assert log.count("rollout-0 is process") == 2  # the second one stayed when the learner died
        os.kill(ray.get(controller.info.remote())["pid"], signal.SIGKILL)
        outcome = ended.result(300)
    assert outcome["status"] == "finished" and outcome["groups"] == undisturbed.outcome["groups"]
    assert outcome["takes"] == 32
    assert "its process died" in said.getvalue() and "continuing at step" in said.getvalue()
    rooms = [room for room in placement_group_table().values() if room["name"].startswith("killed/")]
    assert [room["state"] for room in rooms] == ["REMOVED"] * 2, "a dead controller's learner still has its resources"
    same_results(run, undisturbed)


def _named(name: str):
    """The actor of this name, or None while there is none."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(name)
    return None


def test_killed_at_a_random_moment_and_resumed(cluster, undisturbed):
    run = Run(undisturbed.cfg, "resumed")
    run.until(lambda s: checkpoint.latest(run.dir.checkpoints) is not None)  # written beside the second step
    time.sleep(random.Random().uniform(0, 0.8))
    pids = run.until(lambda s: True)["pids"]
    ray.kill(run.controller)
    limit = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids.values()):  # its actors end with it
        assert time.monotonic() < limit, "actors outlive their controller"
        time.sleep(0.05)
    folder = checkpoint.latest(run.dir.checkpoints)
    assert folder is not None
    resumed = Run(undisturbed.cfg, "resumed", folder)
    assert resumed.result()["status"] == "finished"
    same_results(resumed, undisturbed)


def test_a_reward_that_raises_ends_the_run_by_name(cluster, tiny_sd3, files, tmp_path):
    faults = {"max_attempts": 2, "max_failed_groups": 1}
    cfg = make_config(tiny_sd3, files, tmp_path, "broken", prompts={"heldout": None}, faults=faults)
    error = Run(cfg, "broken").failure()
    text = str(error)
    assert isinstance(error, RunFailed) and "\n" not in text
    assert "2 groups in a row failed, each after 2 attempts" in text
    assert "reward.own-0 on " in text and os.uname().nodename in text
    assert "ZeroDivisionError: the scorer's own words" in text and "RayTaskError" not in text
    log = (tmp_path / "broken" / "run.log").read_text()
    assert "Traceback" in log and "role=reward worker=reward.own-0 group=0" in log


def test_equal_rewards_are_filtered_and_a_hopeless_step_ends_the_run(cluster, tiny_sd3, files, tmp_path):
    cfg = make_config(
        tiny_sd3,
        files,
        tmp_path,
        "flat",
        prompts={"heldout": None},
        step={"groups": 1, "takes": 2},
        signal={"zero_std": "filter"},
    )
    error = Run(cfg, "flat").failure()
    assert isinstance(error, RunFailed) and "20 groups had equal rewards" in str(error)


def test_a_start_up_error_is_the_original_one(cluster, tiny_sd3, files, tmp_path):
    cfg = make_config(tiny_sd3, files, tmp_path, sampler={"kind": "ddim"})
    error = Run(cfg, "unsupported").failure()
    assert isinstance(error, UnsupportedPolicyError) and str(error).startswith("sampler.kind: ddim")


def test_a_stuck_worker_is_found_and_the_evaluation_fails_by_name(cluster, tiny_sd3, files, tmp_path):
    cfg = make_config(tiny_sd3, files, tmp_path, faults={"max_attempts": 1, "call_timeout_s": 0.01})
    error = Run(cfg, "stuck").failure()
    assert isinstance(error, RunFailed)
    assert "the evaluation at step 0 failed after 1 attempts in rollout-0 on" in str(error)
    assert "within 0.01 s (faults.call_timeout_s)" in str(
        error
    )  # holding the version, or generating: whichever it was at


def _gone(pid: int) -> None:
    """Returns once the process has ended."""
    limit = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < limit, f"process {pid} does not end"
        time.sleep(0.02)


def _spilled_mib() -> int:
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address  # without it, any Ray of this machine would answer
    found = re.search(r"Spilled (\d+) MiB", memory_summary(address, stats_only=True))
    return int(found.group(1)) if found else 0


def test_results_outlive_the_worker_that_made_them_and_a_full_object_store(cluster, tiny_sd3, files, tmp_path):
    """The controller calls and so owns; here the test is the caller. What others keep in the store (200 MiB), half as
    much again as it holds, goes to the disk, as these results do: nothing is dropped, nobody is killed."""
    cfg = make_config(tiny_sd3, files, tmp_path, sampler={"steps": 30})
    ctx = RunContext(cfg=cfg, run_path=str(tmp_path), cwd=os.getcwd())
    worker = ray.remote(RolloutWorker).remote(ctx, "rollout-0")
    prompt = PromptItem(index=0, text="a red circle")
    pid = ray.get(worker.start.remote([prompt]))["pid"]
    with pytest.raises(ray.exceptions.RayTaskError, match="holding None"):
        order = to_bytes(([train_work(cfg, 0, 0, prompt)], (0, "", "")))
        ray.get(worker.generate.options(num_returns=3).remote(order, None)[0])
    weights = _weights(cfg)
    version = PolicyVersion(number=0, tag="train", checksum=weights.checksum, weights=ray.put(weights))
    assert weights.checksum == checksum(weights.tensors)
    works = [train_work(cfg, i, 0, prompt) for i in range(2)]
    other = replace(version, checksum="0")
    with pytest.raises(ray.exceptions.RayTaskError, match="holds weights .* published were 0"):
        ray.get(worker.generate.options(num_returns=3).remote(to_bytes((works[:1], other.key)), version.weights)[0])
    order = to_bytes((works[:1], version.key))
    metas, media, trajectory = worker.generate.options(num_returns=3).remote(order, version.weights)
    others = [ray.put(np.full(20 * 2**20, i, np.uint8)) for i in range(15)]
    assert ray.get(metas)[0].worker == "rollout-0"
    again = worker.generate.options(num_returns=3).remote(to_bytes((works[1:], version.key)), None)
    assert len(ray.get(again[2]).parts[0].steps) == 29 and _spilled_mib() >= 80
    os.kill(pid, signal.SIGKILL)
    _gone(pid)
    assert all(ray.get(other)[0] == i for i, other in enumerate(others))
    assert ray.get(media).frames.shape[0] == 4
    parts = ray.get(trajectory).parts
    assert len(parts[0].steps) == 29 and tree_bytes([step.sample for step in parts[0].steps]) > 0


def _weights(cfg: Config):
    from pipeline.learner.learner import Learner

    return Learner(cfg, "cpu").weights("train")
