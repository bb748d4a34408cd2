"""The jobs "autoencoder" and "latents": random draws, checkpoints and exported models."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save
from tiny import clip_tokenizer
from training_runs import contents

import diffgen
import schedulers
from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.pipelines.training.autoencoder import AutoencoderJob, shifted
from diffgen.pipelines.training.captions import EMPTY, Tokens
from diffgen.pipelines.training.config import AutoencoderConfig, LatentConfig
from diffgen.pipelines.training.export import save_latent_run, save_run
from diffgen.pipelines.training.latents import LatentJob
from diffgen.pipelines.training.parts import read_autoencoder
from diffgen.pipelines.training.shards import Shards
from diffgen.pipelines.weights.load import load_pipeline
from diffgen.training import config as configuration
from diffgen.training import start
from diffgen.training.batches import Shuffle
from diffgen.training.data import open_data
from diffgen.training.data.procedural import ProceduralData
from diffgen.training.listener import Listener
from diffgen.training.parallel import Ranks
from diffgen.training.run import read_run
from diffgen.training.trainer import Trainer
from schedulers.diffusers_config import from_diffusers_config

TRAIN = {"steps": 4, "batch_size": 4, "log_every": 1, "held_out_every": 2, "checkpoint_every": 2, "keep": 1}
TRAIN |= {"learning_rate": 0.01, "warmup": 1}
VAE: dict[str, Any] = {
    "job": "autoencoder",
    "data": {"flip": True, "shift": 2, "permute": 0.5},
    "network": {"latent_channels": 4, "block_out_channels": [4, 8], "norm_num_groups": 2},
    "train": TRAIN,
    "sample": {"every": 4, "count": 2},
}
LATENTS: dict[str, Any] = {
    "job": "latents",
    "text": {"length": 8, "width": 8, "layers": 1, "heads": 2},
    "network": {"block_out_channels": [4, 8], "norm_num_groups": 2, "attention_head_dim": 2},
    "diffusion": {"prediction": "v_prediction"},
    "train": {**TRAIN, "ema": [0.05, 0.1]},
    "sample": {"every": 4, "count": 2, "steps": 2},
}
CAPTIONS = {"text": ["red apple", "a red apple", "green circle"], "weights": [5, 3, 2]}


def write_data(folder: Path, size: tuple[int, int] = (8, 8), **fields: Any) -> Path:
    """Write six pictures; the fifth is held out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "held_out": i == 4, **(fields or CAPTIONS)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def config_of(tables: dict[str, Any], **changed: Any) -> Any:
    kind = AutoencoderConfig if tables["job"] == "autoencoder" else LatentConfig
    return configuration.parse({**tables, **changed}, "a.toml", kind)


def train(folder: Path, job: Any, **order: Any) -> start.TrainResult:
    """Train, until step `stop` if it is set."""
    steps, stop = itertools.count(1), order.pop("stop", None)
    return start.execute(
        start.TrainRequest(folder, job.config, **order), job, Ranks("cpu"), Listener(), lambda: next(steps) == stop
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, tokenizer/, and a finished run of each job: vae/, latents/."""
    folder = tmp_path_factory.mktemp("latents")
    data = open_data(write_data(folder / "data"))
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    train(folder / "vae", AutoencoderJob(config_of(VAE), data))
    train(folder / "latents", latent_job(folder))
    return folder


def latent_job(place: Path, **changed: Any) -> LatentJob:
    text = {**LATENTS["text"], "tokenizer": str(place / "tokenizer"), **changed.pop("text", {})}
    return LatentJob(
        config_of(LATENTS, autoencoder=str(place / "vae"), text=text, **changed), open_data(place / "data"), "a.toml"
    )


def test_an_interrupted_training_ends_in_the_same_bytes(place: Path, tmp_path: Path) -> None:
    data = open_data(place / "data")
    makers: dict[str, Callable[[], Any]] = {
        "vae": lambda: AutoencoderJob(config_of(VAE), data),
        "latents": lambda: latent_job(place),
    }
    for name, make in makers.items():
        assert train(tmp_path / name, make(), stop=3).step == 3
        assert train(tmp_path / name, make(), resume=True).started_at == 3
        assert contents(tmp_path / name) == contents(place / name)
        weights = load_file(place / name / "checkpoints" / "4" / "model.safetensors")
        average = load_file(place / name / "checkpoints" / "4" / "ema.safetensors")
        assert any(not torch.equal(tensor, average[key]) for key, tensor in weights.items())
        held_out = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        quartiles = [line["held_out_raw_quartiles"] for line in held_out if "held_out_raw" in line]
        assert [len(values) for values in quartiles] == [1 if name == "vae" else 4] * 2


@pytest.mark.parametrize("name", ["vae", "latents"])
def test_the_loss_of_a_batch_equals_that_of_its_parts(place: Path, name: str) -> None:
    """The draws of a position depend only on the seed, the step and the position."""
    job: Any = AutoencoderJob(config_of(VAE), open_data(place / "data")) if name == "vae" else latent_job(place)
    job.prepare(torch.device("cpu"), torch.enable_grad)
    with torch.no_grad():
        expected = job.loss(job.networks, 7, slice(0, 4))
        parts = torch.cat([job.loss(job.networks, 7, slice(i, i + 1)) for i in range(4)])
        other = job.loss(job.networks, 8, slice(0, 4))
    torch.testing.assert_close(expected, parts)
    assert not torch.allclose(expected, other)
    assert 4 not in torch.cat([job.indices(k) for k in range(10)]).tolist()  # picture 4 is held out


# The autoencoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_faster_attention_has_diffusers_gradients(place: Path, dtype: torch.dtype, tolerance: float) -> None:
    unet: Any = latent_job(place).networks["unet"]
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(3, 4, 4, 4, generator=generator), torch.randn(3, 8, 8, generator=generator)

    def gradients() -> torch.Tensor:
        unet.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = unet(x, torch.tensor([10, 500, 900]), context, return_dict=False)[0]
        out.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters()])

    ours = gradients()
    unet.set_attn_processor(AttnProcessor2_0())
    theirs = gradients()
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_loss_of_the_autoencoder(place: Path) -> None:
    """Compare with explicit sums, and with diffusers' KL divergence."""
    job = AutoencoderJob(
        config_of(VAE, data={}, loss={"l1": 2, "l2": 3, "gradient": 5, "kl": 7}), open_data(place / "data")
    )
    job.prepare(torch.device("cpu"), torch.enable_grad)
    coder: Any = job.networks["vae"]
    with torch.no_grad():
        loss = job.loss(job.networks, 0, slice(0, 4))
        noise, *_ = job._draws(0)
        x = job.clean(job.indices(0))
        posterior = coder.vae.encode(x).latent_dist
        y = coder.vae.decode(posterior.mean + posterior.std * noise).sample
    for i in range(4):
        d = (y - x)[i].numpy()
        edges = np.abs(np.diff(d, axis=1)).mean() + np.abs(np.diff(d, axis=2)).mean()
        expected = 2 * np.abs(d).mean() + 3 * (d**2).mean() + 5 * edges
        expected += 7 * posterior.kl()[i].item() / posterior.mean[i].numel()
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


@given(st.integers(-9, 9), st.integers(-9, 9))
def test_a_shifted_picture_repeats_its_edge(down: int, right: int) -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    moved = shifted(x, torch.tensor([[down, right], [0, 0]]))
    expected = [[x[0, :, min(max(i - down, 0), 3), min(max(j - right, 0), 4)] for j in range(5)] for i in range(4)]
    assert torch.equal(moved[0], torch.stack([torch.stack(row) for row in expected]).permute(2, 0, 1))
    assert torch.equal(moved[1], x[1])


def test_variations_have_the_configured_rates(place: Path) -> None:
    job = AutoencoderJob(config_of(VAE, train={**TRAIN, "batch_size": 2000}), open_data(place / "data"))
    job.prepare(torch.device("cpu"), torch.enable_grad)
    _, flip, shift, order = job._draws(0)
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert set(shift.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert (shift == 0).all(1).float().mean().item() == pytest.approx(0.5 + 0.5 / 25, abs=0.05)
    same = (order == torch.tensor([0, 1, 2])).all(1).float().mean().item()
    assert same == pytest.approx(0.5 + 0.5 / 6, abs=0.05)
    assert torch.equal(order.sort(1).values, torch.tensor([0, 1, 2]).expand(2000, 3))
    job = AutoencoderJob(config_of(VAE, data={}), open_data(place / "data"))
    job.prepare(torch.device("cpu"), torch.enable_grad)
    _, flip, shift, order = job._draws(0)
    assert not flip.any()
    assert not shift.any()
    assert (order == torch.tensor([0, 1, 2])).all()


# Captions


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_caption_is_drawn_as_often_as_its_weight_says(weights: list[list[float]]) -> None:
    captions = [tuple((f"apple {'a ' * i}{'b ' * j}", w) for j, w in enumerate(row)) for i, row in enumerate(weights)]
    tokens = Tokens(captions, clip_tokenizer())
    u = (torch.arange(4000) + 0.5) / 4000
    for i, texts in enumerate(captions):
        chosen = tokens.choose(torch.full((4000,), i), u)
        total = sum(w for _, w in texts)
        for text, weight in texts:
            rate = (chosen == tokens.texts.index(text)).float().mean().item()
            assert rate == pytest.approx(weight / total, abs=1 / 2000)
        assert tokens.texts[tokens.heaviest[i]] == max(texts, key=lambda pair: pair[1])[0]
    last = torch.tensor([len(captions) - 1])
    assert tokens.choose(last, torch.tensor([1 - 2**-24])).item() == tokens.texts.index(captions[-1][-1][0])


def test_captions_are_dropped_at_the_configured_rate(place: Path) -> None:
    job = latent_job(place, train={**TRAIN, "batch_size": 4000}, diffusion={"caption_dropout": 0.25})
    job.prepare(torch.device("cpu"), torch.enable_grad)
    drawn = job._draws(3).choices["caption"]
    rates = torch.bincount(drawn, minlength=4) / len(drawn)
    assert job.encoding.tokens.texts == ["", "red apple", "a red apple", "green circle"]
    assert rates.tolist() == pytest.approx([0.25, 0.75 * 0.5, 0.75 * 0.3, 0.75 * 0.2], abs=0.03)
    assert job.encoding.ids[EMPTY].tolist() == job.tokenizer("", padding="max_length").input_ids


def test_captions_that_are_cut_off_are_counted(place: Path) -> None:
    assert latent_job(place, text={"length": 4}).notes == ("1 of 4 captions are longer than 4 tokens and are cut off",)
    assert latent_job(place).notes == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": []}, "line 1: the list of texts is empty"),
        ({"text": ["a", 3]}, "line 1: the text 3 is not a string"),
        ({"text": ["a", "b"], "weights": [1]}, r"line 1: weights is \[1\], not 2 positive numbers"),
        ({"text": ["a", "b"], "weights": [1, 0]}, "not 2 positive numbers"),
        ({"text": ["a", "b"], "weights": "x"}, "not 2 positive numbers"),
        ({"text": "a", "held_out": 1}, "line 1: held_out is 1, not true or false"),
        ({"text": "a", "held_out": True}, "all pictures are held out"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_data(write_data(tmp_path / "data", **fields))


def test_the_fingerprint_covers_captions_and_held_out_pictures(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{}, {"text": "a"}, {"text": ["a"]}, {"text": ["a", "b"]}]
    lines += [{"text": ["a", "b"], "weights": [2, 1]}, {"text": "a", "held_out": False}]
    fingerprints = [open_data(write_data(tmp_path / str(i), **fields)).fingerprint for i, fields in enumerate(lines)]
    assert fingerprints[1] != fingerprints[5]
    assert len(set(fingerprints)) == 5  # a list of one text equals the text


# Exported models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_exported_folder_is_the_run(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """It has every weight, the latents' scale and the tokens; and it generates pictures."""
    import diffusers

    run = read_run(place / "latents")
    save_latent_run(run, tmp_path / "out", {"resolution": 8}, dtype=dtype)
    pipe = load_pipeline(gate.check_folder(tmp_path / "out"), torch.device("cpu"), torch.float32)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {part.dtype for part in (theirs.unet, theirs.text_encoder, theirs.vae)} == {torch.float32}
    average = load_file(place / "latents" / "checkpoints" / "4" / "ema.safetensors")
    vae, factor = read_autoencoder(place / "latents" / "vae")
    expected = {**average, **{f"vae.{key}": tensor for key, tensor in vae.state_dict().items()}}
    for pipeline in (pipe, theirs):
        tensors = {
            f"{name}.{key}": tensor
            for name in ("unet", "text_encoder", "vae")
            for key, tensor in getattr(pipeline, name).state_dict().items()
            if not key.endswith("position_ids")
        }
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor.float(), expected[key].to(dtype).float()) for key, tensor in tensors.items())
        assert pipeline.vae.config.scaling_factor == factor
    assert pipe.tokenizer.model_max_length == theirs.tokenizer.model_max_length == 8
    job = latent_job(place)
    for text in job.encoding.tokens.texts:
        options = {"padding": "max_length", "max_length": 8}
        assert pipe.tokenizer(text, **options).input_ids == job.tokenizer(text, **options).input_ids
        assert theirs.tokenizer(text, **options).input_ids == job.tokenizer(text, **options).input_ids
    (picture,) = diffgen.load(tmp_path / "out").generate("red apple", steps=2)
    assert picture.size == (8, 8)
    job.prepare(torch.device("cpu"), torch.enable_grad)  # latents have unit deviation, and are those of the pictures
    assert job.encoding.latents[job.train].std().item() == pytest.approx(1, abs=0.01)
    x = job.data.to_float(job.data.images)
    with torch.no_grad():
        torch.testing.assert_close(job.encoding.latents, vae.encode(x).latent_dist.mean * factor)
        torch.testing.assert_close(job.decode(job.encoding.latents), vae.decode(job.encoding.latents / factor).sample)


@pytest.mark.parametrize("noise", ["linear", "scaled_linear", "cosine", "sigmoid", "laplace"])
@pytest.mark.parametrize(("T", "zero"), [(1000, False), (500, True)])
def test_the_exported_scheduler_is_the_process(place: Path, tmp_path: Path, noise: str, T: int, zero: bool) -> None:
    run = dataclasses.replace(read_run(place / "latents"), noise={"name": noise, "T": T, "zero_terminal_snr": zero})
    save_run(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    exported, prediction = from_diffusers_config(config)
    expected = schedulers.NoiseSchedule.named(noise, T=T)
    expected = expected.zero_terminal_snr() if zero else expected
    assert prediction == "v_prediction"
    np.testing.assert_allclose(exported.alphas_cumprod, expected.alphas_cumprod, rtol=1e-9, atol=1e-12)
    assert (expected.alphas_cumprod[-1] == 0) == zero


def test_a_run_can_start_from_a_model(place: Path, tmp_path: Path) -> None:
    """The model is in half precision. With another tokenizer, each token keeps its embedding."""
    save_latent_run(read_run(place / "latents"), tmp_path / "model")
    job = latent_job(place)
    trainer = Trainer(job, job.config.train, Ranks("cpu"))
    start.initialise(trainer, tmp_path / "model")
    average = load_file(place / "latents" / "checkpoints" / "4" / "ema.safetensors")
    assert all(torch.equal(tensor, average[key].half().float()) for key, tensor in trainer.model().items())
    train(tmp_path / "run", latent_job(place), init=tmp_path / "model")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init"]["file"] == "model"
    train(tmp_path / "again", latent_job(place), init=place / "latents")
    assert json.loads((tmp_path / "again" / "run.json").read_text())["init"]["file"] == "ema.safetensors"

    ours = clip_tokenizer().get_vocab()
    fewer = {token: i for i, token in enumerate(sorted(ours.keys() - {"flat</w>"}))} | {"new</w>": len(ours) - 1}
    path = tmp_path / "other" / "tokenizer.json"
    path.parent.mkdir()
    table = json.loads((place / "tokenizer" / "tokenizer.json").read_text())
    merges = [pair for pair in table["model"]["merges"] if "".join(pair) in fewer]
    path.write_text(json.dumps({"model": {"vocab": fewer, "merges": merges}}))
    other = latent_job(place, text={"tokenizer": str(path.parent), "length": 12})
    trainer = Trainer(other, other.config.train, Ranks("cpu"))
    before = trainer.model()["text_encoder.embeddings.token_embedding.weight"].clone()
    start.initialise(trainer, tmp_path / "model")
    model, half = trainer.model(), {key: tensor.half().float() for key, tensor in average.items()}
    rows, theirs = (where["text_encoder.embeddings.token_embedding.weight"] for where in (model, half))
    for token, i in fewer.items():
        assert torch.equal(rows[i], before[i] if token == "new</w>" else theirs[ours[token]])
    places, theirs = (where["text_encoder.embeddings.position_embedding.weight"] for where in (model, half))
    assert torch.equal(places, torch.cat([theirs, theirs[-1:].expand(4, -1)]))


def test_the_autoencoder_can_start_from_a_folder(place: Path) -> None:
    job = AutoencoderJob(config_of(VAE), open_data(place / "data"))
    trainer = Trainer(job, job.config.train, Ranks("cpu"))
    start.initialise(trainer, place / "latents" / "vae")
    average = load_file(place / "vae" / "checkpoints" / "4" / "ema.safetensors")
    assert all(torch.equal(tensor, average[key]) for key, tensor in trainer.model().items())


# Invalid combinations


def test_invalid_combinations_are_named(place: Path, tmp_path: Path) -> None:
    data = open_data(place / "data")
    for tables, changed, message in (
        (VAE, {"network": {"block_out_channels": [4, 8, 8, 8, 8]}}, "5 levels halve a side of 8 pixels 4 times"),
        (VAE, {"network": {"in_channels": 4}}, "network.in_channels follows from the data"),
        (VAE, {"network": {"width": 4}}, "unknown key network.width"),
        (VAE, {"network": {"norm_num_groups": 3}}, "is invalid for AutoencoderKL"),
        (LATENTS, {}, "a.toml: it names no autoencoder"),
        (LATENTS, {"autoencoder": str(tmp_path / "none")}, "no such folder"),
        (LATENTS, {"autoencoder": str(place / "latents")}, "a run of the job 'latents', not of an autoencoder"),
        (LATENTS, {"network": {"sample_size": 4}}, "network.sample_size follows from the data"),
        (LATENTS, {"network": {"block_out_channels": [4, 4, 4, 4]}}, "latents of 4x4 cannot be halved 3 times"),
        (LATENTS, {"text": {"width": 9, "heads": 2}}, "text.width 9 is not a multiple"),
        (LATENTS, {"text": {"tokenizer": str(place / "vae")}}, "neither tokenizer.json nor vocab.json"),
        (LATENTS, {"diffusion": {"zero_terminal_snr": True}}, "epsilon"),
        (LATENTS, {"sample": {"scheduler": "eular"}}, "euler"),
    ):
        if tables is LATENTS and changed and "autoencoder" not in changed:
            changed = {"autoencoder": str(place / "vae"), "text": {"tokenizer": str(place / "tokenizer")}, **changed}
        kind: Any = AutoencoderJob if tables is VAE else LatentJob
        with pytest.raises(InputError) as excinfo:
            kind(config_of(tables, **changed), data, "a.toml")
        assert message in f"{excinfo.value.message} {excinfo.value.hint}"
    with pytest.raises(InputError, match="no captions"):
        LatentJob(config_of(LATENTS), dataclasses.replace(data, captions=None))
    with pytest.raises(InputError, match="8x16 pixels, not squares"):
        AutoencoderJob(config_of(VAE), open_data(write_data(tmp_path / "oblong", (16, 8))))
    trainer = Trainer(job := latent_job(place), job.config.train, Ranks("cpu"))
    with pytest.raises(InputError, match="has no weights to start from"):
        start.hash_of(start.init_files(place / "data"))
    other = latent_job(place, text={"width": 16})
    save_latent_run(read_run(place / "latents"), tmp_path / "model")
    with pytest.raises(InputError, match="has the shape"):
        start.initialise(Trainer(other, other.config.train, Ranks("cpu")), tmp_path / "model")
    del trainer


def test_the_command(place: Path, tmp_path: Path, diffgen_: Callable[..., tuple[int, str, str]]) -> None:
    """Train both stages, export and generate. The first stage has no prompts, the second no pictures."""
    (tmp_path / "vae.toml").write_text(toml(VAE))
    (tmp_path / "latents.toml").write_text(toml({**LATENTS, "autoencoder": "vae"}))
    with (tmp_path / "latents.toml").open("a") as file:
        file.write(f"[text]\ntokenizer = {json.dumps(str(place / 'tokenizer'))}\nlength = 8\nwidth = 8\nheads = 2\n")
    for name in ("vae", "latents"):
        code, out, err = diffgen_("train", place / "data", "-o", name, "--config", f"{name}.toml", "--steps", 2)
        assert (code, out) == (0, f"{name}\n"), err
    assert "the captions are not used" not in err
    code, _, err = diffgen_("train", place / "data", "-o", "vae", "--resume")
    assert code == 0
    assert "is finished" in err
    code, _, err = diffgen_("generate", "red apple", "-m", "latents")
    assert code == 3
    assert "diffgen models export latents FOLDER" in err
    code, out, err = diffgen_("models", "export", "latents", "model")
    assert (code, out) == (0, "model\n"), err
    code, _, err = diffgen_("generate", "red apple", "-m", "model", "-o", "a.png", "--steps", 2)
    assert code == 0, err
    assert Image.open("a.png").size == (8, 8)
    code, _, err = diffgen_("models", "export", "vae", "other")
    assert code == 3
    assert "autoencoder" in err
    (tmp_path / "wrong.toml").write_text('job = "latent"')
    code, _, err = diffgen_("train", place / "data", "-o", "x", "--config", "wrong.toml")
    assert code == 3
    assert "there are pixels, autoencoder, latents" in err


def toml(tables: dict[str, Any]) -> str:
    """The tables as TOML: keys first, then tables, without `text`."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict) and name != "text":
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


# Windows: latents of a part of the pictures at a time


def windows_job(place: Path, **data: Any) -> LatentJob:
    """A job on 40 computed pictures with two captions each, the last four held out, in batches of four."""

    def picture(i: int) -> np.ndarray:
        return np.random.default_rng((0, i)).integers(0, 256, (3, 8, 8), dtype=np.uint8)

    computed = ProceduralData(
        picture, 40, name="noise 1", held_out=4, describe=lambda i: (("red apple", 1.0), (f"circle {i}", 1.0))
    )
    text = {**LATENTS["text"], "tokenizer": str(place / "tokenizer")}
    return LatentJob(config_of(LATENTS, autoencoder=str(place / "vae"), text=text, data=data), computed)


@given(window=st.integers(1, 12), repeats=st.integers(1, 3), batch=st.integers(1, 4), seed=st.integers(0, 9))
def test_each_window_has_its_epochs(window: int, repeats: int, batch: int, seed: int) -> None:
    pictures = torch.arange(0, 60, 2)
    order = Shuffle(pictures, batch, seed, window * batch, repeats) if window * batch <= 30 else None
    if order is None:
        return
    steps = [order(k) for k in range(2 * repeats * window)]
    again = Shuffle(pictures, batch, seed, window * batch, repeats)
    assert all(torch.equal(step, again(k)) for k, step in reversed(list(enumerate(steps))))
    for epoch in range(2 * repeats):
        indices = torch.cat(steps[epoch * window : (epoch + 1) * window]).sort().values
        first = epoch // repeats % (30 // (window * batch)) * window * batch
        assert torch.equal(indices, pictures[first : first + window * batch])


def test_a_window_gives_the_losses_of_all_latents(place: Path) -> None:
    few, everything = windows_job(place, window=8, repeats=2), windows_job(place)
    assert len(few.encoding.latents) == 4
    assert len(everything.encoding.latents) == 40
    for job in (few, everything):
        job.prepare(torch.device("cpu"), contextlib.nullcontext)
    everything.indices = few.indices
    for name, network in few.networks.items():
        everything.networks[name].load_state_dict(network.state_dict())
    for k in (0, 3, 4, 11, 2):  # also backwards: a step is a function of k
        indices = few.indices(k)
        torch.testing.assert_close(few.clean(indices), everything.clean(indices))
        ours, theirs = (job._encoding(indices).tokens.texts for job in (few, everything))
        drawn = [[texts[i] for i in job._draws(k).choices["caption"].tolist()]
                 for job, texts in ((few, ours), (everything, theirs))]  # fmt: skip
        assert drawn[0] == drawn[1]
        losses = [job.loss(job.networks, k, slice(0, 4)) for job in (few, everything)]
        torch.testing.assert_close(*losses)
    with torch.no_grad():
        assert few.held_out(few.networks) == pytest.approx(everything.held_out(everything.networks))
    assert few._captions(3) == everything._captions(3)


@pytest.mark.parametrize("window", [6, 48])
def test_windows_that_do_not_fit_are_refused(place: Path, window: int) -> None:
    with pytest.raises(InputError, match=f"data.window is {window}"):
        windows_job(place, window=window)


def test_a_training_in_windows_can_be_interrupted(place: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", windows_job(place, window=8))
    train(tmp_path / "part", windows_job(place, window=8), stop=3)
    train(tmp_path / "part", windows_job(place, window=8), resume=True)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_shards_spare_the_encoding_and_change_nothing(place: Path, tmp_path: Path) -> None:
    """A training that writes shards, one that reads them and one without have the same losses and weights."""
    folder = tmp_path / "shards"
    train(tmp_path / "without", windows_job(place, window=8))
    train(tmp_path / "writes", windows_job(place, window=8, shards=str(folder)))
    shards = sorted(folder.rglob("*.safetensors"))
    assert [shard.name for shard in shards] == ["0.safetensors", "1.safetensors"]
    job = windows_job(place, window=8, shards=str(folder))
    encode, job._latents = job._latents, pytest.fail  # type: ignore[method-assign]
    train(tmp_path / "reads", job)
    for name in ("model", "ema"):
        weights = [
            (tmp_path / run / "checkpoints/4" / f"{name}.safetensors").read_bytes()
            for run in ("without", "writes", "reads")
        ]
        assert weights[0] == weights[1] == weights[2]
    job.prepare(torch.device("cpu"), contextlib.nullcontext)
    latents = load_file(shards[1])["latents"]
    torch.testing.assert_close(latents, encode(job.train[8:16], torch.device("cpu"), None))


@pytest.mark.parametrize("wrong", ["shape", "name", "infinite", "bytes"])
def test_a_wrong_shard_is_refused(place: Path, tmp_path: Path, wrong: str) -> None:
    train(tmp_path / "writes", windows_job(place, window=8, shards=str(tmp_path / "shards")))
    path = next(tmp_path.rglob("0.safetensors"))
    latents = load_file(path)["latents"]
    tensors = {"shape": {"latents": latents[:4]}, "name": {"other": latents}, "infinite": {"latents": latents / 0}}
    path.write_bytes(b"{}" if wrong == "bytes" else save(tensors[wrong]))
    with pytest.raises(InputError, match=r"0\.safetensors"):
        train(tmp_path / "reads", windows_job(place, window=8, shards=str(tmp_path / "shards")))


def test_other_pictures_have_other_shards() -> None:
    folder = Path("shards")
    assert Shards(folder, "a", 8).folder == Shards(folder, "a", 8).folder
    assert len({Shards(folder, *depends).folder for depends in (("a", 8), ("a", 9), ("b", 8), ("a", "8"))}) == 4
