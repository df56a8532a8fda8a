"""Samplers and objectives are files: nothing else knows their names, and a new file is all that a new one needs."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from doc_examples import doc_examples
from scored_groups import scored

from pipeline.config.parts import OBJECTIVES, SIGNALS, SOURCES
from pipeline.core.errors import ConfigError
from pipeline.core.types import GroupBatch
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl import objectives, samplers, signals, sources
from pipeline.rl.recipe import check_recipe
from pipeline.rl.samplers import check_sampler, get_sampler, samplers_for, stochastic_samplers
from pipeline.rl.samplers.base import SAMPLERS
from pipeline.rl.signals import signal_of
from pipeline.rl.sources import source_of

ROOT = Path(__file__).parents[2]
AMBIGUOUS = {"advantages", "pairs", "labels", "none", "rollout"}  # also fields of the feedback and of others, a role


def _constants(node: ast.AST) -> Iterator[str]:
    """The strings that a node asks for: itself, or the members of a literal collection."""
    members = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    for member in members:
        if isinstance(member, ast.Constant) and isinstance(member.value, str):
            yield member.value


def names_asked(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines that compare with one of the names, choose a value by it, or look the part up by it."""
    lines = []
    for node in ast.walk(tree):
        nodes: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            nodes = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            nodes = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            nodes = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            nodes = [*node.args] if node.func.id in ("get_sampler") else []
        if names & {text for each in nodes for text in _constants(each)}:
            lines.append(node.lineno)
    return lines


def test_nothing_asks_for_a_part_by_name():
    names = {*OBJECTIVES.all(), *SAMPLERS.all(), *SIGNALS.all(), *SOURCES.all()} - AMBIGUOUS
    assert {"awm", "grpo", "flow_sde", "ode"} <= names
    homes = [ROOT / "pipeline/rl" / wing for wing in ("objectives", "samplers", "signals", "sources")]
    places = [
        f"{file.relative_to(ROOT)}:{line}"
        for folder in ("pipeline", "actors", "jobs")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not (file.parent in homes and file.stem in names)
        for line in names_asked(ast.parse(file.read_text("utf-8")), names)
    ]
    assert not places, f"ask what the part declares instead: {places}"


@pytest.mark.parametrize(
    "source",
    [
        'cfg.objective.name == "awm"',
        'kind in ("ddim", "lcm")',
        '{"flow_sde": 0.7}',
        'get_sampler("flow_sde")',
        'match kind:\n    case "cps":\n        pass',
    ],
)
def test_the_search_sees_a_name_that_is_asked_for(source):
    assert names_asked(ast.parse(source), {*OBJECTIVES.all(), *SAMPLERS.all()})


@pytest.fixture
def add_part(tmp_path, monkeypatch):
    """Adds the file of an example to a package, as if it lay in its folder; removes it afterwards."""
    added: list[str] = []

    def add(package: ModuleType, path: str) -> None:
        file = tmp_path / package.__name__ / Path(path).name
        file.parent.mkdir(exist_ok=True)
        file.write_text(doc_examples()[path])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
        added.append(f"{package.__name__}.{file.stem}")

    for registry in (SAMPLERS, OBJECTIVES, SIGNALS, SOURCES):
        monkeypatch.setattr(registry, "_parts", registry.all())
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        monkeypatch.setattr(registry, "_imported", False)
    yield add
    for name in added:
        sys.modules.pop(name, None)


def test_a_new_sampler_source_signal_and_objective_train_a_step(add_part, tiny_sd3, tmp_path):
    """The examples of docs/extending.md, through rollout, recording, scores, replay and update."""
    add_part(samplers, "pipeline/rl/samplers/linear_sde.py")
    add_part(objectives, "pipeline/rl/objectives/cispo.py")
    add_part(signals, "pipeline/rl/signals/ranks.py")
    add_part(sources, "pipeline/rl/sources/short_prompts.py")
    importlib.invalidate_caches()
    assert "linear_sde" in stochastic_samplers() and "linear_sde" in samplers_for("flow")
    assert "cispo" in OBJECTIVES.all()

    (tmp_path / "prompts.txt").write_text("a red circle in the middle\na red circle\n")
    sections = {
        "sampler": {"kind": "linear_sde", "noise_level": 0.7},
        "objective": {"name": "cispo", "clip_high": 0.2},
        "signal": {"name": "ranks"},
        "source": {"name": "short_prompts", "share": 0.5},
    }
    cfg = tiny.config(tiny_sd3, prompts={"train": tmp_path / "prompts.txt"}, optimizer={"lr": 1e-3}, **sections)
    assert cfg.objective.model_dump() == {
        "name": "cispo", "clip_low": 1e-4, "clip_high": 0.2, "kl_beta": 0.0, "kl_every": 1,
        "stale": "reweigh", "max_weight": 2.0, "reject_above": 0.0,
    }  # fmt: skip
    check_sampler(cfg)
    check_recipe(cfg)
    (row,) = source_of(cfg).rows(cfg)
    assert row.text == "a red circle"
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    learner, signal = Learner(cfg, "cpu"), signal_of(cfg).begin(cfg.rewards)
    for step in range(2):
        policy.load_weights(learner.weights())
        drawn, scores = [], []
        for group in range(2):
            _, trajectory, _ = policy.rollout(source_of(cfg).work(cfg, 2 * step + group, step, row))
            assert trajectory.sampling.kind == "linear_sde"
            drawn.append(trajectory)
            scores.append(scored(**{name: [1, 3, 2, 0] for name in cfg.rewards}))
        taught = signal.step(scores).feedback
        assert taught[0].advantages == pytest.approx([-1 / 3, 1, 1 / 3, -1])
        metrics = learner.train_step(
            [GroupBatch(trajectory=t, feedback=feedback) for t, feedback in zip(drawn, taught, strict=True)]
        )
        assert metrics["onpolicy/max_abs_log_ratio"] < 1e-5 and metrics["grad_norm"] > 0


def test_parts_added_for_a_test_are_gone_again():
    with pytest.raises(ConfigError, match="sampler.kind: found 'linear_sde'; expected one of cps, "):
        get_sampler("linear_sde")
    with pytest.raises(ConfigError, match="objective.name: found 'gpro'.*; did you mean grpo?"):
        OBJECTIVES.get("gpro")


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two classes are registered as 'grpo'"):
        OBJECTIVES.register("grpo")(type("Other", (), {}))
