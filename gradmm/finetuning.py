"""Fine-tuning on any set of examples: the measure of what a synthetic set is worth.

Knows nothing of where examples come from. Every method is trained and judged by the same code: same template, same label
tokens, and all choices made on validation examples.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from gradmm.classification import TOKENS_PER_BATCH, Encoded, Evaluation, score
from gradmm.errors import require
from gradmm.examples import Example, check_examples, refuse_overlap
from gradmm.models import Model
from gradmm.seeds import generator
from gradmm.tasks import Task, tokenize_task
from gradmm.training import FinetuneConfig, finish, learnt_weights, restart, train_at_rate, trainable_copy

Progress = Callable[[dict], None]


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

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> model = gradmm.load_model("demo", device="cpu")
        >>> real = gradmm.sample_examples(data.train, 4, task, seed=0)
        >>> config = gradmm.FinetuneConfig(steps=2, learning_rates=[0.0002], max_validation=10)
        >>> found = gradmm.finetune(model, task, real, data.validation, data.test[:20], config)
        >>> 0 <= found.accuracy <= 1 and found.step <= 2
        True
    """
    config = config or FinetuneConfig()
    train = check_examples(train, task, "train example")
    validation = check_examples(validation, task, "validation example")
    test = check_examples(test, task, "test example")
    refuse_overlap([*train, *validation], test)
    begun, tokens = time.perf_counter(), tokenize_task(task, model.tokenizer)
    asked = Encoded.of(model, task, tokens, test, "test")
    found = fit(model, task, train, validation, config, progress)
    return FinetuneResult(
        test=score(found.model, tokens, asked, TOKENS_PER_BATCH),
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
    """Train a copy of the model, all of it or `config.adapter`, at each rate, and keep the best rate and step.

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
    trained = trainable_copy(model, config)
    for rate in config.learning_rates:
        restart(trained, model, config)
        for row in train_at_rate(trained, tokens, data, looks, rate, config, start=curve[0] if curve else None):
            curve.append(row)
            if progress is not None:
                progress(row)
            if best is None or (-row["validation_accuracy"], row["step"]) < (-best["validation_accuracy"], best["step"]):
                best, weights = row, learnt_weights(trained)
    finish(trained, weights, config)
    fingerprint = _identity(model, config, train, validation)
    named = replace(trained, name=f"{model.name}, fine-tuned", revision=None, fingerprint=fingerprint)
    return Training(named, best["learning_rate"], best["step"], best["validation_accuracy"], curve)


def _drawn(validation: Sequence[Example], task: Task, config: FinetuneConfig) -> list[Example]:
    validation = check_examples(validation, task, "validation example")
    pool = [example for example in validation if len(example.text.split()) >= task.min_words]
    require(
        len(pool) > 0 or not validation,
        f"none of the {len(validation)} validation examples has the {task.min_words} words that task {task.name!r} "
        "asks for: "
        "give longer ones or lower its min_words",
    )
    order = torch.randperm(len(pool), generator=generator(config.seed, "validation examples")).tolist()
    return [pool[row] for row in sorted(order[: config.max_validation])]


def _identity(model: Model, config: FinetuneConfig, *sets: Sequence[Example]) -> str:
    parts = repr((model.fingerprint, asdict(config), [[(example.text, example.label) for example in some] for some in sets]))
    return hashlib.sha256(parts.encode()).hexdigest()
