"""Condition consistency (ControlNet++): extract the condition from the picture again and compare it with the given one.

The condition picture comes with the prompt: metadata `condition` of a prompts file (a path), else the prompt's image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.devices import resolve_device
from pipeline.core.errors import ConfigError, InputError, RewardError
from pipeline.core.pictures import open_picture
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.canny import canny
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.pixel_processor import PixelProcessor
from pipeline.rewards.models.pretrained import (
    batches,
    check_batch,
    check_choice,
    check_number,
    image_processor,
    pretrained,
)
from pipeline.rewards.models.prompt_pictures import picture_paths
from pipeline.rewards.models.soft_maps import (
    depth_agreement,
    edge_probability,
    soft_f1,
    soft_mean_iou,
    with_slope_of,
)

if TYPE_CHECKING:
    import torch

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
    gradient_note = ""

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
            self.prepare = PixelProcessor(self.processor)
        compare: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "edges": lambda extracted, given: f1(extracted, given > 127),
            "depth": lambda extracted, given: 1.0 - normalised_rmse(extracted, given),
            "segmentation": mean_iou,
        }
        self.compare = compare[kind]

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        frames = media.frames[:, 0]
        given = self._given(prompts, (frames.shape[1], frames.shape[2]))
        if self.kind == "edges":
            extracted = [canny(frame, self.low, self.high) for frame in frames]
        else:
            extracted = [row for part in batches(len(frames), self.batch) for row in self.extract(frames[part])]
        return np.asarray([self.compare(a, b) for a, b in zip(extracted, given, strict=True)], dtype=np.float32)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        """Decisions have no slope, so the gradient of edges and segmentation is that of F1 and IoU of probabilities;
        which pixels are edges at all (the ridges and the given ones) is a constant to it. The score is the server's."""
        import torch

        pixels = pixels[:, 0]
        given = self._given(prompts, (pixels.shape[2], pixels.shape[3]))
        extracted = (
            edge_probability(pixels, self.low, self.high)
            if self.kind == "edges"
            else in_batches(lambda part: self._maps(self.prepare(part), part.shape[2:]), pixels, self.batch)
        )
        compare = {"edges": self._edges, "depth": self._depth, "segmentation": self._segments}[self.kind]
        return torch.stack([compare(*row) for row in zip(extracted, given, pixels, strict=True)])

    def _edges(self, probability: torch.Tensor, given: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        wanted = given > 127
        frame = (255 * pixels.detach()).round().byte().permute(1, 2, 0).cpu().numpy()
        found = canny(frame, self.low, self.high)
        counts = torch.from_numpy(found | wanted).to(probability.device)
        soft = soft_f1(probability * counts, torch.from_numpy(wanted).to(probability.device))
        return with_slope_of(soft, soft.new_tensor(self.compare(found, given)))

    def _depth(self, maps: torch.Tensor, given: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        return depth_agreement(maps[0], maps.new_tensor(given))

    def _segments(self, logits: torch.Tensor, given: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        value = self.compare(logits.detach().argmax(dim=0).cpu().numpy(), given)  # refuses a map without a class
        soft = soft_mean_iou(logits, torch.from_numpy(given.astype(np.int64)).to(logits.device), IGNORED)
        return with_slope_of(soft, soft.new_tensor(value))

    def _given(self, prompts: Sequence[PromptItem], size: tuple[int, int]) -> list[np.ndarray]:
        return [condition_picture(prompt, size, self.kind == "segmentation") for prompt in prompts]

    def extract(self, frames: np.ndarray) -> list[np.ndarray]:
        """uint8 [N, H, W, 3] -> per picture depth float [H, W] or class numbers int [H, W]."""
        inputs = self.processor(images=list(frames), return_tensors="pt")
        maps = self._maps(inputs["pixel_values"], frames.shape[1:3])
        return list((maps[:, 0] if self.kind == "depth" else maps.argmax(dim=1)).cpu().numpy())

    def _maps(self, inputs: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """The model's input -> depth [N, 1, H, W] or logits [N, C, H, W] of pictures of `size`."""
        import torch

        outputs = self.model(pixel_values=inputs.to(self.device))
        maps = outputs.predicted_depth[:, None] if self.kind == "depth" else outputs.logits
        return torch.nn.functional.interpolate(maps.float(), tuple(size), mode="bilinear", align_corners=False)
