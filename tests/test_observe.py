"""Intermediate results: what each evaluation predicts, attention maps of words, a preview in a real terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import terminal
import tiny as models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

import diffgen
from diffgen.errors import InvalidOutput, UsageError
from diffgen.images import heat, preview
from diffgen.images import strip as strips
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import make_plan
from diffgen.pipelines.sampling import sketch as observe
from diffgen.pipelines.sampling.embed import places

ROOT = Path(__file__).parent.parent
APPLE = "a red apple, flat style"
Result = tuple[int, str, str]


@pytest.fixture(scope="module")
def emoji() -> ImageGenerator:
    return diffgen.load("emoji", device="cpu")


def generate_pictures(generator: Any, prompt: Any = APPLE, **options: Any) -> Any:
    seed = {} if "seeds" in options else {"seed": 7}
    plan = make_plan(generator.model, prompt, **(seed | options))
    return list(generator.pictures(plan))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# What each evaluation predicts


@pytest.mark.parametrize(("scheduler", "steps", "nfe"), [("dpmpp_2m", 7, 7), ("heun", 4, 7), ("euler_ancestral", 3, 3)])
def test_the_last_evaluation_predicts_the_picture(emoji: ImageGenerator, scheduler: str, steps: int, nfe: int) -> None:
    """These solvers end with a step of Euler to σ = 0, where the next state is the predicted picture itself."""
    (picture,) = generate_pictures(emoji, scheduler=scheduler, steps=steps, keep_steps=True)
    assert [step.evaluation for step in picture.steps] == list(range(1, nfe + 1))
    assert picture.record["nfe"] == nfe
    assert abs(pixels(picture.steps[-1].image) - pixels(picture.image)).max() <= 1
    assert abs(pixels(picture.steps[0].image) - pixels(picture.image)).max() > 30
    expected = emoji.scheduler(make_plan(emoji.model, APPLE, scheduler=scheduler, steps=steps))
    expected.set_timesteps(steps)
    assert [step.t for step in picture.steps] == pytest.approx(expected.timesteps.tolist())
    (plain,) = generate_pictures(emoji, scheduler=scheduler, steps=steps)
    assert (plain.steps, plain.image.tobytes()) == ((), picture.image.tobytes())


def test_each_picture_of_a_batch_has_its_own_steps(emoji: ImageGenerator) -> None:
    together = generate_pictures(emoji, seeds="3,9", batch_size=2, steps=3, keep_steps=True)
    alone = [generate_pictures(emoji, seed=seed, steps=3, keep_steps=True)[0] for seed in (3, 9)]
    for a, b in zip(together, alone, strict=True):
        for x, y in zip(a.steps, b.steps, strict=True):
            assert abs(pixels(x.image) - pixels(y.image)).max() <= 1


def test_pixel_models_have_steps_too(tmp_path: Path) -> None:
    from test_training_generate import make_run

    from diffgen.training import plan as runs

    make_run(tmp_path / "run", classes=["cat", "dog"])
    run: Any = diffgen.load(tmp_path / "run", device="cpu")
    calls: list[Any] = []
    plan = runs.make_plan(run.model, "dog", count=2, batch_size=2, seed=1, steps=4, keep_steps=True)
    pictures = list(run.pictures(plan, on_denoised=lambda shots, i, x0: calls.append((len(shots), i, x0.shape[0]))))
    assert calls == [(2, i, 2) for i in range(4)]
    for picture in pictures:
        assert picture.steps[-1].image.tobytes() == picture.image.tobytes()
        assert len(picture.steps) == picture.record["nfe"] == 4
    folder = models.build(tmp_path / "u", family="unconditional")
    (picture,) = generate_pictures(diffgen.load(str(folder), device="cpu"), (), steps=3, keep_steps=True)
    assert abs(pixels(picture.steps[-1].image) - pixels(picture.image)).max() <= 1
    assert len(picture.steps) == 3


def test_inpainting_keeps_what_is_outside_the_mask_in_every_step(emoji: ImageGenerator) -> None:
    photo, mask = Image.new("RGB", (64, 64), (10, 200, 30)), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    (picture,) = generate_pictures(emoji, image=photo, mask=mask, steps=3, keep_steps=True)
    assert all((pixels(step.image)[:, :32] == (10, 200, 30)).all() for step in picture.steps)


@given(st.integers(1, 40), st.sampled_from([(8, 8), (64, 64), (100, 30), (20, 90), (700, 300)]))
@settings(deadline=None, max_examples=12)
def test_a_strip_and_a_gif_hold_every_step(count: int, size: tuple[int, int]) -> None:
    steps = [strips.Step(Image.new("RGB", size, (5 * i, 90, 40)), i + 1, 999 - i) for i in range(count)]
    strip = strips.strip(steps)
    assert strip.width <= max(strips.WIDTH, 256 + 2 * strips.GAP)
    colours = {tuple(colour) for row in pixels(strip)[::7, ::7] for colour in row.tolist()}
    assert {(5 * i, 90, 40) for i in range(count)} <= colours
    gif: Any = Image.open(io.BytesIO(strips.animation(steps)))
    assert getattr(gif, "n_frames", 1) == count
    assert gif.info.get("loop", 0) == 0
    for i in range(count):
        gif.seek(i)
        assert abs(pixels(gif.convert("RGB"))[3, 3] - (5 * i, 90, 40)).max() <= 3
    with pytest.raises(ValueError, match="without evaluations"):
        strips.strip([])


# Attention


def independent(generator: ImageGenerator, **options: Any) -> tuple[np.ndarray, Any]:
    """The mean attention [tokens, h, w] of the second half of the batch, from hooks on q and k; and the picture."""
    layers: list[torch.Tensor] = []
    unet = generator.pipeline.unet
    latest: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in unet.named_modules():
        if not name.endswith("attn2"):
            continue
        hooks.append(layer.to_q.register_forward_hook(lambda m, i, out, n=name: latest.__setitem__(n, out)))

        def keys(module: Any, inputs: Any, out: torch.Tensor, name: str = name, heads: int = layer.heads) -> None:
            q, k = (x[-1].unflatten(-1, (heads, -1)).double() for x in (latest[name], out))  # [length, heads, width]
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            share = scores.exp() / scores.exp().sum(-1, keepdim=True)
            side = round(share.shape[1] ** 0.5)
            layers.append(share.mean(0).T.reshape(1, -1, side, side))

        hooks.append(layer.to_k.register_forward_hook(keys))
    try:
        (picture,) = generate_pictures(generator, **options)
    finally:
        for hook in hooks:
            hook.remove()
    side = max(maps.shape[-1] for maps in layers)
    large = [torch.nn.functional.interpolate(maps, (side, side), mode="bilinear") for maps in layers]
    return torch.cat(large).mean(0).numpy(), picture


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_attention_is_softmax_of_queries_and_keys(emoji: ImageGenerator, guidance: float) -> None:
    expected, plain = independent(emoji, guidance=guidance, steps=3)
    assert expected.shape == (24, 8, 8)
    words = ["a", "red", "apple", ",", "flat", "style"]
    targets = [word for word in words if word != ","]
    before = {name: type(p).__name__ for name, p in emoji.pipeline.unet.attn_processors.items()}
    (picture,) = generate_pictures(emoji, guidance=guidance, steps=3, attention=[*targets, "flat style"])
    assert picture.image.tobytes() == plain.image.tobytes()  # recording does not change the picture
    assert {name: type(p).__name__ for name, p in emoji.pipeline.unet.attn_processors.items()} == before
    assert not emoji.pipeline.unet._forward_pre_hooks
    for word in targets:
        np.testing.assert_allclose(picture.attention[word], expected[1 + words.index(word)], atol=1e-6)
    np.testing.assert_allclose(picture.attention["flat style"], expected[5] + expected[6], atol=1e-6)
    assert picture.attention["apple"].std() > 0.001


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_attention_sums_to_one_over_the_tokens(family: str, tmp_path: Path) -> None:
    """In a batch, for each family, with latents of 5×3, which cannot be halved evenly."""
    from diffgen.generation.batching import Progress
    from diffgen.pipelines.sampling.batch import Batches

    generator = diffgen.load(str(models.build(tmp_path / "m", family=family)), device="cpu")
    assert isinstance(generator, ImageGenerator)
    options: dict[str, Any] = {"seeds": "1,2", "steps": 2, "size": (40, 24), "attention": ["apple", "red"]}
    plan = make_plan(generator.model, "a red apple", batch_size=2, **options)
    run = Batches(generator, plan, Progress([plan], lambda plan: plan.steps, None), None)
    with torch.inference_mode():
        together = list(run.make(list(plan.shots())))
        assert run.maps is not None
        for row in (0, 1):
            maps = run.maps.tokens(row)
            assert tuple(maps.shape[1:]) == ((2, 3) if family == "sdxl" else (3, 5))  # XL's first level has none
            torch.testing.assert_close(maps.sum(0), torch.ones(maps.shape[1:]), atol=1e-5, rtol=0)
            assert (maps >= 0).all()
    alone = list(generator.pictures(make_plan(generator.model, "a red apple", **options)))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.attention["apple"], b.attention["apple"], atol=1e-4)
    assert abs(alone[0].attention["apple"] - alone[1].attention["apple"]).max() > 1e-6


def test_places_are_the_positions_of_a_words_tokens(emoji: ImageGenerator) -> None:
    pipe, reads = emoji.pipeline, emoji.pipeline.tokenizer.model_max_length
    ids = pipe.tokenizer("a strawberry cake and a cake").input_ids
    cake = pipe.tokenizer("cake", add_special_tokens=False).input_ids
    assert [ids[i] for i in places(pipe, "a strawberry cake and a cake", "Cake")] == cake * 2
    assert places(pipe, "a (red:1.3) [apple]", "red apple") == [2, 3]
    assert places(pipe, "a cat BREAK a red apple", "apple") == [reads + 3]
    assert places(pipe, "a cat BREAK a red apple", "cat a") == []
    assert places(pipe, "a cat BREAK apple", "apple", "plain") != places(pipe, "a cat BREAK apple", "apple")
    long = places(pipe, "a zqxjkvzq", "zqxjkvzq")
    assert long == list(range(2, 2 + len(pipe.tokenizer("zqxjkvzq", add_special_tokens=False).input_ids)))
    assert len(long) > 1


def test_each_picture_has_the_maps_of_its_own_words(emoji: ImageGenerator) -> None:
    pictures = generate_pictures(emoji, ["a red apple", "a banana"], steps=2, attention=["apple", "banana"])
    assert [sorted(picture.attention) for picture in pictures] == [["apple"], ["banana"]]
    chosen = generate_pictures(emoji, "a {apple|banana}", steps=1, seeds="0-7", attention=["apple", "banana"])
    assert all(list(picture.attention) == [picture.prompt[2:]] for picture in chosen)
    assert len({picture.prompt for picture in chosen}) == 2


@pytest.mark.parametrize(
    ("family", "words", "text"),
    [
        ("sd1", ["pear"], "'pear' is not in the prompt"),
        ("sd1", ["apple red"], "is not in the prompt"),
        ("sd1", ["appl"], "is not in the prompt"),
        ("sd1", [" ,"], "is no word"),
        ("sd3", ["apple"], "it has no cross-attention"),
        ("flux", ["apple"], "it has no cross-attention"),
        ("unconditional", ["apple"], "--attention is not supported: m makes pictures from nothing but noise"),
    ],
)
def test_attention_of_unknown_words_and_models_is_refused_before_any_work(
    tmp_path: Path, diffgen_: Callable[..., Result], family: str, words: list[str], text: str
) -> None:
    models.build(tmp_path / "m", family=family)
    prompt = [] if family == "unconditional" else ["a red apple"]
    flags = [part for word in words for part in ("--attention", word)]
    code, out, err = diffgen_("generate", *prompt, "-m", tmp_path / "m", *flags, "--dry-run")
    assert (code, out) == (2, "")
    assert text in err
    if family == "sd1" and "no word" not in text:
        assert "a, red, apple" in err


def test_the_overlay_shows_the_map_over_the_picture() -> None:
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    values = np.zeros((8, 8), np.float32)
    values[:, 4:] = 0.3
    overlay = heat.overlay(picture, values, "apple")
    assert overlay.width == 256
    top = overlay.height - 256 - strips.LINE - 4
    low, high = (pixels(overlay)[top + 128, x] for x in (8, 248))
    for pixel, colour in ((low, heat.COLOURS[0]), (high, heat.COLOURS[-1])):
        assert abs(pixel - ((1 - heat.OPACITY) * 255 + heat.OPACITY * colour)).max() <= 1
    assert heat.overlay(picture, np.full((4, 4), 0.1, np.float32), "x" * 90).width == 256
    light = heat.coloured(np.linspace(0, 1, 50)) @ (0.299, 0.587, 0.114)
    assert (np.diff(light) > 0).all()  # readable without seeing colours


# The command


def test_the_command_writes_steps_and_attention_maps(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    line = ("generate", APPLE, "--seed", 7, "--steps", 3, "-o", "out/", "--save-steps", "seen", "--attention", "apple")
    code, out, err = diffgen_(*line, "--attention", "flat style", "--json")
    assert code == 0, err
    result = json.loads(out)["result"]
    name = "000001-7-a-red-apple-flat-style"
    assert [path.name for path in Path("out").iterdir()] == [f"{name}.png"]
    assert result["inside"] == [
        {
            "picture": f"out/{name}.png",
            "steps": [f"seen/{name}-steps.png", f"seen/{name}-steps.gif"],
            "attention": {"apple": f"attention/{name}-apple.png", "flat style": f"attention/{name}-flat-style.png"},
        }
    ]
    assert Image.open(f"attention/{name}-apple.png").width == 256
    assert Image.open(f"seen/{name}-steps.gif").n_frames == result["nfe"] == 3
    (Path("out") / f"{name}.png").unlink()
    first = Path(f"seen/{name}-steps.png").read_bytes()
    code, out, err = diffgen_(*line)
    assert (code, out) == (0, f"out/{name}.png\n")
    assert f"also written: seen/{name}-steps-1.png, seen/{name}-steps-1.gif, attention/{name}-apple-1.png" in err
    assert sorted(path.name for path in Path("seen").iterdir()) == sorted(
        f"{name}-steps{n}.{kind}" for n in ("", "-1") for kind in ("png", "gif")
    )
    assert Path(f"seen/{name}-steps.png").read_bytes() == first  # nothing was overwritten


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["-o", "out/", "--save-steps", "out"], 2, "the pictures' folder"),
        (["-o", "{prompt}/{seed}.png", "--save-steps", "x"], 2, "the pictures' folder"),
        (["-o", "out/", "--attention", "a", "--attention-out", "./out/../out"], 2, "the pictures' folder"),
        (["--save-steps", ""], 2, "--save-steps is empty"),
        (["--save-steps", "file/x"], 6, "is not a folder; choose another --save-steps"),
        (["--attention", "a", "--attention-out", "file"], 6, "is not a folder; choose another --attention-out"),
        (["--attention-out", "x"], 2, "--attention WORD"),
        (["--quantize", "int4"], 2, "--quantize must be one of none, int8"),
    ],
)
def test_an_impossible_output_is_refused_before_any_work(
    diffgen_: Callable[..., Result], tiny: Path, args: list[str], code: int, text: str
) -> None:
    Path("file").write_text("")
    exit_code, out, err = diffgen_("generate", "a", "-m", tiny, *args, "--dry-run")
    assert (exit_code, out) == (code, ""), err
    assert text in err


# The preview


@given(arrays.arrays(np.uint8, (3, 4, 3)))
@settings(deadline=None)
def test_256_colours_are_the_nearest_of_xterms(values: np.ndarray) -> None:
    cube = [(r, g, b) for r in preview.CUBE for g in preview.CUBE for b in preview.CUBE]
    palette = np.array(cube + [(8 + 10 * i,) * 3 for i in range(24)])
    distance = ((values[..., None, :].astype(int) - palette) ** 2).sum(-1)
    chosen = preview._nearest(values)
    assert (np.take_along_axis(distance, chosen[..., None] - 16, -1)[..., 0] == distance.min(-1)).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 100), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_half_blocks_stay_inside_and_keep_proportions(width: int, height: int, columns: int, rows: int) -> None:
    lines = preview.half_blocks(Image.new("RGBA", (width, height), (1, 2, 3, 0)), columns, rows)
    across = {line.count(preview.BLOCK) for line in lines}
    assert len(across) == 1
    assert 1 <= len(lines) <= rows
    assert 1 <= (w := across.pop()) <= columns
    assert w / width <= min(columns / width, 2 * rows / height) * 1.0001 or w == 1
    assert all(line.endswith(preview.RESET) and f"38;2;{preview.PAPER};" in line for line in lines)


@pytest.mark.parametrize(
    ("environ", "terminal", "encoding", "expected"),
    [
        ({"COLORTERM": "truecolor", "TERM": "xterm"}, True, "utf-8", "24bit"),
        ({"COLORTERM": "24bit"}, True, "utf-8", "24bit"),
        ({"TERM": "xterm-256color"}, True, "utf-8", "256"),
        ({"COLORTERM": "truecolor"}, False, "utf-8", None),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, True, "utf-8", None),
        ({"COLORTERM": "truecolor", "TERM": "dumb"}, True, "utf-8", None),
        ({"COLORTERM": "truecolor"}, True, "ascii", None),
        ({"COLORTERM": "truecolor"}, True, None, None),
    ],
)
def test_when_a_preview_is_shown(environ: dict[str, str], terminal: bool, encoding: str | None, expected: Any) -> None:
    assert preview.colours_of(environ, terminal, encoding) == expected


def on_a_terminal(args: list[str], folder: Path, environ: dict[str, str]) -> tuple[str, str]:
    """Run a command on a terminal of 24 lines of 80 characters; return the terminal's output and stdout."""
    here, their_end = os.openpty()
    fcntl.ioctl(their_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLORTERM", "NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", *args],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color", **environ},
        stdout=subprocess.PIPE,
        stderr=their_end,
        text=True,
    )
    os.close(their_end)
    output = bytearray()

    def read() -> None:
        try:
            while data := os.read(here, 4096):
                output.extend(data)
        except OSError:  # raised on Linux when the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    out, _ = process.communicate(timeout=120)
    reader.join(10)
    os.close(here)
    assert process.returncode == 0, output.decode()
    return output.decode(), out


def test_on_a_terminal_the_picture_is_drawn_in_place(tmp_path: Path) -> None:
    command = ["generate", APPLE, "--seed", "7", "--steps", "12", "-n", "2", "-o", "out/", "--preview"]
    output, out = on_a_terminal(command, tmp_path, {"COLORTERM": "truecolor"})
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 2  # while the model loads, and while it works
    screen = terminal.Screen(80)
    screen.write(output)
    assert screen.plain  # no colour is left on at the end
    rows = [line for line in screen.lines if any(cell[0] == preview.BLOCK for cell in line)]
    assert len(rows) == 2 * 21  # two finished pictures, without the previews before them
    assert output.count(preview.BLOCK) >= 3 * 21 * 42  # at least one preview was drawn
    for number, path in enumerate(out.split()):
        expected = pixels(Image.open(tmp_path / path).resize((42, 42), Image.Resampling.LANCZOS))
        shown = np.array([[cell[1:] for cell in line[:42]] for line in rows[21 * number : 21 * number + 21]])
        assert (shown.transpose(0, 2, 1, 3).reshape(42, 42, 3) == expected).all()
    assert "autoencoder" in screen.text


def test_other_terminals_get_256_colours(tmp_path: Path, tiny: Path) -> None:
    output, _ = on_a_terminal(["generate", "a", "-m", str(tiny), "--steps", "2", "--preview"], tmp_path, {})
    assert preview.BLOCK in output
    assert "38;5;" in output
    assert "38;2;" not in output


def test_no_preview_without_a_terminal(diffgen_: Callable[..., Result], tiny: Path) -> None:
    code, _, err = diffgen_("generate", "a", "-m", tiny, "--steps", 1, "--preview")
    assert code == 0
    assert preview.BLOCK not in err
    assert "preview" not in err


def test_the_linear_fit_gives_the_autoencoders_colours(emoji: ImageGenerator) -> None:
    """Compare the fit with the autoencoder's own decoding at the same size, on pictures outside the fit's data.

    The best matrix for just these pictures correlates at 0.89: each latent position covers eight by eight pixels.
    """
    sketch = observe.Sketch(emoji.autoencoder())
    assert sketch.exact
    fitted, expected = [], []
    with torch.inference_mode():
        for prompt in ("a red apple", "a blue heart", "a frog", "a banana"):
            latents: list[torch.Tensor] = []
            plan = make_plan(emoji.model, prompt, seed=1, steps=4)
            list(emoji.pictures(plan, on_denoised=lambda shots, i, x0, latents=latents: latents.append(x0[0].clone())))
            fitted.append(sketch.linear(latents[-1]).numpy())
            decoded = emoji.autoencoder().decode(latents[-1][None])
            expected.append(torch.nn.functional.avg_pool2d(decoded, 8)[0].numpy())
    assert fitted[0].shape == (3, 8, 8)
    assert np.corrcoef(np.ravel(fitted), np.ravel(expected))[0, 1] > 0.75


# Reports and records


def test_guidance_rescale_and_interval_are_recorded(tiny: Path) -> None:
    (image,) = diffgen.load(str(tiny), device="cpu").generate(
        "a", seed=1, steps=3, guidance=3, guidance_rescale=0.6, guidance_interval="0.2,0.8"
    )
    record = json.loads(image.info["diffgen"])
    assert (record["guidance_rescale"], record["guidance_interval"]) == (0.6, [0.2, 0.8])


@pytest.fixture(scope="module")
def checked_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Build tiny models with a safety checker that flags similarities above a threshold."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    def build(threshold: float) -> Path:
        folder = tmp_path_factory.mktemp("checked")
        torch.manual_seed(2)
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=6)).eval()
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        pipe = StableDiffusionPipeline.from_pretrained(models.build(folder / "bare"), safety_checker=None)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        pipe.register_modules(safety_checker=checker, feature_extractor=processor)
        pipe.save_pretrained(folder / "m")
        return folder / "m"

    return build


def test_safety_on_and_off_are_reported_and_recorded(
    checked_model: Callable[[float], Path], diffgen_: Callable[..., Result], tiny: Path
) -> None:
    strict, mild = checked_model(-2.0), checked_model(2.0)  # a cosine is above −2 and below 2
    model = diffgen.load(str(strict), device="cpu")
    with pytest.raises(InvalidOutput, match="flagged by the model's safety checker"):
        model.generate("a", seed=1, steps=1)
    (off,) = model.generate("a", seed=1, steps=1, safety=False)
    (on,) = diffgen.load(str(mild), device="cpu").generate("a", seed=1, steps=1)
    (none,) = diffgen.load(str(tiny), device="cpu").generate("a", seed=1, steps=1)
    records = [json.loads(image.info["diffgen"]) for image in (off, on, none)]
    assert [record.get("safety") for record in records] == ["off", "on", None]
    assert off.tobytes() == on.tobytes()
    line = ("generate", "a", "-m", strict, "--seed", 1, "--steps", 1, "--save-steps", "seen")
    code, _, err = diffgen_(*line)
    assert code == 5
    assert "safety checker on" in err
    assert not Path("seen").exists()
    code, _, err = diffgen_(*line, "--safety", "off")
    assert (code, "safety checker off" in err) == (0, True)


def test_int8_is_recorded_and_cannot_be_saved(tiny: Path) -> None:
    pytest.importorskip("torchao")
    exact, small = (diffgen.load(str(tiny), device="cpu", quantize=name) for name in ("none", "int8"))
    a, b = (model.generate("a red apple", seed=1, steps=2)[0] for model in (exact, small))
    assert 0 < abs(pixels(a) - pixels(b)).mean() < 8
    records = [json.loads(image.info["diffgen"]) for image in (a, b)]
    assert [record.get("quantize") for record in records] == [None, "int8"]
    assert "in eight bits" in small.fits[-1]
    with pytest.raises(UsageError, match="not written"):
        small.save("nowhere")


# diffgen models export


def test_models_and_runs_are_exported_as_folders(diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    import original_layout
    from test_training_generate import make_run

    original_layout.write(models.build(tmp_path / "x"), tmp_path / "x.safetensors", "sd1")
    code, out, err = diffgen_("models", "export", "x.safetensors", "folder", "--dtype", "float16", "--json")
    assert code == 0, err
    result = json.loads(out)["result"]
    assert (result["folder"], result["family"]) == ("folder", "sd1")
    assert 0 < result["bytes"] < (tmp_path / "x.safetensors").stat().st_size
    code, out, err = diffgen_("generate", "a red apple", "-m", "folder", "--steps", 1, "-o", "a.png")
    assert code == 0, err
    small: dict[str, Any] = {"width": 2, "multipliers": [1, 1], "attention": [True, False], "head_width": 2}
    make_run(tmp_path / "run", channels=3, **small)
    for weights, folder in (("ema", "net"), ("model", "raw")):
        code, out, err = diffgen_("models", "export", "run", folder, "--weights", weights)
        assert (code, out) == (0, f"{folder}\n"), err
    files = [Path(folder, "unet/diffusion_pytorch_model.safetensors").read_bytes() for folder in ("net", "raw")]
    assert files[0] != files[1]
    code, out, err = diffgen_("generate", "-m", "net", "--seed", 1, "--steps", 2, "-o", "b.png")
    assert code == 0, err
    for args, expected, text in (
        (("x.safetensors", "folder"), 6, "it exists"),
        (("nothing", "new"), 3, "nothing"),
        (("x.safetensors", "new", "--weights", "model"), 2, "for runs"),
        (("run", "new", "--dtype", "float16"), 2, "not for runs"),
    ):
        code, out, err = diffgen_("models", "export", *args)
        assert (code, out) == (expected, ""), err
        assert re.search(text, err)
    assert not Path("new").exists()
