"""Single files by their headers: families, variants, files that are no checkpoint, bundled configurations."""

import json
import math
from pathlib import Path

import pytest
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from test_models_gate import make_folder
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Qwen3Model, T5EncoderModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from diffgen.errors import InputError
from diffgen.models import families, gate
from diffgen.models.find import check, find
from diffgen.models.info import info
from diffgen.models.single_file import CONFIGS, check_file, recognise
from diffgen.pipelines.weights.network import make_network

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BOTH_VAE = {VAE + "encoder.conv_in.weight": (128, 3, 3, 3), VAE + "decoder.conv_in.weight": (512, 4, 3, 3)}


def unet(width, channels=4, **more):
    return {
        UNET + "input_blocks.0.0.weight": (320, channels, 3, 3),
        UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
        UNET + "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        **more,
    }


def text(prefix, width=768):
    return {prefix + "embeddings.token_embedding.weight": (49408, width)}


CLIP_L = text("cond_stage_model.transformer.text_model.")
CLIP_H = {
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
}
CLIP_G = {
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
}
SD1 = {**unet(768), **CLIP_L, **BOTH_VAE}
SD2 = {**unet(1024), **CLIP_H, **BOTH_VAE}
SDXL = {
    **unet(2048),
    **text("conditioner.embedders.0.transformer.text_model."),
    **CLIP_G,
    **BOTH_VAE,
}
REFINER = {
    **unet(1280),
    **BOTH_VAE,
    **{name.replace("embedders.1", "embedders.0"): shape for name, shape in CLIP_G.items()},
}
MMDIT = {
    f"{UNET}joint_blocks.{i}.context_block.adaLN_modulation.1.bias": (9216 if i < 23 else 3072,) for i in range(24)
} | {UNET + "pos_embed": (1, 36864, 1536), UNET + "x_embedder.proj.weight": (1536, 16, 2, 2)}
CLIPS = {
    **text("text_encoders.clip_l.transformer.text_model."),
    **text("text_encoders.clip_g.transformer.text_model.", 1280),
}
SD3 = {**MMDIT, **CLIPS, **BOTH_VAE}
SD35 = {
    f"joint_blocks.{i}.{name}": shape
    for i in range(24)
    for name, shape in {
        "context_block.adaLN_modulation.1.bias": (9216,),
        "x_block.attn.ln_q.weight": (64,),
        **({"x_block.attn2.qkv.weight": (4608, 1536)} if i < 13 else {}),
    }.items()
} | {"pos_embed": (1, 147456, 1536), "x_embedder.proj.weight": (1536, 16, 2, 2)}
FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "single_blocks.0.linear1.weight": (21504, 3072),
    "img_in.weight": (3072, 64),
}

CHROMA = {**FLUX, "distilled_guidance_layer.in_proj.bias": (5120,)}
Z_IMAGE = {
    f"{UNET}{name}": shape
    for name, shape in {
        "layers.0.adaLN_modulation.0.weight": (15360, 256),
        "layers.0.attention.qkv.weight": (11520, 3840),
        "noise_refiner.0.attention.qkv.weight": (11520, 3840),
        "cap_embedder.0.weight": (2560,),
        "x_embedder.weight": (3840, 64),
    }.items()
}
KLEIN = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "single_blocks.0.linear1.weight": (27648, 3072),
    "single_stream_modulation.lin.weight": (9216, 3072),
    "double_stream_modulation_img.lin.weight": (18432, 3072),
    "img_in.weight": (3072, 128),
    "txt_in.weight": (3072, 7680),
}
QWEN = {"transformer_blocks.0.img_mod.1.weight": (18432, 3072), "img_in.weight": (3072, 64), "txt_norm.weight": (3584,)}


def write(path: Path, shapes, metadata=None, dtype="F16") -> Path:
    """A safetensors file of zeros: the header as it would be, the tensors a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * gate.DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({**header, **({"__metadata__": metadata} if metadata else {})}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


# Checkpoints

CHECKPOINTS = {
    "sd1": (SD1, "sd1", None, "v1"),
    "inpainting": ({**SD1, UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}, "sd1", "inpaint", "inpainting"),
    "dreamshaper-lcm": (SD1, "sd1", "lcm-merged", "v1"),
    "lcm": ({**SD1, UNET + "time_embed.cond_proj.weight": (320, 256)}, "sd1", "lcm", "v1"),
    "unet-alone": (unet(768), "sd1", None, "v1"),
    "v2-1_768-ema-pruned": (SD2, "sd2", None, "v2"),
    "sd2-unet-alone-768": (unet(1024), "sd2", None, "v2"),
    "512-inpainting-ema": (
        {**SD2, UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
        "sd2",
        "inpaint",
        "inpainting_v2",
    ),
    "sd_turbo": (SD2, "sd2", "turbo", "v2"),
    "sdxl": (SDXL, "sdxl", None, "xl_base"),
    "sd_xl_turbo_1.0_fp16": (SDXL, "sdxl", "turbo", "xl_base"),
    "juggernautXL_v9Lightning": (SDXL, "sdxl", "turbo", "xl_base"),
    "xl-inpaint": ({**SDXL, UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}, "sdxl", "inpaint", "xl_inpaint"),
    "refiner": (REFINER, "sdxl-refiner", None, "xl_refiner"),
    "sd3_medium_incl_clips": (SD3, "sd3", None, "sd3"),
    "sd3-alone": (MMDIT, "sd3", None, "sd3"),
    "sd3.5_medium": (SD35, "sd3", "3.5", "sd35_medium"),
    "schnell": (FLUX, "flux", "schnell", "flux-schnell"),
    "dev": ({**FLUX, "guidance_in.in_layer.bias": (3072,)}, "flux", None, "flux-dev"),
    "dev-comfy": (
        {UNET + name: shape for name, shape in {**FLUX, "guidance_in.in_layer.bias": (3072,)}.items()},
        "flux",
        None,
        "flux-dev",
    ),
    "Chroma1-HD": (CHROMA, "chroma", None, "chroma"),
    "chroma-flash": (CHROMA, "chroma", "flash", "chroma"),
    "z_image_turbo_bf16": (Z_IMAGE, "z-image", "turbo", "z-image-turbo"),
    "z_image_bf16": (Z_IMAGE, "z-image", None, "z-image-turbo"),
    "flux-2-klein-4b": (KLEIN, "flux2-klein", None, "flux-2-dev"),
    "flux-2-klein-base-4b": (KLEIN, "flux2-klein", "base", "flux-2-dev"),
    "flux2-dev": ({**KLEIN, "guidance_in.in_layer.weight": (6144, 256)}, "flux2", None, "flux-2-dev"),
    "qwen_image_bf16": (QWEN, "qwen-image", None, "v1"),  # diffusers does not know its files
}


class Shaped:
    def __init__(self, shape):
        self.shape = shape


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_families_and_variants(tmp_path, name):
    """diffusers recognises the same family by the same names and shapes."""
    shapes, family, variant, theirs = CHECKPOINTS[name]
    contents = recognise(write(tmp_path / f"{name}.safetensors", shapes))
    assert (contents.kind, contents.family, contents.variant) == ("checkpoint", family, variant)
    assert infer_diffusers_model_type({name: Shaped(shape) for name, shape in shapes.items()}) == theirs
    assert {name: tensor.shape for name, tensor in contents.tensors.items()} == shapes


def test_the_parts_of_a_checkpoint(tmp_path):
    more = {"model_ema.decay": (1,), "betas": (1000,)}
    path = write(tmp_path / "sub/x.safetensors", {**SDXL, **more})
    checked = check_file(path)
    assert (checked.family, checked.file, checked.folder) == ("sdxl", path, tmp_path / "sub")
    assert {name: len(part.tensors or ()) for name, part in checked.components.items()} == {
        "unet": 3, "vae": 2, "text_encoder": 1, "text_encoder_2": 2, "tokenizer": 0, "tokenizer_2": 0, "scheduler": 0,
    }  # fmt: skip
    assert set(checked.unused) == set(more)
    assert all(part.weights == ((path,) if part.tensors else ()) for part in checked.components.values())
    assert checked.components["tokenizer"].config == {}
    assert checked.components["tokenizer_2"].config == {"pad_token": "!"}
    assert checked.files == (path,)
    small = write(tmp_path / "small.safetensors", {**SD1, **text("cond_stage_model.transformer.text_model.", 8)})
    hashes = gate.file_hashes(check_file(small))
    assert list(hashes) == ["small.safetensors"]
    assert gate.model_hash(check_file(small), hashes) == hashes["small.safetensors"]


def test_configurations_follow_the_header(tmp_path):
    inpaint = check_file(write(tmp_path / "a.safetensors", CHECKPOINTS["inpainting"][0]))
    assert inpaint.network.config["in_channels"] == 9
    lcm = check_file(write(tmp_path / "b.safetensors", CHECKPOINTS["lcm"][0]))
    assert lcm.network.config["time_cond_proj_dim"] == 256
    assert (lcm.defaults.scheduler, lcm.defaults.guidance) == ("lcm", 8.0)
    medium = check_file(write(tmp_path / "c.safetensors", {**SD35, **CLIPS, **BOTH_VAE})).network.config
    assert (medium["num_layers"], medium["pos_embed_max_size"], medium["qk_norm"]) == (24, 384, "rms_norm")
    assert medium["dual_attention_layers"] == list(range(13))
    large = {f"joint_blocks.{i}.x_block.attn.ln_q.weight": (64,) for i in range(38)}
    large |= {"pos_embed": (1, 36864, 2432), "x_embedder.proj.weight": (2432, 16, 2, 2)}
    config = check_file(write(tmp_path / "d.safetensors", {**large, **CLIPS, **BOTH_VAE})).network.config
    assert (config["num_layers"], config["num_attention_heads"], config["caption_projection_dim"]) == (38, 38, 2432)
    assert (config["pos_embed_max_size"], "dual_attention_layers" in config) == (192, False)


@pytest.mark.parametrize(
    ("name", "shapes", "metadata", "option", "prediction"),
    [
        ("v2-1_768-ema", SD2, {}, None, "v_prediction"),
        ("768model", SD2, {}, None, "v_prediction"),
        ("v2-1_512-ema", SD2, {}, None, "epsilon"),
        ("512-base-ema", SD2, {}, None, "epsilon"),
        ("sd_turbo", SD2, {}, None, "epsilon"),
        ("x", SD2, {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("x", SD2, {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("x", SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ("x", SD2, {}, "v_prediction", "v_prediction"),
        ("768", SD2, {}, "epsilon", "epsilon"),
        ("17680", SD2, {}, None, None),
        ("wd", SD2, {}, None, None),
        ("x", SD1, {}, None, "epsilon"),
        ("x", SDXL, {}, None, "epsilon"),
        ("noobai-vPred-1", SDXL, {}, None, "v_prediction"),
        ("anime_v-pred", SD1, {}, None, "v_prediction"),
        ("x", {**SDXL, "v_pred": (0,), "ztsnr": (0,)}, {}, None, "v_prediction"),
    ],
)
def test_what_the_network_predicts(tmp_path, name, shapes, metadata, option, prediction):
    path = write(tmp_path / f"{name}.safetensors", shapes, metadata)
    if prediction is None:
        with pytest.raises(InputError, match="neither the file nor its name") as excinfo:
            check_file(path)
        assert "prediction" in excinfo.value.hint
        return
    checked = check_file(path, prediction=option)
    config = checked.components["scheduler"].config
    assert shapes is not SD2 or checked.network.config["sample_size"] == (96 if prediction == "v_prediction" else 64)
    assert config["prediction_type"] == prediction
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in shapes)


# What lacks comes from a base


def test_a_folder_beside_the_file_supplies_missing_components(tmp_path):
    path = write(tmp_path / "x.safetensors", unet(768))
    with pytest.raises(InputError, match="lacks vae, text_encoder") as excinfo:
        check_file(path)
    assert "x/" in excinfo.value.hint
    base = make_folder(tmp_path / "x")
    checked = check_file(path)
    assert checked.components["unet"].weights == (path,)
    assert checked.components["unet"].config == json.loads((base / "unet/config.json").read_text())
    assert checked.components["vae"].weights == (base / "vae/diffusion_pytorch_model.safetensors",)
    assert (checked.folder, checked.file) == (base, path)
    assert {path, base / "tokenizer/vocab.json"} <= set(checked.files)
    assert base / "unet/diffusion_pytorch_model.safetensors" not in checked.files
    assert "x.safetensors" in gate.file_hashes(checked)
    assert check_file(path, base, "v_prediction").components["scheduler"].config["prediction_type"] == "v_prediction"
    xl = write(tmp_path / "xl.safetensors", unet(2048, **CLIP_G))
    with pytest.raises(InputError, match="of the family sd1"):
        check_file(xl, base)
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="vae"):
        check_file(path)


T5 = {"text_encoders.t5xxl.transformer.shared.weight": (32128, 4096)}


@pytest.mark.parametrize(
    ("shapes", "family", "encoder"),
    [({**SD3, **T5}, "sd3", "text_encoder_3"), ({**FLUX, **CLIPS, **T5, **BOTH_VAE}, "flux", "text_encoder_2")],
)
def test_t5_comes_with_its_tokenizer(tmp_path, shapes, family, encoder):
    checked = check_file(write(tmp_path / "x.safetensors", shapes))
    assert (checked.family, checked.folder) == (family, tmp_path)
    assert set(checked.components) == set(families.FAMILIES[family].parts)
    assert dict(checked.components[encoder].tensors).keys() == T5.keys()
    assert checked.components[encoder.replace("text_encoder", "tokenizer")].folder == CONFIGS / "t5_tokenizer"
    without = {name: shape for name, shape in shapes.items() if name not in T5}
    if family == "sd3":
        assert {encoder, "tokenizer_3"}.isdisjoint(check_file(write(tmp_path / "y.safetensors", without)).components)
    else:
        with pytest.raises(InputError, match="lacks text_encoder_2") as excinfo:
            check_file(write(tmp_path / "flux.safetensors", without))
        assert "flux/" in excinfo.value.hint


def test_fluxs_configuration_follows_the_header(tmp_path):
    rest = {**CLIPS, **T5, **BOTH_VAE}
    schnell = check_file(write(tmp_path / "a.safetensors", {**FLUX, **rest}))
    few = {f"double_blocks.{i}.img_attn.qkv.weight": (9216, 3072) for i in range(8)}
    dev = check_file(write(tmp_path / "b.safetensors", {**FLUX, **few, **rest, "guidance_in.in_layer.bias": (3072,)}))
    for checked, embeds, blocks, noise in ((schnell, False, 1, (1.0, False)), (dev, True, 8, (3.0, True))):
        config, scheduler = checked.network.config, checked.components["scheduler"].config
        assert (config["guidance_embeds"], config["num_layers"], config["num_single_layers"]) == (embeds, blocks, 1)
        assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == noise


# What is no checkpoint


def lora(keys, width, rank=8):
    return {f"{key}.{part}": shape for key in keys for part, shape in (
        ("lora_down.weight", (rank, width)), ("lora_up.weight", (320, rank)), ("alpha", ()))}  # fmt: skip


ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
OTHERS = {
    "kohya": (lora([f"lora_unet_{ATTENTION}", f"lora_te_{ATTENTION}"], 768), "lora", "sd1", "6 tensors named lora_"),
    "kohya2": (lora([f"lora_unet_{ATTENTION}"], 1024), "lora", "sd2", "LoRA for Stable Diffusion 2"),
    "kohyaxl": (lora([f"lora_unet_{ATTENTION}", "lora_te2_x"], 2048), "lora", "sdxl", "--lora"),
    "peft": (
        {f"{DOTTED}.to_k.lora_A.weight": (4, 768), f"{DOTTED}.to_k.lora_B.weight": (320, 4)}, "lora", "sd1", "unet.",
    ),
    "old": (
        {f"{DOTTED}.processor.to_k_lora.down.weight": (4, 768), f"{DOTTED}.processor.to_k_lora.up.weight": (320, 4)},
        "lora", "sd1", "LoRA",
    ),
    "flux": (lora(["lora_unet_double_blocks_0_img_attn_proj"], 3072), "lora", "flux", "FLUX.1"),
    "sd3": (
        {f"transformer.transformer_blocks.0.attn.add_k_proj.lora_{x}.weight": (4, 4) for x in "AB"}, "lora", "sd3", "3",
    ),
    "unknown lora": (lora(["lora_unet_other"], 5), "lora", None, "it is a LoRA"),
    "vae": ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}, "vae", None, "a VAE"),
    "vae2": (BOTH_VAE, "vae", None, "first_stage_model.*: it is a VAE"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "controlnet", None, "a ControlNet"),
    "controlnet2": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "down_blocks.0.x": (1,)}, "controlnet",
                    None, "--control"),
    "a1111 embedding": ({"emb_params": (8, 768)}, "embedding", "sd1", "an embedding for Stable Diffusion 1"),
    "embedding": ({"<cat>": (1024,)}, "embedding", "sd2", "--embedding"),
    "embedding xl": ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "embedding", "sdxl", "width 768 and 1280"),
    "upscaler": ({"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}, "upscaler", None, "an upscaler"),
    "upscaler2": ({"conv_first.weight": (64, 3, 3, 3)}, "upscaler", None, "larger"),
    "ip adapter": ({"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.x": (1,)}, "other", None, "IP-Adapter"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "part", None, "whole diffusers folder"),
    "transformer": ({"transformer_blocks.0.attn.to_q.weight": (9, 9)}, "part", None, "whole diffusers folder"),
    "clip": ({"text_model.encoder.layers.0.mlp.fc1.bias": (3072,)}, "part", None, "a text encoder"),
    "x4": ({**SD2, UNET + "input_blocks.0.0.weight": (320, 7, 3, 3)}, "other", None, "upscaling model with 7 channels"),
    "pix2pix": ({**SD1, UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)}, "other", None, "InstructPix2Pix"),
    "depth": ({**SD2, UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)}, "other", None, "depth"),
    "playground": ({**SDXL, "edm_mean": (4,)}, "other", None, "Playground"),
    "fill": ({**FLUX, "img_in.weight": (3072, 384)}, "other", None, "control picture"),
    "radiance": ({**CHROMA, "nerf_final_layer_conv.norm.scale": (1,)}, "other", None, "Chroma-Radiance"),
    "else": ({"a.b": (3, 700), "c": (9, 9, 9)}, "other", None, "unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_checkpoint_is_refused_with_a_hint(tmp_path, name):
    shapes, kind, family, words = OTHERS[name]
    path = write(tmp_path / "x.safetensors", shapes)
    contents = recognise(path)
    assert (contents.kind, contents.family) == (kind, family)
    for look in (check_file, lambda path: find(str(path))):
        with pytest.raises(InputError) as excinfo:
            look(path)
        text = f"{excinfo.value.message}; {excinfo.value.hint}"
        assert words in text
        assert "not a checkpoint diffgen can read: " in text
        assert str(path) in text


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("x.safetensors", b"\x80\x02}q\0.", "pickle"),
        ("x.safetensors", b"PK\x03\x04" + bytes(64), "pickle or zip"),
        ("x", b"<html>", "not a safetensors file"),
    ],
)
def test_other_files(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=match) as excinfo:
        find(str(tmp_path / name))
    assert "safetensors" in excinfo.value.hint


def test_empty_tensors_are_marks_only(tmp_path):
    for name in ("v_pred2", "other"):
        with pytest.raises(InputError, match="shape"):
            recognise(write(tmp_path / "x.safetensors", {name: (0,)}))


def test_names_in_messages_are_escaped(tmp_path):
    with pytest.raises(InputError) as excinfo:
        check_file(write(tmp_path / "x.safetensors", {"\x1b[2J": (3, 768)}))
    assert excinfo.value.message.isprintable()


def test_find_and_info_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.SAFETENSORS", SDXL, {"modelspec.license": "MIT"})
    model = find("mine.SAFETENSORS")
    assert (model.name, model.family, model.source, model.file) == ("mine", "sdxl", "file", Path("mine.SAFETENSORS"))
    about = info(model)
    assert (about["resolution"], about["prediction"], about["licence"]) == (1024, "epsilon", "MIT")
    assert about["bytes"] == (tmp_path / "mine.SAFETENSORS").stat().st_size
    assert about["family_defaults"]["steps"] == 30
    assert check(model).family == "sdxl"


# The bundled configurations


def parameters(cls, folder: Path) -> int:
    import torch

    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        network = make_network(cls.__name__, config)
    assert type(network) is cls
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("folder", "cls", "count"),
    [
        ("sd1/unet", UNet2DConditionModel, 859_520_964),
        ("sd1/vae", AutoencoderKL, 83_653_863),
        ("sd1/text_encoder", CLIPTextModel, 123_060_480),
        ("sd2/unet", UNet2DConditionModel, 865_910_724),
        ("sd2/text_encoder", CLIPTextModel, 340_387_840),
        ("sdxl/unet", UNet2DConditionModel, 2_567_463_684),
        ("sdxl/text_encoder_2", CLIPTextModelWithProjection, 694_659_840),
        ("sdxl-refiner/unet", UNet2DConditionModel, pytest.approx(2.26e9, rel=1e-3)),
        ("sd3/transformer", SD3Transformer2DModel, 2_028_328_000),
        ("sd3/vae", AutoencoderKL, 83_819_683),
        ("sd3/text_encoder_3", T5EncoderModel, 4_762_310_656),
        ("flux/text_encoder", CLIPTextModel, 123_060_480),
        ("flux/text_encoder_2", T5EncoderModel, 4_762_310_656),
        ("flux/transformer", FluxTransformer2DModel, 11_901_408_320),
        ("flux/vae", AutoencoderKL, 83_819_683),
        ("z-image/transformer", ZImageTransformer2DModel, 6_154_908_736),
        ("z-image/text_encoder", Qwen3Model, 4_022_468_096),
        ("chroma/transformer", ChromaTransformer2DModel, pytest.approx(8.9e9, rel=0.01)),
        ("flux2/transformer", Flux2Transformer2DModel, pytest.approx(32e9, rel=0.02)),
        ("flux2/text_encoder", MistralModel, pytest.approx(23e9, rel=0.02)),
        ("flux2-klein/transformer", Flux2Transformer2DModel, pytest.approx(4e9, rel=0.05)),
        ("flux2-klein/vae", AutoencoderKLFlux2, pytest.approx(84e6, rel=0.01)),
        ("qwen-image/transformer", QwenImageTransformer2DModel, 20_430_401_088),
        ("qwen-image/vae", AutoencoderKLQwenImage, pytest.approx(127e6, rel=0.01)),
        ("qwen-image/text_encoder", Qwen2_5_VLTextModel, 7_070_619_136),
    ],
)
def test_configurations_make_networks_of_the_published_sizes(folder, cls, count):
    family, part = folder.split("/")
    counted = json.loads((Path(__file__).parent.parent / "docs" / "parameters.json").read_text())
    assert parameters(cls, CONFIGS / folder) == count == counted[family][part][0]


def test_clips_vocabulary():
    folder = CONFIGS / "clip_tokenizer"
    assert gate.check_tokenizer(folder) == [folder / "vocab.json", folder / "merges.txt"]
    vocabulary = gate.read_json(folder / "vocab.json", gate.MAX_TOKENIZER_FILE)
    assert sorted(vocabulary.values()) == list(range(49408))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo of a CAT").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_every_bundled_configuration_passes_the_gate():
    folders = {path.parent.name for path in CONFIGS.glob("*/model_index.json")}
    assert folders == {
        "sd1",
        "sd2",
        "sdxl",
        "sdxl-refiner",
        "sd3",
        "flux",
        "chroma",
        "z-image",
        "flux2",
        "flux2-klein",
        "qwen-image",
    }
    for name in folders:
        index = gate.read_index(CONFIGS / name)
        assert (index.family, index.variant) == (name, None)
        assert set(index.pairs) == set(families.FAMILIES[name].parts)
