"""The fast path against the literal method, side by side in one run: `python tests/benchmarks/against_reference.py`.

Both do the same work on the same random weights with the same threads: inner steps (value and input gradient of the
matching loss of one group) and projections of one group. Timings alternate, fast then reference, and medians are
compared. Prints a table and, with --output, writes it as JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

from gradmm import reference
from gradmm.gradients import FactorTarget, Head, Space, head_factors
from gradmm.matching import Matching
from gradmm.models import Model
from gradmm.projection import Reading, Tables, project
from gradmm.tasks import TaskTokens

SHAPES = {
    "tiny": {"vocabulary": 500, "width": 64, "layers": 2, "heads": 2, "context": 128},
    "small": {"vocabulary": 20_000, "width": 512, "layers": 6, "heads": 8, "context": 128},
    "phi-1.5": {"vocabulary": 51_200, "width": 2048, "layers": 24, "heads": 32, "context": 2048},
}
PROMPT, TAIL, LABEL, REAL = tuple(range(1, 7)), (7, 8), 9, 50


def random_model(shape: str, device: str) -> Model:
    """A Llama of random weights in one of SHAPES."""
    size = SHAPES[shape]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=4 * size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        max_position_embeddings=size["context"],
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    lm = transformers.LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
    return Model(lm, None, shape, None, "random")


def problem(model: Model, length: int):
    """A Matching of one class with a random real target, and the same target as an explicit gradient."""
    tokens = TaskTokens(None, PROMPT[:1], (), TAIL, (LABEL, LABEL + 1), (PROMPT, PROMPT), "")
    source = torch.Generator().manual_seed(1)
    size = model.embedding.shape[0]
    real = [[*PROMPT[:1], *torch.randint(10, size, (length,), generator=source).tolist(), *TAIL] for _ in range(REAL)]
    labels = torch.full((REAL,), LABEL, device=model.device)
    factors = head_factors(model.hidden_of(real), labels, Head(model.head_weight, model.head_bias))
    return Matching(model, tokens, [FactorTarget(factors)], Space()), reference.real_gradient(model.lm, real, [LABEL] * REAL)


def pairs(model: Model, groups: int, count: int, length: int, k: int):
    """The work, twice: {name: (fast, reference)}; the reference does one group, the fast path all of them at once."""
    matching, explicit = problem(model, length)
    source = torch.Generator().manual_seed(2)
    x = torch.randn(groups, count, length, model.embedding.shape[1], generator=source).to(model.device) * 0.05
    ids, classes = torch.zeros(x.shape[:3], dtype=torch.long), torch.zeros(groups, dtype=torch.long, device=model.device)
    before, after = (model.embed(torch.tensor(part, device=model.device)) for part in (PROMPT[:1], TAIL))
    labels, allowed = torch.full((count,), LABEL, device=model.device), torch.ones(model.embedding.shape[0], dtype=torch.bool)
    tables, rows = Tables.of(model), torch.zeros(groups * count, dtype=torch.long, device=model.device)

    def slope(f, start):
        variable = start.clone().requires_grad_(True)
        return torch.autograd.grad(f(variable).sum(), variable)[0]

    work = {
        "inner step": (
            lambda: slope(lambda v: matching.of_vectors(v, ids, classes), x),
            lambda: slope(lambda v: reference.match(model.lm, v, before, after, labels, explicit, "cosine"), x[0]),
        )
    }
    for order in ("lm_then_nearest", "nearest_then_lm"):
        reading = Reading(order, k, allowed.to(model.device))
        work[f"projection, {order}"] = (
            lambda reading=reading: project(model, tables, x.flatten(0, 1), [PROMPT], rows, reading),
            lambda reading=reading: reference.project(model.lm, x[0], PROMPT, reading.order, k, reading.allowed),
        )
    return work


def seconds(call, device: str) -> float:
    """Wall seconds of one call."""
    begun = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(options: argparse.Namespace) -> list[dict]:
    """Alternating timings of every pair, after one warm-up each."""
    model = random_model(options.shape, options.device)
    rows = []
    for name, (fast, slow) in pairs(model, options.groups, options.count, options.length, options.top_k).items():
        seconds(fast, options.device), seconds(slow, options.device)
        times = [(seconds(fast, options.device), seconds(slow, options.device)) for _ in range(options.repeats)]
        ratios = [options.groups * slow / fast for fast, slow in times]
        rows.append(
            {
                "work": name,
                "fast_seconds": statistics.median(fast for fast, _ in times),
                "reference_seconds": options.groups * statistics.median(slow for _, slow in times),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", type=int, default=1, help="groups of the fast path; the reference does one, times this")
    parser.add_argument("--count", type=int, default=10, help="examples of a group")
    parser.add_argument("--length", type=int, default=28, help="tokens of an example")
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, save; returns what was measured."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(f"{'work':32} {'fast':>9} {'reference':>10} {'ratio':>7}   (seconds, medians of {options.repeats})")
    for row in rows:
        spread = f"{row['ratio_low']:.1f} to {row['ratio_high']:.1f}"
        print(f"{row['work']:32} {row['fast_seconds']:9.3f} {row['reference_seconds']:10.3f} {row['ratio']:6.1f}x  ({spread})")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    record = {"settings": settings, "sizes": SHAPES[options.shape], "torch": torch.__version__, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
