"""Which measure of a set of texts foretells what training on it gives? Many small sets, each measured and trained on.

    python tests/benchmarks/measures.py --model FOLDER --data sst2 --task notebooks/tasks/film-chat.yaml \
        --folder results/real --output book/records/measures-smollm2-sst2.json

A set is drawn at random, as many texts of each class, from what the model wrote (the pools that `real_models.py` leaves
in the folder) or from real training texts. A measure sees the set, `--n-real` other real examples and public texts, all
at the untrained model; but one looks at the model behind a warm-up, and the metagradient at a training on the texts of
all sets. The outcome is the accuracy after a few steps on the whole set, on validation texts that no measure sees.
Interrupted runs go on. Letters: N texts, D coordinates, C classes.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from metagradient import metagradients
from real_models import Upper, pools_of, settings_of, warmed_up
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import gradmm
from gradmm import files
from gradmm.classification import Encoded, Evaluation, label_logs, score_calibrated
from gradmm.data import Example
from gradmm.experiments.metrics import subsample
from gradmm.experiments.records import write_record
from gradmm.finetuning import looked_at
from gradmm.models import Model
from gradmm.seeds import stream
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, TaskTokens, tokenize_task
from gradmm.training import adamw, batches, train_at_rate

WARM_UP_RATE = 5e-5
DIRECTIONS = 64  # of public gradients, in which "whitened" compares


@dataclass(frozen=True, eq=False)
class Seen:
    """What measures know of N texts: labels (N,), gradients (N, D) in the body's sketch, last hidden states (N, W), and
    the log-probabilities of the labels (N, C); the gradients behind a warm-up (N, D); of a set also what their weight
    adds to the loss (N,), see `influences`.
    """

    labels: Tensor
    gradients: Tensor
    states: Tensor
    logs: Tensor
    later: Tensor
    influence: Tensor

    @staticmethod
    def of(
        models: Sequence[tuple[Model, BodySketch]], tokens: TaskTokens, examples: Sequence[Example],
        influence: dict[Example, float] | None = None,
    ) -> "Seen":  # fmt: skip
        """Read once, at the model as it came and behind a warm-up, each with its space."""
        texts, labels = [example.text for example in examples], [example.label for example in examples]
        sequences = [tokens.sequence(text) for text in texts]
        now, later = (space.factors(model, tokens, sequences, labels).hidden for model, space in models)
        states, logs = models[0][0].hidden_of(sequences).float(), label_logs(models[0][0], tokens, texts)
        weights = torch.tensor([(influence or {}).get(example, math.nan) for example in examples])
        return Seen(torch.tensor(labels), now, states, logs, later, weights)

    def mean(self, name: str = "gradients") -> Tensor:
        """The mean of each class: (C, D)."""
        values = getattr(self, name)
        return torch.stack([values[self.labels == number].mean(0) for number in self.labels.unique()])

    @cached_property
    def spread(self) -> Tensor:
        """What takes gradients to directions in which these ones vary alike: (D, at most `DIRECTIONS`)."""
        _, sizes, basis = torch.linalg.svd(self.gradients - self.gradients.mean(0), full_matrices=False)
        count = min(DIRECTIONS, int((sizes > 1e-6 * sizes[0]).sum()))
        return basis[:count].mT / sizes[:count]


def nearest(own: Tensor, theirs: Tensor, labels: Tensor, their_labels: Tensor) -> float:
    """Of each real row the cosine of the nearest of the set's rows with its label, averaged."""
    alike = normalize(theirs, dim=-1) @ normalize(own, dim=-1).mT
    return float(alike.masked_fill(their_labels[:, None] != labels, -1).max(1).values.mean())


def by_class(own: Seen, real: Seen, public: Seen) -> float:
    """gradmm's own: the cosine of the mean gradients, class by class."""
    return float(cosine_similarity(own.mean(), real.mean(), dim=-1).mean())


def behind_warm_up(own: Seen, real: Seen, public: Seen) -> float:
    """As `by_class`, of the gradients that the model has after a few steps on public texts."""
    return float(cosine_similarity(own.mean("later"), real.mean("later"), dim=-1).mean())


def all_classes(own: Seen, real: Seen, public: Seen) -> float:
    """The cosine of the mean gradients of all classes together."""
    return float(cosine_similarity(own.mean().mean(0), real.mean().mean(0), dim=-1))


def as_adam_steps(own: Seen, real: Seen, public: Seen) -> float:
    """As `by_class`, the set's gradient divided as Adam would (LESS, arXiv 2402.04333)."""
    scale = public.gradients.square().mean(0).sqrt().clamp_min(1e-12)
    return float(cosine_similarity(own.mean() / scale, real.mean(), dim=-1).mean())


def whitened(own: Seen, real: Seen, public: Seen) -> float:
    """As `by_class`, in directions in which public gradients vary alike (TAROT, arXiv 2412.00420)."""
    return float(cosine_similarity(own.mean() @ public.spread, real.mean() @ public.spread, dim=-1).mean())


def round_robin(own: Seen, real: Seen, public: Seen) -> float:
    """Whether every real example has a text with a gradient like its own (after arXiv 2602.14696)."""
    return nearest(own.gradients, real.gradients, own.labels, real.labels)


def interaction(own: Seen, real: Seen, public: Seen) -> float:
    """What a step gains less what its texts take from each other: <m, r> - |m|^2 / 2, class by class (after GREATS)."""
    mean = own.mean()
    return float((mean * real.mean()).sum(-1).mean() - mean.square().sum(-1).mean() / 2)


def states(own: Seen, real: Seen, public: Seen) -> float:
    """As `round_robin`, of centred hidden states (after RDS+)."""
    middle = public.states.mean(0)
    return nearest(own.states - middle, real.states - middle, own.labels, real.labels)


def contrast(own: Seen, real: Seen, public: Seen) -> float:
    """The cosine of what sets the classes' mean hidden states apart."""
    mine, theirs = own.mean("states"), real.mean("states")
    return float(cosine_similarity((mine - mine.mean(0)).flatten(), (theirs - theirs.mean(0)).flatten(), dim=0))


def sureness(own: Seen, real: Seen, public: Seen) -> float:
    """The mean log-probability of a text's label, the model's preference among labels taken out."""
    logs = (own.logs - public.mean("logs").mean(0)).log_softmax(-1)
    return float(logs[range(len(logs)), own.labels].mean())


def metagradient(own: Seen, real: Seen, public: Seen) -> float:
    """What a little more of the set's texts takes off the real examples' loss behind a training (MGD, 2503.13751)."""
    return -float(own.influence.mean())


def small_gradients(own: Seen, real: Seen, public: Seen) -> float:
    """Minus the size of the mean gradients."""
    return -float(own.mean().norm(dim=-1).mean())


MEASURES: dict[str, Callable[[Seen, Seen, Seen], float]] = {
    "by_class": by_class,
    "behind_warm_up": behind_warm_up,
    "all_classes": all_classes,
    "as_adam_steps": as_adam_steps,
    "whitened": whitened,
    "round_robin": round_robin,
    "interaction": interaction,
    "states": states,
    "contrast": contrast,
    "sureness": sureness,
    "metagradient": metagradient,
    "small_gradients": small_gradients,
}


def trained_on(
    examples: Sequence[Example], upper: Upper, task: Task, asked: Encoded, looks: Encoded, config
) -> tuple[Evaluation, Evaluation]:
    """All steps on the whole set, then the examples asked, plain and calibrated."""
    tokens = tokenize_task(task, upper.model.tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.autocast)):
        data = upper.encoded(Encoded.of(upper.model, task, tokens, examples, "a"))
    learner = upper.fresh()
    optimizer = adamw(learner, config.learning_rates[0], config)
    few = Encoded(looks.sequences[:1], looks.labels[:1])
    for _ in train_at_rate(learner, tokens, data, few, optimizer, config):
        pass
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.autocast)):
        return score_calibrated(learner, tokens, asked, looks.sequences)


def influences(
    upper: Upper, task: Task, examples: Sequence[Example], real: Sequence[Example], config, place: Path
) -> dict[Example, float]:
    """Of each text its `metagradients` for the real examples: a training that takes every text twice."""
    if not place.exists():
        tokens = tokenize_task(task, upper.model.tokenizer)
        data, others = (upper.encoded(Encoded.of(upper.model, task, tokens, some, "a")) for some in (examples, real))
        order = batches(len(examples), replace(config, batch_size=math.ceil(2 * len(examples) / config.steps)))
        steps = list(islice(order, config.steps))
        found = metagradients(upper.fresh(), tokens, data, others, steps, config.learning_rates[0])
        files.write_json(place, found.tolist())
    return dict(zip(examples, files.read_json(place), strict=True))


def drawn(options: argparse.Namespace, model: Model, task: Task, train: Sequence[Example]) -> dict[str, list[Example]]:
    """The sets by name."""
    paths = sorted(Path(options.folder).glob(f"{pools_of(model, task)}*.jsonl"))
    pool = [Example(row["text"], row["label"]) for path in paths for row in files.read_json_lines(path)]
    pool = [example for example in pool if len(example.text.split()) >= task.min_words]
    names = [("written", pool, options.written), ("real", train, options.real)]
    return {
        f"{kind}-{number}": gradmm.sample_examples(source, options.size, task, stream(options.seed, kind, number))
        for kind, source, count in names for number in range(count)
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and train what is missing, and write the record."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    task, splits = gradmm.load_data(options.data, options.task)
    wide, model = (gradmm.load_model(options.model, device="cpu", dtype=kind) for kind in ("float32", options.dtype))
    tokens, upper = tokenize_task(task, model.tokenizer), Upper(wide, options.layers or len(wide.lm.base_model.layers))
    config = gradmm.FinetuneConfig(
        steps=options.steps, learning_rates=(options.rate,), eval_every=options.steps, patience=None, warmup=1,
        batch_size=options.size, autocast=options.dtype == "bfloat16", max_validation=options.max_validation,
    )  # fmt: skip
    real = gradmm.sample_examples(splits.train, options.n_real, task, options.seed)
    held = {example.text for example in real}
    sets = drawn(options, model, task, [example for example in splits.train if example.text not in held])
    looks = looked_at(splits.validation, task, config)
    others = [example for example in splits.validation if example not in looks]
    tested = subsample([one for one in others if len(one.text.split()) >= task.min_words], 0, options.max_test)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.autocast)):
        asked, seen = (upper.encoded(Encoded.of(wide, task, tokens, some, "a")) for some in ([*tested, *real], looks))
    written = [example for name, some in sets.items() if name.startswith("written") for example in some]
    warm = warmed_up(model, task, written, splits.validation, replace(config, learning_rates=(WARM_UP_RATE,), warmup=5))
    models = [(one, BodySketch.of(one, tokens, [example.text for example in written])) for one in (model, warm)]
    public, target = (Seen.of(models, tokens, some) for some in (written, real))
    settings = settings_of(options, wide, splits.source)
    depends = {name: value for name, value in settings.items() if name not in ("real", "threads")}  # real sets are last
    place = Path(options.folder) / f"measured-{files.digest([wide.fingerprint, depends])[:8]}.jsonl"
    rows = files.read_json_lines(place)[: len(sets)] if place.exists() else []
    everything = list(dict.fromkeys(example for some in sets.values() for example in some))
    name = files.digest([wide.fingerprint, settings])[:8]
    influence = influences(upper, task, everything, real, config, Path(options.folder) / f"influence-{name}.json")
    for name, examples in list(sets.items())[len(rows) :]:
        own = Seen.of(models, tokens, examples, influence)
        found = {measure: value(own, target, public) for measure, value in MEASURES.items()}
        for kind, result in zip(
            ("", "calibrated_"), trained_on(examples, upper, task, asked, seen, config), strict=True
        ):
            right = [a == b for a, b in zip(result.predictions, result.labels, strict=True)]
            found |= {f"{kind}accuracy": sum(right[: len(tested)]) / len(tested)}
            found |= {f"{kind}on_the_real": sum(right[len(tested) :]) / len(real)}
        rows.append({"set": name, **found})
        files.write_json_lines(place, rows)
    write_record(options.output, {"sets": rows, "n_test": len(tested)}, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--data", "--task", "--folder", "--output"):
        parser.add_argument(name, required=True)
    for name, default in (
        ("--n-real", 50), ("--size", 16), ("--written", 48), ("--real", 16), ("--layers", None), ("--steps", 8),
        ("--max-validation", 100), ("--max-test", 300), ("--seed", 0), ("--threads", 2),
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


if __name__ == "__main__":
    main()
