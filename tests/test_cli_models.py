"""The commands `models` and `doctor`, on temporary files; questions are tested on a pseudo-terminal."""

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from test_models_families import SD, XL, build
from test_models_gate import UNET, make_folder
from test_models_single_file import SD1, write

from diffgen.cli import doctor as doctor_module
from diffgen.models import listed

ROOT = Path(__file__).parent.parent
COMMIT = "b" * 40


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    """A temporary cache and a temporary list."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(listed, "list_file", lambda: tmp_path / "config/models.toml")
    (tmp_path / "config").mkdir()


def result(outcome):
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out)["result"]


def test_list(diffgen_, tmp_path):
    make_folder(tmp_path / "mine")
    (tmp_path / "config/models.toml").write_text(f'mine = "{tmp_path}/mine"\ngone = "./gone"\nfar = "o/n"\n')
    build(tmp_path / "hub/models--org--name/snapshots" / COMMIT, "StableDiffusionPipeline", SD)
    build(tmp_path / "hub/models--org--video/snapshots" / COMMIT, "WanPipeline", SD)
    answer = result(diffgen_("models", "list", "--json"))
    assert [(model["name"], model["source"], model["family"]) for model in answer["models"]] == [
        ("emoji", "bundled", "sd1"),
        ("mine", "list", "sd1"),
        ("gone", "list", None),
        ("far", "list", None),
        (f"org/name@{COMMIT}", "cache", "sd1"),
        (f"org/video@{COMMIT}", "cache", None),
    ]
    problems = {model["name"]: model["problem"] for model in answer["models"]}
    assert problems["emoji"] is problems["mine"] is None
    assert "where there is no model" in problems["gone"]
    assert "WanPipeline" in problems[f"org/video@{COMMIT}"]
    assert answer["cache"]["bytes"] == sum(p.stat().st_size for p in (tmp_path / "hub").rglob("*") if p.is_file())
    code, out, err = diffgen_("models", "list")
    assert code == 0
    assert len(out.splitlines()) == 7
    assert "where there is no model" in err
    (tmp_path / "config/models.toml").write_text("a = 1")
    assert diffgen_("models", "list")[0] == 3


def test_info_of_every_kind(diffgen_, tmp_path):
    make_folder(tmp_path / "mine")
    write(tmp_path / "one.safetensors", SD1)
    answer = result(diffgen_("models", "info", "one.safetensors", "--json"))
    assert (answer["family"], answer["source"], answer["resolution"]) == ("sd1", "file", 512)
    assert answer["family_defaults"] == {
        "steps": 25,
        "guidance": 7.5,
        "scheduler": "dpmpp_2m",
        "grid": None,
        "size": None,
    }
    answer = result(diffgen_("models", "info", "mine", "--json"))
    assert {"folder", "family", "bytes", "licence", "resolution"} <= set(answer)
    assert diffgen_("models", "info", "mine")[1].startswith("name")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": (4, 9), "lora_unet_x.lora_up.weight": (9, 4)})
    code, _, err = diffgen_("models", "info", "lora.safetensors")
    assert code == 3
    assert "not a checkpoint diffgen can read: lora.safetensors has 2 tensors named lora_unet_*: it is a LoRA" in err
    assert "--lora lora.safetensors" in err


def test_the_bundled_model_matches_its_card(diffgen_):
    states = {file["path"]: file["state"] for file in result(diffgen_("models", "verify", "--json"))["files"]}
    assert {state for path, state in states.items() if path.endswith(".safetensors")} == {"right"}


def test_verify_against_a_card(diffgen_, tmp_path):
    folder = make_folder(tmp_path / "mine")
    files = [path for path in folder.rglob("*") if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    answer = result(diffgen_("models", "verify", "mine", "--json"))
    assert {file["path"]: file["sha256"] for file in answer["files"]} == hashes
    assert {file["state"] for file in answer["files"]} == {"not recorded"}
    (folder / "card.json").write_text(json.dumps({"sha256": hashes}))
    answer = result(diffgen_("models", "verify", "mine", "--json"))
    assert {file["state"] for file in answer["files"]} == {"right"}
    weights = bytearray((folder / "unet" / UNET).read_bytes())
    weights[-1] ^= 1
    (folder / "unet" / UNET).write_bytes(weights)
    code, out, err = diffgen_("models", "verify", "mine")
    assert code == 3
    assert f"not as recorded: unet/{UNET};" in err
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("wrong")] == [f"unet/{UNET}"]
    code, out, _ = diffgen_("models", "verify", "mine", "--json")
    document = json.loads(out)
    assert (code, document["ok"], len(document["result"]["files"])) == (3, False, len(files))
    for wrong in ({"sha256": 1}, {"sha256": {"a": 1}}):
        (folder / "card.json").write_text(json.dumps(wrong))
        assert diffgen_("models", "verify", "mine")[0] == 3
    (folder / "unet" / UNET).write_bytes(b"damaged")
    assert diffgen_("models", "verify", "mine")[0] == 3


def test_rm_removes_entries_and_never_deletes_a_folder(diffgen_, tmp_path):
    make_folder(tmp_path / "mine")
    text = f'mine = "{tmp_path}/mine"\nother = "./x"\n'
    (tmp_path / "config/models.toml").write_text(text)
    code, _, err = diffgen_("models", "rm", "mine")
    assert (code, "--yes" in err) == (2, True)
    assert result(diffgen_("models", "rm", "mine", "--dry-run", "--json"))["dry_run"] is True
    assert (tmp_path / "config/models.toml").read_text() == text
    assert diffgen_("models", "rm", "mine", "-y")[:2] == (0, "mine\n")
    assert (tmp_path / "config/models.toml").read_text() == 'other = "./x"\n'
    for name, match in (
        ("emoji", "comes with diffgen"),
        ("mine", "yours to delete"),
        ("a/b", "neither"),
        ("../x", "n"),
    ):
        code, _, err = diffgen_("models", "rm", name, "-y")
        assert (code, match in err) == (3, True), err
    assert (tmp_path / "mine/unet" / UNET).is_file()


def test_doctor(diffgen_, tmp_path, monkeypatch):
    answer = result(diffgen_("doctor", "--json"))
    assert answer["problems"] == []
    assert answer["models"] == ["emoji (bundled)"]
    assert answer["device"]["device"] in ("cpu", "cuda", "mps")
    assert answer["device"]["ram"] > 2**28
    assert answer["places"]["pictures"]["writable"] is True
    code, out, _ = diffgen_("doctor")
    assert code == 0
    assert 'diffgen generate "a red apple"' in out
    monkeypatch.setitem(doctor_module.FLOORS, "torch", "99.1")
    monkeypatch.setitem(doctor_module.FLOORS, "no-such-package-at-all", "1.0")
    monkeypatch.setattr("diffgen.models.find.BUNDLED", tmp_path / "nowhere")
    code, out, err = diffgen_("doctor", "--json")
    document = json.loads(out)
    assert (code, document["error"]["code"]) == (1, 1)
    assert [problem.split()[0] for problem in document["result"]["problems"]] == [
        "torch",
        "no-such-package-at-all",
        "the",
    ]
    code, out, err = diffgen_("doctor")
    assert (code, out.count("\nproblem"), "Traceback" in err) == (1, 3, False)


ASK = """
import sys
from diffgen.cli.models import offer_pull
from diffgen.cli.output import Output
from diffgen.errors import DiffgenError
try:
    print(offer_pull(sys.argv[1], Output("generate")).source)
except DiffgenError as error:
    print(type(error).__name__, error.message)
"""


def on_a_terminal(answer, *command, **environment):
    """The output of a command on a terminal where the user types an answer."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    os.write(ours, answer)
    output = b""
    try:
        while block := os.read(ours, 4096):
            output += block
    except OSError:  # the other end is closed
        pass
    process.wait()
    os.close(ours)
    return output.decode()


def test_a_terminal_asks_first(tmp_path):
    hub = Hub()
    for name in ("name", "second"):
        hub.add(f"org/{name}", make_folder(tmp_path / name))
    parts = {name: pair for name, pair in XL.items() if name not in ("text_encoder", "tokenizer")}
    hub.add("org/refiner", build(tmp_path / "refiner", "StableDiffusionXLImg2ImgPipeline", parts))
    xl = build(tmp_path / "xl", "StableDiffusionXLPipeline", XL, scheduler={"beta_schedule": "scaled_linear"})
    (xl / "vae/config.json").write_text('{"block_out_channels": [4, 4]}')
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "TERM": "dumb"}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **home}
    output = on_a_terminal(b"n\n", "-c", ASK, "org/name", **environment)
    assert "creativeml-openrail-m" in output
    assert "Fetch" in output
    assert "NotCached" in output
    assert hub.fetched() == ["model_index.json"]
    output = on_a_terminal(b"y\n", "-c", ASK, "org/name", **environment)
    assert output.rstrip().endswith("cache")
    output = on_a_terminal(b"n\n", "-m", "diffgen", "generate", "a cat", "-m", "org/second", **environment)
    assert "org/second@" in output
    assert "error: there is no folder 'org/second'" in output
    with_refiner = (
        "-m",
        "diffgen",
        "generate",
        "a cat",
        "-m",
        str(tmp_path / "xl"),
        "-s",
        "64",
        "--dry-run",
        "--refiner",
    )
    output = on_a_terminal(b"y\n", *with_refiner, "org/refiner", **environment)
    assert "Fetch" in output
    assert "error" not in output
    output = on_a_terminal(b"y\n", *with_refiner, "org/second", **environment)
    assert "not sdxl-refiner" in output
    assert "Fetch" not in output
    before = len(hub.requests)
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert "NotCached" in on_a_terminal(b"y\n", "-c", ASK, "org/other", **offline)
    assert on_a_terminal(b"", "-c", ASK, "org/name", **offline).strip() == "cache"
    assert len(hub.requests) == before
    hub.close()
