"""The shape of the repository: who imports whom, what code may never do, and how notebooks are stored."""

import ast
import itertools
import re
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradmm"
# Each room may import those before it, and no other: the method knows nothing of the experiments.
METHOD = """
    errors progress markup readability vocabulary seeds device files sharding admm card runs gradients rows tasks data
    models decoding projection generation classification spaces matching mechanism evaluation selection initialisation
    config privacy training finetuning plan searches synthesis
""".split()
EXPERIMENTS = """
    records theory seed_run metrics audit baselines results protocol ablation demo plots paper roofline
    performance reference batch
""".split()
ORDER = [*METHOD, *(f"experiments/{room}" for room in EXPERIMENTS), "commands", "cli", "__main__"]
# Functions of more than 40 lines or 8 arguments that are still there.
LARGE = {("finetuning", "finetune")}  # three sets, a place to keep, and who sees the looks
ROOMS = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LANGUAGE = {"transformers", "tokenizers", "datasets"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# To share work between a process and its own workers, never to read or write a file.
PARALLEL = {"experiments/batch": {"joblib"}, "experiments/protocol": {"pickle"}}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "joblib.load", "joblib.dump", "pandas.read_pickle",
    "pd.read_pickle", "pickle.load", "pickle.dump", "yaml.load", "os.system",
}  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.:/~$}<-])/(?:work|root|home|Users|tmp)/[\w.]|\b[A-Z]:\\Users\\")


def parse(room: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Every module that a file names in an import, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["gradmm" if node.level else "", node.module]))
            inside = base in ("gradmm", "gradmm.experiments")
            found |= {f"{base}.{alias.name}" for alias in node.names} if inside else {base}
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; empty for anything else, such as a call's result."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def room_of(module: str) -> str:
    """`gradmm.experiments.plots` and `gradmm.admm.step` -> `experiments/plots` and `admm`."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2] if parts[:1] == ["experiments"] else parts[:1])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above(room):
    assert room in ORDER, f"gradmm/{room}.py has no place in the order of rooms: merge it into one, or give it a place"
    above = {room_of(name) for name in imported(parse(room)) if name.split(".")[0] == "gradmm"}
    assert above - {"__version__"} <= set(ORDER[: ORDER.index(room)])


def test_the_front_door_opens_on_the_method_alone():
    assert {room_of(name) for name in imported(parse("__init__")) if name.startswith("gradmm.")} <= set(METHOD)


def functions(room: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(parse(room)) if isinstance(node, ast.FunctionDef)}


def lines_of(function: ast.FunctionDef) -> int:
    """How many lines a function has, its docstring aside."""
    first = function.body[0]
    said = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - said


@pytest.mark.parametrize("room", ROOMS)
def test_a_function_is_short_and_takes_few_arguments(room):
    found = {name: node for name, node in functions(room).items() if (room, name) not in LARGE}
    assert not [name for name, node in found.items() if lines_of(node) > 40]
    assert not [name for name, node in found.items() if len(node.args.args) + len(node.args.kwonlyargs) > 8]


@pytest.mark.parametrize("room", ["admm", "errors", "files", "gradients", "runs", "seeds"])
def test_the_mathematics_knows_no_language_model(room):
    assert not {name.split(".")[0] for name in imported(parse(room))} & LANGUAGE


@pytest.mark.parametrize("room", [*ROOMS, "__init__", "experiments/__init__"])
def test_no_room_runs_data_as_code_or_prints(room):
    tree = parse(room)
    assert not {name.split(".")[0] for name in imported(tree)} & UNSAFE_MODULES - PARALLEL.get(room, set())
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & (UNSAFE_CALLS | {"print"})


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_of_a_room_is_given_twice(room):
    names = []
    for node in parse(room).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    assert sorted(names) == sorted(set(names))


def private(tree: ast.AST) -> set[str]:
    """The names with one underscore that a file defines, its methods and attributes of `self` too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            found.add(dotted(node).removeprefix("self."))
    return {name for name in found if re.fullmatch(r"_[^\W_]\w*(?<!_)", name)}


def test_no_test_reaches_for_a_private_name_of_the_package():
    """As an attribute, in an import, or as a text such as `monkeypatch.setattr` takes."""
    hidden = set().union(*(private(parse(room)) for room in [*ROOMS, "__init__", "experiments/__init__"]))
    reached = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "name", getattr(node, "value", None)))
            if not isinstance(node, ast.Attribute | ast.alias | ast.Constant) or not isinstance(name, str):
                continue
            own = "." not in name or name.startswith("gradmm.")
            if own and name.rpartition(".")[2] in hidden and not ast.unparse(node).startswith("self."):
                reached.append(f"{path.name}: {name}")
    assert not reached and len(hidden) > 100


@pytest.mark.parametrize("room", [*ROOMS, "__init__", "experiments/__init__"])
def test_trust_is_never_switched_on(room):
    keywords = [node for node in ast.walk(parse(room)) if isinstance(node, ast.keyword)]
    unsafe = [k for k in keywords if k.arg in {"trust_remote_code", "allow_pickle", "shell"}]
    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in unsafe)


def test_the_checks_see_what_they_forbid():
    tree = ast.parse(
        "def f():\n    from gradmm.experiments import plots\n    import pickle\n    model.eval()\n    return eval('1')"
    )
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert imported(tree) == {"gradmm.experiments.plots", "pickle"}
    assert calls == {"model.eval", "eval"}
    assert MACHINE_PATH.search("open('" + "/".join(["", "home", "someone", "x"]) + "')")
    assert not MACHINE_PATH.search("https://example.org/home/page and ./work/x")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_path_of_one_machine(tracked):
    found = {}
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if match := MACHINE_PATH.search(text):
            found[path.name] = text[match.start() : match.start() + 60]
    assert not found


def test_no_tracked_file_is_a_pickle_or_larger_than_needed(tracked):
    assert not [path for path in tracked if path.suffix in {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt"}]
    assert not [path for path in tracked if path.stat().st_size > 40_000_000]


def parse_cell(cell) -> ast.Module:
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    functions = [node for cell in code for node in ast.walk(parse_cell(cell)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 10]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_takes_the_name_of_a_function_or_a_module_for_a_value(path):
    """A later cell that calls it would fail, and only where that cell is reached."""
    nodes = [node for cell in code_cells(path) for node in ast.walk(parse_cell(cell))]
    called = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    called |= {(name.asname or name.name).split(".")[0] for node in nodes
               if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}  # fmt: skip
    assert not called & {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_code_fits_a_page(path):
    """At most 100 columns, and 20 lines a cell; the parameters are one cell however many there are."""
    cells = code_cells(path)
    assert not [line for cell in cells for line in cell.source.splitlines() if len(line) > 100]
    long = [cell for cell in cells if len(cell.source.splitlines()) > 20]
    assert not [cell.id for cell in long if "parameters" not in tags(cell)]


def is_plumbing(cell) -> bool:
    """Whether a cell imports, claims a folder, ends in a computed sentence, or writes the results."""
    body = parse_cell(cell).body
    return (
        any(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
        or ast.unparse(body[-1]).startswith("display(Markdown(")
        or any(call in cell.source for call in ("output_folder(", "files.write_json("))
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_plumbing_is_hidden_and_what_draws_is_shown(path):
    cells = [cell for cell in code_cells(path) if "parameters" not in tags(cell)]
    assert not [cell.id for cell in cells if is_plumbing(cell) and tags(cell) != ["hide-input"]]
    assert not [cell.id for cell in cells if "figure = " in cell.source and tags(cell)]


@pytest.mark.parametrize("path, following", list(itertools.pairwise(NOTEBOOKS)), ids=lambda path: path.stem)
def test_a_notebook_ends_with_a_link_to_the_next(path, following):
    last = nbformat.read(path, as_version=4).cells[-1]
    assert last.cell_type == "markdown" and f"[{following.stem}]({following.name})" in last.source


def kinds(cells) -> str:
    """A letter a cell: T draws a table, F a figure, M is prose; other code is left out, and B does two of them."""
    marks = []
    for cell in cells:
        found = [mark for mark, call in (("F", "figure = "), ("T", "plots.table(")) if call in cell.source]
        marks.append("M" if cell.cell_type == "markdown" else "B" if len(found) > 1 else "".join(found))
    return "".join(marks)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_shows_one_thing_and_figures_stand_before_tables(path):
    """Between two pieces of prose, that is: a new thought may begin with a table."""
    shown = kinds(nbformat.read(path, as_version=4).cells)
    assert "B" not in shown and not [part for part in shown.split("M") if "TF" in part]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_in_short_under_its_title_what_it_found(path):
    """The box is the first thing after the title; a cell at the end fills it."""
    title, box, introduction = nbformat.read(path, as_version=4).cells[:3]
    assert re.fullmatch("# .+", title.source) and introduction.cell_type == "markdown"
    assert tags(box) == ["hide-input"] and re.search(r'in_short = plots\.InShort\("[^"]+\?"\)', box.source)
    assert box.source.endswith("box_of_answers = display(in_short, display_id=True)")
    (answer,) = (cell for cell in code_cells(path) if "in_short.answered(" in cell.source)
    assert tags(answer) == ["hide-input"] and parse_cell(answer).body[-1].value.func.attr == "update"
