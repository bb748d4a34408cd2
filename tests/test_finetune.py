"""Fine-tuning: what a LoRA is, who reads it, and that nothing about the data can change a result."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_training_parallel import pair

import diffgen
from diffgen.errors import InputError
from diffgen.pipelines.inputs import read_lora
from diffgen.pipelines.training import finetune_config as configs
from diffgen.pipelines.training.lora import LoraJob
from diffgen.pipelines.training.pictures import open_pictures
from diffgen.pipelines.weights import deltas
from diffgen.pipelines.weights.adapters import merge_lora
from diffgen.pipelines.weights.lora_files import LAYOUTS, write_lora
from diffgen.training import checkpoint, optimizers
from diffgen.training.batches import BucketShuffle
from diffgen.training.config import parse
from diffgen.training.parallel import Ranks
from diffgen.training.run import read_state
from diffgen.training.trainer import Trainer

CPU = torch.device("cpu")
SIZES = [(40, 40), (64, 32), (32, 64), (40, 44), (33, 61), (48, 48)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffgen"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of several shapes, with a.txt beside each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate(SIZES):
        values = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'green', 'blue')[i % 3]} apple, flat style")
    return folder


def job_of(cls: Any, model: Path, pictures: Path, **tables: Any) -> Any:
    """A job on that model, in float32 on the CPU, ready for a step."""
    kind = configs.LoraConfig if cls is LoraJob else cls.CONFIG
    config = parse({"model": str(model), **tables}, "test", kind)
    job = cls(config, open_pictures(str(pictures), config, "test"), device="cpu")
    job.prepare(CPU, contextlib.nullcontext)
    return job


def answer(job: Any, call: Any, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """The output for fixed noise and captions."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, *job.coder.shape(size), generator=g)
    with torch.no_grad():
        inputs = job.inputs(job.networks, ["a red apple", None], size)
        return job.predict(call, x, torch.tensor([100, 700]), inputs)


# (family, kind, layers): every kind, and every way in which a family names its layers
READ = [
    ("sd1", "lora", "all"),
    ("sd1", "dora", "attention+mlp"),
    ("sd1", "lokr", "all"),
    ("sdxl", "lora", "all"),
    ("sd3", "lora", "attention+mlp"),
    ("flux", "lora", "attention"),
    ("flux2-klein-base", "lora", "attention+mlp"),
    ("z-image", "lora", "attention+mlp"),
    ("qwen-image", "lora", "attention+mlp"),
]


@pytest.mark.parametrize(("family", "kind", "layers"), READ)
def test_an_adapter_is_the_same_to_all_who_read_it(
    family: str, kind: str, layers: str, family_folder: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """Untrained: the base, to the bit. Trained: hooks, our merge in each layout, diffusers with PEFT agree to 1e-5."""
    folder = family_folder(family)
    one = {"held_out": 0.0, "size": 32, "aspect": 1.0}
    job = job_of(LoraJob, folder, pictures, data=one, adapter={"kind": kind, "rank": 3, "alpha": 6.0, "layers": layers})
    base = answer(job, job.base)
    adapted = job.networks["adapter"]
    assert torch.equal(answer(job, adapted), base)
    assert {name for name, _ in adapted.named_parameters()} == set(adapted.state_dict())  # nothing of the base
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    hooked = answer(job, adapted)
    assert (hooked - base).abs().max() > 1e-2
    with job.base_only():
        assert torch.equal(answer(job, adapted), base)

    names = {f"lora_unet_{name.replace('.', '_')}" for name, module in job.base.named_modules()}
    about, pipeline = job.about(), job.loaded.pipeline
    weights = {name: tensor.detach() for name, tensor in adapted.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in job.base.state_dict().items()}
    for layout in LAYOUTS:
        if kind == "dora" and layout == "original":
            continue  # the same tensors as in diffusers' layout
        path = tmp_path / f"{layout}.safetensors"
        path.write_bytes(write_lora(about, weights, layout, checked=job.checked))
        matched = merge_lora(pipeline, job.checked.family, read_lora(str(path)))
        assert matched.unmatched == ()
        if layout == "kohya" and job.row.denoiser == "unet":
            assert {name.split(".")[0] for name in load_file(path)} <= names
        with job.base_only():
            merged = answer(job, job.base)
        torch.testing.assert_close(merged, hooked, atol=1e-5, rtol=1e-5, msg=lambda m, layout=layout: f"{layout}: {m}")
        job.base.load_state_dict(before)

    if kind == "lokr" or family in ("flux2-klein-base", "qwen-image"):
        return  # PEFT has its own names for LoKr; two heavy families are left to benchmarks/finetune.py
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(tmp_path, weight_name="diffusers.safetensors")
    network = getattr(theirs, job.row.denoiser)
    assert len([m for m in network.modules() if hasattr(m, "lora_A")]) == len(adapted.layers)
    torch.testing.assert_close(answer(job, network), hooked, atol=1e-5, rtol=1e-5)


@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_picture_comes_once_in_an_epoch(sizes: list[int], batch: int, epochs: int, seed: int) -> None:
    n = len(sizes)
    order = BucketShuffle(torch.arange(n), batch, seed, sizes)
    steps = [order(k).tolist() for k in range(-(-n * epochs // batch))]
    assert all(len(step) == batch for step in steps)
    stream = [picture for step in steps for picture in step]
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    mixed = sum(len({sizes[p] for p in step}) > 1 for step in steps)
    kinds = len(set(sizes))
    assert mixed <= epochs * (kinds + 2 + kinds * (batch - 1) // batch)  # the others are one batch of the network
    if kinds == 1:
        assert not mixed


def test_37_pictures_of_9_shapes_mostly_share_their_steps() -> None:
    shapes = [i % 9 for i in range(37)]
    order = BucketShuffle(torch.arange(37), 4, 0, shapes)
    one = sum(len({shapes[p] for p in order(k).tolist()}) == 1 for k in range(9))
    assert one >= 7


def run_files(run: Path) -> dict[str, bytes]:
    """The files of a run that promise the same bytes."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if (path.is_file() and path.suffix in (".safetensors", ".png", ".json")) or path.name == "metrics.jsonl"
    }


QUICK: dict[str, Any] = {
    "data": {"flip": True, "crops": 2, "shuffle": ","},
    "train": {"batch_size": 2, "log_every": 2, "checkpoint_every": 2, "held_out_every": 4, "ema": [0.2]},
    "sample": {"every": 4, "count": 2, "steps": 2},
}


class Stop:
    """Ends a training after some steps, as an interrupt does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self) -> Callable[[], bool]:
        return self.stopped

    def __exit__(self, *error: object) -> None: ...

    def stopped(self) -> bool:
        self.left -= 1
        return self.left <= 0


JOBS = {
    "lora": (
        "adapter.safetensors",
        {"adapter": {"rank": 1}, "prior": {"captions": ["a red apple"], "target": "model"}},
    ),
    "embedding": ("embedding.safetensors", {"embedding": {"begin": "red apple"}}),
    "full": ("model", {"prior": {"captions": ["a red apple"], "pictures": 2}}),
    "control": ("controlnet", {"control": {"attention": False}}),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_run_resumes_to_the_byte_and_is_used_by_generate(
    job: str, tiny: Path, pictures: Path, tmp_path: Path, cache: Path, family_folder: Callable[[str], Path]
) -> None:
    """Interrupted and resumed, and without the cache: the same bytes. `generate` reads the run itself."""
    product, more = JOBS[job]
    config, whole, two = {**QUICK, **more, "job": job}, tmp_path / "whole", tmp_path / "two"
    options: dict[str, Any] = {"steps": 4, "trigger": "<new>", "device": "cpu"}
    result = diffgen.finetune(tiny, pictures, whole, config=config, **options)
    assert (result.job, result.step, result.files) == (job, 4, [str(whole / product)])
    assert result.held_out is not None
    assert len(SIZES) < len(list((cache / "latents").rglob("*.safetensors"))) <= 5 * len(SIZES)  # equal crops are one
    expected = run_files(whole)
    assert "samples/4.png" in expected

    uncached = {**config, "data": {**QUICK["data"], "cache": False}}
    for path in (cache / "latents").rglob("*.safetensors"):
        path.write_bytes(b"not safetensors")  # a damaged entry is made anew
    stopped = diffgen.finetune(tiny, pictures, two, config=uncached, stopping=Stop(3), **options)
    assert stopped.step == 3
    resumed = diffgen.finetune(tiny, pictures, two, resume=True, **options)
    assert (resumed.started_at, resumed.step) == (3, 4)
    files = run_files(two)
    assert json.loads(files.pop("run.json"))["config"]["data"]["cache"] is False
    assert json.loads(expected.pop("run.json"))["base"]["family"] == "sd1"
    assert {name: data for name, data in files.items() if "/3/" not in name} == expected

    with pytest.raises(InputError, match="a run of another base"):
        diffgen.finetune(family_folder("sd2"), pictures, whole, resume=True)
    plain = diffgen.load(tiny, device="cpu")
    used: dict[str, Any] = {
        "lora": {"loras": [str(whole)]},
        "embedding": {"embeddings": [f"<new>={whole}"]},
        "full": {},
        "control": {"controls": [f"canny={pictures / '0.png'}"], "control_models": [str(whole)]},
    }[job]
    prompt = "a <new> apple" if job == "embedding" else "a red apple"
    before = np.asarray(plain.generate(prompt, seed=1, steps=2)[0])
    tuned = diffgen.load(whole, device="cpu") if job == "full" else plain
    after = np.asarray(tuned.generate(prompt, seed=1, steps=2, **used)[0])
    assert after.shape != before.shape or (after != before).any()
    if job in ("lora", "embedding"):
        with pytest.raises(InputError, match=f"a run of the job '{job}'"):
            plain.generate(prompt, **({"embeddings": [f"<x>={whole}"]} if job == "lora" else {"loras": [str(whole)]}))
        size = sum(t.numel() for t in load_file(whole / "checkpoints/4/model.safetensors").values())
        assert size < 0.1 * sum(t.numel() for t in plain.pipeline.unet.state_dict().values())


def test_times_noise_and_captions_are_those_of_the_paper(family_folder: Callable[[str], Path], pictures: Path) -> None:
    """A flow's times are logit-normal, then shifted as the model's grids are; dropped captions are guidance's."""
    job = job_of(LoraJob, family_folder("sd3"), pictures, train={"batch_size": 512})
    t = torch.tensor([picks[0].t for picks in job._draw(0)]).double() / 1000
    edges = torch.special.ndtri(torch.arange(513).double() / 512).sigmoid()
    edges = 3 * edges / (1 + 2 * edges)  # the shift of the tiny model's scheduler
    assert ((edges[:-1] - 1e-5 <= t) & (t <= edges[1:] + 1e-5)).all()  # one in each part of equal probability
    dropped = sum(picks[0].text is None for picks in job._draw(0)) / 512
    assert 0.05 < dropped < 0.15
    job = job_of(LoraJob, family_folder("sdxl"), pictures)
    pick = next(p for (p,) in job._draw(0) if job.data.examples[p.picture].size != (40, 40))
    inputs = job.inputs(job.networks, [None, "a red apple"], (32, 32))
    assert not inputs["text"][0].any()  # XL's pipelines guide away from zeros
    group = [replace(pick, text=None), replace(pick)]
    job._place(inputs, group, [job.encoded[p.picture, 0, False] for p in group], (32, 32))
    width, height = job.data.examples[pick.picture].size
    assert inputs["sizes"][0, :2].tolist() == [height, width]


def test_a_mask_weighs_a_picture_evenly(tiny: Path, tmp_path: Path) -> None:
    """What is masked out counts a tenth; the loss of a small mask is no smaller."""
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 16))
    mask.save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a", "mask": "m.png"}\n')
    job = job_of(LoraJob, tiny, tmp_path)
    weight = job.encoded[0, 0, False].weight
    assert weight.mean() == pytest.approx(1)
    assert weight.max() / weight.min() == pytest.approx(10)
    ((pick,), *_) = job._draw(0)
    masked = job._losses(job.networks, [pick], 1)
    job.encoded[0, 0, False] = replace(job.encoded[0, 0, False], weight=None)
    plain = job._losses(job.networks, [pick], 1)
    assert 0.5 < masked / plain < 2
    assert masked != plain


def test_bad_data_are_refused_before_a_model_is_loaded(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_folder: Callable[[str], Path]
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diffgen.pipelines.loaded.load_pipeline", refuse)
    good = (pictures / "0.png").read_bytes()

    def folder(name: str, **files: bytes) -> Path:
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file.replace("_", ".")).write_bytes(data)
        return tmp_path / name

    small = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(small)
    line = b'{"file_name": "a.png", "text": "a", "mask": "m.png"}'
    for data, message in (
        (folder("empty"), "no picture in it"),
        (folder("broken", a_png=good[:200], a_txt=b"a"), "a.png"),
        (folder("alone", a_png=good, b_txt=b"a"), "the caption file b.txt has no picture"),
        (folder("bare", a_png=good, b_png=good, b_txt=b"a"), "a.png has no caption file"),
        (folder("none", a_png=good), "has no captions"),
        (folder("mask", a_png=good, m_png=small.read_bytes(), metadata_jsonl=line), "the mask has 8x8 pixels"),
        (tmp_path / "nowhere", "there is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            diffgen.finetune(tiny, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="not fine-tuned"):
        diffgen.finetune(family_folder("unconditional"), pictures, tmp_path / "run")
    with pytest.raises(InputError, match="job is 'pixels'"):
        diffgen.finetune(tiny, pictures, tmp_path / "run", config={"job": "pixels"})
    with pytest.raises(InputError, match="job is 'lora'"):
        diffgen.train(pictures, tmp_path / "run", config={"job": "lora"})


def test_the_pictures_of_an_epoch_are_counted(pictures: Path, tiny: Path) -> None:
    config = parse({"model": str(tiny)}, "test", configs.LoraConfig)
    data = open_pictures(str(pictures), config, "test")
    about = data.about()
    assert about["count"] == sum(about["buckets"].values()) == len(SIZES)
    assert Counter(e.bucket for e in data.examples)[32, 32] >= 3
    assert all(w % 8 == h % 8 == 0 and w * h <= 32 * 32 for w, h in (e.bucket for e in data.examples))


@pytest.fixture(scope="module")
def trained(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Train one LoRA job some steps with a [train] table, from its first weights: the files of its checkpoint."""
    tables = {"prior": {"captions": ["a red apple"], "target": "model"}, "adapter": {"rank": 8, "layers": "all"}}
    job = job_of(LoraJob, tiny, pictures, data={"cache": False}, diffusion={"weight": "min_snr"}, **tables)
    first = {name: tensor.clone() for name, tensor in job.networks["adapter"].state_dict().items()}
    folder = tmp_path_factory.mktemp("checkpoints")

    def train(steps: int, stop: int = 0, **table: Any) -> dict[str, Any]:
        config = replace(job.config.train, steps=steps, batch_size=4, precision="float32", **table)
        job.networks["adapter"].load_state_dict(first)
        trainer = Trainer(job, config, Ranks("cpu"))
        for k in range(stop or steps):
            trainer.step(k)
        if stop:
            path = checkpoint.write(folder, stop, trainer.files(), {"pending": trainer.check(stop)})
            job.networks["adapter"].load_state_dict(first)
            trainer = Trainer(job, config, Ranks("cpu"))
            assert trainer.restore(path, read_state(path)) == stop
            for k in range(stop, steps):
                trainer.step(k)
        files = trainer.files()
        return {f"{file}.{name}": value.clone() for file, own in files.items() for name, value in own.items()}

    return train


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw8bit", 1e-3), ("adafactor", 1e-3), ("prodigy", 1.0)])
def test_every_optimizer_resumes_to_the_bit(
    trained: Callable[..., Any], optimizer: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = torch.empty(256, 256)
    assert sum(slot.nbytes for slot in optimizers.eight_bit_slots(p).values()) <= 0.27 * 2 * p.nbytes
    monkeypatch.setattr(optimizers, "BLOCK", 16)  # so that a tiny network has moments in eight bits
    options = {"optimizer": optimizer, "learning_rate": rate, "warmup": 2, "rates": {"adapter": 0.5}}
    whole, resumed = trained(4, **options), trained(4, 2, **options)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    if optimizer == "adamw8bit":
        plain = trained(4, **{**options, "optimizer": "adamw"})
        moments = [sum(x.nbytes for n, x in f.items() if n.startswith("optimizer.")) for f in (whole, plain)]
        large = "optimizer.exp_avg.layers.mid_block/resnets/0/conv1.A"
        assert whole[large].dtype == torch.float16  # whole numbers from 0 to 255, as a file may hold them
        assert moments[0] < 0.7 * moments[1]
        name = "model.layers.mid_block/resnets/0/conv1.B"
        assert torch.nn.functional.cosine_similarity(whole[name].flatten(), plain[name].flatten(), 0) > 0.98


def test_accumulation_and_recomputation_change_nothing(trained: Callable[..., Any]) -> None:
    whole = trained(3, learning_rate=1e-3)
    for table in ({"accumulate": 2}, {"accumulate": 4}):
        parts = trained(3, learning_rate=1e-3, **table)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)


def test_recomputation_and_four_bits_train(tiny: Path, pictures: Path) -> None:
    """Gradient checkpointing gives the same gradients; an adapter of a model in four bits has some too."""
    gradients = []
    for recompute in (False, True):
        job = job_of(LoraJob, tiny, pictures, train={"recompute": recompute, "batch_size": 2})
        with torch.no_grad():
            for adapter in job.networks["adapter"].layers.values():
                adapter.B.fill_(0.01)
        job.loss(job.networks, 0, slice(0, 2)).sum().backward()
        gradients.append([p.grad for p in job.networks["adapter"].parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    four = LoraJob(parse({"model": str(tiny), "train": {"quantize": "nf4"}}, "test", configs.LoraConfig), job.data)
    four.prepare(CPU, contextlib.nullcontext)
    four.loss(four.networks, 0, slice(0, 2)).sum().backward()
    assert all(bool(p.grad.any()) for name, p in four.networks["adapter"].named_parameters() if name.endswith("B"))


def test_two_processes_are_one(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Pictures of several shapes and prior examples: the weights of two gloo processes are those of one, to 1e-5."""
    toml = tmp_path / "c.toml"
    toml.write_text(
        '[prior]\ncaptions = ["a red apple"]\ntarget = "model"\n[adapter]\nrank = 2\n[data]\nheld_out = 0.0\n'
        "[train]\nsteps = 3\nbatch_size = 4\nlog_every = 3\n[sample]\nevery = 1000\ncount = 1\nsteps = 1\n"
    )
    options = ["finetune", tiny, pictures, "-o", "run", "--config", toml]
    codes, errors = pair(tmp_path, *options)
    assert codes == [0, 0], errors
    diffgen.finetune(tiny, pictures, tmp_path / "one", config=toml, device="cpu")
    two, one = (load_file(tmp_path / run / "checkpoints/3/model.safetensors") for run in ("run", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)


def test_other_programs_kinds_are_read() -> None:
    """LoHa, LoKr of products, and DoRA by columns, by their formulas."""
    g = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(*shape, generator=g) for shape in ((6, 2), (2, 4), (6, 2), (2, 4)))
    delta, rank = deltas.loha(dict(zip(deltas.LOHA, (a1, b1, a2, b2), strict=True)))
    torch.testing.assert_close(delta, (a1 @ b1) * (a2 @ b2))
    assert rank == 2
    w1 = torch.randn(2, 2, generator=g)
    delta, rank = deltas.lokr({"lokr_w1": w1, "lokr_w2_a": a1[:3], "lokr_w2_b": b1[:, :2]})
    torch.testing.assert_close(delta, torch.kron(w1, a1[:3] @ b1[:, :2]))
    weight, magnitude = torch.randn(6, 4, generator=g), torch.rand(1, 4, generator=g)
    changed = weight + delta
    expected = magnitude * changed / changed.norm(dim=0, keepdim=True)
    torch.testing.assert_close(weight + deltas.decomposed(weight, delta, magnitude), expected)


def test_a_run_is_measured_against_its_base(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Zero steps change nothing: every figure is its floor. A trained run has another fit, and drifts."""
    tables = {**QUICK, "prior": {"captions": ["a green circle", "a blue square"]}, "data": {"held_out": 0.3}}
    still = {**tables, "train": {**QUICK["train"], "learning_rate": 0.0}}
    moved = {**tables, "train": {**QUICK["train"], "learning_rate": 0.1}}
    metrics = []
    for name, config in (("still", still), ("moved", moved)):
        config = {**config, "prior": {**config["prior"], "target": "model"}}
        diffgen.finetune(tiny, pictures, tmp_path / name, config=config, steps=2, rank=4, device="cpu")
        metrics.append(diffgen.evaluate(tmp_path / name, pictures, samples=2, device="cpu").metrics)
    unchanged, changed = metrics
    assert set(unchanged) == {"fit", "drift", "subject_rank", "copying", "diversity", "prompts_kept"}
    assert unchanged["fit"].value == unchanged["fit"].floor
    assert unchanged["drift"].value == unchanged["drift"].ceiling == 0
    assert unchanged["diversity"].value == 1
    assert unchanged["prompts_kept"].value == unchanged["prompts_kept"].ceiling
    assert changed["fit"].value != changed["fit"].floor == unchanged["fit"].floor
    assert changed["drift"].value > 0
    shutil.copytree(pictures, tmp_path / "other")
    (tmp_path / "other/0.txt").write_text("another caption")
    with pytest.raises(InputError, match="not the pictures of this run"):
        diffgen.evaluate(tmp_path / "still", tmp_path / "other", samples=2)
