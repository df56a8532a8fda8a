"""Every shipped recipe parses, dry-runs without its model, and says where its settings come from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import cli
from pipeline.config.load import load_config
from pipeline.core import cluster_address
from pipeline.core.media import encode_mp4
from pipeline.core.prompts import load_prompts
from pipeline.rewards.scorers.ocr import target_text
from pipeline.tools import preflight_machine

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
ASKED_FOR = (
    "sd1.5 sdxl sd3.5-medium sd3.5-medium-ocr sd1.5-safety flux.1-dev qwen-image wan-1.3b wan-14b wan2.2-a14b "
    "hunyuanvideo skyreels-i2v ltx ltx-i2v quickstart quickstart-image instructvideo"
).split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_address, "CLUSTER_FILE", ROOT / "no such file")


def test_the_recipes_asked_for_are_there():
    assert {f"{name}.yaml" for name in ASKED_FOR} <= set(RECIPES)


def captioned_clips(folder: Path, frames: int) -> Path:
    folder = folder / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(encode_mp4(np.zeros((frames, 48, 80, 3), np.uint8), 8.0))
    (folder / "a.txt").write_text("a dog runs")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_dry_runs(name, capsys, tmp_path):
    cfg = load_config(Path("configs") / name, [])
    given = [f"run.dir={tmp_path}"]
    if not cfg.prompts.train.exists():  # data that the user brings
        given.append(f"prompts.train={captioned_clips(tmp_path, cfg.generator.num_frames)}")
    status = cli.main(["train", f"configs/{name}", "--dry-run", *given])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "all checks passed; no model was loaded" in out and "not checked" in out
    local = Path(cfg.generator.pretrained).is_dir()
    assert ("is no folder here" in out) != local
    wanted = cfg.learner.resources.get("GPU", 0) + cfg.rollout.resources.get("GPU", 0) * cfg.rollout.workers.max
    if wanted > preflight_machine.gpu_count():
        assert f"{wanted:g} GPUs" in out or "GPUs (it has" in out


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("quickstart")])
def test_a_recipe_names_its_source_and_what_was_not_run(name):
    text = (ROOT / "configs" / name).read_text()
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"rushes train configs/{name}" in comment
    assert re.search(r"\b[0-9a-f]{7}\b|August 2025", comment), "no commit or date of the source"
    assert "Ours differ" in comment or "ltx.yaml" in comment or "No GRPO settings" in comment
    assert "Not run by us" in comment


def test_prompts_of_the_special_recipes():
    for part in ("train", "heldout"):
        assert all(target_text(prompt) for prompt in load_prompts(Path(f"configs/prompts/text-{part}.txt")))
    for part in ("", "-heldout"):
        for prompt in load_prompts(Path(f"configs/prompts/first-frames{part}.jsonl")):
            assert prompt.image and Image.open(prompt.image).size == (640, 400)


def test_a_machine_that_is_too_small_is_noted_in_a_dry_run_and_refused_in_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_machine, "gpu_count", lambda: 0)
    assert cli.main(["train", "configs/sd1.5.yaml", "--dry-run", f"run.dir={tmp_path}"]) == 0
    assert "too small: the actors reserve" in capsys.readouterr().out
    assert cli.main(["train", "configs/sd1.5.yaml", f"run.dir={tmp_path}"]) == 2
    assert "reserve" in capsys.readouterr().err


def test_a_wrong_pipeline_class_is_named_with_the_nearest(capsys):
    given = ["train", "configs/ltx-i2v.yaml", "--dry-run", "generator.pipeline=LTXImagetoVideoPipeline"]
    assert cli.main(given) == 2
    assert "LTXImageToVideoPipeline" in capsys.readouterr().err
