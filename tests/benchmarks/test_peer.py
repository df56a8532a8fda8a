"""The data-parallel baseline trains as the plain loop does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed.standing import MeasurementServer, together
from pipeline.config.load import load_config
from pipeline.plain_loop import PlainLoop

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart-image.yaml"
SMALL = ["step.groups=2", "step.takes=4", "generator.compile=false"]
GRPO = ["objective.name=grpo", "objective.kl_beta=0", "sampler.timestep_fraction=1", "sampler.window.range=[0,4]"]


def steps_of_peers(folder: Path, overrides: list[str], steps: int) -> list[list[dict[str, float]]]:
    args = ["benchmarks.speed.peer", str(CONFIG), *overrides, "--meet", str(folder / "meet"), "--rank"]
    with MeasurementServer([*args, "0"]) as first, MeasurementServer([*args, "1"]) as second:
        return [together([first, second]) for _ in range(steps)]


@pytest.mark.slow
def test_two_processes_take_the_plain_loops_steps(tmp_path):
    answers = steps_of_peers(tmp_path, SMALL, 2)
    loop = PlainLoop(load_config(CONFIG, SMALL))
    for both in answers:
        whole = loop.train_step()
        for name in ("reward/mean", "grad_norm"):
            found = sum(answer[name] for answer in both) / 2
            assert found == pytest.approx(whole[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_grpo_is_on_policy_and_both_processes_make_the_same_update(tmp_path):
    ((first, second), _) = steps_of_peers(tmp_path, [*SMALL, *GRPO], 2)
    assert first["grad_norm"] == second["grad_norm"] > 0
    assert abs(first["loss"]) < 1e-5  # every ratio is 1, and advantages sum to zero
