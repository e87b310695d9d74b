"""What a Release holds, what it must not hold, and every way of asking for one wrongly."""

import copy
import dataclasses
import datetime
import errno
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_sketch import literal

from gradmm import files, mechanism, privacy, spaces
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.files import read_tensors, write_tensors
from gradmm.gradients import DenseTarget, FactorTarget, Space
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was")
SECRET = "zanzibar"
EXAMPLES = [
    Example("the movie is terrible", 0), Example("a good film and a fine story", 1), Example("dull plot", 0),
    Example("we saw some music", 1), Example(f"the actors {SECRET}", 0),
]  # fmt: skip
OTHERS = [Example("you like this cat", 1), Example("one two three words of text and all that", 0)]
PUBLIC = ["some words", "a dog sat on the cat", "two red words", "this text is about sports", "they made time"]
PRIVATE = {"epsilon": 1.0, "delta": 1e-5, "length": 6}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("phi")


def explicit_gradients(model, example: Example) -> list[torch.Tensor]:
    """d loss / d head by autograd through the whole model."""
    tokens = tokenize_task(TASK, model.tokenizer)
    head = [p for p in (model.head_weight, model.head_bias) if p is not None]
    for parameter in head:
        parameter.requires_grad_(True)
    logits = model.lm(input_ids=torch.tensor([tokens.sequence(example.text)]), use_cache=False).logits[0, -1]
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([tokens.labels[example.label]]))
    found = torch.autograd.grad(loss, head)
    for parameter in head:
        parameter.requires_grad_(False)
    return list(found)


# ---------------------------------------------------------------- without privacy


def test_without_epsilon_the_targets_are_the_mean_gradients(model):
    found = privacy.release(model, TASK, EXAMPLES, space="head")
    assert not found.private and found.ledger == () and found.statement.startswith("not private")
    for label, target in enumerate(found.targets):
        gradients = [explicit_gradients(model, example) for example in EXAMPLES if example.label == label]
        weight, bias = (torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True))
        factors = target.factors
        torch.testing.assert_close(factors.delta.mT @ factors.hidden / len(gradients), weight, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(factors.delta.mean(0), bias, rtol=1e-8, atol=1e-10)


def test_without_epsilon_the_length_is_the_real_mean(model):
    tokens = tokenize_task(TASK, model.tokenizer)
    mean = sum(len(tokens.encode(example.text)) for example in EXAMPLES) / len(EXAMPLES)
    assert privacy.release(model, TASK, EXAMPLES).length == round(mean)
    assert privacy.release(model, TASK, EXAMPLES, length=3).length == 3
    assert privacy.release(model, TASK, [Example("a", 0), Example("b", 1)]).length == len(tokens.encode("a")) == 1


@pytest.mark.parametrize("space", ["head", "body", "label_rows"])
@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_row_is_counted_as_it_was_given_and_found_before_the_model_runs(model, monkeypatch, space, place):
    long = {"text": f"{SECRET} " * 40, "label": 0}
    rows = [{"text": example.text, "label": 1 - example.label} for example in EXAMPLES]
    rows.insert(place - 1, long)
    monkeypatch.setattr(type(model), "last_hidden", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(
        UserError, match=f"^example {place} has .* tokens with its template, tiny-phi reads 64"
    ) as caught:
        privacy.release(model, TASK, rows, space=space)
    assert SECRET not in str(caught.value)
    rows[place - 1] = Example(long["text"], 0, "mine/train.jsonl, line 9")
    with pytest.raises(UserError, match="^mine/train.jsonl, line 9 has "):
        privacy.release(model, TASK, rows, space=space)


def test_a_release_names_what_it_belongs_to(model):
    found = privacy.release(model, TASK, EXAMPLES)
    assert (found.model, found.task) == (model.fingerprint, TASK.fingerprint)
    assert found.labels == TASK.labels and found.label_tokens == tokenize_task(TASK, model.tokenizer).labels


# ---------------------------------------------------------------- with privacy


def options_of(space: str) -> dict:
    """What a release in this space needs and takes of public texts."""
    if space in spaces.PUBLIC_SPACES:
        return {"public_texts": PUBLIC, "directions": 3}
    return {} if space in spaces.HEAD_SPACES else {"public_texts": PUBLIC}


def in_space(space: Space, weight: torch.Tensor, bias: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = weight if space.rows is None else weight[space.rows]
    weight = weight if space.basis is None else weight @ space.basis
    return [weight, *(b if space.rows is None else b[space.rows] for b in bias)]


def explicit_in(model, space, example: Example) -> list[torch.Tensor]:
    """One example's gradient in the coordinates of any space: weight, and bias if the head has one."""
    if isinstance(space, BodySketch):
        sketch = literal(model, tokenize_task(TASK, model.tokenizer), space, example.text, example.label)[None]
        return [sketch if space.basis is None else sketch @ space.basis.to(sketch)]
    weight, *bias = explicit_gradients(model, example)
    return in_space(space, weight, bias)


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("space", spaces.SPACES)
@pytest.mark.parametrize("relation", mechanism.RELATIONS)
def test_the_targets_are_clipped_sums_plus_the_planned_noise(tiny_model, kind, space, relation):
    model = tiny_model(kind)
    clip = 0.5
    found = privacy.release(
        model, TASK, EXAMPLES, **PRIVATE, clip=clip, space=space, relation=relation, noise_seed=4, **options_of(space)
    )
    (entry,) = found.ledger
    bits = mechanism.seeded_bits(4)
    for label, target in enumerate(found.targets):
        total = None
        for example in (e for e in EXAMPLES if e.label == label):
            parts = explicit_in(model, found.space, example)
            scale = min(1.0, clip / torch.cat([part.flatten() for part in parts]).norm().item())
            total = (
                [scale * p for p in parts]
                if total is None
                else [t + scale * p for t, p in zip(total, parts, strict=True)]
            )
        for value, released in zip(total, (target.weight, target.bias), strict=False):
            noise = mechanism.add_noise(torch.zeros_like(value), entry.sigma, entry.grid, bits)
            torch.testing.assert_close(released - noise, value, rtol=0, atol=4e-6)
    assert entry.coordinates == sum(t.weight.numel() + (0 if t.bias is None else t.bias.numel()) for t in found.targets)


def test_the_noise_differs_between_releases_and_is_not_seeded_by_torch(model):
    torch.manual_seed(0)
    one = privacy.release(model, TASK, EXAMPLES, **PRIVATE)
    torch.manual_seed(0)
    two = privacy.release(model, TASK, EXAMPLES, **PRIVATE)
    assert one.private and one.fingerprint != two.fingerprint
    assert one.statement.startswith("(1, 1e-05)-differential privacy for replace-one neighbours")


def test_a_fixed_noise_seed_is_not_private(model):
    one, two = (privacy.release(model, TASK, EXAMPLES, **PRIVATE, noise_seed=7) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert not one.private and one.statement.startswith("not private: the noise seed is fixed at 7")


@pytest.mark.parametrize("calibration", mechanism.CALIBRATIONS)
def test_the_ledger_says_how_the_noise_was_found(model, calibration):
    found = privacy.release(model, TASK, EXAMPLES, **PRIVATE, calibration=calibration)
    (entry,) = found.ledger
    assert entry.calibration == calibration and calibration in found.statement
    assert (entry.what, entry.space) == ("sums of clipped gradients per class", "body_subspace")
    assert entry.sigma == pytest.approx(2 * mechanism.CALIBRATIONS[calibration](1.0, 1e-5))


def test_releases_on_one_ledger_add_up_and_the_last_one_says_so(model):
    ledger = mechanism.Ledger(1.0, 1e-5)
    options = {"delta": 1e-5, "length": 6, "ledger": ledger}
    privacy.release(model, TASK, EXAMPLES, epsilon=0.5, **options)
    second = privacy.release(model, TASK, EXAMPLES, epsilon=0.5, space="label_rows", **options)
    assert second.ledger == ledger.entries and len(second.ledger) == 2
    assert second.statement.endswith(
        f" in the space label_rows; with the 1 earlier release(s) of its ledger ({ledger.spent:.6g}, 1e-05) in all"
    )
    alone = privacy.release(model, TASK, EXAMPLES, **PRIVATE)
    assert alone.statement.startswith("(1, 1e-05)-differential privacy for")
    assert alone.statement.endswith(" in the space body_subspace")
    with pytest.raises(UserError, match="budget"):
        privacy.release(model, TASK, EXAMPLES, epsilon=0.9, **options)
    assert ledger.entries == second.ledger


def test_a_half_precision_model_is_released_in_single_precision(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    for options in ({}, PRIVATE):
        target = privacy.release(model, TASK, EXAMPLES, **options).targets[0]
        assert (target.weight if isinstance(target, DenseTarget) else target.factors.delta).dtype == torch.float32


# ---------------------------------------------------------------- taint


def test_private_text_reaches_nothing_but_the_noised_numbers(model, tmp_path, monkeypatch):
    """With the sums taken away, two different private data sets give the same file, byte for byte."""
    clipped = mechanism.clipped_sum
    monkeypatch.setattr(
        mechanism, "clipped_sum", lambda f, c: tuple(None if v is None else v * 0 for v in clipped(f, c))
    )
    for space in spaces.SPACES:
        saved = [
            privacy.release(model, TASK, rows, **PRIVATE, space=space, noise_seed=1, **options_of(space)).save(
                tmp_path / f"{name}.safetensors"
            )
            for name, rows in (("one", EXAMPLES), ("two", OTHERS))
        ]
        assert saved[0].read_bytes() == saved[1].read_bytes()


def test_a_private_file_says_nothing_of_the_examples_but_their_sums(model, tmp_path):
    found = [
        read_tensors(privacy.release(model, TASK, rows, **PRIVATE, noise_seed=1).save(tmp_path / "r.safetensors"))
        for rows in (EXAMPLES, OTHERS)
    ]
    fields = [json.loads(metadata["release"])["fields"] for _, metadata in found]
    assert fields[0] == fields[1] and SECRET not in json.dumps(fields)
    assert {k: (v.dtype, v.shape) for k, v in found[0][0].items()} == {
        k: (v.dtype, v.shape) for k, v in found[1][0].items()
    }


def test_a_private_release_runs_every_text_alone(model, monkeypatch):
    sizes = []
    run = type(model).hidden_of
    monkeypatch.setattr(type(model), "hidden_of", lambda self, part: sizes.append(len(part)) or run(self, part))
    privacy.release(model, TASK, EXAMPLES, **PRIVATE, space="label_rows")
    assert sizes == [1] * len(EXAMPLES)
    sizes.clear()
    privacy.release(model, TASK, EXAMPLES, space="head")
    assert sizes == [sum(example.label == label for example in EXAMPLES) for label in (0, 1)]
    sizes.clear()
    monkeypatch.undo()
    read = BodySketch.sketches
    monkeypatch.setattr(BodySketch, "sketches", lambda self, *some: sizes.append(len(some[2])) or read(self, *some))
    privacy.release(model, TASK, EXAMPLES, **PRIVATE, public_texts=PUBLIC)
    assert sizes == [len(PUBLIC)] + [1] * len(EXAMPLES)


def test_the_subspace_is_public_orthonormal_and_holds_the_public_states(model):
    tokens = tokenize_task(TASK, model.tokenizer)
    one, two = (
        privacy.release(
            model, TASK, rows, **PRIVATE, space="label_rows_subspace", public_texts=PUBLIC, directions=3
        ).space.basis
        for rows in (EXAMPLES, OTHERS)
    )
    assert torch.equal(one, two)
    torch.testing.assert_close(one.mT @ one, torch.eye(3, dtype=torch.float64))
    hidden = model.hidden_of([tokens.sequence(text) for text in PUBLIC])
    kept = (hidden @ one).square().sum()
    assert kept == pytest.approx(torch.linalg.svdvals(hidden)[:3].square().sum().item())


# ---------------------------------------------------------------- misuse

WRONG = {
    "epsilon zero": ({"epsilon": 0.0}, "epsilon"),
    "no public texts": ({"space": "label_rows_subspace"}, "public texts"),
    "public texts unused": ({"space": "label_rows", "public_texts": PUBLIC}, "no use"),
    "too many directions": ({"space": "label_rows_subspace", "public_texts": PUBLIC, "directions": 6}, "span 5"),
    "no directions": ({"space": "label_rows_subspace", "public_texts": PUBLIC, "directions": 0}, "directions = 0"),
    "an empty class": ({"examples": [e for e in EXAMPLES if e.label == 0]}, "'positive'"),
    "no examples": ({"examples": []}, "there is no example of 'negative', 'positive', each of the 2 classes needs one"),
    "an unknown label": ({"examples": [*EXAMPLES, {"text": SECRET, "label": 5}]}, "label 5"),
    "no label": ({"examples": [*EXAMPLES, {"text": SECRET}]}, "no label"),
    "no string": ({"examples": [*EXAMPLES, {"text": [SECRET], "label": 0}]}, "example 6 has a text of type list: "
                                                                             "give a string"),
    "no mapping": ({"examples": [*EXAMPLES, SECRET]}, "example 6"),
    "an empty text": ({"examples": [*EXAMPLES, {"text": " ", "label": 0}]}, "example 6"),
    "a text too long": ({"examples": [*EXAMPLES, {"text": f"{SECRET} " * 99, "label": 0}]}, "tokens"),
}  # fmt: skip


def test_the_centred_space_is_the_subspace_without_its_first_direction(model):
    found = {
        name: privacy.release_space(model, tokenize_task(TASK, model.tokenizer), name, PUBLIC, directions).basis
        for name, directions in (("label_rows_subspace", 4), ("label_rows_centred", 3))
    }
    assert torch.equal(found["label_rows_centred"], found["label_rows_subspace"][:, 1:])
    with pytest.raises(UserError, match="span 4"):
        privacy.release_space(model, tokenize_task(TASK, model.tokenizer), "label_rows_centred", PUBLIC, 5)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_sentence_and_spends_nothing(model, case):
    changes, words = WRONG[case]
    options = {**PRIVATE, "examples": EXAMPLES, "ledger": mechanism.Ledger(10.0, 1e-5), **changes}
    with pytest.raises(UserError, match=words) as caught:
        privacy.release(model, TASK, **options)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert options["ledger"].entries == ()


@pytest.mark.parametrize(
    "options",
    [{"delta": 1e-5}, {"noise_seed": 1}, {"ledger": mechanism.Ledger(1.0, 1e-5)}, {"delta": 1e-5, "noise_seed": 1}],
)
def test_privacy_options_without_epsilon_are_refused(model, options):
    with pytest.raises(UserError, match=f"^{', '.join(options)} without epsilon"):
        privacy.release(model, TASK, EXAMPLES, **options)


def test_private_noise_is_drawn_by_one_process_alone(model, monkeypatch):
    """Each process would draw its own; exact gradients and seeded noise come out the same in all."""
    monkeypatch.setattr(privacy, "launched", lambda: (0, 2))
    words = (
        r"^epsilon = 1.0 in 2 processes would draw and spend the noise 2 times: release in one process, save the "
        r"Release, and load "
        r"it in the others with load_release$"
    )
    with pytest.raises(UserError, match=words):
        privacy.release(model, TASK, EXAMPLES, **PRIVATE)
    assert not privacy.release(model, TASK, EXAMPLES).private
    assert not privacy.release(model, TASK, EXAMPLES, **PRIVATE, noise_seed=1).private
    monkeypatch.setattr(privacy, "launched", lambda: (0, 1))
    assert privacy.release(model, TASK, EXAMPLES, **PRIVATE).private


@pytest.mark.parametrize("options", [{}, PRIVATE])
def test_a_gradient_that_is_not_finite_is_never_released(tiny_model, options):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm.model.norm.weight[3] = float("nan")
    ledger = mechanism.Ledger(10.0, 1e-5) if options else None
    with pytest.raises(UserError, match="not finite"):
        privacy.release(model, TASK, EXAMPLES, **options, ledger=ledger)
    assert ledger is None or ledger.entries == ()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("options", [{}, PRIVATE], ids=["exact", "private"])
@pytest.mark.parametrize("space", spaces.SPACES)
def test_a_saved_release_comes_back_whole(model, tmp_path, options, space):
    saved = privacy.release(model, TASK, EXAMPLES, **options, space=space, **options_of(space))
    found = privacy.load_release(saved.save(tmp_path / "release.safetensors"))
    assert found.fingerprint == saved.fingerprint == saved.to("cpu").fingerprint
    assert isinstance(found.targets[0], DenseTarget if options else FactorTarget)
    assert type(found.space) is type(saved.space)
    for field in ("space_name", "labels", "label_tokens", "private", "statement", "ledger", "model", "task", "length"):
        assert getattr(found, field) == getattr(saved, field)


def test_a_release_moves_with_all_its_tensors(model, monkeypatch, tmp_path):
    found, asked = privacy.release(model, TASK, EXAMPLES), []
    held, _ = read_tensors(found.save(tmp_path / "release.safetensors"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: asked.append(device) or self)
    moved = found.to("elsewhere")
    assert asked == ["elsewhere"] * len(held) and moved.fingerprint == found.fingerprint


def test_the_fingerprint_follows_every_field(model):
    found = privacy.release(model, TASK, EXAMPLES, **PRIVATE)
    changes = {
        "private": False, "statement": "", "ledger": (), "model": "x", "length": 7, "targets": found.targets[::-1],
    }  # fmt: skip
    assert (
        len({found.fingerprint, *(dataclasses.replace(found, **{k: v}).fingerprint for k, v in changes.items())}) == 7
    )


def test_the_fields_of_a_file_are_written_in_one_way(model, tmp_path):
    """Byte for byte: the fingerprint is taken of them, and equal Releases are equal files."""
    found = privacy.release(model, TASK, EXAMPLES, epsilon=1.0, delta=1e-5, length=5, noise_seed=1)
    (entry,) = found.ledger
    plain = dataclasses.replace(found, labels=("schön", "übel"), statement="s", model="m", task="t")
    charged = json.dumps(dataclasses.asdict(entry), sort_keys=True)
    fields = (
        f'{{"format": "gradmm release 1", "label_tokens": {json.dumps(list(found.label_tokens))}, '
        '"labels": ["schön", "übel"], '
        f'"ledger": [{charged}], "length": 5, "model": "m", "private": false, "space_name": "body_subspace", '
        '"statement": "s", "task": "t"}'
    )
    assert read_tensors(plain.save(tmp_path / "release"))[1] == {
        "release": f'{{"fields": {fields}, "fingerprint": "{plain.fingerprint}"}}'
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(found, length=float("nan")).save(tmp_path / "nothing")


def test_a_file_that_was_changed_is_refused(model, tmp_path):
    found = privacy.release(model, TASK, EXAMPLES, **PRIVATE, space="label_rows", noise_seed=1)
    path = found.save(tmp_path / "release.safetensors")
    tensors, metadata = read_tensors(path)
    claims = metadata["release"].replace('"private": false', '"private": true')
    assert claims != metadata["release"]
    elsewhere = metadata["release"].replace('"space_name": "label_rows"', '"space_name": "body"')
    assert elsewhere != metadata["release"]
    write_tensors(tmp_path / "claims", tensors, {"release": claims})
    write_tensors(tmp_path / "elsewhere", tensors, {"release": elsewhere})
    write_tensors(tmp_path / "numbers", {**tensors, "0.weight": tensors["0.weight"] + 1}, metadata)
    write_tensors(tmp_path / "infinite", {**tensors, "0.weight": tensors["0.weight"] / 0}, metadata)
    write_tensors(tmp_path / "missing", {k: v for k, v in tensors.items() if k != "1.weight"}, metadata)
    write_tensors(tmp_path / "nothing", tensors, {})
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    write_tensors(
        tmp_path / "another format",
        tensors,
        {"release": metadata["release"].replace(privacy.FORMAT, "gradmm release 9")},
    )
    differs, no_release = (
        "does not hold what was saved in it: make the Release again",
        r"is no saved Release \({}: {}\): save one with Release.save",
    )
    invalid = no_release.format("ValueError", "another format, or numbers that are not finite")
    reasons = {
        "claims": differs, "elsewhere": no_release.format("KeyError", "'rank'"), "numbers": differs,
            "infinite": invalid,
        "missing": no_release.format("KeyError", "'1.weight'"), "nothing": no_release.format("KeyError", "'release'"),
        "another format": invalid, "cut": "is no whole safetensors file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            privacy.load_release(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_the_default_space_is_the_body_s_sketch_and_with_noise_a_few_directions_of_it(model):
    assert privacy.release(model, TASK, EXAMPLES).space_name == "body"
    found = privacy.release(model, TASK, EXAMPLES, epsilon=1.0, delta=1e-5, length=5)
    assert found.space_name == "body_subspace" and [target.weight.shape for target in found.targets] == [(1, 16)] * 2
    assert found.ledger[0].coordinates == 32


# ---------------------------------------------------------------- drawn once and kept

SOURCE = {"data": "reviews", "n_real": 5, "seed": 0}


def once(folder, model, examples=EXAMPLES, **options) -> privacy.Release:
    return privacy.release_once(folder, model, TASK, examples, **{"source": SOURCE, **PRIVATE, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"space": "head"},
        {"space": "label_rows_subspace", "public_texts": PUBLIC, "directions": 2},
        {"noise_seed": 3},
    ],
)
def test_the_same_private_release_is_drawn_once(model, tmp_path, monkeypatch, options):
    first = once(tmp_path / "run", model, **options)
    held = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert set(held) == {"release.safetensors", "ledger.json"} and len(first.ledger) == 1
    monkeypatch.setattr(privacy, "noised_sums", lambda *_: pytest.fail("noise was drawn again"))
    assert once(tmp_path / "run", model, **options).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == held


def test_without_a_folder_the_same_release_is_found_whatever_comes_after_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = once(None, model)
    (folder,) = Path("results/releases").iterdir()
    assert {path.name for path in folder.iterdir()} == {"release.safetensors", "ledger.json"}
    monkeypatch.setattr(privacy, "noised_sums", lambda *_: pytest.fail("noise was drawn again"))
    assert once(None, model).fingerprint == first.fingerprint == once(folder, model).fingerprint
    same = {"epsilon": 1, "clip": 1, "space": "body_subspace"}
    assert once(None, model, **same).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for other in ({"epsilon": 0.5}, {"source": SOURCE | {"place": "elsewhere"}}):
        assert once(None, model, **other).fingerprint != first.fingerprint
    assert len(list(Path("results/releases").iterdir())) == 3


def test_who_asks_while_the_release_is_made_waits_for_it(model, tmp_path, monkeypatch):
    """One draws, the others read."""
    drawn = []

    def slow(*given):
        drawn.append(given)
        time.sleep(0.3)
        return mechanism.noised_sums(*given)

    monkeypatch.setattr(privacy, "noised_sums", slow)
    with ThreadPoolExecutor(3) as several:
        found = [several.submit(once, tmp_path / "run", model) for _ in range(3)]
    assert len({one.result().fingerprint for one in found}) == 1 == len(drawn)


def test_a_ledger_takes_no_noise_that_can_be_drawn_again(model):
    with pytest.raises(UserError, match="noise_seed = 1 with a ledger: noise that can be drawn again protects nobody"):
        privacy.release(model, TASK, EXAMPLES, **PRIVATE, noise_seed=1, ledger=mechanism.Ledger(1.0, 1e-5))


def test_nothing_of_the_examples_is_kept_beside_the_release(model, tmp_path):
    once(tmp_path / "one", model)
    once(tmp_path / "two", model, examples=[*EXAMPLES, *OTHERS])
    assert (tmp_path / "one" / "ledger.json").read_bytes() == (tmp_path / "two" / "ledger.json").read_bytes()
    assert once(tmp_path / "one", model, examples=object()).private  # they are not looked at again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"epsilon": 2.0},
            r"other arguments: epsilon \(1.0 there, 2.0 now\): give the same to read it, .* which .*ledger\.json "
            r"will not count",
        ),
        ({"delta": 1e-6, "clip": 0.5}, r"delta \(1e-05 there, 1e-06 now\); clip \(1.0 there, 0.5 now\)"),
        ({"source": SOURCE | {"n_real": 6}}, r"n_real \(5 there, 6 now\)"),
        ({"space": "head"}, r"space \(\"body_subspace\" there, \"head\" now\)"),
        ({"length": 7, "relation": "add-remove"}, r"relation .*length \(6 there, 7 now\)"),
    ],
)
def test_a_folder_holds_one_release_and_refuses_others(model, tmp_path, options, message):
    first = once(tmp_path, model)
    held = (tmp_path / "ledger.json").read_bytes()
    with pytest.raises(UserError, match=message):
        once(tmp_path, model, **options)
    assert (tmp_path / "ledger.json").read_bytes() == held and once(tmp_path, model).fingerprint == first.fingerprint


def test_a_charge_that_a_crash_followed_is_counted_in_the_next_release(model, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(privacy, "noised_sums", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            once(tmp_path, model)
    assert len(json.loads((tmp_path / "ledger.json").read_text())["entries"]) == 1
    assert not (tmp_path / "release.safetensors").exists()
    found = once(tmp_path, model)
    assert len(found.ledger) == 2
    assert "with the 1 earlier release(s) of its ledger (1.46517, 1e-05) in all" in found.statement
    assert once(tmp_path, model).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"clip": -1}, "clip"),
        ({"length": None}, "length"),
        ({"length": 999}, "length = 999 with a template or prompt of .*: take a length of at most"),
    ],
)
def test_what_is_refused_is_neither_charged_nor_kept(model, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        once(tmp_path, model, **options)
    with pytest.raises(UserError, match="there is no example of"):
        once(tmp_path, model, examples=EXAMPLES[:1])
    assert not (tmp_path / "ledger.json").exists() and once(tmp_path, model).private


def test_without_epsilon_nothing_is_kept_and_a_second_ledger_is_refused(model, tmp_path):
    found = privacy.release_once(tmp_path / "run", model, TASK, EXAMPLES, source=SOURCE, space="head")
    assert not found.private and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="its folder has one of its own"):
        once(tmp_path / "run", model, ledger=mechanism.Ledger(1.0, 1e-5))


def test_a_folder_whose_ledger_is_gone_or_broken_is_refused(model, tmp_path):
    once(tmp_path, model)
    for text in ("{}", "[]", '{"entries": [{"epsilon": 1}], "release": {}}'):
        (tmp_path / "ledger.json").write_text(text)
        with pytest.raises(UserError, match=r"ledger\.json is no ledger of a release .*: choose another folder"):
            once(tmp_path, model)
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(UserError, match=r"release\.safetensors has no ledger\.json beside it that counts it"):
        once(tmp_path, model)


def test_noise_is_not_drawn_where_nothing_keeps_another_process_from_it(model, tmp_path, monkeypatch):
    with monkeypatch.context() as unlocked:
        unlocked.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
        with pytest.raises(
            UserError, match=r"run can't be locked \(its \.lock is another user's.*give the release ano"
        ):
            once(tmp_path / "run", model)
    assert not list((tmp_path / "run").glob("[!.]*"))
    first = once(tmp_path / "run", model)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    assert once(tmp_path / "run", model).fingerprint == first.fingerprint  # read, it needs no lock


def test_data_in_memory_are_named_by_their_owner(model, tmp_path):
    with pytest.raises(UserError, match="source has the place '', as of data in memory, which nothing tells apart"):
        once(tmp_path / "run", model, source=SOURCE | {"place": ""})
    with pytest.raises(UserError, match="source is of type list: give public facts such as"):
        once(tmp_path / "run", model, source=["demo"])
    assert not (tmp_path / "run").exists()


def test_the_kept_arguments_say_all_that_tells_releases_apart(model, tmp_path):
    options = {"space": "label_rows_subspace", "public_texts": PUBLIC, "directions": 2}
    once(tmp_path / "run", model, **options)
    held = json.loads((tmp_path / "run" / "ledger.json").read_text())["release"]
    assert held == {
        "model": model.fingerprint, "task": TASK.fingerprint, "min_words": TASK.min_words, **SOURCE, **PRIVATE,
        "clip": 1.0, "space": "label_rows_subspace", "relation": "replace-one", "calibration": "exact",
        "public_texts": files.digest(PUBLIC), "directions": 2, "noise_seed": None,
    }  # fmt: skip
    assert all(isinstance(held[name], float) for name in ("epsilon", "delta", "clip"))
    with pytest.raises(UserError, match="other arguments: public_texts"):
        once(tmp_path / "run", model, **options | {"public_texts": PUBLIC[::-1]})
    once(tmp_path / "dated", model, source=SOURCE | {"day": datetime.date(2025, 1, 2)})  # as text
    assert json.loads((tmp_path / "dated" / "ledger.json").read_text())["release"]["day"] == "2025-01-02"


@pytest.mark.parametrize("asked", [{}, PRIVATE])
def test_what_release_once_is_told_reaches_the_release(model, tmp_path, monkeypatch, asked):
    given, made = {}, privacy.release

    def instead(model, task, examples, config=None, **more):
        given.update(more, config=config)
        return made(model, task, examples, config, progress=False, ledger=more.get("ledger"))

    monkeypatch.setattr(privacy, "release", instead)
    config = privacy.ReleaseConfig(space="label_rows", **asked)
    privacy.release_once(
        tmp_path / "run",
        model,
        TASK,
        EXAMPLES,
        config,
        source=SOURCE,
        clip=2.0,
        cache=tmp_path / "kept",
        progress=False,
    )
    assert given["config"] == dataclasses.replace(config, clip=2.0)
    assert given["cache"] == tmp_path / "kept" and given["progress"] is False


def test_an_output_with_a_run_of_another_release_is_refused_before_noise_is_drawn(model, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    once(tmp_path / "first", model, output=output)  # nothing lies there yet
    (output / "manifest.json").write_text("{}")
    words = f"{output} holds a run of another release than this one, which is still to be drawn in {tmp_path / 'run'}: "
    words += "give the same data, task and settings from the same working folder, or another output"
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        once(tmp_path / "run", model, output=output)
    assert not list((tmp_path / "run").glob("[!.]*"))
    once(tmp_path / "first", model, output=output)  # drawn already


def test_a_place_that_is_no_path_is_named(model):
    with pytest.raises(UserError, match="^the folder of the release "):
        once(7, model)
    with pytest.raises(UserError, match="^the Release "):
        privacy.load_release(7)


def test_exact_gradients_are_known_by_their_texts_labels_and_type(model):
    def digest(examples, **options):
        return privacy.release(model, TASK, examples, space="label_rows", **options).examples

    other = [Example("the movie is bad", 0), *EXAMPLES[1:]]
    assert len({digest(EXAMPLES), digest(other), digest(EXAMPLES[:4])}) == 3
    half = dataclasses.replace(model, lm=copy.deepcopy(model.lm).float())
    assert privacy.release(half, TASK, EXAMPLES, space="label_rows").examples != digest(EXAMPLES)


def test_who_asks_for_a_private_release_hears_whether_it_was_drawn(model, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "gradmm.privacy")

    def heard(*given, **options) -> str:
        caplog.clear()
        once(*given, model, **options)
        return caplog.messages[-1]

    home = tmp_path / "results" / "releases"
    assert heard(home / "one") == f"a new private release was drawn and is kept in {home / 'one'}"
    assert heard(home / "one").startswith(f"the release in {home / 'one'} was read: nothing was spent, and the data")
    for name, text in (("broken", "{"), ("foreign", "[1]"), ("older", '{"release": []}')):
        (home / name).mkdir()
        (home / name / "ledger.json").write_text(text)
    assert "of the same data" not in heard(home / "other", source=SOURCE | {"place": "elsewhere"})
    assert heard(home / "two", epsilon=2.0).endswith(
        "; 1 other(s) of the same data lie beside it: what they cost adds up"
    )
    far = heard(tmp_path / "far" / "three", source=SOURCE | {"n_real": 3})
    assert f"; 2 other(s) of the same data lie beside it or in {Path('results', 'releases')}: what" in far
    assert heard(home / "fixed", noise_seed=1).startswith("a new release was drawn")
    assert "of the same data" not in heard(home / "unnamed", source={"made": "here"})


def test_the_longest_length_that_is_advised_is_the_longest_that_is_taken(model):
    with pytest.raises(UserError) as caught:
        privacy.release(model, TASK, EXAMPLES, **PRIVATE | {"length": 1000})
    said = re.fullmatch(
        r"length = 1000 with a template or prompt of (\d+) tokens, tiny-phi reads 64: take a length of at most (\d+)",
        str(caught.value),
    )
    around, most = map(int, said.groups())
    assert around + most == 64
    assert privacy.release(model, TASK, EXAMPLES, **PRIVATE | {"length": most}).length == most
    with pytest.raises(UserError, match=f"length = {most + 1} with"):
        privacy.release(model, TASK, EXAMPLES, **PRIVATE | {"length": most + 1})
    assert privacy.release(model, TASK, EXAMPLES, space="head", length=1000).length == 1000  # refused where it is used


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ledger": "mine"}, "the ledger .* give a gradmm.Ledger such as Ledger\\(epsilon=1.0, delta=1e-5\\)"),
        ({"config": {"epsilon": 1.0}}, "the config .* give a gradmm.ReleaseConfig, or its settings by name"),
        ({"cache": 7}, "the cache is 7: give a path"),
        ({"progress": "no"}, "progress = 'no', it must be True or False"),
    ],
)
def test_what_a_release_cannot_take_is_named(model, options, words):
    with pytest.raises(UserError, match=f"^{words}"):
        privacy.release(model, TASK, EXAMPLES, **options)


def test_the_model_s_own_texts_are_kept_where_a_cache_is_named(model, tmp_path):
    privacy.release(model, TASK, EXAMPLES, space="body", cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir())
