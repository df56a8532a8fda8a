"""GenEval's rules on worked examples, and the detector and colour parts on small random weights."""

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection, CLIPModel
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models.geneval_rules import COLORS, Detection, check_metadata, iou, judge, keep, relations
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD
from pipeline.rewards.runner import build_reward


def box(x, y, w=10.0, h=10.0):
    """Around its centre."""
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def found(label, *boxes, score=0.95):
    return [Detection(label, score, b) for b in boxes]


def no_colors(_boxes):
    raise AssertionError("no colour was asked for")


def verdict(objects, include, exclude=(), colors=no_colors):
    return judge(objects, {"include": list(include), "exclude": list(exclude)}, colors)


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


@pytest.mark.parametrize(
    "a, expected",
    [
        (box(0, 50), {"left of"}),
        (box(100, 50), {"right of"}),
        (box(50, 0), {"above"}),  # y points downwards
        (box(50, 100), {"below"}),
        (box(0, 0), {"left of", "above"}),
        (box(100, 90), {"right of", "below"}),
        (box(50, 50), set()),
        (box(51.9, 50), set()),  # an offset below 0.1 * (10 + 10)
        (box(53.9, 50), set()),  # 1.9 / 3.9 < 0.5: divided by the distance before shortening
        (box(54.1, 50), {"right of"}),  # 2.1 / 4.1 > 0.5
        (box(100, 20), {"right of"}),  # 28 / 58 < 0.5 upwards
        (box(100, 15), {"right of", "above"}),  # 33 / 61
    ],
)
def test_relations_on_worked_examples(a, expected):
    assert relations(a, box(50, 50)) == expected


def test_relations_shrink_by_both_sizes_along_each_axis():
    wide = box(100, 50, w=400, h=10)
    assert relations(wide, box(50, 50)) == set()  # offset 50, shortened by 0.1 * 410 = 41: 9 / 50
    assert relations(box(100, 50, w=140), box(50, 50)) == {"right of"}  # shortened by 15: 35 / 50


def test_relations_against_the_plain_formula():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (tuple(np.sort(rng.uniform(0, 100, (2, 2)), axis=0).ravel()) for _ in range(2))
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
        ox, oy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
        sx = max(abs(ox) - 0.1 * (ax1 - ax0 + bx1 - bx0), 0) / (ox * ox + oy * oy) ** 0.5
        sy = max(abs(oy) - 0.1 * (ay1 - ay0 + by1 - by0), 0) / (ox * ox + oy * oy) ** 0.5
        expected = {"right of" if ox > 0 else "left of"} if sx > 0.5 else set()
        expected |= {"below" if oy > 0 else "above"} if sy > 0.5 else set()
        assert relations(a, b) == expected


def test_iou_counts_edge_pixels_as_genevals():
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((0, 0, 9, 9), (20, 20, 29, 29)) == 0.0


def test_keep_thresholds_ranks_and_limits():
    detections = [Detection("dog", s, box(i, 0)) for i, s in enumerate((0.3, 0.31, 0.95, 0.9, 0.91))]
    assert [d.score for d in keep(detections, counting=False)["dog"]] == [0.95, 0.91, 0.9, 0.31]  # above, not at
    assert [d.score for d in keep(detections, counting=True)["dog"]] == [0.95, 0.91]
    assert keep(detections[:1], counting=False) == {}
    crowd = [Detection("dog", 0.5 + i / 100, box(i, 0)) for i in range(30)]
    kept = keep(crowd + found("cat", box(0, 0)), counting=False)
    assert len(kept["dog"]) == 16 and kept["dog"][0].score == 0.79 and len(kept["cat"]) == 1


def test_keep_drops_overlapping_boxes_only_if_asked():
    twice = found("dog", box(0, 0), box(1, 0)) + found("cat", box(0, 0))
    assert len(keep(twice, counting=False)["dog"]) == 2
    kept = keep(twice, counting=False, max_overlap=0.5)
    assert len(kept["dog"]) == 1 and len(kept["cat"]) == 1


def test_counts_are_at_least_and_too_many_fail_by_exclusion():
    dogs = {"dog": found("dog", box(0, 0), box(50, 0), box(90, 0))}
    assert verdict(dogs, [clause("dog", 3)]).correct
    assert verdict(dogs, [clause("dog", 2)]).correct  # GenEval's include is a lower bound …
    over = verdict(dogs, [clause("dog", 2)], [clause("dog", 3)])  # … and its files exclude N + 1
    assert not over.correct and over.reasons == ("expected dog<3, found 3",)
    assert over.partial == pytest.approx((1 + 1 / 2) / 2)
    few = verdict(dogs, [clause("dog", 4)], [clause("dog", 5)])
    assert not few.correct and few.partial == pytest.approx((3 / 4 + 1) / 2)
    nothing = verdict({}, [clause("dog", 4)])
    assert not nothing.correct and nothing.partial == 0


def test_all_includes_must_hold_and_no_exclude_may():
    objects = {"dog": found("dog", box(0, 0)), "cat": found("cat", box(50, 0))}
    assert verdict(objects, [clause("dog"), clause("cat")]).correct
    assert not verdict(objects, [clause("dog"), clause("tie")]).correct
    assert not verdict(objects, [clause("dog")], [clause("tie"), clause("cat")]).correct


def test_colours_count_only_among_the_most_confident_n():
    objects = {"dog": [Detection("dog", 0.9 - i / 10, box(10 * i, 0)) for i in range(4)]}
    shown = []

    def colors(boxes):
        shown.append(boxes)
        return ["red", "blue", "red", "red"][: len(boxes)]

    two = verdict(objects, [clause("dog", 2, color="red")], colors=colors)
    assert not two.correct and two.partial == pytest.approx((1 + 1 / 2) / 2) and len(shown[0]) == 2
    assert verdict(objects, [clause("dog", 1, color="red")], colors=colors).correct
    missing = verdict({}, [clause("dog", 1, color="red")])  # no colour is looked at
    assert not missing.correct and missing.partial == 0


def test_positions_are_checked_for_all_pairs_and_against_a_matched_clause():
    left, middle, right = box(0, 0), box(50, 0), box(100, 0)
    include = [clause("dog", 2), clause("cat", 1, position=["right of", 0])]
    good = {"dog": found("dog", left, middle), "cat": found("cat", right)}
    between = {"dog": found("dog", left, right), "cat": found("cat", middle)}
    assert verdict(good, include).correct
    half = verdict(between, include)
    assert not half.correct and half.partial == pytest.approx((1 + 1 + 1 / 2) / 3)
    alone = verdict({"cat": found("cat", right)}, include)
    assert not alone.correct and "no target for cat to be right of" in alone.reasons
    assert verdict(good, [clause("dog", 2), clause("cat", 1, position=["left of", 0])]).reasons == (
        "expected cat left of target",
    )


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "no 'include' list"),
        ({"include": []}, "no 'include' list"),
        ({"include": [{"class": "dog"}]}, "a 'count' of at least 1"),
        ({"include": [clause("dog", 0)]}, "a 'count' of at least 1"),
        ({"include": [clause("dog", True)]}, "a 'count' of at least 1"),
        ({"include": ["dog"]}, "a 'count' of at least 1"),
        ({"include": [clause("unicorn")]}, "knows no class 'unicorn'"),
        ({"include": [clause("dog")], "exclude": [clause("unicorn")]}, "knows no class 'unicorn'"),
        ({"include": [clause("dog", color="mauve")]}, "unknown color 'mauve'"),
        ({"include": [clause("dog", position=["near", 0])]}, "must be"),
        ({"include": [clause("dog", position=["above", 0])]}, "earlier clause"),
    ],
)
def test_wrong_metadata_is_a_reward_error(metadata, message):
    with pytest.raises(RewardError, match=message):
        check_metadata(metadata, {"dog", "cat"})


# ------------------------------------------------------------------- detector and colours, random weights

LABELS = ["dog", "cat", "mouse", "N/A"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return (
        tiny.detector(tmp_path_factory.mktemp("detector"), LABELS),
        tiny.clip(tmp_path_factory.mktemp("clip")),
    )


def scorer(models, **args):
    args = {"model": str(models[0]), "clip": str(models[1]), "batch": 2, **args}
    return build_reward("g", RewardConfig(scorer="geneval", args=args))


def test_detections_match_the_model_run_picture_by_picture(models):
    media = tiny.pictures(3, 60, 80)
    model = AutoModelForObjectDetection.from_pretrained(models[0]).eval()
    processor = YolosImageProcessorPil.from_pretrained(models[0])
    detector = scorer(models).scorer
    detections = detector.detect(media.frames[:2, 0]) + detector.detect(media.frames[2:, 0])
    for frame, ours in zip(media.frames[:, 0], detections, strict=True):
        with torch.no_grad():
            out = model(**processor(images=Image.fromarray(frame), return_tensors="pt"))
        probabilities = out.logits[0].softmax(-1)[:, :-1]  # the last class is "nothing"
        cx, cy, w, h = out.pred_boxes[0].unbind(-1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).clamp(0, 1)
        corners = corners * torch.tensor([80.0, 60.0, 80.0, 60.0])
        assert [d.label for d in ours] == [LABELS[i] for i in probabilities.argmax(-1)]
        np.testing.assert_allclose([d.score for d in ours], probabilities.max(-1).values, atol=1e-4)
        np.testing.assert_allclose([d.box for d in ours], corners, atol=1e-2)
    assert len({d.label for row in detections for d in row}) > 1


def test_colours_match_zero_shot_clip_on_the_crop(models):
    frame = tiny.pictures(1, 60, 80).frames[0, 0]
    boxes = found("cat", (5.2, 3.1, 60.4, 40.0), (30, 20, 80, 60), (79.6, 59.8, 80, 60))
    model, tokenizer = CLIPModel.from_pretrained(models[1]).eval(), tiny.clip_tokenizer()

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    expected = []
    with torch.no_grad():
        rows = []
        for color in COLORS:
            texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
            ids = [tokenizer(t, return_tensors="pt").input_ids for t in texts]
            rows.append(unit(torch.cat([unit(model.get_text_features(i).pooler_output) for i in ids]).mean(0)))
        for x0, y0, x1, y1 in ((5, 3, 60, 40), (30, 20, 80, 60), (79, 59, 80, 60)):
            crop = Image.fromarray(frame[y0:y1, x0:x1])
            w, h = crop.size
            w, h = (int(32 * w / h), 32) if h <= w else (32, int(32 * h / w))
            left, top = round((w - 32) / 2), round((h - 32) / 2)
            crop = crop.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
            x = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
            x = (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
            image = unit(model.get_image_features(x[None]).pooler_output[0])
            expected.append(COLORS[int((torch.stack(rows) @ image).argmax())])
    assert scorer(models).scorer.colors(frame, boxes) == expected


def test_whole_scores_follow_from_detections_and_rules(models, monkeypatch):
    runner = scorer(models)
    seen = [found("dog", box(10, 10)), found("dog", box(10, 10), score=0.5), found("mouse", box(10, 10)), []]
    monkeypatch.setattr(runner.scorer, "detect", lambda frames: [seen.pop(0) for _ in frames])
    prompts = [
        PromptItem(index=0, text="", metadata={"tag": "single_object", "include": [clause("dog")]}),
        PromptItem(index=1, text="", metadata={"tag": "counting", "include": [clause("dog")]}),
        PromptItem(index=2, text="", metadata={"include": [clause("computer mouse")]}),
        PromptItem(index=3, text="", metadata={"include": [clause("dog")], "exclude": [clause("cat")]}),
    ]
    result = runner.run(tiny.pictures(4, 40, 40), prompts, None)
    assert result.values.tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(result.parts["partial"], [1, 0, 1, 0.5])


def test_partial_credit_clips_and_missing_colours(models):
    metadata = {"include": [clause("dog", 2), clause("cat")]}
    prompt = PromptItem(index=0, text="", metadata=metadata)
    result = scorer(models, partial=True, clip=None).run(tiny.pictures(2, 40, 60), [prompt] * 2, None)
    np.testing.assert_array_equal(result.values, result.parts["partial"])
    clip = Media(frames=np.repeat(tiny.pictures(1).frames, 5, axis=1), fps=8)
    assert scorer(models).run(clip, [prompt], 0).segment_values.shape == (1, 4)
    red = PromptItem(index=0, text="", metadata={"include": [clause("dog", color="red")]})
    with pytest.raises(RewardError, match="set the option clip"):
        scorer(models, clip=None).run(tiny.pictures(1), [red], None)
    with pytest.raises(RewardError, match="GenEval's metadata"):
        scorer(models).run(tiny.pictures(1), [PromptItem(index=0, text="a dog")], None)
