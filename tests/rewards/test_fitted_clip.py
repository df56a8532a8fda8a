"""Rewards fitted to labelled pairs: the model of ties, the fit on people of known taste, the scorer and its folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from pixel_gradients import check_slope, gap_to_server
from safetensors.torch import load_file, save_file

from pipeline.config.schema import RewardConfig
from pipeline.config.sections.rewards import SegmentsConfig
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.preference_statistics import hits
from pipeline.core.types import Media
from pipeline.rewards.fitting.embed import embed_takes
from pipeline.rewards.fitting.fit import EmbeddedPairs, fit
from pipeline.rewards.fitting.likelihood import eta_of_tie_share, log_likelihood
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.fitted_head import FittedConfig, FittedHead, features, load_head, save_head
from pipeline.rewards.runner import build_reward, check_reward
from pipeline.rewards.scorers.fitted_clip import probe

PROMPTS = tiny.items("a red cat", "a blue mat", "a cat on the mat")


# ------------------------------------------------------------------------------------------------ the model of ties


@pytest.mark.parametrize("eta", [0.2, 1.5])
def test_the_likelihood_is_rao_and_kuppers(eta):
    """P(a) = p / (p + theta q), P(tie) = (theta^2 - 1) p q / ((p + theta q)(theta p + q)), with p = exp(score)."""
    scores = torch.tensor([[0.0, 0.0], [1.3, -0.4], [-5.0, 2.0], [40.0, 0.0]], dtype=torch.float64)
    p, q, theta = *scores.exp().unbind(1), np.exp(eta)
    expected = {1: p / (p + theta * q), -1: q / (q + theta * p)}
    expected[0] = (theta**2 - 1) * p * q / ((p + theta * q) * (theta * p + q))
    total = 0
    for label, chance in expected.items():
        labels = torch.full((4,), label)
        found = log_likelihood(scores[:, 0] - scores[:, 1], labels, torch.tensor(eta, dtype=torch.float64)).exp()
        torch.testing.assert_close(found, chance)
        total = total + found
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))
    share = torch.tanh(torch.tensor(eta / 2))  # of ties at equal scores
    assert float(expected[0][0]) == pytest.approx(float(share), abs=1e-6)
    assert eta_of_tie_share(float(share)) == pytest.approx(eta, abs=1e-5)


def test_without_ties_it_is_bradley_and_terrys_and_a_swapped_pair_pulls_the_other_way():
    difference = torch.tensor([0.7, -2.0, 0.0], requires_grad=True)
    gradients = []
    for label in (1, -1):
        value = log_likelihood(difference, torch.full((3,), label), torch.tensor(0.0))
        torch.testing.assert_close(value, torch.nn.functional.logsigmoid(label * difference))
        gradients.append(torch.autograd.grad(value.sum(), difference)[0])
    assert gradients[0][2] == 0.5 and gradients[1][2] == -0.5 and (gradients[0] > 0).all() and (gradients[1] < 0).all()


# -------------------------------------------------------------------------------------------------------- the fit

WIDTH = 16


def people(tastes, answers=1200, prompts=60, strength=60.0, eta=0.0, seed=0):
    """Raters who prefer embeddings along a direction of their own, as their model of ties has it; `tastes` [U, D]."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        rows = torch.as_tensor(rng.normal(size=shape), dtype=torch.float32)
        return torch.nn.functional.normalize(rows, dim=-1)

    prompt = rng.integers(prompts, size=answers)
    images, texts = unit(prompts * 6, WIDTH), unit(prompts, WIDTH)
    picks = np.array([rng.choice(6, 2, replace=False) for _ in range(answers)])
    a, b = prompt * 6 + picks[:, 0], prompt * 6 + picks[:, 1]
    rater = rng.integers(len(tastes), size=answers)
    score = (images @ torch.as_tensor(tastes, dtype=torch.float32).T).numpy() * strength / WIDTH**0.5
    difference = score[a, rater] - score[b, rater]
    better, worse = (1 / (1 + np.exp(eta - sign * difference)) for sign in (1, -1))
    draw = rng.random(answers)
    label = np.where(draw < better, 1, np.where(draw < better + worse, -1, 0))
    names = tuple(f"rater {i}" for i in range(len(tastes)))
    return EmbeddedPairs(
        images=images, texts=texts, a=a, b=b, prompt=prompt, label=label, rater=rater, raters=names
    ), difference  # fmt: skip


TASTE = np.eye(WIDTH)[:1]


def test_a_taste_that_clip_does_not_know_is_learnt_with_its_ties():
    pairs, truth = people(TASTE, eta=0.8)
    found = fit(pairs)
    decided = pairs.label != 0
    ceiling = hits(truth, pairs.label)[decided].mean()
    assert hits(found.difference, pairs.label)[decided].mean() > ceiling - 0.03
    assert abs(hits(found.base, pairs.label)[decided].mean() - 0.5) < 0.08
    assert found.eta == pytest.approx(0.8, abs=0.2) and found.mixtures.numel() == 0
    written = (pairs.differences() @ found.heads[0]).numpy()
    for difference in (found.difference, written):
        assert 0.7 < np.polyfit(truth, difference, 1)[0] < 1.3  # in log-odds, so that chances can be read from it


def test_what_is_reported_of_a_prompt_has_not_seen_its_labels():
    """With labels drawn by a coin per prompt and take there is nothing to learn; a fit that knew them would shine."""
    pairs, _ = people(TASTE, answers=300, strength=0.0)
    found = fit(pairs)
    assert abs(hits(found.difference, pairs.label).mean() - 0.5) < 0.09
    everything = pairs.differences() @ found.heads[0]
    assert np.abs(found.difference).mean() < 0.6 and everything.shape == (300,)


def test_flipped_labels_give_the_opposite_reward():
    pairs, _ = people(TASTE, answers=400)
    flipped = EmbeddedPairs(**{**pairs.__dict__, "label": -pairs.label})
    torch.testing.assert_close(fit(pairs).heads, -fit(flipped).heads, atol=1e-3, rtol=1e-3)


def test_raters_of_opposite_tastes_are_each_served():
    pairs, truth = people(np.concatenate([TASTE, -TASTE]), answers=800)
    shared, apart = fit(pairs), fit(pairs, heads=2)
    assert hits(shared.difference, pairs.label).mean() < 0.6
    for rater in range(2):
        mine = pairs.rater == rater
        ceiling = hits(truth, pairs.label)[mine].mean()
        assert hits(apart.difference, pairs.label)[mine].mean() > ceiling - 0.06
    assert apart.mixtures.shape == (2, 2)
    torch.testing.assert_close(apart.mixtures.sum(dim=1), torch.ones(2))


def test_a_few_answers_place_a_new_rater_among_the_heads():
    known = fit(people(np.concatenate([TASTE, -TASTE]), answers=800)[0], heads=2)
    few, _ = people(-TASTE, answers=16, prompts=8, seed=5)
    found = fit(few, known=known.heads)
    torch.testing.assert_close(found.heads, known.heads)
    more, truth = people(-TASTE, answers=400, seed=6)
    scored = (more.differences() @ (found.mixtures[0] @ known.heads)).numpy()
    assert hits(scored, more.label).mean() > hits(truth, more.label).mean() - 0.08
    alone = (more.differences() @ fit(few).heads[0]).numpy()  # the same answers, without the others' heads
    assert hits(scored, more.label).mean() > hits(alone, more.label).mean() + 0.1


@pytest.mark.parametrize(("change", "message"), [({"prompt": 0}, "all of one prompt"), ({"label": 0}, "are ties")])
def test_labels_that_teach_nothing_are_refused(change, message):
    pairs, _ = people(TASTE, answers=20)
    changed = {name: np.full(20, value) for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        fit(EmbeddedPairs(**{**pairs.__dict__, **changed}))


# -------------------------------------------------------------------------------------------- the scorer, the folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny.clip(tmp_path_factory.mktemp("clip"), std=0.1))


@pytest.fixture(scope="module")
def embedder(clip):
    return ClipEmbedder(clip)


@pytest.fixture
def folder(clip, embedder, tmp_path):
    generator = torch.Generator().manual_seed(3)
    head = FittedHead(
        config=FittedConfig(base=clip, width=24, tie=0.1, users=["ada", "bob"]),
        heads=torch.randn(3, 49, generator=generator), mixtures=torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]),
        probe=probe(embedder),
    )  # fmt: skip
    save_head(tmp_path / "reward", head)
    return tmp_path / "reward"


def reward(folder, segments=None, **args):
    config = RewardConfig(
        scorer="fitted_clip", args={"path": str(folder), **args}, segments=SegmentsConfig(**(segments or {}))
    )
    check_reward("r", config)
    return build_reward("r", config)


def test_the_score_is_the_head_on_the_embeddings(folder, embedder):
    media = tiny.pictures(3, 40, 56)
    images, texts = embedder.images(media.frames[:, 0]), embedder.texts([p.text for p in PROMPTS])[0]
    tensors = load_file(folder / "head.safetensors")
    for user, mixture in (("ada", [1.0, 0, 0]), ("bob", [0, 0.5, 0.5]), (None, [0.5, 0.25, 0.25])):
        weights = torch.tensor(mixture) @ tensors["heads"]
        cosine = (images * texts).sum(1)
        expected = weights[0] * cosine + (images * texts) @ weights[1:25] + images @ weights[25:]
        found = reward(folder, user=user).run(media, PROMPTS, None)
        np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-5)


def test_it_gives_gradients_and_the_servers_score(folder):
    runner = reward(folder)
    assert gap_to_server(runner, tiny.pictures(3, 32, 32), PROMPTS) < 1e-5
    check_slope(runner, tiny.pictures(3, 40, 56), PROMPTS)


@pytest.mark.parametrize("segments", [{}, {"frames": 2, "attenuation": 0.3}, {"count": 3, "normalize": False}])
def test_a_clip_is_fitted_as_its_segments_are_scored(folder, embedder, segments):
    frames = [tiny.pictures(3, 32, 32, seed=seed).frames for seed in range(9)]
    media = Media(frames=np.concatenate(frames, axis=1), fps=8.0)
    images = embed_takes(embedder, media, SegmentsConfig(**segments))
    expected = features(images, embedder.texts([p.text for p in PROMPTS])[0]) @ load_head(folder).weights(None)
    np.testing.assert_allclose(reward(folder, segments).run(media, PROMPTS, None).values, expected, atol=1e-5)


def _change_tensors(path, **changes):
    tensors = {**load_file(path / "head.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "head.safetensors")


def _change_config(path, **changes):
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is not there"),
        (lambda p: (p / "config.json").write_text("[1]"), "is not a JSON object"),
        (lambda p: _change_config(p, width=25), r"heads is float32 \[3, 49\]; expected float32 \[3, 51\]"),
        (lambda p: _change_config(p, width="24"), "'width': input should be a valid integer"),
        (lambda p: _change_config(p, tie=-1.0), "'tie': input should be greater"),
        (lambda p: _change_config(p, code="x"), "'code': extra inputs"),
        (lambda p: _change_config(p, users=["ada"]), r"mixtures is float32 \[2, 3\]; expected float32 \[1, 3\]"),
        (lambda p: _change_config(p, users=[]), "holds heads, mixtures, probe; expected heads, probe"),
        (lambda p: (p / "head.safetensors").write_bytes(b"\x80\x04pickle"), "not a readable safetensors file"),
        (lambda p: _change_tensors(p, heads=None), "holds mixtures, probe"),
        (lambda p: _change_tensors(p, heads=torch.zeros(3, 49).half()), r"heads is float16"),
        (lambda p: _change_tensors(p, heads=torch.full((3, 49), torch.nan)), "heads holds NaN"),
        (lambda p: _change_tensors(p, heads=torch.zeros(())), r"heads is float32 \[\]"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line_before_clip_is_loaded(folder, damage, message, monkeypatch):
    damage(folder)
    monkeypatch.setattr("pipeline.rewards.scorers.fitted_clip.ClipEmbedder", None)
    with pytest.raises(ConfigError, match=message) as caught:
        reward(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("rewards.r.args.path: ")


def test_other_users_versions_and_models_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="args.user: found 'adda', .*did you mean ada"):
        reward(folder, user="adda")
    with pytest.raises(ConfigError, match="args.digest: found .*another version"):
        reward(folder, digest="0" * 16)
    assert reward(folder, digest=load_head(folder).digest)
    other = tiny.clip(tmp_path / "other", seed=5, std=0.1)
    with pytest.raises(InputError, match="is not the CLIP that the head was fitted on"):
        reward(folder, model=str(other))
    with pytest.raises(ConfigError, match="args.path: found 3"):
        build_reward("r", RewardConfig(scorer="fitted_clip", args={"path": 3}))
