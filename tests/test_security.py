"""Nothing gets in: words of others are shown and not obeyed, and no name leaves the output folder."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from executing import ROOT, SMOKE, execute, forked_kernels, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_protocol import CONFIG, TWO, splits_of
from test_synthesis import REAL, SMALL, TASK

import gradmm
from gradmm import files, markup
from gradmm.errors import UserError
from gradmm.experiments import ablation, plots
from gradmm.experiments.protocol import compare
from gradmm.tasks import Task

EVIL = [
    "<script>alert(1)</script>", "`<script>alert(1)</script>`", "``` \n<script>alert(1)</script>\n```",
    "| a |\n\n<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1)) <javascript:alert(1)>",
    "\\`<script>alert(1)</script>\\`",
    "&lt;b&gt; <b>bold</b> *stars* _lines_ $x$ {role}`y`",
    "</td></tr></table><script>alert(1)</script>",
    "\u202e<script\u0000>alert(1)</script>",
]  # fmt: skip
TAGS = ("<script", "<img", "<b>", "<td><script", 'href="javascript', "onerror=alert(1)>")


def rendered(text: str) -> str:
    """Markdown as the book and JupyterLab render it: with HTML let through, tables on."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def obeyed(page: str) -> list[str]:
    return [tag for tag in TAGS if tag in page.lower()]


def test_the_check_sees_what_it_forbids():
    assert obeyed(rendered(EVIL[0])) and obeyed(rendered(f"| a |\n|---|\n| {EVIL[0]} |"))
    assert obeyed(rendered(f"`a` {EVIL[0]}`"))


# ---------------------------------------------------------------- words of others


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("show", [markup.literal, markup.code])
def test_words_of_others_are_shown_and_not_obeyed(text, show):
    for around in ("{}", "**{}**", "*{}* and {}", "# {}", "- {}", "| a | b |\n|---|---|\n| {} | {} |"):
        assert not obeyed(rendered(around.format(show(text), show(text))))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<script>", "`", "``", "\\", "\n", "|", "*", "_", "[", "](javascript:x)", "&lt;", " ", "a", "$"]
        ),
        max_size=12,
    ).map("".join)
)
def test_no_mixture_of_marks_breaks_out(text):
    page = rendered(
        f"see {markup.literal(text)} and {markup.code(text)} end\n\n| a |\n|---|\n| {markup.literal(text)} "
        f"{markup.code(text)} |"
    )
    assert not obeyed(page) and "<em>" not in page and "<strong>" not in page and "<a " not in page


def test_plain_words_look_as_they_did():
    assert (
        markup.literal("rotten_tomatoes by microsoft/phi-1_5, 3.5% (a + b)!")
        == "rotten_tomatoes by microsoft/phi-1_5, 3.5% (a + b)!"
    )
    assert markup.code("{text} it was") == "`{text} it was`" and markup.code("a\nb `c`") == "`` a\\nb `c` ``"


@pytest.mark.parametrize("text", EVIL)
def test_tables_show_tags(text):
    assert not obeyed(plots.table([{"text": text, "match_loss": 0.5}]).to_html())
    assert not obeyed(plots.table([{text: "as a column's name"}]).to_html())


@pytest.mark.parametrize("name", ["<script>", "a`b", "[x](y)", "two\nlines", "\u202eback", "nul\0"])
def test_a_name_that_could_be_obeyed_is_refused_or_made_plain(name, tmp_path):
    with pytest.raises(UserError, match="the task's name .* holds .*: give it a name without them"):
        Task(name, ("bad", "good"), (" bad", " great"))
    if "\0" not in name and "/" not in name:
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"text": f"words {n}", "label": n % 2} for n in range(40)]
        files.write_json_lines(folder / "train.jsonl", rows)
        splits = gradmm.load_data(folder, TWO)[1]
        assert (
            markup.check_name(splits.source, "the source") == markup.plain_name(name) == gradmm.load_task(folder).name
        )
        assert splits.train[0].origin.startswith(f"{splits.source}/train.jsonl, line ")
        assert rendered(f"**{splits.source}**") == f"<p><strong>{splits.source}</strong></p>\n"


def test_odd_names_of_folders_stay_readable():
    assert markup.plain_name("hotels [v2]") == "hotels (v2)" and markup.plain_name("<a>\n`b`") == "(a)_'b'"
    assert markup.plain_name("中文 (v2), 50% & more") == "中文 (v2), 50% & more"


def test_a_card_of_an_evil_task_is_harmless(tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    task = replace(
        TASK, labels=(EVIL[0], EVIL[3]), template="<b>` {text} it was", generation_prompts=(EVIL[1], "a | b")
    )
    rows = [{**row, "label": row["label"]} for row in REAL]
    with pytest.warns(UserWarning, match="a token of the model's own markup, which no text may hold"):
        gradmm.synthesize(model, task, gradmm.release(model, task, rows, space="head"), SMALL, tmp_path, progress=False)
    page = rendered((tmp_path / "README.md").read_text().split("---\n", 2)[2])
    assert not obeyed(page) and page.count("<table>") == 2


def evil_data(folder: Path) -> Path:
    """The demo's rows with tags among the words, and a task whose labels, template and prompts hold tags."""
    task, splits = gradmm.load_data("demo")
    draw = random.Random(0)
    for split in ("train", "validation", "test"):
        some = getattr(splits, split)[:40]
        rows = [{"text": f"{draw.choice(EVIL)} {example.text}"[:90], "label": example.label} for example in some]
        files.write_json_lines(folder / f"{split}.jsonl", rows)
    evil = {
        "labels": [EVIL[0], EVIL[3]],
        "verbalizers": list(task.verbalizers),
        "template": "{text} `<script>alert(2)</script>\n" + task.template.removeprefix("{text}").strip(),
    }
    files.write_json(
        folder / "task.yaml", {**evil, "generation_prompts": list(task.generation_prompts)}
    )  # JSON is YAML
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00-quickstart", "02-synthesis"])
def test_an_executed_notebook_shows_tags_of_the_data(name, tmp_path, shared_folder):
    preset = files.read_yaml(SMOKE / f"{name}.yaml") | {"data": str(evil_data(tmp_path / "data"))}
    with quiet(tmp_path), forked_kernels(shared_folder):
        executed = execute(ROOT / "notebooks" / f"{name}.ipynb", preset, tmp_path)
    shown = [output["data"] for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]
    pages = [data["text/html"] for data in shown if "text/html" in data] + [
        rendered(data["text/markdown"]) for data in shown if "text/markdown" in data
    ]
    assert len(pages) >= 3 and not [found for page in pages if (found := obeyed(page))]
    assert [page for page in pages if "&lt;script&gt;" in page]


# ---------------------------------------------------------------- paths


def outside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"run"}


def test_no_setting_or_name_writes_outside_the_output_folder(tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    task = replace(TASK, name="../../task", labels=("../../bad", "/good"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    release, other = gradmm.release(model, task, REAL, space="head"), tmp_path / "a" / "b" / "run2"
    gradmm.synthesize(model, task, release, SMALL, tmp_path / "a" / "b" / "run", progress=False)
    asked = (model, TWO, splits_of(TWO), CONFIG)
    for act in (
        lambda: compare(*asked, ("../none",), (0,), other, progress=False),
        lambda: compare(*asked, ("none",), ("../../0",), other, progress=False),
        lambda: ablation.vary(*asked, {"space": ["../../../x"]}, (0,), other, progress=False),
        lambda: ablation.vary(*asked, {"init": ["../../../x"]}, (0,), other, progress=False),
    ):
        with pytest.raises(UserError):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run"]
