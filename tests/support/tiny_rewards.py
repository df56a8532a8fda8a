"""Small random-weight reward models made from the real classes, saved as their users would have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from pipeline.core.types import Media, PromptItem

SIZE = 32  # pixels of the models' square input


def spread(model: torch.nn.Module, seed: int, std: float = 0.25) -> torch.nn.Module:
    """Weights large enough for every part to matter: at the library's std of 0.02 all pictures look alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 or "class_embedding" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def clip_tokenizer(context: int = 77) -> CLIPTokenizer:
    """CLIP's real tokenizer class over single bytes: any text in any script, one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=context)


def clip(folder: Path, seed: int = 0, context: int = 77, std: float = 0.25) -> Path:
    tokenizer = clip_tokenizer(context)
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text | depth, vision_config=vision | depth, projection_dim=24))
    spread(model, seed, std).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )
    return folder


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "on", "the", "mat", "##s"]


def bert_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={w: i for i, w in enumerate(BERT_WORDS)})


def blip(seed: int = 0) -> BlipForImageTextRetrieval:
    """The towers that ImageReward is made of."""
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            "vocab_size": len(BERT_WORDS),
            "hidden_size": 24,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 32,
            "projection_dim": 16,
        }
        | depth,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "image_size": SIZE,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        }
        | depth,
        image_text_hidden_size=16,
    )
    torch.manual_seed(seed)
    return spread(BlipForImageTextRetrieval(config), seed)


def dino(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
    )
    spread(ViTModel(config, add_pooling_layer=False), seed).save_pretrained(folder)
    return folder


def detector(folder: Path, labels: list[str], seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[48, 64],
        patch_size=16,
        num_detection_tokens=12,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        use_mid_position_embeddings=False,
    )
    spread(YolosForObjectDetection(config), seed).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder)
    return folder


def pictures(count: int, height: int = 45, width: int = 72, seed: int = 0) -> Media:
    """Smooth coloured noise: unlike in its middle and at its edges, so that cropping shows."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    noisy = smooth.permute(0, 2, 3, 1).numpy() + rng.normal(0, 20, (count, height, width, 3))
    return Media(frames=noisy.clip(0, 255).astype(np.uint8)[:, None], fps=8.0)


def items(*texts: str, **extra) -> list[PromptItem]:
    return [PromptItem(index=i, text=text, **extra) for i, text in enumerate(texts)]
