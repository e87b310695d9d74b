"""The reasons for changes that no test notices speak of code that exists."""

import difflib
import importlib
import inspect
import operator
from pathlib import Path

import mutants


def test_every_reason_names_a_function_and_a_line_that_is_one_change_away_from_one_of_its_own():
    reasons = mutants.explained(Path(__file__).with_name("mutants.toml"))
    for function, line in reasons:
        module, _, name = function.partition(".")
        source = inspect.getsource(operator.attrgetter(name)(importlib.import_module(f"gradmm.{module}")))
        lines = [own.strip() for own in source.splitlines()]
        assert line not in lines and difflib.get_close_matches(line.removeprefix("- "), lines, cutoff=0.7), line
    assert len(reasons) > 0


def test_a_mutant_s_name_tells_its_function():
    names = {
        "gradmm.admm.x__finish__mutmut_6": "admm._finish",
        "gradmm.gradients.x_greedy_order__mutmut_12": "gradients.greedy_order",
    }
    names |= {
        "gradmm.gradients.xǁDenseTargetǁinner__mutmut_10": "gradients.DenseTarget.inner",
        "gradmm.privacy.xǁReleaseǁto__mutmut_7": "privacy.Release.to",
    }
    assert {name: mutants.function_of(name) for name in names} == names


def test_a_change_is_told_by_the_line_that_it_makes_or_takes_out():
    head = "--- a\n+++ a\n@@ -1 +1 @@\n f(\n"
    assert mutants.change(f"{head}-    a,\n+    None,\n     b,") == "None,"
    assert mutants.change(f"{head}-    a,\n     b,") == "- a,"
    assert mutants.change(f"{head}-    a,\n-)\n+    )") == "- a,"
