"""The report's verdict, changes, gold curve, guards and gallery, on a made-up run without its plots where they do not
matter."""

import json
import re

import numpy as np
import pytest
from made_up_run import make_run

from pipeline.config.load import load_config, to_yaml
from pipeline.core.takes_table import save_takes
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rl.evaluation import changes, summarise_scores
from pipeline.runs.verdict import judge, tolerances
from pipeline.tools.report.report import build_report

PROMPTS = [PromptItem(index=index, text=f"a shape, number {index}") for index in range(8)]


def judged_run(root, gain: dict[str, list[float]], spread: float = 0.02, prompts: int = 8, brightness=(0.5, 0.5, 0.5)):
    """A run with the rewards `scene` (trained on) and `motion` (gold), three evaluations, 16 x 16 pictures. `gain`: of
    each reward at the evaluations."""
    run = make_run(root, steps=2, frames=1, finished=False)
    cfg = load_config(run / "config.yaml", ["rewards.motion.weight=0", "evaluation.every=1"])
    (run / "config.yaml").write_text(to_yaml(cfg))
    for folder in (run / "eval").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    rng, items, records = np.random.default_rng(0), PROMPTS[:prompts], []
    level = rng.normal(0.5, 0.2, prompts)
    for number, step in enumerate((0, 1, 2)):
        scores = {name: level + gain[name][number] + rng.normal(0, spread, prompts) for name in ("scene", "motion")}
        guards = {"brightness": np.full(prompts, brightness[number]) + rng.normal(0, 0.01, prompts)}
        record = summarise_scores(scores, cfg.reward_weights, np.arange(prompts), guards).record()
        records.append({"step": step, "tag": "train", **record})
        if (verdict := judge(records, cfg.reward_weights, tolerances(cfg))) is not None:
            records[-1] |= {"verdict": verdict.record(), "changes": changes(records[0], records[-1]).record()}
        media = Media(frames=rng.integers(0, 256, (prompts, 1, 16, 16, 3), dtype=np.uint8), fps=1.0)
        values = {name: RewardScores(values=each.astype(np.float32)) for name, each in scores.items()}
        columns = {"guard/brightness": guards["brightness"].tolist()}
        folder = run / "eval" / f"step-{step:06d}"
        save_takes(folder, media, items, [7] * prompts, step, values, weights=cfg.reward_weights, more_columns=columns)
    (run / "evals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "metrics.jsonl").unlink()
    return run


def page(run) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>", "", build_report(run).read_text("utf-8"), flags=re.DOTALL))


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of a report's time."""
    for module in ("curves", "trust"):
        monkeypatch.setattr(f"pipeline.tools.report.{module}.plot", lambda *_, **__: "")


@pytest.fixture(scope="module")
def suspect(tmp_path_factory) -> str:
    gain = {"scene": [0, 0.2, 0.4], "motion": [0, 0.1, -0.2]}
    return page(judged_run(tmp_path_factory.mktemp("suspect"), gain, brightness=(0.5, 0.55, 0.9)))


def test_a_suspect_run_says_so_on_top_with_the_takes_that_show_it(suspect):
    top = suspect[: suspect.index("held-out reward before")]
    assert (
        "Verdict: suspect" in top
        and "motion (" in top
        and "brightness (0.497 → 0.903)" in top
        and "since step 1" in top
    )
    assert top.count('class="card pair"') == 3 and top.count("<img ") == 6 and "motion 0." in top
    assert 'class="number up"' not in suspect  # the rise of a suspect run is not green
    assert "(suspect)" in suspect and "0.377 to 0.617" in suspect


def test_proxy_and_gold_are_plotted_with_the_peak(suspect):
    assert "Proxy against motion, which peaked at step 1" in suspect and ">gold</span>" in suspect


def test_all_kept_takes_are_in_the_gallery_and_open_at_full_size(suspect):
    gallery = suspect[suspect.index("All kept held-out takes") :]
    assert gallery.count("<img ") == 16 and gallery.count('type="checkbox"') == 16
    assert "16×16, shown × 12" in suspect and "<script" not in suspect


def test_a_change_within_its_interval_is_no_change_and_not_green(tmp_path, no_plots):
    html = page(judged_run(tmp_path, {"scene": [0, 0, 0], "motion": [0, 0, 0]}))
    assert "Verdict: no measurable change" in html and 'class="number same">no change' in html
    assert not re.search(r'class="(number )?(up|down)"', html) and html.count("no change</b>") == 2


def test_an_improved_run_is_green_and_one_prompt_has_no_interval(tmp_path, no_plots):
    gain = {"scene": [0, 0.2, 0.4], "motion": [0, 0.1, 0.2]}
    html = page(judged_run(tmp_path / "better", gain))
    assert "Verdict: improved" in html and 'class="number up">+0.4' in html
    alone = page(judged_run(tmp_path / "alone", gain, prompts=1))
    assert "Verdict: no measurable change" in alone and "A single prompt has no error" in alone
    assert "± 0.000" not in alone and 'class="number unknown"' in alone


def test_two_points_are_called_two_points(tmp_path, no_plots):
    run = judged_run(tmp_path, {"scene": [0, 0, 0], "motion": [0, 0, 0]})
    assert "has two points" not in page(run)
    cfg = load_config(run / "config.yaml", ["evaluation.every=0"])
    (run / "config.yaml").write_text(to_yaml(cfg))
    assert "The held-out curve has two points" in page(run)
