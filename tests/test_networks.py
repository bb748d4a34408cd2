"""The networks against diffusers' with the same weights, against formulas, and their errors."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffgen.diffusion import GaussianDiffusion
from diffgen.networks import DiT, UNet, build
from diffgen.networks.blocks import attend
from diffgen.networks.dit import positions
from diffgen.networks.unet import GroupNorm
from schedulers import NoiseSchedule

SMALL_UNET: dict[str, Any] = dict(
    width=8, multipliers=(1, 2, 2), blocks=1, attention=(False, False, True), head_width=8
)
SMALL_DIT: dict[str, Any] = dict(width=16, depth=2, heads=2)


def unet(channels: int = 3, out_channels: int | None = None, **changes: Any) -> UNet:
    torch.manual_seed(0)
    return filled(UNet(channels, out_channels, **{**SMALL_UNET, **changes}))


def dit(channels: int = 3, out_channels: int | None = None, **changes: Any) -> DiT:
    torch.manual_seed(0)
    return filled(DiT(channels, out_channels, **{**SMALL_DIT, **changes}))


def filled(network: Any) -> Any:
    """The network in evaluation mode with every weight non-zero, as after training."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 25
            weight.add_(torch.randn(weight.shape, generator=g) * 0.5 / math.sqrt(fan_in))
    return network.eval()


def pictures(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


both = pytest.mark.parametrize("make", [unet, dit])


# --- against diffusers, weight by weight ---


def linears(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def residual(ours: str, theirs: str, shortcut: bool) -> dict[str, str]:
    names = {"norm1": "norm1", "conv1": "conv1", "modulation": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    if shortcut:
        names["shortcut"] = "conv_shortcut"
    return {k: v for a, b in names.items() for k, v in linears(f"{ours}.residual.{a}", f"{theirs}.{b}").items()}


def copy_attention(ours: dict[str, Tensor], prefix: str, theirs: dict[str, Tensor], their_prefix: str) -> None:
    for kind in ("weight", "bias"):
        parts = [theirs[f"{their_prefix}.{part}.{kind}"] for part in ("to_q", "to_k", "to_v")]
        ours[f"{prefix}.qkv.{kind}"] = torch.cat(parts)
        ours[f"{prefix}.out.{kind}"] = theirs[f"{their_prefix}.to_out.0.{kind}"]


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_unet_computes_what_that_of_diffusers_does(size: tuple[int, int], batch: int):
    """Two levels, two blocks, attention on the lower one, scale and shift by the time, three classes."""
    theirs = filled(
        UNet2DModel(
            in_channels=3,
            out_channels=6,
            block_out_channels=(16, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            norm_eps=1e-5,
            downsample_padding=1,
            resnet_time_scale_shift="scale_shift",
            flip_sin_to_cos=True,
            freq_shift=0,
            num_class_embeds=4,  # three and the null class
        )
    )
    network = UNet(
        3, 6, width=16, multipliers=(1, 2), blocks=2, attention=(False, True), head_width=8, classes=3
    ).eval()
    for part in network.modules():
        if isinstance(part, GroupNorm):
            part.num_groups = 4  # diffusers has one number for all
    network.middle[0].attention.norm = nn.Identity()  # with scale and shift, diffusers has none there
    names = {
        **linears("condition.into", "time_embedding.linear_1"),
        **linears("condition.out", "time_embedding.linear_2"),
        "condition.label.weight": "class_embedding.weight",
        **linears("first", "conv_in"),
        **linears("down.2.conv", "down_blocks.0.downsamplers.0.conv"),
        **linears("up.3.conv", "up_blocks.0.upsamplers.0.conv"),
        **linears("norm", "conv_norm_out"),
        **linears("last", "conv_out"),
    }
    attentions = {"middle.0": "mid_block.attentions.0"}
    for i, place in enumerate((0, 1, 3, 4)):
        theirs_is = f"down_blocks.{i // 2}.resnets.{i % 2}"
        names |= residual(f"down.{place}", theirs_is, shortcut=i == 2)
        if i >= 2:
            attentions[f"down.{place}"] = theirs_is.replace("resnets", "attentions")
    for i, place in enumerate((0, 1, 2, 4, 5, 6)):
        theirs_is = f"up_blocks.{i // 3}.resnets.{i % 3}"
        names |= residual(f"up.{place}", theirs_is, shortcut=True)
        if i < 3:
            attentions[f"up.{place}"] = theirs_is.replace("resnets", "attentions")
    for i in range(2):
        names |= residual(f"middle.{i}", f"mid_block.resnets.{i}", shortcut=False)
    for ours_is, theirs_is in attentions.items():
        if not ours_is.startswith("middle"):
            names |= linears(f"{ours_is}.attention.norm", f"{theirs_is}.group_norm")
    weights = theirs.state_dict()
    state = {ours_is: weights[theirs_is] for ours_is, theirs_is in names.items()}
    for ours_is, theirs_is in attentions.items():
        copy_attention(state, f"{ours_is}.attention", weights, theirs_is)
    network.load_state_dict(state)  # strict: nothing missing, nothing over
    assert sum(w.numel() for w in state.values()) == sum(w.numel() for w in weights.values())

    x, t, label = pictures(batch, 3, *size), torch.tensor([0, 500, 999])[:batch], torch.tensor([2, 0, 3])[:batch]
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, label), theirs(x, t, class_labels=label).sample, rtol=1e-4, atol=1e-4)


def test_the_dit_computes_what_that_of_diffusers_does():
    theirs = filled(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=3,
        )
    )
    network = DiT(3, 6, patch=2, width=256, depth=2, heads=4, classes=3).eval()
    theirs.pos_embed.pos_embed = positions(4, 4, 256, torch.device("cpu"))[None]  # the order of its parts is another
    weights = theirs.state_dict()
    names = {
        **linears("first", "pos_embed.proj"),
        **linears("modulation", "proj_out_1"),
        **linears("last", "proj_out_2"),
    }
    embedding = "transformer_blocks.0.norm1.emb"
    names |= linears("condition.into", f"{embedding}.timestep_embedder.linear_1")
    names |= linears("condition.out", f"{embedding}.timestep_embedder.linear_2")
    names["condition.label.weight"] = f"{embedding}.class_embedder.embedding_table.weight"
    for i in range(2):
        block = f"transformer_blocks.{i}"
        names |= linears(f"blocks.{i}.modulation", f"{block}.norm1.linear")
        names |= linears(f"blocks.{i}.mlp.0", f"{block}.ff.net.0.proj")
        names |= linears(f"blocks.{i}.mlp.3", f"{block}.ff.net.2")
    state = {ours_is: weights[theirs_is] for ours_is, theirs_is in names.items()}
    for i, block in enumerate(theirs.transformer_blocks):
        copy_attention(state, f"blocks.{i}", weights, f"transformer_blocks.{i}.attn1")
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())  # each has its own there
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    network.load_state_dict(state)

    x, t, label = pictures(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([2, 0, 3])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=label).sample
        torch.testing.assert_close(network(x, t, label), expected, rtol=1e-4, atol=1e-4)


# --- against formulas ---


def test_attention_is_the_formula():
    q, k, v = (pictures(2, 3, n, 4, seed=n).double() for n in (5, 7, 8))
    v = v[:, :, :7]
    expected = torch.einsum("bhnm,bhmd->bnhd", (torch.einsum("bhnd,bhmd->bhnm", q, k) / 2).softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v), expected.flatten(2))


def test_attention_of_a_cpu_in_bfloat16_is_the_formula_too():
    """The plain operations for training: output and gradients as in float64, to bfloat16's 8 bits."""
    q, k, v = (pictures(2, 3, 9, 4, seed=n).bfloat16().requires_grad_() for n in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, expected = attend(q, k, v), attend(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    for x, y in zip((q, k, v), exact, strict=True):
        (actual,) = torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)
        (want,) = torch.autograd.grad(expected.square().sum(), y, retain_graph=True)
        torch.testing.assert_close(actual.double(), want, rtol=0.05, atol=0.05)


def test_positions_distinguish_rows_and_columns():
    p = positions(3, 5, 16, torch.device("cpu")).reshape(3, 5, 16)
    assert p.flatten(0, 1).unique(dim=0).shape[0] == 15
    for r in range(3):
        for c in range(5):
            for half, place in ((p[r, c, :8], r), (p[r, c, 8:], c)):
                frequencies = [10_000 ** (-i / 4) for i in range(4)]
                waves = [math.cos(place * f) for f in frequencies] + [math.sin(place * f) for f in frequencies]
                torch.testing.assert_close(half, torch.tensor(waves))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (8, 2), (48, 12), (64, 16), (128, 32), (192, 32)])
def test_groups_divide_the_channels(channels: int, groups: int):
    assert GroupNorm(channels).num_groups == groups


@both
@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(1, 33), st.integers(1, 33)), channels=st.integers(1, 4), twice=st.booleans())
def test_any_size_is_padded_with_its_border_and_cropped(make: Any, size: tuple[int, int], channels: int, twice: bool):
    network = make(channels, 2 * channels if twice else None)
    factor = 4 if make is unet else 2
    x, t = pictures(2, channels, *size), torch.tensor([3, 700])
    rows = torch.arange(-(-size[0] // factor) * factor).clamp(max=size[0] - 1)
    columns = torch.arange(-(-size[1] // factor) * factor).clamp(max=size[1] - 1)
    with torch.no_grad():
        y, padded = network(x, t), network(x[:, :, rows][:, :, :, columns], t)
    assert y.shape == (2, channels * (2 if twice else 1), *size)
    torch.testing.assert_close(y, padded[:, :, : size[0], : size[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "changes"), [(unet, {}), (dit, {"patch": 8})])
def test_a_large_picture_goes_through(make: Any, changes: dict[str, int]):
    with torch.no_grad():
        assert make(1, **changes)(pictures(1, 1, 256, 256), torch.zeros(1)).shape == (1, 1, 256, 256)


@pytest.mark.parametrize("network", [UNet(3, 6, classes=2, **SMALL_UNET), DiT(3, 6, classes=2, **SMALL_DIT)])
def test_a_fresh_network_outputs_zero(network: nn.Module):
    """The output is 0, also v of a learned variance, half way between β and β̃; the gradient is not 0."""
    y = network(pictures(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 2]))
    assert y.shape == (2, 6, 8, 8)
    assert not y.any()
    (y - 1).square().sum().backward()
    assert network.get_parameter("last.weight").grad.any() or network.get_parameter("last.bias").grad.any()


@both
def test_every_weight_is_used(make: Any):
    network = make(3, classes=4, text_width=6)
    x, t, label, context = pictures(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 4]), pictures(2, 5, 6)
    network(x, t, label, context).square().sum().backward()
    unused = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert unused == []


# --- conditioning ---


@both
def test_a_picture_does_not_depend_on_its_batch(make: Any):
    network = make(3, classes=4, text_width=6)
    x, t, label, context = pictures(3, 3, 9, 8), torch.tensor([0, 5, 999]), torch.tensor([1, 0, 4]), pictures(3, 5, 6)
    with torch.no_grad():
        together = network(x, t, label, context)
        for i in range(3):
            alone = network(x[i : i + 1], t[i : i + 1], label[i : i + 1], context[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@both
def test_times_are_integers_or_fractions(make: Any):
    network, x = make(), pictures(2, 3, 8, 8)
    with torch.no_grad():
        whole = network(x, torch.tensor([3, 700]))
        torch.testing.assert_close(network(x, torch.tensor([3.0, 700.0], dtype=torch.float64)), whole)
        assert (network(x, torch.tensor([3.5, 700.5])) - whole).abs().max() > 1e-4


@both
def test_no_label_is_the_null_class(make: Any):
    network, x, t = make(classes=4), pictures(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        none = network(x, t)
        assert torch.equal(none, network(x, t, torch.tensor([4, 4])))
        for label in range(4):
            assert (network(x, t, torch.tensor([label, 4])) - none)[0].abs().max() > 1e-3


@both
def test_the_text_is_read(make: Any):
    """The text is a set of any number of tokens, and each token has an effect."""
    network, x, t = make(text_width=6), pictures(1, 3, 8, 8), torch.tensor([3])
    context = pictures(1, 5, 6)
    with torch.no_grad():
        y = network(x, t, context=context)
        torch.testing.assert_close(network(x, t, context=context.flip(1)), y, rtol=1e-4, atol=1e-4)
        for i in range(5):
            changed = context.clone()
            changed[:, i] = pictures(6, seed=i + 9)
            assert (network(x, t, context=changed) - y).abs().max() > 1e-4
        assert network(x, t, context=context[:, :1]).shape == y.shape


@both
def test_dropout_comes_from_the_global_generator(make: Any):
    network, x, t = make(dropout=0.3), pictures(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        calm = network(x, t)
        assert torch.equal(network(x, t), calm)
        network.train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(network(x, t))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], calm)


# --- numbers and memory ---


@both
@pytest.mark.parametrize("way", ["autocast", "bfloat16", "float64"])
def test_other_precisions_agree(make: Any, way: str):
    network, x, t = make(classes=4, text_width=6), pictures(2, 3, 10, 8), torch.tensor([3, 700])
    label, context = torch.tensor([1, 4]), pictures(2, 5, 6)
    with torch.no_grad():
        expected = network(x, t, label, context)
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                actual = network(x, t, label, context)
        else:
            dtype = getattr(torch, way)
            actual = network.to(dtype)(x.to(dtype), t, label, context.to(dtype))
            assert actual.dtype == dtype
    bound = 1e-4 if way == "float64" else 0.05
    assert (actual.double() - expected.double()).square().mean().sqrt() < bound * expected.double().std()


@both
def test_a_step_of_bfloat16_has_the_gradient_of_float32(make: Any):
    x, t = pictures(4, 3, 8, 8), torch.tensor([3, 200, 500, 900])
    gradients = []
    for on in (False, True):
        network = make()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = network(x, t)
        (y.float() - x).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in network.parameters()]))
        assert all(weight.dtype == torch.float32 for weight in network.parameters())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


@both
def test_weights_lie_in_memory_as_files_have_them(make: Any):
    network = make()
    network(pictures(2, 3, 8, 8), torch.tensor([1, 2])).sum().backward()
    assert all(weight.is_contiguous() for weight in network.state_dict().values())


@pytest.mark.parametrize(("make", "steps"), [(unet, 50), (dit, 120)])
def test_it_learns_a_single_picture(make: Any, steps: int):
    """x_t of one known x0 determines the noise: a network with the output 0 has the loss 1, the floor is 0."""
    torch.manual_seed(0)
    network = build({"name": make.__name__, "channels": 1, **(SMALL_UNET if make is unet else SMALL_DIT)})
    d = GaussianDiffusion(NoiseSchedule.linear(1000))
    x0 = pictures(1, 1, 8, 8).sign().expand(16, -1, -1, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = d.loss(network, x0, torch.randint(1000, (16,)), torch.randn(16, 1, 8, 8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert sum(losses[-10:]) / 10 < 0.25


@both
def test_a_learned_variance_trains(make: Any):
    d = GaussianDiffusion(NoiseSchedule.linear(1000), variance="learned_range", objective="hybrid")
    network = make(3, 6)
    d.loss(
        network, pictures(4, 3, 8, 8).clamp(-1, 1), torch.tensor([0, 1, 500, 999]), pictures(4, 3, 8, 8)
    ).mean().backward()
    assert network.last.bias.grad.any()


# --- building, and refusals ---


@both
def test_a_network_is_built_again_from_its_configuration(make: Any):
    network = make(2, 4, classes=5, text_width=6, dropout=0.1)
    description = json.loads(json.dumps({"name": make.__name__, **network.config}))
    again = build(description).eval()
    assert again.config == network.config
    again.load_state_dict(network.state_dict())
    x, t, context = pictures(1, 2, 8, 8), torch.tensor([3]), pictures(1, 5, 6)
    with torch.no_grad():
        assert torch.equal(again(x, t, context=context), network(x, t, context=context))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "unknown network None; there are unet, dit"),
        ({"name": "vae", "channels": 3}, "unknown network 'vae'"),
        ({"name": ["unet"], "channels": 3}, "unknown network"),
        ({"name": "unet"}, "channels is missing"),
        (
            {"name": "unet", "channels": 3, "wdith": 64},
            "a unet has no 'wdith'; did you mean 'width'? it takes channels",
        ),
        ({"name": "dit", "channels": 3, "multipliers": [1]}, "a dit has no 'multipliers'"),
        ({"name": "unet", "channels": 0}, "channels must be a whole number, 1 to 1024; got 0"),
        ({"name": "unet", "channels": True}, "channels must be a whole number"),
        ({"name": "unet", "channels": "3"}, "channels must be a whole number"),
        ({"name": "unet", "channels": 3, "out_channels": 1e9}, "out_channels must be"),
        ({"name": "unet", "channels": 3, "width": 10**12}, "width must be a whole number, 1 to 8192"),
        ({"name": "unet", "channels": 3, "width": 33}, "width must be even, got 33"),
        ({"name": "unet", "channels": 3, "multipliers": 4}, "multipliers must be a list, got 4"),
        ({"name": "unet", "channels": 3, "multipliers": []}, "multipliers must be a list"),
        (
            {"name": "unet", "channels": 3, "multipliers": [1, 0, 2]},
            "a multiplier must be a whole number, 1 to 64; got 0",
        ),
        ({"name": "unet", "channels": 3, "multipliers": [1] * 9}, "the number of levels"),
        (
            {"name": "unet", "channels": 3, "attention": [True]},
            "attention must be a true or false for each of 3 levels",
        ),
        ({"name": "unet", "channels": 3, "attention": [0, 1, 1]}, "attention must be a true or false"),
        ({"name": "unet", "channels": 3, "blocks": 0}, "blocks must be"),
        ({"name": "unet", "channels": 3, "head_width": -1}, "head_width must be"),
        ({"name": "unet", "channels": 3, "dropout": 1.0}, "dropout must be a number, 0 to less than 1; got 1.0"),
        ({"name": "unet", "channels": 3, "dropout": math.nan}, "dropout must be"),
        ({"name": "unet", "channels": 3, "dropout": None}, "dropout must be"),
        ({"name": "unet", "channels": 3, "classes": 0}, "classes must be"),
        ({"name": "unet", "channels": 3, "text_width": 2.0}, "text_width must be"),
        ({"name": "dit", "channels": 3, "patch": 0}, "patch must be"),
        ({"name": "dit", "channels": 3, "depth": 10**6}, "depth must be"),
        (
            {"name": "dit", "channels": 3, "width": 256, "heads": 5},
            "width must be a multiple of 4 and of 5 heads, got 256",
        ),
        ({"name": "dit", "channels": 3, "width": 18, "heads": 1}, "width must be a multiple of 4"),
    ],
)
def test_invalid_networks_are_refused(description: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        build(description)


X, TIMES = torch.zeros(2, 3, 8, 8), torch.zeros(2)
LABELS, TEXT = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5, 6)


@both
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(x=X[0], t=TIMES), r"pictures must be floating point \[B, 3, H, W\], got torch.float32 \[3, 8, 8\]"),
        (dict(x=torch.zeros(2, 1, 8, 8), t=TIMES), r"\[B, 3, H, W\], got torch.float32 \[2, 1, 8, 8\]"),
        (dict(x=X.to(torch.uint8), t=TIMES), "got torch.uint8"),
        (dict(x=X[:, :, :0], t=TIMES), "pictures must be"),
        (dict(x=X[:0], t=TIMES[:0]), "pictures must be"),
        (dict(x=X, t=torch.zeros(())), r"times must be numbers \[2\], got torch.float32 \[\]"),
        (dict(x=X, t=torch.zeros(1)), r"times must be numbers \[2\]"),
        (dict(x=X, t=torch.zeros(2, dtype=torch.bool)), "times must be numbers"),
        (dict(x=X, t=TIMES, label=LABELS), "this network has no classes"),
        (dict(x=X, t=TIMES, context=TEXT), "this network reads no text"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make: Any, call: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        make()(**call)


@both
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(context=None), r"context must be \[2, L, 6\], got none"),
        (dict(context=TEXT[0]), r"context must be \[2, L, 6\], got \[5, 6\]"),
        (dict(context=TEXT[:1]), r"got \[1, 5, 6\]"),
        (dict(context=TEXT[:, :, :5]), r"got \[2, 5, 5\]"),
        (dict(label=LABELS.int()), "labels must be a LongTensor"),
        (dict(label=LABELS[:1]), r"labels must be a LongTensor \[2\], got torch.int64 \[1\]"),
        (dict(label=LABELS + 5), "labels must lie in 0 to 4 .4 is the null class., got 5 to 5"),
        (dict(label=LABELS - 1), "labels must lie in 0 to 4"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(make: Any, call: dict[str, Tensor | None], message: str):
    with pytest.raises(ValueError, match=message):
        make(classes=4, text_width=6)(X, TIMES, **{"context": TEXT, **call})
