"""Single-file checkpoints in the original layout: recognise a file by its header, and find its configurations.

`configs/` has the configurations of each family and the vocabularies of CLIP and T5, so that a file loads offline.
Parts that a file lacks (a VAE, a text encoder) come from `base`, a diffusers folder of the same family.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffgen.errors import InputError, UsageError

from . import families, file_configs, gate
from .gate import Checked, Component, Tensor

CONFIGS = Path(__file__).parent / "configs"

DENOISER = "model.diffusion_model."  # the prefix of the denoiser in a whole checkpoint


@dataclass(frozen=True)
class Contents:
    """What a file of weights is."""

    kind: str  # checkpoint, lora, vae, controlnet, embedding, upscaler, part, other
    family: str | None
    variant: str | None
    what: str  # in words
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]  # untrusted


def recognise(path: str | Path) -> Contents:
    """What a file is, by the names and shapes in its header. Raises InputError unless it is sound safetensors or GGUF.

    The family of a checkpoint is one of families.FAMILIES; that of a LoRA or an embedding is None where the widths
    leave it open.
    """
    path = Path(path)
    metadata, tensors = gate.read_weights(path)

    def contents(kind: str, family: str | None, what: str, variant: str | None = None) -> Contents:
        of = f" for {families.FAMILIES[family].title}" if family and kind != "checkpoint" else ""
        return Contents(kind, family, variant, what + of, tensors, metadata)

    for kind, family, what in (_lora(tensors), _others(tensors)):
        if kind:
            return contents(kind, family, what)
    row = _checkpoint(tensors)
    if row is None:
        return contents(*(_parts(tensors) or _embedding(tensors) or ("other", None, "a file of an unknown kind")))
    if unread := _unread(tensors):
        return contents("other", None, unread)
    prediction = _prediction(row, path, tensors, metadata)
    network, scheduler = _configs(row, prediction or "epsilon", tensors, tensors)
    variant = families.variant_of(row, path.stem, row.pipelines[0], network, scheduler if prediction else {})
    return contents("checkpoint", row.name, f"a checkpoint of {row.title}", variant)


def check_file(
    path: str | Path,
    base: str | Path | None = None,
    prediction: str | None = None,
    parts: Mapping[str, Path] | None = None,
) -> Checked:
    """Check a single-file checkpoint. Parts that it lacks come from `base`, a diffusers folder of the same family.

    Without `base`, a folder beside the file with the file's name (x.safetensors, x/) serves as such, if there is one.
    Where there is a base, configurations and tokenizers come from it too. `prediction` (epsilon, v_prediction) says
    what the network was trained to predict, where neither the file nor its name does. `parts` are files of single
    components by their names (vae, text_encoder, …), which come before all others.
    Raises InputError: no checkpoint (what it is instead, and what to do with it), or a part is missing.
    """
    path = Path(path)
    contents = recognise(path)
    if contents.kind != "checkpoint" or contents.family is None:
        raise InputError(*not_a_checkpoint(path, contents))
    family = families.FAMILIES[contents.family]
    split, unused = _split(family, contents.tensors)
    beside = path.with_suffix("")
    if base is None and beside.name != path.name and (beside / "model_index.json").is_file():
        base = beside
    if base is not None:
        return with_parts(_with_base(path, Path(base), contents, split, unused, prediction), parts)
    configs = CONFIGS / family.name
    alone = {name: check_part(family, name, file, configs) for name, file in (parts or {}).items()}
    networks = [n for n, part in family.parts.items() if part.kind == "network" and not part.optional]
    vocabularies = [n for n, part in family.parts.items() if part.kind == "tokenizer" and not part.vocabulary]
    missing = [name for name in (*networks, *vocabularies) if name not in split and name not in alone]
    if missing:
        raise InputError(
            f"{path}: {contents.what} that holds {', '.join(sorted(split))}; it lacks {', '.join(missing)}",
            f"name each: --component {missing[0]}=FILE; or put a diffusers folder of {family.title} beside it as "
            f"{beside.name}/, or name one as base in models.toml",
        )
    predicts = prediction or _prediction(family, path, contents.tensors, contents.metadata)
    if predicts is None:
        raise InputError(
            f"{path}: {family.title} predicts epsilon (512) or v (768), and neither the file nor its name says which",
            "add --prediction epsilon or v_prediction; where there is no such option, prediction = in models.toml",
        )
    network, scheduler = _configs(family, predicts, split[family.denoiser], contents.tensors)
    index = gate.read_index(configs)
    components: dict[str, Component] = {}
    for name, pair in index.pairs.items():
        part, folder = family.parts[name], configs / name
        if part.optional and not {name.replace("tokenizer", "text_encoder")} & {*split, *alone}:
            continue  # Stable Diffusion 3 without T5
        if name in alone:
            components[name] = alone[name]
        elif name in split:
            config = network if name == family.denoiser else gate.read_json(folder / "config.json")
            components[name] = Component(name, *pair, folder, config, (path,), split[name])
        elif name == "scheduler":
            components[name] = Component(name, *pair, folder, scheduler)
        else:
            components[name] = Component(name, *pair, CONFIGS / part.vocabulary, dict(part.special))
    files = (path, *(file for part in alone.values() for file in part.weights))
    return Checked(
        path.parent, family.name, components, files, index.pipeline, contents.variant, {}, path, tuple(unused)
    )


def with_parts(checked: Checked, parts: Mapping[str, Path] | None) -> Checked:
    """A checked model with components from files of their own, and the folder's configurations. Raises InputError."""
    if not parts:
        return checked
    alone = {name: check_part(checked.row, name, file, checked.folder) for name, file in parts.items()}
    replaced = {path for name in alone if name in checked.components for path in checked.components[name].weights}
    files = [path for path in checked.files if path not in replaced or path == checked.file]
    files += [file for part in alone.values() for file in part.weights]
    return replace(checked, components={**checked.components, **alone}, files=tuple(files))


PARTS = {"vae": ("vae", "checkpoint"), "text_encoder": ("part", "checkpoint")}  # kinds of files that may hold a part
PARTS |= dict.fromkeys(("transformer", "unet"), ("checkpoint", "part"))


def check_part(family: families.Family, name: str, path: Path, configs: Path) -> Component:
    """Check a file that holds one component, or a checkpoint that holds it among others.

    `configs` is the folder with its configuration, which is adapted to the file. Raises UsageError for a name that the
    family does not have, InputError for a file that is something else.
    """
    networks = [part for part, row in family.parts.items() if row.kind == "network"]
    if name not in networks:
        raise UsageError(f"--component {name}: {family.title} has no such part", f"it has {', '.join(networks)}")
    contents = recognise(path)
    place, tensors = family.parts[name].file, contents.tensors
    inside = {n: t for n, t in tensors.items() if place is not None and n.startswith(place.prefixes)}
    kinds = PARTS[re.sub(r"_\d$", "", name)]
    if contents.kind not in kinds or (contents.kind == "checkpoint" and name != family.denoiser and not inside):
        raise InputError(f"{path}: {contents.what}, which is no {name} of {family.title}")
    tensors, where = inside or tensors, configs / name
    config = gate.read_json(where / "config.json")
    shapes = {n.removeprefix(DENOISER): t.shape for n, t in tensors.items()}
    if name == family.denoiser and contents.kind == "checkpoint":
        if contents.family is not None and families.FAMILIES[contents.family].module != family.module:
            raise InputError(f"{path}: {contents.what}, not of {family.title}")
        if family.configure is not None:
            family.configure(config, {}, shapes)
    elif family.parts[name].loads:
        file_configs.language(config, shapes)
    pair = gate.read_index(configs).pairs.get(name) or sorted(family.parts[name].classes)[0]
    return Component(name, *pair, where, config, (path,), tensors, alone=True)


def _with_base(
    path: Path,
    base: Path,
    contents: Contents,
    split: Mapping[str, Mapping[str, Tensor]],
    unused: list[str],
    prediction: str | None,
) -> Checked:
    """The file's own components with the base's configurations, and the base's for the rest."""
    index = gate.read_index(base)
    row = families.FAMILIES[index.family]
    if index.family != contents.family and (row.marks or row.module != families.FAMILIES[contents.family or ""].module):
        raise InputError(f"{path}: {contents.what}, but {base} is of the family {index.family}")
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
    unused += [name for part in split if part not in components for name in split[part]]
    return Checked(
        base,
        index.family,
        components,
        tuple(files),
        index.pipeline,
        contents.variant,
        dict(index.companions),
        path,
        tuple(unused),
    )


def _split(family: families.Family, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({component: its tensors, under their names in the file}, the names of those that belong to none)."""
    split: dict[str, dict[str, Tensor]] = {}
    unused = []
    for name, tensor in tensors.items():
        starts = ((part, (*place.prefixes, *place.bare)) for part, place in family.in_files.items())
        part = next((part for part, begins in starts if name.startswith(begins)), None)
        if part is None:
            unused.append(name)
        else:
            split.setdefault(part, {})[name] = tensor
    return split, unused


# What is in a file


def _checkpoint(tensors: Mapping[str, Tensor]) -> families.Family | None:
    """The family of a checkpoint: the last row with all its marks; of a UNet alone, by the width of its texts."""
    for family in reversed(families.FAMILIES.values()):
        if family.marks and all(any(re.match(mark, name) for name in tensors) for mark in family.marks):
            return family
    if DENOISER + "input_blocks.0.0.weight" not in tensors:
        return None
    width = _width(tensors, r"\.attn2\.to_k\.weight$")
    return families.FAMILIES[families.TEXT_WIDTHS.get(width, "sd1")]


def _unread(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is instead, if it belongs to a relative of a family that is not read."""
    first = tensors.get(DENOISER + "input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels not in (4, 9):
        kind = {5: "a depth-to-image model", 7: "an upscaling model", 8: "an InstructPix2Pix or video model"}
        return f"{kind.get(channels, 'a model')} with {channels} channels in, which is not read"
    if "edm_mean" in tensors:
        return "a checkpoint of Playground 2.5, which is read as a diffusers folder only"
    if any("nerf_final_layer_conv" in tensor for tensor in tensors):
        return "a checkpoint of Chroma-Radiance, which is not read"
    image = next((tensor for name, tensor in tensors.items() if re.fullmatch(r"(.*\.)?img_in\.weight", name)), None)
    flux2 = any("stream_modulation" in tensor for tensor in tensors)
    if image is not None and not flux2 and len(image.shape) == 2 and image.shape[1] in (128, 384):
        return (
            "a FLUX.1 model that needs a control picture (fill, depth, canny), which is read as a diffusers folder only"
        )
    return None


Kind = tuple[str, str | None, str]  # (kind, family, in words); the kind is empty where it is not this one


def _lora(tensors: Mapping[str, Tensor]) -> Kind:
    marks = re.compile(r"(\.|_)(lora_(A|B|up|down|a|b)(\.|$)|lora\.(up|down)\.|hada_w|lokr_w|dora_scale|lora_mid)")
    names = [name for name in tensors if marks.search(name)]
    if len(names) * 2 < len(tensors):
        return "", None, ""
    return "lora", _lora_family(tensors), f"{len(tensors)} tensors named {_common(names)}: it is a LoRA"


def _lora_family(tensors: Mapping[str, Tensor]) -> str | None:
    joined = "\n".join(tensors)
    for family in reversed(families.FAMILIES.values()):
        if family.lora_mark and re.search(family.lora_mark, joined):
            return family.name
    down = r"attn2[._](processor[._])?to_k(_lora)?[._](lora_down|lora_A|lora\.down|down)\.(default\.)?weight$"
    return families.TEXT_WIDTHS.get(_width(tensors, down))


def _others(tensors: Mapping[str, Tensor]) -> Kind:
    """Files that one mark tells."""
    names = list(tensors)
    marks = (
        ("controlnet", r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|lllite_", "a ControlNet"),
        ("other", r"image_proj\.|ip_adapter\.", "an IP-Adapter"),
        ("upscaler", r"(model\.\d+\.sub\.\d+\.RDB|body\.\d+\.rdb\d|RRDB_trunk|conv_first\.)", "an upscaler"),
        ("other", r".*motion_modules\.\d", "a motion module"),
    )
    for kind, mark, what in marks:
        matches = [name for name in names if re.match(mark, name)]
        if matches and not any(name.startswith("first_stage_model.") for name in names):
            width = _width(tensors, r"attn2\.to_k\.weight$")
            return kind, families.TEXT_WIDTHS.get(width), f"{len(names)} tensors named {_common(matches)}: it is {what}"
    return "", None, ""


def _parts(tensors: Mapping[str, Tensor]) -> Kind | None:
    """A component in a file of its own."""
    names = list(tensors)
    starts = {name.split(".")[0] for name in names}
    if {"encoder", "decoder"} <= starts and any(name.startswith("decoder.conv_in.") for name in names):
        return "vae", None, f"{len(names)} tensors named decoder.* and encoder.*: it is a VAE"
    if starts and starts <= {"first_stage_model"}:
        return "vae", None, f"{len(names)} tensors named first_stage_model.*: it is a VAE"
    if any(name.startswith("down_blocks.0.") for name in names):
        family = families.TEXT_WIDTHS.get(_width(tensors, r"\.attn2\.to_k\.weight$"))
        return "part", family, f"{len(names)} tensors named down_blocks.*: it is the UNet of a diffusers folder"
    if any(re.match(r"(single_)?transformer_blocks\.0\.", name) for name in names):
        return "part", None, f"{len(names)} tensors named transformer_blocks.*: it is a diffusers folder's transformer"
    if any(
        re.match(
            r"(text_model\.|encoder\.(layers|block)\.0\.|transformer\.resblocks\.|(enc\.)?blk\.0\.|(language_)?model\.)",
            name,
        )
        for name in names
    ):
        return "part", None, f"{len(names)} tensors: it is a text encoder"
    return None


def _embedding(tensors: Mapping[str, Tensor]) -> Kind | None:
    """A textual-inversion embedding: a few vectors as wide as the text encoder's."""
    shapes = [tensor.shape for name, tensor in tensors.items()]
    if len(shapes) > 8 or not all(1 <= len(shape) <= 2 and math.prod(shape[:-1]) <= 128 for shape in shapes):
        return None
    widths = sorted({shape[-1] for shape in shapes})
    rows = families.FAMILIES.values()
    family = next((family.name for family in rows if tuple(widths) in family.embedding_widths), None)
    return "embedding", family, f"{_common(tensors)} of width {' and '.join(map(str, widths))}: it is an embedding"


def _width(tensors: Mapping[str, Tensor], pattern: str) -> int | None:
    """The last dimension of the first matrix with a matching name."""
    matches = (t.shape for name, t in tensors.items() if len(t.shape) >= 2 and re.search(pattern, name))
    return next((shape[1] for shape in matches), None)


def _common(names: Iterable[str]) -> str:
    """The most common beginning of the names: lora_unet_*; or the only name."""
    names = list(names)
    if len(names) == 1:
        return repr(gate.short(names[0]))[1:-1]
    heads = Counter((re.match(r"lora_(unet|te\d?|transformer)_|[^.]*\.?", name) or [""])[0] for name in names)
    return gate.short(heads.most_common(1)[0][0] + "*").strip("'")


def not_a_checkpoint(path: Path, contents: Contents) -> tuple[str, str]:
    """(what a file is instead of a checkpoint, what to do with it)."""
    hints = {
        "lora": f"use it with a model: --lora {path}",
        "controlnet": f"use it with a model: --control TYPE=IMAGE with {path.name}",
        "embedding": f"use it with a model: --embedding {path}",
        "vae": "put it into a model's vae/ folder; give a checkpoint or a diffusers folder as the model",
        "part": "give the whole diffusers folder",
        "upscaler": "it only makes pictures larger",
    }
    has = "has " if contents.kind == "embedding" or re.match(r"\d", contents.what) else "it is "
    message = f"not a checkpoint diffgen can read: {path} {has}{contents.what}"
    titles = ", ".join(family.title for family in families.FAMILIES.values() if family.marks)
    return message, hints.get(contents.kind, f"read here: {titles}")


# Configurations, adapted to the header


def _configs(
    family: families.Family, prediction: str, denoiser: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the denoiser's configuration, the scheduler's): the family's, adapted to this file's tensors."""
    network = gate.read_json(CONFIGS / family.name / family.denoiser / "config.json")
    scheduler = gate.read_json(CONFIGS / family.name / "scheduler" / "scheduler_config.json")
    if not family.is_flow:
        scheduler["prediction_type"] = prediction
        if "ztsnr" in tensors:
            scheduler["rescale_betas_zero_snr"] = True
    if family.configure is not None:
        family.configure(network, scheduler, {n.removeprefix(DENOISER): t.shape for n, t in denoiser.items()})
    return network, scheduler


def _prediction(
    family: families.Family, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str | None:
    """What the network predicts; None where nothing says it.

    In this order: the tensors v_pred and ztsnr, which are marks; modelspec.prediction_type in the metadata; "vpred" or
    "v-pred" in the file's name; the family's usual prediction; where it has none (Stable Diffusion 2), "768" or "512"
    or "base" in the metadata's architecture or the name.
    """
    if family.is_flow:
        return family.prediction
    name = path.stem.lower()
    written = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in tensors or written in ("v", "v_prediction") or re.search(r"v[-_. ]?pred", name):
        return "v_prediction"
    if family.prediction is not None or written == "epsilon":
        return family.prediction or "epsilon"
    kinds = f"{metadata.get('modelspec.architecture', '').lower()} {name}"
    if re.search(r"(?<!\d)768(?!\d)", kinds):
        return "v_prediction"
    return "epsilon" if re.search(r"(?<!\d)512(?!\d)|base|turbo|inpaint", kinds) else None
