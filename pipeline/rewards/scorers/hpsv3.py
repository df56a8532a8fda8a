"""HPSv3: predicted human preference for pictures of many kinds, on Qwen2-VL-7B (Ma et al., ICCV 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.images import resize_pixels
from pipeline.rewards.models.qwen_vl import QwenVlReader, VisionInput, resized_shape, vision_input

if TYPE_CHECKING:
    import torch

PIXELS = 256 * 28 * 28  # a picture's area after resizing, minimum and maximum
TOKEN = "<|Reward|>"

# The prompt that the model was trained with, whitespace included: any change changes the scores.
QUESTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {TOKEN}\n\nEND\n"
)


@register("hpsv3")
class Hpsv3(Scorer):
    """HPSv3: mean of the predicted preference (about -2 to 12); its spread is the part `sigma`."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        weights: str = "MizzenAI/HPSv3/HPSv3.safetensors",
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str = "auto",
        dtype: str = "bfloat16",
        batch: int = 8,
    ) -> None:
        """`weights`: safetensors of the whole model; `model`: Qwen2-VL's config and tokenizer."""
        self.reader = QwenVlReader(weights, model, [TOKEN], device, dtype, batch)
        head = self.reader.head
        missing = [f"rm_head.{i}.{part}" for i in (0, 3, 5) for part in ("weight", "bias")]
        missing = [name for name in missing if name not in head]
        if missing or len(head["rm_head.5.weight"]) != 2:
            raise InputError(
                f"{weights}: {', '.join(missing) or 'rm_head.5'} is missing or of another shape; not HPSv3"
            )

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        out = self._read([_vision_input(frame) for frame in media.frames[:, 0]], prompts).cpu().numpy()
        return {"score": out[:, 0], "sigma": np.exp(out[:, 1])}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        size = resized_shape(pixels.shape[3], pixels.shape[4], PIXELS, PIXELS)
        resized = 255 * resize_pixels(pixels[:, 0], *size)
        return self._read([vision_input(picture, clip=False) for picture in resized.split(1)], prompts)[:, 0]

    def _read(self, pictures: Sequence[VisionInput], prompts: Sequence[PromptItem]) -> torch.Tensor:
        """[N, 2]: mean and log of sigma."""
        questions = [QUESTION.replace("{text_prompt}", self.reader.check_text(p.text)) for p in prompts]
        return self._head(self.reader.read(pictures, questions)[:, 0])

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, 2]: mean and log of sigma."""
        import torch

        for layer in (0, 3, 5):  # 1 and 4 are ReLUs, 2 is a dropout
            x = torch.nn.functional.linear(
                x, self.reader.head[f"rm_head.{layer}.weight"], self.reader.head[f"rm_head.{layer}.bias"]
            )
            x = x.relu() if layer != 5 else x
        return x


def _vision_input(frame: np.ndarray) -> VisionInput:
    """Of uint8 [H, W, 3], resized to about 256 x 28 x 28 pixels by PIL's bicubic filter."""
    import torch
    from PIL import Image

    height, width = resized_shape(frame.shape[0], frame.shape[1], PIXELS, PIXELS)
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return vision_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], clip=False)
