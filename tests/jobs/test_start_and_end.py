"""What a run says while it starts, where its workers find modules, and what stands in its folder when it has ended."""

import os

import ray
from fake_checkpoint import fake_config
from made_up_run import make_run
from rich.console import Console

from jobs.cluster.ray_session import RaySession
from jobs.common.progress import PlainView
from jobs.launch import summary
from pipeline.core.errors import InputError
from pipeline.runs.paths import RunDir
from pipeline.runs.snapshot import RunSnapshot
from pipeline.tools.report import report

RESULT = {
    "evals": [],
    "step": 2,
    "takes": 4,
    "groups": {},
    "retries": 0,
    "checkpoint": None,
    "export": "e",
    "peaks": {},
}


def test_a_run_that_starts_says_whom_it_waits_for_once_each(capsys):
    view = PlainView(Console(width=160))
    loading = {"learner": "loading", "rollout-0": "waiting for a node with 1 GPU"}
    for activities, pids in [(loading, {}), (loading, {}), ({**loading, "rollout-0": "idle"}, {"rollout-0": 7})]:
        view.update(RunSnapshot(state="starting", step=0, steps=2, activities=activities, pids=pids))
    view.update(RunSnapshot(state="evaluating", step=0, steps=2, activities=loading))
    assert capsys.readouterr().out.splitlines() == [
        "starting: learner (loading), rollout-0 (waiting for a node with 1 GPU)",
        "starting: learner (loading)",
        "evaluating",
    ]


def test_a_summary_says_finished_only_once_the_report_is_there(tmp_path, monkeypatch, capsys):
    run = RunDir(make_run(tmp_path, steps=2, finished=False))
    seen, build = [], report.build_report

    def watched(*args):
        assert not run.finished
        seen.append(build(*args))
        return seen[-1]

    monkeypatch.setattr(report, "build_report", watched)
    summary.summarise(fake_config(tmp_path), run, RESULT, 0, Console())
    assert run.finished and len(seen) == 1 and ">finished<" in run.report.read_text().replace("\n", "")


def test_a_report_that_fails_is_named_and_the_run_has_finished(tmp_path, monkeypatch, capsys):
    run = RunDir(make_run(tmp_path, steps=2, finished=False))

    def broken(*_):
        raise InputError("no font")

    monkeypatch.setattr(report, "build_report", broken)
    summary.summarise(fake_config(tmp_path), run, dict(RESULT), 0, Console(width=160))
    out = capsys.readouterr().out
    assert run.finished and "warning: missing: report: InputError: no font" in out and "report  " not in out


def test_workers_find_modules_that_the_drivers_relative_pythonpath_names(tmp_path, monkeypatch):
    """Ray's workers start in another folder. An empty entry would be that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["mine", "", "/else"]))
    monkeypatch.setattr(ray, "init", lambda **_: None)
    with RaySession(fake_config(tmp_path, ray={"address": "local"})):
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
    assert paths[1:] == [str(tmp_path / "mine"), "/else"]
