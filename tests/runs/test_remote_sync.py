"""Runs under a URL: two machines (two scratch folders) that share nothing but the store."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from command import run as command
from fake_checkpoint import fake_config
from made_up_run import make_run

from pipeline.config.load import load_config, to_yaml
from pipeline.core.errors import CheckpointError, ConfigError, RushesError
from pipeline.core.storage import Store, local_folder, url_of
from pipeline.runs import checkpoint, remote_sync
from pipeline.runs.lock import RunLock
from pipeline.runs.paths import RunDir
from pipeline.runs.remote_sync import LEASE, RemoteSync, local_run
from pipeline.runs.resume import create, find_resumable
from pipeline.tools import preflight


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else f"file://{tmp_path}/shared/runs"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine("b") goes to another machine."""

    def go(name):
        monkeypatch.setenv("RUSHES_SCRATCH", str(tmp_path / f"scratch-{name}"))
        monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"nodename": name}))

    go("a")
    monkeypatch.setattr(remote_sync, "CONFIRM_S", 0.0)
    return go


def config(tmp_path, url, name="try"):
    return load_config_of(tmp_path, {"run": {"dir": url, "name": name}})


def load_config_of(tmp_path, sections):
    path = tmp_path / "c.yaml"
    plain = fake_config(tmp_path).model_dump(mode="json")
    for key, values in sections.items():
        plain[key] |= values
    path.write_text(json.dumps(plain))
    return load_config(path)


def save(cfg, run: RunDir, step: int, keep: int = 2) -> Path:
    tensors = {"weights/w": torch.full((3,), float(step))}
    return checkpoint.save(run.checkpoints, step, tensors, {"version": step}, {"version": step}, cfg, keep)


def names(run: RunDir) -> list[str]:
    return sorted(remote_sync.store_of(run.path).files())


# ------------------------------------------------------------------------------------------------------ names


def test_the_config_keeps_the_url(machine, tmp_path):
    cfg = config(tmp_path, "s3://bucket/runs")
    assert cfg.run.dir == local_folder("s3://bucket/runs") and "dir: s3://bucket/runs\n" in to_yaml(cfg)
    with pytest.raises(ConfigError, match="run.dir.*credentials"):
        config(tmp_path, "s3://key:secret@bucket/runs")
    with pytest.raises(ConfigError, match="run.dir.*no bucket"):
        config(tmp_path, "s3://")


def test_stores_that_cannot_hold_a_run_are_refused_early(machine, tmp_path):
    with pytest.raises(ConfigError, match="run.dir: .*nonsense"):
        preflight.check_store("nonsense://x/y")
    with pytest.raises(ConfigError, match="one process"):
        preflight.check_store("memory://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.dir: cannot write file://"):
        preflight.check_store(f"file://{tmp_path}/file/runs")
    preflight.check_store(f"file://{tmp_path}/fine")
    assert Store(f"file://{tmp_path}/fine").files() == {}


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_run_is_resumed_on_another_machine(machine, tmp_path, url):
    cfg = config(tmp_path, url)
    run = create(cfg, Path("c.yaml"))
    with RunLock(run), RemoteSync(run):
        run.config.write_text(to_yaml(cfg))
        run.metrics.write_text('{"step": 1}\n{"step": 2}\n')
        for step in (1, 2, 3):
            save(cfg, run, step)
        (run.path / ".lock-like").write_text("hidden")
    stored = names(run)
    assert "config.yaml" in stored and "metrics.jsonl" in stored and LEASE not in stored
    assert {name.split("/")[1] for name in stored if name.startswith("checkpoints")} == {"step-000002", "step-000003"}
    assert not any(name.startswith(".") for name in stored)

    machine("b")
    cfg = config(tmp_path, url)
    with pytest.raises(ConfigError, match="exists in .*://"):
        create(cfg, Path("c.yaml"))
    again = find_resumable(cfg, Path("c.yaml"))
    assert again.path != run.path
    with RunLock(again), RemoteSync(again):
        newest = checkpoint.latest(again.checkpoints)
        assert newest.name == "step-000003" and checkpoint.load(newest)[0]["weights/w"][0] == 3
        checkpoint.check_config(newest, cfg)
        assert again.metrics.read_text() == run.metrics.read_text()
        save(cfg, again, 4)

    machine("a")  # its own files are older than the store's
    assert checkpoint.latest(run.checkpoints).name == "step-000004"
    machine("c")
    with pytest.raises(ConfigError, match="no run 'other'.*://"):
        find_resumable(config(tmp_path, url, "other"), Path("c.yaml"))
    with pytest.raises(ConfigError, match="run.name=NAME"):
        find_resumable(config(tmp_path, url, None), Path("c.yaml"))


def test_a_half_uploaded_checkpoint_is_never_picked_up(machine, tmp_path, url, monkeypatch):
    cfg = config(tmp_path, url)
    run = create(cfg, Path("c.yaml"))
    run.config.write_text("")
    save(cfg, run, 1)
    upload, sent = Store.upload, []

    def cut_off(self, source, name):
        sent.append(name)
        if len(sent) == 3:
            raise RushesError(f"cannot write {name}: the network is gone")
        upload(self, source, name)

    monkeypatch.setattr(Store, "upload", cut_off)
    with pytest.raises(CheckpointError, match="complete on this node, but cannot write"):
        save(cfg, run, 2)
    monkeypatch.undo()
    assert not any(name.endswith("MANIFEST.json") for name in sent)  # it would have been the last one
    machine("b")
    elsewhere = RunDir(local_folder(url) / "try")
    assert checkpoint.latest(elsewhere.checkpoints).name == "step-000001"
    machine("a")
    assert checkpoint.latest(run.checkpoints).name == "step-000002"  # here it is complete


@pytest.mark.parametrize("stored", ["good", "corrupt too"])
def test_a_corrupt_checkpoint_is_replaced_by_the_stores_copy_if_that_is_good(machine, tmp_path, url, stored):
    cfg = config(tmp_path, url)
    run = create(cfg, Path("c.yaml"))
    for step in (1, 2):
        folder = save(cfg, run, step)
    (folder / "tensors.safetensors").write_bytes(b"\0")
    if stored != "good":
        remote_sync.store_of(run.path).write("checkpoints/step-000002/state.json", b"{}")
    found = checkpoint.newest(run.checkpoints, writing=True)
    assert len(found.notes) == 1 and "step-000002" in found.notes[0]
    assert found.folder.name == ("step-000002" if stored == "good" else "step-000001")
    assert checkpoint.load(found.folder)[1]["controller"] == {"version": checkpoint.step_of(found.folder)}

    machine("b")  # has no copy of its own
    elsewhere = checkpoint.newest((local_folder(url) / "try" / "checkpoints"), writing=True)
    assert elsewhere.folder.name == found.folder.name and len(elsewhere.notes) == (stored != "good")


def test_a_learner_on_another_node_fetches_its_checkpoint(machine, tmp_path, url):
    cfg = config(tmp_path, url)
    run = create(cfg, Path("c.yaml"))
    save(cfg, run, 1)
    machine("b")
    folder = local_folder(url) / "try" / "checkpoints" / "step-000001"
    assert checkpoint.read_state(folder)["controller"] == {"version": 1}
    machine("c")
    tensors, _ = checkpoint.load(local_folder(url) / "try" / "checkpoints" / "step-000001")
    assert tensors["weights/w"][0] == 1
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(local_folder(url) / "try" / "checkpoints" / "step-000009")


# ------------------------------------------------------------------------------------------------- one writer


def test_two_machines_cannot_write_one_run(machine, tmp_path, url, monkeypatch):
    monkeypatch.setattr(remote_sync, "INTERVAL_S", 0.05)
    monkeypatch.setattr(remote_sync, "STALE_S", 0.6)
    run = create(config(tmp_path, url), Path("c.yaml"))
    with RunLock(run), RemoteSync(run):
        machine("b")
        other = RunDir(local_folder(url) / "try")
        other.path.mkdir(parents=True)
        with pytest.raises(RushesError, match=f"written by process {os.getpid()} on a"):
            with RunLock(other), RemoteSync(other):
                pass
        machine("a")
    store = remote_sync.store_of(run.path)
    store.write(LEASE, json.dumps({"writer": "process 1 on gone", "time": time.time()}).encode())
    with RunLock(run), RemoteSync(run):  # nobody renews the lease: its writer has died
        assert json.loads(store.read(LEASE))["writer"].endswith("on a")


@pytest.mark.parametrize("skew_s", [-660, 660, -1e9])
@pytest.mark.parametrize("host", ["other", "the same name"])
def test_a_live_writer_is_not_taken_over_whatever_its_clock_or_host_name(machine, tmp_path, monkeypatch, skew_s, host):
    """A lease counts by whether it is renewed. Two containers may have one host name."""
    monkeypatch.setattr(remote_sync, "STALE_S", 0.6)
    url = f"file://{tmp_path}/shared"
    run = create(config(tmp_path, url), Path("c.yaml"))
    store, done = remote_sync.store_of(run.path), threading.Event()
    name = "a" if host == "the same name" else "b"

    def renew() -> None:
        count = 0
        while not done.wait(0.05):
            count += 1
            lease = {"writer": f"process {os.getpid()} on {name}", "place": "elsewhere", "time": time.time() + skew_s}
            store.write(LEASE, json.dumps(lease | {"count": count}).encode())

    writer = threading.Thread(target=renew)
    writer.start()
    while store.read(LEASE) is None:
        time.sleep(0.01)
    try:
        with pytest.raises(RushesError, match=f"written by process {os.getpid()} on {name}"):
            with RunLock(run), RemoteSync(run):
                pass
    finally:
        done.set()
        writer.join()
    with RunLock(run), RemoteSync(run):  # nobody renews it any more
        pass


def test_of_two_writers_that_start_at_once_one_stays(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_sync, "CONFIRM_S", 0.1)
    run = create(config(tmp_path, f"file://{tmp_path}/shared"), Path("c.yaml"))
    store = remote_sync.store_of(run.path)
    other = json.dumps({"writer": "process 1 on b", "place": "b", "time": 0}).encode()
    threading.Timer(0.05, lambda: store.write(LEASE, other)).start()
    with pytest.raises(RushesError, match="written by process 1 on b"):
        with RunLock(run), RemoteSync(run):
            pass
    assert store.read(LEASE) == other


def test_changed_files_are_uploaded_during_the_run(machine, tmp_path, url, monkeypatch):
    monkeypatch.setattr(remote_sync, "INTERVAL_S", 0.05)
    run = create(config(tmp_path, url), Path("c.yaml"))
    store = remote_sync.store_of(run.path)
    with RunLock(run), RemoteSync(run):
        run.metrics.write_text("1\n")
        limit = time.monotonic() + 20
        while store.read("metrics.jsonl") != b"1\n" and time.monotonic() < limit:
            pass
        assert store.read("metrics.jsonl") == b"1\n"
        run.summary.write_text("{}")
    assert store.read("summary.json") == b"{}"


def test_a_failed_upload_at_the_end_is_an_error_unless_there_is_another(machine, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/shared"
    run = create(config(tmp_path, url), Path("c.yaml"))
    run.metrics.write_text("1\n")

    def broken(self):
        raise RushesError("the network is gone")

    monkeypatch.setattr(RemoteSync, "push", broken)
    with pytest.raises(RushesError, match="network"), RunLock(run), RemoteSync(run):
        pass
    with pytest.raises(ZeroDivisionError), RunLock(run), RemoteSync(run):
        1 / 0  # noqa: B018


# ---------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read_by_its_url(machine, tmp_path, capsys, url):
    source = make_run(tmp_path, steps=3, finished=False, name="read")
    store = Store(f"{url}/read")
    for path in source.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(source).as_posix())
    status, out, err = command(capsys, "report", f"{url}/read")
    assert status == 0 and Path(out.strip()).name == "report.html", err
    assert url_of(Path(out.strip()).parent) == f"{url}/read" or url.startswith("memory")
    status, out, err = command(capsys, "size", f"{url}/read")
    assert status == 0 and "rollout.workers=" in out, err
    status, _, err = command(capsys, "report", f"{url}/nothing")
    assert status == 2 and "there is no run" in err and err.count("\n") == 1


def test_reading_leaves_alone_what_this_machine_is_writing(machine, tmp_path, url):
    run = create(config(tmp_path, url), Path("c.yaml"))
    run.config.write_text("x")
    code = (
        "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); "
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    Store(f"{url}/try").write("config.yaml", b"older and longer")
    assert local_run(f"{url}/try") == run.path and run.config.read_text() == "x"
    holder.communicate("")
    local_run(f"{url}/try")
    assert run.config.read_text() == "older and longer"


@pytest.fixture(autouse=True)
def forget_memory():
    yield
    fsspec.filesystem("memory").store.clear()
