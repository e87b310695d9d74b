"""Every notebook runs from end to end at its smoke preset, and the numbers that it writes are what it says they are."""

import ast
import itertools
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import executing
import nbformat
import numpy
import pandas
import papermill
import pytest
import torch
from test_batch import store

import gradmm
from gradmm import files, runs
from gradmm.experiments import batch, plots, records
from gradmm.experiments import performance as performance_room
from gradmm.experiments.ablation import against_base
from gradmm.experiments.metrics import summarise_runs
from gradmm.experiments.results import outcome
from gradmm.experiments.seed_run import ComparisonConfig
from gradmm.runs import NOT_FOR_RELEASE

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRESETS = ROOT / "notebooks" / "params" / "smoke"


def quickstart(results: dict, preset: dict) -> None:
    assert list(results["methods"]) == ["none", "real", "zero_shot", "gradmm"]
    for method in results["methods"].values():
        assert 0 <= method["accuracy"]["mean"] <= 1
    assert {len(m["accuracy"]["runs"]) for name, m in results["methods"].items() if name != "none"} == {
        preset["fine_tuning_seeds"]
    }
    assert results["methods"]["real"]["n"] == preset["n_real"]
    assert results["methods"]["gradmm"]["n"] <= preset["n_synthetic"] <= results["written"]
    assert [row["step"] for row in results["history"]] == [1, 2]  # texts taken of each class
    assert results["private"] is False and results["statement"].startswith("not private")


def synthesis(results: dict, preset: dict) -> None:
    assert results["closed_form"]["value_error"] < 1e-2 and results["closed_form"]["gradient_error"] < 1e-3
    assert all(row["match of the answer"] <= row["lowest match_z"] for row in results["answers"])
    assert set(results["history"]) == set(results["comparison"]) == {"lm_then_nearest", "nearest_then_lm"}
    assert all(len(rows) == preset["outer_steps"] for rows in (*results["history"].values(), results["norms"]))
    first = results["norms"][0]  # lam was zero before the first step, so it is rho (x - z) and the push is x - z
    assert first["push"] == pytest.approx(first["x_minus_z"], rel=1e-4)
    assert first["lam"] < first["push"]
    scores = [score for runs in results["comparison"].values() for score in (runs["matched"], *runs["control"])]
    assert all(0 <= score["match_loss"] <= 2 and score["perplexity"] >= 1 for score in scores)
    assert all(text for row in results["texts"] for text in row.values())


def finetuning(results: dict, preset: dict) -> None:
    assert list(results["methods"]) == preset["methods"] and len(results["seeds"]) == preset["seeds"]
    assert all(len(method["accuracy"]["runs"]) == preset["seeds"] for method in results["methods"].values())
    assert all(0 <= method["accuracy"]["mean"] <= 1 for method in results["methods"].values())
    assert results["methods"]["gradmm"]["minus_gradmm"] is None
    assert results["n_test"] == preset["max_test"] and 0 < results["calibrated"] <= 1


def privacy(results: dict, preset: dict) -> None:
    assert results["private"] is True and results["statement"].startswith("(1, 1e-05)-differential privacy")
    (spent,) = results["ledger"]
    assert (spent["epsilon"], spent["delta"], spent["sensitivity"]) == (1.0, 1e-5, 2.0)
    assert spent["space"] == "label_rows_centred"
    assert spent["sigma"] == pytest.approx(results["calibration"]["exact"]["1"], rel=1e-6)
    assert "the budget is 1" in results["refusal"]
    # None of it computed from private text.
    assert set(results) == {"ledger", "private", "statement", "refusal", "calibration", "checks"}


def experiments(results: dict, preset: dict) -> None:
    assert [row["epsilon"] for row in results["utility"]] == preset["epsilons"] * preset["seeds"]
    assert set(results["controls"]) == {"noise only", "prompts only", "no noise", "real texts", "untrained"}
    assert all(0 <= row["target"] <= 1 and -1 <= row["useful"] <= 1 for row in results["fidelity"])
    assert {row["n"] for row in results["fidelity"]} == {*preset["sizes"], preset["n_real"]}
    assert not [
        row for row in results["audit"] if row["mechanism"] == "as released" and row["epsilon_lower"] > row["claim"]
    ]
    own = [row for row in results["membership"] if row["published"] == "the private texts"]
    assert {row["auc"] for row in own if row["attack"] == "nearest neighbour"} == {1.0}


def ablations(results: dict, preset: dict) -> None:
    assert {row["factor"] for row in results["factors"]} == set(preset["factors"])
    assert len(results["factors"]) == 2 * len(preset["factors"]) * preset["seeds"]
    assert all(
        len({row["accuracy"] for row in results["factors"] if row["base"] and row["seed"] == seed}) == 1
        for seed in results["seeds"]
    )
    assert {row["set"] for row in results["agreement"]} >= {"gradmm", "zero-shot texts", "other real texts"}
    assert all(
        -1.001 <= row[name] <= 1.001 for row in results["agreement"] for name in ("per_class", "contrast", "classes")
    )
    assert list(results["choice_effects"]) == ["validation_accuracy", "accuracy"]
    for rows in (results["choices"], *results["choice_effects"].values()):
        assert {row["factor"] for row in rows} == set(preset["choices"])
    assert all("random_target" in methods for methods in results["methods"].values())
    assert set(results["effects"]) == {"validation_accuracy", "accuracy", "match_loss", "perplexity"}
    assert len(results["stages"]) == 8


def theory(results: dict, preset: dict) -> None:
    assert {row["B"] for row in results["closed_form"]} == set(preset["group_sizes"])
    assert all(row[name] < 1e-10 for row in results["closed_form"] for name in row if name.endswith("relative error"))
    small = results["admm"]
    assert max(small["last"]["box"][name] for name in ("primal", "dual")) < 0.02 < small["last"]["corners"]["primal"]
    assert small["optimum"]["box"] < small["optimum"]["corners"] and abs(small["excess"]["box"]) < 1e-3
    assert all(row["last z is the optimum"] <= row["best z is the optimum"] for row in small["by_rho"])
    runs = results["descent"]["runs"]
    assert len(runs) == 3 * len(preset["error_shares"])
    assert all(row["holds"] and row["gap"] <= row["bound"] + 1e-12 for row in runs)
    assert all(last["measured"] <= last["bound"] + 1e-12 for last in results["descent"]["relative"].values())
    assert all(
        row["final gap"] <= row["bound"] and row["largest share of the drift bound"] <= 1 + 1e-9
        for row in results["examples"]
    )


def transfer(results: dict, preset: dict) -> None:
    assert list(results["methods"]) == ["demo", "demo-b"] and results["writer"] == "demo"
    assert results["n_test"] == preset["max_test"]
    writer, learner = results["methods"].values()
    for name, figures in learner.items():
        assert len(figures["accuracy"]["runs"]) == preset["seeds"] and figures["n"] == writer[name]["n"]
        assert name == "none" or figures["perplexity"] != writer[name]["perplexity"]  # each model reads for itself
    assert writer["real"]["match_loss"] == pytest.approx(0, abs=1e-4)
    assert learner["real"]["match_loss"] == pytest.approx(0, abs=1e-4)
    gain = learner["gradmm"]["accuracy"]["mean"] - learner["none"]["accuracy"]["mean"]
    assert learner["gradmm"]["minus_none"]["mean"] == pytest.approx(gain)
    advantage = writer["prompt_only"]["match_loss"] - writer["gradmm"]["match_loss"]
    assert results["match_advantage"]["demo"]["prompt_only"]["mean"] == pytest.approx(advantage)


def performance(results: dict, preset: dict) -> None:
    types = list(results["rates"])  # a processor without instructions for bfloat16 has one
    assert set(results["operations"]) == {"demo", "phi"} and types in (["float32"], ["float32", "bfloat16"])
    assert results["operations"]["phi"]["inner steps"] > 1e4 * results["operations"]["demo"]["inner steps"]
    assert all(rate[name] > 0 for rate in results["rates"].values() for name in ("matmul", "bandwidth"))
    for dtype, rows in results["floors"].items():
        assert [row["phase"] for row in rows] == ["inner steps", "projection"]
        assert all(0 < row["share"] < 1 and row["seconds"] == results["seconds"][dtype][row["phase"]] for row in rows)
    assert results["literal"][1]["they differ by"] == "0e+00" and all(row["ratio"] > 0 for row in results["literal"])
    empty = (results["records"], results["gpu_records"], results["cards"], results["memory"]["records"])
    assert not any(empty)  # no records in an empty folder
    assert len(results["types"]) == len(types) * preset["seeds"]
    assert all(0 <= row["accuracy"] <= 1 for row in results["types"])
    assert {row["same texts"] for row in results["types"] if row["type"] == "float32"} == {1.0}
    assert list(results["memory"]["weights"]) == types
    assert results["memory"]["weights"]["float32"] < results["memory"]["peak"]["process"]


def paper(results: dict, preset: dict) -> None:
    # No records in an empty folder.
    assert results["own_runs"] == [] and all(claim["own"] is None for claim in results["claims"])
    assert [claim["verified"] for claim in results["claims"]].count(False) >= 1 and "transfer" in results["experiments"]
    assert list(results["methods"]) == ["demo", "demo-b"] and results["n_test"] == preset["max_test"]
    runs = [one["accuracy"]["runs"] for by_method in results["methods"].values() for one in by_method.values()]
    runs += [one["runs"] for one in results["with_noise"].values()]
    assert all(len(values) == preset["seeds"] and all(0 <= value <= 1 for value in values) for values in runs)
    assert len(results["answers"]) == 5
    assert {row["holds here"] for row in results["answers"]} <= {"yes", "no, worse", "not shown"}


# A notebook without an entry still has to run, write its numbers and draw its figures.
CHECKS = {
    "00-quickstart": quickstart, "01-theory": theory, "02-synthesis": synthesis, "03-finetuning": finetuning,
    "04-privacy": privacy, "05-ablations": ablations, "06-transfer": transfer, "07-performance": performance,
    "08-paper": paper,
}  # fmt: skip


def test_every_check_has_a_notebook():
    assert set(CHECKS) <= {path.stem for path in NOTEBOOKS}


def results_of(folder: Path, name: str) -> tuple[dict, dict]:
    """What a notebook wrote: what may be shared, and what may not."""
    found = {
        place.parent.name == NOT_FOR_RELEASE: json.loads(place.read_text(encoding="utf-8"))
        for place in folder.rglob(f"{name}.json")
    }
    apart = found.get(True, {})
    assert not apart or next(iter(apart)) == "not for release"
    return found[False], apart


# What changes no result, and what only adds runs to those that a comparison's folder holds.
NOT_OF_THE_FOLDER = {"output", "workers", "records"}
PRIVATE = {"00-quickstart": "epsilon is not None", "04-privacy": "True"}  # where a folder holds a private release
ADDS_RUNS = {
    name: {"seeds", "methods", "budgets", "budget_methods"}
    for name in ("03-finetuning", "05-ablations", "06-transfer", "08-paper")
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_is_described_to_papermill(path):
    """As `papermill --help-notebook` lists them; it reads a cell by lines and leaves out what it cannot read."""
    (cell,) = (
        cell for cell in nbformat.read(path, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])
    )
    own = {}
    exec(cell.source, own)
    found = papermill.inspect_notebook(str(path))
    assert list(found) == list(own["__annotations__"])
    assert not [name for name, item in found.items() if item["inferred_type_name"] == "None" or not item["help"]]
    assert all(found[name]["inferred_type_name"].endswith(" or None") for name in found if own[name] is None)
    assert batch.parameters_of(path) == {name: own[name] for name in found}


def test_a_record_of_a_card_is_shown_beside_those_of_processors(tmp_path):
    """As tests/benchmarks/gpu.py writes it; the notebook's cells that read and show records are run on it."""
    row = {
        "shape": "phi-1.5",
        "part": "inner step, 20 group(s), captured",
        "milliseconds": 50.0,
        "share of the rate": 0.6,
    }
    place = tmp_path / "gpu-h100.json"
    records.write_record(place, {"rows": [row]}, {"device": "cuda", "dtype": "bfloat16"})
    files.write_json(place, files.read_json(place) | {"machine": {"gpu": "NVIDIA H100", "processor": "a processor"}})
    shown: list = []
    own = {
        "records": tmp_path,
        "display": shown.append,
        "Markdown": str,
        "plots": plots,
        "performance": performance_room,
    }
    own |= {"read_records": records.read_records, "origin": records.origin}
    cells = {cell.id: cell for cell in nbformat.read(ROOT / "notebooks" / "07-performance.ipynb", as_version=4).cells}
    for name in ("perf-20", "perf-20-gpu", "perf-21"):
        exec(cells[name].source, own)
    assert own["on_gpu"] == ["gpu-h100"] and "1 of 1 ran on a GPU" in shown[-1] and "NVIDIA H100" in shown[-1]
    (found,) = own["of_cards"]
    assert (found["on"], found["type"], found["milliseconds"]) == ("NVIDIA H100", "bfloat16", 50.0)


def test_recorded_comparisons_answer_the_claims_by_their_intervals(tmp_path):
    """The cells of 08-paper that read them, on a comparison and on a transfer."""

    def against(**gaps: tuple[float, float]) -> dict:
        return {name: {"minus_gradmm": {"low": low, "high": high}} for name, (low, high) in gaps.items()}

    alone = against(real=(0.01, 0.02), zero_shot=(-0.02, -0.01), few_shot=(-0.01, 0.01), none=(-0.2, -0.1))
    alone |= against(admm=(-0.2, -0.1))
    both = {"writer": "a", "methods": {"a": alone, "b": against(none=(-0.2, -0.1), prompt_only=(-0.02, -0.01))}}
    records.write_record(
        tmp_path / "03-finetuning-one.json", {"methods": alone | {"gradmm": {"minus_gradmm": None}}}, {}
    )
    records.write_record(tmp_path / "06-transfer-two.json", both, {})
    shown: list = []
    own = {"records": tmp_path, "display": shown.append, "Markdown": str, "plots": plots, "outcome": outcome}
    own |= {"read_records": records.read_records, "pandas": pandas}
    cells = {cell.id: cell for cell in nbformat.read(ROOT / "notebooks" / "08-paper.ipynb", as_version=4).cells}
    for name in ("paper-10-d", "paper-10-e"):
        exec(cells[name].source, own)
    answers = {row["gradmm's texts are"]: row for row in own["sayings"]}
    assert [row["one"] for row in answers.values()] == ["no, worse", "yes", "not shown", "–", "–", "yes"]
    assert [row["two, learnt by b"] for row in answers.values()] == ["–", "–", "–", "yes", "yes", "–"]
    assert "not shown" in shown[0].to_html()


def run_cells(name: str, wanted: str, own: dict, until: str = "") -> tuple[dict, list]:
    """What some cells of a notebook leave in their namespace, and what they show.

    Args:
        wanted: ids of cells, with spaces between them.
        own: what the cells find there already; of the parameters, what is given in place of their defaults.
        until: all code cells up to this one come first.
    """
    cells = {cell.id: cell for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells}
    first = list(cells)[: list(cells).index(until) + 1] if until else []
    shown: list = []
    place = {"display": shown.append, "Markdown": str, "plots": plots, "pandas": pandas} | own
    for cell in (cells[one] for one in (*first, *wanted.split()) if cells[one].cell_type == "code"):
        exec(cell.source, place)
        if "parameters" in cell.metadata.get("tags", []):
            place |= own
        place |= {"display": shown.append, "Markdown": str}
    return place, shown


def test_the_closed_form_is_checked_in_float32_whatever_the_model_s_type(tmp_path):
    small = {"n_real": 4, "device": "cpu", "output": tmp_path, "dtype": "float16"}
    own, shown = run_cells("02-synthesis", "", small, until="synthesis-08-3-2")
    assert own["language_model"].dtype == torch.float16 and "in float32" in shown[-1]
    assert own["closed_form"]["value_error"] < 1e-2 and own["closed_form"]["gradient_error"] < 1e-3


def test_the_literal_method_is_timed_in_float32_whatever_the_model_s_type(tmp_path, monkeypatch):
    small = files.read_yaml(PRESETS / "07-performance.yaml") | {"device": "cpu", "output": tmp_path}
    small |= {"dtype": "float16", "other_dtypes": ["float16", "float32"]}
    own, _ = run_cells("07-performance", "perf-16 perf-17 perf-17-2 perf-17-3", small, until="perf-04-2")
    assert list(own["models"]) == ["float16", "float32"] and own["literal"].dtype == torch.float32
    assert float(own["versus"][0]["they differ by"]) < 0.1
    rates = {dtype: performance_room.Rates(1e30, 1.0, {}, {}, "cpu", dtype, 1) for dtype in own["models"]}
    monkeypatch.setattr(runs, "peak_memory", dict)  # as on Windows
    own, shown = run_cells("07-performance", "perf-08 perf-32 perf-32-a", own | {"rates": rates})
    least = {dtype: own["least_seconds"](dtype, bodies[0], own["job"]) for dtype, bodies in own["bodies"].items()}
    assert 0.5 < least["float16"] / least["float32"] < 0.9  # its weights are half as long, the sums as long
    assert "is not counted on this system; the weights take" in shown[-1]
    assert files.write_json(tmp_path / "peak.json", own["peak"])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_is_named_by_the_type_that_it_has(dtype, tmp_path, monkeypatch):
    one = gradmm.load_model("demo", device="cpu", dtype="float32")
    monkeypatch.setattr(gradmm, "load_model", lambda *given, **named: one)  # a machine without another type
    given = {"dtype": dtype, "n_real": 4, "output": tmp_path}
    own, _ = run_cells("07-performance", "", given, until="perf-02-4")
    assert list(own["models"]) == own["dtypes"] == ["float32"]


def test_a_character_of_several_tokens_is_shown_where_it_is_complete():
    text = "a \u20ac, b\u00e9".encode()
    tokens = SimpleNamespace(decode=lambda row: bytes(row).decode(errors="replace").strip())
    one = torch.tensor([[[list(text)]]])
    own, _ = run_cells("02-synthesis", "synthesis-17-b", {"tokens": tokens, "ids": one, "group": 0, "row": 0})
    assert own["spell"](list(text)) == ["a", "", "", "", " \u20ac", ",", "", " b", "", "\u00e9"]


@pytest.mark.parametrize(("worst", "said"), [(1e-13, "is exact"), (1e-7, "float32 may"), (0.1, "is not confirmed")])
def test_the_sentence_on_the_closed_form_follows_the_figure(worst, said):
    frame = pandas.DataFrame({"f, relative error": [worst, 0.0]})
    _, shown = run_cells("01-theory", "theory-06-a", {"frame": frame})
    assert [words in shown[0] for words in (said, "exact")] == [True, said == "is exact"]


class View:
    """A comparison in which every difference is for certain."""

    methods = {name: {} for name in ("real", "gradmm")}

    def difference(self, method: str, other: str) -> dict:
        return {"mean": 0.2, "low": 0.1, "high": 0.3}

    def verdict(self, method: str, other: str) -> str:
        return f"{method} beats {other}"


@pytest.mark.parametrize(
    ("methods", "taught", "beaten"),
    [
        (["none", "real", "gradmm"], "real beats none", "gradmm beats none"),
        (["real", "gradmm"], "leave it open", "leave it open"),
        (["zero_shot", "gradmm", "real"], "leave it open", "gradmm beats zero_shot"),
        (["none", "real"], "real beats none", "leave it open"),
    ],
)
def test_a_transfer_says_of_any_methods_what_they_tell(methods, taught, beaten, tmp_path):
    box = SimpleNamespace(update=lambda filled: shown.extend(filled.answers))
    own = {"methods": methods, "views": {"a": View()}, "writer": SimpleNamespace(name="a"), "numbers": range(1)}
    own |= {"found": SimpleNamespace(labels=[0]), "lower": {}, "asdict": asdict, "files": files, "output": tmp_path}
    own |= {"box_of_answers": box, "in_short": plots.InShort("Does it?")}
    cells = "transfer-09 transfer-09-a transfer-11 transfer-11-2 transfer-12 transfer-13 transfer-20"
    own, shown = run_cells("06-transfer", cells, own)
    run_cells("06-transfer", "in-short-answered", own)
    assert taught in shown[0] and beaten in shown[-1] and not [text for text in shown if "gradmm ." in text]
    written = files.read_json(tmp_path / "06-transfer.json")["methods"]["a"]
    assert all(set(figures) == {f"minus_{methods[0]}"} for figures in written.values())


@pytest.mark.parametrize("more", ["more_synthesis", "more_finetuning"])
def test_further_settings_that_do_not_exist_are_refused_and_known_ones_replace(more, tmp_path):
    with pytest.raises(gradmm.UserError, match="unknown setting 'siize': the settings are "):
        resolved("06-transfer", tmp_path, **{more: {"siize": 3}})
    assert resolved("06-transfer", tmp_path, more_synthesis={"rho": 3.0}, rho=2.0).rho == 3.0


def test_the_demo_is_laid_beside_the_published_search_in_every_setting():
    rows: list = []
    given = batch.parameters_of(ROOT / "notebooks" / "08-paper.ipynb")
    given |= {"gradmm": gradmm, "replace": replace, "fields": fields, "plots": SimpleNamespace(table=rows.extend)}
    own, _ = run_cells("08-paper", "paper-07", given)
    one, other = asdict(gradmm.PRESETS["paper"]), asdict(own["synthesis"])
    assert {name for name in one if one[name] != other[name]} <= {row["setting"] for row in rows}


@pytest.mark.parametrize(("runs_of", "said"), [([0.9], "one seed has no"), ([0.9, 0.1], "does not exceed two")])
def test_one_seed_has_no_standard_error(runs_of, said):
    own = {"name": "private", "private": {"private": runs_of, "noise only": [0.5] * len(runs_of)}, "epsilon": 1.0}
    _, shown = run_cells("08-paper", "paper-17", own | {"summarise_runs": summarise_runs})
    assert said in shown[0]


@pytest.mark.parametrize(("seeds", "said"), [(1, "One seed does not say"), (2, "Two standard errors")])
def test_a_private_gain_is_judged_by_a_spread_that_is_known(seeds, said):
    runs = pandas.DataFrame({"mean": [0.7], "std": [0.02]}, index=[1.0])
    own = {"controls": {name: [0.6] * seeds for name in ("noise only", "prompts only")}, "untrained": 0.5}
    own |= {"seeds": seeds, "runs": runs, "flat": dict.fromkeys(own["controls"], runs), "numpy": numpy, "math": math}
    _, shown = run_cells("04-privacy", "privacy-17-a", own)
    assert said in shown[0] and (seeds == 1) == ("take more seeds" in shown[0])


def test_of_a_record_without_trained_models_no_table_is_announced():
    recorded = {"one": {"results": {"trained": []}}}
    cells = "privacy-25-4 privacy-25-4-a privacy-25-4-b privacy-25-5 privacy-25-5-a"
    assert run_cells("04-privacy", cells, {"recorded": recorded})[1] == []


def test_what_noise_leaves_is_shown_in_the_space_that_the_texts_were_chosen_in():
    figures = {(50, 1.0): 0.2, (50, 10.0): 0.5, (500, 1.0): 0.6, (500, 10.0): 0.63}
    rows = [
        {"space": space, "n": n, "epsilon": epsilon, "useful": useful - less, "kept": 0.64 - less, "coordinates": 16}
        for space, less in (("body_subspace, 16 directions", 0.0), ("body_subspace, 4 directions", 0.4))
        for (n, epsilon), useful in figures.items()
    ]
    settings = {"space": "body_subspace", "directions": [4, 16]}
    held = {"04-privacy-one": {"settings": settings, "results": {"fidelity": rows}}}
    drawn: list = []
    axes = SimpleNamespace(axes=[SimpleNamespace(set=lambda **_: None)])
    own = {"read_records": lambda *_: held, "records": "", "origin": lambda _: "here"}
    own |= {"plots": SimpleNamespace(lines=lambda series, *_: drawn.append(series) or axes)}
    said = run_cells("04-privacy", "privacy-25-1 privacy-25-2 privacy-25-3", own)[1]
    assert {name: list(values) for name, values in drawn[0].items()} == {"n = 50": [0.2, 0.5], "n = 500": [0.6, 0.63]}
    assert said[0].startswith(
        "**one** (here): `body_subspace`, 16 coordinates a class, without noise a cosine of 0.64."
    )
    assert said[0].endswith("One of 0.5 takes epsilon 10 with 50 examples, epsilon 1 with 500 examples.")


def test_what_a_release_chooses_is_laid_beside_its_controls_seed_by_seed():
    kinds = ("accuracy", "calibrated", "validation_accuracy")
    reached = {"50:10": (0.5, 0.5, 0.5), "500:1": (0.7, 0.8, 0.9), "500:3": (0.8, 1.0, 0.9), "500:10": (0.7, 0.9, 0.8)}
    reached |= {"noise only": (0.6, 0.8, 0.7), "prompts only": (0.5, 0.6, 0.7)}
    rows = [
        {"name": name, "seed": seed, **dict.fromkeys(kinds, value)}
        for name, values in reached.items()
        for seed, value in enumerate(values)
    ]
    tables: list = []
    drawn: list = []
    settings = {"model": "m", "space": "body_subspace"}
    own = {
        "recorded": {"one": {"settings": settings, "results": {"trained": rows}}},
        "pandas": pandas,
        "against_base": against_base,
    }
    own["plots"] = SimpleNamespace(table=tables.append, by_panel=lambda panels, *_, **__: drawn.append(panels))
    said = run_cells("04-privacy", "privacy-25-4 privacy-25-4-a privacy-25-4-b privacy-25-5 privacy-25-5-a", own)[1]
    (table,), (panels,) = tables, drawn
    runs = panels["one"]
    assert list(table["chosen by"])[1] == "a release of 500 examples, epsilon 1" == list(runs)[1]
    assert list(table["chosen by"])[-2:] == ["noise only", "prompts only"] and runs["noise only"] == [0.6, 0.8, 0.7]
    first, last = (list(table[f"over {control} (95%)"]) for control in ("noise only", "prompts only"))
    assert first[1] == "+0.100 (-0.148 to +0.348)" and first[4] == ""  # 0.1 -+ 4.303 x 0.1 / sqrt(3)
    assert last[1] == "+0.200 (+0.200 to +0.200)" and last[5] == ""
    tried = "none with 50 examples (tried: 10); 3 with 500 examples (tried: 1, 3, 10)."
    assert said[2].endswith(f"the interval above zero: {tried}")


def test_a_set_that_lacks_a_class_is_left_out_where_its_match_would_be_shown():
    found = {name: {"similarity": {"0": value, "2": 0.5}} for name, value in (("gradmm", None), ("random", 0.9))}
    own = {"methods": list(found), "found": SimpleNamespace(methods=found), "similarity_steps": [0, 2]}
    assert run_cells("03-finetuning", "c20 c21", own)[1] == ["- random: 0.900 at step 0, 0.500 at step 2"]
    losses = {"gradmm": [0.1, 0.2], "prompt_only": [0.3, None], "zero_shot": [0.3, 0.5]}
    view = SimpleNamespace(of=lambda name: [{"match_loss": loss} for loss in losses[name]])
    own = {"methods": list(losses), "views": {"a": view}}
    _, shown = run_cells("06-transfer", "transfer-17 transfer-18 transfer-18-a", own)
    assert "minus that of zero_shot is -0.2500" in shown[0] and "prompt_only" not in shown[0]


def test_a_budget_is_run_once_and_only_for_what_is_shown():
    runs: list = []
    own = {"config": ComparisonConfig(), "synthesis": gradmm.SynthesisConfig(n_synthetic=100), "replace": replace}
    own |= {"compare": lambda *given: runs.append(given[3:5]), "methods": ["gradmm", "real"], "budgets": [50, 5]}
    own |= {"budget_methods": ["random", "gradmm"], "classes": 2, "found": None, "numbers": range(1)}
    own |= dict.fromkeys(("language_model", "task", "splits")) | {"output": Path("out")}
    run_cells("03-finetuning", "c13", own)
    assert [(config.synthesis.n_synthetic, names) for config, names in runs] == [(10, ["gradmm"])]
    run_cells("03-finetuning", "c13", own | {"budget_methods": ["random"]})
    assert len(runs) == 1


def calls_of(path: Path, function: str) -> list[ast.Call]:
    """The calls of a function in a notebook."""
    trees = [ast.parse(cell.source) for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if ast.unparse(node.func) == function]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_columns_of_a_reader_s_data_are_parameters(path):
    known = batch.parameters_of(path)
    assert (known["text_column"], known["label_column"]) == ("text", "label")
    (load,) = calls_of(path, "gradmm.load_data")
    assert ast.unparse(load) == "gradmm.load_data(data, task, text=text_column, label=label_column)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_type_of_a_model_s_weights_is_a_parameter(path):
    loads = calls_of(path, "gradmm.load_model")
    assert "dtype" in batch.parameters_of(path) and loads
    assert {"device", "dtype"} <= set.intersection(*({word.arg for word in load.keywords} for load in loads))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_folder_follows_from_all_its_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    trees = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func).endswith("output_folder"))
    known = batch.parameters_of(path)
    assert [ast.literal_eval(call.args[0]), ast.unparse(call.args[1])] == [path.stem, "output"]
    assert known["output"] is None
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert given.pop("private", None) == PRIVATE.get(path.stem)
    assert given == {name: name for name in set(known) - NOT_OF_THE_FOLDER - ADDS_RUNS.get(path.stem, set())}
    first = "".join(map(ast.unparse, trees)).split("output_folder(")[0]
    assert not [
        work for work in ("load_data(", "load_model(", "release(", "release_once(") if work in first
    ]  # refused before any of it


def before_loading(notebook) -> list:
    """The code cells up to the first that loads data: parameters, imports, settings and the folder of the results."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return list(itertools.takewhile(lambda cell: "gradmm.load_data(" not in cell.source, code))


def resolved(name: str, folder: Path, **given) -> gradmm.SynthesisConfig:
    """The settings that a notebook arrives at with these parameters and no others."""
    own = {}
    for cell in before_loading(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)):
        exec(cell.source, own)
        if "parameters" in cell.metadata.get("tags", []):
            own |= given | {"output": folder / name}
    return own.get("synthesis", own.get("config"))


@pytest.mark.parametrize("search", gradmm.PRESETS)
@pytest.mark.parametrize("name", ["00-quickstart", "03-finetuning", "06-transfer"])
def test_a_named_search_is_run_as_it_is_named(name, search, tmp_path):
    assert resolved(name, tmp_path, search=search) == gradmm.PRESETS[search]
    with pytest.raises(gradmm.UserError, match=f"search = '{search.upper()}' is not known: did you mean {search}"):
        resolved(name, tmp_path, search=search.upper())


def test_the_search_of_the_quickstart_is_the_package_s_default(tmp_path):
    assert resolved("00-quickstart", tmp_path) == gradmm.SynthesisConfig()


def test_a_quickstart_writes_what_python_writes(tmp_path, shared_folder):
    """Byte for byte."""
    (held,) = executing.smoke_run("00-quickstart", shared_folder).rglob("synthetic.jsonl")
    small = files.read_yaml(PRESETS / "00-quickstart.yaml")
    settings = {name: small[name] for name in ("n_synthetic", "outer_steps", "inner_steps")}
    for search in gradmm.PRESETS:
        config = gradmm.preset(search, **settings)
        assert resolved("00-quickstart", tmp_path / search, search=search, **settings) == config
    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo", device="cpu")
    config, real = gradmm.preset("pool", **settings), gradmm.sample_examples(data.train, small["n_real"], task, 0)
    target = gradmm.release(model, task, real, space=config.space)
    gradmm.synthesize(model, task, target, config, tmp_path / "python", progress=False)
    assert held.read_bytes() == (tmp_path / "python" / "synthetic.jsonl").read_bytes()
    manifests = [files.read_json(place / "manifest.json") for place in (held.parent, tmp_path / "python")]
    assert manifests[0]["config"] == manifests[1]["config"]


@pytest.mark.slow
def test_a_private_quickstart_shares_nothing_of_the_private_texts_and_spends_once(tmp_path, shared_folder):
    words = ("bad", "dull", "fine", "great")  # four classes
    rows = [{"text": f"zebra {n} was {word}", "label": word} for n in range(31) for word in words]
    for split, some in (("train", [*rows[:78], *rows[:3]]), ("validation", rows[78:95]), ("test", rows[95:])):
        files.write_json_lines(tmp_path / "ward" / f"{split}.jsonl", some)
    asked = {"data": "ward", "n_real": 8, "n_synthetic": 8, "epsilon": 2.0, "delta": 1e-5, "length": 8}
    asked |= {"fine_tuning_steps": 30, "fine_tuning_seeds": 1}  # so many that a bar would be shown
    with executing.quiet(tmp_path), executing.forked_kernels(shared_folder):
        executed = executing.execute(NOTEBOOKS[0], asked, tmp_path)
        (folder,) = (tmp_path / "results" / "00-quickstart").iterdir()
        results, apart = results_of(folder, "00-quickstart")
        held = {place: place.read_bytes() for place in folder.rglob("*") if place.is_file()}
        executing.execute(NOTEBOOKS[0], asked, tmp_path)
        (kept,) = (tmp_path / "results" / "releases").iterdir()
        executing.execute(NOTEBOOKS[0], {**asked, "n_synthetic": 4, "fine_tuning_steps": 1}, tmp_path)
        assert list((tmp_path / "results" / "releases").iterdir()) == [kept]  # the same release serves other parameters
    assert results["private"] is True
    assert set(results["methods"]) == {"none", "zero_shot", "gradmm"} == set(apart["methods"])
    assert all(set(figures) == {"n", "perplexity"} for figures in results["methods"].values())
    assert all(0 <= figures["accuracy"]["mean"] <= 1 for figures in apart["methods"].values())
    shown = json.dumps([executed.metadata, [cell.get("outputs") for cell in executed.cells]])
    assert "validation=" not in shown and "testing" not in shown and "row(s) repeat" not in shown
    public = shown + "".join(
        content.decode("utf-8", "replace") for place, content in held.items() if NOT_FOR_RELEASE not in place.parts
    )
    assert "zebra" not in public and "accuracy" not in public
    assert not [n for n in ("78 ", "17 validation", "29 test") if n in shown]
    assert {place: place.read_bytes() for place in folder.rglob("*") if place.is_file()} == held
    assert len(files.read_json(kept / "ledger.json")["entries"]) == 1


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no parameter outer_stepps"):
        executing.execute(NOTEBOOKS[0], {"outer_stepps": 1}, tmp_path)


@pytest.mark.slow
def test_a_forked_kernel_has_a_folder_and_an_end_of_its_own(tmp_path, shared_folder):
    """Where it is, what it has imported, and an error when it dies."""
    seen = (
        "import os, sys\nwith open('seen', 'w') as file:\n    print(*{'torch', 'gradmm'} & {*sys.modules}, file=file)"
    )
    died = store(tmp_path / "died.ipynb", "seed = 0", seen, "os._exit(3)")
    (tmp_path / "here").mkdir()
    with executing.quiet(tmp_path), executing.forked_kernels(shared_folder), pytest.raises(RuntimeError, match="died"):
        executing.execute(died, {}, tmp_path / "here")
    assert (tmp_path / "here" / "seen").read_text().split() == (["torch"] if executing.forks() else [])


@pytest.mark.slow
def test_the_stored_quickstart_runs_cell_by_cell(tmp_path):
    """As an editor runs it, by nbval, with small parameters below its own."""
    notebook = papermill.parameterize.parameterize_notebook(
        papermill.iorw.load_notebook_node(str(NOTEBOOKS[0])), files.read_yaml(PRESETS / "00-quickstart.yaml")
    )
    nbformat.write(notebook, tmp_path / "00-quickstart.ipynb")
    seconds = str(batch.KERNEL_SECONDS)
    asked = ["--nbval-lax", "--nbval-cell-timeout", seconds, "--nbval-kernel-startup-timeout", seconds]
    with executing.quiet(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *asked, "00-quickstart.ipynb"],
            cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    assert done.returncode == 0 and f"{cells} passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_same_seeds_give_the_same_numbers(tmp_path, shared_folder):
    """Byte for byte, by a forked kernel and one that starts alone; what depends on the clock stays out of this file."""
    (first,) = executing.smoke_run("03-finetuning", shared_folder).rglob("03-finetuning.json")
    with executing.quiet(tmp_path):
        executing.execute(
            ROOT / "notebooks" / "03-finetuning.ipynb", files.read_yaml(PRESETS / "03-finetuning.yaml"), tmp_path
        )
    (again,) = tmp_path.rglob("03-finetuning.json")
    assert len(files.read_json(again)["seeds"]) > 1 and again.read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_recorded_comparisons_are_shown_as_they_stand(tmp_path, shared_folder):
    """The last section of 03-finetuning by itself, on records made from the smoke run; by default there are none."""
    folder = executing.smoke_run("03-finetuning", shared_folder)
    (written,) = folder.rglob("03-finetuning.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    for name in ("rotten_tomatoes", "sst2"):
        records.write_record(tmp_path / "records" / f"03-finetuning-{name}.json", results, {"seeds": 2, "data": name})
    notebook = nbformat.read(ROOT / "notebooks" / "03-finetuning.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    start = [place for place, cell in enumerate(code) if cell.source.startswith("recorded = ")][0]
    notebook.cells = [*before_loading(notebook), *code[start:]]
    nbformat.write(notebook, tmp_path / "section.ipynb")
    with executing.quiet(tmp_path), executing.forked_kernels(shared_folder):
        (tmp_path / "run").mkdir()
        executed = executing.execute(
            tmp_path / "section.ipynb", {"records": str(tmp_path / "records")}, tmp_path / "run"
        )
    shown = [data for cell in executed.cells for output in cell.get("outputs", []) if (data := output.get("data"))]
    assert sum("image/png" in data for data in shown) == 1 and sum("text/html" in data for data in shown) == 3
    assert "The answer stands here when" in shown[0]["text/html"]  # the box, which no cell of this section fills
    text = "\n".join(data.get("text/markdown", "") for data in shown)
    assert "**sst2**: 2 seed(s), 10 test texts" in text and "**rotten_tomatoes**" in text
    assert f"commit `{records.short_commit({'commit': records.commit()})}`" in text
    tables = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    real = results["methods"]["real"]["minus_gradmm"]
    assert len(tables) == 2 and all(f"{real['low']:+.3f} to {real['high']:+.3f}" in table for table in tables)


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_writes_its_numbers(path, shared_folder):
    preset = files.read_yaml(PRESETS / f"{path.stem}.yaml")
    folder = executing.smoke_run(path.stem, shared_folder)
    executed = nbformat.read(folder / path.name, as_version=4)
    results, apart = results_of(folder, path.stem)
    assert results
    if path.stem in CHECKS:
        CHECKS[path.stem](results, preset)
    if path.stem == "04-privacy":
        experiments(apart, preset)
    assert bool(apart) == bool(results.get("private"))
    if path.stem in executing.RECORDED:
        said = "".join(output.get("data", {}).get("text/markdown", "") for output in outputs_of(executed))
        names = [place.stem.removeprefix(f"{path.stem}-") for place in executing.RECORDS.glob(f"{path.stem}-*.json")]
        assert names and all(f"**{name}**" in said for name in names)
    (box,) = (cell for cell in executed.cells if "plots.InShort(" in cell.source)
    assert "It took" in box.outputs[-1]["data"]["text/html"]  # filled where it stands, by a cell at the end
    said = [output for output in outputs_of(executed) if output.get("name") == "stderr"]
    assert not [output.text for output in said]  # a page has no warnings, and no paths of the machine that made it
    bare = [output.data for output in outputs_of(executed) if output.output_type == "execute_result"]
    assert not [data for data in bare if set(data) == {"text/plain"}]  # nor what matplotlib happens to return
    promised = [cell for cell in executed.cells if cell.cell_type == "code" and "figure = " in cell.source]
    drawn = [cell for cell in promised if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert promised and len(drawn) == len(promised)
