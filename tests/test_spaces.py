"""Release spaces by name: what they hold, what is refused, and back from a file's tensors."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from gradmm import spaces
from gradmm.classification import label_logs, label_preference
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.generation import prompted_texts
from gradmm.models import wrap_model
from gradmm.privacy import release
from gradmm.tasks import Task, tokenize_task

TASK = Task("toy", ("negative", "positive"), (" bad", " great"), "{text} it was", ("a", "the"))
REAL = [Example("the actors were fine", 1), Example("a dull story", 0)]
PUBLIC = ["some words", "a dog sat on the cat", "two red words", "this text is about sports", "they made time"]


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(spaces, "CALIBRATION_TEXTS", 3)


def test_the_body_s_space_holds_what_public_texts_say(tiny_model):
    model = tiny_model("phi")
    tokens = tokenize_task(TASK, model.tokenizer)
    given, own = (spaces.release_space(model, tokens, "body", texts).preference for texts in (PUBLIC, None))
    assert torch.equal(given, label_preference(model, tokens, PUBLIC)) and not torch.equal(given, own)
    with pytest.raises(UserError, match="the space body needs public texts"):
        spaces.release_space(model, tokens, "body", [""])


def test_a_model_writes_its_own_texts_once_for_a_task(tiny_model, monkeypatch):
    written, write = [], spaces.prompted_texts
    monkeypatch.setattr(spaces, "prompted_texts", lambda *some: written.append(some) or write(*some))
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    found = [
        spaces.release_space(one, tokenize_task(TASK, one.tokenizer), "body").preference
        for one in (model, model, other)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2]) and len(written) == 2
    task = replace(TASK, generation_prompts=("a", "the movie was"))
    assert not torch.equal(
        spaces.release_space(model, tokenize_task(task, model.tokenizer), "body").preference, found[0]
    )
    assert len(written) == 3


def spread_of(model, tokens, texts) -> list[float]:
    """The standard error of each label's mean log-probability against all labels', by the spread within the classes."""
    logs = label_logs(model, tokens, texts).double().unflatten(0, (2, -1))
    return ((logs - logs.mean(-1, keepdim=True)).var(1).mean(0) / len(texts)).sqrt().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_as_many_texts_are_written_as_the_preference_needs(tiny_model, monkeypatch, kind):
    monkeypatch.setattr(spaces, "CALIBRATION_TEXTS", 64)
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    first = prompted_texts(model, tokens, spaces.FIRST_TEXTS)
    error = max(spread_of(model, tokens, first))

    def texts_within(bound):
        monkeypatch.setattr(spaces, "PREFERENCE_ERROR", bound)
        return spaces.own_texts(tiny_model(kind), tokens)

    for bound, count in ((2 * error, 8), (error / 1.5, 18), (error / 2.1, 36), (error / 9, 64)):
        texts = texts_within(bound)
        assert len(texts) == 2 * count and texts[:16] == first
        assert len(set(texts)) > count  # the later texts are other draws than the first
    enough = texts_within(error / 2.1)
    assert max(spread_of(model, tokens, [*enough[:8], *enough[16:44], *enough[8:16], *enough[44:]])) < error


def test_a_cache_keeps_the_texts_of_one_model_and_task(tiny_model, monkeypatch, tmp_path):
    written, write = [], spaces.prompted_texts
    monkeypatch.setattr(spaces, "prompted_texts", lambda *some, **more: written.append(some) or write(*some, **more))
    found = [release(tiny_model("llama"), TASK, REAL, cache=tmp_path).fingerprint for _ in range(3)]
    assert len(set(found)) == 1 and len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert release(tiny_model("llama"), TASK, REAL).fingerprint == found[0] and len(written) == 2
    assert not {example.text for example in REAL} & set(
        json.loads((tmp_path / "calibration.json").read_text())["texts"]
    )
    release(tiny_model("llama", seed=1), TASK, REAL, cache=tmp_path)
    assert len(written) == 3  # another model writes its own, and the cache is now its
    release(tiny_model("llama", seed=1), replace(TASK, generation_prompts=("a", "the movie")), REAL, cache=tmp_path)
    assert len(written) == 4
    model = tiny_model("llama", seed=2)
    release(model, TASK, REAL)
    release(model, TASK, REAL, cache=tmp_path)  # what is in memory goes to the folder
    release(tiny_model("llama", seed=2), TASK, REAL, cache=tmp_path)
    assert len(written) == 5


def test_writing_them_is_shown_where_it_takes_long(tiny_model, monkeypatch, capfd):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))  # three seconds pass at every look
    for progress, shown in ((True, True), (False, False)):
        release(tiny_model("llama"), TASK, REAL, progress=progress)
        assert ("measuring the model's preference" in capfd.readouterr().err) == shown


def test_directions_of_the_body_are_those_of_public_sketches_of_length_one(tiny_model):
    """The eigenvectors of their second moments, literally; of two classes either label gives the same."""
    model = tiny_model("llama", dtype=torch.float64)
    tokens = tokenize_task(TASK, model.tokenizer)
    whole = spaces.release_space(model, tokens, "body", PUBLIC)
    few = spaces.release_space(model, tokens, "body_subspace", PUBLIC, 3)
    sequences = [tokens.sequence(text) for text in PUBLIC]
    for labels in ([0, 1, 0, 1, 0], [1, 1, 0, 0, 0]):
        rows = whole.factors(model, tokens, sequences, labels).hidden
        alike = rows / rows.norm(dim=1, keepdim=True)
        _, vectors = torch.linalg.eigh(alike.mT @ alike)
        projector = vectors[:, -3:] @ vectors[:, -3:].mT
        length = few.basis.norm(dim=0)[0]
        torch.testing.assert_close(few.basis @ few.basis.mT / length**2, projector)
        if labels == [0, 1, 0, 1, 0]:  # in turn: the texts' median length is 1
            assert (rows @ projector).norm(dim=1).median().item() == pytest.approx(1 / length.item())
    torch.testing.assert_close(few.basis.mT @ few.basis, length**2 * torch.eye(3, dtype=torch.float64))
    own = few.factors(model, tokens, sequences, [0, 1, 0, 1, 0])
    torch.testing.assert_close(own.hidden, whole.factors(model, tokens, sequences, [0, 1, 0, 1, 0]).hidden @ few.basis)
    assert own.delta.tolist() == [[1.0]] * 5 and spaces.coordinates(model, few) == 3


def test_what_the_body_s_directions_cannot_be_made_of_is_refused(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    for texts, count, said in (
        ([" "], None, "the space body_subspace needs public texts"),
        (PUBLIC, 6, "directions = 6, but the 5 public texts span 5"),
        (PUBLIC, 0, "directions = 0"),
    ):
        with pytest.raises(UserError, match=said):
            spaces.release_space(model, tokens, "body_subspace", texts, count)
    assert spaces.coordinates(model, spaces.release_space(model, tokens, "body_subspace", PUBLIC)) == 5
    assert spaces.coordinates(model, spaces.release_space(model, tokens, "body_subspace", PUBLIC, 2)) == 2
    own = spaces.release_space(model, tokens, "body_subspace")  # of texts that the model writes itself
    assert own.basis.shape[1] == spaces.BODY_DIRECTIONS
    assert torch.equal(own.preference, spaces.release_space(model, tokens, "body").preference)
    with pytest.raises(UserError, match="public_texts and directions have no use in the space 'body'"):
        spaces.release_space(model, tokens, "body", PUBLIC, 2)


@pytest.mark.parametrize("name", spaces.SPACES)
def test_a_space_comes_back_from_its_tensors(tiny_model, name):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    space = spaces.release_space(model, tokens, name, PUBLIC if name in spaces.PUBLIC_SPACES else None)
    held = spaces.tensors_of(space)
    again = spaces.space_from(name, held, 2)
    assert type(again) is type(space)
    assert {k: v.tolist() for k, v in spaces.tensors_of(again).items()} == {k: v.tolist() for k, v in held.items()}
    assert spaces.coordinates(model, again) == spaces.coordinates(model, space)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("everything", {}),
        ("head", {"preference": torch.zeros(2)}),
        ("body", {"preference": torch.zeros(3), "rank": torch.tensor([2])}),
        ("body", {"preference": torch.zeros(2), "rank": torch.tensor([0])}),
        ("body", {"preference": torch.zeros(2)}),
        ("body", {"preference": torch.zeros(2), "rank": torch.tensor([2, 2])}),
        ("body", {"preference": torch.zeros(2), "rank": torch.tensor([2]), "prompts": torch.tensor([2])}),
        ("body", {"rank": torch.tensor([2])}),
        ("body", {"preference": torch.zeros(2), "rank": torch.tensor([2]), "basis": torch.zeros(8, 1)}),
        ("body_subspace", {"preference": torch.zeros(2), "rank": torch.tensor([2])}),
        ("body_subspace", {"preference": torch.zeros(2), "rank": torch.tensor([2]), "basis": torch.zeros(8)}),
        ("lora", {"preference": torch.zeros(2), "rank": torch.tensor([2])}),
    ],
)
def test_tensors_that_are_no_such_space_are_refused(name, tensors):
    with pytest.raises((KeyError, TypeError, ValueError)):  # what load_release calls no saved Release
        spaces.space_from(name, tensors, 2)


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("ctrl", {"n_embd": 32, "n_head": 4, "n_layer": 2, "dff": 64, "n_positions": 64}),
        ("phimoe", {
            "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
            "intermediate_size": 64, "num_local_experts": 2, "max_position_embeddings": 64,
        }),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:phimoe mixes experts")
def test_the_body_s_gradients_are_read_of_routers_and_of_what_scales_in_place(kind, small, toy_tokenizer):
    config = transformers.AutoConfig.for_model(kind, vocab_size=97, **small)
    model = wrap_model(transformers.AutoModelForCausalLM.from_config(config).eval(), toy_tokenizer, kind)
    rows = [Example("good film", 1), Example("dull film", 0)]
    assert all(target.factors.hidden.norm() > 0 for target in release(model, TASK, rows, space="body").targets)
