"""A causal language model as a classifier: the likeliest label token after the prompt, and how often it is right.

Same template and same label tokens as where gradients are matched. Letters: N examples, C classes, D hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradmm.data import Example, Splits, check_examples
from gradmm.errors import require, require_texts, require_type, require_whole
from gradmm.models import Model, require_model
from gradmm.readability import count_words
from gradmm.rows import SPLITS
from gradmm.tasks import PROBE, Task, TaskTokens, tokenize_task

TOKENS_PER_BATCH = 1024  # on a CPU


@dataclass(frozen=True)
class Evaluation:
    """What a model does on N examples.

    Attributes:
        labels, predictions: N label numbers each.
        accuracy: share of predictions that are right.
        macro_f1: mean over the task's C classes of F1; a class that is neither present nor predicted counts 0.
        loss: mean cross-entropy over the C label tokens, in nats.
    """

    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    accuracy: float
    macro_f1: float
    loss: float


@dataclass(frozen=True)
class Encoded:
    """Examples in tokens: N sequences, prompt included, and N labels."""

    sequences: list[list[int]]
    labels: Tensor

    @staticmethod
    def of(model: Model, task: Task, tokens: TaskTokens, examples: Iterable, what: str) -> "Encoded":
        """Encode and check examples once.

        Raises:
            UserError: no examples, a label that the task does not have, or a text too long for the model.
        """
        examples = check_examples(examples, task, f"{what} example")
        require(len(examples) > 0, f"there are 0 {what} examples, at least 1 is needed: give some")
        sequences = [tokens.sequence(example.text) for example in examples]
        model.check_lengths(sequences, [example.origin for example in examples])
        return Encoded(sequences, torch.tensor([example.label for example in examples], device=model.device))


def check_fit(model: Model, task: Task, splits: Splits, needed: Sequence[str] = ("validation", "test")) -> None:
    """Check, before the model's first pass, that data, task and model go together: to call right after they are loaded.

    Args:
        needed: the splits that will be used whole; texts drawn from another one are checked where they are used.

    Raises:
        UserError: a verbalizer that is not one token (see `tokenize_task`), a needed split without a text of
            `task.min_words` words (and why), or with a text longer than the model's context (file, line and how many).
    """
    require_model(model)
    require_type(splits, Splits, "the splits", "give what gradmm.load_data returns")
    unknown = [name for name in needed if name not in SPLITS]
    require(not unknown, f"the splits {unknown} are not known: use some of {', '.join(SPLITS)}")
    tokens = tokenize_task(task, model.tokenizer)
    because = f" ({'; '.join(splits.notes)})" if splits.notes else ""
    for name in needed:
        examples = getattr(splits, name)
        usable = name == "test" or any(count_words(example.text) >= task.min_words for example in examples)
        require(len(examples) > 0, f"{splits.source} has no {name} text{because}: put others into {name}.jsonl")
        require(
            usable,
            f"{splits.source} has no {name} text of the {task.min_words} words that task {task.name!r} asks for: "
            "lower its min_words",
        )
        _check_lengths(model, tokens, examples)


def _check_lengths(model: Model, tokens: TaskTokens, examples: Sequence[Example]) -> None:
    """As `Model.check_lengths`; texts of fewer bytes than the context has tokens are short enough without a look."""
    around = len(tokens.sequence(PROBE))
    some = [example for example in examples if around + len(example.text.encode()) > model.context]
    places = [example.origin or "a text" for example in some]
    model.check_lengths([tokens.sequence(example.text) for example in some], places)


def evaluate(model: Model, task: Task, examples: Iterable, tokens_per_batch: int | None = None) -> Evaluation:
    """Predict the label of each example: the likeliest of the C verbalizers after the prompt.

    Args:
        examples: whatever `check_examples` takes, such as a split of `load_data` or the `kept` of a synthesis.
        tokens_per_batch: tokens of one pass, padding included, which change speed and memory alone; None suits the
            device.

    Raises:
        UserError: no examples, a label that the task does not know, or a text longer than the model's context.
    """
    require_model(model)
    if tokens_per_batch is not None:
        tokens_per_batch = require_whole(tokens_per_batch, "tokens_per_batch", 1)
    tokens = tokenize_task(task, model.tokenizer)
    return score(model, tokens, Encoded.of(model, task, tokens, examples, "test"), tokens_per_batch)


def evaluate_calibrated(model: Model, task: Task, examples: Iterable, texts: Sequence[str]) -> Evaluation:
    """As `evaluate`, with each verbalizer's mean log-probability over unlabelled texts taken out first.

    It takes the model's preference for some verbalizer away and teaches it nothing, so what a training set adds shows
    above this and not above `evaluate` (after Zhao et al. 2021, with task texts for content-free ones).

    Args:
        texts: unlabelled and apart from the examples; their classes should be about as frequent as the examples'.

    Raises:
        UserError: as `evaluate`; no texts.
    """
    require_model(model)
    tokens, texts = tokenize_task(task, model.tokenizer), require_texts(texts, "the texts to calibrate on")
    require(
        len(texts) > 0,
        "there are 0 texts to calibrate on, at least 1 is needed: give some, such as the validation texts",
    )
    data = Encoded.of(model, task, tokens, examples, "test")
    return score_calibrated(model, tokens, data, [tokens.sequence(text) for text in texts])[1]


def label_preference(model: Model, tokens: TaskTokens, texts: Sequence[str]) -> Tensor:
    """The mean of `label_logs` over texts: (C,), float32 at least."""
    return label_logs(model, tokens, texts).mean(0)


def label_logs(model: Model, tokens: TaskTokens, texts: Sequence[str]) -> Tensor:
    """The log-probability of each label token behind each text, softmax over these alone: (N, C), float32 at least."""
    return _label_logits(model, tokens, [tokens.sequence(text) for text in texts]).log_softmax(-1)


def score(model: Model, tokens: TaskTokens, data: Encoded, tokens_per_batch: int | None = None) -> Evaluation:
    """As `evaluate`, of examples that are encoded already."""
    tokens_per_batch = tokens_per_batch or model.tokens_at_once(TOKENS_PER_BATCH)
    return _judged(_label_logits(model, tokens, data.sequences, tokens_per_batch), data.labels)


def score_calibrated(
    model: Model, tokens: TaskTokens, data: Encoded, unlabelled: Sequence[Sequence[int]]
) -> tuple[Evaluation, Evaluation]:
    """As `evaluate` and as `evaluate_calibrated`, from one pass over the examples; all encoded already."""
    logits = _label_logits(model, tokens, data.sequences, model.tokens_at_once(TOKENS_PER_BATCH))
    preference = _label_logits(model, tokens, unlabelled).log_softmax(-1).mean(0)
    return _judged(logits, data.labels), _judged(logits - preference, data.labels)


@torch.no_grad()
def _label_logits(
    model: Model, tokens: TaskTokens, sequences: Sequence[Sequence[int]], tokens_per_batch: int | None = None
) -> Tensor:
    """The logits of the label tokens behind N sequences, batched as `Model.hidden_of`: (N, C)."""
    return model.logits_of(model.hidden_of(sequences, tokens_per_batch), tokens.labels)


def _judged(logits: Tensor, targets: Tensor) -> Evaluation:
    from sklearn.metrics import f1_score

    labels, predictions = targets.tolist(), logits.argmax(-1).tolist()
    classes = list(range(logits.shape[-1]))
    return Evaluation(
        labels=tuple(labels),
        predictions=tuple(predictions),
        accuracy=sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels),
        macro_f1=float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0.0)),
        loss=float(cross_entropy(logits, targets)),
    )
