"""The GPU part of the suite: random weights in the shapes of real models, rollout and learner in one process.

Speed does not depend on the values of weights, so nothing is downloaded: the denoiser and the VAE have the published
configs (stabilityai/stable-diffusion-3.5-medium, black-forest-labs/FLUX.1-dev, Wan-AI/Wan2.1-T2V-1.3B-Diffusers), the
text encoders one layer each, since a prompt is encoded once. Not run yet: no GPU was available.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.speed.bare import seconds_of
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.files import atomic_write
from pipeline.core.types import Feedback, GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work

PROMPT = PromptItem(index=0, text="a red cube on a wooden table")
# Pixels, frames, takes of a group, sampler steps: those of configs/sd3.5-medium.yaml and configs/wan-1.3b.yaml.
CALLS: dict[str, dict[str, Any]] = {
    "sd3.5-medium": {"height": 512, "width": 512, "num_frames": 1, "group_size": 24, "steps": 10},
    "flux": {"height": 512, "width": 512, "num_frames": 1, "group_size": 12, "steps": 6},
    "wan-1.3b": {"height": 240, "width": 416, "num_frames": 33, "group_size": 8, "steps": 16},
}


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def _clip(cls: Any, width: int) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            projection_dim=width,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _t5(cls: Any, config: Any) -> Any:
    return cls(config(vocab_size=4, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=64))


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _sd35_medium() -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_image_vae(),
        text_encoder=_clip(CLIPTextModelWithProjection, 768),
        tokenizer=_tokenizer(77),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 1280),
        tokenizer_2=_tokenizer(77),
        text_encoder_3=_t5(T5EncoderModel, T5Config),
        tokenizer_3=_tokenizer(256),
    )


def _flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_image_vae(),
        text_encoder=_clip(CLIPTextModel, 768),
        tokenizer=_tokenizer(77),
        text_encoder_2=_t5(T5EncoderModel, T5Config),
        tokenizer_2=_tokenizer(512),
    )


def _wan() -> Any:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config),
        tokenizer=_tokenizer(512),
    )


BUILDERS: dict[str, Callable[[], Any]] = {"sd3.5-medium": _sd35_medium, "flux": _flux, "wan-1.3b": _wan}


def _config(folder: Path, call: dict[str, Any], batch: int) -> Config:
    return Config.model_validate(
        {
            "generator": {
                "pretrained": str(folder),
                **{key: call[key] for key in ("height", "width", "num_frames")},
                "call_kwargs": {"max_sequence_length": 256},
            },
            "trainable": {"kind": "lora", "rank": 32, "alpha": 64},
            "prompts": {"train": "unused.txt"},
            "rewards": {"unused": {"scorer": "unused"}},
            "sampler": {"steps": call["steps"], "window": {"kind": "random", "size": 2}},
            "objective": {"kl_beta": 0.0},
            "step": {"takes": call["group_size"]},
            "learner": {"autocast": "bfloat16", "activation_checkpointing": True, "micro_batch": batch},
            "rollout": {"merge_lora": True, "batch": batch},
        }
    )


def measure_one(name: str, say: Callable[[str], None], device: str = "cuda", batch: int = 4) -> dict[str, Any]:
    """Rollout and learner seconds of one group, the bare passes in them, and their ratios. Raises ConfigError."""
    if name not in BUILDERS:
        raise ConfigError(f"--gpu {name}: expected one of {', '.join(BUILDERS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--gpu: torch sees no GPU here")
    with tempfile.TemporaryDirectory() as scratch:
        say(f"{name}: making random weights")
        folder = Path(scratch)
        torch.manual_seed(0)
        BUILDERS[name]().to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
        cfg = _config(folder, CALLS[name], batch)
        policy, learner = Policy.load(cfg, device), Learner(cfg, device)
    policy.probe([PROMPT])
    policy.add_adapters()
    policy.load_weights(learner.weights())
    work = train_work(cfg, 0, 0, PROMPT, grid=policy.grid)
    say(f"{name}: rollout and learner")
    media, trajectory, seconds = policy.rollout(work)
    assert trajectory is not None  # steps are trained, so there is one
    groups = [
        GroupBatch(
            trajectory=trajectory, feedback=Feedback(advantages=np.linspace(-1, 1, work.takes).astype(np.float32))
        )
    ]
    rollout = seconds_of(lambda: policy.rollout(work))
    learn = seconds_of(lambda: learner.train_step(groups))
    say(f"{name}: bare passes")
    spec = trajectory.spec
    part = trajectory.parts[0]
    takes = slice(0, part.stop - part.start)
    share = work.takes / (part.stop - part.start)  # of the group in one part

    def forward(modules: Any) -> torch.Tensor:
        replayer = Replayer(part, spec, modules, policy.device)
        x, _ = replayer.samples(0, takes)
        with torch.autocast(device, dtype=torch.bfloat16):
            out = replayer.model_output(0, takes, x)
        return _finished(out, device)

    def forward_backward() -> None:
        _finished(forward(learner.modules).square().mean().backward(), device)
        learner.optimizer.zero_grad(set_to_none=True)

    with torch.no_grad():
        one_forward = seconds_of(lambda: forward(policy.modules))
    both = seconds_of(forward_backward)
    decode = seconds["decode"]
    bare_rollout = share * one_forward * work.sampling.num_steps + decode
    bare_learn = share * both * len(work.sampling.trained_steps)
    return {
        "takes_per_s_rollout": work.takes / rollout,
        "takes_per_s_in_turn": work.takes / (rollout + learn),
        "rollout_s": rollout,
        "learn_s": learn,
        "efficiency_rollout": bare_rollout / rollout,
        "efficiency_learn": bare_learn / learn,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "media": list(media.frames.shape),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def _finished(value: Any, device: str) -> Any:
    if device == "cuda":
        torch.cuda.synchronize()
    return value


def measure_gpu(names: list[str], say: Callable[[str], None], out: Path) -> Path:
    """Measures each of `names` (`all`: every one) and writes `out`."""
    results = {}
    for name in list(BUILDERS) if names == ["all"] else names:
        began = time.time()
        results[name] = {**measure_one(name, say), "bench_s": round(time.time() - began)}
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, (json.dumps(results, indent=2) + "\n").encode())
    return out
