"""The pipeline: the same bytes again, also after a kill; a reason for every text; one sentence for every misuse."""

import copy
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import KINDS, in_tiers

import gradmm
from gradmm.config import PRESETS, SynthesisConfig
from gradmm.errors import UserError
from gradmm.generation import Writer
from gradmm.gradients import Factors, FactorTarget
from gradmm.matching import Matching
from gradmm.plan import Plan, work_units
from gradmm.readability import flaw
from gradmm.selection import FILTERS, count_dropped
from gradmm.synthesis import synthesize
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was:", "a:"))
TEXTS = {
    0: ["a dull plot", "the actors sat all time", "not one scene"],
    1: ["a fine film", "we like the music", "red and blue"],
}
REAL = [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]
SMALL = SynthesisConfig(
    search="admm", ranking="text", n_synthetic=4, oversample=1.5, group_size=2, outer_steps=2, inner_steps=2, top_k=5,
    init_candidates=2, length=5,
)  # fmt: skip
CLOCKS = {"clock"}


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    return model, TASK, gradmm.release(model, TASK, REAL, space="head")


def files_of(folder: Path) -> dict[str, object]:
    """Every file but the clock readings."""
    held = {p.name: p.read_text() for p in folder.iterdir() if p.name not in ("timings.jsonl", "manifest.json")}
    manifest = json.loads((folder / "manifest.json").read_text())
    return {**held, "manifest.json": {k: v for k, v in manifest.items() if k not in CLOCKS}}


def test_a_run_gives_texts_history_and_manifest(setting, tmp_path):
    model, task, release = setting
    result = synthesize(model, task, release, SMALL, tmp_path / "run", progress=False)
    assert result.candidates.column_names == [
        "text", "label", "label_name", "match_loss", "perplexity", "group", "kept", "reason",
    ]  # fmt: skip
    assert len(result.candidates) == 8 and len(result.kept) == 4 and result.kept["label"].count(0) == 2
    assert all(row["reason"].startswith("kept" if row["kept"] else "dropped") for row in result.candidates)
    assert set(result.history.columns) >= {
        "step", "group", "label", "match_x", "match_z", "primal", "dual", "stationarity", "inner_gradient", "changed",
        "seconds",
    }  # fmt: skip
    assert len(result.history) == 2 * 4
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["config"]["seed"] == 0
    assert manifest["release"]["private"] is False
    assert manifest["clock"]["peak_memory"]["process"] > 0 and manifest["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert rows == result.candidates.to_list()


def test_the_match_column_is_the_distance_of_the_text_itself(setting):
    model, task, release = setting
    result = synthesize(model, task, release, SMALL, progress=False)
    matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space)
    row = result.candidates[3]
    assert row["match_loss"] == pytest.approx(matching.of_texts([row["text"]], [row["label"]]).item(), rel=1e-4)


def test_ranking_by_group_keeps_what_matches_best_together(setting):
    model, task, release = setting
    config = replace(SMALL, ranking="group", oversample=3.0)
    result = synthesize(model, task, release, config, progress=False)
    matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space)
    for label in (0, 1):
        rows = [row for row in result.candidates if row["label"] == label]
        distinct = list({row["text"]: None for row in rows if flaw(row["text"]) is None})
        wanted = [distinct[place] for place in matching.greedy(distinct, label, 2)]
        kept = {row["reason"]: row["text"] for row in rows if row["kept"]}
        assert kept == {
            f"kept: rank {rank} of {len(distinct)} by the group's matching loss": wanted[rank - 1] for rank in (1, 2)
        }
    by_text = synthesize(model, task, release, replace(config, ranking="text"), progress=False)
    assert set(by_text.candidates["text"]) == set(result.candidates["text"])


def test_of_a_private_release_only_the_directions_count(setting):
    model, task, _ = setting
    private = gradmm.release(model, task, REAL, epsilon=1.0, delta=1e-5, length=5, space="label_rows")
    with pytest.raises(UserError, match="'l2' compares lengths, and"):
        Plan.of(model, task, private, replace(SMALL, distance="l2"))


def test_a_pool_asks_for_nothing_that_admm_alone_needs(setting, monkeypatch):
    model, task, release = setting
    monkeypatch.setattr(type(model), "ends", ())
    monkeypatch.setattr("gradmm.projection.TokenTables.of", lambda model: pytest.fail("tables were made"))
    pool = replace(SMALL, search="pool", top_k=10**6)
    assert Plan.of(model, task, release, pool).written_per_class == (3, 3)
    with pytest.raises(UserError, match="has no end-of-text token: set init = 'normal'"):
        Plan.of(model, task, release, SMALL)


def test_exact_gradients_are_known_by_their_examples_and_not_by_their_last_bits(setting, tmp_path):
    """Threads and GPUs move these; a run goes on all the same, but not with other examples."""
    model, task, release = setting
    done = synthesize(model, task, release, SMALL, tmp_path, progress=False)
    (first, second), other = release.targets, gradmm.release(model, task, REAL[::-1] + REAL[:1], space="head")
    moved = FactorTarget(Factors(first.factors.delta * (1 + 1e-6), first.factors.hidden, first.factors.bias))
    again = synthesize(model, task, replace(release, targets=(moved, second)), SMALL, tmp_path, progress=False)
    assert again.kept["text"] == done.kept["text"]
    with pytest.raises(UserError, match=r"release.examples .* made of other real examples"):
        synthesize(model, task, other, SMALL, tmp_path, progress=False)
    assert gradmm.load_release(release.save(tmp_path / "r.safetensors")).examples == release.examples
    public = {"space": "label_rows_subspace", "public_texts": ["a film", "the plot was dull", "we like it"]}
    few, more = (gradmm.release(model, task, REAL, **public, directions=count) for count in (1, 2))
    assert len({few.examples, more.examples, release.examples}) == 3
    assert not gradmm.release(model, task, REAL, epsilon=1.0, delta=1e-5, length=5).examples


@pytest.mark.parametrize("ranking", ["text", "group"])
def test_every_ranking_honours_the_weight_of_perplexity(setting, ranking):
    model, task, release = setting
    config = replace(SMALL, ranking=ranking, oversample=3.0, perplexity_weight=1e3)
    result = synthesize(model, task, release, config, progress=False)
    for label in (0, 1):
        rows = [row for row in result.candidates if row["label"] == label and flaw(row["text"]) is None]
        least = sorted({row["perplexity"] for row in rows})[:2]
        assert sorted(row["perplexity"] for row in rows if row["kept"]) == least


@pytest.mark.parametrize("choice", [{"ranking": "text"}, {"perplexity_weight": 1e3}, {"filter": "label"}], ids=str)
def test_the_history_of_a_choice_is_in_the_order_in_which_its_texts_were_taken(setting, monkeypatch, choice):
    model, task, release = setting
    monkeypatch.setitem(FILTERS, "label", lambda _, classes: [1 - c if n % 4 else None for n, c in enumerate(classes)])
    config = replace(SMALL, search="pool", n_synthetic=8, oversample=2.0, length=24)
    result = synthesize(model, task, release, replace(config, **{"ranking": "group", **choice}), progress=False)
    matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space)

    def place(row):
        rank = row["reason"].removeprefix("kept: rank ").split()[0]
        return (0, int(rank)) if rank.isdigit() else (1, row["match_loss"])  # what fills up comes last

    assert any(row["reason"].startswith("kept to fill") for row in result.kept) == ("filter" in choice)
    for label, name in enumerate(task.labels):
        taken = [row["text"] for row in sorted(result.kept, key=place) if row["label"] == label]
        steps = result.history[result.history["label"] == name]
        assert steps["match_z"].tolist() == pytest.approx(
            [matching.of_sets(taken[:count], [label] * count)[label] for count in range(1, 5)], rel=1e-5
        )


@pytest.mark.parametrize("space", in_tiers(["head", "body"], "head"))
def test_a_pool_holds_finished_texts_and_the_target_chooses(setting, tmp_path, space):
    model, task, _ = setting
    release = gradmm.release(model, task, REAL, space=space)
    config = replace(SMALL, search="pool", ranking="group", oversample=4.0, length=24)
    result = synthesize(model, task, release, config, tmp_path / "a", progress=False)
    assert len(result.candidates) == 16 and len(result.kept) == 4 and result.kept["label"].count(0) == 2
    assert all(row["text"][-1] in ".!?" and row["group"] == row["label"] for row in result.candidates)
    matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space)
    first = [row["text"] for row in result.candidates if row["label"] == 0]
    assert [row["text"] for row in result.kept if row["label"] == 0] == [
        first[row] for row in sorted(matching.greedy(first, 0, 2))
    ]
    again = synthesize(model, task, release, config, tmp_path / "a", progress=False)
    assert again.candidates.to_list() == result.candidates.to_list() and again.history.equals(result.history)
    steps = result.history[result.history["label"] == TASK.labels[0]]
    taken = [first[row] for row in matching.greedy(first, 0, 2)]
    assert steps["step"].tolist() == [1, 2]
    assert steps["match_z"].tolist() == pytest.approx(
        [matching.of_sets(taken[:count], [0] * count)[0] for count in (1, 2)], rel=1e-5
    )
    synthesize(model, task, release, config, tmp_path / "b", progress=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_body_is_matched_by_choosing_alone(setting, tmp_path):
    model, task, _ = setting
    with pytest.raises(
        UserError, match="targets in the space 'body' are matched by choosing texts: set search = 'pool'"
    ):
        synthesize(
            model, task, gradmm.release(model, task, REAL, space="body"), SMALL, tmp_path / "none", progress=False
        )
    assert not (tmp_path / "none").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(setting, tmp_path):
    model, task, release = setting
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthesize(model, task, release, replace(SMALL, seed=seed), tmp_path / name, progress=False)
    one, two, three = (files_of(tmp_path / name) for name in "abc")
    assert one == two and one["synthetic.jsonl"] != three["synthetic.jsonl"]


def test_a_finished_folder_is_read_back(setting, tmp_path, monkeypatch):
    model, task, release = setting
    first = synthesize(model, task, release, SMALL, tmp_path, progress=False)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("gradmm.admm.solve", lambda *_: pytest.fail("nothing is left to do"))
    again = synthesize(model, task, release, SMALL, tmp_path, progress=False)
    assert again.candidates.to_list() == first.candidates.to_list() and again.manifest == first.manifest
    assert again.history.equals(first.history)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held


@pytest.mark.parametrize("after", in_tiers([1, 2, 3, 4, 5], 3))
def test_an_interrupted_run_continues_to_the_same_bytes(setting, tmp_path, monkeypatch, after):
    model, task, release = setting
    config = replace(SMALL, groups_per_batch=3, outer_steps=3)
    synthesize(model, task, release, config, tmp_path / "whole", progress=False)
    monkeypatch.setattr("gradmm.runs.SNAPSHOT_SECONDS", 0.0)
    seen = []

    def interrupt(batch, result):
        seen.append(result)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(model, task, release, config, tmp_path / "cut", progress=False, on_step=interrupt)
    steps = []
    synthesize(
        model, task, release, config, tmp_path / "cut", progress=False, on_step=lambda batch, result: steps.append(1)
    )
    assert len(steps) == 6 - after + 1  # the step whose snapshot was not yet written is taken again
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_an_interrupted_pool_continues_to_the_same_bytes(setting, tmp_path, monkeypatch):
    model, task, release = setting
    pool = replace(SMALL, search="pool", ranking="group", oversample=4.0, length=24)
    written, write = [], Writer.write

    def interrupt(writer, *given):
        written.append(given)
        if len(written) == stop:
            raise KeyboardInterrupt
        return write(writer, *given)

    monkeypatch.setattr(Writer, "write", interrupt)
    stop = 0
    synthesize(model, task, release, pool, tmp_path / "whole", progress=False)
    units, stop = len(written), len(written) + 2
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, task, release, pool, tmp_path / "cut", progress=False)
    assert [path.name for path in (tmp_path / "cut").glob("texts-*")] == ["texts-0000.json"]
    written.clear()
    synthesize(model, task, release, pool, tmp_path / "cut", progress=False)
    assert len(written) == units - 1 > 0 and files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import conftest, test_synthesis, gradmm.models, gradmm.runs
gradmm.runs.SNAPSHOT_SECONDS = 0.0
lm = conftest.make_tiny_lm("llama", dtype=torch.float32)
model = gradmm.models.wrap_model(lm, conftest.make_toy_tokenizer(), "tiny-llama")
def on_step(batch, result):
    if result.state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
test_synthesis.long_run(model, sys.argv[2], on_step)
"""


def long_run(model, output, on_step=None):
    """Twelve steps of each of two batches."""
    target = gradmm.release(model, TASK, REAL, space="head")
    synthesize(
        model, TASK, target, replace(SMALL, groups_per_batch=2, outer_steps=12), output, progress=False, on_step=on_step
    )


@pytest.mark.slow
def test_a_run_killed_in_one_process_continues_in_another_to_the_same_bytes(tiny_model, tmp_path):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "cut")]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"] == "running"
    assert list((tmp_path / "cut").glob("batch-*.safetensors"))
    model = tiny_model("llama", dtype=torch.float32)
    for name in ("cut", "whole"):
        long_run(model, tmp_path / name)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_the_published_settings_run_too(setting):
    model, task, release = setting
    published = {
        name: getattr(PRESETS["official"], name) for name in ("projection", "init", "filter", "perplexity_weight")
    }
    result = synthesize(model, task, release, replace(SMALL, **published), progress=False)
    assert len(result.kept) == 4 and all(row["text"] for row in result.candidates)


EVERY_FAMILY = [(kind, "generated") for kind in KINDS if kind != "llama"]


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        ("llama", "generated"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("phi", "normal"), *EVERY_FAMILY]),
    ],
)
def test_the_size_of_a_batch_changes_no_byte(tiny_model, kind, init):
    model = tiny_model(kind, dtype=torch.float32)
    release = gradmm.release(model, TASK, REAL, space="head")
    config = replace(SMALL, init=init, n_synthetic=7)
    one, four = (
        synthesize(model, TASK, release, replace(config, groups_per_batch=size), progress=False) for size in (1, 4)
    )
    assert four.candidates.to_list() == one.candidates.to_list()
    assert _sorted(four.history).equals(_sorted(one.history))
    assert four.manifest["groups_ended"] == one.manifest["groups_ended"]


def _sorted(history):
    return history.drop(columns="seconds").sort_values(["group", "step"], ignore_index=True)


def test_units_of_work_follow_from_settings_alone(setting, monkeypatch):
    model, task, release = setting
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: pytest.fail("memory was asked for"))
    assert work_units(model, SynthesisConfig(group_size=10), 20) == (10, 1)
    assert work_units(model, SynthesisConfig(group_size=10), 21) == (7, 1)
    assert work_units(model, SynthesisConfig(group_size=100), 3) == (1, 1)
    assert work_units(model, SynthesisConfig(group_size=10, groups_per_batch=7), 20) == (7, 1)
    assert work_units(model, SynthesisConfig(group_size=10, groups_per_batch=70), 20) == (20, 1)
    assert work_units(replace(model, lm=copy.deepcopy(model.lm).half()), SynthesisConfig(group_size=10), 20) == (10, 1)
    halved = replace(model, lm=copy.deepcopy(model.lm).bfloat16())
    assert work_units(halved, SynthesisConfig(group_size=10), 20) == (10, 2)
    assert work_units(halved, SynthesisConfig(group_size=10), 22) == (8, 2)
    assert work_units(halved, SynthesisConfig(group_size=10), 13) == (8, 2)
    assert work_units(halved, SynthesisConfig(group_size=10), 5) == (5, 2)
    assert work_units(halved, SynthesisConfig(group_size=10, groups_per_batch=7), 20) == (7, 2)
    assert work_units(halved, SynthesisConfig(group_size=100), 3) == (1, 1)
    manifest = synthesize(model, task, release, SMALL, progress=False).manifest
    assert (manifest["groups_per_batch"], manifest["groups_per_pass"]) == (4, 1)


def test_four_classes_a_model_with_bias_and_texts_that_end_early(tiny_model):
    model = tiny_model("phi", dtype=torch.float32)
    labels = ("world", "sports", "business", "text")
    words, prompts = tuple(f" {label}" for label in labels), ("we:", "they:", "you:", "i:")
    task = Task("news", labels, words, "{text} this is", prompts)
    real = [{"text": f"a {word} scene", "label": i % 4} for i, word in enumerate("red blue cat dog fine dull".split())]
    config = replace(SMALL, n_synthetic=6, distance="l2", projection="nearest_then_lm", filter="none")
    result = synthesize(model, task, gradmm.release(model, task, real, space="head"), config, progress=False)
    assert [result.kept["label"].count(label) for label in range(4)] == [2, 2, 1, 1]


def test_a_group_without_a_finite_loss_is_reported_its_texts_dropped_and_no_byte_of_the_others_changed(
    setting, monkeypatch
):
    model, task, release = setting
    whole = synthesize(model, task, release, SMALL, progress=False)
    sound = Matching.of_vectors
    monkeypatch.setattr(
        Matching,
        "of_vectors",
        lambda self, x, ids, classes: sound(self, x, ids, classes).where(classes == 1, torch.nan),
    )
    with pytest.warns(UserWarning, match="2 of 4 texts are kept: .*empty 4"):
        result = synthesize(model, task, release, SMALL, progress=False)
    reasons = {row["label"]: row["reason"] for row in result.manifest["groups_ended"]}
    assert reasons["bad"].startswith("non-finite") and reasons["good"].startswith("step limit")
    assert [row["reason"] for row in result.candidates if row["label"] == 0] == ["dropped: the text is empty"] * 4
    assert len(result.history) < len(whole.history)
    ours, theirs = (_sorted(run.history[run.history["label"] == "good"]) for run in (result, whole))
    assert ours.equals(theirs)


UNREADABLE = {
    "loop": "cat cat cat cat", "fragment": ", it was", "markup": "the <|endoftext|> film", "echo": "the movie was bad",
        "no word": "...", "empty": " ",
}  # fmt: skip


@pytest.mark.parametrize("search", ["admm", "pool"])
@pytest.mark.parametrize("ranking", ["text", "group"])
def test_unreadable_texts_are_never_kept_whatever_the_search_and_ranking(setting, search, ranking):
    model, task, release = setting
    told = replace(task, generation_prompts=("the movie was bad .", "a:"))
    plan = Plan.of(model, told, release, replace(SMALL, search=search, ranking=ranking))
    good = ["red and blue", "the cat sat", "one dull plot", "we like music"]
    texts = [*UNREADABLE.values(), *good, good[0]]
    rows = plan.selector.rows(texts, [0] * 8 + [1] * 3)
    assert [row["reason"].startswith("dropped") for row in rows] == [True] * 6 + [False] * 4 + [True]
    assert count_dropped([row["reason"] for row in rows]) == {**dict.fromkeys(UNREADABLE, 1), "duplicate": 1}
    with pytest.warns(
        UserWarning,
        match=r"3 of 4 texts are kept: of the 9 written too many were dropped \(.*loop 1.*\); raise oversample, or",
    ):
        rows = plan.selector.rows(texts[:9], [0] * 8 + [1])
    assert [row["text"] for row in rows if row["kept"]] == good[:3]


def test_a_search_that_writes_loops_keeps_none_and_counts_them(setting, monkeypatch, tmp_path):
    model, task, release = setting
    monkeypatch.setattr("gradmm.tasks.TaskTokens.decode", lambda self, ids: "good " * 3 + str(sum(ids)))
    with pytest.warns(UserWarning, match=r"0 of 4 texts are kept: of the 8 written too many were dropped \(loop"):
        result = synthesize(model, task, release, SMALL, tmp_path, progress=False)
    assert len(result.kept) == 0 and sum(result.manifest["dropped"].values()) == 8
    assert json.loads((tmp_path / "manifest.json").read_text())["dropped"] == result.manifest["dropped"]


@pytest.mark.parametrize("ranking", ["text", "group"])
def test_a_pool_that_comes_out_short_is_chosen_from_all_the_same(setting, monkeypatch, tmp_path, ranking):
    model, task, release = setting
    words = ("red", "blue", "one", "like", "not")

    def write(writer, label, pool, draws):
        some = [int(torch.randint(3 + 2 * label, (1,), generator=draw)) for draw in draws]
        return [f"a {words[one]} {('plot', 'film')[label]}" for one in some]

    monkeypatch.setattr("gradmm.generation.Writer.write", write)
    config = replace(SMALL, search="pool", ranking=ranking, oversample=2.5)
    with pytest.warns(UserWarning, match="3 of 5 texts of 'bad' came out"):
        result = synthesize(model, task, release, config, tmp_path, progress=False)
    assert len(result.candidates) == 8 and result.kept["label"] == [0, 0, 1, 1]
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == result.kept.to_list()


@pytest.mark.parametrize("search", ["admm", "pool"])
@pytest.mark.parametrize("prompts", [(), ("", ""), ("a film.", "A  film.")])
def test_prompts_that_tell_no_class_are_warned_of_before_writing(setting, monkeypatch, search, prompts):
    model, task, release = setting
    for name in ("gradmm.models.Model.read", "gradmm.matching.Matching.of_vectors"):
        monkeypatch.setattr(name, lambda *inputs, **more: pytest.fail("the model was asked"))
    with pytest.raises(
        UserWarning, match="the labels 'bad', 'good', so .*: write into task.yaml such as generation_prompts: "
    ):
        synthesize(
            model, replace(task, generation_prompts=prompts), release, replace(SMALL, search=search), progress=False
        )


def test_a_release_of_another_model_or_task_is_refused(setting, tiny_model):
    model, task, release = setting
    with pytest.raises(UserError, match="another model than tiny-gpt2"):
        synthesize(tiny_model("gpt2"), task, release, SMALL, progress=False)
    with pytest.raises(UserError, match="other labels, template or verbalizers"):
        synthesize(model, replace(task, verbalizers=(" bad", " good")), release, SMALL, progress=False)


def test_a_folder_with_other_settings_is_refused_and_kept(setting, tmp_path):
    model, task, release = setting
    synthesize(model, task, release, SMALL, tmp_path, progress=False)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"config\.rho \(0\.003 there, 0\.5 now\)"):
        synthesize(model, task, release, replace(SMALL, rho=0.5), tmp_path, progress=False)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_synthetic": 0}, "n_synthetic = 0, it must be a whole number of at least 1"),
        ({"n_synthetic": 1}, "n_synthetic = 1, but 2 classes need one text each"),
        ({"n_synthetic": 2.5}, "n_synthetic = 2.5"), ({"group_size": 0}, "group_size = 0"),
        ({"oversample": 0.5}, "oversample = 0.5, it must be at least 1"),
        ({"rho": 0}, "rho = 0, it must be a finite number above 0"),
        ({"rho": -0.1}, "rho = -0.1"), ({"inner_steps": 0}, "inner_steps = 0"), ({"outer_steps": 0}, "outer_steps = 0"),
        ({"lr": 0.0}, "lr = 0.0"), ({"top_k": 0}, "top_k = 0"),
        ({"top_k": 5000}, "top_k = 5000, it must be from 1 to the"),
        ({"projection": "beam"}, "projection 'beam' is not known: use one of"),
        ({"init": "zeros"}, "init 'zeros' is not known: use one of generated, normal"),
        ({"temperature": 0.0}, "temperature = 0.0, it must be a finite number above 0"),
        ({"filter": "best"}, "filter 'best' is not known: use one of"),
        ({"distance": "l1"}, "distance 'l1' is not known: use one of cosine, l2"),
        ({"length": 0}, "length = 0"),
        ({"length": 64}, "length = 64 with a template or prompt of"),
        ({"init_candidates": 0}, "init_candidates = 0"),
        ({"ranking": "best"}, "the ranking 'best' is not known: use one of text, group"),
        ({"perplexity_weight": -1}, "perplexity_weight = -1"),
        ({"groups_per_batch": 0}, "groups_per_batch = 0"),
        ({"search": "best"}, "the search 'best' is not known: use one of admm, pool"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence_and_nothing_is_written(setting, tmp_path, settings, message):
    model, task, release = setting
    with pytest.raises(UserError) as caught:
        config = replace(gradmm.PRESETS["admm"], **{"length": 5, "top_k": 5, **settings})
        synthesize(model, task, release, config, tmp_path / "run", progress=False)
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_published_settings():
    assert PRESETS["paper"].projection == "lm_then_nearest" and PRESETS["official"].projection == "nearest_then_lm"
    assert (PRESETS["paper"].outer_steps, PRESETS["paper"].inner_steps, PRESETS["paper"].top_k) == (30, 50, 200)
