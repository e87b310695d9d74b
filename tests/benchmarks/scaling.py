"""Does the cost grow in proportion to what is asked for? `python tests/benchmarks/scaling.py`.

Groups, outer steps, inner steps and length each grow by a factor of 8 while the others stay where they are. A whole
synthesis is timed at every size, a line is fitted to the medians, and the worst deviation from it is given, in percent
of the line. Groups grow through the number of texts, `n_synthetic`, at a constant number of texts a group.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from against_reference import SHAPES, save
from whole_synthesis import TASK, settings_of, worded_examples, worded_model

from gradmm.experiments import performance

FACTORS = (1, 2, 4, 6, 8)
STARTS = {"n_synthetic": None, "outer_steps": 1, "inner_steps": 4, "length": 8}  # from where each setting grows


def growth(options: argparse.Namespace) -> dict[str, list[int]]:
    """Every setting's sizes; `n_synthetic` counts whole groups of both classes."""
    starts = {**STARTS, "n_synthetic": len(TASK.labels) * options.count}
    return {name: [starts[name] * factor for factor in FACTORS] for name in options.settings}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--settings", nargs="+", choices=STARTS, default=list(STARTS), help="which settings grow")
    parser.add_argument("--groups", type=int, default=1, help="of each class, while another setting grows")
    parser.add_argument("--outer-steps", type=int, default=1)
    parser.add_argument("--inner-steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--count", type=int, default=5, help="texts of a group")
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
    model, examples = (
        worded_model(options.shape, options.device, options.dtype),
        worded_examples(options.shape, options.real, options.length),
    )
    config = replace(
        settings_of(options), n_synthetic=len(TASK.labels) * options.groups * options.count, oversample=1.0
    )
    performance.time_synthesis(
        model, TASK, examples, replace(config, outer_steps=1, inner_steps=1)
    )  # so that no library loads within a timing
    results = performance.time_growth(model, TASK, examples, config, growth(options), options.repeats)
    print(f"shape {options.shape}, {options.device}, {options.dtype}; medians of {options.repeats}")
    for name, row in results.items():
        points = ", ".join(
            f"{size}: {seconds:.2f} s" for size, seconds in zip(row["sizes"], row["seconds"], strict=True)
        )
        print(
            f"{name:12} {points}; at most {row['worst_percent']:.1f}% from {row['start_seconds']:.2f} + "
            f"{row['slope_seconds']:.3f} n"
        )
    save(results, options)
    return results


if __name__ == "__main__":
    main()
