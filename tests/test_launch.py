"""Launch buttons: none without a repository, on the stored notebook with one, refused where they lead elsewhere."""

import re

import executing
import pytest
import yaml

URL, SERVICES = (
    "https://github.com/someone/copy",
    {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
)
PAGE = executing.NOTEBOOKS[-1]  # the one that links to no other notebook: a book of two pages has none
needs_jupyter_book = pytest.mark.skipif(not executing.can_build(), reason="jupyter-book is not installed")


def small_book(root, **settings) -> str:
    """The notebook's page in a book of two pages, with these settings added to the book's own."""
    executing.stage(root, [PAGE])
    book, name = root / "book", PAGE.stem
    (book / "start.md").write_text("# Start\n", encoding="utf-8")
    toc = {"format": "jb-book", "root": "book/start", "chapters": [{"file": f"book/executed/{name}"}]}
    (book / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    config = yaml.safe_load((book / "_config.yml").read_text(encoding="utf-8"))
    (book / "_config.yml").write_text(yaml.safe_dump({**config, **settings}), encoding="utf-8")
    return (executing.build(root) / "book" / "executed" / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_jupyter_book
def test_with_a_repository_the_buttons_open_the_stored_notebook(tmp_path):
    text = small_book(
        tmp_path,
        repository={"url": URL, "branch": "main"},
        launch_buttons={**SERVICES, "notebook_interface": "jupyterlab"},
    )
    name = PAGE.name
    links = set(re.findall(r'href="(https://(?:mybinder|colab)[^"]*)"', text))
    assert links == {
        f"https://mybinder.org/v2/gh/someone/copy/main?urlpath=lab/tree/notebooks/{name}",
        f"https://colab.research.google.com/github/someone/copy/blob/main/notebooks/{name}",
    }


@pytest.mark.slow
@needs_jupyter_book
def test_without_a_repository_a_page_says_how_to_run_it_and_names_no_service(tmp_path):
    text = small_book(tmp_path)
    assert not re.findall(r"mybinder|colab\.|unpkg|sphinx-thebe", text)
    assert 'id="run-it-yourself"' in text and f"papermill notebooks/{PAGE.name}" in text
    assert f'download href="../../_sources/book/executed/{PAGE.name}"' in text


@pytest.mark.slow
@needs_jupyter_book
def test_buttons_without_a_repository_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="launch_buttons has binderhub_url, colab_url, but no repository is known"):
        small_book(tmp_path, launch_buttons=SERVICES)


def test_the_documented_lines_are_the_ones_that_work():
    text = (executing.ROOT / "book" / "reproduce.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "launch_buttons" in part)
    given = yaml.safe_load(block)
    assert set(given) == {"repository", "launch_buttons"} and set(given["repository"]) == {"url", "branch"}
    assert SERVICES.items() <= given["launch_buttons"].items()
