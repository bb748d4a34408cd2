"""Tiny random pipelines of every family: every part of the real thing, a few thousand weights each."""

from __future__ import annotations

import itertools
import json
import shutil
import string
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "apple",
    "circle",
    "square",
    "on",
    "the",
    "and",
    "piñata",
    "flat",
    "modern",
    "style",
]
CONCEPTS = ["red apple", "green circle", "piñata"]
START, END = "<|startoftext|>", "<|endoftext|>"
TABLE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}


def build(folder: Path, closed: bool = False, family: str = "sd1") -> Path:
    """Write the folder: 32×32 pixels, VAE factor 8 (unconditional: 8×8 pixels, no VAE).

    `closed` adds a card that lists all concepts.
    """
    import torch

    torch.manual_seed(0)
    PIPELINES[family]().save_pretrained(folder)
    if closed:
        card = {
            "licence": "CC0-1.0",
            "resolution": 32,
            "concepts": CONCEPTS,
            "styles": ["flat"],
            "held_out": [["piñata", "flat"]],
            "defaults": {"steps": 3, "guidance": 2.0, "scheduler": "euler", "grid": "karras"},
        }
        (folder / "card.json").write_text(json.dumps(card))
    return folder


def changed(folder: Path, copy: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a folder with one file changed: the table of a .json, the tensors of a .safetensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    path = copy / file
    if path.suffix == ".json":
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return copy


# One function for each kind of pipeline. A function builds its parts in a fixed order: the weights depend on it.


def stable_diffusion(
    width: int = 16, layers: int = 2, prediction: str = "epsilon", time_cond_proj_dim: int | None = None
) -> Any:
    """Stable Diffusion 1 and 2. The width of the texts decides the family."""
    import diffusers

    tokenizer = clip_tokenizer()
    denoiser = unet(
        cross_attention_dim=width, use_linear_projection=width == 1024, time_cond_proj_dim=time_cond_proj_dim
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(width, layers=layers),
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=diffusers.DDIMScheduler(**TABLE, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(refiner: bool = False) -> Any:
    import diffusers

    denoiser = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24 if refiner else 40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 4 * (5 if refiner else 6),
    )
    cls = diffusers.StableDiffusionXLImg2ImgPipeline if refiner else diffusers.StableDiffusionXLPipeline
    more: dict[str, Any] = {"requires_aesthetics_score": True} if refiner else {}
    return cls(
        vae=vae(),
        text_encoder=None if refiner else clip(16),
        tokenizer=None if refiner else clip_tokenizer(),
        text_encoder_2=clip(24, projected=12),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(**{k: v for k, v in TABLE.items() if k != "clip_sample"}),
        force_zeros_for_empty_prompt=not refiner,
        add_watermarker=False,
        **more,
    )


def stable_diffusion_3(with_t5: bool = True) -> Any:
    import diffusers

    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=6,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(latent_channels=8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip(16, projected=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(24, projected=24),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=t5(48) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=denoiser,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(schnell: bool = False, cls: str = "FluxPipeline", channels: int = 16) -> Any:
    import diffusers

    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 2, 2),
    )
    return getattr(diffusers, cls)(
        vae=vae(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(48),
        tokenizer_2=t5_tokenizer(),
        transformer=denoiser,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not schnell),
    )


def chroma() -> Any:
    import diffusers

    return diffusers.ChromaPipeline(
        vae=vae(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=t5(48),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=8,
            approximator_hidden_dim=12,
            approximator_layers=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def z_image() -> Any:
    import diffusers

    return diffusers.ZImagePipeline(
        vae=vae(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=qwen3(24),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[1536, 64, 64],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux2_klein(is_distilled: bool = True) -> Any:
    import diffusers

    autoencoder = flux2_vae()
    return diffusers.Flux2KleinPipeline(
        vae=autoencoder,
        text_encoder=qwen3(8, layers=28),  # its outputs 9, 18 and 27 are read
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=is_distilled,
    )


def flux2_dev() -> Any:
    import diffusers

    autoencoder = flux2_vae()
    return diffusers.Flux2Pipeline(
        vae=autoencoder,
        text_encoder=mistral3(8, layers=31),  # its outputs 10, 20 and 30 are read
        tokenizer=mistral_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def flux2_vae() -> Any:
    import diffusers

    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return autoencoder


def flux2_transformer(guidance_embeds: bool) -> Any:
    import diffusers

    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def qwen_image() -> Any:
    import diffusers

    return diffusers.QwenImagePipeline(
        vae=qwen_vae(),
        text_encoder=qwen25vl(16),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def krea2(is_distilled: bool = False) -> Any:
    import diffusers

    return diffusers.Krea2Pipeline(
        vae=qwen_vae(),
        text_encoder=qwen3vl(16),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        text_encoder_select_layers=(0, 2),
        is_distilled=is_distilled,
    )


def ernie_image() -> Any:
    import diffusers
    from tokenizers import processors

    network = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)  # its last layers begin as zeros
    tokenizer = mistral_tokenizer()
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return diffusers.ErnieImagePipeline(
        vae=flux2_vae(),
        text_encoder=ministral3(16),
        tokenizer=tokenizer,
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
    )


def ministral3(width: int) -> Any:
    """With the vision of Mistral 3, which is not read."""
    from transformers import Mistral3Config, Mistral3Model

    text = {
        "model_type": "ministral3",
        "vocab_size": len(mistral_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "image_size": 28,
    }
    return Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))


def qwen3vl(width: int) -> Any:
    """With its vision, which is not read."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def unconditional() -> Any:
    import diffusers

    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )


# A family, or a variant of one, and the function that makes its pipeline of diffusers' own class. The weights are drawn
# from torch's global generator.
PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1": stable_diffusion,
    "lcm": partial(stable_diffusion, time_cond_proj_dim=8),  # guidance is an input of the UNet
    "sd2": partial(stable_diffusion, width=1024, layers=1, prediction="v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sdxl-refiner": partial(stable_diffusion_xl, refiner=True),
    "sd3": stable_diffusion_3,
    "sd3-without-t5": partial(stable_diffusion_3, with_t5=False),
    "flux": flux,
    "flux-schnell": partial(flux, schnell=True),
    "flux-kontext": partial(flux, cls="FluxKontextPipeline"),
    "flux-fill": partial(flux, cls="FluxFillPipeline", channels=16 + 16 + 256),
    "flux-control": partial(flux, cls="FluxControlPipeline", channels=16 + 16),
    "chroma": chroma,
    "z-image": z_image,
    "flux2-klein": flux2_klein,
    "flux2-klein-base": partial(flux2_klein, is_distilled=False),
    "flux2": flux2_dev,
    "qwen-image": qwen_image,
    "krea2": krea2,
    "krea2-turbo": partial(krea2, is_distilled=True),
    "ernie-image": ernie_image,
    "unconditional": unconditional,
}
FAMILIES = tuple(PIPELINES)


def controlnet(family: str, **changes: Any) -> Any:
    """A ControlNet for the tiny network of a family of transformers."""
    import diffusers

    config: dict[str, Any] = {"num_layers": 1, "joint_attention_dim": 48, "attention_head_dim": 4}
    if family == "sd3":
        config |= {"sample_size": 4, "in_channels": 8, "out_channels": 8, "num_attention_heads": 4}
        config |= {"caption_projection_dim": 16, "pooled_projection_dim": 40, "pos_embed_max_size": 6}
        network: Any = diffusers.SD3ControlNetModel(**{**config, **changes})
    else:
        config |= {"in_channels": 16, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        config |= {"pooled_projection_dim": 16, "axes_dims_rope": (4, 2, 2), "guidance_embeds": True}
        network = diffusers.FluxControlNetModel(**{**config, **changes})
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)  # its last layers begin as zeros
    return network


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        sample_size=32,
        **changes,
    )


def clip(width: int, layers: int = 2, projected: int | None = None) -> Any:
    """A text encoder; with the width of its projection, if it has one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, _ = _byte_pairs(WORDS)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        projection_dim=projected or 512,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def clip_tokenizer(**special: str) -> Any:
    """A tokenizer in which each of WORDS is one token; it cuts at 16."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs(WORDS)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16, **special)
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    return tokenizer


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_pieces()),
            d_model=width,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def t5_pieces() -> list[tuple[str, float]]:
    """T5's vocabulary: three special tokens, words and letters with their log-probabilities, a hundred sentinels."""
    letters = [*string.ascii_lowercase, "ñ"]
    words = [(f"▁{word}", -3.0 - i / 8) for i, word in enumerate(WORDS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return [*special, ("▁", -2.0), *words, *((letter, -8.0) for letter in letters), *sentinels]


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=t5_pieces(), model_max_length=32)


def mistral3(width: int, layers: int) -> Any:
    """With its vision, which is not read."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "vocab_size": len(mistral_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "image_size": 28,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def mistral_tokenizer() -> Any:
    """With the bytes and WORDS as its vocabulary behind the special tokens; it pads on the left."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>")
    words, merges = _byte_pairs([word for plain in WORDS for word in (plain, f" {plain}")], end="")
    vocabulary = {token: i for i, token in enumerate(special)} | {t: i + len(special) for t, i in words.items()}
    inner = Tokenizer(BPE(vocabulary, merges))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=1024,
    )  # fmt: skip
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% set b = ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]') if m.role == 'system' else "
        "('[INST]', '[/INST]') %}{{ b[0] }}{% for part in m.content %}{{ part.text }}{% endfor %}{{ b[1] }}{% endfor %}"
    )
    return tokenizer


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 1.0],
    )


def qwen25vl(width: int) -> Any:
    """With its vision, which only editing needs."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
        "window_size": 56,
    }
    ids = {name: qwen_tokenizer().convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start")}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3(width: int, layers: int = 3) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        )
    )


def qwen_tokenizer() -> Any:
    """Qwen's, with the bytes and WORDS as its vocabulary, and the tokens of its chats."""
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary, merges = _byte_pairs([word for plain in WORDS for word in (plain, f" {plain}")], end="")
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=1024)
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{%- endif %}"
    )
    return tokenizer


def byte_level(word: str) -> str:
    """The word in the letters of a byte-level vocabulary: printable Latin-1 bytes stay, the others become
    the characters from 256 on (GPT-2)."""
    return "".join(_BYTES[byte] for byte in word.encode())


def _byte_letters() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _byte_pairs(words: list[str], end: str = "</w>") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary in which each word is one token: merge the commonest pair until all are one token.

    `end` marks the ends of words; without it, the special tokens are not in the vocabulary.
    """
    letters = sorted(_BYTES.values())
    tokens = [*letters, *(letter + end for letter in letters), START, END] if end else letters
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = [[*byte_level(word)[:-1], byte_level(word)[-1] + end] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))
        pieces = [_merge(word, left, right) for word in pieces]
    return vocabulary, merges


def _merge(word: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and merged[-1] == left and piece == right:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return merged


if __name__ == "__main__":
    build(Path(sys.argv[1]), closed="closed" in sys.argv, family=next((f for f in FAMILIES if f in sys.argv), "sd1"))
