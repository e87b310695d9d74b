"""Fine-tuning: what is trained, what is chosen on which examples, and that a run is a function of its settings."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import KINDS, in_tiers
from sklearn.metrics import accuracy_score, f1_score

from gradmm import files, finetuning
from gradmm import training as training_room
from gradmm.classification import Encoded, evaluate, evaluate_calibrated, score
from gradmm.config import FinetuneConfig
from gradmm.data import Example, load_data, sample_examples
from gradmm.errors import DataWarning, UserError
from gradmm.finetuning import Training, finetune, fit
from gradmm.models import load_model
from gradmm.tasks import Task, tokenize_task
from gradmm.training import adamw, batches, train_at_rate, trainable_copy

TWO = Task("two", ("negative", "positive"), (" bad", " great"), template="{text} it was")
FOUR = Task("four", ("a", "b", "c", "d"), (" world", " sports", " business", " text"), template="{text} this is")
CLUES = ("cat sat", "dog sat", "red movie", "blue film")
FILLERS = ("the", "a", "i feel", "we saw the", "you like a", "they made the")
QUICK = FinetuneConfig(steps=12, batch_size=8, learning_rates=(3e-3, 1e-2), eval_every=4, warmup=2, patience=None)


def toy(task: Task, start: int, count: int) -> list[Example]:
    """`count` learnable examples of each class, texts distinct for distinct starts."""
    numbers = ("one", "two", "three")
    return [
        Example(f"{FILLERS[i % 6]} {CLUES[label]} {numbers[i // 6 % 3]} {numbers[i // 18 % 3]}", label)
        for i in range(start, start + count)
        for label in range(len(task.labels))
    ]


@pytest.fixture(params=[TWO, FOUR], ids=lambda task: task.name)
def task(request) -> Task:
    return request.param


def run(model, task, config=QUICK, count=8, **options):
    return finetune(model, task, toy(task, 0, count), toy(task, 20, 6), toy(task, 30, 6), config, **options)


@pytest.mark.parametrize("kind", in_tiers(KINDS, "phi"))
def test_training_teaches_and_leaves_the_model_alone(tiny_model, task, kind):
    model = tiny_model(kind, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    result = run(model, task, replace(QUICK, steps=60, eval_every=10), count=12)
    assert result.accuracy >= 0.75 > evaluate(model, task, toy(task, 30, 6)).accuracy
    assert all(torch.equal(before[name], value) for name, value in model.lm.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())
    assert not model.lm.training


def test_calibration_takes_out_the_preference_for_a_verbalizer_and_nothing_else(tiny_model, task):
    model, examples = tiny_model("phi", dtype=torch.float32), toy(task, 30, 6)
    texts = [example.text for example in toy(task, 20, 6)]
    before = evaluate_calibrated(model, task, examples, texts)
    model.head_bias[tokenize_task(task, model.tokenizer).labels[-1]] += 50
    assert set(evaluate(model, task, examples).predictions) == {len(task.labels) - 1}
    assert evaluate_calibrated(model, task, examples, texts).predictions == before.predictions
    with pytest.raises(UserError, match="there are 0 texts to calibrate on"):
        evaluate_calibrated(model, task, examples, [])


def test_a_caller_s_autocast_does_not_keep_the_weights_of_the_first_step(tiny_model):
    model, config = tiny_model("llama", dtype=torch.float32), replace(QUICK, autocast=True, learning_rates=(3e-3,))
    plain = run(model, TWO, config)
    with torch.autocast("cpu", torch.bfloat16):
        within = run(model, TWO, config)
    losses = [[row["train_loss"] for row in found.curve if row["step"]] for found in (plain, within)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0][-1] < 0.9 * losses[0][0]


def test_a_result_knows_what_the_trained_model_is_worth_calibrated(tiny_model, task):
    model, config = tiny_model("llama", dtype=torch.float32), replace(QUICK, max_validation=4)
    sets, tested = (toy(task, 0, 8), toy(task, 20, 6)), toy(task, 30, 6)
    trained = fit(model, task, *sets, config).model
    looks = [example.text for example in finetuning.looked_at(sets[1], task, config)]
    found = finetune(model, task, *sets, tested, config)
    assert len(looks) == 4 and found.test == evaluate(trained, task, tested)
    assert found.calibrated == evaluate_calibrated(trained, task, tested, looks)


def test_same_seed_same_run_other_seed_other_run(tiny_model, task):
    model = tiny_model("llama")
    first, again, other = (run(model, task, replace(QUICK, seed=seed)) for seed in (3, 3, 4))
    assert first.curve == again.curve and first.test == again.test
    assert [row["train_loss"] for row in first.curve] != [row["train_loss"] for row in other.curve]


def test_one_step_is_adamw_on_the_mean_loss_of_the_batch(tiny_model, task, kind):
    model = tiny_model(kind)
    rows = toy(task, 0, 3)
    config = replace(QUICK, steps=1, batch_size=64, learning_rates=(1e-2,), warmup=0, tokens_per_batch=16)
    trained = fit(model, task, rows, toy(task, 20, 1), config)
    reference = tiny_model(kind).lm.requires_grad_(True)
    tokens = tokenize_task(task, model.tokenizer)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for example in rows:
        ids = torch.tensor([tokens.sequence(example.text)])
        embeds = reference.get_input_embeddings().weight[ids]  # the padding token, which starts every text, learns too
        logits = reference(inputs_embeds=embeds).logits[:, -1, list(tokens.labels)]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([example.label])))
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    assert trained.curve[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-9)
    found = evaluate(replace(model, lm=reference.requires_grad_(False)), task, toy(task, 20, 1))
    assert trained.curve[-1]["validation_loss"] == pytest.approx(found.loss, rel=1e-6)


def test_the_best_look_is_kept_and_ties_go_to_the_earliest(tiny_model, task):
    model = tiny_model("gpt2")
    training = fit(model, task, toy(task, 0, 8), toy(task, 20, 6), replace(QUICK, steps=24))
    best = max(row["validation_accuracy"] for row in training.curve)
    step = min(row["step"] for row in training.curve if row["validation_accuracy"] == best)
    assert (training.validation_accuracy, training.step) == (best, step)
    assert evaluate(training.model, task, toy(task, 20, 6)).accuracy == best
    assert {row["learning_rate"] for row in training.curve} == set(QUICK.learning_rates)


def test_all_rates_start_from_one_look(tiny_model, monkeypatch):
    model, counted = tiny_model("gpt2"), []
    monkeypatch.setattr(training_room, "score", lambda *given: counted.append(1) or score(*given))
    curve = fit(model, TWO, toy(TWO, 0, 8), toy(TWO, 20, 6), QUICK).curve
    starts = [row for row in curve if row["step"] == 0]
    assert len(starts) == len(QUICK.learning_rates) == 2 and len(counted) == len(curve) - 1
    assert starts[1] == {**starts[0], "learning_rate": QUICK.learning_rates[1]}
    alone = fit(
        model, TWO, toy(TWO, 0, 8), toy(TWO, 20, 6), replace(QUICK, learning_rates=QUICK.learning_rates[1:])
    ).curve
    assert [row for row in curve if row["learning_rate"] == QUICK.learning_rates[1]] == alone


def test_a_model_that_training_spoils_stays_as_it_came(tiny_model):
    model = tiny_model("llama")
    texts = [example.text for example in toy(TWO, 0, 4)]
    read = evaluate(model, TWO, [Example(text, 0) for text in texts]).predictions
    validation = [Example(text, label) for text, label in zip(texts, read, strict=True)]
    wrong = [Example(f"the {text}", 1 - label) for text, label in zip(texts, read, strict=True)]
    training = fit(model, TWO, wrong, validation, QUICK)
    assert training.step == 0 and training.learning_rate == QUICK.learning_rates[0]
    weights = training.model.lm.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.lm.state_dict().items())


def test_evaluation_agrees_with_whole_logits_and_scikit_learn(tiny_model, task, kind):
    model = tiny_model(kind)
    examples = toy(task, 0, 7)
    found = evaluate(model, task, examples, tokens_per_batch=40)
    tokens = tokenize_task(task, model.tokenizer)
    logits = torch.cat([model.lm(torch.tensor([tokens.sequence(e.text)])).logits[:, -1] for e in examples])
    expected = logits[:, list(tokens.labels)]
    assert found.predictions == tuple(expected.argmax(-1).tolist())
    assert found.labels == tuple(e.label for e in examples)
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(expected, torch.tensor(found.labels)).item())
    assert found.accuracy == pytest.approx(accuracy_score(found.labels, found.predictions))
    every = list(range(len(task.labels)))
    assert found.macro_f1 == pytest.approx(
        f1_score(found.labels, found.predictions, labels=every, average="macro", zero_division=0.0)
    )


def test_fewer_examples_than_a_batch_and_one_example(tiny_model, task):
    model = tiny_model("opt")
    assert run(model, task, replace(QUICK, batch_size=1000), count=2).curve
    assert finetune(model, task, toy(task, 0, 1)[:1], toy(task, 20, 2), toy(task, 30, 2), QUICK).curve


def test_batches_hold_every_row_once_in_each_pass():
    stream = batches(10, FinetuneConfig(batch_size=4, seed=1))
    rows = [next(stream) for _ in range(5)]
    assert all(len(batch) == 4 for batch in rows)
    flat = sum(rows, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert len(next(batches(3, FinetuneConfig(batch_size=4)))) == 3


def rates_of(model, config: FinetuneConfig, past=()) -> list[float]:
    """The rate at each step of a training at the peak 0.01, in the optimizer's own words."""
    trained, tokens, rates = trainable_copy(model), tokenize_task(TWO, model.tokenizer), []
    data, optimizer = Encoded.of(model, TWO, tokens, toy(TWO, 0, 2), "training"), adamw(trained, 0.01, config)
    optimizer.register_step_pre_hook(lambda chosen, *_: rates.append(chosen.param_groups[0]["lr"]))
    list(train_at_rate(trained, tokens, data, data, optimizer, config, past=past))
    return rates


@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (7, 0), (5, 5), (3, 10), (1, 0), (9, 2.5)])
def test_the_rate_rises_then_falls_to_zero(tiny_model, steps, warmup):
    model = tiny_model("llama", dtype=torch.float32)
    config = replace(QUICK, steps=steps, warmup=warmup, eval_every=100, patience=None)
    rise = [(step + 1) / (warmup + 1) for step in range(steps)]
    fall = [(steps - step) / max(1, steps - warmup) for step in range(steps)]
    expected = [0.01 * min(up, down, 1.0) for up, down in zip(rise, fall, strict=True)]
    assert rates_of(model, config) == pytest.approx(expected, rel=1e-12, abs=0)
    past = [{"step": steps // 2, "validation_accuracy": 0.5}]
    assert rates_of(model, config, past) == pytest.approx(expected[steps // 2 :], rel=1e-12, abs=0)


def test_patience_gives_a_rate_up(tiny_model):
    config = replace(QUICK, steps=400, eval_every=2, patience=2, learning_rates=(1e-3,))
    looks = [row["validation_accuracy"] for row in run(tiny_model("llama"), TWO, config).curve]
    assert len(looks) < 100 and max(looks[-2:]) <= max(looks[:-2])


def test_a_rate_that_diverges_is_given_up(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    model.head_weight.mul_(1e30)
    result = run(model, TWO)
    assert result.step == 0 and all(math.isfinite(row["validation_loss"]) or row["step"] for row in result.curve)


def test_half_precision_models_learn_in_float32(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    training = fit(model, FOUR, toy(FOUR, 0, 4), toy(FOUR, 20, 2), replace(QUICK, autocast=True))
    assert training.model.dtype == torch.float32 and model.dtype == torch.bfloat16


def test_short_validation_texts_are_left_out_and_their_number_is_limited(tiny_model):
    model, task = tiny_model("llama"), replace(TWO, min_words=5)
    short = [Example("cat", 1), Example("dog", 0)]
    validation = toy(task, 20, 4)
    long = fit(model, task, toy(task, 0, 2), validation, QUICK).curve
    assert fit(model, task, toy(task, 0, 2), validation + short, QUICK).curve == long
    with pytest.raises(UserError, match="none of the 2 validation examples has the 5 words that task 'two' asks for"):
        fit(model, task, toy(task, 0, 2), short, QUICK)
    few = fit(model, task, toy(task, 0, 2), validation, replace(QUICK, max_validation=3)).curve
    assert {round(row["validation_accuracy"] * 3, 6) for row in few} <= {0.0, 1.0, 2.0, 3.0}


def test_progress_sees_each_row(tiny_model):
    seen = []
    assert run(tiny_model("llama"), TWO, on_look=seen.append).curve == seen
    assert set(seen[0]) == {"learning_rate", "step", "train_loss", "validation_loss", "validation_accuracy"}


def test_the_trained_model_carries_its_own_fingerprint(tiny_model):
    model = tiny_model("llama")
    trained: list[Training] = [fit(model, TWO, toy(TWO, 0, n), toy(TWO, 20, 2), QUICK) for n in (2, 2, 3)]
    prints = [training.model.fingerprint for training in trained]
    assert prints[0] == prints[1] != prints[2] and model.fingerprint not in prints


@pytest.mark.parametrize("which", ["train", "validation"])
def test_overlap_with_test_is_refused(tiny_model, which):
    sets = {"train": toy(TWO, 0, 2), "validation": toy(TWO, 20, 2), "test": toy(TWO, 30, 2)}
    sets[which] = [*sets[which], Example(sets["test"][0].text.upper(), 0)]
    with pytest.raises(UserError, match="test set"):
        finetune(tiny_model("llama"), TWO, config=QUICK, **sets)


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"batch_size": 2.5}, {"learning_rates": ()}, {"learning_rates": 1e-3}, {"learning_rates": (-1e-3,)},
     {"eval_every": 0}, {"patience": 0}, {"warmup": -1}, {"weight_decay": -0.1}, {"gradient_clip": 0},
         {"max_validation": 0}],
)  # fmt: skip
def test_unusable_settings_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        FinetuneConfig(**setting)


@pytest.mark.slow
def test_real_examples_teach_the_bench_model(bench):
    model = load_model(bench / "imdb-lm")
    with pytest.warns(DataWarning):
        task, splits = load_data(bench / "data" / "sst2")
    real = sample_examples(splits.train, 50, task, 0)
    config = FinetuneConfig(steps=30, learning_rates=(1e-4,), eval_every=15)
    result = finetune(model, task, real, splits.validation, splits.test, config)
    assert evaluate(model, task, splits.test).accuracy < 0.6 < 0.68 < result.accuracy


# ---------------------------------------------------------------- interrupted and finished work


class Killed(Exception):
    """Stands for the end of the process."""


def killed_at(look: int):
    """A callback that ends the training at a look, counted from 1."""
    seen = []

    def on_look(row: dict) -> None:
        seen.append(row)
        if len(seen) == look:
            raise Killed

    return on_look


@pytest.fixture(
    scope="module",
    params=[{}, {"batch_size": 3, "patience": 2}, {"adapter": "lora", "adapter_rank": 2}],
    ids=str,
)
def uninterrupted(request, tiny_model):
    """A model, settings and what a training by them that nothing interrupts gives."""
    if "adapter" in request.param:
        pytest.importorskip("peft")
    model, config = tiny_model("gpt2", dtype=torch.float32), replace(QUICK, **request.param)
    return model, config, run(model, TWO, config, progress=False)


@pytest.mark.parametrize("look", in_tiers([1, 3, 4, 5, 6, 8], 3))
def test_an_interrupted_training_ends_as_an_uninterrupted_one(uninterrupted, tmp_path, monkeypatch, look):
    monkeypatch.setattr(finetuning, "SNAPSHOT_SECONDS", -1.0)
    model, config, whole = uninterrupted
    with pytest.raises(Killed):
        run(model, TWO, config, output=tmp_path, progress=False, on_look=killed_at(min(look, len(whole.curve))))
    looks = []
    again = run(model, TWO, config, output=tmp_path, progress=False, on_look=looks.append)
    for name in ("curve", "test", "learning_rate", "step", "validation_accuracy"):
        assert getattr(again, name) == getattr(whole, name)
    assert looks == whole.curve[-len(looks) :] and len(looks) >= len(whole.curve) - look + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetuning.json", "manifest.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_an_uninterrupted_training_to_the_last_bit(tiny_model, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(finetuning, "SNAPSHOT_SECONDS", -1.0)
    model, config = tiny_model("llama", dtype=dtype), replace(QUICK, learning_rates=(3e-3,), steps=16)
    sets = (toy(TWO, 0, 8), toy(TWO, 20, 6))
    whole = fit(model, TWO, *sets, config)
    with pytest.raises(Killed):
        fit(model, TWO, *sets, config, killed_at(3), finetuning.Checkpoint(tmp_path))
    again = fit(model, TWO, *sets, config, saved=finetuning.Checkpoint(tmp_path))
    theirs = whole.model.lm.state_dict()
    assert again.step == whole.step
    assert all(torch.equal(value, theirs[name]) for name, value in again.model.lm.state_dict().items())


def test_a_finished_training_is_read_back(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    first = run(model, TWO, output=tmp_path, progress=False)
    monkeypatch.setattr(finetuning, "fit", None)
    again = run(model, TWO, output=tmp_path, progress=False)
    assert (
        again.curve, again.test, again.calibrated, again.seconds, again.macro_f1,
    ) == (first.curve, first.test, first.calibrated, first.seconds, first.macro_f1)  # fmt: skip
    for changed in ({"config": replace(QUICK, seed=1)}, {"count": 7}):
        with pytest.raises(UserError, match="holds a run with other settings: .*choose another output folder"):
            run(model, TWO, output=tmp_path, progress=False, **changed)
    with pytest.raises(UserError, match=r"other settings: task\.name"):
        run(model, replace(TWO, name="other"), output=tmp_path, progress=False)
    (tmp_path / "finetuning.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"finetuning\.json is no finished fine-tuning .*: remove its folder and run again"
    ):
        run(model, TWO, output=tmp_path, progress=False)


def test_a_training_that_diverged_is_read_back(tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.head_weight.mul_(1e30)
    first, again = (run(model, TWO, output=tmp_path, progress=False) for _ in range(2))
    assert [row["step"] for row in again.curve] == [row["step"] for row in first.curve]
    assert again.test.accuracy == first.test.accuracy


def test_unfinished_work_that_is_damaged_is_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "SNAPSHOT_SECONDS", -1.0)
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(Killed):
        run(model, TWO, output=tmp_path, progress=False, on_look=killed_at(2))
    files.write_tensors(tmp_path / finetuning.STATE, {"x": torch.ones(1)}, {})
    with pytest.raises(UserError, match=r"training\.safetensors is no saved training .*: remove it and run again"):
        run(model, TWO, output=tmp_path, progress=False)
    (tmp_path / finetuning.STATE).write_bytes(b"half")
    with pytest.raises(UserError, match=r"training\.safetensors is no whole safetensors file"):
        run(model, TWO, output=tmp_path, progress=False)


def test_saving_takes_a_tenth_of_the_time_at_most(tiny_model, tmp_path, monkeypatch):
    saved, write, clock = [], files.write_tensors, iter(range(0, 10_000, 6))
    monkeypatch.setattr(finetuning.files, "write_tensors", lambda *given: saved.append(given) or write(*given))
    monkeypatch.setattr(
        finetuning.time, "monotonic", lambda: next(clock)
    )  # six seconds pass at every look: so long a save takes
    run(tiny_model("llama"), TWO, replace(QUICK, steps=40, eval_every=1), output=tmp_path, progress=False)
    assert 1 < len(saved) <= 82 / 10


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_training_is_shown(tiny_model, monkeypatch, capfd, progress):
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    run(tiny_model("llama"), TWO, progress=progress)
    shown = capfd.readouterr().err
    assert ("fine-tuning: 100%" in shown and "24/24" in shown) if progress else shown == ""


def test_what_the_memory_held_is_known_to_who_goes_on(tiny_model, tmp_path, monkeypatch):
    """So that the pieces of later steps, and with them the last bits, are those of a run without interruption."""
    monkeypatch.setattr(finetuning, "SNAPSHOT_SECONDS", 0)
    model = tiny_model("llama", dtype=torch.float32)
    trained = trainable_copy(model, QUICK)
    optimizer = adamw(trained, 1e-3, QUICK)
    optimizer.param_groups[0]["held"] = 40
    saved = finetuning.Checkpoint(tmp_path)
    row = {"learning_rate": 1e-3, "step": 0, "validation_loss": 1.0}
    saved.snapshot([[row]], row, {}, trained, optimizer)
    later = finetuning.Checkpoint(tmp_path)
    assert later.tokens is None
    later.load()
    assert later.tokens == 40
