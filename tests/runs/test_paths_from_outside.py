"""Names in a run, its store, its checkpoints and its report stay in it; exports replace exports only."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_checkpoint import fake_config
from made_up_run import make_run
from rich.console import Console
from traps import KINDS, picture, traps, within

from jobs import cli
from jobs.commands.export import export
from jobs.launch.training import run_training
from pipeline.config.load import to_yaml
from pipeline.core.errors import CheckpointError, ConfigError, InputError, RushesError
from pipeline.core.storage import Store, local_folder
from pipeline.runs import checkpoint, remote_sync
from pipeline.runs.paths import RunDir
from pipeline.runs.resume import create, find_resumable, resume_or_create
from pipeline.tools import preflight
from pipeline.tools.report.report import build_report


@pytest.fixture(autouse=True)
def alarm():
    with within(30):
        yield


# --------------------------------------------------------------------------------------------------- runs by name

BAD_NAMES = ["../up", "../../../etc", "/etc", "a/b", "..", ".", ".hidden", "a\n", "a\x00b", "x" * 101, "-"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_run_lies_outside_its_folder(tmp_path, name):
    cfg = fake_config(tmp_path, run={"dir": str(tmp_path / "runs"), "name": name})
    (tmp_path / "up").mkdir()
    (tmp_path / "runs" / "a" / "b").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    quiet = Console(file=io.StringIO())
    for way in (
        lambda: create(cfg, Path("c.yaml")),
        lambda: find_resumable(cfg, Path("c.yaml")),
        lambda: resume_or_create(cfg, Path("c.yaml")),
        lambda: preflight.check_all(cfg, dry=True),
        lambda: run_training(cfg, Path("c.yaml"), resume=True, console=quiet),
        lambda: run_training(cfg, Path("c.yaml"), or_start=True, console=quiet),
    ):
        with pytest.raises(ConfigError, match="run.name: .*letters, digits"):
            way()
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------------- the store

BAD_KEYS = ["../outside", "../../outside", "a/../../outside", "/outside", "logs//../../outside", "a/./b"]


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A run in a store, and a way to have it list further keys, as an object store may."""
    monkeypatch.setenv("RUSHES_SCRATCH", str(tmp_path / "scratch"))
    url = f"file://{tmp_path}/shared/runs"
    cfg = fake_config(tmp_path, run={"dir": url, "name": "try"})
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": local_folder(url)})})
    run = create(cfg, Path("c.yaml"))
    run.config.write_text(to_yaml(cfg))
    Store(f"{url}/try").write("config.yaml", run.config.read_bytes())
    checkpoint.save(run.checkpoints, 1, {"weights/w": torch.zeros(2)}, {}, {}, cfg, 2)
    shutil.rmtree(run.path)

    class Info:
        def __init__(self, path, kind):
            self.path, self.type, self.size = path, kind, 3

    def also(*keys):
        from pyarrow import fs

        real = Store.__init__

        def init(self, where):
            real(self, where)
            own, base = self._fs, self._root

            class Listing:
                def __getattr__(self, name):
                    return getattr(own, name)

                def get_file_info(self, what):
                    found = own.get_file_info(what)
                    if not isinstance(what, fs.FileSelector):
                        return found
                    more = [Info(f"{tmp_path}/shared/runs/try/{key}", fs.FileType.File) for key in keys]
                    return [*found, *[m for m in more if m.path.startswith(what.base_dir)]]

                def open_input_stream(self, path):
                    return (
                        io.BytesIO(b"bad") if any(path.endswith(key) for key in keys) else own.open_input_stream(path)
                    )

            assert base
            self._fs = Listing()

        monkeypatch.setattr(Store, "__init__", init)

    return url, run, also


def outside_of(root: Path, run: RunDir) -> list[Path]:
    return [p for p in root.rglob("*") if "scratch" in p.parts and p.is_file() and run.path not in p.parents]


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize("below", ["", "checkpoints/step-000001/", "export/"])
def test_keys_of_a_store_write_nothing_outside(stored, tmp_path, below, key):
    url, run, also = stored
    also(below + key)
    ways = [
        lambda: remote_sync.local_run(f"{url}/try"),
        lambda: remote_sync.local_run(f"{url}/try/export"),
        lambda: remote_sync.fetch_files(run.path),
        lambda: remote_sync.fetch_checkpoint(run.checkpoints / "step-000001"),
        lambda: remote_sync.fetch_newest_checkpoint(run.checkpoints),
    ]
    refused = 0
    for way in ways:
        try:
            way()
        except RushesError as error:
            refused += 1
            assert url in str(error) and "outside" in str(error) or "/./" in str(error)
    assert refused and not outside_of(tmp_path, run)


def test_folders_that_are_no_checkpoints_are_not_fetched_or_deleted(stored):
    url, run, also = stored
    also("checkpoints/zzz/MANIFEST.json", "checkpoints/step-9/MANIFEST.json", "checkpoints/step-000009x/MANIFEST.json")
    remote_sync.local_run(f"{url}/try")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    remote_sync.fetch_checkpoint(run.checkpoints / "..")
    assert run.config.exists()
    numbers = ("0000001", "999999", "1000000", "9", "000009x")
    assert set(remote_sync._steps(f"checkpoints/step-{n}/MANIFEST.json" for n in numbers)) == {1, 999999, 1000000}


def test_a_link_in_the_scratch_folder_is_not_followed(stored, tmp_path):
    url, run, also = stored
    Store(f"{url}/try").write("logs/a.txt", b"new")
    run.path.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (run.path / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="logs/a.txt.*leads out"):
        remote_sync.fetch_files(run.path)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_lock_in_the_store_is_not_fetched(stored):
    url, run, also = stored
    Store(f"{url}/try").write(".lock", b"process 1")
    remote_sync.local_run(f"{url}/try")
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize("name", ["..", "../x", "try/checkpoints/../../x"])
def test_a_urls_run_is_named_without_dots(stored, name):
    with pytest.raises(InputError, match="names no run"):
        remote_sync.local_run(f"{stored[0]}/{name}")


# --------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_names_regular_files_of_its_checkpoint(tmp_path, kind):
    outside = tmp_path / "private" / "secret.png"
    outside.parent.mkdir()
    outside.write_bytes(b"")
    folder = checkpoint.save(tmp_path / "c", 1, {"w": torch.zeros(1)}, {}, {}, fake_config(tmp_path), 1)
    name = traps(folder, outside)[kind]
    file = folder / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="corrupt: MANIFEST.json .*copy the checkpoint again"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "identity.json", "tensors.safetensors"])
def test_a_checkpoints_own_files_are_regular(tmp_path, name):
    folder = checkpoint.save(tmp_path / "c", 1, {"w": torch.zeros(1)}, {}, {}, fake_config(tmp_path), 1)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for way in (checkpoint.load, lambda f: checkpoint.latest(f.parent)):
        with pytest.raises(CheckpointError, match="FIFO"):
            way(folder)


# --------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_embeds_takes_of_its_run_only(tmp_path, kind):
    run = make_run(tmp_path, steps=3, frames=1)
    for unused in ("metrics.jsonl", "evals.jsonl"):  # their plots take most of a report's time
        (run / unused).unlink()
    folder = sorted((run / "eval").iterdir())[0]
    outside = picture(tmp_path / "private" / "secret.png", 123)
    name = traps(folder, outside)[kind]
    rows = pq.read_table(folder / "takes.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "path": name} for row in rows]), folder / "takes.parquet")
    text = build_report(run).read_text()
    assert base64.b64encode(outside.read_bytes()).decode()[:60] not in text
    assert "takes.parquet: path " in text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evals.jsonl", "summary.json", "eval"])
def test_a_report_reads_files_of_its_run_only(tmp_path, name):
    run = make_run(tmp_path, steps=3, frames=1)
    moved = tmp_path / "private"
    moved.mkdir()
    (run / name).rename(moved / name)
    (run / name).symlink_to(moved / name)
    if name == "eval":
        (run / "metrics.jsonl").unlink()  # its plots take most of the report's time
        assert "leads out of" in build_report(run).read_text()
        return
    with pytest.raises(InputError, match=f"{name}.*leads out of"):
        build_report(run)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(InputError, match="FIFO"):
        build_report(run)


# --------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def trained(tmp_path):
    run = make_run(tmp_path, steps=3, frames=1, name="mine")
    cfg = fake_config(tmp_path)
    checkpoint.save(run / "checkpoints", 1, {"weights/w": torch.zeros(1)}, {}, {}, cfg, 1)
    return run


def test_force_replaces_exports_only(trained, tmp_path, monkeypatch):
    other = make_run(tmp_path / "second", steps=3, frames=1, name="other")
    mine = tmp_path / "photos"
    picture(mine / "holiday.png")
    (tmp_path / "linked").symlink_to(mine)
    monkeypatch.chdir(mine)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    for out in (
        trained,
        trained.parent,
        trained / "checkpoints",
        trained / "checkpoints" / "step-000001",
        trained / "eval",
        other,
        other.parent,
        tmp_path / "model",
        tmp_path / "model" / "vae",
        mine,
        Path("."),
        Path(".."),
        tmp_path / "linked",
        tmp_path,
        Path.home(),
        Path("/"),
    ):
        with pytest.raises(ConfigError, match="^--out .*choose another|^--out .*is a link"):
            export(trained, out=out, force=True)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_the_command_says_it_in_one_line(trained, capsys):
    assert cli.main(["export", str(trained), "--out", str(trained), "--force"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--out" in error and (trained / "config.yaml").exists()
