"""`rushes serve-reward` as a process of its own, asked by the `http` scorer and by plain HTTP."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from http_server import items
from PIL import Image

from jobs import cli
from jobs.common import score_request
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError, RewardError, RewardUnavailable
from pipeline.core.types import Media
from pipeline.rewards.models.protocol import ScoreAnswer, ScoreRequest, decode_item, encode_frames, parse_request
from pipeline.rewards.models.web import png_base64
from pipeline.rewards.runner import build_reward

TOKEN = "s3cret-token"
OWN = """
import time
import numpy as np

def level(frames, prompts, metadata):
    assert all("rewards" not in row for row in metadata)
    time.sleep(0.3 if "slow" in prompts else 0)
    levels = frames.reshape(len(prompts), -1).mean(1)
    if (levels == 13).any():
        raise ValueError("thirteen")
    return {"score": levels, "frames": np.full(len(prompts), frames.shape[1]), "odd": np.where(levels > 99, np.nan, 1)}

level.batched, level.reads = True, "video"
"""


class Served:
    """The command, running; ends with it."""

    def __init__(self, *args):
        environment = os.environ | {"REWARD_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "jobs.cli", "serve-reward", *map(str, args), "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.line)
        assert found, self.line + self.process.stdout.read()
        self.url = found.group()

    def ask(self, path="/score", body=None, token=TOKEN, kind="application/json"):
        """(status, answer)"""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        output = self.process.communicate(timeout=30)[0]
        return self.process.returncode, output


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "own.py"
    own.write_text(OWN)
    server = Served(
        f"{own}:level",
        "--token-env",
        "REWARD_TOKEN",
        "--max-mb",
        "1",
        "--memory-gb",
        "0.1",
        "--set",
        f"{own}:level.batch_items=64",
    )
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def noise(takes, frames=1, size=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (takes, frames, size, size, 3), dtype=np.uint8)
    return Media(frames=pixels, fps=8.0)


def request(*levels, **extra):
    return {"version": 1, "items": [{"prompt": "a", "frames": [frame(level)], **extra} for level in levels]}


def frame(level, size=4):
    return png_base64(np.full((size, size, 3), level, np.uint8))


def test_the_http_scorer_gets_exactly_what_the_scorer_says_itself():
    server = Served("jpeg_compressibility", "--set", "jpeg_compressibility.args.quality=80")
    try:
        direct = build_reward("direct", RewardConfig(scorer="jpeg_compressibility", args={"quality": 80}))
        for media, encoding in ((noise(3), "png"), (noise(2, frames=6), "png"), (noise(2, frames=6), "safetensors")):
            remote = build_reward(
                "remote", RewardConfig(scorer="http", args={"url": server.url + "/score", "encoding": encoding})
            )
            prompts = items(*["a cat"] * len(media.frames))
            got, expected = (r.run(media, prompts, 5) for r in (remote, direct))
            np.testing.assert_array_equal(got.values, expected.values)
            if media.frames.shape[1] > 1:
                np.testing.assert_array_equal(got.segment_values, expected.segment_values)
    finally:
        status, output = server.end()
    assert status == 0 and "finishing" in output and "Traceback" not in output


def test_clips_metadata_and_parts(served, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    for encoding in ("png", "mp4", "safetensors"):
        args = {"url": served.url + "/score", "reads": "video", "encoding": encoding, "api_key_env": "REWARD_TOKEN"}
        remote = build_reward("remote", RewardConfig(scorer="http", args=args))
        clip = Media(frames=np.full((2, 5, 32, 32, 3), [[[[[60]]]], [[[[160]]]]], np.uint8), fps=8.0)
        prompts = items("a", "b", metadata={"rewards": ["remote"], "n": 1})
        result = remote.run(clip, prompts, None)
        np.testing.assert_allclose(result.values, [60, 160], atol=3)
        assert result.parts["frames"].tolist() == [5, 5]
        np.testing.assert_array_equal(result.parts["odd"], [1, np.nan])


def test_a_wrong_token_opens_nothing_but_health(served, monkeypatch):
    for token in (None, "wrong", TOKEN + "x"):
        status, answer = served.ask(body=request(1), token=token)
        assert status == 401 and "Bearer" in answer["error"]
    assert served.ask("/schema", token=None)[0] == 401
    status, health = served.ask("/health", token=None)
    assert status == 200 and health["status"] == "ok" and health["reads"] == "video"
    monkeypatch.setenv("REWARD_TOKEN", "wrong")
    args = {"url": served.url + "/score", "api_key_env": "REWARD_TOKEN"}
    with pytest.raises(RewardUnavailable, match="401 .*wrong or missing token"):
        build_reward("r", RewardConfig(scorer="http", args=args)).run(noise(1), items("a"), None)


def test_what_is_too_large_is_refused(served, monkeypatch):
    status, answer = served.ask(body=b"x" * (2**20 + 1))
    assert status == 413 and "larger than 1 MB (--max-mb)" in answer["error"]
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    args = {"url": served.url + "/score", "api_key_env": "REWARD_TOKEN"}
    with pytest.raises(RewardError, match="413 .*--max-mb"):
        build_reward("r", RewardConfig(scorer="http", args=args)).run(noise(4, size=400), items(*"abcd"), None)


@pytest.mark.parametrize(
    "body, message",
    [
        (b"no", "the body: Invalid JSON"),
        ({"items": []}, "version: Field required (and 1 more)"),
        ({**request(1), "version": 2}, "version: Input should be 1"),
        ({**request(1), "model": "x"}, "model: Extra inputs are not permitted"),
        (request(1, 2, video="AAAA"), "items.0: found frames and video; give one"),
        (request(1, prompt=3), "items.0.prompt: Input should be a valid string"),
        (request(1, fps=-1.0), "items.0.fps: Input should be greater than 0"),
        (request(1, frames=["%%"]), "items.0: not base64"),
        (request(1, frames=["AAAA"]), "items.0: a frame is no readable PNG"),
        (request(1, frames=[frame(1), frame(1, 5)]), "items.0: its frames have 2 different sizes"),
        (request(1, frames=None, video="AAAA"), "items.0: video: is not a"),
        (request(1, frames=None, tensor="AAAA"), "items.0: tensor: not a safetensors file"),
        (request(10, 13, 20), "take 1: "),
    ],
)  # fmt: skip
def test_bad_requests_get_one_clear_line(served, body, message):
    status, answer = served.ask(body=body)
    assert status == 422 and message in answer["error"] and "\n" not in answer["error"]
    assert served.ask(body=request(7))[1]["scores"] == [7]  # and the server goes on


def test_other_paths_methods_and_content_types(served):
    assert served.ask("/")[0] == 404 and served.ask("/score")[0] == 405
    assert "POST /score" in served.ask("/nowhere")[1]["error"]
    assert served.ask(body=request(1), kind="text/plain")[0] == 415
    assert served.ask("/schema")[1]["request"]["properties"].keys() == {"version", "items"}


def test_requests_at_the_same_time_are_joined_and_poison_fails_its_own_only(served):
    """The first keeps the scorer busy; the others wait, and are scored in one call that one of them spoils."""
    answers = {}

    def ask(name, body):
        answers[name] = served.ask(body=body)

    threads = [threading.Thread(target=ask, args=("slow", request(1, prompt="slow")))]
    threads += [threading.Thread(target=ask, args=(n, request(n, n + 1))) for n in (10, 12, 20, 30)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert answers.pop(12)[0] == 422
    assert {n: a[1]["scores"] for n, a in answers.items()} == {"slow": [1], 10: [10, 11], 20: [20, 21], 30: [30, 31]}


def test_a_request_in_hand_is_finished_before_the_end(served):
    """Last of those that use this server."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.ask(body=request(5, prompt="slow"))))
    thread.start()
    time.sleep(0.15)
    status, output = served.end(signal.SIGINT)
    thread.join()
    assert status == 0 and "Traceback" not in output and TOKEN not in output
    assert answers == [(200, {"scores": [5.0], "parts": {"frames": [1.0], "odd": [1.0]}})]


def test_wrong_options_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    for args, message in (
        (["jpeg"], "unknown scorer 'jpeg'"),
        (["jpeg_compressibility", "--token-env", "NO_SUCH_TOKEN"], "NO_SUCH_TOKEN is not set"),
        (["jpeg_compressibility", "--host", "203.0.113.1"], "cannot be listened on"),
    ):
        assert cli.main(["serve-reward", *args]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_pictures_survive_the_lossless_forms():
    frames = noise(1, frames=3, size=16).frames[0]
    for encoding in ("png", "safetensors"):
        body = {"version": 1, "items": [{"prompt": "", "fps": 8.0, **encode_frames(frames, 8.0, encoding)}]}
        item = parse_request(json.dumps(body).encode()).items[0]
        media = decode_item(item, 0)
        assert media.fps == 8.0
        np.testing.assert_array_equal(media.frames[0], frames)
    ScoreRequest.model_validate(body)
    ScoreAnswer(scores=[1.0], parts={"x": [None]})


def test_the_limit_on_decoded_pixels_is_for_the_whole_request(monkeypatch, tmp_path):
    asked = parse_request(json.dumps(request(1, 2, 3)).encode())
    assert len(score_request.decode_takes(asked, tmp_path)[0]) == 1
    assert score_request.decoding_size(asked) == (2 * 3 + 3) * 4 * 4 * 3
    monkeypatch.setattr(score_request, "MAX_PIXEL_BYTES", 2 * 4 * 4 * 3)
    with pytest.raises(InputError, match=r"items: .* decoded"):
        score_request.decode_takes(asked, tmp_path)
    with pytest.raises(InputError, match=r"items: .* decoded"):
        score_request.decoding_size(asked)


def test_the_prompts_own_picture_travels_with_the_take(tmp_path):
    """As an edit's source or a control picture, which the server has no file of."""
    media = noise(2)
    Image.fromarray(media.frames[1, 0]).save(tmp_path / "control.png")
    prompts = items("a", "b", image=str(tmp_path / "control.png"))
    direct = build_reward("direct", RewardConfig(scorer="condition", args={"kind": "edges"}))
    expected = direct.run(media, prompts, None).values
    server = Served("condition", "--set", "condition.args.kind=edges")
    try:
        remote = build_reward("remote", RewardConfig(scorer="http", args={"url": server.url + "/score"}))
        np.testing.assert_array_equal(remote.run(media, prompts, None).values, expected)
        assert expected[1] != expected[0]
        status, answer = server.ask(body=request(1, image="no picture"))
        assert status == 422 and answer["error"].startswith("items.0: image: not base64")
    finally:
        assert server.end()[0] == 0


def test_a_small_file_that_holds_a_huge_picture_is_refused_unopened():
    data = bytearray(base64.b64decode(frame(1)))
    data[16:24] = (30_000).to_bytes(4, "big") * 2  # the header's width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    text = base64.b64encode(data).decode()
    item = ScoreRequest.model_validate({"version": 1, "items": [{"prompt": "", "frames": [text]}]}).items[0]
    with pytest.raises(InputError, match=r"items\.7: .*exceeds limit"):
        decode_item(item, 7)
