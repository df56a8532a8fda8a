"""The commands of a cluster's user, without a cluster: what is checked before, what is asked, what is said."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import run
from fake_checkpoint import fake_config
from made_up_run import make_run
from ray._private.runtime_env import packaging
from ray.dashboard.modules.job.job_manager import JobManager

from jobs.cluster import client, run_api, runs
from jobs.cluster import submission as submitting
from jobs.cluster.client import RUN_KEY, find_address, refused, tail
from jobs.commands.scale import parse_targets
from pipeline.config.load import to_yaml
from pipeline.core import cluster_address
from pipeline.core.errors import CheckpointError, ConfigError, RunFailed
from pipeline.runs.lock import RunLock, writer_of
from pipeline.runs.paths import RunDir

NOWHERE = "http://127.0.0.1:1"  # nothing listens on port 1


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster_address, "CLUSTER_FILE", tmp_path / "none")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(fake_config(tmp_path)))
    return path


class Jobs:
    """Stands for Ray's Jobs API; `pieces` are what the log's connection delivers, an exception breaks it."""

    def __init__(self, jobs=(), pieces=(), status="SUCCEEDED", code=0, message=""):
        self.jobs, self.pieces, self.status, self.submitted = list(jobs), list(pieces), status, []
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message=message)

    def list_jobs(self):
        return self.jobs

    def submit_job(self, **job):
        self.submitted.append(job)
        return job["submission_id"]

    def get_job_status(self, job):
        return self.status if not self.pieces else "RUNNING"

    def get_job_info(self, job):
        return self.info

    async def tail_job_logs(self, job):
        for piece in self.pieces.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece


def job(name, status, number=1):
    return SimpleNamespace(metadata={RUN_KEY: name}, status=status, submission_id=f"{name}-{number}", start_time=number)


@pytest.fixture
def jobs(monkeypatch):
    found = Jobs(pieces=[["step 1/2\n", "step 2/2\n"]])
    monkeypatch.setattr(client, "reachable", lambda address: address)
    monkeypatch.setattr(client, "jobs_client", lambda address: found)
    return found


# ----------------------------------------------------------------------------------------------------- submit


def test_submit_uploads_follows_and_returns_the_exit_code(capsys, config, jobs):
    status, out, err = run(capsys, "submit", config.name, "run.name=try", "run.dir=/data/runs", "--address", NOWHERE)
    assert status == 0 and out.endswith("step 1/2\nstep 2/2\n"), err
    (sent,) = jobs.submitted
    assert sent["entrypoint"] == "python -m jobs.cli train mine.yaml run.dir=/data/runs ray.address=auto run.name=try"
    assert sent["metadata"] == {RUN_KEY: "try"} and sent["submission_id"].startswith("try-")
    assert {".git", ".venv", "runs"} <= set(sent["runtime_env"]["excludes"])
    assert int(sent["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_key_files_stay_here_and_are_named(capsys, config, jobs, tmp_path):
    """Wherever they lie, whatever their case, and through links; sources and public files go."""
    keys = [".env", "a/.env.local", "a/b/server.PEM", "a/id_rsa", ".netrc", ".aws/config", "gcp-service-account-1.json"]
    fine = ["a/environment.yaml", "secrets.py", "a/keys.md", "a/tokenizer.json", "a/link.txt"]
    for name in (*keys, *fine[:-1]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / fine[-1]).symlink_to("tokenizer.json")
    (tmp_path / "a" / "harmless").symlink_to("id_rsa")
    status, out, err = run(capsys, "submit", config.name, "run.name=try", "run.dir=/data/runs", "-a", NOWHERE)
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("not uploaded"))
    assert set(line.split(": ")[1].split(", ")) == {".aws", *keys, "a/harmless"} - {".aws/config"}
    ignored = packaging._get_excludes(tmp_path, jobs.submitted[0]["runtime_env"]["excludes"])
    assert all(ignored(tmp_path / name) for name in (*keys, "a/harmless"))
    assert not any(ignored(tmp_path / name) for name in (*fine, config.name))


def test_a_run_without_a_name_gets_one_before_it_starts(capsys, config, jobs):
    status, out, _ = run(capsys, "submit", config.name, "run.dir=/data/my runs", "-a", NOWHERE, "--no-wait")
    (sent,) = jobs.submitted
    assert status == 0 and "run.name=mine-20" in sent["entrypoint"] and "'run.dir=/data/my runs'" in sent["entrypoint"]
    assert "rushes stop mine-20" in out and "step" not in out


@pytest.mark.parametrize(
    "status, code, expected", [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("STOPPED", None, 130), ("FAILED", None, 1),
                               ("FAILED", -9, 9)],
)  # fmt: skip
def test_exit_codes(capsys, config, jobs, status, code, expected):
    jobs.status, jobs.info = status, SimpleNamespace(status=status, driver_exit_code=code, message="its node died")
    found, out, _ = run(capsys, "submit", config.name, "run.dir=/data/runs", "-a", NOWHERE)
    assert found == expected and ("its node died" in out) == (status == "FAILED" and code != 2)


def test_ctrl_c_leaves_the_log_and_not_the_run(capsys, config, jobs):
    jobs.pieces = [Interrupted()]
    status, out, _ = run(capsys, "submit", config.name, "run.name=try", "run.dir=/data/runs", "-a", NOWHERE)
    assert status == 130 and f"rushes logs try -f --address {NOWHERE}" in out and "rushes stop try" in out


class Interrupted(list):
    def __iter__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "run.dir: 'runs' is relative"),
        (["run.dir=/data/runs", "optimizer.lrr=1"], "lrr"),
        (["run.dir=/data/runs", "run.name=a/b"], "run.name"),
        (["run.dir=/data/runs", "--resume"], "run.name=NAME"),
        (["run.dir=/data/runs", "--resume-or-start"], "run.name=NAME"),
        (["run.dir=/data/runs", "run.name=b", "--resume", "--resume-or-start"], "give one of them"),
        (["run.dir=/data/runs", "--working-dir", "sub"], "lies outside"),
        (["run.dir=/data/runs", "run.name=taken"], "is already running"),
    ],
)
def test_submit_refuses_before_anything_is_uploaded(capsys, config, jobs, tmp_path, args, words):
    (tmp_path / "sub").mkdir()
    jobs.jobs = [job("taken", "RUNNING"), job("done", "SUCCEEDED")]
    base = [] if "run.dir=/data/runs" in args else ["run.dir=runs"]
    status, _, err = run(capsys, "submit", config.name, *base, *args, "-a", NOWHERE)
    assert status == 2 and words in err and err.count("\n") == 1 and not jobs.submitted
    assert run(capsys, "submit", config.name, "run.dir=/data/runs", "run.name=done", "-a", NOWHERE)[0] == 0


def test_a_large_folder_is_refused_with_its_largest_parts(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "big.safetensors").write_bytes(bytes(3000))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big").write_bytes(bytes(90_000))
    submitting.check_size(tmp_path, list(submitting.EXCLUDES), limit=4000)
    with pytest.raises(ConfigError, match="models 0 MiB.*--exclude"):
        submitting.check_size(tmp_path, list(submitting.EXCLUDES), limit=2000)
    submitting.check_size(tmp_path, [*submitting.EXCLUDES, "*.safetensors"], limit=2000)


def test_the_cluster_decides_which_ray_is_joined(tmp_path, config):
    cfg = fake_config(tmp_path, ray={"address": "local"})
    assert "ray.address=auto" in submitting.entrypoint(cfg, config, [], "a", "")


@pytest.mark.parametrize("option", ["--resume", "--resume-or-start"])
def test_a_run_goes_on_in_the_way_that_was_asked_for(capsys, config, jobs, option):
    """The option reaches `rushes train` on the cluster, whose own command line takes it."""
    jobs.jobs = [job("try", "FAILED")]
    status, _, err = run(capsys, "submit", config.name, "run.name=try", "run.dir=/data/runs", option, "-a", NOWHERE)
    (sent,) = jobs.submitted
    assert status == 0 and sent["entrypoint"].endswith(f"run.name=try {option}"), err
    words = ["train", str(config), *sent["entrypoint"].split()[5:], "--dry-run"]
    assert "ray.address=auto" in words
    status, _, err = run(capsys, *words)  # the run itself is on the cluster, not here
    if option == "--resume":
        assert (
            status == 2
            and err == "error: --resume: there is no run 'try' in /data/runs; leave --resume out to start it\n"
        )
    else:
        assert status == 0, err


# ----------------------------------------------------------------------------------------------------- cluster


def test_without_a_cluster_every_command_says_so_in_one_line(capsys, config):
    for args in (["status"], ["status", "x"], ["watch", "x"], ["logs", "x"], ["stop", "x"], ["scale", "x", "rollout=2"],
                 ["list"], ["submit", config.name, "run.dir=/data/runs"]):  # fmt: skip
        status, _, err = run(capsys, *args)
        assert status == 2 and "no Ray cluster was found" in err and err.count("\n") == 1, args
        status, _, err = run(capsys, *args, "--address", NOWHERE)
        assert status == 2 and f"no Ray cluster answers at {NOWHERE}" in err and err.count("\n") == 1, args


def test_addresses(monkeypatch, tmp_path):
    assert find_address(None) is None and find_address("http://h:8265/") == "http://h:8265"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert find_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "h:6379")
    assert find_address(None) == "h:6379" and find_address("http://g:1") == "http://g:1"
    with pytest.raises(ConfigError, match="nonsense"):
        client.reachable("http://nonsense:port")


def test_a_refused_token_is_named():
    error = type("AuthenticationError", (Exception,), {})("Invalid token\nlong advice")
    assert "RAY_AUTH_TOKEN" in str(refused(NOWHERE, error)) and "\n" not in str(refused(NOWHERE, error))


def test_a_log_is_taken_up_where_its_connection_broke(monkeypatch):
    monkeypatch.setattr(client, "POLL_S", 0.0)
    lost = RuntimeError("closed unexpectedly")
    broken = Jobs(pieces=[["one\n", "two", lost], ["one\ntwo\nth", lost], ["one\ntwo\nthree\n"]])
    assert "".join(tail(broken, "id")) == "one\ntwo\nthree\n"
    with pytest.raises(RunFailed, match="closed unexpectedly"):
        list(tail(Jobs(pieces=[[lost]] * 9), "id"))


def test_answers_of_the_cluster_come_back_as_they_were():
    assert client._value({"value": [1]}) == [1]
    with pytest.raises(CheckpointError, match="the disk"):
        client._value({"error": "the disk", "kind": "CheckpointError"})
    with pytest.raises(RunFailed):
        client._value({"error": "?", "kind": "Unheard"})


def test_the_job_of_a_call_is_removed_only_when_rays_monitor_has_seen_its_end(monkeypatch):
    """Deleted sooner, Ray lists it anew as failed. What earlier calls left is removed too, and nothing else."""
    monkeypatch.setattr(client, "POLL_S", 0.0)
    events: list = []
    statuses = iter(["RUNNING", "RUNNING", "SUCCEEDED"])
    now = time.time() * 1000
    call_id = "rushes-overview-0123456789ab"

    def listed(name, status, ended_s_ago):
        return SimpleNamespace(submission_id=name, status=status, end_time=now - 1000 * ended_s_ago)

    jobs = SimpleNamespace(
        stop_job=lambda job: events.append(("stop", job)),
        get_job_status=lambda job: events.append("status") or next(statuses),
        delete_job=lambda job: events.append(("delete", job)),
        list_jobs=lambda: [
            listed("rushes-watch-aaaaaaaaaaaa", "FAILED", 99),
            listed("rushes-watch-bbbbbbbbbbbb", "STOPPED", 3),
            listed("rushes-watch-cccccccccccc", "RUNNING", 0),
            listed("rushes-20261127-200000", "FAILED", 99),
            listed(None, "SUCCEEDED", 99),
        ],
    )
    monkeypatch.setattr(client.time, "sleep", lambda seconds: events.append(seconds) if seconds else None)
    client._remove_job(jobs, call_id, stop=True)
    assert events[0] == ("stop", call_id) and events.count("status") == 3
    assert events[-3:] == [client.SETTLE_S, ("delete", call_id), ("delete", "rushes-watch-aaaaaaaaaaaa")]
    assert client.SETTLE_S > 2 * JobManager.JOB_MONITOR_LOOP_PERIOD_S


def test_a_cluster_file_of_another_user_is_not_believed(monkeypatch, tmp_path):
    file = tmp_path / "ray_current_cluster"
    file.write_text("127.0.0.1:1")
    monkeypatch.setattr(cluster_address, "CLUSTER_FILE", file)
    monkeypatch.setattr(cluster_address, "is_listening", lambda address: True)
    assert find_address(None) == "127.0.0.1:1"
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    if mine:
        assert find_address(None) is None


def test_an_unknown_run_is_answered_with_the_known_ones():
    error = run_api.unknown_run("quik", ["quick", "other"])
    assert "quick, other" in str(error) and "did you mean quick?" in str(error)


def test_scale_targets():
    assert parse_targets(["rollout=8", "reward.clip=2"]) == {"rollout": 8, "reward.clip": 2}
    for wrong in ("rollout", "rollout=-1", "learner=2", "rollout=x", "clip=2"):
        with pytest.raises(ConfigError, match="rollout=N or reward.NAME=N"):
            parse_targets([wrong])


class Live:
    """A cluster whose runs are made up."""

    address = NOWHERE

    def __init__(self, **snapshots):
        self.snapshots, self.calls, self.ended = snapshots, [], []
        self.jobs = None

    def running(self):
        return sorted(self.snapshots)

    def jobs_of(self, run=None):
        return [found for found in self.ended if run in (None, found.metadata[RUN_KEY])]

    def call(self, operation, run=None, **arguments):
        self.calls.append((operation, run, arguments))
        if operation == "overview":
            return [{"run": name, "state": "training", "step": 3, "steps": 9, "reward": 0.5} for name in self.running()]
        return self.snapshots[run] if operation == "snapshot" else None

    def follow(self, operation, run):
        return iter([self.snapshots[run]] if operation == "watch" else ["a line\n"])


@pytest.fixture
def live_cluster(monkeypatch):
    record = {"step": 3, "reward/mean": 0.5, "takes_per_s": 2.0, "staleness/max": 1.0, "ratio/mean": 1.0, "kl": 1e-3}
    record |= {f"time/{name}": 1.0 for name in ("step", "rollout", "score", "learn", "sync")}
    snapshot = {"state": "training", "step": 3, "steps": 9, "records": [record], "evals": [],
                "activities": {"rollout-0": "train group 7"}, "queues": {"rollout": 2}}  # fmt: skip
    found = Live(try1=snapshot)
    monkeypatch.setattr(client, "open_cluster", lambda address: found)
    return found


def test_status_and_list_of_a_cluster(capsys, live_cluster):
    status, out, _ = run(capsys, "status", "-a", NOWHERE)
    assert status == 0 and out == "try1  training  step 3 of 9  reward 0.5000\n"
    status, out, _ = run(capsys, "status", "try1", "-a", NOWHERE)
    assert status == 0 and "step 3 of 9" in out and "staleness 1" in out and "KL 1.00e-03" in out
    assert "queues rollout 2" in out and "rollout-0            train group 7" in out
    assert json.loads(run(capsys, "status", "try1", "--json", "-a", NOWHERE)[1])["step"] == 3
    live_cluster.ended = [job("old", SimpleNamespace(value="FAILED"))]
    live_cluster.ended[0].status = type("Status", (str,), {"value": "FAILED"})("FAILED")
    status, out, _ = run(capsys, "list", "-a", NOWHERE)
    assert status == 0 and "failed" in out and "try1" in out and "3/9" in out
    status, _, err = run(capsys, "status", "old", "-a", NOWHERE)
    assert status == 2 and "has ended (FAILED" in err
    status, _, err = run(capsys, "watch", "try", "-a", NOWHERE)
    assert status == 2 and "did you mean try1?" in err
    assert run(capsys, "watch", "try1", "-a", NOWHERE)[1].endswith("run try1 has ended\n")


def test_stop_asks_the_controller(capsys, live_cluster, monkeypatch):
    assert run(capsys, "stop", "try1", "--no-wait", "-a", NOWHERE)[0] == 0
    assert run(capsys, "stop", "try1", "--now", "--no-wait", "-a", NOWHERE)[0] == 0
    assert [call[0] for call in live_cluster.calls] == ["stop", "kill"]
    monkeypatch.setattr(client, "reachable", lambda address: address)
    assert run(capsys, "scale", "try1", "rollout=4", "-a", NOWHERE)[1] == "rollout: 4\n"
    assert live_cluster.calls[-1] == ("scale", "try1", {"targets": {"rollout": 4}})


def test_a_run_that_has_no_controller_yet(capsys, live_cluster, monkeypatch):
    """Between `rushes submit` and the controller's start: it is not called ended, is waited for, and can be stopped."""
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    live_cluster.ended = [job("new", "PENDING")]
    status, out, _ = run(capsys, "status", "new", "-a", NOWHERE)
    assert status == 0 and "run 'new' is starting or ending (job new-1 is PENDING)" in out and "logs new -f" in out
    assert json.loads(run(capsys, "status", "new", "--json", "-a", NOWHERE)[1])["job"] == "new-1"
    monkeypatch.setattr(client, "reachable", lambda address: address)
    status, _, err = run(capsys, "scale", "new", "rollout=2", "-a", NOWHERE)
    assert status == 2 and "its controller cannot answer" in err and err.count("\n") == 1
    stopped = []
    statuses = iter(["RUNNING", "STOPPED"])
    live_cluster.jobs = SimpleNamespace(stop_job=stopped.append, get_job_status=lambda job: next(statuses))
    assert run(capsys, "stop", "new", "-a", NOWHERE)[:2] == (0, "run new has ended\n") and stopped == ["new-1"]
    names = iter([["try1"], ["try1"], ["new", "try1"]])
    live_cluster.running = lambda: next(names)
    live_cluster.snapshots["new"] = live_cluster.snapshots["try1"]
    status, out, _ = run(capsys, "watch", "new", "-a", NOWHERE)
    assert status == 0 and out.count("is starting or ending") == 1 and out.endswith("run new has ended\n")


# ------------------------------------------------------------------------------------------------ this machine


HOLD = """
import signal, sys, time
from pathlib import Path
from pipeline.runs.lock import RunLock
from pipeline.runs.paths import RunDir
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with RunLock(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    while not asked:
        time.sleep(0.02)
"""


def test_a_run_of_this_machine_is_seen_and_stopped_through_its_folder(capsys, tmp_path):
    folder = make_run(tmp_path, steps=4, finished=False, name="here")
    (folder / "run.log").write_text("a line\n")
    status, out, _ = run(capsys, "status", "here")
    assert status == 0 and "here  stopped" in out and "reward" in out
    assert run(capsys, "logs", "here")[1] == "a line\n"
    assert "here" in run(capsys, "list")[1]
    status, _, err = run(capsys, "stop", "here")
    assert status == 2 and "not running" in err
    writer = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "held\n"
    assert f"process {writer.pid} on {os.uname().nodename}" == writer_of(RunDir(folder))
    assert f"running (process {writer.pid}" in run(capsys, "status", str(folder))[1]
    assert run(capsys, "stop", "here")[0] == 0 and writer.wait(10) == 0
    with RunLock(RunDir(folder)):  # looking at it has not kept it
        pass
    assert writer_of(RunDir(folder)) is None


def test_the_report_of_a_running_run(capsys, tmp_path):
    folder = make_run(tmp_path, steps=3, finished=False)
    with RunLock(RunDir(folder)), open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/me')  # a line being written
        file.flush()
        status, out, err = run(capsys, "report", folder)
    assert status == 0 and "running (or stopped): 3" in (folder / "report.html").read_text(), err


def test_an_unknown_run_lists_those_of_the_folder(capsys, tmp_path):
    make_run(tmp_path, steps=1, name="one")
    status, _, err = run(capsys, "status", "two")
    assert status == 2 and "there: one" in err and err.count("\n") == 1
