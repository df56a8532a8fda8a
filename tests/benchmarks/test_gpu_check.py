"""The check of a GPU, on the CPU with tiny shapes: what it measures, and that it outlives what fails."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import check, families, table
from benchmarks.gpu.card import Card

CARD = Card("cpu", tiny=True)


@pytest.mark.slow
def test_a_size_is_measured_and_planned():
    result = check.run_section("sd3.5-medium", CARD)
    assert "failed" not in result, result["failed"]
    assert abs(result["replay"]) < 1e-3 and result["replay_metric"] == "onpolicy/max_abs_log_ratio"
    assert 0 < result["mfu_learn"] < 1 and result["push_mib"] > 0.1
    # A denoiser call of two takes: 2 x parameters x tokens operations at least in its linear layers.
    assert result["bare"]["takes"] == 2 and 1e-4 < result["bare"]["forward_tflop"] < 1e-1
    assert result["planned_gib"]["rollout"] > result["planned_gib"]["learner"] > 0
    assert "| sd3.5-medium |" in table.table({"sd3.5-medium": result})


@pytest.mark.slow
def test_a_shipped_generator_learns_in_bfloat16():
    result = check.run_section("image bfloat16", CARD)
    assert "failed" not in result, result["failed"]
    assert result["takes"] == 4 and 0 < result["replay_first"] < 1e-2, "16 bits are not exact"
    assert set(result["rewards"]["scene"]) == {"before", "after", "se"}


def test_the_families_are_tried_in_every_dtype(monkeypatch):
    monkeypatch.setattr(families, "DTYPES", ("bfloat16",))
    assert families.families(CARD, seconds=0.0)["not tried"][:2] == ["StableDiffusion", "StableDiffusion 2 (v)"]
    result = families.families(CARD, seconds=60.0)
    assert all("failed" not in row["bfloat16"] for row in result.values()) and len(result) == 2


def test_a_section_that_fails_or_takes_too_long_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    def apart(name: str, card: Card, limit_s: float) -> dict:
        ran.append(name)
        return {"failed": "CUDA error"} if name == "switches" else {"seconds": 1.0}

    monkeypatch.setattr(check, "run_apart", apart)
    out = tmp_path / "card.json"
    check.check(out, CARD, ["facts", "switches", "families"], 100.0, again=False)
    assert ran == ["facts", "switches", "families"] and "CUDA error" in out.with_suffix(".md").read_text()
    assert set(json.loads(out.read_text())) == {"facts", "switches", "families"}
    check.check(out, CARD, ["facts", "switches"], 100.0, again=False)
    assert ran[3:] == ["switches"], "what succeeded is not measured again"
    check.check(out, CARD, ["flux"], 5.0, again=False)
    assert ran[4:] == [] and "no time left" in capsys.readouterr().out


def test_a_section_runs_in_a_process_of_its_own():
    facts = check.run_apart("facts", CARD, 120)
    assert facts["torch"] == torch.__version__ and facts["matmul_bf16_tflops"] > 0
    assert "ended after its limit" in check.run_apart("facts", CARD, 0.1)["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check"])
    with pytest.raises(SystemExit):
        check.main()
    assert "--device cpu --tiny" in capsys.readouterr().err
