"""reproduce: identical pixels for every way of generation, and the reason where pixels differ."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import diffgen
from diffgen.errors import InputError
from diffgen.images.metadata import encode_png
from diffgen.images.pixels import pixels_sha256
from diffgen.models import gate
from diffgen.models.by_hash import find_by_hash, network_hash
from diffgen.models.find import find, predicting
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import make_plan
from diffgen.reproduce import reproduce

Result = tuple[int, str, str]
OPTIONS: dict[str, Any] = {"seed": 11, "steps": 4}


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    return diffgen.load("emoji", device="cpu")


@pytest.fixture(scope="module")
def folder(generator: ImageGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input files of pictures: start.png, mask.png, ink.safetensors."""
    folder = tmp_path_factory.mktemp("from")
    y, x = np.mgrid[:64, :64] / 63
    Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x)], -1).astype(np.uint8)).save(folder / "start.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    weight = generator.pipeline.unet.state_dict()
    name = next(key.removesuffix(".weight") for key in weight if key.endswith("attn2.to_q.weight"))
    rows, columns = weight[f"{name}.weight"].shape
    random = torch.Generator().manual_seed(0)
    low = {
        f"unet.{name}.lora_A.weight": torch.randn(2, columns, generator=random),
        f"unet.{name}.lora_B.weight": torch.randn(rows, 2, generator=random),
    }
    save_file(low, folder / "ink.safetensors")
    return folder


def write_picture(generator: Any, path: Path, prompt: str = "a red apple", **options: Any) -> dict[str, Any]:
    """Write a picture to a file, as the command does; return its record."""
    picture = next(iter(generator.pictures(make_plan(generator.model, [prompt], **{**OPTIONS, **options}))))
    path.write_bytes(encode_png(picture.image, picture.record))
    return picture.record


@pytest.fixture(scope="module")
def apple(generator: ImageGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apple") / "apple.png"
    write_picture(generator, path)
    return path


WAYS: dict[str, dict[str, Any]] = {
    "text": {
        "negative": "blue",
        "scheduler": "DPM++ 2M SDE Heun",
        "grid": "exponential",
        "guidance": 3,
        "clip_skip": 2,
    },
    "image": {"image": "start.png", "strength": 0.6},
    "mask": {"image": "start.png", "mask": "mask.png"},
    "outpaint": {"image": "start.png", "outpaint": "0,0,16,0"},
    "lora": {"loras": ["ink.safetensors:0.5"]},
    "upscale": {"upscale": 1.5, "upscale_strength": 0.4, "size": "48x64"},
    "variation": {"variation_seed": 3, "variation_strength": 0.4, "scheduler": "euler_ancestral", "tile": True},
    "wildcards": {"prompt": "a {red|green|blue} \\{apple\\}", "prompt_syntax": "a1111", "guidance_interval": "0.2,0.8"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_reproduced_with_identical_pixels(
    way: str, generator: ImageGenerator, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the picture and its input files are in the folder."""
    for name in ("start.png", "mask.png", "ink.safetensors"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    record = write_picture(generator, Path("x.png"), **WAYS[way])
    generator._adapt(make_plan(generator.model, ["a"]))  # removes the LoRA from the shared generator
    monkeypatch.chdir("/")
    result = reproduce(tmp_path / "x.png")
    assert (result.identical, result.max_difference, result.differing_pixels, result.reason) == (True, 0, 0, None)
    assert result.record["pixels_sha256"] == record["pixels_sha256"] == pixels_sha256(result.image)
    assert {**result.record, "template": None, "warnings": []} == {**record, "template": None, "warnings": []}


def test_a_controlnet_and_an_embedding(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny random pipeline. The ControlNet is a folder, identified by its weights."""
    from diffusers import ControlNetModel

    generator: Any = diffgen.load(str(tiny), device="cpu")
    torch.manual_seed(5)
    network = ControlNetModel.from_unet(generator.pipeline.unet, conditioning_channels=3)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.chdir(tmp_path)
    network.save_pretrained("net")
    save_file({"emb_params": torch.randn(1, 16)}, "cat.safetensors")
    shutil.copy(folder / "start.png", "start.png")
    options = {"controls": ["canny=start.png:0.7"], "control_models": ["net"], "embeddings": ["<cat>=cat.safetensors"]}
    record = write_picture(generator, Path("x.png"), prompt="a <cat>", size=32, **options)
    assert (len(record["controls"]), len(record["embeddings"])) == (1, 1)
    assert reproduce("x.png", str(tiny)).identical
    shutil.move("net", "other")
    with pytest.raises(InputError, match="the ControlNet for canny"):
        reproduce("x.png", str(tiny))
    assert reproduce("x.png", str(tiny), files=["other"]).identical


def test_a_grid_that_is_a_file(generator: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"schema": "diffgen.grid/1", "solver": "euler", "nfe": 3, "times": [999.0, 500.0, 100.0]}
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(times))
    record = write_picture(generator, Path("x.png"), grid="mine.json", steps=3, scheduler="euler")
    assert (record["grid"], record["grid_sha256"]) == ("mine.json", gate.sha256_of(Path("mine.json")))
    assert reproduce("x.png").identical
    Path("mine.json").write_text(json.dumps(times | {"times": [999.0, 400.0, 100.0]}))
    with pytest.raises(InputError, match="another content"):
        reproduce("x.png")


def test_the_command(diffgen_: Callable[..., Result], apple: Path) -> None:
    code, out, err = diffgen_("reproduce", apple, "-o", "again.png")
    assert (code, out) == (0, "identical pixels\n"), err
    with Image.open("again.png") as again, Image.open(apple) as first:
        assert again.tobytes() == first.tobytes()
    assert diffgen_("reproduce", apple, "-o", "again.png")[0] == 6  # before any work


def test_one_changed_pixel(diffgen_: Callable[..., Result], apple: Path, tmp_path: Path) -> None:
    with Image.open(apple) as image:
        text = image.info["diffgen"]
        changed = image.convert("RGB")
    r, g, b = changed.getpixel((5, 6))  # type: ignore[misc]
    changed.putpixel((5, 6), (r, (g + 9) % 256 if g < 247 else g - 9, b))
    path = tmp_path / "changed.png"
    path.write_bytes(encode_png(changed, json.loads(text)))
    code, out, err = diffgen_("reproduce", path, "--json")
    assert code == 5, err
    document = json.loads(out)
    assert (document["ok"], document["error"]["code"]) == (False, 5)
    result = document["result"]
    assert (result["identical"], result["max_difference"], result["differing_pixels"]) == (False, 9, 1)
    assert "changed after the picture was made" in result["reason"]
    assert "1 of 4096 pixels" in err


def test_reasons_for_a_difference(apple: Path, tmp_path: Path) -> None:
    """A picture of another prompt, under a record of other versions and another dtype."""
    with Image.open(apple) as image:
        record = json.loads(image.info["diffgen"])
        pixels = image.convert("RGB")
    record |= {"prompt": "a banana", "threads": 1, "memory": {"vae_dtype": "float32"}}
    record["versions"] |= {"torch": "2.8.0", "diffusers": "0.30.0"}
    record["model_files"] |= {"vae:diffusion_pytorch_model.safetensors": "0" * 64}
    path = tmp_path / "other.png"
    path.write_bytes(encode_png(pixels, record))
    result = reproduce(path)
    assert not result.identical
    assert (result.max_difference or 0) > 20
    assert (result.differing_pixels or 0) > 1000
    assert result.reason is not None
    for part in (
        f"torch 2.8.0 → {torch.__version__}",
        "diffusers 0.30.0 → ",
        "memory {'vae_dtype': 'float32'} → {}",
        "vae:diffusion_pytorch_model.safetensors of the model is another file",
    ):
        assert part in result.reason
    assert "threads" not in result.reason  # reproduce uses the recorded number


def test_another_size(apple: Path, tmp_path: Path) -> None:
    with Image.open(apple) as image:
        path = tmp_path / "small.png"
        path.write_bytes(encode_png(image.convert("RGB").resize((32, 32)), json.loads(image.info["diffgen"])))
    result = reproduce(path)
    assert (result.identical, result.max_difference, result.differing_pixels) == (False, None, None)
    assert "32x32 and 64x64" in str(result.reason)


def test_a_missing_model_is_an_error(diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    record = write_picture(diffgen.load(str(tiny), device="cpu"), tmp_path / "x.png")
    code, _, err = diffgen_("reproduce", "x.png")
    assert code == 3
    assert record["model_hash"][:10] in err
    assert "-m MODEL" in err
    assert diffgen_("reproduce", "x.png", "-m", tiny)[:2] == (0, "identical pixels\n")
    code, _, err = diffgen_("reproduce", "x.png", "-m", "emoji")
    assert code == 3
    assert "another model" in err


def test_a_model_of_the_users_list(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "diffgen").mkdir()
    (tmp_path / "diffgen" / "models.toml").write_text(f'gone = "/nowhere/at/all"\nmine = "{tiny}"\n')
    model = find(str(tiny))
    match = find_by_hash(network_hash(model), "sd1")
    assert match is not None
    assert (match.name, match.folder) == ("mine", tiny)
    assert find_by_hash(network_hash(model), "sdxl") is None
    assert find_by_hash("0" * 64) is None
    emoji = find_by_hash(network_hash(find("emoji")))
    assert emoji is not None
    assert emoji.bundled


def test_a_file_in_the_list_that_does_not_say_what_it_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of its pictures say it. A family with only one kind of prediction ignores them."""
    import original_layout
    from tiny import build

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "diffgen").mkdir()
    (tmp_path / "diffgen" / "models.toml").write_text(
        "".join(f'{f} = "{tmp_path}/{f}.safetensors"\n' for f in ("a", "b"))
    )
    for name, family in (("a", "sd2"), ("b", "sd3")):
        original_layout.write(build(tmp_path / family, family=family), tmp_path / f"{name}.safetensors", family)
    digest = network_hash(predicting(find("a"), "epsilon"))
    assert find_by_hash(digest, "sd2") is None
    match = find_by_hash(digest, "sd2", "epsilon")
    assert match is not None
    assert (match.name, match.prediction) == ("a", "epsilon")
    match = find_by_hash(network_hash(find("b")), "sd3", "epsilon")
    assert match is not None
    assert (match.name, match.prediction) == ("b", None)


def test_a_model_in_the_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache names files by their hashes, so the file is not read."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    digest = network_hash(find(str(tiny)))
    root = tmp_path / "models--org--tiny"
    snapshot = root / "snapshots" / ("a" * 40)
    shutil.copytree(tiny, snapshot)
    (root / "blobs").mkdir()
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(root / "blobs" / digest)
    weights.symlink_to(root / "blobs" / digest)
    match = find_by_hash(digest, "sd1")
    assert match is not None
    assert (match.name, match.source) == ("org/tiny", "cache")


def test_input_files_are_identified_by_their_hashes(
    generator: ImageGenerator, folder: Path, diffgen_: Callable[..., Result], tmp_path: Path
) -> None:
    write_picture(generator, tmp_path / "x.png", image=str(folder / "start.png"), strength=0.5)
    code, _, err = diffgen_("reproduce", "x.png")
    assert code == 3
    assert "'start.png'" in err
    assert "--image" in err
    with Image.open(folder / "start.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save("start.png")
    code, _, err = diffgen_("reproduce", "x.png")
    assert code == 3
    assert "another content" in err
    assert diffgen_("reproduce", "x.png", "--image", "nothing.png")[0] == 3
    shutil.copy(folder / "start.png", "renamed.png")
    assert diffgen_("reproduce", "x.png", "--image", "renamed.png")[:2] == (0, "identical pixels\n")


def test_a_picture_from_a_picture_in_memory(generator: ImageGenerator, folder: Path, tmp_path: Path) -> None:
    """An image that was not a file is identified by its pixels."""
    with Image.open(folder / "start.png") as image:
        write_picture(generator, tmp_path / "x.png", image=image, strength=0.5)
    with pytest.raises(InputError, match="the picture to begin with"):
        reproduce(tmp_path / "x.png")
    assert reproduce(tmp_path / "x.png", files=[folder / "start.png"]).identical


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cut": ["prompt"], "model_hash": "0" * 64}, "not complete"),
        ({"seed": None}, "does not say its seed"),
        ({"scheduler": "nothing"}, "cannot be reproduced"),
        ({"seed": 2**40}, "cannot be reproduced"),
        ({"quantize": "int4"}, "cannot be reproduced: --quantize"),
        ({"scheduler_options": [1]}, "impossible scheduler_options"),
        ({"cut": 7}, "impossible cut"),
        ({"prediction": [1]}, "impossible prediction"),
        ({"refiner_hash": "0"}, "impossible refiner_hash"),
        ({"grid": "..json"}, "the grid"),
        ({"refiner": "nothing"}, "refiner"),
        ({"loras": [{"name": "..", "sha256": "0" * 64, "scale": 1}]}, "the LoRA"),
    ],
)
def test_invalid_records_are_refused(apple: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with Image.open(apple) as image:
        text = PngInfo()
        text.add_text("diffgen", json.dumps(json.loads(image.info["diffgen"]) | change))
        image.save(path := tmp_path / "x.png", pnginfo=text)
    with pytest.raises(InputError, match=word):
        reproduce(path)


def test_runs_are_found_by_the_hash_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of an older checkpoint: the run is found by its name, the checkpoint by its hash."""
    from training_runs import run, write_config

    code, _, err = run(tmp_path, "train", "digits", "-o", "dig", "--config", write_config(tmp_path, steps=20))
    assert code == 0, err
    generator: Any = diffgen.load(str(tmp_path / "dig"), device="cpu")
    from diffgen.training.plan import make_plan as run_plan

    steps = [folder.name for folder in generator.run.checkpoints()]
    older = type(generator)(generator.model, "cpu", checkpoint=generator.run.checkpoints()[-1])
    assert len(steps) > 1
    assert older.model_hash != generator.model_hash
    for loaded, name in ((generator, "new.png"), (older, "old.png")):
        picture = next(iter(loaded.pictures(run_plan(loaded.model, ["3"], seed=5, steps=3))))
        (tmp_path / name).write_bytes(encode_png(picture.image, picture.record))
    monkeypatch.chdir(tmp_path)
    assert reproduce("new.png").identical
    assert reproduce("old.png").identical
    Path("elsewhere").mkdir()
    shutil.move("dig", "elsewhere/moved")
    with pytest.raises(InputError, match="not among"):
        reproduce("old.png")
    assert reproduce("old.png", "elsewhere/moved").identical
    shutil.rmtree(Path("elsewhere/moved/checkpoints") / str(older.step))
    with pytest.raises(InputError, match="no checkpoint"):
        reproduce("old.png", "elsewhere/moved")


def test_the_guide(diffgen_: Callable[..., Result]) -> None:
    """Its commands run in order and print what the page shows, except what depends on the model's card."""
    page = (Path(__file__).parent.parent / "docs" / "metadata.md").read_text("utf-8")
    for block in page.split("    $ diffgen ")[1:4]:
        command, _, rest = block.partition("\n")
        code, out, err = diffgen_(*shlex.split(command))
        assert code == 0, err
        indented = itertools.takewhile(lambda line: not line.strip() or line.startswith("    "), rest.splitlines())
        shown = textwrap.dedent("\n".join(indented)).strip()
        if command.startswith("inspect"):
            own = ("guidance", "scheduler", "grid", "diffgen")
            lines, expected = ([one for one in text.splitlines() if not one.startswith(own)] for text in (out, shown))
            assert [one.split() for one in lines if one] == [one.split() for one in expected if one]
            assert out.splitlines()[-1].startswith(shown.splitlines()[-1].partition(" --guidance")[0])
        elif command.startswith("reproduce"):
            assert out.strip() == shown
