"""What a comparison found: means over seeds, paired differences, training curves, sentences that the numbers decide.

Letters: M test examples.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import pandas

from gradmm.experiments.metrics import MEASURES, paired_bootstrap, summarise_runs
from gradmm.tasks import Task


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison gives.

    Attributes:
        labels: M label numbers of the test examples.
        records: one for each method and seed: method, seed, n, in_test (texts left out because a model wrote a test
            text word for word), accuracy, macro_f1, predictions (M), learning_rate, step, validation_accuracy, curve
            (see `finetuning.Training`), similarity ({step: cosine}), MEASURES, `calibrated`: accuracy, macro_f1 and
            predictions of `FinetuneResult.calibrated`, and `elsewhere`: for each learner's name, what is its own of
            these.
    """

    task: Task
    labels: tuple[int, ...]
    records: list[dict]

    def of(self, method: str) -> list[dict]:
        """The records of a method, seed by seed."""
        return [record for record in self.records if record["method"] == method]

    def on(self, learner: str) -> "Comparison":
        """The same examples judged by another model: accuracies, curves, `match_loss`, perplexity and tokens are its.

        What tells of the texts alone stays; the similarity, which is the writer's training, is left out.
        """
        records = [{**record, **record["elsewhere"][learner], "similarity": {}} for record in self.records]
        return Comparison(self.task, self.labels, records)

    @property
    def calibrated(self) -> "Comparison | None":
        """The same with each trained model calibrated; None where a record, an older one, does not know it."""
        if not all("calibrated" in record for record in self.records):
            return None
        rows = [{name: value for name, value in record.items() if name != "calibrated"} for record in self.records]
        found = [{**row, **record["calibrated"]} for row, record in zip(rows, self.records, strict=True)]
        return Comparison(self.task, self.labels, found)

    @cached_property
    def methods(self) -> dict[str, dict]:
        """Each method's figures over its seeds.

        accuracy {mean, std, runs}; means of macro_f1, n, the measures and the similarity of each step; and
        `minus_gradmm` {mean, low, high, confidence}: this method's accuracy minus gradmm's, with a paired bootstrap
        interval over test examples and seeds (None for gradmm itself, or without it). `calibrated`: accuracy and
        `minus_gradmm` of `calibrated`, where the records know it.
        """
        found = {name: self._summary(name) for name in dict.fromkeys(record["method"] for record in self.records)}
        for name, figures in (self.calibrated.methods if self.calibrated else {}).items():
            found[name]["calibrated"] = {key: figures[key] for key in ("accuracy", "minus_gradmm")}
        return found

    def _summary(self, name: str) -> dict:
        records = self.of(name)
        means = {key: _mean([record[key] for record in records]) for key in ("macro_f1", "n", *MEASURES)}
        steps = dict.fromkeys(step for record in records for step in record["similarity"])
        return {
            "accuracy": asdict(summarise_runs([record["accuracy"] for record in records])),
            **means,
            "similarity": {step: _mean([record["similarity"].get(step) for record in records]) for step in steps},
            "minus_gradmm": None if name == "gradmm" or not self.of("gradmm") else self.difference(name, "gradmm"),
        }

    def difference(self, first: str, second: str) -> dict[str, float]:
        """The accuracy of `first` minus that of `second`, see `metrics.paired_bootstrap`."""
        return asdict(paired_bootstrap(self._correct(first), self._correct(second)))

    def _correct(self, name: str) -> list[list[bool]]:
        return [[a == b for a, b in zip(record["predictions"], self.labels, strict=True)] for record in self.of(name)]

    def verdict(self, first: str, second: str) -> str:
        """Whether `first` beats `second`, as a sentence; only an interval that leaves out 0 decides."""
        one, other = (self.methods[name]["accuracy"]["mean"] for name in (first, second))
        return _sentence(first, one, second, other, self.difference(first, second))

    def table(self) -> pandas.DataFrame:
        """One row for each method."""
        return table_of(self.methods)

    def curve(self, method: str, column: str, learning_rate: float) -> pandas.DataFrame:
        """Mean and standard deviation over seeds of a column of `finetuning.Training.curve`.

        By step, as far as every seed was trained.
        """
        rows = [{"seed": record["seed"], **look} for record in self.of(method) for look in record["curve"]]
        some = pandas.DataFrame(rows).query("learning_rate == @learning_rate")
        values = some.pivot(index="step", columns="seed", values=column).astype(float).dropna()
        return pandas.DataFrame({"mean": values.mean(axis=1), "std": values.std(axis=1)})


def table_of(methods: Mapping[str, Mapping]) -> pandas.DataFrame:
    """One row for each method of `Comparison.methods`, or of what a notebook's JSON holds of it."""
    return pandas.DataFrame([_table_row(name, figures) for name, figures in methods.items()])


def verdicts_of(methods: Mapping[str, Mapping]) -> list[str]:
    """Whether each method beats gradmm, a sentence each as in `Comparison.verdict`; methods as in `table_of`."""
    means = {name: figures["accuracy"]["mean"] for name, figures in methods.items()}
    gaps = {name: figures["minus_gradmm"] for name, figures in methods.items() if figures["minus_gradmm"] is not None}
    return [_sentence(name, means[name], "gradmm", means["gradmm"], gap) for name, gap in gaps.items()]


def outcome(gap: Mapping[str, float]) -> str:
    """What an interval {low, high} of a difference decides: "beats", "is beaten by" or "cannot be told from"."""
    return "beats" if gap["low"] > 0 else "is beaten by" if gap["high"] < 0 else "cannot be told from"


def _sentence(first: str, one: float, second: str, other: float, gap: Mapping[str, float]) -> str:
    return (
        f"{first} ({one:.3f}) {outcome(gap)} {second} ({other:.3f}): difference {gap['mean']:+.3f}, "
        f"{gap['confidence']:.0%} interval {gap['low']:+.3f} to {gap['high']:+.3f}"
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a run has no figure (no examples, or not finite)."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _measured(figures: Mapping) -> list[str]:
    """Of MEASURES what a table shows: what the record knows, an older one not all; a second model's only with one."""
    known = [key for key in MEASURES if key in figures]
    return [key for key in known if figures[key] is not None or key != "second_perplexity"]


def _table_row(name: str, figures: Mapping) -> dict:
    accuracy, gap = figures["accuracy"], figures["minus_gradmm"]
    return {
        "method": name,
        "n": int(figures["n"]) if float(figures["n"]).is_integer() else figures["n"],
        "accuracy": accuracy["mean"],
        "std": accuracy["std"],
        "minus gradmm": None if gap is None else gap["mean"],
        "95% interval": "" if gap is None else f"{gap['low']:+.3f} to {gap['high']:+.3f}",
        **({"calibrated": figures["calibrated"]["accuracy"]["mean"]} if "calibrated" in figures else {}),
        "macro F1": figures["macro_f1"],
        **{key: figures[key] for key in _measured(figures)},
        **{f"cosine at step {step}": value for step, value in figures["similarity"].items()},
    }
