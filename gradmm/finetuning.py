"""Fine-tuning on any set of examples: the measure of what a synthetic set is worth.

Knows nothing of where examples come from. Every method is trained and judged by the same code: same template, same
label tokens, and all choices made on validation examples.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmm import files
from gradmm.classification import Encoded, Evaluation, score_calibrated
from gradmm.config import FinetuneConfig
from gradmm.data import Example, check_examples, refuse_overlap
from gradmm.device import enough_memory
from gradmm.errors import UserError, first_line, require, require_flag, require_type
from gradmm.files import lock
from gradmm.models import Model, require_model
from gradmm.progress import SECONDS, if_slow, shown, stage, ticking
from gradmm.readability import count_words
from gradmm.runs import RunFolder, finite_row, numbers
from gradmm.seeds import generator
from gradmm.tasks import Task, TaskTokens, tokenize_task
from gradmm.training import (
    adamw,
    finish,
    learnt_weights,
    optimizer_state,
    restart,
    restore_optimizer,
    train_at_rate,
    trainable_copy,
)

OnLook = Callable[[dict], object]
SNAPSHOT_SECONDS = 10.0
STATE, RESULT = "training.safetensors", "finetuning.json"
JUDGED = ("test", "calibrated")  # what a result holds of the test examples


@dataclass(frozen=True, eq=False)
class Training:
    """A fine-tuned model and how it was chosen.

    Attributes:
        model: the model at the chosen step; its fingerprint is a hash of the first model's, the settings and the
            examples.
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
    """A fine-tuning's figures: the chosen model on the test examples, and how it was chosen (see `Training`).

    Attributes:
        test: as `evaluate` finds it.
        calibrated: as `evaluate_calibrated` finds it with the validation texts: without the preference for some
            verbalizer that the model had or that training gave it.
    """

    test: Evaluation
    calibrated: Evaluation
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
    train: Iterable,
    validation: Iterable,
    test: Iterable,
    config: FinetuneConfig | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    on_look: OnLook | None = None,
) -> FinetuneResult:
    """Fine-tune a copy of the model, choose rate and step on validation, and read the test examples once.

    Args:
        model: left as it is.
        train: any number of examples, any source: whatever `data.check_examples` takes, such as the `kept` of a
            synthesis.
        validation, test: the same.
        config: the settings.
        output: a folder of its own that keeps unfinished work, which the same call continues to the same result, and
            the figures of a finished one, which are read back. None keeps everything in memory.
        progress: whether to show a progress bar if it takes more than two seconds.
        on_look: called with each new row of the curve.

    Raises:
        UserError: an argument of another type, a train or validation text that is in the test set, no examples, an
            unknown label, a text that is too long, or a folder that holds other work.

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
    _check(model, config, progress, on_look)
    config, tokens = config or FinetuneConfig(), tokenize_task(task, model.tokenizer)
    train = check_examples(train, task, "train example")
    validation = check_examples(validation, task, "validation example")
    test = check_examples(test, task, "test example")
    refuse_overlap([*train, *validation], test)
    asked = Encoded.of(model, task, tokens, test, "test")
    with lock(output):
        folder = RunFolder.open(output, _identity(model, task, config, train=train, validation=validation, test=test))
        if folder.path is not None and folder.finished:
            return _read(folder.path)
        saved = Checkpoint(folder.path)
        with _bar(config, progress) as show:
            look = show if on_look is None else lambda row: (show(row), on_look(row))
            found = fit(model, task, train, validation, config, look, saved)
        looks = [tokens.sequence(example.text) for example in looked_at(validation, task, config)]
        with shown(progress), stage("testing", len(asked.sequences) + len(looks)):
            tested, calibrated = score_calibrated(found.model, tokens, asked, looks)
        result = FinetuneResult(
            test=tested,
            calibrated=calibrated,
            learning_rate=found.learning_rate,
            step=found.step,
            validation_accuracy=found.validation_accuracy,
            curve=found.curve,
            seconds=saved.seconds,
        )
        _write(folder, result)
    return result


def _check(model, config, progress, on_look) -> None:
    require_model(model)
    require_type(config, FinetuneConfig | None, "the config", "give a gradmm.FinetuneConfig")
    require_flag(progress, "progress")
    require(
        on_look is None or callable(on_look), f"on_look is of type {type(on_look).__name__}: give a function, or None"
    )


@contextmanager
def _bar(config: FinetuneConfig, progress: bool) -> Iterator[OnLook]:
    """A progress bar over the steps of all rates, moved by the rows of the curve."""
    total = len(config.learning_rates) * config.steps
    options = {"desc": "fine-tuning", "unit": "step", "delay": SECONDS, "smoothing": 0}
    with (
        tqdm(total=total, disable=not progress, **options) as bar,
        if_slow(progress, lambda: bar.update(0)),
        ticking(bar),
    ):

        def show(row: dict) -> None:
            done = config.learning_rates.index(row["learning_rate"]) * config.steps + row["step"]
            bar.set_postfix(rate=row["learning_rate"], validation=f"{row['validation_accuracy']:.3f}", refresh=False)
            bar.update(max(0, done - bar.n))

        yield show
        bar.update(total - bar.n)  # what a rate that was given up left undone


def fit(
    model: Model,
    task: Task,
    train: Iterable,
    validation: Iterable,
    config: FinetuneConfig | None = None,
    on_look: OnLook | None = None,
    saved: "Checkpoint | None" = None,
) -> Training:
    """Train a copy of the model, all of it or `config.adapter`, at each rate, and keep the best rate and step.

    The loss is the cross-entropy over the C label tokens at the last position. Dropout is off, as it is where gradients
    are matched, so a result is a function of the examples and the settings. The best is the highest validation
    accuracy; ties go to the earliest step, then to the first rate. Validation texts of fewer than `task.min_words`
    words are left out, as they are where real examples are drawn.

    Args:
        saved: where unfinished work is kept and continued from; None keeps none.

    Raises:
        UserError: as `finetune`.
    """
    _check(model, config, True, on_look)
    config = config or FinetuneConfig()
    tokens = tokenize_task(task, model.tokenizer)
    train, validation = check_examples(train, task, "train example"), looked_at(validation, task, config)
    data = Encoded.of(model, task, tokens, train, "train")
    looks = Encoded.of(model, task, tokens, validation, "validation")
    mend = "let fewer weights learn with layers = 4 or adapter = 'lora', or take a smaller model or batch_size"
    with enough_memory("the weights that learn with their gradients and moments", mend):
        trained = trainable_copy(model, config)
        begin = partial(restart, trained, model, config)
        best, curve = train_at_rates(trained, begin, tokens, data, looks, config, on_look, saved)
        finish(trained, config)
    fingerprint = _fingerprint(model, config, train, validation)
    named = replace(trained, name=f"{model.name}, fine-tuned", revision=None, fingerprint=fingerprint)
    return Training(named, best["learning_rate"], best["step"], best["validation_accuracy"], curve)


def train_at_rates(
    trained: Model,
    begin: Callable[[], object],
    tokens: TaskTokens,
    data: Encoded,
    looks: Encoded,
    config: FinetuneConfig,
    on_look: OnLook | None = None,
    saved: "Checkpoint | None" = None,
) -> tuple[dict, list[dict]]:
    """Train a copy at each rate, in place, and leave it with the weights of the best look.

    Args:
        trained: a copy that learns.
        begin: gives it the weights of step 0.
        saved: see `fit`.

    Returns:
        The best look's row of the curve, and the curve.
    """
    saved = saved or Checkpoint(None)
    rows, best, held = saved.load()
    weights = held["best"]
    for number, rate in enumerate(config.learning_rates):
        if number < len(rows) - 1:
            continue  # done before the interruption
        begin()
        optimizer = adamw(trained, rate, config)
        if number == len(rows) - 1:
            trained.lm.load_state_dict(held["weights"], strict=False)
            restore_optimizer(optimizer, held["optimizer"])
            if saved.tokens is not None:
                optimizer.param_groups[0]["held"] = saved.tokens
        else:
            rows.append([])
        start = rows[0][0] if rows[0] else None
        for row in train_at_rate(trained, tokens, data, looks, optimizer, config, start, rows[number]):
            rows[number].append(row)
            if on_look is not None:
                on_look(row)
            if not best or _rank(row) < _rank(best):
                best, weights = row, {}  # the old are let go before the new are kept
                weights = learnt_weights(trained)
            saved.snapshot(rows, best, weights, trained, optimizer)
    trained.lm.load_state_dict(weights, strict=False)
    return best, sum(rows, [])


def _rank(row: dict) -> tuple[float, int]:
    """What is lowest for the best of a curve's rows."""
    return -row["validation_accuracy"], row["step"]


def looked_at(validation: Iterable, task: Task, config: FinetuneConfig) -> list[Example]:
    """The validation examples that a fine-tuning uses: long enough ones, drawn with its seed.

    Raises:
        UserError: An example does not fit the task, or none has ``task.min_words`` words.
    """
    validation = check_examples(validation, task, "validation example")
    pool = [example for example in validation if count_words(example.text) >= task.min_words]
    require(
        len(pool) > 0 or not validation,
        f"none of the {len(validation)} validation examples has the {task.min_words} words that task {task.name!r} "
        "asks for: give longer ones or lower its min_words",
    )
    order = torch.randperm(len(pool), generator=generator(config.seed, "validation examples")).tolist()
    return [pool[row] for row in sorted(order[: config.max_validation])]


def _fingerprint(model: Model, config: FinetuneConfig, *sets: Sequence[Example]) -> str:
    parts = repr(
        (model.fingerprint, asdict(config), [[(example.text, example.label) for example in some] for some in sets])
    )
    return hashlib.sha256(parts.encode()).hexdigest()


# ---------------------------------------------------------------- folders


def _identity(model: Model, task: Task, config: FinetuneConfig, **sets: Sequence[Example]) -> dict:
    """What must be equal for unfinished work to be continued and finished work to be read back."""
    hashes = {name: [(example.text, example.label) for example in some] for name, some in sets.items()}
    return {
        "fine-tuning": asdict(config),
        "task": task.to_dict(),
        "model": {"name": model.name, "revision": model.revision, "fingerprint": model.fingerprint,
                  "dtype": str(model.dtype).removeprefix("torch.")},
        "data": {name: hashlib.sha256(repr(rows).encode()).hexdigest() for name, rows in hashes.items()},
    }  # fmt: skip


class Checkpoint:
    """An unfinished training in a folder: the curve, the best weights, and weights and moments at the last look."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / STATE
        self._begun = self._saved = time.monotonic()
        self._before = self._cost = 0.0
        self.tokens: int | None = None  # of a pass, where the memory held no more

    @property
    def seconds(self) -> float:
        """What the training has taken, before an interruption and since."""
        return self._before + time.monotonic() - self._begun

    def load(self) -> tuple[list[list[dict]], dict, dict[str, dict[str, Tensor]]]:
        """The rows of each rate, the best of them, and the tensors by kind; empty where nothing was saved.

        Raises:
            UserError: the file there is no saved training.
        """
        held: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("weights", "best", "optimizer")}
        if self.path is None or not self.path.exists():
            return [], {}, held
        tensors, metadata = files.read_tensors(self.path, "remove it and run again")
        try:
            state = json.loads(metadata["training"])
            rows, best, self._before = state["rows"], state["best"], state["seconds"]
            self.tokens = state.get("tokens")
            for name, tensor in tensors.items():
                kind, rest = name.split("/", 1)
                held[kind][rest] = tensor
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is no saved training ({first_line(error)}): remove it and run again"
            ) from error
        return (
            [[numbers(row, "validation_loss") for row in some] for some in rows],
            numbers(best, "validation_loss"),
            held,
        )

    def snapshot(
        self, rows: list[list[dict]], best: dict, weights: dict[str, Tensor], trained: Model, optimizer
    ) -> None:
        """Save the training as it stands, so seldom that it takes a tenth of the time at most."""
        begun = time.monotonic()
        if self.path is None or begun - self._saved < max(SNAPSHOT_SECONDS, 10 * self._cost):
            return
        live = {name: some.detach() for name, some in trained.lm.named_parameters() if some.requires_grad}
        kinds = {"weights": live, "best": weights, "optimizer": optimizer_state(optimizer)}
        tensors = {f"{kind}/{name}": tensor for kind, some in kinds.items() for name, tensor in some.items()}
        state = {
            "rows": [[finite_row(row) for row in some] for some in rows],
            "best": finite_row(best),
            "seconds": self.seconds,
            "tokens": optimizer.param_groups[0].get("held"),
        }
        files.write_tensors(self.path, tensors, {"training": json.dumps(state)})
        self._saved = time.monotonic()
        self._cost = self._saved - begun


def _write(folder: RunFolder, result: FinetuneResult) -> None:
    if folder.path is None:
        return
    held = asdict(result) | {
        **{name: finite_row(asdict(getattr(result, name))) for name in JUDGED},
        "curve": [finite_row(row) for row in result.curve],
    }
    files.write_json(folder.path / RESULT, held)
    files.write_json(folder.path / "manifest.json", {**folder.manifest, "status": "complete"})
    _clear(folder.path)


def _read(folder: Path) -> FinetuneResult:
    held, place = files.read_json(folder / RESULT, files.MAX_TEXT_BYTES), folder / RESULT
    try:
        judged = {name: _evaluation(held[name]) for name in JUDGED}
        curve = [numbers(row, "validation_loss") for row in held["curve"]]
        result = FinetuneResult(**{**held, **judged, "curve": curve})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place} is no finished fine-tuning ({first_line(error)}): remove its folder and run again"
        ) from error
    _clear(folder)
    return result


def _evaluation(held: dict) -> Evaluation:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
    return Evaluation(**numbers(values, "loss"))


def _clear(folder: Path) -> None:
    with suppress(OSError):  # figures on a read-only disk are read all the same
        (folder / STATE).unlink(missing_ok=True)
