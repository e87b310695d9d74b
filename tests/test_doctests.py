"""The examples in docstrings: they run as they stand, on the embedded default, and the first functions to call have one."""

import doctest
import importlib
from pathlib import Path

import pytest

import gradmm
from gradmm import demo_text

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.stem for path in (ROOT / "gradmm").glob("*.py") if ">>>" in path.read_text(encoding="utf-8"))
FIRST = ("load_model", "load_data", "release", "synthesize", "finetune")


@pytest.mark.skipif(not (demo_text.DATA / "model").is_dir(), reason="the embedded model is not here")
@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_a_room_run(room):
    found = doctest.testmod(importlib.import_module(f"gradmm.{room}"), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("name", FIRST)
def test_what_a_new_user_calls_first_has_an_example(name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(gradmm, name), name)
    assert any(f"gradmm.{name}(" in example.source for example in found.examples)
