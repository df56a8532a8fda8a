"""ADIEE (arXiv 2507.07317): how well an edit was carried out, by a LLaVA-NeXT with a score token.

The model sees the picture before and after the edit side by side and the instruction, answers with a sentence that
holds [SCORE], and a small head reads the hidden state that produced that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.errors import InputError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import (
    batches,
    check_batch,
    image_processor,
    pretrained,
    read_tensors,
    tokenizer,
)
from pipeline.rewards.models.prompt_pictures import read_picture

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

TOKEN = "[SCORE]"
SIDE = 512  # both pictures are stretched to this square
ANSWER = 8  # tokens
# The first of the four wordings that the authors draw from.
QUESTION = (
    'Can you rate how successful the edit instruction "{instruction}" has been executed from the first image to the '
    "second image with a score from 0 to 10?"
)
# Names of the published checkpoint (a LLaVA-NeXT of any transformers version, under `vlm.`) -> transformers 5's.
NAMES = {
    r"^vlm\.language_model\.model\.": "model.language_model.",
    r"^vlm\.language_model\.lm_head\.": "lm_head.",
    r"^vlm\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^vlm\.model\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^vlm\.(vision_tower\.|multi_modal_projector\.|image_newline)": r"model.\1",
    r"^vlm\.": "",
}


@register("adiee")
class Adiee(Scorer):
    """ADIEE: how well the instruction was carried out from the source picture to this one (0 to 10)."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = "it reads an answer that is generated token by token; use clip_score or hpsv3 on the wanted result"

    def __init__(self, model: str, device: str = "auto", dtype: str = "bfloat16", batch: int = 4) -> None:
        """`model`: the published checkpoint's folder or hub id (weights, tokenizer, processor)."""
        from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

        self.device, self.dtype, self.batch = resolve_device(device), named_dtype(dtype), check_batch(batch)
        self.tokenizer = tokenizer(model)
        if TOKEN not in self.tokenizer.get_vocab():
            raise InputError(f"{model}: its tokenizer has no {TOKEN}; give a checkpoint of ADIEE")
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.score_id = self.tokenizer.convert_tokens_to_ids(TOKEN)
        self.special_tokens = [str(word) for word in self.tokenizer.added_tokens_decoder.values()]
        self.head = self._head(model)
        self.model = pretrained(LlavaNextForConditionalGeneration, model, self.device, self.dtype, key_mapping=NAMES)
        config = self.model.config
        settings, _ = LlavaNextProcessor.get_processor_dict(model)  # older ones keep the chat template apart
        self.processor = LlavaNextProcessor(
            image_processor=image_processor(model),
            tokenizer=self.tokenizer,
            chat_template=self.tokenizer.chat_template or settings.get("chat_template"),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # CLIP's class token
        )

    def _head(self, model: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weight and bias of its three layers, float32."""
        tensors = read_tensors(model, "score_decoder.")
        names = [(f"score_decoder.{i}.weight", f"score_decoder.{i}.bias") for i in (0, 2, 4)]
        missing = [name for pair in names for name in pair if name not in tensors]
        if missing or len(tensors[names[-1][0]]) not in (1, 3):
            what = f"{missing[0]} is missing" if missing else "its head has neither 1 nor 3 outputs"
            raise InputError(f"{model}: not a checkpoint of ADIEE ({what})")
        return [(tensors[w].float().to(self.device), tensors[b].float().to(self.device)) for w, b in names]

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        pairs = [side_by_side(self._source(p), frame) for p, frame in zip(prompts, media.frames[:, 0], strict=True)]
        questions = [QUESTION.replace("{instruction}", self._checked(p.text)) for p in prompts]
        parts = batches(len(pairs), self.batch)
        return np.concatenate([self._score(pairs[part], questions[part]) for part in parts])

    def _source(self, prompt: PromptItem) -> np.ndarray:
        if not prompt.image:
            raise RewardError(f"adiee compares with the source picture, but prompt {prompt.index} has no image")
        return read_picture(prompt.image)

    def _checked(self, text: str) -> str:
        for word in (*self.special_tokens, self.processor.image_token):
            if word in text:
                raise RewardError(f"the prompt {text!r:.60} holds {word}, which steers the reward model; take it out")
        return text

    def _score(self, pairs: list[Image], questions: list[str]) -> np.ndarray:
        """float32 [N]. Raises `RewardError` if an answer holds no score token."""
        import torch

        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        inputs = self.processor(text=texts, images=pairs, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        states: list[torch.Tensor] = []  # of the last position, that produced each token of the answer
        hook = self.model.model.language_model.norm.register_forward_hook(
            lambda _module, _given, out: states.append(out[:, -1].float())
        )
        try:
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs,
                    max_new_tokens=ANSWER,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=self.tokenizer.pad_token_id,
                )[:, -len(states) :]
        finally:
            hook.remove()
        is_score = ids == self.score_id
        for answer, has_score, question in zip(ids, is_score.any(1), questions, strict=True):
            if not has_score:
                raise RewardError(
                    f"the answer {self.tokenizer.decode(answer)!r:.60} to {question!r:.100} has no {TOKEN}"
                )
        x = torch.stack(states, 1)[torch.arange(len(ids)), last_true(is_score)]
        for i, (weight, bias) in enumerate(self.head):
            x = torch.nn.functional.linear(x, weight, bias)
            x = x.relu() if i < 2 else x
        if x.shape[1] == 3:  # failed, partly done, done
            x = 5 * x.softmax(1) @ torch.tensor([[0.0], [1.0], [2.0]], device=x.device)
        return x[:, 0].cpu().numpy()


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """Where the last True of each row of bool [N, T] is, int [N]; every row has one."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def side_by_side(source: np.ndarray, result: np.ndarray) -> Image:
    """Both uint8 [H, W, 3], of any sizes, as one picture of 1024 x 512."""
    from PIL import Image

    joined = Image.new("RGB", (2 * SIDE, SIDE))
    for i, picture in enumerate((source, result)):
        joined.paste(Image.fromarray(picture).resize((SIDE, SIDE)), (i * SIDE, 0))
    return joined
