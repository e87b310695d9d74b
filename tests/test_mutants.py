"""The reasons for changes that no test notices speak of code that exists."""

import importlib
import operator
from pathlib import Path

import mutants


def test_every_reason_names_a_function_of_the_package_and_a_line_that_it_does_not_hold():
    reasons = mutants.explained(Path(__file__).with_name("mutants.toml"))
    for function, line in reasons:
        module, _, name = function.partition(".")
        source = importlib.import_module(f"gradmm.{module}")
        assert callable(operator.attrgetter(name)(source)), function
        assert line not in Path(source.__file__).read_text(encoding="utf-8"), line
    assert len(reasons) > 0


def test_a_mutant_s_name_tells_its_function():
    names = {
        "gradmm.admm.x__finish__mutmut_6": "admm._finish",
        "gradmm.gradients.x_joint_order__mutmut_12": "gradients.joint_order",
    }
    names |= {
        "gradmm.gradients.xǁ_Chosenǁloss_with__mutmut_10": "gradients._Chosen.loss_with",
        "gradmm.privacy.xǁReleaseǁto__mutmut_7": "privacy.Release.to",
    }
    assert {name: mutants._function(name) for name in names} == names
