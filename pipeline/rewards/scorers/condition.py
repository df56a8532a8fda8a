"""Condition consistency (ControlNet++): extract the condition from the picture again and compare it with the given one.

The condition picture comes with the prompt: metadata `condition` of a prompts file (a path), else the prompt's image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.core.devices import resolve_device
from pipeline.core.errors import ConfigError, InputError, RewardError
from pipeline.core.pictures import open_picture
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.canny import canny
from pipeline.rewards.models.pretrained import (
    batches,
    check_batch,
    check_choice,
    check_number,
    image_processor,
    pretrained,
)
from pipeline.rewards.models.prompt_pictures import picture_paths

IGNORED = 255  # class number of pixels that do not count


def condition_picture(prompt: PromptItem, size: tuple[int, int], classes: bool) -> np.ndarray:
    """uint8 [H, W], resized to `size` (height, width): grey levels, or class numbers as they stand in the file."""
    from PIL import Image

    path = picture_paths(prompt, "condition", "`condition` or an image")[0]
    try:
        picture = open_picture(Path(path))
        if classes and picture.mode not in ("L", "P"):
            raise RewardError(f"the condition {path} is {picture.mode}; class numbers need an 8-bit grey PNG")
        picture = picture if classes else picture.convert("L")
    except InputError as error:
        raise RewardError(f"the condition picture {path} cannot be read ({error})") from error
    how = Image.Resampling.NEAREST if classes else Image.Resampling.BILINEAR
    return np.asarray(picture if picture.size == size[::-1] else picture.resize(size[::-1], how))


def f1(extracted: np.ndarray, given: np.ndarray) -> float:
    """F1 of two bool maps; 1 if both are empty."""
    total = int(extracted.sum()) + int(given.sum())
    return 2.0 * int((extracted & given).sum()) / total if total else 1.0


def mean_iou(extracted: np.ndarray, given: np.ndarray) -> float:
    """Mean IoU over the classes of `given`, leaving out pixels of class 255. Raises `RewardError` if none is left."""
    counts = given != IGNORED
    classes = np.unique(given[counts])
    if not len(classes):
        raise RewardError("the condition has no pixel that counts (all are of class 255)")
    ious = [
        ((extracted == c) & (given == c)).sum() / (((extracted == c) | (given == c)) & counts).sum() for c in classes
    ]
    return float(np.mean(ious))


def normalised_rmse(extracted: np.ndarray, given: np.ndarray) -> float:
    """RMSE of two maps, each brought to 0..1 first (depth is known up to scale and shift); a flat map is all 0."""

    def unit(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64) - values.min()
        return values / values.max() if values.max() > 0 else values

    return float(np.sqrt(np.mean((unit(extracted) - unit(given)) ** 2)))


@register("condition")
class Condition(Scorer):
    """Does the picture keep to its control picture? Edges: F1; depth: 1 - RMSE; segmentation: mean IoU (all 0 to 1)."""

    reads = "frame"
    tested_with = "random weights"

    def __init__(
        self,
        kind: str,
        model: str | None = None,
        low: float = 100.0,
        high: float = 200.0,
        device: str = "auto",
        batch: int = 8,
    ) -> None:
        """`kind`: edges (Canny with thresholds `low` and `high`), depth or segmentation (with a `model`)."""
        self.kind = check_choice("kind", kind, ("edges", "depth", "segmentation"))
        self.low, self.high = check_number("low", low, 0.0), check_number("high", high, 0.0)
        self.batch = check_batch(batch)
        if (kind == "edges") != (model is None):
            raise ConfigError(f"model: {'edges need none' if model else f'{kind} needs one'}; correct kind or model")
        if model is not None:
            import torch
            from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

            cls = AutoModelForDepthEstimation if kind == "depth" else AutoModelForSemanticSegmentation
            self.device = resolve_device(device)
            self.model, self.processor = pretrained(cls, model, self.device, torch.float32), image_processor(model)
        compare: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "edges": lambda extracted, given: f1(extracted, given > 127),
            "depth": lambda extracted, given: 1.0 - normalised_rmse(extracted, given),
            "segmentation": mean_iou,
        }
        self.compare = compare[kind]

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        frames = media.frames[:, 0]
        size = (frames.shape[1], frames.shape[2])
        given = [condition_picture(prompt, size, self.kind == "segmentation") for prompt in prompts]
        if self.kind == "edges":
            extracted = [canny(frame, self.low, self.high) for frame in frames]
        else:
            extracted = [row for part in batches(len(frames), self.batch) for row in self.extract(frames[part])]
        return np.asarray([self.compare(a, b) for a, b in zip(extracted, given, strict=True)], dtype=np.float32)

    def extract(self, frames: np.ndarray) -> list[np.ndarray]:
        """uint8 [N, H, W, 3] -> per picture depth float [H, W] or class numbers int [H, W]."""
        import torch

        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        maps = outputs.predicted_depth[:, None] if self.kind == "depth" else outputs.logits
        size = tuple(frames.shape[1:3])
        maps = torch.nn.functional.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
        return list((maps[:, 0] if self.kind == "depth" else maps.argmax(dim=1)).cpu().numpy())
