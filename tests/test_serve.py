"""`diffgen serve`: jobs, events, cancellation, the gallery, health and metrics, the loss of the worker, the end."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Served, encoded, half_mask, png_of

RED = {"prompt": "a red apple", "seed": 7, "steps": 4}


def start_long(served: Served, **fields: Any) -> dict[str, Any]:
    """A job that runs for a long time, once it has made a step."""
    job = served.json("POST", "/api/jobs", {"prompt": "a cat", "steps": 150, "count": 4, **fields})
    for kind, _ in served.events(job["id"]):
        if kind == "step":
            break
    return job


def test_the_line_says_where_the_server_is_which_model_it_has_and_where_pictures_go(served: Served) -> None:
    assert served.line == f"{served.url}  model emoji  pictures in {served.folder}/\n"
    assert served.json("GET", "/health") == {"status": "ok", "model": "emoji", "queue": 0, "running": 0}


def test_a_job_tells_its_steps_and_previews_and_ends_in_the_gallery(served: Served) -> None:
    job = served.json("POST", "/api/jobs", {"prompt": "a blue car", "seed": 3, "steps": 12, "count": 2, "exact": True})
    assert (job["status"], job["count"], job["seed"]) in {("queued", 2, 3), ("running", 2, 3)}
    events = list(served.events(job["id"], previews=True))
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "done"
    assert kinds.index("step") < kinds.index("picture") < kinds.index("done")
    steps = [data["done"] for kind, data in events if kind == "step"]
    assert steps == sorted(steps)
    assert steps[-1] == 24
    preview = next(data["png"] for kind, data in events if kind == "preview")
    assert png_of(preview).size == (64, 64)
    last = events[-1][1]
    assert [picture["seed"] for picture in last["pictures"]] == [3, 4]
    assert set(last["pictures"][0]) >= {"id", "prompt", "seed", "width", "height", "pixels_sha256"}
    assert served.json("GET", f"/api/jobs/{job['id']}") == last
    png = served.request("GET", f"/api/pictures/{last['pictures'][0]['id']}.png")[2]
    assert png == (served.folder / f"{last['pictures'][0]['id']}.png").read_bytes()


def test_an_exact_job_equals_generate_to_the_byte(
    served: Served, diffgen_: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    job = served.job(**RED, exact=True, scheduler="heun", negative="a face")
    words = ["--seed", 7, "--steps", 4, "--scheduler", "heun", "--negative", "a face", "-o", "local.png"]
    code, _, err = diffgen_("generate", "a red apple", *words)
    assert code == 0, err
    assert (served.folder / f"{job['pictures'][0]['id']}.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_image_to_image_and_inpainting_begin_from_the_picture_that_was_sent(served: Served) -> None:
    first = served.job(**RED)["pictures"][0]
    png = served.request("GET", f"/api/pictures/{first['id']}.png")[2]
    sent = {"image": base64.b64encode(png).decode(), "image_name": "/home/me/apple.png"}
    mask = base64.b64encode(encoded(half_mask())).decode()
    changed = served.job(prompt="a green apple", seed=1, steps=6, **sent, mask=mask)["pictures"][0]
    record = served.json("GET", f"/api/pictures/{changed['id']}/record")
    assert record["image"]["name"] == "apple.png"
    before, after = (Image.open(served.folder / f"{one['id']}.png").convert("RGB") for one in (first, changed))
    left, right = (0, 0, 24, 64), (36, 0, 64, 64)
    assert difference(before.crop(left), after.crop(left)) < 8 < difference(before.crop(right), after.crop(right))
    similar = served.job(prompt="a red apple", seed=1, steps=8, strength=0.3, **sent)["pictures"][0]
    assert difference(before, Image.open(served.folder / f"{similar['id']}.png")) < 40


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean absolute difference of the pixels, 0 … 255."""
    pairs = zip(one.convert("RGB").tobytes(), other.convert("RGB").tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / (one.width * one.height * 3)


def test_compatible_requests_of_several_clients_are_one_batch(served: Served) -> None:
    long = start_long(served)
    prompts = ["a red apple", "a blue car", "a cat", "a green tree"]
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(
            lambda row: served.json("POST", "/api/jobs", {"prompt": row[1], "seed": row[0], "steps": 5}),
            enumerate(prompts),
        )
        jobs = list(jobs)
    other = served.json("POST", "/api/jobs", {"prompt": "a dog", "steps": 6})  # not compatible
    served.json("DELETE", f"/api/jobs/{long['id']}")
    ended = [list(served.events(job["id"]))[-1][1] for job in [*jobs, other]]
    sizes = [served.json("GET", f"/api/pictures/{job['pictures'][0]['id']}/record")["batch_size"] for job in ended]
    assert sizes == [4, 4, 4, 4, 1]
    assert [job["pictures"][0]["prompt"] for job in ended] == [*prompts, "a dog"]


def test_clients_take_turns_in_the_queue(served: Served) -> None:
    long = start_long(served)

    def submit(client: str, steps: int) -> str:
        fields = {"prompt": "a cat", "steps": steps, "exact": True}
        return str(served.json("POST", "/api/jobs", fields, {"X-Diffgen-Client": client})["id"])

    greedy = [submit("greedy", 2) for _ in range(4)]
    modest = submit("modest", 2)
    positions = [served.json("GET", f"/api/jobs/{id}")["position"] for id in [*greedy, modest]]
    assert positions == [0, 2, 3, 4, 1]
    for id in [*greedy, modest, long["id"]]:
        assert served.json("DELETE", f"/api/jobs/{id}")["status"] == "cancelled"


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    long = start_long(served)
    jobs = [served.json("POST", "/api/jobs", RED) for _ in range(12)]
    status, headers, body = served.request("POST", "/api/jobs", RED)
    assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 60
    for job in [*jobs, long]:
        served.json("DELETE", f"/api/jobs/{job['id']}")


@pytest.mark.parametrize("how", ["delete", "leave"])
def test_a_cancelled_job_frees_the_worker_within_one_step(served: Served, how: str) -> None:
    if how == "delete":
        job = start_long(served)
        served.json("DELETE", f"/api/jobs/{job['id']}")
    else:
        connection = served.send("POST", "/v1/images/generations", {"prompt": "a cat", "steps": 150, "n": 4})
        served.wait_for("/health", "running", 1)
        connection.close()
    served.wait_for("/health", "running", 0)
    job = served.json("GET", "/api/jobs")["jobs"][0]
    assert job["status"] == "cancelled"
    assert job["step"] < 75  # of 150; the benchmark has the seconds
    served.job(prompt="a cat", steps=1, seed=1)


def test_clients_that_leave_at_random_change_nothing_for_the_next(served: Served) -> None:
    before = served.job(**RED, exact=True)["pictures"][0]["pixels_sha256"]
    choose = random.Random(1)
    for seed in range(12):
        connection = served.send("POST", "/v1/images/generations", {"prompt": "a cat", "steps": 30, "seed": seed})
        time.sleep(choose.random() * 0.3)
        connection.close()
    served.wait_for("/health", "running", 0)
    assert served.json("GET", "/health")["queue"] == 0
    assert served.job(**RED, exact=True)["pictures"][0]["pixels_sha256"] == before


def test_the_gallery_is_searched_and_its_ids_are_no_paths(served: Served) -> None:
    picture = served.job(prompt="a purple snail", seed=5, steps=2)["pictures"][0]
    (served.folder.parent / "secret.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    os.symlink(served.folder.parent / "secret.png", served.folder / "link.png")
    content = served.json("GET", "/api/pictures?q=purple+SNAIL")
    assert [entry["id"] for entry in content["pictures"]] == [picture["id"]]
    everything = served.json("GET", "/api/pictures?limit=500")["pictures"]
    assert len(everything) == len([path for path in served.folder.glob("*.png") if not path.is_symlink()])
    assert everything[0]["id"] == picture["id"]
    rest = served.json("GET", f"/api/pictures?after={everything[1]['id']}&limit=2")["pictures"]
    assert [entry["id"] for entry in rest] == [entry["id"] for entry in everything[2:4]]
    for id in ("../secret", "..%2Fsecret", "%2e%2e/secret", "link", ".", "", "%00", "a" * 300):
        assert served.request("GET", f"/api/pictures/{id}.png")[0] in (404, 405), id
    record = served.json("GET", f"/api/pictures/{picture['id']}/record")
    assert (record["prompt"], record["seed"], record["steps"]) == ("a purple snail", 5, 2)
    thumbnail = served.request("GET", f"/api/pictures/{picture['id']}/thumbnail")
    assert thumbnail[1]["content-type"] == "image/webp"
    assert served.json("DELETE", f"/api/pictures/{picture['id']}") == {"deleted": picture["id"]}
    assert served.request("GET", f"/api/pictures/{picture['id']}.png")[0] == 404
    assert not (served.folder / f"{picture['id']}.png").exists()


def test_a_picture_that_is_dropped_into_the_folder_is_in_the_gallery(served: Served) -> None:
    (served.folder / "dropped.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    entry = next(one for one in served.json("GET", "/api/pictures?limit=500")["pictures"] if one["id"] == "dropped")
    assert entry["prompt"] is None
    status, _, body = served.request("GET", "/api/pictures/dropped/record")
    assert status == 400
    assert "says nothing about how it was made" in json.loads(body)["error"]["message"]


def test_the_model_says_what_it_knows(served: Served) -> None:
    model = served.json("GET", "/api/model")
    assert model["defaults"]["size"] == [64, 64]
    assert "red apple" in model["concepts"]
    assert {"name": "dpmpp_2m", "label": "DPM++ 2M"} in model["schedulers"]
    assert model["limits"]["steps"] == 150


def test_metrics_count_what_happened(served: Served) -> None:
    def read() -> dict[str, float]:
        text = served.request("GET", "/metrics")[2].decode()
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    before = read()
    served.job(**RED, count=2)
    after = read()
    assert after["diffgen_pictures_total"] == before["diffgen_pictures_total"] + 2
    assert after['diffgen_jobs_total{status="done"}'] == before['diffgen_jobs_total{status="done"}'] + 1
    assert after["diffgen_queue_jobs"] == 0


def test_the_loss_of_the_worker_costs_its_batch_once_and_sigterm_ends_the_server_in_order(tmp_path: Path) -> None:
    served = Served(tmp_path / "pictures")
    restarts = b"diffgen_worker_restarts_total 0"
    assert restarts in served.request("GET", "/metrics")[2]
    (worker,) = served.workers()
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(served.request, "POST", "/v1/images/generations", {"prompt": "a cat", "steps": 150, "n": 4})
        served.wait_for("/health", "running", 1)
        while not served.json("GET", "/api/jobs")["jobs"][0]["step"]:
            time.sleep(0.05)
        os.kill(worker, signal.SIGKILL)
        at_once = served.request("POST", "/v1/images/generations", RED)[0]  # the loss may not be noticed yet
        status, headers, body = lost.result()
    assert at_once == 200
    assert (status, headers["x-should-retry"]) == (500, "false")
    assert json.loads(body)["error"]["code"] == "worker_lost"
    assert served.job(**RED)["status"] == "done"
    assert restarts not in served.request("GET", "/metrics")[2]
    assert served.json("GET", "/health")["status"] == "ok"

    (worker,) = served.workers()
    with ThreadPoolExecutor() as pool:
        short = pool.submit(served.request, "POST", "/v1/images/generations", {**RED, "steps": 8, "exact": True})
        served.wait_for("/health", "running", 1)
        waiting = pool.submit(served.request, "POST", "/v1/images/generations", {"prompt": "a cat", "steps": 150})
        served.wait_for("/health", "queue", 1)
        assert served.stop() == 0
        assert short.result()[0] == 200
        status, headers, _ = waiting.result()
    assert (status, headers["retry-after"]) == (503, "10")
    assert not Path(f"/proc/{worker}").exists()
    assert served.log.read_text() == ""


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--host", "0.0.0.0"], 2, "there is no key"),
        (["--host", "0.0.0.0", "--api-key", ""], 2, "--api-key"),
        (["--api-key", "@missing.txt"], 3, "missing.txt"),
        (["-m", "nothing"], 3, "there is no model"),
        (["--loras", "nothing"], 3, "no such folder"),
        (["--max-body", "many"], 2, "--max-body"),
        (["--batch", "0"], 2, "--batch must be at least 1"),
        (["--port", "70000"], 2, "--port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(
    diffgen_: Callable[..., tuple[int, str, str]], options: list[str], code: int, text: str
) -> None:
    result, _, err = diffgen_("serve", *options)
    assert (result, text in err) == (code, True), err


def test_a_port_in_use_is_refused(served: Served, diffgen_: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = diffgen_("serve", "--port", served.port)
    assert (code, "choose another --port" in err) == (6, True)
