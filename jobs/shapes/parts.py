"""The components of the two shipped generators: tokenizers, text encoders, autoencoders, transformers.

Everything is a stock diffusers / transformers class with a small config, so that the saved folders load with
`DiffusionPipeline.from_pretrained`, without this repository. The sizes are chosen for two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from pipeline.rewards.models import scene_world

TEXT_LENGTH = 12  # longest caption is 8 words, plus begin and end
# The end token must not have id 2: transformers' CLIP would then use a legacy rule (the largest id is the end).
SPECIALS = ("<pad>", "<bos>", "<unk>", "<eos>")
PAD, BOS, UNK, EOS = range(4)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the grammar's vocabulary: `<bos> words <eos>`, padded with `<pad>`."""
    words = [*SPECIALS, *scene_world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="right",
    )


def build_clip(width: int, layers: int) -> CLIPTextModelWithProjection:
    """A tiny CLIP text tower, initialised at random."""
    config = CLIPTextConfig(
        vocab_size=len(SPECIALS) + len(scene_world.vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return CLIPTextModelWithProjection(config)


def t5_sizes(width: int, layers: int) -> dict[str, object]:
    """Config entries of a tiny T5 or UMT5 encoder."""
    return {
        "vocab_size": len(SPECIALS) + len(scene_world.vocabulary()),
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 24,
    }


def _posterior(posterior: DiagonalGaussianDistribution, sample: bool) -> tuple[Tensor, Tensor]:
    """A draw (or the mode) of an autoencoder's posterior, and its KL term as a mean over latents."""
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return (posterior.sample() if sample else posterior.mode()), kl


class ImageParts(nn.Module):
    """The image generator: 48 px -> 12 x 12 x 4 latents -> 36 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder, self.text_encoder_2 = build_clip(64, 2), build_clip(64, 2)
        # SD3 works without its third encoder, but from_pretrained refuses a folder without it: so a tiny one.
        self.text_encoder_3 = T5EncoderModel(T5Config(**t5_sizes(128, layers=1)))
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=scene_world.SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        self.transformer = SD3Transformer2DModel(
            sample_size=scene_world.SIZE // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=6,
            qk_norm="rms_norm",
        )

    @property
    def encoders(self) -> list[nn.Module]:
        """Text encoders, trained together with the transformer."""
        return [self.text_encoder, self.text_encoder_2, self.text_encoder_3]

    def encode_pixels(self, pixels: Tensor, sample: bool = False) -> tuple[Tensor, Tensor]:
        """Raw latents float [B, 4, 12, 12] and the KL term of pixels float [B, 3, 48, 48] in [-1, 1]."""
        return _posterior(self.vae.encode(pixels).latent_dist, sample)

    def decode_pixels(self, raw: Tensor) -> Tensor:
        """Pixels of raw latents."""
        return self.vae.decode(raw).sample

    def set_statistics(self, raw: Tensor) -> None:
        """Writes the latents' scale into the VAE config, so that normalised latents have unit variance."""
        self.vae.register_to_config(scaling_factor=float(1 / raw.std()), shift_factor=float(raw.mean()))

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents -> the normalised latents of the transformer."""
        return (raw - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def velocity(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise - clean at noise levels sigma float [B] for captions as token ids [B, 12]."""
        outputs = [clip(ids, output_hidden_states=True) for clip in self.encoders[:2]]
        context = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        pooled = torch.cat([out.text_embeds for out in outputs], dim=-1)
        # The SD3 pipeline pads the third encoder's text to max_sequence_length without a mask. That length
        # is a call argument, so training varies it.
        extra = (0, 4, 52)[int(torch.multinomial(torch.tensor([0.82, 0.14, 0.04]), 1))]
        third = self.text_encoder_3(nn.functional.pad(ids, (0, extra), value=PAD))[0]
        context = torch.cat([context, third], dim=1)
        return self.transformer(noisy, context, pooled, sigma * 1000, return_dict=False)[0]

    def pipeline(self, shift: float) -> StableDiffusion3Pipeline:
        """The diffusers pipeline of these parts."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer,
        )


class VideoParts(nn.Module):
    """The video generator: 9 x 48 px -> 3 x 6 x 6 x 16 latents -> 108 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        width = 96
        self.text_encoder = UMT5EncoderModel(UMT5Config(**t5_sizes(width, layers=2)))
        # patch_size=2 folds 2 x 2 pixels into channels first (as Wan 2.2 does): no convolution runs at full
        # resolution, where decoding on a CPU spends most of its time. 2 (fold) x 4 (two halvings) = 8.
        self.vae = AutoencoderKLWan(
            base_dim=16,
            z_dim=16,
            dim_mult=[1, 2, 3],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=3,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=width,
            freq_dim=128,
            ffn_dim=3 * width,
            num_layers=5,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoder, trained together with the transformer."""
        return [self.text_encoder]

    def encode_pixels(self, pixels: Tensor, sample: bool = False) -> tuple[Tensor, Tensor]:
        """Raw latents float [B, 16, 1 + (F - 1) / 4, 6, 6], KL term of pixels float [B, 3, F, 48, 48]."""
        return _posterior(self.vae.encode(pixels).latent_dist, sample)

    def decode_pixels(self, raw: Tensor) -> Tensor:
        """Pixels of raw latents."""
        return self.vae.decode(raw).sample

    def set_statistics(self, raw: Tensor) -> None:
        """Writes the latents' per-channel mean and standard deviation into the VAE config."""
        dims = (0, 2, 3, 4)
        self.vae.register_to_config(
            latents_mean=[float(v) for v in raw.mean(dims)], latents_std=[float(v) for v in raw.std(dims)]
        )

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents -> the normalised latents of the transformer."""
        mean, std = self._statistics()
        return (raw - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics()
        return latents * std + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw latents, float [1, 16, 1, 1, 1] each."""
        config = self.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, std

    def velocity(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise - clean at noise levels sigma float [B] for captions as token ids [B, 12]."""
        mask = ids != PAD
        context = self.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
        # WanPipeline zeroes the embeddings after the caption and pads to max_sequence_length, a call argument.
        extra = (0, 4, 52)[int(torch.multinomial(torch.tensor([0.5, 0.4, 0.1]), 1))]
        context = nn.functional.pad(context * mask[..., None], (0, 0, 0, extra))
        return self.transformer(noisy, sigma * 1000, context, return_dict=False)[0]

    def pipeline(self, shift: float) -> WanPipeline:
        """The diffusers pipeline of these parts."""
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            transformer=self.transformer,
        )


@dataclass(frozen=True)
class Recipe:
    """Data sizes, step counts and hyperparameters of one training."""

    samples: int  # drawn scenes
    vae_steps: int
    vae_batch: int  # single pictures per step
    clip_batch: int  # video: whole clips per step, alternating with single pictures; 0 for images
    steps: int  # transformer and text encoders
    batch: int
    vae_lr: float = 2e-3
    kl: float = 1e-3  # weight of the KL term (mean over latents)
    object_weight: float = 0.0  # extra loss weight of pixels at objects
    polish_steps: int = 0  # afterwards, of the decoder alone
    lr: float = 1.2e-3
    shift: float = 2.0  # of the noise schedule
    wrong: float = 0.45  # share of training captions with replaced attributes


RECIPES = {
    "image": Recipe(24000, 1200, 32, 0, 4800, 64),
    "video": Recipe(6000, 2600, 24, 4, 3800, 32, vae_lr=3e-3, kl=1e-4, object_weight=6.0, polish_steps=700),
}


def call_options(kind: str) -> dict[str, object]:
    """Keyword arguments of calls of the shipped pipelines, besides prompt and steps."""
    options: dict[str, object] = {"height": scene_world.SIZE, "width": scene_world.SIZE, "guidance_scale": 1.0}
    if kind == "image":
        return options | {"max_sequence_length": TEXT_LENGTH}
    return options | {"num_frames": scene_world.FRAMES, "max_sequence_length": TEXT_LENGTH}
