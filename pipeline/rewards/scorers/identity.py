"""Does the picture show the same person? Cosine of the face embeddings of the picture and of the prompt's reference.

The identity reward of ID-Aligner (arXiv 2404.15449): detect, align, embed, compare. Detection, alignment and the
default embedding (YuNet and SFace) are OpenCV's own. Embedders of the ArcFace family in ONNX take the same aligned
112 x 112 faces; their pixels are scaled otherwise (`mean`, `std`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.core.errors import ConfigError, InputError, RewardError, one_line
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import check_batch, check_number, weight_file
from pipeline.rewards.models.prompt_pictures import read_picture, references

DETECT_SIDE = 640  # pixels of the long side while detecting: YuNet finds faces of 10 to 300 pixels
_CACHED = 256  # reference embeddings kept


@register("identity")
class Identity(Scorer):
    """Likeness of the largest face to the reference picture's (cosine; -1 to 1, strangers are near 0)."""

    reads = "frame"
    tested_with = "random weights"
    gradient_note = (
        "its face embedder is an ONNX file; use clip_i or dino, or an embedder in torch as your own function "
        "that takes pixels"
    )

    def __init__(
        self,
        detector: str = "opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx",
        embedder: str = "opencv/face_recognition_sface/face_recognition_sface_2021dec.onnx",
        mean: float = 0.0,
        std: float = 1.0,
        confidence: float = 0.9,
        missing: float = 0.0,
        threads: int = 1,
    ) -> None:
        """`detector`, `embedder`: ONNX files. `mean`, `std`: what the embedder's pixels (RGB, 0 to 255) are normalised
        with; ArcFace's are 127.5 and 127.5. `confidence`: detections below it are ignored. `missing`: the score of a
        picture without a face."""
        self.mean, self.std = check_number("mean", mean), check_number("std", std, 1e-6)
        confidence = check_number("confidence", confidence, 0.0, 1.0)
        self.missing, threads = check_number("missing", missing, -1.0, 1.0), check_batch(threads, "threads")
        try:
            import cv2
        except ImportError as error:
            raise ConfigError(
                f"the scorer identity needs opencv-python ({error}); run: pip install 'rushes[face]'"
            ) from error
        self.cv2 = cv2
        cv2.setNumThreads(threads)
        paths = [str(weight_file(path, suffix=".onnx")) for path in (detector, embedder)]
        try:
            self.detector = cv2.FaceDetectorYN.create(paths[0], "", (320, 320), score_threshold=confidence)
            self.aligner = cv2.FaceRecognizerSF.create(paths[1], "")
            self.embedder = cv2.dnn.readNetFromONNX(paths[1])
        except cv2.error as error:
            raise InputError(f"OpenCV cannot load {paths[0]} and {paths[1]}: {one_line(error, 600)}") from error
        self.cache: dict[str, np.ndarray] = {}

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        """Part `faces`: how many were found."""
        targets_of_takes = [[self._reference(path) for path in references(prompt)] for prompt in prompts]
        scores, counts = [], []
        for frame, targets in zip(media.frames[:, 0], targets_of_takes, strict=True):
            faces = self.faces(frame)
            counts.append(len(faces))
            if len(faces):
                embedding = self.embed(frame, faces[0])
                scores.append(np.mean([target @ embedding for target in targets]))
            else:
                scores.append(self.missing)
        return {"score": np.asarray(scores, np.float32), "faces": np.asarray(counts, np.float32)}

    def faces(self, frame: np.ndarray) -> np.ndarray:
        """The faces in uint8 [H, W, 3], the largest first: [N, 15] box (x, y, w, h), five landmarks, confidence."""
        shrink = min(1.0, DETECT_SIDE / max(frame.shape[:2]))
        height, width = (max(1, round(side * shrink)) for side in frame.shape[:2])
        picture = np.ascontiguousarray(frame[..., ::-1])  # OpenCV takes BGR
        if shrink < 1.0:
            picture = self.cv2.resize(picture, (width, height), interpolation=self.cv2.INTER_AREA)
        self.detector.setInputSize((width, height))
        try:
            _, detections = self.detector.detect(picture)
        except self.cv2.error as error:
            raise RewardError(f"the face detector failed on a picture of {width} x {height}: {error}") from error
        if detections is None:
            return np.zeros((0, 15), np.float32)
        scale = np.tile([frame.shape[1] / width, frame.shape[0] / height], 7)
        faces = np.concatenate([detections[:, :14] * scale, detections[:, 14:]], axis=1).astype(np.float32)
        return faces[np.argsort(-faces[:, 2] * faces[:, 3], kind="stable")]

    def embed(self, frame: np.ndarray, face: np.ndarray) -> np.ndarray:
        """Unit vector float32 [D] of a face that `faces` found. Raises `RewardError` if there is no such vector."""
        aligned = self.aligner.alignCrop(np.ascontiguousarray(frame[..., ::-1]), face)  # uint8 [112, 112, 3]
        blob = self.cv2.dnn.blobFromImage(aligned, 1.0 / self.std, (112, 112), (self.mean,) * 3, swapRB=True)
        try:
            self.embedder.setInput(blob)
            vector = self.embedder.forward().reshape(-1)
        except self.cv2.error as error:
            raise RewardError(f"the face embedder failed: {one_line(error, 600)}") from error
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0.0:
            raise RewardError(f"the face embedder gave a vector of length {length}")
        return vector / length

    def _reference(self, path: str) -> np.ndarray:
        if path not in self.cache:
            picture = read_picture(path)
            faces = self.faces(picture)
            if not len(faces):
                raise RewardError(
                    f"no face was found in the reference picture {path}; choose another, or lower confidence"
                )
            if len(self.cache) >= _CACHED:
                self.cache.pop(next(iter(self.cache)))
            self.cache[path] = self.embed(picture, faces[0])
        return self.cache[path]
