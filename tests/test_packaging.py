"""What a fresh machine relies on: dependencies, the wheel's contents, the commands that the README promises."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gradmm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def distributions_imported(folder: str, without: str = "") -> set[str]:
    """The installed distributions behind a folder's imports, the standard library and local files left out."""
    modules = set()
    for path in (path for path in (ROOT / folder).rglob("*.py") if path.stem != without):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    local = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"gradmm"}
    known = importlib.metadata.packages_distributions()
    return {
        canonicalize_name(known.get(module, [module])[0]) for module in modules - local - set(sys.stdlib_module_names)
    }


def test_every_import_is_declared():
    everywhere = names(PROJECT["dependencies"])
    notebooks, lora = (names(PROJECT["optional-dependencies"][extra]) for extra in ("notebooks", "lora"))
    assert distributions_imported("gradmm") <= everywhere | notebooks | lora
    assert distributions_imported("gradmm", "batch") <= everywhere | lora  # `batch` alone needs the notebooks' extra
    assert distributions_imported("gradmm", "training") <= everywhere | notebooks  # `training` alone the other


def test_the_tests_need_nothing_undeclared():
    extras = PROJECT["optional-dependencies"]
    assert distributions_imported("tests") <= names(
        PROJECT["dependencies"] + extras["notebooks"] + extras["distributed"] + extras["test"]
    )


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])])
def test_a_dependency_is_bounded_and_what_is_installed_fits(line):
    requirement = Requirement(line)
    if requirement.name == "gradmm":
        return
    assert any(bound.operator in {"<", "=="} for bound in requirement.specifier)
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{requirement.name} belongs to an extra that is not installed")
    assert requirement.specifier.contains(installed)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == citation["version"] == importlib.metadata.version("gradmm")
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


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(tmp_path):
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    source = tmp_path / "source"
    for name in tracked:
        if name.startswith("gradmm/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked if name.startswith("gradmm/")}


def test_every_name_comes_from_its_room_and_only_what_is_asked_for_is_imported():
    rooms = {room: importlib.import_module(f"gradmm.{room}") for room in gradmm._ROOMS}
    assert all(
        getattr(gradmm, name) is getattr(rooms[room], name) for room, names in gradmm._ROOMS.items() for name in names
    )
    with pytest.raises(AttributeError, match="'gradmm' has no attribute 'syntesize'"):
        _ = gradmm.syntesize
    assert set(gradmm.__all__) <= set(dir(gradmm))
    tree = ast.parse(Path(gradmm.__file__).read_text(encoding="utf-8"))
    shown = {
        node.module.removeprefix("gradmm."): {alias.name for alias in node.names}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert {room: names for room, names in shown.items() if room not in ("importlib", "typing")} == {
        room: set(names) for room, names in gradmm._ROOMS.items()
    }
    code = "import sys, gradmm.experiments.batch; print(not {'transformers', 'datasets', 'sklearn'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "True\n"
    )


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
