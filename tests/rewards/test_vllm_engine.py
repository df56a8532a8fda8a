"""What a judge hands to vLLM's engine and reads from it, with a stand-in for vLLM; the real one: test_vllm_live.py."""

from __future__ import annotations

import math
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from http_server import items, levels
from tiny_qwen import qwen_tokenizer

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, InputError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.batching import Takes, score_groups
from pipeline.rewards.models.vllm_engine import ENVIRONMENT
from pipeline.rewards.runner import build_reward, check_reward

SPELLINGS = ["yes", "Yes", "no", "No", "yesterday"]


class StandIn:
    """`vllm.LLM`: answers each conversation by `reply(pictures, sampling)`: text, or log-probabilities by token id."""

    def __init__(self, reply):
        self.reply, self.settings, self.calls = reply, None, []
        self.tokens = qwen_tokenizer()
        self.tokens.add_tokens(SPELLINGS)

    def __call__(self, **settings):
        self.settings = settings
        return self

    def get_tokenizer(self):
        return self.tokens

    def chat(self, conversations, sampling, use_tqdm):
        assert use_tqdm is False and len(conversations) == len(sampling)
        self.calls.append(list(zip(conversations, sampling, strict=True)))
        return [self._output(c, s) for c, s in self.calls[-1]]

    def _output(self, conversation, sampling):
        pictures = [np.asarray(p["image_pil"]) for p in conversation[-1]["content"] if p["type"] == "image_pil"]
        said = self.reply(pictures, sampling)
        logprobs = None
        if isinstance(said, dict):
            assert sorted(said) == sorted(sampling.logprob_token_ids)
            logprobs, said = [{i: SimpleNamespace(logprob=p) for i, p in said.items()}], "x"
        output = SimpleNamespace(text=said, finish_reason="stop", logprobs=logprobs)
        return SimpleNamespace(outputs=[output], num_cached_tokens=30, prompt_token_ids=[0] * 40)


@pytest.fixture
def vllm(monkeypatch):
    """Puts the stand-in in vLLM's place."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)

    def use(reply, cpu=True):
        stand_in = StandIn(reply)
        top, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        top.LLM, top.SamplingParams = stand_in, lambda **options: SimpleNamespace(**options)
        platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu)
        monkeypatch.setitem(sys.modules, "vllm", top)
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        return stand_in

    return use


def judge(**args):
    return build_reward("r", RewardConfig(scorer="vlm_judge", args={"model": "/models/judge"} | args))


def test_all_takes_of_all_groups_go_in_one_call_one_question_a_clip_rubric_first(vllm):
    engine = vllm(lambda pictures, sampling: dict.fromkeys(sampling.logprob_token_ids, -1.0))
    runner = judge(rubric="shows_prompt", frames=4)
    groups = [Takes(levels(10, 20, frames=9), items("a", "a"), None), Takes(levels(30, frames=9), items("b"), None)]
    outcomes = score_groups(runner, groups)
    assert [len(o.values) for o in outcomes] == [2, 1]
    assert len(engine.calls) == 1 and len(engine.calls[0]) == 3
    for level, (conversation, _) in zip((10, 20, 30), engine.calls[0], strict=True):
        assert [m["role"] for m in conversation] == ["system", "user"]
        assert conversation[0]["content"] == engine.calls[0][0][0][0]["content"]  # the shared prefix
        kinds = [part["type"] for part in conversation[1]["content"]]
        assert kinds == ["image_pil"] * 4 + ["text"]
        assert np.asarray(conversation[1]["content"][0]["image_pil"]).mean() == level
    np.testing.assert_allclose(outcomes[0].parts["cached"], 0.75)


def test_probability_of_yes_over_every_token_that_says_it(vllm):
    chances = {"yes": 0.3, "Yes": 0.2, "no": 0.1, "No": 0.0625}

    def reply(pictures, sampling):
        texts = {i: engine.tokens.decode([i]) for i in sampling.logprob_token_ids}
        assert sorted(texts.values()) == sorted(chances) and sampling.max_tokens == 1 and sampling.temperature == 0
        return {i: math.log(chances[text]) for i, text in texts.items()}

    engine = vllm(reply)
    assert judge(rubric="shows_prompt").run(levels(1), items("a"), None).values[0] == pytest.approx(0.5 / 0.6625)


def test_rating_is_the_mean_digit_under_the_probabilities(vllm):
    def reply(pictures, sampling):
        texts = {i: engine.tokens.decode([i]) for i in sampling.logprob_token_ids}
        assert sorted(texts.values()) == list("12345")
        return {i: math.log({"3": 0.1, "4": 0.3}.get(text, 1e-9)) for i, text in texts.items()}

    engine = vllm(reply)
    values = judge(rubric="rating").run(levels(1), items("a"), None).values
    assert values[0] == pytest.approx((3.75 - 1) / 4, abs=1e-6)


def test_only_unreadable_answers_are_asked_again_and_never_become_a_score(vllm):
    def reply(pictures, sampling):
        shy = pictures[0].mean() == 20 and sampling.seed < 2
        return "hm" if shy else "Alignment: 5\nCoherence: 5\nStyle: 5"

    engine = vllm(reply)
    result = judge().run(levels(10, 20, 30), items("a", "b", "c"), None)
    assert result.values.tolist() == [1, 1, 1] and [len(call) for call in engine.calls] == [3, 1, 1]
    assert [(s.temperature, s.seed) for _, s in engine.calls[1] + engine.calls[2]] == [(0.7, 1), (0.7, 2)]
    with pytest.raises(RewardError, match="the judge /models/judge gave no readable answer in 2 tries"):
        judge(attempts=2).run(levels(10, 20), items("a", "b"), None)


def test_duels_and_unified_reward_use_the_same_engine(vllm):
    def brighter(pictures, sampling):
        better = 1 if pictures[0].mean() > pictures[-1].mean() else 2
        return f"<answer>Image {better} is better</answer>"

    engine = vllm(brighter)
    same = [PromptItem(index=0, text="a")] * 3
    assert judge(rubric="better_of_two").run(levels(10, 30, 20), same, None).values.tolist() == [0, 1, 0.5]
    assert [len(call) for call in engine.calls] == [6] and engine.settings["limit_mm_per_prompt"]["image"][
        "count"
    ] == 16
    args = {"judge": "unified_reward", "args": {"model": "/models/unified", "version": "think"}}
    runner = build_reward("r", RewardConfig(scorer="tournament", args=args))
    assert runner.run(levels(10, 30, 20), same, None).values.tolist() == [0, 1, 0.5]
    assert len(engine.calls) == 2 and engine.settings["model"] == "/models/unified"


def test_a_prompt_with_the_models_own_words_fails_alone(vllm):
    vllm(lambda pictures, sampling: "Alignment: 5\nCoherence: 5\nStyle: 5")
    groups = [Takes(levels(1, 2), items("a", "a <|image_pad|>"), None), Takes(levels(3), items("b"), None)]
    bad, good = score_groups(judge(), groups)
    assert "take 1: the prompt 'a <|image_pad|>' holds <|image_pad|>, which steers the judge" in str(bad)
    assert good.values.tolist() == [1]


def test_safetensors_only_no_code_from_checkpoints_and_little_memory_on_a_cpu(vllm):
    engine = vllm(lambda pictures, sampling: "x")
    judge(frames=3, rubric="edit", max_side=448, engine={"max_model_len": 4096, "dtype": "float32"})
    settings = engine.settings
    assert settings["load_format"] == "safetensors" and settings["trust_remote_code"] is False
    assert settings["limit_mm_per_prompt"] == {"image": {"count": 4, "width": 448, "height": 448}, "video": 0}
    assert settings["enable_prefix_caching"] is True and settings["kv_cache_memory_bytes"] == 2**30
    assert (settings["max_model_len"], settings["dtype"], settings["enforce_eager"]) == (4096, "float32", True)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    engine = vllm(lambda pictures, sampling: "x", cpu=False)
    judge(engine={"tensor_parallel_size": 2})
    assert "kv_cache_memory_bytes" not in engine.settings and engine.settings["distributed_executor_backend"] == "mp"


@pytest.mark.parametrize(
    "args, message",
    [
        ({"engine": {"load_format": "pt"}}, "engine.load_format: cannot be set"),
        ({"engine": {"trust_remote_code": True}}, "engine.trust_remote_code: cannot be set"),
        ({"engine": {"max_model_length": 1}}, "engine.max_model_length: cannot be set; did you mean max_model_len"),
        ({"engine": {"max_model_len": "8k"}}, "engine.max_model_len: found '8k'; expected a whole number"),
        ({"engine": {"max_num_seqs": True}}, "engine.max_num_seqs: found true; expected a whole number"),
        ({"engine": "fast"}, "engine: found 'fast'"),
        ({"engine": {"dtype": "float32"}, "base_url": "http://h/v1"}, "engine: its options are for vLLM"),
        ({"parallel": 4}, "parallel: only an endpoint has it; set base_url too"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(args, message):
    with pytest.raises(ConfigError, match=f"rewards.r: {message}"):
        check_reward("r", RewardConfig(scorer="vlm_judge", args={"model": "m"} | args))


def test_unified_reward_wants_an_endpoint_or_weights():
    with pytest.raises(ConfigError, match="rewards.r: base_url: set it to where UnifiedReward is served, or `model`"):
        check_reward("r", RewardConfig(scorer="unified_reward"))


def test_what_cannot_run_says_why(vllm, monkeypatch, tmp_path):
    vllm(lambda *_: "x")
    rubric = tmp_path / "r.yaml"
    rubric.write_text('mode: yes_no\nprompt: p\n"yes": ["absolutely"]\n"no": ["no"]\n')
    with pytest.raises(ConfigError, match="no single token of /models/judge says 'absolutely'; use other words"):
        judge(rubric=str(rubric))

    def refuses(**settings):
        raise ValueError("too little\nmemory")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuses)
    with pytest.raises(InputError, match="judge /models/judge: vLLM could not start: ValueError: too little memory"):
        judge()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM is not in this environment: make one that has it"):
        judge()


def test_frames_are_shrunk_as_for_an_endpoint(vllm):
    engine = vllm(lambda pictures, sampling: "Alignment: 5\nCoherence: 5\nStyle: 5")
    frames = np.random.default_rng(0).integers(0, 256, (1, 1, 40, 60, 3)).astype(np.uint8)
    judge(max_side=30).run(Media(frames=frames, fps=8), items("a"), None)
    assert engine.calls[0][0][0][1]["content"][0]["image_pil"].size == (30, 20)
