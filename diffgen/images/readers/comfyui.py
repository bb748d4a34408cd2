"""ComfyUI: the graph that was run, JSON as the PNG text `prompt`; else the editor's own, as `workflow`.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], "positive": ["6", 0], …}}, …}

An input is a value or a link [node, output]. The walk begins at the sampler that feeds what was saved, and goes up the
links to the first sampler, its texts, its model and its latents; every node is visited once, at most MAX_NODES of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from ..read import DESCRIPTION, MAKE, MODEL, Carried
from .picture_info import PictureInfo, as_int, entries, name, number, parsed, seed, side, steps, table, text

MAX_NODES = 5_000
MAX_SAVES = 20  # nodes that save or show a picture, from each of which a walk begins
MAX_CHAIN = 50  # nodes between a text and its encoder's layers
Node = dict[str, Any]  # class_type, inputs

TEXTS = ("text", "prompt", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "positive_prompt", "value", "string")
NUMBERS = ("value", "seed", "noise_seed", "int", "float", "number")
MODELS = ("ckpt_name", "unet_name", "model_name", "base_ckpt_name")
# The order of a node's values in the editor's graph, for the nodes that matter; "" is not an input.
WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler", "start_at_step", "end_at_step",
    ),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps",),
    "CFGGuider": ("cfg",),
    "FluxGuidance": ("guidance",),
    "CLIPTextEncode": ("text",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "LatentUpscale": ("upscale_method", "width", "height"),
    "LoadImage": ("image",),
}  # fmt: skip
PLAIN = ("ModelSampling", "Reroute", "CheckpointLoader", "UNETLoader", "Lora", "UnetLoader")  # of no need to tell


def read(carried: Carried) -> PictureInfo | None:
    texts = dict(carried.texts)
    for tag in (DESCRIPTION, MAKE, MODEL):  # WebP: "workflow:{…}", "prompt:{…}"
        kind, colon, rest = carried.tags.get(tag, "").partition(":")
        if colon and kind.lower() in ("prompt", "workflow"):
            texts.setdefault(kind.lower(), rest)
    nodes = _nodes(parsed(texts.get("prompt"))) or _of_workflow(parsed(texts.get("workflow")))
    if not nodes:
        return None
    return _Graph(nodes).info(carried)


def _nodes(graph: dict[str, Any] | None) -> dict[str, Node]:
    """The nodes of a graph that was run."""
    nodes = {}
    for key, node in list((graph or {}).items())[:MAX_NODES]:
        if isinstance(node, dict) and isinstance(node.get("class_type"), str):
            nodes[key] = {"class_type": node["class_type"], "inputs": table(node.get("inputs"))}
    return nodes


def _of_workflow(graph: dict[str, Any] | None) -> dict[str, Node]:
    """The nodes of the editor's graph, their values by the names in WIDGETS."""
    if graph is None:
        return {}
    links = {}
    for link in entries(graph.get("links"), MAX_NODES * 4):
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], int):
            links[link[0]] = [str(link[1]), link[2]]
    nodes = {}
    for node in map(table, entries(graph.get("nodes"), MAX_NODES)):
        kind = node.get("type")
        if not isinstance(kind, str) or node.get("mode") in (2, 4):  # muted, bypassed
            continue
        values = entries(node.get("widgets_values"))
        inputs: dict[str, Any] = {key: value for key, value in zip(WIDGETS.get(kind, ()), values, strict=False) if key}
        for slot in map(table, entries(node.get("inputs"))):
            if isinstance(slot.get("name"), str) and isinstance(slot.get("link"), int) and slot["link"] in links:
                inputs[slot["name"]] = links[slot["link"]]
        nodes[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return nodes


class _Graph:
    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes

    def info(self, carried: Carried) -> PictureInfo:
        info = PictureInfo("comfyui", width=carried.width or None, height=carried.height or None, cpu_noise=True)
        chain = self.samplers()
        if not chain:
            info.notes.append("no sampler of its own nodes is in the graph")
            return info
        first = chain[-1]
        self.sampler(info, first)
        info.prompt, info.negative = (self.prompt(first, side_, info) for side_ in ("positive", "negative"))
        self.model(info, first)
        self.start(info, first)
        if len(chain) > 1:
            self.second(info, chain)
        return info

    def link(self, node: Node, key: str) -> Node | None:
        """The node that an input is linked to."""
        value = node["inputs"].get(key)
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            return self.nodes.get(str(value[0]))
        return None

    def value(self, node: Node | None, key: str, names: tuple[str, ...] = NUMBERS) -> Any:
        """An input's value, through the nodes that only hold one."""
        for _ in range(20):
            if node is None:
                return None
            if not isinstance(node["inputs"].get(key), list):
                return node["inputs"].get(key)
            node = self.link(node, key)
            key = next((name for name in names if node is not None and name in node["inputs"]), "")
        return None

    def up(self, start: Node | None, keys: Iterable[str] | None = None) -> Iterator[Node]:
        """The nodes above, nearest first, that one first; along the inputs of these names, or along all."""
        waiting = deque([start] if start else [])
        queued = {id(start)}
        while waiting:
            node = waiting.popleft()
            yield node
            for key in node["inputs"] if keys is None else keys:
                above = self.link(node, key)
                if above is not None and id(above) not in queued:
                    queued.add(id(above))
                    waiting.append(above)

    def samplers(self) -> list[Node]:
        """The sampler that made the picture, and those before it, whose latents or picture it began with."""
        saves = [node for node in self.nodes.values() if node["class_type"].startswith(("Save", "Preview"))]
        last = next((above for save in saves[:MAX_SAVES] for above in self.up(save) if _samples(above)), None)
        last = last or next((node for node in self.nodes.values() if _samples(node)), None)
        chain = [] if last is None else [last]
        while last is not None and len(chain) < 20:
            before = self.link(last, "latent_image") or self.link(last, "samples")
            keys = ("samples", "latent", "pixels", "image", "latent_image", "upscaled", "input")
            last = next(
                (node for node in self.up(before, keys) if _samples(node) and all(node is not one for one in chain)),
                None,
            )
            chain += [] if last is None else [last]
        return chain

    def sampler(self, info: PictureInfo, node: Node) -> None:
        guider, sigmas = self.link(node, "guider"), self.link(node, "sigmas")
        noise, chosen = self.link(node, "noise"), self.link(node, "sampler")
        inputs = node["inputs"]
        info.seed = seed(self.value(node, "seed" if "seed" in inputs else "noise_seed") if noise is None else None)
        if noise is not None:
            info.seed = seed(self.value(noise, "noise_seed"))
        info.steps = steps(self.value(sigmas or node, "steps"))
        info.guidance = number(self.value(guider or node, "cfg"))
        if guider is not None and "cfg" not in guider["inputs"]:
            info.guidance = 1.0  # BasicGuider has no negative prompt
        schedule = self.value(sigmas or node, "scheduler", ("value",))
        if schedule is None and sigmas is not None:  # KarrasScheduler, SDTurboScheduler, …
            schedule = sigmas["class_type"].removesuffix("Scheduler")
        info.sampled(self.value(chosen or node, "sampler_name", ("value",)), schedule)
        if isinstance(begin := inputs.get("start_at_step"), int) and begin > 0:
            info.notes.append(f"it began at step {begin}")

    def prompt(self, node: Node, which: str, info: PictureInfo) -> str | None:
        """The text that reaches the sampler's positive or negative input."""
        start = self.link(node, which)
        if start is None and (guider := self.link(node, "guider")) is not None:
            start = self.link(guider, which) or (self.link(guider, "conditioning") if which == "positive" else None)
        prompts: dict[str, None] = {}
        nodes = list(self.up(start, ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to",
                                     "conditioning_from", which)))  # fmt: skip
        for above in nodes:
            if above["class_type"] == "ConditioningZeroOut":
                return ""
            if above["class_type"].startswith("ControlNetApply"):
                info.notes.append("it was made with a ControlNet")
            if above["class_type"] == "FluxGuidance":
                info.guidance = number(self.value(above, "guidance"))
            texts = [text(self.value(above, key, TEXTS)) for key in TEXTS if key in above["inputs"]]
            prompts |= dict.fromkeys(one for one in texts if one is not None and (one or len(nodes) == 1))
            chain = itertools.islice(self.up(self.link(above, "clip"), ("clip",)), MAX_CHAIN)
            clip = next((one for one in chain if "stop_at_clip_layer" in one["inputs"]), None)
            if clip is not None and (layer := as_int(self.value(clip, "stop_at_clip_layer"), -100, -1)):
                info.clip_skip = -layer
        if len(prompts) > 1:
            info.notes.append(f"several {which} prompts were put together")
        return ", ".join(prompts) if prompts else None

    def model(self, info: PictureInfo, node: Node) -> None:
        start = self.link(node, "model") or self.link(self.link(node, "guider") or node, "model")
        for above in self.up(start, ("model",)):
            inputs = above["inputs"]
            if lora := name(self.value(above, "lora_name", ("value",))):
                scale = number(self.value(above, "strength_model"))
                info.loras.insert(0, (lora, 1.0 if scale is None else scale))
            elif model := next((name(self.value(above, key, ("value",))) for key in MODELS if key in inputs), None):
                info.model = model
            if not above["class_type"].startswith(PLAIN):
                info.notes.append(f"there is nothing like its node {text(above['class_type'])!r} here")

    def start(self, info: PictureInfo, node: Node) -> None:
        """The start of the sampler: an empty latent of some size, or a picture."""
        for above in self.up(self.link(node, "latent_image"), ("samples", "pixels", "image", "latent")):
            width, height = (side(self.value(above, key)) for key in ("width", "height"))
            if above["class_type"].startswith("Empty") and width and height:
                info.width, info.height = width, height
            if above["class_type"].startswith("LoadImage"):
                share = self.value(self.link(node, "sigmas") or node, "denoise")
                info.strength = number(share) or 1.0
                info.notes.append(
                    f"it began with the picture {name(above['inputs'].get('image')) or 'that was loaded'!r}"
                )
            if "mask" in above["inputs"]:
                info.notes.append("it was made with a mask")

    def second(self, info: PictureInfo, chain: list[Node]) -> None:
        """A second pass at another size, as --upscale does it; further passes are only noted."""
        last = chain[0]
        keys = ("samples", "pixels", "image", "latent")
        between = [node for node in self.up(self.link(last, "latent_image"), keys) if not _samples(node)]
        share = number(self.value(self.link(last, "sigmas") or last, "denoise"))
        scaled = next(
            (node for node in between if "pscale" in node["class_type"] or "Scale" in node["class_type"]), None
        )
        if len(chain) == 2 and scaled is not None and info.width:
            width, factor = side(self.value(scaled, "width")), number(self.value(scaled, "scale_by"))
            factor = factor or (width / info.width if width else None)
            if factor and 1 <= factor <= 8:
                mode = "latent" if scaled["class_type"].startswith("Latent") else "lanczos"
                info.upscale = round(factor, 4), mode, share
                return
        info.notes.append(f"{len(chain)} samplers worked one after the other: this is the first")


def _samples(node: Node) -> bool:
    inputs = node["inputs"]
    return "latent_image" in inputs and any(key in inputs for key in ("sampler_name", "sampler", "steps"))
