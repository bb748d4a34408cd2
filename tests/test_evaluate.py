"""`diffgen evaluate` on a small run: its figures against independent computations, and what it refuses."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffgen
from diffgen.cli import run as command
from diffgen.errors import InputError, UsageError
from diffgen.training import classifier, real_pictures
from diffgen.training.data import open_data
from diffgen.training.evaluate import evaluate
from diffgen.training.evaluate_plan import make_evaluation_plan
from diffgen.training.evaluation import Evaluation, Ticks, data_of, in_proportion
from diffgen.training.listener import Listener
from diffgen.training.neighbours import neighbours
from diffgen.training.real_pictures import RealPictures

CONFIG = """
[data]
classes = {classes}
[network]
width = 8
multipliers = [1]
attention = [false]
blocks = 1
[diffusion]
T = 30
noise = "cosine"
prediction = "v_prediction"
variance = "{variance}"
[train]
steps = 30
batch_size = 32
held_out_every = 30
[sample]
count = 2
steps = 4
"""
DISTANCES = ["sliced_wasserstein", "frechet_distance", "nearest_neighbour_accuracy", "density", "coverage"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """digits, by class; plain: the same without classes and with a learned variance. Not to be changed."""
    place = tmp_path_factory.mktemp("runs")
    for name, classes, variance in (("digits", "true", "fixed_small"), ("plain", "false", "learned_range")):
        config = place / f"{name}.toml"
        config.write_text(CONFIG.format(classes=classes, variance=variance))
        assert command(["train", "digits", "-o", str(place / name), "--config", str(config), "-q"]) == 0
    return place


@pytest.fixture
def quick(monkeypatch):
    """Make classifiers train briefly, in tests that do not depend on their accuracy."""
    monkeypatch.setattr(classifier, "STEPS", 30)


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


@pytest.fixture(scope="module")
def real(digits):
    return RealPictures(digits)


@pytest.fixture(scope="module")
def evaluation(runs, digits):
    return Evaluation(make_evaluation_plan(runs / "digits", samples=1000), digits)


# The metrics of real pictures, copies and noise


def test_real_pictures_are_as_good_as_real_pictures(real, digits):
    """A third of the training part, taken for samples, against its own floors."""
    some = torch.arange(0, len(real.train), 3)
    result = real.measure(real.train[some], digits.labels[real.train_index[some]])
    metrics = result.metrics
    assert result.left_out == {}
    assert list(metrics) == [*DISTANCES, "memorisation_ratio", "classification_accuracy_score"]
    for name in DISTANCES:
        figures = metrics[name]
        reach = abs(figures.ceiling - figures.floor)
        assert abs(figures.value - figures.floor) < 0.1 * reach, name
        assert 0 < result.floor_deviation[name] < 0.1 * reach, name
    assert metrics["memorisation_ratio"].value == 0
    assert metrics["memorisation_ratio"].floor == pytest.approx(1, abs=0.05)
    assert metrics["memorisation_ratio"].ceiling > 3
    score = metrics["classification_accuracy_score"]
    assert score.floor > score.value - 0.1 > 0.7
    assert score.ceiling == pytest.approx(0.1, abs=0.02)
    assert metrics["nearest_neighbour_accuracy"].ceiling > 0.99
    assert real.classifier_accuracy > 0.95


def test_wrong_labels_make_a_bad_classifier(real, digits):
    labels = digits.labels[real.train_index]
    assert real._classification(real.train, (labels + 1) % 10).value < 0.05


def test_few_pictures(digits, quick):
    """Density and coverage need six held-out pictures, everything two."""
    few = digits.__class__("few", digits.images[:8], None, None, None, 17, digits.digests[:8])
    result = RealPictures(few, held_out=0.5).measure(digits.images[20:25])
    assert result.left_out.keys() == {"density", "coverage"}
    assert "more than 5 real examples, there are 4" in result.left_out["density"]
    assert result.floor_deviation["sliced_wasserstein"] is None  # five of four pictures cannot be drawn several times
    with pytest.raises(InputError, match="0 that are held out"):
        RealPictures(few, held_out=0)


def test_a_part_of_large_data_is_used(digits, monkeypatch):
    monkeypatch.setattr(real_pictures, "MOST_TRAIN", 100)
    assert RealPictures(digits).notes == ["of 1618 training pictures, 100 are used"]
    assert RealPictures(digits).train_index[-1] == digits.split()[0][-1]


def test_in_proportion():
    assert in_proportion(torch.tensor([3, 0, 1]), 8).tolist() == [0] * 6 + [2] * 2
    assert in_proportion(torch.tensor([1, 1, 1]), 2).tolist() == [0, 1]
    for total in range(2, 60, 7):
        labels = in_proportion(torch.tensor([5, 9, 2, 11]), total)
        assert len(labels) == total
        assert np.abs(np.bincount(labels, minlength=4) - total * np.array([5, 9, 2, 11]) / 27).max() < 1


# Of a run


def test_held_out_loss_is_that_of_the_training(evaluation, runs):
    lines = [json.loads(line) for line in (runs / "digits/metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "held_out_ema" in line)
    figures, quartiles = evaluation._held_out(Ticks(1, None))
    assert figures.value == pytest.approx(last["held_out_ema"], rel=1e-6)
    assert quartiles == pytest.approx(last["held_out_ema_quartiles"], rel=1e-6)
    assert figures.floor == pytest.approx(figures.value, rel=0.1)
    assert figures.value < figures.ceiling


@pytest.mark.parametrize("name", ["digits", "plain"])
def test_bits_per_dim_is_the_bound(name, runs, digits):
    """Against all terms for all held-out pictures."""
    evaluation = Evaluation(make_evaluation_plan(runs / name, samples=250), digits)
    part = evaluation._parts[0]
    x0, model = evaluation._inputs(part)
    expected = evaluation.process.bits_per_dim(model, x0, torch.Generator().manual_seed(1), clip=(-1, 1)).mean().item()
    assert evaluation._bound(part, Ticks(1, None)) == pytest.approx(expected, rel=0.02)
    assert evaluation._bound(part, Ticks(1, None)) == evaluation._bound(part, Ticks(1, None))


def test_bits_per_dim_by_the_ode(evaluation):
    part = evaluation._parts[0][:20]
    x0, model = evaluation._inputs(part)
    expected = evaluation.process.bits_per_dim_ode(model, x0, torch.Generator().manual_seed(1), probes=6).mean()
    assert evaluation._ode(part, Ticks(1, None)) == pytest.approx(expected.item(), rel=0.05)


def test_the_command(runs, digits, diffgen_, quick):
    heard = []

    class Recorder(Listener):
        def progress(self, *call):
            heard.append(call)

    options = {"samples": 60, "seed": 3, "steps": 3}
    code, out, err = diffgen_(
        "evaluate", runs / "digits", "--data", "digits", "--samples", 60, "--seed", 3, "--steps", 3, "-o", "found/",
        "--ode", "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    result = document["result"]
    assert (document["schema"], document["command"]) == ("diffgen.result/1", "evaluate")
    names = ["memorisation_ratio", "classification_accuracy_score", "held_out_loss", "bits_per_dim", "bits_per_dim_ode"]
    assert list(result["metrics"]) == [*DISTANCES, *names]
    for name, figures in result["metrics"].items():
        assert figures.keys() == {"value", "floor", "ceiling"}, name
        assert all(math.isfinite(value) for value in figures.values()), name
    assert result["metrics"]["bits_per_dim"]["ceiling"] == pytest.approx(math.log2(17))
    assert (result["run"], result["step"], result["samples"], result["steps"]) == ("digits", 30, 60, 3)
    assert result["data"] == {"name": "digits", "train": 1618, "test": 179}
    assert json.loads(Path("found/evaluation.json").read_text()) == result
    assert Image.open("found/neighbours.png").width > 300
    assert result["files"] == ["found/neighbours.png", "found/evaluation.json"]

    again = asdict(evaluate(runs / "digits", digits, **options, listener=Recorder()))
    same = result["metrics"] | {}
    del same["bits_per_dim_ode"]
    assert again["metrics"] == same
    assert all(0 <= done <= total for done, total, _ in heard)
    assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)

    code, _, err = diffgen_("evaluate", runs / "digits", "--data", "digits", "-o", "found/")
    assert code == 6
    assert "neighbours.png: it exists" in err


def test_without_classes(runs, diffgen_, quick):
    code, out, err = diffgen_(
        "evaluate", runs / "plain", "--data", "digits", "--samples", 30, "--no-bits", "-o", "n.png"
    )
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["metric", *DISTANCES, "memorisation_ratio", "held_out_loss"]
    assert lines[0].split() == ["metric", "value", "floor", "ceiling", "better"]
    assert lines[-2:] == ["classification_accuracy_score is left out: the run has no classes", "n.png"]
    assert "30 samples" in err
    assert Image.open("n.png").mode == "RGB"


def test_samples_are_those_of_generate(evaluation, runs):
    """Sample i is the picture of its class with seed + i."""
    plan = make_evaluation_plan(runs / "digits", samples=30, seed=7)
    other = Evaluation(plan, evaluation.data)
    other.samples = other._sample(Ticks(1, None))
    i = 17
    (picture,) = other.generator.generate(str(other.labels[i].item()), seed=7 + i)
    values = np.rint(np.asarray(picture, dtype=float) * 16 / 255)
    assert np.mean(values == other.samples[i, 0].numpy()) > 0.95
    assert other.samples.dtype == torch.uint8


def test_neighbours(real):
    """Copies have the distance 0 and are shown first; the picture has a pair for each sample, up to 32."""
    samples = torch.cat([real.noise(3), real.train[5:6]])
    distance, number = real.nearest(samples)
    assert (distance[3], number[3]) == (0, 5)
    sheet = np.asarray(neighbours(real, samples))
    of_copy = np.kron(np.rint(real.train[5, 0].numpy() * (255 / 16)), np.ones((9, 9)))
    top = next(y for y in range(60) if np.array_equal(sheet[y : y + 72, 6:78, 0], of_copy))
    assert np.array_equal(sheet[top + 75 : top + 147, 6:78, 0], of_copy)
    assert neighbours(real, real.noise(100)).size == neighbours(real, real.noise(32)).size


# What is refused


@pytest.fixture
def pictures(tmp_path):
    """Ten classes of grey 8x8 pictures, twelve each."""
    values = np.random.default_rng(0).integers(0, 256, (10, 12, 8, 8), dtype=np.uint8)
    for label, group in enumerate(values):
        (folder := tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i, picture in enumerate(group):
            Image.fromarray(picture).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_other_data_is_refused(runs, pictures, diffgen_):
    code, _, err = diffgen_("evaluate", runs / "digits", "--data", pictures)
    assert code == 3
    assert "was trained on other pictures: digits, 1797 of them; pictures has 120" in err
    assert "--any-data" in err
    code, _, err = diffgen_("evaluate", runs / "digits", "--data", pictures, "--any-data")
    assert code == 3
    assert "levels: 256; the run's: 17" in err


def test_other_data_that_fits(runs, digits, quick):
    """Without its last hundred pictures it is other data; a run cannot have memorised other data."""
    other = digits.__class__(
        "fewer", digits.images[:-100], digits.labels[:-100], digits.classes, None, 17, digits.digests[:-100]
    )
    plan = make_evaluation_plan(runs / "digits", samples=30, bits=False)
    with pytest.raises(InputError, match="other pictures"):
        data_of(plan, other)
    result = evaluate(runs / "digits", other, samples=30, bits=False, any_data=True)
    assert "trained on other pictures" in result.left_out["memorisation_ratio"]
    assert "bits_per_dim" not in result.metrics
    letters = digits.__class__("letters", digits.images, digits.labels, list("abcdefghij"), None, 17, digits.digests)
    with pytest.raises(InputError, match="letters does not fit digits: its classes: a, b, c"):
        evaluate(runs / "digits", letters, samples=30, any_data=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "is not a run"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (lambda run: (run / "checkpoints/30/ema.safetensors").write_bytes(b"x"), "has no checkpoint to read"),
        (lambda run: (run / "run.json").write_text("{}"), "schema"),
    ],
)
def test_a_wrong_run(runs, tmp_path, diffgen_, change, message):
    run = Path(shutil.copytree(runs / "digits", tmp_path / "copy"))
    change(run)
    code, _, err = diffgen_("evaluate", run, "--data", "digits")
    assert code == 3
    assert message in err


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--samples", "1"], 2),
        (["--samples", "many"], 2),
        (["--steps", "0"], 2),
        (["--batch-size", "0"], 2),
        (["--seed", "-1"], 2),
        (["--scheduler", "eular"], 2),
        (["--guidance", "nan"], 2),
        (["--grid", "nothing.json"], 3),
        (["--device", "gpu"], 2),
        (["--data", "digitz"], 3),
        (["-o", "found.jpg"], 2),
        (["-o", "nowhere/found.png"], 6),
    ],
)
def test_wrong_options(runs, diffgen_, options, code):
    exit_code, out, err = diffgen_("evaluate", runs / "digits", "--data", "digits", *options)
    assert (exit_code, out) == (code, "")
    assert err.startswith("error: ") or options[0] == "--data"


def test_guidance_without_classes(runs):
    with pytest.raises(UsageError, match="trained without classes"):
        make_evaluation_plan(runs / "plain", guidance=2)


def test_an_unknown_keyword(runs):
    with pytest.raises(UsageError, match="evaluate takes no keyword 'sampels'") as excinfo:
        diffgen.evaluate(runs / "digits", "digits", sampels=3)
    assert excinfo.value.hint == "did you mean 'samples'?"


def test_an_unknown_keyword_is_named_before_a_missing_argument(runs):
    with pytest.raises(UsageError, match="evaluate takes no keyword 'dta'") as excinfo:
        diffgen.evaluate(run=runs / "digits", dta="digits")
    assert excinfo.value.hint == "did you mean 'data'?"
    with pytest.raises(UsageError, match="evaluate: missing a required argument: 'data'"):
        diffgen.evaluate(runs / "digits")
    with pytest.raises(UsageError, match="tune takes no keyword 'schedulr'"):
        diffgen.tune(model="mixture", schedulr="euler", nfe=5)
