"""A run that is judged: guards of its held-out takes, its verdict, the best checkpoint, the end on suspicion."""

import json

import numpy as np
import pytest
from ray_run import Run, make_config, write_files

from pipeline.config.schema import Config
from pipeline.core.takes_table import read_takes
from pipeline.runs import checkpoint
from pipeline.runs.trained_weights import read_weights

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def rolled_back(cluster, tiny_sd3, tmp_path_factory) -> Run:
    """Any change is suspect, and by the gold no step is better than the first."""
    folder = tmp_path_factory.mktemp("judged")
    evaluation = {"every": 2, "guards": {"distance": 1e-6}}
    cfg = make_config(
        tiny_sd3,
        write_files(folder),
        folder,
        run={"steps": 6},
        evaluation=evaluation,
        checkpoint={"every": 1, "keep": 1},
    )
    gold = {"scorer": f"{folder / 'rewards.py'}:flat", "weight": 0}
    plain = cfg.model_dump(mode="json")
    plain["rewards"]["gold"], plain["evaluation"]["on_suspect"] = gold, "rollback"
    cfg = Config.model_validate(plain)
    run = Run(cfg, "judged")
    run.outcome = run.result()
    return run


def test_a_suspect_run_ends_and_exports_the_best_gold_checkpoint(rolled_back):
    run, outcome = rolled_back, rolled_back.outcome
    assert outcome["status"] == "finished" and outcome["step"] == 2 and "suspect: distance" in outcome["ended"]
    assert outcome["exported_step"] == 0
    assert [checkpoint.step_of(folder) for folder in checkpoint.complete(run.dir.checkpoints)] == [2, 0]
    kept = run.dir.checkpoints / "step-000000"
    start, end = (read_weights(folder, "lora").tensors for folder in (kept, run.dir.checkpoints / "step-000002"))
    assert all(not np.any(each.data) for name, each in start.items() if "lora_B" in name)
    assert any(np.any(each.data) for name, each in end.items() if "lora_B" in name)
    from safetensors.numpy import load_file

    exported = load_file(run.dir.export / "pytorch_lora_weights.safetensors")
    ups = [each for name, each in exported.items() if "lora_B" in name or ".up." in name]
    assert ups and all(not each.any() for each in ups)


def test_an_evaluation_leaves_guards_changes_and_a_verdict(rolled_back):
    first, last = rolled_back.evals()
    assert "verdict" not in first and last["verdict"]["kind"] == "suspect"
    assert last["verdict"]["suspects"][0]["name"] == "distance" and last["guards"]["distance"]["mean"] > 0
    assert last["prompts"] == [0, 1, 2, 3] and len(last["guards"]["brightness"]["prompt_means"]) == 4
    change = np.subtract(last["rewards"]["own"]["prompt_means"], first["rewards"]["own"]["prompt_means"])
    assert last["changes"]["rewards"]["own"]["mean"] == pytest.approx(change.mean())
    rows = read_takes(rolled_back.dir.eval_takes(2))
    assert [row["guard/distance"] > 0 for row in rows] == [True] * 4 and len(rows[0]["descriptor"]) == 192
    lines = [json.loads(line) for line in rolled_back.dir.metrics.read_text().splitlines()]
    judged = [line for line in lines if "verdict/suspect" in line]
    assert [line["step"] for line in judged] == [2] and judged[0]["verdict/suspect"] == 1
    assert judged[0]["change/own"] == pytest.approx(change.mean()) and judged[0]["guard/distance"] > 0
