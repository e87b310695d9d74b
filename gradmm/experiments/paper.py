"""The paper's experiments and claims, each with where it was read, and what one's own runs gave beside them.

Knows no model and runs nothing: claims are the package's data, own figures the JSON files that the notebooks wrote.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gradmm import files
from gradmm.errors import require
from gradmm.experiments import records

DATA = Path(__file__).resolve().parents[1] / "data" / "paper.yaml"
KINDS = ("accuracy", "gain", "statement")


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper and the preset that repeats it.

    Attributes:
        name, question: how claims refer to it, and what it asks.
        preset, notebook: what to run.
        models: hub ids, the writer first.
        data: a registered task's name.
        expected, memory: time on the machines named, by arithmetic, not measured, and memory of the GPU.
    """

    name: str
    question: str
    preset: str
    notebook: str
    models: str
    data: str
    expected: str
    memory: str

    @property
    def command(self) -> str:
        """The shell command that runs it, from the repository's root."""
        batch = f"python -m gradmm.experiments.batch --preset {self.preset}"
        return f"{batch} --output results/executed notebooks/{self.notebook}.ipynb"


@dataclass(frozen=True)
class Claim:
    """What somebody says that an experiment shows.

    Attributes:
        claim: in words.
        experiments: names of the experiments that it is about.
        kind: "accuracy" (a share of test examples), "gain" (an accuracy minus the best of some others, the largest over
            the experiments), or "statement" (no figure).
        by, where: who claims it, and where it was read.
        verified: whether that place is the paper itself.
        method, over: whose accuracy, and for a gain the methods compared with.
        value: the figure, a share of 1; None for a statement.
    """

    claim: str
    experiments: tuple[str, ...]
    kind: str
    by: str
    where: str
    verified: bool
    method: str | None = None
    over: tuple[str, ...] = ()
    value: float | None = None


@cache
def _data() -> Mapping:
    return files.read_yaml(DATA)


def experiments() -> tuple[Experiment, ...]:
    """The paper's experiments."""
    return tuple(Experiment(name, **values) for name, values in _data()["experiments"].items())


def claims() -> tuple[Claim, ...]:
    """The claims, figures first."""
    lists = ("experiments", "over")
    return tuple(Claim(**row | {name: tuple(row.get(name, ())) for name in lists}) for row in _data()["claims"])


def own_runs(folder: str | Path) -> list[dict]:
    """The accuracies in JSON files that notebooks wrote, copied to `<folder>/<preset>/<notebook>.json`, and in records.

    Returns:
        For each file, model and method: record (path without the suffix), experiment (a name, or None where the path is
        no experiment's), model (None where the file has one only), method, accuracy (mean), runs (how many). A file
        without accuracies gives no row, and a folder that is not there none at all.

    Raises:
        UserError: a file that is not JSON, or holds no object.
    """
    folder = records.find_folder(folder)
    known = {f"{one.preset}/{one.notebook}": one.name for one in experiments()}
    rows = []
    for path in sorted(folder.rglob("*.json")):
        values = files.read_json(path, files.MAX_TEXT_BYTES)
        require(isinstance(values, dict), f"{path} holds no JSON object: copy the file that a notebook wrote")
        values = values["results"] if set(records.KEYS) <= set(values) else values
        record = path.relative_to(folder).with_suffix("").as_posix()
        rows += [{"record": record, "experiment": known.get(record), **row} for row in _accuracies(values)]
    return rows


def _accuracies(values: Mapping) -> list[dict]:
    """Rows of model, method, accuracy and runs, from any notebook's results."""
    found = []
    for name, figures in dict(values.get("methods") or {}).items():
        by_method, model = ({name: figures}, None) if "accuracy" in figures else (figures, name)
        measured = {m: one for m, one in by_method.items() if isinstance(one, Mapping) and "accuracy" in one}
        found += [(model, method, one["accuracy"]["runs"]) for method, one in measured.items()]
    private: dict[str, list[float]] = {}
    for row in values.get("utility") or []:
        private.setdefault(f"gradmm, epsilon {row['epsilon']:g}", []).append(row["accuracy"])
    found += [(None, method, runs) for method, runs in (private | dict(values.get("controls") or {})).items()]
    names = ("model", "method", "accuracy", "runs")
    return [dict(zip(names, (*one, statistics.fmean(runs), len(runs)), strict=True)) for *one, runs in found if runs]


def own_figure(claim: Claim, rows: Sequence[Mapping]) -> float | None:
    """A claim's figure in one's own runs, from `own_runs`: a share of 1; None for a statement, or without such runs.

    Raises:
        UserError: the claim's kind is not known.
    """
    require(claim.kind in KINDS, f"the kind {claim.kind!r} of a claim is not known: use one of {', '.join(KINDS)}")
    found = []
    for name in claim.experiments:
        own = {row["method"]: row["accuracy"] for row in rows if row["experiment"] == name and row["model"] is None}
        if claim.kind != "statement" and {claim.method, *claim.over} <= set(own):
            found.append(own[claim.method] - max((own[other] for other in claim.over), default=0.0))
    return max(found, default=None)
