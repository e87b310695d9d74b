"""The clocks see every phase and go away again; rates and shares are what they say."""

from contextlib import nullcontext

import pytest
import torch

from gradmm import admm, searches, synthesis
from gradmm.config import SynthesisConfig
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.experiments import performance, plots, roofline
from gradmm.tasks import Task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was:", "a film was:"))
REAL = [Example("a dull plot", 0), Example("a fine film", 1)]
SMALL = SynthesisConfig(
    search="admm", ranking="text", n_synthetic=2, oversample=1, group_size=1, length=6, outer_steps=2, inner_steps=2,
    init="normal", top_k=5,
)  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rates(request) -> performance.Rates:
    return performance.measure_rates(
        "cpu", request.param, [(8, 32, 64), (8, 32, 97), (8, 32, 64)], repeats=3, stream_bytes=1 << 20
    )


def test_rates_are_positive_and_the_best_of_what_was_measured(rates):
    assert set(rates.products) == {(8, 32, 64), (8, 32, 97)} and set(rates.streams) == {"copy", "triad"}
    assert rates.matmul == max(rates.products.values()) > min(rates.products.values()) > 0
    assert rates.bandwidth == max(rates.streams.values()) > min(rates.streams.values()) > 0
    assert rates.threads == torch.get_num_threads() and rates.device == "cpu"


def test_products_are_measured_as_the_models_multiply(monkeypatch):
    within = []
    monkeypatch.setattr(performance, "fast_products", lambda device: within.append(device.type) or nullcontext())
    performance.measure_rates("cpu", "float32", [(1, 1, 1), (2, 2, 2)], repeats=1, stream_bytes=1 << 10)
    assert within == ["cpu"] * 2


@pytest.mark.parametrize(
    ("change", "named"), [({"dtype": "int4"}, "int4"), ({"products": []}, "0 products"), ({"repeats": 0}, "0 repeats")]
)
def test_what_cannot_be_measured_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        performance.measure_rates(
            **{"device": "cpu", "dtype": "float32", "products": [(1, 1, 1)], "repeats": 1} | change
        )


def test_the_phases_take_less_than_the_whole(tiny_model):
    result, seconds = performance.time_synthesis(tiny_model(dtype=torch.float32), TASK, REAL, SMALL)
    assert set(seconds) == {*performance.PHASES, "other", "whole"} and len(result.candidates) == 2
    assert all(seconds[phase] > 0 for phase in performance.PHASES) and seconds["other"] > 0


def test_clocks_count_every_call_and_leave_no_trace():
    before = [getattr(room, name) for room, name in performance.CLOCKED.values()]
    with pytest.raises(TypeError), performance.clocks("cpu") as spent:
        assert searches.project is not before[2]
        admm.InnerLoop.minimise()  # fails, and its time counts all the same
    assert [getattr(room, name) for room, name in performance.CLOCKED.values()] == before
    assert spent["inner steps"] > 0 and spent["projection"] == 0


def test_a_clock_changes_no_text(tiny_model):
    model = tiny_model(dtype=torch.float32)
    timed, _ = performance.time_synthesis(model, TASK, REAL, SMALL)
    plain = synthesis.synthesize(
        model, TASK, performance.release(model, TASK, REAL, space="head"), SMALL, progress=False
    )
    assert timed.candidates.to_list() == plain.candidates.to_list()


def test_a_floor_is_set_by_arithmetic_or_by_memory():
    rates = performance.Rates(100.0, 10.0, {}, {}, "cpu", "float32", 1)
    works = {"a": roofline.Cost(400.0, 10.0), "b": roofline.Cost(100.0, 30.0)}
    first, second = performance.shares(works, {"a": 8.0, "b": 4.0}, rates)
    assert (first["bound by"], first["floor_seconds"], first["share"]) == ("arithmetic", 4.0, 0.5)
    assert (second["bound by"], second["floor_seconds"], second["share"]) == ("memory", 3.0, 0.75)


@pytest.mark.parametrize(("device", "said"), [("cpu", "Some CPU, 2 thread(s)"), ("cuda", "Some GPU")])
def test_a_record_says_what_it_ran_on(device, said):
    machine = {"processor": "Some CPU", "threads": 2, "gpu": "Some GPU"}
    assert performance.ran_on({"settings": {"device": device}, "machine": machine}) == said


def test_a_card_s_rows_keep_every_figure():
    rows = [
        {"shape": "tiny", "part": "large product", "TFLOP/s": 789.4, "weights, GB": 2.84},
        {"shape": "tiny", "part": "inner step, 20 group(s), captured", "milliseconds": 44.0, "share of the rate": 0.61,
         "seconds before the first": 2.0, "peak, GB": 8.5},
        {"shape": "tiny", "part": "sketches", "not measured": "Unmeasured: the budget of seconds is spent"},
        {"shape": "tiny", "part": "whole synthesis, paper's setting", "seconds": 120.0, "groups at once": {"H100": 20}},
    ]  # fmt: skip
    record = {
        "settings": {"device": "cuda", "dtype": "bfloat16"},
        "machine": {"gpu": "H100"},
        "results": {"rows": rows},
    }
    product, step, sketches, whole = performance.of_card(record)
    assert {row["on"] for row in (product, step, sketches, whole)} == {"H100"} and step["type"] == "bfloat16"
    assert product["more"] == "TFLOP/s 789, weights, GB 2.84" and product["milliseconds"] is None
    assert (step["milliseconds"], step["share of the rate"], step["peak, GB"]) == (44.0, 0.61, 8.5)
    assert sketches["more"] == "not measured Unmeasured: the budget of seconds is spent"
    assert (whole["seconds"], whole["more"]) == (120.0, "groups at once {'H100': 20}")
    html = plots.table(performance.of_card(record)).to_html()
    assert "captured" in html and "0.610" in html and "None" not in html
