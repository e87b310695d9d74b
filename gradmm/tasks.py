"""Classification tasks: labels, template, verbalizers and generation prompts, and their tokens.

Knows tokenizers but no language model. Letters: C classes, V vocabulary.
An example reads `template.format(text=...)` followed by its label's verbalizer, one token.
"""

import hashlib
import json
import os
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from gradmm import files
from gradmm.errors import COUNT, Rule, UserError, check_settings, first_line, one_of, require, require_type, short_repr
from gradmm.markup import check_name, plain_name
from gradmm.readability import BROKEN, CLOSERS, SENTENCE_ENDS, WIDE_ENDS
from gradmm.rows import SPLITS, Row, read_label_names, read_rows
from gradmm.vocabulary import tokens_of

SLOT = "{text}"
PROBE = "some words"
LETTERS = tuple(string.ascii_uppercase)
MOST_NAMED = 200  # labels that an error spells out
# Up to the last sentence end, colon or line break, but not within 4.5 or 4:30.
_ENDS = rf"[{re.escape(SENTENCE_ENDS)}][{re.escape(CLOSERS)}*_]*(?=\s|\Z|[“\u2e80-\U0010ffff])"
INSTRUCTION = re.compile(rf"(?:.*(?:{_ENDS}|(?<!\d):|:(?!\d)|[{WIDE_ENDS}：][{re.escape(CLOSERS)}]*|\n))?", re.DOTALL)
FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro +%}"
ANSWERS = {  # what a template ends with that leaves more to say before the answer, and what is said
    "<think>": "\n\n</think>\n\n",
    "<|start|>assistant": "<|channel|>final<|message|>",
}
PROMPT_STYLES = ("plain", "chat")
NAMED_PROMPT = "Here is an example of a {} text:"
REVIEW_PROMPT = "One sentence from a {} review:"  # to a language model "a negative text" is no complaint
SENTIMENTS = {"neg": "negative", "pos": "positive"} | {name: name for name in ("negative", "neutral", "positive")}
SENTIMENT_VERBALIZERS = {"negative": " bad", "positive": " great"}
DEMO = Path(__file__).parent / "data" / "demo"


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows live on the Hugging Face hub.

    Attributes:
        path: the data set's id.
        text, label: the columns' names.
        splits: our split -> the hub's split; None finds them by their usual names. A split that is missing is carved
            from train by content hash.
        config: the data set's configuration, if it has several.
        classes: the hub's label numbers, in the order of the task's labels; rows of other classes are left out.
        revision: a commit, tag or branch; None is the default branch (the commit found is recorded).
    """

    path: str
    text: str = "text"
    label: str = "label"
    splits: Mapping[str, str] | None = None
    config: str | None = None
    classes: tuple[int, ...] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, _SOURCE, "hub source: ")


_SOURCE = {
    "path": Rule(lambda path: isinstance(path, str), "{name} = {value}: give the data set's id, a text"),
    "splits": Rule(
        lambda splits: isinstance(splits, Mapping) and "train" in splits and set(splits) <= set(SPLITS),
        "{name} = {value}: name the hub's train split, and validation and test if it has them",
    ),
    "classes": Rule(
        lambda classes: isinstance(classes, list | tuple), "{name} = {value}: give a list of the hub's label numbers"
    ),
}


@dataclass(frozen=True)
class Task:
    """A text-classification task as a language model sees it.

    Attributes:
        name: for reports and file names.
        labels: C label names; a label's number is its place here.
        verbalizers: C strings as they stand right after the template, leading space included; one token each.
        template: the prompt around one text; contains `{text}` once and does not end with a space.
        generation_prompts: C public prefixes after which a model writes a text of that class; a model writes the same
            for classes whose prompts are equal, so synthesis then warns.
        prompt_style: "plain": a text continues its prompt; "chat": the prompts are instructions, which a model is given
            as a user's turn in its tokenizer's chat template. It concerns writing alone, not the prompt that is
            classified.
        min_words: real texts with fewer words are not drawn (phrase data sets such as SST-2 need it); at least 1.
        hub: where the rows are on the hub, if they are there.
        language: the texts' language as its ISO code, such as "en", for the data set's card; None: not said.

    Raises:
        UserError: fewer than two labels, lengths that differ, repeated labels, a template without `{text}`, a
            verbalizer that runs into the template's last word.
    """

    name: str
    labels: tuple[str, ...]
    verbalizers: tuple[str, ...]
    template: str = "{text} It was"
    generation_prompts: tuple[str, ...] = ()
    prompt_style: str = "plain"
    min_words: int = 1
    hub: HubSource | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, _TASK, f"task {short_repr(self.name)}: ")
        check_name(self.name, "the task's name")
        for name in ("labels", "verbalizers", "generation_prompts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "generation_prompts", self.generation_prompts or ("",) * len(self.labels))
        self._check_labels()
        self._check_verbalizers()

    def _check_labels(self) -> None:
        count = len(self.labels)
        require(count >= 2, f"task {self.name!r} has {count} class(es), at least 2 are needed: name the other labels")
        for label in self.labels:
            sound = label == label.strip() != ""
            require(sound, f"task {self.name!r} has the label {label!r}: give a name without spaces around it")
        require(len(set(self.labels)) == count, f"task {self.name!r} repeats a label in {self.labels}: name each once")
        for name in ("verbalizers", "generation_prompts"):
            given = len(getattr(self, name))
            require(given == count, f"task {self.name!r} has {given} {name} for {count} labels: give one a label")
        require(
            self.hub is None or self.hub.classes is None or len(self.hub.classes) == count,
            f"task {self.name!r} has {count} labels but another number of hub classes: give one class a label",
        )

    def _check_verbalizers(self) -> None:
        for label, verbalizer in zip(self.labels, self.verbalizers, strict=True):
            require(
                verbalizer.strip() != "",
                f"task {self.name!r} has an empty verbalizer for label {label!r}: give it a word",
            )
            require(
                not _runs_on(self.template.replace(SLOT, PROBE), verbalizer),
                f"task {self.name!r} has the verbalizer {verbalizer!r}, which runs into the template's last word: "
                f"begin it with a space, {' ' + verbalizer!r}",
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the gradient depends on: labels, verbalizers and template."""
        values = [self.labels, self.verbalizers, self.template]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()

    @property
    def instructions(self) -> tuple[str, ...]:
        """The C generation prompts without the words at their end that begin the text itself: all of a chat's.

        >>> prompts = ("A sad text: i feel", "Be happy.")
        >>> Task("x", ("no", "yes"), (" no", " yes"), generation_prompts=prompts).instructions
        ('A sad text:', 'Be happy.')
        """
        if self.prompt_style == "chat":
            return self.generation_prompts
        found = (INSTRUCTION.match(prompt) for prompt in self.generation_prompts)
        return tuple(match.group() if match else "" for match in found)

    @property
    def openings(self) -> tuple[str, ...]:
        """The C beginnings of a text that stand at the end of the generation prompts, behind `instructions`.

        >>> Task("x", ("no", "yes"), (" no", " yes"), generation_prompts=("A sad text: i feel", "Be happy.")).openings
        (' i feel', '')
        """
        asked = zip(self.generation_prompts, self.instructions, strict=True)
        openings = (prompt.removeprefix(instruction) for prompt, instruction in asked)
        return tuple(opening if opening.strip() else "" for opening in openings)

    def to_dict(self) -> dict:
        """The task as plain values, for manifests and YAML."""
        return asdict(self)


_TEXTS = Rule(
    lambda values: isinstance(values, list | tuple) and all(isinstance(value, str) for value in values),
    "{name} = {value}: give a list of strings",
)
_TASK = {
    **dict.fromkeys(("labels", "verbalizers", "generation_prompts"), _TEXTS),
    "name": Rule(lambda name: isinstance(name, str) and name != "", "its {name} is {value}: give a short text"),
    "template": Rule(
        lambda template: isinstance(template, str) and template.count(SLOT) == 1 and not template.endswith(" "),
        "the {name} {value} must contain {{text}} exactly once, and no space at its end: begin the verbalizers with it",
    ),
    "prompt_style": one_of(PROMPT_STYLES),
    "min_words": COUNT,
    "hub": Rule(lambda hub: isinstance(hub, HubSource), "{name} = {value}: give a HubSource('owner/data'), or None"),
    "language": Rule(
        lambda code: isinstance(code, str) and bool(re.fullmatch("[a-z]{2,3}", code)),
        "{name} = {value}: give an ISO code such as en",
    ),
}


def _runs_on(before: str, after: str) -> bool:
    """Whether two texts would join into one word, in a script of upper and lower case, which sets words apart."""
    joining = (mark.isdigit() or mark.lower() != mark.upper() for mark in (before[-1:], after[:1]) if mark)
    return bool(after) and all(joining)


def require_task(task) -> None:
    """Raise unless it is a `Task`, not its name or folder."""
    require_type(task, Task, "the task", "give what gradmm.load_task or gradmm.load_data returns")


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TaskTokens:
    """A task in the tokens of one tokenizer: the same ids for matching, filtering, fine-tuning and evaluation.

    Attributes:
        start: what the tokenizer itself puts before a text, see `start_tokens`.
        prefix, suffix: the template's tokens before and after the text.
        labels: C distinct verbalizer tokens.
        before: the template up to the text, with the space that `prefix` leaves to the text's first token.
    """

    task: Task
    tokenizer: Any
    start: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    labels: tuple[int, ...]
    before: str

    @cached_property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The C generation prompts, see `prompt`; made when a text is to be written, as only that needs them."""
        return tuple(map(self.prompt, range(len(self.labels))))

    def prompt(self, label: int, shots: Sequence[str] = (), separator: str = "\n") -> tuple[int, ...]:
        """The tokens after which a text of a class is written.

        Args:
            label: the class's number.
            shots: example texts. In the plain style each reads instruction, text, separator, and the prompt follows
                once more; in a chat they stand before the instruction in the user's turn.

        Raises:
            UserError: a chat with a tokenizer that has no chat template.
        """
        asked = self.task.generation_prompts[label]
        if self.task.prompt_style == "chat":
            return tuple(_encode(self.tokenizer, self._chat(separator.join([*shots, asked]))))
        instruction = self.task.instructions[label]
        space = " " if instruction[-1:].strip() else ""
        before = "".join(instruction + space + text + separator for text in shots)
        return tuple(from_start(self.tokenizer, [_encode(self.tokenizer, before + asked)])[0])

    @cached_property
    def openings(self) -> tuple[tuple[int, ...], ...]:
        """The tokens at the end of each of the C prompts that begin the text itself, see `Task.instructions`."""
        asked = zip(self.prompts, self.task.openings, strict=True)
        return tuple(prompt[_split(self.tokenizer, prompt, opening) :] for prompt, opening in asked)

    def _chat(self, instruction: str) -> str:
        """A user's turn and the beginning of the answer, in the chat template's own markup, begin token included."""
        require(
            bool(self.tokenizer.chat_template),
            f"task {self.task.name!r} has prompt_style = 'chat', but this model's tokenizer has no chat template: set "
            "prompt_style: plain in task.yaml, or take a model that was trained to follow instructions",
        )
        turns = [{"role": "user", "content": instruction}]
        # Without thinking where a template knows the word (Qwen3): the text is wanted, not the way to it; and on every
        # day the same.
        template = FIXED_DATE + self.tokenizer.get_chat_template()
        mend = "set prompt_style: plain in task.yaml"
        try:
            found = self.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template may raise anything
            cause = f"the chat template of this model's tokenizer fails ({first_line(error)})"
            raise UserError(f"{cause}: {mend}") from error
        require(
            instruction.strip() in found,
            f"the chat template of this model's tokenizer leaves out the prompt {short_repr(instruction)}: {mend}",
        )
        return next((found.rstrip() + said for end, said in ANSWERS.items() if found.rstrip().endswith(end)), found)

    def encode(self, text: str) -> list[int]:
        """The tokens of one text as it stands in the template; special tokens spelt out in it are plain text."""
        head = self.before.rstrip(" ")
        behind = self.before[len(head) :] + text
        found = _continuation(self.tokenizer, head, behind, plain=True)
        return _encode(self.tokenizer, behind, plain=True) if found is None else found

    def sequence(self, text: str) -> list[int]:
        """The tokens of the whole prompt around one text; the label's token comes next."""
        return [*self.start, *self.prefix, *self.encode(text), *self.suffix]

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens back to text, without special tokens and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def tokenize_task(task: Task, tokenizer) -> TaskTokens:
    """Encode a task's template, verbalizers and prompts once.

    Raises:
        UserError: a verbalizer of several tokens (its pieces and candidates are named), two that share a token, or a
            template that runs into the text.
    """
    require_task(task)
    before, after = task.template.split(SLOT)
    tail = _continuation(tokenizer, before + PROBE, after)
    if tail is None:
        raise UserError(
            f"what follows the text in the template {task.template!r} joins the text's last token: begin it with a "
            "space or a line break"
        )
    return TaskTokens(
        task=task,
        tokenizer=tokenizer,
        start=start_tokens(tokenizer),
        prefix=tuple(_encode(tokenizer, before.rstrip(" "))),
        suffix=tuple(tail),
        labels=_label_tokens(task, tokenizer),
        before=before,
    )


def start_tokens(tokenizer) -> tuple[int, ...]:
    """What a tokenizer itself puts before a text: a begin-of-text token or nothing. What it puts behind one is not
    used.
    """
    whole, plain = (list(tokenizer(PROBE, add_special_tokens=special)["input_ids"]) for special in (True, False))
    places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    return tuple(whole[: places[0]]) if places else ()


def from_start(tokenizer, sequences: Sequence[Sequence[int]], least: int = 1) -> list[list[int]]:
    """Token sequences as a language model reads them from the beginning: behind `start_tokens`, unless they begin with
    these.

    Where there are none and a sequence has fewer than `least` tokens (an empty prompt; a text of one token of which the
    perplexity is asked for), the tokenizer's begin-of-text token stands before it, or else its end-of-text token.
    """
    start, ends = start_tokens(tokenizer), (tokenizer.bos_token_id, tokenizer.eos_token_id)
    alone = start or tuple(token for token in ends if token is not None)[:1]
    before = (alone if len(ids) < least else start for ids in sequences)
    return [
        [*(() if tuple(ids[: len(some)]) == some else some), *ids] for some, ids in zip(before, sequences, strict=True)
    ]


def _encode(tokenizer, text: str, plain: bool = False) -> list[int]:
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False) if text else {}
    return list(found.get("input_ids", ()))


def _split(tokenizer, prompt: Sequence[int], opening: str) -> int:
    """Where the tokens of an opening begin in a prompt's: the last place from which the tokens hold all of it."""
    behind = (tokenizer.decode(list(prompt[at:]), clean_up_tokenization_spaces=False) for at in range(len(prompt) + 1))
    whole = ((at, text.strip()) for at, text in enumerate(behind) if BROKEN not in text)
    return max((at for at, text in whole if len(text) >= len(opening.strip())), default=0)


def _continuation(tokenizer, before: str, after: str, plain: bool = False) -> list[int] | None:
    """The tokens of `after` as it stands behind `before`; None if the two share a token."""
    left, whole = _encode(tokenizer, before, plain), _encode(tokenizer, before + after, plain)
    return whole[len(left) :] if whole[: len(left)] == left else None


def _label_tokens(task: Task, tokenizer) -> tuple[int, ...]:
    prompt = task.template.replace(SLOT, PROBE)
    pieces = [_continuation(tokenizer, prompt, verbalizer) for verbalizer in task.verbalizers]
    tokens = [_single(tokenizer, some) for some in pieces]
    faults = {}
    for number, (token, verbalizer) in enumerate(zip(tokens, task.verbalizers, strict=True)):
        if token is None:
            parts = [tokenizer.decode([piece]) for piece in pieces[number] or _encode(tokenizer, verbalizer)]
            faults[number] = f"is {len(parts)} token(s) {parts} after the template, 1 known token of its own is needed"
        elif tokens.index(token) != number:
            first = task.labels[tokens.index(token)]
            faults[number] = f"is the same token as label {first!r}'s, all {len(tokens)} must differ"
    if faults:
        raise UserError(_mended(task, tokenizer, tokens, faults))
    return tuple(token for token in tokens if token is not None)


def _mended(task: Task, tokenizer, tokens: list[int | None], faults: Mapping[int, str]) -> str:
    """What is wrong with some verbalizers, with words that would do, all different, and a task file that has them."""
    said, verbalizers = [], [*task.verbalizers]
    for number, better in _better(task, tokenizer, tokens, [*faults]).items():
        use = f"use one such as {better}" if better else "the tokenizer has no other word of one token"
        label, verbalizer = task.labels[number], verbalizers[number]
        said.append(f"the verbalizer {verbalizer!r} of label {label!r} {faults[number]}: {use}")
        verbalizers[number] = [*better, verbalizer][0]
    usual = Task(task.name, task.labels, tuple(f" {label}" for label in task.labels)).to_dict()
    values = replace(task, verbalizers=tuple(verbalizers), hub=None).to_dict()
    always = ("labels", "verbalizers", "template")
    plain = {key: value for key, value in values.items() if key in always or value != usual[key]}
    return (
        f"{'; '.join(said)}; write this line, with words that suit the classes, into task.yaml in the data's folder "
        f"or into a file that you give as the task: {json.dumps(plain, ensure_ascii=False)}"
    )


def _single(tokenizer, pieces: list[int] | None) -> int | None:
    """The one ordinary token, or None."""
    return pieces[0] if pieces and len(pieces) == 1 and pieces[0] not in tokenizer.all_special_ids else None


def _better(task: Task, tokenizer, tokens: Iterable[int | None], faulty: Sequence[int]) -> dict[int, list[str]]:
    """For each verbalizer that fails up to three words that would do in its place, none given twice."""
    prompt = task.template.replace(SLOT, PROBE)
    known = {tokenizer.decode([token]).strip() for token in range(min(tokens_of(tokenizer), 300_000))}
    known_words = sorted(filter(str.isalpha, known), key=lambda word: (word != word.lower(), len(word), word))
    words = {word.strip().casefold() for number, word in enumerate(task.verbalizers) if number not in faulty}
    taken = {*tokens}

    def takes(form: str) -> bool:
        """Whether it is one token and a word that no other verbalizer has, in whatever case; it then is taken."""
        word, token = form.strip().casefold(), _single(tokenizer, _continuation(tokenizer, prompt, form))
        if token is None or token in taken or word in words or _runs_on(prompt, form):
            return False
        taken.add(token)
        words.add(word)
        return True

    count = 3 if len(faulty) <= 3 else 1
    forms = {number: _forms(task.verbalizers[number], task.labels[number], known_words) for number in faulty}
    return {number: list(islice(filter(takes, some), count)) for number, some in forms.items()}


def _forms(verbalizer: str, label: str, known: Sequence[str]) -> Iterator[str]:
    """Spellings of verbalizer, label and the words in them, the last first, then known words by their likeness."""
    whole = [verbalizer.strip(), label.strip()]
    parts = [part for word in whole for part in reversed(re.findall(r"[^\W\d_]+", word))]
    parts += LETTERS if whole[0].isdecimal() else ()
    spellings = [form for word in [*whole, *parts] for form in (word, word.lower(), word.capitalize())]
    start = (parts or whole)[0].lower()
    near = sorted(known, key=lambda word: -len(os.path.commonprefix([word.lower(), start])))
    spaces = (" ", "") if verbalizer.startswith(" ") else ("", " ")
    return (space + word for words in (spellings, near) for space in spaces for word in words)


# ---------------------------------------------------------------- prompts


def warn_of_equal_prompts(task: Task) -> None:
    """Warn where classes have the same generation prompt, most often none: nothing tells a model what to write for
    which.
    """
    asked = [" ".join(prompt.lower().split()) for prompt in task.generation_prompts]
    alike = [label for label, prompt in zip(task.labels, asked, strict=True) if asked.count(prompt) > 1]
    if not alike:
        return
    verbalizers = ["" if verbalizer.strip() in LETTERS else verbalizer for verbalizer in task.verbalizers]
    named = zip(task.labels, verbalizers, strict=True)
    words = [_name_of(label) or _name_of(word) or f"({label}: say what it is)" for label, word in named]
    warnings.warn(
        f"task {task.name!r} has the same generation prompt for the labels {', '.join(map(short_repr, alike))}, so a "
        "model writes them the same kind of text: write into task.yaml such as generation_prompts: "
        f"{json.dumps(_prompts_of(words), ensure_ascii=False)}",
        stacklevel=1,  # one place, so that it is said once, by whoever looks first
    )


def _named_prompts(labels: Sequence[str]) -> tuple[str, ...]:
    """Public prompts from labels that are names; none where one is a mere number."""
    names = [_name_of(label) for label in labels]
    return _prompts_of(names) if all(names) else ()


def _prompts_of(names: Sequence[str]) -> tuple[str, ...]:
    """Prompts that name each class; sentiments are asked for as reviews."""
    felt = _sentiments(names)
    return tuple(REVIEW_PROMPT.format(name) for name in felt) or tuple(NAMED_PROMPT.format(name) for name in names)


def _sentiments(names: Sequence[str]) -> tuple[str, ...]:
    """What names of classes mean if all are sentiments of their own, such as neg and pos; else nothing."""
    found = tuple(SENTIMENTS.get(name.lower(), "") for name in names)
    return found if all(found) and len(set(found)) == len(found) else ()


def _name_of(label: str) -> str:
    """A label as words, empty if it has no letter."""
    return label.replace("_", " ").strip() if any(letter.isalpha() for letter in label) else ""


# ---------------------------------------------------------------- registry

_ALL = {split: split for split in SPLITS}


def _with_labels(task: Task, labels: tuple[str, ...]) -> Task:
    """A registered task with some of its labels, in this order: the rows' numbers count in that order."""
    places = [task.labels.index(label) for label in labels]
    verbalizers, prompts = (
        tuple(values[place] for place in places) for values in (task.verbalizers, task.generation_prompts)
    )
    return replace(task, labels=labels, verbalizers=verbalizers, generation_prompts=prompts, hub=None)


_SST2 = Task(
    name="sst2",
    labels=("negative", "positive"),
    verbalizers=(" bad", " great"),
    template="{text} it was",
    generation_prompts=("this movie was bad .", "this movie was great ."),
    min_words=6,
    hub=HubSource("stanfordnlp/sst2", text="sentence", splits={"train": "train", "test": "validation"}),
    language="en",
)
_EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
_EMOTION = Task(
    name="emotion",
    labels=_EMOTIONS,
    verbalizers=tuple(f" {name}" for name in _EMOTIONS),
    template="{text} The emotion is",
    generation_prompts=tuple(f"A message full of {name}: i feel" for name in _EMOTIONS),
    hub=HubSource("dair-ai/emotion", splits=_ALL, config="split"),
    language="en",
)
_NEWS = ("world", "sports", "business", "technology")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _SST2,
        replace(
            _SST2,
            name="rotten_tomatoes",
            hub=HubSource("cornell-movie-review-data/rotten_tomatoes", splits=_ALL),
        ),
        _EMOTION,
        replace(
            _with_labels(_EMOTION, ("sadness", "joy")),
            name="emotion2",
            hub=HubSource("dair-ai/emotion", splits=_ALL, config="split", classes=(0, 1)),
        ),
        Task(
            name="ag_news",
            labels=_NEWS,
            verbalizers=tuple(f" {name}" for name in _NEWS),
            template="{text} This news is about",
            generation_prompts=tuple(f"A short news report about {name}:" for name in ("world politics", *_NEWS[1:])),
            hub=HubSource("fancyzhx/ag_news", splits={"train": "train", "test": "test"}, classes=(0, 1, 2, 3)),
            language="en",
        ),
    )
}


def load_task(task: "str | Path | Task | Mapping") -> Task:
    """Find a task: a `Task`, a mapping of its fields, a registered name, a YAML file, or a folder of rows.

    A folder's task is its `task.yaml`; without one, a registered task of the folder's name with the same labels;
    without that, its labels (from `labels.json` or its rows) serve as verbalizers, letters where they are numbers, bad
    and great for negative and positive; labels that are names give the generation prompts too.

    Raises:
        UserError: nothing of that name, an unknown field, fields that do not fit together, or rows whose labels make no
            classes (file and line are named).

    >>> task = load_task({"labels": ["bad", "good"], "verbalizers": [" bad", " great"], "template": "{text} It was"})
    >>> task.template.format(text="We stayed an hour."), task.verbalizers
    ('We stayed an hour. It was', (' bad', ' great'))
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return _task_from_mapping(task, str(task.get("name", "task")))
    if str(task) == "demo":
        return _task_from_folder(DEMO)
    path = files.as_path(task, "the task")
    if path.is_dir():
        return _task_from_folder(path)
    if path.is_file():
        return _task_from_mapping(files.read_yaml(path), plain_name(path.stem))
    require(
        str(task) in TASKS,
        f"there is no task {short_repr(str(task))}: give one of {', '.join(['demo', *TASKS])}, a YAML file, or a "
        "folder with train.jsonl",
    )
    return TASKS[str(task)]


def _task_from_mapping(values, name: str) -> Task:
    values = {"name": name, **_known_fields(values, Task, ("labels", "verbalizers"), f"task {name!r}")}
    if values.get("hub") is not None:
        hub = _known_fields(values["hub"], HubSource, ("path",), f"the hub source of task {name!r}")
        values["hub"] = HubSource(**hub)
    return Task(**values)


def _known_fields(values, kind: type, needed: tuple[str, ...], what: str) -> dict:
    """The values as keyword arguments of a dataclass."""
    require(isinstance(values, Mapping), f"{what} is {short_repr(values)}: give a mapping with {' and '.join(needed)}")
    known = {item.name for item in fields(kind)}
    unknown = [short_repr(key) for key in values if key not in known]
    require(
        not unknown, f"{what} has the unknown field {', '.join(unknown)}: the fields are {', '.join(sorted(known))}"
    )
    missing = [name for name in needed if name not in values]
    require(not missing, f"{what} lacks {' and '.join(missing)}: add what is missing")
    return dict(values)


def _task_from_folder(folder: Path) -> Task:
    name, names = folder.resolve().name, read_label_names(folder)
    return written_task(folder) or implied_task(name, lambda: read_rows(folder)["train"], names)


def written_task(folder: Path) -> Task | None:
    """The task that a folder's `task.yaml` describes, if it has one.

    Raises:
        UserError: a `task.yaml` that is no task, or a file that looks like one and is not read.
    """
    given = folder / "task.yaml"
    if given.is_file():
        return _task_from_mapping(files.read_yaml(given), plain_name(folder.resolve().name))
    others = [path.name for path in (folder / "task.yml", folder / "task.json") if path.is_file()]
    require(
        not others,
        f"{folder} holds {', '.join(others)}, which is not read: rename it to task.yaml or move it elsewhere",
    )
    return None


def implied_task(
    name: str, rows: Callable[[], Sequence[Row]], names: Mapping[str, str], in_memory: bool = False
) -> Task:
    """The task that data imply: of a registered name with the same labels, or else one made of the labels.

    Args:
        name: of the data.
        rows: gives the train rows; not asked where there are names.
        names: what the data call each label, see `rows.read_label_names`; empty: the rows' labels are the names.
        in_memory: whether the rows come from a `datasets.Dataset`, beside which no `labels.json` can stand.

    Raises:
        UserError: rows whose labels make no classes.
    """
    labels = tuple(dict.fromkeys(names.values())) or _labels_of(rows(), in_memory)
    namesake = TASKS.get(name)
    if namesake is not None and set(labels) <= set(namesake.labels):
        return _with_labels(namesake, labels)
    if namesake is not None and labels == tuple(str(number) for number in range(len(namesake.labels))):
        return replace(namesake, hub=None)
    felt = _sentiments(labels)
    if set(felt) == set(SENTIMENT_VERBALIZERS):
        verbalizers = tuple(SENTIMENT_VERBALIZERS[sentiment] for sentiment in felt)
        return Task(plain_name(name), labels, verbalizers, generation_prompts=_named_prompts(labels))
    words = felt or labels
    if all(label.isdecimal() for label in labels) and len(labels) <= len(LETTERS):
        words = LETTERS  # a number is seldom one token behind a space
    verbalizers = tuple(f" {word}" for word in words[: len(labels)])
    return Task(plain_name(name), labels, verbalizers, "{text} Category:", _named_prompts(labels))


def _labels_of(rows: Sequence[Row], in_memory: bool) -> tuple[str, ...]:
    """The names of the classes from the labels of train rows."""
    first: dict[int | str, Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    require(
        len(first) > 1,
        f"all {len(rows)} rows of {_file_of(rows)} have the label {rows[0].label!r}, at least 2 classes are "
        "needed: add rows of others",
    )
    names = sorted(label for label in first if isinstance(label, str))
    numbers = sorted(label for label in first if isinstance(label, int))
    if not numbers:
        _refuse_twins(names, first)
        return tuple(names)
    if names or numbers != list(range(len(numbers))):
        raise UserError(_unnamed(_file_of(rows), [*numbers, *names], in_memory))
    return tuple(map(str, numbers))


def _refuse_twins(names: Iterable[str], first: Mapping[int | str, Row]) -> None:
    """Raise for two names that differ in case or spaces alone: no class of its own, but a slip."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", " ".join(name.casefold().split())), name)
        require(
            other == name,
            f"{first[name].origin} has the label {name!r} and {first[other].origin} {other!r}, which read the same "
            "but for case or spaces: write one of them in all rows",
        )


def _file_of(rows: Sequence[Row]) -> str:
    return rows[0].origin.rpartition(", ")[0]


def _unnamed(place: str, labels: Sequence[int | str], in_memory: bool) -> str:
    """That labels are no names and no numbers from 0, with names that they can have."""
    names = {str(label): label if isinstance(label, str) else f"class {label}" for label in labels[:MOST_NAMED]}
    if len(labels) == 2 and all(isinstance(label, int) for label in labels):
        names = dict(zip(names, ("negative", "positive"), strict=True))
    beside = f"name them in labels.json beside it, {json.dumps({'labels': names}, ensure_ascii=False)}"
    before = f"name them before, as in data.map(lambda row: {{'label': {names}[str(row['label'])]}})"
    return (
        f"the labels of {place} are {short_repr(list(labels))}: use names, or every number from 0, or "
        f"{before if in_memory else beside}, with your own names for the classes"
    )
