"""The book: its pages and the notebooks keep in step, and every room of the package is in the API reference."""

import re
from pathlib import Path

import executing

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


def test_every_room_is_in_the_api_reference():
    listed = re.findall(
        r"^\.\. automodule:: gradmm\.([\w.]+)$", (BOOK / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    files = [
        path.relative_to(ROOT / "gradmm")
        for path in (ROOT / "gradmm").rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]
    rooms = sorted(".".join(path.with_suffix("").parts) for path in files)
    assert sorted(listed) == rooms, "each room needs an automodule in book/api.md"


def test_mathjax_and_its_fonts_are_here():
    held = BOOK / "_static" / "mathjax"
    assert (held / "tex-mml-chtml.js").stat().st_size > 1_000_000 and (held / "LICENSE").is_file()
    assert len(list((held / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))) == 23
