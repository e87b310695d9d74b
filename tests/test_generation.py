"""Zero-shot and few-shot texts: what they hold, that draws follow the model, and that neighbours change nothing."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import configuration_of, held_to, make_toy_tokenizer
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper

import gradmm
from gradmm import generation
from gradmm.data import Example, content_hash, load_data, sample_examples
from gradmm.decoding import decoder_of
from gradmm.errors import DataWarning, UserError
from gradmm.generation import Sampling, Writer, generate_counts, generate_texts, nucleus, prompted_texts
from gradmm.models import Model, load_model, wrap_model
from gradmm.tasks import Task, load_task, tokenize_task

TWO = Task(
    "two", ("negative", "positive"), (" bad", " great"), "{text} it was", ("the movie was bad .", "this was great .")
)
FOUR = Task(
    "four", ("a", "b", "c", "d"), (" world", " sports", " business", " text"), "{text} this is",
    ("", "a", "the cat", "text"),
)  # fmt: skip
SHOTS = [
    Example(f"{word} {clue}.", label)
    for label, clue in enumerate(("dog", "cat", "red", "blue"))
    for word in ("the", "a", "one")
]
SAMPLING = Sampling(temperature=4.0, max_tokens=16, min_tokens=4, shots=1, rounds=20)
INSIDE = ("Ġcat", "Ġdog", "Ġsat", "Ġred", "Ġblue", "Ġthe", "Ġand", "Ġon", ".")


@pytest.fixture(params=[TWO, FOUR], ids=lambda task: task.name)
def task(request) -> Task:
    return request.param


@pytest.fixture
def allowed(toy_tokenizer) -> torch.Tensor:
    """A few words and a full stop: with a high temperature even a random model writes sentences of these."""
    mask = torch.zeros(97, dtype=torch.bool)
    mask[toy_tokenizer.convert_tokens_to_ids(INSIDE)] = True
    return mask


def shots_of(task: Task) -> list[Example]:
    return [shot for shot in SHOTS if shot.label < len(task.labels)]


@pytest.mark.usefixtures("decoder")
def test_texts_are_finished_distinct_and_balanced(tiny_model, task, kind, allowed):
    model = held_to(tiny_model(kind), allowed)
    for shots in ((), shots_of(task)):
        texts = generate_texts(model, task, 5, 0, SAMPLING, shots)
        assert [example.label for example in texts] == [label for label in range(len(task.labels)) for _ in range(5)]
        assert len({content_hash(example.text) for example in [*texts, *shots]}) == len(texts) + len(shots)
        for example in texts:
            assert example.text == example.text.strip() and example.text[-1] in ".!?"
            assert 4 <= len(tokenize_task(task, model.tokenizer).encode(example.text))


@pytest.mark.usefixtures("decoder")
@pytest.mark.slow
def test_neighbours_do_not_change_a_text(tiny_model, task, allowed):
    model = held_to(tiny_model(), allowed)
    for shots in ((), shots_of(task)):
        whole = generate_texts(model, task, 6, 1, SAMPLING, shots)
        assert whole == generate_texts(model, task, 6, 1, SAMPLING, shots)
        assert whole == generate_texts(model, task, 6, 1, replace(SAMPLING, batch_size=2), shots)
        fewer = generate_texts(model, task, 3, 1, SAMPLING, shots)
        assert fewer[:3] == whole[:3]
        assert whole != generate_texts(model, task, 6, 2, SAMPLING, shots)


def writer_of(model, task, sampling) -> Writer:
    return Writer(model, tokenize_task(task, model.tokenizer), sampling, model.vocabulary)


def logits_at(model, prompt, step) -> torch.Tensor:
    """Of the tokens that a text may have at a step, too early to end: (1, V)."""
    logits = torch.nn.functional.linear(model.hidden_of([prompt]), model.head_weight, model.head_bias)
    vocabulary, row = model.vocabulary, torch.zeros(1, dtype=torch.long)
    allowed = vocabulary.open_to(row, row + 9) & ~vocabulary.stops
    if step == 0:
        allowed = allowed & vocabulary.first(row + prompt[-1])
    return logits.masked_fill(~allowed, -torch.inf)


def tell(monkeypatch, tokens):
    """Let the tokens of one text be drawn as told: the iterator has those that were not asked for."""
    draws = iter(tokens)

    def told(logits, top_p):
        return torch.nn.functional.one_hot(torch.tensor([next(draws)]), logits.shape[-1]).to(logits)

    monkeypatch.setattr(generation, "nucleus", told)
    return draws


def prompts_read(monkeypatch) -> list:
    """The prompts of all texts from now on."""
    asked = []
    monkeypatch.setattr(
        generation, "decoder_of", lambda model, prompts, room: asked.extend(prompts) or decoder_of(model, prompts, room)
    )
    return asked


def room(uniform) -> torch.Tensor:
    return torch.full((len(uniform),), uniform.shape[1])


@pytest.mark.usefixtures("decoder")
def test_draws_follow_the_model_with_temperature_and_nucleus(tiny_model):
    model = tiny_model("phi")  # its head has a bias
    writer = writer_of(model, TWO, Sampling(temperature=1.7, top_p=0.8, batch_size=2000))
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1, None]
    drawn = writer.rows([[0, 5, 7]] * len(uniform), uniform, room(uniform))
    logits = TemperatureLogitsWarper(1.7)(None, logits_at(model, [0, 5, 7], 0))
    expected = TopPLogitsWarper(0.8)(None, logits).softmax(-1)[0]
    found = torch.bincount(drawn.flatten(), minlength=97) / len(drawn)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_the_nucleus_is_that_of_a_full_sort(top_p, spread):
    logits = spread * torch.randn(20, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, :100] = -torch.inf
    expected = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    torch.testing.assert_close(nucleus(logits, top_p), torch.where(expected.isinf(), 0, logits.softmax(-1)))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_equal_logits_are_in_the_nucleus_together(top_p):
    """Ties at the least logit of the set, and rows in which all tokens are equal, with and without forbidden ones."""
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [0, 0, 0, -torch.inf], [3, 0, 0, 0], [9, 9, -5, -torch.inf], [-torch.inf, 2, -torch.inf, 1]]
    )
    probabilities = logits.softmax(-1)
    inside = nucleus(logits, top_p) > 0
    least = torch.where(inside, logits, torch.inf).amin(-1, keepdim=True)
    assert torch.equal(inside, (logits >= least) & logits.isfinite())
    assert ((probabilities * inside).sum(-1) >= top_p - 1e-6).all()
    assert ((probabilities * (logits > least)).sum(-1) < top_p).all()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(bad):
    logits = torch.tensor([[0.0, 1, 2, 3], [bad] * 4, [3, bad, 1, -torch.inf]])
    assert torch.equal(nucleus(logits, 0.7)[0], nucleus(logits[:1], 0.7)[0])
    assert nucleus(logits[1:], 0.7).shape == (2, 4)
    assert nucleus(logits[1:2], 0.7).shape == (1, 4)


@pytest.mark.usefixtures("decoder")
def test_a_draw_at_either_end_is_in_the_nucleus(tiny_model):
    model = tiny_model()
    writer = writer_of(model, TWO, Sampling(top_p=0.5))
    kept = nucleus(logits_at(model, [0, 5, 7], 0), 0.5).nonzero()[:, 1:].tolist()
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert writer.rows([[0, 5, 7]] * 2, ends, room(ends)).tolist() == [kept[0], kept[-1]]


@pytest.mark.usefixtures("decoder")
def test_cached_steps_equal_whole_passes(tiny_model, kind):
    model = tiny_model(kind)
    writer = writer_of(model, TWO, replace(SAMPLING, max_tokens=9, min_tokens=9))
    prompts = [[0, 5, 7, 9], [0, 8], [0, 4, 6]]
    uniform = torch.rand(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = writer.rows(prompts, uniform, room(uniform))
    for row, prompt in enumerate(prompts):
        text = []
        for step in range(9):
            cumulated = nucleus(logits_at(model, prompt + text, step) / SAMPLING.temperature, 0.95)[0].cumsum(0)
            text.append(int((cumulated <= uniform[row, step] * cumulated[-1]).sum()))
        assert found[row].tolist() == text


def test_equal_prompts_are_read_once_and_no_pass_reads_a_text_that_has_ended(tiny_model, allowed, monkeypatch):
    model, sizes, read = held_to(tiny_model(), allowed), [], Model.read
    with decoder_of(model, [[5]], 1):  # the first time it is tried whether the model can be read so
        pass
    monkeypatch.setattr(
        Model, "read", lambda self, ids, *some: sizes.append(tuple(ids.shape)) or read(self, ids, *some)
    )
    writer = writer_of(model, TWO, SAMPLING)
    uniform = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
    written = (writer.rows([(0, 5, 7)] * 12, uniform, room(uniform)) >= 0).sum(1)
    passes = written.clamp_max(15)  # a text's last token is read: what follows tells whether its sentence ended there
    assert sizes == [(1, 3), *((int((passes > step).sum()), 1) for step in range(int(passes.max())))]
    assert sizes[-1] < (12, 1)


@pytest.mark.usefixtures("decoder")
def test_masked_tokens_are_not_written(tiny_model, allowed):
    for example in generate_texts(held_to(tiny_model(), allowed), TWO, 4, 0, SAMPLING):
        assert set(example.text.replace(".", " ").split()) <= {word.removeprefix("Ġ") for word in INSIDE}


def test_shots_are_real_examples_of_the_class_behind_the_prompt(tiny_model, monkeypatch):
    model, asked = tiny_model(), prompts_read(monkeypatch)
    writer = writer_of(model, TWO, Sampling(shots=2, separator=" : ", max_tokens=6))
    pool = [shot.text for shot in SHOTS if shot.label == 1]
    writer.write(1, pool, [torch.Generator().manual_seed(seed) for seed in range(20)])
    prompts = {model.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in asked}
    said = "this was great ."
    possible = {f"{said} {first} : {said} {second} : {said}" for first, second in itertools.permutations(pool, 2)}
    assert prompts <= possible and len(prompts) > 2
    writer.write(1, [], [torch.Generator()])
    assert asked[-1] == list(writer.tokens.prompts[1])


@pytest.mark.parametrize("bad", ["cat cat cat.", ", the cat sat.", "The movie was bad. It was.", "the <|im_end|> cat."])
def test_texts_that_cannot_be_read_are_written_anew(tiny_model, allowed, monkeypatch, bad):
    model, cut = held_to(tiny_model(), allowed), generation.cut_to_sentence
    wanted = generate_texts(model, TWO, 20, 0, SAMPLING)
    monkeypatch.setattr(
        generation, "cut_to_sentence", lambda text, complete: bad if len(text) % 2 else cut(text, complete)
    )
    found = generate_texts(model, TWO, 5, 0, SAMPLING)
    assert len(found) == 10 and (bad, 0) not in [(example.text, example.label) for example in found]
    assert {example.text for example in found if example.label == 0} < {
        example.text for example in wanted if example.label == 0
    }


def test_no_class_is_written_without_a_prompt_of_its_own_in_silence(tiny_model, allowed):
    for prompts in ((), ("a", "A "), ("the cat", "the cat")):
        with pytest.warns(UserWarning, match="same generation prompt for the labels 'negative', 'positive'"):
            generate_texts(held_to(tiny_model(), allowed), replace(TWO, generation_prompts=prompts), 1, 0, SAMPLING)


def test_a_chat_writes_behind_the_templates_markup(tiny_model, allowed, monkeypatch):
    model, asked = held_to(tiny_model(), allowed), prompts_read(monkeypatch)
    model.tokenizer.chat_template = (
        "{% for m in messages %}<|endoftext|>{{ m.role }} {{ m.content }}{% endfor %}<|endoftext|>"
    )
    for shots in ((), shots_of(TWO)):
        generate_texts(model, replace(TWO, prompt_style="chat"), 2, 0, SAMPLING, shots)
        turns = {model.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in asked}
        assert all(
            turn.startswith("<|endoftext|>user ") and turn.endswith(".<|endoftext|>") and turn.count("<|end") == 2
            for turn in turns
        )
        assert any("this was great ." in turn for turn in turns)


def written(model, task, monkeypatch, said, stopped=True) -> str:
    """A text of the first class whose tokens are told, up to a stop or to the last that it may have."""
    ids = model.tokenizer(said)["input_ids"]
    tell(monkeypatch, [*ids, 0])
    writer = writer_of(model, task, replace(SAMPLING, max_tokens=len(ids) + stopped))
    return writer.write(0, [], [torch.Generator()])[0]


def test_a_text_is_cut_back_to_its_last_sentence_and_ends_at_stops(tiny_model, monkeypatch):
    model = tiny_model()
    assert written(model, TWO, monkeypatch, " the cat sat. the") == "the cat sat."
    assert written(model, TWO, monkeypatch, " the cat sat the", stopped=False) == ""
    assert written(model, TWO, monkeypatch, " ...") == written(model, TWO, monkeypatch, " a it.") == ""
    vocabulary = model.vocabulary
    assert bool(vocabulary.stops[0])
    assert vocabulary.closes.nonzero().flatten().tolist() == [model.tokenizer.convert_tokens_to_ids(".")]


def test_a_space_alone_belongs_to_what_follows_it(tiny_model, monkeypatch):
    """As before a number, or a word of many scripts: `Ġ` and `z` here."""
    model = tiny_model()
    space = model.tokenizer.convert_tokens_to_ids("Ġ")
    assert space in model.tokenizer(" the zz")["input_ids"] and bool(model.vocabulary.whole[space])
    assert not model.vocabulary.begins[:, space].any()
    assert written(model, TWO, monkeypatch, " the zz sat.") == "the zz sat."
    assert written(model, TWO, monkeypatch, " the cat sat. zz it.") == "the cat sat."  # where a sentence ends is seen
    assert written(model, TWO, monkeypatch, " dr. zz sat.") == "dr. zz sat."  # through it, and that it does not here


def test_a_text_is_not_quoted(tiny_model, monkeypatch):
    model = tiny_model()
    assert written(model, TWO, monkeypatch, "' the cat sat on.'") == "the cat sat on."


def test_a_mark_with_a_line_break_ends_a_text_and_its_sentence(tiny_lm, monkeypatch):
    """As tokens of Llama 3 and Qwen do."""
    tokenizer = make_toy_tokenizer()
    tokenizer.add_tokens([".\n", "?\n"])
    model = wrap_model(tiny_lm("llama"), tokenizer, "toy")
    full, question = tokenizer.convert_tokens_to_ids([".\n", "?\n"])
    vocabulary = model.vocabulary
    assert bool(vocabulary.stops[full]) and int(vocabulary.left[full]) == tokenizer.convert_tokens_to_ids(".")
    assert int(vocabulary.left[question]) == -1  # no token is a question mark alone
    tell(monkeypatch, [*tokenizer(" the cat sat on it")["input_ids"], full])
    writer = writer_of(model, TWO, SAMPLING)
    assert writer.write(0, [], [torch.Generator()]) == ["the cat sat on it."]
    only = vocabulary.only(torch.arange(len(model.pieces)) != int(vocabulary.left[full]))
    assert int(only.left[full]) == -1


def without_row() -> Model:
    """A model whose tokenizer has one token more than it has rows."""
    tokenizer = make_toy_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = configuration_of("llama", tied=False)
    config.vocab_size = rows
    return wrap_model(AutoModelForCausalLM.from_config(config), tokenizer, "small")


def without_ends(model) -> Model:
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    return model


def only_full_stop(model) -> Model:
    return held_to(model, torch.arange(97) == model.tokenizer.convert_tokens_to_ids("."))


UNUSABLE = {  # of a model: another one, the first prompt, what is said
    "empty": (without_ends, "", "no tokens and the tokenizer no begin-of-text token: give a prompt"),
    "no row": (
        lambda model: without_row(), "a <image>",
        r"of label 'negative' holds \['<image>'\], which the model has no row for: resize",
    ),
    "long": (
        lambda model: model, 63 * " red" + ":",
        r"a prompt of 64 .* exceed the context of 64|prompt of \d+ tokens, .* reads 64",
    ),
    "no beginning": (only_full_stop, "bad .", "no token of tiny-llama may begin a text behind .* of label 'negative'"),
}  # fmt: skip


def synthesized(model, task, space, **settings):
    target = gradmm.release(model, task, SHOTS[:6], space=space, progress=False)
    config = gradmm.SynthesisConfig(n_synthetic=2, top_k=1, outer_steps=1, inner_steps=1, **settings)
    return gradmm.synthesize(model, task, target, config, progress=False)


WRITERS = {
    "generate": lambda model, task: generate_texts(model, task, 1, 0, SAMPLING),
    "prompted": lambda model, task: prompted_texts(model, tokenize_task(task, model.tokenizer), 1),
    "release": lambda model, task: synthesized(model, task, "body"),
    "admm": lambda model, task: synthesized(model, task, "head", search="admm", ranking="text", init="normal"),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_prompt_that_no_text_can_be_written_behind_is_refused_in_a_sentence(tiny_model, case, write):
    change, prompt, said = UNUSABLE[case]
    with pytest.raises(UserError, match=said):
        WRITERS[write](change(tiny_model()), replace(TWO, generation_prompts=(prompt, "the")))


@pytest.mark.parametrize("most", [1, 7, 64, 256])
@pytest.mark.parametrize("missing", [0, 1, 16, 65, 600])
def test_how_many_are_tried_does_not_depend_on_the_batch(missing, most):
    found = generation.next_batches(1, 5, missing, most)
    assert sum(batch.size for batch in found) == (max(missing, 16) if missing else 0)
    assert [batch.first for batch in found] == [5 + most * number for number in range(len(found))]
    assert all(0 < batch.size <= most for batch in found)


@pytest.mark.parametrize(
    ("opening", "said", "text"),
    [
        ("i feel", " that the cat sat.", "i feel that the cat sat."),
        ("the movie", " was great.", "the movie was great."),
        ("a movie: i", " sat on the cat.", "i sat on the cat."),
    ],
)
def test_what_a_prompt_begins_is_the_beginning_of_the_text(tiny_model, monkeypatch, opening, said, text):
    assert written(tiny_model(), replace(TWO, generation_prompts=(opening, "a:")), monkeypatch, said) == text


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "prompts", [("the movie: i feel", "a movie: i saw"), ("i like the", "we saw it. you"), ("the", "a:")]
)
def test_texts_begin_with_their_prompts_opening_and_go_on_with_a_word(tiny_model, kind, allowed, prompts):
    task = replace(TWO, generation_prompts=prompts)
    for example in generate_texts(held_to(tiny_model(kind), allowed), task, 3, 0, SAMPLING):
        opening = task.openings[example.label].strip()
        rest = example.text.removeprefix(opening)
        assert example.text.startswith(opening) and (rest[0] == " " or not opening)
        assert rest.split()[0].strip(".") in [word.removeprefix("Ġ") for word in INSIDE]


def test_a_sentence_goes_on_where_what_follows_is_no_new_word(tiny_model, allowed, monkeypatch):
    """Drawn as told: an abbreviation, a part of a word behind a stop, a real end."""
    model = tiny_model()
    for said, text in (
        (" the dr. cat sat on it. the", "the dr. cat sat on it."),
        (" the cat.cat sat on it. on", "the cat.cat sat on it."),
        (" the cat sat on. the", "the cat sat on."),
    ):
        told = model.tokenizer(said)["input_ids"]
        draws = tell(monkeypatch, told)
        writer = writer_of(model, TWO, replace(SAMPLING, min_tokens=2, max_tokens=len(told) + 4))
        uniform = torch.zeros(1, len(told) + 4)
        ids = writer.rows([(0, 5, 7)], uniform, room(uniform))
        assert model.tokenizer.decode([token for token in ids[0].tolist() if token >= 0]).strip() == text
        assert list(draws) == []
        tell(monkeypatch, told)
        assert writer.write(0, [], [torch.Generator()]) == [text]


@pytest.mark.parametrize("markup", ["<|endoftext|>", "<|unknown|>", "<|endoftext|> so"])
def test_markup_in_a_prompt_is_warned_of(tiny_model, allowed, markup):
    task = replace(TWO, generation_prompts=(f"{markup} the movie:", "a:"))
    with pytest.warns(UserWarning, match=r"label 'negative' of task 'two' holds '<\|(endoftext|unknown)\|>'"):
        generate_texts(held_to(tiny_model(), allowed), task, 1, 0, SAMPLING)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("length", [1, 3, 6])
def test_raw_texts_have_whole_characters_however_short(demo_model, length):
    tokens = tokenize_task(load_task("demo"), demo_model.tokenizer)
    texts = prompted_texts(demo_model, tokens, 20, length)
    assert len(texts) == 40 and not [text for text in texts if "\ufffd" in text or not text[:1].isprintable()]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}, {"min_tokens": 50}, {"shots": 0},
        {"batch_size": 0.5}, {"rounds": 0},
    ],
)  # fmt: skip
def test_unusable_settings_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


def test_unusable_requests_are_refused(tiny_model):
    model = tiny_model()
    endless = torch.arange(97) != model.tokenizer.convert_tokens_to_ids(".")
    for options, match in (
        ({"shots": SHOTS[:3]}, "0 of the 3 shots"),
        ({"model": held_to(model, endless)}, "ends a sentence"),
        ({"sampling": Sampling(max_tokens=64)}, "context"),
        ({"n_per_class": 0}, "n_per_class"),
        ({"sampling": Sampling(max_tokens=8, min_tokens=2, top_p=1e-6, rounds=2)}, "of 3 texts"),
    ):
        with pytest.raises(UserError, match=match):
            generate_texts(
                **{"model": model, "task": TWO, "n_per_class": 3, "seed": 0, "sampling": SAMPLING, **options}
            )


FEW = ("red", "blue", "old", "new", "long", "short", "loud", "calm", "odd")


def write_few(usable):
    """A writer that knows so many texts of each class and no others."""

    def write(writer, label, pool, draws):
        picked = [int(torch.randint(max(1, usable[label]), (1,), generator=draw)) for draw in draws]
        return [f"The {FEW[n]} film was {('dull', 'fine')[label]}." if usable[label] else "" for n in picked]

    return write


@pytest.mark.parametrize(("usable", "counts"), [((3, 9), (5, 4)), ((1, 5), (5, 5)), ((2, 2), (2, 3)), ((1, 1), (9, 9))])
def test_a_pool_that_comes_out_short_is_what_came_out_with_a_warning(tiny_model, monkeypatch, usable, counts):
    monkeypatch.setattr(Writer, "write", write_few(usable))
    with pytest.warns(UserWarning, match="came out finished, distinct and readable after .* raise length") as said:
        found = generate_counts(tiny_model(), TWO, counts, 0)
    there = [min(pair) for pair in zip(usable, counts, strict=True)]
    assert [sum(example.label == label for example in found) for label in (0, 1)] == there
    assert [example.label for example in found] == sorted(example.label for example in found)
    assert len({example.text for example in found}) == len(found)
    short = [label for label in (0, 1) if there[label] < counts[label]]
    assert [str(one.message).partition(" texts of ")[0] for one in said] == [
        f"{there[label]} of {counts[label]}" for label in short
    ]


@pytest.mark.parametrize("usable", [(0, 9), (9, 0), (0, 0)])
def test_a_pool_without_a_text_of_some_class_is_refused(tiny_model, monkeypatch, usable):
    monkeypatch.setattr(Writer, "write", write_few(usable))
    with pytest.raises(UserError, match=r"0 of 5 texts of '.*' came out .* raise length or temperature, or take other"):
        generate_counts(tiny_model(), TWO, (5, 5), 0)


@pytest.mark.slow
def test_the_bench_model_writes_sentences_of_both_classes(bench):
    model = load_model(bench / "imdb-lm")
    with pytest.warns(DataWarning):
        task, splits = load_data(bench / "data" / "sst2")
    shots = sample_examples(splits.train, 10, task, 0)
    for given in ((), shots):
        texts = generate_texts(model, task, 10, 0, shots=given)
        assert len(texts) == 20 and all(len(example.text.split()) >= 3 for example in texts)
