"""Learner ranks as processes without Ray. They come from a fork server, so that torch is imported once."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config


def run_ranks(world: int, cases: list[dict[str, Any]], context: int = 1) -> list[Any]:
    """Trains every case with `world` ranks that stay together; returns rank 0's result of each case.

    A case: {"config": plain config, "steps": [batches], "resume": folder or None, "save": folder}.
    """
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["pipeline.learner.learner", "pipeline.generators.policy"])
    answers: Any = ctx.Queue()
    port: Any = ctx.Queue()
    ranks = [
        ctx.Process(target=_rank, args=(rank, world, context, cases, port, answers), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    results = []
    try:
        for _ in range(world):
            rank, result = answers.get(timeout=300)
            if isinstance(result, str):
                raise AssertionError(f"rank {rank}:\n{result}")
            if rank == 0:
                results = result
    except queue.Empty:
        raise AssertionError("the ranks did not end") from None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return results


def _rank(rank: int, world: int, context: int, cases: list[dict[str, Any]], port: Any, answers: Any) -> None:
    try:
        answers.put((rank, _train(rank, world, context, cases, port)))
    except Exception:
        answers.put((rank, traceback.format_exc()))


def _train(rank: int, world: int, context: int, cases: list[dict[str, Any]], port: Any) -> list[Any]:
    import torch

    from pipeline.learner.distributed import join, listen

    torch.set_num_threads(1)
    opened = listen("127.0.0.1") if rank == 0 else None
    if opened is not None:
        for _ in range(world - 1):
            port.put(opened.getsockname()[1])
    address = ("127.0.0.1", opened.getsockname()[1] if opened is not None else port.get(timeout=120))
    distributed = join(rank, world, address, torch.device("cpu"), context, opened)
    return [one_case(case, distributed) for case in cases]


def one_case(case: dict[str, Any], distributed: Any = None) -> Any:
    """Metrics of the steps and the EMA's weight set; a checkpoint in `save`. Also for a learner of one process."""
    from pipeline.core.errors import RushesError
    from pipeline.learner.learner import Learner
    from pipeline.learner.micro_batch import micro_batch_specs
    from pipeline.runs import checkpoint

    cfg = Config.model_validate(case["config"])
    try:
        learner = Learner(cfg, "cpu", distributed)
    except RushesError as error:
        return f"{type(error).__name__}: {error}"
    if case["resume"] is not None:
        tensors, state = checkpoint.load(Path(case["resume"]))
        learner.load_state(tensors, state["learner"])
    metrics, read = [], []
    for groups in case["steps"]:
        needed = learner.groups_to_read(groups)
        read.append(needed)
        given = [
            replace(
                g, trajectory=g.trajectory if i in needed else None, micro_batches=micro_batch_specs(cfg, g.trajectory)
            )
            for i, g in enumerate(groups)
        ]
        metrics.append(learner.train_step(given if distributed is not None else groups))
    weights = learner.weights("ema")
    tensors, meta = learner.state()
    if learner.distributed.is_main:
        checkpoint.save(Path(case["save"]), learner.version, tensors, meta, {"version": learner.version}, cfg, 1)
    local = sum(_local(p).numel() for m in learner.modules.values() for p in m.parameters())
    return {"metrics": metrics, "read": read, "ema": weights, "local_parameters": local}


def _local(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
