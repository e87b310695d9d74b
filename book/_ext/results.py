"""The directive `results`, and `results-table` and the others of `setup`: what records found.

Every figure, and every sentence that depends on one, is computed at the build from the records beside this folder, so
that none can go stale. Run as a program this file writes the short table into README.md.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy
from docutils import nodes
from scipy.stats import rankdata, t
from sphinx.util.docutils import SphinxDirective

from gradmm.experiments.baselines import OF_REAL_TEXT
from gradmm.experiments.records import origin, read_records
from gradmm.experiments.results import outcome, verdicts_of

BOOK = Path(__file__).resolve().parents[1]
README = BOOK.parent / "README.md"
PREFIX = "03-finetuning-"
BEGIN, END = "<!-- results: python book/_ext/results.py writes these lines -->", "<!-- end of results -->"

Record = Mapping[str, Any]
Records = Mapping[str, Record]

METHODS = {
    "none": "nothing: the model as it came",
    "shuffled": "gradmm's texts, labels dealt at random",
    "random_target": "gradmm's search for a random target",
    "prompt_only": "gradmm's prompts without matching",
    "surest": "candidates that the model is surest of",
    "admm": "texts by the published ADMM, of few steps",
    "zero_shot": "zero-shot texts of the same model",
    "few_shot": "few-shot texts, real ones in the prompt",
    "second_round": "gradmm's texts, a second pool among them",
    "warm_up": "gradmm's texts, by gradients behind a warm-up",
    "oracle": "gradmm's choice for 1,000 real texts",
    "gradmm": "gradmm's texts",
    "real": "the real texts that gradmm saw",
    "random": "real texts drawn at random",
    "random_many": "1,000 real texts drawn at random",
    "herding": "real texts chosen by herding",
    "k_center": "real texts chosen by k-center",
    "matched_real": "real texts chosen as gradmm chooses",
    "all_real": "every real training text long enough",
}
DATA = {
    "sst2": "SST-2", "rotten_tomatoes": "Rotten Tomatoes", "demo": "the embedded reviews",
    "reuters4": "four topics of Reuters", "trec5": "five kinds of questions", "tweets": "tweets",
}  # fmt: skip
BRIEF = (
    "none",
    "random_target",
    "prompt_only",
    "surest",
    "zero_shot",
    "few_shot",
    "admm",
    "oracle",
    "gradmm",
    "real",
    "random",
    "random_many",
    "herding",
    "all_real",
)
HEADROOM = (  # whose distance to the real texts is the room
    "gradmm",
    "real",
    "random",
    "random_many",
    "herding",
    "oracle",
    "all_real",
)
QUALITIES = {  # measures of `gradmm.experiments.metrics`, each with its column and its form
    "perplexity": ("perplexity", "{:.1f}"),
    "second_perplexity": ("of another model", "{:.1f}"),
    "distinct_2": ("distinct bigrams", "{:.2f}"),
    "duplicates": ("duplicates", "{:.0%}"),
    "flawed": ("flawed", "{:.0%}"),
    "unfinished": ("unfinished", "{:.0%}"),
    "longest_shared_span": ("longest span shared with real texts, words", "{:.0f}"),
    "tokens": ("tokens", "{:.0f}"),
}
FAULTS = ("flawed", "unfinished", "duplicates")
REAL = (*OF_REAL_TEXT, "random_many")
WRITTEN = ("prompt_only", "zero_shot", "few_shot", "surest")
FEWEST = 3  # comparisons that an interval over comparisons is taken of
SIDE_BY_SIDE = 3  # records whose columns fit a page
AT_ONCE = 4  # texts of each label that are seen without a click
AGAIN = "† by a further run of the same settings, against its own gradmm."
NO_BREAK = "\N{NO-BREAK SPACE}"
OVER = (
    "Over all comparisons, each of a model, data and prompts (the interval is Student's t over comparisons, of which "
    "some share the model or the data):"
)
MARKS = {"beats": "▲", "is beaten by": "▼", "cannot be told from": ""}

WIDTH, ROW, LEFT, RIGHT, TRACK = 340, 38, 12, 328, 25  # of a panel and of a row in it, in pixels
COLOURS = {"beats": "#1fa67a", "is beaten by": "#3a8fd0", "cannot be told from": "currentColor"}
GRADMM = "#e07b39"


# ---------------------------------------------------------------- records


def recorded(folder: Path = BOOK / "records", prefix: str = PREFIX) -> dict[str, Record]:
    """The records of a kind; those named after their data alone, which are of a small model, come last."""
    found = read_records(folder, prefix)
    alone = {name: name == prefix + str(record["settings"]["data"]) for name, record in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (alone[name], name))}


def title(record: Record) -> str:
    """`SmolLM2-135M on SST-2`: which model and what it learnt."""
    return f"{model_of(record)} on {data_of(record)}"


def model_of(record: Record) -> str:
    """The model without its owner and its description."""
    return Path(str(record["settings"]["model"]).split(",")[0]).name


def data_of(record: Record) -> str:
    """The data in words, and which run of them it is."""
    data, run = Path(str(record["settings"]["data"])).name, record["settings"].get("run")
    return DATA.get(data, data) + (f", {run}" if run else "")


def words(method: str) -> str:
    """A method in plain words; one that is not known here keeps its name."""
    return METHODS.get(method, f"`{method}`")


def base_of(record: Record) -> float | None:
    """gradmm's mean accuracy; None where it was not run, and then no method has a difference to it."""
    found = record["results"]["methods"].get("gradmm")
    return None if found is None else found["accuracy"]["mean"]


def ranked(records: Sequence[Record]) -> list[str]:
    """Every method of the records, from the ceiling to the floor: by how far it lies above gradmm on average."""
    above: dict[str, list[float]] = {}
    for record in records:
        for name, figures in record["results"]["methods"].items():
            above.setdefault(name, []).append(figures["accuracy"]["mean"] - (base_of(record) or 0.0))
    return sorted(above, key=lambda name: -statistics.fmean(above[name]))


def accuracy(figures: Mapping[str, Any]) -> str:
    """Mean and spread, and the mark of what the interval decides."""
    gap, found = figures["minus_gradmm"], figures["accuracy"]
    mark = "" if gap is None else MARKS[outcome(gap)]
    spread = "" if found["std"] is None else f"±{NO_BREAK}{found['std']:.3f}"  # None of one run
    return NO_BREAK.join(filter(None, [f"{found['mean']:.3f}", spread, mark]))


def whole(number: float) -> str:
    """A count, which is a mean over seeds and may be broken."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def counted(number: int, what: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def emphasised(method: str, cells: Sequence[str]) -> list[str]:
    """A method's row; gradmm's is bold."""
    return [f"**{cell}**" if method == "gradmm" and cell else cell for cell in cells]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


# ---------------------------------------------------------------- the short table


def brief(records: Records) -> str:
    """The table of the README and of the first page: what each way to get a training set gives, record by record."""
    if not records:
        return "No comparison is recorded."
    held = list(map(first_run_of, groups_by_data(records)))
    added = any("again" in figures for record in held for figures in record["results"]["methods"].values())
    models = f"The models: {'; '.join(dict.fromkeys(record['settings']['model'] for record in held))}."
    tables = [
        across([one["results"]["methods"] for one in held]),
        *map(brief_table, by_table(held)),
        legend(held) + f" {AGAIN}" * added,
        models,
    ]
    return "\n\n".join(filter(None, tables))


def across(held: Sequence[Mapping[str, Record]], base: str = "gradmm", names: Sequence[str] = BRIEF) -> str:
    """How far methods lie from one of them in all comparisons that have both; a comparison is its methods' figures."""
    apart: dict[str, list[float]] = {}
    for methods in held:
        told = {name: methods[name]["minus_gradmm"] for name in methods if name in names}
        gaps = {"gradmm": 0.0} | {name: 100 * gap["mean"] for name, gap in told.items() if gap}
        for name, gap in gaps.items():
            if base in gaps and name != base:
                apart.setdefault(name, []).append(gap - gaps[base])
    found = {name: over(values) for name, values in apart.items() if len(values) >= FEWEST}
    if not found:
        return ""
    rows = []
    for name in sorted([*found, base], key=lambda name: -found.get(name, [0.0])[0]):
        cells = ["", "0"]
        if name in found:
            middle, low, high = found[name]
            mark = MARKS[outcome({"low": low, "high": high})]
            cells = [str(len(apart[name])), f"{middle:+.1f} ({low:+.1f} to {high:+.1f}){NO_BREAK}{mark}".rstrip()]
        rows.append(emphasised(name, [words(name), *cells]))
    head = ["trained on", "comparisons", f"points above {words(base)}, mean and 95% interval"]
    return f"{OVER}\n\n{markdown(head, rows)}"


def headroom(records: Records) -> str:
    """How far real texts, and a choice that knows more of them, lie above the real texts that gradmm saw."""
    held = [record["results"]["methods"] for record in map(first_run_of, groups_by_data(records))]
    return across(held, "real", HEADROOM) or "No record has enough real texts beside those that gradmm saw."


def over(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of a few values and its 95% interval by Student's t."""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), statistics.fmean(values) - half, statistics.fmean(values) + half


def groups_by_data(records: Records) -> list[list[Record]]:
    """The records of one model, its data and its prompts together, the first run before further ones."""
    groups: dict[tuple[str | None, ...], list[Record]] = {}
    for record in records.values():
        of = tuple(record["settings"].get(name) for name in ("model", "data", "task"))
        groups.setdefault(of, []).append(record)
    return [sorted(group, key=lambda record: "run" in record["settings"]) for group in groups.values()]  # a stable sort


def by_table(held: Sequence[Record]) -> list[list[Record]]:
    """The records table by table: those of one model, no more than a page holds, shared out evenly."""
    models: dict[str, list[Record]] = {}
    for record in held:
        models.setdefault(record["settings"]["model"], []).append(record)
    tables = []
    for own in models.values():
        count = math.ceil(len(own) / SIDE_BY_SIDE)
        each = math.ceil(len(own) / count)
        tables += [own[at : at + each] for at in range(0, len(own), each)]
    return tables


def first_run_of(group: Sequence[Record]) -> Record:
    """The first record with the methods that only further ones have, each of these marked."""
    first, *further = group
    more = {name: {**found, "again": True} for one in further for name, found in one["results"]["methods"].items()}
    results = first["results"]
    return {**first, "results": {**results, "methods": {**more, **results["methods"]}}}


def brief_table(held: Sequence[Record]) -> str:
    """One of its tables."""
    rows = []
    for name in (name for name in ranked(held) if name in BRIEF):
        of = [record["results"]["methods"].get(name) for record in held]
        counts = sorted({figures["n"] for figures in of if figures})
        cells = ["" if figures is None else accuracy(figures) + " †" * ("again" in figures) for figures in of]
        row = [words(name), " / ".join(map(whole, counts)), *cells]
        rows.append(emphasised(name, row))
    calibrated = ["{:.3f}".format(record["results"]["calibrated"]) for record in held]
    rows.append(["nothing, but calibrated", "0", *calibrated])
    return markdown([f"{model_of(held[0])}, trained on", "texts", *map(data_of, held)], rows)


def once_calibrated(records: Records) -> str:
    """What the trained models reach once their preference among labels is taken out, and how far they lie apart."""
    held = [record for record in map(first_run_of, groups_by_data(records)) if calibrated_of(record)]
    if not held:
        return "No trained model of a record is calibrated."
    tables = [across(list(map(calibrated_of, held))), *map(calibrated_table, by_table(held))]
    return "\n\n".join(filter(None, [*tables, "\n".join(f"- {reach(record)}" for record in held)]))


def calibrated_table(held: Sequence[Record]) -> str:
    """One of its tables."""
    found = list(map(calibrated_of, held))
    rows = []
    for name in (name for name in ranked(held) if any(name in one for one in found)):
        cells = ["" if name not in one else accuracy(one[name]) + " †" * ("again" in one[name]) for one in found]
        rows.append(emphasised(name, [words(name), *cells]))
    return markdown([f"{model_of(held[0])}, trained on", *map(data_of, held)], rows)


def calibrated_of(record: Record) -> Record:
    """What each method reaches calibrated, where a record has it."""
    methods = record["results"]["methods"]
    marks = {name: {"again": True} if "again" in one else {} for name, one in methods.items()}
    return {name: one["calibrated"] | marks[name] for name, one in methods.items() if "calibrated" in one}


def reach(record: Record) -> str:
    """From where to where the trained models' means reach, as they are and calibrated."""
    methods, after = record["results"]["methods"], calibrated_of(record)
    names = [name for name in after if methods[name]["n"]]
    plain, then = ([one[name]["accuracy"]["mean"] for name in names] for one in (methods, after))
    said = [f"{min(values):.3f} to {max(values):.3f}" for values in (plain, then)]
    return f"{title(record)}: {counted(len(names), 'set')} of texts give {said[0]}, and {said[1]} calibrated."


def legend(records: Sequence[Record]) -> str:
    """What the figures of a table are and what its marks mean."""
    gaps = [one["minus_gradmm"] for record in records for one in record["results"]["methods"].values()]
    shares = sorted({f"{gap['confidence']:.0%}" for gap in gaps if gap})
    *others, most = sorted({len(record["results"]["seeds"]) for record in records})
    seeds = " or ".join([*map(str, others), counted(most, "seed")])
    return (
        f"Test accuracy, mean ± standard deviation over {seeds}. ▲ beats gradmm, ▼ is beaten by it: the "
        f"{' or '.join(shares)} interval of the difference leaves out 0. Without a mark a method cannot be told "
        "from it; what is only calibrated is not compared."
    )


def readme(text: str, records: Records) -> str:
    """The README with the records' table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{brief(records)}\n\n{END}{rest.split(END)[1]}"


# ---------------------------------------------------------------- the figure


def rows_of(record: Record) -> list[tuple[str, float, Mapping[str, float] | None]]:
    """Of each row of a panel: method, mean accuracy, and the interval of its difference to gradmm, if it has one."""
    methods = record["results"]["methods"]
    rows = [(name, methods[name]["accuracy"]["mean"], methods[name]["minus_gradmm"]) for name in methods]
    rows.append(("calibrated", record["results"]["calibrated"], None))
    return sorted(rows, key=lambda row: -row[1])


def limits_of(records: Sequence[Record]) -> tuple[float, float]:
    """The ends of the axis that all panels share, in twentieths."""
    ends = []
    for record in records:
        base = base_of(record)
        for _, mean, gap in rows_of(record):
            ends += [mean] if gap is None else [mean, base + gap["low"], base + gap["high"]]
    return int(min(ends) * 20) / 20, -int(-max(ends) * 20 - 1) / 20


def marker(x: float, y: float, decided: str | None) -> str:
    """What stands at a mean: shapes differ as well as colours."""
    if decided is None:
        return f'<path d="M{x:.1f} {y - 6} l6 6 l-6 6 l-6 -6 z" fill="{GRADMM}"/>'
    up = {"beats": -1, "is beaten by": 1}.get(decided)
    if up is None:
        return (
            f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="var(--pst-color-background, white)" stroke="currentColor"/>'
        )
    return f'<path d="M{x - 6:.1f} {y - 5 * up} h12 l-6 {10 * up} z" fill="{COLOURS[decided]}"/>'


def panel(record: Record, ends: tuple[float, float]) -> str:
    """One record: a row a method with its name, its accuracy, a mark at it and the interval against gradmm's line."""
    low, high = ends
    base = base_of(record)

    def at(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / (high - low)

    drawn, rows = [], rows_of(record)
    for number, (name, mean, gap) in enumerate(rows):
        top = number * ROW
        y, bold = top + TRACK, ' font-weight="700"' if name == "gradmm" else ""
        said = "nothing, but calibrated" if name == "calibrated" else words(name).strip("`")
        drawn.append(f'<text x="0" y="{top + 13}"{bold}>{escape(said)}</text>')
        drawn.append(f'<text x="{WIDTH}" y="{top + 13}" text-anchor="end"{bold}>{mean:.3f}</text>')
        drawn.append(f'<path d="M{LEFT} {y} H{RIGHT}" stroke="currentColor" opacity="0.2"/>')
        if base is not None:
            drawn.append(f'<path d="M{at(base):.1f} {y - 8} v16" stroke="{GRADMM}" stroke-width="1.5"/>')
        if gap:
            decided = outcome(gap)
            line = f"M{at(base + gap['low']):.1f} {y} H{at(base + gap['high']):.1f}"
            drawn.append(f'<path d="{line}" stroke="{COLOURS[decided]}" stroke-width="2.5"/>')
            drawn.append(marker(at(mean), y, decided))
        else:
            drawn.append(marker(at(mean), y, None if name == "gradmm" else ""))
    foot = len(rows) * ROW + 12
    for tick in range(round(low * 20), round(high * 20) + 1):
        if tick % 2 == 0:
            drawn.append(
                f'<text x="{at(tick / 20):.1f}" y="{foot}" text-anchor="middle" opacity="0.8">{tick / 20:.1f}</text>'
            )
    return (
        f'<svg viewBox="0 0 {WIDTH} {foot + 6}" role="img" aria-label="{escape(spoken(record))}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        f"{''.join(drawn)}</svg>"
    )


def spoken(record: Record) -> str:
    """The panel in words."""
    return f"Test accuracy, {title(record)}: " + ", ".join(
        f"{'calibrated' if name == 'calibrated' else words(name)} {mean:.3f}"
        + (f" ({outcome(gap)} gradmm)" if gap else "")
        for name, mean, gap in rows_of(record)
    )


def figure(records: Records) -> str:
    """All records on one axis: the first run of each comparison side by side, further ones behind a click."""
    if not records:
        return brief(records)
    ends, groups = limits_of(list(records.values())), groups_by_data(records)
    first, further = [group[0] for group in groups], [one for group in groups for one in group[1:]]
    again = [behind_a_click("Further runs", panels(further, ends))] if further else []
    return "\n\n".join([panels(first, ends), *again])


def panels(held: Sequence[Record], ends: tuple[float, float]) -> str:
    """Records side by side."""
    drawn = "".join(f"<div><p>{escape(title(one))}</p>{panel(one, ends)}</div>" for one in held)
    return f'<figure class="results">{drawn}</figure>'


# ---------------------------------------------------------------- record by record


def report(records: Records) -> str:
    """A section for each record: sentences, tables, texts, cost and origin."""
    return "\n\n".join(section(record) for record in records.values()) or brief(records)


def section(record: Record) -> str:
    """All that one record says."""
    results = record["results"]
    parts = [f"## {title(record)}", summary(record), full_table(record)]
    methods = {name: results["methods"][name] for name in ranked([record])}
    parts.append(behind_a_click("Sentence by sentence", "\n".join(f"- {said}." for said in verdicts_of(methods))))
    parts += [of_budgets(results), qualities(record), texts(results), seconds(results)]
    parts.append(behind_a_click("Where these figures come from", f"{origin(record)}."))
    return "\n\n".join(filter(None, parts))


def behind_a_click(heading: str, body: str) -> str:
    """A box that the reader opens."""
    return f":::{{dropdown}} {heading}\n{body}\n:::"


def summary(record: Record) -> str:
    """How many texts of which kind gave what, and how many of the other ways gradmm beats."""
    results, methods = record["results"], record["results"]["methods"]
    gaps = {name: figures["minus_gradmm"] for name, figures in methods.items() if figures["minus_gradmm"]}
    by = {word: [name for name, gap in gaps.items() if outcome(gap) == word] for word in MARKS}
    tested = f"{counted(len(results['seeds']), 'seed')}, {counted(results['n_test'], 'test text')}."
    if "gradmm" not in methods:
        return f"{tested} gradmm itself was not run here."
    found = methods["gradmm"]
    return (
        f"{tested} {whole(found['n'])} texts by gradmm give **{found['accuracy']['mean']:.3f}**. "
        f"Of the {len(gaps)} other ways, {len(by['beats'])} did better, {len(by['is beaten by'])} did worse, and "
        f"{len(by['cannot be told from'])} cannot be told from it. Calibrated and still untrained, the model "
        f"reaches {results['calibrated']:.3f}."
    )


def full_table(record: Record) -> str:
    """Every method with its number of texts, its accuracy, its difference to gradmm, and the accuracy calibrated."""
    rows, calibrated = [], any("calibrated" in one for one in record["results"]["methods"].values())
    for name in ranked([record]):
        figures = record["results"]["methods"][name]
        gap = figures["minus_gradmm"]
        apart = "" if gap is None else f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        plain = f"{METHODS[name]} (`{name}`)" if name in METHODS else words(name)
        row = [plain, whole(figures["n"]), accuracy(figures), apart]
        row += [accuracy(figures["calibrated"]) if "calibrated" in figures else ""] if calibrated else []
        rows.append(emphasised(name, row))
    head = ["trained on", "texts", "test accuracy", "minus gradmm (interval)", *["calibrated"] * calibrated]
    return f"{markdown(head, rows)}\n\n{legend([record])}"


def of_budgets(results: Mapping[str, Any]) -> str:
    """The same at other numbers of texts, where the record has them."""
    budgets = {float(size): methods for size, methods in results.get("budgets", {}).items()}
    if len(budgets) < 2:
        return ""
    names = list(dict.fromkeys(name for size in sorted(budgets) for name in budgets[size]))
    rows = [
        [whole(size), *(accuracy(budgets[size][name]) if name in budgets[size] else "" for name in names)]
        for size in sorted(budgets)
    ]
    return "With fewer or more texts:\n\n" + markdown(["texts of each class", *map(words, names)], rows)


def quality(figures: Record, key: str) -> str:
    """One measure of a method's texts, in its form; nothing where the record lacks it."""
    value = figures.get(key)
    return "" if value is None else QUALITIES[key][1].format(value)


def qualities(record: Record) -> str:
    """How each method's texts read, by the measures that the record has, behind a click."""
    methods = record["results"]["methods"]
    known = [key for key in QUALITIES if any(one.get(key) is not None for one in methods.values())]
    rows = []
    for name in ranked([record]):
        cells = [quality(methods[name], key) for key in known]
        rows += [emphasised(name, [words(name), *cells])] if any(cells) else []
    if not rows:
        return ""
    head = ["texts", *(QUALITIES[key][0] for key in known)]
    said = "Means over seeds, unless the box below says otherwise; the glossary says what each column measures."
    return behind_a_click("How the texts read", f"{markdown(head, rows)}\n\n{said}")


def texts(results: Mapping[str, Any]) -> str:
    """Kept texts side by side, the first few of each label at once, all behind a click."""
    held = results.get("texts")
    if not held:
        return ""
    most = max(len(some) for by_label in held.values() for some in by_label.values())
    shown = f"Texts, drawn at random:\n\n{side_by_side(held, AT_ONCE)}"
    return shown if most <= AT_ONCE else f"{shown}\n\n{behind_a_click('All texts', side_by_side(held, most))}"


def side_by_side(held: Mapping[str, Mapping[str, Sequence[str]]], most: int) -> str:
    """A table with a column a method and so many texts of each label; a text is shown, never obeyed."""
    labels = list(dict.fromkeys(label for by_label in held.values() for label in by_label))
    head = "".join(f"<th>{escape(words(name).strip('`'))}</th>" for name in held)
    body = ""
    for label in labels:
        columns = [by_label.get(label, [])[:most] for by_label in held.values()]
        for number in range(max(map(len, columns))):
            said = [column[number] if number < len(column) else "" for column in columns]
            cells = "".join(f"<td>{escape(' '.join(text.split()))}</td>" for text in said)
            body += f"<tr><th>{escape(label)}</th>{cells}</tr>"
    table = f"<table class='table texts'><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='pst-scrollable-table-container'>{table}</div>"


def seconds(results: Mapping[str, Any]) -> str:
    """What each stage took, where the record has it."""
    rows = [[str(stage).replace("_", " "), duration(value)] for stage, value in results.get("seconds", {}).items()]
    return "What it cost:\n\n" + markdown(["stage", "time"], rows) if rows else ""


def duration(value: float) -> str:
    """Seconds, or minutes where there are many."""
    return (
        f"{value:.1f} s"
        if value < 120
        else f"{value / 60:.0f} minutes"
        if value < 7200
        else f"{value / 3600:.1f} hours"
    )


# ---------------------------------------------------------------- when not to use this


def tally(records: Records, names: Sequence[str]) -> str:
    """How many comparisons with these methods gradmm wins, loses and leaves open."""
    won, lost, undecided = score(records, names)
    return (
        f"Of {counted(won + lost + undecided, 'comparison')} gradmm wins {won}, loses {lost}, and {undecided} are open"
    )


def score(records: Records, names: Sequence[str]) -> list[int]:
    """How many comparisons with these methods gradmm wins, loses and leaves open, as numbers."""
    return list(map(outcomes(records, names).count, ("is beaten by", "beats", "cannot be told from")))


def scores(records: Records) -> str:
    """The same method by method, a table."""
    each = {name: score(records, [name]) for name in (*REAL, *WRITTEN)}
    held = [[f"{words(name)} (`{name}`)", *map(str, (sum(of), *of))] for name, of in each.items() if any(of)]
    return markdown(["beside", "comparisons", "gradmm wins", "gradmm loses", "open"], held) if held else ""


def outcomes(records: Records, names: Sequence[str]) -> list[str]:
    """What the interval of each of these methods decides in each record that has it."""
    methods = [record["results"]["methods"] for record in records.values()]
    found = [one[name]["minus_gradmm"] for one in methods for name in names if name in one]
    return [outcome(gap) for gap in found if gap]


def against_real(records: Records) -> str:
    """Whether a choice of real texts does better."""
    return (
        "**Where the real texts may be published.** Real texts, all of them or some, need no synthesis. "
        f"{tally(records, REAL)}."
    )


def against_calibration(records: Records) -> str:
    """How much of the gain a calibration gives."""
    shares = [(share, title(record)) for record in records.values() if (share := of_the_gain(record)) is not None]
    gives = (
        f"it gives {spanned(shares, '{:.0%}')} of the gain that gradmm's texts give" if shares
        else "no record here has a gain of gradmm's texts to hold against it"
    )  # fmt: skip
    return (
        "**Where the model is only out of balance.** A model may know the task and prefer one verbalizer whatever the "
        "text says. {py:func}`gradmm.classification.evaluate_calibrated` takes that out with unlabelled texts and no "
        f"training: {gives}."
    )


def of_the_gain(record: Record) -> float | None:
    """The share of gradmm's gain that a calibration gives, at most all; None where there is no gain."""
    methods, calibrated = record["results"]["methods"], record["results"]["calibrated"]
    if not {"none", "gradmm"} <= set(methods):
        return None
    start, end = (methods[name]["accuracy"]["mean"] for name in ("none", "gradmm"))
    return min(1.0, max(0.0, (calibrated - start) / (end - start))) if end > start else None


def spanned(values: Sequence[tuple[float, str]], form: str) -> str:
    """The median of what comparisons give, each with its title, and the ends: `46% (12% on A to 95% on B)`."""
    (low, first), (high, last) = min(values), max(values)
    middle = form.format(statistics.median(value for value, _ in values))
    if len(values) == 1:
        return f"{middle} (on {first})"
    return f"{middle} ({form.format(low)} on {first} to {form.format(high)} on {last})"


def against_writing(records: Records) -> str:
    """Whether texts that match nothing do as well."""
    return f"**Where texts that the model writes freely are enough.** A search costs time. {tally(records, WRITTEN)}."


def against_noise(records: Records) -> str:
    """Which records are private."""
    private = [title(record) for record in records.values() if record["settings"].get("epsilon") is not None]
    held = f"Only {listed(private)} was measured with privacy" if private else "No record here is of a private release"
    return (
        f"**Where the real texts are private and few.** {held}. What noise leaves of a release at which number of "
        "examples, on a small model and on a pretrained one, and what an attacker still sees, is in "
        "[04-privacy](executed/04-privacy.ipynb). Without `epsilon` nothing is promised about the real texts."
    )


def undecided(records: Records) -> str:
    """How many comparisons are open, and how small a difference the records can see."""
    everything = dict.fromkeys(name for one in records.values() for name in one["results"]["methods"])
    found = outcomes(records, list(everything))
    halves = []
    for record in records.values():
        gaps = [one["minus_gradmm"] for one in record["results"]["methods"].values() if one["minus_gradmm"]]
        halves += [(statistics.median((gap["high"] - gap["low"]) / 2 for gap in gaps), title(record))] if gaps else []
    open_ones = found.count("cannot be told from")
    said = f"**Where a small difference decides.** {open_ones} of {len(found)} comparisons are open."
    if not halves:
        return said
    half = f"Half an interval is, in the median, {spanned(halves, '{:.3f}')}"
    return f"{said} {half}: much smaller differences are not seen here."


def limits(records: Records) -> str:
    """When not to use gradmm, as the records have it."""
    if not records:
        return brief(records)
    points = (against_real, against_calibration, against_writing, against_noise, undecided)
    said = "\n".join(f"- {point(records)}" for point in points)
    return "\n\n".join(filter(None, [said, scores(records)]))


# ---------------------------------------------------------------- how the texts read


def ease(records: Records, ablated: Records | None = None) -> str:
    """gradmm's texts beside those that the same model writes for no target; and what a lean to easier ones costs."""
    rows = []
    for record in map(first_run_of, groups_by_data(records)):
        methods = record["results"]["methods"]
        plain = next((name for name in ("zero_shot", "prompt_only") if name in methods), None)
        if plain and "gradmm" in methods:
            found, beside = methods["gradmm"], methods[plain]["perplexity"]
            own, *faults = [quality(found, key) for key in ("perplexity", *FAULTS)]
            usual = f"{beside:.1f}" + " (unchosen)" * (plain == "prompt_only")
            rows.append([title(record), own, usual, f"{found['perplexity'] / beside:.2f}", *faults])
    if not rows:
        return "No comparison is recorded."
    head = ["comparison", "gradmm's perplexity", "zero-shot's", "ratio", *FAULTS]
    lean = leaning(recorded(prefix="05-ablations-") if ablated is None else ablated)
    return "\n\n".join(filter(None, [markdown(head, rows), lean]))


def leaning(ablated: Records) -> str:
    """What `perplexity_weight` does to accuracy and perplexity over all paired trainings that vary it."""
    pairs: dict[float, list[tuple[str, Record, Record]]] = {}
    for record in ablated.values():
        rows = [row for row in record["results"]["choices"] if row["factor"] == "perplexity_weight"]
        base = {row["seed"]: row for row in rows if row["base"]}
        for row in rows:
            if not row["base"] and row["seed"] in base:
                pairs.setdefault(row["value"], []).append((title(record), base[row["seed"]], row))
    return " ".join(leaned(weight, found) for weight, found in pairs.items() if len(found) >= FEWEST)


def leaned(weight: float, pairs: Sequence[tuple[str, Record, Record]]) -> str:
    """The same of one weight: trainings by title, with the default's texts and with those that read more easily."""
    middle, low, high = over([100 * (eased["accuracy"] - plain["accuracy"]) for _, plain, eased in pairs])
    ratio = statistics.fmean(eased["perplexity"] / plain["perplexity"] for _, plain, eased in pairs)
    return (
        f"With `perplexity_weight={weight:g}` the choice leans to texts that read more easily: they have {ratio:.2f} "
        f"times the perplexity of the default's, and the test accuracy changes by {middle:+.1f} points ({low:+.1f} to "
        f"{high:+.1f}, Student's t over {len(pairs)} paired trainings; {listed(sorted({one for one, *_ in pairs}))})."
    )


# ---------------------------------------------------------------- what foretells the outcome of training

MEASURES = {
    "by_class": "cosine of the mean gradients, class by class: what gradmm matches",
    "behind_warm_up": "cosine class by class, of the gradients behind a short public warm-up",
    "all_classes": "cosine of the mean gradients of all classes together",
    "as_adam_steps": "cosine class by class, the texts' gradients as Adam scales them (LESS)",
    "whitened": "cosine class by class, in whitened directions (TAROT)",
    "round_robin": "every real example has a text with a gradient like its own",
    "interaction": "the step's gain less what its texts take from each other (GREATS)",
    "states": "every real example has a text with a hidden state like its own (RDS+)",
    "contrast": "cosine of what sets the classes' mean hidden states apart",
    "sureness": "how sure the model is of the texts' labels, calibrated",
    "metagradient": "derivative of the real examples' loss, behind a short training, in the texts' weight (MGD)",
    "small_gradients": "small gradients",
    "on_the_real": "the outcome itself, on the real examples",
}
RESAMPLES = 2000


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's, and its 95% bootstrap interval over the pairs; zeros where one of the two does not vary."""
    pairs = numpy.array([first, second], dtype=float)
    if (pairs == pairs[:, :1]).all(1).any():
        return 0.0, 0.0, 0.0
    rows = numpy.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    with numpy.errstate(invalid="ignore"):  # a resample of one value alone has no correlation
        drawn = [numpy.corrcoef(*rankdata(pairs[:, row], axis=1))[0, 1] for row in rows]
        found = numpy.corrcoef(*rankdata(pairs, axis=1))[0, 1]
    return float(found), *map(float, numpy.nanquantile(drawn, [0.025, 0.975]))


OUTCOMES = {"accuracy": "on_the_real", "calibrated_accuracy": "calibrated_on_the_real"}  # on unseen texts, on the real


def foretold(record: Record) -> str:
    """How far each measure of small sets puts them into the order in which training on them does."""
    sets = record["results"]["sets"]
    held = {name: [row[name] for row in sets] for name in sets[0]}
    rows = {name: [(held[name], held[outcome]) for outcome in OUTCOMES]
            for name in held if name not in ("set", *OUTCOMES, *OUTCOMES.values())}  # fmt: skip
    rows["on_the_real"] = [(held[seen], held[outcome]) for outcome, seen in OUTCOMES.items()]
    found = {name: [rank_correlation(*pair) for pair in pairs] for name, pairs in rows.items()}
    ordered = sorted(found, key=lambda name: -sum(middle for middle, _, _ in found[name]))
    table = [
        [
            MEASURES.get(name, f"`{name}`"),
            *(f"{mid:+.2f} ({low:+.2f} to {high:+.2f})" for mid, low, high in found[name]),
        ]
        for name in ordered
    ]
    measures = [one for name, one in found.items() if name != "on_the_real"]
    proven = sum(any(low > 0 for _, low, _ in one) for one in measures)
    reach = [f"{statistics.fmean(held[name]):.3f} ± {statistics.stdev(held[name]):.3f}" for name in OUTCOMES]
    settings, tested = record["settings"], record["results"]["n_test"]
    return (
        f"**{title(record)}**: {counted(len(sets), 'set')} of {settings['size']} texts, written or real, each trained "
        f"on for {settings['steps']} steps; {settings['n_real']} real examples, {tested} validation texts. The sets "
        f"reach {reach[0]}, and {reach[1]} once the trained models are calibrated. Rank correlations with 95% "
        f"intervals; of {proven} among {len(measures)} measures one of the two is above zero.\n\n"
        + markdown(["measure", "with accuracy", "with calibrated accuracy"], table)
        + "\n\n"
        + behind_a_click("Where these figures come from", f"{origin(record)}.")
    )


def of_measures(records: Records) -> str:
    """Each record's table."""
    return "\n\n".join(map(foretold, records.values())) or "Nothing of this kind is recorded."


# ---------------------------------------------------------------- directives


def directive(made: Callable[[Records], str], prefix: str = PREFIX) -> type[SphinxDirective]:
    """One whose Markdown is made of the records, and read as if it stood on the page."""

    class Results(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # at every build: records come and go
            return self.parse_text_to_nodes(made(recorded(prefix=prefix)), allow_section_headings=True)

    return Results


def setup(app):
    """Make the directives known."""
    for name, made in {
        "-table": brief,
        "-figure": figure,
        "": report,
        "-limits": limits,
        "-headroom": headroom,
        "-calibrated": once_calibrated,
        "-reading": ease,
    }.items():
        app.add_directive(f"results{name}", directive(made))
    app.add_directive("results-measures", directive(of_measures, "measures-"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8"), recorded()), encoding="utf-8")
