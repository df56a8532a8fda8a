"""GenEval-style check with a detector of transformers: are the objects there, that many, that colour, in that place?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.messages import show
from pipeline.core.devices import resolve_device
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.geneval_rules import COLORS, Detection, check_metadata, judge, keep
from pipeline.rewards.models.pretrained import batches, check_batch, check_number, image_processor, pretrained

# GenEval's class names that COCO detectors spell otherwise
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


@register("geneval")
class Geneval(Scorer):
    """GenEval's rules on a COCO detector: 1 if objects, counts, colours and positions match (or partial credit).

    The official evaluation uses Mask2Former's masks to grey out what surrounds an object before its colour is named;
    a box detector has no masks, so here the whole box is shown to CLIP. Scores are not comparable with the benchmark's.
    """

    reads = "frame"
    tested_with = "random weights"
    gradient_note = "it counts the boxes of a detector; use hpsv3 or image_reward"

    def __init__(
        self,
        model: str = "facebook/detr-resnet-50",
        clip: str | None = "openai/clip-vit-large-patch14",
        partial: bool = False,
        max_overlap: float = 1.0,
        device: str = "auto",
        batch: int = 8,
    ) -> None:
        """`clip`: names colours; null if no prompt asks for one. `partial`: mean of partly met clauses, not 0 or 1."""
        from transformers import AutoModelForObjectDetection

        if not isinstance(partial, bool):
            raise ConfigError(f"partial: found {show(partial)}; expected true or false")
        import torch

        self.partial, self.max_overlap = partial, check_number("max_overlap", max_overlap, 0.0, 1.0)
        self.batch, self.device = check_batch(batch), resolve_device(device)
        self.model = pretrained(AutoModelForObjectDetection, model, self.device, torch.float32)
        self.processor = image_processor(model)
        self.labels = {int(i): str(name) for i, name in self.model.config.id2label.items()}
        self.clip = ClipEmbedder(clip, device=device, batch=batch, odd="round") if clip else None
        self.classifiers: dict[str, Any] = {}

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        metadata = [_renamed(prompt.metadata) for prompt in prompts]
        for row in metadata:
            check_metadata(row, set(self.labels.values()))
            if self.clip is None and any("color" in clause for clause in row["include"]):
                raise RewardError("a prompt asks for a colour; set the option clip to a CLIP model")
        frames, verdicts = media.frames[:, 0], []
        for part in batches(len(frames), self.batch):
            for frame, row, detections in zip(frames[part], metadata[part], self.detect(frames[part]), strict=True):
                objects = keep(detections, row.get("tag") == "counting", self.max_overlap)
                verdicts.append(judge(objects, row, functools.partial(self.colors, frame)))
        correct = np.asarray([v.correct for v in verdicts], dtype=np.float32)
        partial = np.asarray([v.partial for v in verdicts], dtype=np.float32)
        return {"score": partial if self.partial else correct, "correct": correct, "partial": partial}

    def detect(self, frames: np.ndarray) -> list[list[Detection]]:
        """uint8 [N, H, W, 3] -> detections of each picture, boxes in pixels clipped to it."""
        import torch

        height, width = frames.shape[1:3]
        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        results = self.processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(height, width)] * len(frames)
        )
        limits = torch.tensor([width, height, width, height], dtype=torch.float32, device=self.device)
        detections = []
        for result in results:
            boxes = torch.minimum(result["boxes"].float().clamp(min=0), limits).tolist()
            rows = zip(result["labels"].tolist(), result["scores"].tolist(), boxes, strict=True)
            detections.append([Detection(self.labels[i], score, tuple(box)) for i, score, box in rows])
        return detections

    def colors(self, frame: np.ndarray, boxes: Sequence[Detection]) -> list[str]:
        """The likeliest of GenEval's ten colours of each box of uint8 [H, W, 3], zero-shot by CLIP."""
        import torch

        assert self.clip is not None
        names = self._classifier(boxes[0].label)
        colors = []
        for detection in boxes:
            x0, y0, x1, y1 = (round(v) for v in detection.box)
            x0, y0 = min(x0, frame.shape[1] - 1), min(y0, frame.shape[0] - 1)  # at least one pixel is shown
            crop = frame[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
            colors.append(COLORS[int(torch.argmax(self.clip.images(crop[None]) @ names.T))])
        return colors

    def _classifier(self, label: str) -> Any:
        """Unit vectors [10, D]: per colour the mean of its three descriptions' embeddings."""
        import torch

        if label not in self.classifiers:
            assert self.clip is not None
            texts = [
                text
                for color in COLORS
                for text in (f"a photo of a {color} {label}", f"a photo of a {color}-colored {label}",
                             f"a photo of a {color} object")
            ]  # fmt: skip
            rows = self.clip.texts(texts)[0].reshape(len(COLORS), 3, -1).mean(dim=1)
            self.classifiers[label] = torch.nn.functional.normalize(rows, dim=-1)
        return self.classifiers[label]


def _renamed(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata with COCO's spelling of the classes."""
    out = dict(metadata)
    for key in ("include", "exclude"):
        if isinstance(metadata.get(key), list):
            out[key] = [
                {**c, "class": ALIASES.get(str(c.get("class")), c.get("class"))} if isinstance(c, dict) else c
                for c in metadata[key]
            ]
    return out
