"""Identity reward with a detector and an embedder whose answers can be worked out by hand."""

import numpy as np
import pytest
import tiny_faces as tiny
import torch
from PIL import Image
from reward_math import run
from tiny_rewards import items

from pipeline.core.errors import ConfigError, InputError, RewardError
from pipeline.core.types import Media

cv2 = pytest.importorskip("cv2")

# where ArcFace and SFace want the eyes, the nose and the corners of the mouth in 112 x 112 pixels
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def picture(faces, seed=0, height=160, width=224):
    """Blue-green noise with red cells where faces are: [(row, column) of the grid of 8 pixels]."""
    rng = np.random.default_rng(seed)
    made = rng.integers(40, 200, (height // 4, width // 4, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    made[..., 0] //= 4
    for row, column in faces:
        made[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = (255, 0, 0)
    return made


def similarity(points, onto):
    """The 2 x 3 matrix of rotation, one scale and shift that takes points closest to `onto` (least squares)."""
    a = np.concatenate([np.array([[x, -y, 1, 0], [y, x, 0, 1]]) for x, y in points])
    p, q, dx, dy = np.linalg.lstsq(a, onto.reshape(-1), rcond=None)[0]
    return np.array([[p, -q, dx], [q, p, dy]])


def by_hand(frame, cell, w, b, mean=0.0, std=1.0, template=TEMPLATE, bgr=False):
    """Unit embedding of the face at a cell: aligned by its landmarks, RGB, torch's convolution."""
    centre = np.array([cell[1] * 8 + 4, cell[0] * 8 + 4])
    matrix = similarity(centre + tiny.LANDMARKS * 8, template)
    face = cv2.warpAffine(np.ascontiguousarray(frame[..., ::-1] if bgr else frame), matrix, (112, 112))
    x = (torch.from_numpy(face).permute(2, 0, 1)[None].float() - mean) / std
    out = torch.nn.functional.conv2d(x, torch.from_numpy(w), torch.from_numpy(b), stride=28).relu().flatten().numpy()
    return out / np.linalg.norm(out)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    embedder, w, b = tiny.embedder(folder / "embedder.onnx")
    return {"detector": str(tiny.detector(folder / "detector.onnx")), "embedder": str(embedder)}, w, b


def rows(tmp_path, references, *cells):
    """Prompts whose references are pictures with a face at these cells."""
    paths = []
    for i, cell in enumerate(references):
        Image.fromarray(picture([cell], seed=50 + i)).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


def test_cosine_of_aligned_faces_and_the_usual_mistakes_are_noticed(models, tmp_path):
    args, w, b = models
    cells = [(8, 9), (11, 17)]
    frames = np.stack([picture([cell], seed=i) for i, cell in enumerate(cells)])
    paths = rows(tmp_path, [(9, 12), (7, 14)])
    prompts = items("one", "two", files={"reference": tuple(paths)})

    def expected(**options):
        targets = [by_hand(picture([c], seed=50 + i), c, w, b, **options) for i, c in enumerate([(9, 12), (7, 14)])]
        return [
            np.mean([t @ by_hand(f, c, w, b, **options) for t in targets]) for f, c in zip(frames, cells, strict=True)
        ]

    result = run("identity", Media(frames=frames[:, None], fps=1), prompts, **args)
    np.testing.assert_allclose(result.values, expected(), atol=1e-4)
    assert result.parts["faces"].tolist() == [1, 1] and np.ptp(result.values) > 1e-3
    arcface = run("identity", Media(frames=frames[:, None], fps=1), prompts, **args, mean=127.5, std=127.5)
    np.testing.assert_allclose(arcface.values, expected(mean=127.5, std=127.5), atol=1e-4)
    mistakes = [{"bgr": True}, {"mean": 127.5, "std": 127.5}, {"template": TEMPLATE + 4}]
    for options in mistakes:
        assert np.abs(np.array(expected(**options)) - result.values).max() > 1e-3, options


def test_the_same_picture_is_1_and_large_pictures_are_only_shrunk_for_detection(models, tmp_path):
    args, w, b = models
    frame = picture([(9, 12)], seed=50)
    path = rows(tmp_path, [(9, 12)])[0]
    prompts = items("me", image=path)
    assert run("identity", Media(frames=frame[None, None], fps=1), prompts, **args).values[0] == pytest.approx(
        1, abs=1e-5
    )
    large = picture([(9, 12)], seed=50, height=640, width=1280)  # detected at half size: no cell of 8 pixels is red
    assert run("identity", Media(frames=large[None, None], fps=1), prompts, **args).values[0] == 0.0
    large[9 * 16 : 10 * 16, 12 * 16 : 13 * 16] = (255, 0, 0)
    result = run("identity", Media(frames=large[None, None], fps=1), prompts, **args)
    assert result.parts["faces"].tolist() == [1] and result.values[0] < 0.999
    spots = (np.array([12 * 16 + 8, 9 * 16 + 8]) + tiny.LANDMARKS * 16).astype(np.float32)
    face = cv2.warpAffine(large, similarity(spots, TEMPLATE), (112, 112))
    out = torch.nn.functional.conv2d(
        torch.from_numpy(face).permute(2, 0, 1)[None].float(), torch.from_numpy(w), torch.from_numpy(b), stride=28
    ).relu().flatten().numpy()  # fmt: skip
    target = by_hand(frame, (9, 12), w, b)
    assert result.values[0] == pytest.approx(float(target @ out / np.linalg.norm(out)), abs=1e-3)


def test_no_face_in_a_take_is_a_low_score_and_in_the_reference_a_failure(models, tmp_path):
    args, *_ = models
    path = rows(tmp_path, [(9, 12)])[0]
    frames = np.stack([picture([]), picture([(9, 12)])])[:, None]
    result = run("identity", Media(frames=frames, fps=1), items("a", "b", image=path), **args)
    assert result.values[0] == 0.0 and result.parts["faces"].tolist() == [0, 1]
    low = run("identity", Media(frames=frames, fps=1), items("a", "b", image=path), **args, missing=-1.0)
    assert low.values[0] == -1.0 and low.values[1] == result.values[1]
    Image.fromarray(picture([])).save(tmp_path / "landscape.png")
    with pytest.raises(RewardError, match="no face was found in the reference picture .*landscape.png"):
        run("identity", Media(frames=frames, fps=1), items("a", "b", image=str(tmp_path / "landscape.png")), **args)
    with pytest.raises(RewardError, match="prompt 0 has no reference picture"):
        run("identity", Media(frames=frames, fps=1), items("a", "b"), **args)
    dot = run("identity", Media(frames=np.zeros((1, 1, 1, 1, 3), np.uint8), fps=1), items("a", image=path), **args)
    assert dot.values[0] == 0.0


def test_the_largest_face_counts(models, tmp_path):
    args, w, b = models
    path = rows(tmp_path, [(9, 12)])[0]
    target = by_hand(picture([(9, 12)], seed=50), (9, 12), w, b)
    for large, small in (((9, 6), (9, 20)), ((9, 20), (9, 6))):
        frame = picture([large, small])
        frame[large[0] * 8 : large[0] * 8 + 8, large[1] * 8 : large[1] * 8 + 8, 2] = 30
        result = run("identity", Media(frames=frame[None, None], fps=1), items("a", image=path), **args)
        assert result.parts["faces"].tolist() == [2]
        assert result.values[0] == pytest.approx(float(target @ by_hand(frame, large, w, b)), abs=1e-4)


def test_wrong_options_and_files_are_named(models, tmp_path):
    args, *_ = models
    media = Media(frames=picture([])[None, None], fps=1)
    with pytest.raises(ConfigError, match="confidence: found 2"):
        run("identity", media, items("a"), **args, confidence=2)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="must be a .onnx file"):
        run("identity", media, items("a"), detector=str(tmp_path / "model.pt"), embedder=args["embedder"])
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputError, match="OpenCV cannot load .*broken.onnx"):
        run("identity", media, items("a"), detector=str(tmp_path / "broken.onnx"), embedder=args["embedder"])
