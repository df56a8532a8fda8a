"""VideoReward of VideoAlign: visual quality, motion quality and text alignment of a clip, on Qwen2-VL-2B (Liu et al.,
2025, arXiv 2501.13918).

One question holds three reward tokens. The prompt's text comes only before the last one and the model is causal, so the
first two scores do not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import InputError, RewardError
from pipeline.core.reading import read_json_object
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import check_choice
from pipeline.rewards.models.qwen_vl import QwenVlReader, VisionInput, resized_shape, vision_input

if TYPE_CHECKING:
    import torch

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
ASPECTS = ("visual", "motion", "text")  # in the order of the tokens
SAMPLE_FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768  # frames per second that are scored, and bounds of their number
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame

# The published checkpoint's model_config.json; a file beside the weights takes precedence.
PUBLISHED: dict[str, dict[str, float]] = {
    "inference_config": {
        "VQ_mean": 3.6757,
        "VQ_std": 2.2476,
        "MQ_mean": 1.1646,
        "MQ_std": 1.3811,
        "TA_mean": 2.8105,
        "TA_std": 2.5121,
    },
    "peft_lora_config": {"lora_r": 64, "lora_alpha": 128},
}

# The prompt that the model was trained with, whitespace included: any change changes the scores.
QUESTION = (
    "\nYou are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion "
    "Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being "
    "the worst and 10 being the best. Each evaluation should be independent of the others.\n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions "
    "should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    f"Please provide the ratings of Visual Quality: {TOKENS[0]}\nEND\n\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following "
    "sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, unnatural "
    "jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, textures, or missing body "
    "parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing should "
    "flow naturally with motion, and facial expressions should change appropriately (e.g., blinking, mouth "
    "movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different motions or "
    "camera angles should be seamless, and the overall dynamic feel should be visually pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend naturally with "
    "the background, without obvious artifacts or the feeling of cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas where the "
    "video might have blurry or unsteady sections that hinder visual continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion quality.\n\n"
    f"Please provide the ratings of Motion Quality: {TOKENS[1]}\nEND\n\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions like talking "
    "or blinking) align with the described prompt. The motion should match the prompt in terms of type, scale, and "
    "direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes checking if "
    "real-world locations or scenes are accurately represented, though some stylistic adaptation is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus shifts) are "
    "consistent with the expected behavior from the prompt.\n\n"
    "Textual prompt - {text_prompt}\n"
    f"Please provide the ratings of Text Alignment: {TOKENS[2]}\nEND\n"
)


@register("video_align")
class VideoAlign(Scorer):
    """VideoReward: sum of visual quality, motion quality and text alignment, each as a z-score (or one of them)."""

    reads = "video"
    needs_prompt = True
    needs_clip = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        weights: str,
        model: str = "Qwen/Qwen2-VL-2B-Instruct",
        aspect: str = "overall",
        device: str = "auto",
        dtype: str = "bfloat16",
        batch: int = 2,
    ) -> None:
        """`weights`: safetensors of the whole model; `model`: Qwen2-VL's config and tokenizer. `aspect`: which
        score is the reward: overall (the sum), visual, motion or text; all three are logged as parts."""
        self.aspect = check_choice("aspect", aspect, ("overall", *ASPECTS))
        config = published_config(Path(weights))
        lora, norm = config["peft_lora_config"], config["inference_config"]
        self.mean, self.std = (
            np.array([norm[f"{letters}_{statistic}"] for letters in ("VQ", "MQ", "TA")], np.float32)
            for statistic in ("mean", "std")
        )
        scale = lora["lora_alpha"] / lora["lora_r"]
        self.reader = QwenVlReader(weights, model, TOKENS, device, dtype, batch, lora=scale)
        if len(self.reader.head.get("rm_head.weight", ())) != 1:
            raise InputError(f"{weights}: rm_head.weight [1, D] is missing or of another shape; not VideoReward")

    @classmethod
    def check_args(cls, args: dict) -> None:
        check_choice("aspect", args.get("aspect", "overall"), ("overall", *ASPECTS))

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        import torch

        picks = sampled_frames(media.frames.shape[1], media.fps)
        clips = [torch.from_numpy(frames[picks]).permute(0, 3, 1, 2).float() for frames in media.frames]
        z = self._read([_vision_input(clip, whole_levels=True) for clip in clips], prompts)
        parts = {name: values.cpu().numpy() for name, values in zip(ASPECTS, z.T, strict=True)}
        return {"score": self._reward(z).cpu().numpy(), **parts}

    def looks_at(self, frames: int, fps: float) -> Sequence[int]:
        return sampled_frames(frames, fps)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self._reward(self._read([_vision_input(255 * clip, whole_levels=False) for clip in pixels], prompts))

    def _read(self, clips: Sequence[VisionInput], prompts: Sequence[PromptItem]) -> torch.Tensor:
        """z-scores [N, 3] in the order of ASPECTS."""
        questions = [QUESTION.replace("{text_prompt}", self.reader.check_text(p.text)) for p in prompts]
        raw = (self.reader.read(clips, questions) @ self.reader.head["rm_head.weight"].T)[..., 0]
        return (raw - raw.new_tensor(self.mean)) / raw.new_tensor(self.std)

    def _reward(self, z: torch.Tensor) -> torch.Tensor:
        return z.sum(dim=1) if self.aspect == "overall" else z[:, ASPECTS.index(self.aspect)]


def published_config(weights: Path) -> dict[str, dict[str, float]]:
    """model_config.json beside the weights or in the folder above, else the published numbers. Raises `InputError`."""
    for folder in (weights if weights.is_dir() else weights.parent, weights.parent.parent):
        file = folder / "model_config.json"
        if weights.exists() and file.is_file():
            try:
                config = read_json_object(file, "copy it again", lenient=True)
                return {key: {name: float(config[key][name]) for name in part} for key, part in PUBLISHED.items()}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file}: not VideoReward's config ({type(error).__name__}: {error})") from error
    return PUBLISHED


def sampled_frames(total: int, fps: float) -> list[int]:
    """Indices of the frames that are scored: 2 per second, at least 4, an even number, first and last included."""
    import torch

    limit = min(MAX_FRAMES, total) // 2 * 2
    count = round(min(max(total / fps * SAMPLE_FPS, MIN_FRAMES), limit) / 2) * 2
    if count < 2:
        raise RewardError(f"video_align needs clips of 2 frames or more, got {total}")
    return torch.linspace(0, total - 1, count).round().long().tolist()


def _vision_input(pixels: torch.Tensor, whole_levels: bool) -> VisionInput:
    """Of frames float [F, 3, H, W] from 0 to 255, each resized to at most 256 x 28 x 28 pixels.

    As torchvision resizes tensors: bicubic with antialiasing in float, then rounded to 8 bits (`whole_levels`), which
    gradients do without.
    """
    import torch

    size = resized_shape(pixels.shape[2], pixels.shape[3], MIN_PIXELS, MAX_PIXELS)
    if size != tuple(pixels.shape[2:]):
        pixels = torch.nn.functional.interpolate(
            pixels, size, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 255)  # fmt: skip
        pixels = pixels.round() if whole_levels else pixels
    return vision_input(pixels, clip=True)
