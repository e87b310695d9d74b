"""Cached projections against brute force with the whole prefix recomputed."""

from contextlib import nullcontext

import pytest
import torch
from conftest import ORACLE_KINDS

from gradmm import decoding, models, projection
from gradmm.errors import UserError
from gradmm.experiments import reference
from gradmm.models import Model
from gradmm.projection import PROJECTIONS, DecodingConfig, TokenTables, project, text_mask
from gradmm.vocabulary import Vocabulary

PROMPTS = [(0, 40, 41), (0,), (0, 50, 51, 52, 53)]


def vectors(model, count, length, seed=0):
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.embedding.shape[0], (count, length), generator=source)
    noise = torch.randn(count, length, model.embedding.shape[1], generator=source, dtype=torch.float64)
    return model.embedding[ids] + 0.5 * noise


def projected(model, *given) -> torch.Tensor:
    return project(model, TokenTables.of(model), *given)


def every(model) -> Vocabulary:
    return Vocabulary.free(torch.ones(model.embedding.shape[0], dtype=torch.bool))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ORACLE_KINDS)
@pytest.mark.parametrize("order", PROJECTIONS)
@pytest.mark.parametrize("k", [1, 5, 97])
def test_equals_brute_force_with_prompts_of_any_lengths_side_by_side(tiny_model, kind, order, k):
    model = tiny_model(kind)
    v, rows = vectors(model, 6, 7), torch.tensor([0, 1, 2, 2, 1, 0])
    ids = projected(model, v, PROMPTS, rows, DecodingConfig(order, k, every(model)))
    for i, row in enumerate(rows.tolist()):
        expected = reference.project(model.lm, v[i : i + 1], PROMPTS[row], order, k, every(model).whole)
        assert torch.equal(ids[i : i + 1], expected)


@pytest.mark.usefixtures("decoder")
def test_a_text_may_have_more_tokens_than_its_vectors_have_numbers(tiny_model):
    model = tiny_model("llama")
    v, rows = vectors(model, 1, 40), torch.zeros(1, dtype=torch.long)
    assert v.shape[1] > v.shape[2]
    ids = projected(model, v, PROMPTS[:1], rows, DecodingConfig("lm_then_nearest", 3, every(model)))
    assert ids.shape == (1, 40) and bool((ids >= 0).all())


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("order", PROJECTIONS)
def test_the_mask_of_allowed_tokens_holds_everywhere(tiny_model, order):
    model = tiny_model("llama")
    allowed = torch.rand(97, generator=torch.Generator().manual_seed(1)) < 0.2
    v = vectors(model, 5, 6)
    for k in (1, int(allowed.sum())):
        ids = projected(
            model, v, PROMPTS[:1], torch.zeros(5, dtype=torch.long), DecodingConfig(order, k, Vocabulary.free(allowed))
        )
        assert bool(allowed[ids].all())
        assert torch.equal(ids, reference.project(model.lm, v, PROMPTS[0], order, k, allowed))


@pytest.mark.parametrize("order", PROJECTIONS)
def test_more_candidates_than_allowed_tokens_let_no_other_token_in(tiny_model, order):
    """At a place where the end may not stand yet, one of the k tokens that are counted is not allowed."""
    model = tiny_model("phi")
    allowed = torch.zeros(97, dtype=torch.bool).index_fill(0, torch.arange(40, 43), True)
    tables, v = TokenTables.of(model), vectors(model, 30, 1)[:, 0]
    state, _ = model.read(torch.arange(30, 60)[:, None], None)
    found = PROJECTIONS[order](tables, state, v, allowed, 5)
    assert set(found.tolist()) <= {40, 41, 42} and torch.equal(found, PROJECTIONS[order](tables, state, v, allowed, 3))


def test_limits_of_k_with_all_tokens_as_candidates_one_criterion_rules(tiny_model):
    """k = V: the paper's order is the nearest token whatever the model says, the code's order plain greedy decoding."""
    model = tiny_model("gpt2")
    v, rows = vectors(model, 4, 5), torch.zeros(4, dtype=torch.long)
    nearest = torch.cdist(v.flatten(0, 1), model.embedding).argmin(-1).view(4, 5)

    def found(order, k):
        return projected(model, v, PROMPTS, rows, DecodingConfig(order, k, every(model)))

    assert torch.equal(found("lm_then_nearest", 97), nearest)
    assert torch.equal(found("nearest_then_lm", 97), found("lm_then_nearest", 1))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("order", PROJECTIONS)
def test_a_text_ends_at_the_end_token_and_not_before_it_may(tiny_model, order):
    model = tiny_model("opt")
    end = 9
    v = vectors(model, 20, 8)
    v[:10, 1:] = model.embedding[end]
    reading = DecodingConfig(order, 97 if order == "lm_then_nearest" else 1, every(model), end=end, min_tokens=4)
    ids = projected(model, v, PROMPTS, torch.zeros(20, dtype=torch.long), reading)
    mask = text_mask(ids, end)
    assert mask.sum(-1)[:10].tolist() == [4] * 10
    assert bool((mask.sum(-1) >= 4).all()) and bool((ids[mask == 0] == end).all())
    assert bool(reading.vocabulary.whole.all())  # what may stand where it could end is its own mask


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many texts each step of reading was for, as it goes on."""
    counted, own = [], decoding.CachedDecoder.read
    monkeypatch.setattr(
        decoding.CachedDecoder, "read", lambda self, token: counted.append(len(token)) or own(self, token)
    )
    return counted


def read_once(model) -> Model:
    """The first time it is tried whether the model can be read token by token."""
    with decoding.decoder_of(model, PROMPTS, 1):
        return model


def test_the_last_token_is_not_read(tiny_model, sizes):
    model = read_once(tiny_model("llama"))
    sizes.clear()
    reading = DecodingConfig("lm_then_nearest", 4, every(model))
    projected(model, vectors(model, 2, 5), PROMPTS, torch.tensor([0, 1]), reading)
    assert len(sizes) == 4


def test_no_pass_reads_a_text_that_has_ended(tiny_model, sizes):
    model, rows = read_once(tiny_model("llama")), torch.zeros(9, dtype=torch.long)
    sizes.clear()
    reading = DecodingConfig("lm_then_nearest", 20, every(model), end=9, min_tokens=2)
    ids = projected(model, vectors(model, 9, 8), PROMPTS, rows, reading)
    lengths = text_mask(ids, 9).sum(1)
    assert sizes == [int((lengths > step).sum()) for step in range(min(7, int(lengths.max())))] and sizes[-1] < 9


# ---------------------------------------------------------------- types and devices


@pytest.mark.parametrize("order", PROJECTIONS)
def test_half_precision_tables_take_single_precision_vectors(tiny_model, order):
    model = tiny_model("phi", dtype=torch.bfloat16)
    tables, v = TokenTables.of(model), vectors(tiny_model("phi"), 6, 4).float()
    ids = project(model, tables, v, PROMPTS, torch.zeros(6, dtype=torch.long), DecodingConfig(order, 5, every(model)))
    assert ids.shape == (6, 4) and tables.squares.dtype == torch.float32


@pytest.mark.parametrize("order", PROJECTIONS)
def test_what_is_made_lies_where_the_vectors_lie(tiny_model, order, monkeypatch):
    """The default device is another one, as it is for everything that should be on a GPU."""
    model, end = tiny_model("llama"), 9
    tables, v, rows = TokenTables.of(model), vectors(model, 3, 4), torch.tensor([0, 1, 2])
    reader, reading = (
        decoding.CachedDecoder.of(model, [PROMPTS[row] for row in rows]),
        DecodingConfig(order, 5, every(model), end=end, min_tokens=2),
    )
    asked, select, read_on = [], reader.select, reader.read_on
    reader.read = lambda token: None  # the model's own code is not what is asked
    reader.select = lambda rows: asked.append(rows.device) or select(rows)
    reader.read_on = lambda rows, *given: asked.append(rows.device) or read_on(rows, *given)
    monkeypatch.setattr(projection, "decoder_of", lambda *given: nullcontext(reader))
    with torch.device("meta"):
        ids = project(model, tables, v, PROMPTS, rows, reading)
    assert {ids.device, *asked} == {v.device} and ids.shape == (3, 4)


def test_prompts_are_read_where_the_model_is_and_with_a_mask_only_if_they_differ_in_length(tiny_model, monkeypatch):
    model, asked = tiny_model("llama"), []
    monkeypatch.setattr(
        decoding, "pad_left", lambda prompts, device, own=models.pad_left: asked.append(device) or own(prompts, device)
    )
    for lengths in ([2, 2], [2, 3], [1, 2, 3]):
        reader = decoding.CachedDecoder.of(model, [(1,) * length for length in lengths])
        assert (reader.mask is None) == (len(set(lengths)) == 1)
    assert asked == [model.device] * 3


def test_text_mask():
    ids = torch.tensor([[5, 0, 7], [0, 0, 0], [1, 2, 3]])
    assert text_mask(ids, 0).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert text_mask(ids, None).tolist() == [[1] * 3] * 3


def test_bad_settings_are_one_sentence(tiny_model):
    model = tiny_model("llama")
    allowed = every(model)
    with pytest.raises(UserError, match=r"top_k = 98, it must be from 1 to the 97 allowed tokens"):
        DecodingConfig("lm_then_nearest", 98, allowed)
    with pytest.raises(
        UserError, match="top_k = 0, it must be from 1 to the 300 allowed tokens of the 300 in the vocabulary: try 200"
    ):
        DecodingConfig("lm_then_nearest", 0, Vocabulary.free(torch.ones(300, dtype=torch.bool)))
    with pytest.raises(UserError, match="top_k = 0"):
        DecodingConfig("lm_then_nearest", 0, allowed)
    with pytest.raises(UserError, match="projection 'beam' is not known: use one of lm_then_nearest, nearest_then_lm"):
        DecodingConfig("beam", 5, allowed)
    reading, rows = DecodingConfig("lm_then_nearest", 5, allowed), torch.tensor([0])
    with pytest.raises(UserError, match="no tokens"):
        projected(model, vectors(model, 1, 3), [()], rows, reading)
    with pytest.raises(UserError, match="exceed the context of 64"):
        projected(model, vectors(model, 1, 64), [(0,)], rows, reading)


@pytest.mark.parametrize("order", PROJECTIONS)
def test_blocks_of_candidates_change_no_token(tiny_model, order, monkeypatch):
    model, rows = tiny_model("phi"), torch.zeros(7, dtype=torch.long)
    v, reading = vectors(model, 7, 3), DecodingConfig(order, 6, every(model))
    whole = projected(model, v, PROMPTS, rows, reading)
    for numbers in (1, 6 * 32, 2 * 6 * 32, 3 * 6 * 32 + 5):
        monkeypatch.setitem(projection.GATHERED_NUMBERS, "cpu", numbers)
        assert torch.equal(projected(model, v, PROMPTS, rows, reading), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [1, 3 * 4 * 8, 1 << 20])
def test_inner_products_are_summed_in_single_precision_at_least(dtype, numbers, monkeypatch):
    monkeypatch.setitem(projection.GATHERED_NUMBERS, "cpu", numbers)
    source = torch.Generator().manual_seed(0)
    table, vectors = (torch.randn(count, 8, generator=source).to(dtype) for count in (20, 7))
    candidates = torch.randint(20, (7, 4), generator=source)
    found = projection.inner_products(table, candidates, vectors)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        found.double(), torch.einsum("nkd,nd->nk", table[candidates].double(), vectors.double()), atol=1e-5, rtol=0
    )
    assert projection.inner_products(table, candidates[:0], vectors[:0]).shape == (0, 4)


def test_the_largest_scores_are_found_by_two_searches():
    source = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 16, 30, 60, 64, 97):
        scores = torch.randn(3, size, generator=source)
        for k in range(1, size + 1):
            values, places = projection.top(scores, k)
            expected = scores.topk(k)
            assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


def test_of_equal_scores_as_many_are_found_as_are_asked_for_and_none_twice():
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (50, 60), generator=source).to(torch.bfloat16)
    scores[:, 20:] = -torch.inf
    for k in range(1, 61):
        values, places = projection.top(scores, k)
        assert torch.equal(values, scores.topk(k).values) and torch.equal(values, scores.gather(1, places))
        assert all(len(set(row)) == k for row in places.tolist())


def test_a_gpu_gathers_more_candidates_at_once():
    assert [projection.gathered_numbers(torch.device(name)) for name in ("cpu", "cuda:1")] == [1 << 20, 1 << 26]


@pytest.mark.usefixtures("decoder")
def test_a_prompt_and_text_may_fill_the_context(tiny_model):
    model = tiny_model("llama")
    ids = projected(
        model, vectors(model, 1, 63), [(0,)], torch.tensor([0]), DecodingConfig("lm_then_nearest", 5, every(model))
    )
    assert ids.shape == (1, 63)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("order", PROJECTIONS)
def test_an_opening_stands_before_each_text_and_is_not_chosen(tiny_model, kind, order):
    """As if the rest of each text had been projected alone, from the whole prompt and the rest of the vectors."""
    model = tiny_model(kind)
    v, rows = vectors(model, 6, 7), torch.tensor([0, 1, 2, 2, 1, 0])
    openings = [(41,), (), (51, 52, 53)]
    reading = DecodingConfig(order, 5, every(model), end=9, min_tokens=2)
    ids = projected(model, v, PROMPTS, rows, reading, openings)
    for i, row in enumerate(rows.tolist()):
        count = len(openings[row])
        alone = projected(
            model, v[i : i + 1, count:], PROMPTS[row : row + 1], torch.zeros(1, dtype=torch.long), reading
        )
        assert ids[i].tolist() == [*openings[row], *alone[0].tolist()]


def literal_masks(vocabulary, chosen, length, before):
    """Tokens open at each place of one text, from the tables entry by entry."""
    state, masks = 0, []
    for place, token in enumerate(chosen):
        mask = [needs <= length - 1 - place for needs in vocabulary.needs[state].tolist()]
        if place == 0:
            begins = vocabulary.begins[int(vocabulary.spaces[before])].tolist()
            mask = [a and bool(b) for a, b in zip(mask, begins, strict=True)]
        masks.append(mask)
        state = int(vocabulary.follows[state, token])
    return masks, state


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("order", PROJECTIONS)
@pytest.mark.parametrize("prompt", ["Rating: poor.", "a film", "the \n"])
def test_every_projection_is_whole_characters_that_begin_with_a_word(demo_model, order, prompt):
    model = demo_model
    ids = tuple(model.tokenizer(prompt)["input_ids"])
    v = torch.randn(4, 6, model.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    found = projected(model, v, [ids], torch.zeros(4, dtype=torch.long), DecodingConfig(order, 3000, model.vocabulary))
    for row in found.tolist():
        masks, state = literal_masks(model.vocabulary, row, 6, ids[-1])
        assert state == 0 and all(mask[token] for mask, token in zip(masks, row, strict=True))
        text = model.tokenizer.decode([*ids[-1:], *row], clean_up_tokenization_spaces=False)
        assert "\ufffd" not in text and model.pieces[row[0]].lstrip()[:1].isprintable()


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_projected_text_begins_with_a_word_and_may_end_from_its_least_length_on(tiny_model, step):
    """Of the first vectors and the end token alone every token could be had: the masks decide."""
    model = tiny_model("llama")
    end, least = 0, 2
    first = model.vocabulary.first(torch.tensor([7]))[0]
    decoding = DecodingConfig("nearest_then_lm", 1, model.vocabulary, end, least)
    v = model.embedding[end].repeat(1, 3, 1)  # nothing is nearer than the end itself
    v = v.masked_fill(torch.arange(3)[None, :, None] < step, 0.0)
    ids = projected(model, v, [(5, 7)], torch.zeros(1, dtype=torch.long), decoding)[0]
    assert bool(first[ids[0]]) and end not in ids[:least].tolist()
