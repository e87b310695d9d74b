"""What a card gives, part by part and as a whole: `python tests/benchmarks/gpu.py --output book/records/gpu-h100.json`.

For each shape, on random weights made on the device: the rate of a large product; an inner step of 1 to 20 groups as it
is, captured, and captured with compiled layers, with its share of that rate, and with either kind of attention;
projection and pool per token and text; sketches; a training step; a whole synthesis at the paper's setting from a few
of its outer steps, and beside it the literal method. Prints a table as it goes; a part that fails or that the budget of
seconds has no room for says so and the others go on. On a CPU (`--device cpu --shapes tiny`) it shows that it runs, not
how fast a card is.
"""

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from against_reference import SHAPES, save
from whole_synthesis import TASK, extrapolate, literal_group, worded_examples, worded_model

from gradmm import admm
from gradmm.classification import Encoded
from gradmm.config import PRESETS, FinetuneConfig
from gradmm.device import Graphs, compiled_layers, fast_products
from gradmm.experiments import performance
from gradmm.generation import Sampling, prompted_texts
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.plan import Plan
from gradmm.privacy import release
from gradmm.projection import project
from gradmm.spaces import BodySketch
from gradmm.tasks import tokenize_task
from gradmm.training import adamw, train_at_rate, trainable_copy

MODES = ("as it is", "captured", "compiled")
QUICK = {"outer_steps": 1, "inner_steps": 2}  # of the literal method, scaled in proportion
Row = dict[str, object]


class Unmeasured(Exception):
    """A part for which there is no time left."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """One shape on one device.

    Attributes:
        model: of random weights.
        plan: a synthesis at the paper's setting of groups, texts and length.
        rate: operations a second of a large product.
    """

    model: Model
    plan: Plan
    rate: float
    options: argparse.Namespace

    @staticmethod
    def of(shape: str, options: argparse.Namespace) -> "Bench":
        model = worded_model(shape, options.device, options.dtype)
        examples = worded_examples(shape, options.real, options.length)
        plan = Plan.of(model, TASK, release(model, TASK, examples, space="head", progress=False), settings_of(options))
        size = (options.product,) * 3
        rate = performance.measure_rates(options.device, options.dtype, [size], 5, 1 << 24).matmul
        return Bench(model, plan, rate, options)

    @property
    def texts(self) -> int:
        """Of all groups."""
        return len(self.plan.classes) * self.plan.config.group_size

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """The median of a few calls, after one that warms up."""
        call()
        return statistics.median(performance.seconds_of(call, self.options.device) for _ in range(repeats))


# ---------------------------------------------------------------- the parts


def inner_steps(bench: Bench) -> Iterator[Row]:
    """Milliseconds of an inner step, and the share of the card's rate that its products reach."""
    body = sum(weights.numel() for weights in bench.model.lm.base_model.parameters()) - bench.model.embedding.numel()
    tokens, most = bench.plan.tokens, max(bench.options.groups)
    positions = len(tokens.start + tokens.prefix + tokens.suffix) + bench.plan.length
    for groups in bench.options.groups:
        for mode in MODES if groups == most else MODES[:2]:
            begun = time.perf_counter()
            step = inner_step(bench, groups, mode)
            first = time.perf_counter() - begun
            spent = bench.seconds(step)
            done = 4 * body * positions * groups * bench.plan.config.group_size
            yield {
                "part": f"inner step, {groups} group(s), {mode}", "milliseconds": 1e3 * spent,
                "share of the rate": done / spent / bench.rate, "seconds before the first": first,
            }  # fmt: skip


def inner_step(bench: Bench, groups: int, mode: str) -> Callable[[], object]:
    """One inner step of so many groups, with all that comes before the first done."""
    plan, model = bench.plan, bench.model
    classes = torch.tensor([label % len(TASK.labels) for label in range(groups)]).sort().values
    graphs = Graphs(model.device, partial(compiled_layers, model.lm) if mode == "compiled" else nullcontext)
    if mode == "as it is":
        graphs = Graphs(torch.device("cpu"))
    inner = admm.InnerLoop(
        lambda x, ids, which: plan.matching.of_vectors(x, ids, classes[which]), admm.Config(inner_steps=1), graphs
    )
    x = 0.05 * torch.randn(groups, plan.config.group_size, plan.length, model.embedding.shape[1], device=model.device)
    ids = torch.zeros(x.shape[:3], dtype=torch.long, device=model.device)
    with fast_products(model.device):
        inner.move(x, x, 0 * x, ids, torch.arange(groups))
    return lambda: inner.minimise(torch.arange(groups), x, x)


def attention(bench: Bench) -> Iterator[Row]:
    """A captured inner step of the most groups with plain attention, and with the fused kernels."""
    groups, lm = max(bench.options.groups), bench.model.lm
    before = lm.config._attn_implementation
    for kind in ("eager", "sdpa"):
        lm.set_attn_implementation(kind)
        try:
            spent = bench.seconds(inner_step(bench, groups, "captured"))
        finally:
            lm.set_attn_implementation(before)
        yield {"part": f"inner step, {groups} group(s), attention {kind}", "milliseconds": 1e3 * spent}


def projection(bench: Bench) -> Iterator[Row]:
    """Milliseconds a token of all texts side by side."""
    plan, model = bench.plan, bench.model
    v = 0.05 * torch.randn(bench.texts, plan.length, model.embedding.shape[1], device=model.device)
    rows = torch.arange(bench.texts, device=model.device) % len(TASK.labels)
    spent = bench.seconds(lambda: project(model, plan.tables, v, plan.tokens.prompts, rows, plan.decoding))
    yield {"part": f"projection of {bench.texts} texts, a token", "milliseconds": 1e3 * spent / plan.length}


def pool(bench: Bench) -> Iterator[Row]:
    """Texts a second that the model writes."""
    count = bench.options.texts
    length = min(2 * bench.plan.length, bench.model.context - 16)
    spent = bench.seconds(lambda: prompted_texts(bench.model, bench.plan.tokens, count // 2, length), 1)
    yield {"part": f"pool, texts of {length} tokens", "a second": 2 * (count // 2) / spent,
           "side by side": Sampling().together(bench.model.device)}  # fmt: skip


def sketches(bench: Bench) -> Iterator[Row]:
    """Texts a second whose gradients are sketched."""
    model, tokens, count = bench.model, bench.plan.tokens, bench.options.texts
    space = BodySketch(torch.zeros(len(TASK.labels), device=model.device))
    texts = [example.text for example in worded_examples(model.name, count, bench.options.length)]
    matching = Matching(model, tokens, [], space)
    spent = bench.seconds(lambda: matching.factors(texts, [0] * count), 1)
    yield {"part": "sketches", "a second": count / spent}


def training(bench: Bench) -> Iterator[Row]:
    """Milliseconds of an AdamW step on 16 examples."""
    model, steps = bench.model, bench.options.training_steps
    config = FinetuneConfig(steps=steps, eval_every=steps, patience=None, learning_rates=[1e-5])
    tokens = tokenize_task(TASK, model.tokenizer)
    data = Encoded.of(model, TASK, tokens, worded_examples(model.name, 64, bench.options.length), "train")
    few = Encoded(data.sequences[:1], data.labels[:1])  # what is looked at behind the last step
    learner = trainable_copy(model, config)
    clock: list[float] = []
    for _ in train_at_rate(learner, tokens, data, few, adamw(learner, 1e-5, config), config):
        performance.wait(model.device)
        clock.append(time.perf_counter())
    yield {"part": "training step of 16 examples", "milliseconds": 1e3 * (clock[-1] - clock[0]) / steps}


def whole(bench: Bench) -> Iterator[Row]:
    """A whole synthesis at the paper's setting: measured with a few outer steps, the rest in proportion.

    The layers, which its 1,500 inner steps would have compiled, are not.
    """
    options, config = bench.options, bench.plan.config
    examples = worded_examples(bench.model.name, options.real, options.length)
    few = dataclasses.replace(config, outer_steps=options.outer_steps)
    begun = time.perf_counter()
    result, spent = performance.time_synthesis(bench.model, TASK, examples, few)
    measured = time.perf_counter() - begun
    outer = PRESETS["paper"].outer_steps
    times, walks = outer / options.outer_steps, (outer + 1) / (options.outer_steps + 1)  # the start is projected, too
    seconds = measured + (times - 1) * spent["inner steps"] + (walks - 1) * spent["projection"]
    yield {
        "part": "whole synthesis, paper's setting", "seconds": seconds, "measured seconds": measured,
        "outer steps measured": options.outer_steps, "groups at once": result.manifest.get("groups_at_once"),
        "of it inner steps": times * spent["inner steps"] / seconds,
    }  # fmt: skip
    literal = worded_model(bench.model.name, options.device)
    _, slow = literal_group(literal, bench.plan, examples, QUICK)
    reference = extrapolate(slow, QUICK, bench.plan)["whole"]
    yield {"part": "the literal method", "seconds": reference, "times as long": reference / seconds}


PARTS = {part.__name__: part for part in (inner_steps, attention, projection, pool, sketches, training, whole)}

# ---------------------------------------------------------------- measuring


def settings_of(options: argparse.Namespace):
    """The paper's, with random starts as published, whose number is an option."""
    wanted = len(TASK.labels) * options.class_groups * options.count // 2
    return dataclasses.replace(
        PRESETS["paper"], n_synthetic=wanted, group_size=options.count, length=options.length, top_k=options.top_k,
        init_candidates=options.candidates, inner_steps=options.inner_steps,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows of all shapes."""
    rows, end = [], time.monotonic() + options.budget
    on_gpu = torch.device(options.device).type == "cuda"
    for shape in options.shapes:
        begun = time.monotonic()
        bench = Bench.of(shape, options)
        weights = sum(part.numel() * part.element_size() for part in bench.model.lm.parameters())
        made = {"TFLOP/s": bench.rate / 1e12, "weights, GB": weights / 1e9, "seconds to make": time.monotonic() - begun}
        rows.append({"shape": shape, "part": "large product", **made})
        show(rows[-1])
        for name in options.parts:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(bench.model.device)
            for row in guarded(name, bench, end):
                peak = {"peak, GB": torch.cuda.max_memory_allocated(bench.model.device) / 1e9} if on_gpu else {}
                rows.append({"shape": shape, **row, **peak})
                show(rows[-1])
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def guarded(name: str, bench: Bench, end: float) -> Iterator[Row]:
    """The rows of a part; what stops it is a row too."""
    try:
        if time.monotonic() > end:
            raise Unmeasured("the budget of seconds is spent")
        yield from PARTS[name](bench)
    except Exception as error:  # a card is lent for minutes: what fails must not take the rest along
        yield {"part": name.replace("_", " "), "not measured": f"{type(error).__name__}: {error}"}


def show(row: Row) -> None:
    """One row as it comes."""
    figures = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("shape", "part") and value is not None
    )
    print(f"{row['shape']:9} {row['part']:42} {', '.join(figures)}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "phi-1.5", "small", "tiny"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 2, 4, 10, 20], help="of an inner step")
    parser.add_argument("--class-groups", type=int, default=10, help="groups of each of the two classes")
    parser.add_argument("--count", type=int, default=10, help="texts of a group")
    parser.add_argument("--length", type=int, default=22, help="tokens of a text; 31 positions with its template")
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--real", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--outer-steps", type=int, default=3, help="of the whole synthesis, the rest in proportion")
    parser.add_argument("--inner-steps", type=int, default=50)
    parser.add_argument("--texts", type=int, default=512, help="that a pool writes and that are sketched")
    parser.add_argument("--training-steps", type=int, default=10)
    parser.add_argument("--product", type=int, default=8192, help="rows and columns of the large product")
    parser.add_argument("--budget", type=float, default=200, help="seconds after which no part begins")
    parser.add_argument("--output", type=Path, help="a record, such as book/records/gpu-h100.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, save; returns the rows."""
    options = parse(arguments)
    rows = measure(options)
    save({"rows": rows}, options)
    return rows


if __name__ == "__main__":
    main()
