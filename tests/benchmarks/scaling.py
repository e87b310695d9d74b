"""Does the cost grow in proportion to what is asked for? `python tests/benchmarks/scaling.py`.

Groups, outer steps, inner steps and length each grow by a factor of 8 while the others stay where they are. A whole
synthesis is timed at every size, a line is fitted to the medians, and the worst deviation from it is given, in percent of
the line. Rounds go through all sizes, so that a slow minute of the machine meets all of them.
"""

import argparse
import statistics
from pathlib import Path

import numpy
import torch
from against_reference import SHAPES
from whole_synthesis import TASK, settings_of, worded_examples, worded_model

from gradmm import performance, records
from gradmm.models import Model

FACTORS = (1, 2, 4, 6, 8)
# From where each setting grows; groups are those of each of the two classes.
STARTS = {"groups": 1, "outer_steps": 1, "inner_steps": 4, "length": 8}


def fit(sizes: list[float], seconds: list[float]) -> dict[str, float]:
    """The line through timings, with the same weight for the same share: start, slope, and the worst deviation in percent.

    A line's deviations are taken as shares of it, so a constant cost (reading the settings, the prompts) is no deviation.
    """
    weights = 1 / numpy.asarray(seconds)
    slope, start = numpy.polyfit(sizes, seconds, 1, w=weights)
    line = start + slope * numpy.asarray(sizes)
    worst = float(numpy.abs(numpy.asarray(seconds) / line - 1).max())
    return {"start_seconds": float(start), "slope_seconds": float(slope), "worst_percent": 100 * worst}


def measure(model: Model, options: argparse.Namespace) -> dict:
    """For each setting its sizes, median seconds and fitted line."""
    found = {}
    for name in options.settings:
        sizes = [STARTS[name] * factor for factor in FACTORS]
        runs = [[one(model, options, name, size) for size in sizes] for _ in range(options.repeats)]
        seconds = [statistics.median(column) for column in zip(*runs, strict=True)]
        found[name] = {"sizes": sizes, "seconds": seconds, "runs": runs, **fit(sizes, seconds)}
    return found


def one(model: Model, options: argparse.Namespace, name: str, size: int) -> float:
    """Seconds of a whole synthesis with one setting changed."""
    changed = argparse.Namespace(**vars(options) | {name: size})
    examples = worded_examples(options.shape, options.real, changed.length)
    return performance.time_synthesis(model, TASK, examples, settings_of(changed))[1]["whole"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--settings", nargs="+", choices=STARTS, default=list(STARTS), help="which settings grow")
    parser.add_argument("--groups", type=int, default=1, help="of each class, while another setting grows")
    parser.add_argument("--outer-steps", type=int, default=2)
    parser.add_argument("--inner-steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--count", type=int, default=10, help="texts of a group")
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--real", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=1, help="starts that each group takes the best of")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a record, such as book/records/scaling-small-cpu.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, save; returns the results."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model = worded_model(options.shape, options.device, options.dtype)
    one(model, options, "groups", 1)  # so that no library loads within a timing
    results = measure(model, options)
    print(f"shape {options.shape}, {options.device}, {options.dtype}; medians of {options.repeats}")
    for name, row in results.items():
        points = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in zip(row["sizes"], row["seconds"], strict=True))
        print(f"{name:12} {points}; at most {row['worst_percent']:.1f}% from {row['start_seconds']:.2f} + {row['slope_seconds']:.3f} n")
    if options.output:
        named = {name: value for name, value in vars(options).items() if name != "output"}
        records.write_record(options.output, results, {**named, "sizes": SHAPES[options.shape]})
    return results


if __name__ == "__main__":
    main()
