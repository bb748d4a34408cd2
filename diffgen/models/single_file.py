"""Single-file checkpoints in the original layout: what a file is, by its header alone; its configuration from here.

The configurations of each family and the vocabularies of CLIP and T5 lie in `configs/`, so that a file loads offline.
What a file lacks (a VAE, a text encoder) is taken from `base`, a diffusers folder of the same family.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

from . import families, gate
from .gate import Checked, Component, Tensor

CONFIGS = Path(__file__).parent / "configs"

# Where the tensors of each component lie in a file. A denoiser may also stand alone, without its prefix.
UNET, TRANSFORMER, FIRST_STAGE = "model.diffusion_model.", "model.diffusion_model.", "first_stage_model."
PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {"unet": (UNET,), "vae": (FIRST_STAGE,), "text_encoder": ("cond_stage_model.",)},
    "sd2": {"unet": (UNET,), "vae": (FIRST_STAGE,), "text_encoder": ("cond_stage_model.",)},
    "sdxl": {
        "unet": (UNET,),
        "vae": (FIRST_STAGE,),
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "sdxl-refiner": {"unet": (UNET,), "vae": (FIRST_STAGE,), "text_encoder_2": ("conditioner.embedders.0.",)},
    "sd3": {
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
        "vae": (FIRST_STAGE,),
        "transformer": (TRANSFORMER, "joint_blocks.", "context_embedder.", "final_layer.", "pos_embed", "t_embedder.",
                        "x_embedder.", "y_embedder."),
    },
    "flux": {
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
        "vae": ("vae.", FIRST_STAGE),
        "transformer": (TRANSFORMER, "double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.",
                        "vector_in.", "guidance_in.", "final_layer."),
    },
}  # fmt: skip
CLIP_PADS_WITH = {"sd2": {"tokenizer": "!"}, "sdxl": {"tokenizer_2": "!"}, "sdxl-refiner": {"tokenizer_2": "!"},
                  "sd3": {"tokenizer_2": "!"}}  # fmt: skip

# Widths of the texts that each family's denoiser reads; of an adapter they tell the family.
TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}


@dataclass(frozen=True)
class Found:
    """What a safetensors file is."""

    kind: str  # checkpoint, lora, vae, controlnet, embedding, upscaler, part, other
    family: str | None
    variant: str | None
    what: str  # in words
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]  # untrusted


def recognise(path: str | Path) -> Found:
    """What a file is, by the names and shapes in its header. Raises InputError for what is no sound safetensors file.

    The family of a checkpoint is one of families.FAMILIES; that of a LoRA or an embedding is None where the widths do
    not tell.
    """
    path = Path(path)
    metadata, tensors = gate.read_safetensors(path)

    def found(kind: str, family: str | None, what: str, variant: str | None = None) -> Found:
        of = f" for {families.FAMILIES[family].title}" if family and kind != "checkpoint" else ""
        return Found(kind, family, variant, what + of, tensors, metadata)

    for kind, family, what in (_lora(tensors), _others(tensors)):
        if kind:
            return found(kind, family, what)
    family = _checkpoint(tensors)
    if family is None:
        kind, family, what = _parts(tensors) or _embedding(tensors) or ("other", None, "a file of an unknown kind")
        return found(kind, family, what)
    unread = _unread(tensors)
    if unread:
        return found("other", None, unread)
    network, scheduler = _network_config(family, tensors), _scheduler_config(family, path, tensors, metadata)
    pipeline = families.FAMILIES[family].pipelines[0]
    variant = families.variant_of(families.FAMILIES[family], path.stem, pipeline, network, scheduler or {})
    return found("checkpoint", family, f"a checkpoint of {families.FAMILIES[family].title}", variant)


def check_file(path: str | Path, base: str | Path | None = None, prediction: str | None = None) -> Checked:
    """Check a single-file checkpoint. What it lacks comes from `base`, a diffusers folder of the same family.

    Without `base`, a folder beside the file that is called like it (x.safetensors, x/) serves as such, if there is
    one. Where there is a base, configurations and tokenizers come from it too. `prediction` (epsilon, v_prediction)
    says what the network was trained to predict, where neither the file nor its name does.
    Raises InputError: no checkpoint (what it is instead, and what to do with it), or something lacks.
    """
    path = Path(path)
    found = recognise(path)
    if found.kind != "checkpoint" or found.family is None:
        raise InputError(*not_a_checkpoint(path, found))
    family = families.FAMILIES[found.family]
    split, unused = _split(found)
    beside = path.with_suffix("")
    if base is None and beside.name != path.name and (beside / "model_index.json").is_file():
        base = beside
    if base is not None:
        return _with_base(path, Path(base), found, split, unused, prediction)
    missing = [n for n, part in family.parts.items() if part.kind == "network" and not part.optional and n not in split]
    if missing:
        raise InputError(
            f"{path}: {found.what} that holds {', '.join(sorted(split))}; it lacks {', '.join(missing)}",
            f"put a diffusers folder of {family.title} beside it as {beside.name}/, or name one as base in models.toml",
        )
    scheduler = _scheduler_config(family.name, path, found.tensors, found.metadata, prediction)
    if scheduler is None:
        raise InputError(
            f"{path}: {family.title} predicts epsilon (512) or v (768), and neither the file nor its name says which",
            "add --prediction epsilon or v_prediction; where there is no such option, prediction = in models.toml",
        )
    index = gate.read_index(CONFIGS / family.name)
    files = [path]
    components: dict[str, Component] = {}
    for name, pair in index.pairs.items():
        folder = CONFIGS / family.name / name
        if family.parts[name].optional and name.replace("tokenizer", "text_encoder") not in split:
            continue  # Stable Diffusion 3 without T5
        if name in split:
            config = gate.read_json(folder / "config.json")
            if name in ("unet", "transformer"):
                config = _network_config(family.name, split[name])
                if family.name == "sd2" and scheduler["prediction_type"] == "v_prediction":
                    config["sample_size"] = 96  # the 768 model
            components[name] = Component(name, *pair, folder, config, (path,), split[name])
        elif name == "scheduler":
            components[name] = Component(name, *pair, folder, scheduler)
        elif pair[1] in families.T5_TOKENIZER:
            components[name] = Component(name, *pair, CONFIGS / "t5_tokenizer", {})
        else:
            pad = CLIP_PADS_WITH.get(family.name, {}).get(name)
            special = {"pad_token": pad} if pad else {}
            components[name] = Component(name, *pair, CONFIGS / "clip_tokenizer", special)
    return Checked(path.parent, family.name, components, tuple(files), index.pipeline, found.variant, {}, path, unused)


def _with_base(
    path: Path,
    base: Path,
    found: Found,
    split: Mapping[str, Mapping[str, Tensor]],
    unused: tuple[str, ...],
    prediction: str | None,
) -> Checked:
    """The file's own components with the base's configurations, and the base's for the rest."""
    index = gate.read_index(base)
    if index.family != found.family:
        raise InputError(f"{path}: {found.what}, but {base} is of the family {index.family}")
    files = [path]
    components = {}
    for name, pair in index.pairs.items():
        if name in split:
            config = gate.read_json(base / name / "config.json")
            components[name] = Component(name, *pair, base / name, config, (path,), split[name])
        else:
            kind = families.FAMILIES[index.family].parts[name].kind
            components[name] = gate.check_component(base / name, name, pair, kind, files)
    if prediction is not None:
        components["scheduler"].config["prediction_type"] = prediction
    unused += tuple(name for part in split if part not in components for name in split[part])
    companions = dict(index.companions)
    return Checked(
        base, index.family, components, tuple(files), index.pipeline, found.variant, companions, path, unused
    )


def _split(found: Found) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """({component: its tensors, under their names in the file}, the names of those that belong to none)."""
    split: dict[str, dict[str, Tensor]] = {}
    unused = []
    prefixes = PREFIXES[found.family or ""]
    for name, tensor in found.tensors.items():
        part = next((part for part, starts in prefixes.items() if name.startswith(starts)), None)
        if part is None:
            unused.append(name)
        else:
            split.setdefault(part, {})[name] = tensor
    return split, tuple(unused)


# What is in a file


def _checkpoint(tensors: Mapping[str, Tensor]) -> str | None:
    """The family of a checkpoint."""
    if any(re.match(r"(model\.diffusion_model\.)?joint_blocks\.0\.", name) for name in tensors):
        return "sd3"
    if any(re.match(r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.", name) for name in tensors):
        return "flux"
    if UNET + "input_blocks.0.0.weight" not in tensors:
        return None
    if any(name.startswith("conditioner.embedders.1.model.") for name in tensors):
        return "sdxl"
    if any(name.startswith("conditioner.embedders.0.model.") for name in tensors):
        return "sdxl-refiner"
    if any(name.startswith("cond_stage_model.model.") for name in tensors):
        return "sd2"
    if any(name.startswith("cond_stage_model.") for name in tensors):
        return "sd1"
    return TEXT_WIDTHS.get(_width(tensors, r"\.attn2\.to_k\.weight$") or 0, "sd1")  # the UNet alone


def _unread(tensors: Mapping[str, Tensor]) -> str | None:
    """What a relative of a known family is that is not read."""
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels not in (4, 9):
        kind = {5: "a depth-to-image model", 7: "an upscaling model", 8: "an InstructPix2Pix or video model"}
        return f"{kind.get(channels, 'a model')} with {channels} channels in, which is not read"
    if "edm_mean" in tensors:
        return "a checkpoint of Playground 2.5, which is read as a diffusers folder only"
    for word, name in (("distilled_guidance_layer", "Chroma"), ("double_stream_modulation", "FLUX.2")):
        if any(word in tensor for tensor in tensors):
            return f"a checkpoint of {name}, which is not read"
    image = next((tensor for name, tensor in tensors.items() if re.fullmatch(r"(.*\.)?img_in\.weight", name)), None)
    if image is not None and len(image.shape) == 2 and image.shape[1] in (128, 384):
        return "a FLUX.1 model that needs a control picture (fill, depth, canny), which is not read"
    return None


Said = tuple[str, str | None, str]


def _lora(tensors: Mapping[str, Tensor]) -> Said:
    marks = re.compile(r"(\.|_)(lora_(A|B|up|down|a|b)(\.|$)|lora\.(up|down)\.|hada_w|lokr_w|dora_scale|lora_mid)")
    names = [name for name in tensors if marks.search(name)]
    if len(names) * 2 < len(tensors):
        return "", None, ""
    return "lora", _lora_family(tensors), f"{len(tensors)} tensors named {_common(names)}: it is a LoRA"


def _lora_family(tensors: Mapping[str, Tensor]) -> str | None:
    joined = "\n".join(tensors)
    if re.search(r"double_blocks|single_blocks|single_transformer_blocks", joined):
        return "flux"
    if re.search(r"joint_blocks|transformer_blocks[._]\d+[._](attn[._]add_|ff_context)", joined):
        return None if re.search(r"img_mlp|txt_mlp", joined) else "sd3"
    if re.search(r"lora_te2_|text_encoder_2\.", joined):
        return "sdxl"
    down = r"attn2[._](processor[._])?to_k(_lora)?[._](lora_down|lora_A|lora\.down|down)\.(default\.)?weight$"
    return TEXT_WIDTHS.get(_width(tensors, down) or 0)


def _others(tensors: Mapping[str, Tensor]) -> Said:
    """Files that are told by one mark."""
    names = list(tensors)
    marks = (
        ("controlnet", r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|lllite_", "a ControlNet"),
        ("other", r"image_proj\.|ip_adapter\.", "an IP-Adapter"),
        ("upscaler", r"(model\.\d+\.sub\.\d+\.RDB|body\.\d+\.rdb\d|RRDB_trunk|conv_first\.)", "an upscaler"),
        ("other", r".*motion_modules\.\d", "a motion module"),
    )
    for kind, mark, what in marks:
        held = [name for name in names if re.match(mark, name)]
        if held and not any(name.startswith("first_stage_model.") for name in names):
            width = _width(tensors, r"attn2\.to_k\.weight$")
            return kind, TEXT_WIDTHS.get(width or 0), f"{len(names)} tensors named {_common(held)}: it is {what}"
    return "", None, ""


def _parts(tensors: Mapping[str, Tensor]) -> Said | None:
    """A single component in a file of its own."""
    names = list(tensors)
    starts = {name.split(".")[0] for name in names}
    if {"encoder", "decoder"} <= starts and any(name.startswith("decoder.conv_in.") for name in names):
        return "vae", None, f"{len(names)} tensors named decoder.* and encoder.*: it is a VAE"
    if starts and starts <= {"first_stage_model"}:
        return "vae", None, f"{len(names)} tensors named first_stage_model.*: it is a VAE"
    if any(name.startswith("down_blocks.0.") for name in names):
        family = TEXT_WIDTHS.get(_width(tensors, r"\.attn2\.to_k\.weight$") or 0)
        return "part", family, f"{len(names)} tensors named down_blocks.*: it is the UNet of a diffusers folder"
    if any(re.match(r"(single_)?transformer_blocks\.0\.", name) for name in names):
        return "part", None, f"{len(names)} tensors named transformer_blocks.*: it is a diffusers folder's transformer"
    if any(re.match(r"(text_model\.|encoder\.(layers|block)\.0\.|transformer\.resblocks\.)", name) for name in names):
        return "part", None, f"{len(names)} tensors: it is a text encoder"
    return None


def _embedding(tensors: Mapping[str, Tensor]) -> Said | None:
    """A textual-inversion embedding: a few vectors as wide as the text encoder's."""
    shapes = [tensor.shape for name, tensor in tensors.items()]
    if len(shapes) > 8 or not all(1 <= len(shape) <= 2 and math.prod(shape[:-1]) <= 128 for shape in shapes):
        return None
    widths = sorted({shape[-1] for shape in shapes})
    family = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl", (1280,): "sdxl"}.get(tuple(widths))
    return "embedding", family, f"{_common(tensors)} of width {' and '.join(map(str, widths))}: it is an embedding"


def _width(tensors: Mapping[str, Tensor], pattern: str) -> int | None:
    """The last dimension of the first matrix whose name matches."""
    matches = (t.shape for name, t in tensors.items() if len(t.shape) >= 2 and re.search(pattern, name))
    return next((shape[1] for shape in matches), None)


def _common(names: Iterable[str]) -> str:
    """What most names begin with: lora_unet_*, or one name."""
    names = list(names)
    if len(names) == 1:
        return repr(gate.short(names[0]))[1:-1]
    heads = Counter((re.match(r"lora_(unet|te\d?|transformer)_|[^.]*\.?", name) or [""])[0] for name in names)
    return gate.short(heads.most_common(1)[0][0] + "*").strip("'")


def not_a_checkpoint(path: Path, found: Found) -> tuple[str, str]:
    """What a file is instead of a checkpoint, and what to do with it."""
    hints = {
        "lora": f"use it upon a model: --lora {path}",
        "controlnet": f"use it upon a model: --control TYPE=IMAGE with {path.name}",
        "embedding": f"use it upon a model: --embedding {path}",
        "vae": "it goes into a model's vae/ folder; as a model give a checkpoint or a diffusers folder",
        "part": "give the whole diffusers folder",
        "upscaler": "it makes pictures larger and none itself",
    }
    has = "has " if re.match(r"\d", found.what) else "it is "
    if found.kind == "embedding":
        has = "has "
    message = f"not a checkpoint diffgen can read: {path} {has}{found.what}"
    return message, hints.get(found.kind, f"read here: {', '.join(families.FAMILIES[name].title for name in PREFIXES)}")


# Configurations, adapted to what the header says


def _network_config(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The denoiser's configuration: the family's, with what differs between its models read off the shapes."""
    held = {name.removeprefix(UNET): tensor.shape for name, tensor in tensors.items()}
    part = "transformer" if family in ("sd3", "flux") else "unet"
    config = gate.read_json(CONFIGS / family / part / "config.json")
    if family == "flux":
        config["guidance_embeds"] = any(name.startswith("guidance_in.") for name in held)
        for key, stem in (("num_layers", "double_blocks."), ("num_single_layers", "single_blocks.")):
            config[key] = len({name.split(".")[1] for name in held if name.startswith(stem)})
        return config
    if family == "sd3":
        blocks = {int(m[1]) for name in held if (m := re.match(r"joint_blocks\.(\d{1,3})\.", name))}
        config["num_layers"] = len(blocks)
        dual = sorted(
            {int(name.split(".")[1]) for name in held if re.match(r"joint_blocks\.\d+\.x_block\.attn2\.", name)}
        )
        if dual:
            config["dual_attention_layers"] = dual
        if any(".attn.ln_q." in name for name in held):
            config["qk_norm"] = "rms_norm"
        if (embed := held.get("pos_embed")) and len(embed) == 3:
            config["pos_embed_max_size"] = math.isqrt(embed[1])
        if (first := held.get("x_embedder.proj.weight")) and len(first) == 4:
            config["num_attention_heads"] = first[0] // config["attention_head_dim"]
            config["caption_projection_dim"] = first[0]
        return config
    first = held.get("input_blocks.0.0.weight")
    if first and len(first) == 4:
        config["in_channels"] = first[1]
    if guidance := held.get("time_embed.cond_proj.weight"):
        config["time_cond_proj_dim"] = guidance[-1]
    return config


def _scheduler_config(
    family: str,
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prediction: str | None = None,
) -> dict[str, Any] | None:
    """The scheduler's configuration; None where nothing says what is predicted.

    In this order: what was asked for; the marks v_pred and ztsnr among the tensors; modelspec.prediction_type in the
    metadata; "vpred" or "v-pred" in the file's name; for Stable Diffusion 2, which has both, "768" or "512" or "base"
    in the metadata's architecture or the name; for the others epsilon.
    """
    config = gate.read_json(CONFIGS / family / "scheduler" / "scheduler_config.json")
    if family == "flux" and not any("guidance_in." in name for name in tensors):  # schnell: the same noise at any size
        config |= {"shift": 1.0, "use_dynamic_shifting": False}
    if family in ("sd3", "flux"):
        return config
    name = path.stem.lower()
    said = metadata.get("modelspec.prediction_type", "").lower()
    if prediction is None:
        if "v_pred" in tensors or said in ("v", "v_prediction") or re.search(r"v[-_. ]?pred", name):
            prediction = "v_prediction"
        elif family != "sd2" or said == "epsilon":
            prediction = "epsilon"
        else:
            kinds = f"{metadata.get('modelspec.architecture', '').lower()} {name}"
            if re.search(r"(?<!\d)768(?!\d)", kinds):
                prediction = "v_prediction"
            elif re.search(r"(?<!\d)512(?!\d)|base|turbo|inpaint", kinds):
                prediction = "epsilon"
            else:
                return None
    config["prediction_type"] = prediction
    if "ztsnr" in tensors:
        config["rescale_betas_zero_snr"] = True
    return config
