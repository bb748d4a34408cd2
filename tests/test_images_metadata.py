"""A picture's metadata, read back by an independent parser of AUTOMATIC1111's grammar."""

import io
import json
import os
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffgen.errors import InputError
from diffgen.generation.record import read_record
from diffgen.images.metadata import MAX_CHUNK, encode_png, info_of, parameters_text

RECORD = {
    "schema": "diffgen.image/1",
    "prompt": "a red apple, noto style",
    "negative": "",
    "seed": 7,
    "index": 0,
    "steps": 20,
    "nfe": 20,
    "guidance": 5.0,
    "scheduler": "dpmpp_2m",
    "grid": "karras",
    "width": 64,
    "height": 48,
    "model": "emoji",
    "model_hash": "0123456789abcdef" * 4,
    "model_files": {"unet/diffusion_pytorch_model.safetensors": "0123456789abcdef" * 4},
    "family": "stable-diffusion",
    "prediction": "epsilon",
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
    "batch_size": 1,
    "rng": "CPU",
    "versions": {"diffgen": "0.1.0", "torch": "2.13.0"},
    "pixels_sha256": "fedcba9876543210" * 4,
    "warnings": [],
}
PICTURE = Image.new("RGB", (64, 48), "red")


def a1111(text):
    """The grammar, from its description: prompt lines, an optional negative part, a last line of pairs.

    The last line is one if it has at least three pairs. A value is a JSON string or runs to the next comma.
    """
    *lines, last = text.strip().split("\n")
    pair = re.compile(r'\s*(?P<key>\w[\w \-/]+):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    pairs = {m["key"]: m["value"] for m in pair.finditer(last)}
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    parts = {"prompt": [], "negative": []}
    part = "prompt"
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            part, line = "negative", line.strip().removeprefix("Negative prompt:")
        parts[part].append(line.strip())
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs.items()}
    return {**{name: "\n".join(content) for name, content in parts.items()}, **values}


def chunks(png):
    """(kind, body) of every chunk, with its checksum verified; written from the PNG specification."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, []
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        body = png[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", png[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + body)
        parts.append((kind, body))
        place += 12 + length
    return parts


def texts(png):
    """{keyword: text} of tEXt and iTXt chunks."""
    pairs = {}
    for kind, body in chunks(png):
        if kind == b"tEXt":
            keyword, text = body.split(b"\0", 1)
            pairs[keyword.decode("latin-1")] = text.decode("latin-1")
        elif kind == b"iTXt":
            keyword, rest = body.split(b"\0", 1)
            assert rest[0] == 0  # not compressed
            _language, _translated, text = rest[2:].split(b"\0", 2)
            pairs[keyword.decode("latin-1")] = text.decode("utf-8")
    return pairs


def written(tmp_path, record=RECORD, level="full", **more):
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PICTURE, {**record, **more}, level))
    return path


def test_the_a1111_text_word_for_word():
    assert parameters_text({**RECORD, "negative": "blurry"}) == (
        "a red apple, noto style\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 7, Size: 64x48, "
        "Model hash: 0123456789, Model: emoji, RNG: CPU, Version: diffgen 0.1.0"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "5", "negative": ""}),
        ({"guidance": 7.5}, {"CFG scale": "7.5"}),
        ({"guidance": 3}, {"CFG scale": "3"}),
        ({"scheduler": "euler", "grid": "trailing"}, {"Sampler": "Euler", "Schedule type": "Simple"}),
        ({"scheduler": "of_a_plugin", "grid": "tuned.json"}, {"Sampler": "of_a_plugin", "Schedule type": "tuned.json"}),
        ({"grid": "/home/me/tuned.json"}, {"Schedule type": "tuned.json"}),
        ({"model": 'a, b: "c"'}, {"Model": 'a, b: "c"'}),
        ({"model": "/home/me/models/mine"}, {"Model": "mine"}),
        ({"model": "C:\\Users\\me\\mine"}, {"Model": "mine"}),
        ({"prompt": "one\ntwo, Steps: 3", "negative": "x\ny"}, {"prompt": "one\ntwo, Steps: 3", "negative": "x\ny"}),
        ({"prompt": ""}, {"prompt": "", "Steps": "20", "Seed": "7"}),
        ({"seed": 2**64 - 1}, {"Seed": str(2**64 - 1)}),
    ],
)
def test_an_a1111_reader_reads_every_field(change, expected):
    read = a1111(parameters_text({**RECORD, **change}))
    assert {key: read[key] for key in expected} == expected
    assert (read["RNG"], read["Size"], read["Model hash"]) == ("CPU", "64x48", "0123456789")


def test_no_grid_no_schedule_type():
    assert "Schedule type" not in a1111(parameters_text({**RECORD, "grid": None}))


def cleaned(text):
    """A prompt as a reader returns it that splits at line breaks and strips each line."""
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    return "\n".join(line.strip() for line in text.strip().split("\n"))


ordinary = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(
    ordinary, ordinary, st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1)
)
@example("a\r\nb\x00\x1b[31m", "\x85", '"')
def test_prompts_come_back_through_the_a1111_grammar(prompt, negative, model):
    read = a1111(parameters_text({**RECORD, "prompt": prompt, "negative": negative, "model": model}))
    if "Negative prompt:" not in prompt + negative:  # the grammar has no escape for that
        assert (read["prompt"], read["negative"]) == (cleaned(prompt), cleaned(negative))
    assert (read["Steps"], read["Seed"], read["Version"]) == ("20", "7", "diffgen 0.1.0")
    assert read["Model"].strip() == model.strip()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.integers(0, 2**64 - 1))
@example("東京 🍎 \0\x07\x7f\x85 \u202e\u2028", 0)
@example("</x:xmpmeta> %s {prompt} \\ \" '", 1)
def test_records_come_back_exactly(tmp_path_factory, prompt, seed):
    folder = tmp_path_factory.getbasetemp()
    record = {**RECORD, "prompt": prompt, "seed": seed}
    assert read_record(written(folder, record)) == record


def test_half_a_surrogate_pair_does_no_harm(tmp_path):
    assert read_record(written(tmp_path, prompt="a\ud800b"))["prompt"] == "a?b"
    assert texts(encode_png(PICTURE, {**RECORD, "prompt": "a\ud800b"}))["parameters"].startswith("ab\n")


def test_levels():
    read = {level: texts(encode_png(PICTURE, RECORD, level)) for level in ("full", "params", "none")}
    assert set(read["full"]) == {"parameters", "diffgen", "XML:com.adobe.xmp"}
    assert set(read["params"]) == {"parameters", "XML:com.adobe.xmp"}
    assert read["none"] == {}
    for level, pairs in read.items():
        assert info_of(RECORD, level) == pairs
    with pytest.raises(ValueError, match="full, params, none"):
        encode_png(PICTURE, RECORD, "some")


@pytest.mark.parametrize("level", ["full", "params", "none"])
def test_pixels_are_the_same_at_every_level_and_for_pillow(level):
    opened = Image.open(io.BytesIO(encode_png(PICTURE, RECORD, level)))
    assert opened.tobytes() == PICTURE.tobytes()
    assert info_of(RECORD, level).items() <= opened.info.items()


def test_the_source_type_is_found_by_an_xml_parser():
    packet = texts(encode_png(PICTURE, RECORD))["XML:com.adobe.xmp"]
    tree = ElementTree.fromstring(packet.removeprefix("\ufeff"))
    elements = tree.findall(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert [element.text for element in elements] == [
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    ]
    assert Image.open(io.BytesIO(encode_png(PICTURE, RECORD))).getxmp()  # Pillow's own XMP reader takes it too


@pytest.mark.parametrize("letter", ["x", "é", "東", "🍎", "\n", '"', "\x01"])
def test_chunks_are_capped(tmp_path, letter):
    record = {**RECORD, "prompt": letter * 200_000, "negative": letter * 100_000}
    png = encode_png(PICTURE, record)
    for keyword, text in texts(png).items():
        assert len(text.encode()) <= MAX_CHUNK, keyword
    read = read_record(written(tmp_path, record))
    assert read["prompt"]
    assert record["prompt"].startswith(read["prompt"])
    assert "prompt" in read["cut"]
    assert {**read, "prompt": 0, "negative": 0, "cut": 0} == {**record, "prompt": 0, "negative": 0, "cut": 0}
    assert a1111(texts(png)["parameters"])["Seed"] == "7"


def test_long_lists_are_left_out_rather_than_prompts(tmp_path):
    read = read_record(written(tmp_path, warnings=["w" * 100] * 1000))
    assert (read["prompt"], read["warnings"], read["cut"]) == (RECORD["prompt"], None, ["warnings"])


def test_no_home_folder_is_written():
    home = os.path.expanduser("~")
    png = encode_png(PICTURE, {**RECORD, "model": f"{home}/m/emoji", "grid": f"{home}/g.json"})
    assert home.encode() + b"/" not in png


def test_same_record_same_bytes():
    assert encode_png(PICTURE, RECORD) == encode_png(PICTURE.copy(), dict(RECORD))


def carrying(tmp_path, text, keyword="diffgen"):
    info = PngInfo()
    info.add_text(keyword, text)
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    return tmp_path / "x.png"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "/etc/passwd"),
        ("model", "..\\x"),
        ("steps", 10**9),
        ("steps", 1.5),
        ("steps", True),
        ("width", -1),
        ("width", "64"),
        ("seed", -1),
        ("seed", 2**64),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("prompt", ["x"]),
        ("scheduler", "../x"),
        ("model_hash", "0123"),
        ("versions", "x"),
    ],
)
def test_impossible_records_are_refused(tmp_path, key, value):
    with pytest.raises(InputError, match=key):
        read_record(carrying(tmp_path, json.dumps({**RECORD, key: value})))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '"x"', "[" * 50_000, '{"schema": "other/1"}'),
        json.dumps({**RECORD, "prompt": "x" * MAX_CHUNK}),
        '{"schema": "diffgen.image/1", "prompt": "\\ud800"}',
        '{"schema": "diffgen.image/1", "seed": ' + "9" * 5000 + "}",
    ],
)
def test_broken_records_are_refused(tmp_path, text):
    with pytest.raises(InputError, match="record"):
        read_record(carrying(tmp_path, text))


def test_a_picture_without_a_record(tmp_path):
    with pytest.raises(InputError, match="no record"):
        read_record(carrying(tmp_path, "Steps: 1", "parameters"))
    with pytest.raises(InputError, match="cannot read"):
        read_record(tmp_path / "missing.png")


def test_a_bomb_of_text_is_refused(tmp_path):
    info = PngInfo()
    info.add_text("diffgen", "x" * 50_000_000, zip=True)
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    assert (tmp_path / "x.png").stat().st_size < 100_000
    with pytest.raises(InputError):
        read_record(tmp_path / "x.png")
