"""The families of models, one row each. Code reads the row instead of comparing a family's name.

What a row cannot hold (the layout of the network's weights, its inputs) is in the module that the row names, in
`diffgen/pipelines/families/`. Names in files are only compared with this table; none of them is ever imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from diffgen.errors import UsageError

from . import file_configs

Pair = tuple[str, str]  # (library, class), as model_index.json writes them

TASKS = {
    "text": "text to image",
    "image": "image to image",
    "mask": "inpainting with a network that reads the mask",
    "control": "ControlNet",
    "control+image": "ControlNet on a picture",
}


@dataclass(frozen=True)
class InFile:
    """Where a single-file checkpoint holds a network, and in which layout."""

    layout: str  # "denoiser" (of the family's module), or one that families share: see pipelines/weights/layouts.py
    prefixes: tuple[str, ...]  # one of them begins the names of the network's tensors
    inner: str = ""  # what follows the prefix in these names; tensors without it are not read
    bare: tuple[str, ...] = ()  # how the names begin in a file that holds only this network, without a prefix
    identities: tuple[str, ...] = ()  # matrices of the network that no file holds: the identity


@dataclass(frozen=True)
class Part:
    """A component of a pipeline."""

    kind: str  # "network", "tokenizer", "processor" or "scheduler"
    classes: frozenset[Pair]  # the classes it may have; empty for a scheduler, whose class is not used
    optional: bool = False  # the pipeline works without it
    file: InFile | None = None  # of a network: where single files hold it
    loads: str = ""  # of a network: the class that is loaded, where it is only a part of what the files hold
    layout: str = ""  # of a network: the layout in folders, where it is not diffusers' or transformers' own
    vocabulary: str = (
        ""  # of a tokenizer: the folder in configs/ with its vocabulary; without one, no single file has it
    )
    template: str = ""  # of a tokenizer: the chat template, one of pipelines/weights/tokenizers.TEMPLATES
    special: Mapping[str, str] = field(default_factory=dict)  # and the special tokens that differ from the folder's


class Defaults(NamedTuple):
    """How a model is sampled unless its card or the user says otherwise. Guidance is in our convention: 1 is off."""

    steps: int
    guidance: float
    scheduler: str
    grid: str | None = None  # None: the scheduler's own
    size: int | None = None  # side of a square in pixels; None: the configuration's


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common."""

    name: str
    title: str
    pipelines: tuple[str, ...]  # class names in model_index.json; the first one is what the parts are loaded into
    parts: Mapping[str, Part]
    defaults: Defaults
    variants: Mapping[str, Defaults] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)  # {task of TASKS: diffusers' class for it}
    module: str = "unet"  # in pipelines/families: layout, checks and inputs of the network
    licence: str = ""  # of the weights that its makers published
    native: bool = False  # sampled by our own loop (pipelines/sampling/native.py), not by diffusers' pipelines
    reads: str = ""  # what its network reads beside the latents: "mask" (a picture with a hole, and a mask), "control"

    # Pipelines
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments of their constructors that are not parts
    settings: tuple[str, ...] = ()  # switches of model_index.json that their constructors take
    references: int = 0  # how many pictures a network reads beside the one that it makes, to edit them; 0: none
    refiner: str | None = None  # the family of models that can take over the last steps

    # Prompts
    embeddings: tuple[str, ...] = ()  # what encode_prompt returns, by the call's arguments; "" is not used
    chunks: bool = False  # prompts of any length, read in chunks with weights; else encode_prompt reads the text
    tokens: Mapping[str | None, int] = field(default_factory=dict)  # {variant: its limit}; else the pipeline's default

    # Latents and noise
    latents: str = "plain"  # their layout, one of pipelines/sampling/latents.CODECS
    patch: int = 1  # latents on a side that the network reads as one
    vae_overflows: bool = False  # its VAE may be too narrow in float16, and says so (force_upcast)
    guidance_embedded: bool = False  # the network takes the guidance as an input, in one evaluation
    shift: str | None = None  # how a flow's shift depends on the size, where it is not linear in the tokens: "flux2"
    shifts: Mapping[str, float] = field(default_factory=dict)  # {variant: the μ of its flow at any size}
    prediction: str | None = "epsilon"  # unless a file names another; None: single files have to name it

    # Single files
    marks: tuple[str, ...] = ()  # patterns that begin names of tensors; a checkpoint of the family has all of them
    text_width: int | None = None  # of the embeddings that a UNet reads
    lora_mark: str = ""  # a pattern in the names of a LoRA's tensors, one per line
    embedding_widths: tuple[tuple[int, ...], ...] = ()  # of the vectors in a textual inversion
    configure: Callable[[dict[str, Any], dict[str, Any], file_configs.Shapes], None] | None = None

    @property
    def denoiser(self) -> str:
        """The name of the part that predicts the noise."""
        return "unet" if "unet" in self.parts else "transformer"

    @property
    def reads_prompts(self) -> bool:
        return any(name.startswith("text_encoder") for name in self.parts)

    @property
    def reads_negative_prompts(self) -> bool:
        """Whether its networks are guided by a second evaluation, for a negative prompt."""
        return self.reads_prompts and not self.guidance_embedded

    def samples_natively(self, task: str) -> bool:
        """Whether our own loop does a task: a native family's, and ControlNets of transformers."""
        return self.native or (task.startswith("control") and self.denoiser == "transformer")

    @property
    def is_flow(self) -> bool:
        """Whether its models predict the velocity of a flow, always."""
        return self.prediction == "flow_prediction"

    @property
    def is_refiner(self) -> bool:
        return self.name in REFINERS

    @property
    def in_files(self) -> dict[str, InFile]:
        """The parts that single files hold."""
        return {name: part.file for name, part in self.parts.items() if part.file is not None}


def _network(library: str, *classes: str, optional: bool = False, file: InFile | None = None) -> Part:
    return Part("network", frozenset((library, name) for name in classes), optional, file)


def _clip(layout: str, prefix: str, inner: str, projected: bool = True, **more: Any) -> Part:
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return _network("transformers", name, file=InFile(layout, (prefix,), inner, **more))


def _tokenizer(vocabulary: str, classes: tuple[str, ...], optional: bool = False, **special: str) -> Part:
    pairs = frozenset(("transformers", name) for name in classes)
    return Part("tokenizer", pairs, optional, vocabulary=vocabulary, special=special)


_DENOISER, _FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
_SCHEDULER = Part("scheduler", frozenset())
_UNET = _network("diffusers", "UNet2DConditionModel", file=InFile("denoiser", (_DENOISER,)))
_VAE = _network("diffusers", "AutoencoderKL", file=InFile("vae", (_FIRST_STAGE,)))
_CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
_CLIP_TOKENIZER = _tokenizer("clip_tokenizer", _CLIP)
_OPENCLIP_TOKENIZER = _tokenizer("clip_tokenizer", _CLIP, pad_token="!")
_T5, _T5_TOKENIZER = "T5EncoderModel", ("T5Tokenizer", "T5TokenizerFast")
_T5_IN_FILE = InFile("t5", ("text_encoders.t5xxl.",), "transformer.")


def _language(*classes: str, loads: str, prefix: str = "") -> Part:
    """A language model of which only the layers that read a prompt are loaded."""
    pairs = frozenset(("transformers", name) for name in classes)
    file = InFile("language", (prefix,), "transformer.") if prefix else None
    return Part("network", pairs, file=file, loads=loads, layout="language")


_QWEN3 = ("Qwen3Model", "Qwen3ForCausalLM")
_QWEN25VL = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
_QWEN3VL = ("Qwen3VLModel", "Qwen3VLForConditionalGeneration")
_QWEN_TOKENIZER = Part(
    "tokenizer",
    frozenset(("transformers", name) for name in ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
    vocabulary="qwen_tokenizer",
    template="qwen",
)

_MISTRAL_TOKENIZER = Part(
    "tokenizer",
    frozenset(("transformers", name) for name in ("PixtralProcessor", "PreTrainedTokenizerFast", "TokenizersBackend")),
    template="mistral",
)

_UNET_MARK = r"model\.diffusion_model\.input_blocks\.0\.0\.weight$"

_SD_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
# "mask" is for networks that read the mask as an input (9 channels). With every other network inpainting is image to
# image that keeps the picture outside the mask.
_SD_TASKS = {
    "text": "StableDiffusionPipeline",
    "image": "StableDiffusionImg2ImgPipeline",
    "mask": "StableDiffusionInpaintPipeline",
    "control": "StableDiffusionControlNetPipeline",
    "control+image": "StableDiffusionControlNetImg2ImgPipeline",
}
_SD_FIXED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_EMBEDDINGS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

# The distilled variants of Stable Diffusion: "turbo" takes no guidance; "lcm" takes it as an input of its UNet,
# "lcm-merged" (a UNet with an LCM LoRA in it) nearly none.
_FEW_STEPS = {
    "turbo": Defaults(4, 1.0, "euler", "trailing"),
    "lcm": Defaults(4, 8.0, "lcm"),
    "lcm-merged": Defaults(6, 1.0, "lcm"),
}

_FLUX_PARTS = {
    "transformer": _network(
        "diffusers",
        "FluxTransformer2DModel",
        file=InFile(
            "denoiser",
            (_DENOISER,),
            bare=(
                "double_blocks.",
                "single_blocks.",
                "img_in.",
                "txt_in.",
                "time_in.",
                "vector_in.",
                "guidance_in.",
                "final_layer.",
            ),
        ),
    ),
    "vae": _network("diffusers", "AutoencoderKL", file=InFile("vae", (_FIRST_STAGE, "vae."))),
    "text_encoder": _clip("clip", "text_encoders.clip_l.", "transformer.", projected=False),
    "tokenizer": _CLIP_TOKENIZER,
    "text_encoder_2": _network("transformers", _T5, file=_T5_IN_FILE),
    "tokenizer_2": _tokenizer("t5_tokenizer", _T5_TOKENIZER),
    "scheduler": _SCHEDULER,
}

_FLUX2_TRANSFORMER = _network(
    "diffusers",
    "Flux2Transformer2DModel",
    file=InFile(
        "denoiser",
        (_DENOISER,),
        bare=(
            "double_blocks.",
            "single_blocks.",
            "img_in.",
            "txt_in.",
            "time_in.",
            "guidance_in.",
            "final_layer.",
            "double_stream_modulation_img.",
            "double_stream_modulation_txt.",
            "single_stream_modulation.",
        ),
    ),
)

# If a file has the marks of several families, it belongs to the last one: special families follow general ones.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd1",
            "Stable Diffusion 1",
            _SD_PIPELINES,
            {
                "unet": _UNET,
                "vae": _VAE,
                "text_encoder": _clip("clip", "cond_stage_model.", "transformer.", projected=False),
                "tokenizer": _CLIP_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(25, 7.5, "dpmpp_2m"),
            {**_FEW_STEPS, "inpaint": Defaults(25, 7.5, "dpmpp_2m")},
            _SD_TASKS,
            fixed=_SD_FIXED,
            licence="CreativeML Open RAIL-M",
            embeddings=_EMBEDDINGS,
            chunks=True,
            marks=(_UNET_MARK, r"cond_stage_model\."),
            text_width=768,
            embedding_widths=((768,),),
            configure=file_configs.unet,
        ),
        Family(
            "sd2",
            "Stable Diffusion 2",
            _SD_PIPELINES,
            {
                "unet": _UNET,
                "vae": _VAE,
                "text_encoder": _clip("openclip-cut", "cond_stage_model.", "model.", projected=False),
                "tokenizer": _OPENCLIP_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(25, 7.5, "dpmpp_2m"),
            {**_FEW_STEPS, "inpaint": Defaults(25, 7.5, "dpmpp_2m")},
            _SD_TASKS,
            fixed=_SD_FIXED,
            licence="CreativeML Open RAIL++-M",
            embeddings=_EMBEDDINGS,
            chunks=True,
            prediction=None,  # its makers published both: epsilon at 512 pixels, v at 768
            marks=(_UNET_MARK, r"cond_stage_model\.model\."),
            text_width=1024,
            embedding_widths=((1024,),),
            configure=file_configs.unet_2,
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
            {
                "unet": _UNET,
                "vae": _VAE,
                "text_encoder": _clip("clip", "conditioner.embedders.0.", "transformer.", projected=False),
                "tokenizer": _CLIP_TOKENIZER,
                "scheduler": _SCHEDULER,
                "text_encoder_2": _clip("openclip", "conditioner.embedders.1.", "model."),
                "tokenizer_2": _OPENCLIP_TOKENIZER,
            },
            Defaults(30, 5.0, "dpmpp_2m"),
            {
                **_FEW_STEPS,
                "turbo": Defaults(4, 1.0, "euler_ancestral", "trailing"),
                "inpaint": Defaults(30, 5.0, "dpmpp_2m"),
            },
            {
                "text": "StableDiffusionXLPipeline",
                "image": "StableDiffusionXLImg2ImgPipeline",
                "mask": "StableDiffusionXLInpaintPipeline",
                "control": "StableDiffusionXLControlNetPipeline",
                "control+image": "StableDiffusionXLControlNetImg2ImgPipeline",
            },
            fixed={"add_watermarker": False},
            settings=("force_zeros_for_empty_prompt",),
            refiner="sdxl-refiner",
            licence="CreativeML Open RAIL++-M",
            embeddings=_POOLED,
            chunks=True,
            vae_overflows=True,
            marks=(_UNET_MARK, r"conditioner\.embedders\.1\.model\."),
            text_width=2048,
            lora_mark=r"lora_te2_|text_encoder_2\.",
            embedding_widths=((768, 1280), (1280,)),
            configure=file_configs.unet,
        ),
        Family(
            "sdxl-refiner",
            "Stable Diffusion XL refiner",
            ("StableDiffusionXLImg2ImgPipeline",),
            {
                "unet": _UNET,
                "vae": _VAE,
                "text_encoder_2": _clip("openclip", "conditioner.embedders.0.", "model."),
                "tokenizer_2": _OPENCLIP_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(30, 5.0, "dpmpp_2m"),
            tasks={"image": "StableDiffusionXLImg2ImgPipeline"},
            fixed={
                "text_encoder": None,
                "tokenizer": None,
                "add_watermarker": False,
                "requires_aesthetics_score": True,
                "force_zeros_for_empty_prompt": False,
            },
            settings=("force_zeros_for_empty_prompt", "requires_aesthetics_score"),
            licence="CreativeML Open RAIL++-M",
            embeddings=_POOLED,
            chunks=True,
            vae_overflows=True,
            marks=(_UNET_MARK, r"conditioner\.embedders\.0\.model\."),
            text_width=1280,
            configure=file_configs.unet,
        ),
        Family(
            "sd3",
            "Stable Diffusion 3",
            ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
            {
                "transformer": _network(
                    "diffusers",
                    "SD3Transformer2DModel",
                    file=InFile(
                        "denoiser",
                        (_DENOISER,),
                        bare=(
                            "joint_blocks.",
                            "context_embedder.",
                            "final_layer.",
                            "pos_embed",
                            "t_embedder.",
                            "x_embedder.",
                            "y_embedder.",
                        ),
                    ),
                ),
                "vae": _VAE,
                # The first CLIP is used without its projection (sd3-ref), which is the identity in diffusers' class.
                "text_encoder": _clip(
                    "clip", "text_encoders.clip_l.", "transformer.", identities=("text_projection.weight",)
                ),
                "tokenizer": _CLIP_TOKENIZER,
                "text_encoder_2": _clip("plain", "text_encoders.clip_g.", "transformer."),
                "tokenizer_2": _OPENCLIP_TOKENIZER,
                "text_encoder_3": _network("transformers", _T5, optional=True, file=_T5_IN_FILE),
                "tokenizer_3": _tokenizer("t5_tokenizer", _T5_TOKENIZER, optional=True),
                "scheduler": _SCHEDULER,
            },
            Defaults(28, 7.0, "euler", size=1024),
            {"3.5": Defaults(28, 4.5, "euler", size=1024), "turbo": Defaults(4, 1.0, "euler", size=1024)},
            {
                "text": "StableDiffusion3Pipeline",
                "image": "StableDiffusion3Img2ImgPipeline",
                "control": "StableDiffusion3ControlNetPipeline",
                "control+image": "StableDiffusion3ControlNetPipeline",
            },
            "sd3",
            licence="Stability AI Community",
            embeddings=_POOLED,
            patch=2,
            prediction="flow_prediction",
            marks=(r"(model\.diffusion_model\.)?joint_blocks\.0\.",),
            lora_mark=(
                r"(?s)\A(?!.*(?:img_mlp|txt_mlp)).*"
                r"(?:joint_blocks|transformer_blocks[._]\d+[._](?:attn[._]add_|ff_context))"
            ),
            configure=file_configs.sd3,
        ),
        Family(
            "flux",
            "FLUX.1",
            ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
            _FLUX_PARTS,
            Defaults(28, 3.5, "euler", size=1024),
            {"schnell": Defaults(4, 1.0, "euler", size=1024)},
            {
                "text": "FluxPipeline",
                "image": "FluxImg2ImgPipeline",
                "control": "FluxControlNetPipeline",
                "control+image": "FluxControlNetImg2ImgPipeline",
            },
            "flux",
            licence="dev: FLUX.1 [dev] Non-Commercial; schnell: Apache-2.0",
            embeddings=("prompt_embeds", "pooled_prompt_embeds"),
            tokens={"schnell": 256},  # as its makers say
            latents="packed",
            patch=2,
            guidance_embedded=True,
            prediction="flow_prediction",
            marks=(r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.",),
            lora_mark=r"double_blocks|single_blocks|single_transformer_blocks",
            configure=file_configs.flux,
        ),
        Family(
            "flux-kontext",
            "FLUX.1 Kontext",
            ("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
            _FLUX_PARTS,
            Defaults(28, 2.5, "euler", size=1024),
            tasks={"text": "FluxKontextPipeline", "image": "FluxKontextPipeline"},
            module="flux",
            native=True,
            references=1,
            licence="FLUX.1 [dev] Non-Commercial",
            embeddings=("prompt_embeds", "pooled_prompt_embeds"),
            latents="packed",
            patch=2,
            guidance_embedded=True,
            prediction="flow_prediction",
        ),
        Family(
            "flux-fill",
            "FLUX.1 Fill",
            ("FluxFillPipeline",),
            _FLUX_PARTS,
            Defaults(50, 30.0, "euler", size=1024),
            tasks={"mask": "FluxFillPipeline"},
            module="flux",
            native=True,
            reads="mask",
            licence="FLUX.1 [dev] Non-Commercial",
            embeddings=("prompt_embeds", "pooled_prompt_embeds"),
            latents="packed",
            patch=2,
            guidance_embedded=True,
            prediction="flow_prediction",
        ),
        Family(
            "flux-control",
            "FLUX.1 Canny and Depth",
            ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
            _FLUX_PARTS,
            Defaults(50, 30.0, "euler", size=1024),
            tasks={"control": "FluxControlPipeline", "control+image": "FluxControlImg2ImgPipeline"},
            module="flux",
            native=True,
            reads="control",
            licence="FLUX.1 [dev] Non-Commercial",
            embeddings=("prompt_embeds", "pooled_prompt_embeds"),
            latents="packed",
            patch=2,
            guidance_embedded=True,
            prediction="flow_prediction",
        ),
        Family(
            "chroma",
            "Chroma1",
            ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
            {
                "transformer": _network(
                    "diffusers",
                    "ChromaTransformer2DModel",
                    file=InFile(
                        "denoiser",
                        (_DENOISER,),
                        bare=(
                            "double_blocks.",
                            "single_blocks.",
                            "img_in.",
                            "txt_in.",
                            "final_layer.",
                            "distilled_guidance_layer.",
                        ),
                    ),
                ),
                "vae": _FLUX_PARTS["vae"],
                "text_encoder": _FLUX_PARTS["text_encoder_2"],
                "tokenizer": _FLUX_PARTS["tokenizer_2"],
                "scheduler": _SCHEDULER,
            },
            Defaults(35, 5.0, "euler", size=1024),
            {"flash": Defaults(12, 1.0, "euler", size=1024)},
            {"text": "ChromaPipeline", "image": "ChromaImg2ImgPipeline"},
            "chroma",
            native=True,
            licence="Apache-2.0",
            embeddings=(
                "prompt_embeds",
                "",
                "prompt_embeds_mask",
                "negative_prompt_embeds",
                "",
                "negative_prompt_embeds_mask",
            ),
            tokens={None: 512, "flash": 512},
            patch=2,
            prediction="flow_prediction",
            marks=(r"(model\.diffusion_model\.)?distilled_guidance_layer\.in_proj\.bias",),
            configure=file_configs.chroma,
        ),
        Family(
            "z-image",
            "Z-Image",
            ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
            {
                "transformer": _network(
                    "diffusers",
                    "ZImageTransformer2DModel",
                    file=InFile(
                        "denoiser",
                        (_DENOISER,),
                        bare=(
                            "layers.",
                            "noise_refiner.",
                            "context_refiner.",
                            "x_embedder.",
                            "all_x_embedder.",
                            "t_embedder.",
                            "cap_embedder.",
                            "final_layer.",
                            "all_final_layer.",
                            "x_pad_token",
                            "cap_pad_token",
                            "norm_final.",
                        ),
                    ),
                ),
                "vae": _network("diffusers", "AutoencoderKL", file=InFile("vae", (_FIRST_STAGE, "vae."))),
                "text_encoder": _language(*_QWEN3, loads="Qwen3Model", prefix="text_encoders.qwen3_4b."),
                "tokenizer": _QWEN_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(50, 5.0, "euler", size=1024),
            {"turbo": Defaults(8, 1.0, "euler", size=1024)},
            {"text": "ZImagePipeline", "image": "ZImageImg2ImgPipeline"},
            "z_image",
            native=True,
            licence="Apache-2.0",
            embeddings=_EMBEDDINGS,
            tokens={None: 512, "turbo": 512},
            patch=2,
            prediction="flow_prediction",
            marks=(
                r"(model\.diffusion_model\.)?layers\.0\.adaLN_modulation\.0\.weight",
                r"(model\.diffusion_model\.)?cap_embedder\.0\.weight",
            ),
            lora_mark=r"(?s)(?=.*layers[._]\d+[._]attention[._])(?=.*layers[._]\d+[._]feed_forward[._])",
            configure=file_configs.z_image,
        ),
        Family(
            "flux2-klein",
            "FLUX.2 klein",
            ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
            {
                "transformer": _FLUX2_TRANSFORMER,
                "vae": _network("diffusers", "AutoencoderKLFlux2"),
                "text_encoder": _language(*_QWEN3, loads="Qwen3Model"),
                "tokenizer": _QWEN_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(4, 1.0, "euler", size=1024),
            {"base": Defaults(50, 4.0, "euler", size=1024)},
            {"text": "Flux2KleinPipeline", "image": "Flux2KleinPipeline"},
            "flux2",
            native=True,
            settings=("is_distilled",),
            references=4,
            licence="4B: Apache-2.0; 9B: FLUX Non-Commercial",
            embeddings=("prompt_embeds",),
            tokens={None: 512, "base": 512},
            patch=2,
            shift="flux2",
            prediction="flow_prediction",
            marks=(r"(model\.diffusion_model\.)?single_stream_modulation\.lin\.weight",),
            lora_mark=r"to_qkv_mlp_proj|ff[._]linear_in|ff_context[._]linear_in|stream_modulation",
            configure=file_configs.flux2,
        ),
        Family(
            "flux2",
            "FLUX.2 dev",
            ("Flux2Pipeline",),
            {
                "transformer": _FLUX2_TRANSFORMER,
                "vae": _network("diffusers", "AutoencoderKLFlux2"),
                "text_encoder": _language("Mistral3ForConditionalGeneration", loads="MistralModel"),
                "tokenizer": _MISTRAL_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(28, 4.0, "euler", size=1024),
            tasks={"text": "Flux2Pipeline", "image": "Flux2Pipeline"},
            module="flux2",
            native=True,
            references=10,
            licence="FLUX [dev] Non-Commercial",
            embeddings=("prompt_embeds",),
            tokens={None: 512},
            patch=2,
            guidance_embedded=True,
            shift="flux2",
            prediction="flow_prediction",
            marks=(
                r"(model\.diffusion_model\.)?single_stream_modulation\.lin\.weight",
                r"(model\.diffusion_model\.)?guidance_in\.in_layer\.weight",
            ),
            configure=file_configs.flux2,
        ),
        Family(
            "qwen-image",
            "Qwen-Image",
            ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
            {
                "transformer": _network(
                    "diffusers",
                    "QwenImageTransformer2DModel",
                    file=InFile(
                        "denoiser",
                        (_DENOISER,),
                        bare=(
                            "transformer_blocks.",
                            "img_in.",
                            "txt_in.",
                            "txt_norm.",
                            "time_text_embed.",
                            "norm_out.",
                            "proj_out.",
                        ),
                    ),
                ),
                "vae": _network("diffusers", "AutoencoderKLQwenImage"),
                "text_encoder": _language(*_QWEN25VL, loads="Qwen2_5_VLTextModel"),
                "tokenizer": _QWEN_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(50, 4.0, "euler", size=1024),
            {"lightning": Defaults(8, 1.0, "euler", size=1024)},
            {"text": "QwenImagePipeline", "image": "QwenImageImg2ImgPipeline"},
            "qwen_image",
            native=True,
            licence="Apache-2.0",
            embeddings=("prompt_embeds", "prompt_embeds_mask"),
            tokens={None: 512, "lightning": 512},
            patch=2,
            prediction="flow_prediction",
            marks=(r"(model\.diffusion_model\.)?transformer_blocks\.0\.img_mod\.1\.weight",),
            lora_mark=r"img_mlp|txt_mlp|img_mod|txt_mod",
            configure=file_configs.qwen_image,
        ),
        Family(
            "krea2",
            "Krea 2",
            ("Krea2Pipeline",),
            {
                "transformer": _network("diffusers", "Krea2Transformer2DModel"),
                "vae": _network("diffusers", "AutoencoderKLQwenImage"),
                "text_encoder": _language(*_QWEN3VL, loads="Qwen3VLTextModel"),
                "tokenizer": _QWEN_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(28, 5.5, "euler", size=1024),
            {"turbo": Defaults(8, 1.0, "euler", size=1024)},
            {"text": "Krea2Pipeline", "image": "Krea2Pipeline"},
            "krea2",
            native=True,
            settings=("is_distilled", "text_encoder_select_layers", "patch_size"),
            licence="Krea 2 Community",
            embeddings=("prompt_embeds", "prompt_embeds_mask"),
            tokens={None: 512, "turbo": 512},
            patch=2,
            shifts={"turbo": 1.15},
            prediction="flow_prediction",
        ),
        Family(
            "ernie-image",
            "ERNIE-Image",
            ("ErnieImagePipeline",),
            {
                "transformer": _network("diffusers", "ErnieImageTransformer2DModel"),
                "vae": _network("diffusers", "AutoencoderKLFlux2"),
                "text_encoder": _language("Mistral3Model", "Ministral3Model", loads="Ministral3Model"),
                "tokenizer": _MISTRAL_TOKENIZER,
                "scheduler": _SCHEDULER,
            },
            Defaults(50, 4.0, "euler", size=1024),
            {"turbo": Defaults(8, 1.0, "euler", size=1024)},
            {"text": "ErnieImagePipeline", "image": "ErnieImagePipeline"},
            "ernie_image",
            native=True,
            licence="Apache-2.0",
            embeddings=("prompt_embeds",),
            patch=2,
            prediction="flow_prediction",
        ),
        Family(
            "unconditional",
            "unconditional diffusion in pixels",
            ("DDPMPipeline", "DDIMPipeline"),
            {"unet": _network("diffusers", "UNet2DModel"), "scheduler": _SCHEDULER},
            Defaults(50, 1.0, "dpmpp_2m"),
            module="pixels",
        ),
    )
}
REFINERS = {family.refiner for family in FAMILIES.values() if family.refiner is not None}
PIPELINES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.pipelines))
TEXT_WIDTHS: dict[int | None, str] = {
    row.text_width: row.name for row in FAMILIES.values() if row.text_width is not None
}

# Components that a folder may name and that text to image does not need. They are checked only when they are used.
COMPANIONS = {
    "safety_checker": _network("stable_diffusion", "StableDiffusionSafetyChecker"),
    "feature_extractor": Part(
        "processor",
        frozenset(
            ("transformers", name)
            for name in ("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPFeatureExtractor", "SiglipImageProcessor")
        ),
    ),
    "image_encoder": _network("transformers", "CLIPVisionModelWithProjection", "SiglipVisionModel"),
    "pe": _network("transformers", "Ministral3ForCausalLM"),  # rewrites prompts of ERNIE-Image
    "pe_tokenizer": replace(_MISTRAL_TOKENIZER, template=""),
}
# Plain values of a model_index.json that change the pictures.
SETTINGS = {name for family in FAMILIES.values() for name in family.settings}


def class_of(family: str, task: str) -> str:
    """The name of diffusers' class for a task of a family. Raises UsageError where the family does not support it."""
    tasks = FAMILIES[family].tasks
    if task not in tasks:
        supported = ", ".join(TASKS[name] for name in tasks) or "pictures from nothing but noise"
        raise UsageError(f"{TASKS[task]} is not supported for models of the family {family}", f"supported: {supported}")
    return tasks[task]


def candidates(pipeline: str, parts: set[str]) -> list[Family]:
    """The families that a pipeline of that class and with those components may belong to; empty if it is not read.

    These are the families that miss the fewest components and, among them, need the most.
    """
    families = [family for family in FAMILIES.values() if pipeline in family.pipelines]

    def missing(family: Family) -> tuple[int, int]:
        needed = {name for name, part in family.parts.items() if not part.optional}
        return len(needed - parts), -len(needed)

    fewest = min(map(missing, families), default=None)
    return [family for family in families if missing(family) == fewest]


def family_of(pipeline: str, parts: set[str], unet: Mapping[str, Any]) -> Family | None:
    """The family of a pipeline with those components; its UNet's text width decides where they leave it open."""
    families = candidates(pipeline, parts)
    width = unet.get("cross_attention_dim")
    return next((family for family in families if family.text_width == width), families[0] if families else None)


def variant_of(
    family: Family,
    name: str,
    pipeline: str,
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] = MappingProxyType({}),
) -> str | None:
    """The variant of a family's model, by its configurations first, then by its name; None is the plain one.

    inpaint: 9 channels in. lcm: the UNet has a projection for the guidance (time_cond_proj_dim). lcm-merged: it has
    none, and LCM's pipeline or scheduler, or "lcm" in the name. turbo: an Euler scheduler with trailing times for
    epsilon, or "turbo" or "lightning" in the name; of Krea 2, where model_index.json says that it is distilled. 3.5:
    normalised queries and keys. schnell: no guidance embedding.
    base: model_index.json (`index`) says that it is not distilled, or "base" in the name. lightning: a shift that does
    not depend on the size, or "lightning" in the name. flash: "flash" in the name.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    variants = family.variants
    if "inpaint" in variants and network.get("in_channels") == 9:
        return "inpaint"
    if "schnell" in variants and network.get("guidance_embeds") is not True:
        return "schnell"
    if "lcm" in variants:
        if network.get("time_cond_proj_dim") is not None:
            return "lcm"
        named = pipeline.startswith("LatentConsistency") or scheduler.get("_class_name") == "LCMScheduler"
        if named or "lcm" in words:
            return "lcm-merged"
    if "turbo" in variants and "is_distilled" in family.settings:
        return "turbo" if index.get("is_distilled") is True else None
    if "turbo" in variants:
        fast = any(word.endswith(("turbo", "lightning")) for word in words)
        euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        plain = scheduler.get("prediction_type", "epsilon") == "epsilon"
        if fast or (euler and plain and scheduler.get("timestep_spacing") == "trailing"):
            return "turbo"
    if "base" in variants and not index.get("is_distilled", "base" not in words):
        return "base"
    if "flash" in variants and "flash" in words:
        return "flash"
    if "lightning" in variants:
        ends = [scheduler.get(key) for key in ("base_shift", "max_shift")]
        if "lightning" in words or (None not in ends and ends[0] == ends[1]):
            return "lightning"
    if "3.5" in variants and network.get("qk_norm") is not None:
        return "3.5"
    return None


def guidance_is_input(family: str, network: Mapping[str, Any]) -> bool:
    """Whether the network itself reads the guidance scale, so that there is no second, unconditional evaluation.

    `network` is its configuration. Flux's networks read it or, in schnell, use none; a UNet reads it if it has a
    projection for it (time_cond_proj_dim), as LCM's has.
    """
    return FAMILIES[family].guidance_embedded or network.get("time_cond_proj_dim") is not None


def defaults_of(family: str, variant: str | None = None) -> Defaults:
    """How a model of that family and variant is sampled unless its card or the user says otherwise."""
    row = FAMILIES[family]
    return row.variants[variant] if variant is not None else row.defaults
