"""The one error that a user's input can cause; its message is one sentence that names the value, the limit and the mend."""

import difflib
import reprlib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Raised where the caller's input cannot be used; nothing has been written or spent when it is raised."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the sentence, since the fault is not in the code."""
        return [f"UserError: {self}"]


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def shown(value) -> str:
    """A value as an error names it: its repr, cut short (input may be huge)."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


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
    """Whether a value is a finite number of the size of a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
