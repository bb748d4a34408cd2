"""The command that reproduces a picture here by its metadata, and notes on what it cannot carry over."""

from __future__ import annotations

import re

from . import a1111
from .picture_info import PictureInfo
from .picture_info import plain_number as plain

MAX_SEED = 2**32 - 1


def command(info: PictureInfo, model: str | None = None) -> tuple[list[str], list[str]]:
    """(words, notes): `diffgen generate …` as the words of a shell command, and what is left out of it or may differ.

    `model` is what to give to -m; None where it is the default.
    """
    notes = list(info.notes)
    words = ["diffgen", "generate"]
    options: list[str] = []

    def add(option: str, value: float | str | None, low: float = -10e9, high: float = 10e9) -> None:
        if value is None:
            return
        if not isinstance(value, str) and not low <= value <= high:
            notes.append(f"{option} {plain(value)} is left out: here it is from {plain(low)} to {plain(high)}")
            return
        options.extend([option, value if isinstance(value, str) else plain(value)])

    prompt = _prompt(info, info.prompt or "", notes)
    negative = _prompt(info, info.negative or "", [])
    add("-m", model)
    add("--negative", negative if negative.strip() else None)
    add("--seed", info.seed, 0, MAX_SEED)
    add("--steps", info.steps, 1, 1000)
    add("--guidance", info.guidance, 0, 100)
    add("--scheduler", info.label)
    add("--grid", info.given_grid if info.label or info.scheduler is None else None)
    width, height = info.first_size or (info.width, info.height)
    if width and height:
        add("--size", f"{width}x{height}" if max(width, height) <= 8192 else None)
    if info.clip_skip and info.clip_skip > 1:
        add("--clip-skip", info.clip_skip, 1, 12)
    for name, scale in info.loras:
        file = name if name.endswith(".safetensors") else f"{name}.safetensors"
        add("--lora", f"{file}:{plain(scale)}")
    if info.variation is not None and info.variation[0] <= MAX_SEED and 0 <= info.variation[1] <= 1:
        add("--variation-seed", info.variation[0])
        add("--variation-strength", info.variation[1])
    if info.upscale is not None:
        factor, mode, strength = info.upscale
        add("--upscale", factor, 1, 8)
        add("--upscale-mode", mode)
        add("--upscale-strength", strength, 0.000001, 1)
    if info.syntax == "plain":
        add("--prompt-syntax", "plain")
    options += info.more
    if info.strength is not None:
        notes.append(
            f"made from a picture: add --image FILE --strength {plain(info.strength)}, and --mask FILE if it had one"
        )
    if not prompt.strip():
        if info.syntax != "ours":
            notes.append("there is no prompt in it")
        prompt = ""
    words += options if not prompt else [*options, "--", prompt] if prompt.startswith("-") else [prompt, *options]
    if info.tool != "diffgen":
        notes.append(_noise(info))
    return words, list(dict.fromkeys(notes))


def _prompt(info: PictureInfo, prompt: str, notes: list[str]) -> str:
    """A tool's prompt, written so that it means the same here."""
    if info.syntax != "a1111":
        return prompt
    bracketed = re.findall(r"\[([^\[\]]*)\]", prompt)
    if re.search(r"\bAND\b", prompt) or any(":" in part or "|" in part for part in bracketed):
        notes.append("AND, [a:b:0.5] and [a|b] have no meaning here: they are read as text")
    prompt = a1111.without_tags(prompt)
    return re.sub(r"(?<!\\)([{}])", r"\\\1", prompt).replace("__", r"\_\_")


def _noise(info: PictureInfo) -> str:
    if info.cpu_noise:
        return (
            "its noise comes from torch's generator on the CPU, as here: the picture may come out alike, not identical"
        )
    return "its noise comes from elsewhere: here the same seed gives another picture"
