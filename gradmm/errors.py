"""The one error that a user's input can cause; its message is one sentence that names the value, the limit and the mend."""


class UserError(ValueError):
    """Raised where the caller's input cannot be used; nothing has been written or spent when it is raised."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
