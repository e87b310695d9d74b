"""Matching loss at the start against its cost, on the embedded model: `python tests/benchmarks/initialisation.py`.

For each way to choose a start, and each kind of draw that is asked for: mean and standard error over groups of the loss, the
texts that had to be evaluated (one forward pass each), and seconds. Prints a table and, with --output, writes a record.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from against_reference import save

import gradmm
from gradmm.initialisation import CHOICES, INITIALISATIONS, Shape
from gradmm.matching import Matching
from gradmm.projection import Reading, allowed_tokens
from gradmm.seeds import generator
from gradmm.tasks import tokenize_task

WAYS = (("best", 1), ("best", 4), ("best", 500), ("greedy", 4), ("greedy", 10), ("greedy", 25), ("greedy", 50))


def measure(options: argparse.Namespace) -> list[dict]:
    """One row for each way."""
    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo", device=options.device)
    release = gradmm.release(model, task, gradmm.sample_examples(data.train, 50, task, seed=0), space="head")
    end = model.tokenizer.eos_token_id
    matching = Matching(model, tokenize_task(task, model.tokenizer), release.targets, release.space, end=end)
    reading = Reading("lm_then_nearest", 50, allowed_tokens(model), end, 4)
    shape, classes = Shape(options.count, options.length), torch.arange(options.groups, device=model.device) % len(task.labels)
    rows = []
    for choice, draws in WAYS:
        sources, begun = [generator(0, "initial x", group) for group in range(options.groups)], time.perf_counter()
        x = CHOICES[choice](options.init, draws, matching, reading, shape, classes, sources, 1)
        taken = time.perf_counter() - begun
        ids = nearest(model, x, end)
        values = [matching.of_vectors(x[[k]], ids[[k]], classes[[k]]).item() for k in range(options.groups)]
        evaluated = 0 if (choice, draws) == ("best", 1) else draws * options.groups * options.count
        rows.append(
            {
                "choice": f"{choice} of {draws}",
                "mean": statistics.fmean(values),
                "standard_error": statistics.stdev(values) / len(values) ** 0.5,
                "texts evaluated": evaluated,
                "seconds": taken,
            }
        )
    return rows


def nearest(model: gradmm.Model, x: torch.Tensor, end: int) -> torch.Tensor:
    """The tokens whose embeddings a generated start consists of, to find its ends; none for random vectors."""
    distances = torch.cdist(x.flatten(0, 2), model.embedding)
    values, tokens = distances.min(-1)
    return torch.where(values < 1e-3, tokens, -1).view(x.shape[:3])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", choices=INITIALISATIONS, default="normal", help="what is drawn (default: %(default)s, as published)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--count", type=int, default=10, help="examples of a group")
    parser.add_argument("--length", type=int, default=20, help="tokens of an example")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, save; returns what was measured."""
    options = parse(arguments)
    rows = measure(options)
    print(f"{'start':14} {'loss':>9} {'error':>9} {'texts evaluated':>16} {'seconds':>9}")
    for row in rows:
        print(f"{row['choice']:14} {row['mean']:9.5f} {row['standard_error']:9.5f} {row['texts evaluated']:16d} {row['seconds']:9.2f}")
    save({"rows": rows}, options)
    return rows


if __name__ == "__main__":
    main()
