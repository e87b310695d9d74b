"""Fine-tuning on any set of examples, and evaluation: the measure of what a synthetic set is worth.

Knows nothing of where examples come from. Every method is trained and judged by the same code: same template, same label
tokens, and all choices made on validation examples. Letters: N examples, C classes, D hidden width, V vocabulary.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from gradmm.errors import require
from gradmm.examples import Example, check_examples, refuse_overlap
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.seeds import generator
from gradmm.tasks import Task, TaskTokens, tokenize_task

Progress = Callable[[dict], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning; the rates and steps suit about a hundred examples and ten million parameters.

    Attributes:
        steps: AdamW steps at each learning rate.
        batch_size: examples of a step; fewer if there are fewer.
        learning_rates: peaks tried one after the other; after `warmup` steps the rate falls linearly to zero.
        eval_every: steps between looks at the validation examples; step 0 and the last are always looked at.
        patience: looks without a better validation accuracy after which a rate is given up; None goes on to the end.
        warmup: steps of linear rise.
        weight_decay: of AdamW, on every parameter.
        gradient_clip: largest norm of the whole gradient.
        max_validation: validation examples used at most, drawn with the seed; None uses all.
        tokens_per_batch: tokens of one pass, padding included; a step's batch is cut in pieces of similar length, which
            changes speed and memory but not the gradient.
        autocast: compute in bfloat16 with weights kept in float32 (float64 models are left alone); seldom faster on a CPU.
        seed: names every random draw.
    """

    steps: int = 60
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (5e-5, 2e-4)
    eval_every: int = 10
    patience: int | None = 3
    warmup: int = 10
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    max_validation: int | None = 300
    tokens_per_batch: int = 512
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rates = self.learning_rates
        require(
            not isinstance(rates, str | float | int) and len(rates) > 0 and all(0 < rate < 1 for rate in rates),
            f"learning_rates = {rates!r}, each must be above 0 and below 1: give a list such as [0.00005, 0.0002]",
        )
        object.__setattr__(self, "learning_rates", tuple(float(rate) for rate in rates))
        for name in ("steps", "batch_size", "eval_every", "tokens_per_batch", "patience", "max_validation"):
            value = getattr(self, name)
            optional = name in ("patience", "max_validation") and value is None
            require(
                optional or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
                f"{name} = {value!r}, it must be a whole number of at least 1: the default is {_default(name)}",
            )
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"{name} = {value!r}, it must be at least 0: the default is {_default(name)}")
        require(self.gradient_clip > 0, f"gradient_clip = {self.gradient_clip!r}, it must be above 0: the default is 1.0")

    @staticmethod
    def from_dict(values: dict) -> "FinetuneConfig":
        """Settings from plain values; unknown names are errors."""
        known = {item.name for item in fields(FinetuneConfig)}
        unknown = sorted(set(values) - known)
        require(not unknown, f"unknown setting {', '.join(map(repr, unknown))}: the settings are {', '.join(sorted(known))}")
        return FinetuneConfig(**values)


def _default(name: str):
    return next(item.default for item in fields(FinetuneConfig) if item.name == name)


# ---------------------------------------------------------------- evaluation


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

    @property
    def correct(self) -> tuple[bool, ...]:
        """Which predictions are right; see `evaluation.paired_bootstrap`."""
        return tuple(a == b for a, b in zip(self.labels, self.predictions, strict=True))


@dataclass(frozen=True)
class Encoded:
    """Examples in tokens: N sequences, prompt included, and N labels."""

    sequences: list[list[int]]
    labels: Tensor

    @staticmethod
    def of(model: Model, task: Task, tokens: TaskTokens, examples: Sequence[Example], what: str) -> "Encoded":
        """Encode and check examples once."""
        require(len(examples) > 0, f"there are 0 {what} examples, at least 1 is needed: give some")
        examples = check_examples(examples, task, f"{what} example")
        sequences = [tokens.sequence(example.text) for example in examples]
        model.check_lengths(sequences)
        return Encoded(sequences, torch.tensor([example.label for example in examples], device=model.device))


def evaluate(model: Model, task: Task, examples: Sequence[Example], tokens_per_batch: int = 1024) -> Evaluation:
    """Predict the label of each example: the likeliest of the C verbalizers after the prompt.

    Raises:
        UserError: no examples, a label that the task does not know, or a text longer than the model's context.
    """
    tokens = tokenize_task(task, model.tokenizer)
    return _score(model, tokens, Encoded.of(model, task, tokens, examples, "test"), tokens_per_batch)


def label_logits(model: Model, tokens: TaskTokens, hidden: Tensor) -> Tensor:
    """The logits of the verbalizers alone, in float32 at least: (N, D) -> (N, C)."""
    rows = torch.tensor(tokens.labels, device=hidden.device)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if model.head_bias is None else model.head_bias[rows].to(wide)
    return linear(hidden.to(wide), model.head_weight[rows].to(wide), bias)


@torch.no_grad()
def _score(model: Model, tokens: TaskTokens, data: Encoded, tokens_per_batch: int) -> Evaluation:
    logits = label_logits(model, tokens, model.hidden_of(data.sequences, tokens_per_batch))
    labels, predictions = data.labels.tolist(), logits.argmax(-1).tolist()
    classes = list(range(len(tokens.labels)))
    return Evaluation(
        labels=tuple(labels),
        predictions=tuple(predictions),
        accuracy=sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels),
        macro_f1=float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0.0)),
        loss=float(cross_entropy(logits, data.labels)),
    )


# ---------------------------------------------------------------- training


@dataclass(frozen=True, eq=False)
class Training:
    """A fine-tuned model and how it was chosen.

    Attributes:
        model: the model at the chosen step; its fingerprint is a hash of the first model's, the settings and the examples.
        learning_rate, step: chosen on validation; step 0 is the model as it came.
        validation_accuracy: of the chosen model; it was chosen for it, so it flatters.
        curve: one row per look: learning_rate, step, train_loss (mean since the last look, None at step 0),
            validation_loss, validation_accuracy.
    """

    model: Model
    learning_rate: float
    step: int
    validation_accuracy: float
    curve: list[dict]


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A fine-tuning's figures: the chosen model on the test examples, and how it was chosen (see `Training`)."""

    test: Evaluation
    learning_rate: float
    step: int
    validation_accuracy: float
    curve: list[dict]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Test accuracy."""
        return self.test.accuracy

    @property
    def macro_f1(self) -> float:
        """Test macro-F1."""
        return self.test.macro_f1


def finetune(
    model: Model,
    task: Task,
    train: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
    config: FinetuneConfig | None = None,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Fine-tune a copy of the model, choose rate and step on validation, and read the test examples once.

    Args:
        model: left as it is.
        train: any number of examples, any source.
        progress: called with each row of the curve.

    Raises:
        UserError: a train or validation text that is in the test set, no examples, an unknown label, or a text that is too
            long.
    """
    config = config or FinetuneConfig()
    refuse_overlap([*train, *validation], test)
    begun = time.perf_counter()
    found = fit(model, task, train, validation, config, progress)
    return FinetuneResult(
        test=evaluate(found.model, task, test),
        learning_rate=found.learning_rate,
        step=found.step,
        validation_accuracy=found.validation_accuracy,
        curve=found.curve,
        seconds=time.perf_counter() - begun,
    )


def fit(
    model: Model,
    task: Task,
    train: Sequence[Example],
    validation: Sequence[Example],
    config: FinetuneConfig,
    progress: Progress | None = None,
) -> Training:
    """Train all parameters of a copy of the model at each rate, and keep the best rate and step.

    The loss is the cross-entropy over the C label tokens at the last position. Dropout is off, as it is where gradients
    are matched, so a result is a function of the examples and the settings. The best is the highest validation accuracy;
    ties go to the earliest step, then to the first rate. Validation texts of fewer than `task.min_words` words are left
    out, as they are where real examples are drawn.

    Raises:
        UserError: as `finetune`.
    """
    tokens = tokenize_task(task, model.tokenizer)
    data = Encoded.of(model, task, tokens, train, "train")
    looks = Encoded.of(model, task, tokens, _drawn(validation, task, config), "validation")
    best, weights, curve = None, None, []
    trained = trainable_copy(model)
    for rate in config.learning_rates:
        trained.lm.load_state_dict(model.lm.state_dict())
        for row in train_at_rate(trained, tokens, data, looks, rate, config):
            curve.append(row)
            if progress is not None:
                progress(row)
            if best is None or (-row["validation_accuracy"], row["step"]) < (-best["validation_accuracy"], best["step"]):
                best, weights = row, {name: value.clone() for name, value in trained.lm.state_dict().items()}
    trained.lm.load_state_dict(weights)
    trained.lm.requires_grad_(False)
    fingerprint = _identity(model, config, train, validation)
    named = replace(trained, name=f"{model.name}, fine-tuned", revision=None, fingerprint=fingerprint)
    return Training(named, best["learning_rate"], best["step"], best["validation_accuracy"], curve)


def _drawn(validation: Sequence[Example], task: Task, config: FinetuneConfig) -> list[Example]:
    pool = [example for example in validation if len(example.text.split()) >= task.min_words]
    order = torch.randperm(len(pool), generator=generator(config.seed, "validation examples")).tolist()
    return [pool[row] for row in sorted(order[: config.max_validation])]


def trainable_copy(model: Model) -> Model:
    """A copy of the model whose parameters learn; half precision would lose small updates, so it becomes float32."""
    lm = copy.deepcopy(model.lm).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        lm = lm.float()
    return replace(model, lm=lm.requires_grad_(True))


def _identity(model: Model, config: FinetuneConfig, *sets: Sequence[Example]) -> str:
    parts = repr((model.fingerprint, asdict(config), [[(example.text, example.label) for example in some] for some in sets]))
    return hashlib.sha256(parts.encode()).hexdigest()


def train_at_rate(model: Model, tokens: TaskTokens, data: Encoded, looks: Encoded, rate: float, config: FinetuneConfig) -> Iterator[dict]:
    """Train at one peak rate, in place.

    Args:
        model: a `trainable_copy`; when a row is given out, its weights are those of the row's step.
        data: the examples to train on.
        looks: the examples to look at.

    Yields:
        A row of `Training.curve` at each look; the run ends early where it diverges or runs out of patience.
    """
    fused = model.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=rate, weight_decay=config.weight_decay, fused=fused)
    order = _order(len(data.sequences), config)
    losses: list[float] = []
    best, waited = -1.0, 0
    for step in range(config.steps + 1):
        if step % config.eval_every == 0 or step == config.steps:
            row = _look(model, tokens, looks, rate, step, losses, config)
            yield row
            losses.clear()
            best, waited = max(best, row["validation_accuracy"]), 0 if row["validation_accuracy"] > best else waited + 1
            if step == config.steps or waited == config.patience:
                return
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, config)
        losses.append(_step(model, tokens, data, next(order), optimizer, config))
        if not math.isfinite(losses[-1]):
            return


def _look(model: Model, tokens: TaskTokens, looks: Encoded, rate: float, step: int, losses: list[float], config) -> dict:
    with _precision(model, config):
        found = _score(model, tokens, looks, config.tokens_per_batch)
    return {
        "learning_rate": rate,
        "step": step,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": found.loss,
        "validation_accuracy": found.accuracy,
    }


def _schedule(step: int, config: FinetuneConfig) -> float:
    """The share of the peak rate at a step: a linear rise over `warmup` steps, then linearly to zero after the last."""
    rise = (step + 1) / (config.warmup + 1)
    fall = (config.steps - step) / max(1, config.steps - config.warmup)
    return min(rise, fall, 1.0)


def _order(count: int, config: FinetuneConfig):
    """Batches of row numbers without end: every row once in each pass, passes joined so that no batch is smaller."""
    size, waiting, turn = min(config.batch_size, count), [], 0
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator(config.seed, "fine-tuning order", turn)).tolist()
            turn += 1
        yield waiting[:size]
        waiting = waiting[size:]


def _step(model: Model, tokens: TaskTokens, data: Encoded, rows: list[int], optimizer, config: FinetuneConfig) -> float:
    """One AdamW step on the mean loss of a batch; returns that loss before the step."""
    optimizer.zero_grad()
    sequences, total = [data.sequences[row] for row in rows], 0.0
    for piece in batches_by_length(sequences, config.tokens_per_batch):
        ids, mask = pad_left([sequences[place] for place in piece], model.device)
        with _precision(model, config):
            hidden = model.last_hidden(model.embed(ids), mask)
        labels = data.labels[[rows[place] for place in piece]]
        loss = cross_entropy(label_logits(model, tokens, hidden), labels, reduction="sum") / len(rows)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.lm.parameters(), config.gradient_clip)
    optimizer.step()
    return total


def _precision(model: Model, config: FinetuneConfig):
    enabled = config.autocast and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)
