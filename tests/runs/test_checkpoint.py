"""Checkpoints are whole or absent, corrupt ones are refused by name, and another config cannot resume them."""

import errno
import json
import logging
import os
import resource

import pytest
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import CheckpointError
from pipeline.runs import checkpoint


def config(**changes) -> Config:
    data = {
        "generator": {"pretrained": "models/x"},
        "prompts": {"train": "p.txt"},
        "rewards": {"r": {"scorer": "jpeg_compressibility"}},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data.setdefault(section, {})[name] = value
    return Config.model_validate(data)


def tensors(value=1.0):
    return {"lora.a": torch.full((4, 3), value), "half": torch.ones(5, dtype=torch.bfloat16), "step": torch.tensor(7)}


def save(root, step, value=1.0, keep=10, cfg=None):
    return checkpoint.save(root, step, tensors(value), {"version": step}, {"cursor": [1, 2]}, cfg or config(), keep)


def test_round_trip_is_exact(tmp_path):
    folder = save(tmp_path, 25, value=0.1)
    assert folder == tmp_path / "step-000025" == checkpoint.latest(tmp_path)
    loaded, state = checkpoint.load(folder)
    for name, tensor in tensors(0.1).items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert state == {"learner": {"version": 25}, "controller": {"cursor": [1, 2]}} == checkpoint.read_state(folder)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".partial")]
    assert {p.name for p in folder.iterdir()} == {"tensors.safetensors", "state.json", "identity.json", "MANIFEST.json"}


def test_keeps_the_last_n_and_replaces_the_same_step(tmp_path):
    for step in (1, 2, 3, 3, 4):
        save(tmp_path, step, value=step, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004", "step-000003"]
    assert len(list(tmp_path.iterdir())) == 2


def test_newest_is_by_number_not_by_name_or_time(tmp_path):
    save(tmp_path, 1_000_000)
    save(tmp_path, 999_999)
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def test_half_written_folders_are_skipped_with_a_log(tmp_path, caplog):
    assert checkpoint.latest(tmp_path / "none") is None
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    (newer / "MANIFEST.json").unlink()
    (tmp_path / ".partial-step-000003-1").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path).name == "step-000001"
    assert "step-000002" in caplog.text and "skipped" in caplog.text


@pytest.mark.parametrize("when", ["tensors", "state", "manifest", "rename"])
def test_killed_while_saving_leaves_the_previous_one(tmp_path, monkeypatch, when):
    """A kill at any point: no clean-up runs, so the partial folder stays."""
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    if when == "tensors":
        monkeypatch.setattr("safetensors.torch.save_file", die)
    elif when == "state":
        monkeypatch.setattr(checkpoint.Path, "write_text", die)
    elif when == "manifest":
        monkeypatch.setattr(checkpoint, "_fingerprint", die)
    else:
        monkeypatch.setattr(os, "rename", die)
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path).name == "step-000001"
    save(tmp_path, 2)  # the partial folder does not disturb the next attempt
    assert checkpoint.latest(tmp_path).name == "step-000002"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "format", "unlisted"])
def test_a_corrupt_one_is_refused_and_the_one_before_it_is_used(tmp_path, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path, manifest = folder / "tensors.safetensors", folder / "MANIFEST.json"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "delete":
        path.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        plain = json.loads(manifest.read_text())
        if damage == "format":
            plain["format"] = 99
        else:
            del plain["files"]["state.json"]
        manifest.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    text = str(error.value)
    assert "step-000002 is corrupt" in text and "step-000001" in text and "\n" not in text
    found = checkpoint.newest(tmp_path)
    assert found.folder == tmp_path / "step-000001" and len(found.notes) == 1 and folder.is_dir()
    assert "step-000002 is corrupt" in found.notes[0] and "step-000001" in found.notes[0] and "\n" not in found.notes[0]


def test_the_writer_sets_corrupt_ones_aside_so_that_later_saves_are_kept(tmp_path):
    """As the newest ones they would push the checkpoints of the resumed run out of those that are kept."""
    save(tmp_path, 1)
    for step in (8, 9):
        (save(tmp_path, step) / "state.json").write_text("{}")
    found = checkpoint.newest(tmp_path, writing=True)
    assert found.folder.name == "step-000001" and len(found.notes) == 2 and "now corrupt-step-000009" in found.notes[0]
    save(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-000002"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    left = [
        run / "checkpoints" / ".partial-step-000002-17",
        run / ".export.17.partial",
        run / "eval" / "step-000002" / ".takes.parquet.17.partial",
    ]
    kept = [run / ".lock", run / "eval" / "step-000002" / "takes.parquet", save(run / "checkpoints", 1) / "state.json"]
    for path in left[:2]:
        path.mkdir(parents=True)
        (path / "tensors.safetensors").write_text("half")
    left[2].parent.mkdir(parents=True)
    for path in (left[2], *kept[:2]):
        path.write_text("x")
    checkpoint.remove_partial(run)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    checkpoint.load(checkpoint.latest(run / "checkpoints"))


def test_corrupt_only_one_says_so(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no earlier good one"):
        checkpoint.latest(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "step-000009")


def test_disk_full_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2)
    for words in ("disk is full", "step-000002", "step-000001 is intact"):
        assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    checkpoint.load(checkpoint.latest(tmp_path))


def test_a_real_write_error_inside_safetensors_is_recognised(tmp_path):
    """safetensors raises its own kind of error for the system's; a file-size limit stands in for a full disk."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(CheckpointError, match="step-000001 is intact"):
            big = {"big": torch.zeros(100_000)}
            checkpoint.save(tmp_path, 2, big, {}, {}, config(), 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="no permission"):
            save(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        save(tmp_path / "checkpoints", 2)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"step__takes": 4}, "step.takes"),
        ({"generator__pretrained": "models/y"}, "generator.pretrained"),
        ({"sampler__noise_level": 0.5}, "sampler.noise_level"),
        ({"trainable__rank": 8}, "trainable.rank"),
        ({"run__seed": 3}, "run.seed"),
        ({"sampler__window": {"kind": "random", "size": 3}}, "sampler.window.kind"),
    ],
)
def test_another_config_is_refused_naming_the_key(tmp_path, change, key):
    folder = save(tmp_path, 2)
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_config(folder, config(**change))
    assert f"{key} was " in str(error.value)


def test_prompts_count_by_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "same.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "other.txt").write_text("a\nc\n")
    folder = save(tmp_path / "checkpoints", 2, cfg=config(prompts__train="p.txt"))
    for same in ("p.txt", str(tmp_path / "p.txt"), "./same.jsonl"):
        checkpoint.check_config(folder, config(prompts__train=same))
    with pytest.raises(CheckpointError, match="prompts.train .other.txt. holds other prompts"):
        checkpoint.check_config(folder, config(prompts__train="other.txt"))
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    with pytest.raises(CheckpointError, match="prompts.train .p.txt. holds other prompts"):
        checkpoint.check_config(folder, config(prompts__train="p.txt"))


def test_a_generator_counts_by_where_its_path_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("models/x")
    folder = save(tmp_path / "checkpoints", 2, cfg=config(generator__pretrained="models/x"))
    for same in (str(tmp_path / "models" / "x"), "link", "models/../models/x"):
        checkpoint.check_config(folder, config(generator__pretrained=same))


def test_what_changed_is_listed():
    old = config(prompts__train="p.txt")
    assert checkpoint.changes(old, config(prompts__train="q.txt")) == []
    changed = config(optimizer__lr=0.5, faults__max_attempts=7)
    assert checkpoint.changes(old, changed) == ["optimizer.lr: 0.0001 -> 0.5", "faults.max_attempts: 3 -> 7"]


def test_harmless_changes_may_resume(tmp_path):
    folder = save(tmp_path, 2)
    checkpoint.check_config(folder, config(run__steps=500, rollout__workers=4, checkpoint__every=1))


def test_a_run_of_a_version_without_some_keys_can_be_resumed(tmp_path):
    folder = save(tmp_path, 1)
    saved = json.loads((folder / checkpoint.IDENTITY).read_text())
    del saved["config"]["sampler"]["same_initial_noise"], saved["config"]["trainable"]["rank"]
    saved["digest"] = checkpoint._digest(saved["config"])
    (folder / checkpoint.IDENTITY).write_text(json.dumps(saved))
    checkpoint.check_config(folder, config())
    with pytest.raises(CheckpointError, match="trainable.rank was 16 and is now 8"):
        checkpoint.check_config(folder, config(trainable__rank=8))
