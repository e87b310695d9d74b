r"""The one place where private text enters, and the one form in which it leaves: a Release.

Knows the model, the task and the examples; everything after it knows the Release alone. With epsilon = None the Release
holds the gradients as they are and says so. Otherwise, with g_i the gradient of example i as an outer product
delta_i h_i^T (and delta_i for a bias) in the release space, each class's target is

    G_c = sum_{i in c} g_i min(1, clip / ||g_i||)  +  N(0, sigma^2)      ||g_i||^2 = |delta_i|^2 (|h_i|^2 + [bias])

Sensitivity of (G_1 .. G_C) together, in L2. "add-remove": one term comes or goes, at most clip. "replace-one": within
its class two terms differ, ||g - g'|| <= 2 clip; with a new label two sums move by one term each, sqrt(clip^2 +
clip^2); so at most 2 clip. Sums rather than means: the private class counts are not needed. Nothing here asks what the
coordinates are: a space maps each example alone, by a map made of public inputs (rows, directions, sketches,
models trained on public texts), and the norm that is clipped is that of what it gives, so whatever a space stretches is
clipped after it.

What the guarantee takes for granted: the classes, the template, the length, the clip and the space are chosen without a
look at the private examples, and every class has an example (an empty one is an error, which tells that it was empty;
so do a text that is too long and a gradient that is not finite). Letters: n examples of a class, C classes, V rows of
the head, R rows and r directions of the release space, D hidden width.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmm import files
from gradmm.config import ReleaseConfig
from gradmm.data import Example, check_examples
from gradmm.errors import UserError, first_line, require, require_flag, require_settings, require_type
from gradmm.files import LOCK, lock
from gradmm.gradients import DenseTarget, Factors, FactorTarget, Space, Target
from gradmm.matching import factors_of
from gradmm.mechanism import (
    Ledger,
    LedgerEntry,
    noised_sums,
    plan_entry,
    seeded_bits,
    system_bits,
    total_epsilon,
)
from gradmm.models import Model, require_model
from gradmm.progress import announced, shown, stage
from gradmm.runs import RESULTS, refuse_other
from gradmm.sharding import launched
from gradmm.spaces import BodySketch, coordinates, release_space, space_from, tensors_of
from gradmm.tasks import Task, TaskTokens, require_task, tokenize_task

LOG = logging.getLogger(__name__)
FORMAT = "gradmm release 1"
SPACE = "space."  # before the names of the space's tensors in a file
RELEASE_FILE, LEDGER_FILE = "release.safetensors", "ledger.json"


@dataclass(frozen=True, eq=False, repr=False)
class Release:
    """All that is known of the real examples after `release`.

    Attributes:
        targets: one per class: the mean gradient as its examples' factor pairs (not private), or the noised sum of
            clipped gradients, weight (R, r) and bias (R,). The scales differ; the cosine distance does not see it.
        space: the coordinates of the targets.
        space_name: one of `spaces.SPACES`.
        labels: C class names.
        label_tokens: C rows of the head.
        private: whether the differential privacy that the ledger states holds.
        statement: the same as a sentence.
        ledger: what was spent on these examples, oldest first; empty without privacy.
        model, task: fingerprints of the model and the task that the gradients belong to.
        length: L, tokens of a text, of a pool at most twice as many: public with privacy; without, the real texts' mean
            where none was given.
        examples: SHA-256 of the examples that exact gradients are of, whose last bits follow the number of threads and,
            on a GPU, chance. Empty with privacy, where nothing but the noised sums may leave.
    """

    targets: tuple[Target, ...]
    space: Space | BodySketch
    space_name: str
    labels: tuple[str, ...]
    label_tokens: tuple[int, ...]
    private: bool
    statement: str
    ledger: tuple[LedgerEntry, ...]
    model: str
    task: str
    length: int
    examples: str = ""

    def __repr__(self) -> str:
        """Without the numbers."""
        return f"Release({self.space_name!r}, labels={self.labels}, length={self.length}: {self.statement})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every field and every number."""
        digest = hashlib.sha256(_fields_json(self).encode())
        for name, value in sorted(_tensors(self).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Release":
        """The same Release on another device."""
        return _assemble(json.loads(_fields_json(self)), {k: v.to(device) for k, v in _tensors(self).items()})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with the fields as metadata."""
        # One entry alone: safetensors writes several in no fixed order, and equal Releases should be equal files.
        held = json.dumps(
            {"fields": json.loads(_fields_json(self)), "fingerprint": self.fingerprint}, ensure_ascii=False
        )
        return files.write_tensors(files.as_path(path, "the Release"), _tensors(self), {"release": held})


def load_release(path: str | Path) -> Release:
    """Read what `Release.save` wrote, onto the CPU.

    Raises:
        UserError: no safetensors file, no Release, or contents that differ from what was saved.
    """
    tensors, metadata = files.read_tensors(files.as_path(path, "the Release"))
    try:
        held = json.loads(metadata["release"])
        found = _assemble(held["fields"], tensors)
        whole = found.fingerprint == held["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no saved Release ({first_line(error)}): save one with Release.save") from error
    require(whole, f"{path} does not hold what was saved in it: make the Release again")
    return found


def release(
    model: Model,
    task: Task,
    examples: Iterable,
    config: ReleaseConfig | None = None,
    *,
    ledger: Ledger | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Release:
    """Turn real examples into the gradients that synthetic text is to match.

    Args:
        model: the language model.
        task: the task.
        examples: `Example`s, mappings with `text` and `label`, or a `datasets.Dataset` of them, see
            `data.check_examples`; at least one of every class.
        config: privacy, space and length; None starts from the defaults.
        ledger: the budget to charge; None counts this release alone.
        cache: a folder, such as the run's, that keeps the public texts that the model writes, so that a later release
            of the same model and task reads them back; nothing of the real examples is written there.
        progress: whether to show a progress bar if writing them takes more than two seconds.
        settings: settings of `ReleaseConfig` by name, instead of those in `config`, such as `epsilon`, `delta`,
            `length`, `clip` and `space`.

    Returns:
        Release.

    Raises:
        UserError: an argument out of range, with epsilon a length beyond the model's context, an example without text
            or label, an empty class, a gradient that is not finite, or a budget that does not suffice. Nothing is
            released and nothing spent then; no message holds private text.

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> model = gradmm.load_model("demo", device="cpu")
        >>> real = gradmm.sample_examples(data.train, 4, task, seed=0)
        >>> gradmm.release(model, task, real).statement
        'not private: the gradients of the real examples as they are'
        >>> gradmm.release(model, task, real, epsilon=1.0, delta=1e-5, length=16).private
        True
    """
    require_model(model)
    tokens = tokenize_task(task, model.tokenizer)
    config = _configured(config, settings)
    _check(config, ledger, cache, progress)
    _check_length(model, tokens, config)
    classes = _by_class(model, tokens, examples, task)  # before the space: some spaces run the model
    space = release_space(
        model, tokens, config.space_name, config.public_texts, config.directions, cache=cache, progress=progress
    )
    entry = _entry(config, coordinates(model, space) * len(task.labels))
    if entry is not None and ledger is not None:
        ledger.check(entry)  # before the work of many gradients
    with shown(progress), stage("reading gradients", sum(map(len, classes)), "example"):
        factors = _factors(model, tokens, classes, space, one_by_one=entry is not None)
    spent = () if entry is None else _charge(ledger, entry)
    return Release(
        targets=_targets(factors, spent, config.noise_seed),
        space=space,
        space_name=config.space_name,
        labels=task.labels,
        label_tokens=tokens.labels,
        private=bool(spent) and config.noise_seed is None,
        statement=_statement(spent, config.noise_seed),
        ledger=spent,
        model=model.fingerprint,
        task=task.fingerprint,
        length=_mean_length(tokens, classes) if config.length is None else config.length,
        examples="" if spent else _digest_of(classes, config, model),
    )


def release_once(
    folder: str | Path | None,
    model: Model,
    task: Task,
    examples: Iterable,
    config: ReleaseConfig | None = None,
    *,
    source: Mapping[str, Any],
    output: str | Path | None = None,
    **options: Any,
) -> Release:
    """A private release that is drawn once and kept: the same call again reads it from its folder and spends nothing.

    The folder holds the Release (`release.safetensors`) and what was spent on its examples (`ledger.json`). A charge is
    written before the noise is drawn, so that a crash in between leaves it counted, and the Release that is drawn next
    says what both cost together. Who asks while another process makes the Release waits for it. Without epsilon this is
    `release`, and nothing is kept.

    Of the examples nothing is stored, not even a hash: that other texts stand behind the same `source` cannot be seen
    here. Nor does a folder count what others cost. Noise that was drawn cannot be drawn back: deleting a folder deletes
    the count and gives no budget back, and the release that replaces it costs as much again. Whether noise was drawn,
    and how many other releases of the same data lie near it, goes to the logger "gradmm.privacy" at INFO.

    Args:
        folder: of the Release; None: one in results/releases that follows from all arguments, so that no change of
            what comes after a Release draws and pays another one.
        model, task, examples: as in `release`; the examples are not looked at where the folder holds their Release.
        source: public facts that say which examples these are, such as the data's name and place (`Splits`), how many
            were drawn, and the seed.
        output: where a synthesis for the Release is to lie; if a run lies there already, of another Release then, none
            is drawn that could not be used there.
        config, options: as in `release`, without a ledger.

    Raises:
        UserError: the folder holds a Release with other arguments, each that differs is named; `output` holds a run and
            the Release is still to be drawn; or as in `release`.
    """
    require(
        "ledger" not in options,
        "release_once was given a ledger, but its folder has one of its own: use gradmm.release for another",
    )
    place = {name: options.pop(name) for name in ("cache", "progress") if name in options}
    config = _configured(config, options)
    if config.epsilon is None:
        return release(model, task, examples, config, **place)
    require_model(model)
    require_task(task)
    _check_source(source)
    arguments = _public_arguments(model, task, source, config)
    folder = RESULTS / "releases" / files.digest(arguments)[:8] if folder is None else folder
    folder = files.as_path(folder, "the folder of the release")
    with ExitStack() as held:
        with shown(place.get("progress", True)), announced(f"waiting for who makes the release in {folder}"):
            alone = held.enter_context(lock(folder, wait=True))
        ledger = _FolderLedger.open(folder / LEDGER_FILE, arguments)
        kept = folder / RELEASE_FILE
        if kept.exists():
            return _read_kept(kept, ledger)
        _check_output(output, folder)
        _check_lock(alone, folder)
        drawn = release(model, task, examples, config, **place, ledger=ledger)
        drawn.save(kept)
        kind = "private release" if drawn.private else "release"
        others = _others(folder, arguments) if drawn.private else ""
        LOG.info("a new %s was drawn and is kept in %s%s", kind, folder, others)
        return drawn


def _read_kept(kept: Path, ledger: Ledger) -> Release:
    """The release of a folder whose ledger counts it."""
    require(bool(ledger.entries), f"{kept} has no {LEDGER_FILE} beside it that counts it: choose another folder")
    found = load_release(kept)
    LOG.info(
        "the release in %s was read: nothing was spent, and the data were not looked at; if they have changed, another "
        "folder is a further release, which costs as much again",
        kept.parent,
    )
    return found


def _others(folder: Path, arguments: Mapping[str, Any]) -> str:
    """How many other releases of the same data there are, by the public facts of the ledgers beside it and at home."""
    home: Path = RESULTS / "releases"
    found: set[Path] = set()
    for place in (folder.parent, home):
        with suppress(OSError, RuntimeError):  # a folder that can't be listed has nothing to say
            found |= {path.resolve() for path in place.glob(f"*/{LEDGER_FILE}")}
    number = sum(_same_data(path, arguments) for path in found - {(folder / LEDGER_FILE).resolve()})
    where = "beside it" if folder.parent.resolve() == home.resolve() else f"beside it or in {home}"
    return f"; {number} other(s) of the same data lie {where}: what they cost adds up" if number else ""


def _same_data(ledger: Path, arguments: Mapping[str, Any]) -> bool:
    """Whether a file is a ledger of these data; a file that can't be read or is no ledger is not."""
    try:
        held = files.read_json(ledger)["release"]
        same = "data" in arguments and all(held.get(name) == arguments.get(name) for name in ("data", "place"))
        return same and held.get("noise_seed") is None  # with one it has no guarantee, and adds up to nothing
    except Exception:  # whatever else lies there: the release is drawn and must be returned
        return False


def _check_source(source: Mapping[str, Any]) -> None:
    require_type(source, Mapping, "source", "give public facts such as {'data': 'demo', 'seed': 0}")
    require(
        source.get("place") != "",
        "source has the place '', as of data in memory, which nothing tells apart: leave place out of it and give data "
        "a name that is yours alone, such as {'data': 'reviews of May', 'seed': 0}",
    )


def _check_lock(alone: bool, folder: Path) -> None:
    """Refuse to draw where nothing keeps another process from drawing too: only one of both would be counted."""
    require(
        alone,
        f"{folder} can't be locked (its {LOCK} is another user's, or the file system has no locks), so another process "
        "could draw the noise too, uncounted: give the release another folder",
    )


def _check_output(output: str | Path | None, folder: Path) -> None:
    """Refuse to draw a Release for an output folder where a run of another one lies."""
    require(
        output is None or not (Path(output) / "manifest.json").exists(),
        f"{output} holds a run of another release than this one, which is still to be drawn in {folder}: give the "
        "same data, task and settings from the same working folder, or another output",
    )


def _public_arguments(model: Model, task: Task, source: Mapping[str, Any], config: ReleaseConfig) -> dict:
    """All that tells one release from another and is no secret."""
    # 1 and 1.0, and a space and its name left out, ask for the same.
    given = asdict(config) | {name: float(getattr(config, name) or 0) for name in ("epsilon", "delta", "clip")}
    given["space"] = config.space_name
    given["public_texts"] = config.public_texts and files.digest(list(config.public_texts))
    return json.loads(
        json.dumps(
            {"model": model.fingerprint, "task": task.fingerprint, "min_words": task.min_words, **source, **given},
            default=str,
        )
    )


@dataclass
class _FolderLedger(Ledger):
    """The ledger of a folder: a file that every charge enters before it counts; its budget is what is asked for."""

    path: Path = Path()
    arguments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The entries of a file were charged when they were written, and `release` checks the claim."""

    @staticmethod
    def open(path: Path, arguments: dict) -> "_FolderLedger":
        held: dict[str, Any] = files.read_json(path) if path.exists() else {"release": arguments, "entries": []}
        try:
            entries, theirs = tuple(LedgerEntry(**entry) for entry in held["entries"]), held["release"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no ledger of a release ({first_line(error)}): choose another folder") from error
        refuse_other(
            arguments,
            theirs,
            f"{path.parent} holds a release with other arguments",
            "give the same to read it, or another folder for a further release, which costs as much again and which "
            f"{path} will not count",
        )
        return _FolderLedger(arguments["epsilon"], arguments["delta"], entries, path, arguments)

    def check(self, entry: LedgerEntry) -> None:
        """Nothing is refused: a release that was charged and lost in a crash counts in the next one's statement."""

    def charge(self, entry: LedgerEntry) -> None:
        """Write the expense down, then record it."""
        entries = (*self.entries, entry)
        files.write_json(self.path, {"release": self.arguments, "entries": [asdict(one) for one in entries]})
        self.entries = entries


def _configured(config: ReleaseConfig | None, settings: Mapping[str, Any]) -> ReleaseConfig:
    require_type(config, ReleaseConfig | None, "the config", "give a gradmm.ReleaseConfig, or its settings by name")
    require_settings(ReleaseConfig, settings)
    return replace(config or ReleaseConfig(), **settings)


def _check(config: ReleaseConfig, ledger: Ledger | None, cache: str | Path | None, progress: bool) -> None:
    require_type(ledger, Ledger | None, "the ledger", "give a gradmm.Ledger such as Ledger(epsilon=1.0, delta=1e-5)")
    require(
        config.epsilon is not None or ledger is None,
        "ledger without epsilon, nothing would be private: give epsilon, or leave it out",
    )
    require(
        config.noise_seed is None or ledger is None or isinstance(ledger, _FolderLedger),
        f"noise_seed = {config.noise_seed} with a ledger: noise that can be drawn again protects nobody, and "
        "whatever is added to it would count for nothing, so leave one of them out",
    )
    processes = launched()[1]
    require(
        config.epsilon is None or config.noise_seed is not None or processes == 1,
        f"epsilon = {config.epsilon} in {processes} processes would draw and spend the noise {processes} times: "
        "release in one process, save the Release, and load it in the others with load_release",
    )
    if cache is not None:
        files.as_path(cache, "the cache")
    require_flag(progress, "progress")


def _check_length(model: Model, tokens: TaskTokens, config: ReleaseConfig) -> None:
    """Refuse, before a private release is paid for, a length that no search could write: another one costs again."""
    if config.epsilon is not None and config.length is not None:
        check_context(model, tokens, config.length, opened=0)


def check_context(model: Model, tokens: TaskTokens, length: int, opened: int) -> None:
    """Raise unless the model reads a text with the template around it, or behind its prompt.

    Args:
        length: tokens of a text, with the `opened` ones that its prompt begins it with.
    """
    around = max(len(tokens.start + tokens.prefix + tokens.suffix), max(map(len, tokens.prompts)))
    require(
        around + length <= model.context,
        f"length = {length - opened} with a template or prompt of {around + opened} tokens, {model.name} reads "
        f"{model.context}: take a length of at most {model.context - around - opened}",
    )


def _entry(config: ReleaseConfig, coordinates: int) -> LedgerEntry | None:
    """What the release costs; None without privacy."""
    if config.epsilon is None or config.delta is None:
        return None
    claim = (config.epsilon, config.delta, config.relation, config.clip, config.calibration)
    return plan_entry("sums of clipped gradients per class", config.space_name, *claim, coordinates)


# ---------------------------------------------------------------- private examples


def _by_class(model: Model, tokens: TaskTokens, examples: Iterable, task: Task) -> list[list[Example]]:
    """The examples of each class; messages name rows, counted as they were given, and labels, never text."""
    found = check_examples(examples, task, "example")
    model.check_lengths([tokens.sequence(example.text) for example in found], [example.origin for example in found])
    classes = [[example for example in found if example.label == label] for label in range(len(task.labels))]
    empty = [name for name, members in zip(task.labels, classes, strict=True) if not members]
    require(
        not empty,
        f"there is no example of {', '.join(map(repr, empty))}, each of the {len(classes)} classes needs one: add some",
    )
    return classes


def _factors(
    model: Model, tokens: TaskTokens, classes: list[list[Example]], space: Space | BodySketch, one_by_one: bool
) -> list[Factors]:
    """Each class's gradients in the release space: delta (n, R), hidden (n, r).

    `one_by_one` runs every text alone, so that no rounding of one example's gradient depends on another example.
    """
    sequences = [[tokens.sequence(example.text) for example in members] for members in classes]
    found = []
    for number, members in enumerate(sequences):
        runs = [[sequence] for sequence in members] if one_by_one else [members]
        parts = [factors_of(model, tokens, space, part, [number] * len(part)) for part in runs]
        pairs = Factors(torch.cat([p.delta for p in parts]), torch.cat([p.hidden for p in parts]), parts[0].bias)
        finite = pairs.delta.isfinite().all() and pairs.hidden.isfinite().all()
        require(
            bool(finite), f"a gradient is not finite with {model.name} in {model.dtype}: use another dtype or model"
        )
        found.append(pairs)
    return found


def _digest_of(classes: list[list[Example]], config: ReleaseConfig, model: Model) -> str:
    """SHA-256 of all that decides about exact gradients but the model's fingerprint and the space's name."""
    rows = [[one.text, one.label] for members in classes for one in members]
    return files.digest([rows, config.public_texts, config.directions, str(model.dtype)])


def _mean_length(tokens: TaskTokens, classes: list[list[Example]]) -> int:
    lengths = [len(tokens.encode(example.text)) for members in classes for example in members]
    return max(1, round(sum(lengths) / len(lengths)))


# ---------------------------------------------------------------- budget


def _charge(ledger: Ledger | None, entry: LedgerEntry) -> tuple[LedgerEntry, ...]:
    if ledger is None:
        return (entry,)
    ledger.charge(entry)
    return ledger.entries


def _targets(factors: list[Factors], spent: tuple[LedgerEntry, ...], noise_seed: int | None) -> tuple[Target, ...]:
    """The exact gradients, or with an expense what it pays for: the sums of the clipped ones with their noise."""
    if not spent:
        return tuple(FactorTarget(pairs) for pairs in factors)
    return noised_sums(factors, spent[-1], system_bits if noise_seed is None else seeded_bits(noise_seed))


def _statement(spent: Sequence[LedgerEntry], noise_seed: int | None) -> str:
    if not spent:
        return "not private: the gradients of the real examples as they are"
    entry = spent[-1]
    claim = (
        f"({entry.epsilon:g}, {entry.delta:g})-differential privacy for {entry.relation} neighbours: Gaussian noise of "
        f"standard deviation {entry.sigma:.6g} ({entry.calibration} calibration, sensitivity {entry.sensitivity:g}) on "
        f"the {entry.what} in the space {entry.space}"
    )
    if len(spent) > 1:
        total = total_epsilon(spent, entry.delta)
        claim += f"; with the {len(spent) - 1} earlier release(s) of its ledger ({total:.6g}, {entry.delta:g}) in all"
    return claim if noise_seed is None else f"not private: the noise seed is fixed at {noise_seed}; otherwise {claim}"


# ---------------------------------------------------------------- files


def _fields_json(release: Release) -> str:
    """Every field that is no tensor."""
    values = {f.name: getattr(release, f.name) for f in fields(release) if f.name not in ("targets", "space")}
    values |= {"format": FORMAT, "ledger": [asdict(entry) for entry in release.ledger]}
    values = {name: value for name, value in values.items() if (name, value) != ("examples", "")}
    return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _tensors(release: Release) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {f"{SPACE}{name}": value for name, value in tensors_of(release.space).items()}
    for number, target in enumerate(release.targets):
        if isinstance(target, FactorTarget):
            found |= {f"{number}.delta": target.factors.delta, f"{number}.hidden": target.factors.hidden}
            found |= {f"{number}.with_bias": torch.tensor(target.factors.bias)}
        else:
            found |= {f"{number}.weight": target.weight, f"{number}.bias": target.bias}
    return {name: value for name, value in found.items() if value is not None}


def _assemble(values: dict, tensors: dict[str, Tensor]) -> Release:
    """The inverse of `_fields_json` and `_tensors`."""
    if values.pop("format") != FORMAT or not all(
        math.isfinite(float(t.double().abs().sum())) for t in tensors.values()
    ):
        raise ValueError("another format, or numbers that are not finite")
    values |= {"labels": tuple(values["labels"]), "label_tokens": tuple(values["label_tokens"])}
    values["ledger"] = tuple(LedgerEntry(**entry) for entry in values["ledger"])
    targets = tuple(_target(tensors, number) for number in range(len(values["labels"])))
    held = {name.removeprefix(SPACE): value for name, value in tensors.items() if name.startswith(SPACE)}
    return Release(targets=targets, space=space_from(values["space_name"], held, len(targets)), **values)


def _target(tensors: dict[str, Tensor], number: int) -> Target:
    if f"{number}.delta" in tensors:
        pairs = Factors(tensors[f"{number}.delta"], tensors[f"{number}.hidden"], bool(tensors[f"{number}.with_bias"]))
        return FactorTarget(pairs)
    return DenseTarget(tensors[f"{number}.weight"], tensors.get(f"{number}.bias"))
