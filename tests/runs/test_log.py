"""Lines of run.log say where they come from, and hold no secrets."""

import logging
import os

from pipeline.runs.log import setup_logging
from pipeline.runs.paths import RunDir


def test_log_lines_name_their_place_and_hide_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    setup_logging(RunDir(tmp_path), "rollout", "rollout-1")
    log = logging.getLogger("rushes.test")
    log.info("made %d takes", 4, extra={"group": 17})
    try:
        raise ValueError("key abcdef0123456789 refused")
    except ValueError:
        log.exception("header %s", os.environ["WANDB_API_KEY"])
    text = (tmp_path / "run.log").read_text()
    assert f"run={tmp_path.name} role=rollout worker=rollout-1 group=17 rushes.test: made 4 takes" in text
    assert "group=- rushes.test: header ***" in text and "abcdef0123456789" not in text
    for handler in [h for h in logging.getLogger().handlers if h.name == "rushes run.log"]:
        logging.getLogger().removeHandler(handler)
        handler.close()
