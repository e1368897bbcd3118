"""Editors and judges in their released sizes, with random weights: no downloads.

Only vocabularies are tiny; the tables over them are not.
"""

import diffusers as d
import torch
import transformers as t
from conftest import tiny_editor, tiny_qwen_tokenizer, tiny_qwen_vl
from transformers.modeling_utils import local_torch_dtype

NAMES = {  # the editor and its pipeline's class
    "kontext": ("FLUX.1-Kontext-dev", "FluxKontextPipeline"),
    "qwen": ("Qwen-Image-Edit-2509", "QwenImageEditPlusPipeline"),
    "klein": ("FLUX.2-klein-base-4B", "Flux2KleinPipeline"),
}


KL = dict(  # the VAE that both Flux editors have
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    block_out_channels=(128, 256, 512, 512),
    sample_size=1024,
)


def kontext():
    """{part: module} of FLUX.1-Kontext-dev."""
    clip = t.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        projection_dim=768,
        eos_token_id=2,
    )
    t5 = t.T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return {
        # Its other defaults are the released config.
        "transformer": d.FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": t.CLIPTextModel(clip),
        "text_encoder_2": t.T5EncoderModel(t5),
        "vae": d.AutoencoderKL(
            **KL,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    }


QWEN_VL = {  # sizes of Qwen2.5-VL's text model, and the width within a block of its vision
    "7B": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "32B": dict(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
}


def qwen_vl(size, config):
    """Qwen2.5-VL, the judge; 7B is also Qwen-Image-Edit's text encoder. config: has tokens' ids."""
    text = QWEN_VL[size] | dict(
        vocab_size=152064,
        rms_norm_eps=1e-6,
        max_position_embeddings=128000,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3456 if size == "32B" else 3420,
        num_heads=16,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        out_hidden_size=text["hidden_size"],
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    ids = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id")}
    return t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )


def qwen(tiny):
    """{part: module} of Qwen-Image-Edit-2509. tiny: a tiny pipeline of its class."""
    return {
        "transformer": d.QwenImageTransformer2DModel(num_layers=60),
        "text_encoder": qwen_vl("7B", tiny.text_encoder.config),
        "vae": d.AutoencoderKLQwenImage(),
    }


def klein():
    """{part: module} of FLUX.2-klein-base-4B."""
    qwen3 = t.Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return {
        "transformer": d.Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        ),
        "text_encoder": t.Qwen3ForCausalLM(qwen3),
        "vae": d.AutoencoderKLFlux2(**KL, latent_channels=32),
    }


def build_editor(model, device):
    """A pipeline with modules, prompts and pictures of the released sizes, in bf16."""
    pipe = tiny_editor(NAMES[model][1])
    with torch.device(device), local_torch_dtype(torch.bfloat16):
        if model == "kontext":
            parts = kontext()
        elif model == "qwen":
            parts = qwen(pipe)
        else:
            parts = klein()
    pipe.tokenizer.model_max_length = 77 if model == "kontext" else 512
    if model == "kontext":
        pipe.tokenizer_2.model_max_length = 512
    if model == "qwen":
        pictures = pipe.processor.image_processor
        pictures.patch_size = 14
        pictures.size = {"shortest_edge": 56**2, "longest_edge": 12845056}
    return type(pipe)(**pipe.components | parts)


def build_judge(size, device):
    """A judge of the size ("7B" or "32B") in bf16."""
    tiny, _ = tiny_qwen_vl(tiny_qwen_tokenizer())
    with torch.device(device), local_torch_dtype(torch.bfloat16):
        model = qwen_vl(size, tiny.config)
    return model.requires_grad_(False).eval()


def parameters(pipe):
    """{part: its number of parameters} of a pipeline."""
    counts = {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            counts[part] = sum(parameter.numel() for parameter in module.parameters())
    return counts
