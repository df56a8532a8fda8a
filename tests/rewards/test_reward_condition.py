"""Condition consistency: edges against OpenCV, the comparisons on worked examples, extractors on random weights."""

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from pixel_gradients import as_pixels, check_slope, gap_to_server
from reward_math import normalised, pil, run
from transformers import (
    CLIPImageProcessorPil,
    GLPNConfig,
    GLPNForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.models.glpn.image_processing_pil_glpn import GLPNImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media
from pipeline.rewards.models.canny import canny
from pipeline.rewards.models.pixel_processor import PixelProcessor
from pipeline.rewards.models.soft_maps import depth_agreement, edge_probability, soft_f1, soft_mean_iou
from pipeline.rewards.runner import build_reward
from pipeline.rewards.scorers.condition import f1, mean_iou, normalised_rmse


def shapes(seed=0, height=60, width=80):
    """Discs and bars on a gradient, slightly noisy."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 1.5, y * 2.0, x + y], -1).astype(float)
    for _ in range(4):
        cx, cy, r = rng.uniform(10, width - 10), rng.uniform(10, height - 10), rng.uniform(5, 14)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.uniform(0, 255, 3)
    return (picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_opencvs(seed):
    cv2 = pytest.importorskip("cv2")
    for frame in (shapes(seed), tiny.pictures(1, 50, 70, seed).frames[0, 0]):
        expected = cv2.Canny(frame, 100, 200) > 0
        assert expected.any()
        np.testing.assert_array_equal(canny(frame, 100, 200), expected)


def test_edges_of_flat_and_tiny_pictures():
    assert not canny(np.full((9, 9, 3), 77, np.uint8), 100, 200).any()
    assert canny(np.zeros((1, 1, 3), np.uint8), 100, 200).shape == (1, 1)


def save(folder, name, array):
    Image.fromarray(array.astype(np.uint8)).save(folder / name)
    return str(folder / name)


def test_a_picture_keeps_to_its_own_edges_and_not_to_anothers(tmp_path):
    frames = np.stack([shapes(0), shapes(1)])[:, None]
    path = save(tmp_path, "edges.png", canny(frames[0, 0], 100, 200) * 255)
    values = run("condition", Media(frames=frames, fps=1), tiny.items("a", "a", image=path), kind="edges").values
    assert values[0] == 1.0 and values[1] < 0.5
    named = tiny.items("a", "a", image="no.png", files={"condition": (path,)})
    np.testing.assert_array_equal(run("condition", Media(frames=frames, fps=1), named, kind="edges").values, values)


def test_comparisons_on_worked_examples():
    a, b = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool)
    assert f1(a, b) == 0.5 and f1(a, a) == 1.0 and f1(a & False, b & False) == 1.0 and f1(a, ~a) == 0.0
    given = np.array([[0, 0, 1, 1, 255]])
    assert mean_iou(np.array([[0, 0, 1, 1, 7]]), given) == 1.0  # class 255 does not count
    assert mean_iou(np.array([[0, 1, 1, 1, 0]]), given) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(RewardError, match="no pixel that counts"):
        mean_iou(given, np.full_like(given, 255))
    depth = np.array([[1.0, 2.0, 3.0]])
    assert normalised_rmse(depth, 10 * depth + 5) == pytest.approx(0)
    assert normalised_rmse(depth, -depth) == pytest.approx((2 / 3) ** 0.5)
    assert normalised_rmse(depth, np.zeros_like(depth)) == pytest.approx((1.25 / 3) ** 0.5)


TINY = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip


def segmenter(folder):
    torch.manual_seed(0)
    model = tiny.spread(SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, **TINY)), 0)
    model.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def depth_model(folder):
    torch.manual_seed(0)
    model = tiny.spread(GLPNForDepthEstimation(GLPNConfig(**TINY)), 1)
    model.save_pretrained(folder)
    GLPNImageProcessorPil(size_divisor=32).save_pretrained(folder)
    return model


def test_segmentation_matches_the_model_run_by_hand(tmp_path):
    model = segmenter(tmp_path)
    media, paths, expected = tiny.pictures(2, 40, 60), [], []
    for i, picture in enumerate(pil(media)):
        square = picture.resize((32, 32), Image.Resampling.BILINEAR)
        pixels = normalised([square], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(pixels).logits, (40, 60), mode="bilinear")
        predicted = logits[0].argmax(0).numpy()
        given = np.where(np.arange(60) < 30, predicted, 3)
        paths.append(save(tmp_path, f"{i}.png", given))
        expected.append(mean_iou(predicted, given))
    prompts = [tiny.items("a", image=path)[0] for path in paths]
    values = run("condition", media, prompts, kind="segmentation", model=str(tmp_path)).values
    np.testing.assert_allclose(values, expected, atol=0.01)  # a pixel on a border may fall to the other side
    assert 0 < values[0] < 1


def test_depth_matches_the_model_run_by_hand(tmp_path):
    model = depth_model(tmp_path)
    media = tiny.pictures(1, 64, 96)
    with torch.no_grad():
        x = torch.from_numpy(media.frames[:, 0]).permute(0, 3, 1, 2) / 255
        depth = torch.nn.functional.interpolate(model(x).predicted_depth[:, None], (64, 96), mode="bilinear")[0, 0]
    depth = depth.numpy()
    unit = (depth - depth.min()) / np.ptp(depth)
    same, turned = (save(tmp_path, f"{i}.png", 255 * u) for i, u in enumerate((unit, 1 - unit)))
    close, far = (
        run("condition", media, tiny.items("a", image=p), kind="depth", model=str(tmp_path)).values[0]
        for p in (same, turned)
    )
    assert close > 0.99 and far == pytest.approx(1 - np.sqrt(np.mean((2 * unit - 1) ** 2)), abs=0.01)


def test_failures(tmp_path):
    media = Media(frames=shapes()[None, None], fps=1)
    with pytest.raises(RewardError, match="no condition picture"):
        run("condition", media, tiny.items("a"), kind="edges")
    with pytest.raises(RewardError, match="cannot be read"):
        run("condition", media, tiny.items("a", image=str(tmp_path / "no.png")), kind="edges")
    for args, message in (
        ({"kind": "edge"}, "did you mean edges"),
        ({"kind": "depth"}, "depth needs one"),
        ({"kind": "edges", "model": "m"}, "edges need none"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("condition", media, tiny.items("a"), **args)


# ------------------------------------------------------------------------------------------- gradients


def reward(**args):
    return build_reward("r", RewardConfig(scorer="condition", args=args))


def climbed(runner, media, prompts, steps, rate):
    """The server's scores of the pictures before and after some steps along the gradient."""
    pixels = as_pixels(media)
    optimiser = torch.optim.Adam([pixels], rate)
    for _ in range(steps):
        optimiser.zero_grad()
        (-runner.gradient(pixels.clamp(0, 1), prompts, None).sum()).backward()
        optimiser.step()
    frames = (pixels.detach().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    return runner.run(media, prompts, None).values, runner.run(Media(frames=frames, fps=1), prompts, None).values


def test_soft_comparisons_are_the_hard_ones_where_all_is_certain():
    a, b = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[True, False, True, False]])
    assert soft_f1(a, b) == 0.5 and soft_f1(a, a > 0) == 1 and soft_f1(0 * a, b & False) == 1
    assert soft_f1(a / 2, a > 0) == pytest.approx(2 / 3)
    given = torch.tensor([[0, 0, 1, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 1, 0]])
    certain = 100.0 * torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1)
    assert float(soft_mean_iou(certain, given, 255)) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert float(soft_mean_iou(0 * certain, given, 255)) == pytest.approx((2 / 3) / (4 / 3 + 2 - 2 / 3))
    depth = torch.tensor([[1.0, 2.0, 3.0]])
    assert float(depth_agreement(depth, -depth)) == pytest.approx(1 - (2 / 3) ** 0.5)
    assert float(depth_agreement(depth, 0 * depth)) == pytest.approx(1 - (1.25 / 3) ** 0.5)
    flat, step = torch.full((1, 3, 5, 8), 0.5), torch.zeros(1, 3, 5, 8)
    step[..., 4:] = 150 / 4 / 255  # |dx| = 150 beside the step
    assert edge_probability(flat, 100, 200).max() < 0.06
    assert edge_probability(step, 100, 200)[0, 2, 3:5].tolist() == pytest.approx([0.5, 0.5])


def test_edges_with_gradients_are_the_servers_and_climbing_them_draws_the_edges(tmp_path):
    path = save(tmp_path, "edges.png", canny(shapes(0), 100, 200) * 255)
    media, prompts = Media(frames=shapes(1)[None, None], fps=1), tiny.items("a", image=path)
    assert gap_to_server(reward(kind="edges"), media, prompts) < 1e-6
    before, after = climbed(reward(kind="edges"), media, prompts, steps=40, rate=0.03)
    assert (after > before + 0.3).all()


def test_depth_with_gradients_is_the_servers(tmp_path):
    depth_model(tmp_path)
    path = save(tmp_path, "depth.png", np.tile(np.linspace(0, 255, 96), (64, 1)))
    runner, prompts = reward(kind="depth", model=str(tmp_path), batch=1), tiny.items("a", "a", image=path)
    assert gap_to_server(runner, tiny.pictures(2, 64, 96), prompts) < 1e-5
    check_slope(runner, tiny.pictures(2, 64, 96), prompts, eps=0.005)


def test_segmentation_with_gradients_is_the_servers_and_climbing_it_pays(tmp_path):
    segmenter(tmp_path)
    given = np.zeros((32, 32))
    given[:, 16:], given[:4] = 3, 255
    path = save(tmp_path, "classes.png", given)
    runner, prompts = reward(kind="segmentation", model=str(tmp_path)), tiny.items("a", "a", image=path)
    media = tiny.pictures(2, 32, 32)
    assert gap_to_server(runner, media, prompts) < 1e-6
    before, after = climbed(runner, media, prompts, steps=40, rate=0.02)
    assert (after > before + 0.2).all()


def test_a_processor_that_does_more_than_resize_is_refused(tmp_path):
    pixels = as_pixels(tiny.pictures(1, 40, 60))[:, 0]
    plain = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    assert PixelProcessor(plain)(pixels).shape == (1, 3, 32, 32)
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24})
    with pytest.raises(RewardError, match="CLIPImageProcessorPil does more than resize and normalise"):
        PixelProcessor(cropping)(pixels)
