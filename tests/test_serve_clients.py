"""The real clients of the two protocols, recorded requests of two more, and what the guard refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import KEY, SITE, Served, encoded, half_mask, png_of, raw

import schedulers

openai = pytest.importorskip("openai")
webuiapi = pytest.importorskip("webuiapi")
litellm = pytest.importorskip("litellm")


@pytest.fixture(scope="module", autouse=True)
def slow_client(served: Served) -> Iterator[socket.socket]:
    """A connection on which half of a head has been sent."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=25) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        yield connection


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key)


@pytest.fixture(scope="module")
def webui(served: Served) -> Any:
    return webuiapi.WebUIApi(host="127.0.0.1", port=served.port, username="me", password=served.key)


@pytest.fixture(scope="module")
def apple(client: Any) -> bytes:
    """The bytes of a picture that the server made."""
    result = client.images.generate(prompt="a red apple", size="64x64", extra_body={"seed": 7, "steps": 4})
    return base64.b64decode(result.data[0].b64_json)


# --- OpenAI's client ---


def test_generate_returns_pictures_with_their_seeds(client: Any) -> None:
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3, "exact": True, "stepz": 1}
    result = client.images.generate(model="emoji", prompt="a red apple", n=2, size="64x64", extra_body=extra)
    assert [one.model_extra["seed"] for one in result.data] == [7, 8]
    image = png_of(result.data[0].b64_json)
    assert image.size == (64, 64)
    assert "Steps: 4" in image.info["parameters"]
    assert json.loads(image.info["diffgen"])["guidance"] == 3
    assert (result.size, result.output_format) == ("64x64", "png")
    assert result.model_extra["warnings"] == ["unknown field 'stepz' is ignored"]


def test_the_async_client_and_other_formats(served: Served) -> None:
    async def generate() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key) as client:
            fields = {"prompt": "a blue car", "extra_body": {"steps": 2, "seed": 1}}
            forms = ("webp", "jpeg")
            return await asyncio.gather(*(client.images.generate(**fields, output_format=form) for form in forms))

    for result, form in zip(asyncio.run(generate()), ("WEBP", "JPEG"), strict=True):
        image = png_of(result.data[0].b64_json)
        assert (image.format, image.size) == (form, (64, 64))


def test_a_url_is_alive(client: Any, served: Served) -> None:
    result = client.images.generate(prompt="a cat", response_format="url", extra_body={"steps": 2})
    assert result.data[0].url.startswith(f"{served.url}/api/pictures/")
    status, _, body = served.request("GET", result.data[0].url.removeprefix(served.url))
    assert (status, Image.open(io.BytesIO(body)).size) == (200, (64, 64))


def test_a_stream_has_partial_pictures_then_the_finished_one(client: Any) -> None:
    fields = {
        "prompt": "a cat",
        "stream": True,
        "partial_images": 3,
        "extra_body": {"steps": 8, "seed": 2, "exact": True},
    }
    events = list(client.images.generate(**fields))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert events[-1].usage.total_tokens == 0
    partial, final = (png_of(event.b64_json).convert("RGB") for event in (events[0], events[-1]))
    assert partial.size == final.size
    assert partial.tobytes() != final.tobytes()


def test_an_edit_keeps_what_the_mask_keeps(client: Any, apple: bytes) -> None:
    fields = {"image": ("a.png", apple), "prompt": "a green apple", "extra_body": {"seed": 3, "steps": 6}}
    mask = ("m.png", encoded(half_mask(transparent=True)))
    result = png_of(client.images.edit(mask=mask, **fields).data[0].b64_json).convert("RGB")
    before = Image.open(io.BytesIO(apple)).convert("RGB")

    def change(box: tuple[int, int, int, int]) -> float:
        one, other = before.crop(box).tobytes(), result.crop(box).tobytes()
        return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)

    assert change((0, 0, 24, 64)) < 8 < change((40, 0, 64, 64))
    events = [event.type for event in client.images.edit(stream=True, partial_images=1, **fields)]
    assert events == ["image_edit.partial_image", "image_edit.completed"]


def test_a_variation_takes_the_prompt_that_the_picture_carries(client: Any, apple: bytes) -> None:
    result = client.images.create_variation(image=("a.png", apple), n=2, extra_body={"steps": 4})
    assert [one.revised_prompt for one in result.data] == ["a red apple"] * 2
    plain = encoded(Image.open(io.BytesIO(apple)).convert("RGB"))
    (one,) = client.images.create_variation(image=("a.png", plain), extra_body={"steps": 2}).data
    assert one.revised_prompt == "a picture"


def test_sizes_that_nobody_chose_are_fitted(client: Any) -> None:
    result = client.images.generate(model="dall-e-3", prompt="a cat", size="1792x1024", extra_body={"steps": 2})
    assert result.size == "80x48"  # the area of 64x64, in multiples of 8
    assert [word in " ".join(result.model_extra["warnings"]) for word in ("dall-e-3", "1792x1024")] == [True, True]


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").owned_by == "diffgen"


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "nothing"}, "NotFoundError", "model_not_found", "model"),
        ({"prompt": ""}, "BadRequestError", "invalid_value", "prompt"),
        ({"n": 11}, "BadRequestError", "invalid_value", "count"),
        ({"n": 10**6}, "BadRequestError", "invalid_value", "count"),
        ({"size": "many"}, "BadRequestError", "invalid_value", "size"),
        ({"output_format": "svg"}, "BadRequestError", "invalid_value", "output_format"),
        ({"background": "transparent"}, "BadRequestError", "invalid_value", "background"),
        ({"partial_images": 9}, "BadRequestError", "invalid_value", "partial_images"),
        ({"extra_body": {"steps": 10**9}}, "BadRequestError", "invalid_value", "steps"),
        ({"extra_body": {"steps": "many"}}, "BadRequestError", "invalid_value", "steps"),
        ({"extra_body": {"guidance": 1e308}}, "BadRequestError", "invalid_value", "guidance"),
        ({"extra_body": {"scheduler": "nothing"}}, "BadRequestError", "invalid_value", "scheduler"),
        ({"extra_body": {"grid": "../grid.json"}}, "BadRequestError", "invalid_value", "grid"),
        ({"extra_body": {"loras": ["../secret"]}}, "BadRequestError", "invalid_value", "loras"),
        ({"prompt": "a <lora:/etc/passwd:1>"}, "BadRequestError", "invalid_value", "loras"),
        ({"prompt": "word " * 50_000}, "BadRequestError", "invalid_value", "prompt"),
    ],
    ids=str,
)
def test_errors_have_openais_shape(client: Any, fields: dict[str, Any], error: str, code: str, param: str) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.images.generate(**{"prompt": "a cat", **fields})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong").models.list()


# --- AUTOMATIC1111's clients ---


def test_webuiapi_makes_pictures(webui: Any, apple: bytes) -> None:
    result = webui.txt2img(
        prompt="a red apple",
        seed=7,
        steps=4,
        cfg_scale=3,
        width=512,
        height=512,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        batch_size=2,
    )
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert (result.info["seed"], result.info["all_seeds"]) == (7, [7, 8])
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in result.info["infotexts"][0]
    before = Image.open(io.BytesIO(apple)).convert("RGB")
    fields = {"prompt": "a green apple", "steps": 4, "width": 64, "height": 64}
    changed = webui.img2img(images=[before], mask_image=half_mask(), denoising_strength=1.0, **fields)
    assert changed.image.size == (64, 64)
    assert webui.png_info(result.image).info.startswith("a red apple\n")


def test_webuiapi_reads_what_the_server_has(webui: Any) -> None:
    assert webui.util_get_model_names() == [webui.get_options()["sd_model_checkpoint"]]
    names = [row["name"] for row in webui.get_samplers()]
    assert {"DPM++ 2M", "Euler a", "Heun"} <= set(names)
    for name in names:
        schedulers.resolve(name)
    assert {"automatic", "karras"} <= {row["name"] for row in webui.get_schedulers()}
    assert webui.get_loras() == []
    assert isinstance(webui.get_upscalers(), list)
    webui.set_options({"sd_model_checkpoint": "emoji"})
    for read in (webui.get_sd_vae, webui.get_embeddings, webui.get_cmd_flags, webui.get_memory, webui.get_scripts):
        read()


def test_progress_and_interrupt_of_a_task(served: Served, webui: Any) -> None:
    idle = served.json("GET", "/sdapi/v1/progress")
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0.0, 0, None)
    fields = {"prompt": "a cat", "steps": 150, "batch_size": 8, "force_task_id": "task(1)"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.request, "POST", "/sdapi/v1/txt2img", fields)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            state = served.json("GET", "/sdapi/v1/progress?id_task=task(1)")
            if state["current_image"]:
                break
            time.sleep(0.1)
        assert 0 < state["progress"] < 1
        assert png_of(state["current_image"]).size == (64, 64)
        assert served.json("GET", "/sdapi/v1/progress?id_task=other")["progress"] == 0
        webui.interrupt()
        assert answer.result()[0] == 409
    assert webui.get_progress()["state"]["job_count"] == 0


def test_litellm(served: Served) -> None:
    result = litellm.image_generation(
        model="openai/emoji", api_base=f"{served.url}/v1", api_key=served.key, prompt="a red apple", n=1, size="64x64"
    )
    assert png_of(result.data[0].b64_json).size == (64, 64)


# As Open WebUI and SillyTavern send them: (path, body)
OPEN_WEBUI = {"prompt": "a cat", "batch_size": 1, "width": 512, "height": 512, "steps": 3, "negative_prompt": "a dog"}
SILLY_TAVERN = {
    "prompt": "a cat",
    "negative_prompt": "blurry",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 3,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_prompts": "",
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


@pytest.mark.parametrize("body", [OPEN_WEBUI, SILLY_TAVERN], ids=["Open WebUI", "SillyTavern"])
def test_recorded_requests(served: Served, body: dict[str, Any]) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(f"me:{served.key}".encode()).decode()}
    assert "sd_model_checkpoint" in served.json("GET", "/sdapi/v1/options", headers=basic)
    assert served.json("GET", "/sdapi/v1/upscalers", headers=basic)
    answer = served.json("POST", "/sdapi/v1/txt2img", body, basic)
    assert png_of(answer["images"][0]).size == (64, 64)
    assert json.loads(answer["info"])["steps"] == 3
    assert answer["parameters"]["prompt"] == "a cat"
    assert served.json("POST", "/sdapi/v1/interrupt", headers=basic) == {}


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"sampler_name": "nothing"}, 404, "Sampler not found"),
        ({"scheduler": "nothing"}, 404, "Scheduler not found"),
        ({"prompt": ""}, 400, "prompt"),
        ({"init_images": ["nonsense"]}, 500, "Invalid encoded image"),
        ({"init_images": ["http://169.254.169.254/"]}, 400, "fetches nothing"),
        ({"steps": 10**9}, 400, "steps"),
        ({"batch_size": 10**6}, 400, "count"),
    ],
    ids=str,
)
def test_errors_have_automatic1111s_shape(served: Served, fields: dict[str, Any], status: int, text: str) -> None:
    path = "img2img" if "init_images" in fields else "txt2img"
    answer = served.request("POST", f"/sdapi/v1/{path}", {"prompt": "a cat", "steps": 2, **fields})
    content = json.loads(answer[2])
    assert (answer[0], text in content["detail"], set(content)) == (status, True, {"error", "detail", "body", "errors"})


# --- The guard ---

JSON = b'{"prompt": "a cat", "steps": 1}'


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Host": "evil.example"}, 403, "forbidden_host"),
        ({"Host": "127.0.0.1:1"}, 403, "forbidden_host"),
        ({"Host": "localhost.evil.example:{port}"}, 403, "forbidden_host"),
        ({"Host": ""}, 403, "forbidden_host"),
        ({"Origin": "https://evil.example"}, 403, "forbidden_origin"),
        ({"Origin": "null"}, 403, "forbidden_origin"),
        ({"Origin": "http://localhost:{port}"}, 403, "forbidden_origin"),  # the Host is 127.0.0.1
        ({"Sec-Fetch-Site": "cross-site"}, 403, "forbidden_origin"),
        ({"Sec-Fetch-Site": "same-site"}, 403, "forbidden_origin"),
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"Content-Type": ""}, 415, "unsupported_media_type"),
        ({"Authorization": ""}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"Authorization": f"Bearer {KEY}x"}, 401, "invalid_api_key"),
        ({"Authorization": "Basic !!!"}, 401, "invalid_api_key"),
        ({"Content-Length": "67108864"}, 413, "too_large"),
    ],
    ids=str,
)
def test_the_guard_refuses(served: Served, headers: dict[str, str], status: int, code: str) -> None:
    sent = {
        "Host": served.host,
        "Content-Type": "application/json",
        **served.authorization,
        "Content-Length": str(len(JSON)),
        **headers,
    }
    head = "".join(f"{name}: {value.replace('{port}', str(served.port))}\r\n" for name, value in sent.items())
    answer = raw(served.port, f"POST /api/jobs HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + JSON)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert code.encode() in answer


def test_the_guard_lets_its_own_page_and_allowed_ones_in(served: Served) -> None:
    for origin in (served.url, SITE):
        status, headers, _ = served.request("GET", "/api/pictures", headers={"Origin": origin})
        assert (status, headers.get("access-control-allow-origin")) == (200, SITE if origin == SITE else None)
    preflight = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
    assert served.request("OPTIONS", "/v1/images/generations", headers=preflight)[0] == 204
    assert served.request("GET", "/health", headers={"Host": "pictures.example"})[0] == 200
    status, headers, _ = served.request(
        "GET", "/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Authorization": ""}
    )
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="diffgen"')
    assert "default-src 'self'" in headers["content-security-policy"]


def test_a_body_is_bounded_while_it_arrives(served: Served) -> None:
    head = f"POST /api/jobs HTTP/1.1\r\nHost: {served.host}\r\nAuthorization: Bearer {served.key}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = raw(served.port, head.encode() + chunk * 64)  # 4 MB and no end
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:100]


def bomb() -> bytes:
    """A small PNG that says it has 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data", [bomb(), b"GIF89a", b"", encoded(Image.new("RGB", (300, 300)))], ids=["bomb", "GIF", "empty", "large"]
)
def test_a_picture_is_checked_before_it_is_decoded(served: Served, data: bytes) -> None:
    body = {"prompt": "a cat", "image": base64.b64encode(data).decode()}
    status, _, content = served.request("POST", "/api/jobs", body)
    assert (status, json.loads(content)["error"]["code"]) == (400, "invalid_input")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt": "a", "guidance": Infinity}',
        b"\xff",
        b'{"prompt": 7}',
    ],
    ids=lambda body: body[:20].decode("latin-1"),
)
def test_a_body_that_is_no_request(served: Served, body: bytes) -> None:
    status, _, _ = served.request("POST", "/api/jobs", body, {"Content-Type": "application/json"})
    assert status == 400


def test_a_slow_head_is_not_waited_for(served: Served, slow_client: socket.socket) -> None:
    assert slow_client.recv(1) == b""  # it is closed by now, or within HEADER_SECONDS
    assert served.json("GET", "/health")["status"] == "ok"


def test_nothing_but_pictures_is_in_the_folder(served: Served) -> None:
    assert {path.suffix for path in Path(served.folder).iterdir() if not path.name.startswith(".")} == {".png"}
