"""A small random Qwen2-VL of the real classes, its tokenizer, and its chat template as published."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_rewards import spread
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS += ["<|video_pad|>"]
CHAT = (  # the published template without the parts that number pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's real tokenizer class over single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    made.add_tokens(WORDS, special_tokens=True)
    made.chat_template = CHAT
    return made


def qwen(folder: Path, rows: int, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """The model with `rows` words; its config (with the base model's larger vocabulary) and tokenizer in `folder`."""
    tokens = qwen_tokenizer()
    image, video = tokens.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    text = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video)
    torch.manual_seed(seed)
    model = spread(Qwen2VLForConditionalGeneration(config), seed, std=0.15)
    config.text_config.vocab_size = rows + 40  # published checkpoints pad the vocabulary
    config.save_pretrained(folder)
    config.text_config.vocab_size = rows
    tokens.save_pretrained(folder)
    return model


def conversation(tokens: Qwen2Tokenizer, kind: str, question: str, pads: int) -> torch.Tensor:
    """Token ids [1, T] of one question about one picture or clip, through the chat template."""
    content = [{"type": kind}, {"type": "text", "text": question}]
    text = tokens.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad = f"<|{kind}_pad|>"
    return torch.tensor([tokens(text.replace(pad, pad * pads)).input_ids])
