"""Files of the families that diffgen samples by its own loop: LoRAs in each layout, text encoders, hostile variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny
import torch
from loading import load
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models import single_file
from diffgen.pipelines.inputs import read_lora
from diffgen.pipelines.weights.adapters import merge_lora
from diffgen.pipelines.weights.load import _load as load_part

# Of each family: modules of its transformer by diffusers' names; and by the original ones, which may hold several.
LORAS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "chroma": (
        "x_embedder",
        {
            "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            "distilled_guidance_layer.layers.0.in_layer": ["distilled_guidance_layer.layers.0.linear_1"],
        },
    ),
    "z-image": (
        "layers.1.feed_forward.w1",
        {
            "layers.0.attention.qkv": [f"layers.0.attention.to_{x}" for x in "qkv"],
            "layers.0.attention.out": ["layers.0.attention.to_out.0"],
        },
    ),
    "flux2-klein": (
        "x_embedder",
        {
            "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
            "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
        },
    ),
    "qwen-image": (
        "transformer_blocks.0.attn.to_q",
        {
            "transformer_blocks.1.img_mlp.net.0.proj": ["transformer_blocks.1.img_mlp.net.0.proj"],
            "transformer_blocks.0.txt_mod.1": ["transformer_blocks.0.txt_mod.1"],
        },
    ),
}
TRANSFORMER = "transformer/config.json"
# Of each family: (file, a change to it, what the refusal says).
HOSTILE: dict[str, list[tuple[str, Callable[[Any], Any], str]]] = {
    "z-image": [
        (TRANSFORMER, lambda c: c.update(n_layers=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(dim=10**9), "'dim' is out of bounds"),
        (TRANSFORMER, lambda c: c.update(axes_dims=[2, 2, 2]), "makes no ZImageTransformer2DModel"),
        (TRANSFORMER, lambda c: c.update(all_patch_size=[4]), "the transformer's patches are|does not belong"),
        (TRANSFORMER, lambda c: c.update(siglip_feat_dim=8), "is missing"),
        ("text_encoder/config.json", lambda c: c.update(num_hidden_layers=10**5), "more layers"),
        ("text_encoder/config.json", lambda c: c.update(hidden_act="os.system"), "makes no Qwen3Model"),
        ("text_encoder/config.json", lambda c: c.update(rope_theta=float(10**13)), "'rope_theta' is out of bounds"),
        ("text_encoder/model.safetensors", lambda t: t.update(extra=torch.zeros(1)), "'extra' does not belong"),
        ("text_encoder/model.safetensors", lambda t: t["norm.weight"].fill_(torch.nan), "not finite"),
        ("tokenizer/tokenizer.json", lambda c: c["added_tokens"][-1].update(id=9), "has the number"),
        ("tokenizer/tokenizer.json", lambda c: c["added_tokens"].append({"content": "", "id": 1}), "no added token"),
        ("tokenizer/tokenizer.json", lambda c: c.update(added_tokens={"a": 1}), "no list of at most"),
        ("tokenizer/tokenizer.json", lambda c: c["model"].update(merges="x"), "not a list of merges"),
        ("vae/config.json", lambda c: c.update(latent_channels=8), "vae"),
        ("model_index.json", lambda c: c.update(text_encoder=["transformers", "AutoModel"]), "'text_encoder' is of"),
        ("scheduler/scheduler_config.json", lambda c: c.update(shift=-1.0), "shift"),
    ],
    "chroma": [
        (TRANSFORMER, lambda c: c.update(approximator_layers=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(axes_dims_rope=[2, 2, 2]), "do not make up"),
        (TRANSFORMER, lambda c: c.update(approximator_num_channels=16), "has the shape"),
        ("text_encoder/config.json", lambda c: c.update(d_model=10**9), "out of bounds"),
        ("tokenizer/tokenizer.json", lambda c: c["model"].update(vocab="x"), "no list of pieces"),
        ("model_index.json", lambda c: c.update(transformer=["os", "system"]), "'transformer' is of"),
    ],
    "flux2": [
        (TRANSFORMER, lambda c: c.update(joint_attention_dim=32), "has the shape"),
        ("text_encoder/config.json", lambda c: c["text_config"].update(hidden_size=10**9), "out of bounds"),
        ("text_encoder/config.json", lambda c: c["text_config"].update(num_hidden_layers=10**5), "more layers"),
        ("tokenizer/tokenizer.json", lambda c: c["model"]["vocab"].pop("<s>"), "has no <s>|has the number"),
        ("tokenizer/tokenizer.json", lambda c: c["added_tokens"][0].update(id=300), "has the number"),
        ("tokenizer/tokenizer.json", lambda c: c["model"].update(merges=[["a"]]), "a merge is not a pair"),
        ("model_index.json", lambda c: c.update(tokenizer=["transformers", "AutoProcessor"]), "'tokenizer' is of"),
    ],
    "flux2-klein": [
        (TRANSFORMER, lambda c: c.update(num_single_layers=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(axes_dims_rope=[2, 2, 2, 4]), "do not make up"),
        (TRANSFORMER, lambda c: c.update(guidance_embeds=True), "is missing"),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            lambda t: t.update(extra=torch.zeros(1)),
            "does not belong",
        ),
        ("text_encoder/config.json", lambda c: c.update(rope_parameters={"rope_theta": 1e13}), "out of bounds"),
        ("tokenizer/tokenizer.json", lambda c: c["model"].update(vocab={"a": -1}), "not a table of tokens"),
        ("vae/config.json", lambda c: c.update(patch_size=[4, 4]), "'bn.running_mean' has the shape"),
        ("vae/diffusion_pytorch_model.safetensors", lambda t: t["bn.running_var"].fill_(-1), "running_var"),
        ("model_index.json", lambda c: c.update(vae=["diffusers", "AutoencoderKL"]), "'vae' is of the class"),
        ("scheduler/scheduler_config.json", lambda c: c.update(base_shift="x"), "base_shift"),
    ],
    "krea2": [
        (TRANSFORMER, lambda c: c.update(num_layerwise_text_blocks=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(text_hidden_dim=32), "has the shape"),
        ("model_index.json", lambda c: c.update(text_encoder_select_layers=[0, 9]), "the text encoder has 3 layers"),
        ("model_index.json", lambda c: c.update(text_encoder_select_layers=[0]), "num_text_layers is 2"),
        ("model_index.json", lambda c: c.update(text_encoder_select_layers="os"), "text_encoder_select_layers is"),
        ("model_index.json", lambda c: c.update(patch_size=4), "patch_size is 4"),
        ("text_encoder/config.json", lambda c: c["text_config"].update(num_hidden_layers=10**5), "more layers"),
    ],
    "ernie-image": [
        (TRANSFORMER, lambda c: c.update(num_layers=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(rope_axes_dim=[4, 4, 4]), "rope_axes_dim is 12"),
        ("text_encoder/config.json", lambda c: c["text_config"]["rope_parameters"].update(factor=1e9), "out of bounds"),
        ("model_index.json", lambda c: c.update(pe=["os", "system"]), "'pe' is of the class"),
    ],
    "qwen-image": [
        (TRANSFORMER, lambda c: c.update(num_layers=10**5), "more layers"),
        (TRANSFORMER, lambda c: c.update(use_additional_t_cond=True), "is missing"),
        (TRANSFORMER, lambda c: c.update(use_layer3d_rope=True), "of another model"),
        (TRANSFORMER, lambda c: c.update(axes_dims_rope=[4, 4, 4]), "do not make up"),
        ("text_encoder/config.json", lambda c: c.update(text_config=[]), "does not belong|has the shape|more layers"),
        ("text_encoder/model.safetensors", lambda t: t.update({"model.other.x": torch.zeros(1)}), "does not belong"),
        ("vae/config.json", lambda c: c.update(dim_mult=[1] * 11), "block_out|does not belong|is missing|makes no"),
        ("vae/config.json", lambda c: c.update(latents_std=[0.0, 1, 1, 1]), "latents_std"),
        ("scheduler/scheduler_config.json", lambda c: c.update(shift_terminal=2.0), "shift_terminal"),
    ],
}


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, cases in HOSTILE.items() for case in cases])
def test_a_hostile_file_is_refused(
    family_folder: Callable[[str], Path], tmp_path: Path, family: str, case: tuple[str, Any, str]
) -> None:
    from diffgen.models import gate
    from diffgen.pipelines.plan import noise_and_prediction

    file, change, text = case
    folder = tiny.changed(family_folder(family), tmp_path / "model", file, change)

    def read() -> None:
        checked = gate.check_folder(folder)
        noise_and_prediction(checked)
        part = checked.components.get(file.partition("/")[0])
        if part is not None and part.tensors is not None:
            load_part(checked, part, torch.device("cpu"), torch.float32)  # alone, which is faster
        load(folder)

    with pytest.raises(InputError, match=text):
        read()


@pytest.mark.parametrize("family", ["z-image", "flux2"])
def test_a_chat_template_of_a_file_is_never_used(
    family_folder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Templates are programs. Ours gives the text that the model's own would."""
    evil = "{{ raise_exception('a template of a file was run') }}"
    folder = tiny.changed(
        family_folder(family), tmp_path / "m", "tokenizer/tokenizer_config.json", lambda c: c.update(chat_template=evil)
    )
    (folder / "tokenizer" / "chat_template.jinja").write_text(evil)
    ours = load(folder).tokenizer
    if family == "flux2":
        own = tiny.mistral_tokenizer()
        messages = [
            {"role": role, "content": [{"type": "text", "text": f"a red apple, {role}"}]} for role in ("system", "user")
        ]
        assert ours.padding_side == own.padding_side == "left"
    else:
        own = tiny.qwen_tokenizer()
        messages = [{"role": "user", "content": "a red apple"}]
    for thinking in (True, False):
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        text = ours.apply_chat_template(messages, **options)
        assert text == own.apply_chat_template(messages, **options)
        assert ours(text).input_ids == own(text).input_ids


@pytest.mark.parametrize("name", ["model.{}", "model.language_model.{}", "language_model.model.{}"])
def test_a_language_model_is_read_from_larger_ones(
    family_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Its last layer and the vision beside it are left out."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[name.format(key)] = tensors.pop(key)
        tensors["lm_head.weight"] = torch.zeros(3, 3)
        tensors["model.visual.patch_embed.weight"] = torch.zeros(2)

    folder = tiny.changed(family_folder("z-image"), tmp_path / "model", "text_encoder/model.safetensors", change)
    expected = load(family_folder("z-image")).text_encoder.state_dict()
    weights = load(folder).text_encoder.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())


@pytest.mark.parametrize("family", LORAS)
@pytest.mark.parametrize("layout", ["diffusers", "original", "kohya"])
def test_a_lora_in_each_layout(family_folder: Callable[[str], Path], tmp_path: Path, family: str, layout: str) -> None:
    """Each weight becomes W + scale·(alpha/rank)·B·A; of a matrix of several, each has its rows of B."""
    single, fused = LORAS[family]
    pipeline = load(family_folder(family))
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    random = torch.Generator().manual_seed(4)
    modules: dict[str, list[str]] = {single: [single]}
    modules |= {name: [name] for names in fused.values() for name in names} if layout == "diffusers" else fused
    tensors, deltas = {}, {}
    for module, targets in modules.items():
        rows = [len(before[f"{target}.weight"]) for target in targets]
        a = torch.randn(2, before[f"{targets[0]}.weight"].shape[1], generator=random)
        b = torch.randn(sum(rows), 2, generator=random)
        if layout == "diffusers":
            tensors |= {
                f"transformer.{module}.lora_A.default.weight": a,
                f"transformer.{module}.lora_B.default.weight": b,
            }
        else:
            stem = f"diffusion_model.{module}" if layout == "original" else f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
        deltas |= dict(zip(targets, (b @ a).split(rows), strict=True))
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(f"{tmp_path / 'x.safetensors'}:0.5")
    matched = merge_lora(pipeline, family, lora)
    assert (matched.matched, matched.unmatched) == (len(tensors), ())
    for name, tensor in pipeline.transformer.state_dict().items():
        expected = before[name] + 0.5 * deltas.get(name.removesuffix(".weight"), torch.zeros(()))
        assert torch.allclose(tensor, expected, atol=1e-6), name


@pytest.mark.parametrize("family", [family for family in LORAS if family != "chroma"])  # its LoRAs look like FLUX.1's
def test_a_lora_names_its_family(family_folder: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    from diffgen.models.single_file import recognise

    weights = load_file(next((family_folder(family) / "transformer").glob("*.safetensors")))
    for prefix in ("transformer.", "lora_unet_"):
        tensors = {}
        for name, tensor in weights.items():
            module = name.removesuffix(".weight")
            if tensor.ndim == 2 and module != name:
                stem = prefix + (module if prefix.endswith(".") else module.replace(".", "_"))
                tensors |= {f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(2, 1)}
        save_file(tensors, tmp_path / "x.safetensors")
        contents = recognise(tmp_path / "x.safetensors")
        assert (contents.kind, contents.family) == ("lora", family)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("Krea2Transformer2DModel", 12e9, 14e9), ("ErnieImageTransformer2DModel", 2.5e9, 3e9)]
)
def test_a_network_of_full_size_is_within_the_bounds(name: str, low: float, high: float) -> None:
    """The size of the constructor's defaults, which for Krea 2 is the published one. Nothing is allocated."""
    from diffgen.models.gate import Component
    from diffgen.models.gate import Tensor as Entry
    from diffgen.pipelines.weights import network

    with torch.device("meta"):
        whole: Any = network.make_network(name, {})
    assert low <= sum(parameter.numel() for parameter in whole.parameters()) <= high
    tensors = {key: Entry("BF16", tuple(tensor.shape)) for key, tensor in whole.state_dict().items()}
    network._check_bounds(Component("transformer", "diffusers", name, Path(), dict(whole.config), (), tensors))


def test_no_table_is_left_empty() -> None:
    """Tables that no file holds are computed: rotary frequencies are real although parameters take no memory."""
    from diffgen.pipelines.weights import network

    with torch.device("meta"):
        empty = network.make_network("Qwen3Model", {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8})
    assert any("inv_freq" in name for name in network._empty_tables(empty))
    with network._parameters_without_memory():
        made = network.make_network("Qwen3Model", {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8})
    assert not list(network._empty_tables(made))
    assert all(parameter.is_meta for parameter in made.parameters())


def test_a_file_of_all_networks_needs_nothing_else(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = original_layout.write(family_folder("z-image"), tmp_path / "x.safetensors", "z-image")
    checked = single_file.check_file(path)
    assert set(checked.components) == set(checked.row.parts)
    assert checked.files == (path,)
