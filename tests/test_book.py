"""The book: its pages and the notebooks keep in step, and every room of the package is in the API reference."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import executing
import nbformat
import pandas

from gradmm.experiments import plots
from gradmm.experiments.metrics import MEASURES

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"


def test_the_table_of_contents_lists_every_notebook_in_order():
    listed = [page.removeprefix("book/executed/") for page in executing.pages() if page.startswith("book/executed/")]
    stored = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert listed == stored, "each notebook needs a line `- file: book/executed/NAME` in book/_toc.yml"


def test_every_other_page_exists():
    assert not [
        page
        for page in executing.pages()
        if not page.startswith("book/executed/") and not (ROOT / f"{page}.md").is_file()
    ]


def test_every_written_page_is_listed():
    written = {f"book/{path.stem}" for path in BOOK.glob("*.md")}
    assert written <= set(executing.pages()) and len(executing.pages()) == len(set(executing.pages()))


def source_of(page: str) -> str:
    """The Markdown of a page; of a notebook the cells' sources."""
    if not page.startswith("book/executed/"):
        return (ROOT / f"{page}.md").read_text(encoding="utf-8")
    cells = nbformat.read(ROOT / "notebooks" / f"{Path(page).name}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def labels_of_the_book() -> dict[str, str]:
    """Each label that a `{ref}` can name, `(label)=` before a heading -> its page."""
    found: dict[str, str] = {}
    for page in executing.pages():
        found |= dict.fromkeys(re.findall(r"^\(([\w-]+)\)=$", source_of(page), re.MULTILINE), page)
    return found


def references(text: str) -> set[str]:
    """The labels that the `{ref}`s of a page name."""
    return set(re.findall(r"\{ref\}`[^`<]*<([\w-]+)>`", text))


def test_a_link_into_a_page_names_a_label():
    """A link to a heading by its words, `page.md#words`, fails only when the book is built; a label is found here."""
    labels = labels_of_the_book()
    for page in executing.pages():
        text = source_of(page)
        assert not re.findall(r"\]\((?!https?:)[^)\s]*#[^)\s]*\)", text), f"{page}: use {{ref}}`words <label>`"
        assert references(text) <= labels.keys(), page


def clicked(page: str) -> set[str]:
    """The pages to which links in a page's own text lead; the menu beside it is not counted."""
    text, labels = source_of(page), labels_of_the_book()
    links = {re.sub(r"\.(md|ipynb)$", "", link) for link in re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))\)", text)}
    links = {(Path(page).parent / link).as_posix().replace("book/../", "") for link in links}
    return links | {labels[name] for name in references(text)}


SOUGHT = {
    "a result": r"^```\{results-figure\}",
    "a command for one's data": r"^gradmm synthesize .*--data ",
    "a warning": r"^## When not to use this",
    "a formula": r"^\$\$$",
    "the code of a formula": r"^```\{source\} gradmm\.",
}


def test_a_first_time_reader_finds_what_he_seeks_in_two_clicks():
    """By links in the text of the first page, and of the pages that it leads to."""
    first = clicked("book/intro")
    near = {"book/intro", *first, *(page for one in first for page in clicked(one))}
    assert near <= set(executing.pages())
    texts = [source_of(page) for page in near]
    assert not [what for what, mark in SOUGHT.items() if not any(re.search(mark, text, re.MULTILINE) for text in texts)]


def test_a_formula_s_code_is_that_of_the_package(extension):
    named = re.findall(r"^```\{source\} (\S+)$", source_of("book/notation"), re.MULTILINE)
    for name in named:
        room, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(room), function))
    directive = mock.Mock(arguments=["gradmm.gradients.combine"])
    (shown,) = extension("sources").Source.run(directive)
    assert shown["language"] == "python" and shown.astext().startswith("def combine(inners")
    directive.env.note_dependency.assert_called_once_with(str(ROOT / "gradmm" / "gradients.py"))
    assert len(named) == 3


def test_the_measures_of_a_set_are_explained():
    glossary = (BOOK / "glossary.md").read_text(encoding="utf-8")
    assert not [name for name in MEASURES if not re.search(rf"\b{name}\b", glossary)]
    assert not [
        name for name in ("flawed", "unfinished") if f"*{name}*" not in source_of("book/executed/03-finetuning")
    ]


def test_the_glossary_is_in_order():
    terms = re.findall(r"^([^\s`#].*)\n  ", (BOOK / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 30 and terms == sorted(terms, key=str.casefold)


def test_a_figure_of_several_panels_is_marked_for_narrow_screens(extension, tmp_path):
    curve = pandas.DataFrame({"mean": [1.0, 2.0], "std": [0.0, 0.0]})
    for name, panels in (("one.png", 1), ("two.png", 2)):
        plots.bands({str(number): {"a": curve} for number in range(panels)}, "step").savefig(tmp_path / name)
    images = {name: name for name in ("one.png", "two.png")}
    app = SimpleNamespace(srcdir=tmp_path, builder=SimpleNamespace(images=images))
    body = '<img alt="" src="../_images/one.png" /><img alt="" src="../_images/two.png" />'
    marked = extension("pages").mark_wide(app, body)
    assert marked == '<img alt="" src="../_images/one.png" /><img data-wide alt="" src="../_images/two.png" />'


def test_markup_in_a_docstring_is_shown_and_examples_are_left_alone(extension):
    lines = ["p * q of `a * b`.", "", "    n | m", "", "Raises:", "    UserError: **x", ">>> f(**some)", "... * 2"]
    found = extension("plain_docstrings").plain(lines)
    assert found[:2] == ["p \\* q of `a * b`.", ""] and found[2:5] == ["::", "", "    n | m"]
    assert found[-3:] == ["    UserError: \\*\\*x", ">>> f(**some)", "... * 2"]


def test_settings_as_a_default_are_a_call_without_their_values(extension):
    given = "(n=50, config=FinetuneConfig(steps=60, learning_rates=(5e-05, 0.0002)), path=Path('a'))"
    found, _ = extension("plain_docstrings").shorten(None, "class", "", None, None, given, None)
    assert found == "(n=50, config=FinetuneConfig(), path=Path('a'))"


def test_every_room_is_in_the_api_reference():
    texts = [path.read_text(encoding="utf-8") for path in (BOOK / "api").glob("*.md")]
    listed = [
        name for text in texts for name in re.findall(r"^\.\. automodule:: gradmm\.([\w.]+)$", text, re.MULTILINE)
    ]
    files = [
        path.relative_to(ROOT / "gradmm")
        for path in (ROOT / "gradmm").rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]
    rooms = sorted(".".join(path.with_suffix("").parts) for path in files)
    assert sorted(listed) == rooms, "each room needs an automodule on a page in book/api"


def test_mathjax_and_its_fonts_are_here():
    held = BOOK / "_static" / "mathjax"
    assert (held / "tex-mml-chtml.js").stat().st_size > 1_000_000 and (held / "LICENSE").is_file()
    assert len(list((held / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))) == 23
