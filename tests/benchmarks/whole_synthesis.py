"""A whole synthesis against the literal method, paired and repeated: `python tests/benchmarks/whole_synthesis.py`.

The fast side is `gradmm.release` and `gradmm.synthesize` as anybody calls them, on random weights in one of the shapes
and words that mean nothing: target, starts, outer and inner steps, projections, filter and ranking, all groups of both
classes. The literal side (`gradmm.experiments.reference`) does one group of one class, from the same start, and is
extrapolated: its target once a class, the rest once a group. It does nothing of weight zero: no perplexity, no gradient
where only a value is asked for. With --quick it takes few steps and the time of steps and projections is scaled in
proportion. Both sides alternate; the literal one always computes in float32. Beside the ratios stand the shares of the
floor (`gradmm.experiments.roofline`) that each phase reaches by the rates that the machine shows in the same run, and
the peak of memory.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
import transformers
from against_reference import SHAPES, random_model, save
from tokenizers import Tokenizer, models, pre_tokenizers

from gradmm import runs
from gradmm.config import SynthesisConfig
from gradmm.data import Example
from gradmm.experiments import performance, reference, roofline
from gradmm.initialisation import Shape, normal
from gradmm.models import Model
from gradmm.plan import Plan
from gradmm.privacy import release
from gradmm.seeds import generator
from gradmm.synthesis import SynthesisResult
from gradmm.tasks import Task

END, UNKNOWN = "<|end|>", "<|unknown|>"
TASK = Task("words", ("left", "right"), (" w9", " w10"), "{text} w7 w8", ("w2 w3 w4 w5 w6\n", "w6 w5 w4 w3 w2\n"))
FIRST_WORD = 11  # texts are made of the words from here on
QUICK = {"outer_steps": 1, "inner_steps": 2}


# ---------------------------------------------------------------- the problem


def word_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens: an end, an unknown, the words w2, w3 and so on with spaces between, a full stop."""
    words = {END: 0, UNKNOWN: 1} | {f"w{number}": number for number in range(2, size - 1)} | {".": size - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, unk_token=UNKNOWN)


def worded_model(shape: str, device: str, dtype: str = "float32") -> Model:
    """The random model of a shape, which can read and write words."""
    model = random_model(shape, device, dtype)
    return dataclasses.replace(model, tokenizer=word_tokenizer(SHAPES[shape]["vocabulary"]))


def worded_examples(shape: str, count: int, length: int) -> list[Example]:
    """Real examples of random words, as many of either class."""
    source = torch.Generator().manual_seed(1)
    rows = torch.randint(FIRST_WORD, SHAPES[shape]["vocabulary"] - 1, (count, length), generator=source).tolist()
    return [Example(" ".join(f"w{number}" for number in row), place % 2) for place, row in enumerate(rows)]


def settings_of(options: argparse.Namespace) -> SynthesisConfig:
    """The synthesis: `groups` a class, twice the texts that are kept, starts and label filter as published."""
    texts = len(TASK.labels) * options.groups * options.count // 2
    return SynthesisConfig(
        search="admm", ranking="text", n_synthetic=texts, oversample=2.0, group_size=options.count,
        outer_steps=options.outer_steps, inner_steps=options.inner_steps, top_k=options.top_k, length=options.length,
        init="normal", init_candidates=options.candidates, filter="label", perplexity_weight=0.0,
    )  # fmt: skip


# ---------------------------------------------------------------- the literal side


def literal_group(
    model: Model, plan: Plan, examples: list[Example], steps: dict[str, int]
) -> tuple[list[list[int]], dict[str, float]]:
    """The first group of the first class by the literal method: its tokens, and the seconds of each phase.

    Args:
        plan: of the fast side.
        examples: all real examples.
        steps: `outer_steps` and `inner_steps`.
    """
    spent = dict.fromkeys((*performance.PHASES, "other"), 0.0)

    def clocked(phase, call):
        performance.wait(model.device)
        begun = time.perf_counter()
        value = call()
        performance.wait(model.device)
        spent[phase] += time.perf_counter() - begun
        return value

    tokens, config, label = plan.tokens, plan.config, plan.tokens.labels[0]
    before, after = (
        model.embed(torch.tensor(part, dtype=torch.long, device=model.device))
        for part in (tokens.start + tokens.prefix, tokens.suffix)
    )
    labels = torch.full((config.group_size,), label, device=model.device)
    sequences = [tokens.sequence(example.text) for example in examples if example.label == 0]
    explicit = clocked("target", lambda: reference.real_gradient(model.lm, sequences, [label] * len(sequences)))

    def match(x, labels=labels):
        if x.requires_grad:
            return reference.match_loss(model.lm, x, before, after, labels, explicit, config.distance)
        around = torch.cat([before.expand(len(x), -1, -1), x, after.expand(len(x), -1, -1)], dim=1)
        return reference.distance(reference.head_gradient(model.lm, around, labels), explicit, config.distance)

    def project(v):
        return clocked(
            "projection",
            lambda: reference.project(
                model.lm, v, tokens.prompts[0], config.projection, config.top_k, plan.decoding.vocabulary.whole
            ),
        )

    x = clocked("initialisation", lambda: best_start(model, plan, match))
    begun = time.perf_counter()
    objective = lambda x: match(x) if x.requires_grad else clocked("other", lambda: match(x))  # noqa: E731
    solver = dataclasses.replace(config.solver, **steps)
    ids, _ = reference.solve(objective, project, model.embedding, x, solver)
    performance.wait(model.device)
    spent["inner steps"] = time.perf_counter() - begun - spent["projection"] - spent["other"]
    clocked("filter", lambda: judge(model, plan, ids, match))
    return ids.tolist(), spent


def best_start(model: Model, plan: Plan, match) -> torch.Tensor:
    """The best of the first group's draws, evaluated one after the other."""
    source, shape = generator(plan.config.seed, "initial x", 0), Shape(plan.config.group_size, plan.length)
    draws = [
        normal(plan.matching, plan.decoding, shape, [0], [source])[0][0].float()
        for _ in range(plan.config.init_candidates)
    ]
    return draws[0] if len(draws) == 1 else min(draws, key=lambda x: float(match(x)))


def judge(model: Model, plan: Plan, ids: torch.Tensor, match) -> list[tuple[float, int]]:
    """Each text's own matching loss and the label that the model reads, one text after the other."""
    found = []
    for row in ids:
        alone = match(model.embed(row)[None], torch.tensor([plan.tokens.labels[0]], device=row.device))
        around = [*plan.tokens.start, *plan.tokens.prefix, *row.tolist(), *plan.tokens.suffix]
        with torch.no_grad():
            logits = model.lm(input_ids=torch.tensor([around], device=row.device), use_cache=False).logits[0, -1]
        found.append((float(alone), int(logits[list(plan.tokens.labels)].argmax())))
    return found


def extrapolate(spent: dict[str, float], steps: dict[str, int], plan: Plan) -> dict[str, float]:
    """From one group with `steps` to all groups with all steps."""
    config, groups = plan.config, len(plan.classes)
    times = dict.fromkeys(spent, float(groups)) | {"target": float(len(TASK.labels))}
    walks = (config.outer_steps + 1) / (steps["outer_steps"] + 1)
    times["inner steps"] *= config.outer_steps * config.inner_steps / (steps["outer_steps"] * steps["inner_steps"])
    times["projection"] *= walks
    times["other"] *= walks  # the loss at each projection
    whole = {phase: seconds * times[phase] for phase, seconds in spent.items()}
    return whole | {"whole": sum(whole.values())}


# ---------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> dict:
    """The record's results."""
    model = worded_model(options.shape, options.device, options.dtype)
    examples, config = worded_examples(options.shape, options.real, options.length), settings_of(options)
    plan = Plan.of(model, TASK, release(model, TASK, examples, space="head"), config)
    steps = QUICK if options.quick else {"outer_steps": options.outer_steps, "inner_steps": options.inner_steps}
    body, job = roofline.Body.of(model), roofline.Workload.of(plan)
    small = dataclasses.replace(config, n_synthetic=2, oversample=1, outer_steps=1, inner_steps=1, init_candidates=1)
    performance.time_synthesis(model, TASK, examples, small)  # so that no library loads within a timing
    fast, slow, memory, literal = [], [], {}, None
    for number in range(options.repeats):
        if number == 0 and model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result, seconds = performance.time_synthesis(model, TASK, examples, config)
        fast.append(seconds)
        if literal is None:  # the peak before the other side takes memory
            memory, literal = (
                peak(model),
                model if options.dtype == "float32" else worded_model(options.shape, options.device),
            )
            # Behind the peak, which its vectors would be part of.
            rates = performance.measure_rates(
                options.device, options.dtype, roofline.products(body, job), options.repeats
            )
        ids, spent = literal_group(literal, plan, examples, steps)
        slow.append(extrapolate(spent, steps, plan))
    middle = {phase: statistics.median(row[phase] for row in fast) for phase in fast[0]}
    return {
        "phases": {phase: compared([row[phase] for row in fast], [row[phase] for row in slow]) for phase in fast[0]},
        "floors": performance.shares(roofline.synthesis(body, job), middle, rates),
        "rates": {"matmul": rates.matmul, "bandwidth": rates.bandwidth, "threads": rates.threads,
            "streams": rates.streams,
                  "products": [{"rows": r, "inputs": i, "outputs": o, "rate": rate} for (r, i, o),
                      rate in rates.products.items()]},
        "memory": memory,
        "same_tokens": None if options.quick else agreement(result, plan, ids),
        "groups": len(plan.classes),
        "literal": describe(steps, plan, options.quick),
    }  # fmt: skip


def compared(fast: list[float], slow: list[float]) -> dict:
    """Medians and ranges of paired timings, in seconds, and of their ratio."""
    ratios = [b / a for a, b in zip(fast, slow, strict=True)]
    parts = {"fast_seconds": fast, "reference_seconds": slow, "ratio": ratios}
    return {
        name: {"median": statistics.median(runs), "low": min(runs), "high": max(runs), "runs": runs}
        for name, runs in parts.items()
    }


def peak(model: Model) -> dict[str, int]:
    """Bytes of the weights, and at most so far: of the GPU's allocator, or of the process with all its libraries."""
    found, weights = runs.peak_memory(), sum(part.numel() * part.element_size() for part in model.lm.parameters())
    return {
        "weights": weights,
        "peak": found.get("cuda", found["process"]) if model.device.type == "cuda" else found["process"],
    }


def agreement(result: SynthesisResult, plan: Plan, ids: list[list[int]]) -> float:
    """The share of the first group's tokens that both sides wrote alike; rounding may part them after many steps."""
    texts = [plan.tokens.encode(row["text"]) for row in result.candidates if row["group"] == 0]
    pairs = [(a, b) for fast, slow in zip(texts, ids, strict=True) for a, b in zip(fast, slow, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def describe(steps: dict[str, int], plan: Plan, quick: bool) -> str:
    """How the literal side's seconds came about."""
    groups, config = len(plan.classes), plan.config
    said = f"one group measured, times {groups} groups; its target once for each of {len(TASK.labels)} classes"
    if not quick:
        return said
    taken = f"{steps['outer_steps']} x {steps['inner_steps']} steps and {steps['outer_steps'] + 1} projections"
    return f"{said}; {taken} scaled to {config.outer_steps} x {config.inner_steps} and {config.outer_steps + 1}"


def show(results: dict, options: argparse.Namespace) -> None:
    """The table."""
    print(
        f"shape {options.shape}, {options.device}, {options.dtype}, {results['groups']} groups of {options.count}; "
        f"medians of {options.repeats}"
    )
    print(f"reference: {results['literal']}")
    shares = {row["phase"]: row for row in results["floors"]}
    print(f"{'phase':16} {'fast s':>9} {'ref. s':>10} {'ratio':>8}  {'(range)':18} {'floor s':>9} {'share':>6}")
    for phase, row in results["phases"].items():
        ratio, floor = row["ratio"], shares.get(phase)
        spread = f"({ratio['low']:.1f} to {ratio['high']:.1f})"
        bound = f"{floor['floor_seconds']:9.3f} {floor['share']:6.0%}" if floor else ""
        print(
            f"{phase:16} {row['fast_seconds']['median']:9.3f} {row['reference_seconds']['median']:10.3f} "
            f"{ratio['median']:7.1f}x  {spread:18} {bound}"
        )
    rates, memory = results["rates"], results["memory"]
    print(
        f"machine: {rates['matmul'] / 1e9:.1f} GFLOP/s, {rates['bandwidth'] / 1e9:.1f} GB/s; memory: "
        f"{memory['peak'] / 1e6:.0f} MB, weights {memory['weights'] / 1e6:.0f} MB"
    )
    if results["same_tokens"] is not None:
        print(f"tokens that both sides wrote alike: {results['same_tokens']:.0%}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the fast side")
    parser.add_argument("--groups", type=int, default=10, help="groups of each of the two classes")
    parser.add_argument("--count", type=int, default=10, help="texts of a group")
    parser.add_argument("--length", type=int, default=28, help="tokens of a text")
    parser.add_argument("--outer-steps", type=int, default=2)
    parser.add_argument("--inner-steps", type=int, default=20)
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--real", type=int, default=50, help="real examples of both classes together")
    parser.add_argument("--candidates", type=int, default=4, help="starts that each group takes the best of")
    parser.add_argument("--quick", action="store_true", help="few steps of the reference, scaled in proportion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--output", type=Path, help="a record, such as book/records/performance-small-cpu-bfloat16.json"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, save; returns the results."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    results = measure(options)
    show(results, options)
    save(results, options)
    return results


if __name__ == "__main__":
    main()
