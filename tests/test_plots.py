"""The figures draw what they are given, and text is shown rather than obeyed."""

import time

import datasets
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas
import pytest

from gradmm.experiments import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_a_choice_is_drawn_class_by_class():
    rows = [
        {"label": label, "step": step, "group": 0, "match_z": 1 / step}
        for label in ("bad", "good")
        for step in (1, 2, 3)
    ]
    figure = plots.history(pandas.DataFrame(rows), "pool")
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 1 / 2, 1 / 3]] * 2
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["bad", "good"]


def test_convergence_draws_median_and_range_of_every_measure():
    rows = [
        {
            "step": step,
            "group": group,
            "match_x": 0.1 * group,
            "match_z": 0.2,
            "primal": 1.0,
            "dual": 0.5,
            "stationarity": 0.1 + group,
        }
        for step in (1, 2, 3)
        for group in (0, 1, 2)
    ]
    left, right = plots.convergence(pandas.DataFrame(rows)).axes
    assert [line.get_label() for line in left.lines] == ["at x (continuous)", "at z (text)"]
    assert list(left.lines[0].get_ydata()) == pytest.approx([0.1] * 3) and len(right.lines) == 3
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (left, right))


def test_convergence_of_a_search_among_texts_is_the_loss_alone():
    rows = [
        {"step": step, "group": group, "match_z": 0.2 * group, "promised": -0.1}
        for step in (1, 2)
        for group in (0, 1, 2)
    ]
    (left,) = plots.convergence(pandas.DataFrame(rows)).axes
    assert [line.get_label() for line in left.lines] == ["at z (text)"]
    assert list(left.lines[0].get_ydata()) == pytest.approx([0.2] * 2)


def test_selection_tells_more_classes_apart_than_there_are_colours():
    names = [f"class {n:02}" for n in range(20)]
    table = {"label_name": names, "kept": [True] * 20, "match_loss": [0.1] * 20, "perplexity": [9.0] * 20}
    (axes,) = plots.selection(datasets.Dataset.from_dict(table)).axes
    looks = {(str(some.get_edgecolor()), str(some.get_paths()[0].vertices)) for some in axes.collections}
    assert len(looks) == 20


def test_curves_tell_more_series_apart_than_there_are_colours():
    (axes,) = plots.lines({str(n): pandas.Series([1, 2]) for n in range(20)}, "step", "norm").axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 20


def test_two_dollar_signs_in_a_text_are_no_formula():
    assert "mathjax_ignore" in plots.table([{"text": "paid $45 and $20 more"}]).to_html()
    assert "mathjax_ignore" in plots.evolution({1: ["$45", " and $20"]}).html


def test_selection_draws_every_text():
    table = {
        "label_name": ["a", "a", "b"],
        "kept": [True, False, True],
        "match_loss": [0.1, 0.2, 0.3],
        "perplexity": [9.0, 8.0, 7.0],
    }
    (axes,) = plots.selection(datasets.Dataset.from_dict(table)).axes
    assert sum(len(points.get_offsets()) for points in axes.collections) == 3
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"a, kept", "a, dropped", "b, kept"}
    assert [axes.xaxis.get_major_formatter()(tick) for tick in (2, 10)] == ["2", "10"]


def test_names_that_no_corner_holds_stand_once_above_all_panels():
    curve = pandas.Series([1.0, 2.0])
    frame = pandas.DataFrame({"measured": curve, "bound": curve})
    figure = plots.lines({f"a curve with a long name {n}": curve for n in range(4)}, "step", "norm")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4 and figure.axes[0].get_legend() is None
    several = plots.bounds({title: {str(n): frame for n in range(4)} for title in "abc"}, "step", "gap")
    assert len(several.legends) == 1 and len(several.axes) == 3
    assert len({axes.get_position().y0 for axes in several.axes}) == 2  # two side by side, the third below
    apart = plots.bounds({"a": {str(n): frame for n in range(4)}, "b": {"x": frame}}, "step", "gap")
    assert not apart.legends and all(axes.get_legend() for axes in apart.axes)


def test_accuracies_draw_every_run_and_name_the_mean():
    (axes,) = plots.accuracies({"real": [0.5, 0.7], "none": [0.4]}, chance=0.5).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["real", "none"]
    assert [text.get_text() for text in axes.texts] == ["0.600", "0.400"]
    assert sum(len(points.get_offsets()) for points in axes.collections if hasattr(points, "get_offsets")) >= 3


def test_panels_stand_side_by_side_over_one_range():
    axes = plots.by_panel(
        {"a": {"real": [0.5, 0.7], "none": [0.4]}, "b": {"real": [0.9], "none": [0.2]}}, "match_loss", line=0.5
    ).axes
    assert [place.get_title() for place in axes] == ["a", "b"]
    assert [text.get_text() for text in axes[1].texts] == ["0.900", "0.200"]
    assert len({place.get_xlim() for place in axes}) == 1 and axes[0].get_xlabel() == "match_loss"


def test_a_panel_a_factor_with_the_base_named():
    rows = [("rho", value, value == 0.1, 0.5 + value) for value in (0.1, 0.2) for _ in range(2)]
    rows += [(name, "normal", True, 0.6) for name in ("init", "filter", "space")]
    panels = plots.factors(pandas.DataFrame(rows, columns=["factor", "value", "base", "accuracy"]), "accuracy").axes
    assert [axes.get_title() for axes in panels] == ["rho", "init", "filter", "space"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["0.1 (base)", "0.2"]
    assert [text.get_text() for text in panels[0].texts] == ["0.600", "0.700"]


def test_lines_have_names_and_units():
    (axes,) = plots.lines({"z": pandas.Series([1, 2]), "x": pandas.Series([3, 4])}, "step", "norm").axes
    assert (axes.get_xlabel(), axes.get_ylabel(), len(axes.lines)) == ("step", "norm", 2)


def test_neighbouring_series_differ_without_colour():
    assert len(set(plots.MARKERS)) == len(plots.MARKERS) and len(set(plots.COLOURS)) == len(plots.COLOURS)


def test_bands_have_a_panel_for_each_quantity_and_no_band_of_one_run():
    frame = pandas.DataFrame({"mean": [0.5, 0.6], "std": [0.1, float("nan")]}, index=[5, 20])
    left, right = plots.bands({"accuracy": {"a": frame, "b": frame}, "loss": {"a": frame}}, "examples").axes
    assert (len(left.lines), len(right.lines)) == (2, 1) and left.get_ylabel() == "accuracy"
    assert right.get_xlabel() == "examples"
    low, high = (extreme(left.collections[0].get_paths()[0].vertices[:, 1]) for extreme in (min, max))
    assert (low, high) == pytest.approx((0.4, 0.6))


def test_bounds_are_dashed_beside_what_they_bound():
    frame = pandas.DataFrame({"measured": [1.0, 0.1], "bound": [1.0, 0.5]}, index=[0, 1])
    left, right = plots.bounds({"one": {"a": frame, "b": frame}, "other": {"a": frame}}, "step", "gap").axes
    assert (len(left.lines), len(right.lines), left.get_title(), left.get_yscale()) == (4, 2, "one", "log")
    measured, bound = left.lines[:2]
    assert measured.get_color() == bound.get_color()
    assert (measured.get_linestyle(), bound.get_linestyle()) == ("-", "--")
    assert list(bound.get_ydata()) == [1.0, 0.5]


def test_what_was_not_measured_is_a_dash_and_short_columns_stay_on_a_line():
    html = plots.table(
        [{"a": None, "b": "short", "c": "long enough to need two lines"}, {"a": 0.5, "b": "x", "c": "y"}]
    ).to_html()
    assert ">–<" in html and ">nan<" not in html and ">0.500<" in html
    assert html.count("white-space: nowrap") >= 1 and "white-space: normal" in html
    assert html.count("min-width: 7em") == 1 and "min-width: 18em" in plots.table([{"a": 90 * "x"}]).to_html()


def test_steps_are_whole_numbers():
    curve = pandas.Series([0.1, 0.2], index=[1, 2])
    (axes,) = plots.lines({"a": curve}, "outer step", "loss").axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    (axes,) = plots.lines({"a": curve.set_axis([0.1, 0.2])}, "rate", "loss").axes
    assert not all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_text_from_step_to_step_marks_what_changed_and_obeys_nothing():
    shown = plots.evolution({1: [" good", " <b>", "\n"], 2: [" bad", " <b>", "\n", "!"]})._repr_html_()
    first, second = shown.split("<tr><td>")[1:]
    assert "<mark" not in first and second.count("<mark") == 2 and "2 of 4" in second
    assert "> bad</mark>" in second and ">!</mark>" in second
    assert "<b>" not in shown and "&lt;b&gt;" in shown and "↵" in shown
    assert "color:inherit" in second and "border-bottom" in second  # legible on any ground, and in grey


def test_a_notebook_s_box_holds_question_answers_and_cost_and_obeys_none_of_them():
    asked = plots.InShort("Does it <b>hold</b>?", begun=time.perf_counter() - 12.6)
    html = asked.answered(["yes & no", "perhaps"])._repr_html_()
    assert "<em>Does it &lt;b&gt;hold&lt;/b&gt;?</em>" in html and "<p>yes &amp; no</p><p>perhaps</p>" in html
    assert "It took 13 s here" in html and html.count("<div") == html.count("</div>") == 1
    open_yet = asked._repr_html_()
    assert "<em>Does it &lt;b&gt;hold&lt;/b&gt;?</em>" in open_yet and "It took" not in open_yet
    assert "The answer stands here when the last cells have run." in open_yet
