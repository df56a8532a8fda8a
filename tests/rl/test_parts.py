"""Samplers and objectives are files: nothing else knows their names, and a new file is all that a new one needs."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
from doc_examples import doc_examples

from pipeline.core.errors import ConfigError
from pipeline.core.types import GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl import objectives, samplers
from pipeline.rl.group_plan import train_work
from pipeline.rl.objectives import check_objective, get_objective, objective_names
from pipeline.rl.objectives.base import OBJECTIVES
from pipeline.rl.samplers import check_sampler, get_sampler, samplers_for, stochastic_samplers
from pipeline.rl.samplers.base import SAMPLERS

ROOT = Path(__file__).parents[2]


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
            nodes = [*node.args] if node.func.id in ("get_objective", "get_sampler") else []
        if names & {text for each in nodes for text in _constants(each)}:
            lines.append(node.lineno)
    return lines


def test_nothing_asks_for_an_objective_or_a_sampler_by_name():
    names = {*OBJECTIVES.all(), *SAMPLERS.all()}
    assert {"awm", "grpo", "flow_sde", "ode"} <= names
    homes = (ROOT / "pipeline/rl/objectives", ROOT / "pipeline/rl/samplers")
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
        'cfg.algorithm.objective == "awm"',
        'kind in ("ddim", "lcm")',
        '{"flow_sde": 0.7}',
        'get_objective("grpo")',
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

    for registry in (SAMPLERS, OBJECTIVES):
        monkeypatch.setattr(registry, "_parts", registry.all())
        monkeypatch.setattr(registry, "_imported", False)
    yield add
    for name in added:
        sys.modules.pop(name, None)


def test_a_new_sampler_and_a_new_objective_train_a_step(add_part, tiny_sd3):
    """The examples of docs/extending.md, through rollout, recording, replay and update."""
    add_part(samplers, "pipeline/rl/samplers/linear_sde.py")
    add_part(objectives, "pipeline/rl/objectives/cispo.py")
    importlib.invalidate_caches()
    assert "linear_sde" in stochastic_samplers() and "linear_sde" in samplers_for("flow")
    assert "cispo" in objective_names()

    sections = {"sampler": {"kind": "linear_sde", "noise_level": 0.7}, "algorithm": {"objective": "cispo"}}
    cfg = tiny.config(tiny_sd3, optimizer={"lr": 1e-3}, **sections)
    check_sampler(cfg)
    check_objective(cfg)
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    learner = Learner(cfg, "cpu")
    for step in range(2):
        policy.load_weights(learner.weights())
        batch = []
        for group in range(2):
            work = train_work(cfg, 2 * step + group, step, PromptItem(index=0, text="a red circle"))
            _, trajectory, _ = policy.rollout(work)
            assert trajectory.sampling.kind == "linear_sde"
            batch.append(GroupBatch(trajectory=trajectory, advantages=np.array([1, -1, 0.5, -0.5], np.float32)))
        metrics = learner.train_step(batch)
        assert metrics[get_objective("cispo").replay_metric] < 1e-5 and metrics["grad_norm"] > 0


def test_parts_added_for_a_test_are_gone_again():
    with pytest.raises(ConfigError, match="sampler.kind: found 'linear_sde'; expected one of cps, "):
        get_sampler("linear_sde")
    with pytest.raises(ConfigError, match="algorithm.objective: found 'gpro'.*; did you mean grpo?"):
        get_objective("gpro")


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two classes are registered as 'grpo'"):
        OBJECTIVES.register("grpo")(type("Other", (), {}))
