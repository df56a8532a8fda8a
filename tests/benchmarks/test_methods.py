"""The methods' recipes and what is computed from their runs."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from benchmarks.learning import methods
from pipeline.config.load import load_config


@pytest.mark.parametrize("name", methods.names())
def test_a_recipe_names_its_paper_and_is_short(name, monkeypatch):
    monkeypatch.chdir(methods.ROOT)
    path = methods.RECIPES / f"{name}.yaml"
    first, *head = path.read_text().splitlines()[:4]
    assert first.startswith("# yaml-language-server:")
    assert all(line.startswith("#") for line in head) and f"rushes train configs/methods/{name}.yaml" in head[2]
    assert re.search(r"arXiv \d{4}\.\d{5}", " ".join(head))
    cfg = load_config(path)
    assert cfg.generator.pretrained.startswith("models/shapes-") and cfg.prompts.heldout is not None
    assert cfg.run.steps * cfg.step.groups * cfg.step.takes <= 5000, "minutes on two cores"


def test_data_that_have_to_be_made_first_are_named_with_what_makes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["methods", "dpo-offline"])
    with pytest.raises(SystemExit):
        methods.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pairs.parquet is not there; first run: python -m benchmarks.learning.labelled_pairs --out shapes-" in error
    made = tmp_path / "pairs.parquet"
    made.touch()
    assert methods.missing_data("dpo-offline", [f"prompts.train={made}"]) == "" == methods.missing_data("awm", [])


def fake_run(seed: int, rise: float) -> dict:
    before = np.linspace(0.2, 0.6, 5)
    scene = {"before": before.tolist(), "after": (before + rise + 0.01 * np.arange(5)).tolist()}
    return {
        "generator": "shapes-image", "overrides": [], "seed": seed, "takes": 1000 + 2 * seed, "wall_s": 30.0,
        "rewards": {"scene": scene}, "weights": {"scene": 2.0},
    }  # fmt: skip


def test_the_standard_error_is_paired_and_counts_prompts_or_seeds():
    one = methods.summarise([fake_run(0, 0.1)])
    assert one["before"] == 0.4 and one["after"] == pytest.approx(0.52)
    assert one["se"] == pytest.approx(0.01 * np.std(range(5), ddof=1) / np.sqrt(5), abs=1e-4), "before cancels"
    two = methods.summarise([fake_run(0, 0.1), fake_run(1, 0.3)])
    assert two["se"] == pytest.approx(0.1, abs=1e-4) and two["seeds"] == 2 and two["takes"] == 1001


def test_rewards_of_some_prompts_only_count_where_they_apply():
    run = fake_run(0, 0.1)
    ada, bob = [0.5, None, 0.5, None, None], [None, 0.2, None, 0.2, None]
    run["rewards"] = {
        "ada": {"before": ada, "after": [0.7, None, 0.7, None, None]},
        "bob": {"before": bob, "after": bob},
    }
    run["weights"] = {"ada": 1.0, "bob": 3.0}
    summary = methods.summarise([run])
    assert summary["rewards"]["ada"] == {"before": 0.5, "after": 0.7, "se": 0.0}
    assert (summary["before"], summary["after"]) == (0.35, 0.45), "four prompts, each with its own reward"
    assert methods._by_prompt([0.5, float("nan")]) == [0.5, None]


def test_results_are_merged_and_the_page_is_made_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "methods.json")
    monkeypatch.setattr(methods, "DOCS", tmp_path / "methods.md")
    monkeypatch.setattr(methods, "PICTURE", tmp_path / "methods.png")
    (tmp_path / "methods.md").write_text(f"top\n{methods.BEGIN}\nold\n{methods.END}\nbottom\n")
    methods.keep("grpo", fake_run(0, 0.1))
    methods.keep("grpo", fake_run(1, 0.1))
    methods.keep("awm", {**fake_run(0, 0.3), "overrides": ["run.steps=2"]})
    results = json.loads((tmp_path / "methods.json").read_text())
    assert results["grpo"]["seeds"] == 2 and len(results["grpo"]["runs"]) == 2
    assert results["awm"]["command"].endswith("methods awm --seeds 0 --overrides run.steps=2")
    methods.write_docs()
    page = (tmp_path / "methods.md").read_text()
    assert page.startswith("top\n") and page.endswith("bottom\n") and "old" not in page
    assert page.index("[awm]") < page.index("[grpo]") and "+0.320 ±" in page and "+0.640" in page
    assert (tmp_path / "methods.png").stat().st_size > 1000


def test_the_page_shows_the_results_that_are_kept():
    if methods.RESULTS.exists():
        assert methods.table(methods.read()) in methods.DOCS.read_text("utf-8")
