"""Token by token, with a cache that grows and on places that stay: the same states, the same texts, few waits."""

import logging
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import KINDS, held_to, in_tiers
from test_device import WAITS, Launches, as_on_a_gpu
from test_generation import SAMPLING, TWO, room, shots_of, tell, writer_of
from test_models import FAMILIES, Widened, random_lm
from test_projection import PROMPTS, every, projected, vectors
from torch.utils._python_dispatch import TorchDispatchMode

import gradmm
from gradmm import decoding, device, generation
from gradmm.decoding import EVERY, CachedDecoder, StaticDecoder, decoder_of, side_by_side, stands_still
from gradmm.errors import UserError
from gradmm.generation import generate_texts, nucleus
from gradmm.models import wrap_model
from gradmm.projection import PROJECTIONS, DecodingConfig

# Bloom, Falcon and MPT make numbers on the host for each token, experts of a mixture are asked for.
UNCAPTURED = {"bloom", "falcon", "gpt_oss", "mixtral", "mpt"}
# A tied head, one with a bias, grouped keys, numbers made on the host, windows, experts, a recurrent state.
FAST = ("gpt2", "phi", "qwen2", "falcon", "gemma3_text", "gpt_oss", "mamba")
SEQUENCES = [(0, 5, 7), (0, 8), (0, 5, 7), (3, 9, 11, 12, 13), (4,)]


def model_of(family, tiny_lm, tokenizer, **options):
    lm = tiny_lm(family) if family in KINDS else random_lm(family, torch.float64, **FAMILIES.get(family, {}), **options)
    if family in FAMILIES:
        lm.set_experts_implementation("eager")
    return wrap_model(lm, tokenizer, family)


def widened(family):
    return Widened() if family in FAMILIES else nullcontext()


@pytest.fixture
def static(monkeypatch):
    """What a GPU uses, on the CPU."""
    monkeypatch.setitem(decoding.DECODERS, "cpu", StaticDecoder)
    monkeypatch.setitem(generation.BORDERS, "cpu", generation.BORDERS["other"])


@pytest.mark.parametrize("family", in_tiers([*KINDS, *FAMILIES, "mamba"], *FAST))
def test_what_is_read_token_by_token_equals_whole_passes(toy_tokenizer, tiny_lm, family):
    """Prompts of two lengths, one of them twice; some sequences are left behind, others go on twice."""
    with widened(family):
        model = model_of(family, tiny_lm, toy_tokenizer)
        sequences = SEQUENCES[:3]
        reader = CachedDecoder.of(model, sequences)
        for step, rows in enumerate(([0, 1, 2], [2, 1], [1, 0, 1], [0, 2])):
            reader.select(torch.tensor(rows))
            sequences = [(*sequences[row], 10 + step + place) for place, row in enumerate(rows)]
            reader.read(torch.tensor([sequence[-1] for sequence in sequences]))
            close = 1e-9 if family != "mamba" else 1e-6  # parts of Mamba are float32 whatever its weights are
            torch.testing.assert_close(reader.state, model.hidden_of(sequences), rtol=close, atol=close)


def assert_same_states(model, sequences, steps=6):
    """Both decoders, token by token; the static one leaves its stage, which is given, to the next."""
    with torch.no_grad():
        static, cached = StaticDecoder.of(model, sequences, steps), CachedDecoder.of(model, sequences)
        torch.testing.assert_close(static.state, cached.state, rtol=0, atol=0)
        for step in range(steps):
            for reader in (static, cached):
                reader.read(torch.arange(len(sequences)) + 10 + step)
            torch.testing.assert_close(static.state, cached.state, rtol=1e-9, atol=1e-9)
        static.leave(model)
    return static.stage


@pytest.mark.parametrize("family", in_tiers([*KINDS, *FAMILIES], *FAST))
def test_places_that_stay_give_the_states_of_a_cache_that_grows(toy_tokenizer, tiny_lm, family):
    with widened(family):
        model = model_of(family, tiny_lm, toy_tokenizer)
        assert stands_still(model)
        for sequences in (SEQUENCES, SEQUENCES[:3], SEQUENCES[4:], SEQUENCES[3:4] * 40, SEQUENCES[1:3]):
            assert_same_states(model, sequences)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "mistral", "phi3"])
@pytest.mark.parametrize("window", [3, 8])
def test_a_sliding_window_is_that_of_the_mask(toy_tokenizer, tiny_lm, family, window):
    """Prompts longer than the window, and texts that grow beyond it."""
    with widened(family):
        model = model_of(family, tiny_lm, toy_tokenizer, sliding_window=window)
        cache = CachedDecoder.of(model, SEQUENCES[:1]).cache
        assert any(layer.is_sliding for layer in cache.layers)
        for sequences in (SEQUENCES, [tuple(range(20)), tuple(range(5, 12))]):
            assert_same_states(model, sequences, 12)


def test_a_recurrent_state_is_read_with_a_cache_that_grows(toy_tokenizer, tiny_lm, static, caplog):
    model = model_of("mamba", tiny_lm, toy_tokenizer)
    with caplog.at_level(logging.INFO, "gradmm.decoding"):
        for _ in range(2):
            with torch.no_grad(), decoder_of(model, SEQUENCES, 4) as reader:
                assert type(reader) is CachedDecoder
    assert [record.message for record in caplog.records if record.name == "gradmm.decoding"] == [
        "mamba is read token by token with a cache that grows: its state is more than keys and values"
    ]


@pytest.mark.parametrize("fault", ["wrong", "refused"])
def test_a_model_that_misreads_or_refuses_places_that_stay_is_read_with_a_cache_that_grows(
    tiny_model, kind, static, monkeypatch, caplog, fault
):
    model, read = tiny_model(kind), StaticDecoder.read

    def broken(self, token):
        if fault == "refused":
            raise TypeError("no such cache")
        read(self, token.roll(1))

    monkeypatch.setattr(StaticDecoder, "read", broken)
    with caplog.at_level(logging.INFO, "gradmm.decoding"), torch.no_grad(), decoder_of(model, SEQUENCES, 4) as reader:
        assert type(reader) is CachedDecoder
    said = {"wrong": "its states differ with places that stay", "refused": "TypeError: no such cache"}[fault]
    assert [record.message for record in caplog.records if record.name == "gradmm.decoding"] == [
        f"tiny-{kind} is read token by token with a cache that grows: {said}"
    ]


def test_capturing_reads_a_few_times_and_leaves_no_trace(tiny_model, kind, monkeypatch):
    """As on a GPU: the step runs, the stage is put back, the step is replayed."""
    captured = []

    def of(self, key, step, begin):
        if self not in captured:
            captured.append(self)
            for _ in range(device.WARM_UP):
                step()
            begin()
        return step

    monkeypatch.setattr(device.Graphs, "of", of)
    model = tiny_model(kind)
    for steps in (1, 6, 6):
        assert_same_states(model, SEQUENCES, steps)
    assert len(captured) == 1  # rooms of 1 and 6 share a stage


@pytest.mark.parametrize("family", in_tiers([*KINDS, *sorted({*FAMILIES} - UNCAPTURED)], *FAST))
def test_the_step_of_a_token_launches_the_same_at_every_place_and_waits_for_nothing(toy_tokenizer, tiny_lm, family):
    """So that a replay reads the next token as it read the one at which it was captured."""
    seen = []
    for sequences in (SEQUENCES, SEQUENCES[:2]):
        with torch.no_grad(), widened(family):
            model = model_of(family, tiny_lm, toy_tokenizer)
            static = StaticDecoder.of(model, sequences, 40)
            for _ in range(3):
                with as_on_a_gpu(), Launches() as launches:
                    static.stage.read(static.end)
                assert not launches.waits
                seen.append(launches.seen)
    assert all(some == seen[0] for some in seen)


def test_batches_of_nearly_the_same_shape_share_a_stage_that_stays_where_it_is(tiny_model, kind):
    model = tiny_model(kind)

    def places(sequences, steps):
        stage = assert_same_states(model, sequences, steps)
        some = [stage.token, stage.state, stage.mask, stage.place]
        return [tensor.data_ptr() for tensor in (*some, *(layer.keys for layer in stage.layers))]

    first = places(SEQUENCES, 4)
    assert first == places(SEQUENCES[:2], 9)
    stage = weakref.ref(assert_same_states(model, SEQUENCES, 4))
    larger = weakref.ref(assert_same_states(model, SEQUENCES * 7, 4))
    assert stage() is None and larger().token.shape == (64,)
    for parameter in model.lm.parameters():
        parameter.data = parameter.data.clone()  # as a model that goes to another device and back
    assert_same_states(model, SEQUENCES * 7, 4)
    assert larger() is None


def test_a_stage_goes_with_its_model_or_where_memory_is_short(tiny_model):
    model = tiny_model()
    stage = weakref.ref(assert_same_states(model, SEQUENCES))
    device.forget()
    assert stage() is None
    stage, gone = weakref.ref(assert_same_states(model, SEQUENCES)), weakref.ref(model)
    del model
    device.forget()
    assert stage() is None and gone() is None


def test_a_stage_at_work_is_nobody_elses(tiny_model, static):
    model, other = tiny_model(), torch.tensor([30, 31, 32, 33, 34])
    with torch.no_grad(), decoder_of(model, SEQUENCES, 4) as first, decoder_of(model, SEQUENCES, 4) as second:
        for step in range(3):
            first.read(torch.arange(5) + step)
            second.read(other + step)
        for reader, start in ((first, torch.arange(5)), (second, other)):
            whole = [(*some, *(int(start[row]) + step for step in range(3))) for row, some in enumerate(SEQUENCES)]
            torch.testing.assert_close(reader.state, model.hidden_of(whole), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- the same texts


@pytest.mark.parametrize("order", PROJECTIONS)
@pytest.mark.parametrize("openings", [(), ((41,), (), (51, 52, 53))])
@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen2"])
def test_both_decoders_project_on_the_same_texts(tiny_model, kind, order, openings, static, monkeypatch):
    model, rows = tiny_model(kind), torch.tensor([0, 1, 2, 2, 1, 0]).repeat(4)
    v = vectors(model, 24, 19)
    for reading in (
        DecodingConfig(order, 5, every(model), end=9, min_tokens=2),
        DecodingConfig(order, 5, every(model)),
        DecodingConfig(order, 5, model.vocabulary, end=0, min_tokens=3),
    ):
        found = projected(model, v, PROMPTS, rows, reading, openings)
        with monkeypatch.context() as cached:
            cached.setitem(decoding.DECODERS, "cpu", CachedDecoder)
            assert torch.equal(found, projected(model, v, PROMPTS, rows, reading, openings))


@pytest.mark.parametrize("shots", [(), shots_of(TWO)], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_both_decoders_write_the_same_texts_in_batches_of_any_size(tiny_model, kind, shots, monkeypatch):
    model, words = tiny_model(kind), torch.zeros(97, dtype=torch.bool)
    words[model.tokenizer.convert_tokens_to_ids(["Ġcat", "Ġsat", "Ġred", "Ġthe", "Ġon", "."])] = True
    model = held_to(model, words)
    expected = generate_texts(model, TWO, 6, 1, SAMPLING, shots)
    monkeypatch.setitem(decoding.DECODERS, "cpu", StaticDecoder)
    for border in generation.BORDERS.values():
        monkeypatch.setitem(generation.BORDERS, "cpu", border)
        for size in (None, 7):
            some = replace(SAMPLING, batch_size=size)
            assert generate_texts(model, TWO, 6, 1, some, shots) == expected


def test_a_text_that_has_ended_may_read_on_and_holds_none_of_it(tiny_model, static, monkeypatch):
    """Tokens drawn as told: an abbreviation, a real end, and words behind it until the host asks."""
    model = tiny_model()
    told = model.tokenizer(" the dr. cat sat. the dog sat. on it" + 9 * " on")["input_ids"]
    draws = tell(monkeypatch, told)
    writer = writer_of(model, TWO, replace(SAMPLING, min_tokens=2, max_tokens=30))
    ids = writer.rows([(0, 5, 7)], torch.zeros(1, 30), torch.tensor([30]))
    assert model.tokenizer.decode([token for token in ids[0].tolist() if token >= 0]).strip() == "the dr. cat sat."
    assert len(told) - len(list(draws)) == 2 * EVERY


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3, 5])
def test_batches_that_memory_does_not_hold_are_halved_and_change_no_text(tiny_model, decoder, monkeypatch, most):
    model, rows, read = tiny_model(), torch.tensor([0, 1, 2, 2, 1, 0]), decoder.read
    v, reading = vectors(model, 6, 9), DecodingConfig("lm_then_nearest", 5, every(model), end=9)
    expected = projected(model, v, PROMPTS, rows, reading), generate_texts(model, TWO, 1, 1, SAMPLING)

    def short(self, token):
        if len(token) > most:
            raise torch.OutOfMemoryError("too many")
        read(self, token)

    monkeypatch.setattr(decoder, "read", short)
    assert torch.equal(projected(model, v, PROMPTS, rows, reading), expected[0])
    assert generate_texts(model, TWO, 1, 1, SAMPLING) == expected[1]


# ---------------------------------------------------------------- when it waits


class Waits(TorchDispatchMode):
    """Within this, what waits for the device or brings a list to it while a static decoder is at work.

    `seen` has how many tokens had been read then. Masks are made as they are within a capture.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.reader, of, leave = [], None, StaticDecoder.of, StaticDecoder.leave

        def begin(*given):
            reader = of(*given)
            self.reader = reader
            return reader

        def end(reader, model):
            self.reader = None
            leave(reader, model)

        monkeypatch.setattr(StaticDecoder, "of", begin)
        monkeypatch.setattr(StaticDecoder, "leave", end)

    def __torch_dispatch__(self, function, types, given=(), named=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if self.reader is not None and name in WAITS:
            self.seen.append((self.reader.reads, name))
        return function(*given, **(named or {}))


@pytest.mark.parametrize("order", PROJECTIONS)
@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi", "qwen2"])
def test_a_projection_waits_once_every_eight_tokens(tiny_model, kind, order, static, monkeypatch):
    model, rows = tiny_model(kind), torch.tensor([0, 1, 2])
    assert stands_still(model)
    for reading in (
        DecodingConfig(order, 5, every(model), end=9, min_tokens=20),
        DecodingConfig(order, 5, every(model)),
        DecodingConfig(order, 5, model.vocabulary, end=0, min_tokens=20),
    ):
        with as_on_a_gpu(), monkeypatch.context() as patch, Waits(patch) as waits:
            projected(model, vectors(model, 3, 30), PROMPTS, rows, reading)
        assert waits.seen == [(reads, "_local_scalar_dense") for reads in range(EVERY - 1, 29, EVERY)]


def test_writing_asks_for_ends_once_every_eight_tokens(tiny_model, kind, static, monkeypatch):
    model = tiny_model(kind)
    assert stands_still(model)
    writer = writer_of(model, TWO, replace(SAMPLING, max_tokens=30, min_tokens=25))
    uniform = torch.rand(5, 30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), as_on_a_gpu(), monkeypatch.context() as patch, Waits(patch) as waits:
        writer.rows(SEQUENCES, uniform, room(uniform))
    assert {reads for reads, _ in waits.seen} == {*range(EVERY - 1, 29, EVERY), 29}
    assert len(waits.seen) <= 4 * 5  # a mask, its numbers, an end for each text, whether all have ended


def test_what_waits_is_seen(tiny_model, static, monkeypatch):
    """The check itself: a number asked of each token's state."""
    model = tiny_model()
    monkeypatch.setattr(generation, "nucleus", lambda logits, top_p: nucleus(logits + 0 * float(logits.amax()), top_p))
    writer, uniform = writer_of(model, TWO, SAMPLING), torch.rand(5, 16)
    with torch.no_grad(), as_on_a_gpu(), monkeypatch.context() as patch, Waits(patch) as waits:
        writer.rows(SEQUENCES, uniform, room(uniform))
    assert {reads for reads, _ in waits.seen} >= set(range(EVERY))


def test_all_texts_that_ended_early_are_read_on_for_few_tokens(tiny_model, static, monkeypatch):
    model, reads, read = tiny_model(), [], StaticDecoder.read
    monkeypatch.setattr(StaticDecoder, "read", lambda self, token: reads.append(len(token)) or read(self, token))
    v = vectors(model, 3, 40)
    v[:, 2:] = model.embedding[9]
    reading = DecodingConfig("lm_then_nearest", 97, every(model), end=9)
    assert stands_still(model) and not reads.clear()
    assert (projected(model, v, PROMPTS, torch.tensor([0, 1, 2]), reading) == 9).sum() >= 3 * 37
    assert reads == [3] * (EVERY - 1)


# ---------------------------------------------------------------- how many at once


def test_a_cpu_reads_all_texts_at_once_and_a_gpu_what_a_share_of_it_holds(tiny_model, monkeypatch):
    model = tiny_model()
    assert side_by_side(model, 5000, 40) == 5000
    one = decoding.bytes_of_text(model, 40)
    assert one == ((2 * 2 + 8) * 32 + 4 * 64) * 40 * 8 + decoding.LOGIT_BYTES * 97
    for held, found in ((0, 1), (1, 1), (7, 7), (900, 900), (5000, decoding.AT_MOST)):
        monkeypatch.setattr(decoding, "memory_of", lambda where, held=held: int(held * one / decoding.SHARE) + 4)
        assert side_by_side(model, 5000, 40) == found and side_by_side(model, 3, 40) == min(3, found)


def test_texts_written_side_by_side_follow_from_the_device_alone_unless_told():
    for some, cpu, gpu in ((generation.Sampling(), 64, 256), (generation.Sampling(batch_size=5), 5, 5)):
        assert some.together(torch.device("cpu")) == cpu and some.together(torch.device("cuda")) == gpu


@pytest.mark.parametrize(
    ("kind", "small", "words"),
    [
        ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, r"\(KeyError: 'cache'\)"),
        (
            "minimax",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "head_dim": 8,
                "block_size": 8,
                "num_key_value_heads": 4,
                "intermediate_size": 64,
                "num_local_experts": 2,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "",
        ),
    ],
)
def test_a_model_that_is_not_read_token_by_token_is_refused_where_it_writes(kind, small, words, toy_tokenizer):
    config = transformers.AutoConfig.for_model(kind, vocab_size=97, **small)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = gradmm.wrap_model(lm, toy_tokenizer, kind)
    task = gradmm.Task("two", ("negative", "positive"), (" bad", " great"), "{text} it was", ("a", "the"))
    with pytest.raises(UserError, match=f"{kind} can't be read token by token, which writing texts needs {words}"):
        generate_texts(model, task, 1, 0)
    rows = [{"text": "good film", "label": 1}, {"text": "dull film", "label": 0}]
    assert 0 <= gradmm.evaluate(model, task, rows).accuracy <= 1
    assert gradmm.release(model, task, rows, space="head").targets
