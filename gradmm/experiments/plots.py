"""Every figure of the book, in one style; readable in grey and by colour-blind readers.

Each function takes plain data, draws on axes that it makes or is given, and returns the figure. Colours are Okabe and
Ito's; methods differ by marker as well as by colour.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import datasets
import matplotlib.pyplot as plt
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PLAIN = 'class="tex2jax_ignore mathjax_ignore"'  # "$45 and $20" is no formula
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ABREAST = 2  # panels that fit side by side with letters that can be read on a page
LETTERS = 90  # of a legend's names and keys in one row
SHORT = 20  # letters of a table's entry that stays on one line
LINES, WIDEST = 4, 18  # longer ones get the width, in ems, that breaks them into about two lines, up to so many
CHANGED = "style='background:rgba(230,159,0,0.3);color:inherit;border-bottom:2px solid #D55E00'"
TEXT = "style='text-align:left;white-space:pre-wrap'"
STYLE: Any = {  # matplotlib's own settings
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.bbox": "tight",
}


def use_style() -> None:
    """Make the book's style matplotlib's for the rest of the session."""
    plt.switch_backend(plt.get_backend())  # loaded later, within `rc_context`, a notebook would show one figure alone
    plt.rcParams.update(STYLE)


def _grid(panels: int, height: float, width: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `ABREAST` in a row, each of this size in inches; one alone is wider."""
    rows, columns = -(-panels // ABREAST), min(panels, ABREAST)
    with plt.rc_context(STYLE):
        size = (6.4 if panels == 1 else width * columns, height * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    return figure, list(grid.flat[:panels])


def _legend(figure: Figure, panels: Sequence[Axes], **options: Any) -> None:
    """Names in each panel; where all have the same ones, and more than a corner holds, once above the panels."""
    handles, names = panels[0].get_legend_handles_labels()
    if len(names) > 3 and all(axes.get_legend_handles_labels()[1] == names for axes in panels):
        columns = max(1, LETTERS // (max(map(len, names)) + 6))
        figure.legend(
            handles, names, loc="outside upper center", ncols=min(columns, len(names)), frameon=False, **options
        )
    else:
        for axes in panels:
            axes.legend(**options)


def _look(number: int) -> dict[str, Any]:
    """The colour and marker of one of several series."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # another one when the colours begin again
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4}


def _curve(axes: Axes, number: int, name: str, middle: pandas.Series, low: pandas.Series, high: pandas.Series) -> None:
    """A line within a band."""
    axes.plot(middle.index, middle, label=name, **_look(number))
    axes.fill_between(middle.index, low, high, color=_look(number)["color"], alpha=0.15, linewidth=0)
    _whole_steps(axes, middle.index)


def convergence(history: pandas.DataFrame) -> Figure:
    """The matching loss at x and at the text (left), and the residuals (right), over outer steps.

    Lines are medians over groups, bands reach from the lowest to the highest group. A search among texts has neither an
    x nor residuals: its figure is the loss at the text alone.
    """
    names = {"match_x": "at x (continuous)", "match_z": "at z (text)"}
    residuals = [name for name in ("primal", "dual", "stationarity") if name in history]
    figure, panels = _grid(2 if residuals else 1, 3.2)
    for axes, shown in zip(panels, (names, dict(zip(residuals, residuals, strict=True))), strict=False):
        for number, (column, name) in enumerate(shown.items()):
            if column in history:
                steps = history.groupby("step")[column]
                _curve(axes, number, name, steps.median(), steps.min(), steps.max())
    panels[0].set(xlabel="outer step", ylabel="matching loss (1 - cosine)", title="Loss", ylim=(0, None))
    for axes in panels[1:]:
        axes.set(xlabel="outer step", ylabel="norm", title="Residuals", yscale="log")
    _legend(figure, panels)
    return figure


def history(found: pandas.DataFrame, search: str) -> Figure:
    """The history of a synthesis: of a pool, the matching loss of each class's texts over how many were taken."""
    if search != "pool":
        return convergence(found)
    series = {label: part.set_index("step")["match_z"] for label, part in found.groupby("label", sort=False)}
    return lines(series, "texts taken", "matching loss (1 - cosine)")


def _whole_steps(axes: Axes, steps: Sequence) -> None:
    """Ticks at whole numbers alone, where what is counted comes in whole numbers."""
    if pandas.api.types.is_integer_dtype(pandas.Index(steps)) and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def selection(dataset: datasets.Dataset) -> Figure:
    """Every text that was written: matching loss against perplexity, kept or dropped, by class."""
    figure, (axes,) = _grid(1, 3.4)
    frame = dataset.to_pandas()
    for place, (name, rows) in enumerate(frame.groupby("label_name")):
        look = _look(place)
        for kept, part in rows.groupby("kept"):
            colours = {"edgecolor": look["color"], "facecolor": look["color"] if kept else "none"}
            label = f"{name}, {'kept' if kept else 'dropped'}"
            axes.scatter(part["perplexity"], part["match_loss"], s=28, label=label, marker=look["marker"], **colours)
    axes.set(xscale="log", xlabel="perplexity under the model", ylabel="matching loss of the text alone")
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
    _legend(figure, [axes])
    return figure


def accuracies(runs: Mapping[str, Sequence[float]], chance: float | None = None) -> Figure:
    """Test accuracy of each method, drawn as in `by_panel`."""
    return by_panel({"": runs}, "test accuracy", chance, (0, 1))


def by_panel(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    line: float | None = None,
    xlim: tuple | None = None,
) -> Figure:
    """One quantity of several items: one point a run, a bar for the mean with one standard deviation.

    Args:
        panels: for each panel's title, each item's runs.
        line: where a dashed line stands, such as chance.
        xlim: ends of every panel's axis; None: from 0 to the largest value of all.
    """
    most = max(value for runs in panels.values() for values in runs.values() for value in values)
    figure, places = _grid(len(panels), 0.4 * max(map(len, panels.values())) + 1.0, width=4.4)
    for axes, (name, runs) in zip(places, panels.items(), strict=True):
        _runs(axes, runs, line)
        axes.set(title=name, xlabel=xlabel, xlim=xlim or (0, 1.05 * most))
    return figure


def _runs(axes: Axes, runs: Mapping[str, Sequence[float]], line: float | None) -> None:
    for place, values in enumerate(runs.values()):
        series = pandas.Series(list(values), dtype=float)
        colour = COLOURS[place % len(COLOURS)]
        spread = series.std() if len(series) > 1 else 0.0
        axes.barh(place, series.mean(), xerr=spread, color=colour, alpha=0.35, height=0.6, error_kw={"ecolor": colour})
        axes.scatter(series, [place] * len(series), s=18, color=colour, marker=MARKERS[place % len(MARKERS)], zorder=3)
        axes.annotate(f"{series.mean():.3f}", (1.005, place), xycoords=("axes fraction", "data"), va="center")
    axes.set(yticks=range(len(runs)), yticklabels=list(runs))
    axes.invert_yaxis()
    if line is not None:
        axes.axvline(line, color="#666666", linewidth=1, linestyle="--")


def lines(series: Mapping[str, pandas.Series], xlabel: str, ylabel: str) -> Figure:
    """Several curves over one axis, told apart by colour and marker."""
    figure, (axes,) = _grid(1, 3.4)
    for place, (name, values) in enumerate(series.items()):
        axes.plot(values.index, values, label=name, **_look(place))
        _whole_steps(axes, values.index)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure, [axes])
    return figure


def bands(panels: Mapping[str, Mapping[str, pandas.DataFrame]], xlabel: str) -> Figure:
    """Curves with bands of one standard deviation, a panel for each quantity.

    Args:
        panels: for each panel's y label, each curve's frame: x as the index, columns `mean` and `std` (not a number of
            one run: no band).
    """
    figure, axes = _grid(len(panels), 3.2)
    for place, (ylabel, curves) in zip(axes, panels.items(), strict=True):
        for number, (name, frame) in enumerate(curves.items()):
            middle, spread = frame["mean"], frame["std"].astype(float).fillna(0)
            _curve(place, number, name, middle, middle - spread, middle + spread)
        place.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure, axes)
    return figure


def factors(frame: pandas.DataFrame, quantity: str) -> Figure:
    """One quantity at every value of each factor, drawn as in `by_panel`.

    Args:
        frame: from `ablation.vary`.
        quantity: one of its columns.
    """
    panels: dict[str, dict[str, list[float]]] = {}
    for (name, value, base), part in frame.groupby(["factor", "value", "base"], sort=False, dropna=False):
        panels.setdefault(name, {})[f"{value} (base)" if base else str(value)] = part[quantity].tolist()
    return by_panel(panels, quantity)


def bounds(panels: Mapping[str, Mapping[str, pandas.DataFrame]], xlabel: str, ylabel: str) -> Figure:
    """Measured curves and, dashed in the same colour, what bounds each of them; a panel for each title, log scale.

    Args:
        panels: for each title, each curve's frame: x as the index, columns `measured` and `bound`.
    """
    figure, axes = _grid(len(panels), 3.2)
    for place, (title, curves) in zip(axes, panels.items(), strict=True):
        for number, (name, frame) in enumerate(curves.items()):
            look, every = _look(number), max(1, len(frame) // 12)
            place.plot(frame.index, frame["measured"], label=name, markevery=every, **look)
            place.plot(frame.index, frame["bound"], color=look["color"], linestyle="--", linewidth=1.2)
        place.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log")
    _legend(figure, axes, title="dashed: the bound")
    return figure


def table(rows: Sequence[Mapping] | pandas.DataFrame, digits: int = 3):
    """Rows as an HTML table with whole texts; anything in a text that looks like HTML is shown, not obeyed.

    A column of short entries is not broken into lines, one of long ones into a few; what was not measured is a dash.
    """
    frame = pandas.DataFrame(rows)
    longest = {name: frame[name].map(_length).max() for name in frame}
    short = [name for name in frame if longest[name] <= SHORT]
    styled = frame.style.format(precision=digits, escape="html", na_rep="–").hide(axis="index")
    styled = styled.format_index(precision=digits, escape="html", axis="columns")
    styled = styled.set_properties(**{"text-align": "left", "white-space": "normal"}).set_table_attributes(PLAIN)
    for name in (name for name in frame if name not in short):
        styled = styled.set_properties(subset=[name], **{"min-width": f"{min(WIDEST, longest[name] // LINES)}em"})
    return styled.set_properties(subset=short, **{"white-space": "nowrap"})


def _length(value) -> int:
    return len(value) if isinstance(value, str) else 0


@dataclass(frozen=True)
class Markup:
    """HTML that a notebook shows as it is."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


@dataclass(frozen=True)
class InShort:
    """The box under a notebook's title: its question, and once the notebook has run the answers and what they cost.

    `box = display(in_short, display_id=True)` shows it, and `box.update(in_short.answered(answers))` at the end of the
    notebook fills it where it stands: in JupyterLab, in Colab, and in the copy that papermill keeps.

    Attributes:
        question: what the notebook asks.
        answers: a paragraph each, by the runs of the notebook; none as long as it runs.
        begun: the clock when the box was made, in seconds.
        seconds: from there to the answers; None as long as there are none.
    """

    question: str
    answers: tuple[str, ...] = ()
    begun: float = field(default_factory=time.perf_counter)
    seconds: float | None = None

    def answered(self, answers: Iterable[str]) -> "InShort":
        """The box with its answers, and the time since it was made as the cost."""
        return replace(self, answers=tuple(answers), seconds=time.perf_counter() - self.begun)

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{escape(answer)}</p>" for answer in self.answers)
        cost = (
            "The answer stands here when the last cells have run." if self.seconds is None
            else f"It took {self.seconds:.0f} s here; work that was finished before is read back."
        )  # fmt: skip
        head = f"<p class='admonition-title'>In short</p><p><em>{escape(self.question)}</em></p>"
        return f"<div class='admonition tip'>{head}{said}<p><small>{cost}</small></p></div>"


def evolution(texts: Mapping[object, Sequence[str]]) -> Markup:
    """One text from step to step, a row a step; tokens that differ from the row above are underlined and tinted.

    The marks can be told from the other tokens in grey, and on light and dark pages alike. Text is shown, never obeyed.

    Args:
        texts: for each step its tokens, as the tokenizer spells them, from left to right.
    """
    rows: list[str] = []
    above: Sequence[str] | None = None
    for step, tokens in texts.items():
        before = tokens if above is None else [*above, *[""] * len(tokens)]
        changed = [token != old for token, old in zip(tokens, before, strict=False)]
        pieces = "".join(_piece(token, moved) for token, moved in zip(tokens, changed, strict=True))
        count = "" if above is None else f"{sum(changed)} of {len(tokens)}"
        narrow = f"<td style='white-space:nowrap'>{count}</td>"
        rows.append(f"<tr><td>{escape(str(step))}</td>{narrow}<td {TEXT}>{pieces}</td></tr>")
        above = tokens
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in ("step", "tokens changed", "text"))
    return Markup(f"<table {PLAIN}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _piece(token: str, changed: bool) -> str:
    """A token's HTML; ends of lines are made visible so that a row stays a row."""
    shown = escape(token.replace("\r", "").replace("\n", "↵"))
    return f"<mark {CHANGED}>{shown}</mark>" if changed else f"<span>{shown}</span>"
