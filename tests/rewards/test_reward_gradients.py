"""Scores with gradients: they agree with the server's, their gradients with finite differences."""

import re

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from doc_examples import ROOT
from pixel_gradients import as_pixels, check_slope, finite_difference, gap_to_server

from pipeline.config.sections.rewards import RewardConfig, SegmentsConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media
from pipeline.rewards.base import Scorer
from pipeline.rewards.gradients import check_gradient
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.images import Preprocess, preprocess
from pipeline.rewards.registry import scorer_class, scorer_names
from pipeline.rewards.runner import build_reward

PROMPTS = tiny.items("a red cat", "a blue mat", "a cat on the mat")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny.clip(tmp_path_factory.mktemp("clip"), std=0.1))


def reward(clip, name="r", segments=None, **args):
    segments = SegmentsConfig(**(segments or {}))
    return build_reward(name, RewardConfig(scorer="clip_score", args={"model": clip, **args}, segments=segments))


def clips(frames=9, height=32, width=32):
    media = [tiny.pictures(3, height, width, seed=seed).frames for seed in range(frames)]
    return Media(frames=np.concatenate(media, axis=1), fps=8.0)


@pytest.mark.parametrize(("shape", "gap"), [((32, 32), 1e-6), ((45, 72), 5e-4), ((128, 96), 5e-4), ((20, 24), 5e-4)])
def test_clip_score_agrees_with_the_server(clip, shape, gap):
    """At the model's own size to float32; elsewhere the server rounds to 8 bits after PIL's resize. Measured: 2.7e-4,
    3.4e-4 and 3.8e-4 with cosines 0.15 apart."""
    runner = reward(clip)
    for seed in range(4):
        media = tiny.pictures(3, *shape, seed=seed)
        assert gap_to_server(runner, media, PROMPTS) < gap
        assert np.ptp(runner.run(media, PROMPTS, None).values) > 20 * gap


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("shape", [(45, 72), (128, 96), (20, 24), (32, 90)])
def test_pixels_are_resized_as_by_pil_within_a_level_of_255(fit, shape):
    media, p = tiny.pictures(2, *shape), Preprocess(size=32, fit=fit, odd="round")
    server, learner = preprocess(media.frames[:, 0], p), preprocess(as_pixels(media)[:, 0], p)
    levels = (server - learner).abs() * torch.tensor(p.std)[:, None, None] * 255
    assert levels.max() < 1.2 and levels.mean() < 0.5


def test_the_gradient_is_that_of_finite_differences(clip):
    runner = reward(clip, scale=10)
    check_slope(runner, tiny.pictures(3, 40, 56), PROMPTS)
    assert not any(p.requires_grad for p in runner.scorer.clip.model.parameters())


@pytest.mark.parametrize("segments", [
    {}, {"normalize": False, "frames": 2}, {"aggregate": "min"}, {"aggregate": 0.5, "frames": 2},
    {"aggregate": 0.5, "normalize": False}, {"attenuation": 0.0, "count": 3},
])  # fmt: skip
@pytest.mark.parametrize("seed", [3, None])
def test_clips_have_the_servers_frames_weights_and_segments(clip, segments, seed):
    media, runner = clips(), reward(clip, segments=segments)
    server = runner.run(media, PROMPTS, seed)
    pixels = as_pixels(media)
    learner = runner.gradient(pixels, PROMPTS, seed)
    np.testing.assert_allclose(learner.detach().numpy(), server.values, atol=1e-6)
    learner.sum().backward()
    looked_at = runner.looks_at(9, seed)
    np.testing.assert_array_equal(looked_at, server.segment_frames.reshape(-1))
    weights = np.broadcast_to(server.segment_weights, server.segment_values.shape)
    touched = np.zeros((3, 9), bool)
    for take in range(3):
        touched[take, server.segment_frames[weights[take] > 0].reshape(-1)] = True
    assert ((pixels.grad.abs().amax(dim=(2, 3, 4)) > 0).numpy() == touched).all()

    only = pixels.detach()[:, looked_at].requires_grad_()
    again = runner.gradient(only, PROMPTS, seed, clip_frames=9)
    again.sum().backward()
    torch.testing.assert_close(again, learner)
    torch.testing.assert_close(only.grad, pixels.grad[:, looked_at])
    with pytest.raises(RewardError, match="got 9 frames of a clip of 12; expected the"):
        runner.gradient(pixels, PROMPTS, seed, clip_frames=12)


def test_weights_are_constants_of_the_gradient(clip):
    """The worst segment is chosen by the scores; the choice itself is not differentiated. Two are 0.0016 apart."""
    media = clips(8)
    runner = reward(clip, segments={"aggregate": "min", "normalize": False, "attenuation": 0.2}, scale=10)
    pixels = as_pixels(media)
    slope, product = finite_difference(lambda x: runner.gradient(x, PROMPTS, None).sum(), pixels, eps=0.002)
    assert slope == pytest.approx(product, rel=0.01) and product > 1


def test_a_reward_that_does_not_apply_gives_nan_and_no_gradient(clip):
    runner = reward(clip, name="match")
    prompts = tiny.items("a", "b", "c")
    prompts[1] = tiny.items("b", metadata={"rewards": ["other"]})[0]
    media = tiny.pictures(3, 32, 32)
    pixels = as_pixels(media)
    scores = runner.gradient(pixels, prompts, None)
    np.testing.assert_allclose(scores.detach().numpy(), runner.run(media, prompts, None).values, atol=1e-6)
    scores.nansum().backward()
    assert (pixels.grad.flatten(1).abs().amax(dim=1) > 0).tolist() == [True, False, True]
    none = runner.gradient(pixels, [prompts[1]] * 3, None)
    assert none.isnan().all()
    pixels.grad = None
    none.nansum().backward()
    assert not pixels.grad.any()


def test_batches_are_computed_again_in_the_backward_pass(clip):
    """The gradient is the same, and no more than one batch's activations are held."""
    media = tiny.pictures(7, 32, 32)
    prompts = [PROMPTS[0]] * 7
    gradients = []
    for batch in (2, 7):
        pixels = as_pixels(media)
        reward(clip, batch=batch).gradient(pixels, prompts, None).sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients)

    calls = []

    def square(x):
        calls.append((len(x), torch.is_grad_enabled()))
        return (x**2).sum(dim=1)

    x = torch.ones(5, 3, requires_grad=True)
    out = in_batches(square, x, 2)
    assert [n for n, _ in calls] == [2, 2, 1]
    out.sum().backward()
    assert [n for n, _ in calls] == [2, 2, 1, 1, 2, 2] and torch.equal(x.grad, 2 * x.detach())
    with torch.no_grad():
        in_batches(square, x, 2)
    assert len(calls) == 9


def test_bfloat16_and_autocast(clip):
    media = tiny.pictures(3, 32, 32)
    exact = reward(clip).run(media, PROMPTS, None).values
    with torch.autocast("cpu", torch.bfloat16):
        plain = reward(clip).gradient(as_pixels(media), PROMPTS, None)
    np.testing.assert_allclose(plain.detach().numpy(), exact, atol=1e-6)
    pixels = as_pixels(media)
    half = reward(clip, dtype="bfloat16").gradient(pixels.to(torch.bfloat16), PROMPTS, None)
    half.sum().backward()
    assert half.dtype == torch.float32 and pixels.grad.abs().max() > 0
    np.testing.assert_allclose(half.detach().numpy(), exact, atol=0.03)


def test_wrong_pixels_are_one_line(clip):
    runner, pixels = reward(clip), torch.zeros(2, 1, 3, 8, 8)
    for bad, message in (
        (pixels.to(torch.uint8), r"got pixels torch.uint8 \[2, 1, 3, 8, 8\]; expected float"),
        (pixels[:, 0], r"expected float \[K, F, 3, H, W\]"),
        (torch.full_like(pixels, torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(RewardError, match=message):
            runner.gradient(bad, PROMPTS[:2], None)
    with pytest.raises(RewardError, match="3 prompts for 2 takes"):
        runner.gradient(pixels, PROMPTS, None)


def test_a_reward_without_gradients_is_refused_before_any_model_is_loaded():
    check_gradient("match", RewardConfig(scorer="clip_score", args={"model": "/nowhere"}))
    for options, message in (
        ({"scorer": "jpeg_compressibility"}, "rewards.r.gradient: jpeg_compressibility has no gradient: "),
        ({"scorer": "clip_score", "score_repeats": 3}, "rewards.r.score_repeats: found 3"),
        ({"scorer": "clip_score", "runtime_env": {"env_vars": {}}}, "rewards.r.runtime_env: found"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_gradient("r", RewardConfig(**options))


OWN = """
def redness(pixels, prompt, gain=1.0):
    red, green, blue = pixels.mean(dim=(0, 2, 3))
    return gain * (red - (green + blue) / 2)
redness.takes = "pixels"

def joined(pixels, prompts, metadata):
    return pixels.mean(dim=(1, 2, 3, 4)) * len(metadata)
joined.takes, joined.batched, joined.reads = "pixels", True, "video"

def number(pixels, prompt):
    return 1.0
number.takes = "pixels"

def timed(pixels, prompt, fps):
    return pixels.mean()
timed.takes = "pixels"

def plain(frames, prompt):
    return frames.mean()
"""


def own(folder, name, **options):
    (folder / "mine.py").write_text(OWN)
    return RewardConfig(scorer=f"{folder / 'mine.py'}:{name}", **options)


def test_own_functions_of_pixels(tmp_path):
    media, config = clips(4, 8, 8), own(tmp_path, "redness", args={"gain": 3.0})
    check_gradient("red", config)
    runner = build_reward("red", config)
    assert gap_to_server(runner, media, PROMPTS) < 1e-6
    check_slope(runner, media, PROMPTS)
    joined = build_reward("all", own(tmp_path, "joined"))
    assert gap_to_server(joined, media, PROMPTS) < 1e-6 and joined.looks_at(4, 0).tolist() == [0, 1, 2, 3]
    check_slope(joined, media, PROMPTS)

    with pytest.raises(ConfigError, match="rewards.p.gradient: .*plain has no gradient: the function takes 8-bit"):
        check_gradient("p", own(tmp_path, "plain"))
    with pytest.raises(ConfigError, match="a function that takes pixels is not given fps"):
        check_gradient("t", own(tmp_path, "timed"))
    number = build_reward("n", own(tmp_path, "number"))
    for call in (lambda: number.run(media, PROMPTS, 0), lambda: number.gradient(as_pixels(media), PROMPTS, 0)):
        with pytest.raises(RewardError, match="reward n: .*instead of a tensor of one number"):
            call()


def test_wrapped_rewards(clip):
    scaled = {"scorer": "clip_score", "args": {"model": clip}, "shift": 0.1, "scale": 0.5, "high": 0.2}
    runner = build_reward("r", RewardConfig(scorer="scaled", args=scaled))
    media = tiny.pictures(3, 32, 32)
    values = runner.run(media, PROMPTS, None).values
    assert gap_to_server(runner, media, PROMPTS) < 1e-5 and (values == np.float32(0.2)).sum() == 1
    pixels = as_pixels(media)
    runner.gradient(pixels, PROMPTS, None).sum().backward()
    touched = pixels.grad.flatten(1).abs().amax(dim=1) > 0
    assert touched.tolist() == (values < 0.2).tolist()  # no slope beyond the bound

    check_gradient("r", RewardConfig(scorer="scaled", args=scaled))
    for args, message in (
        ({"scorer": "scaled", "args": {**scaled, "scorer": "ocr", "args": {}}}, "text recogniser is an ONNX file"),
        ({"scorer": "binary", "args": {"scorer": "clip_score", "threshold": 0.2}}, "use scaled"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_gradient("r", RewardConfig(**args))


def table_rows(text):
    """(names, cells by column) of every row of the tables that have a column `gradient`."""
    columns = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "gradient" in cells:
            columns = cells
        elif columns and len(cells) == len(columns) and set(cells[0]) != {"-"}:
            yield re.findall(r"`([^`]+)`", cells[0]), dict(zip(columns, cells, strict=True))
        elif not cells:
            columns = []


def test_the_docs_say_which_scorers_have_gradients():
    said = {}
    for names, cells in table_rows((ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")):
        said |= dict.fromkeys(names, cells["gradient"])
    assert said.pop("file.py:function") == '`takes = "pixels"`' and said.pop("scaled") == "as wrapped"
    notes = {name: scorer_class(name).gradient_note for name in scorer_names() if name != "scaled"}
    assert said == {name: "no" if note else "yes" for name, note in notes.items()}
    for name, note in notes.items():
        cls = scorer_class(name)
        assert (cls.score_pixels is Scorer.score_pixels) == bool(note) or name == "binary", name
        assert not note or ("use " in note and "\n" not in note), name
