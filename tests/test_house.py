"""Rules of the code that CONTRIBUTING states, read from the syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("diffgen", "schedulers") for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
FOLDERS = sorted({path.parent for path in FILES})
Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def family_comparisons() -> Iterator[str]:
    """The comparisons of a family with a constant name, outside the families' rows and modules."""
    for path, tree in TREES.items():
        if path.stem == "families" or path.parent.name == "families":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                family = any(getattr(side, "attr", getattr(side, "id", "")) == "family" for side in sides)
                if family and any(
                    isinstance(part, ast.Constant) and isinstance(part.value, str)
                    for side in sides
                    for part in ast.walk(side)
                ):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_code_does_not_ask_for_the_name_of_a_family() -> None:
    assert len(list(family_comparisons())) <= 6, "\n".join(family_comparisons())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_public_name_is_defined_once_in_a_package(folder: Path) -> None:
    modules: dict[str, set[str]] = defaultdict(set)
    for path, tree in TREES.items():
        if path.parent == folder:
            for node in tree.body:
                if isinstance(node, Definition) and not node.name.startswith("_"):
                    modules[node.name].add(path.name)
    if folder.name in ("readers", "families"):  # their modules have the same functions, which tables call
        modules = {name: files for name, files in modules.items() if name[0].isupper()}
    assert {name: files for name, files in modules.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "diffgen" / "cli").glob("*.py")), ids=lambda p: p.stem)
def test_the_body_of_a_command_has_at_most_80_lines(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert body[-1].end_lineno is not None
                assert body[-1].end_lineno - body[0].lineno < 80, node.name
