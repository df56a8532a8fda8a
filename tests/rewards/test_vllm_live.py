"""vLLM's real engine in a real reward server, on a small random Qwen2.5-VL. Needs .venv-vllm: `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import ray
import tiny
from http_server import items
from PIL import Image
from score_work import score_work
from tiny_judge import tiny_judge

from actors.ray_options import RunContext, merged_env, to_bytes
from actors.reward_server import RewardServer
from jobs.cluster.ray_session import RaySession
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import Media
from pipeline.rewards.models.rubric import load_rubric

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-vllm; `make test-vllm` makes it and runs this"),
]
TEXTS = ("a red cat", "a dog", "猫")
FRAMES = 4


def in_its_environment(args: list[str], text: str | None = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(PYTHON), *args], input=text, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A reward server as a pool starts it, in vLLM's environment."""
    args = {
        "model": str(model),
        "rubric": "shows_prompt",
        "frames": FRAMES,
        "engine": {"dtype": "float32", "block_size": 32, "max_model_len": 1024},
    }
    env = {"py_executable": ".venv-vllm/bin/python"}
    cfg = tiny.config(
        Path("unused"), ray={"address": "local", "init": {"num_cpus": 2, "object_store_memory": 200 * 2**20}}
    )
    cfg = cfg.model_copy(update={"rewards": {"judge": RewardConfig(scorer="vlm_judge", args=args, runtime_env=env)}})
    with RaySession(cfg):
        ctx = RunContext(cfg=cfg, run_path=str(tmp_path_factory.mktemp("run")), cwd=os.getcwd())
        env = merged_env(cfg.rewards["judge"].runtime_env, threads=1)
        actor = ray.remote(RewardServer).options(num_cpus=1, runtime_env=env).remote(ctx, "reward.judge-0")
        info = ray.get(actor.start.remote("judge", items("a red circle")), timeout=300)
        assert info["pid"] != os.getpid()
        yield actor


def clips(count=3):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, FRAMES, 56, 84, 3)).astype(np.uint8)
    frames[1] //= 4
    frames[2, :, :20] = 255
    return Media(frames=frames, fps=8.0)


def ask(server, *groups):
    works = [score_work(i, prompts) for i, (_, prompts) in enumerate(groups)]
    return ray.get(server.score.remote(to_bytes(works), *(media for media, _ in groups)), timeout=300)


def job(media, file, frames=slice(None), system=None, texts=TEXTS):
    rubric = load_rubric("shows_prompt")
    np.save(file, media.frames[:, frames])
    questions = [rubric.fill(prompt, FRAMES, media.fps) for prompt in items(*texts)]
    return {"frames": str(file), "questions": questions, "system": system or rubric.system}


def test_the_server_gives_transformers_probabilities_and_computes_the_rubric_once(server, model, tmp_path):
    media = clips()
    (result,) = ask(server, (media, items(*TEXTS)))
    jobs = {
        "right": {},
        "frames in another order": {"frames": slice(None, None, -1)},
        "the first frame only": {"frames": slice(0, 1)},
        "another rubric": {"system": "You are strict."},
        "another take's prompt": {"texts": TEXTS[1:] + TEXTS[:1]},
    }
    asked = {"model": str(model), "jobs": [job(media, tmp_path / f"{i}.npy", **o) for i, o in enumerate(jobs.values())]}
    done = in_its_environment(["tests/support/judge_reference.py"], json.dumps(asked))
    assert done.returncode == 0, done.stderr
    expected, *wrong = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(result.values, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-2
    for name, values in zip(list(jobs)[1:], wrong, strict=True):
        assert np.abs(values - expected).max() > 1e-3, name
    assert (result.parts["cached"] > 0.4).all()  # the rubric, from the grey take of the start

    (again,) = ask(server, (media, items(*TEXTS)))
    assert (again.parts["cached"] > 0.8).all()  # the clips as well
    np.testing.assert_allclose(again.values, result.values, atol=1e-5)
    info = ray.get(server.info.remote())
    print(f"peak memory of the server: {info['peak_rss'] / 2**30:.2f} GiB")


def test_groups_share_a_call_and_what_the_engine_refuses_fails_alone(server):
    media = clips()
    alone = ask(server, (media, items(*TEXTS)))[0].values
    too_long = items("a cat " * 300)  # beyond max_model_len
    steers = items("a <|image_pad|> cat")
    good, long, steered, other = ask(
        server,
        (Media(frames=media.frames[:1], fps=8.0), items(TEXTS[0])),
        (Media(frames=media.frames[1:2], fps=8.0), too_long),
        (Media(frames=media.frames[1:2], fps=8.0), steers),
        (Media(frames=media.frames[2:], fps=8.0), items(TEXTS[2])),
    )
    np.testing.assert_allclose([good.values[0], other.values[0]], alone[[0, 2]], atol=1e-5)
    assert isinstance(long, RewardError) and "1024" in str(long)
    assert isinstance(steered, RewardError) and "holds <|image_pad|>" in str(steered)
    assert ask(server, (media, items(*TEXTS)))[0].values == pytest.approx(alone, abs=1e-5)  # nothing was left behind


def test_rushes_score_in_that_environment_and_unreadable_answers_are_errors(model, tmp_path):
    """A random model says nothing that a Likert rubric can read: no score, and the exit status says so."""
    for i in range(2):
        Image.fromarray(clips().frames[i, 0]).save(tmp_path / f"{i}.png")
    options = [f"model={model}", "attempts=2", "engine={dtype: float32, max_model_len: 1024}"]
    args = [
        "-m",
        "jobs.cli",
        "score",
        str(tmp_path),
        "-r",
        "vlm_judge",
        "-p",
        "a cat",
        "-o",
        str(tmp_path / "s.parquet"),
    ]
    done = in_its_environment([*args, *(a for o in options for a in ("--set", f"vlm_judge.args.{o}"))])
    assert done.returncode == 1 and "2 of 2 scores failed" in done.stderr + done.stdout, done.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert all(row["score"] is None and "gave no readable answer in 2 tries" in row["error"] for row in rows)
