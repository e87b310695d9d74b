"""Bad input at every door: one sentence that names the value, the limit and the mend; nothing half done stays."""

import json
import math
from dataclasses import replace
from pathlib import Path

import papermill
import pytest
import torch
import yaml
from executing import ROOT, execute, forked_kernels, quiet
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_batch import PARAMETERS, store
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm import admm, cli, files
from gradmm.config import FinetuneConfig
from gradmm.data import check_examples
from gradmm.errors import UserError
from gradmm.experiments import batch
from gradmm.experiments.protocol import compare
from gradmm.generation import Sampling
from gradmm.tasks import tokenize_task

LONG, NULL, NAN, INF = "x" * 5000, "a\0b", math.nan, math.inf

# name -> (what is done, with `at` for its folder, what the message says)
CASES = {
    # tasks
    "task: nothing": (lambda at: gradmm.load_task(None), "the task is None"),
    "task: too long": (lambda at: gradmm.load_task(LONG), "no usable path (File name too long)"),
    "task: a null": (lambda at: gradmm.load_task(NULL), "no usable path (embedded null"),
    "task: aliases": (lambda at: gradmm.load_task(put(at, "t.yaml", "a: &a [x]\nb: [*a, *a]")),
        "line 2 is not YAML (it has the alias *a, where the value itself belongs)"),
    # data
    "data: nothing": (lambda at: gradmm.load_data(None), "the data is None: give a path or a name as text"),
    "data: too long": (lambda at: gradmm.load_data(LONG), "no usable path (File name too long)"),
    # models
    "model: nothing": (lambda at: gradmm.load_model(None), "the model is None: give a hub id, a folder, or demo"),
    "model: empty": (lambda at: gradmm.load_model(""), "the model is '': give a hub id"),
    "model: too long": (lambda at: gradmm.load_model(LONG), "no usable path (File name too long)"),
    # settings
    "synthesis: oversample in words": (lambda at: replace(SMALL, oversample="2"),
        "oversample = '2', it must be at least 1"),
    "synthesis: oversample infinite": (lambda at: replace(SMALL, oversample=INF),
        "oversample = inf, it must be at least 1"),
    "synthesis: weight": (lambda at: replace(SMALL, perplexity_weight=NAN),
        "perplexity_weight = nan, it must be at least 0"),
    "synthesis: temperature": (lambda at: replace(SMALL, temperature="no"),
        "temperature = 'no', it must be a finite number above 0"),
    "synthesis: a seed of words": (lambda at: replace(SMALL, seed="../0"), "seed = '../0', it must be a whole number"),
    "synthesis: a list for a name": (lambda at: replace(SMALL, projection=["lm"]),
        "the projection ['lm'] is not known: use one of"),
    "sampling: temperature": (lambda at: Sampling(temperature="hot"),
        "temperature = 'hot', it must be a finite number above 0"),
    "sampling: min above max": (lambda at: Sampling(max_tokens=2), "min_tokens = 6 is above max_tokens = 2"),
    "fine-tuning: rates in words": (lambda at: FinetuneConfig(learning_rates=["1e-4"]),
        "learning_rates = ['1e-4'], each must be above 0"),
    "fine-tuning: warmup": (lambda at: FinetuneConfig(warmup="ten"), "warmup = 'ten', it must be at least 0"),
    "fine-tuning: decay": (lambda at: FinetuneConfig(weight_decay=NAN), "weight_decay = nan"),
    "fine-tuning: an adapter": (lambda at: FinetuneConfig(adapter=["lora"]), "the adapter ['lora'] is not known"),
    "comparison: n_real": (lambda at: replace(CONFIG, n_real="many"),
        "n_real = 'many', it must be a whole number of at least 1"),
    "comparison: a space with a path": (lambda at: replace(CONFIG, space="../head"),
        "the space '../head' is not known: use one of head"),
    "comparison: steps": (lambda at: replace(CONFIG, similarity_steps=3),
        "similarity_steps = 3, each must be a whole number"),
    # output folders
    "output: too long": (lambda at: write(at / LONG), "no usable path (File name too long)"),
    "output: a null": (lambda at: write(f"{at}/a\0b"), "no usable path (embedded null"),
    "output: a number": (lambda at: write(3), "the output folder is 3: give a path"),
    "output: a file": (lambda at: write(put(at, "taken", "")), "taken is a file: give a folder for the output"),
    "comparison: a seed with a path": (lambda at: contest(at / "run", seeds=("../../x",)),
        "seeds = ['../../x'], they must be whole numbers"),
    "comparison: workers true": (lambda at: replace(CONFIG, workers=True), "workers = True"),
    # batches, presets and parameters
    "batch: a long name": (lambda at: batch.plan([LONG], at), "no usable path (File name too long)"),
    "batch: a preset with a path": (lambda at: batch.plan([notebook(at)], at, "../params"),
        "there is no preset '../params'"),
    "batch: aliases": (lambda at: files.read_parameters(put(at, "p.yaml", BOMB)),
        "line 2 is not YAML (it has the alias *a, where the value itself belongs): mend that line"),
}  # fmt: skip
LEVELS = "abcdefghijklmnopqrstuvwxyz"
BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip(LEVELS, LEVELS[1:], strict=False)
)


def put(at: Path, name: str, content: str) -> Path:
    (at / name).write_text(content)
    return at / name


def notebook(at: Path) -> Path:
    return store(at / "one.ipynb", PARAMETERS)


HELD: dict = {}


@pytest.fixture(scope="module", autouse=True)
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    HELD.update(model=model, release=gradmm.release(model, TASK, REAL, space="head"))


def write(output):
    return gradmm.synthesize(HELD["model"], TASK, HELD["release"], SMALL, output, progress=False)


def contest(output, **options):
    return compare(HELD["model"], TWO, splits_of(TWO), CONFIG, ("none",), output=output, progress=False, **options)


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_sentence_and_leaves_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    act, words = CASES[case]
    with pytest.raises(UserError) as caught:
        act(tmp_path)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message.replace(str(tmp_path), "")) < 500
    assert ":" in message  # what is wrong: what to do
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"t.yaml", "p.yaml", "taken", "one.ipynb"}


# ---------------------------------------------------------------- the command line and notebooks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.ipynb"], "none.ipynb is no notebook"),
        (["one.ipynb", "-p", "sede", "1"], "no parameter 'sede': did you mean seed?"),
        (["one.ipynb", "--preset", "demo"], "there is no preset 'demo'"),
        (["one.ipynb", "--sweep", "none.yaml"], "none.yaml does not exist"),
        (["one.ipynb", "--jobs", "0"], "jobs = 0, it must be at least 1"),
        (["one.ipynb", "--output", LONG], "no usable path (File name too long)"),
    ],
)
def test_the_command_line_says_one_sentence_and_ends_with_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path)
    assert cli.main(["batch", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["one.ipynb"]


@pytest.mark.parametrize("text", ["2020-13-45", "[" * 800, "a: b: c", "*x", "\x00"])
def test_a_value_that_is_no_yaml_is_text_on_the_command_line(text, tmp_path):
    _, (job,) = batch.requested([str(notebook(tmp_path)), "-p", "seed", text])
    assert job.parameters == {"seed": text}


@pytest.mark.slow
def test_a_notebook_s_last_cell_is_one_sentence(tmp_path, shared_folder):
    parameters, words = {"n_real": 1}, "n_real = 1, but 2 classes need at least 2"
    with quiet(tmp_path), forked_kernels(shared_folder), pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(ROOT / "notebooks" / "00-quickstart.ipynb", parameters, tmp_path)
    assert caught.value.ename == "UserError" and caught.value.evalue.startswith(words)
    assert caught.value.traceback == [f"UserError: {caught.value.evalue}"]
    cells = json.loads((tmp_path / "00-quickstart.ipynb").read_text())["cells"]
    (error,) = (o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error")
    assert error["traceback"] == caught.value.traceback
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".ipython") == ["00-quickstart.ipynb"]


# ---------------------------------------------------------------- strategies

FAST = settings(
    max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONTROLS = st.text(st.characters(codec="utf-8", categories=["Cc", "Cf", "Zl", "Zp", "Co", "Cn"]), max_size=8)
RIGHT_TO_LEFT = st.text(st.sampled_from("אבגדהשלוםمرحبا\u202e\u200f\u2067 "), max_size=12)
ANY_TEXT = st.text(max_size=20) | CONTROLS | RIGHT_TO_LEFT | st.just("long " * 400)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY_VALUE = st.recursive(
    PLAIN,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
    max_leaves=6,
)


@FAST
@given(
    values=st.dictionaries(
        st.sampled_from(["name", "labels", "verbalizers", "template", "generation_prompts", "min_words", "hub", "x"]),
        ANY_VALUE,
    )
)
def test_any_mapping_is_a_task_or_one_sentence(values):
    try:
        task = gradmm.load_task(values)
    except UserError as error:
        assert "\n" not in str(error) or "\n" in repr(values)
        assert len(str(error)) < 2000
    else:
        assert len(task.labels) == len(task.verbalizers) >= 2


@FAST
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
@example(texts=["\u202e\u0000", "\ud7ff", "𐏿 أهلا"])
def test_any_text_goes_through_the_pipeline_or_is_refused_by_its_row(texts):
    """Of any script, empty, very long, control characters, right to left: refused, or tokenized and matched."""
    model, released = HELD["model"], []
    for number, text in enumerate(texts, 1):
        try:
            released += check_examples([{"text": text, "label": number % 2}], TASK)
        except UserError as error:
            assert str(error).startswith("row 1 has ") and not text.strip()
    tokens = tokenize_task(TASK, model.tokenizer)
    short = [one for one in released if len(tokens.sequence(one.text)) <= model.context]
    for one in released:
        if one not in short:
            with pytest.raises(UserError, match="tokens with its template, tiny-llama reads 64"):
                gradmm.release(model, TASK, [*REAL, one])
    if short:
        target = gradmm.release(model, TASK, [*REAL, *short])
        assert all(bool(norm.isfinite()) for one in target.targets for norm in one.norms)


@FAST
@given(
    groups=st.integers(1, 3),
    count=st.integers(1, 3),
    length=st.integers(1, 4),
    width=st.integers(1, 3),
    words=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_solver_keeps_any_shape_and_vocabulary(groups, count, length, width, words, seed):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(words, width, generator=draw, dtype=torch.float64)
    x = torch.randn(groups, count, length, width, generator=draw, dtype=torch.float64)
    config = admm.Config(outer_steps=2, inner_steps=2)

    def nearest(v, which):
        ids = torch.cdist(v.flatten(0, 2), table).argmin(-1).view(v.shape[:3])
        return table[ids], ids

    result = admm.solve(lambda x, ids, which: x.square().sum((1, 2, 3)), nearest, admm.start(x), config)
    assert result.value.shape == (groups, count, length) and result.value.min() >= 0 and result.value.max() < words
    assert result.match_loss.tolist() == pytest.approx(table[result.value].square().sum((1, 2, 3)).tolist())
    assert len(result.history) == 2 * groups


@FAST
@given(st.dictionaries(st.text(max_size=6), ANY_VALUE, max_size=4))
def test_any_parameter_file_is_read_or_refused_in_one_sentence(tmp_path, values):
    place = tmp_path / "p.yaml"
    place.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        assert set(files.read_parameters(place)) == set(values)
    except UserError as error:
        assert str(place) in str(error)
