"""LoRAs in the key styles of kohya's scripts and ComfyUI, read back by others' code: diffusers' converters of published
checkpoints and of LoRAs, which know the original names by themselves."""

from __future__ import annotations

import diffusers as d
import numpy as np
import pytest
import tiny
import torch
from diffusers.loaders import single_file_utils as published
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file

from jobs.common.load_trained import find_trained
from pipeline.core.errors import ConfigError, InputError
from pipeline.generators import adapters
from pipeline.generators.export import export_lora, export_styled
from pipeline.generators.export_folder import check_replaceable, load_lines
from pipeline.generators.key_styles import styled, styled_text_encoder
from pipeline.generators.load.pipeline import load_denoisers

SMALL = dict(num_layers=2, attention_head_dim=4, num_attention_heads=1, in_channels=4)
DENOISERS = {
    "sd3": lambda: d.SD3Transformer2DModel(
        sample_size=8, joint_attention_dim=4, caption_projection_dim=4, pooled_projection_dim=4,
        dual_attention_layers=(0,), **SMALL,
    ),
    "flux": lambda: d.FluxTransformer2DModel(num_layers=1, num_single_layers=1, joint_attention_dim=4),  # 3072 wide
    "wan": lambda: d.WanTransformer3DModel(
        num_layers=2, attention_head_dim=12, num_attention_heads=1, in_channels=4, out_channels=4, text_dim=4,
        freq_dim=8, ffn_dim=8, image_dim=4, added_kv_proj_dim=12,
    ),
    "qwen": lambda: d.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=1, in_channels=4, out_channels=1,
        joint_attention_dim=4, axes_dims_rope=(4, 6, 6),
    ),
    "ltx": lambda: d.LTXVideoTransformer3DModel(cross_attention_dim=4, caption_channels=4, **SMALL),
    "sd1": lambda: unet(cross_attention_dim=4),
    "sdxl": lambda: unet(
        cross_attention_dim=4, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=28, transformer_layers_per_block=(1, 2, 1),
    ),
}  # fmt: skip


def unet(**options):
    return d.UNet2DConditionModel(
        block_out_channels=(8, 8, 8), norm_num_groups=4, attention_head_dim=4, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


class Published(dict):
    """A published checkpoint of which only some weights are given: the others are 0."""

    def pop(self, key, *default):
        return super().pop(key) if key in self else self[key]

    def __missing__(self, key):
        return torch.zeros(21504 if "linear1" in key else 6)


def read(tensors):
    """A reader of both styles, from their description: layer -> difference to the weight."""
    found = {}
    for key, down in tensors.items():
        for a, b in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")):
            if key.endswith(a):
                layer = key.removesuffix(a)
                scale = float(tensors[f"{layer}.alpha"]) / len(down) if f"{layer}.alpha" in tensors else 1.0
                name = layer.removeprefix("diffusion_model.").removeprefix("lora_unet_")
                found[name] = scale * tensors[layer + b] @ down
    assert len(tensors) == len(found) * (3 if any(key.endswith(".alpha") for key in tensors) else 2)
    return found


@pytest.fixture(params=DENOISERS)
def lora(request):
    """The family's name, its denoiser's class, config and rows, and a LoRA of rank 2 on every layer of its blocks,
    whose inputs are one wide: the product with a vector of ones says as much as the whole matrix."""
    with torch.device("meta"):
        module = DENOISERS[request.param]()
    rows = {key: layer.out_features for key, layer in module.named_modules() if hasattr(layer, "out_features")}
    torch.manual_seed(0)
    layers = {name: (torch.randn(2, 1), torch.randn(rows[name], 2)) for name in adapters.lora_targets(module, "auto")}
    assert len(layers) > 5
    return request.param, type(module).__name__, module.config, rows, layers


def test_comfyui_layers_are_those_of_the_published_model(lora):
    family, *model, layers = lora
    if family in ("sd1", "sdxl"):
        assert styled("comfyui", *model, layers).keys() == styled("kohya", *model, layers).keys()
        return
    tensors = styled("comfyui", *model, layers)
    assert all(key.startswith("diffusion_model.") for key in tensors)
    convert = {
        "sd3": published.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux": published.convert_flux_transformer_checkpoint_to_diffusers,
        "wan": published.convert_wan_transformer_to_diffusers,
        "ltx": published.convert_ltx_transformer_checkpoint_to_diffusers,
        "qwen": lambda weights: weights,
    }[family]
    weights = convert(Published({f"{name}.weight": value for name, value in read(tensors).items()}))
    for name, (down, up) in layers.items():
        assert torch.allclose(weights[f"{name}.weight"], up @ down, atol=1e-5), name


def test_kohya_layers_are_the_same_under_flat_names(lora):
    family, *model, layers = lora
    tensors = styled("kohya", *model, layers)
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in tensors)
    if family not in ("sd1", "sdxl"):
        named = {name.replace(".", "_"): value for name, value in read(styled("comfyui", *model, layers)).items()}
        flat = read(tensors)
        assert named.keys() == flat.keys()
        assert all(torch.equal(value, flat[name]) for name, value in named.items())
    reader = {
        "sd1": d.StableDiffusionPipeline, "sdxl": d.StableDiffusionXLPipeline, "flux": d.FluxPipeline,
        "wan": d.WanPipeline, "qwen": d.QwenImagePipeline,
    }.get(family)  # fmt: skip
    if reader is None:
        return  # diffusers reads no kohya files of SD3 and LTX
    if family in ("sd1", "sdxl"):
        state, alphas = reader.lora_state_dict(dict(tensors), unet_config=_namespace(model[1]))
        assert set(alphas.values()) == {2.0}
        state = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})
        state = {key.replace(".processor.", "."): value for key, value in state.items()}
    else:
        state = reader.lora_state_dict(dict(tensors))
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
    assert len(state) == 2 * len(layers)
    for name, (down, up) in layers.items():
        found = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        assert torch.allclose(found, up @ down, atol=1e-5), name


def _namespace(config):
    return type("Config", (), dict(config))


def test_some_targets_of_a_joined_layer():
    layers = {f"blocks.0.attn1.to_{x}": (torch.randn(2, 1), torch.randn(3, 2)) for x in "qv"}
    layers = {f"transformer_blocks.0.attn.to_{x}": pair for x, pair in zip("qv", layers.values(), strict=True)}
    rows = {f"transformer_blocks.0.attn.to_{x}": 3 for x in "qkv"}
    tensors = styled("kohya", "SD3Transformer2DModel", {"num_layers": 2}, rows, layers)
    [change] = read(tensors).values()
    (a, b), (c, e) = layers.values()
    assert torch.allclose(change, torch.cat([b @ a, torch.zeros(3, 1), e @ c]))


def test_text_encoders_have_numbers():
    pair = {"encoder.layers.0.self_attn.q_proj": (torch.randn(2, 1), torch.randn(3, 2))}
    assert set(styled_text_encoder(1, pair)) == {
        f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    within = {f"text_model.{name}": value for name, value in pair.items()}
    assert styled_text_encoder(1, within).keys() == styled_text_encoder(1, pair).keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in styled_text_encoder(0, pair)
    t5 = {"encoder.block.0.layer.0.SelfAttention.q": (torch.randn(2, 1), torch.randn(3, 2))}
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha" in styled_text_encoder(3, t5)


def test_models_and_layers_without_published_names_are_refused():
    with pytest.raises(ConfigError, match="no published key style is known for OmniGenTransformer2DModel"):
        styled("kohya", "OmniGenTransformer2DModel", {}, {}, {})
    pair = {"context_embedder": (torch.randn(2, 1), torch.randn(3, 2))}
    with pytest.raises(ConfigError, match="the layer context_embedder of FluxTransformer2DModel"):
        styled("comfyui", "FluxTransformer2DModel", {}, {}, pair)


def test_all_formats_give_the_same_clip_in_diffusers(tiny_wan, tmp_path):
    cfg = tiny.config(tiny_wan, trainable={"rank": 2, "alpha": 6})
    modules = load_denoisers(cfg.generator, torch.device("cpu"), torch.float32)
    adapters.add_adapters(modules, cfg.trainable, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.trainable(modules).values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    weights = adapters.to_weight_set("lora", adapters.trainable(modules))

    def clip(folder):
        pipe = d.WanPipeline.from_pretrained(tiny_wan)
        pipe.set_progress_bar_config(disable=True)
        if folder:
            for file in folder.glob("*.safetensors"):
                pipe.load_lora_weights(folder, weight_name=file.name, use_safetensors=True)
        return pipe(
            "a red circle", height=16, width=16, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
            max_sequence_length=8, generator=torch.Generator().manual_seed(1), output_type="np",
        ).frames[0]  # fmt: skip

    lora = export_lora(cfg, weights, tmp_path / "lora")
    assert load_lines(lora, "owner/name") == ['pipe.load_lora_weights("owner/name")']
    (lora / "adapter_model.safetensors").unlink()  # the same for PEFT
    plain = clip(lora)
    assert np.abs(clip(None) - plain).max() > 1e-2
    for style in ("kohya", "comfyui"):
        folder = export_styled(cfg, weights, tmp_path / style, style)
        assert [path.name for path in folder.iterdir()] == [f"{style}.safetensors"]
        assert np.abs(clip(folder) - plain).max() <= 1e-4, style
        check_replaceable(folder, "--out", [])
        with pytest.raises(InputError, match="export it in the format lora"):
            find_trained(folder)
    alphas = {float(v) for k, v in load_file(tmp_path / "kohya/kohya.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {2.0}  # alpha / rank is in the weights
