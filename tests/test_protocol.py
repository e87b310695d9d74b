"""The comparison: methods at their budget, controls that know what they should, runs that follow from seeds."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_finetuning import toy
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import gradmm
from gradmm import files
from gradmm.config import FinetuneConfig, SynthesisConfig
from gradmm.data import Example, Splits, content_hash
from gradmm.errors import UserError
from gradmm.evaluation import perplexity
from gradmm.experiments import metrics, protocol
from gradmm.experiments import seed_run as trial_room
from gradmm.experiments.baselines import METHODS, random_directions
from gradmm.experiments.metrics import MEASURES, similarities
from gradmm.experiments.protocol import compare
from gradmm.experiments.results import Comparison
from gradmm.experiments.seed_run import ComparisonConfig, Experiment, SeedRun, without_gradient
from gradmm.finetuning import finetune
from gradmm.generation import Sampling
from gradmm.matching import Matching
from gradmm.readability import flaw, words
from gradmm.selection import Selector
from gradmm.tasks import Task, tokenize_task

TWO = Task("two", ("negative", "positive"), (" bad", " great"), "{text} it was", ("the movie was:", "a:"))
FOUR = Task(
    "four", ("a", "b", "c", "d"), (" world", " sports", " business", " text"), "{text} this is",
    ("", "a:", "the cat:", "in:"),
)  # fmt: skip
CONFIG = ComparisonConfig(
    n_real=8,
    synthesis=SynthesisConfig(
        search="admm", ranking="text", n_synthetic=4, oversample=1.5, group_size=2, outer_steps=2, inner_steps=2,
        top_k=5, init_candidates=2, length=5,
    ),
    finetuning=FinetuneConfig(steps=4, batch_size=4, learning_rates=(3e-3, 1e-2), eval_every=2, warmup=1),
    sampling=Sampling(temperature=4.0, max_tokens=16, min_tokens=4, shots=1, rounds=40),
    max_test=8, similarity_steps=(0, 2),
)  # fmt: skip


def splits_of(task: Task) -> Splits:
    return Splits(toy(task, 0, 20), toy(task, 20, 6), toy(task, 30, 6), "toy")


def bench_of(model, task: Task = TWO, config: ComparisonConfig = CONFIG) -> Experiment:
    return Experiment(model, task, splits_of(task), config, {}, "", None)


def records_of(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "records").iterdir()}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Every method with two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return compare(model, TWO, splits_of(TWO), CONFIG, seeds=(0, 1), output=folder, progress=False), folder


def test_every_method_has_its_budget_and_its_figures(whole):
    found, folder = whole
    sizes = {"none": 0, "all_real": 40, "real": 8}
    assert {name: figures["n"] for name, figures in found.methods.items()} == {
        name: sizes.get(name, 4) for name in METHODS
    }
    for name, figures in found.methods.items():
        assert len(figures["accuracy"]["runs"]) == 2 and 0 <= figures["macro_f1"] <= 1
        assert (figures["match_loss"] is None) == (figures["flawed"] is None) == (name == "none")
        assert name == "none" or (0 <= figures["flawed"] <= 1 and 0 <= figures["unfinished"] <= 1)
        assert set(figures["similarity"]) == ({"0", "2"} if name != "none" else set())
        assert (figures["minus_gradmm"] is None) == (name == "gradmm")
        assert figures["calibrated"]["minus_gradmm"] == found.calibrated.methods[name]["minus_gradmm"]
        runs = [record["calibrated"]["accuracy"] for record in found.of(name)]
        assert list(figures["calibrated"]["accuracy"]["runs"]) == runs
    assert not any(record["in_test"] for record in found.records)
    assert len(found.labels) == 8 and len(found.table()) == len(METHODS)
    json.dumps(found.methods, allow_nan=False)
    assert files.read_json(folder / "manifest.json")["status"] == "complete"
    assert {record["method"] for record in found.records if record["curve"]} == set(METHODS) - {"none"}


def test_the_real_examples_match_themselves_at_every_step(whole):
    real = whole[0].methods["real"]
    assert real["match_loss"] == pytest.approx(0, abs=1e-5)
    assert list(real["similarity"].values()) == pytest.approx([1, 1], abs=1e-5)
    for record in whole[0].records:
        if record["n"]:
            assert record["similarity"]["0"] == pytest.approx(1 - record["match_loss"], abs=1e-5)


def test_differences_are_paired_and_summaries_follow_from_the_records(whole):
    found, _ = whole
    for name, figures in found.methods.items():
        runs = [
            sum(a == b for a, b in zip(r["predictions"], found.labels, strict=True)) / len(found.labels)
            for r in found.of(name)
        ]
        assert list(figures["accuracy"]["runs"]) == pytest.approx(runs)
        if name != "gradmm":
            gap, own = figures["minus_gradmm"], found.methods["gradmm"]["accuracy"]
            assert gap["mean"] == pytest.approx(figures["accuracy"]["mean"] - own["mean"])
            assert gap["low"] <= gap["mean"] <= gap["high"]


@pytest.mark.slow
def test_the_same_seeds_give_the_same_files(model, whole, tmp_path):
    compare(model, TWO, splits_of(TWO), CONFIG, seeds=(0, 1), output=tmp_path, progress=False)
    assert records_of(tmp_path) == records_of(whole[1])
    in_memory = compare(model, TWO, splits_of(TWO), CONFIG, methods=("zero_shot", "gradmm"), seeds=(1,), progress=False)
    settings = {"settings": None}
    theirs = [r for r in whole[0].records if r["seed"] == 1 and r["method"] in ("zero_shot", "gradmm")]
    assert [r | settings for r in in_memory.records] == [r | settings for r in theirs]


def test_finished_runs_are_read_back_and_missing_ones_done(model, whole, tmp_path, monkeypatch):
    options = {"methods": ("none", "real", "gradmm"), "output": tmp_path, "progress": False}
    compare(model, TWO, splits_of(TWO), CONFIG, seeds=(0,), **options)
    (tmp_path / "records" / "gradmm-seed0.json").unlink()
    done = []
    monkeypatch.setattr(
        protocol,
        "finetune",
        lambda *args, _run=protocol.finetune, **how: done.append(args[-1].seed) or _run(*args, **how),
    )
    resumed = compare(model, TWO, splits_of(TWO), CONFIG, seeds=(0, 1), **options)
    assert done == [0, 1, 1]
    assert resumed.records == [r for r in whole[0].records if r["method"] in ("none", "real", "gradmm")]
    compare(model, TWO, splits_of(TWO), CONFIG, seeds=(0, 1), **options)
    assert len(done) == 3


def test_a_folder_with_other_settings_is_refused(model, whole):
    before = records_of(whole[1])
    with pytest.raises(UserError, match=r"config\.n_real \(8 there, 6 now\)"):
        compare(model, TWO, splits_of(TWO), replace(CONFIG, n_real=6), seeds=(0,), output=whole[1], progress=False)
    with pytest.raises(UserError, match="data.fingerprint"):
        other = replace(splits_of(TWO), train=toy(TWO, 0, 19))
        compare(model, TWO, other, CONFIG, seeds=(0,), output=whole[1], progress=False)
    assert records_of(whole[1]) == before


def test_a_record_of_another_folder_is_refused(model, tmp_path):
    options = {"methods": ("none",), "seeds": (0,), "output": tmp_path, "progress": False}
    compare(model, TWO, splits_of(TWO), CONFIG, **options)
    place = tmp_path / "records" / "none-seed0.json"
    files.write_json(place, files.read_json(place) | {"settings": "others"})
    with pytest.raises(UserError, match="made with other settings than its folder"):
        compare(model, TWO, splits_of(TWO), CONFIG, **options)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("OMP_NUM_THREADS") != "1", reason="equal to the last bit with equal threads alone")
def test_two_processes_give_what_one_gives(model, whole, tmp_path):
    methods = ("real", "herding", "shuffled", "gradmm")
    two = compare(model, TWO, splits_of(TWO), replace(CONFIG, workers=2), methods, (0, 1), tmp_path, progress=False)
    assert two.records == [r for name in methods for r in whole[0].of(name)]


@pytest.mark.parametrize(("threads", "workers"), [(1, 1), (2, 2), (8, 2)])
def test_two_processes_are_usual_where_there_are_threads_for_two(model, monkeypatch, threads, workers):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert protocol.usual_workers(model) == workers
    assert protocol.usual_workers(SimpleNamespace(device=torch.device("cuda"))) == 1
    monkeypatch.setattr(protocol, "memory_bytes", lambda: 1_000_000)
    assert protocol.usual_workers(model) == 1
    monkeypatch.setattr(protocol, "memory_bytes", lambda: None)
    assert protocol.usual_workers(model) == workers


@pytest.mark.slow
def test_another_model_learns_from_the_same_examples(tiny_model, model, whole, tmp_path):
    """The learner's figures are those by hand of the same examples; the writer's those without a learner."""
    names, learner = ("none", "real", "gradmm"), tiny_model("gpt2", dtype=torch.float32)
    config = replace(CONFIG, learners=[learner])
    found = compare(model, TWO, splits_of(TWO), config, names, (0, 1), tmp_path, progress=False)
    varying = {"settings": None, "elsewhere": None}
    assert [r | varying for r in found.records] == [r | varying for name in names for r in whole[0].of(name)]
    there = found.on(learner.name)
    for seed in (0, 1):
        trial = SeedRun(bench_of(model), seed)
        tuning = replace(CONFIG.finetuning, seed=seed)
        test = metrics.subsample(splits_of(TWO).test, 0, CONFIG.max_test)
        by_hand = finetune(learner, TWO, METHODS["gradmm"](trial), splits_of(TWO).validation, test, tuning)
        assert there.of("gradmm")[seed]["predictions"] == list(by_hand.test.predictions)
        assert there.of("gradmm")[seed]["curve"] == by_hand.curve
    assert there.methods["none"]["match_loss"] is None and there.methods["none"]["n"] == 0
    assert there.methods["real"]["match_loss"] == pytest.approx(0, abs=1e-5)
    assert there.methods["gradmm"]["match_loss"] != found.methods["gradmm"]["match_loss"]
    for seed in (0, 1):
        texts = [example.text for example in METHODS["gradmm"](SeedRun(bench_of(model), seed))]
        assert (
            there.of("gradmm")[seed]["perplexity"]
            == perplexity(learner, texts).corpus
            != found.of("gradmm")[seed]["perplexity"]
        )
    assert there.methods["gradmm"]["distinct_2"] == found.methods["gradmm"]["distinct_2"]
    again = compare(model, TWO, splits_of(TWO), config, names, (0, 1), tmp_path, progress=False)
    assert again.records == found.records
    with pytest.raises(UserError, match="learners"):
        compare(model, TWO, splits_of(TWO), CONFIG, names, (0, 1), tmp_path, progress=False)
    with pytest.raises(UserError, match="must have different names"):
        compare(model, TWO, splits_of(TWO), replace(CONFIG, learners=(model,)), names, (0,), progress=False)


def test_a_learner_without_a_verbalizer_is_refused_before_anything_is_written(
    tiny_model, model, toy_tokenizer, tmp_path
):
    known = json.loads(toy_tokenizer.backend_tokenizer.to_str())
    del known["model"]["vocab"]["Ġgreat"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(known)), bos_token="<|endoftext|>"
    )
    other = replace(tiny_model("gpt2", dtype=torch.float32), name="other", tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"other cannot learn this task: .*verbalizer ' great'"):
        config = replace(CONFIG, learners=(other,))
        compare(model, TWO, splits_of(TWO), config, ("none",), (0,), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def with_other_ids(model, name: str = "other"):
    """The same tokens by other numbers."""
    known = json.loads(model.tokenizer.backend_tokenizer.to_str())
    numbers, last = known["model"]["vocab"], len(known["model"]["vocab"]) - 1
    known["model"]["vocab"] = {piece: last - number for piece, number in numbers.items()}
    known["added_tokens"] = [one | {"id": last - one["id"]} for one in known["added_tokens"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(known)), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return replace(model, name=name, tokenizer=tokenizer)


@pytest.mark.parametrize("space", ["label_rows", "body"])
def test_a_learner_matches_as_with_a_release_of_its_own(tiny_model, model, space, monkeypatch):
    """Over the texts that the writer's preference is taken over: a learner need not be able to write."""
    learner, examples = with_other_ids(tiny_model("gpt2", dtype=torch.float32)), toy(TWO, 9, 3)
    trial = SeedRun(bench_of(model, config=replace(CONFIG, space=space)), 0)
    own = gradmm.release(
        learner, TWO, trial.real, space=space, public_texts=trial.own_texts if space == "body" else None
    )
    monkeypatch.setattr("gradmm.spaces.prompted_texts", lambda *_: pytest.fail("the learner was asked to write"))
    matching = Matching(learner, tokenize_task(TWO, learner.tokenizer), own.targets, own.space)
    losses = matching.of_sets([example.text for example in examples], [example.label for example in examples])
    found = metrics.measure_on(learner, trial, examples)["match_loss"]
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-6) and found > 1e-4


def test_a_second_model_that_cannot_read_the_real_texts_is_refused_before_anything_runs(tiny_model, model, tmp_path):
    second = tiny_model("gpt2", dtype=torch.float32)
    second.lm.config.max_position_embeddings = 5
    with pytest.raises(UserError, match=r"tiny-gpt2 reads 5 tokens, and 32 training text\(s\) have more: take another"):
        config = replace(CONFIG, second=second)
        compare(model, TWO, splits_of(TWO), config, ("real",), (0,), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert compare(model, TWO, splits_of(TWO), config, ("none",), (0,), progress=False).of("none")  # reads none of them


@pytest.mark.parametrize(
    ("n_synthetic", "message"),
    [
        (43, "n_synthetic = 43 needs 22 real texts of each class for random, herding, but 20 of 'negative', 20 of"),
        (1, "n_synthetic = 1, but 2 classes need at least 2"),
    ],
)
def test_a_budget_that_the_real_texts_do_not_cover_is_refused_by_its_own_name(model, n_synthetic, message):
    config = replace(CONFIG, synthesis=replace(CONFIG.synthesis, n_synthetic=n_synthetic))
    with pytest.raises(UserError, match=message):
        compare(model, TWO, splits_of(TWO), config, ("none", "random", "herding"), progress=False)


def test_a_sample_to_measure_leaves_no_class_out_and_is_a_plain_draw_otherwise():
    many = [Example(f"text {number}", int(number == 77)) for number in range(800)]
    for seed in range(5):
        found = metrics.subsample(many, seed, 20)
        assert len(set(found)) == 20 and many[77] in found and found == [one for one in many if one in found]
        same = metrics.subsample([replace(one, label=0) for one in many], seed, 20)
        assert len(set(same) & set(found)) in (19, 20)
    assert metrics.subsample(many, 0, 800) == metrics.subsample(many, 0, None) == many


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_random_targets_have_the_norms_of_the_real_ones(tiny_model, kind):
    model = tiny_model(kind)
    trial = SeedRun(bench_of(model), 0)
    drawn = random_directions(trial.release, 0)
    for ours, theirs in zip(drawn.targets, trial.release.targets, strict=True):
        assert [float(n) for n in ours.norms] == pytest.approx([float(n) for n in theirs.norms], rel=1e-9)
        assert len(ours.norms) == (2 if kind == "phi" else 1)
        whole, real = (t.factors.delta.mT @ t.factors.hidden for t in (ours, theirs))
        assert abs(float((whole * real).sum() / (whole.norm() * real.norm()))) < 0.2
    again, other = (random_directions(trial.release, seed) for seed in (0, 1))
    assert drawn.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("space", ["label_rows", "body"])
def test_the_controls_know_every_space(model, space):
    trial = SeedRun(bench_of(model, config=replace(CONFIG, space=space)), 0)
    drawn, none = random_directions(trial.release, 0), without_gradient(trial.release)
    for ours, theirs, zero in zip(drawn.targets, trial.release.targets, none.targets, strict=True):
        assert [float(n) for n in ours.norms] == pytest.approx([float(n) for n in theirs.norms], rel=1e-5)
        assert [float(n) for n in zero.norms] == [0.0] * len(zero.norms)
    texts = [example.text for example in toy(TWO, 0, 3)]
    matching = Matching(model, tokenize_task(TWO, model.tokenizer), none.targets, none.space)
    assert matching.of_texts(texts, [0, 1] * 3).tolist() == [1.0] * 6


def test_prompt_only_does_not_depend_on_the_release(model):
    texts = []
    for examples in (toy(TWO, 0, 4), toy(TWO, 9, 7)):
        trial = SeedRun(bench_of(model), 3)
        trial.__dict__["release"] = gradmm.release(model, TWO, examples, space="head")
        texts.append(METHODS["prompt_only"](trial))
    assert texts[0] == texts[1] and len(texts[0]) == 4
    assert texts[0] != METHODS["prompt_only"](SeedRun(bench_of(model), 4))


def test_a_pool_is_written_once_and_every_target_chooses_from_it(model, monkeypatch):
    synthesis = replace(
        CONFIG.synthesis, search="pool", ranking="group", filter="calibrated_label", oversample=3.0, length=12
    )
    trial = SeedRun(bench_of(model, config=replace(CONFIG, space="body", synthesis=synthesis)), 3)
    done = []
    monkeypatch.setattr(
        trial_room, "synthesize", lambda *args, _run=trial_room.synthesize, **how: done.append(1) or _run(*args, **how)
    )
    chosen = {name: METHODS[name](trial) for name in ("gradmm", "random_target", "prompt_only", "shuffled")}
    pool = [(row["text"], row["label"]) for row in trial.written.candidates]
    assert len(done) == 1 and len(pool) == 12
    assert all(
        len(texts) == 4 and {(e.text, e.label) for e in texts} <= set(pool)
        for name, texts in chosen.items()
        if name != "shuffled"
    )
    assert [e.text for e in chosen["shuffled"]] == [e.text for e in chosen["gradmm"]]
    passed = [row for row in trial.written.candidates if not row["reason"].startswith("dropped: the model reads")]
    first = [[row["text"] for row in passed if row["label"] == label][:2] for label in (0, 1)]
    assert [e.text for e in chosen["prompt_only"]] == first[0] + first[1]  # in the order of writing
    assert len(METHODS["zero_shot"](trial)) == 4 and len(done) == 1


def test_the_surest_are_those_read_most_surely_as_their_label(model):
    config = replace(CONFIG, synthesis=replace(CONFIG.synthesis, search="pool", oversample=4.0, length=12))
    trial = SeedRun(bench_of(model, config=config), 3)
    texts = [(example.text, example.label) for example in trial.pool]
    tokens = tokenize_task(TWO, model.tokenizer)
    logs = [gradmm.classification.label_logs(model, tokens, [text])[0].double() for text, _ in texts]
    middle = sum(torch.stack([log for log, (_, own) in zip(logs, texts, strict=True) if own == label]).mean(0)
                 for label in (0, 1)) / 2  # fmt: skip
    sure = {text: float((log - middle).softmax(-1)[own]) for log, (text, own) in zip(logs, texts, strict=True)}
    readable = [text for text, _ in texts if flaw(text) is None]
    for label in (0, 1):
        kept = [example.text for example in METHODS["surest"](trial) if example.label == label]
        best = sorted({text for text, own in texts if own == label and text in readable}, key=lambda text: -sure[text])
        assert set(kept) == set(best[:2])


def test_matched_real_examples_are_unseen_real_ones_that_match_together(model):
    config = replace(
        CONFIG, space="body", synthesis=replace(CONFIG.synthesis, search="pool", ranking="group", oversample=8.0)
    )
    trial = SeedRun(bench_of(model, config=config), 0)
    chosen = METHODS["matched_real"](trial)
    assert [e.label for e in chosen] == [0, 0, 1, 1]
    assert set(chosen) <= set(trial.experiment.splits.train) - set(trial.real)
    matching = Matching(model, tokenize_task(TWO, model.tokenizer), trial.release.targets, trial.release.space)
    sets = [chosen, *(METHODS["random"](SeedRun(trial.experiment, seed)) for seed in range(5))]
    best, *others = [sum(matching.of_sets([e.text for e in some], [e.label for e in some])) for some in sets]
    assert best < sum(others) / len(others)


@pytest.mark.parametrize("ranking", ["text", "group"])
def test_matched_real_takes_what_unequal_classes_have_and_chooses_as_gradmm_does(model, ranking):
    synthesis = replace(CONFIG.synthesis, search="pool", ranking=ranking, oversample=8.0)
    bench = bench_of(model, config=replace(CONFIG, space="body", synthesis=synthesis))
    few = [example for example in bench.splits.train if example.label == 0]
    many = [Example(f"{example.text} and {number}", 1) for example in few for number in range(3)]
    bench = replace(bench, splits=replace(bench.splits, train=[*few, *many]))
    trial, asked = SeedRun(bench, 0), []
    with mock.patch.object(SeedRun, "choose", lambda self, pool, config: asked.append((pool, config))):
        METHODS["matched_real"](trial)
    ((pool, config),) = asked
    assert config.ranking == ranking and not set(pool) & set(trial.real)
    counts = [sum(example.label == label for example in pool) for label in (0, 1)]
    assert counts == [min(16, len(few) - 2), 16]


def test_a_pool_is_read_once_for_all_who_choose_from_it(model):
    synthesis = replace(CONFIG.synthesis, search="pool", ranking="group", oversample=8.0)
    trial = SeedRun(bench_of(model, config=replace(CONFIG, space="body", synthesis=synthesis)), 0)
    rows = [{"text": one.text, "label": one.label, "perplexity": 9.0} for one in trial.experiment.splits.train]
    vars(trial)["written"] = SimpleNamespace(candidates=SimpleNamespace(to_list=lambda: rows))
    with mock.patch.object(trial_room, "perplexities", return_value=[]) as read:
        for name in ("prompt_only", "surest", "random_target"):
            assert METHODS[name](trial)
    assert all(texts == [] for _, texts in (call.args for call in read.call_args_list))


def test_prompt_only_is_the_first_projection_of_the_first_draw_in_order_of_writing(model):
    bench = bench_of(model, config=replace(CONFIG, synthesis=replace(CONFIG.synthesis, filter="none")))
    trial = SeedRun(bench, 0)
    first = []
    config = replace(trial.synthesis, init_candidates=1, outer_steps=1)
    gradmm.synthesize(
        model, TWO, trial.release, config, progress=False, on_step=lambda _, result: first.append(result.state.ids)
    )
    tokens = tokenize_task(TWO, model.tokenizer)
    rows = [[i for i in row if i != model.tokenizer.eos_token_id] for row in first[0].flatten(0, 1).tolist()]
    found = METHODS["prompt_only"](trial)
    texts = [tokens.decode(row).strip() for row in rows]
    readable = [[text for text in some if flaw(text) is None] for some in (texts[:4], texts[4:])]
    assert [e.text for e in found] == [*readable[0][:2], *readable[1][:2]]


def test_zero_shot_texts_are_drawn_at_the_temperature_of_the_pool(model):
    hot = replace(CONFIG, sampling=None, synthesis=replace(CONFIG.synthesis, temperature=3.0))
    assert SeedRun(bench_of(model, config=hot), 0).sampling.temperature == 3.0
    assert SeedRun(bench_of(model, config=CONFIG), 0).sampling is CONFIG.sampling


def test_shuffling_moves_labels_alone(model):
    trial = SeedRun(bench_of(model, config=replace(CONFIG, synthesis=replace(CONFIG.synthesis, n_synthetic=12))), 0)
    ours, dealt = METHODS["gradmm"](trial), METHODS["shuffled"](trial)
    assert [e.text for e in ours] == [e.text for e in dealt] and ours != dealt
    assert sorted(e.label for e in ours) == sorted(e.label for e in dealt)


def test_generated_texts_pass_gradmm_s_own_filter_and_repeat_no_shot(model, monkeypatch):
    synthesis = replace(CONFIG.synthesis, filter="calibrated_label")
    trial, asked, keep = SeedRun(bench_of(model, config=replace(CONFIG, synthesis=synthesis)), 0), [], Selector.keep

    def recorded(selector, examples):
        asked.append((selector.filter, len(examples)))
        return keep(selector, examples)

    monkeypatch.setattr(Selector, "keep", recorded)
    for name in ("zero_shot", "few_shot"):
        texts = METHODS[name](trial)
        assert [e.label for e in texts] == [0, 0, 1, 1]
    assert asked == [("calibrated_label", 6)] * 2  # oversample of the 4 that are kept
    assert not {content_hash(e.text) for e in texts} & {content_hash(e.text) for e in trial.real}


def test_shots_that_do_not_fit_the_context_become_fewer(model):
    config = replace(CONFIG, sampling=replace(CONFIG.sampling, shots=40))
    assert len(METHODS["few_shot"](SeedRun(bench_of(model, config=config), 0))) == 4


def test_a_text_that_stands_in_the_test_set_by_chance_is_left_out_and_counted(model, monkeypatch):
    splits, config = splits_of(TWO), replace(CONFIG, max_test=None)
    chance = [Example(splits.test[0].text.upper(), 0), *splits.train[:3]]
    monkeypatch.setitem(METHODS, "zero_shot", lambda trial: chance)
    found = compare(model, TWO, splits, config, ["real", "zero_shot"], (0,), progress=False)
    assert [(record["n"], record["in_test"]) for record in found.records] == [(CONFIG.n_real, 0), (3, 1)]


def test_the_longest_shared_span_of_real_examples_is_their_longest(whole, model):
    real = SeedRun(bench_of(model), 0).real
    assert whole[0].of("real")[0]["longest_shared_span"] == max(len(words(example.text)) for example in real)


def test_curves_and_verdicts(whole):
    found, _ = whole
    rate = CONFIG.finetuning.learning_rates[-1]
    curve = found.curve("real", "validation_loss", rate)
    rows = [
        look for r in found.of("real") for look in r["curve"] if look["learning_rate"] == rate and look["step"] == 2
    ]
    assert curve.loc[2, "mean"] == pytest.approx(sum(look["validation_loss"] for look in rows) / 2)
    assert "gradmm (" in found.verdict("gradmm", "none")
    assert " cannot be told from gradmm" in found.verdict("gradmm", "gradmm")
    known = Comparison(TWO, (0, 1) * 50, [{"method": m, "seed": 0, "n": 0, "accuracy": a, "macro_f1": a,
        "similarity": {},
        "predictions": p, "curve": [], **dict.fromkeys(MEASURES)} for m, a,
            p in (("a", 1, [0, 1] * 50), ("b", 0, [1, 0] * 50))])  # fmt: skip
    later = Comparison(TWO, known.labels, [*known.records, known.records[0] | {"seed": 1, "similarity": {"0": 0.5}}])
    assert later.methods["a"]["similarity"] == {"0": None}  # one seed had no examples
    assert known.verdict("a", "b") == "a (1.000) beats b (0.000): difference +1.000, 95% interval +1.000 to +1.000"
    assert "is beaten by" in known.verdict("b", "a")
    assert known.calibrated is None and "calibrated" not in known.methods["a"]  # as older records are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("gradm",)}, r"\['gradm'\] are not known: use some of none, all_real"),
        ({"methods": ("none", "none")}, "names one twice"),
        ({"seeds": (1, 1)}, "they must differ"), ({"seeds": ()}, "at least one"),
    ],
)  # fmt: skip
def test_misuse_is_one_sentence(model, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compare(model, TWO, splits_of(TWO), CONFIG, **options, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_worker_ends_when_its_parent_is_gone(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        protocol.multiprocessing, "parent_process", lambda: SimpleNamespace(join=lambda: seen.append("gone"))
    )
    monkeypatch.setattr(protocol.os, "_exit", seen.append)
    monkeypatch.setattr(protocol.threading, "Thread", lambda target, daemon: SimpleNamespace(start=target))

    class Begun(Exception):
        pass

    def begin(workers, context, initializer, given):
        initializer(*given)
        raise Begun

    monkeypatch.setattr(protocol, "ProcessPoolExecutor", begin)
    with pytest.raises(Begun):
        compare(model, TWO, splits_of(TWO), replace(CONFIG, workers=2), ("none",), progress=False)
    assert seen == ["gone", 1]


def test_after_an_error_no_other_piece_is_begun(model, monkeypatch):
    begun = []

    def fails_first(trial):
        begun.append(trial.seed)
        time.sleep(len(begun) - 1)  # a piece that has begun goes on
        raise UserError(f"seed {trial.seed}")

    monkeypatch.setitem(METHODS, "none", fails_first)
    monkeypatch.setattr(
        protocol, "ProcessPoolExecutor", lambda workers, context, *begin: ThreadPoolExecutor(1, "", *begin)
    )
    with pytest.raises(UserError, match="seed 0"):
        compare(model, TWO, splits_of(TWO), replace(CONFIG, workers=2), ("none",), range(4), progress=False)
    assert len(begun) <= 2


def test_without_steps_nothing_is_trained_to_compare_gradients(model, monkeypatch):
    monkeypatch.setattr(metrics, "train_at_rate", None)
    trial = SeedRun(bench_of(model, config=replace(CONFIG, similarity_steps=())), 0)
    assert similarities(trial, {"real": trial.real, "none": []}) == {"real": {}, "none": {}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity_steps": (0, 50)}, "from 0 to the"),
        ({"max_test": 0}, "max_test = 0"),
        ({"workers": 0}, "workers = 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **settings)
