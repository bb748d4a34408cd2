"""The networks of the bundled model: what is trained, and what the exported folder says it is."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PREDICTION = "v_prediction"
WIDTH = 192  # of the text encoder
UNET = dict(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 192),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=WIDTH,
    attention_head_dim=4,  # in this class: the number of heads
    norm_num_groups=16,
)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
