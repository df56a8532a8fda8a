"""The `rushes` command in process: config, dry run, report, score, doctor."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run
from fake_checkpoint import fake_config
from made_up_run import make_run, moving_square
from PIL import Image

from jobs.commands import doctor
from pipeline.config.load import to_yaml
from pipeline.core.media import encode_mp4


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(fake_config(tmp_path)))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two pictures and a clip."""
    media = tmp_path / "media"
    media.mkdir()
    for i in range(2):
        Image.fromarray(moving_square(True, 1, i)[0]).save(media / f"{i}.png")
    (media / "clip.mp4").write_bytes(encode_mp4(moving_square(True, 9, 3), 8.0))
    return media


def test_help_and_config_errors_are_quick_and_load_no_model():
    code = (
        "import sys, time; start = time.perf_counter(); from jobs.cli import main; status = "
        "main(['train', 'nope.yaml']);"
        "heavy = {'torch', 'ray', 'diffusers', 'matplotlib', 'transformers'} & set(sys.modules);"
        "print(heavy, status, time.perf_counter() - start)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("set() 2 ")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: nope.yaml")


def test_config_prints_every_key(capsys, config):
    status, out, _ = run(capsys, "config", config, "run.steps=20")
    assert status == 0 and "steps: 20" in out and "ema_decay" in out
    status, out, _ = run(capsys, "config", "--docs")
    assert status == 0 and out.startswith("# Config reference")


def test_dry_run_prints_the_plan_and_loads_nothing(capsys, config, tmp_path):
    status, out, err = run(capsys, "train", config, "--dry-run", "run.steps=5")
    assert status == 0, err
    assert "8 prompts x 8 takes = 64 takes" in out and "5 steps, 320 takes" in out and "all checks passed" in out
    assert "WanTransformer3DModel" in out and not list((tmp_path / "runs").iterdir())
    assert "flow_sde with 10 sampler steps, noise at steps" in out
    status, out, err = run(capsys, "train", config, "--dry-run", "objective.name=awm")
    assert status == 0, err
    assert "ode with 10 sampler steps, no noise, trained at the noise levels of steps" in out


def test_report_command(capsys, tmp_path):
    status, out, _ = run(capsys, "report", make_run(tmp_path, steps=2, finished=False))
    assert status == 0 and out.strip().endswith("report.html")


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.startswith("rushes")


# ------------------------------------------------------------------------------------------------------ score


def scores_of(path):
    return {(r["path"].rsplit("/", 1)[-1], r["reward"]): r for r in pq.read_table(path).to_pylist()}


def test_score_a_folder_with_two_rewards(capsys, folder, tmp_path):
    out = tmp_path / "scores.parquet"
    status, text, err = run(
        capsys, "score", folder, "-r", "jpeg_compressibility", "-r", "jpeg_incompressibility", "--out", out
    )
    assert status == 0, err
    rows = scores_of(out)
    assert len(rows) == 6 and all(r["error"] is None for r in rows.values())
    assert rows["0.png", "jpeg_compressibility"]["score"] == -rows["0.png", "jpeg_incompressibility"]["score"] < 0
    assert "jpeg_compressibility" in text and str(out) in text


def test_unreadable_files_are_rows_with_an_error_and_are_tried_again(capsys, folder, tmp_path):
    out = tmp_path / "scores.parquet"
    good = (folder / "clip.mp4").read_bytes()
    (folder / "clip.mp4").write_bytes(good[:300])
    args = ("score", folder, "-r", "jpeg_compressibility", "-o", out)
    status, _, err = run(capsys, *args)
    assert status == 1 and "1 of 3 scores failed" in err and "clip.mp4" in err and err.count("\n") == 1
    row = scores_of(out)["clip.mp4", "jpeg_compressibility"]
    assert row["score"] is None and "cut off" in row["error"]
    (folder / "clip.mp4").write_bytes(good)
    status, text, _ = run(capsys, *args)
    assert status == 0 and scores_of(out)["clip.mp4", "jpeg_compressibility"]["score"] < 0
    assert "2 files had all their scores already" in text


def test_existing_scores_are_not_computed_again(capsys, folder, tmp_path, monkeypatch):
    source = tmp_path / "counted.py"
    log = tmp_path / "calls"
    source.write_text(
        f"def score(frames, prompt):\n    open({str(log)!r}, 'a').write('x')\n    return frames.mean()\n"
        "score.reads = 'video'\n"
    )
    args = ("score", folder, "-r", f"{source}:score", "-o", tmp_path / "s.parquet")
    assert run(capsys, *args)[0] == 0 and run(capsys, *args)[0] == 0
    assert log.read_text() == "xxx"


def test_one_bad_file_does_not_fail_its_batch(capsys, folder, tmp_path):
    source = tmp_path / "picky.py"
    source.write_text("def score(frames, prompt):\n    assert prompt != 'bad'\n    return 1.0\n")
    (folder / "1.txt").write_text("bad")
    status, _, err = run(capsys, "score", folder, "-r", f"{source}:score", "-o", tmp_path / "s.parquet")
    rows = scores_of(tmp_path / "s.parquet")
    assert status == 1 and "AssertionError" in err
    assert [rows[name, f"{source}:score"]["score"] for name in ("0.png", "1.png", "clip.mp4")] == [1.0, None, 1.0]


def test_prompts_come_from_the_table_the_sidecar_or_the_option(capsys, folder, tmp_path):
    source = tmp_path / "length.py"
    source.write_text("def score(frames, prompt):\n    return len(prompt)\n")
    reward = f"{source}:score"
    pq.write_table(
        pa.table({"path": ["media/0.png", "media/1.png"], "prompt": ["a", "abc"]}), tmp_path / "list.parquet"
    )
    assert run(capsys, "score", tmp_path / "list.parquet", "-r", reward, "-o", tmp_path / "a.parquet")[0] == 0
    assert [r["score"] for r in scores_of(tmp_path / "a.parquet").values()] == [1, 3]
    (folder / "0.txt").write_text("sidecar\n")
    assert run(capsys, "score", folder, "-r", reward, "-o", tmp_path / "b.parquet")[0] == 0
    assert scores_of(tmp_path / "b.parquet")["0.png", reward]["score"] == 7
    assert run(capsys, "score", folder, "-r", reward, "-o", tmp_path / "c.parquet", "--prompt", "xy")[0] == 0
    assert {r["score"] for r in scores_of(tmp_path / "c.parquet").values()} == {2}


def test_score_options_and_list(capsys, folder, tmp_path):
    args = ["score", folder / "0.png", "-r", "jpeg_compressibility", "-o"]
    run(capsys, *args, tmp_path / "a.parquet")
    status, _, err = run(capsys, *args, tmp_path / "b.parquet", "--set", "jpeg_compressibility.args.scale=2")
    assert status == 0, err
    a, b = (next(iter(scores_of(tmp_path / f"{n}.parquet").values()))["score"] for n in "ab")
    assert b == pytest.approx(a / 2)
    status, out, _ = run(capsys, "score", "--list")
    assert status == 0 and "jpeg_incompressibility" in out


# --------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_fails_and_what_to_do(capsys, tmp_path, monkeypatch):
    def broken():
        raise OSError("libx264 is missing")
        yield

    monkeypatch.setattr(doctor, "check_packages", lambda: iter([doctor.Finding("OK", "packages", "fine")]))
    status, out, _ = run(capsys, "doctor", "--dir", tmp_path)
    assert status in (0, 1) and "OK   h264" in out
    monkeypatch.setattr(doctor, "check_codecs", broken)
    status, out, _ = run(capsys, "doctor", "--dir", tmp_path)
    assert status == 1 and "FAIL" in out and "libx264 is missing" in out and "do what their lines say" in out
