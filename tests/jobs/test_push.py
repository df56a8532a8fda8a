"""`rushes push` to a hub on this machine, through huggingface_hub."""

from __future__ import annotations

import json

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from command import run as rushes
from safetensors.numpy import save_file
from stand_in_hub import Hub

TOKEN = "hf_" + "Q7" * 15
BASE = "/home/me/secret-base"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is the library's own
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    yield hub
    hub.close()


def make_export(folder, base):
    """An export's files, as `export_lora` and `write_card` leave them."""
    (folder / "card").mkdir(parents=True)
    weights = {"a.lora_A.weight": np.ones((2, 3), np.float32)}
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (folder / "card/reward.png").write_bytes(b"picture")
    (folder / ".hidden").write_text("mine")
    (folder / "README.md").write_text(
        f"---\ntags: [rushes]\n---\n```python\npipe = DiffusionPipeline.from_pretrained({base!r}, dtype=dtype)\n"
        'pipe.load_lora_weights(".")\n```\n'
    )
    return folder


def test_it_pushes_the_export_and_never_shows_the_token(hub, tmp_path, capsys):
    folder = make_export(tmp_path / "run/export", "owner/base")
    (tmp_path / "run/config.yaml").touch()
    status, out, err = rushes(capsys, "push", tmp_path / "run", "o/n", "--private")
    assert status == 0, err
    assert hub.repos == [{"name": "n", "organization": "o", "visibility": "private"}]
    names = {"README.md", "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    assert hub.files.keys() == names | {"card/reward.png"}
    for name in names - {"README.md"}:
        assert hub.files[name] == (folder / name).read_bytes(), name
    assert b'pipe.load_lora_weights("o/n")' in hub.files["README.md"]
    assert hub.tokens == {f"Bearer {TOKEN}"} and "/o/n/commit/c" in out
    assert TOKEN not in out + err


def test_a_refusal_is_one_line_without_the_token(hub, tmp_path, capsys):
    hub.refuse = 403
    status, out, err = rushes(capsys, "push", make_export(tmp_path / "e", "owner/base"), "o/n")
    assert status == 1 and err.count("\n") == 1 and "403" in err and "has HF_TOKEN write access there?" in err
    assert TOKEN not in out + err


def test_a_dry_run_lists_files_and_asks_nobody(hub, tmp_path, capsys):
    status, out, err = rushes(capsys, "push", make_export(tmp_path / "e", "owner/base"), "o/n", "--dry-run")
    assert status == 0 and "card/reward.png" in out and 'load_lora_weights("o/n")' in out and ".hidden" not in out
    assert not hub.tokens and TOKEN not in out + err


def test_a_base_on_this_machine_needs_its_name_on_the_hub(hub, tmp_path, capsys):
    folder = make_export(tmp_path / "e", BASE)
    status, _, err = rushes(capsys, "push", folder, "o/n")
    assert status == 2 and "--base owner/name" in err and not hub.tokens
    status, _, err = rushes(capsys, "push", folder, "o/n", "--base", "owner/base")
    assert status == 0, err
    assert all(BASE.encode() not in content for content in hub.files.values())
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/base"
    assert "from_pretrained('owner/base'" in card
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"


def test_what_is_no_export_is_refused(hub, tmp_path, capsys, monkeypatch):
    for name in ("no-owner", "a/b/c", "../x", "o/n\n"):
        status, _, err = rushes(capsys, "push", tmp_path, name)
        assert status == 2 and "expected owner/name" in err
    status, _, err = rushes(capsys, "push", tmp_path, "o/n")
    assert status == 2 and "is no export with a model card" in err
    folder = make_export(tmp_path / "e", "owner/base")
    (folder / "card/passwords").symlink_to("/etc/passwd")
    status, _, err = rushes(capsys, "push", folder, "o/n")
    assert status == 2 and "is a link" in err
    (folder / "card/passwords").unlink()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    status, _, err = rushes(capsys, "push", folder, "o/n")
    assert status == 2 and "set HF_TOKEN" in err and not hub.tokens
