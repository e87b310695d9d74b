r"""The one place where private text enters, and the one form in which it leaves: a Release.

Knows the model, the task and the examples; everything after it knows the Release alone. With epsilon = None the Release
holds the gradients as they are and says so. Otherwise, with g_i the gradient of example i as an outer product
delta_i h_i^T (and delta_i for a bias) in the release space, each class's target is

    G_c = sum_{i in c} g_i min(1, clip / ||g_i||)  +  N(0, sigma^2)      ||g_i||^2 = |delta_i|^2 (|h_i|^2 + [bias])

Sensitivity of (G_1 .. G_C) together, in L2. "add-remove": one term comes or goes, at most clip. "replace-one": within
its class two terms differ, ||g - g'|| <= 2 clip; with a new label two sums move by one term each, sqrt(clip^2 +
clip^2); so at most 2 clip. Sums rather than means: the private class counts are not needed. Nothing here asks what the
coordinates are: a space maps each example alone, by a map made of public inputs (rows, directions, whitening, sketches,
models trained on public texts), and the norm that is clipped is that of what it gives, so whatever a space stretches is
clipped after it.

What the guarantee takes for granted: the classes, the template, the length, the clip and the space are chosen without a
look at the private examples, and every class has an example (an empty one is an error, which tells that it was empty;
so do a text that is too long and a gradient that is not finite). Letters: n examples of a class, C classes, V rows of
the head, R rows and r directions of the release space, D hidden width.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmm import files
from gradmm.data import Example, check_examples
from gradmm.errors import UserError, first_line, require, require_flag, require_texts, require_type, require_whole
from gradmm.files import lock
from gradmm.gradients import DenseTarget, Factors, FactorTarget, HeadSpace, Target
from gradmm.matching import factors_of
from gradmm.mechanism import (
    Ledger,
    LedgerEntry,
    check_clipping,
    check_delta,
    noised_sums,
    plan_entry,
    seeded_bits,
    system_bits,
    total_epsilon,
)
from gradmm.models import Model, require_model
from gradmm.runs import differences
from gradmm.sharding import launched
from gradmm.spaces import BodySketch, coordinates, release_space, space_from, tensors_of
from gradmm.tasks import Task, TaskTokens, require_task, tokenize_task

FORMAT = "gradmm release 1"
SPACE = "space."  # before the names of the space's tensors in a file
RELEASE_FILE, LEDGER_FILE = "release.safetensors", "ledger.json"


@dataclass(frozen=True, eq=False)
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
        length: L, tokens of a text: public with privacy, the real texts' mean without.
    """

    targets: tuple[Target, ...]
    space: HeadSpace | BodySketch
    space_name: str
    labels: tuple[str, ...]
    label_tokens: tuple[int, ...]
    private: bool
    statement: str
    ledger: tuple[LedgerEntry, ...]
    model: str
    task: str
    length: int

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
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    clip: float = 1.0,
    space: str | None = None,
    relation: str = "replace-one",
    calibration: str = "exact",
    length: int | None = None,
    public_texts: Sequence[str] | None = None,
    directions: int | None = None,
    ledger: Ledger | None = None,
    noise_seed: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Release:
    """Turn real examples into the gradients that synthetic text is to match.

    Args:
        model: the language model.
        task: the task.
        examples: `Example`s, mappings with `text` and `label`, or a `datasets.Dataset` of them, see
            `examples.check_examples`; at least one of every class.
        epsilon: None releases the exact gradients without privacy; otherwise a positive number.
        delta: the chance with which epsilon may fail, at most 0.01; needed with epsilon. The usual advice is well below
            1 / number of examples: who hands out each example as it is with the chance delta keeps to it.
        clip: the largest L2 norm of one example's gradient in the release space (clip, relation and calibration act
            with epsilon alone).
        space: "head" (V x D), "label_rows" (the C labels' rows, C x D), "label_rows_subspace" (C x r: those rows times
            the first r principal directions of the hidden states of `public_texts`) or "label_rows_centred" (C x r: the
            same without the first direction, which nearly all texts share: it takes most of the clip and says little of
            what sets the classes apart). Under the loss that fine-tuning uses, over the label tokens alone, with the
            model's preference among them taken out: "label_rows_calibrated" (C x D) and "label_rows_whitened" (the
            same, of hidden states whitened by those of public texts). Under that loss, and for `search = "pool"` alone,
            gradients of the body, see `gradmm.spaces`: "body" (a sketch of every linear map's: what fine-tuning
            follows). None takes "body" without epsilon and "label_rows" with it: the smaller the space, the less noise,
            and of the two that need no public text it keeps by far the more of what sets the classes apart (notebook 04
            measures it). Give public texts and "label_rows_centred" to keep more. The paper matches "head", which ADMM
            needs.
        relation: which data sets are neighbours: "replace-one" (one example, label included, becomes another) or
            "add-remove" (one example comes or goes).
        calibration: "exact"; "classic" and "zhao2019" use more noise and serve to reproduce published figures.
        length: L, tokens of a synthetic text; public, hence needed with epsilon; None takes the real texts' mean
            without.
        public_texts: texts that are not private: needed for the two subspaces; for the spaces under the loss over the
            label tokens what preference and whitening are measured on (None: texts that the model writes from the
            public prompts, as many as the estimate needs, see `spaces.own_texts`).
        directions: r; None takes 4, or as many as there are texts or hidden units if fewer.
        ledger: the budget to charge; None counts this release alone.
        noise_seed: fixes the noise for a repeatable experiment; the Release is then marked as not private.
        cache: a folder, such as the run's, that keeps the public texts that the model writes, so that a later release
            of the same model and task reads them back; nothing of the real examples is written there.
        progress: whether to show a progress bar if writing them takes more than two seconds.

    Returns:
        Release.

    Raises:
        UserError: an argument out of range, an example without text or label, an empty class, a gradient that is not
            finite, or a budget that does not suffice. Nothing is released and nothing spent then; no message holds
            private text.

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
    _check_arguments(epsilon, delta, length, ledger, noise_seed)
    _check_options(delta, clip, relation, calibration, public_texts, directions, cache, progress)
    space = space or ("body" if epsilon is None else "label_rows")
    classes = _by_class(model, tokens, examples, task)  # before the space: some spaces run the model
    found = release_space(model, tokens, space, public_texts, directions, cache, progress)
    if epsilon is not None:
        size = coordinates(model, found) * len(task.labels)
        entry = plan_entry(
            "sums of clipped gradients per class", space, epsilon, delta, relation, clip, calibration, size
        )
        if ledger is not None:
            ledger.check(entry)  # before the work of many gradients
    factors = _factors(model, tokens, classes, found, one_by_one=epsilon is not None)
    spent: tuple[LedgerEntry, ...] = ()
    if epsilon is None:
        targets: tuple[Target, ...] = tuple(FactorTarget(pairs) for pairs in factors)
        statement = "not private: the gradients of the real examples as they are"
    else:
        spent = _charge(ledger, entry)
        targets = noised_sums(factors, entry, system_bits if noise_seed is None else seeded_bits(noise_seed))
        statement = _statement(spent, noise_seed)
    return Release(
        targets=targets,
        space=found,
        space_name=space,
        labels=task.labels,
        label_tokens=tokens.labels,
        private=epsilon is not None and noise_seed is None,
        statement=statement,
        ledger=spent,
        model=model.fingerprint,
        task=task.fingerprint,
        length=_mean_length(tokens, classes) if length is None else int(length),
    )


def release_once(
    folder: str | Path, model: Model, task: Task, examples: Iterable, *, source: Mapping[str, Any], **options
) -> Release:
    """A private release that is drawn once and kept: the same call again reads it from its folder and spends nothing.

    The folder holds the Release (`release.safetensors`) and what was spent on its examples (`ledger.json`). A charge is
    written before the noise is drawn, so that a crash in between leaves it counted, and the Release that is drawn next
    says what both cost together. Without epsilon this is `release`, and nothing is kept.

    Of the examples nothing is stored, not even a hash: that other texts stand behind the same `source` cannot be seen
    here. Nor does a folder know of other folders. Noise that was drawn cannot be drawn back: deleting a folder deletes
    the count and gives no budget back, and the release that replaces it costs as much again.

    Args:
        folder: of the run.
        model, task, examples: as in `release`; the examples are not looked at where the folder holds their Release.
        source: public facts that say which examples these are, such as the data's name, how many were drawn, and the
            seed.
        options: as in `release`, without a ledger.

    Raises:
        UserError: the folder holds a Release with other arguments, each that differs is named; or as in `release`.
    """
    require(
        "ledger" not in options,
        "release_once was given a ledger, but its folder has one of its own: use gradmm.release for another",
    )
    if options.get("epsilon") is None:
        return release(model, task, examples, **options)
    require_model(model)
    require_task(task)
    require_type(source, Mapping, "source", "give public facts such as {'data': 'demo', 'seed': 0}")
    folder = files.as_path(folder, "the folder of the release")
    with lock(folder):
        ledger = _FolderLedger.open(folder / LEDGER_FILE, _public_arguments(model, task, source, options))
        place = folder / RELEASE_FILE
        if place.exists():
            require(
                bool(ledger.entries), f"{place} has no {LEDGER_FILE} beside it that counts it: choose another folder"
            )
            return load_release(place)
        drawn = release(model, task, examples, **options, ledger=ledger)
        drawn.save(place)
        return drawn


def _public_arguments(model: Model, task: Task, source: Mapping[str, Any], options: Mapping[str, Any]) -> dict:
    """All that tells one release from another and is no secret, with the defaults of what was not given."""
    defaults = {
        name: option.default
        for name, option in signature(release).parameters.items()
        if option.kind is option.KEYWORD_ONLY
    }
    given = {**defaults, **options}
    for name in ("ledger", "cache", "progress"):  # the folder's own, and what changes no number
        given.pop(name, None)
    given["public_texts"] = given["public_texts"] and files.digest(list(given["public_texts"]))
    return json.loads(
        json.dumps({"model": model.fingerprint, "task": task.fingerprint, **source, **given}, default=str)
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
            entries = tuple(LedgerEntry(**entry) for entry in held["entries"])
            differing = differences(arguments, held["release"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no ledger of a release ({first_line(error)}): choose another folder") from error
        require(
            not differing,
            f"{path.parent} holds a release with other arguments: {'; '.join(differing[:3])}: give the same to read "
            f"it, or another folder for a further release, which costs as much again and which {path} will not count",
        )
        return _FolderLedger(arguments["epsilon"], arguments["delta"], entries, path, arguments)

    def check(self, entry: LedgerEntry) -> None:
        """Nothing is refused: a release that was charged and lost in a crash counts in the next one's statement."""

    def charge(self, entry: LedgerEntry) -> None:
        """Write the expense down, then record it."""
        entries = (*self.entries, entry)
        files.write_json(self.path, {"release": self.arguments, "entries": [asdict(one) for one in entries]})
        self.entries = entries


def _check_arguments(epsilon, delta, length, ledger, noise_seed) -> None:
    if length is not None:
        require_whole(length, "length", 1)
    require_type(ledger, Ledger | None, "the ledger", "give a gradmm.Ledger such as Ledger(epsilon=1.0, delta=1e-5)")
    require(
        epsilon is None or length is not None,
        f"epsilon = {epsilon} without a length, and the real texts' own length is private: give length, the tokens of "
        "a synthetic text",
    )
    alone = [
        name for name, value in (("delta", delta), ("ledger", ledger), ("noise_seed", noise_seed)) if value is not None
    ]
    require(
        epsilon is not None or not alone,
        f"{', '.join(alone)} without epsilon, nothing would be private: give epsilon, or leave them out",
    )
    processes = launched()[1]
    require(
        epsilon is None or noise_seed is not None or processes == 1,
        f"epsilon = {epsilon} in {processes} processes would draw and spend the noise {processes} times: release in "
        "one process, save the Release, and load it in the others with load_release",
    )
    if noise_seed is not None:
        require_whole(noise_seed, "noise_seed")


def _check_options(delta, clip, relation, calibration, public_texts, directions, cache, progress) -> None:
    check_delta(delta)
    check_clipping(clip, relation, calibration)
    if public_texts is not None:
        require_texts(public_texts, "public_texts")
    if directions is not None:
        require_whole(directions, "directions", 1)
    if cache is not None:
        files.as_path(cache, "the cache")
    require_flag(progress, "progress")


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
    model: Model, tokens: TaskTokens, classes: list[list[Example]], space: HeadSpace | BodySketch, one_by_one: bool
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


def _mean_length(tokens: TaskTokens, classes: list[list[Example]]) -> int:
    lengths = [len(tokens.encode(example.text)) for members in classes for example in members]
    return max(1, round(sum(lengths) / len(lengths)))


# ---------------------------------------------------------------- budget


def _charge(ledger: Ledger | None, entry: LedgerEntry) -> tuple[LedgerEntry, ...]:
    if ledger is None:
        return (entry,)
    ledger.charge(entry)
    return ledger.entries


def _statement(spent: Sequence[LedgerEntry], noise_seed: int | None) -> str:
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
