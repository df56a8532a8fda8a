"""`rushes score` on a folder of everything that goes wrong: each item fails alone, clearly; the others are scored."""

from __future__ import annotations

import base64
import json

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_rewards as tiny
from PIL import Image

from jobs import cli
from jobs.common import score_files
from jobs.common.score_request import _video_size
from pipeline.core import media as media_files
from pipeline.core import videos
from pipeline.core.errors import InputError
from pipeline.core.media import encode_mp4, read_media

GREY = np.full((48, 64, 3), 120, np.uint8)


def write_clip(path, frames, size=(32, 32), pix_fmt="yuv420p"):
    """A clip of `frames` frames that get brighter, made without a large array."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for number in range(frames):
            shade = np.full((*size, 3), 255 * number // max(1, frames - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


def no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        container.start_encoding()  # writes the header; nothing is written before it


def scores(capsys, folder, *args):
    """(exit status, the error line, {file: row})."""
    out = folder.parent / "scores.parquet"
    status = cli.main(["score", str(folder), "-o", str(out), *[str(a) for a in args]])
    _, err = capsys.readouterr()
    assert "Traceback" not in err and err.count("\n") <= 1
    return status, err, {row["path"].rsplit("/", 1)[-1]: row for row in pq.read_table(out).to_pylist()}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "media"
    made.mkdir()
    return made


def test_every_bad_file_is_a_row_of_its_own_and_the_good_ones_are_scored(capsys, folder):
    Image.fromarray(GREY).save(folder / "good.png")
    Image.fromarray(GREY[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([GREY, np.zeros_like(GREY[..., :1])])).save(folder / "alpha.png")  # all transparent
    (folder / "one.mp4").write_bytes(encode_mp4(GREY[None], 8.0))
    good = encode_mp4(np.repeat(GREY[None], 9, axis=0), 8.0)
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    (folder / "end.mp4").write_bytes(good[:-40])
    (folder / "none.mp4").write_bytes(b"")
    no_frames(folder / "empty.mp4")
    (folder / "text.png").write_text("not a picture")
    (folder / "none.png").touch()
    Image.fromarray(GREY).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:60])
    Image.fromarray(GREY).save(folder / "sidecar.png")
    (folder / "sidecar.txt").write_bytes(b"\xff\xfe\xfa")
    Image.fromarray(GREY).save(folder / "wordy.png")
    (folder / "wordy.txt").write_text("x" * 10_000)
    status, err, rows = scores(capsys, folder, "-r", "jpeg_compressibility")
    assert status == 1 and "9 of 13 scores failed" in err
    expected = {
        "cut.mp4": "cut off",
        "end.mp4": "cut off",
        "none.mp4": "is empty (0 bytes)",
        "none.png": "is empty (0 bytes)",
        "empty.mp4": "holds no",
        "text.png": "is not a picture",
        "half.png": "write it again",
        "sidecar.png": "sidecar.txt: is not UTF-8",
        "wordy.png": "10,000 characters",
    }
    for name, row in rows.items():
        assert (row["score"] is None) == (name in expected), row
        assert expected.get(name, "") in (row["error"] or "") and (row["error"] is None or "media/" in row["error"])
    same = rows["good.png"]["score"]
    assert rows["grey.png"]["score"] == pytest.approx(same, rel=0.1) and rows["one.mp4"]["score"] < 0
    assert rows["alpha.png"]["score"] == pytest.approx(same, rel=0.1)  # plain white, not what lies under the alpha


@pytest.mark.slow
def test_ten_thousand_frames_are_scored_and_too_many_are_refused_before_decoding(capsys, folder, monkeypatch):
    write_clip(folder / "long.mp4", 10_000, size=(16, 16))
    Image.fromarray(GREY).save(folder / "still.png")
    before = psutil.Process().memory_info().rss
    status, err, rows = scores(capsys, folder, "-r", "jpeg_compressibility")
    assert status == 0, err
    assert rows["long.mp4"]["score"] < 0 and psutil.Process().memory_info().rss - before < 400 * 2**20
    (folder.parent / "scores.parquet").unlink()
    monkeypatch.setattr(media_files, "MAX_DECODED_BYTES", 2**20)
    monkeypatch.setattr(videos, "_decode", None)  # calling it would be a crash
    status, _, rows = scores(capsys, folder, "-r", "jpeg_compressibility")
    assert status == 1 and rows["still.png"]["score"] < 0
    assert (
        "10000 frames of 16x16 would take" in rows["long.mp4"]["error"] and "cut the clip" in rows["long.mp4"]["error"]
    )


def test_the_limit_follows_the_free_memory(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.mp4", 100, size=(64, 64))
    assert media_files.read_media(clip).frames.shape[1] == 100
    free = psutil.virtual_memory()._replace(available=4 * 2**20)  # the clip takes 1.2 MiB
    monkeypatch.setattr(media_files.psutil, "virtual_memory", lambda: free)
    with pytest.raises(media_files.InputError, match=r"a\.mp4: 100 frames of 64x64 would take .* of memory"):
        media_files.read_media(clip)


def test_large_clips_are_not_piled_up_in_a_batch(capsys, folder, monkeypatch):
    for number in range(5):
        write_clip(folder / f"{number}.mp4", 4, size=(64, 64))
    own = folder.parent / "own.py"
    own.write_text(
        "def sizes(frames, prompts):\n    open(__file__ + '.log', 'a').write(f'{len(prompts)} ')\n"
        "    return frames.mean(axis=(1, 2, 3, 4))\nsizes.batched, sizes.reads = True, 'video'\n"
    )
    monkeypatch.setattr(score_files, "BATCH_BYTES", 2 * 4 * 64 * 64 * 3)
    status, err, _ = scores(capsys, folder, "-r", f"{own}:sizes")
    assert status == 0, err
    assert (folder.parent / "own.py.log").read_text().split() == ["2", "2", "1"]


@pytest.mark.parametrize(
    "returned, message",
    [
        ("float('nan')", "NaN or infinity"),
        ("float('inf')", "NaN or infinity"),
        ("None", "instead of one number"),
        ("'0.5'", "instead of one number"),
        ("[0.5, 0.5]", "instead of one number"),
        ("{'score': 1}", "instead of one number"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_model_that_returns_garbage_fails_that_file_alone(capsys, folder, returned, message):
    for name in "abc":
        Image.fromarray(GREY).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    own = folder.parent / "own.py"
    own.write_text(f"def judge(frames, prompt):\n    return 0.5 if prompt != 'b' else {returned}\n")
    status, err, rows = scores(capsys, folder, "-r", f"{own}:judge")
    assert status == 1 and "1 of 3 scores failed" in err
    assert [rows[f"{n}.png"]["score"] for n in "abc"] == [0.5, None, 0.5]
    assert message in rows["b.png"]["error"] and "b.png" in rows["b.png"]["error"]


def test_empty_and_non_latin_prompts(capsys, folder, tmp_path):
    model = tiny.clip(tmp_path / "clip")
    texts = {
        "cn": "一只戴着红帽子的猫",
        "ar": "قطة ترتدي قبعة حمراء",
        "emoji": "🐈‍⬛ naïve",
        "none": None,
        "blank": "  \n",
    }
    for name, text in texts.items():
        Image.fromarray(tiny.pictures(1).frames[0, 0]).save(folder / f"{name}.png")
        if text is not None:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    status, err, rows = scores(capsys, folder, "-r", "clip_score", "--set", f"clip_score.args.model={model}")
    assert status == 1 and "2 of 5 scores failed" in err
    values = {name: rows[f"{name}.png"]["score"] for name in texts}
    assert len({values["cn"], values["ar"], values["emoji"]}) == 3  # the texts are read, not dropped
    for name in ("none", "blank"):
        assert values[name] is None and "compares with the prompt, which is empty" in rows[f"{name}.png"]["error"]
    assert rows["cn.png"]["prompt"] == texts["cn"]


def test_another_prompt_is_scored_anew_and_one_file_may_have_several(capsys, folder):
    Image.fromarray(GREY).save(folder / "a.png")
    own = folder.parent / "own.py"
    own.write_text("def length(frames, prompt, metadata):\n    return len(prompt) + metadata.get('n', 0)\n")
    reward = f"{own}:length"
    assert scores(capsys, folder, "-r", reward, "-p", "abc")[2]["a.png"]["score"] == 3
    assert scores(capsys, folder, "-r", reward, "-p", "abcde")[2]["a.png"]["score"] == 5
    out = folder.parent / "scores.parquet"
    assert pq.read_table(out).num_rows == 1
    table = {
        "path": ["media/a.png"] * 3,
        "prompt": ["x", "xy", "bad"],
        "metadata": [json.dumps({"n": 100, "rewards": ["another"]}), None, "{no json"],
    }
    pq.write_table(pa.table(table), folder.parent / "list.parquet")
    status = cli.main(["score", str(folder.parent / "list.parquet"), "-r", reward, "-o", str(out)])
    rows = {row["prompt"]: row for row in pq.read_table(out).to_pylist()}
    assert status == 1 and "1 of 3" in capsys.readouterr().err
    assert {prompt: row["score"] for prompt, row in rows.items()} == {"x": 101, "xy": 2, "bad": None}
    assert "row 3: metadata: is not valid JSON" in rows["bad"]["error"]


def test_a_video_of_no_known_codec_is_refused_as_such(tmp_path):
    """A damaged header may name a codec that FFmpeg has no decoder for; there is no codec context then."""
    clip = write_clip(tmp_path / "clip.mp4", 3)
    data = clip.read_bytes()
    clip.write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(InputError, match="clip.mp4: (holds video of no known codec|is not a readable video)"):
        read_media(clip)
    assert decoding_of(data.replace(b"avc1", b"zzzz")) == 0


def decoding_of(data: bytes) -> int:
    """The size that a request with this clip is expected to take once decoded."""
    return _video_size(base64.b64encode(data).decode())
