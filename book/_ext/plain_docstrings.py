"""Lets sphinx read docstrings that are written to be read as they stand: indented formulas and bare `*`, `|` and `_`.

Backticks hold code and are left alone (`default_role` is code). A block that is indented under no section of its own is
a formula or a listing and becomes a literal block. Examples with `>>>` are left alone, too. Settings that are the
default of an argument stand as a call without their own values, which are on the page of their class.
"""

import re

SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields):$")
SETTINGS = re.compile(r"\b([A-Z]\w+)\(\w+=(?:[^()]|\([^()]*\))+\)")
SPECIAL = re.compile(r"(`[^`]*`)|(\*+|\|+|(?<=\w)_(?!\w))")


def escape(line: str) -> str:
    """The line with what is markup outside backticks made plain."""
    return SPECIAL.sub(lambda found: found[1] or "".join("\\" + sign for sign in found[2]), line)


def plain(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText that says the same."""
    written, literal, section = [], False, False
    for place, line in enumerate(lines):
        indented, after_blank = line.startswith("    "), place > 0 and not lines[place - 1].strip()
        if line.strip() and not indented:
            literal, section = False, bool(SECTION.match(line))
        elif indented and after_blank and not (section or literal):
            literal = True
            written += ["::", ""]
        written.append(line if literal or line.lstrip().startswith((">>>", "...")) else escape(line))
    return written


def rewrite(app, what, name, obj, options, lines) -> None:
    """Sphinx's hook; a colon in a property's first line would name a type to napoleon."""
    lines[:] = plain(lines)
    if what == "property" and lines:
        lines[0] = lines[0].replace(": ", " – ")


def shorten(app, what, name, obj, options, signature, annotation) -> tuple[str | None, str | None]:
    """Sphinx's hook for the arguments of a function or a class."""
    return signature and SETTINGS.sub(r"\1()", signature), annotation


def setup(app):
    """Work on the lines before napoleon does."""
    app.connect("autodoc-process-docstring", rewrite, priority=100)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}
