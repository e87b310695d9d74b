"""The results page: every method of a record is on it, its sentences follow the intervals, and the README agrees."""

import re
from pathlib import Path

import numpy
import pytest
import scipy.stats

from gradmm.experiments import baselines, records

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page(extension):
    """The module that writes the page."""
    return extension("results")


def figures(mean: float, gap: tuple[float, float] | None, n: float = 100.0) -> dict:
    """What a record holds of a method, as far as the page reads it."""
    of_gradmm = None
    if gap is not None:
        of_gradmm = {"mean": sum(gap) / 2, "low": gap[0], "high": gap[1], "confidence": 0.95}
    accuracy = {"mean": mean, "std": 0.01, "runs": [mean, mean]}
    return {"accuracy": accuracy, "minus_gradmm": of_gradmm, "n": n, "perplexity": 30.0}


METHODS = {
    "none": figures(0.5, (-0.25, -0.15), 0.0),
    "zero_shot": figures(0.65, (-0.08, -0.02)),
    "gradmm": figures(0.7, None),
    "real": figures(0.71, (-0.02, 0.04), 50.0),
    "herding": figures(0.75, (0.02, 0.08)),
    "mixed_up": figures(0.69, (-0.04, 0.02), 99.5),  # a method that no page has a word for
}


def record(methods: dict | None = None, data: str = "sst2", **more) -> dict:
    machine = {"gpu": None, "processor": "a processor"}
    results = {"methods": METHODS if methods is None else methods, "calibrated": 0.6, "seeds": [0, 1], "n_test": 1200}
    return {
        "settings": {"model": "someone/Small-LM, a model of the tests", "data": data},
        "machine": machine,
        "versions": {"torch": "2.13"},
        "commit": "0123456789abcdef",
        "results": {**results, **more},
    }


def without(*names: str) -> dict:
    return {name: one for name, one in METHODS.items() if name not in names}


def test_every_method_of_the_package_has_plain_words(page):
    of_the_benchmark = {"admm", "second_round", "warm_up", "oracle", "random_many"}  # `real_models.OWN`
    assert set(page.METHODS) == {*baselines.METHODS, *of_the_benchmark}
    assert {*page.BRIEF, *page.OF_REAL_TEXT, *page.WRITTEN} <= set(page.METHODS)


def test_a_further_run_is_named_in_its_title_and_adds_marked_rows_to_the_column_of_the_first(page):
    first = record(without("herding"))
    second = record({**METHODS, "zero_shot": figures(0.99, (0.2, 0.3)), "herding": figures(0.77, (0.02, 0.08))})
    second["settings"]["run"] = "a second run"
    assert page.title(second) == "Small-LM on SST-2, a second run"
    for both in ({"a": first, "b": second}, {"b": second, "a": first}):
        shown = page.brief(both)
        assert "on SST-2, a second run" in page.report(both) and page.title(first) in page.report(both)
        assert shown.count("| SST-2 |") == 1 and "0.990" not in shown
        row = next(line for line in shown.splitlines() if "herding" in line)
        assert "0.770" in row and "▲ †" in row and shown.count("†") == 2 and page.AGAIN in shown
    assert page.AGAIN not in page.brief({"a": record()})
    alone = page.brief({"b": second})  # with no first run it is one
    assert "†" not in alone and "0.990" in alone


def test_other_prompts_are_a_column_of_their_own_beside_the_first(page):
    first, other = record(), record({**METHODS, "zero_shot": figures(0.99, (0.2, 0.3))})
    other["settings"] |= {"task": "other-prompts.yaml", "run": "other prompts"}
    head, *rows = page.brief({"a": first, "b": other, "c": record(data="demo")}).split("\n\n")[2].splitlines()
    columns = ["Small-LM, trained on", "texts", "SST-2", "SST-2, other prompts", "the embedded reviews"]
    assert [cell.strip() for cell in head.strip("|").split("|")] == columns
    assert any("0.650" in row and "0.990" in row for row in rows) and "†" not in "".join(rows)


def test_each_model_has_tables_of_its_own_that_fit_a_page(page):
    names = [f"data{number}" for number in range(page.SIDE_BY_SIDE + 1)]
    held = {name: record(data=name) for name in names} | {"z": record()}
    held["z"]["settings"]["model"] = "Other-LM"
    parts = page.by_table(list(held.values()))
    assert [[one["settings"]["data"] for one in part] for part in parts] == [names[:2], names[2:], ["sst2"]]
    short = page.brief(held)
    assert [short.count(f"| {model}, trained on |") for model in ("Small-LM", "Other-LM")] == [2, 1]


def test_what_lies_above_and_below_gradmm_over_all_comparisons_comes_first(page):
    gaps = {
        "real": (0.01, 0.03, -0.01),
        "herding": (0.02, 0.03, 0.04),
        "zero_shot": (-0.02, -0.05, -0.08),
        "mixed_up": (0.0, 0.1, 0.2),
    }
    held = {
        str(number): record(
            {
                "gradmm": METHODS["gradmm"],
                **{name: figures(0.7, (gap[number], gap[number])) for name, gap in gaps.items()},
            },
            data=f"data{number}",
        )
        for number in range(3)
    }
    said, table, *_ = page.brief(held).split("\n\n")
    assert said == page.OVER and "data0" in page.brief(held).split(table)[1]
    rows = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [page.words(name) for name in ("herding", "real", "gradmm", "zero_shot")]
    assert [row[1] for row in rows] == ["3", "3", "", "3"]
    # 3 +- t(0.975, 2) 1 / sqrt(3), by a table of Student's t
    assert rows[0][2] == "+3.0 (+0.5 to +5.5)\N{NO-BREAK SPACE}▲" and rows[2][2] == "0"
    assert rows[1][2].endswith("to +6.0)") and rows[3][2] == "-5.0 (-12.5 to +2.5)"
    assert page.over([0.01, 0.04, 0.07]) == pytest.approx(
        (0.04, 0.04 - 4.302653 * 0.03 / 3**0.5, 0.04 + 4.302653 * 0.03 / 3**0.5)
    )
    assert page.OVER not in page.brief({key: held[key] for key in "01"})  # two comparisons are too few
    again = {**held, "again": {**held["2"], "settings": held["2"]["settings"] | {"run": "a second run"}}}
    assert page.brief(again).split("\n\n")[1] == table  # a further run of the same is no further comparison


@pytest.mark.parametrize("left_out", [(), ("herding",), ("zero_shot", "none"), ("gradmm",)])
def test_every_method_of_a_record_is_in_figure_table_and_sentences(page, left_out):
    methods = without(*left_out)
    if "gradmm" in left_out:
        methods = {name: {**one, "minus_gradmm": None} for name, one in methods.items()}
    shown = record(methods)
    text, drawing = page.section(shown), page.figure({"a": shown})
    for name, one in methods.items():
        plain = page.METHODS.get(name, name)
        assert f"{one['accuracy']['mean']:.3f}" in text and f"`{name}`" in text
        assert drawing.count(f">{plain.replace(chr(39), '&#x27;')}</text>") == 1
        assert (f"- {name} (" in text) == (name != "gradmm" and "gradmm" in methods)
    assert "2 seeds, 1,200 test texts" in text and "99.5" in text
    assert "a processor, torch 2.13, commit `0123456789`" in text


@pytest.mark.parametrize(
    "gap, said, mark",
    [
        ((0.01, 0.05), "beats", "▲"),
        ((-0.05, -0.01), "is beaten by", "▼"),
        ((-0.01, 0.01), "cannot be told from", ""),
        ((0.0, 0.05), "cannot be told from", ""),
    ],
)
def test_a_sentence_follows_the_interval(page, gap, said, mark):
    shown = record({**without("real"), "herding": figures(0.7 + sum(gap) / 2, gap)})
    text, limits = page.section(shown), page.limits({"a": shown})
    assert re.search(rf"- herding \([\d.]+\) {said} gradmm \(0.700\)", text)
    row = next(line for line in text.splitlines() if "(`herding`)" in line)
    assert f"{gap[0]:+.3f} to {gap[1]:+.3f}" in row and (mark or "0.010 |").strip() in row
    counts = {word: int(word == said) for word in page.MARKS}
    told = "Of 1 comparison gradmm wins {is beaten by}, loses {beats}, and {cannot be told from} are open"
    assert f"need no synthesis. {told.format_map(counts)}." in limits
    assert "| real texts chosen by herding (`herding`) | 1 | {is beaten by} | {beats} |".format_map(counts) in limits
    assert f"({said} gradmm)" in page.figure({"a": shown})


def test_a_record_of_one_seed_has_no_spread(page):
    alone = {name: one | {"accuracy": one["accuracy"] | {"std": None}} for name, one in METHODS.items()}
    assert "| 0.750 ▲ |" in page.full_table(record(alone)) and "±" not in page.full_table(record(alone))[:400]


def test_further_runs_are_drawn_behind_a_click_on_the_same_axis(page):
    first, second = record(), record({**METHODS, "herding": figures(0.95, (0.2, 0.3))})
    second["settings"]["run"] = "a second run"
    shown, behind = page.figure({"a": second, "b": first}).split(page.behind_a_click("Further runs", "")[:-4])
    assert shown.strip() == page.panels([first], page.limits_of([first, second]))
    assert "a second run" in behind and behind.count("<svg") == 1 and behind.endswith("\n:::")
    other = record(data="demo")
    other["settings"]["run"] = "other prompts"  # no run before it: it is none of the further ones
    assert "Further runs" not in page.figure({"a": first, "b": other})


def test_the_order_is_from_the_ceiling_to_the_floor(page):
    rows = page.full_table(record()).splitlines()[2:]
    names = [found[1] for row in rows if (found := re.search(r"`(\w+)`", row))]
    assert names == ["herding", "real", "gradmm", "mixed_up", "zero_shot", "none"]


def test_no_number_of_the_axis_is_cut_off(page):
    """The first and the last stand at the track's ends, each as wide as three figures of 13 pixels."""
    for ends in ((0.3, 1.0), (0.45, 0.85)):
        drawn = page.panel(record(), ends)
        places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle"', drawn)]
        assert len(places) > 3 and all(10 < x < page.WIDTH - 10 for x in places)


def test_a_record_that_knows_the_accuracy_calibrated_shows_it(page):
    calibrated = {"calibrated": {key: figures(0.8, (0.01, 0.05))[key] for key in ("accuracy", "minus_gradmm")}}
    head, _, *rows = page.full_table(record({**METHODS, "herding": METHODS["herding"] | calibrated})).splitlines()
    (row,) = (row for row in rows if "`herding`" in row)
    assert head.endswith("| calibrated |") and "0.800" in row.split("|")[-2] and "▲" in row.split("|")[-2]
    assert "| calibrated |" not in page.full_table(record())


def test_what_the_trained_models_reach_calibrated_is_a_table_of_its_own(page):
    def both(name: str, mean: float, gap: tuple[float, float] | None) -> dict:
        return METHODS[name] | {"calibrated": figures(mean, gap)}

    first = record(
        {
            **without("herding", "none"),
            "gradmm": both("gradmm", 0.8, None),
            "zero_shot": both("zero_shot", 0.79, (-0.03, 0.01)),
        }
    )
    second = record({"none": both("none", 0.4, (-0.5, -0.3)), "herding": both("herding", 0.82, (0.01, 0.03))})
    second["settings"]["run"] = "a second run"
    shown = page.once_calibrated({"b": second, "a": first, "c": record(data="other")})
    head, _, *rows = shown.split("\n\n")[0].splitlines()
    assert head == "| Small-LM, trained on | SST-2 |"  # a record without calibrated figures has no column
    found = {row.split("|")[1].strip(" *"): row.split("|")[2] for row in rows}
    assert list(found) == [page.words(name) for name in ("herding", "gradmm", "zero_shot", "none")]
    assert "▲ †" in found[page.words("herding")] and "▼" not in found[page.words("zero_shot")]
    assert "3 sets of texts give 0.650 to 0.750, and 0.790 to 0.820 calibrated." in shown
    assert page.once_calibrated({"c": record()}) == "No trained model of a record is calibrated."


def test_the_room_above_the_real_texts_is_measured_from_them(page):
    """In points, comparison by comparison; a method counts where it and the real texts were both run."""
    gaps = [(0.00, 0.03), (0.02, 0.06), (-0.01, 0.02)]  # of the real texts, of the chosen real ones, to gradmm
    held = {
        data: record({
            "gradmm": figures(0.7, None),
            "real": figures(0.7 + real, (real, real)),
            "herding": figures(0.7 + more, (more, more)),
            "none": figures(0.5, (-0.2, -0.2)),
        }, data)
        for data, (real, more) in zip("abc", gaps, strict=True)
    }  # fmt: skip
    alone = {"gradmm": figures(0.7, None), "herding": figures(0.9, (0.2, 0.2))}
    _, head, _, *rows = page.headroom(held | {"d": record(alone, "d")}).replace("\n\n", "\n").splitlines()
    assert head == f"| trained on | comparisons | points above {page.words('real')}, mean and 95% interval |"
    found = [[cell.strip(" *") for cell in row.split("|")[1:-1]] for row in rows]
    names, counts, shown = zip(*found, strict=True)
    assert names == tuple(map(page.words, ("herding", "real", "gradmm"))) and counts == ("3", "", "3")
    half = scipy.stats.t.ppf(0.975, 2) * numpy.std([3, 4, 3], ddof=1) / 3**0.5
    assert shown[0] == f"+3.3 ({10 / 3 - half:+.1f} to {10 / 3 + half:+.1f})\N{NO-BREAK SPACE}▲" and shown[1] == "0"
    assert shown[2].startswith("-0.3 (")
    assert page.headroom({"d": record(alone)}).startswith("No record has enough real texts")


def small_sets(count: int, **columns) -> dict:
    """A record of measures: `columns` says of each what its value is in set number `i`."""
    rows = [{"set": f"written-{i}", **{name: float(value(i)) for name, value in columns.items()}} for i in range(count)]
    settings = record()["settings"] | {"size": 16, "steps": 8, "n_real": 50}
    return {**record(), "settings": settings, "results": {"sets": rows, "n_test": 300}}


def test_a_table_of_measures_says_which_foretell_the_outcome(page):
    shown = page.foretold(small_sets(
        40, by_class=lambda i: -i, odd=lambda i: i % 2, accuracy=lambda i: i, on_the_real=lambda i: i**3,
        calibrated_accuracy=lambda i: (7 * i) % 40, calibrated_on_the_real=lambda i: 1,
    ))  # fmt: skip
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in shown.splitlines() if row.startswith("|")}
    assert list(rows)[2:] == [page.MEASURES["on_the_real"], "`odd`", page.MEASURES["by_class"]]  # the best first
    assert rows[page.MEASURES["on_the_real"]][0] == "+1.00 (+1.00 to +1.00)"
    assert rows[page.MEASURES["on_the_real"]][1].startswith("+0.00 (+0.00 to +0.00)")  # it does not vary
    assert rows[page.MEASURES["by_class"]][0].startswith("-1.00") and "of 0 among 2 measures" in shown
    assert page.of_measures({}) == "Nothing of this kind is recorded." and "40 sets of 16 texts" in shown
    first, second = numpy.random.default_rng(0).normal(size=(2, 25))
    assert page.rank_correlation(first, second)[0] == pytest.approx(scipy.stats.spearmanr(first, second)[0])


def test_texts_stand_side_by_side_and_are_not_obeyed(page):
    texts = {
        "real": {"negative": ["a <b>dull</b> film", "$x$ `bad`\n\n## no"], "positive": ["lovely"]},
        "gradmm": {"negative": ["slow"], "positive": ["warm", "kind"]},
    }
    shown = page.section(record(texts=texts))
    assert "a &lt;b&gt;dull&lt;/b&gt; film" in shown and "<td>$x$ `bad` ## no</td>" in shown
    assert "<tr><th>positive</th><td>lovely</td><td>warm</td></tr>" in shown
    assert "<td></td><td>kind</td>" in shown and "Texts, drawn at random" not in page.section(record())
    assert "All texts" not in shown
    many = page.section(record(texts={"gradmm": {"positive": [f"text {number}." for number in range(9)]}}))
    first, every = many.split(":::{dropdown} All texts")
    assert first.count("text 3.") == 1 and "text 4." not in first and every.count("text 8.") == 1


def test_how_texts_read_is_a_table_of_what_was_measured(page):
    read = {
        "distinct_2": 0.765,
        "duplicates": 0.0,
        "flawed": 0.02,
        "second_perplexity": None,
        "longest_shared_span": 3.2,
    }
    methods = {**METHODS, "none": figures(0.5, (-0.25, -0.15), 0.0) | {"perplexity": None}}
    methods["gradmm"] = {**METHODS["gradmm"], **read}
    shown = page.qualities(record(methods))
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    measured = "| perplexity | distinct bigrams | duplicates | flawed | longest span shared with real texts, words |"
    assert head.endswith(measured) and "of another model" not in head
    assert "| **gradmm's texts** | **30.0** | **0.77** | **0%** | **2%** | **3** |" in rows
    assert "| the real texts that gradmm saw | 30.0 |  |  |  |  |" in rows
    assert not any("as it came" in row for row in rows) and len(rows) == len(methods) - 1
    assert shown in page.report({"a": record(methods)})
    unread = {name: one | {"perplexity": None} for name, one in METHODS.items()}
    assert page.qualities(record(unread)) == "" and "How the texts read" not in page.report({"a": record(unread)})


def test_a_lean_to_easier_texts_is_judged_over_all_paired_trainings(page):
    def varied(data: str, gaps: list[float]) -> dict:
        rows = []
        for seed, gap in enumerate(gaps):
            plain = {"seed": seed, "factor": "perplexity_weight", "value": 0.0, "base": True}
            plain |= {"accuracy": 0.7, "perplexity": 20.0}
            rows += [plain, plain | {"value": 0.01, "base": False, "accuracy": 0.7 + gap, "perplexity": 15.0}]
            rows.append(plain | {"factor": "filter", "value": "none", "accuracy": 0.1})  # another factor's own base
        return record(data=data) | {"results": {"choices": rows}}

    both = {"a": varied("sst2", [0.01, -0.02]), "b": varied("demo", [0.03])}
    middle, low, high = page.over([1.0, -2.0, 3.0])
    said = page.leaning(both)
    assert "`perplexity_weight=0.01`" in said and "0.75 times" in said and "over 3 paired" in said
    assert f"{middle:+.1f} points ({low:+.1f} to {high:+.1f}" in said
    assert said.endswith("trainings; Small-LM on SST-2 and Small-LM on the embedded reviews).")
    assert page.leaning({"b": both["b"]}) == ""  # one training says nothing
    methods = {**METHODS, "zero_shot": METHODS["zero_shot"] | {"perplexity": 24.0}}
    shown = page.ease({"a": record(methods)}, both)
    assert "| Small-LM on SST-2 | 30.0 | 24.0 | 1.25 |  |  |  |" in shown and shown.endswith(said)
    assert page.ease({}, {}) == "No comparison is recorded."


@pytest.mark.parametrize("seconds, said", [(3.25, "3.2 s"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_what_it_cost_is_shown_where_it_is_known(page, seconds, said):
    assert f"| write the_texts | {said} |".replace("_", " ") in page.section(
        record(seconds={"write_the_texts": seconds})
    )
    assert "What it cost" not in page.section(record())


@pytest.mark.parametrize(
    "start, calibrated, end, said",
    [
        (0.5, 0.6, 0.7, "it gives 50% (on Small-LM on SST-2) of the gain that gradmm's texts give."),
        (0.5, 0.8, 0.7, "it gives 100% (on"),
        (0.5, 0.45, 0.7, "it gives 0% (on"),
        (0.7, 0.75, 0.6, "no record here has a gain"),
    ],
)
def test_what_a_calibration_gives_follows_the_figures(page, start, calibrated, end, said):
    methods = {**METHODS, "none": figures(start, (-0.2, -0.1), 0.0), "gradmm": figures(end, None)}
    assert said in page.limits({"a": record(methods, calibrated=calibrated)})


def test_many_records_are_told_by_their_middle_and_their_ends(page):
    shares = [(0.125, "A"), (0.5, "B"), (0.25, "C"), (1.0, "D")]
    assert page.spanned(shares, "{:.1%}") == "37.5% (12.5% on A to 100.0% on D)"
    assert page.spanned([(0.5, "A"), (0.5, "A"), (0.8, "A")], "{:.1f}") == "0.5 (0.5 on A to 0.8 on A)"
    many = {str(n): record(METHODS, data) for n, data in enumerate(["sst2", "rotten_tomatoes", "demo"] * 9)}
    assert max(map(len, page.limits(many).split("\n"))) < max(map(len, page.limits({"a": record()}).split("\n"))) + 80


def test_a_record_without_gradmm_has_limits_too(page):
    said = page.limits({"a": record({"none": figures(0.5, None, 0.0), "real": figures(0.7, None)})})
    assert "0 of 0 comparisons are open." in said and "Half an interval" not in said


def test_what_gradmm_does_not_win_is_counted_method_by_method(page):
    open_yet = {"few_shot": figures(0.69, (-0.02, 0.01)), "surest": figures(0.75, (0.01, 0.09))}
    open_yet["random_target"] = figures(0.5, (-0.3, -0.1))  # nobody would use it: it counts nowhere
    said = page.limits({"a": record(), "b": record({**METHODS, **open_yet}, "rotten_tomatoes")})
    assert "Of 4 comparisons gradmm wins 0, loses 2, and 2 are open." in said
    assert "Of 4 comparisons gradmm wins 2, loses 1, and 1 are open." in said
    for name, of in {"herding": "2 | 0 | 2 | 0", "surest": "1 | 0 | 1 | 0", "few_shot": "1 | 0 | 0 | 1"}.items():
        assert f"{page.METHODS[name]} (`{name}`) | {of} |" in said
    assert "random_target" not in said


def test_other_numbers_of_texts_are_a_table(page):
    budgets = {"50": {"gradmm": METHODS["gradmm"]}, "5": {"gradmm": figures(0.61, None), "random": METHODS["herding"]}}
    rows = page.section(record(budgets=budgets)).split("With fewer or more texts:")[1].splitlines()
    assert rows[4].startswith("| 5 | 0.610") and rows[5].startswith("| 50 | 0.700") and rows[5].endswith("|  |")


def test_records_named_after_their_data_alone_come_last(page, tmp_path):
    for name in ("sst2", "alm-sst2", "zlm-sst2"):
        records.write_record(tmp_path / f"03-finetuning-{name}.json", record()["results"], record()["settings"])
    assert list(page.recorded(tmp_path)) == [f"03-finetuning-{name}" for name in ("alm-sst2", "zlm-sst2", "sst2")]
    assert page.recorded(tmp_path / "absent") == {}
    assert all(made({}) == "No comparison is recorded." for made in (page.brief, page.report, page.limits, page.figure))


def test_the_records_of_the_book_can_be_shown(page):
    held = page.recorded()
    assert held and page.report(held).count("\n## ") + 1 == len(held) == page.figure(held).count("<svg")


def test_the_readme_says_what_the_records_say(page):
    text = page.README.read_text(encoding="utf-8")
    assert page.readme(text, page.recorded()) == text, "run: python book/_ext/results.py"
    assert text.index(page.BEGIN) < text.index("\n## ")  # before the first heading: on the first screen
    changed = page.readme(text, {"a": record()})
    assert "| Small-LM, trained on | texts | SST-2 |" in changed and page.readme(changed, page.recorded()) == text
