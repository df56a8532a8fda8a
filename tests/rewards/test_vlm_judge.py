"""VLM judges against real HTTP servers that speak the OpenAI protocol; rubrics; tournaments."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_replies import chat, images, text_of
from http_server import items, levels, run
from PIL import Image

from jobs import cli
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models.pairwise import matches
from pipeline.rewards.models.rubric import Unparseable, builtin_rubrics, load_rubric, parse_rubric
from pipeline.rewards.runner import check_reward


def judge(server, media, prompts, **args):
    return run("vlm_judge", media, prompts, base_url=server.url + "/v1", model="judge", **args)


def test_likert_rubric_asks_once_a_clip_and_brings_the_mean_to_0_1(serve):
    def reply(path, payload, number):
        assert path == "/v1/chat/completions" and payload["model"] == "judge" and payload["temperature"] == 0
        level = images(payload)[0].mean() / 50  # 1..5
        return chat(f"Alignment: {level:g}\nCoherence: 3\nStyle: {level:g}\n")

    server = serve(reply)
    result = judge(server, levels(50, 150, 250, frames=20), items("a {prompt} cat", "猫", ""), frames=8)
    np.testing.assert_allclose(result.values, [(x - 1) / 4 for x in (5 / 3, 3, 13 / 3)], rtol=1e-5)
    np.testing.assert_allclose(result.parts["alignment"], [1, 3, 5])
    assert len(server.seen) == 3 and result.segment_values is None
    assert all(len(images(payload)) == 8 for payload in server.seen)  # all frames in one request
    assert any("asked for: a {prompt} cat" in text_of(payload) for payload in server.seen)


def test_frames_are_evenly_spaced_lossless_and_shrunk_only_if_too_large(serve):
    server = serve(lambda *_: chat("Alignment: 1\nCoherence: 1\nStyle: 1"))
    frames = np.random.default_rng(0).integers(0, 256, (1, 9, 40, 60, 3)).astype(np.uint8)
    judge(server, Media(frames=frames, fps=8), items("a"), frames=3)
    for shown, index in zip(images(server.seen[0]), (1, 4, 7), strict=True):
        np.testing.assert_array_equal(shown, frames[0, index])
    judge(server, Media(frames=frames, fps=8), items("a"), frames=1, max_side=30)
    assert images(server.seen[1])[0].shape == (20, 30, 3)


@pytest.mark.parametrize(
    "text",
    ["", "I would say 4", "Alignment: 9\nCoherence: 3\nStyle: 3", "Alignment: 4\nCoherence: 3",
     "Alignment: 4/5\nCoherence: 3\nStyle: 3", "Alignment: 4\nAlignment: 2\nCoherence: 3\nStyle: 3"],
)  # fmt: skip
def test_unreadable_answers_are_asked_again_and_then_fail(serve, text):
    server = serve(lambda *_: chat(text))
    with pytest.raises(RewardError, match="reward r: the judge judge gave no readable answer in 3 tries"):
        judge(server, levels(1), items("a"))
    assert [p["temperature"] for p in server.seen] == [0, 0.7, 0.7] and [p["seed"] for p in server.seen] == [0, 1, 2]
    good = chat("Alignment: 5\nCoherence: 5\nStyle: 5")
    server = serve(lambda path, payload, number: good if number == 3 else chat(text))
    assert judge(server, levels(1), items("a")).values.tolist() == [1.0]


def test_an_answer_that_was_cut_off_is_not_read(serve):
    server = serve(lambda *_: chat("Alignment: 4\nCoherence: 3\nStyle: 3", finish="length"))
    with pytest.raises(RewardError, match="cut off at max_tokens"):
        judge(server, levels(1), items("a"), attempts=1)


def test_yes_no_rubric_is_the_probability_of_yes_over_all_spellings(serve):
    def reply(path, payload, number):
        assert payload["logprobs"] is True and payload["top_logprobs"] == 20 and payload["max_tokens"] == 1
        return chat("Yes", top=[("Yes", 0.5), (" yes", 0.1), ("No", 0.15), ("Maybe", 0.2), ("nothing", 0.05)])

    result = judge(serve(reply), levels(1, 2), items("a", "b"), rubric="shows_prompt")
    np.testing.assert_allclose(result.values, 0.6 / 0.75, rtol=1e-5)
    for answer, message in (
        (chat("Hm", top=[("Hm", 0.9)]), "none of yes, no is among"),
        (chat("Yes"), "no log-probabilities"),
        (chat("Yes", top=[("Yes", 2.0)]), "above 0"),
    ):
        with pytest.raises(RewardError, match=message):
            judge(serve(lambda *_, a=answer: a), levels(1), items("a"), rubric="shows_prompt")


def brighter(path, payload, number):
    first, second = (image.mean() for image in images(payload))
    return chat(f"<think>long</think>\n<answer>Image {1 if first > second else 2} is better</answer>")


def test_tournament_gives_the_win_rate_within_each_prompts_takes(serve):
    server = serve(brighter)
    prompts = [PromptItem(index=i, text=t) for i, t in ((0, "a"), (1, "b"), (0, "a"), (0, "a"), (1, "b"))]
    result = judge(server, levels(10, 200, 30, 20, 100), prompts, rubric="better_of_two")
    np.testing.assert_allclose(result.values, [0, 1, 1, 0.5, 0])
    assert result.parts["matches"].tolist() == [4, 2, 4, 4, 2] and len(server.seen) == 6 + 2


def test_a_judge_who_always_prefers_the_first_place_prefers_nobody(serve):
    server = serve(lambda *_: chat("<answer>Image 1 is better</answer>"))
    prompts = [PromptItem(index=0, text="a")] * 5
    for opponents in (0, 1, 2):
        result = judge(server, levels(1, 2, 3, 4, 5), prompts, rubric="better_of_two", opponents=opponents)
        np.testing.assert_allclose(result.values, 0.5)


@pytest.mark.parametrize("takes", [2, 3, 4, 8])
@pytest.mark.parametrize("opponents", [0, 1, 2, 3])
def test_matches_are_fair(takes, opponents):
    pairs = matches(takes, opponents)
    assert len(set(pairs)) == len(pairs) and all((b, a) in pairs for a, b in pairs)
    played = Counter(i for pair in pairs for i in pair)
    assert len(set(played.values())) == 1 and len(played) == takes
    if opponents == 0:
        assert len(pairs) == takes * (takes - 1)


def test_tournament_failures(serve):
    with pytest.raises(RewardError, match="two or more takes"):
        judge(serve(brighter), levels(1, 2), items("a", "b"), rubric="better_of_two")
    both = serve(lambda *_: chat("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>"))
    with pytest.raises(RewardError, match="names both"):
        judge(both, levels(1, 2), [PromptItem(index=0, text="a")] * 2, rubric="better_of_two", attempts=2)


def test_edit_rubric_shows_the_source_first(serve, tmp_path):
    Image.new("RGB", (5, 4), (9, 9, 9)).save(tmp_path / "source.png")
    server = serve(lambda *_: chat("Done: 10\nKept: 5"))
    result = judge(server, levels(77), items("make it red", image=str(tmp_path / "source.png")), rubric="edit")
    assert result.values.tolist() == [0.75]
    assert [image.mean() for image in images(server.seen[0])] == [9, 77]
    with pytest.raises(RewardError, match="has no image"):
        judge(server, levels(77), items("make it red"), rubric="edit")


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{}]}, [], {"error": {"message": "no such model"}}])
def test_endpoints_that_do_not_speak_the_protocol(serve, body):
    server = serve(lambda *_: (200, body))
    with pytest.raises(RewardError, match="not a chat completion"):
        judge(server, levels(1, 2, 3), items("a", "b", "c"))


# --------------------------------------------------------------------------------------------- rubrics


def test_shipped_rubrics_load_and_read_the_answers_they_ask_for():
    assert {"alignment_quality", "better_of_two", "edit", "shows_prompt"} <= set(builtin_rubrics())
    for name in builtin_rubrics():
        rubric = load_rubric(name)
        shown = re.sub(r": [XYZ]\b", ": 3", rubric.fill(items("a cat")[0], 1, 8.0))
        if rubric.mode == "likert" and not name.startswith("unified_reward_"):  # theirs: test_unified_reward.py
            assert rubric.read_likert(shown)["score"] > 0


def test_own_rubric_with_weights_metadata_and_system(tmp_path, serve):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "mode: likert\nsystem: Be strict.\nprompt: 'Is {prompt} by {metadata.artist} at {fps} in {frames}? {other}'\n"
        "axes: {a: 'A=(\\d+)', b: 'B=(\\d+)'}\nweights: {a: 3}\nrange: [0, 10]\n"
    )
    server = serve(lambda *_: chat("A=10 B=2"))
    result = judge(server, levels(1, frames=2), items("x", metadata={"artist": "Klee"}), rubric=str(path))
    assert result.values[0] == pytest.approx(0.8)
    assert server.seen[0]["messages"][0] == {"role": "system", "content": "Be strict."}
    assert text_of(server.seen[0]) == "Is x by Klee at 8 in 2? {other}"
    with pytest.raises(RewardError, match="no metadata for"):
        judge(server, levels(1), items("x"), rubric=str(path))


LIKERT = {"mode": "likert", "prompt": "p", "axes": {"a": "(1)"}}


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "expected keys"),
        ({"mode": "likret", "prompt": "p"}, "did you mean likert"),
        ({"mode": "likert", "prompt": " "}, "prompt"),
        ({"mode": "likert", "prompt": "p"}, "axes"),
        (LIKERT | {"axes": {"a": "1"}}, "needs a group"),
        (LIKERT | {"axes": {"a": "("}}, "not a regular expression"),
        (LIKERT | {"range": [5, 1]}, "range"),
        (LIKERT | {"weights": {"b": 1}}, "weights"),
        (LIKERT | {"yes": ["y"]}, "unknown key 'yes'"),
        (LIKERT | {"source": "no"}, "source"),
        (LIKERT | {"max_tokens": 0}, "max_tokens"),
        ({"mode": "yes_no", "prompt": "p", True: ["yes"]}, "unknown key True"),
        ({"mode": "yes_no", "prompt": "p", "yes": [True]}, "truth value"),
        ({"mode": "pairwise", "prompt": "p", "first": "1"}, "second"),
        ({"mode": "rating", "prompt": "p"}, "range: found nothing"),
        ({"mode": "rating", "prompt": "p", "range": [1, 10]}, "expected two digits"),
        (LIKERT | {"system": "Rate {prompt}"}, "system: it is the same for every take"),
        (LIKERT | {"system": 3}, "system: found 3"),
    ],
)
def test_wrong_rubrics_are_config_errors(data, message):
    with pytest.raises(ConfigError, match=f"rubric mine: .*{message}"):
        parse_rubric(data, "mine")


def test_rubrics_are_checked_before_anything_runs(tmp_path):
    def check(rubric):
        args = {"base_url": "http://h/v1", "model": "m", "rubric": rubric}
        check_reward("r", RewardConfig(scorer="vlm_judge", args=args))

    check("edit")
    with pytest.raises(ConfigError, match="did you mean better_of_two"):
        check("better_of_tow")
    (tmp_path / "bad.yaml").write_text("mode: [")
    for path, message in ((tmp_path / "bad.yaml", "not valid YAML"), (tmp_path / "no.yaml", "cannot read")):
        with pytest.raises(ConfigError, match=message):
            check(str(path))


def test_numbers_that_overflow_are_unreadable():
    with pytest.raises(Unparseable, match="outside"):
        parse_rubric(LIKERT | {"axes": {"a": r"(\S+)"}}, "m").read_likert("1e999")
    with pytest.raises(Unparseable, match="outside"):
        parse_rubric(LIKERT | {"axes": {"a": r"(\S+)"}}, "m").read_likert("nan")


def test_rushes_score_shows_the_source_of_an_edit_from_a_table(serve, tmp_path, capsys):
    for name, level in (("before", 9), ("after", 77)):
        Image.new("RGB", (5, 4), (level, level, level)).save(tmp_path / f"{name}.png")
    rows = {"path": ["after.png"] * 2, "prompt": ["make it light", "make it red"], "image": ["before.png", "gone.png"]}
    pq.write_table(pa.table(rows), tmp_path / "edits.parquet")
    server = serve(lambda *_: chat("Done: 10\nKept: 5"))
    options = {"base_url": server.url + "/v1", "model": "judge", "rubric": "edit"}
    args = [part for key, value in options.items() for part in ("--set", f"vlm_judge.args.{key}={value}")]
    out = tmp_path / "scores.parquet"
    assert cli.main(["score", str(tmp_path / "edits.parquet"), "-r", "vlm_judge", "-o", str(out), *args]) == 1
    good, bad = sorted(pq.read_table(out).to_pylist(), key=lambda row: row["prompt"])
    assert good["score"] == 0.75 and "image 'gone.png' is not there" in bad["error"]
    assert [image.mean() for image in images(server.seen[0])] == [9, 77] and len(server.seen) == 1
