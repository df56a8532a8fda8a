"""Run folders whose files have another shape: one error that names the file, and `rushes list` lists the others."""

import json
import random

import pytest
from made_up_run import make_run

from jobs import cli
from pipeline.core.errors import RushesError
from pipeline.runs import checkpoint

FILES = ("metrics.jsonl", "evals.jsonl", "summary.json", "config.yaml", "eval/step-000000/takes.parquet")
CONTENTS = {
    "a number": b"3",
    "a list": b"[1, 2]",
    "text": b'"x"',
    "null": b"null",
    "an empty object": b"{}",
    "a step of text": b'{"step": "one", "reward/mean": 1}',
    "no step": b'{"reward/mean": 1, "mean": 2}',
    "values of text": b'{"step": 1, "mean": "x", "reward/mean": "x", "heldout": "x", "status": 3}',
    "lists": b'{"step": [], "mean": [], "reward/mean": [], "heldout": [1], "status": []}',
    "lacking keys": b'{"step": 1, "reward/mean": 0.5}',
    "a negative step": b'{"step": -1}',
    "inf": b'{"step": 1e999, "mean": Infinity}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 3000,
    "half a character": b'{"step": 1, "tag": "\\ud83d", "mean": 1, "status": "\\ud83d"}',
    "not UTF-8": b'{"step": 1, "x": "\xe9"}\n{}',
    "binary": bytes(range(256)),
    "wrong parts": b'{"step": 1, "mean": 1, "n": 1, "rewards": {"scene": 3}, "prompt_means": ["x"]}',
    "wrong heldout": b'{"status": "finished", "heldout": {"before": 1, "rewards": {"scene": []}}, "groups": [1]}',
    "wrong versions": b'{"versions": [1], "seeds": 3, "takes": "x", "wall_s": {}}',
}


def run_command(capsys, *args):
    status = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert "internal error" not in err and "Traceback" not in out + err, err
    return status, out, err


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    from jobs.cluster import client

    monkeypatch.setattr(client, "find_address", lambda address: None)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_of_another_shape_is_no_internal_error(tmp_path, capsys, content):
    runs = tmp_path / "runs"
    make_run(tmp_path, steps=4, frames=1, name="good")
    for number, name in enumerate(FILES):
        bad = make_run(tmp_path, steps=4, frames=1, name=f"bad{number}")
        (bad / name).write_bytes(content + b"\n" + content + b"\n{}")
        readers = {"metrics.jsonl": ("status", "watch", "size", "report"), "evals.jsonl": ("status", "report")}
        for command in readers.get(name, ("report",)):
            status, _, err = run_command(capsys, command, bad)
            if status:
                assert err.startswith("error: ") and err.count("\n") == 1
    status, out, _ = run_command(capsys, "list", "--dir", runs)
    assert status == 0 and "good" in out and out.count("bad") >= len(FILES)
    assert "4/40" in out or "3/40" in out


def test_damage_at_random_places(tmp_path, capsys):
    run = make_run(tmp_path, steps=3, frames=1, name="r")
    rng = random.Random(0)
    for name in ("metrics.jsonl", "evals.jsonl", "summary.json"):
        whole = (run / name).read_bytes()
        for _ in range(5):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0x\x00\xff')
            (run / name).write_bytes(data)
            for command in ("status", "report"):
                run_command(capsys, command, run)
        (run / name).write_bytes(whole)


@pytest.mark.parametrize("state", ["3", "[]", "{}", '{"learner": 1, "controller": {}}', "{half"])
def test_a_checkpoints_state_of_another_shape(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(RushesError, match="state.json"):
        checkpoint.read_state(tmp_path)


def test_what_a_run_writes_is_read(tmp_path, capsys):
    run = make_run(tmp_path, steps=4)
    assert run_command(capsys, "status", run, "--json")[0] == 0
    assert run_command(capsys, "report", run)[0] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    from pipeline.runs.tracking import read_metrics

    assert read_metrics(run) == rows
