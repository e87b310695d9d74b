"""Mutation testing: which changes of the code does no test notice, and why may they stay?

    make mutants      changes the files that pyproject.toml names in every way that mutmut knows, one change at a time,
                      and runs the tests that reach it; then this file prints the changes that stayed unnoticed without
                      a reason

`mutants.toml` holds the reasons. A change is named by its function and by the line as it is after the change, or
as `- line` where the change only takes the line out.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

NOTICED = ("killed", "timeout", "caught by type check")


def unnoticed() -> dict[tuple[str, str], str]:
    """(function, changed line) of every mutant that no test noticed -> its name."""
    rows = (line.split(": ") for line in _mutmut("results").splitlines() if ": " in line)
    names = [name.strip() for name, state in rows if state not in NOTICED]
    return {(function_of(name), _changed_line(name)): name for name in names}


def explained(path: Path) -> set[tuple[str, str]]:
    """(function, changed line) of every mutant that has a reason."""
    reasons = tomllib.loads(path.read_text(encoding="utf-8"))["reason"]
    return {(function, line) for reason in reasons for function, lines in reason["changes"].items() for line in lines}


def function_of(name: str) -> str:
    """`gradmm.admm.x__finish__mutmut_6` -> `admm._finish`; of a method `gradients.Space.factors`."""
    module, _, rest = name.removeprefix("gradmm.").partition(".x")
    own = rest.rpartition("__mutmut_")[0]
    return f"{module}.{own.strip('ǁ').replace('ǁ', '.') if own.startswith('ǁ') else own.removeprefix('_')}"


def _changed_line(name: str) -> str:
    return change(_mutmut("show", name))


def change(diff: str) -> str:
    """The line that a mutant's diff adds, or `- line` for what it only takes out."""
    own = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    there, gone = ([line[1:].strip() for line in own if line[0] == sign] for sign in "+-")
    added = [line for line in there if line not in gone]  # not the bracket that only moved
    return " ".join(added) or " ".join(["-", *(line for line in gone if line not in there)])


def _mutmut(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-P", "-m", "mutmut", *arguments], capture_output=True, text=True, check=True
    ).stdout


def main() -> int:
    """0 if every unnoticed change has a reason and every reason a change."""
    found, reasons = unnoticed(), explained(Path(__file__).with_name("mutants.toml"))
    for key in sorted(set(found) - reasons):
        print(f"no test notices, and no reason is given: {found[key]}\n    {key[0]}: {key[1]}")
    for function, line in sorted(reasons - set(found)):
        print(f"a reason for a change that a test notices or that does not exist\n    {function}: {line}")
    print(f"{len(found)} changes stay unnoticed, {len(set(found) & reasons)} of them with a reason")
    return int(set(found) != reasons)


if __name__ == "__main__":
    sys.exit(main())
