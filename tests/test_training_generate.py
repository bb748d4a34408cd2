"""A run as a model: its pictures, compared with the process itself; classes, seeds, records and errors."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffgen
import schedulers
from diffgen import networks
from diffgen.diffusion import GaussianDiffusion
from diffgen.errors import InputError, InvalidOutput, UsageError
from diffgen.generation.record import read_record
from diffgen.images.pixels import to_pil
from diffgen.models.find import find
from diffgen.training.plan import drawn_class, make_plan

ROOT = Path(__file__).parent.parent
CLASSES = ["cat", "dog", "Piñata"]
SAMPLE = {"scheduler": "euler", "steps": 3, "guidance": 1.5, "every": 100, "count": 8}


def network_of(seed, **config):
    """A small network whose weights are all random, the last layer's too."""
    description = {"name": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [False, True], **config}
    network = networks.build(description)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.8 / max(1, weight[0].numel()) ** 0.5)
    return description, network


def checkpoint(folder, step, **weights):
    """Write checkpoints/<step> with ema.safetensors and so on; return {file name: SHA-256}."""
    place = folder / "checkpoints" / str(step)
    place.mkdir(parents=True)
    files = {}
    for name, network in weights.items():
        save_file(dict(network.state_dict()), place / f"{name}.safetensors")
        data = (place / f"{name}.safetensors").read_bytes()
        files[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "state.json").write_text(json.dumps({"schema": "diffgen.checkpoint/1", "step": step, "files": files}))
    return {name: entry["sha256"] for name, entry in files.items()}


def make_run(
    folder, *, channels=1, size=(8, 8), classes=None, levels=17, T=40, variance="fixed_small", dropout=0.1, **more
):
    """Write a run folder with random weights; the raw weights and their average differ."""
    out = 2 * channels if variance == "learned_range" else channels
    config = {"channels": channels, "out_channels": out, "classes": classes and len(classes), **more}
    description, raw = network_of(1, **config)
    content = {
        "schema": "diffgen.run/1",
        "job": "pixels",
        "config": {"diffusion": {"label_dropout": dropout}, "sample": SAMPLE},
        "network": description | config,
        "data": {
            "name": "digits",
            "channels": channels,
            "size": list(size),
            "classes": classes,
            "levels": levels,
            "count": 10,
            "fingerprint": "0" * 64,
        },
        "noise": {"name": "linear", "T": T},
        "prediction": "sample",
        "variance": variance,
        "versions": {},
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(content))
    checkpoint(folder, 7, model=raw, ema=network_of(2, **config)[1])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs: by-class in 17 levels; plain in RGB, 6x5, learned variance; alpha in RGBA. Tests must not change them."""
    place = tmp_path_factory.mktemp("runs")
    make_run(place / "by-class", classes=CLASSES)
    make_run(place / "plain", channels=3, size=(5, 6), levels=256, variance="learned_range")
    make_run(place / "alpha", channels=4, levels=256)
    make_run(place / "no-dropout", classes=CLASSES, dropout=0.0)
    return place


@pytest.fixture(scope="module")
def by_class(runs):
    return diffgen.load(runs / "by-class")


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


# The pictures


def test_ddpm_is_the_reverse_process_itself(runs):
    """`ddpm` with all T steps equals DDPM algorithm 2 with the learned variance in diffgen.diffusion."""
    generator = diffgen.load(runs / "plain")
    process = GaussianDiffusion(schedulers.NoiseSchedule.linear(40), "sample", "learned_range")
    network = network_of(2, channels=3, out_channels=6)[1].eval()
    expected = process.sample(network, (2, 3, 5, 6), [torch.Generator().manual_seed(s) for s in (4, 5)], clip=(-1, 1))
    ours = generator.generate(count=2, seed=4, scheduler="ddpm", steps=40)
    for image, x in zip(ours, to_pil(expected.numpy()), strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(x, dtype=int)).max() <= 1
    fixed = GaussianDiffusion(schedulers.NoiseSchedule.linear(40), "sample", "fixed_small")
    other = fixed.sample(
        lambda x, t: network(x, t)[:, :3], (1, 3, 5, 6), torch.Generator().manual_seed(4), clip=(-1, 1)
    )
    assert np.abs(np.asarray(ours[0], dtype=int) - np.asarray(to_pil(other.numpy())[0], dtype=int)).max() > 1


def test_guidance_is_that_of_the_paper(by_class):
    network, scale = network_of(2, channels=1, out_channels=1, classes=3)[1].eval(), 2.5
    s = schedulers.get("dpmpp_2m", noise=schedulers.NoiseSchedule.linear(40), prediction="sample", clip_sample=True)

    @torch.no_grad()
    def denoiser(x, t):
        label = torch.full((1,), CLASSES.index("dog"))
        uncond = network(x, t, None)
        return uncond + scale * (network(x, t, label) - uncond)

    x0 = s.sample(denoiser, torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)), steps=5)
    (ours,) = by_class.generate("dog", seed=3, scheduler="dpmpp_2m", steps=5, guidance=scale)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(to_pil(x0.numpy(), 17)[0], dtype=int)).max() <= 16
    assert (np.asarray(ours) == np.asarray(to_pil(x0.numpy(), 17)[0])).mean() > 0.9
    off, on = by_class.generate(["dog"], seed=3, guidance=1), by_class.generate(["dog"], seed=3, guidance=4)
    assert pixels(off) != pixels(on)


def test_any_scheduler(by_class):
    for name in schedulers.names():
        options = {"seed": 0, "steps": 4, "scheduler": name}
        if schedulers.info(name).upwards:
            with pytest.raises(UsageError, match="from pictures to noise"):
                by_class.generate("cat", **options)
        else:
            (picture,) = by_class.generate("cat", **options)
            record = json.loads(picture.info["diffgen"])
            assert record["scheduler"] == name
            assert record["nfe"] >= 3


def test_modes_and_levels(runs, by_class):
    (grey,) = by_class.generate("cat", seed=0)
    levels = {round(i * 255 / 16) for i in range(17)}
    assert (grey.mode, grey.size) == ("L", (8, 8))
    assert len(set(grey.tobytes())) > 2
    assert set(grey.tobytes()) <= levels
    for name, mode, size in (("plain", "RGB", (6, 5)), ("alpha", "RGBA", (8, 8))):
        (picture,) = diffgen.load(str(runs / name)).generate(seed=0)
        assert (picture.mode, picture.size) == (mode, size)
        assert not set(picture.tobytes()) <= levels


def test_other_sizes(by_class):
    plan = make_plan(by_class.model, "cat", size="7x9", seed=0)
    assert plan.warnings("cat") == ["by-class was trained at 8x8: other sizes may not look like its data"]
    (picture,) = by_class.generate("cat", size="7x9", seed=0)
    assert picture.size == (7, 9)
    with pytest.raises(UsageError, match="--size"):
        by_class.generate("cat", size=1025)


def test_half_precision_is_nearly_the_same(runs):
    exact = np.asarray(diffgen.load(runs / "plain").generate(seed=1)[0], dtype=float)
    half = np.asarray(diffgen.load(runs / "plain", dtype="bfloat16").generate(seed=1)[0], dtype=float)
    assert 0 < np.abs(exact - half).max() < 10


# Seeds


def test_a_picture_does_not_depend_on_the_others(by_class):
    several = by_class.generate(["cat", "dog"], seed=5, count=3, scheduler="euler_ancestral")
    alone = [
        by_class.generate(name, seed=5 + i, scheduler="euler_ancestral")[0] for name in CLASSES[:2] for i in range(3)
    ]
    assert pixels(several) == pixels(alone)
    together = by_class.generate(["cat", "dog"], seed=5, count=3, scheduler="euler_ancestral", batch_size=4)
    same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(several, together, strict=True)]
    assert min(same) > 0.95  # a value halfway between two levels may round to either
    listed = by_class.generate("cat", seeds=[7, 5], scheduler="euler_ancestral")
    assert pixels(listed) == pixels([several[2], several[0]])


def test_commands_in_their_own_process(runs, tmp_path):
    """`-n 3` and each seed alone give the same bytes of pixels, and nothing of pipelines is imported."""
    code = f"""
import sys
from diffgen.cli import run
where = ["-m", {str(runs / "by-class")!r}, "-q", "--scheduler", "dpmpp_2m_sde"]
assert run(["generate", "dog", "-n", "3", "--seed", "11", "-o", "three/", *where]) == 0
assert run(["generate", "dog", "--seed", "12", "-o", "one.png", *where]) == 0
assert run(["generate", "-m", {str(runs / "plain")!r}, "-o", "plain.png", "-q"]) == 0
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & {{"diffusers", "transformers", "huggingface_hub"}})
assert not loaded, loaded
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    three = sorted((tmp_path / "three").iterdir())
    assert len(three) == 3
    assert Image.open(three[1]).tobytes() == Image.open(tmp_path / "one.png").tobytes()
    assert Image.open(three[0]).tobytes() != Image.open(three[1]).tobytes()
    assert read_record(tmp_path / "one.png")["seed"] == read_record(three[1])["seed"] == 12


def test_planning_needs_no_torch(runs, tmp_path):
    code = f"""
import sys
from diffgen.cli import run
where = ["-m", {str(runs / "by-class")!r}]
assert run(["generate", "cat", "--dry-run", *where]) == 0
assert run(["generate", "cow", *where]) == 2
assert run(["models", "info", {str(runs / "by-class")!r}]) == 0
assert run(["schedulers", "list", *where]) == 0
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "Piñata" in process.stdout


# Classes


def test_classes_by_name(by_class):
    names = ["dog", "DOG", " dog "]
    assert len({str(pixels(by_class.generate(name, seed=1))) for name in names}) == 1
    assert len({str(pixels(by_class.generate(name, seed=1))) for name in CLASSES}) == 3
    assert make_plan(by_class.model, "PIÑATA").prompts == ("Piñata",)


@pytest.mark.parametrize(
    ("prompt", "near"), [("dgo", "did you mean 'dog'?"), ("xylophone", "there are"), ("", "there are")]
)
def test_unknown_classes(by_class, prompt, near):
    with pytest.raises(UsageError, match="has no class") as excinfo:
        by_class.generate(["cat", prompt])
    assert near in excinfo.value.hint
    assert "cat, dog, Piñata" in excinfo.value.hint


def test_the_seed_draws_a_missing_class(by_class):
    drawn = by_class.generate(seed=20, count=8)
    records = [json.loads(picture.info["diffgen"]) for picture in drawn]
    assert [record["prompt"] for record in records] == [CLASSES[drawn_class(20 + i, 3)] for i in range(8)]
    assert len({record["prompt"] for record in records}) == 3
    named = [by_class.generate(record["prompt"], seed=record["seed"])[0] for record in records]
    assert pixels(named) == pixels(drawn)


def test_drawn_classes_are_even():
    counts = np.bincount([drawn_class(seed, 10) for seed in range(5000)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # χ² with 9 degrees of freedom exceeds it once in a thousand


def test_a_run_without_classes_reads_no_prompts(runs):
    with pytest.raises(UsageError, match="reads no prompts"):
        make_plan(find(str(runs / "plain")), "cat")


@pytest.mark.parametrize(("name", "why"), [("plain", "without classes"), ("no-dropout", "with label_dropout = 0")])
def test_guidance_is_refused_without_training_for_it(runs, name, why):
    """Their default is 1, although their configuration has guidance = 1.5."""
    model = find(str(runs / name))
    prompts = () if name == "plain" else "cat"
    with pytest.raises(UsageError, match=why):
        make_plan(model, prompts, guidance=2.0)
    assert make_plan(model, prompts).guidance == 1


# The record


def test_record(by_class, runs):
    (picture,) = by_class.generate("dog", seed=9)
    record = json.loads(picture.info["diffgen"])
    ema = (runs / "by-class/checkpoints/7/ema.safetensors").read_bytes()
    expected = {
        "schema": "diffgen.image/1",
        "prompt": "dog",
        "negative": "",
        "seed": 9,
        "index": 0,
        "steps": 3,
        "nfe": 3,
        "guidance": 1.5,
        "scheduler": "euler",
        "width": 8,
        "height": 8,
        "model": "by-class",
        "model_hash": hashlib.sha256(ema).hexdigest(),
        "family": "run",
        "training_step": 7,
        "training_data": "digits",
        "prediction": "sample",
        "dtype": "float32",
        "rng": "CPU",
        "warnings": [],
        "pixels_sha256": hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest(),
    }
    assert {key: record[key] for key in expected} == expected
    assert record["versions"].keys() == {"diffgen", "python", "torch"}
    assert picture.info["parameters"].startswith("dog\nSteps: 3, Sampler: Euler")
    assert by_class.generate("dog", seed=9, metadata="none")[0].info == {}
    with pytest.raises(UsageError, match="metadata"):
        by_class.generate("dog", metadata="some")


def test_steps_are_counted(by_class):
    calls = []
    by_class.generate(["cat", "dog"], count=2, seed=0, steps=5, on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 20) for i in range(20)]


# Invalid runs


@pytest.fixture
def copy(runs, tmp_path):
    return Path(shutil.copytree(runs / "by-class", tmp_path / "copy"))


def test_a_damaged_newest_checkpoint_is_skipped(copy, by_class):
    checkpoint(copy, 9, model=network_of(3, channels=1, classes=3)[1], ema=network_of(4, channels=1, classes=3)[1])
    newer = diffgen.load(copy).generate("cat", seed=0)
    file = copy / "checkpoints/9/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    (picture,) = diffgen.load(copy).generate("cat", seed=0)
    assert pixels([picture]) == pixels(by_class.generate("cat", seed=0)) != pixels(newer)
    (warning,) = json.loads(picture.info["diffgen"])["warnings"]
    assert "damaged" in warning
    assert str(copy) not in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "has no checkpoint"),
        (lambda folder: (folder / "checkpoints/7/ema.safetensors").unlink(), "has no checkpoint to read"),
        (lambda folder: edit(folder, "job", "latents"), "a run of the job 'latents'"),
        (lambda folder: edit(folder, "schema", "diffgen.run/2"), "schema"),
        (lambda folder: edit(folder, "config", {"sample": {"steps": 0}}), "sample.steps"),
        (lambda folder: edit(folder, "config", {"sample": {"scheduler": "eular"}}), "eular"),
        (lambda folder: edit(folder, "config", {"sampel": {}}), "unknown key sampel"),
        (lambda folder: edit(folder, "network", {"name": "os.system"}), "os.system"),
        (lambda folder: edit(folder, "prediction", "v"), "prediction is 'v'"),
    ],
)
def test_invalid_runs_are_refused(copy, change, message):
    change(copy)
    with pytest.raises(InputError, match=message):
        diffgen.load(copy).generate("cat")


def edit(folder, key, value):
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {key: value}))


def test_only_finite_pictures_are_saved(copy, diffgen_):
    """One class's embedding is so large that its pictures are not finite."""
    shutil.rmtree(copy / "checkpoints")
    network = network_of(2, channels=1, classes=3)[1]
    embedding = next(part for part in network.modules() if isinstance(part, torch.nn.Embedding))
    with torch.no_grad():
        embedding.weight[CLASSES.index("dog")] = 1e38
    checkpoint(copy, 7, model=network, ema=network)
    with pytest.raises(InvalidOutput, match="'dog' with seed 3 is not finite"):
        diffgen.load(copy).generate("dog", seed=3)
    for size in (1, 3):
        where = f"out{size}"
        code, out, err = diffgen_(
            "generate", "cat", "dog", "Piñata", "-m", copy, "--batch-size", size, "-o", f"{where}/"
        )
        assert code == 5
        assert "'dog'" in err
        assert len(out.splitlines()) == len(list(Path(where).iterdir())) == 2


@pytest.mark.parametrize(
    "option",
    [
        ["--negative", "dog"],
        ["--image", "x.png"],
        ["--lora", "x.safetensors"],
        ["--control", "canny=x.png"],
        ["--upscale", "2"],
        ["--tile"],
        ["--guidance-rescale", "0.5"],
        ["--offload", "model"],
        ["--steps", "0"],
        ["--scheduler", "eular"],
    ],
)
def test_unsupported_options_of_a_run_are_refused(runs, diffgen_, option):
    code, out, err = diffgen_("generate", "cat", "-m", runs / "by-class", *option)
    assert (code, out) == (2, "")
    assert option[0] in err or option[-1] in err


def test_diffusers_names_and_unknown_ones(by_class):
    ours = by_class.generate("dog", seed=3, steps=2, guidance=2.0, count=2)
    theirs = by_class.generate("dog", seed=3, num_inference_steps=2, guidance_scale=2.0, num_images_per_prompt=2)
    assert pixels(ours) == pixels(theirs)
    with pytest.raises(UsageError, match="takes no keyword 'stepps'") as excinfo:
        by_class.generate("dog", stepps=3)
    assert "'steps'" in excinfo.value.hint
    with pytest.raises(UsageError, match="num_inference_steps and steps set the same option"):
        by_class.generate("dog", steps=3, num_inference_steps=3)
    with pytest.raises(UsageError, match="--negative is not supported for a run"):
        by_class.generate("dog", negative_prompt="x")


class CallbackError(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("callback", ["on_step", "on_denoised"])
def test_an_error_in_a_callback_ends_the_work_within_one_step(by_class, callback):
    """The generator stays usable: the next picture is the same to the bit."""
    plan = make_plan(by_class.model, "dog", seed=3, steps=4, count=2, batch_size=2)
    expected = pixels(picture.image for picture in by_class.pictures(plan))
    calls = []

    def raising(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise CallbackError

    with pytest.raises(CallbackError):
        list(by_class.pictures(plan, **{callback: raising}))
    assert len(calls) == 2
    assert pixels(picture.image for picture in by_class.pictures(plan)) == expected


def test_dry_run(runs, diffgen_):
    code, out, err = diffgen_(
        "generate", "cat", "-n", "2", "--seed", "4", "-m", runs / "by-class", "--dry-run", "--json"
    )
    result = json.loads(out)["result"]
    assert (code, err) == (0, err)
    assert [(p["prompt"], p["seed"], p["width"], p["height"]) for p in result["images"]] == [
        ("cat", 4, 8, 8),
        ("cat", 5, 8, 8),
    ]
    assert (result["model"], result["scheduler"], result["steps"]) == ("by-class", "euler", 3)


def test_from_training_to_pictures(diffgen_):
    """The commands that the guide shows, on a network that trains for two steps."""
    Path("tiny.toml").write_text(
        "[network]\nwidth = 8\nmultipliers = [1]\nattention = [false]\nblocks = 1\n"
        "[train]\nsteps = 2\nbatch_size = 4\n[sample]\ncount = 2\nsteps = 2\n"
    )
    assert diffgen_("train", "digits", "-o", "runs/digits", "--config", "tiny.toml")[0] == 0
    code, out, err = diffgen_("generate", "7", "-m", "runs/digits", "--seed", "1", "-n", "2", "-o", "sevens/")
    assert code == 0, err
    assert [Image.open(path).mode for path in out.split()] == ["L", "L"]
    assert read_record(out.split()[0])["prompt"] == "7"
    assert diffgen_("generate", "ten", "-m", "runs/digits")[0] == 2
