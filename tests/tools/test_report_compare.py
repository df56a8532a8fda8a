"""Several runs in one page: who is compared with whom, by pairs or not; config differences; the same prompts' takes."""

import json
import re

import numpy as np
import pytest
from made_up_run import make_run

from pipeline.config.load import load_config, to_yaml
from pipeline.core.errors import ConfigError
from pipeline.core.takes_table import read_takes
from pipeline.rl.evaluation import summarise_scores
from pipeline.tools.report import compare

LEVEL = np.array([0.1, 0.3, 0.5, 0.6, 0.8, 0.9])  # of the six prompts: they differ far more than the runs do


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take most of a page's time."""
    monkeypatch.setattr(compare, "plot", lambda title, lines: f"[{title}: {', '.join(line.label for line in lines)}]")


def run_of(root, name, lead=0.0, frames=1, changed=()):
    """A run whose held-out rewards are `LEVEL` before, and 0.05 + `lead` more after, give or take 0.005."""
    run = make_run(root, frames=frames, name=name)
    cfg = load_config(run / "config.yaml", list(changed))
    (run / "config.yaml").write_text(to_yaml(cfg))
    noise = 0.005 * np.array([1, -1, 1, -1, 1, -1])
    records = []
    for step, scores in ((0, LEVEL), (40, LEVEL + 0.05 + lead + noise * (lead != 0))):
        record = summarise_scores({"scene": scores, "motion": scores}, cfg.reward_weights, np.arange(6)).record()
        records.append({"step": step, "tag": "train", **record})
    (run / "evals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def page_of(root, *runs):
    html = compare.build_comparison(runs, root / "page.html").read_text("utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))


def lead_of(page, reward, run):
    """The cell `against` of a run's row."""
    table = page.split(f"<h3>{reward}")[1].split("</table>")[0]
    row = table.split(f"<tr><td>{run}</td>")[1].split("</tr>")[0]
    return re.sub(r"<[^>]+>", " ", row.split('class="lead">')[1].split("</td>")[0]).split()


def test_the_same_prompts_and_seeds_are_compared_by_pairs(tmp_path):
    page = page_of(tmp_path, run_of(tmp_path, "one"), run_of(tmp_path, "two", lead=0.02), run_of(tmp_path, "three"))
    assert lead_of(page, "scene", "two") == ["+0.020", "±", "0.006", "paired,", "6", "prompts"]
    assert lead_of(page, "weighted reward", "two") == ["+0.030", "±", "0.009", "paired,", "6", "prompts"]
    assert lead_of(page, "scene", "three")[:2] == ["no", "difference"]
    assert lead_of(page, "scene", "one") == ["–", "the", "first", "run"]
    assert "[scene, held-out: one, two, three]" in page and "[weighted reward, held-out: one, two, three]" in page


def test_other_seeds_are_not_pairs(tmp_path):
    one, two = run_of(tmp_path, "one"), run_of(tmp_path, "two", lead=0.02)
    import pyarrow.parquet as pq

    table = two / "eval/step-000040/takes.parquet"
    rows = read_takes(table.parent)
    changed = pq.read_table(table).drop_columns("seed").append_column("seed", [[8] * len(rows)])
    pq.write_table(changed, table)
    page = page_of(tmp_path, one, two)
    assert lead_of(page, "scene", "two")[:2] == ["no", "difference"]  # the prompts' spread is no pair's any more
    assert "not paired: other prompts or seeds" in page and "No two runs kept takes of the same prompt" in page


def test_what_is_scored_otherwise_is_not_compared(tmp_path):
    changes = ["rewards.scene.weight=0", "rewards.motion.scorer=aesthetic", "optimizer.lr=0.25"]
    page = page_of(tmp_path, run_of(tmp_path, "one"), run_of(tmp_path, "two", lead=0.02, changed=changes))
    assert lead_of(page, "scene", "two")[0] == "+0.020"  # a weight changes no score
    assert "is scored differently" in " ".join(lead_of(page, "motion", "two"))
    assert "weights or rewards differ" in " ".join(lead_of(page, "weighted reward", "two"))
    assert "gold in some" in page and "[weighted reward" not in page
    for key in ("optimizer.lr", "rewards.scene.weight", "rewards.motion.scorer"):
        assert f"<td>{key}</td>" in page
    assert "<td>run.steps</td>" not in page and "<td>run.name</td>" not in page and "<td>0.25</td>" in page


def test_takes_stand_side_by_side_and_in_the_page(tmp_path, monkeypatch):
    runs = [run_of(tmp_path, name, frames=9) for name in ("one", "two")]
    next((runs[1] / "eval/step-000040").glob("prompt-00002*")).unlink()
    page = page_of(tmp_path, *runs)
    assert page.count('<video src="data:video/mp4;base64,') == 11 and page.count("<video ") == 11
    assert page.count('class="player"') == 6 and "the file cannot be read" in page and "one, step 40, " in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)
    monkeypatch.setattr(compare, "MAX_EMBEDDED", 2)
    page = page_of(tmp_path, *runs)
    assert "<video " not in page and "6 takes of the same prompts and seeds are left out" in page


def test_broken_requests(tmp_path):
    run = run_of(tmp_path, "one")
    with pytest.raises(ConfigError, match="the same run is given twice"):
        compare.build_comparison([run, run.parent / "." / "one"], tmp_path / "page.html")
    same = run_of(tmp_path / "other", "one")
    assert f"<td>{same}</td>" in page_of(tmp_path, run, same)  # two runs of one name go by their paths
    early = make_run(tmp_path, steps=0, finished=False, name="early")
    assert "No run has an evaluation yet" in page_of(tmp_path, early, make_run(tmp_path, steps=0, name="late"))
