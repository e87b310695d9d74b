"""Tasks: one encoding of template, text and verbalizers, on byte-level and on SentencePiece-like tokenizers."""

import copy
import json
import re
import string
import warnings
from dataclasses import asdict, replace

import pytest
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gradmm.config import SynthesisConfig
from gradmm.data import load_data
from gradmm.errors import UserError
from gradmm.plan import check_request
from gradmm.tasks import (
    TASKS,
    HubSource,
    Task,
    from_start,
    load_task,
    start_tokens,
    tokenize_task,
    warn_of_equal_prompts,
)

CORPUS = [
    "the movie was great and the story was good , it was fun", "a bad film : it was terrible , the plot was dull",
    "Review: some words it was bad", "This news is about sports business world technology politics",
    "The emotion is joy sadness love anger fear surprise", "Sentiment: positive negative\nAnswer: yes no Yes No",
] * 20  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "the movie was great", "a dull plot , it was bad !", "story", "some words: fun and good", "It was 3 out of 10 .",
]  # fmt: skip
TEMPLATES = [
    "{text} it was", "Review: {text} Sentiment:", "Review: {text}\nAnswer:", "Review:\n{text}\nAnswer:",
    "Answer: it was {text}", "the review says ({text}) it was",
]  # fmt: skip
TWO = {"labels": ("negative", "positive"), "verbalizers": (" bad", " great")}


def _wrap(tokenizer: Tokenizer, **special) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _byte_level() -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return _wrap(bpe, eos_token="<|end|>")


def _sentence_piece(scheme: str) -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme, split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=[*string.printable], show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return _wrap(bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": _byte_level,
    "metaspace": lambda: _sentence_piece("always"),
    "metaspace first": lambda: _sentence_piece("first"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def byte_level():
    return _byte_level()


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_in_parts_is_the_prompt_as_a_whole(tokenizer, template):
    tokens = tokenize_task(Task("t", template=template, **TWO), tokenizer)
    for text in TEXTS:
        prompt = template.format(text=text)
        assert tokens.sequence(text) == [*tokens.start, *whole(tokenizer, prompt)]
        assert tokens.sequence(text) == [*tokens.start, *tokens.prefix, *tokens.encode(text), *tokens.suffix]
        for verbalizer, label in zip(TWO["verbalizers"], tokens.labels, strict=True):
            assert [*tokens.sequence(text), label] == [*tokens.start, *whole(tokenizer, prompt + verbalizer)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_comes_back_from_its_tokens(tokenizer, template):
    tokens = tokenize_task(Task("t", template=template, **TWO), tokenizer)
    assert [tokens.decode(tokens.encode(text)) for text in TEXTS] == TEXTS


UNICODE = tokenize_task(Task("t", template="Review: {text} it was", **TWO), _byte_level())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_comes_back_from_its_tokens(text):
    assert UNICODE.decode(UNICODE.encode(text.strip())) == text.strip()
    assert UNICODE.sequence(text)[-len(UNICODE.suffix) :] == list(UNICODE.suffix)


def test_special_tokens_spelt_out_in_a_text_are_plain_text(tokenizer):
    tokens = tokenize_task(Task("t", **TWO), tokenizer)
    end = tokenizer.eos_token
    text = f"the movie {end} was great"
    assert tokenizer.eos_token_id not in tokens.encode(text)
    assert tokens.decode(tokens.encode(text)) == text
    assert tokenizer.eos_token_id in whole(tokenizer, text)  # and the tokenizer's own setting is as it was


# ---------------------------------------------------------------- what stands before a text


def beginning(inner, pattern: str, **special) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around a text as the pattern says."""
    tokenizer = _wrap(Tokenizer.from_str(inner.backend_tokenizer.to_str()), **special)
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in pattern.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=named)
    return tokenizer


ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
STARTS = {
    # how a tokenizer sets a text, the tokens that it names -> start, what stands before an empty prompt
    "nothing, both named (SmolLM2)": ("$A", ENDS, "", "<s>"),
    "nothing, an end named (Qwen)": ("$A", {"eos_token": "</s>"}, "", "</s>"),
    "nothing, none named": ("$A", {}, "", ""),
    "begin (Gemma)": ("<s> $A", ENDS, "<s>", "<s>"),
    "end before (OPT)": ("</s> $A", ENDS, "</s>", "</s>"),
    "begin and end (BERT)": ("<s> $A </s>", ENDS, "<s>", "<s>"),
    "end behind (T5)": ("$A </s>", ENDS, "", "<s>"),
    "two before": ("<s> <unk> $A", ENDS, "<s> <unk>", "<s> <unk>"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_text_begins_as_the_tokenizer_begins_it(case):
    pattern, special, start, alone = STARTS[case]
    tokenizer = beginning(_sentence_piece("always"), pattern, **special)
    start, alone = (tuple(tokenizer.convert_tokens_to_ids(names.split())) for names in (start, alone))
    tokens = tokenize_task(Task("t", generation_prompts=("", "the movie"), **TWO), tokenizer)
    assert tokens.start == start == start_tokens(tokenizer)
    assert tokens.prompts == (alone, (*start, *whole(tokenizer, "the movie")))
    assert tokens.sequence("fun") == [*start, *tokens.encode("fun"), *tokens.suffix]
    assert from_start(tokenizer, [[7], [7, 8]], least=2) == [[*alone, 7], [*start, 7, 8]]


@pytest.mark.parametrize("written", ["<s>the movie", "<s>", "<s>the movie</s>"])
def test_a_begin_token_in_the_prompt_is_not_doubled(written):
    for pattern in ("$A", "<s> $A"):
        tokenizer = beginning(_sentence_piece("always"), pattern, **ENDS)
        prompts = tokenize_task(Task("t", generation_prompts=("a", written), **TWO), tokenizer).prompts
        assert prompts[1] == tuple(whole(tokenizer, written)) and prompts[1].count(tokenizer.bos_token_id) == 1


# ---------------------------------------------------------------- prompts

TURNS = (
    "{{ bos_token }}{% for m in messages %}<unk>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}</s>answer:{% endif %}"
)


def talking(pattern: str, template: str = TURNS):
    tokenizer = beginning(_sentence_piece("always"), pattern, **ENDS)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("pattern", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_chat_prompt_is_the_templates_own_with_one_begin_token(pattern):
    tokenizer = talking(pattern)
    task = Task("t", generation_prompts=("a dull plot", "a fun story"), prompt_style="chat", **TWO)
    tokens = tokenize_task(task, tokenizer)
    for prompt, asked in zip(tokens.prompts, task.generation_prompts, strict=True):
        turns = [{"role": "user", "content": asked}]
        assert list(prompt) == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert prompt.count(tokenizer.bos_token_id) == 1 == prompt.count(tokenizer.eos_token_id)
    plain = tokenize_task(replace(task, prompt_style="plain"), tokenizer)
    assert plain.sequence("fun") == tokens.sequence("fun") and plain.prompts != tokens.prompts


@pytest.mark.parametrize(
    ("ending", "prompt"),
    [
        ("answer: <think>\n", "answer: <think>\n\n</think>\n\n"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"),
        ("on {{ strftime_now(format='%d %b') if strftime_now is defined }}:", "on 01 Jan 2025:"),
    ],
)
def test_a_chat_begins_the_answer_itself_and_the_same_on_every_day(ending, prompt):
    tokenizer = talking("$A", "{{ messages[0].content }} " + ending.replace("\n", "{{ '\\n' }}"))
    task = Task("t", generation_prompts=("a dull plot", "a fun story"), prompt_style="chat", **TWO)
    assert list(tokenize_task(task, tokenizer).prompts[0]) == whole(tokenizer, f"a dull plot {prompt}")


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("एक खराब समीक्षा लिखो।", ""), ("Write a short review (a bad one.)", ""), ("a:", ""),
        ("A 4.5 star review", "A 4.5 star review"), ("Written at 4:30: i feel", " i feel"),
        ("写一条差评：这部电影", "这部电影"), ('He said "no." i', " i"), ("Review:great", "great"),
        ("请写一条差评!这部电影", "这部电影"), ("**Write a bad review.** I", " I"), ("Write a review.“I", "“I"),
        ("Rating:5", "5"),
    ],
)  # fmt: skip
def test_what_a_prompt_asks_ends_with_its_last_sentence_or_colon(prompt, opening):
    task = Task("t", generation_prompts=(prompt, "x"), **TWO)
    assert task.openings[0] == opening and task.instructions[0] + opening == prompt


def test_an_opening_begins_with_a_whole_character(byte_level):
    tokens = tokenize_task(Task("t", generation_prompts=("写一条差评：这部电影", "x"), **TWO), byte_level)
    assert tokens.decode(tokens.openings[0]) == "这部电影"


def test_shots_stand_behind_the_prompt_each_or_in_the_users_turn():
    tokenizer = talking("$A")
    task = Task("t", generation_prompts=("a dull plot", "a fun story:"), **TWO)
    plain, chat = (tokenize_task(replace(task, prompt_style=style), tokenizer) for style in ("plain", "chat"))
    assert list(plain.prompt(1, ["good", "great"], " : ")) == whole(
        tokenizer, "a fun story: good : a fun story: great : a fun story:"
    )
    assert list(chat.prompt(1, ["good", "great"], " : ")) == whole(
        tokenizer, "<s><unk>user: good : great : a fun story:</s>answer:"
    )
    assert plain.prompt(0) == plain.prompts[0] and chat.prompt(0) == chat.prompts[0]


@pytest.mark.parametrize(
    ("prompt", "opening", "shown"),
    [
        ("a fun story: i feel", " i feel", "a fun story: i feel great : a fun story: i feel"),
        ("a fun story. the", " the", "a fun story. i feel great : a fun story. the"),
        ("the movie", "the movie", "i feel great : the movie"),
        ("be great.", "", "be great. i feel great : be great."),
    ],
)
def test_what_a_prompt_begins_belongs_to_the_text_and_is_never_doubled(toy_tokenizer, prompt, opening, shown):
    tokens = tokenize_task(Task("t", generation_prompts=(prompt, "a:"), **TWO), toy_tokenizer)
    assert tokens.task.openings[0] == opening and tokens.decode(tokens.openings[0]) == opening.strip()
    assert tokens.prompts[0][len(tokens.prompts[0]) - len(tokens.openings[0]) :] == tokens.openings[0]
    assert tokens.decode(tokens.prompt(0, ["i feel great"], " : ")) == shown
    chat = Task("t", generation_prompts=(prompt, "a:"), prompt_style="chat", **TWO)
    assert chat.openings == ("", "")


def test_a_template_that_can_think_is_asked_not_to():
    template = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<unk>{% endif %}"
    tokenizer = talking("$A", template)
    tokens = tokenize_task(Task("t", generation_prompts=("a", "b"), prompt_style="chat", **TWO), tokenizer)
    assert all(prompt[-1] == tokenizer.unk_token_id for prompt in tokens.prompts)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('a system message is needed') }}", r"fails \(TemplateError: a system message is needed\)"),
        ("{{ foo.bar.baz }}", r"fails \(UndefinedError: 'foo' is undefined\)"),
        ("{% if %}", r"fails \(TemplateSyntaxError: "),
        ("{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}<turn>", "leaves out"),
    ],
)
def test_a_chat_template_that_fails_or_drops_the_prompt_is_refused(template, words):
    task = Task("t", generation_prompts=("a dull plot", "a fun story"), prompt_style="chat", **TWO)
    with pytest.raises(UserError, match=f"the chat template of this model's tokenizer {words}.*prompt_style: plain"):
        list(tokenize_task(task, talking("$A", template)).prompts)


def test_a_label_s_own_word_is_advised_before_another_behind_a_space(toy_tokenizer):
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.add_tokens(["正面"])
    with pytest.raises(UserError, match='"verbalizers": \\["正面", " great"\\]'):
        tokenize_task(Task("t", ("正面", "great"), (" 正面", " great"), "{text}:"), tokenizer)


def test_a_chat_without_a_template_is_refused_where_texts_are_written_and_only_there(tokenizer):
    tokens = tokenize_task(Task("t", generation_prompts=("a", "b"), prompt_style="chat", **TWO), tokenizer)
    assert tokens.sequence("fun")
    with pytest.raises(
        UserError,
        match="task 't' has prompt_style = 'chat', but .* no chat template: set prompt_style: plain in task.yaml",
    ):
        tokens.prompts  # noqa: B018


ALIKE = {
    "none": (("no", "yes"), (" bad", " great"), (), "'no', 'yes'", "an example of a no text:"),
    "all the same": (
        ("no", "yes"), (" bad", " great"), ("A text:", "A text:"), "'no', 'yes'", "an example of a yes text:",
    ),
    "the same words": (
        ("no", "yes"), (" bad", " great"), ("A  text:", "a text: "), "'no', 'yes'", "an example of a yes text:",
    ),
    "two of three": (
        ("a", "b", "c"), (" bad", " great", " dull"), ("x", "y", "x"), "'a', 'c'", "an example of a b text:",
    ),
    "numbers with words": (("0", "1"), (" bad", " great"), (), "'0', '1'", "an example of a bad text:"),
    "mere numbers": (("0", "1"), (" 0", " 1"), (), "'0', '1'", "an example of a (1: say what it is) text:"),
    "numbers with letters": (("0", "1"), (" A", " B"), (), "'0', '1'", "an example of a (0: say what it is) text:"),
    "another script": (("负面", "正面"), (" bad", " great"), (), "'负面', '正面'", "an example of a 负面 text:"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIKE)
def test_equal_prompts_are_warned_of_with_a_line_that_works(case):
    labels, verbalizers, prompts, alike, line = ALIKE[case]
    task = Task("mine", labels, verbalizers, generation_prompts=prompts)
    with pytest.warns(
        UserWarning, match=f"task 'mine' has the same generation prompt for the labels {alike}, so"
    ) as caught:
        warn_of_equal_prompts(task)
    copied = str(caught[0].message).split("such as ")[1]
    assert line in copied
    mended = replace(task, **{key: tuple(value) for key, value in yaml.safe_load(copied).items()})
    warn_of_equal_prompts(mended)  # without a warning


def test_equal_prompts_are_said_once_whoever_looks_first():
    task = Task("mine", ("0", "1"), (" A", " B"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            check_request(task, "body", SynthesisConfig(), private=False)
            warn_of_equal_prompts(task)
    assert len(caught) == 1


@pytest.mark.parametrize("name", TASKS)
def test_registered_tasks_fit_the_tokenizers(tokenizer, name):
    tokens = tokenize_task(TASKS[name], tokenizer)
    assert [tokenizer.decode([token]).strip() for token in tokens.labels] == [
        v.strip() for v in TASKS[name].verbalizers
    ]


@pytest.mark.parametrize("verbalizers", [(" bad", " dullness"), (" bad", " bad"), (" zzz", " great"), (" bad", " ☃")])
def test_a_verbalizer_that_fails_names_candidates_that_pass(tokenizer, verbalizers):
    task = Task("t", ("negative", "positive"), verbalizers, "{text} it was")
    with pytest.raises(UserError, match="verbalizer .* of label ") as caught:
        tokenize_task(task, tokenizer)
    message = str(caught.value)
    wrong = 0 if verbalizers[0] == " zzz" else 1
    assert repr(verbalizers[wrong]) in message and repr(task.labels[wrong]) in message
    said, line = message.split("write this line")
    candidates = [a or b for a, b in re.findall(r"'([^']*)'|\"([^\"]*)\"", said.split("use one such as")[1])]
    assert len(candidates) == 3
    for candidate in candidates:
        mended = [*verbalizers]
        mended[wrong] = candidate
        labels = tokenize_task(replace(task, verbalizers=mended), tokenizer).labels
        assert len(set(labels)) == 2
    copied = yaml.safe_load(line[line.index("{") :])
    assert load_task(copied) == replace(
        task, name="task", verbalizers=[candidates[0] if n == wrong else v for n, v in enumerate(verbalizers)]
    )


MANY = {
    "all of them": [" Sci/Tech", " very good", " zzz", " not_bad"],
    "some": [" bad", " good good", " it", " film!"],
    "one word for all": [" bad"] * 4,
    "numbers": [f" {number}" for number in range(30)],
}


@pytest.mark.parametrize("case", MANY)
def test_all_verbalizers_that_fail_are_named_at_once_with_a_task_file_that_works(tmp_path, tokenizer, case):
    labels = [
        verbalizer.strip() if case != "one word for all" else f"class {n}" for n, verbalizer in enumerate(MANY[case])
    ]
    folder = folder_of(tmp_path, "mine", labels)
    (folder / "labels.json").write_text(json.dumps({"labels": labels}))
    task = replace(load_task(folder), verbalizers=MANY[case])
    with pytest.raises(UserError, match="write this line, with words that suit the classes, into task.yaml") as caught:
        tokenize_task(task, tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    (folder / "task.yaml").write_text(message[message.index('{"labels"') :], encoding="utf-8")
    mended = load_task(folder)
    found = tokenize_task(mended, tokenizer).labels
    assert len(set(found)) == len(labels) and mended.labels == tuple(labels)
    changed = [n for n, (old, new) in enumerate(zip(task.verbalizers, mended.verbalizers, strict=True)) if old != new]
    assert changed and message.count("the verbalizer ") == len(changed)
    candidates = re.findall(r"'([^']*)'", " ".join(re.findall(r"use one such as \[(.*?)\]", message)))
    assert len(candidates) == len(set(candidates)) >= len(changed)


def test_the_pieces_of_a_split_verbalizer_are_named(byte_level):
    task = Task("t", ("negative", "positive"), (" bad", " great good"), "{text} it was")
    with pytest.raises(UserError, match=re.escape("is 2 token(s) [' great', ' good'] after the template")):
        tokenize_task(task, byte_level)


def test_a_special_token_is_no_verbalizer(byte_level):
    with pytest.raises(UserError, match="1 known token of its own is needed"):
        tokenize_task(Task("t", ("a", "b"), (" bad", "<|end|>"), "{text} it was"), byte_level)


def test_the_toy_tokenizer_knows_two_words_as_two_tokens(toy_tokenizer):
    tokens = tokenize_task(Task("t", template="{text} it was", **TWO), toy_tokenizer)
    assert toy_tokenizer.convert_ids_to_tokens(list(tokens.labels)) == ["Ġbad", "Ġgreat"]


@pytest.mark.parametrize("verbalizers", [("bad", " great"), (" bad", "great"), ("1", "2")])
def test_a_verbalizer_that_would_join_the_template_is_refused(verbalizers):
    with pytest.raises(UserError, match="runs into the template's last word: begin it with a space"):
        Task("t", ("a", "b"), verbalizers, "{text} it was")


@pytest.mark.parametrize(
    ("template", "verbalizers"),
    [("{text}\n", ("bad", "great")), ("{text} (", ("bad", "great")), ("这是{text}的", ("好", "坏"))],
)
def test_a_verbalizer_needs_no_space_where_words_do_not_join(template, verbalizers):
    assert Task("t", ("a", "b"), verbalizers, template).verbalizers == verbalizers


def test_text_that_joins_what_follows_it_is_refused():
    with pytest.raises(UserError, match="joins the text's last token: begin it with a space"):
        tokenize_task(Task("t", template="{text}s it was", **TWO), _glued())


def _glued() -> transformers.PreTrainedTokenizerFast:
    """Knows "Ġwords" and "Ġword" + "s"."""
    vocabulary = {
        piece: number
        for number, piece in enumerate(["?", "some", "Ġwords", "Ġwordss", "Ġit", "Ġwas", "Ġbad", "Ġgreat", "s"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="?", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, unk_token="?")


# ---------------------------------------------------------------- tasks

WRONG_TASKS = {
    "one label": ({"labels": ["a"], "verbalizers": [" a"]}, "1 class.es., at least 2"),
    "no labels": ({"labels": [], "verbalizers": []}, "0 class.es."),
    "a label twice": ({"labels": ["a", "a"]}, "repeats a label"),
    "labels as one string": ({"labels": "ab"}, "labels = 'ab': give a list of strings"),
    "labels of nothing": ({"labels": None}, "labels = None"),
    "numbers as labels": ({"labels": [0, 1]}, r"labels = \[0, 1\]: give a list of strings"),
    "fewer verbalizers": ({"verbalizers": [" bad"]}, "1 verbalizers for 2 labels"),
    "more prompts": ({"generation_prompts": ["a", "b", "c"]}, "3 generation_prompts for 2 labels"),
    "no slot": ({"template": "it was"}, "must contain {text} exactly once"),
    "two slots": ({"template": "{text} {text} it was"}, "must contain {text} exactly once"),
    "no template": ({"template": None}, "the template None must contain {text}"),
    "a space at the end": ({"template": "{text} it was "}, "no space at its end: begin the verbalizers with it"),
    "an unknown style": (
        {"prompt_style": "instruct"},
        "task 'mine': the prompt_style 'instruct' is not known: use one of plain, chat",
    ),
    "no style": ({"prompt_style": None}, "prompt_style None is not known"),
    "a list of styles": ({"prompt_style": ["chat"]}, r"prompt_style \['chat'\] is not known"),
    "min_words 0": ({"min_words": 0}, "min_words = 0"),
    "min_words true": ({"min_words": True}, "min_words = True"),
    "min_words in words": ({"min_words": "six"}, "min_words = 'six'"),
    "an empty verbalizer": ({"verbalizers": [" bad", " "]}, "empty verbalizer for label 'good'"),
    "a label with spaces": (
        {"labels": ["bad", "good "]},
        "has the label 'good ': give a name without spaces around it",
    ),
    "an empty label": ({"labels": ["bad", ""]}, "has the label ''"),
    "a nameless task": ({"name": ""}, "task '': its name is '': give a short text"),
    "a number for a name": ({"name": 3}, "task 3: its name is 3: give a short text"),
    "an unknown field": (
        {"verbaliser": [" a"], 3: 4},
        "unknown field 'verbaliser', 3: the fields are generation_prompts",
    ),
    "a hub source in words": ({"hub": "sst2"}, "hub source .* is 'sst2': give a mapping with path"),
    "a hub source without path": ({"hub": {"text": "t"}}, "lacks path"),
    "a hub field unknown": ({"hub": {"path": "a/b", "token": "x"}}, "unknown field 'token'"),
    "a hub path that is none": ({"hub": {"path": 3}}, "hub source: path = 3: give the data set's id"),
    "hub splits unknown": ({"hub": {"path": "a/b", "splits": {"train": "train", "dev": "dev"}}}, "splits = "),
    "hub splits without train": ({"hub": {"path": "a/b", "splits": {"test": "test"}}}, "splits = "),
    "hub classes a number": ({"hub": {"path": "a/b", "classes": 2}}, "classes = 2"),
    "hub classes of other number": ({"hub": {"path": "a/b", "classes": [0]}}, "another number of hub classes"),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_a_wrong_task_is_one_sentence(tmp_path, case):
    changes, words = WRONG_TASKS[case]
    values = {"name": "mine", "labels": ["bad", "good"], "verbalizers": [" bad", " great"], **changes}
    with pytest.raises(UserError, match=words) as caught:
        load_task(values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match=words):
        load_task(tmp_path / "mine.yaml")


@pytest.mark.parametrize("field", ["labels", "verbalizers"])
def test_a_missing_field_is_named(field):
    values = {"labels": ["a", "b"], "verbalizers": [" a", " b"]}
    del values[field]
    with pytest.raises(UserError, match=f"lacks {field}: add what is missing"):
        load_task(values)


def test_a_huge_value_is_cut_short_in_its_error():
    with pytest.raises(UserError) as caught:
        load_task({"labels": "x" * 10_000, "verbalizers": [" a", " b"]})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", TASKS)
def test_a_task_comes_back_from_yaml(tmp_path, name):
    plain = json.loads(json.dumps(TASKS[name].to_dict()))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    found = load_task(tmp_path / "other.yaml")
    assert json.dumps(asdict(found)) == json.dumps(asdict(TASKS[name]))
    assert found.fingerprint == TASKS[name].fingerprint


def test_a_yaml_task_takes_its_name_from_the_file(tmp_path):
    (tmp_path / "mood.yaml").write_text('labels: [low, high]\nverbalizers: [" sad", " glad"]\n')
    task = load_task(str(tmp_path / "mood.yaml"))
    assert task == Task("mood", ("low", "high"), (" sad", " glad"))
    assert load_task(task) is task


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", ""])
def test_yaml_that_is_no_task_is_one_sentence(tmp_path, content):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UserError, match="task 't' is .*: give a mapping with labels and verbalizers"):
        load_task(tmp_path / "t.yaml")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match="no task 'sst3': give one of demo, sst2, .*, a YAML file, or a folder with train.jsonl"
    ):
        load_task("sst3")


def test_the_fingerprint_is_of_what_the_gradient_depends_on():
    task = Task("t", template="{text} it was", **TWO)
    assert (
        replace(
            task, name="u", generation_prompts=("a", "b"), prompt_style="chat", min_words=3, hub=HubSource("a/b")
        ).fingerprint
        == task.fingerprint
    )
    changed = [{"labels": ("no", "yes")}, {"verbalizers": (" good", " great")}, {"template": "{text} it is"}]
    assert len({task.fingerprint, *(replace(task, **change).fingerprint for change in changed)}) == 4


# ---------------------------------------------------------------- the task of a folder


def folder_of(root, name: str, labels, named=None):
    folder = root / name
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "label": label}) + "\n" for i, label in enumerate(labels))
    )
    if named is not None:
        (folder / "labels.json").write_text(json.dumps(named))
    return folder


SENTIMENT = ("negative", "positive")
FOLDERS = {
    # name of the folder, labels of the rows, labels.json -> labels, verbalizers
    "numbers": ("mine", [0, 1, 3, 2], None, ("0", "1", "2", "3"), (" A", " B", " C", " D")),
    "names": ("mine", ["tea", "ale", "tea"], None, ("ale", "tea"), (" ale", " tea")),
    "sentiment by name": ("mine", ["positive", "negative"], None, SENTIMENT, (" bad", " great")),
    "sentiment by short name": ("mine", ["pos", "neg"], None, ("neg", "pos"), (" bad", " great")),
    "sentiment in other order": (
        "mine",
        [1, 0],
        ["Positive", "Negative"],
        ("Positive", "Negative"),
        (" great", " bad"),
    ),
    "three sentiments": (
        "mine",
        [0, 1, 2],
        ["neg", "neutral", "pos"],
        ("neg", "neutral", "pos"),
        (" negative", " neutral", " positive"),
    ),
    "a sentiment twice": ("mine", ["neg", "negative"], None, ("neg", "negative"), (" neg", " negative")),
    "many numbers": ("mine", list(range(27)), None, tuple(map(str, range(27))), tuple(f" {n}" for n in range(27))),
    "numbers from 1": ("mine", [2, 1], {"labels": {"1": "low", "2": "high"}}, ("low", "high"), (" low", " high")),
    "numbers for names": ("mine", [2, 1], {"labels": ["1", "2"]}, ("1", "2"), (" A", " B")),
    "stars": ("mine", [1, 2, 5], {"labels": {"1": "bad", "2": "bad", "5": "good"}}, ("bad", "good"), (" bad", " good")),
    "named": ("mine", [1, 0], ["low", "high"], ("low", "high"), (" low", " high")),
    "named with counts": ("mine", [1, 0], {"labels": ["low", "high"], "rows": 2}, ("low", "high"), (" low", " high")),
    "registered, numbers": ("sst2", [1, 0], None, SENTIMENT, (" bad", " great")),
    "registered, other number": ("sst2", [1, 0, 2], None, ("0", "1", "2"), (" A", " B", " C")),
    "registered, named": ("sst2", [1, 0], list(SENTIMENT), SENTIMENT, (" bad", " great")),
    "registered, other order": ("sst2", [1, 0], ["positive", "negative"], ("positive", "negative"), (" great", " bad")),
    "registered, other labels": ("sst2", [1, 0], ["ham", "spam"], ("ham", "spam"), (" ham", " spam")),
    "registered, some labels": ("emotion", ["joy", "fear"], None, ("fear", "joy"), (" fear", " joy")),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_task_of_a_folder(tmp_path, case):
    name, rows, named, labels, verbalizers = FOLDERS[case]
    task = load_task(folder_of(tmp_path, name, rows, named))
    assert (task.name, task.labels, task.verbalizers, task.hub) == (name, labels, verbalizers, None)
    if name in TASKS and set(labels) <= set(TASKS[name].labels):
        assert task.template == TASKS[name].template
        places = {
            label: prompt for label, prompt in zip(TASKS[name].labels, TASKS[name].generation_prompts, strict=True)
        }
        assert task.generation_prompts == tuple(places[label] for label in labels)


@pytest.mark.parametrize(
    ("labels", "named", "prompts"),
    [
        (
            ["positive", "negative"], None,
            ("One sentence from a negative review:", "One sentence from a positive review:"),
        ),
        (
            ["neutral", "pos", "neg"], None,
            ("One sentence from a negative review:", "One sentence from a neutral review:",
             "One sentence from a positive review:"),
        ),
        (
            ["negative", "ironic"], None,
            ("Here is an example of a ironic text:", "Here is an example of a negative text:"),
        ),
        (
            [0, 1], ["low_cost", "high"],
            ("Here is an example of a low cost text:", "Here is an example of a high text:"),
        ),
        ([0, 1, 2], None, ("", "", "")), (["1", "2"], None, ("", "")),
        (["好", "坏"], None, ("Here is an example of a 坏 text:", "Here is an example of a 好 text:")),
    ],
)  # fmt: skip
def test_labels_that_are_names_give_prompts_and_numbers_none(tmp_path, labels, named, prompts):
    assert load_task(folder_of(tmp_path, "mine", labels, named)).generation_prompts == prompts


def test_task_yaml_in_a_folder_comes_first(tmp_path):
    folder = folder_of(tmp_path, "sst2", [0, 1], list(SENTIMENT))
    (folder / "task.yaml").write_text('labels: [low, high]\nverbalizers: [" sad", " glad"]\nmin_words: 2\n')
    assert load_task(folder) == Task("sst2", ("low", "high"), (" sad", " glad"), min_words=2)


@pytest.mark.parametrize("named", [{"names": ["a"]}, [0, 1], "ab", None])
def test_a_labels_file_without_names_is_refused(tmp_path, named):
    folder = folder_of(tmp_path, "mine", [0, 1])
    (folder / "labels.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match="labels.json holds no list of label names: write "):
        load_task(folder)


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no train.jsonl: put rows such as"):
        load_task(tmp_path)
    with pytest.raises(
        UserError, match="all 2 rows of .*train.jsonl have the label 'a', at least 2 classes are needed"
    ):
        load_task(folder_of(tmp_path, "one", ["a", "a"]))
    with pytest.raises(UserError, match="none/train.jsonl is empty|none.train.jsonl is empty"):
        load_task(folder_of(tmp_path, "none", []))


TWINS = [["Positive", "positive"], ["sci  tech", "Sci Tech"], ["STRASSE", "stra\u00dfe"]]


@pytest.mark.parametrize("labels", TWINS)
def test_names_that_differ_in_case_or_spaces_alone_are_refused(tmp_path, labels):
    with pytest.raises(
        UserError, match="mine/train.jsonl, line .*read the same but for case or spaces: write one of them"
    ) as caught:
        load_task(folder_of(tmp_path, "mine", [*labels, "other"]))
    assert all(f"line {number} " in str(caught.value) or f"line {number + 1} " in str(caught.value) for number in (1,))


@pytest.mark.parametrize("labels", [[1, 2], [-1, 1], [1, 2, 3, 4, 5], [0, 2], [0, 1, 10**9], [0, "good"]])
def test_the_advice_on_other_numbers_works_when_it_is_followed(tmp_path, labels):
    folder = folder_of(tmp_path, "mine", labels * 20)
    with pytest.raises(
        UserError, match="use names, or every number from 0, or name them in labels.json beside it, "
    ) as caught:
        load_task(folder)
    message = str(caught.value)
    (folder / "labels.json").write_text(message[message.index('{"labels"') : message.rindex("}") + 1])
    task, splits = load_data(folder)
    assert len(task.labels) == len(labels)
    rows = [example for split in (splits.train, splits.validation, splits.test) for example in split]
    assert all(
        labels[int(e.text.split()[1]) % len(labels)] == sorted(labels, key=lambda x: (isinstance(x, str), x))[e.label]
        for e in rows
    )


@pytest.mark.parametrize("name", ["task.yml", "task.json"])
def test_a_task_file_that_would_not_be_read_is_refused(tmp_path, name):
    (folder_of(tmp_path, "mine", [0, 1]) / name).write_text("labels: [a, b]\n")
    with pytest.raises(
        UserError, match=f"holds {name}, which is not read: rename it to task.yaml or move it elsewhere"
    ):
        load_task(tmp_path / "mine")


def test_the_built_in_task_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "here" / "demo").mkdir(parents=True)
    monkeypatch.setattr("gradmm.tasks.DEMO", folder_of(tmp_path, "built-in", ["a", "b"]))
    monkeypatch.chdir(tmp_path / "here")
    assert load_task("demo").name == "built-in"


def test_a_folder_may_stand_where_a_name_would(tmp_path, monkeypatch):
    folder_of(tmp_path, "sst2", ["a", "b"])
    monkeypatch.chdir(tmp_path)
    assert load_task("sst2").labels == ("a", "b")
