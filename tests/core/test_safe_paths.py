"""Names in prompts, tables and requests reach regular files of their own folder only."""

import base64
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_rewards
from http_server import items
from PIL import Image
from traps import KINDS, picture, traps, within

from jobs.common import judged_pairs
from jobs.common.score_files import find_items
from jobs.common.score_request import decode_takes
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError, RewardError
from pipeline.core.prompts import load_prompts
from pipeline.core.safe_paths import check_regular, file_inside, path_inside, relative_name
from pipeline.core.types import PromptItem
from pipeline.rewards.models.protocol import parse_request
from pipeline.rewards.runner import build_reward


@pytest.fixture
def place(tmp_path):
    """(a folder, name of the kind -> name that must not be read from it)"""
    outside = picture(tmp_path / "private" / "secret.png", 200)
    root = tmp_path / "given"
    picture(root / "sub" / "fine.png")
    return root, traps(root, outside)


@pytest.fixture(autouse=True)
def alarm():
    with within(30):
        yield


# --------------------------------------------------------------------------------------------------- the helper


@pytest.mark.parametrize("kind", KINDS)
def test_files_inside_a_folder(place, kind):
    root, names = place
    with pytest.raises(InputError, match="^here .*move it"):
        file_inside(root, names[kind], "here", "move it")


def test_fine_files_pass(place):
    root, _ = place
    fine = root / "sub/fine.png"
    (root / "inner.png").symlink_to("sub/fine.png")
    for name in ("sub/fine.png", "./sub/../sub/fine.png", str(fine), "inner.png"):
        assert file_inside(root, name, "x", "y") == fine
    assert path_inside(root, "new/file", "x", "y") == root / "new/file"
    link = root.parent / "other"
    link.symlink_to(root)
    assert file_inside(link, "sub/fine.png", "x", "y") == link / "sub/fine.png"  # the root as it was given
    check_regular(root / "inner.png")
    check_regular(root / "missing")
    with pytest.raises(InputError, match="not a regular file"):
        check_regular(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a/..", "a//b", "./a", "a\x00", None, 3, ["a"]])
def test_names_that_are_no_relative_names(name, tmp_path):
    with pytest.raises(InputError, match="^there: "):
        relative_name(name, "there", "fix")
    assert str(relative_name("a/b..c/.d", "there", "fix")) == "a/b..c/.d"


# --------------------------------------------------------------------------------------------------- prompts, tables


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["image", "conditions", "reference", "condition", "references"])
def test_a_prompts_file_names_pictures_of_its_own_folder_only(place, key, kind):
    root, names = place
    name = names[kind]
    if key == "image":
        row = {"image": name}
    elif key == "conditions":
        row = {"metadata": {"conditions": {"mask_image": name}}}
    else:
        row = {"metadata": {key.rstrip("s"): [name, "sub/fine.png"] if key == "references" else name}}
    (root / "p.jsonl").write_text(json.dumps({"prompt": "a", **row}))
    if key != "image" and kind == "absolute device":  # without a picture's suffix it is a text and never opened
        item = load_prompts(root / "p.jsonl")[0]
        assert not item.files
        return
    with pytest.raises(InputError, match="p.jsonl, line 1: .*relative to the prompts file") as caught:
        load_prompts(root / "p.jsonl")
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_pictures_beside_a_prompts_file_are_found_from_anywhere(place, monkeypatch):
    root, _ = place
    fine = "sub/fine.png"
    metadata = {
        "reference": [fine],
        "condition": fine,
        "conditions": {"mask_image": fine, "strength": 0.5},
        "text": "x",
    }
    rows = [{"prompt": "a", "image": fine, "metadata": metadata}, {"prompt": "b", "metadata": {"reference": "a text"}}]
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"prompt": ["a"], "image": [fine], "metadata": [json.dumps(metadata)]}), root / "p.parquet")
    monkeypatch.chdir("/")
    first, second = load_prompts(root / "p.jsonl")
    path = str(root / fine)
    assert load_prompts(root / "p.parquet") == [first]
    assert first.image == path and first.files == {"reference": (path,), "condition": (path,)}
    assert first.metadata["conditions"] == {"mask_image": path, "strength": 0.5}
    assert second.files == {} and second.metadata == {"reference": "a text"}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_files_stay_in_their_folder(place, kind):
    root, names = place
    rows = {"path": [names[kind], "sub/fine.png", "sub/fine.png"], "prompt": ["a", "b", "c"]}
    pq.write_table(pa.table({**rows, "image": ["sub/fine.png", names[kind], None]}), root / "t.parquet")
    first, second, third = find_items(root / "t.parquet", None)
    if kind in ("FIFO", "device", "socket", "folder", "absolute device"):  # refused when it is read, as before
        assert first.error or not first.path.is_file()
    else:
        assert "leads out of" in first.error
    assert names[kind] in second.error and second.image is None
    assert third.error is None
    pairs = {"path_a": [names[kind]], "path_b": ["sub/fine.png"], "label": ["a"], "prompt": ["p"]}
    pq.write_table(pa.table(pairs), root / "pairs.parquet")
    pair = next(judged_pairs.read_pairs(root / "pairs.parquet", root.parent))
    assert (pair.a.error or not pair.a.path.is_file()) and pair.b.error is None


def test_a_sidecar_that_leads_out_is_no_prompt(place):
    root, _ = place
    (root.parent / "private" / "key").write_text("secret words")
    (root / "sub" / "fine.txt").symlink_to(root.parent / "private" / "key")
    found = [item for item in find_items(root / "sub", None) if item.path.name == "fine.png"]
    assert "leads out of" in found[0].error and "secret words" not in found[0].prompt


# --------------------------------------------------------------------------------------------------- clients


class Shown:
    """Takes a request as `rushes serve-reward` does."""

    def __init__(self, scorer, **args):
        self.runner = build_reward("r", RewardConfig(scorer=scorer, args=args))

    def __call__(self, folder, metadata):
        pixels = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(pixels, "PNG")
        frame = base64.b64encode(pixels.getvalue()).decode()
        body = {"version": 1, "items": [{"prompt": "a", "metadata": metadata, "frames": [frame]}]}
        groups, _ = decode_takes(parse_request(json.dumps(body).encode()), folder)
        return self.runner.run(groups[0].media, groups[0].prompts, None)


@pytest.mark.parametrize("scorer", ["condition", "clip_i"])
@pytest.mark.parametrize("kind", [*KINDS, "missing", "fine"])
def test_a_client_names_no_file_of_the_server(place, tmp_path, scorer, kind):
    root, names = place
    name = {**names, "missing": "none.png", "fine": "sub/fine.png"}[kind]
    path = name if os.path.isabs(name) else str(root / name)
    key, args = ("condition", {"kind": "edges"}) if scorer == "condition" else ("reference", {})
    if scorer == "clip_i":
        args = {"model": str(tiny_rewards.clip(tmp_path / "clip"))}
    ask = Shown(scorer, **args)
    for value in (path, [path], {"path": path}, {key: path}):
        with pytest.raises(RewardError) as caught:
            ask(tmp_path, {key: value})
        answer = str(caught.value).replace(repr(value)[:80], "X")
        assert answer.startswith(f"reward r: prompt 0: metadata.{key} is X, which is no picture")  # the same for all
    with pytest.raises(RewardError, match="has no"):
        ask(tmp_path, {"files": {key: [path]}, "image": path})


def test_the_one_file_of_a_prompt_goes_along_as_the_picture(place, serve):
    root, _ = place
    server = serve(lambda path, payload, number: (200, {"scores": [1.0] * len(payload["items"])}))
    remote = build_reward("remote", RewardConfig(scorer="http", args={"url": server.url}))
    fine = str(root / "sub/fine.png")
    one = PromptItem(index=0, text="a", metadata={"reference": "sub/fine.png", "n": 1}, files={"reference": (fine,)})
    remote.run(tiny_rewards.pictures(1), [one], None)
    sent = server.seen[0]["items"][0]
    assert sent["metadata"] == {"n": 1} and base64.b64decode(sent["image"]).startswith(b"\x89PNG")
    remote.run(tiny_rewards.pictures(1), items("a", metadata={"reference": fine}), None)
    assert "image" not in server.seen[1]["items"][0]


def test_a_server_answers_while_a_client_names_a_fifo(place):
    """The scorer's thread is not held: a second request is scored."""
    root, names = place
    ask = Shown("condition", kind="edges")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(pytest.raises(RewardError, ask, root, {"condition": str(root / "fifo.png")})),
        daemon=True,
    )
    thread.start()
    thread.join(20)
    assert done
