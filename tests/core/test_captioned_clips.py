"""Folders and tables of captioned clips, and the frames that a generator of a given format reads of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.core.captioned_clips import ClipFormat
from pipeline.core.errors import InputError
from pipeline.core.media import encode_mp4, encode_png
from pipeline.core.prompts import content_digest, load_prompts
from pipeline.core.takes_table import save_takes
from pipeline.core.types import Media, PromptItem

FORM = ClipFormat(frames=5, height=32, width=32, fps=8.0)


def ramp(frames: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Frame i is grey, 20 i bright: which frames were taken can be read off."""
    shades = np.arange(frames, dtype=np.uint8) * 20
    return np.broadcast_to(shades[:, None, None, None], (frames, height, width, 3)).copy()


@pytest.fixture
def folder(tmp_path):
    for name, text in (("a", "a red circle"), ("b", "b blue square\n")):
        (tmp_path / f"{name}.mp4").write_bytes(encode_mp4(ramp(5), 8.0))
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def shades(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean(axis=(1, 2, 3)) / 20).astype(int).tolist()


def test_a_folder_is_a_prompt_set(folder):
    rows = load_prompts(folder)
    assert [(row.index, row.text) for row in rows] == [(0, "a red circle"), (1, "b blue square")]
    assert [row.clip for row in rows] == [str(folder / "a.mp4"), str(folder / "b.mp4")]
    before = content_digest(rows)
    (folder / "b.mp4").write_bytes(encode_mp4(ramp(6), 8.0))
    assert content_digest(rows) != before  # a run that is resumed would see another clip


def test_takes_of_ones_own_generator_are_clips(tmp_path):
    media = Media(frames=np.stack([ramp(5), ramp(5)]), fps=8.0)
    prompts = [PromptItem(index=3, text="c green circle")] * 2
    save_takes(tmp_path, media, prompts, [1, 2], 0, {}, keep=[False, True])
    (row,) = load_prompts(tmp_path)
    assert row.text == "c green circle" and row.clip == str(tmp_path / "prompt-00003-take-01.mp4")
    assert shades(FORM.read(tmp_path / "prompt-00003-take-01.mp4")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_table_names_clips_beside_it(folder, kind):
    rows = [{"prompt": "b blue square", "clip": "b.mp4"}, {"prompt": "no clip", "clip": None}]
    file = folder / f"clips.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert [row.clip for row in load_prompts(file)] == [str(folder / "b.mp4"), None]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "b.txt").unlink(), "b.mp4: has no caption; write it to b.txt"),
        (lambda f: (f / "b.txt").write_text(" \n"), "b.mp4: the prompt is empty"),
        (lambda f: [(f / f"{name}.mp4").unlink() for name in "ab"], "holds no images or videos"),
        (lambda f: ((f / "b.txt").unlink(), (f / "b.txt").symlink_to("/etc/hostname")), "leads out of"),
        (lambda f: ((f / "b.mp4").unlink(), (f / "b.mp4").symlink_to("/etc/hostname")), "leads out of"),
    ],
)
def test_a_wrong_folder_is_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_clip_outside_the_tables_folder_is_refused(folder):
    (folder / "sub").mkdir()
    table = folder / "sub" / "clips.jsonl"
    for name in ("../a.mp4", "/etc/hostname"):
        table.write_text(json.dumps({"prompt": "a", "clip": name}))
        with pytest.raises(InputError, match="line 1: clip .* leads out of"):
            load_prompts(table)


@pytest.mark.parametrize(
    ("fps", "frames", "taken"),
    [(8.0, 9, [0, 1, 2, 3, 4]), (8.1, 5, [0, 1, 2, 3, 4]), (16.0, 9, [0, 2, 4, 6, 8]), (12.0, 7, [0, 2, 3, 5, 6])],
)
def test_frames_are_taken_at_the_generators_rate(tmp_path, fps, frames, taken):
    file = tmp_path / "a.mp4"
    file.write_bytes(encode_mp4(ramp(frames), fps))
    FORM.check(file)
    assert shades(FORM.read(file)) == taken


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    form = ClipFormat(frames=1, height=32, width=32, fps=8.0)
    (tmp_path / "a.png").write_bytes(encode_png(ramp(2)[1]))
    (tmp_path / "b.mp4").write_bytes(encode_mp4(ramp(3), 4.0))  # its first frame
    for name, shade in (("a.png", 1), ("b.mp4", 0)):
        form.check(tmp_path / name)
        assert form.read(tmp_path / name).shape == (1, 32, 32, 3) and shades(form.read(tmp_path / name)) == [shade]


def test_other_sizes_are_cut_to_their_middle_where_that_is_asked_for(tmp_path):
    wide = ramp(5, 64, 128)
    wide[:, :, :32] = wide[:, :, 96:] = 255
    (tmp_path / "a.mp4").write_bytes(encode_mp4(wide, 8.0))
    form = ClipFormat(frames=5, height=32, width=32, fps=8.0, fit="crop")
    form.check(tmp_path / "a.mp4")
    assert shades(form.read(tmp_path / "a.mp4")) == [0, 1, 2, 3, 4]


def test_what_does_not_fit_is_one_line_at_the_start_and_when_it_is_read(tmp_path):
    file = tmp_path / "a.mp4"
    for frames, size, fps, message in (
        (4, 32, 8.0, "has 4 frames, and the generator makes 5; give a longer clip"),
        (7, 32, 16.0, r"has 7 frames, and the generator makes 5 at 8 a second \(9 of the clip's own\)"),
        (5, 48, 8.0, "is 48x48, and the generator makes 32x32; set source.fit=crop"),
        (5, 32, 6.0, "shows 6 frames a second, and the generator 8; set generator.fps to 6"),
    ):
        file.write_bytes(encode_mp4(ramp(frames, size, size), fps))
        for read in (FORM.check, FORM.read):
            with pytest.raises(InputError, match=message) as error:
                read(file)
            assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_corrupt_clip_is_one_line(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(9, 32, 32, 3), dtype=np.uint8)
    whole = encode_mp4(noise, 8.0)
    file = tmp_path / "a.mp4"
    for data in (whole[: len(whole) // 2], b"\0" * 100, b""):
        file.write_bytes(data)
        for read in (FORM.check, FORM.read):
            with pytest.raises(InputError) as error:
                read(file)
            assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    damaged = bytearray(whole)  # its head is sound: known only when it is decoded
    at = damaged.find(b"mdat") + 800
    damaged[at : at + 2000] = b"\xff" * 2000
    file.write_bytes(damaged)
    FORM.check(file)
    with pytest.raises(InputError, match="a.mp4"):
        FORM.read(file)
