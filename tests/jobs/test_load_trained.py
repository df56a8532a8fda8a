"""generate, evaluate and export on a real (tiny) pipeline: checkpoint, LoRA export and full export are one model."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import cli
from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.core.media import read_media
from pipeline.runs import checkpoint


def config_of(pretrained, root, kind="lora", frames=1):
    for name, text in (
        ("train.txt", "a red circle\n"),
        ("heldout.txt", "a blue circle\na green square\na red square\n"),
    ):
        (root / name).write_text(text)
    return Config.model_validate(
        {
            "run": {"dir": str(root / "runs")},
            "generator": {"pretrained": str(pretrained), "height": 16, "width": 16, "num_frames": frames,
                          "call_kwargs": {"max_sequence_length": 8}},
            "trainable": {"kind": kind, "rank": 4, "alpha": 8.0},
            "prompts": {"train": str(root / "train.txt"), "heldout": str(root / "heldout.txt")},
            "rewards": {"jpeg": {"scorer": "jpeg_compressibility"}},
            "evaluation": {"steps": 3, "batch": 2, "takes_per_prompt": 2},
            "ray": {"address": "local"},
        }
    )  # fmt: skip


def make_trained_run(cfg, name="try"):
    """A run with one checkpoint whose weights are far from the start, and an EMA that is again different."""
    from pipeline.learner.learner import Learner

    tensors, meta = Learner(cfg, "cpu").state()
    generator = torch.Generator().manual_seed(1)
    moved = {}
    for key, tensor in tensors.items():
        moved[key] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    run = cfg.run.dir / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(cfg))
    checkpoint.save(run / "checkpoints", 7, moved, meta, {}, cfg, keep=2)
    return run


@pytest.fixture
def lora(tiny_sd3, tmp_path):
    cfg = config_of(tiny_sd3, tmp_path)
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    return cfg, make_trained_run(cfg), tmp_path


def ok(capsys, *args):
    status = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def pictures(capsys, root, name, *args):
    ok(
        capsys,
        "generate",
        root / "c.yaml",
        "-p",
        "a red circle",
        "-p",
        "a blue square",
        "--takes",
        2,
        "-o",
        root / name,
        *args,
    )
    rows = pq.read_table(root / name / "takes.parquet").to_pylist()
    assert [(r["prompt_index"], r["take"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    return np.stack([read_media(root / name / r["path"]).frames for r in rows]).astype(int), rows


def test_checkpoint_lora_export_and_full_export_are_one_model(lora, capsys):
    cfg, run, root = lora
    base, _ = pictures(capsys, root, "base")
    again, rows = pictures(capsys, root, "again")
    assert np.array_equal(base, again)  # the same seeds give the same takes
    from_run, _ = pictures(capsys, root, "run", "-c", run)
    assert np.abs(from_run - base).max() > 5
    ok(capsys, "export", run, "-o", run / "export")
    text = ok(capsys, "export", run, "--format", "full", "-o", root / "full")
    assert "DiffusionPipeline.from_pretrained" in text
    for name, path in (
        ("lora", run / "export"),
        ("full-out", root / "full"),
        ("step", run / "checkpoints/step-000007"),
    ):
        assert np.abs(pictures(capsys, root, name, "-c", path)[0] - from_run).max() <= 1, name

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(cfg.generator.pretrained)
    pipe.load_lora_weights(run / "export")
    picture = pipe(
        ["a red circle"], height=16, width=16, num_inference_steps=3, guidance_scale=1.0, output_type="np",
        max_sequence_length=8, generator=[torch.Generator().manual_seed(rows[0]["seed"])],
    ).images[0]  # fmt: skip
    assert np.abs(np.rint(picture * 255) - from_run[0, 0, 0]).max() <= 1


def test_the_model_cards_code_runs_as_pasted(lora, capsys, tmp_path, monkeypatch):
    cfg, run, _ = lora
    folder = tmp_path / "out"
    assert "is its model card" in ok(capsys, "export", run, "-o", folder)
    card = (folder / "README.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    monkeypatch.chdir(folder)
    exec(code, {})
    assert Image.open("take.png").size == (16, 16)
    monkeypatch.chdir(tmp_path)
    assert cfg.generator.pretrained in code and "library_name: diffusers" in card and "- lora" in card


def test_export_in_a_key_style(lora, capsys, tmp_path):
    _, run, _ = lora
    folder = tmp_path / "out"
    assert "copy kohya.safetensors to" in ok(capsys, "export", run, "--format", "kohya", "-o", folder)
    assert {path.name for path in folder.iterdir()} == {"kohya.safetensors", "README.md"}
    assert "Copy kohya.safetensors to ComfyUI" in (folder / "README.md").read_text()
    assert cli.main(["export", str(run), "--format", "peft"]) == 2
    assert "expected lora, kohya, comfyui or full; diffusers and PEFT read lora" in capsys.readouterr().err


def test_export_refuses_to_overwrite(lora, capsys):
    _, run, _ = lora
    ok(capsys, "export", run)
    assert (run / "exports/step-000007-lora/pytorch_lora_weights.safetensors").exists()
    assert cli.main(["export", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    ok(capsys, "export", run, "--force")


def test_evaluate_compares_with_the_start(lora, capsys):
    _, run, root = lora
    ok(capsys, "export", run, "-o", run / "export")
    text = ok(capsys, "evaluate", root / "c.yaml", "-c", run, "-c", run / "export", "-o", root / "eval")
    assert "before training" in text and "3 prompts, 6 takes" in text
    base, a, b = json.loads((root / "eval/results.json").read_text())
    assert "win_rate" not in base and 0 <= a["win_rate"]["mean"] <= 1
    assert a["reward"]["mean"] == pytest.approx(b["reward"]["mean"], abs=0.01)
    assert a["difference"]["mean"] == pytest.approx(a["reward"]["mean"] - base["reward"]["mean"], abs=1e-6)
    rows = pq.read_table(root / "eval/00-takes/takes.parquet").to_pylist()
    assert len(rows) == 6 and np.mean([r["reward"] for r in rows]) == pytest.approx(base["reward"]["mean"], abs=1e-6)


def test_ema_and_raw_weights_differ(tiny_sd3, tmp_path, capsys):
    cfg = config_of(tiny_sd3, tmp_path)
    cfg = cfg.model_copy(update={"optimizer": cfg.optimizer.model_copy(update={"ema_decay": 0.9})})
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    run = make_trained_run(cfg)
    ema, _ = pictures(capsys, tmp_path, "ema", "-c", run)
    raw, _ = pictures(capsys, tmp_path, "raw", "-c", run, "--raw")
    assert np.abs(ema - raw).max() > 1


def test_full_weights_have_no_lora(tiny_wan, tmp_path, capsys):
    cfg = config_of(tiny_wan, tmp_path, kind="full", frames=5)
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    run = make_trained_run(cfg)
    assert cli.main(["export", str(run), "--format", "lora"]) == 2
    assert "use --format full" in capsys.readouterr().err
    ok(capsys, "export", run, "-o", run / "export")
    from_run, _ = pictures(capsys, tmp_path, "run", "-c", run)
    exported, _ = pictures(capsys, tmp_path, "exported", "-c", run / "export")
    assert from_run.shape[2] == 5 and np.abs(from_run - exported).max() <= 1


def test_a_lora_of_another_model_is_refused(lora, tiny_wan, tmp_path, capsys):
    _, run, root = lora
    ok(capsys, "export", run, "-o", run / "export")
    args = ["generate", str(root / "c.yaml"), "-p", "a", "-o", str(root / "g"), f"generator.pretrained={tiny_wan}"]
    assert cli.main([*args, "-c", str(run / "export"), "generator.num_frames=5"]) != 0
    assert "does not fit" in capsys.readouterr().err
    assert cli.main([*args, "-c", str(run), "generator.num_frames=5"]) == 2
    assert "was trained on" in capsys.readouterr().err
