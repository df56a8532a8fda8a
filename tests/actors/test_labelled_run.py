"""DPO on a table of labelled pairs, on a real local Ray: nothing is drawn or scored in training, a resumed run goes on
bit for bit, and files that cannot be read fail their groups alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from labelled_table import SECTIONS, write_table
from ray_run import Run, write_files

from pipeline.config.schema import Config
from pipeline.runs import checkpoint

pytestmark = pytest.mark.ray
STEPS = 3


def config(sd3: Path, root: Path, table: Path, **sections) -> Config:
    return tiny.config(
        sd3,
        run={"dir": str(root / "runs"), "steps": STEPS},
        prompts={"train": table, "heldout": root / "heldout.txt"},
        rewards={"r": {"scorer": f"{root / 'rewards.py'}:brightness"}},
        evaluation={"prompts": 2, "steps": 2, "batch": 2},
        optimizer={"lr": 1e-2, "ema_decay": 0.9},
        checkpoint={"every": 1, "keep": 9},
        tracking={"backends": []},
        ray={"address": "local", "init": {"num_cpus": 8, "object_store_memory": 200 * 2**20}},
        **SECTIONS,
        **sections,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("labelled-run"))


def test_a_run_learns_from_labels_and_goes_on_bit_for_bit(cluster, tiny_sd3, root):
    cfg = config(tiny_sd3, root, write_table(root / "pairs"))
    whole = Run(cfg, "whole")
    outcome = whole.result()
    assert outcome["status"] == "finished" and outcome["groups"]["trained"] == 2 * STEPS
    steps = [line for line in whole.metrics() if "loss" in line]
    assert len(steps) == STEPS and all(line["grad_norm"] > 0 and line["staleness/max"] == 0 for line in steps)
    assert not any(name.startswith(("reward/", "onpolicy/", "offpolicy/")) for line in steps for name in line)
    assert {"r"} == whole.evals()[0]["rewards"].keys()  # held-out takes are drawn and judged
    resumed = Run(cfg, "resumed", checkpoint.folder_of(whole.dir.checkpoints, 1))
    assert resumed.result()["status"] == "finished"
    assert [line for line in resumed.metrics() if "loss" in line] == steps[1:]
    mine, theirs = resumed.tensors(STEPS), whole.tensors(STEPS)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def test_files_that_cannot_be_read_fail_their_groups_with_a_line_each(cluster, tiny_sd3, root):
    table = write_table(root / "broken")
    (table.parent / "a1.png").unlink()
    run = Run(config(tiny_sd3, root, table), "broken")
    outcome = run.result()
    assert outcome["status"] == "finished" and outcome["groups"]["trained"] == 2 * STEPS
    log = run.dir.log.read_text()
    lines = [line for line in log.splitlines() if "a1.png" in line and "the group has failed" in line]
    assert len(lines) == outcome["groups"]["failed"] >= 1 and "it is tried again" not in log
    assert "replacing rollout" not in log
