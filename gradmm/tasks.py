"""Classification tasks: labels, template, verbalizers and generation prompts, and their tokens.

Knows tokenizers but no language model. Letters: C classes, V vocabulary.
An example reads `template.format(text=...)` followed by its label's verbalizer, one token.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from gradmm import files
from gradmm.errors import UserError, require

SLOT = "{text}"
PROBE = "some words"


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows live on the Hugging Face hub.

    Attributes:
        path: the data set's id.
        text, label: the columns' names.
        splits: our split -> the hub's split; a split that is missing is carved from train by content hash.
        config: the data set's configuration, if it has several.
        classes: the hub's label numbers, in the order of the task's labels; rows of other classes are left out.
        revision: a commit, tag or branch; None is the default branch (the commit found is recorded).
    """

    path: str
    text: str = "text"
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: {s: s for s in ("train", "validation", "test")})
    config: str | None = None
    classes: tuple[int, ...] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """A text-classification task as a language model sees it.

    Attributes:
        name: for reports and file names.
        labels: C label names; a label's number is its place here.
        verbalizers: C strings as they stand right after the template, leading space included; one token each.
        template: the prompt around one text; contains `{text}` once.
        generation_prompts: C public prefixes after which a model writes a text of that class; may be empty strings.
        min_words: real texts with fewer words are not drawn (phrase data sets such as SST-2 need it); at least 1.
        hub: where the rows are on the hub, if they are there.

    Raises:
        UserError: fewer than two labels, lengths that differ, repeated labels, a template without `{text}`.
    """

    name: str
    labels: tuple[str, ...]
    verbalizers: tuple[str, ...]
    template: str = "{text} It was"
    generation_prompts: tuple[str, ...] = ()
    min_words: int = 1
    hub: HubSource | None = None

    def __post_init__(self) -> None:
        prompts = self.generation_prompts or ("",) * len(self.labels)
        for name, values in (("labels", self.labels), ("verbalizers", self.verbalizers), ("generation_prompts", prompts)):
            require(
                not isinstance(values, str) and all(isinstance(value, str) for value in values),
                f"task {self.name!r} has {name} = {values!r}: give a list of strings",
            )
            object.__setattr__(self, name, tuple(values))
        self._check()

    def _check(self) -> None:
        count = len(self.labels)
        require(count >= 2, f"task {self.name!r} has {count} class(es), at least 2 are needed: name the other labels")
        require(len(set(self.labels)) == count, f"task {self.name!r} repeats a label in {self.labels}: name each once")
        for name in ("verbalizers", "generation_prompts"):
            given = len(getattr(self, name))
            require(given == count, f"task {self.name!r} has {given} {name} for {count} labels: give one a label")
        require(
            isinstance(self.template, str) and self.template.count(SLOT) == 1,
            f"task {self.name!r} has the template {self.template!r}: it must contain {SLOT} exactly once",
        )
        require(
            isinstance(self.min_words, int) and self.min_words >= 1,
            f"task {self.name!r} has min_words = {self.min_words!r}: give a whole number of at least 1",
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the gradient depends on: labels, verbalizers and template."""
        values = [self.labels, self.verbalizers, self.template]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()

    def to_dict(self) -> dict:
        """The task as plain values, for manifests and YAML."""
        return asdict(self)


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TaskTokens:
    """A task in the tokens of one tokenizer: the same ids for matching, filtering, fine-tuning and evaluation.

    Attributes:
        start: the begin-of-text token, if the tokenizer has one.
        head, tail: the template's tokens before and after the text.
        labels: C distinct verbalizer tokens.
        prompts: C generation prompts, each with `start` before it.
        space: what stands between the template's head and the text.
    """

    tokenizer: object
    start: tuple[int, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]
    labels: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    space: str

    def encode(self, text: str) -> list[int]:
        """The tokens of one text alone."""
        return _encode(self.tokenizer, self.space + text)

    def sequence(self, text: str) -> list[int]:
        """The tokens of the whole prompt around one text; the label's token comes next."""
        return [*self.start, *self.head, *self.encode(text), *self.tail]

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens back to text, without special tokens and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def tokenize_task(task: Task, tokenizer) -> TaskTokens:
    """Encode a task's template, verbalizers and prompts once.

    Raises:
        UserError: a verbalizer of several tokens (its pieces and candidates are named) or two that share a token.
    """
    before, after = task.template.split(SLOT)
    head_text = before.rstrip(" ")
    space = before[len(head_text) :]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = () if begin is None else (begin,)
    tail = tuple(_continuation(tokenizer, PROBE, after)) if after else ()
    labels = _verbalizer_tokens(task, tokenizer, PROBE + after)
    return TaskTokens(
        tokenizer=tokenizer,
        start=start,
        head=tuple(_encode(tokenizer, head_text)) if head_text else (),
        tail=tail,
        labels=labels,
        prompts=tuple(start + tuple(_encode(tokenizer, prompt)) for prompt in task.generation_prompts),
        space=space,
    )


def _encode(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _continuation(tokenizer, before: str, after: str) -> list[int]:
    """The tokens of `after` as it stands behind `before`."""
    left, whole = _encode(tokenizer, before), _encode(tokenizer, before + after)
    return whole[len(left) :] if whole[: len(left)] == left else _encode(tokenizer, after)


def _verbalizer_tokens(task: Task, tokenizer, before: str) -> tuple[int, ...]:
    found = {}
    for label, verbalizer in zip(task.labels, task.verbalizers, strict=True):
        pieces = _continuation(tokenizer, before, verbalizer)
        if len(pieces) != 1 or pieces[0] == getattr(tokenizer, "unk_token_id", None):
            shown = [tokenizer.decode([piece]) for piece in pieces]
            better = _candidates(tokenizer, before, verbalizer, label, taken=set(found))
            raise UserError(
                f"the verbalizer {verbalizer!r} of label {label!r} is {len(pieces)} tokens {shown} after the template, "
                f"1 known token is needed: use one such as {better}"
            )
        if pieces[0] in found:
            better = _candidates(tokenizer, before, verbalizer, label, taken=set(found))
            raise UserError(
                f"the verbalizer {verbalizer!r} of label {label!r} is the same token as label {found[pieces[0]]!r}'s, "
                f"all {len(task.labels)} must differ: use one such as {better}"
            )
        found[pieces[0]] = label
    return tuple(found)


def _candidates(tokenizer, before: str, verbalizer: str, label: str, taken: set[int], count: int = 3) -> list[str]:
    """Single tokens close to a verbalizer that fails: other spellings first, then the vocabulary's longest shared starts."""
    words = [verbalizer.strip(), label.strip()]
    spellings = [space + form for word in words for space in (" ", "") for form in (word, word.lower(), word.capitalize())]
    start = words[0].lower()[:3]
    near = {tokenizer.decode([token]) for token in range(min(len(tokenizer), 300_000))} if start else set()
    near = {form for form in near if form.strip().isalpha() and form.strip().lower().startswith(start[:1])}
    shared = sorted(near, key=lambda form: (-_shared_start(form.strip().lower(), words[0].lower()), form))
    usable = []
    for form in [*spellings, *shared]:
        pieces = _continuation(tokenizer, before, form)
        if form != verbalizer and form.strip() and len(pieces) == 1 and pieces[0] not in taken and form not in usable:
            usable.append(form)
        if len(usable) == count:
            break
    return usable


def _shared_start(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ---------------------------------------------------------------- registry

_SENTIMENT = {"labels": ("negative", "positive"), "verbalizers": (" bad", " great"), "template": "{text} it was"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            **_SENTIMENT,
            generation_prompts=("this movie was bad .", "this movie was great ."),
            min_words=6,
            hub=HubSource("stanfordnlp/sst2", text="sentence", splits={"train": "train", "test": "validation"}),
        ),
        Task(
            name="rotten_tomatoes",
            **_SENTIMENT,
            generation_prompts=("this movie was bad .", "this movie was great ."),
            min_words=6,
            hub=HubSource("cornell-movie-review-data/rotten_tomatoes"),
        ),
        Task(
            name="emotion",
            labels=("sadness", "joy", "love", "anger", "fear", "surprise"),
            verbalizers=(" sadness", " joy", " love", " anger", " fear", " surprise"),
            template="{text} The emotion is",
            generation_prompts=tuple(
                f"A message full of {name}: i feel" for name in ("sadness", "joy", "love", "anger", "fear", "surprise")
            ),
            hub=HubSource("dair-ai/emotion", config="split"),
        ),
        Task(
            name="emotion2",
            labels=("sadness", "joy"),
            verbalizers=(" sadness", " joy"),
            template="{text} The emotion is",
            generation_prompts=("A message full of sadness: i feel", "A message full of joy: i feel"),
            hub=HubSource("dair-ai/emotion", config="split", classes=(0, 1)),
        ),
        Task(
            name="ag_news",
            labels=("world", "sports", "business", "technology"),
            verbalizers=(" world", " sports", " business", " technology"),
            template="{text} This news is about",
            generation_prompts=tuple(
                f"A short news report about {name}:" for name in ("world politics", "sports", "business", "technology")
            ),
            hub=HubSource("fancyzhx/ag_news", splits={"train": "train", "test": "test"}),
        ),
    )
}


def load_task(task: "str | Path | Task | Mapping") -> Task:
    """Find a task: a `Task`, a mapping of its fields, a registered name, a YAML file, or a folder of JSON lines.

    A folder's task is its `task.yaml`; without one, a registered task of the folder's name with the same labels; without
    that, its labels (from `labels.json` or its rows) serve as verbalizers.

    Raises:
        UserError: nothing of that name, an unknown field, or fields that do not fit together.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return _task_from_mapping(task, str(task.get("name", "task")))
    path = Path(task)
    if path.is_dir():
        return _task_from_folder(path)
    if path.is_file():
        return _task_from_mapping(files.read_yaml(path), path.stem)
    if str(task) == "demo":
        return _task_from_folder(DEMO)
    require(
        str(task) in TASKS,
        f"there is no task {str(task)!r}: give one of {', '.join(['demo', *TASKS])}, a YAML file, or a folder with train.jsonl",
    )
    return TASKS[str(task)]


DEMO = Path(__file__).parent / "data" / "demo"


def _task_from_mapping(values, name: str) -> Task:
    require(isinstance(values, Mapping), f"task {name!r} is {type(values).__name__}: give a mapping with labels and verbalizers")
    known = {item.name for item in fields(Task)}
    unknown = sorted(set(values) - known)
    require(not unknown, f"task {name!r} has the unknown field {', '.join(map(repr, unknown))}: the fields are {', '.join(sorted(known))}")
    missing = sorted({"labels", "verbalizers"} - set(values))
    require(not missing, f"task {name!r} lacks {', '.join(missing)}: give both labels and verbalizers")
    values = {"name": name, **values}
    if isinstance(values.get("hub"), Mapping):
        values["hub"] = _hub_from_mapping(values["hub"], name)
    return Task(**values)


def _hub_from_mapping(values: Mapping, name: str) -> HubSource:
    known = {item.name for item in fields(HubSource)}
    unknown = sorted(set(values) - known)
    require(
        not unknown and "path" in values,
        f"task {name!r} has the hub fields {sorted(values)}: path is needed, and the fields are {', '.join(sorted(known))}",
    )
    classes = values.get("classes")
    return HubSource(**{**values, "classes": None if classes is None else tuple(classes)})


def _task_from_folder(folder: Path) -> Task:
    given = folder / "task.yaml"
    if given.is_file():
        return _task_from_mapping(files.read_yaml(given), folder.name)
    labels = _labels_of(folder)
    namesake = TASKS.get(folder.resolve().name)
    if namesake is not None and set(labels) <= set(namesake.labels):
        return replace(namesake, hub=None)
    if labels == ("negative", "positive"):
        return Task(folder.resolve().name, labels, (" bad", " great"))
    return Task(folder.resolve().name, labels, tuple(f" {label}" for label in labels), template="{text} Category:")


def _labels_of(folder: Path) -> tuple[str, ...]:
    named = folder / "labels.json"
    if named.is_file():
        value = files.read_json(named)
        names = value.get("labels") if isinstance(value, Mapping) else value
        require(
            isinstance(names, list) and all(isinstance(name, str) for name in names),
            f"{named} holds no list of label names: write {{\"labels\": [\"negative\", \"positive\"]}}",
        )
        return tuple(names)
    rows = files.read_json_lines(_train_file(folder))
    values = {row.get("label") for row in rows if isinstance(row, Mapping) and isinstance(row.get("label"), str | int)}
    if values and all(isinstance(value, int) for value in values):
        return tuple(str(number) for number in range(max(max(values) + 1, 0)))
    return tuple(sorted(str(value) for value in values))


def _train_file(folder: Path) -> Path:
    path = folder / "train.jsonl"
    require(path.is_file(), f"{folder} has no train.jsonl: put rows such as {{\"text\": \"...\", \"label\": 0}} there, one a line")
    return path
