"""inspect reads ComfyUI's graphs: the one that ran, and the editor's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import PICTURE, Info, options, png
from PIL import Image

import schedulers
from diffgen.images import read
from diffgen.images.readers import comfyui
from diffgen.images.readers.command import command
from diffgen.images.readers.picture_info import PictureInfo

BASE: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15/v1-5-pruned.safetensors"}},
    "10": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "styles\\ink.safetensors", "strength_model": 0.6, "strength_clip": 1, "model": ["4", 0],
        "clip": ["4", 1]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "a red apple"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["11", 0]}},
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras",
        "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip


def test_comfyui(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    texts = {"prompt": json.dumps(BASE), "workflow": '{"nodes": [], "links": []}'}
    info = inspect(png(tmp_path / "x.png", texts))
    expected = {
        "tool": "comfyui",
        "prompt": "a red apple",
        "negative": "blurry",
        "seed": 156680208700286,
        "steps": 20,
        "guidance": 8.0,
        "scheduler": "dpmpp_2m_sde",
        "grid": "karras",
        "width": 512,
        "height": 768,
        "model": "v1-5-pruned.safetensors",
    }
    assert {key: info[key] for key in expected} == expected
    flags = options(info)
    assert "--seed" not in flags  # beyond 32 bits
    assert any("156680208700286" in note for note in info["notes"])
    assert (flags["--lora"], flags["--clip-skip"]) == ("ink.safetensors:0.6", "2")
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:" + texts["prompt"], "workflow:{}"
    PICTURE.save(tmp_path / "x.webp", "WEBP", exif=exif)
    assert inspect(tmp_path / "x.webp")["prompt"] == "a red apple"


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("uni_pc", "beta", ("unipc", "beta_t", "UniPC", "beta_t")),
        ("uni_pc_bh2", "karras", ("unipc", "karras", "uni_pc_bh2", "karras")),
        ("deis", "normal", ("deis", "linspace", "comfyui_deis", "linspace")),
        ("ipndm_v", "kl_optimal", ("ipndm_v", "kl_optimal", "comfyui_ipndm_v", "kl_optimal")),
        ("sa_solver", "simple", ("sa_solver", "simple", "comfyui_sa_solver", "simple")),
        ("dpmpp_2m", "sgm_uniform", ("dpmpp_2m", "sgm_uniform", "dpmpp_2m", "sgm_uniform")),
    ],
)
def test_comfyuis_samplers_and_schedules(sampler: str, schedule: str, expected: tuple[str, ...]) -> None:
    """The command names the solver that ComfyUI means, with its options."""
    info = PictureInfo("comfyui")
    info.sampled(sampler, schedule)
    assert (info.scheduler, info.grid, info.label, info.given_grid) == expected
    label = schedulers.parse(expected[2])
    assert label.name == expected[0]


def test_comfyui_custom_sampling(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    """A graph like that of ComfyUI's Flux template."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "ModelSamplingFlux", "inputs": {"max_shift": 1.15, "model": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "a fox", "t5xxl": "a fox", "clip": ["9", 0]}},
        "4": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["3", 0]}},
        "5": {"class_type": "BasicGuider", "inputs": {"model": ["2", 0], "conditioning": ["4", 0]}},
        "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": 12}},
        "7": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "8": {"class_type": "BasicScheduler", "inputs": {
            "scheduler": "simple", "steps": 21, "denoise": 1.0, "model": ["2", 0]}},
        "9": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "t5xxl.safetensors"}},
        "10": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
        "11": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["6", 0], "guider": ["5", 0], "sampler": ["7", 0], "sigmas": ["8", 0], "latent_image": ["10", 0]}},
        "12": {"class_type": "VAEDecode", "inputs": {"samples": ["11", 0]}},
        "13": {"class_type": "SaveImage", "inputs": {"images": ["12", 0]}},
    }  # fmt: skip
    info = inspect(png(tmp_path / "x.png", {"prompt": json.dumps(graph)}))
    assert (info["prompt"], info["seed"], info["steps"], info["guidance"]) == ("a fox", 12, 21, 3.5)
    assert (info["scheduler"], info["grid"], info["width"], info["height"], info["model"]) == (
        "euler", "simple", 1024, 768, "flux1-dev.safetensors",
    )  # fmt: skip


def test_comfyui_two_passes(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    """Its hires template: the first pass decides the options, the second becomes --upscale."""
    second = {**BASE["3"]["inputs"], "denoise": 0.5, "latent_image": ["20", 0], "steps": 14, "seed": 5}
    graph = BASE | {
        "3": {"class_type": "KSampler", "inputs": BASE["3"]["inputs"] | {"seed": 9}},
        "20": {"class_type": "LatentUpscale", "inputs": {"width": 1024, "height": 1536, "samples": ["3", 0]}},
        "21": {"class_type": "KSampler", "inputs": second},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0]}},
    }
    info = inspect(png(tmp_path / "x.png", {"prompt": json.dumps(graph)}))
    flags = options(info)
    assert (info["seed"], info["steps"], flags["--seed"], flags["--size"]) == (9, 20, "9", "512x768")
    assert (flags["--upscale"], flags["--upscale-mode"], flags["--upscale-strength"]) == ("2", "latent", "0.5")


def test_comfyui_with_only_the_editors_graph(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    workflow = {
        "nodes": [
            {"id": 4, "type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": ["v1-5.safetensors"]},
            {"id": 5, "type": "EmptyLatentImage", "inputs": [], "widgets_values": [640, 512, 1]},
            {"id": 6, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 3}], "widgets_values": ["a fox"]},
            {"id": 7, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 3}], "widgets_values": [""]},
            {"id": 3, "type": "KSampler", "widgets_values": [42, "randomize", 20, 8, "euler", "normal", 1],
             "inputs": [{"name": "model", "link": 1}, {"name": "positive", "link": 4}, {"name": "negative", "link": 6},
                        {"name": "latent_image", "link": 2}]},
        ],
        "links": [[1, 4, 0, 3, 0, "MODEL"], [2, 5, 0, 3, 3, "LATENT"], [3, 4, 1, 6, 0, "CLIP"],
                  [4, 6, 0, 3, 1, "CONDITIONING"], [6, 7, 0, 3, 2, "CONDITIONING"]],
    }  # fmt: skip
    info = inspect(png(tmp_path / "x.png", {"workflow": json.dumps(workflow)}))
    assert (info["prompt"], info["negative"], info["seed"], info["steps"], info["scheduler"], info["grid"]) == (
        "a fox", "", 42, 20, "euler", "linspace",
    )  # fmt: skip
    assert (info["width"], info["height"], info["model"]) == (640, 512, "v1-5.safetensors")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["1", "2", "3", "4"]),
        st.fixed_dictionaries(
            {
                "class_type": st.sampled_from(["KSampler", "CLIPTextEncode", "SaveImage", "Reroute", "LatentUpscale"]),
                "inputs": st.dictionaries(
                    st.sampled_from(["seed", "steps", "latent_image", "positive", "model", "text", "samples", "images",
                                     "sampler_name", "scheduler", "clip", "conditioning", "guider", "sigmas", "width"]),
                    st.one_of(
                        st.tuples(st.sampled_from(["1", "2", "3", "4", 1, None]), st.just(0)).map(list),
                        st.integers(), st.text(max_size=5), st.none(), st.floats(), st.lists(st.none(), max_size=3),
                    ),
                ),
            }
        ),
    )
)  # fmt: skip
def test_no_graph_breaks_the_walk(graph: dict[str, Any]) -> None:
    """Links may go in circles and to nothing, values may be anything."""
    info = comfyui.read(read.Carried({"prompt": json.dumps(graph)}, width=8, height=8))
    assert (info is None) == (not graph)
    if info is not None:
        shlex.join(command(info)[0])
