"""What the command `gradmm` does: a synthesis from data to texts, a fine-tuning, an evaluation.

    gradmm synthesize --model HuggingFaceTB/SmolLM2-135M --data reviews.csv --output synthetic
    accelerate launch --num_processes 4 -m gradmm synthesize --release sst2.safetensors --task sst2 --output synthetic

Every setting of `ReleaseConfig`, `SynthesisConfig` and `FinetuneConfig` is an option of the same name. With one process
or many, on one machine or several that see the output folder, the result is the same; interrupted work is continued by
the same command.
"""

import argparse
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from gradmm import admm, classification, finetuning, privacy, synthesis
from gradmm.classification import check_fit
from gradmm.config import FinetuneConfig, ReleaseConfig, SynthesisConfig, preset
from gradmm.data import Example, Splits, load_data, read_examples, sample_examples, without_overlap
from gradmm.errors import DataWarning, UserError, check_values, one_of, require
from gradmm.files import as_path, lock, read_parameters
from gradmm.models import Model, load_model
from gradmm.plan import MIN_TOKENS, check_request
from gradmm.privacy import Release, load_release, release_once
from gradmm.progress import announced, shown, stage
from gradmm.projection import PROJECTIONS
from gradmm.rows import COLUMNS
from gradmm.runs import output_folder, refuse_foreign
from gradmm.selection import FILTERS
from gradmm.sharding import launched
from gradmm.spaces import SPACES
from gradmm.tasks import Task, load_task

KINDS = {int: "NUMBER", float: "NUMBER", str: "TEXT", string_to_bool: "yes|no"}
# What the help of an option says where the setting's docstring points to code.
PLAINER = {
    ReleaseConfig: {"spaces.BodySketch, ": "", ", see spaces.own_texts": ""},
    SynthesisConfig: {
        "a name in projection.PROJECTIONS": "one of " + ", ".join(PROJECTIONS),
        "a name in selection.FILTERS": "one of " + ", ".join(FILTERS),
        "a name in RANKINGS: ": "",
        ", see generation.Sampling": "",
        "plan.MIN_TOKENS": str(MIN_TOKENS),
        " (work_units)": "",
        "names every random draw": "names every random draw; with --n-real it also chooses the examples, so that of a "
        "private release another seed is another release",
    },
}


@dataclass(frozen=True)
class Inputs:
    """What every command starts from.

    Attributes:
        model: a hub id, a folder, or demo.
        data: a folder or file of rows (JSON lines, CSV, Parquet), an id on the hub, a registered name, or demo.
        task: a registered name, a YAML file or a folder; without it the task that the data imply.
        text, label: the columns' names.
        revision: of the model on the hub.
        device: cpu, cuda or auto.
        dtype: of the weights: float32, bfloat16, float16, float64 or auto, which is the default on a GPU.
        quiet: no progress bars or lines.
    """

    model: str = "demo"
    data: str | None = None
    task: str | None = None
    text: str = "text"
    label: str = "label"
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    quiet: bool = False

    @property
    def show(self) -> bool:
        """Whether this process shows what it does."""
        return not self.quiet and launched()[0] == 0

    def load_data(self) -> tuple[Task, Splits]:
        """The task and the examples.

        Raises:
            UserError: no data, or what `load_data` refuses.
        """
        require(self.data is not None, "no data is given: add --data with a folder or file, or demo")
        with shown(self.show), announced(f"reading the data {self.data}"):
            return load_data(self.data, self.task, text=self.text, label=self.label)

    def load_fitting(self, task: Task, splits: Splits) -> Model:
        """The model, which fits the task and the examples.

        Raises:
            UserError: what `load_model` and `check_fit` refuse.
        """
        model = self.load_model()
        with shown(self.show), announced("checking that the data fit the model"):
            check_fit(model, task, splits)
        return model

    def load_model(self) -> Model:
        """The model alone."""
        return load_model(
            self.model, revision=self.revision, device=self.device, dtype=self.dtype, progress=not self.quiet
        )


@dataclass(frozen=True)
class Synthesis:
    """Settings of `gradmm synthesize` beside those of the release and of the synthesis.

    Attributes:
        release: a file that Release.save wrote, instead of data; with --task.
        n_real: how many of the train rows are released, all classes together; without it all. With --epsilon the
            guarantee is about those drawn, and a file that differs in one row may give many others.
        search: the preset that the settings start from: pool, whose settings are the defaults here, admm, paper or
            official.
        settings: a YAML file of SynthesisConfig's settings, over the preset.
        output: a folder for results and unfinished work, seen by all processes; without it one in results/synthesize.
        release_folder: with --epsilon, the folder that keeps the private release and counts what it cost; without it
            one in results/releases. The same request reads the release there; another folder draws and pays another.
    """

    release: str | None = None
    n_real: int | None = None
    search: str = "pool"
    settings: str | None = None
    output: str | None = None
    release_folder: str | None = None


@dataclass(frozen=True)
class Training:
    """Settings of `gradmm finetune` beside those of the fine-tuning.

    Attributes:
        train: a folder or file of rows to learn from, such as the output of a synthesis, with the columns text and
            label or those of the data; without it the data's train rows.
        output: a folder for unfinished work and the figures of finished work; without it nothing is kept.
    """

    train: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Split:
    """Settings of `gradmm evaluate`.

    Attributes:
        split: train, validation or test.
    """

    split: str = "test"


class _Parser(HfArgumentParser):
    """Options from dataclasses: help from their docstrings, and nothing in the result but what was given."""

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        self._help = {name: text for kind in reversed(kinds) for name, text in _help(kind).items()}
        super().__init__(kinds, conflict_handler="resolve", **options)

    def add_argument(self, *names, **options):
        if options.get("action") != "help":
            own = names[0].removeprefix("--").removeprefix("no_")
            options |= {"default": argparse.SUPPRESS, "help": self._help.get(own, "").replace("%", "%%")}
            if get_args(options.get("type")):  # several values, such as tuple[float, ...]
                options |= {"type": get_args(options["type"])[0], "nargs": "+"}
            if "type" in options:
                options["metavar"] = KINDS.get(options["type"], "VALUE")
        return super().add_argument(*names, **options)


def _attributes(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of each of its settings."""
    listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.replace("`", "").split()))
    return found


def _help(kind: type) -> dict[str, str]:
    """What the help of each of a dataclass's options says, in plain words and with the default."""
    solver, found = _attributes(admm.Config), _attributes(kind)
    for item in fields(kind):
        text = found[item.name].replace("see admm.Config.", solver.get(item.name, ""))
        for code, plain in PLAINER.get(kind, {}).items():
            text = text.replace(code, plain)
        default = item.default
        if default is not None:
            default = ("no", "yes")[default] if isinstance(default, bool) else default
            several = default if isinstance(default, tuple) else (default,)
            text = f"{text.removesuffix('.')} (default: {' '.join(map(str, several))})"
        found[item.name] = text
    return found


def _parse(command: Callable, kinds: Sequence[type], arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What was given for each dataclass; a setting that two have belongs to the first."""
    name, about = command.__name__, (inspect.getdoc(command) or "").split("\n\n")[0]
    usage = f"gradmm {name} [--help] [--SETTING VALUE ...]"  # all of them would be a page above a sentence
    parser = _Parser(kinds, prog=f"gradmm {name}", usage=usage, description=about, allow_abbrev=False)
    given = vars(parser.parse_args(arguments))
    parts = []
    for kind in kinds:
        names = {item.name for item in fields(kind)}
        parts.append({name: value for name, value in given.items() if name in names})
        given = {name: value for name, value in given.items() if name not in names}
    return parts


def synthesize(arguments: Sequence[str]) -> None:
    """Write synthetic texts whose gradients match those of labelled real texts, or of a saved Release.

    Raises:
        UserError: settings of data or privacy beside a saved Release, none of its task, or what the package refuses.
    """
    kinds = (Inputs, Synthesis, ReleaseConfig, SynthesisConfig)
    first, own, private, changes = _parse(synthesize, kinds, arguments)
    inputs, given = Inputs(**first), Synthesis(**own)
    if given.release is not None:
        changes |= {name: private.pop(name) for name in ("length",) if name in private}
        unused = ("data", "text", "label", "n_real", "release_folder")
        idle = [*private, *(name for name in unused if name in first | own)]
        require(
            not idle,
            f"--release holds a finished release, in which {' and '.join(idle)} "
            f"{'has' if len(idle) == 1 else 'have'} no part: leave out either the release or the rest",
        )
    config, settings = _config(given, changes), ReleaseConfig(**private)
    require(
        given.release_folder is None or settings.epsilon is not None,
        "--release-folder without --epsilon, no release is kept: add --epsilon, or leave the folder out",
    )
    _check_output(given.output, inputs.data)
    made = _released if given.release is None else _loaded
    release, model, task, folder = made(inputs, given, settings, config)
    result = synthesis.synthesize(model, task, release, config, folder, progress=not inputs.quiet)
    _say(
        f"{len(result.kept)} of {len(result.candidates)} texts are kept in {folder}/train.jsonl; the release is "
        f"{release.statement}"
    )


def _config(given: Synthesis, changes: dict[str, Any]) -> SynthesisConfig:
    """A preset's settings, with those of a file and then those of the command line over them."""
    values = {} if given.settings is None else read_parameters(given.settings)
    return preset(given.search, **{**values, **changes})


def _loaded(
    inputs: Inputs, given: Synthesis, private: ReleaseConfig, config: SynthesisConfig
) -> tuple[Release, Model, Task, Path]:
    release = load_release(str(given.release))
    require(inputs.task is not None, "--release says nothing of the prompts: add --task with the release's own task")
    task = load_task(str(inputs.task))
    check_request(task, release.space_name, config, private=bool(release.ledger))
    named = replace(inputs, data=Path(str(given.release)).name), replace(given, release=release.fingerprint)
    folder = _folder(*named, private, config, bool(release.ledger))
    return release, inputs.load_model(), task, folder


def _released(
    inputs: Inputs, given: Synthesis, private: ReleaseConfig, config: SynthesisConfig
) -> tuple[Release, Model, Task, Path]:
    task, splits = inputs.load_data()
    is_private, seed = private.epsilon is not None, config.seed
    asked = replace(private, space=private.space or (config.private_space if is_private else config.space))
    check_values({"space": asked.space_name}, {"space": one_of(SPACES)})
    check_request(task, asked.space_name, config, is_private)
    source = {"data": splits.source, "place": splits.place, "n_real": given.n_real}
    real = splits.train
    if given.n_real is not None:
        real, source = sample_examples(real, given.n_real, task, seed), {**source, "seed": seed}
    folder = _folder(inputs, given, private, config, is_private)
    model = inputs.load_fitting(task, splits)
    check_request(task, asked.space_name, config, is_private, model, asked.length)
    where, show = given.release_folder, not inputs.quiet
    with _telling(inputs.show):
        target = release_once(where, model, task, real, asked, source=source, output=folder, progress=show)
    return target, model, task, folder


@contextmanager
def _telling(tell: bool) -> Iterator[None]:
    """Within this, what `release_once` says of a private release goes to stderr, a line each."""
    lines, level = logging.StreamHandler(), privacy.LOG.level
    if tell:
        privacy.LOG.addHandler(lines)
        privacy.LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        privacy.LOG.removeHandler(lines)
        privacy.LOG.setLevel(level)


def _check_output(output: str | None, data: str | None) -> None:
    """Refuse, before anything is loaded, a folder for results in which they cannot lie.

    Raises:
        UserError: it is a file, holds the data or other work, or is in use.
    """
    if output is None:
        return
    folder = as_path(output, "the output folder")
    if data not in (None, "demo"):  # demo is the package's own, whatever lies here
        path = as_path(data, "the data")
        held = path.parent if path.is_file() else path
        require(held.resolve() != folder.resolve(), f"{folder} holds the data: choose another output folder")
    refuse_foreign(folder)
    if folder.exists() and launched()[0] == 0:
        with lock(folder):
            pass


def _folder(inputs: Inputs, given: Synthesis, asked: ReleaseConfig, config: SynthesisConfig, private: bool) -> Path:
    """The folder of the results; one of the user's own is claimed before a private release is paid for.

    Raises:
        UserError: it holds results of other parameters.
    """
    every = {
        item.name: getattr(one, item.name)
        for one in (inputs, given, config, asked)
        for item in fields(one)
        if item.name not in ("output", "quiet")
    }
    if given.output and asked.epsilon is None:  # the synthesis itself says what differs there
        return Path(given.output)
    return output_folder("synthesize", given.output, private=private, **every)


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a model on examples, choose rate and step on the validation rows, and report the test accuracy.

    Raises:
        UserError: what the package refuses.
    """
    first, own, settings = _parse(finetune, (Inputs, Training, FinetuneConfig), arguments)
    inputs, given = Inputs(**first), Training(**own)
    config = FinetuneConfig(**settings)
    _check_output(given.output, inputs.data)
    task, splits = inputs.load_data()
    train = splits.train if given.train is None else _unseen(_to_learn(given.train, task, inputs), splits)
    model = inputs.load_fitting(task, splits)
    found = finetuning.finetune(
        model, task, train, splits.validation, splits.test, config, given.output, progress=not inputs.quiet
    )
    _say(
        f"test accuracy {found.accuracy:.4f}, calibrated {found.calibrated.accuracy:.4f}, on {len(splits.test)} texts "
        f"after {found.step} steps at rate {found.learning_rate:g}, learnt from {len(train)} examples"
    )


def _to_learn(train: str, task: Task, inputs: Inputs) -> list[Example]:
    """The rows to learn from, in the columns that a synthesis writes or else in the data's."""
    try:
        return read_examples(train, task)
    except UserError as error:
        if "has no" not in str(error) or (inputs.text, inputs.label) == COLUMNS:
            raise
        try:
            return read_examples(train, task, text=inputs.text, label=inputs.label)
        except UserError as other:
            raise (error if "has no" in str(other) else other) from None


def _unseen(written: list[Example], splits: Splits) -> list[Example]:
    """The examples that are not in the validation or test set, and a note on the others."""
    kept = without_overlap(written, [*splits.validation, *splits.test])
    if len(kept) < len(written):
        count = f"{len(written) - len(kept)} row(s) to learn from"
        warnings.warn(f"{count} are left out, since their texts are in validation or test too", DataWarning, 2)
    return kept


def evaluate(arguments: Sequence[str]) -> None:
    """Report how often a model names the right label, as it is.

    Raises:
        UserError: an unknown split, or what the package refuses.
    """
    first, own = _parse(evaluate, (Inputs, Split), arguments)
    inputs, split = Inputs(**first), Split(**own).split
    require(split in ("train", "validation", "test"), f"split = {split!r} is not known: use train, validation or test")
    task, splits = inputs.load_data()
    model = inputs.load_fitting(task, splits)
    examples = getattr(splits, split)
    with shown(not inputs.quiet), stage("reading", len(examples)):
        found = classification.evaluate(model, task, examples)
    _say(f"{split} accuracy {found.accuracy:.4f}, macro F1 {found.macro_f1:.4f} on {len(examples)} texts")


def _say(text: str) -> None:
    if launched()[0] == 0:
        sys.stdout.write(f"{text}\n")
