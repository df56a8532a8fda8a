"""Prompt files as other programs write them: the same prompts in every format."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.core.prompts import content_digest, load_prompts


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return load_prompts(path)


@pytest.mark.parametrize("metadata", [{"x": 1}, '{"x": 1}'])
def test_metadata_text_is_read_in_both_formats(tmp_path, metadata):
    rows = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "metadata": metadata})
    rows += parquet(tmp_path / "a.parquet", prompt=["a"], metadata=[metadata])
    assert [row.metadata for row in rows] == [{"x": 1}] * 2


def test_geneval_rows_are_read_as_they_are(tmp_path):
    task = {"tag": "counting", "include": [{"class": "dog", "count": 2}]}
    assert jsonl(tmp_path / "a.jsonl", {**task, "prompt": "two dogs"})[0].metadata == task
    with pytest.raises(InputError, match="unknown key 'tag'"):
        jsonl(tmp_path / "b.jsonl", {"tag": "counting", "prompt": "two dogs"})


def test_images_of_the_datasets_library(tmp_path):
    image = [{"bytes": png(), "path": "x.png"}, {"bytes": png(), "path": None}, None]
    first, second, none = parquet(tmp_path / "a.parquet", prompt=["a", "b", "c"], image=image)
    assert first.image == second.image and none.image is None
    assert Image.open(first.image).size == (8, 8)
    (tmp_path / "x.png").write_bytes(png())
    named = parquet(tmp_path / "b.parquet", prompt=["a"], image=[{"bytes": None, "path": "x.png"}])
    assert named[0].image == str(tmp_path / "x.png")
    with pytest.raises(InputError, match="row 1: image holds 10 bytes that are no PNG") as error:
        parquet(tmp_path / "c.parquet", prompt=["a"], image=[b"\x00not an im"])
    assert "x00" not in str(error.value)


def test_a_pandas_index_is_left_out(tmp_path):
    assert parquet(tmp_path / "a.parquet", prompt=["a"], __index_level_0__=[7])[0].text == "a"
    with pytest.raises(InputError, match="unknown key 'extra'"):
        parquet(tmp_path / "b.parquet", prompt=["a"], extra=[7])


BAD = [
    ('{"prompt": "a \\ud83d"}', "half a character"),
    ('{"prompt": "a", "metadata": {"x": %s}}' % ("9" * 5000), "5000 digits"),
    ('{"prompt": "a", "metadata": "{\\"x\\": %s}"}' % ("9" * 5000), "5000 digits"),
    ('{"prompt": "a", "metadata": {"x": "\\ud83d"}}', "half a character"),
    ('{{"prompt": "a", "metadata": {}1{}}}'.format('{"x":' * 100, "}" * 100), "nested more than"),
    ('{"prompt": "a", "prompt": "b"}', "twice"),
    ('{"prompt": "a", "metadata": {"x": NaN}}', "NaN is no number"),
    ('{"prompt": "a", "metadata": "[1, 2]"}', "metadata"),
    ('{"prompt": "a", "negative": "\\udc00"}', "half a character"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_what_no_prompt_may_hold(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"a.jsonl, line 2: .*{message}"):
        load_prompts(path)


def test_lines_that_end_in_cr_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\rtwo\r")
    assert [prompt.text for prompt in load_prompts(tmp_path / "a.txt")] == ["one", "two"]


def test_the_digest_is_of_the_content(tmp_path):
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        (folder / "x.png").write_bytes(png())
    rows = [{"prompt": "a", "image": "x.png"}, {"prompt": "b"}]
    here, there = jsonl(tmp_path / "p.jsonl", *rows), jsonl(tmp_path / "b" / "q.jsonl", *rows)
    assert content_digest(here) == content_digest(there)
    (tmp_path / "b" / "x.png").write_bytes(png() + b" ")
    assert content_digest(here) != content_digest(there)
    assert content_digest(here) != content_digest(here[::-1])
