"""A step of training against a loop written out with plain torch; what it draws; what is evaluated and kept."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffgen.errors import InputError, InvalidOutput
from diffgen.training import checkpoint, seeds
from diffgen.training.config import Config, Data, Diffusion, Sample, Train
from diffgen.training.data import open_data
from diffgen.training.ema import decay, exponent
from diffgen.training.loop import held_out, samples
from diffgen.training.parallel import Ranks
from diffgen.training.pixels import PixelJob
from diffgen.training.run import Run, read_state
from diffgen.training.trainer import Trainer

TINY = {"name": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [False, True], "head_width": 8}


def config(dropout: float = 0.0, **tables: Any) -> Config:
    return dataclasses.replace(
        Config(),
        network=TINY | {"dropout": dropout},
        data=tables.get("data", Data()),
        diffusion=tables.get("diffusion", Diffusion()),
        train=Train(**{"steps": 100, "batch_size": 12, "warmup": 4, "ema": (0.1, 0.05), **tables.get("train", {})}),
        sample=Sample(count=4, steps=2),
    )


def trainer_of(chosen: Config, nonzero: bool = True) -> Trainer:
    """Ready to train; the last layer, which is zero at first, has random weights, so that all others have gradients."""
    trainer = Trainer(PixelJob(chosen, open_data("digits")), chosen.train, Ranks("cpu"))
    if nonzero:
        with torch.no_grad():
            for p in trainer.weights.values():
                if not p.any():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return trainer


# What a step draws


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_a_function_of_its_number(dropout: float) -> None:
    """The same bits whatever was computed before, and another loss at another step."""
    first, second = (trainer_of(config(dropout)) for _ in range(2))
    for k in (3, 1, 7):
        second.job.loss(second.networks, k, slice(0, 12))
    assert [first.step(k).item() for k in (0, 1)] == [second.step(k).item() for k in (0, 1)]
    assert all(a.equal(b) for a, b in zip(first.weights.values(), second.weights.values(), strict=True))


def test_a_position_of_the_batch_has_its_loss_whoever_computes_it() -> None:
    trainer = trainer_of(config(data=Data(flip=True)))
    with torch.no_grad():
        expected = trainer.job.loss(trainer.networks, 5, slice(0, 12))
        for parts in (2, 3, 5):
            ranks = Ranks("cpu")
            slices = []
            for ranks.rank, ranks.world in [(rank, parts) for rank in range(parts)]:
                slices += [trainer.job.loss(trainer.networks, 5, ranks.share(12, i, 2)) for i in range(2)]
            torch.testing.assert_close(torch.cat(slices), expected, atol=1e-5, rtol=1e-5)


def test_every_epoch_has_each_training_picture_once() -> None:
    job = PixelJob(config(train={"batch_size": 100}), open_data("digits"))
    train, test = open_data("digits").split(0.1)
    n = len(train)
    order = torch.cat([job.indices(k) for k in range(40)])
    first, second = order[:n], order[n : 2 * n]
    assert first.sort().values.equal(train)
    assert second.sort().values.equal(train)
    assert not first.equal(second)
    assert not set(order.tolist()) & set(test.tolist())
    few = PixelJob(config(data=Data(held_out=0.9), train={"batch_size": 1000}), open_data("digits"))
    assert torch.bincount(few.indices(3)[torch.isin(few.indices(3), few.train)]).max() <= 1000 // len(few.train) + 2


@pytest.mark.parametrize("times", ["stratified", "uniform"])
def test_times_are_uniform_and_stratified_ones_fill_every_part(times: str) -> None:
    job = PixelJob(config(diffusion=Diffusion(T=50, times=times), train={"batch_size": 10}), open_data("digits"))
    job.prepare(torch.device("cpu"), torch.no_grad)
    drawn = torch.stack([job._draw(k).t for k in range(2000)])
    counts = torch.bincount(drawn.flatten(), minlength=50)
    assert len(counts) == 50
    assert ((counts - 400).abs() < 5 * 400**0.5).all()
    if times == "stratified":
        assert (drawn // 5).equal(torch.arange(10).expand(2000, 10))


def test_rates_of_dropped_classes_and_of_flips() -> None:
    chosen = config(diffusion=Diffusion(label_dropout=0.2), data=Data(flip=True), train={"batch_size": 1000})
    job = PixelJob(chosen, open_data("digits"))
    job.prepare(torch.device("cpu"), torch.no_grad)
    draws = [job._draw(k) for k in range(20)]
    assert torch.cat([d.choices["drop"] for d in draws]).float().mean() == pytest.approx(0.2, abs=0.015)
    assert torch.cat([d.choices["flip"] for d in draws]).float().mean() == pytest.approx(0.5, abs=0.02)
    noise = torch.cat([d.noise.flatten() for d in draws])
    assert noise.std() == pytest.approx(1, abs=0.005)


# What a step does


def test_a_step_is_adamw_with_clipping_and_averages() -> None:
    """Against the same written out: torch's plain AdamW, one backward pass of the mean, averages by their recursion."""
    trainer = trainer_of(config(train={"clip": 0.5, "weight_decay": 0.1, "schedule": "cosine", "learning_rate": 0.01}))
    other = trainer_of(config())
    optimizer = torch.optim.AdamW(other.weights.values(), betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    averages = {name: torch.zeros_like(p) for name, p in other.weights.items()}
    clipped = 0
    for k in range(6):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (k + 1) / 4) * (1 + math.cos(math.pi * k / 100)) / 2
        loss = other.job.loss(other.networks, k, slice(0, 12)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in other.weights.values()))  # type: ignore[union-attr]
        clipped += bool(norm > 0.5)
        for p in other.weights.values():
            p.grad *= min(1, 0.5 / norm)
        optimizer.step()
        for name, p in other.weights.items():
            beta = decay(exponent(0.1), k + 1)
            averages[name] = beta * averages[name] + (1 - beta) * p.detach()
        assert trainer.step(k).item() == pytest.approx(loss.item(), rel=1e-5)
        assert trainer.gradients[-1].item() == pytest.approx(norm.item(), rel=1e-4)
    assert clipped == 6
    files = trainer.files()
    for name, p in other.weights.items():
        torch.testing.assert_close(files["model"][name], p.detach(), atol=1e-4, rtol=0)  # they moved by up to 0.06
        torch.testing.assert_close(files["ema"][name], averages[name], atol=1e-4, rtol=0)


def test_a_batch_in_parts_is_the_same_batch() -> None:
    single, parts = (trainer_of(config(train={"accumulate": n})) for n in (1, 5))
    for k in range(3):
        assert parts.step(k).item() == pytest.approx(single.step(k).item(), rel=1e-5)
    for a, b in zip(single.weights.values(), parts.weights.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 2, 4, 4, 4]),
        ("linear", [1, 2 * 0.99, 4 * 0.97, 4 * 0.5, 4 * 0.01]),
        ("cosine", [1, None, None, 2, None]),
    ],
)
def test_the_learning_rate(schedule: str, rates: list[float | None]) -> None:
    trainer = trainer_of(config(train={"schedule": schedule, "learning_rate": 4.0}))
    for k, rate in zip((0, 1, 3, 50, 99), rates, strict=True):
        assert rate is None or trainer.learning_rate(k) == pytest.approx(rate)


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 4.0), ("linear", 2.0), ("cosine", 2.0)])
def test_a_learning_rate_that_falls_in_the_last_fifth(schedule: str, middle: float) -> None:
    trainer = trainer_of(config(train={"schedule": schedule, "decay": 0.2, "learning_rate": 4.0, "steps": 200}))
    rates = [trainer.learning_rate(k) for k in (10, 100, 160, 180)]
    assert rates == pytest.approx([4, 4, 4, middle])


def test_a_continued_run_warms_up_and_falls_again() -> None:
    options = {"warmup": 4, "learning_rate": 4.0, "steps": 200}
    falling, constant = (trainer_of(config(train={"schedule": s, **options})) for s in ("linear", "constant"))
    falling.segments = constant.segments = (40, 100)
    rates = [falling.learning_rate(k) for k in (0, 39, 40, 70, 100, 150, 199)]
    assert rates == pytest.approx([1, 0.1, 1, 2, 1, 2, 0.04])
    assert [constant.learning_rate(k) for k in (0, 39, 40, 100, 199)] == [1, 4, 4, 4, 4]


def test_in_bfloat16_the_loss_is_nearly_that_of_float32() -> None:
    exact, fast = (trainer_of(config(train={"precision": p})) for p in ("float32", "bfloat16"))
    kinds: set[torch.dtype] = set()
    conv = next(m for m in fast.job.networks["network"].modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    a, b = exact.step(0).item(), fast.step(0).item()
    assert a != b
    assert b == pytest.approx(a, rel=0.02)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in fast.weights.values()} == {torch.float32}


def test_a_learned_variance_is_trained_with_the_hybrid_objective() -> None:
    trainer = trainer_of(config(diffusion=Diffusion(variance="learned_range")))
    job = trainer.job
    assert isinstance(job, PixelJob)
    assert job.diffusion.objective == "hybrid"
    assert job.network.config["out_channels"] == 2
    trainer.step(0)
    assert next(reversed(trainer.weights.values())).grad is None  # set to none, after it had one
    assert trainer.gradients[0] > 0
    assert [len(pictures) for pictures in samples(trainer)] == [4, 4]


# Held-out losses and samples


def test_held_out_losses_of_a_network_that_returns_0_are_the_noise() -> None:
    """ε̂ = 0: the loss is the mean of ε² over noise that is always the same, near 1 in each quartile."""
    trainer = trainer_of(config(), nonzero=False)
    n = len(open_data("digits").split(0.1)[1])
    losses = held_out(trainer)
    assert losses["raw"] == losses["ema"]
    assert losses["raw"] == pytest.approx([1] * 4, abs=5 * (2 / (n * 64)) ** 0.5)
    for quarter, loss in enumerate(losses["raw"]):
        g = seeds.generator(seeds.HELD_OUT, quarter)
        torch.rand(n, generator=g)
        assert loss == pytest.approx(torch.randn(n, 1, 8, 8, generator=g).square().mean().item(), rel=1e-5)
    assert held_out(trainer_of(config(train={"seed": 9}), nonzero=False)) == losses


def test_evaluating_an_average_restores_the_weights() -> None:
    trainer = trainer_of(config(dropout=0.5, diffusion=Diffusion(prediction="sample")))
    for k in range(3):
        trainer.step(k)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    losses, pictures = held_out(trainer), samples(trainer)
    assert losses["raw"] != losses["ema"]
    assert pictures[0][0].tobytes() != pictures[1][0].tobytes()
    assert all(p.equal(before[name]) for name, p in trainer.weights.items())
    assert trainer.job.networks["network"].training
    trainer.load_model(trainer.files()["ema"])
    assert held_out(trainer)["raw"] == losses["ema"]
    assert [p.tobytes() for p in samples(trainer)[0]] == [p.tobytes() for p in pictures[1]]


# Checkpoints


def saved(trainer: Trainer, folder: Path, step: int) -> Path:
    return checkpoint.write(folder, step, trainer.files(), {"pending": trainer.check(step)})


@pytest.mark.parametrize(
    "chosen",
    [
        config(dropout=0.2),
        config(diffusion=Diffusion(noise="cosine", T=3, variance="learned_range", objective="vlb", times="importance")),
        config(train={"accumulate": 3, "precision": "bfloat16"}),
    ],
    ids=["dropout", "importance", "accumulate"],
)
def test_a_checkpoint_continues_exactly(tmp_path: Path, chosen: Config) -> None:
    straight, before, after = (trainer_of(chosen) for _ in range(3))
    for k in range(8):
        straight.step(k)
        if k < 5:
            before.step(k)
    folder = saved(before, tmp_path, 5)
    assert after.restore(folder, read_state(folder)) == 5
    for k in range(5, 8):
        after.step(k)
    assert after.check(8) == straight.check(8)
    ours, theirs = after.files(), straight.files()
    assert ours.keys() == theirs.keys() == {"model", "ema", "ema-0.05", "optimizer"}
    for name in theirs:
        assert ours[name].keys() == theirs[name].keys()
        assert all(value.equal(theirs[name][key]) for key, value in ours[name].items())


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(config())
    trainer.step(0)
    folder = saved(trainer, tmp_path, 1)
    other = trainer_of(dataclasses.replace(config(), network=TINY | {"width": 16}))
    with pytest.raises(InputError, match="has the shape"):
        other.restore(folder, read_state(folder))


def test_older_checkpoints_go_and_one_between_counts_for_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "pixels", {}, {}, {}, {}, "", "", {})
    for step in (10, 20, 30, 34, 40):
        checkpoint.write(tmp_path, step, {"model": {"w": torch.ones(2)}}, {})
        checkpoint.prune(run, step, 2, 10)
        names = [folder.name for folder in run.checkpoints()]
        assert names == {10: ["10"], 20: ["20", "10"], 30: ["30", "20"], 34: ["34", "30"], 40: ["40", "30"]}[step]


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".diffgen-1").mkdir()
    (tmp_path / ".diffgen-1/model.safetensors").write_bytes(b"half")
    (tmp_path / "samples").mkdir()
    for name in (".diffgen-2", "10.png"):
        (tmp_path / "samples" / name).write_bytes(b"")
    checkpoint.sweep(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["samples", "samples/10.png"]


def test_a_newer_checkpoint_is_a_damaged_one_and_costs_no_sound_one(tmp_path: Path) -> None:
    run = Run(tmp_path, "pixels", {}, {}, {}, {}, "", "", {})
    for step in (40, 30):  # a run that went back to 20, since 40 is damaged
        checkpoint.write(tmp_path, step, {"model": {"w": torch.ones(2)}}, {})
    checkpoint.prune(run, 30, 1, 10)
    assert [folder.name for folder in run.checkpoints()] == ["40", "30"]


class Diverging:
    """A job whose loss is fine while its gradient is not: √x at 0, from step 2 on."""

    area = 1

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {"line": nn.Linear(1, 1, bias=False)}

    def prepare(self, device: torch.device, autocast: Any) -> None: ...

    def loss(self, networks: Any, k: int, positions: slice) -> Tensor:
        x = networks["line"](torch.ones(positions.stop - positions.start, 1))
        return ((x - x.detach()).clamp_min(0) if k >= 2 else x.square()).sqrt().flatten()

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def test_a_gradient_that_is_not_finite_is_named_with_its_step(tmp_path: Path) -> None:
    trainer = Trainer(Diverging(), Train(batch_size=2), Ranks("cpu"))  # type: ignore[arg-type]
    for k in range(2):
        trainer.step(k)
    trainer.check(2)
    for k in (2, 3):
        trainer.step(k)
    with pytest.raises(InvalidOutput, match="the gradient norm is inf at step 3"):
        trainer.check(4)
    with pytest.raises(InvalidOutput, match="weight in model is not finite after step 4"):
        checkpoint.write(tmp_path, 4, trainer.files(), {})
    assert list(tmp_path.iterdir()) == []


# What does not go together


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dataclasses.replace(config(), network={"name": "unit"}), "a.toml: .network.: unknown network 'unit'"),
        (dataclasses.replace(config(), network={"widht": 8}), "a.toml: .network.: a unet has no 'widht'"),
        (dataclasses.replace(config(), network={"channels": 3}), "a.toml: network.channels follows from the data"),
        (config(diffusion=Diffusion(T=5, noise="linear")), "a.toml: .diffusion."),
        (config(diffusion=Diffusion(objective="hybrid")), "a.toml: .diffusion.: the hybrid objective"),
        (dataclasses.replace(config(), sample=Sample(scheduler="eular")), "a.toml: .sample.: scheduler: .*euler"),
        (
            dataclasses.replace(
                config(diffusion=Diffusion(T=50, noise="cosine")), sample=Sample(scheduler="ddpm", steps=60)
            ),
            "a.toml: .sample.: scheduler: 60 steps are too many",
        ),
    ],
)
def test_options_that_exclude_each_other_are_named(chosen: Config, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PixelJob(chosen, open_data("digits"), "a.toml")
