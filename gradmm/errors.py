"""The one error that a user's input can cause: one sentence that names the value, the limit and the mend."""

import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_type_hints


class UserError(ValueError):
    """Raised where the input, the machine or the disk stops the work; what was finished or charged before stays."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the sentence, since the fault is not in the code."""
        return [f"UserError: {self}"]


class DataWarning(UserWarning):
    """Says once what was left out or moved when data was loaded, and where."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def short_repr(value) -> str:
    """A value as an error names it: its repr in one line, cut short (input may be huge)."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return " ".join(short.repr(value).splitlines())


def short_json(value) -> str:
    """A value as it stands in a file, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return f"of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the close matches, whatever their case, or else all names.

    >>> near("ADMM", ["pool", "admm"], "use one of"), near("x", ["pool", "admm"], "use one of")
    ('did you mean admm?', 'use one of pool, admm')
    """
    known = list(known)
    by_lower = {one.lower(): one for one in known}
    found = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    return f"did you mean {' or '.join(found)}?" if found else f"{otherwise} {', '.join(known) or 'none'}"


def is_number(value) -> bool:
    """Whether a value is a finite number of the size of a float, numpy's included; true and false are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value) -> bool:
    """Whether a value is a whole number, numpy's included; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_type(value, kinds: type | UnionType, name: str, mend: str) -> None:
    """Raise unless a value is of one of these types; the error names its type alone, as a value may hold real text."""
    require(isinstance(value, kinds), f"{name} is of type {type(value).__name__}: {mend}")


def require_whole(value, name: str, least: int | None = None) -> int:
    """Raise unless a value is a whole number of at least `least`, which is returned as Python's own."""
    bound = "" if least is None else f" of at least {least}"
    require(
        is_whole(value) and (least is None or value >= least),
        f"{name} = {short_repr(value)}, it must be a whole number{bound}: give such as {0 if least is None else least}",
    )
    return int(value)


def require_texts(values, name: str) -> list[str]:
    """Raise for one text alone and for something that is no text; texts are returned as a list. No text is shown."""
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    require(several, f"{name} are of type {type(values).__name__}: give a list of texts")
    texts = list(values)
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    require(not wrong, f"{name} hold something of type {', '.join(wrong[:1])}: give a list of texts")
    return texts


def require_flag(value, name: str) -> None:
    """Raise unless a value is True or False."""
    require(isinstance(value, bool), f"{name} = {short_repr(value)}, it must be True or False: give one of them")


# ---------------------------------------------------------------- settings


class Rule(NamedTuple):
    """What the value of a setting must be: a test, and what an error says of a {name} whose {value} fails it."""

    holds: Callable[[Any], bool]
    says: str


WHOLE = Rule(is_whole, "{name} = {value}, it must be a whole number: give such as 0")
COUNT = Rule(
    lambda value: is_whole(value) and value >= 1,
    "{name} = {value}, it must be a whole number of at least 1: give such as 1",
)
FLAG = Rule(lambda value: isinstance(value, bool), "{name} = {value}, it must be True or False: give one of them")


def above_zero(such: float) -> Rule:
    """The rule of a number that must not be 0 or less."""
    says = f"{{name}} = {{value}}, it must be a finite number above 0: give such as {such}"
    return Rule(lambda value: is_number(value) and value > 0, says)


def at_least(least: float) -> Rule:
    """The rule of a number with a lower bound."""
    says = f"{{name}} = {{value}}, it must be at least {least}: give such as {least}"
    return Rule(lambda value: is_number(value) and value >= least, says)


def one_of(known: Iterable[str]) -> Rule:
    """The rule of a name."""
    known = tuple(known)
    says = f"the {{name}} {{value}} is not known: use one of {', '.join(known)}"
    return Rule(lambda value: isinstance(value, str) and value in known, says)


def check_values(values: Mapping[str, Any], rules: Mapping[str, Rule], place: str = "") -> None:
    """Raise for the first value that breaks the rule of its name; the error begins with `place`."""
    for name, value in values.items():
        if name in rules and not rules[name].holds(value):
            raise UserError(place + rules[name].says.format(name=name, value=short_repr(value)))


def check_settings(settings: Any, rules: Mapping[str, Rule], place: str = "") -> None:
    """Raise for a setting of a frozen dataclass that breaks its rule; one whose type holds None may be None."""
    plain_fields(settings)
    given = {item.name: getattr(settings, item.name) for item in fields(settings)}
    kinds = get_type_hints(type(settings))  # not the fields' own types, from which HfArgumentParser takes the None
    unset = {name for name, value in given.items() if value is None and NoneType in get_args(kinds[name])}
    check_values({name: value for name, value in given.items() if name not in unset}, rules, place)


def plain_fields(settings: Any) -> None:
    """Make Python's own of the numpy numbers in a frozen dataclass, so that equal settings are equal files."""
    for item in fields(settings):
        value = getattr(settings, item.name, None)
        if type(value).__module__ == "numpy" and isinstance(value, Real):
            object.__setattr__(settings, item.name, int(value) if isinstance(value, Integral) else float(value))


def require_settings(kind: type, names: Iterable) -> None:
    """Raise unless every name is a setting of a dataclass."""
    known = {item.name for item in fields(kind)}
    unknown = sorted(map(short_repr, set(names) - known))
    require(not unknown, f"unknown setting {', '.join(unknown)}: the settings are {', '.join(sorted(known))}")
