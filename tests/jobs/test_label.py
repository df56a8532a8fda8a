"""`rushes label` without a browser: which pairs are drawn, what is kept of answers, and what the server refuses."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from contextlib import closing
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp.test_utils import TestClient, TestServer
from command import run
from PIL import Image

from jobs.common import label_answers
from jobs.common.label_answers import AnswerFile, labelled_pairs, read_answers, session_token
from jobs.common.label_service import LabelService
from jobs.common.label_session import LabelSession, rater_name, schedule
from jobs.common.label_takes import Take, TakePair, draw_pairs, find_takes
from pipeline.core.errors import InputError, RushesError
from pipeline.core.labelled_pairs import read_labelled_pairs


def take(name, prompt="p"):
    return Take(name, None, prompt)


def pairs(count):
    return [TakePair(take(f"{i}-x"), take(f"{i}-y")) for i in range(count)]


def picture(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """4 pictures of two prompts."""
    for i in range(4):
        picture(tmp_path / "takes" / f"{i}.png", 50 * i)
        (tmp_path / "takes" / f"{i}.txt").write_text("ab"[i // 2])
    return tmp_path / "takes"


@pytest.fixture
def file(tmp_path):
    with closing(AnswerFile(tmp_path / "labels.jsonl")) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("count", [2, 5, 6])
def test_all_pairs_of_a_prompt_come_once_and_takes_equally_often(count):
    takes = [take(f"{i}", prompt) for prompt in "ab" for i in range(count)]
    drawn = draw_pairs(takes, 10**6)
    expected = {(prompt, *pair) for prompt in "ab" for pair in combinations(map(str, range(count)), 2)}
    assert {(p.a.prompt, *sorted((p.a.name, p.b.name))) for p in drawn} == expected and len(drawn) == len(expected)
    some = draw_pairs(takes, 2 * count)  # a round or so of each prompt
    assert Counter(pair.a.prompt for pair in some[: 2 * (len(some) // 2)])["a"] == len(some) // 2
    uses = Counter((t.prompt, t.name) for pair in some for t in (pair.a, pair.b))
    assert max(uses.values()) - min(uses.values()) <= 1
    assert draw_pairs(takes, 3) == some[:3]
    assert set(draw_pairs(takes, len(some), some[1:])) == set(some)  # the same pairs, the same way round
    again = draw_pairs(takes, 2, [some[-1]])
    assert again[0] == some[-1] and len({pair.key for pair in again}) == 2 == len(again)


def test_a_share_of_the_pairs_comes_again_later():
    tasks = schedule(pairs(40), 0.1)
    assert [task.repeat for task in tasks].count(True) == 4
    places = {task.id: place for place, task in enumerate(tasks)}
    assert len(places) == 44
    assert all(places[task.id] - places[task.pair.key] >= 10 for task in tasks[:40] if task.repeat)
    assert not any(task.repeat for task in schedule(pairs(5), 0.0)) and len(schedule(pairs(5), 1.0)) == 10


def test_takes_of_a_run_are_found_and_bad_ones_named(tmp_path):
    run_folder = tmp_path / "run"
    for step in ("step-000000", "step-000010"):
        picture(run_folder / "eval" / step / "x.png")
        names = ["x.png", "gone.png", None, "../../../secret.png"]
        table = pa.table({"path": names, "prompt": ["p"] * 4})
        pq.write_table(table, run_folder / "eval" / step / "takes.parquet")
    picture(tmp_path / "secret.png")
    takes, problems = find_takes(run_folder, tmp_path)
    assert [each.name for each in takes] == ["run/eval/step-000000/x.png", "run/eval/step-000010/x.png"]
    assert len(problems) == 4 and all("\n" not in problem for problem in problems)
    assert "row 2" in problems[0] and "is not there" in problems[0] and "leads out of" in problems[1]
    with pytest.raises(InputError, match="no such folder"):
        find_takes(tmp_path / "none", tmp_path)


# ----------------------------------------------------------------------------------------------------- answers


def test_answers_are_by_take_whatever_the_side_and_repeats_swap_the_sides(file):
    session = LabelSession(pairs(12), file, 0.25, "secret")
    lefts = Counter()
    while (task := session.next_task("ada")) is not None:
        left, right = session.sides("ada", task)
        if not task.repeat:
            lefts[left is task.pair.a] += 1
        else:
            first = next(each for each in session.tasks.values() if each.id == task.pair.key)
            assert session.sides("ada", first) == (right, left)
        session.answer("ada", task.id, session.media_id(left if left.name.endswith("x") else right, "secret"))
    assert len(file_rows(file)) == 15 and min(lefts.values()) >= 2
    for row in file_rows(file):
        assert row[f"path_{row['answer']}"].endswith("x")  # the same take was always the better one
    assert sum("repeat_of" in row for row in file_rows(file)) == 3
    assert session.state("ada") | {"last": 0} == {"rater": "ada", "done": 15, "total": 15, "task": None, "last": 0}
    assert session.next_task("bob").id == pairs(1)[0].key  # all raters begin with the same pair


def file_rows(file):
    return [json.loads(line) for line in file.path.read_text().splitlines()]


def test_an_answer_or_undo_that_arrives_twice_counts_once(file):
    session = LabelSession(pairs(3), file, 0.0, "secret")
    first = session.next_task("ada").id
    session.answer("ada", first, "tie")
    session.answer("ada", first, "tie")
    with pytest.raises(InputError, match="another answer already"):
        session.answer("ada", first, "skip")
    assert len(file_rows(file)) == 1
    session.answer("ada", session.next_task("ada").id, "tie")
    last = session.state("ada")["last"]
    session.undo("bob", last)  # not his
    session.undo("ada", last)
    session.undo("ada", last)
    assert session.state("ada")["done"] == 1 and session.next_task("ada").id != first
    for task, choice in (("unknown", "tie"), (None, "tie"), (first, "better"), (first, ["tie"]), (first, None)):
        with pytest.raises(InputError):
            session.answer("ada", task, choice)


def test_what_is_skipped_is_neither_repeated_nor_exported(file):
    session = LabelSession(pairs(2), file, 1.0, "secret")
    session.answer("ada", session.next_task("ada").id, "skip")
    session.answer("ada", session.next_task("ada").id, "tie")
    assert session.state("ada")["total"] == 3
    session.answer("ada", session.next_task("ada").id, "tie")
    assert session.next_task("ada") is None
    rows = labelled_pairs(session.answers, "test")
    assert len(rows) == 2 and rows[1].repeat_of == rows[0].id


def test_a_new_start_goes_on_where_the_answers_end(tmp_path):
    path = tmp_path / "labels.jsonl"
    with closing(AnswerFile(path)) as first:
        session = LabelSession(pairs(4), first, 0.5, "secret")
        for choice in ("left", "right", "skip"):
            task = session.state("ada")["task"]
            session.answer("ada", task["id"], task.get(choice, choice))
        session.undo("ada", session.state("ada")["last"])
        state = session.state("ada")
    with open(path, "a") as torn:
        torn.write('{"id": "half an ans')
    assert len(read_answers(path)[0]) == 2
    with closing(AnswerFile(path)) as second:
        assert second.dropped == 19
        turned = [TakePair(pair.b, pair.a) for pair in pairs(4)]  # a page that is still open shows the same sides
        session = LabelSession(turned, second, 0.5, "secret")
        assert session.state("ada") == state
        session.answer("ada", state["task"]["id"], "tie")
    assert [answer.answer for answer in read_answers(path)[0]][-1] == "tie" and "half" not in path.read_text()
    assert session_token(path) == session_token(path) and len(session_token(path)) >= 22
    assert (tmp_path / ".labels.token").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_loses_nothing_and_says_so(file, monkeypatch):
    session = LabelSession(pairs(3), file, 0.0, "secret")
    session.answer("ada", session.next_task("ada").id, "tie")
    text, task = file.path.read_text(), session.next_task("ada").id
    monkeypatch.setattr(label_answers.os, "write", lambda handle, data: os.pwrite(handle, data[:7], 10**3) * 0 + 7)
    with pytest.raises(RushesError, match="disk is full"):
        session.answer("ada", task, "tie")
    monkeypatch.undo()
    assert file.path.read_text() == text and session.next_task("ada").id == task
    session.answer("ada", task, "tie")
    assert len(read_answers(file.path)[0]) == 2


def test_a_second_server_and_foreign_lines_are_refused(tmp_path, file):
    with pytest.raises(RushesError, match="served by another"):
        AnswerFile(file.path)
    for line, message in (("x", "not valid JSON"), ('{"id": "1"}', "rater"), ('{"undo": "9"}', "rater")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(line + "\n")
        with pytest.raises(InputError, match=f"bad.jsonl, line 1: .*{message}"):
            AnswerFile(bad)
        assert bad.read_text() == line + "\n"
    for name in ("", "  ", "x" * 41, None, "a\x1bb"):
        with pytest.raises(InputError, match="rater"):
            rater_name(name)
    assert rater_name("  Ada  L. ") == "Ada L."


# ------------------------------------------------------------------------------------------------------ server


def asked(folder, talk, hosts=("localhost",)):
    """Runs `talk(client)` with a server of all pairs in the folder; returns the lines that it printed."""
    said = []

    async def main():
        takes, _ = find_takes(folder, folder)
        with closing(AnswerFile(folder / "labels.jsonl")) as answers:
            session = LabelSession(draw_pairs(takes, 10), answers, 0.0, "secret")
            service = LabelService(session, folder, "token", said.append, hosts)
            async with TestClient(TestServer(service.app)) as client:
                await talk(client)

    asyncio.run(main())
    return said


def test_only_those_who_know_the_token_and_the_hosts_name_are_answered(folder):
    async def talk(client):
        async def status(method, path, **how):
            async with client.request(method, path, **how) as reply:
                assert reply.headers["Cache-Control"] == "no-store"
                return reply.status

        answer = {"rater": "ada", "task": "x", "choice": "tie"}
        assert await status("GET", "/token/state?rater=ada") == 200
        assert await status("GET", "/token/") == 200
        for path in ("/", "/tokem/", "/tokem/state?rater=ada", "/state?rater=ada", "/%ff/"):
            assert await status("GET", path) == 401
        assert await status("GET", "/token/", headers={"Host": "evil.example"}) == 421
        assert await status("POST", "/token/answer", data=json.dumps(answer)) == 415
        assert await status("POST", "/token/answer", json=answer) == 422  # no such pair
        assert await status("POST", "/token/answer", json=[1]) == 422
        assert await status("POST", "/token/answer", json=answer | {"rater": ""}) == 422
        for name in ("../labels.jsonl", "..%2flabels.jsonl", "0.png", "x"):
            assert await status("GET", f"/token/media/{name}") == 404

    asked(folder, talk)


def test_takes_are_served_and_one_that_became_a_link_to_elsewhere_is_not(folder):
    (folder.parent / "secret.png").write_bytes((folder / "0.png").read_bytes())

    async def talk(client):
        state = await (await client.get("/token/state?rater=ada")).json()
        sides = [await client.get(f"/token/media/{state['task'][side]}") for side in ("left", "right")]
        contents = [await side.read() for side in sides]
        assert sides[0].headers["Content-Type"] == "image/png" and state["task"]["left_kind"] == "image"
        files = {path.read_bytes(): path for path in folder.glob("*.png")}
        shown = [files[content] for content in contents]
        assert len(set(shown)) == 2 and state["task"]["prompt"] == shown[0].with_suffix(".txt").read_text()
        shown[0].unlink()
        shown[0].symlink_to(folder.parent / "secret.png")
        gone = await client.get(f"/token/media/{state['task']['left']}")
        assert gone.status == 422 and "leads out of" in (await gone.json())["error"]

    asked(folder, talk)


def test_a_corrupt_and_a_vanished_take_get_a_line_each_and_the_rest_goes_on(folder):
    for i in range(4, 10):
        picture(folder / f"{i}.png", 20 * i)
        (folder / f"{i}.txt").write_text("c")

    async def talk(client):
        (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:-20])
        (folder / "5.png").unlink()
        for rater in ("ada", "bob"):
            state = await (await client.get(f"/token/state?rater={rater}")).json()
            while state["task"]:
                body = {"rater": rater, "task": state["task"]["id"], "choice": "tie"}
                state = await (await client.post("/token/answer", json=body)).json()
            assert state["done"] == state["total"] > 3

    said = asked(folder, talk)
    assert len(said) == 2 and "0.png: is corrupt" in "".join(said) and "5.png" in "".join(said)
    names = {side for answer in read_answers(folder / "labels.jsonl")[0] for side in (answer.path_a, answer.path_b)}
    assert not names & {"0.png", "5.png"}


# ------------------------------------------------------------------------------------------------- the command


def test_export_while_labels_are_made_and_a_clip_that_is_gone(capsys, folder):
    async def talk(client):
        state = await (await client.get("/token/state?rater=ada")).json()
        while state["task"]:
            body = {"rater": "ada", "task": state["task"]["id"], "choice": state["task"]["left"]}
            state = await (await client.post("/token/answer", json=body)).json()
        status, text, err = await asyncio.to_thread(run, capsys, "label", folder, "--export")
        assert status == 0 and "2 answers written to" in text, err

    asked(folder, talk)
    rows = list(read_labelled_pairs(folder / "labels.parquet"))
    assert [row.rater for row in rows] == ["ada"] * 2 and rows[0].origin == "rushes label takes" and rows[0].time
    (folder / rows[0].a).unlink()
    status, text, _ = run(capsys, "label", folder, "--export")
    assert status == 0 and text.count("warning: ") == 1 and f"{rows[0].a} is not there" in text
    out = folder / "agreement"
    status, text, err = run(capsys, "agree", folder / "labels.parquet", "-r", "jpeg_compressibility", "-o", out)
    assert status == 1 and "1 of 2 pairs could not be scored" in err and rows[0].a in err and err.count("\n") == 1
    assert "ada" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export"], "there are no answers to export"),
        (["--out", "x.csv"], "must end in .parquet"),
        (["--out", "elsewhere/x.parquet"], "must lie in"),
        (["--rater", " "], "rater: found"),
    ],
)
def test_wrong_arguments_get_one_line(capsys, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder.parent)
    status, _, err = run(capsys, "label", "takes", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_folder_without_two_takes_of_a_prompt_is_refused(capsys, tmp_path):
    picture(tmp_path / "1.png")
    status, _, err = run(capsys, "label", tmp_path)
    assert status == 2 and "no two takes of one prompt" in err and not (tmp_path / "labels.jsonl").exists()
