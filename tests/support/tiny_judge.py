"""A small random Qwen2.5-VL that chats, as a folder that vLLM and transformers load: weights, tokenizer, processor."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_qwen import CHAT, qwen_tokenizer
from tiny_rewards import spread
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD

SPELLINGS = ["yes", "Yes", "no", "No"]
# The system message comes as one text from transformers, as parts from vLLM.
TEMPLATE = CHAT.replace(
    "{% for content in message['content'] %}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}",
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


def tiny_judge(folder: Path, seed: int = 0) -> Path:
    tokens = qwen_tokenizer()
    tokens.add_tokens(SPELLINGS)
    tokens.chat_template = TEMPLATE
    tokens.eos_token = "<|im_end|>"
    tokens.pad_token = "<|endoftext|>"
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start",
                                                                         "vision_end", "im_end")}  # fmt: skip
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids["im_end"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    spread(Qwen2_5_VLForConditionalGeneration(config), seed, std=0.15).save_pretrained(folder)
    tokens.save_pretrained(folder)
    sizes = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
    patches = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    kind = {"processor_class": "Qwen2_5_VLProcessor"}
    for name, extra in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"}),
    ):
        (folder / name).write_text(json.dumps(sizes | patches | kind | extra))
    return folder
