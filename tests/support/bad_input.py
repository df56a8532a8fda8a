"""A folder with a config whose every check passes, for tests that spoil one thing and run a command on it."""

from __future__ import annotations

from fake_checkpoint import fake_config
from made_up_run import moving_square
from PIL import Image

from jobs import cli
from pipeline.config.load import to_yaml


class Place:
    """A folder with a config whose every check passes, and a way to run the command on it."""

    def __init__(self, root, capsys, monkeypatch):
        self.root, self.capsys, self.monkeypatch = root, capsys, monkeypatch
        self.config = root / "run.yaml"
        self.config.write_text(to_yaml(fake_config(root)))
        self.weights = root / "model/transformer/diffusion_pytorch_model.safetensors"

    def write(self, name, text):
        (self.root / name).write_text(text, encoding="utf-8")
        return self.root / name

    def scorer(self, body):
        path = self.write("mine.py", f"def score(frames, prompt):\n    {body}\n")
        Image.fromarray(moving_square(True, 1, 0)[0]).save(self.root / "a.png")
        return ["score", str(self.root / "a.png"), "-r", f"{path}:score", "-o", str(self.root / "scores.parquet")]

    def error(self, *args):
        """(status, the error line); checks that it is one line and no traceback."""
        status = cli.main([str(a) for a in args])
        out, err = self.capsys.readouterr()
        assert status != 0, out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return status, err.strip()

    def train(self, *overrides):
        return self.error("train", self.config, *overrides, "--dry-run")
