"""Imports go one way between the rooms; torch-free rooms import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image

from diffgen.images.metadata import encode_png

ROOT = Path(__file__).parent.parent
LEVELS = {
    "schedulers": 0,
    "diffgen.version": 0,
    "diffgen.errors": 0,
    "diffgen.environment": 0,
    "diffgen.devices": 1,
    "diffgen.diffusion": 1,
    "diffgen.networks": 1,
    "diffgen.images": 1,
    "diffgen.models": 1,
    "diffgen.storage": 2,
    "diffgen.prompts": 2,
    "diffgen.generation": 2,
    "diffgen.training": 3,
    "diffgen.pipelines": 4,
    "diffgen.loading": 5,
    "diffgen.comparison": 6,
    "diffgen.reproduce": 6,
    "diffgen": 7,
    "diffgen.serve": 8,
    "diffgen.batch": 8,
    "diffgen.cli": 9,
    "diffgen.__main__": 10,
}
TORCH_FREE = {
    "diffgen.images",
    "diffgen.models",
    "diffgen.prompts",
    "diffgen.generation",
    "diffgen.serve",
    "diffgen.cli",
}
FILES = sorted(path for package in ("diffgen", "schedulers") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The longest name in the table that holds the module."""
    return max((name for name in LEVELS if f"{module}.".startswith(f"{name}.")), key=len, default="")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of each import in a file, those inside functions too."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{name.name}", node.lineno) for name in node.names)


def test_every_room_is_in_the_table() -> None:
    for path in FILES:
        module = module_of(path)
        assert room(module) != "diffgen" or module == "diffgen", f"{module} is in no room of the table"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    here = room(module_of(path))
    for name, line in imports(path):
        there = room(name)
        if there and there != here:
            assert LEVELS[there] < LEVELS[here], f"{path}:{line}: {here} imports {name}"
        if here == "schedulers":
            top = name.split(".")[0]
            foreign = top not in {"torch", "schedulers"} and top not in sys.stdlib_module_names
            assert not foreign or path.name == "for_diffusers.py", f"{path}:{line}: schedulers imports {name}"
        if name.split(".")[0] in {"diffusers", "transformers"}:
            where = here == "diffgen.pipelines" or path.name == "for_diffusers.py"
            assert where, f"{path}:{line}: {here} imports {name}"
        if name.split(".")[0] == "torch":
            where = here not in TORCH_FREE
            assert where, f"{path}:{line}: {here} imports torch"


def test_no_circles() -> None:
    """No chain of imports leads from a file back to it; imports for type checking and inside functions count."""
    files = {module_of(path) for path in FILES}
    graph = {module_of(path): {file_of(name, files) for name, _ in imports(path)} & files for path in FILES}
    for module, needed in graph.items():
        needed.discard(module)  # a package hands on names of its own files
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def file_of(name: str, files: set[str]) -> str:
    """The module that an imported name is, or is defined in."""
    return name if name in files else name.rpartition(".")[0]


def test_torch_free_rooms_import_no_torch(tiny: Path, tmp_path: Path) -> None:
    picture = tmp_path / "apple.png"
    picture.write_bytes(encode_png(Image.new("RGB", (8, 8)), {"prompt": "a red apple", "seed": 7}))
    code = f"""
import sys
import diffgen, schedulers
assert "numpy" not in sys.modules and "typer" not in sys.modules
from diffgen.cli import run
for line in (
    [], ["--help"], ["--version"], ["generate", "--help"], ["schedulers", "list"], ["models", "list"],
    ["schedulers", "show", "DPM++ 2M Karras"], ["prompt", "explain", "a"], ["inspect", {str(picture)!r}],
    ["schedulers", "list", "-m", {str(tiny)!r}],
    ["models", "info", {str(tiny)!r}],
    ["generate", "a", "-m", {str(tiny)!r}, "--dry-run"],
):
    assert run(line) == 0, line
for line in (
    ["generate", "a", "-m", "nothing"], ["generate", "a", "--steps", "0"], ["generate", "a", "--scheduler", "eular"],
):
    assert run(line) != 0, line
heavy = {{"torch", "numpy", "diffusers", "transformers", "huggingface_hub", "matplotlib", "rich.progress"}}
loaded = sorted(heavy & set(sys.modules))
assert not loaded, loaded
"""
    assert_runs(code)


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ([], set()),
        (["--help"], set()),
        (["--version"], set()),
        (["a red apple"], set()),
        (["models", "--help"], set()),
        (["schedulers", "list"], {"schedulers"}),
        (["doctor", "--help"], {"doctor"}),
    ],
    ids=" ".join,
)
def test_a_command_is_imported_when_it_is_called(line: list[str], commands: set[str]) -> None:
    assert_runs(f"""
import sys
from diffgen.cli import run
run({line!r})
from diffgen.cli.commands import COMMANDS
loaded = {{name for name in COMMANDS if f"diffgen.cli.{{name}}" in sys.modules}}
assert loaded == {commands!r}, loaded
""")


def assert_runs(code: str) -> None:
    """Run the code in a fresh Python."""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
