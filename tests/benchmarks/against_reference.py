"""The fast path against the literal method, side by side in one run: `python tests/benchmarks/against_reference.py`.

Both do the same work on the same random weights with the same threads: inner steps (value and input gradient of the
matching loss of one group) and projections of one group. Timings alternate, fast then reference, and medians are
compared. With --dtype bfloat16 the fast path computes in bfloat16 and keeps x and the matching sums in float32, and the
reference stays in float32. Counts the matrix products' operations on both sides, because they bound the ratio of an
inner step: both need one forward and one backward pass of the body. Prints a table and, with --output, writes a record.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from gradmm.experiments import records, reference
from gradmm.gradients import FactorTarget, Head, Space, head_factors
from gradmm.matching import Matching
from gradmm.models import DTYPES, Model, use_fast_kernels
from gradmm.projection import DecodingConfig, TokenTables, project
from gradmm.tasks import TaskTokens
from gradmm.vocabulary import Vocabulary

SHAPES = {
    "tiny": {"vocabulary": 500, "width": 64, "layers": 2, "heads": 2, "context": 128},
    "small": {"vocabulary": 20_000, "width": 512, "layers": 6, "heads": 8, "context": 128},
    "smollm2": {
        "vocabulary": 49_152,
        "width": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "inner": 1536,
        "context": 2048,
    },
    "phi-1.5": {"vocabulary": 51_200, "width": 2048, "layers": 24, "heads": 32, "context": 2048, "family": "phi"},
}
PROMPT, TAIL, LABEL, REAL = tuple(range(1, 7)), (7, 8), 9, 50


def random_model(shape: str, device: str, dtype: str = "float32") -> Model:
    """A model of random weights in one of SHAPES, a Llama where no family is named: always the same, rounded to
    `dtype`.
    """
    size = SHAPES[shape]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        size.get("family", "llama"),
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size.get("inner", 4 * size["width"]),
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size.get("kv_heads", size["heads"]),
        max_position_embeddings=size["context"],
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):  # drawn there: on a CPU phi-1.5's weights take half a minute
        lm = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype]).eval().requires_grad_(False)
    use_fast_kernels(lm)
    return Model(lm, None, shape, None, "random")


class Tokens(TaskTokens):
    """Made-up tokens of no task and no tokenizer."""

    prompts = (PROMPT, PROMPT)


def problem(model: Model, literal: Model, length: int):
    """A Matching of one class with a random real target, and the same target as an explicit gradient of `literal`."""
    tokens = Tokens(None, None, PROMPT[:1], (), TAIL, (LABEL, LABEL + 1), "")
    source = torch.Generator().manual_seed(1)
    size = model.embedding.shape[0]
    real = [[*PROMPT[:1], *torch.randint(10, size, (length,), generator=source).tolist(), *TAIL] for _ in range(REAL)]
    labels = torch.full((REAL,), LABEL, device=model.device)
    factors = head_factors(model.hidden_of(real), labels, Head(model.head_weight, model.head_bias))
    return Matching(model, tokens, [FactorTarget(factors)], Space()), reference.real_gradient(
        literal.lm, real, [LABEL] * REAL
    )


def pairs(model: Model, literal: Model, groups: int, count: int, length: int, k: int):
    """The work, twice: {name: (fast, reference)}; the reference does one group, the fast path all of them at once.

    Args:
        model, literal: the same weights, in the fast path's type and in float32 for the reference.
    """
    matching, explicit = problem(model, literal, length)
    source = torch.Generator().manual_seed(2)
    x = torch.randn(groups, count, length, model.embedding.shape[1], generator=source).to(model.device) * 0.05
    ids, classes = (
        torch.zeros(x.shape[:3], dtype=torch.long, device=x.device),
        torch.zeros(groups, dtype=torch.long, device=model.device),
    )
    before, after = (literal.embed(torch.tensor(part, device=model.device)) for part in (PROMPT[:1], TAIL))
    labels, allowed = (
        torch.full((count,), LABEL, device=model.device),
        torch.ones(model.embedding.shape[0], dtype=torch.bool),
    )
    tables, rows = TokenTables.of(model), torch.zeros(groups * count, dtype=torch.long, device=model.device)

    def slope(f, start):
        variable = start.clone().requires_grad_(True)
        return torch.autograd.grad(f(variable).sum(), variable)[0]

    work = {
        "inner step": (
            lambda: slope(lambda v: matching.of_vectors(v, ids, classes), x),
            lambda: slope(
                lambda v: reference.match_loss(literal.lm, v, before, after, labels, explicit, "cosine"), x[0]
            ),
        )
    }
    for order in ("lm_then_nearest", "nearest_then_lm"):
        reading = DecodingConfig(order, k, Vocabulary.free(allowed.to(model.device)))
        work[f"projection, {order}"] = (
            lambda reading=reading: project(model, tables, x.flatten(0, 1), [PROMPT], rows, reading),
            lambda reading=reading: reference.project(
                literal.lm, x[0], PROMPT, reading.order, k, reading.vocabulary.whole
            ),
        )
    return work


def seconds(call, device: str) -> float:
    """Wall seconds of one call."""
    begun = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def operations(call) -> int:
    """Floating-point operations of the matrix products and attention of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def disagreement(fast: torch.Tensor, slow: torch.Tensor) -> float:
    """Of the first group: the relative difference of two gradients, or the share of tokens that differ."""
    fast = fast[: len(slow)] if fast.ndim == slow.ndim else fast[0]
    if slow.is_floating_point():
        return float((fast.float() - slow.float()).norm() / slow.float().norm())
    return float((fast != slow).float().mean())


def measure(options: argparse.Namespace) -> list[dict]:
    """Alternating timings of every pair, after one run each that counts operations and compares the results."""
    literal = random_model(options.shape, options.device)
    model = literal if options.dtype == "float32" else random_model(options.shape, options.device, options.dtype)
    rows = []
    for name, (fast, slow) in pairs(
        model, literal, options.groups, options.count, options.length, options.top_k
    ).items():
        if options.work not in name:
            continue
        differ = disagreement(fast(), slow())
        times = [(seconds(fast, options.device), seconds(slow, options.device)) for _ in range(options.repeats)]
        ratios = [options.groups * slow / fast for fast, slow in times]
        rows.append(
            {
                "work": name,
                "fast_seconds": statistics.median(fast for fast, _ in times),
                "reference_seconds": options.groups * statistics.median(slow for _, slow in times),
                "ratio": statistics.median(ratios),
                "fast_operations": operations(fast),
                "reference_operations": options.groups * operations(slow),
                "disagreement": differ,
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows


def save(results: dict, options: argparse.Namespace) -> None:
    """A record of the results, with the settings and the sizes that they came from, where --output asks for one."""
    if options.output:
        named = {name: value for name, value in vars(options).items() if name not in ("output", "here")}
        sizes = {"sizes": SHAPES[options.shape]} if "shape" in named else {}
        records.write_record(options.output, results, named | sizes)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the fast path")
    parser.add_argument("--work", default="", help="only the work whose name holds this, such as 'inner'")
    parser.add_argument(
        "--groups", type=int, default=1, help="groups of the fast path; the reference does one, times this"
    )
    parser.add_argument("--count", type=int, default=10, help="examples of a group")
    parser.add_argument("--length", type=int, default=28, help="tokens of an example")
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, save; returns what was measured."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(f"{'work':32} {'fast':>9} {'reference':>10} {'ratio':>7}   GFLOP (seconds: medians of {options.repeats})")
    for row in rows:
        spread = f"{row['ratio_low']:.1f} to {row['ratio_high']:.1f}"
        fast, literal = row["fast_operations"] / 1e9, row["reference_operations"] / 1e9
        counts = f"{fast:.1f} : {literal:.1f}, differ {row['disagreement']:.1g}"
        print(
            f"{row['work']:32} {row['fast_seconds']:9.3f} {row['reference_seconds']:10.3f} {row['ratio']:6.1f}x  "
            f"({spread}); {counts}"
        )
    save({"rows": rows}, options)
    return rows


if __name__ == "__main__":
    main()
