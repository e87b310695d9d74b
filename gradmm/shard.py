"""A synthesis from the command line, by one process or by as many as a launcher starts.

    accelerate launch --num_processes 4 -m gradmm.shard --model microsoft/phi-1_5 --task sst2 \\
        --release sst2.safetensors --settings settings.yaml --output results/sst2

Reads a saved Release and never a real text. With one process or many, on one machine or several that see the output
folder, the result is the same; interrupted work is continued by the same command, whatever the number of processes
then.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from gradmm.config import SynthesisConfig
from gradmm.config import preset as named
from gradmm.errors import UserError
from gradmm.files import read_parameters
from gradmm.models import load_model
from gradmm.privacy import load_release
from gradmm.sharding import launched
from gradmm.synthesis import synthesize
from gradmm.tasks import load_task


def settings(preset: str | None, path: str | None) -> SynthesisConfig:
    """A preset's settings, or the defaults, with those of a YAML file over them."""
    values = {} if path is None else read_parameters(path)
    SynthesisConfig.from_dict(values)  # names a setting that does not exist
    return replace(named(preset) if preset else SynthesisConfig(), **values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 all well, 2 the request cannot be met."""
    given = _parser().parse_args(arguments)
    try:
        config, task, release = (
            settings(given.preset, given.settings),
            load_task(given.task),
            load_release(given.release),
        )
        model = load_model(given.model, revision=given.revision, device=given.device, dtype=given.dtype)
        result = synthesize(model, task, release, config, given.output, progress=not given.quiet)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if launched()[0] == 0:
        sys.stdout.write(f"{len(result.kept)} of {len(result.dataset)} texts are kept in {given.output}/train.jsonl\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradmm.shard", description="Write synthetic text for a saved Release."
    )
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or demo (default: %(default)s)")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument(
        "--task", default="demo", help="a registered name, a YAML file or a folder of JSON lines (default: %(default)s)"
    )
    parser.add_argument("--release", required=True, metavar="FILE", help="what Release.save wrote")
    parser.add_argument("--preset", help="a name in gradmm.PRESETS, such as paper; without it the defaults hold")
    parser.add_argument("--settings", metavar="FILE", help="a YAML file of SynthesisConfig's settings, over the preset")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="results and unfinished work; seen by all processes"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16, float64 or auto (default: float32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(importlib.import_module("gradmm.shard").main())
