"""Every public computation on a GPU against the CPU's; one kind of head runs with a second copy on the CPU, too.

In float64, so that what differs beyond rounding is wrong: `CLOSE` bounds numbers, texts and choices are equal. In
bfloat16, the default on a card, numbers differ by its rounding (`ROUGH`) and texts may part where two tokens are alike.
"""

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from test_sharding import free_port

import gradmm
from gradmm import admm, device
from gradmm.classification import evaluate_calibrated
from gradmm.config import SynthesisConfig
from gradmm.data import Example
from gradmm.evaluation import perplexity
from gradmm.finetuning import fit
from gradmm.generation import Sampling, generate_texts, prompted_texts
from gradmm.initialisation import INITIALISATIONS, Shape, best_of
from gradmm.matching import Matching
from gradmm.models import Model, load_model, wrap_model
from gradmm.privacy import release
from gradmm.projection import PROJECTIONS, DecodingConfig, TokenTables, project
from gradmm.seeds import generator
from gradmm.selection import label_probabilities
from gradmm.spaces import SPACES
from gradmm.synthesis import synthesize
from gradmm.tasks import Task, tokenize_task

CLOSE, ROUGH = {"rtol": 1e-8, "atol": 1e-10}, {"rtol": 0.1, "atol": 0.05}
TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was:", "a film:"))
TEXTS = ("a dull plot", "a fine film", "the plot was thin and it was long", "it was great", "a bad movie", "fun")
REAL = [Example(text, place % 2) for place, text in enumerate(TEXTS)]
# Head and embeddings: tied, untied, with a bias, scaled on the way in, grouped keys.
HEADS = {"tied": "gpt2", "untied": "llama", "biased": "phi", "scaled": "gemma", "grouped": "qwen2"}
SMALL = SynthesisConfig(
    n_synthetic=4, oversample=2, group_size=2, outer_steps=2, inner_steps=3, rho=0.1, top_k=5, search="admm",
    ranking="text", length=6, init_candidates=2,
)  # fmt: skip
POOL = SynthesisConfig(n_synthetic=2, oversample=2, length=10)
PUBLIC = ["the story was long", "a great day", "it was a plot", "bad and dull and thin", "the film was fun"]


PAIRS = [pytest.param(("biased", "cpu"), id="biased-cpu")]
PAIRS += [pytest.param((head, "cuda"), id=f"{head}-cuda", marks=pytest.mark.gpu) for head in HEADS]


def more_there(values: Iterable) -> list:
    """The values of a test's parameter, all but the first for a GPU: a copy on the same CPU shows no more by them."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.gpu) for value in others)]


def tiny(head: str, tiny_model, tokenizer) -> Model:
    """A tiny model with such a head, in float64 on the CPU."""
    return scaled_model(tokenizer) if HEADS[head] == "gemma" else tiny_model(HEADS[head])


@pytest.fixture(params=PAIRS)
def pair(request, tiny_model, toy_tokenizer) -> tuple[Model, Model]:
    """The same model on the CPU and where a second copy of it lies, in float64."""
    head, where = request.param
    model = tiny(head, tiny_model, toy_tokenizer)
    return model, there(model, torch.device(where))


def scaled_model(tokenizer) -> Model:
    """A tiny Gemma, whose embeddings are scaled on the way in."""
    config = transformers.GemmaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = transformers.GemmaForCausalLM(config).double()
        for weights in lm.parameters():
            weights.data.normal_(0.0, 0.2)
    return wrap_model(lm, tokenizer, "tiny-gemma")


def there(model: Model, where: torch.device, dtype: torch.dtype | None = None) -> Model:
    """A copy of a model on a device, of the same name and fingerprint."""
    lm = copy.deepcopy(model.lm).to(where, dtype or model.dtype)
    return wrap_model(lm, model.tokenizer, model.name, None, model.fingerprint)


def close(found, expected, **tolerance) -> None:
    torch.testing.assert_close(found, expected, check_device=False, **(tolerance or CLOSE))


def sequences_of(model: Model) -> list[list[int]]:
    tokens = tokenize_task(TASK, model.tokenizer)
    return [tokens.sequence(text) for text in TEXTS]


def matching_of(model: Model, space: str = "head", distance: str = "cosine") -> Matching:
    found = release(model, TASK, REAL, space=space, progress=False)
    end = model.ends[0]
    return Matching(model, tokenize_task(TASK, model.tokenizer), found.targets, found.space, distance, end)


def drawn(model: Model, groups: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and classes of some groups of two texts of five tokens, some of which end early."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 2, 5, model.embedding.shape[1], generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 9, (groups, 2, 5), generator=draw)
    return (
        x.to(model.device, torch.promote_types(model.dtype, torch.float32)),
        ids.to(model.device),
        torch.arange(groups) % 2,
    )


# ---------------------------------------------------------------- the model


def test_hidden_states(pair):
    here, other = pair
    expected = here.hidden_of(sequences_of(here))
    close(other.hidden_of(sequences_of(here)), expected)
    close(other.hidden_of(sequences_of(here), tokens_per_batch=9), expected)


def test_perplexities(pair):
    here, other = (perplexity(model, TEXTS) for model in pair)
    assert other.per_text == pytest.approx(here.per_text, rel=1e-8) and other.tokens == here.tokens


def test_label_probabilities_and_evaluation(pair):
    here, other = pair
    tokens = tokenize_task(TASK, here.tokenizer)
    close(label_probabilities(other, tokens, TEXTS), label_probabilities(here, tokens, TEXTS), rtol=1e-5, atol=1e-6)
    for judge in (gradmm.evaluate, lambda model, task, real: evaluate_calibrated(model, task, real, PUBLIC)):
        one, two = (judge(model, TASK, REAL) for model in pair)
        assert two.predictions == one.predictions and two.loss == pytest.approx(one.loss, rel=1e-8)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("space", more_there(SPACES))
def test_a_release_in_every_space(pair, space):
    settings = {"space": space, "progress": False}
    if space not in ("head", "label_rows"):
        settings["public_texts"] = PUBLIC
    one, two = (release(model, TASK, REAL, **settings) for model in pair)
    for ours, theirs in zip(one.to("cpu").targets, two.to("cpu").targets, strict=True):
        assert (float(sum(theirs.norms))) == pytest.approx(float(sum(ours.norms)), rel=1e-6)
    assert two.length == one.length


@pytest.mark.parametrize("space", more_there(["label_rows", "body"]))
def test_a_private_release_is_the_sum_and_the_noise(pair, space):
    settings = {"epsilon": 1.0, "delta": 1e-5, "length": 6, "noise_seed": 3, "space": space, "progress": False}
    if space == "body":
        settings["public_texts"] = PUBLIC
    one, two = (release(model, TASK, REAL, **settings).to("cpu") for model in pair)
    for ours, theirs in zip(one.targets, two.targets, strict=True):
        close(theirs.weight, ours.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", more_there(["cosine", "l2"]))
@pytest.mark.parametrize("space", more_there(["head", "label_rows"]))
def test_the_matching_loss_of_vectors_and_its_gradient(pair, space, distance):
    values = []
    for model in pair:
        x, ids, classes = drawn(model)
        x.requires_grad_(True)
        value = matching_of(model, space, distance).of_vectors(x, ids, classes)
        values.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    close(values[1][0], values[0][0])
    close(values[1][1], values[0][1])


@pytest.mark.parametrize("space", more_there(["head", "body"]))
def test_losses_of_texts_and_the_greedy_choice(pair, space):
    one, two = (matching_of(model, space) for model in pair)
    close(two.of_texts(TEXTS, [0, 1] * 3), one.of_texts(TEXTS, [0, 1] * 3), rtol=1e-6, atol=1e-8)
    assert two.greedy(TEXTS, 0, 4) == one.greedy(TEXTS, 0, 4)
    assert two.of_sets(TEXTS, [0, 1] * 3) == pytest.approx(one.of_sets(TEXTS, [0, 1] * 3), rel=1e-6)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("order", more_there(PROJECTIONS))
@pytest.mark.parametrize("early", more_there([False, True]))
def test_projections(pair, order, early):
    found = []
    for model in pair:
        x, _, classes = drawn(model)
        tokens = tokenize_task(TASK, model.tokenizer)
        decoding = DecodingConfig(order, 4, model.vocabulary, model.ends[0] if early else None, 2)
        rows = classes.repeat_interleave(2).to(model.device)
        found.append(project(model, TokenTables.of(model), x.flatten(0, 1), tokens.prompts, rows, decoding).tolist())
    assert found[1] == found[0]


@pytest.mark.parametrize("top_p", more_there([0.9, 1.0]))
def test_written_texts(pair, top_p):
    sampling = Sampling(max_tokens=12, min_tokens=2, top_p=top_p, rounds=30, batch_size=8)
    one, two = ([*generate_texts(model, TASK, 3, 5, sampling)] for model in pair)
    assert two == one
    one, two = (prompted_texts(model, tokenize_task(TASK, model.tokenizer), 4, 8) for model in pair)
    assert two == one


@pytest.mark.parametrize("name", more_there(INITIALISATIONS))
def test_starts(pair, name):
    found = []
    for model in pair:
        decoding = DecodingConfig("lm_then_nearest", 4, model.vocabulary, model.ends[0], 2)
        sources = [generator(1, "initial x", group) for group in range(3)]
        classes = torch.tensor([0, 1, 1])
        found.append(best_of(name, 3, matching_of(model), decoding, Shape(2, 5), classes, sources))
    close(found[1], found[0])


# ---------------------------------------------------------------- the solver


@pytest.mark.parametrize("together", more_there([None, 1, 2]))
def test_the_solver(pair, together):
    config = admm.Config(rho=0.1, outer_steps=2, inner_steps=4, lr=0.05, groups_per_pass=together)
    results = []
    for model in pair:
        matching, (x, _, classes) = matching_of(model), drawn(model)
        decoding = DecodingConfig("lm_then_nearest", 4, model.vocabulary, model.ends[0], 2)

        def projected(v, which, model=model, classes=classes, decoding=decoding):
            rows = classes[which].repeat_interleave(2).to(model.device)
            prompts = tokenize_task(TASK, model.tokenizer).prompts
            ids = project(model, TokenTables.of(model), v.flatten(0, 1), prompts, rows, decoding).view(v.shape[:3])
            return model.embed(ids).to(v.dtype), ids

        def objective(x, ids, which, matching=matching, classes=classes):
            return matching.of_vectors(x, ids, classes[which])

        results.append(admm.solve(objective, projected, admm.start(x), config))
    one, two = results
    assert two.value.tolist() == one.value.tolist() and two.reason == one.reason
    close(two.state.x, one.state.x, rtol=1e-6, atol=1e-8)
    close(two.match_loss, one.match_loss, rtol=1e-6, atol=1e-8)


def moved(model: Model, graphs: device.Graphs, groups: int = 3):
    """The inner steps of some groups, and the loop that did them."""
    matching, (x, ids, classes) = matching_of(model), drawn(model, groups)
    inner = admm.InnerLoop(
        lambda x, ids, which: matching.of_vectors(x, ids, classes[which]), admm.Config(inner_steps=5, lr=0.05), graphs
    )
    found = inner.move(x, x + 0.1, 0.2 * x, ids, torch.arange(groups))
    return found, inner, x


def test_captured_equals_as_it_is(pair):
    _, model = pair
    plain, *_ = moved(model, device.Graphs(torch.device("cpu")))
    captured, *_ = moved(model, device.Graphs(model.device))
    close(captured, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_a_step_is_captured_and_its_replays_wait_for_nothing(head, tiny_model, toy_tokenizer, caplog):
    model = there(tiny(head, tiny_model, toy_tokenizer), torch.device("cuda"))
    _, inner, x = moved(model, device.Graphs(model.device))
    assert "can't be captured" not in caplog.text
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            inner.minimise(torch.arange(3), x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["untied", "biased"])
def test_compiled_layers_are_captured_too(head, tiny_model, caplog):
    model = there(tiny_model(HEADS[head]), torch.device("cuda"), torch.float32)
    plain, *_ = moved(model, device.Graphs(torch.device("cpu")))
    graphs = device.Graphs(model.device, lambda: device.compiled_layers(model.lm))
    close(moved(model, graphs)[0], plain, rtol=1e-3, atol=1e-4)
    assert "can't be captured" not in caplog.text


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("config", more_there([SMALL, POOL]), ids=["admm", "pool"])
def test_a_whole_synthesis_writes_the_same_texts(pair, config):
    results = []
    for model in pair:
        target = release(model, TASK, REAL, space=config.space, public_texts=None, progress=False)
        results.append(synthesize(model, TASK, target, config, progress=False))
    one, two = results
    assert two.candidates["text"] == one.candidates["text"] and two.candidates["kept"] == one.candidates["kept"]
    assert two.candidates["match_loss"] == pytest.approx(one.candidates["match_loss"], rel=1e-5)


def test_a_run_is_interrupted_and_goes_on(pair, tmp_path):
    _, model = pair
    target = release(model, TASK, REAL, space="head", progress=False)
    whole = synthesize(model, TASK, target, SMALL, tmp_path / "whole", progress=False)

    def interrupt(number, result):
        raise KeyboardInterrupt

    # The state is saved at each step, not every few seconds.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gradmm.runs.SNAPSHOT_SECONDS", 0.0)
        synthesize(model, TASK, target, SMALL, tmp_path / "broken", progress=False, on_step=interrupt)
    resumed = synthesize(model, TASK, target, SMALL, tmp_path / "broken", progress=False)
    assert resumed.candidates["text"] == whole.candidates["text"]
    assert resumed.manifest.get("groups_at_once") == whole.manifest.get("groups_at_once")


def test_groups_that_the_memory_does_not_hold_are_halved(pair, monkeypatch):
    """As where another process takes the memory in the middle of a run."""
    _, model = pair
    target = release(model, TASK, REAL, space="head", progress=False)
    plain = synthesize(model, TASK, target, SMALL, progress=False)
    own, seen = Matching.of_vectors, []

    def tight(self, x, ids, classes):
        seen.append(len(x))
        if len(x) > 1 and x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, x, ids, classes)

    monkeypatch.setattr(Matching, "of_vectors", tight)
    monkeypatch.setattr("gradmm.plan.work_units", lambda model, config, groups: (groups, None))
    found = synthesize(model, TASK, target, SMALL, progress=False)
    assert max(seen) == 4 and found.candidates["text"] == plain.candidates["text"]


def test_fine_tuning(pair):
    config = gradmm.FinetuneConfig(steps=3, learning_rates=[1e-3], eval_every=1, warmup=1, batch_size=4)
    one, two = (fit(model, TASK, REAL, REAL, config).curve for model in pair)
    assert [row["train_loss"] for row in two[1:]] == pytest.approx([row["train_loss"] for row in one[1:]], rel=1e-6)
    assert [row["validation_accuracy"] for row in two] == [row["validation_accuracy"] for row in one]


def test_an_adapter_learns_alike(pair):
    pytest.importorskip("peft")
    config = gradmm.FinetuneConfig(
        steps=2, learning_rates=[1e-2], eval_every=1, warmup=0, adapter="lora", adapter_rank=2
    )
    one, two = (fit(model, TASK, REAL, REAL, config).curve for model in pair)
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-5)


TWO_PROCESSES = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import conftest, test_gpu
from gradmm.privacy import release
from gradmm.synthesis import synthesize
where = torch.device(sys.argv[2])
tokenizer = conftest.make_toy_tokenizer()
model = test_gpu.wrap_model(conftest.make_tiny_lm("llama"), tokenizer, "tiny")
model = test_gpu.there(model, where)
target = release(model, test_gpu.TASK, test_gpu.REAL, space="head", progress=False)
synthesize(model, test_gpu.TASK, target, test_gpu.SHARED, sys.argv[3], progress=False)
"""
SHARED = replace(SMALL, groups_per_batch=1)


@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda:0", marks=pytest.mark.gpu)]
)
def test_two_processes_on_one_device_share_a_run(where, tiny_model, tmp_path):
    tests = Path(__file__).parent
    places = {"PYTHONPATH": str(tests.parent), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    places |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_PROCESSES, str(tests), where, str(tmp_path / "shared")]
    running = [
        subprocess.Popen(command, env={**os.environ, **places, "RANK": rank, "LOCAL_RANK": "0"}) for rank in ("0", "1")
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    model = there(tiny_model("llama"), torch.device(where))
    target = release(model, TASK, REAL, space="head", progress=False)
    alone = synthesize(model, TASK, target, SHARED, tmp_path / "alone", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "shared" / "synthetic.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == alone.candidates["text"]


# ---------------------------------------------------------------- a card alone


@pytest.mark.gpu
def test_the_default_on_a_card_is_bfloat16_where_it_is_fast():
    model = load_model("demo")
    assert model.device.type == "cuda" and model.dtype == gradmm.models.fast_dtype(model.device)
    assert load_model("demo", dtype="float32").dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_stays_near_float64(head, tiny_model, toy_tokenizer):
    exact = tiny(head, tiny_model, toy_tokenizer)
    rough = there(exact, torch.device("cuda"), torch.bfloat16)
    close(rough.hidden_of(sequences_of(exact)).double(), exact.hidden_of(sequences_of(exact)), rtol=0.2, atol=0.3)
    (x, ids, classes), (rx, rids, _) = drawn(exact), drawn(rough)
    one, two = matching_of(exact).of_vectors(x, ids, classes), matching_of(rough).of_vectors(rx, rids, classes)
    close(two.double(), one, **ROUGH)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["pool", "admm", "paper"])
def test_the_demo_in_bfloat16_gives_as_many_texts_as_were_asked_for(preset):
    task, data = gradmm.load_data("demo")
    model = load_model("demo")
    real = gradmm.sample_examples(data.train, 10, task, seed=0)
    few = {"n_synthetic": 4, "outer_steps": 2, "inner_steps": 3, "init_candidates": 2}
    config = replace(gradmm.PRESETS[preset], **few)
    target = release(model, task, real, space=config.space, progress=False)
    assert len(synthesize(model, task, target, config, progress=False).kept) == 4


@pytest.mark.gpu
def test_memory_is_given_back():
    task, data = gradmm.load_data("demo")
    model = load_model("demo")
    real = gradmm.sample_examples(data.train, 10, task, seed=0)
    config = replace(gradmm.PRESETS["admm"], n_synthetic=20, outer_steps=2, inner_steps=3)
    target = release(model, task, real, space="head", progress=False)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    synthesize(model, task, target, config, progress=False)
    gc.collect()
    assert torch.cuda.memory_allocated() < before + (64 << 20)


@pytest.mark.gpu
def test_the_groups_at_once_are_recorded_and_all_of_them_on_a_large_card(tiny_model, tmp_path):
    model = there(tiny_model("llama"), torch.device("cuda"))
    target = release(model, TASK, REAL, space="head", progress=False)
    manifest = synthesize(model, TASK, target, SMALL, tmp_path, progress=False).manifest
    assert manifest["groups_at_once"] == {torch.cuda.get_device_name(): manifest["groups"]}
    assert manifest["groups_per_pass"] is None and not (tmp_path / "groups-at-once.json").exists()
