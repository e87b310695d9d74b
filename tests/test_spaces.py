"""Release spaces by name: what they hold, what is refused, and back from a file's tensors."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from gradmm import spaces
from gradmm.classification import label_logs, label_preference
from gradmm.config import SynthesisConfig
from gradmm.data import Example
from gradmm.errors import UserError
from gradmm.generation import prompted_texts
from gradmm.matching import Matching
from gradmm.models import wrap_model
from gradmm.plan import Plan
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


THREE = replace(
    TASK, labels=("bad", "good", "odd"), verbalizers=TASK.verbalizers + (" film",), generation_prompts=("a", "b", "c")
)


@pytest.mark.parametrize("task", [TASK, THREE])
def test_directions_of_the_body_are_those_of_public_sketches_of_length_one_without_what_they_share(tiny_model, task):
    """The eigenvectors of their second moments, literally."""
    model = tiny_model("llama", dtype=torch.float64)
    tokens = tokenize_task(task, model.tokenizer)
    classes = len(task.labels)
    whole = spaces.BodySketch.of(model, tokens, PUBLIC, rank=4)
    few = spaces.body_directions(model, tokens, whole, PUBLIC, 2)
    labels = [0, 1, 2, 0, 1] if classes == 3 else [0, 1, 0, 1, 0]
    sketches = whole.factors(model, tokens, [tokens.sequence(text) for text in PUBLIC], labels).hidden
    alike = sketches / sketches.norm(dim=1, keepdim=True)
    means = torch.stack([alike[label::classes].mean(0) for label in range(classes)])
    vectors = torch.linalg.eigh(means.mT @ means)[1][:, -(classes - 1) :]
    torch.testing.assert_close(few.shared @ few.shared.mT, vectors @ vectors.mT)
    rest = alike - alike @ vectors @ vectors.mT
    vectors = torch.linalg.eigh(rest.mT @ rest)[1][:, -2:]
    projector, length = vectors @ vectors.mT, few.basis.norm(dim=0)[0]
    torch.testing.assert_close(few.basis @ few.basis.mT / length**2, projector)
    assert (sketches @ projector).norm(dim=1).median().item() == pytest.approx(1 / length.item())  # the unit
    torch.testing.assert_close(few.basis.mT @ few.basis, length**2 * torch.eye(2, dtype=torch.float64))
    assert (few.shared.mT @ few.basis).abs().max() < 1e-9 * length
    own = few.factors(model, tokens, [tokens.sequence(text) for text in PUBLIC], labels)
    torch.testing.assert_close(own.hidden, sketches @ few.basis)
    assert own.delta.tolist() == [[1.0]] * 5 and spaces.coordinates(model, few) == 2


@pytest.mark.parametrize("task", [TASK, THREE])
def test_gradients_of_one_text_for_all_labels_add_up_to_nothing_weighted_by_their_probabilities(tiny_model, task):
    """Why texts share one direction less than there are classes."""
    model = tiny_model("gpt2", dtype=torch.float64)  # a llama takes its norms in float32
    tokens = tokenize_task(task, model.tokenizer)
    whole, count = spaces.release_space(model, tokens, "body", PUBLIC), len(task.labels)
    sequence = tokens.sequence("a film that is dull")
    sketches = whole.factors(model, tokens, [sequence] * count, range(count)).hidden
    hidden = model.hidden_of([sequence])
    shares = (model.logits_of(hidden, tokens.labels) - whole.preference).softmax(-1)
    assert (shares @ sketches).abs().max() < 1e-9 * sketches.abs().max()
    assert torch.linalg.matrix_rank(sketches).item() == count - 1


def test_texts_are_compared_with_a_target_of_few_directions_in_the_whole_sketch(tiny_model):
    model = tiny_model("llama", dtype=torch.float64)
    tokens = tokenize_task(TASK, model.tokenizer)
    plain = spaces.release_space(model, tokens, "body", PUBLIC)
    options = {"public_texts": PUBLIC, "directions": 3}
    few = release(model, TASK, REAL, space="body_subspace", **options)
    noised = release(
        model, TASK, REAL, space="body_subspace", epsilon=1.0, delta=1e-5, length=4, noise_seed=0, **options
    )
    basis, shared = few.space.basis, few.space.shared
    for found in (few, noised):
        targets, space = spaces.to_match(found.space, found.targets)
        assert (
            space.basis is None and torch.equal(space.shared, shared) and isinstance(targets[0], type(found.targets[0]))
        )
        sequences = [tokens.sequence(text) for text in PUBLIC]
        sketches = plain.factors(model, tokens, sequences, [1] * 5).hidden
        centred = sketches - sketches @ shared @ shared.mT
        torch.testing.assert_close(space.factors(model, tokens, sequences, [1] * 5).hidden, centred)
        held = found.targets[1]  # its coordinates are those of some sketch along the basis
        along = held.weight[0] if hasattr(held, "weight") else held.factors.hidden.mean(0)
        lifted = torch.linalg.pinv(basis.mT) @ along
        torch.testing.assert_close(lifted @ basis, along)
        for row, loss in enumerate(Matching(model, tokens, targets, space).of_texts(PUBLIC, [1] * 5).tolist()):
            assert loss == pytest.approx(1 - torch.cosine_similarity(centred[row], lifted, dim=0).item(), abs=1e-9)
    config = SynthesisConfig(n_synthetic=2)
    assert Plan.of(model, TASK, noised, config).matching.space.basis is None
    for other in ("body", "label_rows"):  # where nothing has to be lifted
        found = release(model, TASK, REAL, space=other)
        assert spaces.to_match(found.space, found.targets) == (found.targets, found.space)


def test_what_the_body_s_directions_cannot_be_made_of_is_refused(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize_task(TASK, model.tokenizer)
    for texts, count, said in (
        ([" "], None, "the space body_subspace needs public texts"),
        (PUBLIC, 5, "directions = 5, but the 5 public texts span 4"),
        (PUBLIC, 0, "directions = 0"),
    ):
        with pytest.raises(UserError, match=said):
            spaces.release_space(model, tokens, "body_subspace", texts, count)
    assert spaces.coordinates(model, spaces.release_space(model, tokens, "body_subspace", PUBLIC)) == 4
    assert spaces.coordinates(model, spaces.release_space(model, tokens, "body_subspace", PUBLIC, 2)) == 2
    own = spaces.release_space(model, tokens, "body_subspace")  # of texts that the model writes itself
    assert own.basis.shape[1] == spaces.DEFAULT_DIRECTIONS
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
        ("body", {"preference": torch.zeros(2), "rank": torch.tensor([2]), "shared": torch.zeros(8, 1)}),
        (
            "body_subspace",
            {
                "preference": torch.zeros(2),
                "rank": torch.tensor([2]),
                "basis": torch.zeros(8, 1),
                "shared": torch.zeros(8),
            },
        ),
        (
            "body_subspace",
            {
                "preference": torch.zeros(2),
                "rank": torch.tensor([2]),
                "basis": torch.zeros(8, 1),
                "shared": torch.zeros(4, 1),
            },
        ),
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
