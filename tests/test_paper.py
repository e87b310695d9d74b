"""The paper's claims: each names an experiment with a preset, and own figures are read as notebooks write them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gradmm import PRESETS
from gradmm.errors import UserError
from gradmm.experiments import paper, records

PARAMS = Path(__file__).resolve().parents[1] / "notebooks" / "params"


@pytest.mark.parametrize("one", paper.experiments(), ids=lambda one: one.name)
def test_an_experiment_has_a_preset_that_says_the_same(one):
    text = (PARAMS / one.preset / f"{one.notebook}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert one.expected in comment and one.memory in comment
    values = yaml.safe_load(text)
    assert values["data"] == one.data and [values["model"], *values.get("other_models", [])] == one.models.split(", ")
    assert f"--preset {one.preset} " in one.command


def test_every_paper_preset_is_an_experiment():
    assert {one.preset for one in paper.experiments()} == {path.name for path in PARAMS.glob("paper-*")}


def test_every_claim_says_what_it_is_about_and_where_it_was_read():
    names = {one.name for one in paper.experiments()}
    for claim in paper.claims():
        assert claim.kind in paper.KINDS and claim.by and set(claim.experiments) <= names and claim.experiments
        assert (claim.value is None) == (claim.method is None) == (claim.kind == "statement")
        assert bool(claim.over) == (claim.kind == "gain")
        assert claim.verified != claim.where.startswith("not read in the paper")


@pytest.mark.parametrize(
    "path", sorted(PARAMS.glob("paper-*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_presets_and_the_package_agree_on_the_search(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    published = PRESETS["paper"]
    names = ("n_synthetic", "outer_steps", "inner_steps", "rho", "top_k")
    assert {name: values[name] for name in names} == {name: getattr(published, name) for name in names}
    assert published.rho in yaml.safe_load((PARAMS / "sweep-rho.yaml").read_text(encoding="utf-8"))["rho"]
    assert all(getattr(published, name) == value for name, value in values.get("more_synthesis", {}).items())


def methods(**means: float) -> dict:
    return {name: {"accuracy": {"mean": mean, "std": 0.0, "runs": [mean, mean]}} for name, mean in means.items()}


def write(folder: Path, name: str, values) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def test_own_runs_are_read_from_every_notebook_s_results(tmp_path):
    assert paper.own_runs(tmp_path / "absent") == []
    write(tmp_path, "paper-sst2/03-finetuning.json", {"methods": methods(real=0.5, gradmm=0.75)})
    write(
        tmp_path,
        "paper-transfer/06-transfer.json",
        {"methods": {"phi": methods(gradmm=0.5), "opt": methods(gradmm=0.25)}},
    )
    write(
        tmp_path,
        "paper-sst2-dp/00-quickstart.json",
        {"private": True, "methods": {"none": {"n": 0, "perplexity": None}, "gradmm": {"n": 8, "perplexity": 2.0}}},
    )
    write(
        tmp_path,
        "paper-sst2-dp/04-privacy.json",
        {"utility": [{"epsilon": 0.05, "accuracy": a} for a in (0.5, 1.0)], "controls": {"noise only": [0.5]}},
    )
    write(tmp_path, "mine/05-ablations.json", {"factors": []})
    rows = paper.own_runs(tmp_path)
    assert {(row["experiment"], row["model"], row["method"], row["accuracy"], row["runs"]) for row in rows} == {
        ("sst2", None, "real", 0.5, 2), ("sst2", None, "gradmm", 0.75, 2),
        ("transfer", "phi", "gradmm", 0.5, 2), ("transfer", "opt", "gradmm", 0.25, 2),
        ("sst2-dp", None, "gradmm, epsilon 0.05", 0.75, 2), ("sst2-dp", None, "noise only", 0.5, 1),
    }  # fmt: skip
    figures = [paper.own_figure(claim, rows) for claim in paper.claims()]
    assert figures == [0.75, 0.75, 0.25, None, None, None]  # no zero-shot texts in these runs, and two statements
    assert [paper.own_figure(claim, []) for claim in paper.claims()] == [None] * 6


def test_a_record_is_read_like_the_results_that_it_holds(tmp_path):
    records.write_record(
        tmp_path / "paper-sst2" / "03-finetuning.json", {"methods": methods(gradmm=0.75)}, {"seeds": 2}
    )
    records.write_record(tmp_path / "03-finetuning-sst2.json", {"methods": methods(gradmm=0.5)}, {"seeds": 2})
    records.write_record(tmp_path / "07-matching.json", {"seconds": [1.0]}, {})
    rows = paper.own_runs(tmp_path)
    assert [(row["record"], row["experiment"], row["accuracy"]) for row in rows] == [
        ("03-finetuning-sst2", None, 0.5), ("paper-sst2/03-finetuning", "sst2", 0.75)
    ]  # fmt: skip


def test_what_is_no_record_is_refused(tmp_path):
    write(tmp_path, "mine.json", [1])
    with pytest.raises(UserError, match="mine.json holds no JSON object"):
        paper.own_runs(tmp_path)
    with pytest.raises(UserError, match="the kind 'guess' of a claim is not known"):
        paper.own_figure(replace(paper.claims()[0], kind="guess"), [])
