"""The report of made-up runs: finished, running, just begun, with broken files."""

import json
import re

import pytest
from made_up_run import make_run

from pipeline.core.errors import InputError
from pipeline.tools.report.facts import duration
from pipeline.tools.report.report import build_report


def text_of(run):
    return build_report(run).read_text("utf-8")


def without_plots(run):
    """Plots take most of a report's time; they are made from these files."""
    for name in ("metrics.jsonl", "evals.jsonl"):
        (run / name).unlink()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    """The report of a finished video run."""
    return text_of(make_run(tmp_path_factory.mktemp("finished")))


def test_finished_video_run_shows_everything(finished):
    html = finished
    assert "0.550" in html and "0.830" in html and "+0.280" in html and "11.2 standard errors" in html
    assert html.count("<video ") == 12 and html.count('src="data:video/mp4;base64,') == 12
    assert html.count('alt="frame ') == 12 * 4 and "w 0.49" in html
    assert html.count("<svg") == 1 + 2 + 6 + 2
    assert "The same in every step, so without a curve: Share of clipped ratios: low 0.1, high 0.12; Spread" in html
    for part in (
        "a red circle moving right slowly, number 5",
        "480 admitted",
        "3.8 GiB",
        "finished",
        "flow_sde",
        "1234",
    ):
        assert part in html, part
    assert html.index("before, step 0") < html.index("after, step 40")


def test_it_is_self_contained(finished):
    html = finished
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', html)
    assert links == [] and "<script" not in html and "@import" not in html
    assert not re.findall(r'url\((?!["\']?(?:#|data:))', html)


def test_how_rewards_are_combined_is_shown(tmp_path, finished):
    assert "How the rewards are combined" in finished and "The advantage of the weighted sum of rewards." in finished
    run = make_run(tmp_path, finished=False)
    config = (run / "config.yaml").read_text()
    config = config.replace("combine: rewards", "combine: pareto").replace("normalize: none", "normalize: running", 1)
    (run / "config.yaml").write_text(
        config.replace("clip: null", "clip: [-2, 2.5]", 1).replace("score_repeats: 1", "score_repeats: 3")
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    extra = {"combine/share/scene": 0.75, "combine/share/motion": 0.25, "combine/trust/scene": 0.8}
    extra |= {"combine/applies/motion": 0.5, "combine/non_dominated": 0.4, "combine/clipped/scene": 0.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, **extra}) + "\n" for row in rows))
    html = text_of(run)
    cells = ["scene", "1", "running", "-2 to 2.5", "3", "all", "80 %", "75 %"]
    assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) in html
    assert "<td>50 %</td>" in html and "no other of their group dominates" in html
    assert html.count("<svg") == 1 + 2 + 6 + 2 + 5 and "not dominated in their group" in html


def test_images_are_shown_as_pictures(tmp_path):
    html = text_of(without_plots(make_run(tmp_path, frames=1)))
    assert "<video" not in html and html.count('<img src="data:image/png;base64,') == 12


def test_a_run_that_goes_on_says_what_is_missing(tmp_path):
    html = text_of(make_run(tmp_path, steps=3, finished=False))
    assert "3 of 40 steps done" in html and "evaluation after training is not there yet" in html
    assert "after: not there yet" in html and "Versions are written at the end" in html
    html = text_of(make_run(tmp_path, steps=0, finished=False, name="new"))
    assert (
        "no step done yet" in html and "No evaluation on held-out prompts yet" in html and "No step is done yet" in html
    )


def test_a_cut_metrics_line_and_a_corrupt_take_do_not_stop_it(tmp_path):
    run = make_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "rew')
    take = next((run / "eval/step-000000").glob("*.mp4"))
    take.write_bytes(take.read_bytes()[:100])
    html = text_of(run)
    assert "the file cannot be read" in html and take.name in html


def test_prompts_are_escaped(tmp_path):
    run = without_plots(make_run(tmp_path))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("quickstart-1", "<script>alert(1)</script>"))
    html = text_of(run)
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html


def test_wrong_folders(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        build_report(tmp_path / "none")
    with pytest.raises(InputError, match="is not a run folder"):
        build_report(tmp_path)
    run = make_run(tmp_path)
    (run / "summary.json").write_text("{")
    with pytest.raises(InputError, match="summary.json: is not valid JSON"):
        build_report(run)


def test_duration():
    assert [duration(s) for s in (5, 65, 7300)] == ["5 s", "1 min 05 s", "2 h 01 min"]
