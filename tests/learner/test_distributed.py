"""Several learner ranks (2 processes, Gloo, FSDP2) and several replicas against one: same numbers, same files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_rewards
from labelled_table import SECTIONS, write_table
from rank_batches import batches
from rank_worker import one_case, run_ranks

from pipeline.config.schema import Config
from pipeline.core.tensors import unpack
from pipeline.learner.accumulator import count_pairs
from pipeline.learner.distributed import Assignment, DistributedContext, assign_micro_batches
from pipeline.learner.learner import Learner
from pipeline.learner.micro_batch import micro_batch_specs
from pipeline.runs import checkpoint

COMMON = {"optimizer": {"lr": 1e-3, "ema_decay": 0.9, "warmup_steps": 2}}
CASES = {
    "lora": {"objective": {"kl_beta": 0.1}, "step": {"groups": 3, "updates": 2}, "learner": {"micro_batch": 3}},
    "full": {"trainable": {"kind": "full"}, "objective": {"kl_beta": 0.1}, "step": {"groups": 3}},
    "nft": {  # the passes of two other policies, through shards
        "trainable": {"kind": "full"},
        "objective": {"name": "nft", "kl_beta": 0.1, "kl_every": 2, "old_decay_ramp": 0.4},
        "step": {"groups": 3},
    },
    "awm": {
        "objective": {"name": "awm", "kl_beta": 0.1, "kl_every": 2},
        "step": {"groups": 3},
        "learner": {"micro_batch": 8},  # two trained steps in one call, and one alone
    },
    "trajectory_pairs": {  # all trained steps in one loss, each computed again in the backward pass
        "trainable": {"kind": "full"},
        "objective": {"name": "trajectory_pairs", "fit": "gap", "beta": 30.0},
        "signal": {"name": "pairs"},
        "step": {"groups": 3},
    },
    "labelled": {**SECTIONS, "trainable": {"kind": "full"}, "step": {"takes": 2, "groups": 3}},  # pairs that are given
    "reward_gradient": {  # VAE and reward are whole on each rank; shards are gathered again in the backward pass
        "trainable": {"kind": "full"},
        "objective": {"name": "reward_gradient", "tail": [1, 3], "kl_beta": 0.1, "anchor": 1.0},
        "signal": {"name": "none"},
        "step": {"groups": 3},
        "learner": {"micro_batch": 3},
    },
    "one_step": {  # groups of one level or two, with a reward or without
        "trainable": {"kind": "full"},
        "objective": {"name": "one_step", "reward_steps": 2, "uncertainty": 1.0, "shape": "hinge", "target": 1.0},
        "signal": {"name": "none"},
        "step": {"groups": 3},
        "learner": {"micro_batch": 3},
    },
}


def same_tensors(mine: Path, theirs: Path) -> None:
    (a, state_a), (b, state_b) = (checkpoint.load(checkpoint.latest(folder)) for folder in (mine, theirs))
    assert a.keys() == b.keys() and state_a == state_b
    for name in a:
        np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def compared(tiny_sd3, tmp_path_factory):
    """Two steps by one process, two replicas (twice) and two ranks; then one rank resumes from two, and the reverse."""
    out = tmp_path_factory.mktemp("ranks")
    alone, by_replicas, together, further = {}, {}, [], {}
    clip = {"scorer": "clip_score", "args": {"model": str(tiny_rewards.clip(out / "clip"))}, "gradient": True}
    for name, sections in CASES.items():
        rewards = {"clip": clip} if name in ("reward_gradient", "one_step") else {}
        prompts = {"train": write_table(out / "pairs")} if name == "labelled" else {}
        cfg = tiny.config(tiny_sd3, **COMMON, **sections, rewards=rewards, prompts=prompts)
        steps = batches(cfg, 3)
        plain = cfg.model_dump(mode="json")

        def case(steps, save, resume=None, plain=plain, name=name):
            resume = None if resume is None else str(checkpoint.folder_of(out / resume / name, 2))
            return {"config": plain, "steps": steps, "save": str(out / save / name), "resume": resume}

        alone[name] = one_case(case(steps[:2], "one"))
        two_replicas = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"replicas": 2})}).model_dump(
            mode="json"
        )
        by_replicas[name] = [one_case(case(steps[:2], f"replicas-{i}", plain=two_replicas)) for i in range(2)]
        together += [case(steps[:2], "two"), case(steps[2:], "one-two", "one")]
        further[name] = case(steps[2:], "two-one", "two")
    answers = run_ranks(2, together)
    return {
        name: {
            "one": alone[name],
            "replicas": by_replicas[name],
            "two": answers[2 * i],
            "one-two": answers[2 * i + 1],
            "two-one": one_case(case),
        }
        for i, (name, case) in enumerate(further.items())
    }, out


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_train_as_one(compared, name):
    results, out = compared
    one, two = results[name]["one"], results[name]["two"]
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key != "onpolicy/max_abs_gap":  # each rank checks another group
                assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert two["metrics"][0]["grad_norm"] > 0
    if name == "trajectory_pairs":  # the policy has moved away from the one that it is compared with
        assert two["metrics"][0]["pairs/margin"] == 0 and two["metrics"][1]["pairs/margin"] != 0
    elif name == "one_step":
        assert any(metrics["uncertainty"] > 0 for metrics in two["metrics"])
    elif name != "labelled":
        assert two["metrics"][1]["kl"] > 0
    same_tensors(out / "one" / name, out / "two" / name)
    assert one["ema"].tensors.keys() == two["ema"].tensors.keys()
    for key, packed in one["ema"].tensors.items():
        np.testing.assert_allclose(unpack(two["ema"].tensors[key]), unpack(packed), rtol=1e-4, atol=2e-6)
    assert two["local_parameters"] < 0.6 * one["local_parameters"]
    if name == "full":  # the first portion holds a group for each rank; both have a share of the last group
        assert two["read"] == [{0, 2}, {0, 2}]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_replicas_train_as_one_and_always_the_same(compared, name):
    results, out = compared
    first, again = results[name]["replicas"]
    for mine, theirs, repeated in zip(results[name]["one"]["metrics"], first["metrics"], again["metrics"], strict=True):
        assert theirs == repeated and mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    same_tensors(out / "one" / name, out / "replicas-0" / name)
    assert first["ema"].checksum == again["ema"].checksum


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_checkpoint_goes_from_one_rank_to_two_and_back(compared, name):
    results, out = compared
    same_tensors(out / "one-two" / name, out / "two-one" / name)
    assert results[name]["one-two"]["metrics"][0]["loss"] == pytest.approx(
        results[name]["two-one"]["metrics"][0]["loss"], rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("objective", ["grpo", "awm"])
def test_a_rank_needs_the_groups_that_it_replays(tiny_sd3, objective):
    sections = {"objective": {"name": objective}, "step": {"groups": 8, "updates": 1}}
    cfg = tiny.config(tiny_sd3, **sections, learner={"micro_batch": 2})
    groups = batches(cfg, 1)[0]
    with_specs = [replace(g, trajectory=None, micro_batches=micro_batch_specs(cfg, g.trajectory)) for g in groups]
    learners = [Learner(cfg, "cpu", DistributedContext(rank=rank, world=4)) for rank in range(4)]
    assert [learner.groups_to_read(with_specs) for learner in learners] == [{rank, rank + 4} for rank in range(4)]
    assert [learner.groups_to_read(with_specs[:4], 4) for learner in learners] == [{rank} for rank in range(4)]
    assert [learner.groups_to_read(with_specs[:6], 0, last=False) & {4, 5} for learner in learners] == [
        {4},
        {4},
        {5},
        {5},
    ]
    assert Learner(cfg, "cpu").groups_to_read(with_specs) == set(range(8))
    assert count_pairs(with_specs) == count_pairs(groups)
    with pytest.raises(RuntimeError, match="not given the trajectory"):
        _ = with_specs[0].held


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_micro_batch_counts_once_and_ranks_meet_in_equal_calls(parts):
    kinds = ["a", "b", "a", "a", "b", "c"] * 3
    shares = [assign_micro_batches(kinds, parts, part) for part in range(parts)]
    assert sorted(each.index for mine in shares for each in mine if each.counts) == list(range(len(kinds)))
    assert len({tuple(kinds[each.index] for each in mine) for mine in shares}) == 1
    if parts == 1:
        assert shares[0] == [Assignment(i, True) for i in range(len(kinds))]


@pytest.mark.slow
def test_a_sequence_is_split_over_two_ranks_and_gradients_stay_whole(tiny_wan, tiny_sd3, tmp_path):
    """Context parallelism on Wan by diffusers' plan; SD3 has none and is refused."""
    cfg = tiny.config(tiny_wan, **COMMON, objective={"kl_beta": 0.1})
    wan = {"config": cfg.model_dump(mode="json"), "steps": batches(cfg, 2), "resume": None}
    sd3 = {"config": tiny.config(tiny_sd3).model_dump(mode="json"), "steps": [], "resume": None}
    alone = one_case({**wan, "save": str(tmp_path / "one")})
    together, refused = run_ranks(2, [{**wan, "save": str(tmp_path / "two")}, {**sd3, "save": ""}], context=2)
    for mine, theirs in zip(alone["metrics"], together["metrics"], strict=True):
        for key, value in mine.items():
            rounding = 1e-3 if key == "offpolicy/advantage_correlation" else 1e-4  # of differences of log-probs
            assert theirs[key] == pytest.approx(value, rel=rounding, abs=2e-6), key
    same_tensors(tmp_path / "one", tmp_path / "two")
    assert "learner.context_parallel: " in refused and "SD3Transformer2DModel" in refused and "plan" in refused


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"learner": {"ranks": 2}, "trainable": {"modules": "text_encoder"}}, "trainable.modules denoiser"),
        ({"learner": {"ranks": 2}, "generator": {"quantize": "int8"}}, "generator.quantize none"),
        ({"learner": {"replicas": 2}, "trainable": {"modules": "text_encoder"}}, "learner.replicas=1"),
        ({"learner": {"replicas": 2, "ranks": 2}}, "set one of them to 1"),
        ({"learner": {"ranks": 3, "context_parallel": 2}}, "learner.context_parallel: 2 does not divide"),
    ],
)
def test_what_does_not_go_with_several_ranks_is_refused(sections, words):
    with pytest.raises(ValueError, match=words):
        base = tiny.config(Path("sd3")).model_dump(mode="json")
        Config.model_validate({**base, **{name: {**base[name], **values} for name, values in sections.items()}})
