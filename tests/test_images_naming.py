"""`-o`: names of pictures, refusals before any work, and names that stay in their folder for every prompt."""

import os
import re
import resource
import subprocess
import sys
import tempfile
import unicodedata
from datetime import date
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import diffgen
from diffgen.errors import CannotWrite, UsageError
from diffgen.images.naming import DEFAULT, MAX_COMPONENT, Outputs, slug

VALUES = {"seed": 7, "prompt": "a red apple", "model": "emoji", "scheduler": "dpmpp_2m", "steps": 20}


def write(out, count=1, overwrite=False, times=None, **values):
    outputs = Outputs(out, count, overwrite)
    return [str(outputs.write(b"%d" % i, **{**VALUES, **values})) for i in range(times or count)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def everything(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir())


# What -o means


@pytest.mark.parametrize(
    ("out", "count", "expected"),
    [
        (None, 2, ["outputs/000001-7-a-red-apple.png", "outputs/000002-7-a-red-apple.png"]),
        ("new/", 1, ["new/000001-7-a-red-apple.png"]),
        ("deep/er/", 1, ["deep/er/000001-7-a-red-apple.png"]),
        ("x.png", 1, ["x.png"]),
        ("x.PNG", 1, ["x.PNG"]),
        ("sub/x.png", 1, ["sub/x.png"]),
        ("x.png", 3, ["x-1.png", "x-2.png", "x-3.png"]),
        ("a.b.png", 2, ["a.b-1.png", "a.b-2.png"]),
        ("t/{seed:06}_{steps}_{scheduler}_{model}.png", 1, ["t/000007_20_dpmpp_2m_emoji.png"]),
        ("{prompt:5}{{x}}.png", 1, ["a-red{x}.png"]),
        ("{model}/{prompt}/{index}.png", 2, ["emoji/a-red-apple/1.png", "emoji/a-red-apple/2.png"]),
        ("s{seed}.png", 3, ["s7.png", "s7-1.png", "s7-2.png"]),
        ("{model}/", 1, ["emoji/000001-7-a-red-apple.png"]),
    ],
)
def test_names(out, count, expected):
    assert write(out, count) == expected
    assert everything() == sorted(expected)
    assert [Path(name).read_bytes() for name in expected] == [b"%d" % i for i in range(count)]


def test_existing_folder_with_or_without_slash_and_with_braces():
    for name in ("have", "odd{name}"):
        os.mkdir(name)
        assert write(name) == [f"{name}/000001-7-a-red-apple.png"]
        assert write(f"{name}/") == [f"{name}/000002-7-a-red-apple.png"]


def test_absolute_stays_absolute(tmp_path):
    assert write(f"{tmp_path}/x.png") == [f"{tmp_path}/x.png"]


def test_date_is_of_today():
    before = date.today()
    (name,) = write("{date}.png")
    (formatted,) = write("{date:%Y_%m}.png")
    assert name in {f"{day:%Y-%m-%d}.png" for day in (before, date.today())}
    assert formatted == f"{name[:4]}_{name[5:7]}.png"


def test_the_number_is_one_more_than_the_highest_of_this_template():
    os.mkdir("outputs")
    for name in ("000041-3-cat.png", "000007-9-dog.png", "000099-note.txt", "x-000100-1-a.png", "1000.png"):
        Path("outputs", name).touch()
    assert write(None) == ["outputs/000042-7-a-red-apple.png"]
    Path("n9.png").touch()
    assert write("n{index}.png") == ["n10.png"]


def test_own_pictures_are_not_overwritten_but_older_ones_are():
    Path("s7.png").write_bytes(b"old")
    assert write("s{seed}.png", 2, overwrite=True) == ["s7.png", "s7-1.png"]
    assert Path("s7.png").read_bytes() == b"0"


def test_overwrite_of_a_file():
    Path("x.png").write_bytes(b"old")
    assert write("x.png", overwrite=True) == ["x.png"]
    assert Path("x.png").read_bytes() == b"0"
    assert everything() == ["x.png"]


# What is refused before any work: nothing is made, and building it is enough to know


def refused(error, match, *arguments):
    before = everything()
    with pytest.raises(error, match=match):
        Outputs(*arguments)
    assert everything() == before


def test_building_makes_nothing():
    for out in (None, "new/", "a/b/c.png", "{model}/{index}.png"):
        Outputs(out, 2)
    assert os.listdir() == []


def test_existing_files_are_refused():
    Path("x.png").touch()
    Path("y-2.png").touch()
    Path("dangling.png").symlink_to("nowhere")
    refused(CannotWrite, r"x\.png: it exists", "x.png", 1)
    refused(CannotWrite, r"y-2\.png: it exists", "y.png", 3)
    refused(CannotWrite, "exists", "dangling.png", 1)
    Outputs("x.png", 2)  # x-1.png and x-2.png are free
    Outputs("y.png", 1)


@pytest.mark.parametrize("out", ["x.jpg", "x.webp", "x", "-", "{seed}.jpg", "{prompt}", "", ".png", "x.png\0"])
def test_only_png(out):
    refused(UsageError, "-o", out, 1)


@pytest.mark.parametrize(
    "out",
    [
        "{seeds}.png",
        "{}.png",
        "{0}.png",
        "{seed.__class__}.png",
        "{prompt[0]}.png",
        "{seed!r}.png",
        "{seed:>9}.png",
        "{index:{seed}}.png",
        "{prompt:999}.png",
        "{date:%s}.png",
        "{seed.png",
        "seed}.png",
        "{index}/x.png",
        "{nope}/x.png",
        "{prompt}/../../x.png",
    ],
)
def test_bad_templates(out):
    refused(UsageError, "-o", out, 1)


def test_an_unknown_field_lists_the_fields():
    with pytest.raises(UsageError) as excinfo:
        Outputs("{sed}.png", 1)
    assert "{sed}" in excinfo.value.message
    for field in ("index", "seed", "prompt", "model", "scheduler", "steps", "date"):
        assert f"{{{field}}}" in excinfo.value.hint


def test_names_that_are_too_long():
    refused(UsageError, "longer", "x" * 119 + "{seed}.png", 1)
    refused(CannotWrite, "long", "x" * 300 + ".png", 1)


def test_folders_that_are_none():
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    os.mkdir("folder.png")
    refused(CannotWrite, "not a folder", "file/", 1)
    refused(CannotWrite, "not a folder", "file/x.png", 1)
    refused(CannotWrite, "not a folder", "file/{seed}.png", 1)
    refused(CannotWrite, "not a folder", "dangling/", 1)
    os.mkdir("y-1.png")
    refused(CannotWrite, "is a folder", "y.png", 2, True)


def test_no_permission(tmp_path):
    """Needs an ordinary user: root may write anywhere."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        locked = Path(place, "locked")
        locked.mkdir()
        locked.chmod(0o555)
        child = os.fork()
        if not child:
            status = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                refusals = 0
                for out in (f"{locked}/", f"{locked}/x.png", f"{locked}/new/{{seed}}.png"):
                    try:
                        Outputs(out, 1)
                    except CannotWrite as error:
                        refusals += "permission" in error.message
                status = 0 if refusals == 3 else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Names from prompts

RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{p}{i}" for p in ("COM", "LPT") for i in range(10))}
HOSTILE = [
    *("../../etc/passwd", "/etc/x", "a/b", "a\\b", "C:\\x", "..", ".", "~", ".hidden", "-rf", "%2e%2e", "trail. "),
    *("CON", "nul.txt", "com1", "COM¹", "", "   ", "\0", "a\nb", "\ud800", "…", "\u202egnp.exe"),
    *("🍎" * 300, "é" * 300, "x" * 300),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_prompts_stay_in_the_folder(text):
    names = write("out/", prompt=text, model=text, times=2)
    names += write("t/{model}/{prompt}.png", prompt=text, model=text, times=2)
    names += write("u/{prompt}.png", prompt=text, scheduler=text)
    assert everything() == sorted(set(names))
    for name in names:
        for part in Path(name).parts:
            assert len(part.encode()) <= MAX_COMPONENT
            assert part.split(".")[0].upper() not in RESERVED


def windows_safe(name: str) -> bool:
    """Whether Windows accepts the name, by Microsoft's rules."""
    return (
        not set(name) & set('<>:"/\\|?*')
        and all(ord(c) >= 32 for c in name)
        and name[-1] not in ". "
        and PureWindowsPath(name).name == name
    )


@given(st.text(st.characters(), max_size=300))
@example("a. b")
@example("\u0301" * 100)
@example("ﷺ" * 50)  # NFKC makes eighteen letters of one
def test_slug(text):
    stem = slug(text)
    assert 0 < len(stem.encode("utf-8", "strict")) <= 80
    assert windows_safe(stem)
    assert stem[0] not in ".-_~"
    assert ".." not in stem
    assert all(unicodedata.category(c)[0] in "LNM" or c in "-._" for c in stem)
    assert slug(stem) == stem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple, noto style", "a-red-apple-noto-style"),
        ("東京タワー", "東京タワー"),
        ("हिन्दी café", "हिन्दी-café"),
        ("sd-v1.5", "sd-v1.5"),
        ("🍎", "untitled"),
        ("x" * 79 + "é", "x" * 79),
    ],
)
def test_a_slug_keeps_readable_characters(text, expected):
    assert slug(text) == expected


@settings(max_examples=30)
@given(st.text(st.characters(), max_size=200), st.text(st.characters(), max_size=50))
def test_any_prompt_gives_one_file_below_the_folder(prompt, model):
    with tempfile.TemporaryDirectory() as folder:
        path = Outputs(f"{folder}/{{model}}/", 1).write(b"x", seed=1, prompt=prompt, model=model)
        assert [str(path)] == [f"{folder}/{name}" for name in everything(folder)]
        assert len(path.relative_to(folder).parts) == 2


def test_a_picture_that_cannot_be_written_leaves_no_folder():
    Path("there").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for out in ("new/{seed}/", "there/new/x.png", "there/"):
            with pytest.raises(CannotWrite, match="larger than the limit"):
                Outputs(out, 1).write(b"x" * 100, seed=1, prompt="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (os.listdir(), os.listdir("there")) == (["there"], [])


def test_links_below_the_folder_are_not_followed(tmp_path):
    for name in ("secret", "out"):
        os.mkdir(name)
    Path("out/emoji").symlink_to(tmp_path / "secret")
    outputs = Outputs("out/{model}/{prompt}/x{seed}.png", 1)
    with pytest.raises(CannotWrite, match="symbolic link"):
        outputs.write(b"x", **VALUES)
    assert os.listdir("secret") == []
    Path("mine").symlink_to("secret")  # a link that the user names is meant
    assert write("mine/{seed}.png") == ["mine/7.png"]


# Two processes

NUMBERER = """
import sys
from diffgen.images.naming import Outputs
outputs = Outputs(sys.argv[1], 40)
print("ready", flush=True); sys.stdin.readline()
for i in range(40):
    print(outputs.write(sys.argv[2].encode() * 500, seed=int(sys.argv[2]), prompt="x"))
"""


@pytest.mark.parametrize("out", ["both/", "both/{index:03}.png", "both/x.png.{prompt}.png"])
def test_two_processes_share_a_folder(out):
    command = [sys.executable, "-c", NUMBERER, out]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(diffgen.__file__).parent.parent)}
    processes = [subprocess.Popen([*command, mark], **pipes, env=environment) for mark in "12"]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=20)[0].split() for process in processes]
    assert everything() == sorted(printed[0] + printed[1])
    assert len(set(printed[0] + printed[1])) == 80
    for mark, names in zip((b"1", b"2"), printed, strict=True):
        assert all(Path(name).read_bytes() == mark * 500 for name in names)
    if "prompt" not in out:
        numbers = [int(re.match(r"both/0*(\d+)", name)[1]) for name in printed[0] + printed[1]]
        assert sorted(numbers) == list(range(1, 81))


def test_default_is_the_documented_one():
    assert DEFAULT == "outputs/{index:06}-{seed}-{prompt}.png"
    assert Outputs(None, 1).pattern == DEFAULT
