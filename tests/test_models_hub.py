"""Downloads from a hub, by the real client over real HTTP, in processes of their own; offline means no connection."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import original_layout
import pytest
from hub_server import TOKEN, Hub
from safetensors.numpy import save_file
from test_models_families import SD, XL, build
from test_models_gate import make_folder

from diffgen.errors import CannotWrite, InputError
from diffgen.models import cache, known
from diffgen.models import hub as module
from diffgen.models.families import FAMILIES
from diffgen.models.find import NotCached, cached_models, find

ROOT = Path(__file__).parent.parent
REPO = "CompVis/stable-diffusion-v1-4"


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


WORKER = """
import contextlib, io, json, os, sys
import huggingface_hub
from diffgen.cli import run
for line in sys.stdin:
    request = json.loads(line)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(request["args"])
    print(json.dumps([int(code), out.getvalue(), err.getvalue()]), flush=True)
"""


def environment(home: Path, **more) -> dict[str, str]:
    """The environment of a process with an empty home: only the code is shared."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **more}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A process of its own, where the network is on; it runs one command line after the other."""
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(home)
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def diffgen(hub, worker, tmp_path):
    """Run one command line with a home of its own: (exit code, stdout, stderr)."""

    def command(*args, **more):
        more = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, **more}
        request = {"args": list(map(str, args)), "folder": str(tmp_path), "environment": environment(tmp_path, **more)}
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        code, out, err = json.loads(worker.stdout.readline())
        assert TOKEN not in out + err
        assert "Traceback" not in err or "--debug" in args
        return code, out, err

    return command


def repository(tmp_path, name="repo"):
    """A repository of Stable Diffusion 1: two precisions, pickles, code, a safety checker, pictures."""
    folder = make_folder(tmp_path / name)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    parts = (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("safety_checker", "model"))
    for number, (part, stem) in enumerate(parts):
        (folder / part).mkdir(exist_ok=True)
        for variant, dtype in (("", np.float32), (".fp16", np.float16), (".non_ema", np.float64)):
            save_file({"bias": np.full(number + 1, 7, dtype)}, folder / part / f"{stem}{variant}.safetensors")
        (folder / part / f"{stem}.bin").write_bytes(pickle.dumps(1))
        (folder / part / "code.py").write_text("boom")
    (folder / "safety_checker/config.json").write_text("{}")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    (folder / "LICENSE.md").write_text("terms")
    (folder / "sd-v1-4.ckpt").write_bytes(pickle.dumps(1))
    (folder / "v1-4.safetensors").write_bytes(b"x" * 100)
    (folder / "pipeline.py").write_text("boom")
    (folder / "picture.jpg").write_bytes(b"x")
    return folder


HALF = {
    "model_index.json", "README.md", "LICENSE.md", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
}  # fmt: skip


def test_pull_use_verify_remove(hub, diffgen, tmp_path):
    folder = repository(tmp_path)
    commit = hub.add(REPO, folder)
    code, out, err = diffgen("generate", "a cat", "-m", REPO, "--dry-run")
    assert code == 3
    assert f"diffgen models pull {REPO}" in err
    assert hub.requests == []  # nothing starts by itself

    code, out, err = diffgen("models", "pull", REPO)
    assert (code, out) == (2, "")
    assert "add --yes" in err
    assert "creativeml-openrail-m" in err
    assert "float16" in err
    assert hub.fetched() == ["model_index.json"]

    code, out, err = diffgen("models", "pull", REPO, "--dry-run", "--json")
    result = json.loads(out)["result"]
    assert (code, result["commit"], result["licence"], result["gated"]) == (0, commit, "creativeml-openrail-m", False)
    assert {file["path"] for file in result["files"]} == HALF
    assert result["bytes"] == sum((folder / name).stat().st_size for name in HALF)

    code, out, err = diffgen("models", "pull", REPO, "--yes", HF_TOKEN=TOKEN)
    assert code == 0, err
    assert set(hub.fetched()) == HALF
    snapshot = Path(out.strip())
    assert snapshot.name == commit
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert names == HALF
    assert all((snapshot / name).read_bytes() == (folder / name).read_bytes() for name in HALF)
    assert {header for _, _, header in hub.requests} == {None, f"Bearer {TOKEN}"}

    before = len(hub.requests)
    code, out, _ = diffgen("models", "info", REPO, "--json")
    result = json.loads(out)["result"]
    assert (code, result["source"], result["revision"], result["family"]) == (0, "cache", commit, "sd1")
    assert (result["licence"], result["bytes"]) == (
        "creativeml-openrail-m",
        sum((folder / n).stat().st_size for n in HALF),
    )
    code, out, _ = diffgen("models", "list", "--json")
    models = json.loads(out)["result"]["models"]
    assert [(m["name"], m["source"]) for m in models] == [("emoji", "bundled"), (REPO, "cache")]
    code, out, err = diffgen("models", "verify", REPO, "--json")
    files = {file["path"]: file for file in json.loads(out)["result"]["files"]}
    assert code == 0
    assert {file["state"] for file in files.values()} == {"right"}
    unet = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert files[unet]["sha256"] == hashlib.sha256((folder / unet).read_bytes()).hexdigest()
    assert set(files) == HALF - {"README.md", "LICENSE.md"}
    assert len(hub.requests) == before

    for name in (unet, "vae/config.json"):
        blob = (snapshot / name).resolve()
        data = bytearray(blob.read_bytes())
        data[-2] ^= 1
        blob.write_bytes(data.replace(b"}", b" ") if name.endswith("json") and b"}" not in data else data)
    (snapshot / "vae/config.json").resolve().write_text("{}")
    code, _, err = diffgen("models", "verify", REPO)
    assert code == 3
    assert unet in err
    assert "vae/config.json" in err

    code, out, err = diffgen("models", "rm", REPO)
    assert code == 2
    assert "--yes" in err
    code, out, err = diffgen("models", "rm", REPO, "--dry-run")
    assert code == 0
    assert snapshot.is_dir()
    code, out, err = diffgen("models", "rm", REPO, "-y", "--json")
    assert json.loads(out)["result"]["removed"] == [f"{REPO}@{commit}"]
    assert not snapshot.exists()
    assert not list((tmp_path / "hf/hub").rglob("*.safetensors"))
    assert diffgen("models", "rm", REPO, "-y")[0] == 3


def test_full_precision_and_the_safety_checker(hub, diffgen, tmp_path):
    hub.add(REPO, repository(tmp_path))
    code, out, err = diffgen("models", "pull", REPO, "-y", "--full", "--safety", "--json")
    assert code == 0, err
    files = {file["path"] for file in json.loads(out)["result"]["files"]}
    assert {"unet/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors"} <= files
    assert {"safety_checker/config.json", "feature_extractor/preprocessor_config.json"} <= files
    assert not [name for name in files if "fp16" in name or name.endswith((".bin", ".ckpt", ".py"))]


def test_the_commit_is_fixed_before_anything_is_fetched(hub, diffgen, tmp_path):
    """The repository changes between the question and the download: all files come from the first commit."""
    first = repository(tmp_path)
    commit = hub.add(REPO, first)
    evil = {"model_index.json": b'{"_class_name": "Evil"}', "unet/config.json": b"{}"}
    hub.on_info = lambda repo: hub.add(REPO, evil) if len(hub.repos[REPO]) == 1 else None
    code, out, err = diffgen("models", "pull", REPO, "-y")
    assert code == 0, err
    assert Path(out.strip()).name == commit
    assert all(f"/resolve/{commit}/" in path for _, path, _ in hub.requests if "/resolve/" in path)


def test_revisions(hub, diffgen, tmp_path, monkeypatch):
    first = hub.add(REPO, repository(tmp_path, "one"))
    second = hub.add(REPO, repository(tmp_path, "two"))
    for name, commit in ((f"{REPO}@v1.0", first), (REPO, second), (f"{REPO}@{first}", first)):
        code, out, err = diffgen("models", "pull", name, "-y", "--json")
        assert (code, json.loads(out)["result"]["commit"]) == (0, commit), err
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert find(REPO).revision == find(f"{REPO}@main").revision == find(f"{REPO}@{second}").revision == second
    assert find(f"{REPO}@v1.0").revision == find(f"{REPO}@{first}").revision == first
    with pytest.raises(NotCached, match="@v2"):
        find(f"{REPO}@v2")
    assert [model.revision for model in cached_models()] == sorted([first, second])
    code, out, _ = diffgen("models", "rm", f"{REPO}@v1.0", "-y")
    assert (code, out) == (0, f"{REPO}@{first}\n")
    assert find(REPO).revision == second
    code, out, err = diffgen("models", "pull", f"{REPO}@v9", "-y")
    assert (code, "no such revision" in err) == (3, True)


def test_gated(hub, diffgen, tmp_path):
    hub.add(REPO, repository(tmp_path))
    hub.gated.add(REPO)
    for token in ({}, {"HF_TOKEN": "hf_wrongwrongwrong"}):
        code, _, err = diffgen("models", "pull", REPO, "-y", **token)
        assert code == 3
        assert f"{REPO} is gated" in err
        assert f"1. open {hub.url}/{REPO} and accept  2. hf auth login".replace("  ", " ") in " ".join(err.split())
        assert "wrongwrong" not in err
    code, _out, err = diffgen("models", "pull", REPO, "-y", HF_TOKEN=TOKEN)
    assert code == 0
    assert "gated" in err


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_token_in_any_message(hub, diffgen, debug):
    """Also if the address itself contains one."""
    with_secret = hub.url.replace("//", f"//user:{TOKEN}@")
    for status in (401, 403, 404, 500):
        hub.status = status
        code, _, err = diffgen("models", "pull", REPO, "-y", *debug, HF_TOKEN=TOKEN, HF_ENDPOINT=with_secret)
        assert code == 3
        assert REPO in err


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no/where", "the hub has no model no/where"),
        ("a", "not the id of a model"),
        ("../etc/passwd", "not the id of a model"),
    ],
)
def test_missing_files(hub, diffgen, name, match):
    code, _, err = diffgen("models", "pull", name, "-y")
    assert code == 3
    assert match in err


def test_repositories_that_are_not_read(hub, diffgen, tmp_path):
    folder = repository(tmp_path)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("a/files", {"x.safetensors": b"", "x.ckpt": b""})
    hub.add("a/pickles", {name: data for name, data in files.items() if not name.endswith(".safetensors")})
    hub.add("a/video", {"model_index.json": b'{"_class_name": "WanPipeline"}'})
    hub.add("a/broken", {"model_index.json": b"{"})
    hub.add("a/nothing", {"model_index.json": files["model_index.json"]})
    for name, match in {
        "a/files": "x.safetensors",
        "a/pickles": "the only weights of unet are a pickle",
        "a/video": "WanPipeline",
        "a/broken": "broken JSON",
        "a/nothing": "no unet/diffusion_pytorch_model.safetensors",
    }.items():
        code, _out, err = diffgen("models", "pull", name, "-y")
        assert (code, match in err) == (3, True), err
    assert set(hub.fetched()) == {"model_index.json"}


def test_a_damaged_download_is_refused(hub, diffgen, tmp_path):
    hub.add(REPO, repository(tmp_path))
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.damaged.add(name)
    code, _out, err = diffgen("models", "pull", REPO, "-y")
    assert (code, f"{name} arrived damaged" in err) == (3, True)
    hub.damaged.clear()
    assert diffgen("models", "pull", REPO, "-y")[0] == 0
    assert diffgen("models", "verify", REPO)[0] == 0


def test_an_interrupted_download_is_no_model_and_continues(hub, diffgen, tmp_path):
    """The hub breaks down within a download; the next one fetches what is missing."""
    hub.add(REPO, repository(tmp_path))
    name = "vae/diffusion_pytorch_model.safetensors"
    data = hub.repos[REPO][0].pop(name)
    hub.on_info = lambda repo: hub.repos[REPO][0].pop(name, None)
    hub.repos[REPO][0][name] = data
    code, _, err = diffgen("models", "pull", REPO, "-y")
    assert code == 3, err
    assert diffgen("models", "info", REPO)[0] == 3
    assert json.loads(diffgen("models", "list", "--json")[1])["result"]["models"][1:] == []
    hub.on_info = lambda repo: None
    hub.repos[REPO][0][name] = data
    hub.requests.clear()
    code, _, err = diffgen("models", "pull", REPO, "-y")
    assert code == 0, err
    assert name in hub.fetched()
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in hub.fetched()
    assert diffgen("models", "verify", REPO)[0] == 0


def test_no_connection(hub, diffgen):
    hub.close()
    code, _out, err = diffgen("models", "pull", REPO, "-y")
    assert (code, "no connection" in err) == (3, True)


NO_SOCKETS = """
import socket
def refuse(*_, **__):
    print("CONNECTED", file=sys.stderr)
    raise AssertionError("a connection")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""


LINES = """
from diffgen.cli import run
for line in json.loads(sys.argv[1]):
    print(run(line))
"""


def codes(tmp_path, hub, lines, **more):
    """(exit codes, stderr) of command lines in a process where every connection raises."""
    env = environment(tmp_path, HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=hub.url, **more)
    command = [sys.executable, "-c", f"import json, sys{NO_SOCKETS}{LINES}", json.dumps(lines)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    return [int(line) for line in process.stdout.splitlines() if line.isdigit()], process.stderr


def test_offline_makes_no_connection(hub, tmp_path):
    hub.add(REPO, repository(tmp_path))
    lines = [
        ["models", "pull", REPO, "-y", "-q"],
        ["generate", "a", "-m", REPO, "-q"],
        ["models", "verify", "-q"],
        ["models", "rm", REPO, "-y"],
        ["doctor", "-q"],
    ]
    results, err = codes(tmp_path, hub, lines, HF_HUB_OFFLINE="1")
    assert (results, "CONNECTED" in err) == ([3, 3, 0, 3, 0], False)
    assert "switched off" in err
    results, err = codes(tmp_path, hub, [[*lines[0], "--offline"], [*lines[1], "--offline"]])
    assert (results, "CONNECTED" in err) == ([3, 3], False)
    assert hub.requests == []
    _, err = codes(tmp_path, hub, [lines[1], lines[0]])
    assert err.count("CONNECTED") >= 1  # the trap itself works
    assert err.index("no such model in the download cache") < err.index("CONNECTED")


def test_room_on_the_disk(tmp_path):
    module.check_room(tmp_path / "not/there", 0)
    module.check_room(tmp_path, 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CannotWrite, match="are free") as excinfo:
        module.check_room(tmp_path / "not/there", free)
    assert "HF_HOME" in excinfo.value.hint


def test_the_cache_is_where_the_hubs_own_library_has_it(tmp_path):
    cases = [
        {"HF_HUB_CACHE": "/a/b"},
        {"HF_HOME": "/a"},
        {"XDG_CACHE_HOME": "/c"},
        {"HF_HOME": "~/x"},
        {},
        {"HF_HOME": "/a", "HF_HUB_CACHE": "$HOME/y"},
    ]
    code = """
import importlib, json, os, sys
from huggingface_hub import constants
from diffgen.models.cache import cache_dir
for case in json.loads(sys.argv[1]):
    old = dict(os.environ)
    os.environ.update(case)
    assert importlib.reload(constants).HF_HUB_CACHE == str(cache_dir()), case
    os.environ.clear()
    os.environ.update(old)
print("same")
"""
    command = [sys.executable, "-c", code, json.dumps(cases)]
    process = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert process.stdout == "same\n", process.stderr


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("o.r-g/na_me@refs/pr/1", ("o.r-g/na_me", "refs/pr/1")),
    ],
)
def test_ids(text, parsed):
    assert cache.parse_id(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "a/..", "../b", "a/b@", "a/b@../x", "/a/b", "a b/c", "a/b@x/", "a/" + "b" * 200]
)
def test_refused_ids(text):
    with pytest.raises(InputError):
        cache.parse_id(text)


def test_a_strange_cache_is_no_reason_to_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("models--a--b/snapshots/not-a-commit", "models--c", "models--d--e", "datasets--x--y/snapshots"):
        (tmp_path / name).mkdir(parents=True)
    build(tmp_path / "models--f--g/snapshots" / ("1" * 40), "StableDiffusionXLPipeline", XL)
    build(tmp_path / "models--h--i/snapshots" / ("2" * 40), "WanPipeline", SD)
    (tmp_path / "models--f--g/refs").mkdir()
    (tmp_path / "models--f--g/refs/main").write_text("3" * 40)
    assert [snapshot.repo for snapshot in cache.snapshots()] == ["f/g", "h/i"]
    assert [(model.name, model.family) for model in cached_models()] == [("f/g", "sdxl")]
    assert find("f/g").name == "f/g"  # the only one
    with pytest.raises(InputError, match="WanPipeline"):
        find("h/i")


def test_short_names_and_successors(hub, diffgen, tmp_path):
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", repository(tmp_path))
    code, out, err = diffgen("models", "search", "controlnet", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["result"]["models"]}
    assert {"sd15", "sdxl"} <= set(rows)
    assert not rows["sd15"]["here"]
    code, _, err = diffgen("models", "info", "sd15")
    assert (code, "models pull stable-diffusion-v1-5/" in err) == (3, True)
    code, out, err = diffgen("models", "pull", "sd15", "-y", "--json")
    assert code == 0, err
    assert json.loads(out)["result"]["repo"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    code, out, err = diffgen("models", "info", "SD15", "--json")
    assert (code, json.loads(out)["result"]["source"]) == (0, "cache"), err
    assert diffgen("models", "search", "sd15", "--json")[1].count('"here": true') == 1
    code, _, err = diffgen("models", "pull", "runwayml/stable-diffusion-v1-5", "-y")
    assert code == 3
    assert "was withdrawn: its model is stable-diffusion-v1-5/stable-diffusion-v1-5 now" in err
    code, _, err = diffgen("models", "search", "no such thing")
    assert (code, "no well-known model" in err) == (3, True)


def test_the_table_of_well_known_models():
    for name, row in known.KNOWN.items():
        assert cache.ID.fullmatch(row.repo)
        assert row.family in FAMILIES
        assert known.repository(name.upper()) == row.repo
    assert not set(known.SUCCESSORS) & {row.repo for row in known.KNOWN.values()}


def test_files_put_by_hand_into_the_models_folder(diffgen, tmp_path, tiny, family_folder):
    place = tmp_path / "mine"
    shutil.copytree(tiny, place / "tiny-sd")
    original_layout.write(family_folder("sd1"), place / "one.safetensors", "sd1")
    (place / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    (place / "notes.txt").write_text("mine")
    code, out, err = diffgen("models", "list", "--json", DIFFGEN_MODELS=str(place))
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["result"]["models"] if row["source"] == "models"}
    assert set(rows) == {"tiny-sd", "one", "broken.gguf"}
    assert "version 0" in rows["broken.gguf"]["problem"]
    for name in ("one", "one.safetensors", "tiny-sd"):
        code, out, err = diffgen("models", "info", name, "--json", DIFFGEN_MODELS=str(place))
        assert (code, json.loads(out)["result"]["family"]) == (0, "sd1"), err
    assert diffgen("models", "info", "one")[0] == 3
