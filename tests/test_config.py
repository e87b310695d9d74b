"""Named settings: what nobody changed stays as the name says, and an unknown name is one sentence."""

from dataclasses import fields, replace

import pytest

import gradmm
from gradmm.config import PRESETS, SynthesisConfig, described
from gradmm.errors import UserError

SETTINGS = [item.name for item in fields(SynthesisConfig)]


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_left_alone_is_as_the_name_says(name):
    assert gradmm.preset(name) == gradmm.preset(name, **dict.fromkeys(SETTINGS)) == PRESETS[name]


@pytest.mark.parametrize(
    "changes", [{"rho": 0.5}, {"n_synthetic": 7, "top_k": 3}, {"seed": 2, "projection": "nearest_then_lm"}]
)
@pytest.mark.parametrize("name", ["pool", "admm", "paper"])
def test_what_is_changed_is_changed_alone(name, changes):
    assert gradmm.preset(name, **changes, inner_steps=None) == replace(PRESETS[name], **changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ADMM", r"^search = 'ADMM' is not known: did you mean admm\?$"),
        ("papers", r"did you mean paper\?$"),
        ("zzz", "search = 'zzz' is not known: use one of pool, admm, "),
        (None, "search = None is not known: use one of pool"),
        (["admm"], r"search = \['admm'\] is not known"),
    ],
)
def test_an_unknown_name_is_refused_in_one_sentence(name, message):
    with pytest.raises(UserError, match=message):
        gradmm.preset(name)


def test_an_unknown_setting_and_a_wrong_value_are_refused():
    with pytest.raises(UserError, match="unknown setting 'rhoo': the settings are"):
        gradmm.preset("admm", rhoo=None)
    with pytest.raises(UserError, match="top_k = 0"):
        gradmm.preset("admm", top_k=0)


def test_a_run_is_described_by_its_name_its_changes_and_what_is_other_than_the_defaults():
    assert described("pool", PRESETS["pool"]) == "Settings: `gradmm.PRESETS['pool']` as it is."
    changed = described("paper", gradmm.preset("paper", rho=0.5))
    assert changed.startswith(
        "Settings: `gradmm.PRESETS['paper']` with `rho = 0.5`. Other than the package's defaults are"
    )
    assert all(f"`{text}`" in changed for text in ("outer_steps = 30", "init_candidates = 500", "search = 'admm'"))
    assert described("pool", gradmm.preset("pool", seed=3)) == "Settings: `gradmm.PRESETS['pool']` with `seed = 3`."
