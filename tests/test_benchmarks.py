"""The benchmarks run at the shape tiny and write what they say; how fast, only a quiet machine can tell."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import gradmm
from gradmm import files
from gradmm.classification import Encoded
from gradmm.data import Example
from gradmm.experiments import performance, records
from gradmm.experiments.metrics import subsample
from gradmm.tasks import tokenize_task
from gradmm.training import trainable_copy

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parent / "benchmarks"
FEW = "--shape tiny --groups 1 --count 2 --top-k 5 --real 4 --candidates 2 --threads 1".split()


def whole(benchmark, path, *more):
    script = benchmark("whole_synthesis")
    script.main([*FEW, "--length", "5", "--inner-steps", "3", "--repeats", "2", "--output", str(path), *more])
    return records.read_record(path)


def test_both_sides_do_the_same_synthesis(benchmark, tmp_path, capsys):
    record = whole(benchmark, tmp_path / "performance-tiny-cpu.json")
    found = record["results"]
    assert set(found["phases"]) == {*performance.PHASES, "other", "whole"} and found["same_tokens"] == 1
    assert found["groups"] == 2
    assert found["literal"] == "one group measured, times 2 groups; its target once for each of 2 classes"
    for row in found["phases"].values():
        assert len(row["ratio"]["runs"]) == 2 and row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    for row in found["floors"]:
        assert row["share"] == pytest.approx(
            row["floor_seconds"] / found["phases"][row["phase"]]["fast_seconds"]["median"]
        )
        assert 0 < row["share"] < 1
    assert found["memory"]["peak"] > found["memory"]["weights"] > 0
    assert record["settings"]["sizes"]["width"] == 64 and record["settings"]["inner_steps"] == 3
    row = performance.summary(record)
    assert (row["shape"], row["type"], row["groups"], row["steps"]) == ("tiny", "float32", 2, "2 x 3")
    assert row["on"].endswith(", 1 thread(s)") and row["seconds"] == found["phases"]["whole"]["fast_seconds"]["median"]
    assert row["against the literal method"].startswith(f"{found['phases']['whole']['ratio']['median']:.1f}x (")
    assert "%" in row["floor, projection"]
    printed = capsys.readouterr().out
    assert "one group measured" in printed and all(phase in printed for phase in performance.PHASES)


def test_a_quick_reference_says_how_it_was_scaled(benchmark, tmp_path):
    found = whole(benchmark, tmp_path / "quick.json", "--quick", "--dtype", "bfloat16")["results"]
    assert found["literal"].endswith("1 x 2 steps and 2 projections scaled to 2 x 3 and 3")
    assert found["same_tokens"] is None


def test_another_family_is_measured_the_same_way(benchmark, tmp_path, monkeypatch):
    shapes = benchmark("against_reference").SHAPES
    assert shapes["phi-1.5"]["family"] == "phi"
    monkeypatch.setitem(shapes, "tiny", shapes["tiny"] | {"family": "phi"})
    assert whole(benchmark, tmp_path / "phi.json", "--repeats", "1")["results"]["same_tokens"] == 1


def test_a_peak_of_memory_is_measured_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, BENCHMARKS / "memory.py", "--shape", "tiny", "--dtype", "float32"]
    command += ["--output", tmp_path / "record.json"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=300)
    record = records.read_record(tmp_path / "record.json")
    (row,) = record["results"]["rows"]
    assert not {"here", "output"} & set(record["settings"])
    assert row["texts"] == 200 and row["share_of_weights"] == row["peak_over_weights"] / row["weights"] > 0


def test_one_group_becomes_all_of_them(benchmark, tmp_path):
    script = benchmark("whole_synthesis")
    options = script.parse(["--shape", "tiny", "--groups", "3", "--outer-steps", "4", "--inner-steps", "5"])
    plan = type("Plan", (), {"config": script.settings_of(options), "classes": range(6)})
    spent = {"target": 1.0, "initialisation": 1.0, "inner steps": 1.0, "projection": 1.0, "filter": 1.0, "other": 1.0}
    found = script.extrapolate(spent, {"outer_steps": 1, "inner_steps": 2}, plan)
    assert found == {
        "target": 2, "initialisation": 6, "inner steps": 60, "projection": 15, "filter": 6, "other": 15, "whole": 104,
    }  # fmt: skip


def test_words_are_read_as_they_are_written(benchmark):
    tokenizer = benchmark("whole_synthesis").word_tokenizer(50)
    assert len(tokenizer) == 50 and tokenizer("w11 w48 .", add_special_tokens=False)["input_ids"] == [11, 48, 49]
    assert tokenizer.decode([11, 49]) == "w11 ." and tokenizer.eos_token_id == 0


def test_one_step_and_one_projection_against_the_literal_ones(benchmark, tmp_path):
    options = "--shape tiny --count 2 --length 4 --top-k 5 --repeats 1 --output".split()
    rows = benchmark("against_reference").main([*options, str(tmp_path / "r.json")])
    assert records.read_record(tmp_path / "r.json")["results"] == {"rows": rows}
    assert [row["work"] for row in rows] == ["inner step", "projection, lm_then_nearest", "projection, nearest_then_lm"]
    assert rows[0]["disagreement"] < 1e-3 and rows[1]["disagreement"] == rows[2]["disagreement"] == 0


def test_every_part_of_a_card_is_measured_where_there_is_none(benchmark, tmp_path, capsys):
    sizes = "--class-groups 1 --count 2 --length 6 --top-k 5 --real 4 --candidates 2 --outer-steps 1 --inner-steps 3"
    more = f"--groups 1 2 --texts 8 --training-steps 2 --product 64 --output {tmp_path / 'gpu-none.json'}"
    rows = benchmark("gpu").main([*"--device cpu --dtype float32 --shapes tiny".split(), *sizes.split(), *more.split()])
    assert not [row for row in rows if "not measured" in row] and len(rows) == 14
    assert records.read_record(tmp_path / "gpu-none.json")["results"]["rows"] == rows
    assert "inner step, 2 group(s), compiled" in capsys.readouterr().out


def test_a_part_that_fails_or_comes_too_late_is_a_row_and_stops_no_other(benchmark, monkeypatch):
    script = benchmark("gpu")
    monkeypatch.setitem(script.PARTS, "pool", lambda bench: 1 / 0)
    command = (
        "--device cpu --dtype float32 --shapes tiny --parts pool projection --product 64 --real 4 --class-groups 1"
    )
    failed, done = script.main([*command.split(), "--count", "2", "--top-k", "5"])[1:]
    assert failed["not measured"] == "ZeroDivisionError: division by zero" and done["milliseconds"] > 0
    late = script.main([*command.split(), "--count", "2", "--top-k", "5", "--budget", "0"])[1:]
    assert {row["not measured"] for row in late} == {"Unmeasured: the budget of seconds is spent"}


def test_a_real_model_s_shortcuts_change_no_result(benchmark, tmp_path, capsys):
    """The lower layers' states, the gradients and the pool that are kept give what the plain comparison gives."""
    script = benchmark("real_models")
    path, work = str(tmp_path / "03-finetuning-demo.json"), str(tmp_path / "work")
    common = "--model demo --data demo --task demo --seeds 2 --steps 10 --written 2 --n-synthetic 8 --n-real 6".split()
    methods = ["none", "real", "herding", "prompt_only", "gradmm"]
    where = ["--folder", work, "--output", path]
    some = (
        "--layers 2 --rate 2e-4 --batch-size 16 --eval-every 10 --max-test 40 --max-validation 20 --threads 1".split()
    )
    script.main([*where, *common, *some, "--methods", *methods])
    record = records.read_record(path)
    found, settings = record["results"], record["settings"]
    assert list(found["methods"]) == methods and found["seeds"] == [0, 1] and found["n_test"] == 40
    assert all(len(texts) == 4 for texts in found["texts"]["gradmm"].values())
    assert settings["layers"] == 2 and "folder" not in settings
    model, (task, splits) = gradmm.load_model("demo", device="cpu"), gradmm.load_data("demo")
    kept = [gradmm.sample_examples(splits.train, 6, task, seed) for seed in (0, 1)]
    tuning = gradmm.FinetuneConfig(
        steps=10, learning_rates=[2e-4], patience=None, warmup=5, max_validation=20, layers=2
    )
    tested = subsample(splits.test, 0, 40)
    for seed, accuracy in enumerate(found["methods"]["real"]["accuracy"]["runs"]):
        plain = gradmm.finetune(
            model, task, kept[seed], splits.validation, tested, replace(tuning, seed=seed), progress=False
        )
        assert accuracy == plain.accuracy


def test_a_real_model_is_compared_in_bfloat16(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    path, work = str(tmp_path / "03-finetuning-demo.json"), str(tmp_path / "work")
    common = "--model demo --data demo --task demo --seeds 1 --steps 4 --written 2 --n-synthetic 4 --n-real 6".split()
    some = "--dtype bfloat16 --eval-every 4 --max-test 20 --max-validation 10 --methods none real surest gradmm".split()
    benchmark("real_models").main([*common, *some, "--folder", work, "--output", path])
    record = records.read_record(path)
    assert record["settings"]["dtype"] == "bfloat16"
    assert all(0 <= one["calibrated"]["accuracy"]["mean"] <= 1 for one in record["results"]["methods"].values())


def test_the_published_search_stands_beside_the_others_and_in_the_settings(benchmark, tmp_path, monkeypatch):
    path, work = str(tmp_path / "03-finetuning-demo.json"), tmp_path / "work"
    common = "--model demo --data demo --task demo --seeds 1 --steps 2 --written 2 --n-synthetic 4 --n-real 6".split()
    few = "--eval-every 2 --max-test 20 --max-validation 10 --outer-steps 1 --inner-steps 2 --run again".split()
    some = [*common, *few, "--folder", str(work), "--output", path]
    methods = ["zero_shot", "gradmm", *benchmark("real_models").OWN]
    some += ["--reader", "demo-b"]
    monkeypatch.setattr(benchmark("real_models"), "MANY", 6)
    benchmark("real_models").main([*some, "--methods", *methods])
    record = records.read_record(path)
    assert record["settings"]["inner_steps"] == 2 and record["settings"]["run"] == "again"
    assert record["settings"]["reader"] == "demo-b"
    assert all(record["results"]["methods"][name]["second_perplexity"] > 1 for name in methods)
    assert all(record["results"]["methods"][name]["n"] == 4 for name in ("second_round", "warm_up", "oracle"))
    assert record["results"]["methods"]["random_many"]["n"] == 6
    assert 0 < record["results"]["methods"]["admm"]["n"] <= 4
    assert set(record["results"]["texts"]) == {"zero_shot", "admm", "gradmm"}
    (manifest,) = work.rglob("admm-seed0/manifest.json")
    expected = gradmm.preset("paper", n_synthetic=4, outer_steps=1, inner_steps=2, init_candidates=4)
    assert files.read_json(manifest)["config"] == asdict(expected)
    benchmark("real_models").main([*some, "--methods", "gradmm"])
    assert "inner_steps" not in records.read_record(path)["settings"]


def test_texts_of_one_real_model_train_another(benchmark, tmp_path):
    path, work = str(tmp_path / "06-transfer-demo.json"), str(tmp_path / "work")
    common = "--model demo --data demo --task demo --seeds 1 --steps 4 --written 2 --n-synthetic 4 --n-real 6".split()
    more = f"--eval-every 4 --max-test 20 --max-validation 10 --layers 1 --methods none real gradmm --folder {work}"
    model, other = gradmm.load_model("demo", device="cpu"), str(tmp_path / "twin")
    for part in (model.lm, model.tokenizer):
        part.save_pretrained(other)
    benchmark("real_models").main([*common, *more.split(), "--learners", other, "--output", path])
    found = records.read_record(path)["results"]
    writer, learner = (found["methods"][name] for name in ("demo", "twin"))
    assert found["writer"] == "demo" and list(writer) == list(learner) == ["none", "real", "gradmm"]
    for name, figures in learner.items():  # the same weights learn the same
        assert figures["accuracy"] == writer[name]["accuracy"] and figures["n"] == writer[name]["n"]


def test_a_private_choice_is_measured_beside_noise_alone(benchmark, tmp_path):
    path = str(tmp_path / "04-privacy-demo.json")
    common = (
        "--model demo --data demo --task demo --seeds 1 --steps 4 --written 2 --n-synthetic 8 --eval-every 4".split()
    )
    more = f"--max-test 20 --max-validation 10 --sizes 20 100 --epsilons 1 --directions 1 2 --folder {tmp_path}"
    script = benchmark("private_release")
    script.main([*common, *more.split(), "--points", "20:1", "--output", path])
    found = records.read_record(path)["results"]
    assert [row["name"] for row in found["trained"]] == ["20:1", "noise only", "prompts only"]
    assert all(0 <= row[name] <= 1 for row in found["trained"] for name in ("accuracy", "calibrated"))
    counts = {row["space"]: row["coordinates"] for row in found["fidelity"]}
    assert (counts["label_rows_centred, 1 directions"], counts["body_subspace, 2 directions"]) == (2, 2)
    assert len(found["fidelity"]) == 2 * 7 and all(-1 <= row["useful"] <= 1 for row in found["fidelity"])
    script.main([*common, *more.split(), "--points", "20:1", "--output", path])  # trains nothing anew
    assert records.read_record(path)["results"] == found


def test_small_sets_are_measured_trained_on_and_gone_on_with(benchmark, tmp_path):
    script = benchmark("measures")
    pool = [{"text": f"it is a {word} and {word} film {i} .", "label": label}
            for label, word in enumerate(("bad", "good")) for i in range(12)]  # fmt: skip
    prefix = script.pools_of(gradmm.load_model("demo", device="cpu"), gradmm.load_task("demo"))
    files.write_json_lines(tmp_path / f"{prefix}x-0.jsonl", pool)
    files.write_json_lines(tmp_path / "pool-y-0.jsonl", [{"text": "by another model .", "label": 0}])
    path, common = str(tmp_path / "measures-demo.json"), "--model demo --data demo --task demo --steps 2 --size 4"
    more = f"{common} --n-real 6 --max-test 20 --max-validation 10 --threads 1 --folder {tmp_path} --output {path}"
    script.main([*more.split(), "--written", "2", "--real", "0"])
    begun = records.read_record(path)["results"]["sets"]
    script.main([*more.split(), "--written", "2", "--real", "1"])
    found = records.read_record(path)["results"]["sets"]
    assert found[:2] == begun and [row["set"] for row in found] == ["written-0", "written-1", "real-0"]
    assert all(set(row) >= set(script.MEASURES) and 0 <= row["calibrated_accuracy"] <= 1 for row in found)
    script.main([*more.split(), "--written", "2", "--real", "0", "--rate", "1e-3"])  # other settings begin anew
    assert records.read_record(path)["results"]["sets"] != begun


def after_training(model, tokens, data, others, steps, rate, weights, eps):
    """The loss of others behind a training, literally: torch's own Adam, one text after the other."""
    learner = trainable_copy(model, gradmm.FinetuneConfig(layers=1))
    optimizer = torch.optim.Adam([w for w in learner.lm.parameters() if w.requires_grad], lr=rate, eps=eps)

    def loss(one, row):
        hidden = learner.last_hidden(learner.embed(torch.tensor([one.sequences[row]])))
        return cross_entropy(learner.logits_of(hidden, tokens.labels), one.labels[row : row + 1])

    for rows in steps:
        optimizer.zero_grad()
        (sum(weights[row] * loss(data, row) for row in rows) / len(rows)).backward()
        optimizer.step()
    return sum(loss(others, row).item() for row in range(len(others.sequences))) / len(others.sequences)


def test_a_metagradient_is_what_a_weight_does_to_a_whole_training(benchmark, monkeypatch, tiny_model):
    script = benchmark("metagradient")
    monkeypatch.setattr(script, "SPAN", 1e-5)  # float64 bears closer differences
    model, task = tiny_model("gpt2"), gradmm.Task("two", ("negative", "positive"), (" bad", " great"), "{text} it was")
    tokens = tokenize_task(task, model.tokenizer)
    texts = ["it is a bad film .", "a good and lovely film .", "bad .", "one of the good films", "bad , so bad"]
    known = [Example(text, label) for text, label in zip(texts, (0, 1, 0, 1, 0), strict=True)]
    data, others = (Encoded.of(model, task, tokens, some, "a") for some in (known, [Example("good and good .", 1)]))
    steps, rate = [[0, 1, 2], [3, 4, 0], [1, 3, 2]], 1e-3
    learner = trainable_copy(model, gradmm.FinetuneConfig(layers=1))
    before = [weights.clone() for weights in learner.lm.parameters()]
    found = script.metagradients(learner, tokens, data, others, steps, rate)
    assert all(torch.equal(*pair) for pair in zip(before, learner.lm.parameters(), strict=True))
    for row in range(5):
        sides = [torch.ones(5, dtype=torch.float64) for _ in range(2)]
        for weights, shift in zip(sides, (1e-6, -1e-6), strict=True):
            weights[row] += shift
        high, low = (
            after_training(model, tokens, data, others, steps, rate, weights, script.TINY) for weights in sides
        )
        assert found[row] == pytest.approx((high - low) / 2e-6, rel=1e-5, abs=1e-9)


def seen(script, *vectors: tuple[float, float]):
    """Two texts a class, whose gradients and states are these vectors."""
    values = torch.tensor(vectors, dtype=torch.float64)
    return script.Seen(torch.tensor([0, 0, 1, 1]), values, values, values.log_softmax(-1), values, values[:, 0])


def test_a_measure_is_what_its_name_says(benchmark):
    script = benchmark("measures")
    real = seen(script, (1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (0.0, 1.0))
    public = seen(script, (4.0, 0.0), (-4.0, 0.0), (0.0, 1.0), (0.0, -1.0))
    own = seen(script, (2.0, 2.0), (2.0, 0.0), (0.0, 2.0), (0.0, 2.0))
    found = {name: measure(own, real, public) for name, measure in script.MEASURES.items()}
    assert (
        found["by_class"] == found["behind_warm_up"] == pytest.approx((2 / 5**0.5 + 1) / 2)
    )  # the means are (2, 1) and (0, 2) to (2, 0), (0, 1)
    assert found["all_classes"] == pytest.approx((2 * 2 + 3 * 1) / (13 * 5) ** 0.5)
    assert found["round_robin"] == found["states"] == pytest.approx(1)
    assert found["interaction"] == pytest.approx((4 + 2) / 2 - (5 + 4) / 4)
    assert found["contrast"] == pytest.approx(1)  # both sets of means lie apart in the direction (1, -1/2)
    assert found["small_gradients"] == pytest.approx(-(5**0.5 + 2) / 2)
    assert found["metagradient"] == pytest.approx(-1)
