"""Peak memory of a whole synthesis over the model's weights: `python tests/benchmarks/memory.py --shape small`.

Each row is a fresh process: random weights, a release of random texts, every phase from the first token table to the
last verdict, after a warm-up at the shape `tiny` that loads what is loaded once. On a CPU the peak is that of the
resident set, read every few milliseconds, minus what was resident before the release; so that it is that of the program
and not of what the C library keeps for later, glibc is told to give freed blocks back at once. On a GPU it is that of
the allocator. Prints a table, and with --output writes a record.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from against_reference import SHAPES, random_model, save
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import gradmm

SAMPLE_SECONDS = 0.002
DTYPES = ("float32", "bfloat16")
# glibc's own start, which else grows with use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
PROMPTS = ("w14 w15 w16 w17 w18\n", "w19 w20 w21 w22 w23\n")
TASK = gradmm.Task("random", ("first", "second"), (" w10", " w11"), "{text} w12 w13", PROMPTS)


def random_problem(shape: str, device: str, dtype: str) -> gradmm.Model:
    """`random_model` with a tokenizer that gives each row of its embedding a word."""
    names = ["<end>", "<unknown>", ".", *(f"w{number}" for number in range(3, SHAPES[shape]["vocabulary"]))]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", bos_token="<end>", unk_token="<unknown>"
    )
    return replace(random_model(shape, device, dtype), tokenizer=tokenizer)


def run(model: gradmm.Model, options: argparse.Namespace) -> gradmm.SynthesisResult:
    """A release of random texts and the synthesis for it."""
    source = torch.Generator().manual_seed(0)
    rows = torch.randint(30, len(model.tokenizer), (options.real, options.length), generator=source).tolist()
    real = [{"text": model.tokenizer.decode(row), "label": number % 2} for number, row in enumerate(rows)]
    release = gradmm.release(model, TASK, real, length=options.length, space="head")
    config = gradmm.SynthesisConfig(
        search="admm", ranking="text", n_synthetic=options.groups * options.count, oversample=1.0, top_k=options.top_k,
        group_size=options.count, outer_steps=options.outer_steps, inner_steps=options.inner_steps,
    )  # fmt: skip
    return gradmm.synthesize(model, TASK, release, config, progress=False)


class PeakResident:
    """The largest resident set while it is entered."""

    def __enter__(self) -> "PeakResident":
        self.bytes, self._over = resident(), threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watch.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(options: argparse.Namespace) -> dict:
    """One row, in this process."""
    run(
        random_problem("tiny", options.device, options.dtype),
        argparse.Namespace(**{**vars(options), "groups": 2, "count": 2, "top_k": 10, "real": 4}),
    )
    model = random_problem(options.shape, options.device, options.dtype)
    weights = sum(weight.numel() * weight.element_size() for weight in model.lm.parameters())
    begun = time.perf_counter()
    if model.device.type == "cpu":
        before = resident()
        with PeakResident() as peak:
            result = run(model, options)
        over = peak.bytes - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run(model, options)
        over = torch.cuda.max_memory_allocated() - before
    return {
        "dtype": options.dtype,
        "weights": weights,
        "peak_over_weights": over,
        "share_of_weights": over / weights,
        "seconds": time.perf_counter() - begun,
        "texts": len(result.candidates),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="this one alone (default: each)")
    parser.add_argument("--groups", type=int, default=20, help="of both classes together")
    parser.add_argument("--count", type=int, default=10, help="examples of a group")
    parser.add_argument("--length", type=int, default=28, help="tokens of an example")
    parser.add_argument("--real", type=int, default=50, help="real examples")
    parser.add_argument("--outer-steps", type=int, default=2)
    parser.add_argument("--inner-steps", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--output", type=Path, help="a record, such as book/records/memory-small-cpu.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure each type in a fresh process, print, save; returns the results."""
    options = parse(arguments)
    if options.here:
        row = measure(options)
        print(json.dumps(row))
        return row
    given = sys.argv[1:] if arguments is None else arguments
    rows = []
    for dtype in [options.dtype] if options.dtype else DTYPES:
        command = [sys.executable, __file__, *given, "--here", "--dtype", dtype]
        printed = subprocess.check_output(command, text=True, stdin=subprocess.DEVNULL, env=os.environ | GIVE_BACK)
        rows.append(json.loads(printed.splitlines()[-1]))
    print(f"{'type':10} {'weights':>10} {'peak over':>10} {'share':>7}   ({options.shape}, MB)")
    for row in rows:
        sizes = [row[name] / 1e6 for name in ("weights", "peak_over_weights")]
        print(f"{row['dtype']:10} {sizes[0]:10.1f} {sizes[1]:10.1f} {row['share_of_weights']:6.2f}x")
    save({"rows": rows}, options)
    return {"rows": rows}


if __name__ == "__main__":
    main()
