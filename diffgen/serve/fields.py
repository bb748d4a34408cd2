"""The fields of a request → the options of generate. A field that names a file is a name from a list, or the bytes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffgen.errors import UsageError
from diffgen.generation.checks import parse_size
from diffgen.generation.options import ALIASES, OPTIONS, plain_type
from diffgen.images.metadata import base_name
from diffgen.images.read import read_image
from diffgen.pipelines.inputs import Input
from schedulers.explicit import is_grid_file

from .settings import Refused, Settings

LORA = re.compile(r"<lora:([^:<>]+)(?::([+-]?[\d.]+))?[^<>]*>")


def bad(message: str, param: str, hint: str = "") -> Refused:
    """The error for a field with a wrong value."""
    return Refused(400, "invalid_value", message, hint, param=param)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise bad(f"{name} must be a whole number (got {value!r:.80})", name)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise bad(f"{name} must be a number (got {value!r:.80})", name) from None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise bad(f"{name} must be a finite number (got {value!r:.80})", name)
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad(f"{name} must be text (got {value!r:.80})", name)
    return value


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise bad(f"{name} must be true or false (got {value!r:.80})", name)
    return value


def _texts(name: str, value: Any) -> list[str]:
    return [_text(name, one) for one in (value if isinstance(value, list) else [value])]


def _as_is(name: str, value: Any) -> Any:
    return value


def _grid(name: str, value: Any) -> str:
    if is_grid_file(_text(name, value)):
        raise bad(f"{name} must be the name of a grid, not a file", name)
    return str(value)


Read = Callable[[str, Any], Any]

PLAIN: dict[type | None, Read] = {int: _whole, float: _number, str: _text, bool: _switch, None: _as_is}
READ: dict[str, Read] = {"style": _texts, "grid": _grid, "loras": _texts, "embeddings": _texts}  # not as its type says
# Other names of options. Where a request has several of one option, its own counts, then the first here.
NAMES = {
    "n": "count",
    **ALIASES,
    "step": "steps",
    "cfg_scale": "guidance",
    "true_cfg_scale": "guidance",
    "sampler": "scheduler",
}


def _read(option: str) -> Read:
    return READ.get(option) or PLAIN[plain_type(option)]


# field: (option, how its value is read)
FIELDS: dict[str, tuple[str, Read]] = {name: (name, _read(name)) for name, row in OPTIONS.items() if row.served}
FIELDS |= {name: (option, _read(option)) for name, option in NAMES.items()}


@dataclass
class Wanted:
    """What a request asks for, in the options of generate."""

    prompt: str
    options: dict[str, Any]
    exact: bool = False
    warnings: list[str] = field(default_factory=list)


def read_fields(fields: Mapping[str, Any], settings: Settings, known: tuple[str, ...] = ()) -> Wanted:
    """The options among the fields of a request; a field with null is absent.

    `known` are the fields that the caller reads itself. Unknown ones are named in `warnings`. Raises Refused.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    options: dict[str, Any] = {}
    for name, (option, read) in FIELDS.items():
        if name in fields and option not in options:
            options[option] = read(name, fields[name])
    unknown = [name for name in fields if name not in FIELDS and name not in (*known, "prompt", "model", "exact")]
    warnings = [f"unknown field {base_name(name)[:60]!r} is ignored" for name in unknown[:20]]
    prompt = _text("prompt", fields.get("prompt", ""))
    prompt, adapters = split_loras(prompt)
    options["loras"] = [lora_path(text, settings) for text in [*options.get("loras", ()), *adapters]]
    options["embeddings"] = [embedding_path(text, settings) for text in options.get("embeddings", ())]
    _check_limits(options, settings)
    return Wanted(prompt, options, _switch("exact", fields.get("exact", settings.exact)) or settings.exact, warnings)


def _check_limits(options: Mapping[str, Any], settings: Settings) -> None:
    """Raise Refused for numbers beyond the server's limits, before anything is computed from them."""
    for name, most in (("count", settings.max_count), ("steps", settings.max_steps)):
        if name in options and not 1 <= options[name] <= most:
            raise bad(f"{name} must be from 1 to {most} (got {options[name]})", name)
    if options.get("size") is not None:
        try:
            width, height = parse_size(options["size"])
        except UsageError as error:
            raise bad(error.message.replace("--size", "size"), "size") from error
        check_pixels(width, height, settings)


def check_pixels(width: int, height: int, settings: Settings) -> None:
    """Raise Refused for a picture with more pixels than the server makes."""
    if width * height > settings.max_pixels:
        raise bad(f"{width}x{height} has too many pixels: this server makes at most {settings.max_pixels}", "size")


def split_loras(prompt: str) -> tuple[str, list[str]]:
    """(the prompt without `<lora:NAME:SCALE>`, ["NAME:SCALE"])."""
    adapters = [f"{name}:{scale or 1}" for name, scale in LORA.findall(prompt)]
    return " ".join(LORA.sub(" ", prompt).split()) if adapters else prompt, adapters


def lora_path(text: str, settings: Settings) -> str:
    """PATH:SCALE from NAME[:SCALE], NAME among the server's LoRAs. Raises Refused."""
    name, _, scale = text.partition(":")
    if name not in settings.loras:
        raise bad(f"there is no LoRA {base_name(name)[:60]!r} on this server", "loras", _listed(settings.loras))
    return f"{settings.loras[name]}:{_number('loras', scale or 1):g}"


def embedding_path(text: str, settings: Settings) -> str:
    """WORD=PATH from [WORD=]NAME, NAME among the server's embeddings. Raises Refused."""
    word, _, name = text.rpartition("=")
    if name not in settings.embeddings:
        raise bad(
            f"there is no embedding {base_name(name)[:60]!r} on this server",
            "embeddings",
            _listed(settings.embeddings),
        )
    return f"{word or name}={settings.embeddings[name]}"


def _listed(names: Mapping[str, Any]) -> str:
    return f"it has: {', '.join(list(names)[:20])}" if names else "it has none; diffgen serve takes a folder of them"


def decode(name: str, value: Any) -> bytes:
    """The bytes of a field in base64, with or without the head of a data: URL. A URL of a site is refused."""
    text = _text(name, value)
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise bad(f"{name} must be base64", name)
    elif "://" in text[:64]:
        raise bad(f"{name} is a URL: this server fetches nothing", name, "send the picture in base64")
    try:
        return base64.b64decode(text, validate=False) if len(text) < 2**31 else b""
    except (binascii.Error, ValueError) as error:
        raise bad(f"{name} is not base64: {error}", name) from error


def picture(name: str, data: bytes, settings: Settings, mode: str = "RGB", file_name: str | None = None) -> Input:
    """A picture that was sent, judged by its header before it is decoded. Raises InputError."""
    image = read_image(data, mode, settings.max_pixels)
    return Input(base_name(file_name)[:200] if file_name else None, hashlib.sha256(data).hexdigest(), image)


def mask_of_alpha(image: Image.Image) -> Image.Image:
    """Our mask, white where a picture is made anew, from OpenAI's, which is transparent there."""
    return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)


def load_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused: no object, NaN, nested too deep."""

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        content = json.loads(body or b"{}", parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise Refused(400, "invalid_json", "the body must be a JSON object")
    return content
