"""The speed suite's own arithmetic: its baseline does what a run does, its ideal schedule, its tables."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from benchmarks.learning import samples
from benchmarks.resilience.cluster import Result, cluster_experiment
from benchmarks.speed import cpu, standing, tables
from benchmarks.speed.simulator import Plan, ideal
from pipeline.core.errors import RushesError
from pipeline.core.prompts import PromptCursor, load_prompts
from pipeline.core.types import GroupBatch, Trajectory
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.plain_loop import PlainLoop
from pipeline.rewards.runner import build_reward
from pipeline.rl.group_plan import scoring_seed, train_work
from pipeline.rl.signals import signal_of

SCORER = """
def bright(frames, prompts):
    return frames.reshape(len(prompts), -1).mean(1) / 255
bright.batched = True
"""


def check_nothing_large_is_pickled(trajectory: Trajectory) -> None:
    """Arrays leave pickle as buffers, which Ray's object store keeps and readers map; no tensor is among the rest."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(trajectory, protocol=5, buffer_callback=buffers.append)
    part = trajectory.parts[0]
    large = [part.final.data, *(step.sample.data for step in part.steps), *(packed.data for packed in part.shared)]
    assert b"torch" not in rest and not any(array.tobytes() in rest for array in large)
    assert sum(buffer.raw().nbytes for buffer in buffers) >= sum(array.nbytes for array in large)


@pytest.mark.parametrize("which", ["sd3", "wan"])
def test_the_plain_loop_learns_what_a_run_learns(which, tiny_sd3, tiny_wan, tmp_path):
    (tmp_path / "own.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("a red circle\nb blue square\nc green circle\n")
    cfg = tiny.config(
        {"sd3": tiny_sd3, "wan": tiny_wan}[which],
        trainable={"kind": "full"},
        prompts={"train": str(tmp_path / "prompts.txt")},
        objective={"name": "awm", "kl_beta": 0.1, "kl_every": 2},
        optimizer={"lr": 1e-3, "eps": 1e-2, "ema_decay": 0.9},  # eps: gradients of nearly nothing keep no sign
    )
    rewards = (
        type(cfg)
        .model_validate({**cfg.model_dump(), "rewards": {"bright": {"scorer": f"{tmp_path / 'own.py'}:bright"}}})
        .rewards
    )
    cfg = cfg.model_copy(update={"rewards": rewards})
    plain = PlainLoop(cfg)
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    prompts = load_prompts(cfg.prompts.train)
    policy.probe(prompts)
    policy.add_adapters()
    scorer, signal = build_reward("bright", rewards["bright"]), signal_of(cfg).begin(rewards)
    cursor = PromptCursor(prompts, cfg.run.seed)
    for step in range(3):
        policy.load_weights(learner.weights())
        drawn, scores = [], []
        for group in range(2 * step, 2 * step + 2):
            work = train_work(cfg, group, step, cursor.next())
            media, trajectory, _ = policy.rollout(work)
            check_nothing_large_is_pickled(trajectory)
            scores.append({"bright": scorer.run(media, work.prompts, scoring_seed(cfg, group))})
            drawn.append(trajectory)
        taught = signal.step(scores)
        batch = [GroupBatch(trajectory=t, feedback=f) for t, f in zip(drawn, taught.feedback, strict=True)]
        expected = {**taught.metrics, **learner.train_step(batch)}
        found = plain.train_step()
        for name in ("reward/mean", "policy_loss", "kl", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), (step, name)
    for mine, (name, theirs) in zip(plain.parameters, plain.denoiser.named_parameters(), strict=True):
        assert np.allclose(mine.detach(), learner.parameters[f"transformer.{name}"].detach(), atol=1e-4)
        assert mine is theirs


def test_the_ideal_schedule():
    plan = Plan(
        workers=1,
        groups_per_worker=1,
        rollout_s=1.0,
        score_s=0.1,
        learn_share=0.5,
        spread=1e-6,
        steps=4,
        max_staleness=0,
    )
    assert np.allclose(ideal(plan), np.arange(1, 5) * 1.6, atol=1e-3)  # one after the other
    overlapped = ideal(replace(plan, max_staleness=1))
    assert np.allclose(np.diff(overlapped), 1.0, atol=1e-3)  # the worker never waits
    slow_learner = ideal(replace(plan, max_staleness=1, learn_share=3.0))
    assert np.allclose(np.diff(slow_learner), 3.0, atol=1e-3)
    uneven = replace(plan, workers=8, spread=0.3, max_staleness=1)
    assert ideal(uneven)[-1] > ideal(replace(uneven, spread=1e-6))[-1]  # a step waits for its last group


RUN = {
    "time/step": 4.0,
    "time/rollout": 1.8,
    "time/learn": 2.0,
    "time/score": 0.5,
    "time/sync": 0.1,
    "time/controller": 0.2,
    "takes_per_s": 18,
}
PLAIN = {"time/step": 9.0, "time/rollout": 4.0, "time/score": 1.0, "time/learn": 4.0}
BARE = {"forward": 0.1, "forward_batch": 8, "step_s": 7.0, "compiled_step_s": 6.0}
ROW = {"efficiency": 0.97, "controller_ms_per_group": 2.5, "groups_per_s": 98.0, "step_s": 2.6}


class MadeUp:
    """Stands in for a process that measures."""

    def __init__(self, args, threads=1):
        self.args, self.threads = args, threads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self):
        if "benchmarks.speed.bare" in self.args:
            return BARE
        return {**PLAIN, "time/step": 10.0 - self.threads - ("--fast" in self.args)}


def test_results_and_tables(tmp_path, monkeypatch):
    """The ratios of made-up measurements, in the JSON's keys and in the tables."""
    less = {**RUN, "time/step": 3.0}
    monkeypatch.setattr(cpu, "run_steps", lambda config, overrides, steps=7: [less if overrides else RUN] * 3)
    monkeypatch.setattr(cpu, "MeasurementServer", MadeUp)
    monkeypatch.setattr(cpu, "together", lambda processes: [process.measure() for process in processes])
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setitem(cpu.SECTIONS, "simulated", lambda *_: {"256": ROW, "efficiency_256": ROW["efficiency"]})
    out = tmp_path / "cpu.json"
    cpu.measure(["quickstart", "quickstart_image"], lambda _: None, out)
    cpu.measure(["simulated"], lambda _: None, out)
    found = json.loads(out.read_text())
    assert found["efficiency"] == {"quickstart": 7 / 8, "quickstart_image": 7 / 8}
    assert found["quickstart"]["efficiency_against_compiled_bare"] == 6 / 8
    video, image = {"same_recipe": 2.0, "less_work": 8 / 3}, {"same_recipe_image": 2.0, "less_work_image": 8 / 3}
    assert found["speedup_vs_plain_loop"] == video | image
    assert found["quickstart"]["plain_loop"]["threads"] == 2
    assert found["quickstart"]["speedup_vs_compiled_plain_loop"] == 7 / 4
    assert found["quickstart"]["between_roles"] == pytest.approx(0.05)
    assert found["simulated"]["efficiency_256"] == 0.97 and found["quickstart"]["machine"]["cores"] == 2
    docs = tmp_path / "benchmarks.md"
    docs.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.renew(out, docs)
    text = docs.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert (
        "| 0.88 | 0.88 |" in text
        and "| 0.75 | 0.75 |" in text
        and "2.67 x" in text
        and "| 256 | 0.970 | 98.0 | 2.50 |" in text
    )
    assert Path(tables.DOCS).read_text().count(tables.BEGIN) == 1


@pytest.mark.parametrize("generator", samples.CONFIGS)
def test_arms_with_less_work_change_only_the_sampler(generator):
    """Compared are recipes, so all that an arm does not name must be the quickstart's: its learning rate too."""
    own = samples.config(generator, "awm", 1, 30).model_dump()
    for arm in samples.ARMS:
        other = samples.config(generator, arm, 1, 30).model_dump()
        keys = {name for name in own if own[name] != other[name]}
        assert keys <= {"sampler", "objective"} if arm.startswith("awm") else {"sampler", "objective"} <= keys, arm
    less = cpu.LESS_WORK["quickstart" if generator == "video" else "quickstart_image"]
    assert list(less) in samples.ARMS.values(), "the recipe that is timed is one whose reward was measured"


def test_a_process_that_cannot_measure_is_an_error_with_its_last_words():
    with (
        standing.MeasurementServer(["benchmarks.nothing"]) as process,
        pytest.raises(RushesError, match=r"No module named .*noth"),
    ):
        process.measure()


@pytest.mark.parametrize("problems, status", [([], 0), (["one group is lost"], 1)])
def test_an_experiment_prints_its_result_and_fails_on_problems(tmp_path, monkeypatch, capsys, problems, status):
    def run(options, folder):
        return Result({"steps": options.steps, "folder": folder.name}, problems)

    report = tmp_path / "reports" / "head.json"
    arguments = ["head.py", "--steps", "3", "--folder", str(tmp_path / "runs"), "--report", str(report)]
    monkeypatch.setattr("sys.argv", arguments)
    assert cluster_experiment(run, "An experiment.", steps={"type": int, "default": 8}) == status
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(report.read_text()) == {"steps": 3, "folder": "runs"}
    assert ("FAILED: one group is lost" in err) == bool(problems)
