"""What gradmm is worth on a pretrained model, at a cost that two cores can bear: 03-finetuning with three shortcuts.

    python tests/benchmarks/real_models.py --model FOLDER --data sst2 --task notebooks/tasks/film-chat.yaml \
        --folder results/real --output book/records/03-finetuning-smollm2-sst2.json

Embeddings do not learn, nor what is below the last `--layers` layers, so what enters these is read once for each text;
the gradient of a text is read once for all methods; and a pool is written once for all methods and data. None of this
changes a result but by rounding (a test compares with `FinetuneConfig.layers`). With `--dtype bfloat16`, for processors
that have it, texts are written and gradients read in bfloat16, and float32 weights learn under autocast. Interrupted
runs go on. With `--learners` the texts of the first model train others, too, as in 06-transfer. The method `admm` is
the published search with as many steps and starts as the options say, `second_round` a pool written after the first
choice, `warm_up` the choice by the gradients of a model that has learnt a little, `oracle` the choice for a thousand
real examples, which are themselves what `random_many` trains on. For models with `embed_tokens`, `layers` and `norm`,
such as Llama, Qwen and Gemma.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import gradmm
from gradmm import files
from gradmm.classification import Encoded, score_calibrated
from gradmm.data import Example
from gradmm.experiments import protocol
from gradmm.experiments.records import write_record
from gradmm.experiments.results import Comparison
from gradmm.experiments.seed_run import ComparisonConfig, Experiment, SeedRun
from gradmm.finetuning import FinetuneResult, looked_at, train_at_rates
from gradmm.generation import Sampling, generate_counts
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.plan import MIN_TOKENS
from gradmm.seeds import generator, stream
from gradmm.spaces import BodySketch
from gradmm.tasks import Task, tokenize_task
from gradmm.training import learnt_weights

METHODS = ("none", "real", "random", "few_shot", "prompt_only", "surest", "random_target", "gradmm")
WARM_UP = 30  # steps on unchosen texts
MANY = 1000  # real examples of the oracle and of random_many
WRITING = ("zero_shot", "prompt_only", "admm", "gradmm")  # whose texts a record may show: they quote no real one
SHOWN = 20  # texts of each class and method that a record keeps


class Upper:
    """The last layers of a model as a model of its own, whose embeddings are what enters them: a row for each token."""

    def __init__(self, model: Model, layers: int) -> None:
        self.model, self.layers = model, layers
        body = model.lm.base_model
        self._below = _part(body, slice(0, len(body.layers) - layers), torch.nn.Identity())
        self._rows: dict[tuple[int, ...], range] = {}
        self._read: list[Tensor] = []

    @torch.no_grad()
    def encoded(self, data: Encoded) -> Encoded:
        """The same examples, a row's number for each token."""
        first = sum(map(len, self._read))
        new = [ids for ids in dict.fromkeys(map(tuple, data.sequences)) if ids not in self._rows]
        for rows in batches_by_length(new, 1024):
            ids, mask = pad_left([new[row] for row in rows])
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)
            states = self._below(
                inputs_embeds=self.model.embed(ids), attention_mask=mask, position_ids=places, use_cache=False
            ).last_hidden_state
            for place, row in enumerate(rows):
                count = len(new[row])
                self._rows[new[row]] = range(first, first + count)
                self._read.append(states[place, -count:].clone())
                first += count
        return Encoded([list(self._rows[tuple(ids)]) for ids in data.sequences], data.labels)

    def fresh(self) -> Model:
        """A copy that learns, over all rows read so far."""
        self._read = [torch.cat(self._read)]
        lm, body = copy.copy(self.model.lm), self.model.lm.base_model
        lm._modules = dict(lm._modules)
        upper = _part(body, slice(len(body.layers) - self.layers, None), copy.deepcopy(body.norm))
        upper.layers = copy.deepcopy(upper.layers)
        upper.embed_tokens = torch.nn.Embedding.from_pretrained(self._read[0])
        lm._modules[lm.base_model_prefix] = upper
        lm.requires_grad_(False)
        for part in (upper.layers, upper.norm):
            part.requires_grad_(True)
        return replace(self.model, lm=lm)

    def finetune(self, model: Model, task: Task, train, validation, test, config, progress=True) -> FinetuneResult:
        """As `gradmm.finetune` with `config.layers`."""
        begun, tokens = time.monotonic(), tokenize_task(task, self.model.tokenizer)
        sets = (train, looked_at(validation, task, config), test)
        # Around one pass after the other, never around a training: autocast keeps what it has cast until it ends.
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.autocast)):
            data, looks, asked = (self.encoded(Encoded.of(self.model, task, tokens, some, "a")) for some in sets)
        trained = self.fresh()
        begin = partial(trained.lm.load_state_dict, learnt_weights(trained), strict=False)
        best, curve = train_at_rates(trained, begin, tokens, data, looks, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.autocast)):
            found = score_calibrated(trained, tokens, asked, looks.sequences)
        chosen = (best["learning_rate"], best["step"], best["validation_accuracy"])
        return FinetuneResult(*found, *chosen, curve, time.monotonic() - begun)


def _part(body: torch.nn.Module, which: slice, norm: torch.nn.Module) -> torch.nn.Module:
    part = copy.copy(body)
    part._modules, part.config = dict(body._modules), copy.deepcopy(body.config)
    part.layers, part.norm = body.layers[which], norm
    part.config.num_hidden_layers = len(part.layers)
    if kinds := getattr(body.config, "layer_types", None):
        part.config.layer_types = kinds[which]
    return part


@contextmanager
def gradients_read_once() -> Iterator[None]:
    """Within this the gradient of a text in the body's space is read once."""
    held: dict[tuple, Tensor] = {}
    read = BodySketch.sketches

    def sketches(self, model, tokens, sequences: Sequence[Sequence[int]], classes: Sequence[int]) -> Tensor:
        of = (model.fingerprint, *self.preference.tolist())
        keys = [(of, tuple(ids), label) for ids, label in zip(sequences, classes, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in held))
        if new:
            found = read(self, model, tokens, [ids for _, ids, _ in new], [label for *_, label in new])
            held.update(zip(new, found, strict=True))
        return torch.stack([held[key] for key in keys])

    with mock.patch.object(BodySketch, "sketches", sketches):
        yield


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How texts are written."""
    return Sampling(temperature=options.temperature, max_tokens=options.length, min_tokens=MIN_TOKENS)


def pools_of(model: Model, task: Task) -> str:
    """How the names of all pools begin that a model wrote for a task."""
    return f"pool-{files.digest([model.fingerprint, task.to_dict()])[:8]}-"


def written(model: Model, task: Task, seed: int, options: argparse.Namespace) -> list[Example]:
    """A seed's pool: read back, or written now; other data with the same task share it."""
    each, sampling = options.written * options.n_synthetic // len(task.labels), sampling_of(options)
    how = files.digest([each, str(model.dtype), asdict(sampling)])[:8]
    place = Path(options.folder) / f"{pools_of(model, task)}{how}-{seed}.jsonl"
    if not place.exists():
        counts = [each] * len(task.labels)
        pool = generate_counts(model, task, counts, stream(seed, "pool"), sampling)
        files.write_json_lines(place, [{"text": example.text, "label": example.label} for example in pool])
    return [Example(row["text"], row["label"]) for row in files.read_json_lines(place)]


def published(run: SeedRun) -> list[Example]:
    """The published ADMM for the same real examples, with the steps and starts of the comparison's settings."""
    one, own = run.experiment, run.synthesis
    named = ("n_synthetic", "outer_steps", "inner_steps", "init_candidates", "seed")
    config = gradmm.preset("paper", **{name: getattr(own, name) for name in named})
    target = gradmm.release(one.model, one.task, run.real, space=config.space, cache=one.folder, progress=False)
    return run.write("admm", target, config)


def second_round(run: SeedRun) -> list[Example]:
    """gradmm's choice among its pool and as many texts again, whose prompts show three of the texts it chose first."""
    one, first = run.experiment, run.matched
    counts = [sum(example.label == label for example in run.pool) for label in range(len(one.task.labels))]
    sampling = replace(run.sampling, shots=3)
    more = generate_counts(one.model, one.task, counts, stream(run.seed, "second round"), sampling, first)
    return run.choose([*run.pool, *more], run.synthesis)


def random_many(run: SeedRun) -> list[Example]:
    """Many more real examples than gradmm is given, those among them."""
    one = run.experiment
    return gradmm.sample_examples(one.splits.train, min(MANY, len(one.splits.train)), one.task, run.seed)


def oracle(run: SeedRun) -> list[Example]:
    """gradmm's choice from the same pool for the target of many more real examples than it is given."""
    one = run.experiment
    space, many = one.config.release_space, random_many(run)
    target = gradmm.release(one.model, one.task, many, space=space, cache=one.folder, progress=False)
    return run.write("oracle", target, run.synthesis)


def warm_up(run: SeedRun) -> list[Example]:
    """gradmm's choice by the gradients of a model that has learnt from unchosen texts for a while, as training sees."""
    one, tuning = run.experiment, replace(run.experiment.config.finetuning, seed=run.seed)
    model = warmed_up(one.model, one.task, run.pool, one.splits.validation, tuning)
    return SeedRun(replace(one, model=model, folder=None), run.seed).matched


def warmed_up(model: Model, task: Task, pool: Sequence[Example], validation: Sequence[Example], config) -> Model:
    """The model after a few steps on texts of a pool, in its own type."""
    config = replace(config, steps=WARM_UP, eval_every=WARM_UP, batch_size=4, layers=None)
    learnt = gradmm.fit(model, task, pool, validation, config).model
    return replace(learnt, lm=learnt.lm.to(model.dtype))


OWN = {
    "admm": published,
    "second_round": second_round,
    "warm_up": warm_up,
    "oracle": oracle,
    "random_many": random_many,
}  # beside those of the package


def shown(run: SeedRun, methods: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Some of the texts that methods keep, drawn at random: {method: {label: texts}}."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in methods:
        examples = protocol.METHODS[name](run)
        for number, label in enumerate(run.experiment.task.labels):
            own = [example.text for example in examples if example.label == number]
            order = torch.randperm(len(own), generator=generator(run.seed, "shown texts", number)).tolist()
            found.setdefault(name, {})[label] = [own[row] for row in order[:SHOWN]]
    return found


def results_of(found: Comparison, texts: dict, calibrated: float) -> dict:
    """What 03-finetuning writes of a comparison, with some texts of each method."""
    controls = [name for name in ("prompt_only", "zero_shot") if found.of(name)]
    beaten = {name: found.methods[name]["minus_gradmm"]["high"] < 0 for name in controls}
    seeds = sorted({record["seed"] for record in found.records})
    return {
        "methods": found.methods,
        "calibrated": calibrated,
        "beats": beaten,
        "texts": texts,
        "seeds": seeds,
        "n_test": len(found.labels),
    }


def transferred(found: Comparison, writer: str, learners: Sequence[Model]) -> dict:
    """What 06-transfer writes of a comparison: the methods' figures by model."""
    views = {writer: found, **{one.name: found.on(one.name) for one in learners}}
    return {"methods": {name: view.methods for name, view in views.items()}, "writer": writer}


def loaded(name: str, options: argparse.Namespace) -> tuple[Model, Upper]:
    """A model in the type that reads and writes, and what learns of it in float32."""
    wide = gradmm.load_model(name, device="cpu", dtype="float32")
    narrow = options.dtype != "float32"
    model = gradmm.load_model(name, device="cpu", dtype=options.dtype) if narrow else wide
    if narrow:  # the backward pass of the usual attention takes a fifth of a step in bfloat16
        wide.lm.set_attn_implementation("eager")
    return model, Upper(wide, options.layers or len(model.lm.base_model.layers))


def tuning_of(options: argparse.Namespace, upper: Upper) -> gradmm.FinetuneConfig:
    """How a model learns: of one rate, so many steps, the best of the looks on validation."""
    return gradmm.FinetuneConfig(
        steps=options.steps, learning_rates=(options.rate,), eval_every=options.eval_every, patience=None, warmup=5,
        max_validation=options.max_validation, layers=upper.layers, batch_size=options.batch_size,
        autocast=options.dtype != "float32",
    )  # fmt: skip


def settings_of(options: argparse.Namespace, model: Model, source: str, without: Sequence[str] = ()) -> dict:
    """What a record says of its settings: no path of the machine that made it, but the data's name."""
    apart = ("folder", "output", "data", "model", *without)
    asked = {name: value for name, value in vars(options).items() if name not in apart}
    return {"model": model.name, "data": source} | asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the record."""
    parser = options_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--run", default=None)
    for name, default in (("--outer-steps", 5), ("--inner-steps", 8), ("--init-candidates", 4)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--learners", nargs="+", default=[])
    parser.add_argument("--reader", default=None, help="a second model, whose perplexity of the texts is measured too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    task, splits = gradmm.load_data(options.data, options.task)
    (model, upper), *others = (loaded(name, options) for name in (options.model, *options.learners))
    uppers = {one.name: part for one, part in ((model, upper), *others)}
    learners = [one for one, _ in others]
    folder, seeds = Path(options.folder), range(options.seed, options.seed + options.seeds)
    config = ComparisonConfig(
        n_real=options.n_real,
        synthesis=gradmm.SynthesisConfig(
            n_synthetic=options.n_synthetic,
            temperature=options.temperature,
            outer_steps=options.outer_steps,
            inner_steps=options.inner_steps,
            init_candidates=options.init_candidates,
        ),  # fmt: skip
        finetuning=tuning_of(options, upper),
        sampling=sampling_of(options),
        max_test=options.max_test,
        similarity_steps=(),
        learners=learners,
        second=None if options.reader is None else gradmm.load_model(options.reader, device="cpu", dtype=options.dtype),
        pools={seed: written(model, task, seed, options) for seed in seeds},
    )

    def finetune(model: Model, *rest, **named) -> FinetuneResult:
        return uppers[model.name].finetune(model, *rest, **named)

    own = mock.patch.dict(protocol.METHODS, OWN)
    with gradients_read_once(), mock.patch.object(protocol, "finetune", finetune), own:
        found = protocol.compare(model, task, splits, config, options.methods, seeds, folder / task.name)
        as_it_came = (
            found
            if found.of("none")
            else protocol.compare(model, task, splits, config, ["none"], seeds, folder / task.name)
        )
        run = SeedRun(Experiment(model, task, splits, config, {}, "", folder / task.name), options.seed)
        texts = shown(run, [name for name in WRITING if name in options.methods])
    without = ["methods", "seed", "seeds", "learners", "reader", *([] if options.run else ["run"])]
    without += [] if "admm" in options.methods else ["outer_steps", "inner_steps", "init_candidates"]
    settings = settings_of(options, model, splits.source, without)
    settings |= {"layers": upper.layers, "device": "cpu"}
    if config.second is not None:
        settings["reader"] = config.second.name
    results = results_of(found, texts, as_it_came.methods["none"]["calibrated"]["accuracy"]["mean"])
    write_record(options.output, results | (transferred(found, model.name, learners) if learners else {}), settings)


def options_of(description: str) -> argparse.ArgumentParser:
    """What the benchmarks that train on a pool's texts are asked with."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name in ("--model", "--data", "--task", "--folder", "--output"):
        parser.add_argument(name, required=True)
    for name, default in (
        ("--n-real", 50), ("--n-synthetic", 100), ("--written", 5), ("--length", 40), ("--layers", None),
        ("--batch-size", 4), ("--steps", 120), ("--eval-every", 60), ("--max-validation", 150), ("--max-test", None),
        ("--seed", 0), ("--seeds", 5), ("--threads", 2),
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--temperature", type=float, default=0.8)
    return parser


if __name__ == "__main__":
    main()
