"""Media files survive a round trip, and every kind of broken file is refused."""

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import InputError, RushesError
from pipeline.core.files import atomic_write
from pipeline.core.media import encode_mp4, h264_round_trip, list_media, read_media, write_media
from pipeline.core.types import Media


def clip(frames=9, height=48, width=40, seed=0):
    """Blocky moving colours, [1, F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, -(-height // 8), -(-width // 8), 3))
    return np.kron(coarse, np.ones((1, 8, 8, 1)))[None, :, :height, :width].astype(np.uint8)


@pytest.mark.parametrize("size", [(48, 48), (47, 33), (300, 200)])
def test_video_round_trip_keeps_size_count_rate_and_colour(tmp_path, size):
    media = Media(frames=clip(5, *size), fps=8.0)
    path = write_media(tmp_path / "a" / "take", media, 0)
    back = read_media(path)
    assert path.suffix == ".mp4" and back.frames.shape == media.frames.shape and back.fps == pytest.approx(8.0)
    assert np.abs(back.frames.astype(int) - media.frames).mean() < (
        8 if max(size) > 240 else 2
    )  # without enlargement, chroma is halved
    assert not list(tmp_path.rglob("*.partial"))


def test_small_clips_are_enlarged_for_viewing():
    import io

    import av

    with av.open(io.BytesIO(encode_mp4(clip(3)[0], 12.5))) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (192, 160)
        assert stream.average_rate == 12.5 and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.name == "h264"


def test_picture_round_trip_is_exact(tmp_path):
    media = Media(frames=clip(1), fps=1.0)
    path = write_media(tmp_path / "take", media, 0)
    assert path.suffix == ".png" and np.array_equal(read_media(path).frames, media.frames)


def test_grey_alpha_palette_and_16_bit_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_media(tmp_path / "grey.png").frames[0, 0], np.repeat(grey[..., None], 3, -1))
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "alpha.png")
    assert (read_media(tmp_path / "alpha.png").frames == 255).all()  # transparent shows white
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert (read_media(tmp_path / "deep.png").frames == 255).all()
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert read_media(tmp_path / "palette.png").frames.shape == (1, 1, 4, 4, 3)


@pytest.mark.parametrize("width", [16, 24, 32, 48, 62, 64, 72])
def test_narrow_videos_of_others_are_read_right(tmp_path, width):
    """decord2 3.4 returns its row padding as pixels below 64 pixels of width."""
    frames = np.zeros((3, 32, width, 3), np.uint8) + np.array([0, 128, 255], np.uint8)[:, None, None, None]
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    back = read_media(tmp_path / "a.mp4")
    assert back.fps == 8.0 and np.abs(back.frames[0].astype(int) - frames).max() <= 2


def test_grayscale_video_becomes_rgb(tmp_path):
    import av

    with av.open(str(tmp_path / "grey.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "gray"
        for value in (0, 128, 255):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64), value, np.uint8), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read_media(tmp_path / "grey.mp4").frames[0]
    assert frames.shape == (3, 64, 64, 3) and np.ptp(frames.astype(int), axis=-1).max() <= 2


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_cut_videos_are_refused(tmp_path, keep):
    data = encode_mp4(clip()[0], 8.0)
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"cut\.mp4.*write it again"):
        read_media(path)


def test_overwritten_middle_is_refused(tmp_path):
    data = bytearray(encode_mp4(clip()[0], 8.0))
    start = data.index(b"mdat") + 4 + len(data) // 4
    data[start : start + 2000] = bytes(2000)
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.mp4"):
        read_media(tmp_path / "bad.mp4")


def test_zero_frames_is_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        container.start_encoding()  # without it no file is written at all
    assert (tmp_path / "none.mp4").stat().st_size > 0
    with pytest.raises(InputError, match=r"none\.mp4: holds no"):
        read_media(tmp_path / "none.mp4")


def test_not_a_picture_wrong_kind_missing(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "a.xyz").write_text("hello")
    (tmp_path / "a.mp4").write_text("hello hello hello")
    Image.fromarray(clip(1)[0, 0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for name in ("a.png", "a.xyz", "a.mp4", "cut.png", "missing.png"):
        with pytest.raises(InputError, match=name):
            read_media(tmp_path / name)


def test_list_media(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.mp4", "sub/c.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_text("")
    assert [p.name for p in list_media(tmp_path)] == ["a.mp4", "b.png", "c.JPG"]
    with pytest.raises(InputError, match="no images or videos"):
        list_media(tmp_path / "sub" / ".." / "sub2") if (tmp_path / "sub2").mkdir() is None else None


def test_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    import errno
    import os

    path = tmp_path / "f"
    atomic_write(path, b"old")

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RushesError, match=r"/f: the disk is full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_codec_round_trip():
    assert h264_round_trip() < 16
