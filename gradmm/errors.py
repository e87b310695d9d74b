"""The one error that a user's input can cause; its message is one sentence that names the value, the limit and the mend."""

import reprlib
import sys


class UserError(ValueError):
    """Raised where the caller's input cannot be used; nothing has been written or spent when it is raised."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the sentence, since the fault is not in the code."""
        return [f"UserError: {self}"]


class DataWarning(UserWarning):
    """Says once what was left out or moved when data was loaded, and where."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def shown(value) -> str:
    """A value as an error names it: its repr, cut short (input may be huge)."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


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
