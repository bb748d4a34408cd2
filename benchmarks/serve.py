"""diffgen serve and a plain script of Starlette (what FastAPI is made of) and diffusers, with the same clients.

    python benchmarks/serve.py [--requests 3] [--clients 8] [--steps 8] [--pictures 1000] [--only PART]

Each server runs in a process of its own, one thread for torch. CPU time is that of the server's processes.

compare   both servers with 1 and with many clients, in turn
alone     of diffgen serve: time over the library in process, time to free the model, time after kill -9 of the worker
long      of diffgen serve: growth of memory over --pictures N, then 100 clients that leave at random times
client    `diffgen generate --server` and a plain script of diffusers, from start to picture, in turn
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

PROMPTS = ["a red apple", "a blue car", "a cat", "a green tree", "a penguin", "a rocket", "a yellow star", "a house"]
TICKS = os.sysconf("SC_CLK_TCK")


def naive(port: int) -> None:
    """The server that people write first: the pipeline in the handler."""
    import base64
    import io

    import torch
    import uvicorn
    from diffusers import StableDiffusionPipeline
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from diffgen.models.find import find

    pipeline = StableDiffusionPipeline.from_pretrained(find().folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    async def generate(request: Request) -> JSONResponse:
        fields = await request.json()
        generator = torch.Generator().manual_seed(fields["seed"])
        steps = fields["steps"]
        image = pipeline(fields["prompt"], num_inference_steps=steps, guidance_scale=3.0, generator=generator).images[0]
        file = io.BytesIO()
        image.save(file, "PNG")
        return JSONResponse({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    routes = [Route("/v1/images/generations", generate, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


class Server:
    """A server in a process of its own."""

    def __init__(self, kind: str, port: int, folder: str) -> None:
        command = {
            "diffgen": ["-m", "diffgen", "serve", "--port", str(port), "-o", folder],
            "diffgen --batch 1": ["-m", "diffgen", "serve", "--port", str(port), "-o", folder, "--batch", "1"],
            "naive": [__file__, "--naive", str(port)],
        }[kind]
        self.port = port
        self.started = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        while True:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 600) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(
            method, path, body and json.dumps(body), {"Content-Type": "application/json"} if body else {}
        )
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def picture(self, seed: int, steps: int, **more: Any) -> float:
        """Make a picture; the seconds that it takes."""
        begun = time.perf_counter()
        fields = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed, "steps": steps, **more}
        status, content = self.ask("POST", "/v1/images/generations", fields)
        assert status == 200, content
        return time.perf_counter() - begun

    def tree(self) -> list[int]:
        """The process ids of the server and those below it."""
        pids = [self.process.pid]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        return pids

    def worker(self) -> int:
        """The process id of the one that holds the model: it is forked from a child of the server."""
        return self.tree()[-1]

    def cpu(self) -> float:
        """The CPU seconds of its processes so far."""
        stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.tree())
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS

    def memory(self) -> float:
        """The resident memory of its processes, in MB."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.tree())
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def quantile(values: list[float], share: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def load(server: Server, clients: int, requests: int, steps: int) -> dict[str, float]:
    """Closed-loop clients with different prompts and seeds, and a look at /health ten times a second."""
    healths: list[float] = []
    running = True

    def watch() -> None:
        while running:
            begun = time.perf_counter()
            server.ask("GET", "/health")
            healths.append(time.perf_counter() - begun)
            time.sleep(0.1)

    def client(number: int) -> list[float]:
        return [server.picture(100 * number + i, steps) for i in range(requests)]

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch)
        begun, cpu = time.perf_counter(), server.cpu()
        times = [seconds for row in pool.map(client, range(clients)) for seconds in row]
        wall, cpu = time.perf_counter() - begun, server.cpu() - cpu
        running = False
        watching.result()
    return {
        "pictures/s": len(times) / wall,
        "p50 s": statistics.median(times),
        "p95 s": quantile(times, 0.95),
        "CPU-s/picture": cpu / len(times),
        "/health p99 s": quantile(healths, 0.99),
    }


def in_process(requests: int, steps: int) -> list[float]:
    """The seconds of pictures that the library makes in this process, encoded."""
    import diffgen
    from diffgen.images.metadata import encode_png
    from diffgen.loading import make_plan

    generator = diffgen.load("emoji")
    times = []
    for seed in range(requests + 1):
        begun = time.perf_counter()
        plan = make_plan(generator.model, PROMPTS[seed % len(PROMPTS)], seed=seed, steps=steps)
        for picture in generator.pictures(plan):
            assert picture.image is not None
            encode_png(picture.image, picture.record)
        times.append(time.perf_counter() - begun)
    return times[1:]


def free(server: Server) -> tuple[float, float]:
    """(seconds from a client's leaving until the model is free, seconds of a step)."""
    connection = HTTPConnection("127.0.0.1", server.port)
    fields = {"prompt": "a cat", "steps": 150, "n": 4}
    connection.request("POST", "/v1/images/generations", json.dumps(fields), {"Content-Type": "application/json"})
    time.sleep(3)
    job = json.loads(server.ask("GET", "/api/jobs")[1])["jobs"][0]
    step = job["seconds"] / max(1, job["step"])
    begun = time.perf_counter()
    connection.close()
    alone = server.picture(1, 1)  # waits for the model
    total = time.perf_counter() - begun
    return total - min(alone, server.picture(1, 1)), step


def compare(args: argparse.Namespace, folder: str) -> None:
    for number, kind in enumerate(("naive", "diffgen", "naive", "diffgen", "diffgen --batch 1")):
        server = Server(kind, 8600 + number, folder)
        server.picture(0, args.steps)
        first = time.perf_counter() - server.started
        for clients in (1, args.clients):
            figures = load(server, clients, args.requests, args.steps)
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{kind}, clients {clients}: {text}", flush=True)
        print(f"{kind}: start to first picture {first:.1f} s", flush=True)
        server.stop()


def alone(args: argparse.Namespace, folder: str) -> None:
    server = Server("diffgen", 8610, folder)
    server.picture(0, args.steps)
    over = [server.picture(seed, args.steps, exact=True) for seed in range(1, 1 + 4 * args.requests)]
    inside = in_process(4 * args.requests, args.steps)
    print(f"one picture: {statistics.median(over):.3f} s over HTTP, {statistics.median(inside):.3f} s in process")
    seconds, step = free(server)
    print(f"a client leaves: the model is free after {seconds:.2f} s; one step of that job takes {step:.2f} s")
    os.kill(server.worker(), signal.SIGKILL)
    print(f"kill -9 of the worker: the next picture comes after {server.picture(0, args.steps):.1f} s")
    server.stop()


def long(args: argparse.Namespace, folder: str) -> None:
    server = Server("diffgen", 8611, folder)
    before = 0.0
    for seed in range(args.pictures):
        server.picture(seed, 1)
        if seed == args.pictures // 10:
            before = server.memory()
    grown = server.memory() - before
    print(f"{args.pictures} pictures: memory grows by {grown:.1f} MB after the first tenth", flush=True)

    def pixels() -> str:
        fields = {"prompt": "a cat", "seed": 7, "steps": args.steps, "exact": True, "response_format": "b64_json"}
        return json.loads(server.ask("POST", "/v1/images/generations", fields)[1])["data"][0]["b64_json"]

    first, before, chance = pixels(), server.memory(), random.Random(0)
    threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in server.tree())
    for seed in range(100):
        connection = HTTPConnection("127.0.0.1", server.port)
        body = json.dumps({"prompt": "a cat", "seed": seed, "steps": 30})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        time.sleep(chance.random() * 0.5)
        connection.close()
    same = pixels() == first
    more = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in server.tree()) - threads
    health = json.loads(server.ask("GET", "/health")[1])
    grown = server.memory() - before
    print(f"100 disconnects: memory grows by {grown:.1f} MB, threads by {more}, equal: {same}; {health}")
    server.stop()


PLAIN = """
import torch
from diffusers import StableDiffusionPipeline
from diffgen.models.find import find
pipeline = StableDiffusionPipeline.from_pretrained(find().folder, torch_dtype=torch.float32, safety_checker=None)
generator = torch.Generator().manual_seed(1)
pipeline("a cat", num_inference_steps=8, guidance_scale=3.0, generator=generator).images[0].save("plain.png")
"""


def client(args: argparse.Namespace, folder: str) -> None:
    server = Server("diffgen", 8612, folder)
    server.picture(0, args.steps)
    remote = ["-m", "diffgen", "generate", "a cat", "--steps", "8", "--seed", "1", "-q", "--overwrite", "-o", "cat.png"]
    remote += ["--server", f"http://127.0.0.1:{server.port}"]
    times: dict[str, list[float]] = {"--server": [], "diffusers": []}
    source = str(Path(__file__).parent.parent)
    for _ in range(2 * args.requests):
        for name, words in (("--server", remote), ("diffusers", ["-c", PLAIN])):
            begun = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": source}
            subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
            times[name].append(time.perf_counter() - begun)
    ours, theirs = (statistics.median(values) for values in times.values())
    print(f"start to picture: {ours:.2f} s with --server, {theirs:.2f} s with diffusers, ratio {ours / theirs:.3f}")
    server.stop()


PARTS = {"compare": compare, "alone": alone, "long": long, "client": client}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--only", choices=tuple(PARTS))
    parser.add_argument("--naive", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.naive:
        naive(args.naive)
        return
    for name, part in PARTS.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                part(args, folder)


if __name__ == "__main__":
    main()
