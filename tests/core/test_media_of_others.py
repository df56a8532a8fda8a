"""Files that other programs write: the frames that they show, all and only these, or an error."""

import numpy as np
import pytest
from PIL import Image

from pipeline.core import pictures
from pipeline.core.errors import InputError
from pipeline.core.media import encode_mp4, left_out, list_media, read_media
from pipeline.core.pictures import open_picture

LEVELS = np.linspace(20, 235, 20).astype(int)  # of the frames of `clip`


def clip(height=96, width=128):
    """uint8 [20, H, W, 3]: grey, brighter in every frame; the top left corner is white, the top right one black."""
    frames = np.repeat(LEVELS, height * width * 3).reshape(20, height, width, 3).astype(np.uint8)
    frames[:, : height // 4, : width // 4] = 255
    frames[:, : height // 4, -width // 4 :] = 0
    return frames


def write_clip(path, frames, rate=10, codec="libx264", muxer=None, times=None, **options):
    import av

    with av.open(str(path), "w", format=muxer, options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "5"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts = times[number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def middle(frames):
    """Mean level in the middle of every frame."""
    height, width = frames.shape[1:3]
    return frames[:, height // 2, width // 2].mean(axis=-1)


def refused(path, *parts):
    with pytest.raises(InputError) as caught:
        read_media(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")],
)
@pytest.mark.parametrize("width", [48, 128])
def test_every_kind_gives_all_frames_and_the_rate_whatever_its_name(tmp_path, name, codec, width):
    write_clip(tmp_path / name, clip(width=width), codec=codec)
    for called in (name, "b.mp4", "c.png", "d"):
        path = (tmp_path / name).rename(tmp_path / called)
        media = read_media(path)
        path.rename(tmp_path / name)
        assert media.frames.shape == (1, 20, 96, width, 3) and media.fps == pytest.approx(10)
        assert np.abs(middle(media.frames[0]) - LEVELS).max() < 6


# ------------------------------------------------------------------------------------------------ edit lists, turns


def patched(path, box, offset, value, kind=">u4"):
    """Overwrites numbers `offset` bytes after the name of an mp4's box."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + len(box) + offset
    new = np.asarray(value, kind).tobytes()
    data[start : start + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize("hidden", [1, 7, 19])
@pytest.mark.parametrize("width", [48, 128])
def test_frames_before_an_edit_list_begins_are_not_shown(tmp_path, hidden, width):
    path = write_clip(tmp_path / "a.mp4", clip(width=width))
    data = path.read_bytes()
    start = data.index(b"elst") + 16
    began = int.from_bytes(data[start : start + 4], "big")
    frame_ticks = 1024  # 10 fps in FFmpeg's track time base of 10,240
    patched(path, b"elst", 8, [(20 - hidden) * 100, began + hidden * frame_ticks])
    media = read_media(path)
    assert media.frames.shape[1] == 20 - hidden
    assert np.abs(middle(media.frames[0]) - LEVELS[hidden:]).max() < 4


def test_frames_after_an_edit_list_ends_are_not_shown(tmp_path):
    path = write_clip(tmp_path / "a.mp4", clip())
    patched(path, b"elst", 8, [1000])
    frames = read_media(path).frames[0]
    assert len(frames) in (10, 11) and np.abs(middle(frames) - LEVELS[: len(frames)]).max() < 4


TURNS = {  # (a, b, c, d) of the display matrix -> what is shown
    (1, 0, 0, 1): lambda f: f,
    (0, 1, -1, 0): lambda f: np.rot90(f, -1, axes=(1, 2)),  # a telephone held upright: a quarter turn clockwise
    (-1, 0, 0, -1): lambda f: np.rot90(f, 2, axes=(1, 2)),
    (0, -1, 1, 0): lambda f: np.rot90(f, 1, axes=(1, 2)),
    (-1, 0, 0, 1): lambda f: f[:, :, ::-1],
    (1, 0, 0, -1): lambda f: f[:, ::-1],
    (0, 1, 1, 0): lambda f: f.transpose(0, 2, 1, 3),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("width", [48, 128])
def test_frames_are_turned_as_the_file_says(tmp_path, turn, width):
    path = write_clip(tmp_path / "a.mp4", clip(width=width))
    plain = read_media(path).frames[0]
    a, b, c, d = (value * 65536 for value in turn)
    patched(path, b"tkhd", 40, [a, b, 0, c, d, 0], ">i4")
    assert np.array_equal(read_media(path).frames[0], TURNS[turn](plain))


@pytest.mark.parametrize("cosine, sine", [(46341, 46341), (56756, 32768), (131072, 0)], ids=["45", "30", "enlarged"])
def test_other_turns_are_refused(tmp_path, cosine, sine):
    path = write_clip(tmp_path / "a.mp4", clip())
    patched(path, b"tkhd", 40, [cosine, sine, 0, -sine, cosine, 0], ">i4")
    refused(path, "other than a right angle")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("muxer", ["mpegts", "mpeg", "flv"])
def test_other_containers_are_refused_under_any_name(tmp_path, muxer):
    codec = "mpeg2video" if muxer == "mpeg" else "libx264"
    refused(
        write_clip(tmp_path / "a.mp4", clip(), rate=25, codec=codec, muxer=muxer), "whatever its name", "convert it"
    )


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n", b"II*\x00", b"8BPS\x00\x01"]
)
def test_other_pictures_reach_no_decoder(tmp_path, monkeypatch, head):
    monkeypatch.setattr(pictures, "_opened", None)  # calling it would be a crash
    for name in ("a.png", "a.jpg", "a.gif"):
        (tmp_path / name).write_bytes(head + bytes(600))
        refused(tmp_path / name, "whatever its name")
        with pytest.raises(InputError):
            open_picture(tmp_path / name)


def test_pil_may_try_only_the_format_that_was_recognised(tmp_path, monkeypatch):
    tried = []
    plain = Image.open
    monkeypatch.setattr(Image, "open", lambda path, formats=None: tried.append(formats) or plain(path, formats=formats))
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP"):
        Image.fromarray(clip()[0]).save(tmp_path / "a", format=kind)
        read_media(tmp_path / "a")
        open_picture(tmp_path / "a")
        assert tried == [[kind]] * 2
        tried.clear()


def test_sound_with_a_cover_picture_is_no_video(tmp_path):
    import av
    from av.stream import Disposition

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=44100), container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 96, 128, "rgb24"
        cover.disposition = Disposition.attached_pic
        picture = cover.encode(av.VideoFrame.from_ndarray(clip()[0], format="rgb24")) + cover.encode()
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, number * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        container.mux(picture)
    refused(tmp_path / "a.mp4", "holds no video, only a cover picture")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mov", "live.mkv"])
def test_cut_files_are_refused(tmp_path, name, share):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    live = {"live": "1"} if name == "live.mkv" else {}
    path = write_clip(tmp_path / name, clip(), codec=codec, **live)
    assert read_media(path).frames.shape[1] == 20
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_flipped_bytes_never_change_size_or_number_of_frames_in_silence(tmp_path, name):
    path = write_clip(tmp_path / name, clip())
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    start, end = (data.index(b"mdat") + 4, data.index(b"moov")) if name == "a.mp4" else (40, len(data))
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(start, end)] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            frames = read_media(path).frames
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert frames.shape[1] == 20 and sorted(frames.shape[2:4]) == [96, 128]


def test_a_flipped_byte_of_a_png_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    data = path.read_bytes()
    for position in range(8, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        refused(path, "write it again")


def test_frames_of_two_sizes_are_refused(tmp_path):
    import av

    parts = [
        write_clip(tmp_path / f"{number}.webm", clip(*size), codec="libvpx-vp9")
        for number, size in enumerate([(96, 128), (48, 64)])
    ]
    with (
        av.open(str(parts[0])) as first,
        av.open(str(parts[1])) as second,
        av.open(str(tmp_path / "a.mkv"), "w") as out,
    ):
        stream = out.add_stream_from_template(first.streams.video[0])
        for number, container in enumerate((first, second)):
            for packet in container.demux(container.streams.video[0]):
                if packet.size:
                    packet.pts += 2000 * number
                    packet.dts, packet.stream = packet.pts, stream
                    out.mux(packet)
    refused(tmp_path / "a.mkv", "frame 20 is 64x48 and the first is 128x96")


# ------------------------------------------------------------------------------------- animations, 16 bits, folders


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng", "a.png"])
def test_animations_are_read_with_all_frames_and_their_rate(tmp_path, name):
    images = [Image.fromarray(frame) for frame in clip()]
    kind = {"a.gif": "GIF", "a.webp": "WEBP"}.get(name, "PNG")
    extra = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / name
    images[0].save(path, format=kind, save_all=True, append_images=images[1:], duration=50, **extra)
    media = read_media(path)
    assert media.frames.shape == (1, 20, 96, 128, 3) and media.fps == pytest.approx(20)
    assert np.abs(middle(media.frames[0]) - LEVELS).max() < 2
    with pytest.raises(InputError, match=f"{name}: is an animation of 20 frames; give a picture"):
        open_picture(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    refused(path, "write it again")


@pytest.mark.parametrize(
    "level, expected", [(0, 0), (120, 0), (200, 1), (257, 1), (300, 1), (32768, 128), (65535, 255)]
)
def test_16_bits_are_scaled_by_what_white_is(tmp_path, level, expected):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((4, 4), level, np.uint16)).save(path)
    assert (read_media(path).frames == expected).all()
    assert (np.asarray(open_picture(path).convert("L")) == expected).all()


def test_what_a_folder_holds_besides_is_counted(tmp_path):
    for name in ("a.png", "b.tiff", "c.TIFF", "d.heic", ".e.png", "f", "takes.parquet", "sub/g.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a.txt").write_text("the prompt of a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert [file.name for file in list_media(tmp_path)] == ["a.png"]
    counts = dict(reversed(part.split(" ", 1)) for part in left_out(tmp_path).split(", "))
    assert counts == {".tiff": "2", ".heic": "1", "hidden": "1", "without suffix": "1", ".json": "1", ".png": "1"}


def test_our_own_clips_still_come_back_whole(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode_mp4(clip(32, 48), 12.5))
    media = read_media(tmp_path / "a.mp4")
    assert media.frames.shape == (1, 20, 32, 48, 3) and media.fps == 12.5
