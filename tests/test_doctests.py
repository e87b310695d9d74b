"""Docstrings: every public function has one that says what it refuses; their examples run as they stand."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import gradmm

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT / "gradmm").with_suffix("").parts): path for path in (ROOT / "gradmm").rglob("*.py")
}
ROOMS = sorted(
    room for room, path in FILES.items() if ">>>" in path.read_text(encoding="utf-8") and "__init__" not in room
)
SAYS = re.compile(r"Raises:|Raise |refused")
CENTRAL = ("admm", "gradients", "projection", "privacy", "mechanism", "tasks", "selection", "experiments.batch")
FIRST = ("load_model", "load_data", "release", "synthesize", "finetune")


@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_a_room_run(room):
    found = doctest.testmod(
        importlib.import_module(f"gradmm.{room}"), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("name", FIRST)
def test_what_a_new_user_calls_first_has_an_example(name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(gradmm, name), name)
    assert any(f"gradmm.{name}(" in example.source for example in found.examples)


def test_the_central_rooms_have_examples():
    assert set(CENTRAL) <= set(ROOMS)


def public(body: list[ast.stmt], prefix: str = "") -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """The public functions, classes and methods of a file, by their dotted names."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[prefix + node.name] = node
            found |= public(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else {}
    return found


def refuses(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a function itself raises an error of the caller's."""
    called = {getattr(inner.func, "id", "") for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    return isinstance(node, ast.FunctionDef) and (
        "require" in called or any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    )


@pytest.mark.parametrize("room", sorted(room for room in FILES if "__init__" not in room))
def test_every_public_docstring_says_what_is_done_and_what_is_refused(room):
    tree = ast.parse(FILES[room].read_text(encoding="utf-8"))
    said = {name: ast.get_docstring(node) or "" for name, node in public(tree.body).items()}
    assert ast.get_docstring(tree) and not [name for name, text in said.items() if not text]
    silent = [name for name, node in public(tree.body).items() if refuses(node) and not SAYS.search(said[name])]
    assert not silent, f"add `Raises:` to the docstring of {', '.join(silent)}"
