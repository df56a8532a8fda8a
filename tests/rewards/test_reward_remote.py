"""Remote scorers against real HTTP servers on 127.0.0.1, well-behaved and not."""

import base64
import io
import math
import socket
import threading
import time

import numpy as np
import pytest
from http_server import items, levels, picture, run

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardAway, RewardError, RewardUnavailable
from pipeline.core.types import PromptItem
from pipeline.rewards import patience
from pipeline.rewards.runner import build_reward


def brightness(path, payload, number):
    scores = [float(np.mean([picture(f) for f in item["frames"]])) for item in payload["items"]]
    return 200, {"scores": scores, "parts": {"words": [len(i["prompt"].split()) or None for i in payload["items"]]}}


# ------------------------------------------------------------------------------------- remote scorers


def test_http_scorer_sends_lossless_frames_in_batches_and_reads_scores_and_parts(serve, monkeypatch):
    server = serve(brightness)
    monkeypatch.setenv("SOME_KEY", "s3cret")
    prompts = [PromptItem(index=i, text=t, metadata={"n": i}) for i, t in enumerate(["a cat", "猫", ""])]
    result = run("http", levels(10, 20, 31), prompts, url=server.url + "/score", batch=2, api_key_env="SOME_KEY")
    np.testing.assert_allclose(result.values, [10, 20, 31])
    np.testing.assert_allclose(result.parts["words"], [2, 1, np.nan])
    assert [len(p["items"]) for p in server.seen] == [2, 1]
    first = server.seen[0]["items"][0]
    assert first["prompt"] == "a cat" and first["metadata"] == {"n": 0} and first["fps"] == 8.0
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def test_http_scorer_on_clips_by_segments_whole_or_as_mp4(serve):
    def whole(path, payload, number):
        return 200, {"scores": [len(item["frames"]) for item in payload["items"]]}

    def mp4(path, payload, number):
        import av

        sizes = []
        for item in payload["items"]:
            with av.open(io.BytesIO(base64.b64decode(item["video"]))) as file:
                sizes.append(sum(1 for _ in file.decode(video=0)))
        return 200, {"scores": sizes}

    clip = levels(50, 60, frames=8)
    by_segment = run("http", clip, items("a", "b"), seed=1, url=serve(brightness).url)
    np.testing.assert_allclose(by_segment.segment_values, [[50] * 4, [60] * 4])
    assert run("http", clip, items("a", "b"), url=serve(whole).url, reads="video").values.tolist() == [8, 8]
    result = run("http", clip, items("a", "b"), url=serve(mp4).url, reads="video", encoding="mp4")
    assert result.values.tolist() == [8, 8]


BAD = [
    ((200, b"not json"), "not JSON"),
    ((200, b'{"scores": [NaN]}'), "not a finite number"),
    ((200, {"scores": [None]}), "not a finite number"),
    ((200, {"scores": ["0.5"]}), "not a finite number"),
    ((200, {"scores": [True]}), "not a finite number"),
    ((200, {"scores": [1e999]}), "not a finite number"),
    ((200, {"scores": [1, 2]}), "2 values for 1 items"),
    ((200, {"scores": 1}), "int for 1 items"),
    ((200, {"score": [1]}), "no 'scores'"),
    ((200, [1]), "no 'scores'"),
    ((200, {"scores": [1], "parts": {"x": [1, 2]}}), r"parts\.x holds 2 values"),
    ((200, {"scores": [1], "parts": [1]}), "'parts' must be an object"),
    ((500, b"out of memory"), r"500 .*out of memory \(2 tries\)"),
    ((503, b""), r"503"),
    ((404, b"no such page"), "404 .*no such page"),
    ((302, b""), "302"),
    ((200, b""), "not JSON"),
]


@pytest.mark.parametrize("answer, message", BAD)
def test_bad_answers_are_reward_errors_and_never_scores(serve, answer, message):
    server = serve(lambda *_: answer)
    with pytest.raises(RewardError, match=f"reward r: .*{message}"):
        run("http", levels(1), items("a"), url=server.url, retries=1)
    repeated = answer[0] in (500, 503) or "JSON" in message
    assert len(server.seen) == (2 if repeated else 1)  # what another try cannot mend is not tried again


def test_a_passing_failure_is_mended_by_another_try(serve):
    server = serve(lambda *a: brightness(*a) if a[2] == 3 else (503, b"busy"))
    assert run("http", levels(40), items("a"), url=server.url, retries=2).values.tolist() == [40]


def test_slow_silent_and_absent_servers_time_out(serve):
    start = time.monotonic()
    slow = serve(lambda *_: time.sleep(3) or (200, {"scores": [1]}))
    with pytest.raises(RewardError, match=r"no answer within 0\.2 s"):
        run("http", levels(1), items("a"), url=slow.url, timeout_s=0.2, retries=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="cannot be reached"):
        run("http", levels(1), items("a"), url=f"http://127.0.0.1:{port}", retries=1)
    assert time.monotonic() - start < 2.5


def test_a_dripping_server_does_not_take_for_ever():
    """Every byte arrives within the socket's time-out; the answer never ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    threading.Thread(target=drip, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within 0\.4 s"):
        run(
            "http", levels(1), items("a"), url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.4, retries=0
        )
    stop.set()
    listener.close()
    assert time.monotonic() - start < 2


def test_metadata_that_is_no_json_is_a_reward_error(serve):
    with pytest.raises(RewardError, match="cannot be sent as JSON"):
        run("http", levels(1), items("a", metadata={"x": math.nan}), url=serve(brightness).url)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"url": "file:///etc/passwd"}, "expected http"),
        ({"url": "127.0.0.1:80"}, "expected http"),
        ({"url": "http://h", "api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"url": "http://h", "encoding": "mp4"}, "reads: video"),
        ({"url": "http://h", "timeout_s": 0}, "timeout_s"),
        ({"url": "http://h", "retries": -1}, "retries"),
    ],
)
def test_wrong_options_are_config_errors(args, message):
    with pytest.raises(ConfigError, match=message):
        build_reward("r", RewardConfig(scorer="http", args=args))


# ------------------------------------------------------------------------------------- a service that is away


@pytest.mark.parametrize(("status", "kind"), [(503, RewardAway), (429, RewardAway), (500, RewardUnavailable)])
def test_a_server_that_asks_to_come_again_is_away_and_one_that_fails_is_not(serve, status, kind):
    url = serve(lambda path, payload, number: (status, {})).url
    with pytest.raises(RewardError) as error:
        run("http", levels(1), items("a"), url=url, retries=0)
    assert type(error.value) is kind


@pytest.mark.parametrize("how", ["nobody listens", "no answer", "cut off"])
def test_a_server_that_is_not_there_is_away(how):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if how == "nobody listens":
            silent.close()
        if how == "cut off":

            def answer():
                connection, _ = silent.accept()
                with connection:
                    connection.recv(1 << 20)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")

            threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RewardAway):
            run("http", levels(1), items("a"), url=url, retries=0, timeout_s=0.3)


def test_a_function_that_cannot_reach_its_service_is_away(tmp_path):
    (tmp_path / "mine.py").write_text("def score(frames, prompt):\n    raise ConnectionRefusedError('not there')\n")
    runner = build_reward("mine", RewardConfig(scorer=f"{tmp_path}/mine.py:score"))
    with pytest.raises(RewardAway, match="reward mine: .*not there .mine.py, line 2"):
        runner.run(levels(1), items("a"), None)


def test_commands_wait_for_a_service_that_has_answered_before(serve, monkeypatch, caplog):
    """`rushes score`, `evaluate` and the plain loop; a first call fails at once, since its address may be wrong."""
    monkeypatch.setattr(patience, "MIN_PAUSE_S", 0.01)
    away = {1, 3, 4, 5}
    url = serve(lambda path, payload, number: (503, {}) if number in away else brightness(path, payload, number)).url
    runner = build_reward("far", RewardConfig(scorer="http", args={"url": url, "retries": 0}), patience_s=20)
    with pytest.raises(RewardAway):
        runner.run(levels(1), items("a"), None)
    for _ in range(2):
        assert runner.run(levels(7), items("a"), None).values.tolist() == [7]
    assert [record.message.split(":")[0] for record in caplog.records if "reward far" in record.message] == [
        "reward far is away",
        "reward far is back after 0 s",
    ]
