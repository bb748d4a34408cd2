"""Folders of every family pass the gate with the same strictness; variants are recognised; defaults are valid."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from test_models_gate import TENSORS, make_folder

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.models import gate
from diffgen.models.families import COMPANIONS, FAMILIES, PIPELINES, TASKS, class_of, defaults_of, family_of
from diffgen.models.gate import check_companion, check_folder
from diffgen.models.single_file import CONFIGS

CLIP, SECOND = ("transformers", "CLIPTextModel"), ("transformers", "CLIPTextModelWithProjection")
TOKENIZER, T5 = ("transformers", "CLIPTokenizer"), ("transformers", "T5EncoderModel")
T5_TOKENIZER = ("transformers", "T5TokenizerFast")
UNET, VAE = ("diffusers", "UNet2DConditionModel"), ("diffusers", "AutoencoderKL")
EULER, FLOW = ("diffusers", "EulerDiscreteScheduler"), ("diffusers", "FlowMatchEulerDiscreteScheduler")
SD = {"unet": UNET, "vae": VAE, "text_encoder": CLIP, "tokenizer": TOKENIZER, "scheduler": EULER}
XL = {**SD, "text_encoder_2": SECOND, "tokenizer_2": TOKENIZER}
SD3 = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": VAE,
    "text_encoder": SECOND,
    "text_encoder_2": SECOND,
    "text_encoder_3": T5,
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
    "tokenizer_3": T5_TOKENIZER,
    "scheduler": FLOW,
}
Z_IMAGE = {
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": VAE,
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "scheduler": FLOW,
}
KLEIN = {
    **Z_IMAGE,
    "transformer": ("diffusers", "Flux2Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLFlux2"),
    "text_encoder": ("transformers", "Qwen3ForCausalLM"),
    "tokenizer": ("transformers", "Qwen2TokenizerFast"),
}
QWEN = {
    **Z_IMAGE,
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
}
CHROMA = {
    **Z_IMAGE,
    "transformer": ("diffusers", "ChromaTransformer2DModel"),
    "text_encoder": T5,
    "tokenizer": ("transformers", "T5Tokenizer"),
}
FLUX2 = {
    **KLEIN,
    "text_encoder": ("transformers", "Mistral3ForConditionalGeneration"),
    "tokenizer": ("transformers", "PixtralProcessor"),
}
FLUX = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": VAE,
    "text_encoder": CLIP,
    "text_encoder_2": T5,
    "tokenizer": TOKENIZER,
    "tokenizer_2": ("transformers", "T5Tokenizer"),
    "scheduler": FLOW,
}
PIXELS = {"unet": ("diffusers", "UNet2DModel"), "scheduler": ("diffusers", "DDPMScheduler")}
TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
ZSNR = {**TURBO, "prediction_type": "v_prediction"}

# name: (pipeline, parts, the network's configuration, the scheduler's, family, variant)
FOLDERS = {
    "v1-4": ("StableDiffusionPipeline", SD, {"cross_attention_dim": 768}, {}, "sd1", None),
    "inpaint": ("StableDiffusionInpaintPipeline", SD, {"in_channels": 9}, {}, "sd1", "inpaint"),
    "lcm": ("LatentConsistencyModelPipeline", SD, {"time_cond_proj_dim": 256}, {}, "sd1", "lcm"),
    "merged": ("StableDiffusionPipeline", SD, {}, {"_class_name": "LCMScheduler"}, "sd1", "lcm-merged"),
    "my-lcm": ("StableDiffusionPipeline", SD, {}, {}, "sd1", "lcm-merged"),
    "2-1": ("StableDiffusionPipeline", SD, {"cross_attention_dim": 1024}, ZSNR, "sd2", None),
    "2t": ("StableDiffusionPipeline", SD, {"cross_attention_dim": 1024}, TURBO, "sd2", "turbo"),
    "sd-turbo": ("StableDiffusionPipeline", SD, {"cross_attention_dim": 1024}, {}, "sd2", "turbo"),
    "xl": ("StableDiffusionXLPipeline", XL, {"cross_attention_dim": 2048}, {}, "sdxl", None),
    "xl-img2img": ("StableDiffusionXLImg2ImgPipeline", XL, {}, {}, "sdxl", None),
    "DreamShaperXL-Lightning": ("StableDiffusionXLPipeline", XL, {}, {}, "sdxl", "turbo"),
    "sdxl-turbo": ("StableDiffusionXLPipeline", XL, {}, {}, "sdxl", "turbo"),
    "refiner": (
        "StableDiffusionXLImg2ImgPipeline",
        {name: pair for name, pair in XL.items() if name not in ("text_encoder", "tokenizer")},
        {},
        {},
        "sdxl-refiner",
        None,
    ),
    "sd3": ("StableDiffusion3Pipeline", SD3, {}, {"shift": 3.0}, "sd3", None),
    "sd3-without-t5": (
        "StableDiffusion3Pipeline",
        {name: pair for name, pair in SD3.items() if not name.endswith("_3")},
        {},
        {},
        "sd3",
        None,
    ),
    "medium": ("StableDiffusion3Pipeline", SD3, {"qk_norm": "rms_norm"}, {}, "sd3", "3.5"),
    "large-turbo": ("StableDiffusion3Pipeline", SD3, {"qk_norm": "rms_norm"}, {}, "sd3", "turbo"),
    "dev": ("FluxPipeline", FLUX, {"guidance_embeds": True}, {}, "flux", None),
    "kontext": ("FluxKontextPipeline", FLUX, {"guidance_embeds": True}, {}, "flux-kontext", None),
    "schnell": ("FluxPipeline", FLUX, {"guidance_embeds": False}, {}, "flux", "schnell"),
    "z-image": ("ZImagePipeline", Z_IMAGE, {}, {"shift": 6.0}, "z-image", None),
    "klein-4B": ("Flux2KleinPipeline", KLEIN, {}, {}, "flux2-klein", None),
    "klein-base-9B": ("Flux2KleinPipeline", KLEIN, {}, {}, "flux2-klein", "base"),
    "Chroma1-HD": ("ChromaPipeline", CHROMA, {}, {}, "chroma", None),
    "Chroma1-Flash": ("ChromaPipeline", CHROMA, {}, {}, "chroma", "flash"),
    "FLUX.2-dev": ("Flux2Pipeline", FLUX2, {"guidance_embeds": True}, {}, "flux2", None),
    "qwen": ("QwenImagePipeline", QWEN, {}, {"base_shift": 0.5, "max_shift": 0.9}, "qwen-image", None),
    "q8": ("QwenImagePipeline", QWEN, {}, {"base_shift": 1.0986, "max_shift": 1.0986}, "qwen-image", "lightning"),
    "Z-Image-Turbo": ("ZImagePipeline", Z_IMAGE, {}, {"shift": 3.0}, "z-image", "turbo"),
    "church": ("DDPMPipeline", PIXELS, {"sample_size": 32}, {}, "unconditional", None),
    "ddim": ("DDIMPipeline", PIXELS, {}, {}, "unconditional", None),
}


def build(folder: Path, pipeline: str, parts, network=None, scheduler=None) -> Path:
    """A folder of that pipeline with tiny weights, as `save_pretrained` lays it out."""
    for name, (library, _) in parts.items():
        (folder / name).mkdir(parents=True)
        if name.startswith("tokenizer"):
            (folder / name / "vocab.json").write_text('{"a": 0}')
            (folder / name / "merges.txt").write_text("#version: 0.2\n")
        elif name == "scheduler":
            (folder / name / "scheduler_config.json").write_text(json.dumps(scheduler or {}))
        else:
            main = name in ("unet", "transformer")
            (folder / name / "config.json").write_text(json.dumps((network or {}) if main else {}))
            stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
            save_file(TENSORS, folder / name / f"{stem}.safetensors")
    index = {
        "_class_name": pipeline,
        "image_encoder": [None, None],
        **{name: list(pair) for name, pair in parts.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_passes(tmp_path, name):
    pipeline, parts, network, scheduler, family, variant = FOLDERS[name]
    folder = build(tmp_path / name, pipeline, parts, network, scheduler)
    checked = check_folder(folder)
    assert (checked.family, checked.variant, checked.pipeline) == (family, variant, pipeline)
    assert {part: (c.library, c.class_name) for part, c in checked.components.items()} == parts
    assert set(checked.files) == {path for path in folder.rglob("*") if path.is_file()}
    assert checked.network.config == network
    hashes = gate.file_hashes(checked)
    stem = "diffusion_pytorch_model.safetensors"
    assert gate.model_hash(checked, hashes) == hashes[f"{checked.network.name}/{stem}"]
    assert checked.defaults == defaults_of(family, variant)


@pytest.mark.parametrize("name", ["v1-4", "xl", "refiner", "sd3", "dev", "z-image", "klein-4B", "qwen", "church"])
def test_no_part_may_lack_or_be_of_another_class(tmp_path, name):
    pipeline, parts, network, _, family, _ = FOLDERS[name]
    folder = build(tmp_path / "model", pipeline, parts, network)
    index = json.loads((folder / "model_index.json").read_text())
    for part in parts:
        optional = FAMILIES[family].parts[part].optional
        for value in (["os", "system"], ["diffusers", "antigravity.x"], ["transformers", "AutoModel"], [None, None]):
            if optional and value == [None, None]:
                continue
            (folder / "model_index.json").write_text(json.dumps({**index, part: value}))
            with pytest.raises(InputError, match=r"model_index\.json"):
                check_folder(folder)
    (folder / "model_index.json").write_text(json.dumps({**index, "adapter": ["diffusers", "T2IAdapter"]}))
    with pytest.raises(InputError, match="adapter"):
        check_folder(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in parts:
        shutil.move(folder / part, tmp_path / "away")
        if FAMILIES[family].parts[part].optional and part.startswith("text"):
            assert not {part, "tokenizer_3"} & set(check_folder(folder).components)
        else:
            with pytest.raises(InputError, match=part):
                check_folder(folder)
        shutil.move(tmp_path / "away", folder / part)


def test_damaged_weights_of_any_part_are_named(tmp_path):
    pipeline, parts, network, *_ = FOLDERS["sd3"]
    folder = build(tmp_path / "model", pipeline, parts, network)
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(InputError, match="cut off") as excinfo:
            check_folder(folder)
        assert str(path) in excinfo.value.message
        path.write_bytes(data)


def test_half_precision_shards(tmp_path):
    """Shards as those of SD3's third text encoder."""
    folder = build(tmp_path / "model", *FOLDERS["sd3"][:2])
    encoder = folder / "text_encoder_3"
    (encoder / "model.safetensors").unlink()
    names = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    save_file({"conv.weight": TENSORS["conv.weight"]}, encoder / names[0])
    save_file({"conv.bias": TENSORS["conv.bias"]}, encoder / names[1])
    places = {"conv.weight": names[0], "conv.bias": names[1]}
    (encoder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": places}))
    assert [path.name for path in check_folder(folder).components["text_encoder_3"].weights] == names


def test_companions_are_checked_when_they_are_used(tmp_path):
    folder = make_folder(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    checked = check_folder(folder)
    assert set(checked.companions) == {"safety_checker", "feature_extractor"}
    assert not set(checked.components) & set(COMPANIONS)
    with pytest.raises(InputError, match="no such folder"):
        check_companion(checked, "safety_checker")
    with pytest.raises(InputError, match="has no image_encoder"):
        check_companion(checked, "image_encoder")
    for name in ("safety_checker", "feature_extractor"):
        (folder / name).mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match="pickle"):
        check_companion(checked, "safety_checker")
    save_file(TENSORS, folder / "safety_checker/model.safetensors")
    (folder / "feature_extractor/preprocessor_config.json").write_text('{"crop_size": 224}')
    assert set(check_companion(checked, "safety_checker").tensors) == set(TENSORS)
    assert check_companion(checked, "feature_extractor").config == {"crop_size": 224}


def test_the_name_of_a_cached_model_is_the_repositorys(tmp_path):
    """The name of a snapshot's folder is a commit; the repository's name decides the variant."""
    folder = tmp_path / "models--stabilityai--sd-turbo/snapshots" / ("0" * 40)
    build(folder, "StableDiffusionPipeline", SD, {"cross_attention_dim": 1024})
    assert gate.called(folder) == "stabilityai/sd-turbo"
    assert check_folder(folder).variant == "turbo"
    assert check_folder(folder, "another").variant is None


@pytest.mark.parametrize("name", ["turbo", "TurboVision", "xl-turbo-v2", "lightning", "4step_lightning", "returboat"])
def test_words_of_names(tmp_path, name):
    folder = build(tmp_path / name, "StableDiffusionXLPipeline", XL)
    expected = "turbo" if name in ("turbo", "xl-turbo-v2", "lightning", "4step_lightning") else None
    assert check_folder(folder).variant == expected


def test_defaults_are_valid():
    for family in FAMILIES.values():
        for variant in (None, *family.variants):
            defaults = defaults_of(family.name, variant)
            assert 1 <= defaults.steps <= 50
            assert 1 <= defaults.guidance <= (30 if family.guidance_embedded else 10)
            assert schedulers.resolve(defaults.scheduler) == (defaults.scheduler, None)
            assert defaults.grid is None or schedulers.check_grid(defaults.grid) == defaults.grid
            assert defaults.size in (None, 1024)


def test_every_pipeline_has_a_family():
    for pipeline in PIPELINES:
        assert family_of(pipeline, {"text_encoder"}, {}) is not None
    assert family_of("WanPipeline", set(), {}) is None


def test_rows_are_complete():
    """Each row names what exists: tasks, refiner, places in single files, vocabularies, the bundled configurations."""
    for name, family in FAMILIES.items():
        assert name == family.name
        assert set(family.tasks) <= set(TASKS)
        assert family.refiner is None or FAMILIES[family.refiner].is_refiner
        assert set(family.tokens) <= {None, *family.variants}
        assert family.denoiser in family.parts
        assert family.reads_prompts == bool(family.embeddings)
        assert bool(family.marks) == (CONFIGS / name).is_dir() == (family.configure is not None)
        if family.marks:
            networks = {part for part, what in family.parts.items() if what.kind == "network"}
            assert {family.denoiser} <= set(family.in_files) <= networks
            assert set(gate.read_index(CONFIGS / name).pairs) == set(family.parts)
        for part in family.parts.values():
            assert (part.kind == "tokenizer") == bool(part.vocabulary or part.template)
            assert (CONFIGS / part.vocabulary).is_dir()
    with pytest.raises(UsageError, match="ControlNet is not supported for models of the family z-image"):
        class_of("z-image", "control")
