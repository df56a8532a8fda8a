"""UnifiedReward against a real HTTP server that answers by rule: its wordings, its formats, its tournaments."""

import numpy as np
import pytest
from chat_replies import chat, images, text_of
from http_server import items, levels, run
from PIL import Image

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import PromptItem
from pipeline.rewards.models.rubric import Unparseable, builtin_rubrics, load_rubric, parse_rubric
from pipeline.rewards.runner import build_reward, check_reward
from pipeline.rewards.scorers.unified_reward import VERSIONS, rubric_name


def tournament(media, prompts, **args):
    return build_reward("r", RewardConfig(scorer="tournament", args=args)).run(media, prompts, None)


RATINGS = {  # as the authors show them
    ("1", 1): "a cat (object): 1\nFinal Score: 3.5",
    ("1", 3): "visual quality: 4\nfactual consistency: 2\nFinal Score: 6",
    ("2", 1): "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.3715\nStyle Score (1-5): 2.8025",
    ("2", 3): "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.0987\nStyle Score (1-5): 3.3889",
}
SCORES = {("1", 1): 2.5 / 4, ("1", 3): 5 / 9, ("2", 1): 0.4057250, ("2", 3): 0.4909333}


@pytest.mark.parametrize("version,frames", list(RATINGS))
def test_ratings_in_the_published_words_and_formats(serve, version, frames):
    server = serve(lambda *_: chat(RATINGS[version, frames]))
    args = {"base_url": server.url + "/v1", "version": version}
    result = run("unified_reward", levels(10, 20, frames=frames), items("a {cat}", "猫"), **args)
    np.testing.assert_allclose(result.values, [SCORES[version, frames]] * 2, atol=1e-6)
    payload = server.seen[0]
    kinds = [part["type"] for part in payload["messages"][0]["content"]]
    assert kinds == ["image_url"] * frames + ["text"] and payload["model"] == "UnifiedReward"
    assert any(text_of(p).endswith("[a {cat}]") for p in server.seen)  # the prompt, in brackets, ends the question
    assert ("video" in text_of(payload)) == (frames > 1)


def verdict(version, first, second, kind):
    better = 1 if first > second else 2
    if version == "think":
        return f"<think>{kind} 1 is better? {kind} 2 is better?</think>\n<answer>{kind} {better} is better</answer>"
    if version == "1":
        return f"Both {kind.lower()}s are equally good." if first == second else f"So {kind} {better} is better."
    share = 0.5 + (first - second) / 500
    return "\n\n".join(
        f"{name} Score:\n {kind} 1: {share}\n {kind} 2: {1 - share}" for name in ("Alignment", "Coherence", "Style")
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_tournament_of_pairs(serve, version, frames):
    def reply(path, payload, number):
        seen = images(payload)
        kinds = [part["type"] for part in payload["messages"][0]["content"]]
        assert kinds == ["image_url"] * (2 * frames) + ["text"]  # no labels between the two
        kind = "Image" if frames == 1 else "Video"
        assert f"{kind} 1" in text_of(payload)
        return chat(verdict(version, float(seen[0].mean()), float(seen[-1].mean()), kind))

    server = serve(reply)
    args = {"judge": "unified_reward", "args": {"base_url": server.url + "/v1", "version": version}}
    takes = (20, 120, 220) if version != "1" else (20, 120, 120)
    prompts = [PromptItem(index=0, text="a cat")] * 3
    result = tournament(levels(*takes, frames=frames), prompts, **args)
    expected = {"think": [0, 0.5, 1], "1": [0, 0.75, 0.75], "2": [0.5 - 0.3, 0.5, 0.5 + 0.3]}[version]
    np.testing.assert_allclose(result.values, expected, atol=1e-6)
    assert len(server.seen) == 6 and result.parts["contradictions"].tolist() == [0, 0, 0]


def test_what_cannot_be_read_fails_and_is_never_a_score(serve):
    server = serve(lambda *_: chat("<think>Image 1 is better</think><answer>neither</answer>"))
    args = {"judge": "unified_reward", "args": {"base_url": server.url + "/v1", "version": "think", "attempts": 2}}
    with pytest.raises(RewardError, match="no readable answer in 2 tries: the answer names neither"):
        tournament(levels(1, 2), [PromptItem(index=0, text="a")] * 2, **args)
    with pytest.raises(RewardError, match="Alignment|alignment is not in the answer"):
        run("unified_reward", levels(1), items("a"), base_url=server.url + "/v1")
    with pytest.raises(RewardError, match="only compares; use scorer: tournament"):
        run("unified_reward", levels(1), items("a"), base_url=server.url + "/v1", version="think")
    for bad, message in (
        ({"version": "3"}, "version: found '3'"),
        ({"rubric": "edit"}, "rubric: unified_reward has no such option"),
    ):
        cfg = RewardConfig(scorer="unified_reward", args={"base_url": "http://localhost:1/v1"} | bad)
        with pytest.raises(ConfigError, match=message):
            check_reward("r", cfg)


def test_edit_and_aspect_rubrics(serve, tmp_path):
    Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(tmp_path / "before.png")
    prompt = PromptItem(index=0, text="make it red", image=str(tmp_path / "before.png"))
    server = serve(lambda *_: chat('{\n"reasoning" : "fine",\n"score" : [20, 15],\n}'))
    args = {"base_url": server.url + "/v1", "model": "judge"}
    result = run("vlm_judge", levels(10), [prompt], rubric="unified_reward_edit", **args)
    assert result.values[0] == pytest.approx(17.5 / 25) and result.parts["kept"].tolist() == [15]
    assert [int(picture.mean()) for picture in images(server.seen[0])] == [200, 10]  # source first, then the result
    assert "Editing instruction:make it red" in text_of(server.seen[0])
    names = ("Alignment", "Safety", "Fineness", "Consistency", "Fairness")
    server = serve(lambda *_: chat("\n".join(f"{name}: {i + 2}" for i, name in enumerate(names))))
    args["base_url"] = server.url + "/v1"
    result = run("vlm_judge", levels(10, frames=4), items("a"), rubric="video_aspects", **args)
    assert result.values[0] == pytest.approx((4 - 1) / 9) and result.parts["fairness"].tolist() == [6]


def test_every_rubric_that_unified_reward_needs_ships_and_pairwise_rubrics_are_checked():
    assert all(rubric_name(v, pair=True, clip=c) in builtin_rubrics() for v in VERSIONS for c in (False, True))
    assert "', \nin which" not in load_rubric("unified_reward_1_video").prompt
    assert "[1,2,3,4], \nin which '1'" in load_rubric("unified_reward_1_video").prompt  # the blank is the authors'
    pair = {"mode": "pairwise", "prompt": "which?", "first": "A", "second": "B", "tie": "C"}
    rubric = parse_rubric(pair, "x")
    assert [rubric.read_preference(text) for text in "ABC"] == [1.0, 0.0, 0.5]
    with pytest.raises(Unparseable, match="both"):
        rubric.read_preference("A or C")
    with pytest.raises(ConfigError, match="from the axes or by first"):
        parse_rubric({**pair, "axes": {"a": "(1)"}}, "x")
    with pytest.raises(ConfigError, match="labels: found 3"):
        parse_rubric({**pair, "labels": 3}, "x")
