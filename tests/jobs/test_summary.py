"""The end of a run: the model card in its export."""

from __future__ import annotations

import io
import json

import pytest
from made_up_run import make_run
from rich.console import Console

from jobs.launch.summary import summarise
from pipeline.config.load import load_config
from pipeline.generators.checkpoint_files import LORA_FILE
from pipeline.runs.paths import RunDir


@pytest.mark.parametrize("exported", [None, 20])
def test_the_export_gets_a_card_with_the_runs_numbers(tmp_path, monkeypatch, exported):
    monkeypatch.setattr("pipeline.tools.report.report.build_report", lambda run, summary: None)
    run = RunDir(make_run(tmp_path, finished=False))
    run.export.mkdir()
    (run.export / LORA_FILE).touch()
    result = {
        "evals": [json.loads(line) for line in run.evals.read_text().splitlines()], "step": 40, "takes": 3840,
        "groups": {}, "retries": 0, "peaks": {}, "checkpoint": "", "export": str(run.export), "exported_step": exported,
    }  # fmt: skip
    shown = io.StringIO()
    summarise(load_config(run.config), run, result, 0, Console(file=shown))
    card = (run.export / "README.md").read_text()
    assert f"after {exported or 40} steps of" in card and "3,840 takes" in card and "| duration |" in card
    assert "warning" not in shown.getvalue() and json.loads(run.summary.read_text())["missing"] == []


def test_a_card_that_fails_is_said_and_the_run_has_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tools.report.report.build_report", lambda run, summary: None)
    run = RunDir(make_run(tmp_path, finished=False))
    run.export.mkdir()
    (run.path / "eval/step-000000/takes.parquet").write_bytes(b"broken")
    result = {
        "evals": [], "step": 40, "takes": 1, "groups": {}, "retries": 0, "peaks": {}, "checkpoint": "",
        "export": str(run.export),
    }  # fmt: skip
    shown = io.StringIO()
    summarise(load_config(run.config), run, result, 0, Console(file=shown, width=400))
    assert "missing: model card: " in shown.getvalue() and "rushes export quickstart-1" in shown.getvalue()
    assert run.finished
