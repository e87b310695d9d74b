"""The command `gradmm`: what it can do, and the way to it. Imports nothing slow before it knows what is asked."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from gradmm import __version__
from gradmm.errors import UserError
from gradmm.progress import announced, shown

COMMANDS = {
    "synthesize": "write synthetic texts from labelled real ones, or from a saved Release",
    "finetune": "fine-tune a model on examples and report the test accuracy",
    "evaluate": "report how often a model names the right label, as it is",
    "batch": "execute notebooks, several at a time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 all well, 2 the request cannot be met, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        _parser().parse_args(arguments)  # ends here: help, the version, or what is wrong
    try:
        if arguments[0] == "batch":
            return import_module("gradmm.experiments.batch").main(arguments[1:])
        with warnings.catch_warnings():
            warnings.showwarning = _note
            show = sys.stderr.isatty() and "--quiet" not in arguments
            with shown(show), announced("loading PyTorch and transformers"):
                commands = import_module("gradmm.commands")
            getattr(commands, arguments[0])(arguments[1:])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            "Stopped. What an output folder holds is kept, and the same command goes on from there; a private release "
            "that was charged and not finished is charged again.\n"
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gradmm",
        usage="gradmm [--help] [--version] COMMAND ...",
        epilog=f"commands (each has a --help of its own):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as one line, without the place in the package that gave it."""
    sys.stderr.write(f"{message}\n")
